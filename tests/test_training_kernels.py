"""Training's operators against NumPy in float64: the processor's at every vector width that this machine has, and the card's in
emulation.

Products are compared with the matrix as it stands. Derivatives are compared, along random directions, with the central
difference of the function itself, written apart from the operators: with a step of 1e-5 it is exact to 1e-8.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moss_jt.backend.jittor import jt
from moss_jt.kernels.cpu.simd import available_simd
from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.kernels.cuda.training import CudaTrainingOperators
from moss_jt.kernels.interface import DenseMatrix
from moss_jt.kernels.training import TrainingOperators
from moss_jt.store.config import MossConfig
from tests.emulation.emulator import FakeCupy
from tests.support import block_oracle
from tests.support.block_oracle import geometry
from tests.support.operator_weights import packed_matrix, random_packed, var, widened

# Training multiplies floats: a level with VNNI is the same code.
SIMD = [level for level in available_simd() if "vnni" not in level]
CONFIG = geometry(96, 4, 16)
ODD = geometry(130, 5, 24, n_inner=515)
SPANS = np.array([[0, 70], [70, 1], [71, 66]], np.int32)
TOKENS = 137

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def half(*shape: int, seed: int = 0) -> Array:
    return (0.3 * np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(np.float16)


def assert_close(result: Any, expected: Array, bound: float = 2e-5) -> None:
    difference = np.abs(result.numpy() - expected).max()
    assert difference <= bound * np.abs(expected).max(), difference / np.abs(expected).max()


def check_derivative(function: Callable[[Array], Array], x: Array, g: Array, back: Array) -> None:
    """back . v is the change of g . f(x) along v."""
    wide, step = x.astype(np.float64), 1e-5
    for seed in range(5):
        direction = np.random.default_rng(100 + seed).standard_normal(x.shape)
        change = (function(wide + step * direction) - function(wide - step * direction)) / (2 * step)
        expected = float((g * change).sum())
        scale = float(np.sqrt((g.astype(np.float64) ** 2).sum() * (change**2).sum()))
        assert abs(float((back * direction).sum()) - expected) <= 1e-5 * scale


def operators_of(kind: str, config: MossConfig) -> TrainingOperators:
    return CudaTrainingOperators(config, FakeCupy()) if kind == "card" else CpuTrainingOperators(config, kind)


@pytest.fixture(params=[*SIMD, "card"])
def operators(request: pytest.FixtureRequest) -> TrainingOperators:
    return operators_of(request.param, CONFIG)


def halves(x: Array) -> Array:
    """What the card multiplies instead of x (T, K): eleven bits of each number, or fewer far below a row's largest."""
    factor = 2.0 ** (14 - np.floor(np.log2(np.abs(x).max(axis=1, keepdims=True))))
    return (x * factor).astype(np.float16) / factor.astype(np.float64)


def matrices() -> dict[str, tuple[Any, Array]]:
    """Name -> a matrix of (300, 160), and what it stands for."""
    dense = (0.1 * normal(300, 160, seed=3)).astype(np.float16)
    made = {"float16": (DenseMatrix(var(dense)), dense.astype(np.float64))}
    for bits in (8, 4):
        for ordered in (False, True):
            packed = random_packed((300, 160), bits, 32, seed=bits, ordered=ordered)
            name = f"int{bits}{' ordered' if ordered else ''}"
            made[name] = packed_matrix(packed), widened(packed).astype(np.float64)
    return made


