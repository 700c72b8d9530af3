"""The CodeGen model over whatever the weight stream yields: one forward function for any number of new tokens.

Letters: T new tokens, C n_embd, V vocabulary, R rows of logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moss_jt.backend.device import check_process
from moss_jt.backend.jittor import jt
from moss_jt.engine.causal_model import Rows, Watcher
from moss_jt.engine.kv_cache import KVCache
from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, Operators, Var
from moss_jt.kernels.needs import HEAD_ROWS
from moss_jt.store.config import MossConfig


class HeadRows(Protocol):
    """Some rows of the head: moss_jt.weights.weights.HeadSlab."""

    @property
    def first_row(self) -> int: ...

    @property
    def last_row(self) -> int: ...

    @property
    def weight(self) -> Var: ...

    @property
    def bias(self) -> Var: ...


class Weights(Protocol):
    """What the model asks of its weights: moss_jt.weights.weights.Weights.

    Where ``streams`` is true, a block's or slab's weights are gone once the next one has been asked for.
    """

    streams: bool
    norm_weight: Var
    norm_bias: Var

    def embedding_rows(self, token_ids: Sequence[int]) -> np.ndarray: ...

    def blocks(self, then_head: bool = True) -> Iterator[tuple[int, BlockWeights]]: ...

    def head_slabs(self) -> Iterable[HeadRows]: ...

    def close(self) -> None: ...


class Model:
    """See the module. Not thread-safe: one pass at a time.

    Args:
        pass_tokens: the most new tokens of one pass; callers keep to it, because the workspace was planned for it.
    """

    def __init__(
        self,
        config: MossConfig,
        operators: Operators,
        weights: Weights,
        kv_cache: KVCache,
        pass_tokens: int,
    ) -> None:
        self.config = config
        self.operators = operators
        self.weights = weights
        self.pass_tokens = pass_tokens
        self.cache_owner: object = None
        self.watcher: Watcher | None = None
        self._kv_cache: KVCache | None = kv_cache

    @property
    def capacity(self) -> int:
        return self._cache.capacity

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows = "last") -> np.ndarray:
        """Logits of T new tokens at positions start_pos .., which see themselves and all before them in the cache.

        Returns:
            (R, V) float32 where R is 0 (``rows`` "none": only the cache is wanted), 1 ("last") or T ("all").

        Raises:
            MossError: a token is outside the vocabulary, a weight cannot be read, the model is closed, or this process
                was forked from the one that loaded it.
            ValueError: the tokens do not fit into the cache.
        """
        check_process()
        cache = self._cache
        h = jt.array(self.weights.embedding_rows(token_ids).astype(np.float32))
        for layer, weights in self.weights.blocks(then_head=rows != "none"):
            h = self.operators.block(h, weights, cache.keys, cache.values, layer, start_pos)
            watcher = self.watcher if len(token_ids) > 1 else None
            if self.weights.streams or watcher is not None:
                h.sync()
            if watcher is not None:
                watcher(len(token_ids), (layer + 1) / self.config.n_layer)
        # To the host: a slice by Jittor would be compiled for each number of tokens. And what the cache was given
        # must be there before the next pass reads it.
        hidden = h.numpy()
        if rows == "none":
            return np.empty((0, self.config.vocab_size), np.float32)
        return self._logits(hidden if rows == "all" else hidden[-1:])

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        """hidden (R, C) -> (R, V)."""
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for slab in self.weights.head_slabs():
            for first in range(0, len(hidden), HEAD_ROWS):
                some = jt.array(hidden[first : first + HEAD_ROWS])
                result = self.operators.head(
                    some, self.weights.norm_weight, self.weights.norm_bias, slab.weight, slab.bias
                )
                logits[first : first + HEAD_ROWS, slab.first_row : slab.last_row] = result.numpy()
        return logits

    @property
    def _cache(self) -> KVCache:
        if self._kv_cache is None:
            raise MossError("the model is closed.")
        return self._kv_cache

    def close(self) -> None:
        """Let go of weights, cache and what Jittor keeps for reuse. Closing twice is no fault."""
        if self._kv_cache is not None:
            self._kv_cache = None
            self.weights.close()
            jt.sync_all()
            jt.gc()
