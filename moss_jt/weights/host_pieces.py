"""A GPU's second tier: weights in pinned host memory, and those that it cannot hold either, through a ring from disk.

Pinned memory cannot be paged out, so that the card reads it at the link's full speed without the processor's help.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moss_jt.errors import MossError, reason_of
from moss_jt.plan.residency import gib
from moss_jt.weights.disk_ring import Reader, Ring
from moss_jt.weights.file_reader import Piece
from moss_jt.weights.page_buffer import page_buffer


class Pinning(Protocol):
    """What locks host memory into place: moss_jt.kernels.cuda.copy_engine.CudaCopyEngine, or a test's."""

    def pin(self, array: np.ndarray) -> None: ...

    def unpin(self, array: np.ndarray) -> None: ...


class PinnedPieces:
    """See :class:`moss_jt.weights.device_ring.HostPieces`. Close it when no copy reads its memory any more.

    Args:
        pieces: in the order in which a pass takes them.
        on_host: of each, whether it stays in host memory; the others pass through ``buffers`` buffers.
        buffer_bytes: of one such buffer.
        reader: reads both kinds, and is closed with this.

    Raises:
        MossError: a piece cannot be read, or the system does not pin that much memory.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        on_host: Sequence[bool],
        buffers: int,
        buffer_bytes: int,
        reader: Reader,
        pinning: Pinning,
    ) -> None:
        self._pieces = pieces
        self._reader = reader
        self._pinning = pinning
        self._pinned: list[np.ndarray] = []
        self._kept: dict[int, np.ndarray] = {}
        self._passing: dict[int, int] = {}  # a piece's number in the ring
        self._ring: Ring | None = None
        try:
            self._fill(on_host, buffers, buffer_bytes)
        except BaseException:
            self.close()
            raise

    def _fill(self, on_host: Sequence[bool], buffers: int, buffer_bytes: int) -> None:
        for number, piece in enumerate(self._pieces):
            if on_host[number]:
                memory = page_buffer(piece.n_bytes)
                self._reader.read(piece, memory, _never)
                self._pin(memory)
                self._kept[number] = memory[: piece.n_bytes]
        numbers = [number for number in range(len(self._pieces)) if number not in self._kept]
        self._passing = {number: place for place, number in enumerate(numbers)}
        if numbers:
            self._ring = Ring(
                [self._pieces[number] for number in numbers], buffers, buffer_bytes, self._reader
            )
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

    def end_cycle_after(self, piece: int) -> None:
        """As :meth:`moss_jt.weights.device_ring.DeviceRing.end_cycle_after`."""
        wanted = [place for number, place in self._passing.items() if number <= piece]
        if self._ring is not None and wanted:
            self._ring.end_cycle_after(max(wanted))

    def is_passing(self, piece: int) -> bool:
        return piece in self._passing

    def is_ready(self, piece: int) -> bool:
        if piece in self._kept:
            return True
        assert self._ring is not None
        return self._ring.is_ready(self._passing[piece])

    def take(self, piece: int) -> np.ndarray:
        if piece in self._kept:
            return self._kept[piece]
        assert self._ring is not None
        buffer = self._ring.take(self._passing[piece])
        return self._ring.buffers[buffer][: self._pieces[piece].n_bytes]

    def close(self) -> None:
        """Stop reading, and let the memory go. Closing twice is no fault."""
        if self._ring is not None:
            self._ring.close()
        else:
            self._reader.close()
        while self._pinned:
            self._pinning.unpin(self._pinned.pop())
        self._kept.clear()


def _never() -> bool:
    return False
