"""How well a model predicts a text, and how far its predictions are from another model's.

The text is cut into windows of ``context`` tokens; each window is read from an empty cache, several side by side, in passes
small enough that the logits of a pass stay small. A window's first token is given, every later one is scored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moss_jt.engine.causal_model import LoadedAdapter
from moss_jt.engine.engine import Engine
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE

MOST_ROWS = 512  # of logits at once
_ROWS = 4  # widened to float64 at once
DRAFTS = (4, 8, 16, 22)  # lengths for which it is told what drafts would bring


class NextTokens(Protocol):
    """What is needed of a model: EngineTokens, or a scripted one."""

    def window(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits (T, V) float32 after each token of a text, part after part; parts of two models are of equal lengths."""
        ...


class EngineTokens:
    """A model's predictions by way of its engine, which reads in one pass what is asked for at once.

    Args:
        adapter: with which it reads; None for the model alone.
    """

    def __init__(self, engine: Engine, adapter: LoadedAdapter | None = None) -> None:
        self._engine, self._adapter = engine, adapter

    def window(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Page after page."""
        text = Text(self._engine, adapter=self._adapter)
        text.extend(token_ids)
        page: list[np.ndarray] = []
        for first, logits in text.logits():
            page.append(logits)
            end = first + len(logits)
            if end % PAGE == 0 or end == len(token_ids):
                yield np.concatenate(page)
                page = []


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
    """Sums over the positions at which two models predicted a next token.

    passes  of the reference over the text, if the model drafted so many tokens for each
    """

    positions: int = 0
    divergence: float = 0.0
    agreed: int = 0
    passes: dict[int, int] = field(default_factory=lambda: dict.fromkeys(DRAFTS, 0))

    @property
    def mean_divergence(self) -> float:
        """Mean KL(reference || model) in nats."""
        return self.divergence / self.positions

    @property
    def agreement(self) -> float:
        """Share of positions where both models would pick the same token greedily."""
        return self.agreed / self.positions

    def tokens_per_pass(self, drafted: int) -> float:
        """Tokens that a pass of the one model brings where the other drafts so many, one of DRAFTS, for it."""
        return self.positions / self.passes[drafted]


@dataclass
class Evaluation:
    model: Score
    reference: Score | None = None
    comparison: Comparison | None = None


def workspace_bytes(vocab_size: int, models: int, rows: int) -> int:
    """What evaluating takes beside the models themselves: two passes' logits of each, and some rows in float64."""
    return vocab_size * (2 * models * rows * 4 + 4 * models * _ROWS * 8)


def rows_at_once(vocab_size: int, models: int, budget_bytes: int) -> int:
    """Rows of logits of one pass: whole pages, as many as a twentieth of the memory holds; the more, the fewer passes."""
    page_bytes = workspace_bytes(vocab_size, models, PAGE)
    return min(MOST_ROWS, max(1, budget_bytes // 20 // page_bytes) * PAGE)


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
    together: int = 1,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Score a text, and compare with a reference where there is one.

    token_ids  at least 2
    context    tokens of a window, from 2 up
    together   windows that are read side by side
    on_tokens  is told how many tokens were read

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
    windows = [token_ids[start : start + context] for start in range(0, len(token_ids) - 1, context)]
    for first in range(0, len(windows), together):
        readers = [_Window(window, model, reference) for window in windows[first : first + together]]
        while readers:
            for reader in list(readers):
                part = reader.next_part()
                if part is None:
                    readers.remove(reader)
                    if result.comparison is not None:
                        _add_passes(result.comparison, reader.agreed)
                    continue
                reader.agreed += _add_pass(result, *part)
                on_tokens(len(part[2]))
    return result


class _Window:
    """One window as both models read it. Its last token predicts nothing in it and is not read."""

    def __init__(self, window: Sequence[int], model: NextTokens, reference: NextTokens | None) -> None:
        self._window = window
        self._read = 0
        self.agreed: list[bool] = []  # at each position, whether both models would pick the same token
        models = [model] if reference is None else [model, reference]
        self._logits = [one.window(window[:-1]) for one in models]

    def next_part(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray] | None:
        """Logits of both models, and the tokens that came."""
        parts = [next(logits, None) for logits in self._logits]
        if parts[0] is None:
            return None
        first, self._read = self._read, self._read + len(parts[0])
        targets = np.asarray(self._window[first + 1 : self._read + 1])
        return parts[0], parts[1] if len(parts) > 1 else None, targets


def passes_needed(agreed: Sequence[bool], drafted: int) -> int:
    """Passes over a text that one model writes and another drafts for, ``drafted`` tokens at a time; ``agreed``: at which
    positions the draft's token is the text's. A pass ends with the first that is not, or with the token after the draft.
    """
    passes, position = 0, 0
    while position < len(agreed):
        end = min(position + drafted, len(agreed))
        while position < end and agreed[position]:
            position += 1
        position += 1
        passes += 1
    return passes


def _add_passes(comparison: Comparison, agreed: Sequence[bool]) -> None:
    for drafted in DRAFTS:
        comparison.passes[drafted] += passes_needed(agreed, drafted)


def _add_pass(
    result: Evaluation, logits: np.ndarray, others: np.ndarray | None, targets: np.ndarray
) -> list[bool]:
    """Count a pass; returns at which positions both models would pick the same token, where there are two."""
    agreed: list[bool] = []
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
            agreed += _add_comparison(result.comparison, ours, theirs)
    return agreed


def _add_score(score: Score, logs: np.ndarray, targets: np.ndarray) -> None:
    score.tokens += len(targets)
    score.nats -= float(logs[np.arange(len(targets)), targets].sum())


def _add_comparison(comparison: Comparison, ours: np.ndarray, theirs: np.ndarray) -> list[bool]:
    comparison.positions += len(ours)
    comparison.divergence += float((np.exp(theirs) * (theirs - ours)).sum())
    agreed: list[bool] = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).tolist()
    comparison.agreed += sum(agreed)
    return agreed
