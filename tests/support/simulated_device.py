"""A device in a few lines: two queues whose work is done late, in parts, and in any order that CUDA's rules allow.

A queue does its work in order. Between the queues nothing is ordered but by events: a wait holds its queue until the recording
that was the event's latest when the wait was queued; an event that was never recorded holds nobody. A copy reads its source when it
runs and writes its target part by part; a computation looks at its memory part by part, too.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moss_jt.kernels.interface import Queue

Step = Callable[[], None]
PARTS = 4


class WrongOrder(AssertionError):
    """The device's work was allowed to run in an order that gives wrong results, or to stand still."""


@dataclass
class Work:
    """steps: what is left of it, one part after the other; after: the recording that it waits for."""

    steps: deque[Step] = field(default_factory=deque)
    after: tuple[int, int] | None = None


class SimulatedDevice:
    """moss_jt.weights.device_ring.CopyEngine over NumPy arrays, worked off as ``favour`` and the random numbers of ``seed`` say.

    favour: the queue that goes first whenever it can; None for either.
    eager: the chance of another step after each call; 0 does nothing before somebody waits.
    """

    def __init__(self, seed: int, favour: Queue | None = None, eager: float = 0.5) -> None:
        self._random = random.Random(seed)
        self._favour = favour
        self._eager = eager
        self._queues: dict[Queue, deque[Work]] = {queue: deque() for queue in Queue}
        self._recorded: list[int] = []  # by event: how often it was recorded
        self._happened: set[tuple[int, int]] = set()
        self.calls: list[str] = []

    def new_event(self) -> int:
        self._recorded.append(0)
        return len(self._recorded) - 1

    def copy(self, memory: np.ndarray, offset: int, source: np.ndarray) -> None:
        def write(part: slice) -> Step:
            return lambda: memory[offset : offset + len(source)].__setitem__(part, source[part])

        self._add(Queue.COPIES, Work(deque(write(part) for part in parts(len(source)))), "copy")

    def compute(self, look: Callable[[slice], None], size: int) -> None:
        """Queue a computation that looks at ``size`` elements, part by part."""

        def step(part: slice) -> Step:
            return lambda: look(part)

        self._add(Queue.COMPUTE, Work(deque(step(part) for part in parts(size))), "compute")

    def record(self, event: int, queue: Queue) -> None:
        self._recorded[event] += 1
        recording = (event, self._recorded[event])
        self._add(queue, Work(deque([lambda: self._happened.add(recording)])), f"record {queue.name}")

    def wait(self, queue: Queue, event: int) -> None:
        after = (event, self._recorded[event]) if self._recorded[event] else None
        self._add(queue, Work(after=after), f"wait {queue.name}")

    def synchronize(self, event: int) -> None:
        self.calls.append("synchronize")
        while self._recorded[event] and (event, self._recorded[event]) not in self._happened:
            if not self._step():
                raise WrongOrder("the host waits for what never comes")

    def finish(self) -> None:
        while self._step():
            pass
        if any(self._queues.values()):
            raise WrongOrder("the queues wait for each other")

    def pending(self, queue: Queue) -> int:
        return len(self._queues[queue])

    def _add(self, queue: Queue, work: Work, call: str) -> None:
        self.calls.append(call)
        self._queues[queue].append(work)
        while self._random.random() < self._eager and self._step():
            pass

    def _step(self) -> bool:
        """One part of some queue's first work; False where all queues are empty or held."""
        able = [queue for queue, works in self._queues.items() if works and self._may_run(works[0])]
        if not able:
            return False
        queue = self._favour if self._favour in able else self._random.choice(able)
        assert queue is not None
        work = self._queues[queue][0]
        if work.steps:
            work.steps.popleft()()
        if not work.steps:
            self._queues[queue].popleft()
        return True

    def _may_run(self, work: Work) -> bool:
        return work.after is None or work.after in self._happened


class ForgetfulDevice(SimulatedDevice):
    """Forgets every call of one kind, as "wait COPIES": a planted fault."""

    def __init__(self, forgotten: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.forgotten = forgotten

    def _add(self, queue: Queue, work: Work, call: str) -> None:
        if call != self.forgotten:
            super()._add(queue, work, call)

    def record(self, event: int, queue: Queue) -> None:
        if f"record {queue.name}" != self.forgotten:
            super().record(event, queue)

    def synchronize(self, event: int) -> None:
        if self.forgotten != "synchronize":
            super().synchronize(event)


def parts(size: int) -> Iterator[slice]:
    step = -(-size // PARTS)
    return (slice(first, first + step) for first in range(0, size, step))
