"""MOSS in little memory, with Jittor. Importing this package imports no Jittor."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jt.moss import Moss

__all__ = ["Moss"]


def __getattr__(name: str) -> Any:
    """``from moss_jt import Moss`` imports the model's modules when it is asked for."""
    if name == "Moss":
        from moss_jt.moss import Moss

        return Moss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
