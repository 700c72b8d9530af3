"""The model folder that a name means, made first where the program brings its checkpoint along."""

from pathlib import Path

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.store.locations import TINY, folder_for, resolve_model, tiny_checkpoint
from moss_jt.store.model_folder import MANIFEST, open_store


def model_folder(model: str | Path | None) -> Path:
    """The model folder that a command's MODEL means; moss-tiny, which comes with the program, is converted if need be.

    Raises:
        MossError: there is no such model; the message says how to get one.
    """
    if model == TINY and not Path(TINY).is_dir():
        folder = folder_for(TINY)
        if not (folder / MANIFEST).exists():
            checkpoint = open_local(tiny_checkpoint())
            convert(checkpoint, recipe_for(checkpoint), folder)
        return folder
    folder = resolve_model(model)
    if model is None:
        _check_unnamed(folder)
    return folder


def _check_unnamed(folder: Path) -> None:
    """Raises MossError where the model that is taken because none was named is damaged: nobody has asked for that one."""
    try:
        open_store(folder)
    except MossError as error:
        raise MossError(
            f"{error} No model was named, and this one was taken: the one used last, or the only one. Name another; "
            "moss-jt list shows them."
        ) from error
