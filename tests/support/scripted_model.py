"""A model without weights: what follows a text is a function of the text, and every pass is written down."""

from collections.abc import Callable, Sequence

import numpy as np

from moss_jt.engine.causal_model import Piece, Rows
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

    passes  (start, tokens, rows) of every piece of every pass
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
        self, pieces: Sequence[Piece], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        assert 1 <= sum(len(piece.token_ids) for piece in pieces) <= self.pass_tokens
        for piece in pieces:
            assert piece.token_ids and piece.start + len(piece.token_ids) <= self.capacity
            self.passes.append((piece.start, list(piece.token_ids), piece.rows))
            self.write(piece)
        return [self.logits(piece) for piece in pieces]

    def write(self, piece: Piece) -> None:
        for position, token in enumerate(piece.token_ids, piece.start):
            self._cache[piece.pages[position // PAGE], position % PAGE] = token

    def logits(self, piece: Piece) -> np.ndarray:
        text = self._cache[list(piece.pages)].reshape(-1)
        count = len(piece.token_ids)
        ends = {"none": [], "last": [count], "all": list(range(1, count + 1))}[piece.rows]
        found = []
        for end in ends:
            before = tuple(text[: piece.start + end].tolist())
            assert NOTHING not in before, "positions before the new ones were never computed"
            found.append(self._follow(before))
        return np.stack(found) if found else np.empty((0, VOCABULARY), np.float32)

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
