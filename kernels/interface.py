"""What a model asks of its operators, whichever device runs them, and the weights that a block hands to them.

Letters: T new tokens, C n_embd, H heads, D head_dim, I n_inner, V vocabulary, L layers, P positions of the cache, page
after page; in matrices N outputs, K inputs, G groups. Activations are float32, weights float16, the cache float16 or int8.

Operators are made for one model's geometry: ``PortableOperators(config)``, ``CpuOperators(config)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from moss_jt.store.sizes import CACHE_PAGE

Var = Any  # a jittor.Var: only moss_jt.backend.jittor imports Jittor

# Positions of a page of the cache: what sequences take from it and give back, and share where they begin alike.
PAGE = CACHE_PAGE


class Queue(IntEnum):
    """What a device works off in order, each by itself. The numbers are copy_engine.h's."""

    COMPUTE = 0
    COPIES = 1


@dataclass(frozen=True)
class Region:
    """A tensor that lies within a larger Var, as all of a unit's weights do on a GPU: one Var is one copy over the link.

    memory  (n,) uint8
    offset  where the tensor begins, in bytes
    dtype   NumPy's name of it
    """

    memory: Var
    offset: int
    shape: tuple[int, ...]
    dtype: str


Weight = Any  # a Var, or a Region of one: operators say which they take


@dataclass(frozen=True)
class DenseMatrix:
    """A float16 matrix in nn.Linear's orientation: ``y = x @ weight.T``.

    weight  (N, K) float16
    """

    weight: Weight


@dataclass(frozen=True)
class PackedMatrix:
    """A group-quantised matrix, ``w[n, k] = scales[n, g] * (q[n, k] - (zeros[n, g] + 1))`` with g = k // group_size.

    packed       (N, K * bits // 8) uint8. bits 8: one weight per byte. bits 4: 16 bytes hold 32 consecutive weights,
                 byte i has weight i in its low and weight 16 + i in its high nibble.
    scales       (N, G) float16
    zeros        (N, G) uint8, the zero point minus one
    bits         4 or 8
    group_size   weights of one row that share a scale: a multiple of 32, or K where G is 1
    input_order  (K, 1) int32 or None: column k of ``packed`` belongs to input ``input_order[k]`` (act-order). Two axes,
                 as for token ids, and every index in [0, K).
    """

    packed: Weight
    scales: Weight
    zeros: Weight
    bits: int
    group_size: int
    input_order: Weight | None = None


Matrix = DenseMatrix | PackedMatrix


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One block's weights. Keep the object from pass to pass: its shapes are checked once.

    The four matrices are all dense, or all packed with the same number of bits.

    ln_1_weight, ln_1_bias  (C,) float16
    qkv                     (3 * C, C): rows of all heads' queries, then all keys, then all values, each head-major
    out                     (C, C)
    fc_in, fc_in_bias       (I, C), (I,) float16
    fc_out, fc_out_bias     (C, I), (C,) float16
    """

    ln_1_weight: Weight
    ln_1_bias: Weight
    qkv: Matrix
    out: Matrix
    fc_in: Matrix
    fc_in_bias: Weight
    fc_out: Matrix
    fc_out_bias: Weight


@dataclass(frozen=True, eq=False)
class ByteRows:
    """Keys or values in int8: a head's vector at a position is ``scale * numbers``, the scale a 127th of its largest number.

    numbers  (L, P, H, D) int8
    scales   (L, P // PAGE, H, PAGE) float32: a head's in a page lie together
    """

    numbers: Var
    scales: Var


CacheRows = Any  # keys or values: a Var (L, P, H, D) float16, or ByteRows


def numbers_of(rows: CacheRows) -> Var:
    """(L, P, H, D) float16 or int8"""
    return rows.numbers if isinstance(rows, ByteRows) else rows


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a pass belong; made and checked by moss_jt.kernels.places.places_of.

    slots, positions  (T,) int32; tokens of a slot that follow one another are one run
    pages             (S, G) int32: number of the page with positions PAGE * g .. of slot s
    whole             so many tokens come first, in whole pages
    tokens            (T, 2) int32 Var: slot and position
    table             (S', G') int32 Var: pages, and rows and columns of nothing
    adapters          (T,) int32: the number of each token's adapter, -1 for none; None where no token has any
    adapter_tokens    the same as a (T, 1) Var
    """

    slots: np.ndarray
    positions: np.ndarray
    pages: np.ndarray
    whole: int
    tokens: Var
    table: Var
    adapters: np.ndarray | None = None
    adapter_tokens: Var | None = None

    @property
    def count(self) -> int:
        return len(self.slots)

    @cached_property
    def last_page(self) -> int:
        return int(self.pages.max())

    @cached_property
    def last_position(self) -> int:
        return int(self.positions.max())


class BlockByBlock:
    """Operators for which many blocks are nothing else than one after another."""

    block: Callable[..., Var]

    def blocks(
        self,
        h: Var,
        blocks: Sequence[BlockWeights],
        keys: CacheRows,
        values: CacheRows,
        layer: int,
        places: Places,
    ) -> Var:
        for number, weights in enumerate(blocks, layer):
            h = self.block(h, weights, keys, values, number, places)
        return h


class Operators(Protocol):
    """The two steps of a pass. Results are lazy Vars; weights and results are never written to, the cache is.

    The cache is written in place, and a pass reads what earlier passes wrote, without Jittor knowing of it:
    **the caller must sync the last block's result (or the logits made of it) before it starts the next pass.**
    """

    @property
    def level(self) -> str:
        """What decides the last bits of a result, beside the sources and the processor."""
        ...

    def block(
        self, h: Var, weights: BlockWeights, keys: CacheRows, values: CacheRows, layer: int, places: Places
    ) -> Var:
        """One CodeGen block: ``a = layer_norm(h); h + attention(a) + mlp(a)``.

        Writes the new keys (rotated) and values into the pages of each token's sequence in ``layer``; each token attends
        to itself and to everything before it in its sequence. A token's result is the same bits whoever shares the pass. What
        its adapter adds is in its products.

        h             (T, C) float32
        keys, values  (L, P, H, D), both float16 or both int8, written in place; page n is the positions PAGE * n ..
        Returns (T, C) float32.

        Raises:
            ValueError: shapes disagree, a page lies beyond the cache, or there is no such adapter.
        """
        ...

    def blocks(
        self,
        h: Var,
        blocks: Sequence[BlockWeights],
        keys: CacheRows,
        values: CacheRows,
        layer: int,
        places: Places,
    ) -> Var:
        """Blocks that follow one another, from ``layer`` on, each as :meth:`block` computes it, with the same bits.

        Keep the objects from pass to pass in the same groups: what stands for a group is made once.
        """
        ...

    def head(
        self, h: Var, norm_weight: Var, norm_bias: Var, weight: Weight, bias: Var, whole: int = 0
    ) -> Var:
        """Final layer norm and the product with the head, or with a slab of its rows.

        h                       (R, C) float32, R rows of which logits are wanted; the first ``whole`` are whole pages
        norm_weight, norm_bias  (C,) float16
        weight, bias            (V', C), (V',) float16
        Returns (R, V') float32.
        """
        ...
