"""The GPU's operators: our kernels, compiled by CuPy, over Jittor's own memory.

Each operator is one operation for Jittor. Passes of few tokens are launched from C++ by a table that was recorded once
(recording.py), for Python between the launches would take the host longer than the card takes to compute. Longer passes go
through jt.numpy_code, which hands arrays over without a copy. A block's weights are regions of one Var: an operation takes few
inputs.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.checks import check_block, check_cache, check_shape
from moss_jt.kernels.cuda.launchers import FEW_TOKENS, Array, Launchers, Product
from moss_jt.kernels.cuda.recording import Piece, Recorder, Recording, Start, launch_address, queue
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, Region, Var
from moss_jt.kernels.rotary import rotary_table
from moss_jt.store.config import MossConfig

Work = Callable[[Sequence[Array], Array], None]
At = Callable[[Region], Array]


class CudaOperators:
    """See :class:`moss_jt.kernels.interface.Operators`. Weights of blocks and head are Regions.

    Args:
        config: the model's geometry; head_dim a multiple of 8 and at most 256.
        cupy: the module, or what stands in for it in tests.
    """

    def __init__(self, config: MossConfig, cupy: Any) -> None:
        self.config = config
        self.kernels = Launchers(cupy)
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self._launch = launch_address(cupy)
        self._layouts: dict[Hashable, dict[tuple[int, int], Recording]] = {}
        self._blocks = weakref.WeakKeyDictionary[BlockWeights, dict[tuple[int, int], Recording]]()
        self._heads: dict[tuple[int, int, int], Recording] = {}

    def free(self) -> None:
        """Give back to the card what CuPy keeps of the memory of intermediate results."""
        pool = self.kernels.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=0)  # none

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Region, bias: Var) -> Var:
        check_shape("h", h, (h.shape[0], self.config.n_embd))
        check_shape("weight", weight, (bias.shape[0], self.config.n_embd))
        tokens, rows = h.shape[0], weight.shape[0]

        def work(kernels: Launchers, a: Sequence[Array], out: Array) -> None:
            normed = kernels.layer_norm(a[0], a[1], a[2], self.config.layer_norm_epsilon)
            kernels.add_bias(kernels.products([Product(normed, _at(a[3], weight))])[0], a[4], out)

        inputs = [h, norm_weight, norm_bias, weight.memory, bias]
        if tokens > FEW_TOKENS:
            return _code((tokens, rows), inputs, lambda a, out: work(self.kernels, a, out))
        key = weight.offset, rows, tokens
        if key not in self._heads:
            self._heads[key] = self._record(work, inputs, (tokens, rows))
        return queue(self._heads[key], self._launch, (tokens, rows), inputs)

    def block(self, h: Var, weights: BlockWeights, keys: Var, values: Var, layer: int, start_pos: int) -> Var:
        tokens, shape = h.shape[0], tuple(keys.shape)
        check_shape("h", h, (tokens, self.config.n_embd))
        check_cache(keys, values, self.config.n_head, self.config.head_dim, layer, start_pos, tokens)
        recordings = self._blocks.get(weights)
        if recordings is None:
            recordings = self._blocks[weights] = self._checked(weights)

        def work(kernels: Launchers, a: Sequence[Array], out: Array, start: int) -> None:
            def at(region: Region) -> Array:
                return _at(a[1], region)

            self._block(kernels, a[0], weights, at, (a[2], a[3], a[4]), start, out)

        inputs = [h, weights.ln_1_weight.memory, self.rotary, keys, values]
        if tokens > FEW_TOKENS:
            return _code(
                h.shape,
                inputs,
                lambda a, out: work(self.kernels, [*a[:3], a[3][layer], a[4][layer]], out, start_pos),
            )
        key = tokens, shape[1]
        if key not in recordings:
            recordings[key] = self._record(
                lambda kernels, a, out: work(kernels, a, out, Start(start_pos)),
                inputs,
                h.shape,
                layered=(3, 4),
            )
        layer_bytes = layer * shape[1] * shape[2] * shape[3] * 2
        return queue(recordings[key], self._launch, h.shape, inputs, start_pos, layer_bytes)

    def launches_per_block(self, weights: BlockWeights) -> int:
        """Of a block that was queued with these weights, whatever its tokens."""
        return next(int(recording.table[0]) for recording in self._blocks[weights].values())

    def _record(
        self,
        work: Callable[[Launchers, Sequence[Array], Array], None],
        inputs: list[Var],
        shape: tuple[int, ...],
        layered: tuple[int, ...] = (),
    ) -> Recording:
        """What ``work`` launches over arrays that lie in the inputs, of which ``layered`` have a layer on their first axis."""
        pieces = []
        for number, var in enumerate(inputs):
            in_layers = number in layered
            of_one = tuple(var.shape)[1:] if in_layers else tuple(var.shape)
            pieces.append(Piece(number, 0, of_one, np.dtype(str(var.dtype)), in_layers))
        recorder = Recorder(self.kernels, len(inputs) + 1)
        work(recorder, pieces, Piece(len(inputs), 0, tuple(shape), np.dtype(np.float32)))
        return recorder.recording()

    def _block(
        self,
        kernels: Launchers,
        h: Array,
        weights: BlockWeights,
        at: At,
        tables: tuple[Array, Array, Array],
        start_pos: int,
        out: Array,
    ) -> None:
        """The block over arrays on the device; tables: rotary, and the layer's keys and values."""
        norm = at(weights.ln_1_weight), at(weights.ln_1_bias)
        normed = kernels.layer_norm(h, *norm, self.config.layer_norm_epsilon)
        qkv, inner = kernels.products(
            [_product(weights.qkv, at, normed), _product(weights.fc_in, at, normed)]
        )
        q = kernels.rotary_cache(qkv, *tables, start_pos)
        inner = kernels.bias_gelu(inner, at(weights.fc_in_bias))
        context = kernels.attention(q, *tables[1:], start_pos)
        # The larger matrix first: its blocks are the longer ones.
        added = kernels.sum_of_products(
            [_product(weights.fc_out, at, inner), _product(weights.out, at, context)]
        )
        kernels.add_block(h, added, at(weights.fc_out_bias), out)

    def _checked(self, weights: BlockWeights) -> dict[tuple[int, int], Recording]:
        """The recordings for such weights, by tokens and positions of the cache.

        Once for each object, for it goes with a piece of memory that native code will trust. Where in a unit's memory its tensors
        lie is all that recordings know of them, and most units are alike.
        """
        check_block(weights, self.config)
        return self._layouts.setdefault(_layout(weights), {})


