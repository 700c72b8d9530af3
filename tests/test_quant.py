"""The packed formats: every field and zero point, the reference's formula, and how far a rounded weight may be off."""

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.store.quant import (
    PackedArrays,
    check_group_size,
    dequantize,
    dequantize_float16,
    pack,
    quantize_rtn,
    unpack,
    working_group_sizes,
)


def every_field_and_zero(bits: int, group_size: int = 32) -> PackedArrays:
    """One row per zero point 1 .. 2**bits, whose groups run through all fields."""
    levels = 2**bits
    columns = max(levels, group_size)
    fields = np.tile(np.arange(columns) % levels, (levels, 1)).astype(np.uint8)
    zeros = np.tile(np.arange(levels, dtype=np.uint8)[:, None], (1, columns // group_size))
    rng = np.random.default_rng(bits)
    scales = rng.uniform(1e-6, 0.1, zeros.shape).astype(np.float16)  # the least are subnormal
    return PackedArrays(pack(fields, bits), scales, zeros, bits, group_size)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone_by_unpacking_for_every_field(bits: int) -> None:
    rng = np.random.default_rng(0)
    fields = rng.integers(0, 2**bits, (5, 96)).astype(np.uint8)
    assert (unpack(pack(fields, bits), bits) == fields).all()
    assert pack(fields, bits).shape == (5, 96 * bits // 8)
    every = np.arange(256, dtype=np.uint8).reshape(2, 128) % 2**bits
    assert (unpack(pack(every, bits), bits) == every).all()


def test_int4_bytes_hold_weight_i_and_weight_16_plus_i() -> None:
    fields = np.arange(64, dtype=np.uint8)[None] % 16
    fields[0, 16:32] = 15 - np.arange(16)
    packed = pack(fields, 4)[0]
    assert packed[:16].tolist() == [i | (15 - i) << 4 for i in range(16)]
    assert packed[16:].tolist() == [i | i << 4 for i in range(16)]


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weights_are_the_reference_formula_exactly(bits: int) -> None:
    """Weight by weight: float32 holds the product exactly, and the reference's float16 product is that, rounded."""
    matrix = every_field_and_zero(bits)
    weight, half = dequantize(matrix), dequantize_float16(matrix)
    fields = unpack(matrix.packed, bits).astype(np.int64)
    zero_points = set()
    for row in range(weight.shape[0]):
        z = int(matrix.zeros[row, 0]) + 1
        zero_points.add(z)
        for k in range(weight.shape[1]):
            scale = matrix.scales[row, k // matrix.group_size]
            step = int(fields[row, k]) - z
            assert float(weight[row, k]) == float(scale) * step  # Python floats: exact, 53 bits
            assert half[row, k] == np.float16(step) * scale  # float16 arithmetic, as the reference's kernel
    assert set(fields.ravel()) == set(range(2**bits))
    assert zero_points == set(range(1, 2**bits + 1))


def test_columns_return_to_their_inputs() -> None:
    matrix = every_field_and_zero(4, 32)
    order = np.random.default_rng(1).permutation(32).astype(np.int32)
    moved = PackedArrays(matrix.packed, matrix.scales, matrix.zeros, 4, 32, order)
    plain = dequantize(matrix)
    for k in range(32):
        assert (dequantize(moved)[:, order[k]] == plain[:, k]).all()


def test_work_in_slabs_gives_the_same_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((37, 96)).astype(np.float16)
    complete = quantize_rtn(weight, 4, 32)
    whole_weights = dequantize(complete)
    monkeypatch.setattr("moss_jt.store.quant._SLAB_WEIGHTS", 5 * 96)
    slabs = quantize_rtn(weight, 4, 32)
    assert (slabs.packed == complete.packed).all() and (slabs.scales == complete.scales).all()
    assert (slabs.zeros == complete.zeros).all() and (dequantize(complete) == whole_weights).all()


def difficult_rows() -> np.ndarray:
    """Normal weights, then rows that reach the ends of what a zero point can say."""
    rng = np.random.default_rng(3)
    normal = (0.02 * rng.standard_normal((16, 128))).astype(np.float16)
    outlier = normal[:2].copy()
    outlier[:, 5] = 60.0
    rows = [
        normal,
        outlier,
        np.abs(normal[:3]),  # no negative weight: the zero point would be 0
        -np.abs(normal[:3]),
        np.full((1, 128), 65504, np.float16),
        np.zeros((1, 128), np.float16),
        np.full((1, 128), 2.0**-24, np.float16),
        np.where(np.arange(128) % 2, 65504, -65504).astype(np.float16)[None],
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_no_weight_moves_further_than_half_a_scale(bits: int, group_size: int) -> None:
    weight = difficult_rows()
    matrix = quantize_rtn(weight, bits, group_size)
    assert (matrix.scales > 0).all() and np.isfinite(matrix.scales).all()
    half_scale = np.repeat(matrix.scales.astype(np.float64) / 2, group_size, axis=1)
    error = np.abs(dequantize(matrix).astype(np.float64) - weight.astype(np.float64))
    # Half a scale, and what float32 loses in weight / scale, a number below 2**8.
    assert (error <= half_scale * (1 + 2**-14)).all(), (error / half_scale).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_levels_come_back_unchanged(bits: int) -> None:
    """Of a matrix that was quantised before, nothing is lost by quantising it again."""
    matrix = every_field_and_zero(bits, 32 if bits == 4 else 256)
    rows = slice(0, 2**bits - 1)  # without 2**bits, which our own fit never gives
    weight = dequantize(matrix)[rows]
    again = quantize_rtn(weight, bits, matrix.group_size)
    assert (dequantize(again) == weight).all()


def test_group_sizes_that_fit_are_named() -> None:
    assert working_group_sizes(192, 768) == [32, 64, 96, 192]
    check_group_size(96, 192, 768)
    with pytest.raises(MossError, match="rows of 192 and 768 weights. Sizes that work: 32, 64, 96, 192"):
        check_group_size(128, 192, 768)
    with pytest.raises(MossError, match="Sizes that work: none"):
        check_group_size(32, 40)
