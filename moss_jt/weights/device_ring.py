"""Weights through a few buffers on a GPU: which copy, which computation waits for what, so that both go on at once.

The host only queues work; the device does it later, the copies beside the computation. Two events per buffer keep the order:
*filled* (the copy into it is done; the computation waits for it) and *used* (the last computation that reads it is done; the
next copy into it waits for that). Host memory that is itself filled anew, from disk, is handed back when its copy is done.
Knows neither CUDA nor models: tests run it over a simulated device.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moss_jt.kernels.interface import Queue


class CopyEngine(Protocol):
    """The device's copies and events: moss_jt.kernels.cuda.copy_engine.CudaCopyEngine, or a simulated one."""

    def new_event(self) -> int: ...

    def copy(self, memory: Any, offset: int, source: np.ndarray) -> None:
        """Queue, among the copies, that ``memory`` becomes ``source`` from byte ``offset`` on. The source must stay."""
        ...

    def record(self, event: int, queue: Queue) -> None:
        """Queue that the event happens when everything queued there before is done. An earlier recording is void."""
        ...

    def wait(self, queue: Queue, event: int) -> None:
        """Queue that what is queued there later starts after the event's latest recording, if there is one."""
        ...

    def synchronize(self, event: int) -> None:
        """Wait, on the host, for the event's latest recording, if there is one."""
        ...


class HostPieces(Protocol):
    """Where the pieces come from: moss_jt.weights.host_pieces.PinnedPieces, or a test's."""

    def is_passing(self, piece: int) -> bool:
        """Whether the piece's memory is filled anew once another passing piece is taken."""
        ...

    def is_ready(self, piece: int) -> bool:
        """Whether taking it would not wait."""
        ...

    def take(self, piece: int) -> np.ndarray:
        """The piece, waited for."""
        ...


class DeviceRing:
    """Takes ``pieces`` pieces around and around through the buffers ``memories``, ahead of the computation.

    The one who computes takes a piece, queues what reads its buffer, and takes the next.
    """

    def __init__(self, engine: CopyEngine, host: HostPieces, memories: Sequence[Any], pieces: int) -> None:
        if len(memories) < 2 or pieces < 1:
            raise ValueError("a ring needs two buffers at least, and something to copy")
        self.memories = memories
        self._engine = engine
        self._host = host
        self._filled = [engine.new_event() for _ in memories]
        self._used = [engine.new_event() for _ in memories]
        self._free = deque(range(len(memories)))
        self._queued: deque[tuple[int, int]] = deque()  # (piece, buffer), in the order of their copies
        self._taken: int | None = None
        self._passing: int | None = None  # the buffer whose copy reads host memory that will be filled anew
        self._next = 0
        self._last = pieces - 1
        self._whole = False  # whether what is noted here is what was queued
        self._begin_anew()
        self._fill(None)
        self._whole = True

    def end_cycle_after(self, piece: int) -> None:
        """Passes that leave out the last pieces say so, so that these are not copied in vain."""
        self._last = piece

    def take(self, piece: int) -> int:
        """The number of the buffer that holds ``piece`` for what is queued now. The buffer taken before is handed back.

        Raises:
            MossError: the piece could not be read from disk. Taking again tries again.
        """
        if not self._whole:
            self._begin_anew()
        self._whole = False
        self._release()
        while self._queued and self._queued[0][0] != piece:
            self._free.append(self._queued.popleft()[1])
        if not self._queued:
            self._next = piece
        self._fill(piece)
        _, buffer = self._queued.popleft()
        self._engine.wait(Queue.COMPUTE, self._filled[buffer])
        self._taken = buffer
        self._whole = True
        return buffer

    def hand_back(self) -> None:
        """All that reads the buffer taken last has been queued."""
        if not self._whole:
            return
        self._whole = False
        self._release()
        self._fill(None)
        self._whole = True

    def close(self) -> None:
        """Wait until no copy reads or writes any memory."""
        self._engine.record(self._filled[0], Queue.COPIES)
        self._engine.synchronize(self._filled[0])

    def _begin_anew(self) -> None:
        """All buffers are free once everything that was queued is done: at first (the memory may have been something else's), and
        after an error or a Ctrl-C in the midst of what follows.
        """
        for used in self._used:
            self._engine.record(used, Queue.COMPUTE)
        self._free = deque(range(len(self.memories)))
        self._queued.clear()
        self._taken = None

    def _release(self) -> None:
        if self._taken is not None:
            self._engine.record(self._used[self._taken], Queue.COMPUTE)
            self._free.append(self._taken)
            self._taken = None

    def _fill(self, wanted: int | None) -> None:
        """Queue copies into all free buffers; where that would wait for the disk, only up to the piece that is wanted."""
        missing = wanted is not None and not self._queued
        while self._free and (missing or self._host.is_ready(self._next)):
            self._copy(self._next, self._free[0])
            self._free.popleft()
            missing = False
            self._next = 0 if self._next >= self._last else self._next + 1

    def _copy(self, piece: int, buffer: int) -> None:
        passing = self._host.is_passing(piece)
        if passing and self._passing is not None:
            self._engine.synchronize(self._filled[self._passing])
        source = self._host.take(piece)
        self._engine.wait(Queue.COPIES, self._used[buffer])
        self._engine.copy(self.memories[buffer], 0, source)
        self._engine.record(self._filled[buffer], Queue.COPIES)
        if passing:
            self._passing = buffer
        self._queued.append((piece, buffer))
