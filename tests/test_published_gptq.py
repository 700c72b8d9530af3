"""The tests' own writer of published-style checkpoints says what our packed matrices say."""

import numpy as np
import pytest

from moss_jt.store.quant import PackedArrays, dequantize_float16, pack
from tests.support.published_gptq import reference_weight, to_published


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_both_layouts_hold_the_same_weights(bits: int, act_order: bool) -> None:
    rng = np.random.default_rng(bits)
    fields = rng.integers(0, 2**bits, (16, 64)).astype(np.uint8)
    scales = rng.uniform(1e-4, 0.1, (16, 2)).astype(np.float16)
    zeros = rng.integers(0, 2**bits, (16, 2)).astype(np.uint8)
    zeros[0], zeros[1] = 0, 2**bits - 1  # zero points 1 and 2**bits
    order = rng.permutation(64).astype(np.int32) if act_order else None
    matrix = PackedArrays(pack(fields, bits), scales, zeros, bits, 32, order)
    tensors = to_published(matrix)
    assert tensors["qweight"].shape == (64 * bits // 32, 16) and tensors["qzeros"].shape == (
        2,
        16 * bits // 32,
    )
    assert (np.diff(tensors["g_idx"]) < 0).any() == act_order
    assert (reference_weight(tensors, bits) == dequantize_float16(matrix)).all()
