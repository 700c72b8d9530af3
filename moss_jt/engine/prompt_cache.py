"""Pages of the cache that outlive the process: one file each, under the name of the text that they end.

What a page holds is settled by the text up to its end, by the model and by the operators. So its file's name is the text's
(moss_jt.engine.pages.beginning_of), and its folder's is a key of everything else: another model, other operators, another
level of theirs, another number of threads have another folder. A file is complete before it gets its name, and is believed
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
MOST_CHUNKS = 512  # of one system call
MOST_FILES = 4096

Chunks = Sequence[np.ndarray]


class PromptCache:
    """See the module. Its methods may be called from any thread, and several processes may share the folder.

    Args:
        folder: where the files are, for all keys; made with the first page.
        key: of the model, the operators and whatever else decides what a page holds.
        limit_bytes: of all files in it; those used longest ago go.
    """

    def __init__(self, folder: Path, key: str, limit_bytes: int) -> None:
        self._root = folder
        self._folder = folder / key
        self._key = key.encode()
        self._limit = limit_bytes

    def has(self, name: bytes) -> bool:
        """Whether there is such a page; it may be damaged, or go meanwhile."""
        return self._path(name).exists()

    def load(self, name: bytes, chunks: Chunks) -> bool:
        """Fill these arrays with the page of that name; False where there is none, or it is damaged, and they hold anything."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                complete = self._read(file.fileno(), name, chunks)
        except OSError:
            return False
        if not complete:
            with contextlib.suppress(OSError):
                path.unlink()
        return complete

    def save(self, name: bytes, chunks: Chunks) -> Path | None:
        """Write a page into a file that has no name yet, for :meth:`publish`; None where there is no space for it."""
        n_bytes = sum(chunk.nbytes for chunk in chunks)
        fresh = self._folder / f"{name.hex()}.{secrets.token_hex(8)}{UNFINISHED}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            state = os.statvfs(self._folder)
            if n_bytes > self._limit or state.f_bavail * state.f_frsize < n_bytes + SPARE_BYTES:
                return None
            self._make_space(n_bytes)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(descriptor, chunks)
                _write(descriptor, [np.frombuffer(self._trailer(name, chunks), np.uint8)])
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
        for number, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(self._path(name), ns=(now - number, now - number))

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}{ENDING}"

    def _trailer(self, name: bytes, chunks: Chunks) -> bytes:
        """What stands after the page: checksums of its chunks, and one of these, of the name and of the key."""
        sums = struct.pack(f"<{len(chunks)}I", *(zlib.crc32(_bytes(chunk)) for chunk in chunks))
        return FORMAT + sums + self._digest(name, sums)

    def _digest(self, name: bytes, sums: bytes) -> bytes:
        return hashlib.blake2b(FORMAT + self._key + b"\0" + name + sums, digest_size=DIGEST_BYTES).digest()

    def _read(self, descriptor: int, name: bytes, chunks: Chunks) -> bool:
        n_bytes = sum(chunk.nbytes for chunk in chunks)
        trailer = len(FORMAT) + 4 * len(chunks) + DIGEST_BYTES
        if os.fstat(descriptor).st_size != n_bytes + trailer:
            return False
        end = os.pread(descriptor, trailer, n_bytes)
        sums = end[len(FORMAT) : -DIGEST_BYTES]
        if end != FORMAT + sums + self._digest(name, sums):
            return False
        offset = 0
        for first in range(0, len(chunks), MOST_CHUNKS):
            some = [_bytes(chunk) for chunk in chunks[first : first + MOST_CHUNKS]]
            wanted = sum(chunk.nbytes for chunk in some)
            if os.preadv(descriptor, some, offset) != wanted:
                return False
            offset += wanted
        sums_now = (zlib.crc32(_bytes(chunk)) for chunk in chunks)
        return all(
            one == other for one, other in zip(sums_now, struct.unpack(f"<{len(chunks)}I", sums), strict=True)
        )

    def _make_space(self, n_bytes: int) -> None:
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


def _bytes(chunk: np.ndarray) -> memoryview:
    """The memory of an array that lies in one chunk."""
    return chunk.data.cast("B")


def _write(descriptor: int, chunks: Chunks) -> None:
    left = [_bytes(chunk) for chunk in chunks]
    while left:
        count = os.writev(descriptor, left[:MOST_CHUNKS])
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
