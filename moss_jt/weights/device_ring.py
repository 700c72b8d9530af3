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


class HostUnits(Protocol):
    """Where the units come from: moss_jt.weights.pinned_units.PinnedUnits, or a test's."""

    def is_passing(self, unit: int) -> bool:
        """Whether the unit's memory is filled anew once another passing unit is taken."""
        ...

    def is_ready(self, unit: int) -> bool:
        """Whether taking it would not wait."""
        ...

    def take(self, unit: int) -> np.ndarray:
        """The unit, waited for."""
        ...


class DeviceRing:
    """Takes the ``units`` through the buffers ``memories``, ahead of the computation: in the order of the walk, and then once
    more, for the next walk is most often the same.

    The one who computes takes a unit, queues what reads its buffer, and takes the next.
    """

    def __init__(
        self, engine: CopyEngine, host: HostUnits, memories: Sequence[Any], units: Sequence[int]
    ) -> None:
        if len(memories) < 2 or not units:
            raise ValueError("a ring needs two buffers at least, and something to copy")
        self.memories = memories
        self._engine = engine
        self._host = host
        self._filled = [engine.new_event() for _ in memories]
        self._used = [engine.new_event() for _ in memories]
        self._free = deque(range(len(memories)))
        self._queued: deque[tuple[int, int]] = deque()  # (unit, buffer), in the order of their copies
        self._taken: int | None = None
        self._passing: int | None = None  # the buffer whose copy reads host memory that will be filled anew
        self._units = units
        self._order = list(units)
        self._next = 0  # where in the order it copies next
        self._true = False  # whether what is noted here is what was queued
        self._begin_anew()
        self._fill(None)
        self._true = True

    def walk(self, order: Sequence[int]) -> None:
        """The next walk takes those of its units that are in ``order``, in this order."""
        wanted = [unit for unit in order if unit in self._units]
        if wanted:
            ahead = [unit for unit, _ in self._queued]
            follows = ahead == [wanted[i % len(wanted)] for i in range(len(ahead))]
            self._next = 0  # first of all: it must be within the order whenever Ctrl-C comes
            self._order = wanted
            if follows:
                self._next = len(ahead) % len(wanted)

    def take(self, unit: int) -> int:
        """The number of the buffer that holds ``unit`` for what is queued now. The buffer taken before is handed back.

        Raises:
            MossError: the unit could not be read from disk. Taking again tries again.
        """
        if not self._true:
            self._begin_anew()
        self._true = False
        self._release()
        while self._queued and self._queued[0][0] != unit:
            self._free.append(self._queued.popleft()[1])
        # A walk there and back comes twice to a unit: where it stands is not only its first place.
        if not self._queued and self._order[self._next] != unit:
            if unit not in self._order:  # nobody said that it would be wanted
                self._order = list(self._units)
            self._next = self._order.index(unit)
        self._fill(unit)
        _, buffer = self._queued.popleft()
        self._engine.wait(Queue.COMPUTE, self._filled[buffer])
        self._taken = buffer
        self._true = True
        return buffer

    def hand_back(self) -> None:
        """All that reads the buffer taken last has been queued."""
        if not self._true:
            return
        self._true = False
        self._release()
        self._fill(None)
        self._true = True

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
        """Queue copies into all free buffers; where that would wait for the disk, only up to the unit that is wanted."""
        missing = wanted is not None and not self._queued
        while self._free and (missing or self._host.is_ready(self._order[self._next])):
            self._copy(self._order[self._next], self._free[0])
            self._free.popleft()
            missing = False
            self._next = (self._next + 1) % len(self._order)

    def _copy(self, unit: int, buffer: int) -> None:
        passing = self._host.is_passing(unit)
        if passing and self._passing is not None:
            self._engine.synchronize(self._filled[self._passing])
        source = self._host.take(unit)
        self._engine.wait(Queue.COPIES, self._used[buffer])
        self._engine.copy(self.memories[buffer], 0, source)
        self._engine.record(self._filled[buffer], Queue.COPIES)
        if passing:
            self._passing = buffer
        self._queued.append((unit, buffer))
