"""AdamW over one flat array, its learning rate, and clipping. All in float32: half precision loses steps of 1e-4."""

import math
from dataclasses import dataclass

import numpy as np

from moss_jt.errors import MossError
from moss_jt.train.lora import Floats

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
# Elements that are updated at once: what lies between stays in the cache.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Schedule:
    """A cosine from ``peak`` to zero at ``steps``, after a straight way up over the first share of them, as finetune_moss.py.

    Raises:
        MossError: a number makes no sense.
    """

    peak: float
    steps: int
    warm_up: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise MossError(f"a learning rate of {self.peak} is not possible. Give --lr a number like 1e-4.")
        if self.steps < 1:
            raise MossError("there must be one step at least.")

    def at(self, step: int) -> float:
        """Of the step with this number, from 0."""
        first = round(self.steps * self.warm_up)
        if step < first:
            return self.peak * (step + 1) / (first + 1)
        done = (step - first) / max(1, self.steps - first)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))


class AdamW:
    """Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW with its default betas and epsilon.

    first, second  (P,) float32, the moments
    steps          that were taken
    """

    def __init__(self, size: int, weight_decay: float) -> None:
        self.first, self.second = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.steps = 0
        self._decay = weight_decay

    def step(self, values: Floats, gradient: Floats, learning_rate: float) -> None:
        """One step, in place."""
        self.steps += 1
        correction_1 = 1 - BETA_1**self.steps
        correction_2 = math.sqrt(1 - BETA_2**self.steps)
        shrink = np.float32(1 - learning_rate * self._decay)
        for begin in range(0, len(values), CHUNK):
            part = slice(begin, begin + CHUNK)
            x, g, m, v = values[part], gradient[part], self.first[part], self.second[part]
            x *= shrink
            m += np.float32(1 - BETA_1) * (g - m)
            v *= np.float32(BETA_2)
            v += np.float32(1 - BETA_2) * g * g
            x -= (
                np.float32(learning_rate / correction_1)
                * m
                / (np.sqrt(v) / np.float32(correction_2) + np.float32(EPSILON))
            )


def clip(gradient: Floats, most: float) -> float:
    """Shorten a gradient to this length, in place; returns the length that it had.

    Raises:
        MossError: it is no number.
    """
    length = math.sqrt(sum(float(np.dot(part, part)) for part in _parts(gradient)))
    if not math.isfinite(length):
        raise MossError(
            "the gradient is no number any more: training has blown up. The last good adapter stays. Lower --lr, and run the "
            "same command again."
        )
    if length > most:
        gradient *= np.float32(most / (length + 1e-6))
    return length


def _parts(gradient: Floats) -> list[np.ndarray]:
    """In double precision: a sum of millions of squares."""
    return [gradient[begin : begin + CHUNK].astype(np.float64) for begin in range(0, len(gradient), CHUNK)]
