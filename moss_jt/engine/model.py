"""The CodeGen model over whatever the weight stream yields: one pass for any number of new tokens of any sequences.

Letters: T new tokens, C n_embd, V vocabulary, R rows of logits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from moss_jt.backend.device import check_process
from moss_jt.backend.jittor import jt
from moss_jt.engine.causal_model import Rows, TokenRun, Watcher
from moss_jt.engine.kv_cache import KVCache
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE, BlockWeights, Operators, Places, Var
from moss_jt.kernels.needs import FEW_TOKENS, HEAD_ROWS
from moss_jt.kernels.places import places_of
from moss_jt.store.config import MossConfig

# Resident weights that few tokens go through at once, a tenth of a second at most: who wants no more waits for that. Each time
# costs: Python and Jittor then run with caches that are full of weights (2 to 3 % of 0.3 billion parameters, every four blocks).
RESIDENT_BYTES = 1 << 30


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
    block_bytes: int
    link_s: float
    norm_weight: Var
    norm_bias: Var

    def embedding_rows(self, token_ids: Sequence[int]) -> np.ndarray: ...

    def blocks(self, then_head: bool = True) -> Iterator[tuple[int, BlockWeights]]: ...

    def head_slabs(self) -> Iterable[HeadRows]: ...

    def close(self) -> None: ...


class Model:
    """See the module. Not thread-safe: one pass at a time.

    Args:
        pass_tokens, logit_rows: the most new tokens and rows of logits of one pass; callers keep to them, because the
            workspace was planned for them.
        capacity: positions of one sequence; by default all that the cache has.

    adapter  with which :meth:`forward` computes, by its number; None for the model alone
    """

    def __init__(
        self,
        config: MossConfig,
        operators: Operators,
        weights: Weights,
        kv_cache: KVCache,
        pass_tokens: int,
        logit_rows: int = FEW_TOKENS,
        capacity: int | None = None,
    ) -> None:
        self.config = config
        self.operators = operators
        self.weights = weights
        self.pass_tokens = pass_tokens
        self.logit_rows = logit_rows
        self.capacity = kv_cache.capacity if capacity is None else capacity
        self.pages = kv_cache.pages
        self.score_rows = 2 * PAGE
        self.watcher: Watcher | None = None
        self.adapter: int | None = None
        self._kv_cache: KVCache | None = kv_cache

    def page_views(self, page: int) -> list[np.ndarray] | None:
        return self._cache.page_views(page)

    def with_weights(self, weights: Weights) -> "Model":
        """Another model over the same cache, with the same operators; the caller closes both."""
        limits = self.pass_tokens, self.logit_rows, self.capacity
        return Model(self.config, self.operators, weights, self._cache, *limits)

    @property
    def link_s(self) -> float:
        return self.weights.link_s

    def read_page(self, page: int) -> np.ndarray:
        return self._cache.read_page(page)

    def write_page(self, page: int, data: np.ndarray) -> None:
        self._cache.write_page(page, data)

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows = "last") -> np.ndarray:
        """Logits of T new tokens of the one sequence that has the whole cache, page after page, at start_pos .. .

        Returns:
            (R, V) float32 where R is 0 (``rows`` "none": only the cache is wanted), 1 ("last") or T ("all").

        Raises:
            MossError: a token is outside the vocabulary, a weight cannot be read, the model is closed, or this process
                was forked from the one that loaded it.
            ValueError: the tokens do not fit into the cache.
        """
        runs = split(range(self._cache.pages), start_pos, token_ids, rows)
        return np.concatenate(self.forward_many([replace(run, adapter=self.adapter) for run in runs]))

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        """One reading of the weights for new tokens of any sequences, which see themselves and what is before them.

        Args:
            wanted: asked between blocks whether a run, by its index, is still wanted: if not, its tokens are left out
                from there on, which changes nothing for the others.

        Returns:
            for each run (R, V) float32 as for :meth:`forward`; without rows for what was no longer wanted.

        Raises:
            MossError: a token is outside the vocabulary, a weight cannot be read, or the model is closed.
            ValueError: a run does not fit into its pages.
        """
        check_process()
        cache = self._cache
        order = sorted(range(len(runs)), key=lambda index: not runs[index].whole)
        tokens = [token for index in order for token in runs[index].token_ids]
        h = jt.array(self.weights.embedding_rows(tokens).astype(np.float32))
        places = _places([runs[index] for index in order])
        then_head = any(run.rows != "none" for run in runs)
        for layer, blocks in self._blocks(then_head, places.count):
            kept = [index for index in order if wanted(index)]
            if len(kept) < len(order):
                if not kept:
                    return [self._no_logits() for _ in runs]
                h, order = jt.array(_rows_of(h.numpy(), runs, order, kept)), kept
                places = _places([runs[index] for index in order])
            h = self.operators.blocks(h, blocks, cache.keys, cache.values, layer, places)
            h.sync()  # streamed weights are gone after it; and who wants no more waits no longer than for this
            if self.watcher is not None and len(tokens) > 1:
                self.watcher(len(tokens), (layer + len(blocks)) / self.config.n_layer)
        return self._logits(h.numpy(), runs, order)

    def _blocks(self, then_head: bool, tokens: int) -> Iterator[tuple[int, list[BlockWeights]]]:
        """Blocks that so many tokens go through at once, and the first one's number."""
        most = 1
        if not self.weights.streams and tokens <= FEW_TOKENS:
            most = max(1, RESIDENT_BYTES // self.weights.block_bytes)
        blocks: list[BlockWeights] = []
        for layer, weights in self.weights.blocks(then_head=then_head):
            blocks.append(weights)
            if len(blocks) == most or layer == self.config.n_layer - 1:
                yield layer + 1 - len(blocks), blocks
                blocks = []

    def _no_logits(self) -> np.ndarray:
        return np.empty((0, self.config.vocab_size), np.float32)

    def _logits(self, hidden: np.ndarray, runs: Sequence[TokenRun], order: Sequence[int]) -> list[np.ndarray]:
        """hidden (T, C), the runs' rows in this order -> (R, V) of each run."""
        rows: list[int] = []
        rows_of, first, whole = {}, 0, 0
        for index in order:
            run, begin = runs[index], len(rows)
            end = first + len(run.token_ids)
            rows += range({"none": end, "last": end - 1, "all": first}[run.rows], end)
            rows_of[index] = begin, len(rows)
            whole += run.whole * (len(rows) - begin)
            first = end
        logits = self._head(hidden[rows], whole) if rows else self._no_logits()
        return [logits[slice(*rows_of.get(index, (0, 0)))] for index in range(len(runs))]

    def _head(self, hidden: np.ndarray, whole: int) -> np.ndarray:
        """hidden (R, C), the first ``whole`` of whole pages -> (R, V)."""
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for slab in self.weights.head_slabs():
            for first in range(0, len(hidden), HEAD_ROWS):
                some = jt.array(hidden[first : first + HEAD_ROWS])
                result = self.operators.head(
                    some,
                    self.weights.norm_weight,
                    self.weights.norm_bias,
                    slab.weight,
                    slab.bias,
                    HEAD_ROWS if first < whole else 0,
                )
                part = result.numpy()
                if part.shape == logits.shape:
                    logits = part
                else:
                    logits[first : first + HEAD_ROWS, slab.first_row : slab.last_row] = part
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


def split(pages: Sequence[int], start: int, token_ids: Sequence[int], rows: Rows) -> list[TokenRun]:
    """Runs of a text at positions start .. : what fills no page, the whole pages, and the rest.

    The last token of a text that is continued is never in a whole page: its logits are then the same bits whether its page
    was computed with it, or before.
    """
    end = start + len(token_ids)
    first = min(end, -(-start // PAGE) * PAGE)
    last = max(first, (end - (rows == "last")) // PAGE * PAGE)
    runs = []
    for begin, stop, whole in ((start, first, False), (first, last, True), (last, end, False)):
        if begin < stop:
            wanted: Rows = rows if rows == "all" or stop == end else "none"
            runs.append(TokenRun(pages, begin, token_ids[begin - start : stop - start], whole, wanted))
    return runs


def _places(runs: Sequence[TokenRun]) -> Places:
    slots = [slot for slot, run in enumerate(runs) for _ in run.token_ids]
    positions = [run.start + index for run in runs for index in range(len(run.token_ids))]
    whole = sum(len(run.token_ids) for run in runs if run.whole)
    pages, adapters = [run.pages for run in runs], [run.adapter for run in runs]
    return places_of(slots, positions, pages, whole, adapters)


def _rows_of(
    h: np.ndarray, runs: Sequence[TokenRun], order: Sequence[int], kept: Sequence[int]
) -> np.ndarray:
    """The rows of h (T, C), which belong to runs in this order, that belong to the kept ones."""
    owners = np.repeat(order, [len(runs[index].token_ids) for index in order])
    return h[np.isin(owners, kept)]
