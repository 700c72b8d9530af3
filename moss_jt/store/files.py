"""Files of models: read only where they are files and of bounded size, replaced in one step that survives a power cut."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from moss_jt.errors import MissingFileError, MossError

# JSON may take twenty times its size in memory. The largest that a model has is a tokenizer.json of 4 MB.
MAX_JSON_BYTES = 16 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. A pipe instead would make the program wait for ever, and a device never ends.

    Raises:
        MossError: it is no file.
        OSError: it is missing, or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise MossError(f"{path} is not a file, but a folder, a pipe or a device. Put the file itself there.")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the system's errors about what is read into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing.") from error
    except OSError as error:
        raise MossError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All of a file of bounded size.

    Raises:
        MossError: it is missing, no file, too large, or the disk fails.
    """
    with reading(path), open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise MossError(f"{path} is larger than {limit >> 20} MiB; that is no {path.name} of a model.")
    return data


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MossError: ``data`` is anything else; the message names ``path``.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError) as error:
        raise MossError(f"{path} cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise MossError(f"{path} does not hold a JSON object.")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; errors as :func:`read_small` and :func:`parse_json`."""
    return parse_json(read_small(path), path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors about what is written into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise MossError(
                f"the disk is full: {path} could not be written. Free some space and run it again to go on."
            ) from error
        raise MossError(f"writing {path} failed: {error.strerror or error}.") from error


@contextlib.contextmanager
def replacing(path: Path, ending: str = ".new") -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` in one step, also across a power cut: readers see the old or the new.

    It is written under ``path``'s name with an ending; where two processes may write at once, each needs its own.
    Where the block ends in an exception, ``path`` stays as it was and nothing else is left.
    """
    fresh = path.with_name(path.name + ending)
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def rename(fresh: Path, path: Path) -> None:
    """Have ``path`` name a file that is on the disk under another name, also after a power cut."""
    fresh.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, ending: str = ".new") -> None:
    """Replace a small file; see :func:`replacing`."""
    with replacing(path, ending) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, fields: dict[str, Any], ending: str = ".new") -> None:
    """Replace a JSON file. ASCII only, so that names that are not UTF-8 can be written and come back as they were."""
    write_text(path, json.dumps(fields, indent=1) + "\n", ending)


def link_over(path: Path, name: Path) -> None:
    """Let ``name`` be another name of the file ``path``, in place of what it was. None is ever written to: see :func:`replacing`.

    Raises:
        OSError: they lie on different disks, or the file system has no such links.
    """
    fresh = name.with_name(f"{name.name}.new")
    fresh.unlink(missing_ok=True)
    os.link(path, fresh)
    fresh.replace(name)
