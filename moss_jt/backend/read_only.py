"""Jittor compiled in a cache that cannot be written: in an image, for all users of a machine, on a file system of others.

At every start Jittor writes its generated sources anew, as they were, and opens its lock for writing. Where that is refused,
it gets a folder aside, which lives as long as this process. Operators that the cache lacks are compiled there, too.
"""

import atexit
import builtins
import contextlib
import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM)


@cache
def side_folder() -> Path:
    """A folder of this process, removed when it ends."""
    folder = tempfile.mkdtemp(prefix="moss-jt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def writes_led_aside(folder: Path) -> Iterator[None]:
    """For a while, ``open`` gives a file under the side folder where one below ``folder`` may not be written."""
    real: Any = builtins.open

    def open_somewhere(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        try:
            return real(file, mode, *arguments, **options)
        except OSError as error:
            if error.errno not in REFUSALS or mode.startswith("r") or folder not in Path(file).parents:
                raise
        aside = side_folder() / Path(file).relative_to(folder)
        aside.parent.mkdir(parents=True, exist_ok=True)
        return real(aside, mode, *arguments, **options)

    builtins.open = open_somewhere
    try:
        yield
    finally:
        builtins.open = real


def lead_operators_aside(flags: Any) -> None:
    """Where Jittor's folder cannot be written, let it compile operators in another, with links to what is in there.

    ``flags``: Jittor's. The Python that it compiles with would open a lock in the folder: it gets a home aside.
    """
    compiled = Path(flags.cache_path)
    if is_writable(compiled):
        return
    folder = side_folder() / "operators"
    for name in ("jit", "tmp", "obj_files"):
        (folder / name).mkdir(parents=True)
    python = folder / "python"
    home = shlex.quote(str(folder))
    python.write_text(
        f'#!/bin/sh\nHOME={home} JITTOR_HOME={home} exec {shlex.quote(flags.python_path)} "$@"\n'
    )
    python.chmod(0o700)
    for entry in compiled.iterdir():
        if not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    for entry in (compiled / "jit").iterdir():
        if entry.suffix == ".key":  # Jittor's note of what the file was compiled from, where and with what
            note = entry.read_bytes().replace(os.fsencode(f"{compiled}/jit/"), os.fsencode(f"{folder}/jit/"))
            if note.startswith(os.fsencode(f"{flags.python_path} ")):
                note = os.fsencode(python) + note.removeprefix(os.fsencode(flags.python_path))
            (folder / "jit" / entry.name).write_bytes(note)
        elif entry.suffix in (".cc", ".cu", ".so"):  # not what else compilers leave, and write anew
            (folder / "jit" / entry.name).symlink_to(entry)
    flags.python_path = str(python)
    flags.cache_path = str(folder)
