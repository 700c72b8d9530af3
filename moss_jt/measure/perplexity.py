"""How well a model predicts a text, and how far its predictions are from another model's.

The text is cut into windows of ``context`` tokens; each window is read from an empty cache, in passes small enough
that the logits of a pass stay small. A window's first token is given, every later one is scored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moss_jt.engine.causal_model import Rows
from moss_jt.errors import MossError

PASS_TOKENS = 128  # logits of one pass over MOSS's vocabulary: 52 MiB per model
_ROWS = 4  # widened to float64 at once


class NextTokens(Protocol):
    """What is needed of a model (moss_jt.engine.model.Model, or a scripted one)."""

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows) -> np.ndarray:
        """Logits (T, V) float32 of T new tokens at positions start_pos .., the earlier ones being in the cache."""
        ...


@dataclass
class Score:
    """Sums over the scored tokens of one model."""

    tokens: int = 0
    nats: float = 0.0

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats_per_token))


@dataclass
class Comparison:
    """Sums over the positions at which two models predicted a next token."""

    positions: int = 0
    divergence: float = 0.0
    agreed: int = 0

    @property
    def mean_divergence(self) -> float:
        """Mean KL(reference || model) in nats."""
        return self.divergence / self.positions

    @property
    def agreement(self) -> float:
        """Share of positions where both models would pick the same token greedily."""
        return self.agreed / self.positions


@dataclass
class Evaluation:
    model: Score
    reference: Score | None = None
    comparison: Comparison | None = None


def workspace_bytes(vocab_size: int, models: int) -> int:
    """What evaluating takes beside the models themselves: a pass's logits of each, and some rows in float64."""
    return vocab_size * (models * PASS_TOKENS * 4 + 4 * models * _ROWS * 8)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logits (T, V) to natural logarithms of the probabilities, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def evaluate(
    token_ids: Sequence[int],
    model: NextTokens,
    reference: NextTokens | None,
    context: int,
    pass_tokens: int = PASS_TOKENS,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Score a text, and compare with a reference where there is one.

    token_ids    at least 2
    context      tokens of a window, from 2 up
    pass_tokens  tokens that the models read at once
    on_tokens    is told how many tokens each pass has read

    Raises:
        MossError: the text or the context is too short, or the models' vocabularies differ.
    """
    if len(token_ids) < 2 or context < 2:
        raise MossError(
            f"a text of {len(token_ids)} tokens in windows of {context}: at least 2 of each are needed "
            "to predict one token from another."
        )
    result = Evaluation(Score())
    if reference is not None:
        result.reference, result.comparison = Score(), Comparison()
    for window, first, last in _passes(token_ids, context, pass_tokens):
        new, targets = window[first:last], np.asarray(window[first + 1 : last + 1])
        logits = model.forward(new, first, "all")
        others = None if reference is None else reference.forward(new, first, "all")
        _add_pass(result, logits, others, targets)
        on_tokens(len(new))
    return result


def _passes(
    token_ids: Sequence[int], context: int, pass_tokens: int
) -> Iterator[tuple[Sequence[int], int, int]]:
    """Windows, and in each the ranges of tokens read in one pass: all but the last, which predicts nothing in it."""
    for start in range(0, len(token_ids) - 1, context):
        window = token_ids[start : start + context]
        for first in range(0, len(window) - 1, pass_tokens):
            yield window, first, min(first + pass_tokens, len(window) - 1)


def _add_pass(result: Evaluation, logits: np.ndarray, others: np.ndarray | None, targets: np.ndarray) -> None:
    if others is not None and others.shape != logits.shape:
        raise MossError(
            f"the models cannot be compared: one predicts {logits.shape[1]} tokens, the other {others.shape[1]}. "
            "Name a model with the same vocabulary."
        )
    for first in range(0, len(targets), _ROWS):
        rows = slice(first, min(first + _ROWS, len(targets)))
        ours = log_probabilities(logits[rows])
        _add_score(result.model, ours, targets[rows])
        if others is not None and result.reference is not None and result.comparison is not None:
            theirs = log_probabilities(others[rows])
            _add_score(result.reference, theirs, targets[rows])
            _add_comparison(result.comparison, ours, theirs)


def _add_score(score: Score, logs: np.ndarray, targets: np.ndarray) -> None:
    score.tokens += len(targets)
    score.nats -= float(logs[np.arange(len(targets)), targets].sum())


def _add_comparison(comparison: Comparison, ours: np.ndarray, theirs: np.ndarray) -> None:
    comparison.positions += len(ours)
    comparison.divergence += float((np.exp(theirs) * (theirs - ours)).sum())
    comparison.agreed += int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