MATRICES = matrices()


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("tokens", [1, 37, 600])
def test_products_both_ways(operators: TrainingOperators, kind: str, tokens: int) -> None:
    if isinstance(operators, CpuTrainingOperators) and operators.simd != SIMD[0] and kind != "int4 ordered":
        pytest.skip(
            "each matrix is widened by code that test_kernels_cpu runs at every width; compiling takes long"
        )
    if isinstance(operators, CudaTrainingOperators) and tokens == 600 and kind != "int4 ordered":
        pytest.skip("every element is a thread of the emulation, and tokens have no tiles there")
    matrix, exact = MATRICES[kind]
    x, g = normal(tokens, 160, seed=1), normal(tokens, 300, seed=2)
    results = operators.product(jt.array(x), matrix), operators.product_back(jt.array(g), matrix)
    if isinstance(operators, CudaTrainingOperators):
        assert_close(results[0], x @ exact.T, 1e-3)
        assert_close(results[1], g @ exact, 1e-3)
        x, g, exact = halves(x), halves(g), exact.astype(np.float16).astype(np.float64)
    assert_close(results[0], x.astype(np.float64) @ exact.T)
    assert_close(results[1], g.astype(np.float64) @ exact)


def test_a_matrix_larger_than_a_tile() -> None:
    operators = CpuTrainingOperators(CONFIG)
    dense = (0.03 * normal(1100, 2300, seed=3)).astype(np.float16)
    matrix, exact = DenseMatrix(var(dense)), dense.astype(np.float64)
    x, g = normal(5, 2300, seed=1), normal(5, 1100, seed=2)
    assert_close(operators.product(jt.array(x), matrix), x.astype(np.float64) @ exact.T)
    assert_close(operators.product_back(jt.array(g), matrix), g.astype(np.float64) @ exact)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("with_plus", [False, True])
def test_float_matrices(
    operators: TrainingOperators, transpose_a: bool, transpose_b: bool, with_plus: bool
) -> None:
    a, b, plus = normal(300, 70, seed=1), normal(70, 530, seed=2), normal(300, 530, seed=3)
    given = [np.ascontiguousarray(m.T) if turned else m for m, turned in ((a, transpose_a), (b, transpose_b))]
    result = operators.multiply(
        *map(jt.array, given), transpose_a, transpose_b, 0.37, jt.array(plus) if with_plus else None
    )
    assert_close(result, 0.37 * (a.astype(np.float64) @ b) + (plus if with_plus else 0))


def test_layer_norm(operators: TrainingOperators) -> None:
    h, g, weight, bias = 3 * normal(9, 96) + 1, normal(9, 96, seed=1), half(96), half(96, seed=1)

    def norm(x: Array) -> Array:
        return block_oracle.layer_norm(x, weight, bias, CONFIG.layer_norm_epsilon)

    assert_close(operators.norm(jt.array(h), var(weight), var(bias)), norm(h))
    back, normed = operators.norm_back(jt.array(g), jt.array(h), var(weight))
    check_derivative(norm, h, g, back.numpy())
    assert_close(normed, block_oracle.layer_norm(h, np.ones(96), np.zeros(96), CONFIG.layer_norm_epsilon))


def test_gelu(operators: TrainingOperators) -> None:
    y, g, bias = 3 * normal(7, 515), normal(7, 515, seed=1), half(515)
    y[0, :4] = 30, -30, 200, -200

    def gelu(x: Array) -> Array:
        return block_oracle.gelu_new(x + bias.astype(np.float64))

    assert_close(operators.gelu(jt.array(y), var(bias)), gelu(y.astype(np.float64)))
    back = operators.gelu_back(jt.array(g), jt.array(y), var(bias)).numpy()
    assert np.isfinite(back).all()
    check_derivative(gelu, y, g, back)


def spans_attention(qkv: Array, config: MossConfig, spans: Array) -> Array:
    results = []
    for first, count in spans:
        q, k, v = (
            part.reshape(count, config.n_head, config.head_dim)
            for part in np.split(qkv[first : first + count], 3, axis=1)
        )
        positions = np.arange(count)
        q, k = (block_oracle.rotate(part, positions, config.rotary_dim) for part in (q, k))
        results.append(block_oracle.attention(q, k, v, 0).reshape(count, -1))
    return np.concatenate(results)


