"""Optimizers that update a tensor as soon as its gradient is there, so that the gradients of a model never exist all at once.

LOMO (Lv et al., arXiv 2306.09782) is plain descent. AdaLomo (Lv et al., arXiv 2310.10195) keeps of the second moment a row and
a column of each matrix, and moves every tensor by a share of its own size. AdamW keeps two moments of everything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from moss_jt.train.lora import Floats
from moss_jt.train.master_weights import Masters
from moss_jt.train.optimizer import AdamW, squares_of

# Models that learn as a whole change more from step to step than adapters: AdamW's second moment forgets sooner.
SECOND_DECAY = 0.98

OptimizerName = Literal["adalomo", "adamw", "lomo"]


@dataclass(frozen=True)
class FullSettings:
    """
    optimizer  adalomo takes the least memory that learns well; adamw three times as much; lomo is plain descent
    tied       head and embedding learn as one matrix
    """

    optimizer: OptimizerName = "adalomo"
    tied: bool = False


class FusedOptimizer(Protocol):
    """The rule by which a tensor follows its gradient.

    arrays      what it remembers, float32, by name: a training's state
    normalises  a step's length does not depend on the gradient's: nothing is to be clipped
    """

    arrays: dict[str, Floats]
    normalises: bool

    def update(self, name: str, gradient: Floats, rate: float, step: int) -> None:
        """One tensor's step, in place; ``step`` counts from 1. The gradient may be overwritten."""
        ...


class Lomo:
    """``x -= rate * g``, after ``x *= 1 - rate * decay`` of matrices."""

    normalises = False

    def __init__(self, masters: Masters, weight_decay: float) -> None:
        self.arrays: dict[str, Floats] = {}
        self._tensors, self._decay = masters.tensors, weight_decay

    def update(self, name: str, gradient: Floats, rate: float, step: int) -> None:
        x = self._tensors[name]
        if x.ndim == 2:
            x *= np.float32(1 - rate * self._decay)
        gradient *= np.float32(rate)
        x -= gradient


class AdaLomo:
    """With the second moment factored as in Adafactor, and each tensor's update normalised by itself:
    ``u = g / sqrt(v)``, then ``x -= rate * max(1e-3, rms(x)) * u / max(1, rms(u))``.

    The moment forgets as in Adafactor: step t keeps ``1 - t ** -0.8`` of it.
    """

    normalises = True

    def __init__(self, masters: Masters, weight_decay: float) -> None:
        self._tensors, self._decay = masters.tensors, weight_decay
        # Of a matrix a row's and a column's means, of a vector everything.
        sizes = {name: sum(tensor.shape) for name, tensor in masters.tensors.items()}
        moments = np.zeros(sum(sizes.values()), np.float32)
        self.arrays = {"moments": moments}
        ends = np.cumsum(list(sizes.values())).tolist()
        self._moments = {
            name: moments[end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    def update(self, name: str, gradient: Floats, rate: float, step: int) -> None:
        x, forget = self._tensors[name], np.float32(step**-0.8)
        moment, squares = self._moments[name], np.square(gradient) + np.float32(1e-30)
        means = squares if x.ndim == 1 else np.concatenate([squares.mean(axis=1), squares.mean(axis=0)])
        moment += forget * (means - moment)
        if x.ndim == 1:
            gradient /= np.sqrt(moment)
        else:
            rows, columns = moment[: len(x)], moment[len(x) :]
            gradient /= np.sqrt(rows / rows.mean())[:, None]
            gradient /= np.sqrt(columns)
        length = rate * max(1e-3, _rms(x))
        if x.ndim == 2:
            x *= np.float32(1 - length * self._decay)
        gradient *= np.float32(length / max(1.0, _rms(gradient)))
        x -= gradient


class FusedAdamW:
    """moss_jt.train.optimizer.AdamW, tensor by tensor; vectors do not decay."""

    normalises = False

    def __init__(self, masters: Masters, weight_decay: float) -> None:
        first, second = np.zeros_like(masters.values), np.zeros_like(masters.values)
        self.arrays = {"first": first, "second": second}
        self._tensors, self._rules = masters.tensors, dict[str, AdamW]()
        moments = zip(masters.views(first).items(), masters.views(second).values(), strict=True)
        for (name, m), v in moments:
            rule = AdamW(0, weight_decay if m.ndim == 2 else 0.0, SECOND_DECAY)
            rule.first, rule.second = m.reshape(-1), v.reshape(-1)
            self._rules[name] = rule

    def update(self, name: str, gradient: Floats, rate: float, step: int) -> None:
        rule = self._rules[name]
        rule.steps = step - 1
        rule.step(self._tensors[name].reshape(-1), gradient.reshape(-1), rate)


OPTIMIZERS: dict[OptimizerName, Callable[[Masters, float], FusedOptimizer]] = {
    "adalomo": AdaLomo,
    "adamw": FusedAdamW,
    "lomo": Lomo,
}
# What each remembers, in copies of the weights; AdaLomo's rows and columns are less than a hundredth.
COPIES_REMEMBERED: dict[OptimizerName, int] = {"adalomo": 0, "adamw": 2, "lomo": 0}
# Largest learning rates that are usual for teaching a model that knows something.
USUAL_RATES: dict[OptimizerName, float] = {"adalomo": 5e-4, "adamw": 2e-5, "lomo": 3e-2}


def _rms(x: Floats) -> float:
    return math.sqrt(squares_of(x) / x.size)
