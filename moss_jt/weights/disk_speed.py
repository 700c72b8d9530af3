"""How fast the disk under a model folder reads, buffered and direct, one read or several at once: measured once and remembered.

Which of these is faster differs between disks, by a factor of two either way, so that it is never assumed.
"""

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
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
# Reads at once, where several are tried, and by how much they must be faster than one, as buffered reads than direct ones.
IN_FLIGHT, WORTHWHILE = 4, 1.1


@dataclass(frozen=True)
class DiskSpeed:
    """Sequential reads in bytes per second; direct is 0 where the file system has no direct reads.

    The last two: of IN_FLIGHT reads at once; 0 where there are none.
    """

    buffered: float
    direct: float
    several_buffered: float = 0.0
    several_direct: float = 0.0

    @property
    def best(self) -> float:
        return max(self.buffered, self.direct, self.several_buffered, self.several_direct)

    @property
    def prefer_direct(self) -> bool:
        """Buffered reads only where they are clearly faster: they copy, which takes time of the processors that compute."""
        return max(self.direct, self.several_direct) * WORTHWHILE > max(self.buffered, self.several_buffered)

    @property
    def in_flight(self) -> int:
        """So many reads at once: several only where that is clearly faster, for a disk with a head has to move it."""
        one = max(self.buffered, self.direct)
        return IN_FLIGHT if self.best > WORTHWHILE * one else 1


def disk_under(store: Store, home: Path) -> DiskSpeed:
    """The speed of the disk under a model folder, remembered in the folder ``home``.

    Raises:
        MossError: the folder's largest file cannot be read.
    """
    return disk_speed(max(store.blocks, key=lambda file: file.nbytes).path, home / "disk-speed.json")


def reader_for(store: Store, home: Path) -> FileReader:
    """What reads this model folder in the way that is faster here."""
    speed = disk_under(store, home)
    return FileReader(speed.prefer_direct, speed.best, speed.in_flight)


def disk_speed(file: Path, remembered_in: Path) -> DiskSpeed:
    """The speed of the disk that holds ``file``, a large one of a model folder.

    Args:
        file: read at four places; at least a few MB, or the speed means little.
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
    there = {old: known[old] for old in known if os.path.isdir(old.rpartition(" on device ")[0])}
    _remember(remembered_in, {**there, key: speed})
    return speed


def _probe(file: Path) -> DiskSpeed:
    """Four quarters of the file, one each way, so that none finds what another brought into a cache below us."""
    quarter = os.stat(file).st_size // 4 // MEMORY_PAGE * MEMORY_PAGE
    n_bytes = min(PROBE_BYTES, quarter)
    if n_bytes == 0:
        raise MossError(f"{file} is too small to measure the disk with. Convert the model again.")
    speeds = []
    for number, (direct, in_flight) in enumerate(
        ((False, 1), (True, 1), (False, IN_FLIGHT), (True, IN_FLIGHT))
    ):
        try:
            speeds.append(_timed(Extent(file, number * quarter, n_bytes), direct, in_flight))
        except MossError:
            if not direct:
                raise
            speeds.append(0.0)  # tmpfs and some network file systems refuse O_DIRECT
    return DiskSpeed(*speeds)


def _timed(extent: Extent, direct: bool, in_flight: int) -> float:
    target = page_buffer(extent.n_bytes)
    target[::MEMORY_PAGE] = 1  # the memory itself must be there before the clock runs
    with open(extent.path, "rb") as file:
        os.posix_fadvise(file.fileno(), extent.offset, extent.n_bytes, os.POSIX_FADV_DONTNEED)
    reader = FileReader(direct, PROBE_REQUEST * in_flight, in_flight)
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
        names = [field.name for field in fields(DiskSpeed)]
        return {key: DiskSpeed(*(float(value[name]) for name in names)) for key, value in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(path: Path, entries: dict[str, DiskSpeed]) -> None:
    """Written beside and renamed, for two processes may do this at once; a full or read-only disk is no fault here."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {key: asdict(speed) for key, speed in entries.items()}, f".{os.getpid()}")
