"""Pages of the cache that outlive the process: one file each, under the name of the text that they end.

What a page holds is settled by the text up to its end, by the model and by the operators. So its file's name is the text's
(moss_jt.engine.pages.beginning_of), and its folder's is a key of everything else: another model, other operators, another
level of theirs, another number of threads have another folder. A file is whole before it gets its name, and is believed
only where its checksums are right: damage, a kill or a full disk cost time, and never a word.
"""

import contextlib
import hashlib
import os
import secrets
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ENDING, UNFINISHED = ".page", ".new"
FORMAT = b"moss-jt page 1\0\0"
DIGEST_BYTES = 16
# What a kill leaves of a file that was being written goes when it is that old.
LEFT_OVER_S = 600.0
# So much of the disk stays free for others.
SPARE_BYTES = 512 << 20
MOST_PIECES = 512  # of one system call
MOST_FILES = 4096

Pieces = Sequence[np.ndarray]


class PromptCache:
    """See the module. Its methods may be called from any thread, and several processes may share the folder.

    Args:
        folder: where the files are, for all keys; made with the first page.
        key: of the model, the operators and whatever else decides what a page holds.
        limit_bytes: of all files in it; those used longest ago make room.
    """

    def __init__(self, folder: Path, key: str, limit_bytes: int) -> None:
        self._root = folder
        self._folder = folder / key
        self._key = key.encode()
        self._limit = limit_bytes

    def has(self, name: bytes) -> bool:
        """Whether there is such a page; it may be damaged, or go meanwhile."""
        return self._path(name).exists()

    def load(self, name: bytes, pieces: Pieces) -> bool:
        """Fill these arrays with the page of that name; False where there is none, or it is damaged, and they hold anything."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                whole = self._read(file.fileno(), name, pieces)
        except OSError:
            return False
        if not whole:
            with contextlib.suppress(OSError):
                path.unlink()
        return whole

    def save(self, name: bytes, pieces: Pieces) -> Path | None:
        """Write a page into a file that has no name yet, for :meth:`publish`; None where there is no room for it."""
        n_bytes = sum(piece.nbytes for piece in pieces)
        fresh = self._folder / f"{name.hex()}.{secrets.token_hex(8)}{UNFINISHED}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            state = os.statvfs(self._folder)
            if n_bytes > self._limit or state.f_bavail * state.f_frsize < n_bytes + SPARE_BYTES:
                return None
            self._make_room(n_bytes)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(descriptor, pieces)
                _write(descriptor, [np.frombuffer(self._trailer(name, pieces), np.uint8)])
            finally:
                os.close(descriptor)
        except OSError:
            self.discard(fresh)
            return None
        return fresh

    def publish(self, name: bytes, fresh: Path) -> None:
        """What was saved is the page of this name."""
        try:
            fresh.replace(self._path(name))
        except OSError:
            self.discard(fresh)

    def discard(self, fresh: Path) -> None:
        """What was saved is not wanted after all."""
        with contextlib.suppress(OSError):
            fresh.unlink()

    def touch(self, names: Sequence[bytes]) -> None:
        """The pages of a text, in its order, are used now. The first ones count as used last: without them the others are of
        no use."""
        now = time.time_ns()
        for place, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(self._path(name), ns=(now - place, now - place))

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}{ENDING}"

    def _trailer(self, name: bytes, pieces: Pieces) -> bytes:
        """What stands after the page: checksums of its pieces, and one of these, of the name and of the key."""
        sums = struct.pack(f"<{len(pieces)}I", *(zlib.crc32(_bytes(piece)) for piece in pieces))
        return FORMAT + sums + self._digest(name, sums)

    def _digest(self, name: bytes, sums: bytes) -> bytes:
        return hashlib.blake2b(FORMAT + self._key + b"\0" + name + sums, digest_size=DIGEST_BYTES).digest()

    def _read(self, descriptor: int, name: bytes, pieces: Pieces) -> bool:
        n_bytes = sum(piece.nbytes for piece in pieces)
        trailer = len(FORMAT) + 4 * len(pieces) + DIGEST_BYTES
        if os.fstat(descriptor).st_size != n_bytes + trailer:
            return False
        end = os.pread(descriptor, trailer, n_bytes)
        sums = end[len(FORMAT) : -DIGEST_BYTES]
        if end != FORMAT + sums + self._digest(name, sums):
            return False
        offset = 0
        for first in range(0, len(pieces), MOST_PIECES):
            some = [_bytes(piece) for piece in pieces[first : first + MOST_PIECES]]
            wanted = sum(piece.nbytes for piece in some)
            if os.preadv(descriptor, some, offset) != wanted:
                return False
            offset += wanted
        found = (zlib.crc32(_bytes(piece)) for piece in pieces)
        return all(
            one == other for one, other in zip(found, struct.unpack(f"<{len(pieces)}I", sums), strict=True)
        )

    def _make_room(self, n_bytes: int) -> None:
        """Delete the pages used longest ago, of any key, until so many bytes fit beneath the limit."""
        files, left_over = [], time.time() - LEFT_OVER_S
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                state = path.stat()
                if path.suffix == ENDING:
                    files.append((state.st_mtime_ns, state.st_size, path))
                elif path.suffix == UNFINISHED and state.st_mtime < left_over:
                    path.unlink()
        total = sum(size for _, size, _ in files) + n_bytes
        spare = MOST_FILES - len(files)
        for _, size, path in sorted(files):
            if total <= self._limit and spare > 0:
                break
            spare += 1
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _bytes(piece: np.ndarray) -> memoryview:
    """The memory of an array that lies in one piece."""
    return piece.data.cast("B")


def _write(descriptor: int, pieces: Pieces) -> None:
    left = [_bytes(piece) for piece in pieces]
    while left:
        count = os.writev(descriptor, left[:MOST_PIECES])
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
