"""A model without weights: what follows a text is a function of the text, and every pass is written down."""

from collections.abc import Callable, Sequence

import numpy as np

from moss_jt.engine.causal_model import Rows

VOCABULARY = 50


def one_hot(token: int) -> np.ndarray:
    """Logits (V,) that leave no doubt."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = 100
    return logits


def dice(text: tuple[int, ...]) -> np.ndarray:
    """Logits (V,) that look random, the same ones after the same text."""
    return np.random.default_rng(list(text)).normal(0, 2, VOCABULARY).astype(np.float32)


def count_up(text: tuple[int, ...]) -> np.ndarray:
    return one_hot((text[-1] + 1) % VOCABULARY)


class ScriptedModel:
    """moss_jt.engine.causal_model.CausalModel over ``follow``: text so far -> logits of the next token.

    passes  (start_pos, tokens, rows) of each pass
    """

    def __init__(
        self,
        follow: Callable[[tuple[int, ...]], np.ndarray] = count_up,
        capacity: int = 64,
        pass_tokens: int = 16,
    ) -> None:
        self.capacity = capacity
        self.pass_tokens = pass_tokens
        self.cache_owner: object = None
        self.passes: list[tuple[int, list[int], Rows]] = []
        self._follow = follow
        self._cache: list[int] = []

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows = "last") -> np.ndarray:
        assert 1 <= len(token_ids) <= self.pass_tokens and start_pos + len(token_ids) <= self.capacity
        assert start_pos <= len(self._cache), "positions before the new ones were never computed"
        self.passes.append((start_pos, list(token_ids), rows))
        self._cache[start_pos:] = token_ids
        ends = {"none": [], "last": [len(token_ids)], "all": list(range(1, len(token_ids) + 1))}[rows]
        found = [self._follow(tuple(self._cache[: start_pos + end])) for end in ends]
        return np.stack(found) if found else np.empty((0, VOCABULARY), np.float32)


class ScriptedText:
    """A decoder whose tokens are given texts; with it, stop strings can be cut anywhere."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def push(self, token_id: int) -> str:
        return self._texts[token_id]

    def finish(self) -> str:
        return ""
