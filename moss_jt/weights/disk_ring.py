"""A ring of page-aligned buffers that one thread fills ahead of a consumer which walks over units in an order.

The thread reads the units in the order that it was told, as long as a buffer is free, and then once more, for the next walk
is most often the same; the consumer takes them in that order and hands each buffer back when it asks for the next. A
consumer that starts over (after an interruption), turns around or leaves units out makes the ring begin again at the unit
it asks for. Knows files and memory, not models: a unit is a number and a range of a file.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from moss_jt.errors import MossError
from moss_jt.weights.file_reader import Extent
from moss_jt.weights.page_buffer import page_buffer


class Reader(Protocol):
    """What fills the buffers: moss_jt.weights.file_reader.FileReader, or a test's."""

    def read(self, extent: Extent, target: np.ndarray, stopped: Callable[[], bool] = ...) -> bool: ...

    def close(self) -> None: ...


class Ring:
    """``buffers`` buffers of ``buffer_bytes``, filled ahead with ``units``, at first in the order of their numbers. Close it,
    or its thread stays.
    """

    def __init__(self, units: Mapping[int, Extent], buffers: int, buffer_bytes: int, reader: Reader) -> None:
        if buffers < 2 or not units:
            raise ValueError("a ring needs two buffers at least, and something to read")
        self.buffers = [page_buffer(buffer_bytes) for _ in range(buffers)]
        self._units = units
        self._reader = reader
        self._changed = threading.Condition()
        # All of these change only while self._changed is held.
        self._free = list(range(buffers))
        self._ready: deque[tuple[int, int]] = deque()  # (unit, buffer), in reading order
        self._filling: tuple[int, int] | None = None
        self._taken: int | None = None
        self._order = sorted(units)
        self._next = 0  # where in the order it reads next
        self._discard = False  # what is being filled is no longer wanted
        self._error: MossError | None = None
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._fill, name="moss-jt reader", daemon=True)
        self._thread.start()

    def walk(self, order: Sequence[int]) -> None:
        """The next walk takes those of its units that are in ``order``, in this order. What was read ahead stays if it is
        what comes first.
        """
        with self._changed:
            self._order = [unit for unit in order if unit in self._units] or self._order
            ahead = [unit for unit, _ in self._ready]
            if self._filling is not None and not self._discard:
                ahead.append(self._filling[0])
            if ahead != [self._order[i % len(self._order)] for i in range(len(ahead))]:
                self._free += [buffer for _, buffer in self._ready]
                self._ready.clear()
                self._discard = self._filling is not None
                ahead = []
            self._next = len(ahead) % len(self._order)
            self._error = None  # what could not be read is tried again
            self._changed.notify_all()

    def take(self, unit: int) -> int:
        """The number of the buffer that holds ``unit``, waited for. The buffer taken before is handed back.

        Raises:
            MossError: it could not be read. Taking again tries again.
        """
        with self._changed:
            self._hand_back()
            self._aim(unit)
            self._let_begin()
            while not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self._ended:
                    raise MossError("the weight stream is closed.")
                self._changed.wait()
            taken, buffer = self._ready.popleft()
            assert taken == unit, f"the ring holds unit {taken}, not {unit}"
            self._taken = buffer
            return buffer

    def is_ready(self, unit: int) -> bool:
        """Whether taking ``unit`` next would not wait, and would not fail."""
        with self._changed:
            return bool(self._ready) and self._ready[0][0] == unit

    def hand_back(self) -> None:
        """Free the buffer taken last for the units to come."""
        with self._changed:
            self._hand_back()
            self._let_begin()

    def close(self) -> None:
        """Stop and join the thread (it finishes the request that it is in), and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._reader.close()

    def _hand_back(self) -> None:
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None
            self._changed.notify_all()

    def _let_begin(self) -> None:
        """Wait until the thread reads, if it has a buffer: the consumer computes next, in operators that hold Python's lock, and no
        read begins without it.
        """
        while (
            self._free
            and self._filling is None
            and self._error is None
            and not (self._closing or self._ended)
        ):
            self._changed.wait()

    def _aim(self, unit: int) -> None:
        """Drop what was read ahead before ``unit``, and begin again there if nothing read ahead is it."""
        while self._ready and self._ready[0][0] != unit:
            self._free.append(self._ready.popleft()[1])
        if not self._ready and not (self._filling and self._filling[0] == unit and not self._discard):
            self._discard = self._filling is not None
            if self._order[self._next] != unit:
                self._read_next(unit)
                self._error = None  # it was about another unit
        self._changed.notify_all()

    def _read_next(self, unit: int) -> None:
        if unit not in self._order:  # nobody said that it would be wanted
            self._order = sorted(self._units)
        self._next = self._order.index(unit)

    def _fill(self) -> None:
        try:
            while self._start_next():
                self._fill_one()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _start_next(self) -> bool:
        """Wait for a free buffer and choose the next unit; False when closing."""
        with self._changed:
            while not self._closing and (not self._free or self._error is not None):
                self._changed.wait()
            if self._closing:
                return False
            self._filling = (self._order[self._next], self._free.pop())
            self._discard = False
            self._next = (self._next + 1) % len(self._order)
            self._changed.notify_all()
            return True

    def _fill_one(self) -> None:
        assert self._filling is not None
        unit, buffer = self._filling
        error = None
        complete = False
        try:
            complete = self._reader.read(self._units[unit], self.buffers[buffer], self._unwanted)
        except MossError as raised:
            error = raised
        with self._changed:
            self._filling = None
            if complete and not self._discard:
                self._ready.append((unit, buffer))
            else:
                self._free.append(buffer)
                if error is not None and not self._discard:
                    self._error = error
                    self._read_next(unit)
            self._changed.notify_all()

    def _unwanted(self) -> bool:
        return self._discard or self._closing
