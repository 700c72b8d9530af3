"""Cross entropy over a vocabulary that comes slab by slab."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moss_jt.kernels.training import LogitSummary
from moss_jt.train.lora import Floats
from moss_jt.train.masked_samples import TokenSample


@dataclass(frozen=True)
class StepResult:
    """
    loss      mean over the targets of minus the logarithm of their probability
    accuracy  share of the targets that are the most likely token
    targets   how many there were
    likeliest int64 [targets]; at each target the most likely token after the right ones before it
    """

    loss: float
    accuracy: float
    targets: int
    likeliest: NDArray[np.int64] = field(compare=False, repr=False)


def predictions(samples: Sequence[TokenSample]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows of the step's tokens that predict a target, and the targets."""
    targets = np.concatenate([sample.targets for sample in samples])
    rows = np.flatnonzero(targets) - 1  # a sample's first token is no target
    return rows, np.concatenate([sample.token_ids for sample in samples])[rows + 1]


class Softmax:
    """Cross entropy over a vocabulary that comes slab by slab, in any order."""

    def __init__(self, wanted: NDArray[np.int32]) -> None:
        self._wanted = wanted
        self._largest = np.full(len(wanted), -np.inf, np.float32)
        self._best = np.full(len(wanted), -1, np.int64)
        self._total = np.zeros(len(wanted), np.float64)  # of exponentials, relative to the largest
        self._own = np.zeros(len(wanted), np.float32)  # the targets' logits

    def columns(self, part: slice, first: int, count: int) -> NDArray[np.int64]:
        """For each of the predictions ``part`` where its target is among ``count`` rows of the head, from ``first`` on, or -1."""
        columns = self._wanted[part].astype(np.int64) - first
        return np.where((columns >= 0) & (columns < count), columns, -1)

    def see(self, part: slice, first: int, columns: NDArray[np.int64], logits: LogitSummary) -> None:
        """What the logits of these predictions are by rows ``first`` .. of the head."""
        largest = np.maximum(self._largest[part], logits.largest)
        self._total[part] *= np.exp(self._largest[part] - largest, dtype=np.float64)
        self._total[part] += logits.total * np.exp(logits.largest - largest, dtype=np.float64)
        better = logits.largest > self._largest[part]
        self._best[part] = np.where(better, logits.best + first, self._best[part])
        self._largest[part] = largest
        self._own[part] += np.where(columns >= 0, logits.own, 0)

    def result(self) -> StepResult:
        losses = np.log(self._total) + self._largest.astype(np.float64) - self._own
        hits = self._best == self._wanted
        return StepResult(float(losses.mean()), float(hits.mean()), len(self._wanted), self._best)

    def shift(self, part: slice) -> Floats:
        """What is to be taken from the logits of these predictions, so that their exponentials are probabilities."""
        shift: Floats = self._largest[part] + np.log(self._total[part]).astype(np.float32)
        return shift

    @property
    def share(self) -> float:
        """Of one prediction in the mean."""
        return 1 / len(self._wanted)
