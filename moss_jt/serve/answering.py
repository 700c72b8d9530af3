"""Answers that are being written, each with a log of what came, from which the loop sends.

A thread begins each part of an answer. It may write all of it, waiting for the engine as it goes; or it hands on a step, which
writes what the engine has ready, and which the loop takes whenever the engine has computed. So a pass of many answers costs one
wake-up, whatever their number.

The loop never waits for the engine, and the engine never for the loop or a reader: a slow or lost one changes nothing for the
others, and an answer can be read again from any position.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from moss_jt.serve.errors import STOPPING, ApiError, failure_of

# Parts of all answers, one for each choice; and events of all answers that are kept to be taken up again.
MOST_PARTS = 512
MOST_EVENTS = 200_000


class Bell:
    """Has the loop call something, from any thread and without waiting: one wake-up serves all that comes until it has its turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._rung = False

    def ring(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if not self._rung:
            self._rung = True
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                pass  # the loop is closed: nobody reads any more

    def _answer(self) -> None:
        while True:
            while self._calls:
                self._calls.popleft()()
            self._rung = False
            if not self._calls:  # or else it came after the last look, and found the bell rung
                return
            self._rung = True


class Answering:
    """One answer. What is written goes through :meth:`put`, from any thread.

    parts   how many write it
    log     what came so far
    error   what ended it, where that was an error
    ended   nothing more comes
    status  what it waits for at this moment, to be told in a stream that is silent: queue position, progress; None for nothing
    form    how it is worded, for whoever takes it up again
    """

    def __init__(self, bell: Bell, parts: int = 1) -> None:
        self.parts = parts
        self.log: list[Any] = []
        self.error: ApiError | None = None
        self.ended = False
        self.ended_at = 0.0
        self.cancelled = threading.Event()
        self.status: Callable[[], dict[str, Any] | None] = lambda: None
        self.form: Any = None
        self._bell = bell
        self._waiting: set[asyncio.Future[bool]] = set()
        self._over = asyncio.Event()
        self._told = False
        self._to_cancel: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def put(self, event: Any) -> None:
        self.log.append(event)
        if not self._told:
            self._told = True
            self._bell.ring(self._wake)

    def _wake(self) -> None:
        self._told = False
        for changed in self._waiting:
            _tell(changed, True)
        if self.ended:
            self._over.set()

    def end(self) -> None:
        self.ended, self.ended_at = True, time.monotonic()
        self._bell.ring(self._wake)

    def when_cancelled(self, call: Callable[[], None]) -> None:
        """Have something called, once, when nobody wants the answer any more: at once where that is so already."""
        with self._lock:
            if not self.cancelled.is_set():
                self._to_cancel.append(call)
                return
        call()

    def cancel(self, error: ApiError | None = None) -> None:
        """Nobody wants any more of it, or it cannot go on, which who still reads is told. It ends within one block of the model."""
        with self._lock:
            if not self.ended:
                self.error = self.error or error
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
            if position < len(self.log):
                part = self.log[position:]
                position += len(part)
                yield part
            elif self.ended:
                break
            elif not await self._change(silence_s):
                yield ()
        if self.error is not None:
            raise self.error

    async def _change(self, most_s: float) -> bool:
        """Whether something came within so many seconds."""
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(most_s, _tell, changed, False)
        self._waiting.add(changed)
        try:
            return await changed
        finally:
            timer.cancel()
            self._waiting.discard(changed)

    async def over(self) -> None:
        """Wait until nothing more comes."""
        await self._over.wait()

    async def whole(self) -> Sequence[Any]:
        """All that was put, once nothing more comes.

        Raises:
            ApiError: the answer failed.
        """
        await self.over()
        if self.error is not None:
            raise self.error
        return self.log


# Writes what is there of a part of an answer, without waiting for more; returns whether that was all.
Step = Callable[[], bool]
# Writes its part of an answer, in a thread, or begins it; the step then goes on with it, in the loop.
Part = Callable[[Answering], Step | None]


def _tell(waiting: asyncio.Future[bool], came: bool) -> None:
    if not waiting.done():
        waiting.set_result(came)


class Answers:
    """All answers of a server, and their number's bound."""

    def __init__(self, most: int, kept: int, kept_s: float) -> None:
        self.stopping = False
        self._most, self._kept, self._kept_s = most, kept, kept_s
        self._running: set[Answering] = set()
        self._steps: list[Step] = []
        self._bell: Bell | None = None
        self._named: OrderedDict[str, Answering] = OrderedDict()

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, parts: Sequence[Part], name: str | None = None) -> Answering:
        """An answer that these write; to be called in the loop.

        Args:
            name: under which it can be found again.

        Raises:
            ApiError: too many are being written already, or the server is being stopped.
        """
        if self.stopping:
            raise ApiError(503, STOPPING, code="stopping", retry_after_s=30)
        written = sum(answering.parts for answering in self._running)
        if len(self._running) >= self._most or (self._running and written + len(parts) > MOST_PARTS):
            message = f"The server is busy with {len(self._running)} answers."
            raise ApiError(429, message, code="too_many_requests", retry_after_s=5)
        self._bell = bell = self._bell or Bell(asyncio.get_running_loop())
        answering = Answering(bell, len(parts))
        self._running.add(answering)
        left = _Count(len(parts))

        def over(error: ApiError | None) -> None:
            if error is not None:
                answering.cancel(error)
            if left.down() == 0:
                self._running.discard(answering)
                answering.end()

        def write(part: Part) -> None:
            try:
                step = part(answering)
            except BaseException as raised:  # noqa: BLE001  the client is told, whatever it is
                over(failure_of(raised))
                return
            if step is None:
                over(None)
            else:
                bell.ring(partial(self._go_on, partial(_take, step, over)))

        if name is not None:
            self._keep(name, answering)
        for part in parts:
            threading.Thread(target=write, args=(part,), name="moss-jt answer", daemon=True).start()
        return answering

    def _go_on(self, step: Step) -> None:
        if not step():
            self._steps.append(step)

    def computed(self) -> None:
        """There may be something new for the answers that are written; to be called from any thread."""
        if self._bell is not None:
            self._bell.ring(self._step)

    def _step(self) -> None:
        self._steps = [step for step in self._steps if not step()]

    def _keep(self, name: str, answering: Answering) -> None:
        self._named.pop(name, None)
        self._named[name] = answering
        old = time.monotonic() - self._kept_s
        events = sum(len(kept.log) for kept in self._named.values())
        for other, kept in [*self._named.items()]:
            many = len(self._named) > self._kept or events > MOST_EVENTS
            if kept.ended and (many or kept.ended_at < old):
                events -= len(kept.log)
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
            answering.cancel(ApiError(503, STOPPING, code="stopping"))

    async def ended(self, most_s: float) -> bool:
        """Wait until none is being written, but not for ever."""
        end = time.monotonic() + most_s
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._running


def _take(step: Step, over: Callable[[ApiError | None], None]) -> bool:
    try:
        done = step()
    except BaseException as raised:  # noqa: BLE001  as in a thread
        over(failure_of(raised))
        return True
    if done:
        over(None)
    return done


class _Count:
    def __init__(self, value: int) -> None:
        self._value, self._lock = value, threading.Lock()

    def down(self) -> int:
        with self._lock:
            self._value -= 1
            return self._value
