"""The course of a training: which samples each step takes, and what it has come to. All of it follows from the seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moss_jt.errors import MossError


@dataclass(frozen=True)
class CourseSettings:
    """
    epochs, steps  how often all samples are learned, or how many steps there are; steps count where both are given
    step_tokens    a step takes whole samples of about so many tokens
    seed           of the samples' order, and of the adapter's beginning
    in_order       samples come as they are given, in every epoch: somebody has thought about what comes first
    """

    epochs: float = 2.0
    steps: int | None = None
    step_tokens: int = 1024
    seed: int = 42
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise MossError("there must be something to do: give --epochs or --steps a number above 0.")
        if self.step_tokens < 1:
            raise MossError(f"a step of {self.step_tokens} tokens is not possible.")


class Course:
    """The steps over samples of these lengths, in tokens.

    total  how many steps there are
    """

    def __init__(self, lengths: Sequence[int], settings: CourseSettings) -> None:
        self._lengths, self._settings = lengths, settings
        if settings.steps is not None:
            self.total = settings.steps
        else:
            epochs = int(np.ceil(settings.epochs))
            counts = [len(self._epoch(epoch)) for epoch in range(epochs)]
            part = settings.epochs - (epochs - 1)
            self.total = sum(counts[:-1]) + max(1, round(counts[-1] * part))

    def steps_from(self, first: int) -> Iterator[list[int]]:
        """The samples' numbers of step ``first`` and all after it."""
        epoch = begin = 0
        while begin < self.total:
            steps = self._epoch(epoch)
            for number, step in enumerate(steps, begin):
                if first <= number < self.total:
                    yield step
            begin += len(steps)
            epoch += 1

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Every sample once, in an order of this epoch's own, unless it is given."""
        if self._settings.in_order:
            order = np.arange(len(self._lengths))
        else:
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._lengths))
        steps: list[list[int]] = []
        left = 0
        for number in order.tolist():
            if self._lengths[number] > left:
                steps.append([])
                left = self._settings.step_tokens
            steps[-1].append(number)
            left -= self._lengths[number]
        return steps
