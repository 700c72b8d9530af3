"""A model without weights: what follows a text is a function of the text, and every pass is written down."""

from collections.abc import Callable, Sequence

import numpy as np

from moss_jt.engine.causal_model import Rows, TokenRun
from moss_jt.kernels.interface import PAGE

VOCABULARY = 50
NOTHING = -1  # where no token was written


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

    Its cache holds tokens, so that what follows is read from a sequence's own pages, whoever wrote them.

    passes  (start, tokens, rows) of every run of every pass
    """

    def __init__(
        self,
        follow: Callable[[tuple[int, ...]], np.ndarray] = count_up,
        capacity: int = 64,
        pass_tokens: int = 16,
        pages: int | None = None,
        logit_rows: int = 23,
    ) -> None:
        self.capacity = capacity
        self.pages = -(-capacity // PAGE) if pages is None else pages
        self.pass_tokens = pass_tokens
        self.logit_rows = logit_rows
        self.score_rows = PAGE
        self.link_s = 0.0
        self.passes: list[tuple[int, list[int], Rows]] = []
        self._follow = follow
        self._cache = np.full((self.pages, PAGE), NOTHING)

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        assert 1 <= sum(len(run.token_ids) for run in runs) <= self.pass_tokens
        for run in runs:
            assert run.token_ids and run.start + len(run.token_ids) <= self.capacity
            self.passes.append((run.start, list(run.token_ids), run.rows))
            self.write(run)
        return [self.logits(run) for run in runs]

    def write(self, run: TokenRun) -> None:
        for position, token in enumerate(run.token_ids, run.start):
            self._cache[run.pages[position // PAGE], position % PAGE] = token

    def logits(self, run: TokenRun) -> np.ndarray:
        text = self._cache[list(run.pages)].reshape(-1)
        count = len(run.token_ids)
        ends = {"none": [], "last": [count], "all": list(range(1, count + 1))}[run.rows]
        actual = []
        for end in ends:
            before = tuple(text[: run.start + end].tolist())
            assert NOTHING not in before, "positions before the new ones were never computed"
            actual.append(self._follow(before))
        return np.stack(actual) if actual else np.empty((0, VOCABULARY), np.float32)

    def read_page(self, page: int) -> np.ndarray:
        return self._cache[page].copy()

    def write_page(self, page: int, data: np.ndarray) -> None:
        self._cache[page] = data


class ScriptedText:
    """A decoder whose tokens are given texts; with it, stop strings can be cut anywhere."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def push(self, token_id: int) -> str:
        return self._texts[token_id]

    def finish(self) -> str:
        return ""
