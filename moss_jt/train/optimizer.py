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
    """Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW with its default first beta and epsilon.

    first, second  (P,) float32, the moments
    steps          that were taken
    """

    def __init__(self, size: int, weight_decay: float, beta_2: float = BETA_2) -> None:
        self.first, self.second = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.steps = 0
        self._decay, self._beta_2 = weight_decay, beta_2

    def step(self, values: Floats, gradient: Floats, learning_rate: float) -> None:
        """One step, in place."""
        self.steps += 1
        correction_1 = 1 - BETA_1**self.steps
        correction_2 = math.sqrt(1 - self._beta_2**self.steps)
        shrink = np.float32(1 - learning_rate * self._decay)
        for begin in range(0, len(values), CHUNK):
            part = slice(begin, begin + CHUNK)
            x, g, m, v = values[part], gradient[part], self.first[part], self.second[part]
            x *= shrink
            m += np.float32(1 - BETA_1) * (g - m)
            v *= np.float32(self._beta_2)
            v += np.float32(1 - self._beta_2) * g * g
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
    length = math.sqrt(squares_of(gradient))
    factor = shortening(length, most)
    if factor < 1:
        gradient *= np.float32(factor)
    return length


def shortening(length: float, most: float) -> float:
    """What a gradient of this length is to be multiplied with, as torch's clip_grad_norm_.

    Raises:
        MossError: it is no number.
    """
    check_finite(length, "the loss or its gradient")
    return most / (length + 1e-6) if length > most else 1.0


def check_finite(value: float, name: str) -> None:
    """
    Raises:
        MossError: it is no number.
    """
    if not math.isfinite(value):
        raise MossError(
            f"{name} is no number any more: training has blown up. What was good stays. Begin again with a lower --lr and "
            "another --out."
        )


def squares_of(gradient: Floats) -> float:
    """The sum of all squares, in double precision: there are millions. Not by BLAS, whose bits depend on its threads."""
    flat = gradient.reshape(-1)
    parts = (flat[begin : begin + CHUNK] for begin in range(0, len(flat), CHUNK))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
