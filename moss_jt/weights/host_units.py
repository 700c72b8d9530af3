"""Where a CPU's units lie: mapped from the files where all of them fit, or read into memory and through a ring of buffers.

Mapped, opening takes no time, and the page cache is the only copy. Otherwise resident units are read once into memory that
no page cache can push out, and the others stream from disk. Either way a thread has them there, unit after unit, while Jittor
starts and the first pass goes on: see moss_jt.weights.resident_reader. In a RAM disk they are in memory already: all are
mapped, and what a pass has computed with is let go of, for pages that are mapped count as the process's. No Jittor here.
"""

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import MossError
from moss_jt.plan.placement import page_cache_bytes
from moss_jt.plan.residency import ResidencyPlan, Unit, spread
from moss_jt.store.model_folder import Store, ends_early
from moss_jt.store.sizes import MEMORY_PAGE, MIB
from moss_jt.weights.disk_ring import Reader, Ring
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.ram_disk import is_in_ram
from moss_jt.weights.resident_reader import Arrivals, Unwanted
from moss_jt.weights.unit_tensors import UnitMemory, extent_of, map_unit

# Linux has it since 5.14: the pages of a map are read, and found there without a fault.
MADV_POPULATE_READ = 22
MADV_DONTNEED = 4
# A call that is not longer than a fraction of a second, so that closing need not wait.
POPULATED = 256 * MIB


class HostUnits:
    """See the module, and moss_jt.weights.weights.Units. Nothing is read before :meth:`begin`.

    arrivals  the resident units, as they come
    """

    closed_at_exit = True

    def __init__(
        self,
        store: Store,
        plan: ResidencyPlan,
        reader: Reader | None = None,
        cache_bytes: int = 0,
        after: Arrivals | None = None,
    ) -> None:
        """
        Args:
            reader: fills memory of our own with the residents, and the ring's, and is closed with them; None where all units
                are mapped: all are resident, or lie in a RAM disk.
            cache_bytes: what of the streamed units may stay in the page cache, for there is memory beside the budget.
            after: these units are read first.

        Raises:
            MossError: a file cannot be mapped.
        """
        units = dict(enumerate(plan.units))
        self._store, self._plan, self._reader, self._after = store, plan, reader, after
        self._units = {number: unit for number, unit in units.items() if unit.resident}
        self._streamed = {number: unit for number, unit in units.items() if not unit.resident}
        self._cache_bytes = cache_bytes
        self.streams = bool(self._streamed)
        self._memories = {
            number: UnitMemory(number, map_unit(store, unit) if reader is None else page_buffer(unit.n_bytes))
            for number, unit in (units if reader is None else self._units).items()
        }
        self._passing: np.ndarray | None = None  # a mapped unit that does not stay
        self.arrivals: Arrivals | None = None
        self._ring: Ring | None = None
        self._closed = False

    def begin(self) -> None:
        """Begin to read, unless that was done."""
        if self.arrivals is not None or self._closed:
            return
        sizes = {number: unit.n_bytes for number, unit in self._units.items()}
        self.arrivals = Arrivals(sizes, self._read, self._after)
        if self._streamed and self._reader is not None:
            kept = _kept(self._streamed, self._cache_bytes)
            extents = {n: extent_of(self._store, unit, n in kept) for n, unit in self._streamed.items()}
            self._ring = Ring(extents, self._plan.ring_buffers, self._plan.buffer_bytes, self._reader)

    def walk(self, order: Sequence[int]) -> None:
        if self._ring is not None:
            self._ring.walk(order)

    def take(self, number: int) -> UnitMemory:
        assert self.arrivals is not None, "reading has not begun"
        if self._ring is not None and number in self._streamed:
            buffer = self._ring.take(number)
            return UnitMemory(("buffer", buffer), self._ring.buffers[buffer])
        self.end()  # the buffer of the unit before is filled while this one is computed with
        if number in self._streamed:
            self._passing = self._memories[number].memory
        else:
            self.arrivals.wait(number)
        return self._memories[number]

    def end(self) -> None:
        self._let_pass()
        if self._ring is not None:
            self._ring.hand_back()

    def close(self) -> None:
        self._closed = True
        if self.arrivals is not None:
            self.arrivals.close()
        if self._ring is not None:
            self._ring.close()
        elif self._reader is not None:
            self._reader.close()
        self._memories.clear()

    def _let_pass(self) -> None:
        if self._passing is not None:
            let_go(self._passing)
            self._passing = None

    def _read(self, number: int, unwanted: Unwanted) -> bool:
        extent, memory = extent_of(self._store, self._units[number]), self._memories[number].memory
        if self._reader is not None:
            return self._reader.read(extent, memory, unwanted)
        return populate(memory, extent.path, unwanted)


def open_host_units(store: Store, plan: ResidencyPlan, home: Path) -> HostUnits:
    """The plan's units, to be read in the way that suits this machine.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: a file cannot be read.
    """
    if not plan.streams or is_in_ram(store):
        return HostUnits(store, plan)
    return HostUnits(store, plan, reader_for(store, home), page_cache_bytes(plan))


def let_go(memory: np.ndarray) -> None:
    """Have the pages of a map of a file no longer count as this process's; who reads them again gets them again."""
    start, end = memory.ctypes.data // MEMORY_PAGE * MEMORY_PAGE, memory.ctypes.data + memory.nbytes
    _library().madvise(start, end - start, MADV_DONTNEED)


def populate(memory: np.ndarray, path: Path, unwanted: Unwanted) -> bool:
    """Have the pages of a map of a file in memory, in long runs; on systems that cannot, whoever reads them first waits for them.

    Returns:
        False where it was unwanted before all of them were there.

    Raises:
        MossError: the file cannot be read, or is shorter than its map.
    """
    start = memory.ctypes.data
    end, start = start + memory.nbytes, start // MEMORY_PAGE * MEMORY_PAGE
    while start < end:
        if unwanted():
            return False
        count = min(POPULATED, end - start)
        if _library().madvise(start, count, MADV_POPULATE_READ) != 0:
            reason = ctypes.get_errno()
            if reason == errno.EINVAL:
                return True
            if reason == errno.EFAULT:  # whoever read it would get a signal
                raise ends_early(path)
            if reason not in (errno.EINTR, errno.EAGAIN):
                raise MossError(f"cannot read {path}: {os.strerror(reason)}.")
            continue
        start += count
    return True


@cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def _kept(streamed: Mapping[int, Unit], cache_bytes: int) -> set[int]:
    """Which streamed units stay cached: a fixed, evenly spread set, for a cache of the latest would never hit."""
    numbers = list(streamed)
    for count in range(len(numbers), 0, -1):
        kept = {numbers[i] for i in spread(count, len(numbers))}
        if sum(streamed[number].n_bytes for number in kept) <= cache_bytes:
            return kept
    return set()
