"""How fast the disk under a model folder reads, buffered and direct: measured once by a short probe and remembered.

Which of the two is faster differs between disks, by a factor of two either way, so that it is never assumed.
"""

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.store.files import reading, write_json
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import MEMORY_PAGE, MIB
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.page_buffer import page_buffer

# Enough to be past the start of a request, and 0.3 s on a disk of 1 GB/s.
PROBE_BYTES = 160 * MIB
PROBE_REQUEST = 16 * MIB


@dataclass(frozen=True)
class DiskSpeed:
    """Sequential reads in bytes per second; direct is 0 where the file system has no direct reads."""

    buffered: float
    direct: float

    @property
    def best(self) -> float:
        return max(self.buffered, self.direct)

    @property
    def prefer_direct(self) -> bool:
        return self.direct > self.buffered


def disk_under(store: Store, home: Path) -> DiskSpeed:
    """The speed of the disk under a model folder, remembered in the folder ``home``.

    Raises:
        MossError: the folder's largest file cannot be read.
    """
    return disk_speed(max(store.blocks, key=lambda file: file.nbytes).path, home / "disk-speed.json")


def reader_for(store: Store, home: Path) -> FileReader:
    """What reads this model folder in the way that is faster here."""
    speed = disk_under(store, home)
    return FileReader(speed.prefer_direct, speed.best)


def disk_speed(file: Path, remembered_in: Path) -> DiskSpeed:
    """The speed of the disk that holds ``file``, a large one of a model folder.

    Args:
        file: read from its start and from its middle; at least a few MB, or the speed means little.
        remembered_in: a JSON file with the speeds of folders seen before; made, and read again, here.

    Raises:
        MossError: the file cannot be read.
    """
    with reading(file):
        key = f"{file.resolve().parent} on device {os.stat(file).st_dev}"
        known = _remembered(remembered_in)
        if key in known:
            return known[key]
        speed = _probe(file)
    _remember(remembered_in, {**known, key: speed})
    return speed


def _probe(file: Path) -> DiskSpeed:
    """Two halves of the file, one each way, so that neither finds what the other brought into a cache below us."""
    half = os.stat(file).st_size // 2 // MEMORY_PAGE * MEMORY_PAGE
    n_bytes = min(PROBE_BYTES, half)
    if n_bytes == 0:
        raise MossError(f"{file} is too small to measure the disk with. Convert the model again.")
    buffered = _timed(Extent(file, 0, n_bytes), direct=False)
    try:
        direct = _timed(Extent(file, half, n_bytes), direct=True)
    except MossError:
        direct = 0.0  # tmpfs and some network file systems refuse O_DIRECT
    return DiskSpeed(buffered, direct)


def _timed(extent: Extent, direct: bool) -> float:
    target = page_buffer(extent.n_bytes)
    target[::MEMORY_PAGE] = 1  # the memory itself must be there before the clock runs
    with open(extent.path, "rb") as file:
        os.posix_fadvise(file.fileno(), extent.offset, extent.n_bytes, os.POSIX_FADV_DONTNEED)
    reader = FileReader(direct, PROBE_REQUEST)
    start = time.perf_counter()
    try:
        reader.read(extent, target)
    finally:
        reader.close()
    return extent.n_bytes / (time.perf_counter() - start)


def _remembered(path: Path) -> dict[str, DiskSpeed]:
    """What is remembered; nothing where the file is missing or not ours, for a probe costs little."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: DiskSpeed(float(value["buffered"]), float(value["direct"])) for key, value in entries.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(path: Path, entries: dict[str, DiskSpeed]) -> None:
    """Written beside and renamed, for two processes may do this at once; a full or read-only disk is no fault here."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {key: asdict(speed) for key, speed in entries.items()}, f".{os.getpid()}")