def _layout(value: Any) -> Hashable:
    """Where the tensors of weights lie in their memory, and how they are packed."""
    if isinstance(value, Region):
        return value.offset, value.shape, value.dtype
    if is_dataclass(value):
        return tuple(_layout(getattr(value, field.name)) for field in fields(value))
    return value  # bits and the like


def _at(memory: Array, region: Region) -> Array:
    """The region of a unit's memory, as an array over it."""
    if isinstance(memory, Piece):
        return Piece(memory.memory, region.offset, region.shape, np.dtype(region.dtype))
    n_bytes = int(np.prod(region.shape)) * np.dtype(region.dtype).itemsize
    piece = memory[region.offset : region.offset + n_bytes]
    return piece.view(np.dtype(region.dtype)).reshape(region.shape)


def _product(matrix: Matrix, at: At, x: Array) -> Product:
    """x with the matrix's arrays."""
    if isinstance(matrix, DenseMatrix):
        return Product(x, at(matrix.weight))
    order = None if matrix.input_order is None else at(matrix.input_order).reshape(-1)
    return Product(x, at(matrix.packed), matrix.bits, at(matrix.scales), at(matrix.zeros), order)


def _code(shape: tuple[int, ...], inputs: list[Var], work: Work) -> Var:
    """One Jittor operation that calls ``work`` with its inputs' arrays and the array for its result."""

    def run(_: Any, data: dict[str, list[Array]]) -> None:
        work(data["inputs"], data["outputs"][0])

    return jt.numpy_code(shape, np.float32, inputs, run)
