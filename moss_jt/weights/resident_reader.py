"""Units that stay are read by a thread, each once, in the order of a pass; who needs one that is not there yet waits for it.

So reading the weights and reading the first prompt are one walk over the model. The thread begins before Jittor starts, and
touches the memory that it fills: the one who computes finds it there.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from moss_jt.errors import MossError

Unwanted = Callable[[], bool]


class Read(Protocol):
    """Bring a unit, by its number; False where ``unwanted`` answered true meanwhile. It may raise a MossError."""

    def __call__(self, number: int, unwanted: Unwanted) -> bool: ...


class Arrivals:
    """See the module. Close it, or its thread goes on until all are there.

    Args:
        sizes: bytes of each unit, by its number, in the order in which they are wanted.
        read: called by the thread, for one unit at a time.
        after: these come first, unless somebody waits.
    """

    def __init__(self, sizes: Mapping[int, int], read: Read, after: "Arrivals | None" = None) -> None:
        self.total_bytes = sum(sizes.values())
        self._read = read
        self._changed = threading.Condition()
        # All of these change only while self._changed is held.
        self._missing = dict(sizes)
        self._wanted: int | None = None
        self._error: MossError | None = None  # the thread waits until it was told, and somebody comes back
        self._told = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._then: list[Arrivals] = []
        if after is None or not after._then_begin(self):
            self._begin()

    @property
    def missing_bytes(self) -> int:
        """Bytes of what is not there yet."""
        with self._changed:
            return sum(self._missing.values())

    def wait(self, number: int) -> None:
        """Until a unit is there.

        Raises:
            MossError: a unit could not be read. Waiting again tries again.
        """
        if number not in self._missing:
            return
        self._begin()
        with self._changed:
            if self._told:
                self._error, self._told = None, False
            while number in self._missing:
                if self._error is not None:
                    self._told = True
                    raise self._error
                if self._closing:
                    raise MossError("the model is closed.")
                self._wanted = number
                self._changed.notify_all()
                self._changed.wait()

    def close(self) -> None:
        """Stop and join the thread; it finishes the request that it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _then_begin(self, other: "Arrivals") -> bool:
        """Whether the other's reading will begin when this one's has ended."""
        with self._changed:
            if self._missing and not self._closing:
                self._then.append(other)
                return True
            return False

    def _begin(self) -> None:
        with self._changed:
            if self._thread is None and self._missing and not self._closing:
                self._thread = threading.Thread(target=self._run, name="moss-jt loader", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while (number := self._next()) is not None:
                self._read_one(number)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
        for other in self._then:
            other._begin()

    def _read_one(self, number: int) -> None:
        error = None
        complete = False
        try:
            complete = self._read(number, lambda: self._closing)
        except MossError as raised:
            error = raised
        with self._changed:
            if complete:
                del self._missing[number]
            self._error = error
            self._changed.notify_all()

    def _next(self) -> int | None:
        """The unit that somebody waits for, or the first that is missing; None where all are there, or when closing. After an
        error it waits until somebody who was told asks again."""
        with self._changed:
            while self._error is not None and not self._closing:
                self._changed.wait()
            if self._closing or not self._missing:
                return None
            wanted, self._wanted = self._wanted, None
            return wanted if wanted in self._missing else next(iter(self._missing))
