"""Calibration's own block against the float64 one, and activations that flow through what was quantised."""

import numpy as np
import pytest

from moss_jt.convert.calibration import Calibration, GptqSettings
from moss_jt.store.config import MossConfig
from moss_jt.store.quant import PackedArrays, dequantize
from tests.support import block_oracle

NAMES = {
    "ln_1_weight": "ln_1.weight",
    "ln_1_bias": "ln_1.bias",
    "qkv": "attn.qkv_proj.weight",
    "out": "attn.out_proj.weight",
    "fc_in": "mlp.fc_in.weight",
    "fc_in_bias": "mlp.fc_in.bias",
    "fc_out": "mlp.fc_out.weight",
    "fc_out_bias": "mlp.fc_out.bias",
}
MATRICES = {"qkv": "attn.qkv_proj", "out": "attn.out_proj", "fc_in": "mlp.fc_in", "fc_out": "mlp.fc_out"}


def geometry() -> MossConfig:
    return block_oracle.geometry(n_embd=96, n_head=4, rotary_dim=16, n_positions=64, n_inner=160)


def quantized(
    arrays: block_oracle.BlockArrays, hidden: np.ndarray, settings: GptqSettings, length: int
) -> tuple[dict[str, PackedArrays], np.ndarray]:
    weights = {NAMES[name]: array for name, array in arrays.arrays.items()}
    calibration = Calibration(arrays.config, hidden.copy(), length)
    return dict(calibration.quantize_block(weights, settings)), calibration.hidden


def exact_block(
    arrays: block_oracle.BlockArrays, matrices: dict[str, np.ndarray], hidden: np.ndarray, length: int
) -> np.ndarray:
    """The float64 block with other matrices, sequence by sequence."""
    block = block_oracle.BlockArrays(arrays.config, {**arrays.arrays, **matrices})
    shape = (length, arrays.config.n_head, arrays.config.head_dim)
    parts = []
    for first in range(0, len(hidden), length):
        keys, values = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
        parts.append(block_oracle.block(hidden[first : first + length], block, keys, values, 0))
    return np.concatenate(parts)


@pytest.mark.parametrize("act_order", [False, True])
def test_hidden_states_leave_the_block_as_quantised(act_order: bool) -> None:
    """Against the float64 block with the dequantised weights: the same sequences, masks, rotary and sums."""
    arrays = block_oracle.BlockArrays.random(geometry(), seed=1)
    hidden = np.random.default_rng(2).standard_normal((50, 96)).astype(np.float32)
    packed, left = quantized(arrays, hidden, GptqSettings(4, 32, act_order), length=20)
    matrices = {name: dequantize(packed[MATRICES[name]]) for name in MATRICES}
    want = exact_block(arrays, matrices, hidden, length=20)
    # The oracle's cache is float16 (2**-11), summed over few hundred terms of size 1; everything else is float32.
    assert np.abs(left - want).max() < 4e-3, np.abs(left - want).max()
    assert list(packed) == ["attn.qkv_proj", "mlp.fc_in", "attn.out_proj", "mlp.fc_out"]
    assert all((matrix.input_order is not None) == act_order for matrix in packed.values())


def test_eight_bits_hardly_change_a_block_and_four_do() -> None:
    arrays = block_oracle.BlockArrays.random(geometry(), seed=3)
    hidden = np.random.default_rng(4).standard_normal((64, 96)).astype(np.float32)
    want = exact_block(arrays, {}, hidden, length=64)
    errors = {}
    for bits in (4, 8):
        _, left = quantized(arrays, hidden, GptqSettings(bits, 32, False), length=64)
        errors[bits] = float(np.sqrt(np.square(left - want).mean() / np.square(want).mean()))
    assert errors[8] < 0.01 and errors[8] < errors[4] / 8
