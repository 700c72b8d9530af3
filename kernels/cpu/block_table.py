"""The weights of blocks as numbers: where each tensor lies, and its sizes, as Block::read_weights in block.h takes them.

As inputs of an operation Jittor would look at each of some twenty tensors in every block of every pass, and one operation could
not have many blocks.
"""

from collections.abc import Sequence

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, PackedMatrix, Var
from moss_jt.store.architecture import BLOCK


class _Addresses(np.ndarray):
    """Numbers that keep what they lead to."""

    arrays: list[Var]


def bits_of(weights: BlockWeights) -> int:
    """Of its matrices.

    Raises:
        ValueError: they have not all the same.
    """
    matrices = [getattr(weights, tensor.field) for tensor in BLOCK if tensor.is_matrix]
    bits = {matrix.bits if isinstance(matrix, PackedMatrix) else 16 for matrix in matrices}
    if len(bits) > 1:
        raise ValueError(f"one block has matrices of {sorted(bits)} bits; all four must have the same")
    return bits.pop()


def arrays_of(weights: BlockWeights, no_order: Var | None) -> list[Var]:
    """All that a block has, in the order of its fields; ``no_order`` for a matrix without input_order."""
    arrays = []
    for tensor in BLOCK:
        weight = getattr(weights, tensor.field)
        if isinstance(weight, DenseMatrix):
            arrays.append(weight.weight)
        elif isinstance(weight, PackedMatrix):
            order = no_order if weight.input_order is None else weight.input_order
            arrays += [weight.packed, weight.scales, weight.zeros, order]
        else:
            arrays.append(weight)
    return arrays


def table_of(blocks: Sequence[BlockWeights]) -> Var:
    """(B, n) int64. It keeps the weights' memory as long as anything that is queued reads it."""
    rows = [_row(weights) for weights in blocks]
    numbers = _Addresses((len(rows), len(rows[0])), np.int64)
    numbers[...] = rows
    numbers.arrays = [array for weights in blocks for array in arrays_of(weights, None)]
    return jt.reuse_np_array(numbers.view(np.ndarray))  # whose base these numbers are


def _row(weights: BlockWeights) -> list[int]:
    row = []
    for tensor in BLOCK:
        weight = getattr(weights, tensor.field)
        if isinstance(weight, DenseMatrix):
            row += [_address(weight.weight), *weight.weight.shape]
        elif isinstance(weight, PackedMatrix):
            outputs, row_bytes = weight.packed.shape
            parts = (weight.packed, weight.scales, weight.zeros, weight.input_order)
            row += [0 if part is None else _address(part) for part in parts]
            row += [outputs, row_bytes * 8 // weight.bits, weight.scales.shape[1]]
        else:
            row.append(_address(weight))
    return row


def _address(var: Var) -> int:
    return int(var.data.ctypes.data)
