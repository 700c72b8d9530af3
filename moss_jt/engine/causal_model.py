"""What everything above the model asks of it, so that a scripted one can stand in for it in tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Rows = Literal["none", "last", "all"]
# Called within a pass of several tokens, block after block, with how many tokens it has and which share of the blocks is done.
Watcher = Callable[[int, float], None]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that a model has beside its weights.

    number  among the model's
    digest  of what decides the bits of what is computed with it
    """

    name: str
    number: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class TokenRun:
    """New tokens of one sequence in a pass, at positions start .. of it.

    pages    the sequence's pages in order, these tokens' included
    whole    they are whole pages, computed as such: another way, and other bits, than token by token. It is the sequence
             that says so, from its own text alone; so its keys and values are the same whoever shares the pass
    rows     of which tokens the logits are wanted
    adapter  with which they are computed, by its number among the model's; None for the model alone
    """

    pages: Sequence[int]
    start: int
    token_ids: Sequence[int]
    whole: bool = False
    rows: Rows = "none"
    adapter: int | None = None


class CausalModel(Protocol):
    """moss_jt.engine.model.Model, or a scripted one.

    capacity     positions that one sequence may have
    pages        of its cache, for all sequences; enough for one of that length
    pass_tokens  the most new tokens of one pass
    logit_rows   the most rows of logits of one pass, for answers
    score_rows   the same for scoring texts, whose logits are many
    link_s       seconds for which weights were waited for, in all passes so far
    """

    @property
    def capacity(self) -> int: ...

    @property
    def pages(self) -> int: ...

    @property
    def pass_tokens(self) -> int: ...

    @property
    def logit_rows(self) -> int: ...

    @property
    def score_rows(self) -> int: ...

    @property
    def link_s(self) -> float: ...

    def forward_many(self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = ...) -> list[np.ndarray]:
        """Logits (R, V) float32 of each run; R is 0, 1 (the last token's) or T.

        ``wanted`` is asked from time to time whether a run still is; if it is not, it may have no rows.
        """
        ...

    def page_views(self, page: int) -> Sequence[np.ndarray] | None:
        """A page's own memory in chunks, or None where the host cannot reach it."""
        ...

    def read_page(self, page: int) -> np.ndarray:
        """A copy of a page's keys and values."""
        ...

    def write_page(self, page: int, data: np.ndarray) -> None: ...
