"""Pages of the cache that wait on disk while their conversation is idle. The file has no name: it goes with the process."""

import tempfile
from pathlib import Path
from typing import IO

import numpy as np


class PageFile:
    """Records of one page each, in a file that grows as it is needed.

    Args:
        folder: where the file is; it is made. Not one that lies in memory, as /tmp may.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._count = 0

    def write(self, page: np.ndarray) -> int | None:
        """Keep a page, and return its record's number; None if the disk is full or cannot be written to."""
        record = self._free.pop() if self._free else self._count
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
            self._file.seek(record * page.nbytes)
            view = page.data.cast("B")
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._free.append(record)
            self._count = max(self._count, record + 1)
            return None
        self._count = max(self._count, record + 1)
        return record

    def read(self, record: int, page: np.ndarray) -> bool:
        """Fill ``page`` with what was written to this record; False if the disk does not give it back."""
        assert self._file is not None
        try:
            self._file.seek(record * page.nbytes)
            view = page.data.cast("B")
            while view:
                count = self._file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    return False
                view = view[count:]
        except OSError:
            return False
        return True

    def free(self, records: list[int]) -> None:
        """These pages are not needed any more."""
        self._free += records

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
