"""Where model folders live, and which one a name means."""

import difflib
import os
import sys
import time
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.store.files import read_json, write_json
from moss_jt.store.manifest import MANIFEST
from moss_jt.store.published import RECOMMENDED, hub_id_of
from moss_jt.user_folders import own_folder

TINY = "moss-tiny"
LAST, MOST_REMEMBERED = "last.json", 100


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
    """Note that a model folder was used now: commands take the one used last when none is named.

    Raises:
        MossError: the note cannot be written.
    """
    note = model_home() / LAST
    used = {**last_uses(), str(path.resolve()): time.time()}
    newest = dict(sorted(used.items(), key=lambda item: item[1])[-MOST_REMEMBERED:])
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"used": newest}, f".{os.getpid()}")
    except OSError as error:
        raise MossError(
            f"{path} is ready, but {note} could not be written ({error.strerror}): name the model in each command, "
            "or set MOSS_JT_HOME to a folder that can be written."
        ) from error


def last_uses() -> dict[str, float]:
    """Model folders and when each was used last, in seconds since 1970; nothing where the note is missing or not ours."""
    try:
        used = read_json(model_home() / LAST)["used"]
        return {str(path): float(when) for path, when in used.items()}
    except (MossError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def last_model() -> Path | None:
    """The model folder used last of those that are still there."""
    return next((path for path in _by_use() if (path / MANIFEST).exists()), None)


def _by_use() -> list[Path]:
    """Model folders that were used, the last one first."""
    uses = last_uses()
    return [Path(name) for name in sorted(uses, key=lambda name: uses[name], reverse=True)]


def only_model() -> Path | None:
    """The model folder under the model home, where there is but one."""
    names = model_names()
    return models_folder() / names[0] if len(names) == 1 else None


def resolve_model(model: str | Path | None) -> Path:
    """The model folder that a path, a name under the model home, a hub id, or nothing (the one used last, or the only one) means.

    Where nothing is named and the one used last is gone, standard error gets a line about which is taken.

    Raises:
        MossError: there is none; the message says how to get one.
    """
    if model is None:
        last = last_model() or only_model()
        if last is None:
            raise MossError(
                f"no model has been converted yet. Convert one: moss-jt convert {RECOMMENDED} (22 GB of disk), or try the "
                f"small one that comes with the program: moss-jt chat {TINY}. moss-jt plan says what suits this machine."
            )
        if (used := _by_use()) and used[0] != last:
            sys.stderr.write(f"moss-jt: the model used last, {used[0]}, is gone; this is {last}.\n")
        return last
    if not isinstance(model, str | os.PathLike):
        raise MossError(f"a model is a name or a path, not {model!r}.")
    if os.path.isdir(model):  # pathlib's is_dir raises where no file may have such a name
        return Path(model)
    named = models_folder() / Path(str(model)).name
    if os.path.isdir(named):
        return named
    raise MossError(f"there is no model called {str(model)[:200]!r}{_instead(str(model))}")


def _instead(name: str) -> str:
    """What may be meant by a name that no model here has, and how to get a model."""
    here = model_names()
    known = ", ".join(here) or "none"
    meant = hub_id_of(name)
    if meant is not None and meant.partition("/")[2] not in here:
        return f" here (converted so far: {known}). To get it: moss-jt convert {meant}"
    if close := difflib.get_close_matches(name.lower(), [*here, TINY], 1):
        return f"; did you mean {close[0]}?"
    return f" (converted so far: {known}). To get one: moss-jt convert {RECOMMENDED}"


def tiny_checkpoint() -> Path:
    """The small checkpoint that comes with the program: as package data, or in the checkout beside this package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demos" / TINY, package.parent / "demos" / TINY):
        if (folder / "config.json").exists():
            return folder
    raise MossError(
        f"the checkpoint {TINY} did not come with this installation ({sys.prefix}). Install moss-jt again."
    )
