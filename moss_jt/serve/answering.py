"""Answers that are being written: a thread for each, which waits for the engine, and a log of what came, which the loop reads.

The loop never waits for the engine, and the engine never for a reader: a slow or lost one changes nothing for the others, and an
answer can be read again from any position.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from moss_jt.serve.errors import STOPPING, ApiError, failure_of

# Threads that write answers, one for each choice; and events of all answers that are kept to be taken up again.
MOST_THREADS = 512
MOST_EVENTS = 200_000


class Answering:
    """One answer. What is written goes through :meth:`put`, from any thread.

    parts   threads that write it
    error   what ended it, where that was an error
    ended   nothing more comes
    status  what it waits for at this moment, to be told in a stream that is silent: queue position, progress; None for nothing
    form    how it is worded, for whoever takes it up again
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, parts: int = 1) -> None:
        self.parts = parts
        self.error: ApiError | None = None
        self.ended = False
        self.ended_at = 0.0
        self.cancelled = threading.Event()
        self.status: Callable[[], dict[str, Any] | None] = lambda: None
        self.form: Any = None
        self._loop = loop
        self._log: list[Any] = []
        self._changed = asyncio.Event()
        self._told = False
        self._to_cancel: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def events(self) -> int:
        """How many there are so far."""
        return len(self._log)

    def put(self, event: Any) -> None:
        self._log.append(event)
        self._tell()

    def _tell(self) -> None:
        if not self._told:  # one call serves all that comes until the loop has its turn
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                pass  # the loop is closed: nobody reads any more

    def _wake(self) -> None:
        self._told = False
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end(self, error: ApiError | None = None) -> None:
        self.error, self.ended, self.ended_at = error, True, time.monotonic()
        self._told = False
        self._tell()

    def when_cancelled(self, call: Callable[[], None]) -> None:
        """Have something called, once, when nobody wants the answer any more: at once where that is so already."""
        with self._lock:
            if not self.cancelled.is_set():
                self._to_cancel.append(call)
                return
        call()

    def cancel(self) -> None:
        """Nobody wants any more of it. It ends within one block of the model."""
        with self._lock:
            self.cancelled.set()
            calls, self._to_cancel = self._to_cancel, []
        for call in calls:
            call()

    async def follow(self, silence_s: float) -> AsyncIterator[Sequence[Any]]:
        """All that was and will be put, in parts as they come; an empty part after so long a silence.

        Raises:
            ApiError: the answer failed, after all that was put.
        """
        position = 0
        while True:
            changed = self._changed
            if position < len(self._log):
                part = self._log[position:]
                position += len(part)
                yield part
            elif self.ended:
                break
            else:
                try:
                    async with asyncio.timeout(silence_s):
                        await changed.wait()
                except TimeoutError:
                    yield ()
        if self.error is not None:
            raise self.error


class Answers:
    """All answers of a server, and their number's bound."""

    def __init__(self, most: int, kept: int, kept_s: float) -> None:
        self.stopping = False
        self._most, self._kept, self._kept_s = most, kept, kept_s
        self._running: set[Answering] = set()
        self._named: OrderedDict[str, Answering] = OrderedDict()

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, parts: Sequence[Callable[[Answering], None]], name: str | None = None) -> Answering:
        """An answer that these write, each in a thread of its own; to be called in the loop.

        Args:
            name: under which it can be found again.

        Raises:
            ApiError: too many are being written already, or the server is being stopped.
        """
        if self.stopping:
            raise ApiError(503, STOPPING, code="stopping", retry_after_s=30)
        threads = sum(answering.parts for answering in self._running)
        if len(self._running) >= self._most or (self._running and threads + len(parts) > MOST_THREADS):
            message = f"The server is busy with {len(self._running)} answers."
            raise ApiError(429, message, code="too_many_requests", retry_after_s=5)
        answering = Answering(asyncio.get_running_loop(), len(parts))
        self._running.add(answering)
        left = _Count(len(parts))

        def write(part: Callable[[Answering], None]) -> None:
            error: ApiError | None = None
            try:
                part(answering)
            except BaseException as raised:  # noqa: BLE001  the client is told, whatever it is
                error = failure_of(raised)
                answering.cancel()
            answering.error = answering.error or error
            if left.down() == 0:
                self._running.discard(answering)
                answering.end(answering.error)

        if name is not None:
            self._keep(name, answering)
        for part in parts:
            threading.Thread(target=write, args=(part,), name="moss-jt answer", daemon=True).start()
        return answering

    def _keep(self, name: str, answering: Answering) -> None:
        self._named.pop(name, None)
        self._named[name] = answering
        old = time.monotonic() - self._kept_s
        events = sum(kept.events for kept in self._named.values())
        for other, kept in [*self._named.items()]:
            many = len(self._named) > self._kept or events > MOST_EVENTS
            if kept.ended and (many or kept.ended_at < old):
                events -= kept.events
                del self._named[other]

    def find(self, name: str) -> Answering | None:
        """An answer by its name, for some time after it has ended."""
        kept = self._named.get(name)
        if kept is not None and kept.ended and kept.ended_at < time.monotonic() - self._kept_s:
            del self._named[name]
            return None
        return kept

    def drop(self, name: str) -> None:
        self._named.pop(name, None)

    def stop(self) -> None:
        """End all of them, and begin no more."""
        self.stopping = True
        for answering in [*self._running]:
            answering.error = answering.error or ApiError(503, STOPPING, code="stopping")
            answering.cancel()

    async def ended(self, most_s: float) -> bool:
        """Wait until none is being written, but not for ever."""
        end = time.monotonic() + most_s
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._running


class _Count:
    def __init__(self, value: int) -> None:
        self._value, self._lock = value, threading.Lock()

    def down(self) -> int:
        with self._lock:
            self._value -= 1
            return self._value
