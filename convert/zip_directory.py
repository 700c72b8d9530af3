"""The directory of a zip file as torch.save writes it: which entries it holds, and where their bytes lie.

Nothing is unpacked: torch stores its entries as they are, and a compressed one could grow to any size.
Format: PKWARE's APPNOTE.TXT, 4.3 (headers) and 4.5.3 (zip64).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moss_jt.errors import MossError

MAX_DIRECTORY_BYTES = 16 << 20
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_MAX_COMMENT = 0xFFFF
_ZIP64_EXTRA = 1
_ENCRYPTED, _STORED = 1, 0


class NoZip(Exception):
    """The file has no directory at its end: it is no zip file, or its end is missing."""


@dataclass(frozen=True)
class Entry:
    """A file in the archive; ``offset`` is where its local header begins."""

    name: bytes
    offset: int
    n_bytes: int
    crc32: int
    is_stored: bool


def read_directory(file: BinaryIO, path: Path) -> dict[str, Entry]:
    """Every entry by name.

    Raises:
        NoZip: there is no directory.
        MossError: it is damaged, or larger than any checkpoint's; the message names ``path``.
    """
    size = file.seek(0, 2)
    begin, n_bytes, count = _where(file, size, path)
    if n_bytes > MAX_DIRECTORY_BYTES or begin + n_bytes > size:
        raise _damaged(path)
    file.seek(begin)
    data = file.read(n_bytes)
    entries: dict[str, Entry] = {}
    at = 0
    try:
        for _ in range(count):
            entry, at = _entry(data, at)
            name = entry.name.decode("utf-8", "surrogateescape")
            if name in entries:
                raise MossError(f"{path} holds two entries of one name, {name[:200]!r}. Download it again.")
            entries[name] = entry
    except (struct.error, ValueError) as error:
        raise _damaged(path) from error
    if at != n_bytes:
        raise _damaged(path)
    return entries


def data_offset(file: BinaryIO, entry: Entry, path: Path) -> int:
    """Where an entry's bytes begin: behind its local header, whose name and extra field have their own lengths.

    Raises:
        MossError: the entry is compressed, or not where the directory says.
    """
    if not entry.is_stored:
        raise MossError(
            f"{path} was compressed after it was saved; unpack and zip it again without compression."
        )
    size = file.seek(0, 2)
    file.seek(min(entry.offset, size))
    header = file.read(30)
    if len(header) < 30 or header[:4] != _LOCAL:
        raise _damaged(path)
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    begin = entry.offset + 30 + name_bytes + extra_bytes
    if file.read(name_bytes) != entry.name or begin + entry.n_bytes > size:
        raise _damaged(path)
    return begin


def _where(file: BinaryIO, size: int, path: Path) -> tuple[int, int, int]:
    """(offset, bytes, number of entries) of the directory."""
    tail_begin = max(0, size - 22 - _MAX_COMMENT)
    file.seek(tail_begin)
    tail = file.read(size - tail_begin)
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise NoZip
    count, n_bytes, begin, comment = struct.unpack_from("<HIIH", tail, at + 10)
    if at + 22 + comment != len(tail):
        raise _damaged(path)
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR64:
        record_at = struct.unpack_from("<Q", tail, at - 12)[0]
        file.seek(min(record_at, size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != _END64:
            raise _damaged(path)
        count, n_bytes, begin = struct.unpack_from("<QQQ", record, 32)
    return begin, n_bytes, count


def _entry(data: bytes, at: int) -> tuple[Entry, int]:
    """The entry of the directory at an offset, and where the next one begins; ValueError where it is none."""
    if data[at : at + 4] != _ENTRY:
        raise ValueError("no entry")
    flags, method, _, crc32, packed, n_bytes, name_bytes, extra_bytes, comment_bytes = struct.unpack_from(
        "<HHIIIIHHH", data, at + 8
    )
    offset = struct.unpack_from("<I", data, at + 42)[0]
    name_at = at + 46
    extra_at = name_at + name_bytes
    end = extra_at + extra_bytes + comment_bytes
    if end > len(data) or flags & _ENCRYPTED:
        raise ValueError("beyond the end, or encrypted")
    extra = data[extra_at : extra_at + extra_bytes]
    n_bytes, packed, offset = _widened(extra, n_bytes, packed, offset)
    is_stored = method == _STORED and packed == n_bytes
    return Entry(data[name_at:extra_at], offset, n_bytes, crc32, is_stored), end


def _widened(extra: bytes, *values: int) -> list[int]:
    """The numbers of an entry, those that are all ones taken from its zip64 extra field."""
    wide = b""
    while len(extra) >= 4:
        kind, n_bytes = struct.unpack_from("<HH", extra)
        if kind == _ZIP64_EXTRA:
            wide = extra[4 : 4 + n_bytes]
        extra = extra[4 + n_bytes :]
    sizes, at = [], 0
    for value in values:
        if value == 0xFFFFFFFF:
            value, at = struct.unpack_from("<Q", wide, at)[0], at + 8
        sizes.append(value)
    return sizes


def _damaged(path: Path) -> MossError:
    return MossError(f"{path} is damaged: its entries are not where they should be. Download it again.")
