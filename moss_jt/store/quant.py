"""The packed int4 and int8 formats in NumPy: what a model folder stores, and the oracle of every kernel.

Letters: N outputs (rows), K inputs (columns), G = K // group_size groups. A field q is an unsigned number of ``bits``
bits, a zero point z lies in 1 .. 2**bits, and the weight is ``scale * (q - z)``. Zero points are stored minus one, as
the published checkpoints have them, so that 2**bits fits.

Exactness: a float16 scale has 11 significant bits and q - z at most 9, so their product is exact in float32, which is
what :func:`dequantize` returns. The reference forms the product in float16, that is, rounds this same number once:
:func:`dequantize_float16`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moss_jt.errors import MossError

BITS = (4, 8)
RUN = 32  # consecutive int4 weights that share 16 bytes; group sizes are multiples of it
_SMALLEST_SCALE = np.float32(2.0**-24)  # float16's smallest step: a scale is never zero
_SLAB_WEIGHTS = 1 << 22  # rows are worked on in slabs of about this many weights, 16 MiB as float32


@dataclass(frozen=True)
class PackedArrays:
    """A quantised matrix as stored; moss_jt.kernels.interface.PackedMatrix holds the same as Vars.

    packed       (N, K * bits // 8) uint8. bits 8: one field per byte. bits 4: 16 bytes hold 32 consecutive weights,
                 byte i has weight i in its low and weight 16 + i in its high nibble.
    scales       (N, G) float16, not zero; negative in some published checkpoints
    zeros        (N, G) uint8, the zero point minus one
    input_order  (K,) int32 or None: column k of ``packed`` belongs to input ``input_order[k]``
    """

    packed: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    input_order: np.ndarray | None = None


def working_group_sizes(*inputs: int) -> list[int]:
    """Group sizes that divide every one of these row lengths: the multiples of 32 that do."""
    common = math.gcd(*inputs)
    return [size for size in range(RUN, common + 1, RUN) if common % size == 0]


def check_group_size(group_size: int, *inputs: int) -> None:
    """Raises MossError unless matrices with these numbers of inputs split into such groups."""
    sizes = working_group_sizes(*inputs)
    if group_size not in sizes:
        rows = " and ".join(str(k) for k in sorted(set(inputs)))
        possible = ", ".join(map(str, sizes)) or "none"
        raise MossError(
            f"group size {group_size} does not fit this model, whose matrices have rows of {rows} weights. "
            f"Sizes that work: {possible}."
        )


def pack(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields (N, K) uint8, each below 2**bits, to bytes (N, K * bits // 8). K is a multiple of 32 where bits is 4."""
    if bits == 8:
        return np.ascontiguousarray(fields, np.uint8)
    rows, columns = fields.shape
    halves = fields.astype(np.uint8, copy=False).reshape(rows, columns // RUN, 2, RUN // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, columns // 2)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of :func:`pack`: bytes (N, K * bits // 8) to fields (N, K) uint8."""
    if bits == 8:
        return packed
    runs = packed.reshape(packed.shape[0], -1, 1, RUN // 2)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(packed.shape[0], -1)


def fit_groups(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point that span each group from its least to its greatest weight, zero included.

    Scales are rounded up to float16, so that no weight lies further than half a scale from its nearest level.

    groups  (..., group_size) float32, finite
    Returns scales (...) float16 and zero points (...) float32, whole numbers in 1 .. 2**bits - 1.
    """
    top = np.float32(2**bits - 1)
    low = np.minimum(groups.min(axis=-1), np.float32(0))
    high = np.maximum(groups.max(axis=-1), np.float32(0))
    scale = _round_up((high - low) / top)
    zero = np.rint(-low / scale.astype(np.float32))
    # A zero point of 0 cannot be stored. With 1, one level less is left for the positive weights.
    scale = np.where(zero < 1, _round_up(high / (top - 1)), scale)
    return scale, np.clip(zero, 1, top)


def _round_up(scale: np.ndarray) -> np.ndarray:
    """Float32 to the next float16 that is not less."""
    wanted = np.maximum(scale, _SMALLEST_SCALE)
    rounded = wanted.astype(np.float16)
    return np.where(rounded < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded)


def nearest_fields(weights: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int) -> np.ndarray:
    """Nearest field of each weight, as float32 whole numbers; the three arrays broadcast. Scales are float16."""
    levels = np.rint(weights / scales.astype(np.float32)) + zero_points
    return np.clip(levels, 0, np.float32(2**bits - 1))


def quantize_rtn(weight: np.ndarray, bits: int, group_size: int) -> PackedArrays:
    """Round every weight to the nearest of its group's levels (round to nearest, asymmetric).

    weight  (N, K) float16 or float32, finite; group_size divides K and is a multiple of 32
    """
    rows, columns = weight.shape
    groups = columns // group_size
    packed = np.empty((rows, columns * bits // 8), np.uint8)
    scales = np.empty((rows, groups), np.float16)
    zeros = np.empty((rows, groups), np.uint8)
    for part in row_slabs(rows, columns):
        grouped = weight[part].astype(np.float32).reshape(-1, groups, group_size)
        scales[part], zero_points = fit_groups(grouped, bits)
        fields = nearest_fields(grouped, scales[part, :, None], zero_points[:, :, None], bits)
        packed[part] = pack(fields.astype(np.uint8).reshape(-1, columns), bits)
        zeros[part] = (zero_points - 1).astype(np.uint8)
    return PackedArrays(packed, scales, zeros, bits, group_size)


def dequantize(matrix: PackedArrays) -> np.ndarray:
    """The weights (N, K) float32, exact; column k belongs to input k, whatever the packed order is."""
    rows, groups = matrix.scales.shape
    weight = np.empty((rows, groups * matrix.group_size), np.float32)
    for part in row_slabs(*weight.shape):
        weight[part] = dequantize_rows(matrix, part)
    return weight


def dequantize_rows(matrix: PackedArrays, part: slice) -> np.ndarray:
    """The same for some rows: (n, K) float32."""
    scales = matrix.scales[part, :, None].astype(np.float32)
    zero_points = matrix.zeros[part, :, None].astype(np.float32) + 1
    fields = unpack(matrix.packed[part], matrix.bits).reshape(*scales.shape[:2], matrix.group_size)
    stored = (scales * (fields.astype(np.float32) - zero_points)).reshape(len(scales), -1)
    if matrix.input_order is None:
        return stored
    weight = np.empty_like(stored)
    weight[:, matrix.input_order] = stored
    return weight


def dequantize_float16(matrix: PackedArrays) -> np.ndarray:
    """The weights (N, K) float16 as the reference forms them: :func:`dequantize`, rounded once."""
    return dequantize(matrix).astype(np.float16)


def row_slabs(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows of about 4 million weights, so that temporary arrays stay small whatever the matrix."""
    step = max(1, _SLAB_WEIGHTS // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
