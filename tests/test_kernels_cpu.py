"""The CPU's operators against a float64 block, at every level of vectors that this machine has.

Tolerance: weights are exact in float32 whether they come as float16 or packed, and sums are float32, so a block agrees
to 1e-5 of its largest value with the same block in float64. In whole pages packed matrices take inputs of 16 bits: a
rounding of a 65534th of the largest of 128, by sums of errors that are independent, stays below 1e-4 of the block's
largest value; tests/test_products.py has the bound of the product itself. The oracle attends to the cache that the operator wrote;
that one is checked apart, against float16's half step of 2**-11 of each value, or in int8 against half a scale.
"""

import gc
import itertools
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.backend.jittor import jt
from moss_jt.engine.kv_cache import KVCache
from moss_jt.errors import MossError
from moss_jt.kernels.cpu.operators import CpuOperators, let_others_run
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.interface import (
    PAGE,
    BlockWeights,
    ByteRows,
    CacheRows,
    DenseMatrix,
    PackedMatrix,
    Places,
)
from moss_jt.kernels.places import one_sequence, places_of
from moss_jt.kernels.portable import PortableOperators, dequantize
from moss_jt.store import quant
from moss_jt.store.config import MossConfig
from tests.support import block_oracle
from tests.support.block_oracle import BlockArrays, geometry
from tests.support.operator_weights import (
    dense_block,
    packed_block,
    packed_matrix,
    random_packed,
    var,
    widened,
)

SIMD = available_simd()
KINDS = ("float16", "int8", "int4")
# float16 has no products of integers, which are all that VNNI is about.
LEVELS = [(kind, simd) for kind in KINDS for simd in SIMD if kind != "float16" or not simd.endswith("-vnni")]
WIDTHS = [simd for kind, simd in LEVELS if kind == "float16"]
# Where a cache in int8 is tested: another source for each, which is soon compiled for one level only.
CACHE_SIMD = [
    chosen_simd(),
    *(pytest.param(simd, marks=pytest.mark.long) for simd in WIDTHS if simd != chosen_simd()),
]
# Tokens of passes; those that are whole pages, from where a page begins, are computed as such. The last pass ends where the
# cache ends.
PASSES = (1, 2, 3, 7, 16, 23, 12, 128, 24, 33, 1, 6)

GEOMETRIES = {
    "head of 24": geometry(96, 4, 16),
    "24 heads": geometry(768, 24, 32, n_inner=544),
    "head of 256": geometry(1024, 4, 64, n_inner=1056),
    "all rotary": geometry(320, 4, 80, n_inner=96),
}
ODD = geometry(130, 5, 24, n_inner=515)  # no multiple of anything: float16 only


def make_block(
    kind: str, config: MossConfig, group_size: int = 32, ordered: bool = False
) -> tuple[BlockWeights, BlockArrays]:
    if kind == "float16":
        arrays = BlockArrays.random(config, seed=1)
        return dense_block(arrays), arrays
    return packed_block(config, 8 if kind == "int8" else 4, group_size, seed=1, ordered=ordered)


