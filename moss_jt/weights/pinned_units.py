"""A GPU's second tier: weights in pinned host memory, and those that it cannot hold either, through a ring from disk.

Pinned memory cannot be paged out, so that the card reads it at the link's full speed without the processor's help.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

import numpy as np

from moss_jt.errors import MossError, reason_of
from moss_jt.plan.residency import gib
from moss_jt.weights.disk_ring import Reader, Ring
from moss_jt.weights.file_reader import Extent
from moss_jt.weights.page_buffer import page_buffer


class Pinning(Protocol):
    """What page-locks host memory: moss_jt.kernels.cuda.copy_engine.CudaCopyEngine, or a test's."""

    def pin(self, array: np.ndarray) -> None: ...

    def unpin(self, array: np.ndarray) -> None: ...


class PinnedUnits:
    """See :class:`moss_jt.weights.device_ring.HostUnits`. Close it when no copy reads its memory any more.

    Args:
        units: the range of a file of each, by number.
        on_host: which of them stay in host memory; the others pass through ``buffers`` buffers.
        buffer_bytes: of one such buffer.
        reader: reads both kinds, and is closed with this.

    Raises:
        MossError: a unit cannot be read, or the system does not pin that much memory.
    """

    def __init__(
        self,
        units: Mapping[int, Extent],
        on_host: Container[int],
        buffers: int,
        buffer_bytes: int,
        reader: Reader,
        pinning: Pinning,
    ) -> None:
        self._units = units
        self._reader = reader
        self._pinning = pinning
        self._pinned: list[np.ndarray] = []
        self._kept: dict[int, np.ndarray] = {}
        self._ring: Ring | None = None
        try:
            self._fill(on_host, buffers, buffer_bytes)
        except BaseException:
            self.close()
            raise

    def _fill(self, on_host: Container[int], buffers: int, buffer_bytes: int) -> None:
        for number, extent in self._units.items():
            if number in on_host:
                memory = page_buffer(extent.n_bytes)
                self._reader.read(extent, memory)
                self._pin(memory)
                self._kept[number] = memory[: extent.n_bytes]
        passing = {number: extent for number, extent in self._units.items() if number not in self._kept}
        if passing:
            self._ring = Ring(passing, buffers, buffer_bytes, self._reader)
            for memory in self._ring.buffers:
                self._pin(memory)

    def _pin(self, memory: np.ndarray) -> None:
        try:
            self._pinning.pin(memory)
        except RuntimeError as error:
            done = sum(array.nbytes for array in self._pinned)
            raise MossError(
                f"the system does not pin more than {gib(done)} of memory for the GPU ({reason_of(error)}). Give "
                "--host-memory a smaller amount: the rest streams from disk."
            ) from error
        self._pinned.append(memory)

    def walk(self, order: Sequence[int]) -> None:
        """As :meth:`moss_jt.weights.device_ring.DeviceRing.walk`."""
        if self._ring is not None:
            self._ring.walk(order)

    def is_passing(self, unit: int) -> bool:
        return unit not in self._kept

    def is_ready(self, unit: int) -> bool:
        return unit in self._kept or (self._ring is not None and self._ring.is_ready(unit))

    def take(self, unit: int) -> np.ndarray:
        if unit in self._kept:
            return self._kept[unit]
        assert self._ring is not None
        return self._ring.buffers[self._ring.take(unit)][: self._units[unit].n_bytes]

    def close(self) -> None:
        """Stop reading, and let the memory go. Closing twice is no fault."""
        if self._ring is not None:
            self._ring.close()
        else:
            self._reader.close()
        while self._pinned:
            self._pinning.unpin(self._pinned.pop())
        self._kept.clear()
