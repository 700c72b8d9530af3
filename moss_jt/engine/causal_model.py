"""What everything above the model asks of it, so that a scripted one can stand in for it in tests."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

Rows = Literal["none", "last", "all"]
# Called within a pass of several tokens, block after block, with how many tokens it has and which share of the blocks is done.
Watcher = Callable[[int, float], None]


class CausalModel(Protocol):
    """moss_jt.engine.model.Model, or a scripted one.

    capacity     positions of its cache
    pass_tokens  the most new tokens of one pass
    cache_owner  whose tokens the cache holds
    """

    cache_owner: object

    @property
    def capacity(self) -> int: ...

    @property
    def pass_tokens(self) -> int: ...

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows) -> np.ndarray:
        """Logits (R, V) float32 of T new tokens at start_pos ..; R is 0, 1 (the last token's) or T."""
        ...
