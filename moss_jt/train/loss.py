"""Cross entropy over a vocabulary that comes slab by slab."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moss_jt.train.lora import Floats
from moss_jt.train.samples import TokenSample


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

    def see(self, part: slice, first: int, logits: Floats) -> None:
        """logits (R, V') of rows ``first`` .. of the head, for the predictions ``part``."""
        slab_largest = logits.max(axis=1)
        largest = np.maximum(self._largest[part], slab_largest)
        self._total[part] *= np.exp(self._largest[part] - largest, dtype=np.float64)
        self._total[part] += np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
        self._best[part] = np.where(
            slab_largest > self._largest[part], logits.argmax(axis=1) + first, self._best[part]
        )
        self._largest[part] = largest
        rows, columns = self._inside(part, first, logits.shape[1])
        self._own[part][rows] = logits[rows, columns]

    def result(self) -> StepResult:
        losses = np.log(self._total) + self._largest.astype(np.float64) - self._own
        hits = self._best == self._wanted
        return StepResult(float(losses.mean()), float(hits.mean()), len(self._wanted), self._best)

    def slope(self, part: slice, first: int, logits: Floats) -> Floats:
        """The mean loss's derivative by these logits; may overwrite them."""
        shift = self._largest[part] + np.log(self._total[part]).astype(np.float32)
        slope: Floats = np.exp(logits - shift[:, None], out=logits)
        rows, columns = self._inside(part, first, logits.shape[1])
        slope[rows, columns] -= 1
        slope /= np.float32(len(self._wanted))
        return slope

    def _inside(self, part: slice, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the predictions have their target in this slab, and its columns there."""
        columns = self._wanted[part].astype(np.int64) - first
        rows = np.flatnonzero((columns >= 0) & (columns < count))
        return rows, columns[rows]