class Run:
    """One operators object, block and cache; layer 1 of 2 is used, and layer 0 must stay as it was.

    The cache's pages belong to several sequences, each of ``capacity`` positions, and lie in disorder.
    """

    def __init__(
        self,
        operators: Any,
        weights: BlockWeights,
        config: MossConfig,
        capacity: int,
        sequences: int = 1,
        cache_bits: int = 16,
    ) -> None:
        self.operators, self.weights = operators, weights
        pages = -(-capacity // PAGE)
        cache = KVCache(replace(config, n_layer=2), sequences * pages * PAGE, bits=cache_bits)
        self.keys, self.values = cache.keys, cache.values
        self.pages = np.random.default_rng(7).permutation(sequences * pages).reshape(sequences, pages)

    def whole(self, start_pos: int, tokens: int) -> int:
        return tokens if start_pos % PAGE == 0 and tokens % PAGE == 0 else 0

    def tolerance(self, start_pos: int, tokens: int) -> float:
        """What inputs of 16 bits leave (tests/test_products.py has the exact bounds), or float32's."""
        matrices = [getattr(self.weights, name) for name in ("qkv", "out", "fc_in", "fc_out")]
        packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
        in_digits = any(matrix.group_size % 128 == 0 for matrix in packed)
        as_integers = packed and getattr(self.operators, "simd", "0") != "0"
        return 1e-4 if as_integers and (in_digits or self.whole(start_pos, tokens)) else 1e-5

    def step(self, h: np.ndarray, start_pos: int, slot: int = 0) -> np.ndarray:
        tokens = len(h)
        whole = self.whole(start_pos, tokens)
        return self.pass_over(h, places_of([slot] * tokens, start_pos + np.arange(tokens), self.pages, whole))

    def pass_over(self, h: np.ndarray, places: Places) -> np.ndarray:
        return self.operators.block(jt.array(h), self.weights, self.keys, self.values, 1, places).numpy()

    def cache(self, slot: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence as they are meant: (P, H, D)."""
        lies = (self.pages[slot][:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        keys, values = (meant(rows) for rows in (self.keys, self.values))
        assert not keys[0].any() and not values[0].any()
        return keys[1][lies], values[1][lies]

    def steps(self, slot: int = 0) -> tuple[np.ndarray | float, np.ndarray | float]:
        """Scales of the sequence's keys and values (P, H, 1), 0 in float16."""
        lies = (self.pages[slot][:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        keys, values = (
            by_position(rows)[1][lies] if isinstance(rows, ByteRows) else 0.0
            for rows in (self.keys, self.values)
        )
        return keys, values


def by_position(rows: ByteRows) -> np.ndarray:
    """Scales (L, P, H, 1)."""
    scales = rows.scales.numpy()
    return scales.transpose(0, 1, 3, 2).reshape(len(scales), -1, scales.shape[2], 1)


def meant(rows: CacheRows) -> np.ndarray:
    """(L, P, H, D) float16, or of int8 what it stands for, in float64."""
    if isinstance(rows, ByteRows):
        return rows.numbers.numpy().astype(np.float64) * by_position(rows)
    return rows.numpy()


def random_states(config: MossConfig, tokens: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, config.n_embd)).astype(np.float32)


def assert_close(actual: np.ndarray, expected: np.ndarray, where: str, tolerance: float = 1e-5) -> None:
    difference = np.abs(actual - expected)
    bound = tolerance * np.abs(expected).max()
    assert difference.max() <= bound, (
        f"{where}: max {difference.max()}, mean {difference.mean()}, bound {bound}"
    )


def check_passes(run: Run, oracle: BlockArrays, passes: tuple[int, ...]) -> None:
    states = random_states(oracle.config, sum(passes))
    start = 0
    for tokens in passes:
        h = states[start : start + tokens]
        actual = run.step(h, start)
        tolerance = run.tolerance(start, tokens)
        keys, values = run.cache()
        new, in_bytes = slice(start, start + tokens), isinstance(run.keys, ByteRows)
        exacts = block_oracle.new_keys_values(h, oracle, start)
        for cache, steps, exact in zip((keys, values), run.steps(), exacts, strict=True):
            error = np.abs(cache[new] - exact)
            half_step = 0.5001 * steps[new] if in_bytes else 2.0**-11 * np.abs(exact)
            bound = half_step + tolerance * max(1, np.abs(exact).max())
            assert (error <= bound).all(), f"cache, {tokens} tokens from {start}"
        assert_close(
            actual,
            block_oracle.block_over_cache(h, oracle, keys, values, start),
            f"{tokens} tokens from {start}",
            tolerance,
        )
        start += tokens


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Let Jittor compile all sources at once, on all cores, instead of one after another."""
    pending = []
    config = GEOMETRIES["head of 24"]
    for simd in SIMD:
        operators = CpuOperators(config, simd)
        h = jt.array(random_states(config, 1))
        for kind in (kind for kind, level in LEVELS if level == simd):
            run = Run(operators, make_block(kind, config)[0], config, 1)
            pending.append(operators.block(h, run.weights, run.keys, run.values, 1, one_sequence(0, 1)))
        if simd == chosen_simd():
            run = Run(operators, make_block("float16", config)[0], config, 1, cache_bits=8)
            pending.append(operators.block(h, run.weights, run.keys, run.values, 1, one_sequence(0, 1)))
        if simd not in WIDTHS:
            continue
        head = [var(np.ones(shape, np.float16)) for shape in ((96,), (96,), (5, 96), (5,))]
        pending.append(operators.head(h, *head))
    jt.sync(pending)


@pytest.mark.parametrize(("kind", "simd"), LEVELS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_block_agrees_with_float64(name: str, kind: str, simd: str) -> None:
    config = GEOMETRIES[name]
    weights, oracle = make_block(kind, config)
    check_passes(Run(CpuOperators(config, simd), weights, config, sum(PASSES)), oracle, PASSES)


@pytest.mark.parametrize("simd", WIDTHS)
def test_block_of_sizes_that_fill_no_vector(simd: str) -> None:
    weights, oracle = make_block("float16", ODD)
    check_passes(Run(CpuOperators(ODD, simd), weights, ODD, sum(PASSES)), oracle, PASSES)


@pytest.mark.parametrize("simd", CACHE_SIMD)
@pytest.mark.parametrize("config", [GEOMETRIES["head of 256"], ODD], ids=["head of 256", "head of 26"])
def test_a_cache_of_bytes_agrees_with_float64(config: MossConfig, simd: str) -> None:
    weights, oracle = make_block("float16", config)
    check_passes(Run(CpuOperators(config, simd), weights, config, sum(PASSES), cache_bits=8), oracle, PASSES)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_what_a_cache_of_bytes_costs_attention_is_bounded(spread: float) -> None:
    """Of a query's scores each is off by at most e = sum |q| * scale / 2 / sqrt(D), so its weights by factors of e^(2e) and
    e^(-2e), and its result by that share of the largest value and half a value's scale."""
    config, tokens = GEOMETRIES["head of 256"], 2 * PAGE
    arrays = BlockArrays.random(config, seed=1)
    arrays.arrays["ln_1_weight"] = (arrays.arrays["ln_1_weight"] * spread).astype(np.float16)
    run = Run(CpuOperators(config), dense_block(arrays), config, tokens, cache_bits=8)
    states = random_states(config, tokens)
    run.step(states, 0)
    exact_keys, exact_values = block_oracle.new_keys_values(states, arrays, 0)
    q = block_oracle.queries(states, arrays, 0)
    exact = block_oracle.attention(q, exact_keys, exact_values, 0)
    error = np.abs(block_oracle.attention(q, *run.cache(), 0) - exact).max(axis=2)  # (T, H)
    key_steps, value_steps = (np.maximum.accumulate(steps[:, :, 0]) for steps in run.steps())
    score = np.abs(q).sum(axis=2) * 0.501 * key_steps / config.head_dim**0.5
    largest = np.maximum.accumulate(np.abs(exact_values).max(axis=2))
    bound = np.expm1(2 * score) * largest + 0.501 * value_steps
    assert (error <= bound).all(), (error / bound).max()
    assert error.max() > 1e-4 * np.abs(exact).max(), "nothing was rounded"


def test_vectors_of_nothing_and_of_too_much_in_bytes() -> None:
    """A head of zeros has no scale to divide by, and what is not finite counts as float16's largest."""
    config = GEOMETRIES["head of 24"]
    weights, _ = make_block("float16", config)
    run = Run(CpuOperators(config), weights, config, 3, cache_bits=8)
    silent = replace(weights, qkv=DenseMatrix(var(np.zeros((3 * 96, 96), np.float16))))
    run.weights = silent
    assert np.isfinite(run.step(random_states(config, 1), 0)).all()
    assert not run.cache()[0].any() and not run.cache()[1].any()
    run.weights = replace(weights, qkv=DenseMatrix(var(np.full((3 * 96, 96), 60000, np.float16))))
    h = random_states(config, 2)
    h[1, 3] = np.inf
    assert np.isfinite(run.step(h, 1)[0]).all()
    assert np.isfinite(run.cache()[0]).all() and np.isclose(np.abs(run.cache()[0]).max(), 65504)


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize(("group_size", "ordered"), [(32, True), (160, False), (0, False), (0, True)])
def test_group_sizes_and_input_order(kind: str, group_size: int, ordered: bool) -> None:
    config = geometry(320, 4, 32, n_inner=640)
    weights, oracle = make_block(kind, config, group_size, ordered)
    check_passes(Run(CpuOperators(config), weights, config, 64), oracle, (1, 3, 24, 2))


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize(("group_size", "ordered"), [(128, False), (128, True), (0, False)])
def test_groups_of_whole_spans(kind: str, group_size: int, ordered: bool, simd: str) -> None:
    """128 inputs at a time are multiplied as integers where the processor can; a token stays what it is alone."""
    config = geometry(256, 4, 32, n_inner=2304)  # more spans than a vector has lanes
    weights, oracle = make_block(kind, config, group_size, ordered)
    check_passes(Run(CpuOperators(config, simd), weights, config, 128), oracle, (64, 1, 3, 24, 2))
    states = random_states(config, 7)
    alone, together = (Run(CpuOperators(config, simd), weights, config, 7) for _ in range(2))
    rows = [alone.step(states[t : t + 1], t) for t in range(7)]
    assert np.array_equal(np.concatenate(rows), together.step(states, 0))


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_inputs_of_very_different_sizes(kind: str) -> None:
    """Tokens of 1e-30 to 1e4 times the usual, and one input far above its neighbours: the norm evens out the first, not the
    second. A token that is not finite stays so, and changes none of the others."""
    config = geometry(256, 4, 32, n_inner=512)
    weights, oracle = make_block(kind, config, 128)
    states = random_states(config, 4) * np.array([[1e-30], [1.0], [1e4], [1.0]], np.float32)
    states[3, 70] = 3e4
    check_run = Run(CpuOperators(config), weights, config, 8)
    actual = check_run.step(states, 0)
    keys, values = check_run.cache()
    expected = block_oracle.block_over_cache(states, oracle, keys, values, 0)
    for t in range(4):
        assert_close(actual[t], expected[t], f"token {t}", check_run.tolerance(0, 4))
    broken = states.copy()
    broken[3, 5] = np.inf
    again = Run(CpuOperators(config), weights, config, 8).step(broken, 0)
    assert np.array_equal(again[:3], actual[:3])
    assert not np.isfinite(again[3]).any()


@pytest.mark.parametrize("bits", (4, 8))
def test_every_field_and_zero_point_is_widened_exactly(bits: int) -> None:
    """The portable dequantization bit for bit; the kernels' products are tested with the same kind of matrix."""
    matrix = random_packed((256, 512), bits, 32, seed=3, ordered=False)
    fields = quant.unpack(matrix.packed, bits)
    zeros = np.repeat(matrix.zeros, 32, axis=1)
    pairs = {4: set(zip(fields.ravel(), zeros.ravel(), strict=True)), 8: set(fields.ravel())}[bits]
    assert len(pairs) == 256
    assert len(np.unique(matrix.zeros)) == 2**bits
    actual = dequantize(packed_matrix(matrix)).numpy()
    assert np.array_equal(actual, widened(matrix))
    assert np.array_equal(actual, quant.dequantize(matrix))


@pytest.mark.parametrize(("kind", "simd"), LEVELS)
def test_a_token_does_not_depend_on_how_many_share_its_pass(kind: str, simd: str) -> None:
    """Bit for bit, for few tokens, across the border between two pages: drafts and what fills no page rely on it."""
    ways = (63,), (1,) * 63, (2, 3, 4, 5, 9, 40), (22, 1, 24, 16), (7, 16, 40), (46, 17), (60, 3)
    same_in_any_pass(kind, simd, ways)


def same_in_any_pass(kind: str, simd: str, ways: tuple[tuple[int, ...], ...], cache_bits: int = 16) -> None:
    config = geometry(160, 4, 32, n_inner=544)
    weights, _ = make_block(kind, config)
    states = random_states(config, 120 + 63)
    results = []
    for passes in ways:
        run = Run(CpuOperators(config, simd), weights, config, 192, cache_bits=cache_bits)
        run.step(states[:64], 0)
        run.step(states[64:120], 64)
        ends = (120 + np.cumsum(passes)).tolist()
        rows = [
            run.step(states[end - tokens : end], end - tokens)
            for tokens, end in zip(passes, ends, strict=True)
        ]
        results.append((np.concatenate(rows), *run.cache()))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert np.array_equal(first, second)


@pytest.mark.parametrize("simd", CACHE_SIMD)
def test_a_token_in_a_cache_of_bytes_does_not_depend_on_how_many_share_its_pass(simd: str) -> None:
    same_in_any_pass("float16", simd, ((63,), (1,) * 63, (22, 1, 24, 16), (7, 16, 40)), 8)


@pytest.mark.parametrize("simd", WIDTHS)
def test_head_agrees_with_float64(simd: str) -> None:
    config = ODD
    rng = np.random.default_rng(4)
    operators = CpuOperators(config, simd)
    width = config.n_embd
    norm_weight, norm_bias, weight, bias = (
        rng.standard_normal(shape).astype(np.float16)
        for shape in ((width,), (width,), (1031, width), (1031,))
    )
    singles = []
    for rows in (1, 3, 23, 24, 65, 64):
        h = random_states(config, rows)
        arrays = var(norm_weight), var(norm_bias), var(weight), var(bias)
        actual = operators.head(jt.array(h), *arrays, whole=rows if rows == 64 else 0).numpy()
        normed = block_oracle.layer_norm(h, norm_weight, norm_bias, config.layer_norm_epsilon)
        assert_close(actual, normed @ weight.astype(np.float64).T + bias, f"{rows} rows")
        singles.append(actual[0])
    assert all(np.array_equal(singles[0], other) for other in singles[1:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_portable_block_agrees_with_float64(kind: str) -> None:
    config = GEOMETRIES["head of 24"]
    weights, oracle = make_block(kind, config, ordered=kind == "int4")
    check_passes(Run(PortableOperators(config), weights, config, 16, sequences=2), oracle, (3, 1, 1))


def test_portable_block_over_a_cache_of_bytes() -> None:
    """It agrees with float64, and has the same bytes as the kernels but where float32 decides between two neighbours."""
    config = GEOMETRIES["head of 24"]
    weights, oracle = make_block("float16", config)
    portable = Run(PortableOperators(config), weights, config, 70, sequences=2, cache_bits=8)
    check_passes(portable, oracle, (63, 3, 1))
    ours = Run(CpuOperators(config), weights, config, 70, sequences=2, cache_bits=8)
    check_passes(ours, oracle, (63, 3, 1))
    for rows, others in ((portable.keys, ours.keys), (portable.values, ours.values)):
        apart = rows.numbers.numpy().astype(int) - others.numbers.numpy()
        assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.01
        assert np.allclose(rows.scales.numpy(), others.scales.numpy(), rtol=1e-5)


def test_portable_head_agrees_with_float64() -> None:
    config = GEOMETRIES["head of 24"]
    rng = np.random.default_rng(4)
    operators = PortableOperators(config)
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in ((96,), (96,), (37, 96), (37,))]
    h = random_states(config, 3)
    actual = operators.head(jt.array(h), *map(var, arrays)).numpy()
    normed = block_oracle.layer_norm(h, arrays[0], arrays[1], config.layer_norm_epsilon)
    assert_close(actual, normed @ arrays[2].astype(np.float64).T + arrays[3], "head")


def test_keys_beyond_float16_stay_finite() -> None:
    """An infinity in the cache would make every later token's attention NaN."""
    config = GEOMETRIES["head of 24"]
    arrays = BlockArrays.random(config, seed=1)
    arrays.arrays["qkv"] = np.full_like(arrays.arrays["qkv"], 60000)
    run = Run(CpuOperators(config), dense_block(arrays), config, 8)
    h = np.abs(random_states(config, 2))
    assert np.isfinite(run.step(h, 0)).all()
    assert np.abs(run.cache()[0]).max() == 65504


def test_decoding_compiles_nothing() -> None:
    config = GEOMETRIES["head of 24"]
    weights, _ = make_block("float16", config)
    run = Run(CpuOperators(config), weights, config, 64)
    run.step(random_states(config, 5), 0)
    objects = Path(jt.flags.cache_path) / "jit"
    before = sorted(objects.glob("*.so"))
    for position, tokens in ((5, 1), (6, 1), (7, 4), (11, 24), (35, 1)):
        run.step(random_states(config, tokens), position)
    run.step(random_states(config, 64), 0)
    assert sorted(objects.glob("*.so")) == before


def test_what_does_not_fit_is_refused() -> None:
    config = GEOMETRIES["head of 24"]
    weights, _ = make_block("float16", config)
    run = Run(CpuOperators(config), weights, config, 8)
    with pytest.raises(ValueError, match="4 pages of 64 positions do not fit a cache of 64 positions"):
        run.pass_over(random_states(config, 1), places_of([0], [0], [[3]]))
    with pytest.raises(ValueError, match="position 512 a model of 512"):
        run.pass_over(random_states(config, 1), places_of([0], [512], [[0] * 9]))
    for slots, positions, whole in (
        ([0], [64], 0),
        ([1], [0], 0),
        ([0], [-1], 0),
        ([], [], 0),
        ([0, 0], [1], 0),
    ):
        with pytest.raises(ValueError, match="token"):
            places_of(slots, positions, [[0]], whole)
    for slots, start, whole in (
        ([0] * 64, 0, 1),
        ([0] * 64, 1, 64),
        ([0] * 63 + [1], 0, 64),
        ([0] * 63, 0, 64),
    ):
        with pytest.raises(ValueError, match="whole pages"):
            places_of(slots, start + np.arange(len(slots)), [[0, 1], [0, 1]], whole)
    with pytest.raises(ValueError, match=r"h has shape \(3, 95\); \(3, 96\) is needed"):
        run.step(random_states(config, 3)[:, :95], 0)
    mixed = BlockWeights(**(vars(weights) | {"out": make_block("int8", config)[0].out}))
    run.weights = mixed
    with pytest.raises(ValueError, match=r"one block has matrices of \[8, 16\] bits"):
        run.step(random_states(config, 1), 0)
    run.weights = BlockWeights(**(vars(weights) | {"out": weights.qkv}))
    with pytest.raises(ValueError, match=r"out has shape \(288, 96\); \(96, 96\) is needed"):
        run.step(random_states(config, 1), 0)


def test_simd_width_is_chosen_by_the_machine_or_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSS_JT_SIMD", raising=False)
    assert chosen_simd() == SIMD[0]
    monkeypatch.setenv("MOSS_JT_SIMD", "0")
    assert CpuOperators(ODD).simd == "0"
    monkeypatch.setenv("MOSS_JT_SIMD", "sse")
    with pytest.raises(MossError, match="MOSS_JT_SIMD is 'sse'; this machine can run"):
        chosen_simd()


def together(
    operators: Any,
    weights: BlockWeights,
    config: MossConfig,
    texts: list[np.ndarray],
    cache_bits: int = 16,
) -> None:
    """Several texts of states in common passes give each what it has alone: results and cache, bit for bit.

    Each text is read as whole pages and then token by token; in common passes one text's answer meets another's prompt.
    """
    count, capacity = len(texts), max(map(len, texts))
    alone, common = (Run(operators, weights, config, capacity, count, cache_bits) for _ in range(2))
    # Pieces of each text: (start, end), whole pages first.
    plans = []
    for text in texts:
        whole = (len(text) - 1) // PAGE * PAGE
        ends = [*range(PAGE, whole + 1, PAGE), *range(whole + 3, len(text), 3), len(text)]
        plans.append(list(itertools.pairwise([0, *ends])))
    expected = [
        np.concatenate([alone.step(text[a:b], a, slot) for a, b in plan])
        for slot, (text, plan) in enumerate(zip(texts, plans, strict=True))
    ]
    actual: list[list[np.ndarray]] = [[] for _ in texts]
    while any(plans):
        now = [(slot, *plan.pop(0)) for slot, plan in enumerate(plans) if plan]
        now.sort(key=lambda piece: piece[2] - piece[1] < PAGE)
        slots = np.concatenate([[slot] * (b - a) for slot, a, b in now])
        positions = np.concatenate([np.arange(a, b) for _, a, b in now])
        whole = sum(b - a for _, a, b in now if b - a == PAGE)
        states = np.concatenate([texts[slot][a:b] for slot, a, b in now])
        rows = common.pass_over(states, places_of(slots, positions, common.pages, whole))
        for slot, _, _ in now:
            actual[slot].append(rows[slots == slot])
    for slot, wanted in enumerate(expected):
        assert np.array_equal(np.concatenate(actual[slot]), wanted), f"text {slot}"
        for ours, own in zip(common.cache(slot), alone.cache(slot), strict=True):
            assert np.array_equal(ours, own), f"cache of text {slot}"


@pytest.mark.parametrize(("kind", "simd"), LEVELS)
@pytest.mark.parametrize("count", (2, 5, 16))
def test_a_sequence_does_not_depend_on_the_others_in_its_passes(kind: str, simd: str, count: int) -> None:
    config = geometry(320, 4, 32, n_inner=640)
    weights, _ = make_block(kind, config, 64, ordered=count == 5)
    lengths = np.random.default_rng(count).integers(1, 215, count)
    texts = [random_states(config, int(length), seed) for seed, length in enumerate(lengths)]
    together(CpuOperators(config, simd), weights, config, texts)


@pytest.mark.parametrize("simd", CACHE_SIMD)
def test_a_sequence_in_a_cache_of_bytes_does_not_depend_on_the_others(simd: str) -> None:
    config = geometry(320, 4, 32, n_inner=640)
    weights, _ = make_block("float16", config)
    lengths = np.random.default_rng(5).integers(1, 215, 5)
    texts = [random_states(config, int(length), seed) for seed, length in enumerate(lengths)]
    together(CpuOperators(config, simd), weights, config, texts, cache_bits=8)


def test_portable_sequences_share_a_pass() -> None:
    config = GEOMETRIES["head of 24"]
    weights, oracle = make_block("float16", config)
    run = Run(PortableOperators(config), weights, config, 70, sequences=3)
    run.step(random_states(config, 66), 0, 1)
    rows = random_states(config, 4, 5)
    actual = run.pass_over(rows, places_of([1, 1, 2, 0], [66, 67, 0, 0], run.pages))
    for slot, first, end, start in ((1, 0, 2, 66), (2, 2, 3, 0), (0, 3, 4, 0)):
        expected = block_oracle.block_over_cache(rows[first:end], oracle, *run.cache(slot), start)
        assert_close(actual[first:end], expected, f"slot {slot}")


@pytest.mark.parametrize("wanted", [False, True])
def test_others_run_python_while_an_operation_computes_where_that_is_wanted(wanted: bool) -> None:
    config = GEOMETRIES["head of 24"]
    operators = CpuOperators(config)
    if wanted:
        let_others_run(operators)
    run = Run(operators, make_block("float16", config)[0], config, 128)
    states = random_states(config, 64)
    expected = run.step(states, 0)
    turns: list[int] = []
    ended = threading.Event()

    def other() -> None:
        while not ended.is_set():
            turns.append(0)
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to let go
    thread = threading.Thread(target=other)
    thread.start()
    try:
        places = places_of([0] * 64, np.arange(64), run.pages, 64)
        blocks = [
            operators.block(jt.array(states), run.weights, run.keys, run.values, 1, places) for _ in range(50)
        ]
        before = len(turns)
        jt.sync(blocks)
        after = len(turns)
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    assert (after > before) == wanted
    assert all(np.array_equal(block.numpy(), expected) for block in blocks)


class Group:
    """Three different blocks, of int4 one without act-order, and a cache of four layers, of which they are the last three."""

    def __init__(self, kind: str, config: MossConfig, cache_bits: int) -> None:
        if kind == "float16":
            self.blocks = [dense_block(BlockArrays.random(config, seed)) for seed in range(3)]
        else:
            bits = 8 if kind == "int8" else 4
            self.blocks = [
                packed_block(config, bits, 32, seed, bits == 4 and seed > 0)[0] for seed in range(3)
            ]
        cache = KVCache(replace(config, n_layer=4), 2 * PAGE, bits=cache_bits)
        self.keys, self.values = cache.keys, cache.values

    def cached(self) -> list[np.ndarray]:
        parts = [self.keys, self.values]
        if isinstance(self.keys, ByteRows):
            parts = [part for rows in parts for part in (rows.numbers, rows.scales)]
        return [part.numpy() for part in parts]


@pytest.mark.parametrize(
    ("kind", "cache_bits"), [("float16", 16), ("float16", 8), ("int8", 16), ("int4", 16)]
)
def test_blocks_at_once_are_the_same_bits_as_one_after_another(kind: str, cache_bits: int) -> None:
    config = GEOMETRIES["head of 24"]
    operators = CpuOperators(config)
    single, group = (Group(kind, config, cache_bits) for _ in range(2))
    start = 0
    for tokens in (5, 1, 23):
        states = random_states(config, tokens, start)
        h, places = jt.array(states), one_sequence(start, tokens)
        for layer, weights in enumerate(single.blocks, 1):
            h = operators.block(h, weights, single.keys, single.values, layer, places)
        first = jt.array(states)
        actual = operators.blocks(
            first, group.blocks, group.keys, group.values, 1, one_sequence(start, tokens)
        )
        assert np.array_equal(actual.numpy(), h.numpy())
        assert np.array_equal(first.numpy(), states)  # the result lies elsewhere
        start += tokens
    for ours, expected in zip(group.cached(), single.cached(), strict=True):
        assert np.array_equal(ours, expected)
        assert not ours[0].any()


def test_blocks_that_begin_alike_are_not_taken_for_each_other() -> None:
    config = GEOMETRIES["head of 24"]
    operators = CpuOperators(config)
    group = Group("float16", config, 16)
    states = random_states(config, 2)
    results = []
    for count in (3, 2, 3):
        h = operators.blocks(
            jt.array(states), group.blocks[:count], group.keys, group.values, 1, one_sequence(0, 2)
        )
        results.append(h.numpy())
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_what_is_queued_keeps_its_weights() -> None:
    config = GEOMETRIES["24 heads"]
    operators = CpuOperators(config)
    states = jt.array(random_states(config, 2))
    run = Run(operators, make_block("float16", config)[0], config, 2)
    expected = run.step(states.numpy(), 0)
    weights = dense_block(BlockArrays.random(config, seed=1))
    queued = operators.block(states, weights, run.keys, run.values, 1, one_sequence(0, 2))
    there = weakref.ref(weights)
    del weights
    gc.collect()
    assert there() is None
    other = [dense_block(BlockArrays.random(config, seed=seed)) for seed in (2, 3)]
    assert np.array_equal(queued.numpy(), expected)
    del other


def test_blocks_of_different_kinds_and_layers_that_are_not_there_are_refused() -> None:
    config = GEOMETRIES["head of 24"]
    operators = CpuOperators(config)
    group = Group("float16", config, 16)
    h, places = jt.array(random_states(config, 1)), one_sequence(0, 1)
    with pytest.raises(ValueError, match="layer 4 of a cache of 4"):
        operators.blocks(h, group.blocks, group.keys, group.values, 2, places)
    mixed = [group.blocks[0], make_block("int8", config)[0]]
    with pytest.raises(ValueError, match=r"matrices of \[8, 16\] bits"):
        operators.blocks(h, mixed, group.keys, group.values, 0, places)
    with pytest.raises(ValueError, match="3 blocks at once; of weights that move"):
        CpuOperators(config, weights_move=True).blocks(h, group.blocks, group.keys, group.values, 0, places)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_weights_that_jittor_moves_are_read_where_they_are(kind: str) -> None:
    config = GEOMETRIES["head of 24"]
    weights, _ = make_block(kind, config, ordered=kind == "int4")
    states = random_states(config, 3)
    results = [
        Run(CpuOperators(config, weights_move=moved), weights, config, 3).step(states, 0)
        for moved in (False, True)
    ]
    assert np.array_equal(*results)
