"""How likely tokens were: logarithms of the model's own probabilities, before penalties, biases and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from moss_jt.errors import MossError

MOST_TOP = 100


@dataclass(frozen=True)
class Logprob:
    """A token that stands in a text, and what else might have stood there.

    top  the likeliest tokens there and their natural logarithms, likeliest first
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def check_top(top: int | None) -> None:
    """Raises MossError where it is no number of tokens; None is no number that anybody wants."""
    if top is not None and (not isinstance(top, Integral) or not 0 <= int(top) <= MOST_TOP):
        raise MossError(f"logprobs is {top!r:.40}; it must be a whole number of tokens from 0 to {MOST_TOP}.")


def logprobs_of(logits: np.ndarray, token_ids: Sequence[int], top: int) -> list[Logprob]:
    """For rows of logits (R, V) float32 and the R tokens that follow, with so many of the likeliest beside each."""
    return [_logprob(row, token, top) for row, token in zip(logits, token_ids, strict=True)]


def _logprob(row: np.ndarray, token: int, top: int) -> Logprob:
    best = row.max()
    total = float(np.exp(row - best).sum(dtype=np.float64))
    shift = float(best) + float(np.log(total))
    likeliest = np.arange(len(row) if top else 0)
    if 0 < top < len(row):
        likeliest = np.flatnonzero(row >= np.partition(row, -top)[-top])
    likeliest = likeliest[np.argsort(-row[likeliest], kind="stable")][:top]
    return Logprob(
        token, float(row[token]) - shift, tuple((int(one), float(row[one]) - shift) for one in likeliest)
    )
