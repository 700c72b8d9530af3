"""Where model folders live, and which one a name means."""

import json
import os
import sys
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.store.files import write_json
from moss_jt.store.manifest import MANIFEST
from moss_jt.user_folders import own_folder

TINY = "moss-tiny"


def model_home() -> Path:
    """MOSS_JT_HOME, or moss-jt in the user's data directory."""
    return own_folder("DATA", ".local/share")


def models_folder() -> Path:
    return model_home() / "models"


def folder_for(source: str) -> Path:
    """The model folder that a checkpoint's name, hub id or path gets: its last part."""
    return models_folder() / Path(source.rstrip("/")).resolve().name


def model_names() -> list[str]:
    """Names of the finished model folders, in order."""
    return sorted(path.parent.name for path in models_folder().glob(f"*/{MANIFEST}"))


def remember_last(path: Path) -> None:
    """Note which folder was converted last: the one that commands take when none is named."""
    note = model_home() / "last.json"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"model": str(path.resolve())}, f".{os.getpid()}")
    except OSError as error:
        raise MossError(
            f"{path} is ready, but {note} could not be written ({error.strerror}): name the model in each command, "
            "or set MOSS_JT_HOME to a folder that can be written."
        ) from error


def last_model() -> Path | None:
    try:
        last = Path(json.loads((model_home() / "last.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return last if (last / MANIFEST).exists() else None


def resolve_model(model: str | Path | None) -> Path:
    """The model folder that a path, a name under the model home, a hub id, or nothing (the last converted) means.

    Raises:
        MossError: there is none; the message says how to get one.
    """
    if model is None:
        last = last_model()
        if last is None:
            raise MossError(
                "no model has been converted yet. Convert one: moss-jt convert fnlp/moss-moon-003-sft "
                f"(45 GB of disk), or try the small one that comes with the program: moss-jt chat {TINY}"
            )
        return last
    if not isinstance(model, str | os.PathLike):
        raise MossError(f"a model is a name or a path, not {model!r}.")
    if Path(model).is_dir():
        return Path(model)
    named = models_folder() / Path(str(model)).name
    if (named / MANIFEST).exists() or named.is_dir():
        return named
    known = ", ".join(model_names()) or "none"
    source = model if "/" in str(model) else "fnlp/moss-moon-003-sft"
    raise MossError(
        f"there is no model called {str(model)!r} (converted so far: {known}). "
        f"Make one with, for example: moss-jt convert {source}"
    )


def tiny_checkpoint() -> Path:
    """The small checkpoint that comes with the program: as package data, or in the checkout beside this package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demos" / TINY, package.parent / "demos" / TINY):
        if (folder / "config.json").exists():
            return folder
    raise MossError(
        f"the checkpoint {TINY} did not come with this installation ({sys.prefix}). Install moss-jt again."
    )
