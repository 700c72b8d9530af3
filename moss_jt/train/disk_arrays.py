"""Arrays that wait on the disk: in a file without a name, which goes with the process however that ends."""

import contextlib
import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.files import writing
from moss_jt.store.sizes import page_aligned
from moss_jt.train.lora import Floats
from moss_jt.weights.page_buffer import page_buffer


class Shelf:
    """A file in ``folder``, past the page cache where the file system can: what is put there is read once, much later.

    Raises:
        MossError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self._direct = _nameless(folder)
        self._positions: dict[Hashable, tuple[int, list[tuple[int, ...]]]] = {}
        self._end = 0
        self._buffer = page_buffer(1)

    def put(self, key: Hashable, arrays: Sequence[Floats]) -> None:
        """Write them; they are not referred to after this.

        Raises:
            MossError: the disk is full, or fails.
        """
        n_bytes = page_aligned(sum(array.nbytes for array in arrays))
        if len(self._buffer) < n_bytes:
            self._buffer = page_buffer(n_bytes)
        for target, array in zip(
            _views(self._buffer, [array.shape for array in arrays]), arrays, strict=True
        ):
            target[:] = array
        with writing(self._folder):
            done = 0
            while done < n_bytes:
                done += os.pwrite(self._file, self._buffer[done:n_bytes].data, self._end + done)
            self._forget(n_bytes)
        self._positions[key] = self._end, [array.shape for array in arrays]
        self._end += n_bytes

    def take(self, key: Hashable) -> list[Floats]:
        """What was put there under this name, in memory of its own; once.

        Raises:
            MossError: the disk fails.
        """
        offset, shapes = self._positions.pop(key)
        n_bytes = page_aligned(sum(int(np.prod(shape)) for shape in shapes) * 4)
        memory = page_buffer(n_bytes)
        done = 0
        while done < n_bytes:
            try:
                count = os.preadv(self._file, [memory[done:].data], offset + done)
            except OSError as error:
                raise MossError(
                    f"cannot read a file in {self._folder}: {error.strerror}. Check the disk."
                ) from error
            if count == 0:
                raise MossError(f"a file in {self._folder} ends early. Check the disk.")
            done += count
        if not self._positions:
            self._end = 0  # a step is over: the next one writes over it
        return _views(memory, shapes)

    def clear(self) -> None:
        """Forget all of it, as after an interruption."""
        self._positions.clear()
        self._end = 0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _forget(self, n_bytes: int) -> None:
        """Where it went through the page cache: none of it stays there, for it would take the place of weights."""
        if not self._direct:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, self._end, n_bytes, os.POSIX_FADV_DONTNEED)


def _nameless(folder: Path) -> tuple[int, bool]:
    """A descriptor, and whether it is past the page cache."""
    for direct in (os.O_DIRECT, 0):
        with contextlib.suppress(OSError):  # some file systems know neither the one nor the other
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | direct, 0o600), bool(direct)
    file, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    return file, False


def _views(memory: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[Floats]:
    views, at = [], 0
    for shape in shapes:
        count = int(np.prod(shape)) * 4
        views.append(memory[at : at + count].view(np.float32).reshape(shape))
        at += count
    return views
