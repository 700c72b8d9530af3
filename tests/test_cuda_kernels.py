"""CUDA kernels on the CPU, from their own source, launched by their own launch code: against NumPy, and against planted faults."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moss_jt.kernels.adapters import TARGETS
from moss_jt.kernels.cuda.cublas import rows_that_fill
from moss_jt.kernels.cuda.launchers import (
    ENOUGH_BLOCKS,
    KINDS,
    LEAST_CHUNKS,
    Launchers,
    Product,
    TokenAdapters,
    folder,
)
from moss_jt.kernels.cuda.training_launchers import CardMatrix, TrainingLaunchers
from moss_jt.kernels.interface import PAGE, ByteRows, CacheRows
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.quant import PackedArrays, dequantize, dequantize_float16, pack
from tests.emulation.emulator import (
    DeviceArray,
    EmulationError,
    FakeCublas,
    FakeCupy,
    RawModule,
    aligned,
    matrix_at,
)
from tests.support import cuda_reference
from tests.support.cuda_products import dense, packed

# Sums of K products in float32, in another order than NumPy's: the error grows with the root of K.
FLOAT32_STEP = 2.0**-23

PLACES = aligned(np.zeros((1, 2), np.int32))  # one token, at position 0; as pages: its one page is the first


def in_order(start: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and pages of tokens of the one sequence whose pages are 0, 1, 2, ..."""
    end = start + tokens
    places = np.stack([np.zeros(tokens, np.int32), np.arange(start, end, dtype=np.int32)], axis=1)
    return aligned(places), aligned(np.arange(-(-end // PAGE), dtype=np.int32)[None])


class Planted(FakeCupy):
    """Compiles the kernels with a fault; of attention's those for one kind of cache, or compiling would take twice as long."""

    def __init__(self, old: str, new: str, bits: int = 16) -> None:
        self.old, self.new = old, new
        self.other = "KERNELS(, __half)\n" if bits == 8 else "KERNELS(_int8, signed char)\n"

    def RawModule(self, code: str, options: Any) -> RawModule:  # type: ignore[override]  # noqa: N802
        assert self.old in code
        return RawModule(code.replace(self.old, self.new).replace(self.other, ""), options)


@cache
def kernels() -> Launchers:
    return Launchers(FakeCupy())


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return aligned(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(scale))


def half(shape: tuple[int, ...], seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return aligned(normal(shape, seed, scale).astype(np.float16))


def in_bytes(shape: tuple[int, ...], seed: int = 0, scale: float = 0.1) -> ByteRows:
    """Keys or values of whole pages in int8, each head's vector of another size."""
    rows = normal(shape, seed, scale) * np.random.default_rng(seed + 9).uniform(0.2, 3, (*shape[:2], 1))
    numbers, scales = cuda_reference.quantized(rows)
    return ByteRows(aligned(numbers), aligned(scales.reshape(-1, PAGE, shape[1]).transpose(0, 2, 1)))


def cached(bits: int, shape: tuple[int, ...], seed: int = 0, scale: float = 0.1) -> CacheRows:
    """One layer's keys or values, in numbers of so many bits."""
    return half(shape, seed, scale) if bits == 16 else in_bytes(shape, seed, scale)


def spoil(rows: CacheRows, positions: slice) -> None:
    """What nobody may see there is no number."""
    if not isinstance(rows, ByteRows):
        rows[positions] = np.nan
        return
    begin, end, _ = positions.indices(len(rows.numbers))
    for page in range(begin // PAGE, -(-end // PAGE)):
        rows.scales[page, :, max(0, begin - page * PAGE) : end - page * PAGE] = np.nan


def packed_matrix(rows: int, columns: int, bits: int, group_size: int, seed: int = 0) -> PackedArrays:
    """Every field value and every zero point occurs."""
    draw = np.random.default_rng(seed)
    groups = columns // group_size
    fields = draw.permutation(np.arange(rows * columns) % 2**bits).reshape(rows, columns).astype(np.uint8)
    zeros = (draw.permutation(rows * groups) % 2**bits).reshape(rows, groups).astype(np.uint8)
    scales = draw.uniform(0.001, 0.05, (rows, groups)).astype(np.float16)
    return PackedArrays(aligned(pack(fields, bits)), aligned(scales), aligned(zeros), bits, group_size)


def assert_sums_agree(ours: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """Within float32's rounding of K products: 4 * sqrt(K) steps of the sum of the products' sizes over sqrt(K)."""
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    bound = 4 * FLOAT32_STEP * np.sqrt(x.shape[1]) * size + 1e-12
    assert ours.dtype == np.float32
    worst = np.max(np.abs(ours - exact) / bound)
    assert worst <= 1, f"{worst} times the bound"


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 24, 64), (2, 8, 264), (5, 33, 512), (16, 40, 1032), (1, 300, 2048)]
)
def test_dense_product(tokens: int, outputs: int, inputs: int) -> None:
    x, weight = normal((tokens, inputs)), half((outputs, inputs), 1)
    assert_sums_agree(dense(kernels(), x, weight), x, weight)
    np.testing.assert_allclose(
        cuda_reference.dense(x, weight), dense(kernels(), x, weight), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group"),
    [(1, 24, 64, 32), (3, 9, 384, 192), (16, 16, 1056, 32), (1, 40, 4096, 128)],
)
def test_packed_product(bits: int, tokens: int, outputs: int, inputs: int, group: int) -> None:
    x, matrix = normal((tokens, inputs)), packed_matrix(outputs, inputs, bits, group)
    ours = packed(kernels(), x, matrix.packed, matrix.scales, matrix.zeros, bits)
    assert_sums_agree(ours, x, dequantize(matrix))
    np.testing.assert_allclose(
        cuda_reference.packed(x, matrix.packed, matrix.scales, matrix.zeros, bits), ours, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weights_are_the_reference_s_exactly(bits: int) -> None:
    matrix = packed_matrix(256, 96, bits, 32)
    assert set(np.unique(matrix.zeros)) == set(range(2**bits))
    np.testing.assert_array_equal(
        kernels().dequantize(matrix.packed, matrix.scales, matrix.zeros, bits), dequantize_float16(matrix)
    )


class OtherSums(FakeCublas):
    """cuBLAS that adds K in another number of parts by the number of rows and by the page among them, as a card's may."""

    def __init__(self, parts_of: Callable[[int, int], int]) -> None:
        self.parts_of = parts_of
        self.rows: list[int] = []

    def gemmEx(self, *arguments: Any) -> None:  # type: ignore[override]  # noqa: N802
        (outputs, rows, inputs), weight, x, out = arguments[3:6], arguments[7], arguments[10], arguments[14]
        self.rows.append(rows)
        w, x = (matrix_at(at, np.float16, inputs, n, inputs).T for at, n in ((weight, outputs), (x, rows)))
        result = matrix_at(out, np.float32, outputs, rows, outputs).T
        for first in range(0, rows, PAGE):
            some, parts = slice(first, first + PAGE), self.parts_of(rows, first // PAGE)
            ends = np.linspace(0, inputs, parts + 1).astype(int)
            with np.errstate(invalid="ignore"):  # rows of nothing
                result[some] = sum(
                    (x[some, a:b].astype(np.float64) @ w[:, a:b].astype(np.float64).T).astype(np.float32)
                    for a, b in itertools.pairwise(ends)
                )


# On a card of two multiprocessors 256 rows of a product of 24 outputs are the reference.
WAYS = {
    "all alike": (lambda rows, page: 1, [448], [64]),
    "few rows are split": (lambda rows, page: 2 if rows < 256 else 1, [448], [256]),
    "many rows are split": (lambda rows, page: 2 if rows > 256 else 1, [256, 192], [64]),
    "each number has its own": (lambda rows, page: rows // PAGE, [256, 256], [256]),
    "it depends on the page": (lambda rows, page: 1 + page, [64] * 7, [64]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [16, 4])
def test_pages_share_a_product_where_that_changes_none_of_their_bits(way: str, bits: int) -> None:
    parts_of, of_seven, of_one = WAYS[way]
    cublas = OtherSums(parts_of)
    cupy = type("Cupy", (FakeCupy,), {"cuda": SimpleNamespace(**{**vars(FakeCupy.cuda), "cublas": cublas})})
    run = Launchers(cupy())
    x, wide, matrix = normal((7 * PAGE, 64)), half((24, 64)), packed_matrix(24, 64, 4, 32)

    def product(some: np.ndarray) -> np.ndarray:
        if bits == 16:
            return dense(run, aligned(some), wide, whole=True)
        return packed(run, aligned(some), matrix.packed, matrix.scales, matrix.zeros, bits, whole=True)

    product(x[:PAGE])  # what is alike has been tried now
    cublas.rows.clear()
    together = product(x)
    assert cublas.rows == of_seven
    for first in range(0, 7 * PAGE, PAGE):
        cublas.rows.clear()
        np.testing.assert_array_equal(together[first : first + PAGE], product(x[first : first + PAGE]))
        assert cublas.rows == of_one
    np.testing.assert_array_equal(together[PAGE : 4 * PAGE], product(x[PAGE : 4 * PAGE]))
    weight = wide if bits == 16 else dequantize(matrix)
    np.testing.assert_allclose(together, x @ weight.astype(np.float32).T, rtol=0, atol=2e-2)


def test_results_of_whole_pages_may_be_larger_than_float16() -> None:
    large, weight = normal((PAGE, 64), scale=400), half((24, 64), scale=400)
    assert np.abs(dense(kernels(), large, weight, whole=True)).max() > 65504


@pytest.mark.parametrize(
    ("processors", "outputs", "rows"), [(132, 6144, 512), (82, 6144, 256), (28, 6144, 128), (132, 128, 512)]
)
def test_the_reference_is_of_as_many_rows_as_fill_the_card(processors: int, outputs: int, rows: int) -> None:
    assert rows_that_fill(processors, outputs) == rows


def product_with(run: Launchers, bits: int, outputs: int, inputs: int) -> Callable[[np.ndarray], np.ndarray]:
    """Multiplies activations by one random matrix."""
    if bits == 16:
        weight = half((outputs, inputs))
        return lambda x: dense(run, aligned(x), weight)
    matrix = packed_matrix(outputs, inputs, bits, 32)
    return lambda x: packed(run, aligned(x), matrix.packed, matrix.scales, matrix.zeros, bits)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_token_gets_the_same_bits_in_every_short_pass(bits: int) -> None:
    """Drafts and other conversations share a token's pass, and must not change what it gives."""
    inputs = 2080
    assert KINDS[bits].split(20, inputs)[0] > 1, "K is to be split here"
    x, product = normal((40, inputs)), product_with(kernels(), bits, 20, inputs)
    alone = np.concatenate([product(x[i : i + 1]) for i in range(40)])
    for tokens in (*range(2, 24), 40):
        np.testing.assert_array_equal(product(x[:tokens]), alone[:tokens], f"{tokens} tokens")


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("outputs", [1, 3, 7, 37])
def test_matrices_whose_rows_fill_no_warp(bits: int, outputs: int) -> None:
    """Fewer rows than a warp takes at once, and some that are left over; the last warps go back, and nothing is left out."""
    product = product_with(kernels(), bits, outputs, 96)
    x = normal((2, 96))
    np.testing.assert_array_equal(product(x)[:1], product(x[:1]))
    weight = np.concatenate([product(row) for row in np.eye(96, dtype=np.float32)[:, None, :]]).T
    assert_sums_agree(product(x), x, weight)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_two_products_in_one_launch_are_what_each_is_alone(bits: int) -> None:
    def drawn(outputs: int, inputs: int, seed: int) -> Product:
        x = normal((2, inputs), seed)
        if bits == 16:
            return Product(x, half((outputs, inputs), seed))
        matrix = packed_matrix(outputs, inputs, bits, 32, seed)
        return Product(x, matrix.packed, bits, matrix.scales, matrix.zeros)

    run = kernels()
    first, second = drawn(40, 2048, 1), drawn(24, 1024, 2)
    for pair in ((first, second), (second, replace(second, weight=second.weight[::-1].copy()))):
        for together, one in zip(run.products(pair), pair, strict=True):
            np.testing.assert_array_equal(together, run.products([one])[0])
    wide, narrow = drawn(24, 2048, 3), drawn(24, 1024, 4)
    added = run.sum_of_products([wide, narrow])
    parts = [run.products([one])[0] for one in (wide, narrow)]
    np.testing.assert_array_equal(added, np.concatenate(parts))
    many = [replace(one, x=normal((PAGE, one.inputs), 5)) for one in (wide, narrow)]
    assert run.sum_of_products(many, whole=True).shape == (2, PAGE, 24)


@pytest.mark.parametrize("bits", [8, 4])
def test_act_order_and_the_first_pascal_give_the_same_bits(bits: int) -> None:
    """Columns in an order of their own; and compute capability 6.0, without dot products of bytes: the same integers."""

    class FirstPascal(FakeCupy):
        @staticmethod
        def RawModule(code: str, options: Any) -> RawModule:  # noqa: N802
            return RawModule(code, (*options, "-DMOSS_NO_DP4A"))

    matrix = packed_matrix(24, 1056, bits, 32)
    order = aligned(np.random.default_rng(2).permutation(1056).astype(np.int32))
    x = normal((5, 1056))
    ordered = Product(x, matrix.packed, bits, matrix.scales, matrix.zeros, order)
    gathered = replace(ordered, x=aligned(x[:, order]), order=None)
    expected = kernels().products([gathered])[0]
    np.testing.assert_array_equal(kernels().products([ordered])[0], expected)
    np.testing.assert_array_equal(Launchers(FirstPascal()).products([ordered])[0], expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_digits_hold_any_number(bits: int) -> None:
    """Spans of nothing, of the smallest and of the largest numbers; what is no number stays none, in its token."""
    matrix = packed_matrix(8, 256, bits, 64)
    x = normal((6, 256))
    x[0] = 0
    x[1, :64], x[1, 64:128] = 1e-42, 1e30
    x[2] *= np.float32(1e-36)
    x[3, ::16] *= np.float32(1e6)
    x[4, 100] = np.inf
    x[5, 200] = np.nan
    ours = packed(kernels(), aligned(x), matrix.packed, matrix.scales, matrix.zeros, bits)
    assert not ours[0].any()
    assert_sums_agree(ours[1:4], x[1:4], dequantize(matrix))
    assert np.isnan(ours[4:]).all()


def test_shared_memory_is_visited_once_for_each_access() -> None:
    """From the addresses that the kernels use: no two lanes of an access meet in a bank. A planted fault is seen."""
    run = Launchers(FakeCupy())
    for bits in KINDS:
        product = product_with(run, bits, 40, 1120)
        for tokens in (1, 3, 7, 16):
            product(normal((tokens, 1120)))
    keys = half((200, 2, 256))
    run.attention(normal((2, 512)), keys, keys, *in_order(150, 2))
    run.attention(normal((2, 48)), half((80, 2, 24)), half((80, 2, 24)), *in_order(70, 2))
    for dim, bits in ((256, 8), (48, 8), (24, 16), (256, 16)):
        q, rows, _, places, pages = whole_pages(1, dim, bits=bits)
        one_page = aligned(q[PAGE : 2 * PAGE]), rows, rows, aligned(places[PAGE : 2 * PAGE]), pages
        run.attention(*one_page, whole=True)
        if bits == 8:
            in_one = aligned(q[:1]), rows, rows, PLACES, pages[:1, 1:]
            run.attention(*in_one)
            run.rotary_cache(normal((1, 3 * dim)), rotary_table(8, 16), rows, rows, PLACES, pages)
    run.layer_norm(normal((1, 6144)), half((6144,)), half((6144,)), 1e-5)
    conflicts = {}
    add_adapters(run, normal((1, 1024)), normal((1, 40)), [0])
    for name in ("linear.cu", "attention.cu", "elementwise.cu", "adapters.cu"):
        conflicts |= run.module(name).conflicts
    conflicts |= conflicts_of_training()
    with_shared = {kernel: worst for kernel, worst in conflicts.items() if worst}
    names = "products, attentions and what combines them, the cache in int8, layer norm, adapters; five of training"
    assert len(with_shared) == 8 + 3 + 3 + 2 + 5, names
    assert set(with_shared.values()) == {1}, with_shared
    planted = Launchers(Planted("kDenseHalf = kWarp + 4", "kDenseHalf = kWarp"))
    dense(planted, normal((1, 512)), half((8, 512)))
    assert planted.module("linear.cu").conflicts == {"dense_1": 2}
    planted = Launchers(Planted("kKeyRow = kKeyVectors + 1", "kKeyRow = kKeyVectors"))
    planted.attention(*one_page, whole=True)
    assert planted.module("attention.cu").conflicts["attention_of_pages"] > 1
    planted = Launchers(Planted("const int begin = to / 8 % 2;", "const int begin = 0;", 8))
    planted.attention(one_page[0], *[in_bytes((7 * PAGE, 1, 256))] * 2, *one_page[3:], whole=True)
    assert planted.module("attention.cu").conflicts["attention_of_pages_int8"] > 1
    planted = Launchers(Planted("kDims * kLane + kWarp / 2", "kDims * kLane + 2", 8))
    planted.attention(*in_one)
    assert planted.module("attention.cu").conflicts["attention_int8"] > 1


def conflicts_of_training() -> dict[str, int]:
    """Of the kernels of training whose threads share memory, over rows longer than a block."""
    run = TrainingLaunchers(FakeCupy())
    x, out = normal((2, 600)), aligned(np.zeros((2, 600), np.float32))
    run.norm_back(x, x, half((600,)), 1e-5, out, aligned(np.zeros((2, 600), np.float32)))
    run.product(x, CardMatrix(half((8, 600))), aligned(np.zeros((2, 8), np.float32)).view(DeviceArray))
    run.logit_summary(x, half((600,)), np.array([3, -1]), aligned(np.zeros((2, 4), np.float32)))
    spans = np.array([[0, 300]], np.int32)
    qkv, back = (aligned(np.zeros((300, 24), np.float32)).view(DeviceArray) for _ in range(2))
    g = normal((300, 8)).view(DeviceArray)
    run.attention_back(g, qkv, aligned(rotary_table(300, 4)), spans, 1, back)
    return dict(run.kernels.module("training.cu").conflicts)


def test_a_row_s_largest_without_a_barrier_is_seen() -> None:
    barrier = "    __syncthreads();\n    return warp_max(threadIdx.x % kWarp < kRowWarps"
    run = TrainingLaunchers(Planted(barrier, barrier.replace("    __syncthreads();\n", "")))
    with pytest.raises(EmulationError, match="race|before it is written"):
        run.logit_summary(
            normal((1, 600)), half((600,)), np.array([3]), aligned(np.zeros((1, 4), np.float32))
        )


def bank_of(widths: tuple[int, int], ranks: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Adapters of these ranks, 0 for none, for out and fc_out, each of so many inputs and outputs: bank, directory, pairs."""
    directory = np.zeros((len(ranks), 4, 3), np.int32)
    parts: list[np.ndarray] = [np.full(16, np.nan, np.float32)]
    pairs, draw = [], np.random.default_rng(8)
    for number, rank in enumerate(ranks):
        pairs.append([])
        for target, width in zip(("out", "fc_out"), widths, strict=True):
            a, b = (draw.standard_normal((rank, width)).astype(np.float32) for _ in range(2))
            pairs[-1].append((a, b))
            if rank:
                begins = []
                for matrix in (a, b):
                    begins.append(sum(map(len, parts)) // 16)
                    parts.append(np.append(matrix, np.full(-matrix.size % 16, np.nan, np.float32)))
                directory[number, TARGETS.index(target)] = *begins, rank
    return aligned(np.concatenate(parts)), aligned(directory), pairs


def add_adapters(
    run: Launchers, x: np.ndarray, x_2: np.ndarray, of_token: list[int], before: float = 0.0
) -> list[np.ndarray]:
    """Two products of three and two parts, full of ``before``, to which adapters of ranks 3, 0 and 5 have added."""
    bank, directory, _ = bank_of((x.shape[1], x_2.shape[1]), (3, 0, 5))
    adapters = TokenAdapters(bank, directory, aligned(np.array(of_token, np.int32)), 5)
    results = [aligned(np.full((parts, *one.shape), before, np.float32)) for parts, one in ((3, x), (2, x_2))]
    run.add_adapters(adapters, ("out", x, results[0]), ("fc_out", x_2, results[1]))
    return results


def test_adapters_add_their_products_to_one_part() -> None:
    """Tokens of several adapters, of one that has nothing, and of none; alone a token gets the same bits."""
    of_token = [2, -1, 0, 1, 2]
    inputs = normal((5, 1036), 1), normal((5, 44), 2)
    _, _, pairs = bank_of((1036, 44), (3, 0, 5))
    results = add_adapters(kernels(), *inputs, of_token, 2.0)
    for index, (x, actual) in enumerate(zip(inputs, results, strict=True)):
        assert (actual[1:] == 2).all()
        for token, number in enumerate(of_token):
            a, b = pairs[number][index] if number >= 0 else (np.zeros((0, x.shape[1])),) * 2
            expected = 2 + a.astype(np.float64) @ x[token] @ b
            bound = 4 * FLOAT32_STEP * np.sqrt(x.shape[1]) * (np.abs(a) @ np.abs(x[token]) @ np.abs(b) + 2)
            assert (np.abs(actual[0, token] - expected) <= bound).all(), (index, token)
            assert (number in (-1, 1)) == bool((actual[0, token] == 2).all())
    for token in range(5):
        rows = [aligned(x[token : token + 1]) for x in inputs]
        alone = add_adapters(kernels(), *rows, [of_token[token]], 2.0)
        for one, together in zip(alone, results, strict=True):
            np.testing.assert_array_equal(one[0, 0], together[0, token])


def test_gathered_inputs() -> None:
    x, order = normal((3, 40)), aligned(np.random.default_rng(2).permutation(40).astype(np.int32))
    np.testing.assert_array_equal(kernels().gather_inputs(x, order), x[:, order])


def test_split_of_k_covers_everything_and_fills_the_card() -> None:
    for kind in KINDS.values():
        for outputs in (1, 24, 300, 6144, 43008):
            for inputs in (64, 1024, 6144, 24576):
                parts, each = kind.split(outputs, inputs)
                assert (parts - 1) * each < inputs <= parts * each and each % kind.chunk == 0
                blocks = parts * -(-outputs // (4 * max(kind.rows.values())))
                least = LEAST_CHUNKS * kind.chunk
                assert blocks >= ENOUGH_BLOCKS // 2 or each == least, (kind.name, outputs, inputs)


def _include() -> tuple[str, ...]:
    return (f"-I{folder()}",)


@pytest.mark.parametrize(
    ("bits", "tokens", "heads", "dim", "rotary_dim", "start"),
    [
        (16, 1, 2, 16, 8, 0),
        (16, 3, 4, 24, 16, 62),
        (16, 1, 1, 256, 64, 130),
        (16, 5, 2, 64, 64, 0),
        (8, 1, 2, 16, 8, 0),
        (8, 3, 3, 80, 16, 62),
        (8, 1, 1, 256, 64, 130),
    ],
)
def test_rotary_cache_and_attention(
    bits: int, tokens: int, heads: int, dim: int, rotary_dim: int, start: int
) -> None:
    """The last token is another sequence's, and the pages lie in disorder."""
    positions, width = 6 * PAGE, heads * dim
    rotary = aligned(rotary_table(3 * PAGE, rotary_dim))
    places = aligned(np.array([[1, start + t] for t in range(tokens - 1)] + [[0, start]], np.int32))
    pages = aligned(np.array([[4, 0, 2], [1, 5, 3]], np.int32))
    keys, values = (cached(bits, (positions, heads, dim), seed) for seed in (3, 4))
    exact_keys, exact_values = (cuda_reference.meant(rows).astype(np.float32) for rows in (keys, values))
    qkv = normal((tokens, 3 * width), 5)
    q = kernels().rotary_cache(qkv, rotary, keys, values, places, pages)
    expected_q = cuda_reference.rotary_cache(qkv, rotary, exact_keys, exact_values, places, pages)
    # A product and a sum may be one rounding or two; what is rounded in the cache may then be its neighbour.
    np.testing.assert_allclose(q, expected_q, rtol=1e-6, atol=1e-6)
    if bits == 16:
        expected_keys, expected_values = exact_keys.astype(np.float16), exact_values.astype(np.float16)
        np.testing.assert_allclose(
            keys.astype(np.float32), expected_keys.astype(np.float32), rtol=2**-10, atol=1e-6
        )
        np.testing.assert_array_equal(values, expected_values)
    else:
        for rows, exact, off in ((keys, exact_keys, 1), (values, exact_values, 0)):
            numbers, scales = cuda_reference.quantized(exact)
            assert np.abs(rows.numbers.astype(int) - numbers).max() <= off
            by_page = scales.reshape(-1, PAGE, heads).transpose(0, 2, 1)
            np.testing.assert_allclose(rows.scales, by_page, rtol=1e-6 * off, atol=0)
    ours = kernels().attention(q, keys, values, places, pages)
    expected = cuda_reference.attention(q, keys, values, places, pages)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    alone = kernels().attention(aligned(q[-1:]), keys, values, aligned(places[-1:]), pages)
    np.testing.assert_array_equal(ours[-1:], alone)


def test_the_cache_saturates() -> None:
    """As on the CPU: an infinity in the cache would make every later token NaN."""
    qkv = normal((2, 3 * 32), 1, 1e6)
    rotary = aligned(rotary_table(8, 16))
    keys, values = half((8, 2, 16)), half((8, 2, 16))
    expected = keys.copy(), values.copy()
    kernels().rotary_cache(qkv, rotary, keys, values, *in_order(3, 2))
    cuda_reference.rotary_cache(qkv, rotary, *expected, *in_order(3, 2))
    assert np.abs(keys).max() == np.abs(values).max() == 65504
    np.testing.assert_array_equal(values, expected[1])


def test_the_cache_of_bytes_bears_nothing_and_too_much() -> None:
    """Vectors of zeros, of numbers without a reciprocal, and of those beyond float16: as on the CPU."""
    qkv = normal((3, 3 * 32), 1)
    qkv[0], qkv[1] = 0, qkv[1] * np.float32(1e-33)
    qkv[2, 32:] *= np.float32(1e6)
    keys, values = in_bytes((PAGE, 2, 16)), in_bytes((PAGE, 2, 16))
    before = values.numbers.copy()
    kernels().rotary_cache(qkv, aligned(rotary_table(8, 16)), keys, values, *in_order(3, 3))
    for rows in (keys, values):
        assert not rows.numbers[3:5].any() and not rows.scales[0, :, 3:5].any()
        assert np.abs(rows.numbers[5].astype(int)).max() == 127
        np.testing.assert_array_equal(rows.scales[0, :, 5], np.float32(65504) / np.float32(127))
    numbers, _ = cuda_reference.quantized(qkv[2, 64:].reshape(2, 16))
    np.testing.assert_array_equal(values.numbers[5], numbers)
    np.testing.assert_array_equal(values.numbers[6:], before[6:])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("start", "bits"), [(0, 16), (62, 16), (63, 16), (64, 16), (190, 16), (0, 8), (62, 8), (190, 8)]
)
def test_attention_over_pages(tokens: int, start: int, bits: int) -> None:
    """One page and more, passes that end within a page, at its end and behind it; what nobody sees is no number."""
    keys, values = (cached(bits, (4 * PAGE, 2, 32), seed) for seed in (1, 2))
    for rows in (keys, values):
        spoil(rows, slice(start + tokens, None))
    q = normal((tokens, 64), 3)
    places = in_order(start, tokens)
    ours = kernels().attention(q, keys, values, *places)
    expected = cuda_reference.attention(q, keys, values, *places)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    for t in range(tokens):
        alone = kernels().attention(aligned(q[t : t + 1]), keys, values, *in_order(start + t, 1))
        np.testing.assert_array_equal(alone[0], ours[t])


def whole_pages(
    heads: int, dim: int, scale: float = 1.0, bits: int = 16
) -> tuple[np.ndarray, CacheRows, CacheRows, np.ndarray, np.ndarray]:
    """Queries, keys, values, places and pages of three whole pages: the third of one sequence, then another's first two. What no
    token of them may see is no number.
    """
    pages = aligned(np.array([[6, 1, 4, 0], [3, 5, 0, 0]], np.int32))
    keys, values = cached(bits, (7 * PAGE, heads, dim), 1, scale), cached(bits, (7 * PAGE, heads, dim), 2)
    for page in (0, 2):
        for cache_rows in (keys, values):
            spoil(cache_rows, slice(page * PAGE, (page + 1) * PAGE))
    rows = [(slot, PAGE * page + i) for slot, page in ((0, 2), (1, 0), (1, 1)) for i in range(PAGE)]
    return normal((3 * PAGE, heads * dim), 3), keys, values, aligned(np.array(rows, np.int32)), pages


@pytest.mark.parametrize(
    ("heads", "dim", "bits"), [(2, 16, 16), (1, 24, 16), (1, 136, 16), (1, 256, 16), (2, 16, 8), (1, 144, 8)]
)
def test_attention_of_whole_pages(heads: int, dim: int, bits: int) -> None:
    """Heads of less than one piece of keys, of more than one, and of the most; and each page alone gives the same bits."""
    q, keys, values, places, pages = whole_pages(heads, dim, bits=bits)
    ours = kernels().attention(q, keys, values, places, pages, whole=True)
    np.testing.assert_allclose(
        ours, cuda_reference.attention(q, keys, values, places, pages), rtol=1e-5, atol=2e-6
    )
    for page in range(3):
        rows = slice(page * PAGE, (page + 1) * PAGE)
        alone = kernels().attention(aligned(q[rows]), keys, values, aligned(places[rows]), pages, whole=True)
        np.testing.assert_array_equal(alone, ours[rows])


def test_attention_of_whole_pages_survives_large_scores() -> None:
    q, keys, values, places, pages = whole_pages(1, 16, 60.0)
    ours = kernels().attention(aligned(30 * q), keys, values, places, pages, whole=True)
    expected = cuda_reference.attention(30 * q, keys, values, places, pages)
    # Scores of thousands, in float32: a part in 2^-23 of them is what the exponential sees.
    np.testing.assert_allclose(ours, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__syncthreads();  // nobody reads any more what lies there", ""),
        ("            __syncthreads();\n            long long at", "            long long at"),
        (
            "            __syncthreads();\n            if (!mine) continue;",
            "            if (!mine) continue;",
        ),
        ("begin += kValueRows) {\n            __syncthreads();", "begin += kValueRows) {"),
    ],
)
def test_attention_of_whole_pages_without_a_barrier_is_seen(old: str, new: str) -> None:
    q, keys, values, places, pages = whole_pages(1, 136)
    with pytest.raises(EmulationError, match="race|before it is written"):
        Launchers(Planted(old, new)).attention(q, keys, values, places, pages, whole=True)


@pytest.mark.parametrize(
    ("bits", "old", "new"),
    [
        (16, "lane + kWarp <= seen + j", "lane + kWarp <= seen + j + 1"),  # one position too many
        (16, "sums[j][i] *= fade;", "sums[j][i] *= 1.0f;"),
        (8, "of_scores[i] *= key_scales[at];", ""),
        pytest.param(8, "of_weights[i] = value_scales[at];", "", marks=pytest.mark.long),
        (8, "staged[to + begin] = begin ? two[1] : two[0];", "staged[to + begin] = two[0];"),
    ],
)
def test_attention_of_whole_pages_that_computes_something_else_is_seen(bits: int, old: str, new: str) -> None:
    q, keys, values, places, pages = whole_pages(1, 136 if bits == 16 else 32, bits=bits)
    found = Launchers(Planted(old, new, bits)).attention(q, keys, values, places, pages, whole=True)
    expected = cuda_reference.attention(q, keys, values, places, pages)
    assert not np.allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("score[i] *= key_scale[i];", ""),
        pytest.param("there ? weight * value_scale[i] : 0.0f", "weight", marks=pytest.mark.long),
        ("there ? weight * value_scale[i] : 0.0f", "weight * value_scale[i]"),  # no numbers behind the end
        pytest.param(
            "warp_sum<kLanes>(product)", "warp_sum<kWarp>(product)", marks=pytest.mark.long
        ),  # teams that meddle
        pytest.param("0x80808080u, i % 4", "0x80808080u, 3 - i % 4", marks=pytest.mark.long),
    ],
)
def test_attention_over_bytes_that_computes_something_else_is_seen(old: str, new: str) -> None:
    keys, values = in_bytes((2 * PAGE, 1, 32), 1), in_bytes((2 * PAGE, 1, 32), 2)
    for rows in (keys, values):
        spoil(rows, slice(70, None))
    arguments = normal((1, 32), 3), keys, values, *in_order(69, 1)
    found, expected = (
        Launchers(Planted(old, new, 8)).attention(*arguments),
        cuda_reference.attention(*arguments),
    )
    assert not np.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("warp < (int)blockDim.x / kWarp", "warp < 1"),  # one warp's largest number
        pytest.param("two[which][j] = saturated(two[which][j]);", "", marks=pytest.mark.long),
        pytest.param("most < kLeast ? 0.0f : most / 127.0f", "most", marks=pytest.mark.long),
        pytest.param(
            "[(page * heads + head) * kPage", "[(page * heads + head + 1) * kPage", marks=pytest.mark.long
        ),
        (
            "        __syncthreads();\n#pragma unroll\n        for (int which",
            "#pragma unroll\n        for (int which",
        ),
    ],
)
def test_a_cache_of_bytes_that_is_written_wrongly_is_seen(old: str, new: str) -> None:
    qkv = normal((1, 3 * 128), 1)
    qkv[0, 356] = 1e6  # in another warp than the first
    values = in_bytes((2 * PAGE, 1, 128))
    run = Launchers(Planted(old, new, 8))
    try:
        run.rotary_cache(
            qkv, aligned(rotary_table(8, 16)), in_bytes((2 * PAGE, 1, 128)), values, *in_order(3, 1)
        )
    except EmulationError as error:
        assert "race" in str(error) or "before it is written" in str(error)
        return
    numbers, scales = cuda_reference.quantized(qkv[0, 256:])
    assert not (np.array_equal(values.numbers[3, 0], numbers) and values.scales[0, 0, 3] == scales)


def test_attention_ignores_what_lies_beyond_and_survives_large_scores() -> None:
    keys, values = half((PAGE, 1, 16), 1, 60.0), half((PAGE, 1, 16), 2)
    places, pages = aligned(np.array([[0, 4], [0, 5]], np.int32)), aligned(np.zeros((1, 1), np.int32))
    q = normal((2, 16), 3, 30.0)
    before = kernels().attention(q, keys, values, places, pages)
    keys[6:], values[6:] = np.nan, np.nan
    np.testing.assert_array_equal(kernels().attention(q, keys, values, places, pages), before)
    assert np.isfinite(before).all()


def test_elementwise_kernels() -> None:
    x, weight, bias = normal((3, 200), 1, 3.0), half((200,), 2), half((200,), 3)
    run = kernels()
    np.testing.assert_allclose(
        run.layer_norm(x, weight, bias, 1e-5),
        cuda_reference.layer_norm(x, weight, bias, 1e-5),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        run.bias_gelu(x, bias), cuda_reference.bias_gelu(x, bias), rtol=1e-5, atol=1e-6
    )
    out = FakeCupy.empty(x.shape, np.float32)
    run.add_bias(x, bias, out)
    np.testing.assert_array_equal(out, x + bias.astype(np.float32))
    run.add_block(x, aligned(np.stack([x, x])), bias, out)
    np.testing.assert_allclose(out, 3 * x + bias.astype(np.float32), rtol=1e-6)


def test_impossible_shapes_are_refused_before_a_launch() -> None:
    matrix = packed_matrix(8, 64, 4, 32)
    with pytest.raises(ValueError, match="groups"):
        packed(kernels(), normal((1, 96)), matrix.packed, matrix.scales, matrix.zeros, 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        kernels().attention(normal((1, 12)), half((64, 1, 12)), half((64, 1, 12)), PLACES, PLACES)
    with pytest.raises(ValueError, match="multiple of 16; this has 24"):
        kernels().attention(normal((1, 24)), *[in_bytes((PAGE, 1, 24))] * 2, PLACES, PLACES)
    with pytest.raises(ValueError, match="no whole pages"):
        kernels().attention(normal((1, 16)), half((64, 1, 16)), half((64, 1, 16)), PLACES, PLACES, whole=True)
    with pytest.raises(ValueError, match="2 tokens of heads of 16 dimensions have places"):
        kernels().rotary_cache(
            normal((2, 48)), rotary_table(9, 4), half((64, 1, 16)), half((64, 1, 16)), PLACES, PLACES
        )


# ---- the emulation finds planted faults

HEADER = '#include "device.cuh"\n'


def run_kernel(body: str, parameters: str = "IN(float) x, OUT(float) y", *arguments: Any) -> None:
    module = RawModule(f'{HEADER}extern "C" __global__ void k({parameters}) {{\n{body}\n}}\n', _include())
    arguments = arguments or (normal((128,)), FakeCupy.empty((128,), np.float32))
    module.get_function("k")((1,), (128,), arguments)


GOOD = "SHARED(float, s, 128); s[threadIdx.x] = x[threadIdx.x]; __syncthreads(); y[threadIdx.x] = s[127 - threadIdx.x];"


def test_a_kernel_without_fault_passes() -> None:
    x, y = normal((128,)), FakeCupy.empty((128,), np.float32)
    run_kernel(GOOD, "IN(float) x, OUT(float) y", x, y)
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (GOOD.replace("__syncthreads();", ""), "race|before it is written"),
        (
            "SHARED(float, s, 1); s[0] = x[threadIdx.x]; __syncthreads(); y[threadIdx.x] = s[0];",
            "two threads write",
        ),
        (GOOD + " s[threadIdx.x] = 1;", "race"),
        ("SHARED(float, s, 128); y[threadIdx.x] = s[threadIdx.x];", "before it is written"),
        ("if (threadIdx.x < 64) __syncthreads(); y[threadIdx.x] = 0;", "not all threads reach this barrier"),
        ("if (threadIdx.x % 2) y[threadIdx.x] = warp_sum(1.0f);", "not all threads reach this shuffle"),
        ("y[threadIdx.x + 1] = 0;", "out of bounds: element 128 of 128"),
        ("y[threadIdx.x] = x[(int)threadIdx.x - 1];", "out of bounds: element -1"),
        ("SHARED(float, s, 64); s[threadIdx.x] = 0;", "out of bounds of shared"),
        ("y[threadIdx.x] = load_vector(x, threadIdx.x % 100).x;", "misaligned"),
        ("y[threadIdx.x] = load_vector(x, 4 * threadIdx.x).x;", "out of bounds: a vector"),
    ],
)
def test_planted_faults_are_found(body: str, words: str) -> None:
    with pytest.raises(EmulationError, match=words):
        run_kernel(body)


@pytest.mark.parametrize(
    "arguments",
    [
        (normal((128,)),),
        (normal((128,)).astype(np.float64), FakeCupy.empty((128,), np.float32)),
        (normal((256,))[::2], FakeCupy.empty((128,), np.float32)),
        (normal((128,)), 3.0),
    ],
)
def test_wrong_launches_are_found(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((EmulationError, AttributeError)):
        run_kernel(GOOD, "IN(float) x, OUT(float) y", *arguments)


def test_planted_faults_in_the_real_kernels_are_found() -> None:
    """The attention kernel without its barrier, and a dense product that loads one element off, do not pass."""

    keys, q = half((PAGE, 1, 16)), normal((1, 16))
    with pytest.raises(EmulationError, match="race|before it is written"):
        Launchers(Planted("__syncthreads();", "")).attention(q, keys, keys, PLACES, PLACES)
    for old, new, words in (
        (
            "words[s][r] = load_vector(w, at)",
            "words[s][r] = load_vector(w, at + 1)",
            "misaligned|out of bounds",
        ),
        ("buffer = kBuffer - buffer", "buffer = 0", "race"),
    ):
        with pytest.raises(EmulationError, match=words):
            dense(Launchers(Planted(old, new)), normal((1, 2048)), half((8, 2048)))
