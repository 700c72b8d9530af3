"""GPTQ: rounding that makes up for each weight's error in the weights not yet rounded (Frantar et al., 2022).

For a matrix with rows w and inputs x, the layer's squared error over the calibration tokens is ``e H e.T`` with
``e = w - w'`` and ``H = sum of x.T x``. With ``H = R R.T``, R upper triangular, it is the squared length of ``e R``,
whose j-th entry depends on the errors up to j only. So columns are rounded from first to last, each towards the value
that makes its entry zero given the errors before it. This is GPTQ's result without its inverse: R comes from one
Cholesky factorisation in the Hessian's own memory, and the rows of a matrix are independent of each other.
"""

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.quant import PackedArrays, fit_groups, nearest_fields, pack

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it: few tokens leave directions that no input took
_PANEL = 1024  # columns worked on at once, so that temporary arrays are a small part of the Hessian
_SLAB_WEIGHTS = 1 << 24  # weights of the rows that are rounded together, 64 MiB as float32


class Hessian:
    """The running sum of x.T x over the inputs of a layer, its upper triangle only, in float32.

    Takes 4 * K * K bytes: 2.25 GiB for MOSS's widest rows of 24,576.
    """

    def __init__(self, inputs: int) -> None:
        self.matrix = np.zeros((inputs, inputs), np.float32)

    def add(self, x: np.ndarray) -> None:
        """x (T, K) float32: the layer's inputs of T tokens."""
        for first, last in _panels(x.shape[1]):
            self.matrix[:last, first:last] += x[:, :last].T @ x[:, first:last]

    def by_importance(self) -> np.ndarray:
        """Act-order: inputs (K,) int32, those with the most energy first. Equal ones keep their order."""
        return np.argsort(-self.matrix.diagonal(), kind="stable").astype(np.int32)

    def factor(self, input_order: np.ndarray | None = None) -> np.ndarray:
        """R (K, K) float32, upper triangular, with R R.T the damped Hessian, its inputs in ``input_order``.

        R is made in the Hessian's memory, so the Hessian is used up. An input that was always zero only gets the
        damping: it is rounded to nearest, and nothing is made up for in it.

        Raises:
            MossError: inputs so large, or so broken, that their squares are not finite in float32.
        """
        if not np.isfinite(self.matrix.diagonal()).all():
            raise MossError(
                "the calibration text makes activations that are not finite: the checkpoint looks damaged. "
                "Check it, or quantize with --method rtn, which uses no activations."
            )
        if input_order is not None:
            _permute(self.matrix, input_order)
        diagonal = np.einsum("ii->i", self.matrix)
        diagonal += DAMPING * float(diagonal.mean(dtype=np.float64)) or 1.0
        _factor_in_place(self.matrix)
        return self.matrix


def _panels(columns: int) -> list[tuple[int, int]]:
    return [(first, min(first + _PANEL, columns)) for first in range(0, columns, _PANEL)]


def _permute(matrix: np.ndarray, order: np.ndarray) -> None:
    """Rows and columns of a symmetric matrix, given by its upper triangle, into ``order``, in place."""
    for first, last in _panels(len(matrix)):
        for other, end in _panels(last):
            above = matrix[other:end, first:last]
            if other == first:
                matrix[first:last, first:last] = np.triu(above) + np.triu(above, 1).T
            else:
                matrix[first:last, other:end] = above.T
    for first, last in _panels(len(matrix)):
        matrix[:, first:last] = matrix[order, first:last]
    for first, last in _panels(len(matrix)):
        matrix[first:last] = matrix[first:last, order]


def _factor_in_place(matrix: np.ndarray) -> None:
    """Replace the upper triangle of H by R, upper triangular, with H = R R.T; what is below is set to zero."""
    for first, last in reversed(_panels(len(matrix))):
        corner = _upper_factor(matrix[first:last, first:last])
        matrix[first:last, first:last] = corner
        matrix[last:, first:last] = 0
        above = matrix[:first, first:last]
        above[...] = above @ np.linalg.inv(corner).T.astype(np.float32)
        for left, right in _panels(first):
            matrix[:right, left:right] -= above[:right] @ above[left:right].T


