"""An oracle's arrays as the Vars that operators take. Imports Jittor."""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, PackedMatrix, Region
from moss_jt.store import quant
from moss_jt.store.config import MossConfig
from tests.support.block_oracle import BlockArrays

MATRICES = ("qkv", "out", "fc_in", "fc_out")


def var(array: np.ndarray) -> Any:
    """A Var over the array's own memory, as weights are loaded; Jittor keeps the array alive."""
    return jt.reuse_np_array(np.ascontiguousarray(array))


def index_var(indices: np.ndarray) -> Any:
    return jt.array(indices.astype(np.int32).reshape(-1, 1))


def dense_block(weights: BlockArrays) -> BlockWeights:
    return BlockWeights(
        **{name: DenseMatrix(var(a)) if name in MATRICES else var(a) for name, a in weights.arrays.items()}
    )


def random_packed(
    shape: tuple[int, int], bits: int, group_size: int, seed: int, ordered: bool
) -> quant.PackedArrays:
    """Random fields, zero points over their whole range (1 to 2**bits) and scales that keep the product near 1."""
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    groups = (outputs, inputs // group_size)
    spread = 2 ** (bits - 1) * inputs**0.5
    return quant.PackedArrays(
        packed=quant.pack(rng.integers(0, 2**bits, shape, np.uint8), bits),
        scales=(rng.uniform(0.5, 1.5, groups) / spread).astype(np.float16),
        zeros=rng.integers(0, 2**bits, groups, np.uint8),
        bits=bits,
        group_size=group_size,
        input_order=rng.permutation(inputs).astype(np.int32) if ordered else None,
    )


def widened(matrix: quant.PackedArrays) -> np.ndarray:
    """The matrix (N, K) float32 that the packed one stands for, by the formula and in the inputs' own order."""
    outputs, groups = matrix.scales.shape
    fields = quant.unpack(matrix.packed, matrix.bits).astype(np.float32).reshape(outputs, groups, -1)
    zeros = matrix.zeros.astype(np.float32)[:, :, None] + 1
    columns = (matrix.scales.astype(np.float32)[:, :, None] * (fields - zeros)).reshape(outputs, -1)
    if matrix.input_order is None:
        return columns
    result = np.empty_like(columns)
    result[:, matrix.input_order] = columns
    return result


def packed_matrix(matrix: quant.PackedArrays) -> PackedMatrix:
    order = None if matrix.input_order is None else index_var(matrix.input_order)
    arrays = (var(matrix.packed), var(matrix.scales), var(matrix.zeros))
    return PackedMatrix(*arrays, bits=matrix.bits, group_size=matrix.group_size, input_order=order)


def packed_block(
    config: MossConfig, bits: int, group_size: int, seed: int, ordered: bool
) -> tuple[BlockWeights, BlockArrays]:
    """A random packed block and the arrays it stands for. group_size 0: one group for each row."""
    base = BlockArrays.random(config, seed)
    packed = {
        name: random_packed(
            base.arrays[name].shape, bits, group_size or base.arrays[name].shape[1], seed + i, ordered
        )
        for i, name in enumerate(MATRICES)
    }
    oracle = BlockArrays(config, base.arrays | {name: widened(matrix) for name, matrix in packed.items()})
    vectors = {name: var(a) for name, a in base.arrays.items() if name not in MATRICES}
    return BlockWeights(**vectors, **{name: packed_matrix(m) for name, m in packed.items()}), oracle


def in_one_memory(weights: BlockWeights) -> BlockWeights:
    """The same weights as the GPU's operators take them: regions of one Var, each at a multiple of 256 bytes."""
    arrays: list[np.ndarray] = []
    offsets = [0]

    def offset_of(weight: Any) -> int:
        arrays.append(weight.numpy())
        offsets.append(offsets[-1] + -(-arrays[-1].nbytes // 256) * 256)
        return len(arrays) - 1

    def each(value: Any, change: Any) -> Any:
        if isinstance(value, (BlockWeights, DenseMatrix, PackedMatrix)):
            return replace(value, **{f.name: each(getattr(value, f.name), change) for f in fields(value)})
        return value if value is None or isinstance(value, int) else change(value)

    offsets_of = each(weights, lambda weight: np.array(offset_of(weight)))
    memory = np.zeros(offsets[-1] + 256, np.uint8)
    memory = memory[-memory.ctypes.data % 256 :][: offsets[-1]]
    for offset, array in zip(offsets, arrays, strict=False):
        memory[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
    complete = jt.reuse_np_array(memory)

    def region(index: np.ndarray) -> Region:
        array = arrays[int(index)]
        return Region(complete, offsets[int(index)], array.shape, array.dtype.name)

    return each(offsets_of, region)


def head_in_one_region(weight: np.ndarray) -> Region:
    memory = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    return Region(var(memory), 0, weight.shape, weight.dtype.name)
