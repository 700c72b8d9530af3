"""Large sequential reads of weight files into given memory, buffered or direct, that leave no page cache behind."""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.sizes import MEMORY_PAGE, MIB, page_aligned
from moss_jt.weights.parallel_read import library, read_side_by_side

# Requests are long because Jittor holds Python's lock while it computes: a reader that needs the lock for every few
# megabytes would stand still for as long. One second's worth keeps the disk busy and still stops within a second.
SMALLEST_REQUEST = 8 * MIB
# A request that is split into less than this each is not worth it.
LEAST_SHARE = MIB


@dataclass(frozen=True)
class Extent:
    """A range of a file that starts on a page. ``keep_cached``: its pages may stay in the page cache."""

    path: Path
    offset: int
    n_bytes: int
    keep_cached: bool = False


def _never() -> bool:
    return False


class FileReader:
    """Fills memory from weight files, for several threads at once. Files stay open, so that a file deleted meanwhile can still be
    read.

    Args:
        direct: read past the page cache (O_DIRECT), except extents that may stay in it.
        bytes_per_s: about what the disk gives; decides how long one request may be.
        in_flight: into so many a request is split, which are read at once: see moss_jt.weights.parallel_read.
    """

    def __init__(self, direct: bool, bytes_per_s: float, in_flight: int = 1) -> None:
        self.direct = direct
        self._in_flight = 1 if library() is None else in_flight
        self.request_bytes = max(SMALLEST_REQUEST, int(bytes_per_s) // MEMORY_PAGE * MEMORY_PAGE)
        self._files: dict[tuple[Path, bool], list[int]] = {}
        self._opening = threading.Lock()

    def read(self, extent: Extent, target: np.ndarray, stopped: Callable[[], bool] = _never) -> bool:
        """Fill ``target`` (uint8, aligned to pages of memory at both ends) with the extent.

        Returns:
            False where ``stopped`` answered true between two requests, so that target is not complete.

        Raises:
            MossError: the file cannot be opened or read, or ends before the extent does.
        """
        direct = self.direct and not extent.keep_cached and extent.offset % MEMORY_PAGE == 0
        memory = target.data
        done = 0
        try:
            files = self._open(extent.path, direct)
            file = files[0]
            while done < extent.n_bytes:
                if stopped():
                    return False
                # A direct read asks for pages of memory; the file may end within the last one.
                end = page_aligned(extent.n_bytes) if direct else extent.n_bytes
                request = memory[done : min(done + self.request_bytes, end)]
                count = _fill(files, request, extent.offset + done)
                if not direct and not extent.keep_cached:
                    os.posix_fadvise(file, extent.offset + done, count, os.POSIX_FADV_DONTNEED)
                if count < len(request) and done + count < extent.n_bytes:
                    self._check_size(file, extent)
                    if count == 0 or direct:
                        raise OSError(errno.EIO, "short read")
                done += count
        except OSError as error:
            raise MossError(
                f"cannot read {extent.path}: {error.strerror}. Check the disk, then the folder with moss-jt verify."
            ) from error
        return True

    def _check_size(self, file: int, extent: Extent) -> None:
        size = os.fstat(file).st_size
        if size < extent.offset + extent.n_bytes:
            raise MossError(
                f"{extent.path} ends early: it has {size} bytes, {extent.offset + extent.n_bytes} are needed. "
                "It changed while it was in use; convert the model again."
            )

    def _open(self, path: Path, direct: bool) -> list[int]:
        """Descriptors of the file, one for each read that is in flight."""
        key = (path, direct)
        with self._opening:
            if key not in self._files:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
                self._files[key] = [file]
                self._files[key] += [os.dup(file) for _ in range(self._in_flight - 1)]
                if not direct:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._files[key]

    def close(self) -> None:
        for files in self._files.values():
            for file in files:
                os.close(file)
        self._files.clear()


def _fill(files: list[int], memory: memoryview, offset: int) -> int:
    """Read a request, by as many reads at once as there are descriptors; returns how many bytes came, from its start."""
    if len(files) == 1 or len(memory) < len(files) * LEAST_SHARE:
        return os.preadv(files[0], [memory], offset)
    return read_side_by_side(files, memory, offset)