@pytest.mark.parametrize("kind", [*SIMD, "card"])
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["even", "odd"])
def test_attention_within_samples(config: MossConfig, kind: str) -> None:
    operators = operators_of(kind, config)
    qkv, g = normal(TOKENS, 3 * config.n_embd), normal(TOKENS, config.n_embd, seed=1)

    def attention(x: Array) -> Array:
        return spans_attention(x, config, SPANS)

    given = jt.array(qkv), SPANS
    assert_close(operators.attention(*given), attention(qkv.astype(np.float64)))
    check_derivative(attention, qkv, g, operators.attention_back(jt.array(g), *given).numpy())


def test_a_sample_s_bits_do_not_depend_on_what_follows_it(operators: TrainingOperators) -> None:
    qkv, g = normal(TOKENS, 3 * 96), normal(TOKENS, 96, seed=1)
    alone = operators.attention_back(jt.array(g[:70]), jt.array(qkv[:70]), SPANS[:1]).numpy()
    among = operators.attention_back(jt.array(g), jt.array(qkv), SPANS).numpy()
    assert np.array_equal(among[:70], alone)


def test_shapes_that_disagree_are_refused(operators: TrainingOperators) -> None:
    matrix, _ = MATRICES["int4"]
    with pytest.raises(ValueError, match="x has shape"):
        operators.product(jt.array(normal(3, 159)), matrix)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        operators.multiply(jt.array(normal(3, 4)), jt.array(normal(3, 4)))
    with pytest.raises(ValueError, match="int32"):
        operators.attention(jt.array(normal(4, 288)), normal(1, 2))
    with pytest.raises(ValueError, match="are not 4 rows one after another"):
        operators.attention(jt.array(normal(4, 288)), np.array([[0, 2], [3, 1]], np.int32))


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9])
def test_a_card_s_products_hold_what_float16_does_not(scale: float) -> None:
    """A row whose numbers are all too small or too large for float16, beside one of nothing, of infinity, and usual ones."""
    operators = operators_of("card", CONFIG)
    matrix, exact = MATRICES["float16"]
    g = normal(5, 300, seed=2)
    g[0] *= scale
    g[1] = 0
    g[2, 7] = np.inf
    result = operators.product_back(jt.array(g), matrix).numpy()
    usual = [0, 3, 4]
    wanted = halves(g[usual]) @ exact
    assert (np.abs(result[usual] - wanted) <= 2e-5 * np.abs(wanted).max(axis=1, keepdims=True)).all()
    assert not result[1].any() and not np.isfinite(result[2]).any()


def test_sums_and_bias(operators: TrainingOperators) -> None:
    a, b, bias = normal(7, 515), normal(7, 515, seed=1), half(515)
    assert_close(operators.add(jt.array(a), jt.array(b)), a.astype(np.float64) + b)
    assert_close(operators.add(jt.array(a), jt.array(b), var(bias)), a.astype(np.float64) + b + bias)


def test_what_the_loss_asks_of_logits(operators: TrainingOperators) -> None:
    """Rows of which the largest comes twice, with targets among these columns and elsewhere."""
    logits, bias = 5 * normal(6, 700), half(700)
    bias[:10] = bias[600:610] = 0.5
    logits[:, 3] = logits[:, 605] = 40
    logits[4, 699] = 90
    columns = np.array([5, -1, 605, 0, 699, -1])
    values = logits.astype(np.float64) + bias
    summary = operators.logit_summary(jt.array(logits), var(bias), columns)
    np.testing.assert_allclose(summary.largest, values.max(axis=1), 1e-6)
    assert summary.best.tolist() == [3, 3, 3, 3, 699, 3]
    total = np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(summary.total, total, 1e-5)
    own = [values[row, column] if column >= 0 else 0 for row, column in enumerate(columns)]
    np.testing.assert_allclose(summary.own, own, 1e-6)
    shift = (values.max(axis=1) + np.log(total)).astype(np.float32)
    slope = np.exp(values - shift[:, None])
    for row, column in enumerate(columns):
        slope[row, column] -= column >= 0
    assert_close(operators.logit_slope(jt.array(logits), var(bias), columns, shift, 0.25), 0.25 * slope)