def _upper_factor(corner: np.ndarray) -> np.ndarray:
    """The same for a small block, in float64: a Cholesky factorisation read from the last row and column up.

    Rounding in float32 can leave a block that is not quite positive definite; it then gets more damping.
    """
    upper = np.triu(corner).astype(np.float64)
    turned = (upper + np.triu(upper, 1).T)[::-1, ::-1]
    extra = 0.0
    while True:
        try:
            return np.linalg.cholesky(turned + extra * np.eye(len(turned)))[::-1, ::-1]
        except np.linalg.LinAlgError:
            extra = max(10 * extra, 1e-6 * float(np.abs(turned.diagonal()).max()))


def quantize_gptq(
    weight: np.ndarray,
    factor: np.ndarray,
    bits: int,
    group_size: int,
    input_order: np.ndarray | None = None,
) -> PackedArrays:
    """Quantise a matrix against the inputs that it saw.

    weight       (N, K) float16 or float32, finite, columns in the order of the inputs
    factor       (K, K) float32 from :meth:`Hessian.factor`, made with the same ``input_order``
    input_order  (K,) int32: the order in which columns are rounded, grouped and stored; None for their own
    """
    rows, columns = weight.shape
    groups = columns // group_size
    packed = np.empty((rows, columns * bits // 8), np.uint8)
    scales = np.empty((rows, groups), np.float16)
    zeros = np.empty((rows, groups), np.uint8)
    inverses = [
        np.linalg.inv(factor[group, group].astype(np.float64)).astype(np.float32)
        for group in _group_slices(columns, group_size)
    ]
    step = max(64, _SLAB_WEIGHTS // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        wanted = weight[part].astype(np.float32)
        if input_order is not None:
            wanted = wanted[:, input_order]
        fields, scales[part], zeros[part] = _round_rows(wanted, factor, inverses, bits, group_size)
        packed[part] = pack(fields, bits)
    return PackedArrays(packed, scales, zeros, bits, group_size, input_order)


def _group_slices(columns: int, group_size: int) -> list[slice]:
    return [slice(first, first + group_size) for first in range(0, columns, group_size)]


def _round_rows(
    wanted: np.ndarray, factor: np.ndarray, inverses: list[np.ndarray], bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields (n, K), scales (n, G) and stored zero points (n, G) of some rows (n, K) float32."""
    rows, columns = wanted.shape
    fields = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, len(inverses)), np.float16)
    zeros = np.empty((rows, len(inverses)), np.uint8)
    error = np.empty_like(wanted)
    for g, group in enumerate(_group_slices(columns, group_size)):
        # What the group's weights would best be, given the errors made in the groups before it.
        targets = wanted[:, group].copy()
        targets += (error[:, : group.start] @ factor[: group.start, group]) @ inverses[g]
        scales[:, g], zero_points = fit_groups(targets, bits)
        zeros[:, g] = zero_points - 1
        chosen = _round_group(targets, inverses[g], scales[:, g], zero_points, bits)
        fields[:, group] = chosen.T
        error[:, group] = wanted[:, group] - scales[:, g, None].astype(np.float32) * (
            chosen.T - zero_points[:, None]
        )
    return fields, scales, zeros


def _round_group(
    targets: np.ndarray, inverse: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int
) -> np.ndarray:
    """Fields (group_size, n) float32 of one group, column by column, each error spread over the later columns."""
    remaining = np.ascontiguousarray(targets.T)
    chosen = np.empty_like(remaining)
    widths = scales.astype(np.float32)
    for j in range(len(remaining)):
        chosen[j] = nearest_fields(remaining[j], scales, zero_points, bits)
        error = (remaining[j] - widths * (chosen[j] - zero_points)) / inverse[j, j]
        remaining[j + 1 :] -= inverse[j, j + 1 :, None] * error
    return chosen
