"""The GPU's operators over Jittor Vars, with the emulation in CuPy's place: whole blocks against the float64 oracle."""

from dataclasses import replace

import numpy as np
import pytest

from moss_jt.backend.jittor import jt
from moss_jt.kernels.cuda.operators import CudaOperators
from tests.emulation.emulator import FakeCupy, aligned
from tests.support.block_oracle import BlockArrays, block, geometry
from tests.support.operator_weights import (
    dense_block,
    head_in_one_piece,
    in_one_piece,
    packed_block,
)

CONFIG = geometry(n_embd=64, n_head=4, rotary_dim=8, n_positions=32)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4 act-order"])
def test_blocks_agree_with_float64(kind: str) -> None:
    """A prompt of three tokens, then one, then two, over one cache. Tolerance: float16 keys and values, float32 sums."""
    if kind == "float16":
        oracle = BlockArrays.random(CONFIG, 1)
        weights = dense_block(oracle)
    else:
        weights, oracle = packed_block(CONFIG, int(kind[3]), 32, 1, ordered="act-order" in kind)
    operators, pieces = CudaOperators(CONFIG, FakeCupy()), in_one_piece(weights)
    shape = (CONFIG.n_layer, 32, CONFIG.n_head, CONFIG.head_dim)
    memory = [aligned(np.zeros(shape, np.float16)) for _ in range(2)]
    keys, values = (jt.reuse_np_array(array) for array in memory)
    states = np.random.default_rng(2).standard_normal((6, CONFIG.n_embd)).astype(np.float32)
    empty = [np.zeros((32, CONFIG.n_head, CONFIG.head_dim), np.float16) for _ in range(2)]
    expected = block(states, oracle, *empty, 0)  # causal: the same for one pass as for three
    start, found = 0, []
    for tokens in (3, 1, 2):
        h = jt.array(states[start : start + tokens])
        found.append(operators.block(h, pieces, keys, values, 1, start).numpy())
        start += tokens
    assert np.abs(np.concatenate(found) - expected).max() <= 4e-3 * np.abs(expected).max()
    assert not memory[0][0].any(), "another layer's cache was written"


def test_head() -> None:
    draw = np.random.default_rng(3)
    operators = CudaOperators(CONFIG, FakeCupy())
    table = draw.standard_normal((50, 64)).astype(np.float16)
    norm_weight, norm_bias = draw.standard_normal((2, 64)).astype(np.float16)
    bias = draw.standard_normal(50).astype(np.float16)
    h = draw.standard_normal((2, 64)).astype(np.float32)
    norm = jt.array(norm_weight), jt.array(norm_bias)
    found = operators.head(jt.array(h), *norm, head_in_one_piece(table), jt.array(bias)).numpy()
    normed = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    expected = (normed * norm_weight + norm_bias) @ table.T.astype(np.float64) + bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    operators = CudaOperators(CONFIG, FakeCupy())
    weights = in_one_piece(dense_block(BlockArrays.random(CONFIG, 1)))
    cache = jt.zeros((2, 4, CONFIG.n_head, CONFIG.head_dim), "float16")
    with pytest.raises(ValueError, match="do not fit"):
        operators.block(jt.zeros((3, 64)), weights, cache, cache, 0, 2)
    with pytest.raises(ValueError, match="h has shape"):
        operators.block(jt.zeros((1, 32)), weights, cache, cache, 0, 0)
    with pytest.raises(ValueError, match="fc_in_bias"):
        operators.block(
            jt.zeros((1, 64)), replace(weights, fc_in_bias=weights.fc_out_bias), cache, cache, 0, 0
        )
