"""What the blocks before the first one that learns make of each sample: the same in every epoch, computed once and kept.

In a folder of the training: ``rows`` has the samples' rows one after another, ``index.jsonl`` a line for what the file is about and
a line for each group of samples that were computed together. A group counts once its line is there, so that samples that
were computed side by side are kept or forgotten together, and a training that goes on finds the bits that it would have had.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_jt.store.files import writing
from moss_jt.train.lora import Floats
from moss_jt.train.masked_samples import TokenSample

ROWS, INDEX = "rows", "index.jsonl"
# Of what is free on the disk, for the adapter, its states, and whatever else comes.
LEFT_FREE = 4
# No number of an index is larger: of bytes in a file, of tokens, of a checksum.
LARGEST = 1 << 48


class _Entry(NamedTuple):
    offset: int
    tokens: int
    checksum: int


class FrontRows:
    """The rows (T, C) float32 of samples at the input of one block.

    Args:
        folder: where they are kept.
        about: what they depend on beside the samples: what was kept for anything else is removed.
        width: C.
        wanted_bytes: of all samples' rows: no more than this, and a quarter of the free disk stays free. What has no room is
            computed every time.

    Raises:
        MossError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], width: int, wanted_bytes: int) -> None:
        self._folder, self._width = folder, width
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        with writing(folder):
            header, groups = self._known()
            if header is None or header["about"] != dict(about):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                spare = shutil.disk_usage(folder).free * (LEFT_FREE - 1) // LEFT_FREE
                header, groups = {"about": dict(about), "limit": min(wanted_bytes, spare)}, []
                self._append_line(header)
            self._file = os.open(folder / ROWS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._limit: int = header["limit"]
            for group in groups:
                for key, *entry in group:
                    self._entries[key] = _Entry(*entry)
            self._end = max((e.offset + self._bytes_of(e.tokens) for e in self._entries.values()), default=0)

    def find(self, samples: Sequence[TokenSample]) -> dict[str, Floats]:
        """By :func:`key_of`, the rows of those samples that are there and whole."""
        rows = {}
        for sample in samples:
            key = key_of(sample)
            entry = self._entries.get(key)
            if entry is None or entry.tokens != len(sample) or key in rows:
                continue
            data = os.pread(self._file, self._bytes_of(entry.tokens), entry.offset)
            if len(data) == self._bytes_of(entry.tokens) and zlib.crc32(data) == entry.checksum:
                rows[key] = np.frombuffer(data, np.float32).reshape(entry.tokens, self._width)
        return rows

    def keep(self, rows: Mapping[str, Floats]) -> None:
        """Keep these, by :func:`key_of`: all of them, or none where there is no room.

        Raises:
            MossError: the disk is full, or fails.
        """
        if not rows or self._end + sum(part.nbytes for part in rows.values()) > self._limit:
            return
        entries = {}
        with writing(self._folder):
            for key, part in rows.items():
                data = np.ascontiguousarray(part).data.cast("B")
                done = 0
                while done < len(data):
                    done += os.pwrite(self._file, data[done:], self._end + done)
                entries[key] = _Entry(self._end, len(part), zlib.crc32(data))
                self._end += len(data)
            os.fdatasync(self._file)
            self._append_line([[key, *entry] for key, entry in entries.items()])
        self._entries.update(entries)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def remove(self) -> None:
        """Nothing is to be learned from them any more."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _bytes_of(self, tokens: int) -> int:
        return tokens * self._width * 4

    def _append_line(self, value: Any) -> None:
        with (self._folder / INDEX).open("ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _known(self) -> tuple[dict[str, Any] | None, list[list[list[Any]]]]:
        """The index's first line and its groups; nothing of it where it is damaged, and nothing after a torn line."""
        try:
            lines = (self._folder / INDEX).read_bytes().split(b"\n")[:-1]
            header = json.loads(lines[0])
            if not isinstance(header["about"], dict) or not isinstance(header["limit"], int):
                return None, []
            groups = [json.loads(line) for line in lines[1:]]
            for key, offset, tokens, checksum in (entry for group in groups for entry in group):
                if not isinstance(key, str) or not all(
                    isinstance(n, int) and 0 <= n < LARGEST for n in (offset, tokens, checksum)
                ):
                    return None, []
        except (OSError, ValueError, RecursionError, KeyError, IndexError, TypeError):
            return None, []
        return header, groups


def key_of(sample: TokenSample) -> str:
    """What the rows depend on: the tokens, whichever of them are learned."""
    return hashlib.blake2b(sample.token_ids.tobytes(), digest_size=16).hexdigest()
