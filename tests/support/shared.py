"""Where others' data lie that tests may read and the project must not contain."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def shared(name: str) -> Path:
    """``../shared/NAME`` beside the project, or a skip that says what is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(
            f"{name} is not there: these tests read data that the project may not contain (../shared/{name})"
        )
    return path
