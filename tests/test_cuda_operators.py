"""The GPU's operators over Jittor Vars, with the emulation in CuPy's place: whole blocks against the float64 oracle."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moss_jt.backend.jittor import jt
from moss_jt.engine.kv_cache import KVCache
from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kernels.cuda.launchers import Launchers, TokenAdapters
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.cuda.recording import DeviceArray, Recorder, queue
from moss_jt.kernels.interface import PAGE, BlockWeights, ByteRows, DenseMatrix, PackedMatrix
from moss_jt.kernels.needs import FEW_TOKENS, CudaNeeds
from moss_jt.kernels.places import one_sequence, places_of
from moss_jt.store.config import MOSS_MOON_003, MossConfig
from tests.emulation.emulator import FakeCupy, aligned
from tests.support.block_oracle import BlockArrays, block, geometry
from tests.support.operator_weights import (
    dense_block,
    head_in_one_region,
    in_one_memory,
    packed_block,
)
from tests.test_kernels_cpu import Run, check_passes, random_states, together

CONFIG = geometry(n_embd=64, n_head=4, rotary_dim=8, n_positions=128)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4 act-order"])
def test_blocks_agree_with_float64(kind: str) -> None:
    """A prompt of three tokens, then one, then two, over one cache. Tolerance: float16 keys and values, float32 sums."""
    if kind == "float16":
        oracle = BlockArrays.random(CONFIG, 1)
        weights = dense_block(oracle)
    else:
        weights, oracle = packed_block(CONFIG, int(kind[3]), 32, 1, ordered="act-order" in kind)
    operators, regions = CudaOperators(CONFIG, FakeCupy()), in_one_memory(weights)
    shape = (CONFIG.n_layer, PAGE, CONFIG.n_head, CONFIG.head_dim)
    memory = [aligned(np.zeros(shape, np.float16)) for _ in range(2)]
    keys, values = (jt.reuse_np_array(array) for array in memory)
    states = np.random.default_rng(2).standard_normal((6, CONFIG.n_embd)).astype(np.float32)
    empty = [np.zeros((32, CONFIG.n_head, CONFIG.head_dim), np.float16) for _ in range(2)]
    expected = block(states, oracle, *empty, 0)  # causal: the same for one pass as for three
    start, actual = 0, []
    for tokens in (3, 1, 2):
        h = jt.array(states[start : start + tokens])
        actual.append(operators.block(h, regions, keys, values, 1, one_sequence(start, tokens)).numpy())
        start += tokens
    assert np.abs(np.concatenate(actual) - expected).max() <= 4e-3 * np.abs(expected).max()
    assert not memory[0][0].any(), "another layer's cache was written"


def test_head() -> None:
    draw = np.random.default_rng(3)
    operators = CudaOperators(CONFIG, FakeCupy())
    table = draw.standard_normal((50, 64)).astype(np.float16)
    norm_weight, norm_bias = draw.standard_normal((2, 64)).astype(np.float16)
    bias = draw.standard_normal(50).astype(np.float16)
    h = draw.standard_normal((2, 64)).astype(np.float32)
    norm = jt.array(norm_weight), jt.array(norm_bias)
    actual = operators.head(jt.array(h), *norm, head_in_one_region(table), jt.array(bias)).numpy()
    normed = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    expected = (normed * norm_weight + norm_bias) @ table.T.astype(np.float64) + bias
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    operators = CudaOperators(CONFIG, FakeCupy())
    weights = in_one_memory(dense_block(BlockArrays.random(CONFIG, 1)))
    cache, first = jt.zeros((2, PAGE, CONFIG.n_head, CONFIG.head_dim), "float16"), one_sequence(0, 1)
    with pytest.raises(ValueError, match="do not fit"):
        operators.block(jt.zeros((3, 64)), weights, cache, cache, 0, one_sequence(62, 3))
    with pytest.raises(ValueError, match="h has shape"):
        operators.block(jt.zeros((1, 32)), weights, cache, cache, 0, first)
    with pytest.raises(ValueError, match="fc_in_bias"):
        operators.block(
            jt.zeros((1, 64)), replace(weights, fc_in_bias=weights.fc_out_bias), cache, cache, 0, first
        )


LONG = geometry(n_embd=64, n_head=2, rotary_dim=8, n_positions=192)


def operators_and_cache(config: MossConfig) -> tuple[CudaOperators, list[np.ndarray]]:
    shape = (config.n_layer, config.n_positions, config.n_head, config.head_dim)
    return CudaOperators(config, FakeCupy()), [aligned(np.zeros(shape, np.float16)) for _ in range(2)]


@pytest.mark.parametrize("kind", ["float16", "int8 act-order", "int4"])
def test_a_block_gives_a_token_the_same_bits_in_every_short_pass(kind: str) -> None:
    """Over two pages of the cache: all tokens at once, one by one, and in passes that end anywhere."""
    if kind == "float16":
        weights = dense_block(BlockArrays.random(LONG, 1))
    else:
        weights, _ = packed_block(LONG, int(kind[3]), 32, 1, ordered="act-order" in kind)
    regions, start = in_one_memory(weights), 50
    draw = np.random.default_rng(2)
    states = draw.standard_normal((FEW_TOKENS, LONG.n_embd)).astype(np.float32)
    before = draw.standard_normal((2, start, LONG.n_head, LONG.head_dim)).astype(np.float16)

    def in_passes(sizes: list[int]) -> np.ndarray:
        operators, memory = operators_and_cache(LONG)
        for array, old in zip(memory, before, strict=True):
            array[1, :start] = old
        keys, values = (jt.reuse_np_array(array) for array in memory)
        actual, first = [], 0
        for tokens in sizes:
            h = jt.array(states[first : first + tokens])
            actual.append(
                operators.block(h, regions, keys, values, 1, one_sequence(start + first, tokens)).numpy()
            )
            first += tokens
        return np.concatenate(
            [*actual, *(array[1, start : start + FEW_TOKENS].reshape(FEW_TOKENS, -1) for array in memory)]
        )

    alone = in_passes([1] * FEW_TOKENS)
    for sizes in ([FEW_TOKENS], [16, 7], [2, 3, 4, 5, 9]):
        np.testing.assert_array_equal(in_passes(sizes), alone, str(sizes))


def test_a_long_pass_begins_without_what_cupy_keeps_of_others() -> None:
    """Its limit would count that: passes of growing length ended in a full card."""
    freed: list[int] = []
    pool = SimpleNamespace(free_all_blocks=lambda: freed.append(1))
    cupy = type("Cupy", (FakeCupy,), {"get_default_memory_pool": staticmethod(lambda: pool)})
    operators, memory = CudaOperators(CONFIG, cupy()), operators_and_cache(CONFIG)[1]
    keys, values = (jt.reuse_np_array(array) for array in memory)
    weights = in_one_memory(dense_block(BlockArrays.random(CONFIG, 1)))
    for tokens, times in ((2, 0), (FEW_TOKENS + 1, 1), (FEW_TOKENS + 2, 2)):
        for layer in (0, 1):
            h = jt.ones((tokens, CONFIG.n_embd))
            operators.block(h, weights, keys, values, layer, one_sequence(0, tokens)).sync()
        assert len(freed) == times


@pytest.mark.parametrize(("kind", "launches"), [("float16", 8), ("int4", 10), ("int8 act-order", 10)])
def test_a_block_is_recorded_once_and_queued_from_then_on(
    monkeypatch: pytest.MonkeyPatch, kind: str, launches: int
) -> None:
    """Eight launches, ten for packed weights; other blocks of the same layout, other layers and other positions are no new work."""
    operators, memory = operators_and_cache(CONFIG)
    keys, values = (jt.reuse_np_array(array) for array in memory)
    recorded: list[int] = []
    block = CudaOperators._block
    monkeypatch.setattr(CudaOperators, "_block", lambda *a: (recorded.append(1), block(*a))[1])
    for seed in (1, 2):
        if kind == "float16":
            weights = dense_block(BlockArrays.random(CONFIG, seed))
        else:
            weights, _ = packed_block(CONFIG, int(kind[3]), 32, seed, ordered="act-order" in kind)
        regions = in_one_memory(weights)
        for layer, start in ((0, 0), (1, 0), (1, 7)):
            operators.block(jt.ones((1, 64)), regions, keys, values, layer, one_sequence(start, 1)).sync()
    assert len(recorded) == 1
    assert operators.launches_per_block(regions) == launches
    written = [array.reshape(2, CONFIG.n_positions, -1).any(axis=2) for array in memory]
    for array in written:
        assert list(np.flatnonzero(array[0])) == [0] and list(np.flatnonzero(array[1])) == [0, 7]
    operators.block(jt.ones((2, 64)), regions, keys, values, 0, one_sequence(0, 2)).sync()
    assert len(recorded) == 2, "another number of tokens"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_plan_has_room_for_a_short_pass(bits: int) -> None:
    """Of MOSS itself, and of the models of these tests: what a recording takes."""
    for config in (MOSS_MOON_003, CONFIG, geometry(n_embd=1024, n_head=16, rotary_dim=32)):
        operators = CudaOperators(
            replace(config, n_positions=8), FakeCupy()
        )  # its table is of no interest here
        width, inner, context = config.n_embd, config.n_inner, config.n_positions
        for tokens in (1, FEW_TOKENS):
            recorder = Recorder(operators.kernels, 6)

            def matrix(outputs: int, inputs: int, at: Any = recorder.empty) -> Any:
                if bits == 16:
                    return DenseMatrix(at((outputs, inputs), np.float16))
                groups = (outputs, inputs // 32)
                order = at((inputs, 1), np.int32)
                packed = at((outputs, inputs * bits // 8), np.uint8)
                return PackedMatrix(packed, at(groups, np.float16), at(groups, np.uint8), bits, 32, order)

            vector = recorder.empty((inner,), np.float16)
            weights = BlockWeights(
                vector,
                vector,
                matrix(3 * width, width),
                matrix(width, width),
                matrix(inner, width),
                vector,
                matrix(width, inner),
                vector,
            )
            h = recorder.empty((tokens, width), np.float32)
            cache = recorder.empty((context, config.n_head, config.head_dim), np.float16)
            rotary = recorder.empty((context, 2, config.rotary_dim // 2), np.float32)
            places = recorder.empty((tokens, 2), np.int32), recorder.empty((1, -(-context // PAGE)), np.int32)
            inputs = recorder.recording().workspace_bytes
            tables = rotary, *places, cache, cache
            operators._block(recorder, h, weights, lambda weight: weight, tables, 0, h)
            taken = recorder.recording().workspace_bytes - inputs
            assert taken <= CudaNeeds(config, bits).short_pass_bytes(tokens, context), (config, tokens)
            adapters, rank = TokenAdapters(h, h, h, 24), 24
            operators._block(recorder, h, weights, lambda weight: weight, tables, 0, h, adapters)
            taken = recorder.recording().workspace_bytes - inputs - taken
            assert taken <= CudaNeeds(config, bits, rank).short_pass_bytes(tokens, context), (config, tokens)


def test_what_a_card_is_told_is_what_the_table_says() -> None:
    """Numbers, arrays with their offsets and sizes, and a null pointer: as cuLaunchKernel gets them."""
    seen: list[tuple[Any, ...]] = []

    class Told(ctypes.Structure):
        _fields_ = [("value", ctypes.c_uint64), ("elements", ctypes.c_uint64)]

    @ctypes.CFUNCTYPE(
        ctypes.c_int, *[ctypes.c_size_t] * 9, ctypes.POINTER(ctypes.POINTER(Told)), ctypes.c_size_t
    )
    def told(function: int, *rest: Any) -> int:
        arguments = [(rest[8][i].contents.value, rest[8][i].contents.elements) for i in range(6)]
        seen.append((function, tuple(size & 0xFFFFFFFF for size in rest[:6]), arguments))
        return 0

    class Idle:
        """A kernel's handle is 11."""

        RawModule = staticmethod(
            lambda code, options: SimpleNamespace(
                get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=11))
            )
        )

    recorder = Recorder(Launchers(Idle()), 3)
    half = DeviceArray(1, 32, (4, 8), np.dtype(np.float16), layer_bytes=16)
    first, second = recorder.empty((5,), np.float32), recorder.empty((3,), np.float32)
    arguments = half[2:], 1.5, -2, None, second, DeviceArray(1, 0, (64,), np.dtype(np.float32))
    recorder.launch("linear.cu", "k", (7, 2), *arguments, threads=64)
    assert first.offset == 0 and half[2:].shape == (2, 8) and half.reshape(-1, 2).shape == (16, 2)
    inputs = [jt.zeros((8,)), jt.zeros((64,))]
    address = float(ctypes.cast(told, ctypes.c_void_p).value or 0)
    queue(recorder.recording(), address, (4,), inputs, layer=1).sync()
    ((function, grid, got),) = seen
    assert function == 11 and grid == (7, 2, 1, 64, 1, 1)
    numbers = [value & 0xFFFFFFFF for value, _ in got]
    assert numbers[1:4] == [int(np.float32(1.5).view(np.uint32)), 2**32 - 2, 0]
    assert [elements for _, elements in got] == [16, 0, 0, 0, 3, 64]
    assert got[0][0] - got[5][0] == 32 + 2 * 16 + 16 and got[4][0] != 0


@pytest.mark.parametrize("kind", ["float16", "int4"])
def test_a_sequence_does_not_depend_on_the_others_in_its_passes(kind: str) -> None:
    """Three texts, of whole pages and what fills none, in common passes and each alone: the same bits."""
    if kind == "float16":
        weights = dense_block(BlockArrays.random(CONFIG, 1))
    else:
        weights, _ = packed_block(CONFIG, 4, 32, 1, ordered=True)
    operators, regions = CudaOperators(CONFIG, FakeCupy()), in_one_memory(weights)
    draw = np.random.default_rng(2)
    texts = [draw.standard_normal((tokens, CONFIG.n_embd)).astype(np.float32) for tokens in (70, 3, 67)]
    pages = [[4, 0], [2], [1, 3]]
    starts = [(0, 64), (0, 1), (0, 64)]  # of the first pass; the second has the rest

    def run(slots: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        memory = [aligned(np.zeros((2, 5 * PAGE, CONFIG.n_head, CONFIG.head_dim), np.float16)) for _ in "kv"]
        keys, values = (jt.reuse_np_array(array) for array in memory)
        actual: dict[int, list[np.ndarray]] = {slot: [] for slot in slots}
        for step in range(2):
            parts = [
                (slot, *(starts[slot] if step == 0 else (starts[slot][1], len(texts[slot]))))
                for slot in slots
            ]
            parts.sort(key=lambda part: part[2] - part[1] < PAGE)
            owner = np.concatenate([[slot] * (end - begin) for slot, begin, end in parts])
            position = np.concatenate([np.arange(begin, end) for _, begin, end in parts])
            h = jt.array(np.concatenate([texts[slot][begin:end] for slot, begin, end in parts]))
            whole = sum(PAGE for _, begin, end in parts if end - begin == PAGE)
            places = places_of(owner, position, pages, whole)
            rows = operators.block(h, regions, keys, values, 1, places).numpy()
            for slot in slots:
                actual[slot].append(rows[owner == slot])
        return [np.concatenate(actual[slot]) for slot in slots], memory

    common, memory = run([0, 1, 2])
    for slot in range(3):
        (alone,), own = run([slot])
        np.testing.assert_array_equal(common[slot], alone)
        for page in pages[slot]:
            rows = slice(page * PAGE, (page + 1) * PAGE)
            for ours, theirs in zip(memory, own, strict=True):
                np.testing.assert_array_equal(ours[:, rows], theirs[:, rows])


BYTES = geometry(n_embd=64, n_head=2, rotary_dim=8, n_positions=192)


def over_bytes(operators: Any, weights: BlockWeights) -> Run:
    return Run(operators, weights, BYTES, 2 * PAGE, cache_bits=8)


def test_a_block_over_a_cache_of_bytes_agrees_with_float64_and_with_the_cpu() -> None:
    """The CPU's numbers, but for those that lie between two; and the same scales."""
    oracle = BlockArrays.random(BYTES, 1)
    ours = over_bytes(CudaOperators(BYTES, FakeCupy()), in_one_memory(dense_block(oracle)))
    passes = (23, 60, 1)
    check_passes(ours, oracle, passes)
    cpu = over_bytes(CpuOperators(BYTES), dense_block(oracle))
    check_passes(cpu, oracle, passes)
    for rows, others in ((ours.keys, cpu.keys), (ours.values, cpu.values)):
        off = np.abs(rows.numbers.numpy().astype(int) - others.numbers.numpy())
        assert off.max() <= 1 and (off > 0).mean() < 0.01
        np.testing.assert_allclose(rows.scales.numpy(), others.scales.numpy(), rtol=1e-5)
        assert rows.scales.numpy()[1].any()


def test_over_a_cache_of_bytes_a_token_gets_the_same_bits_in_every_short_pass() -> None:
    regions, states = in_one_memory(dense_block(BlockArrays.random(BYTES, 1))), random_states(BYTES, 50 + 23)
    operators, results = CudaOperators(BYTES, FakeCupy()), []
    for sizes in ([1] * FEW_TOKENS, [FEW_TOKENS], [2, 3, 4, 5, 9]):
        run = over_bytes(operators, regions)
        run.step(states[:50], 0)
        ends = 50 + np.cumsum(sizes)
        rows = [run.step(states[end - n : end], end - n) for n, end in zip(sizes, ends, strict=True)]
        results.append(np.concatenate([*rows, *(cache.reshape(2 * PAGE, -1) for cache in run.cache())]))
        np.testing.assert_array_equal(results[-1], results[0], str(sizes))
    assert operators.launches_per_block(regions) == 8


def test_texts_in_a_cache_of_bytes_do_not_depend_on_the_others() -> None:
    regions = in_one_memory(dense_block(BlockArrays.random(BYTES, 1)))
    texts = [random_states(BYTES, tokens, tokens) for tokens in (70, 3, 67)]
    together(CudaOperators(BYTES, FakeCupy()), regions, BYTES, texts, cache_bits=8)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_page_s_copy_has_the_form_that_the_host_s_has(bits: int) -> None:
    """What the card wrote out is read on the processor and the other way round: pages on disk have one form."""
    cache = KVCache(BYTES, 3 * PAGE, bits=bits)
    operators, draw = CudaOperators(BYTES, FakeCupy()), np.random.default_rng(1)
    for page in range(3):
        content = draw.integers(0, 120, cache.read_page(page).nbytes, np.uint8)
        cache.write_page(page, content.view(cache.read_page(page).dtype))
    copies = [cache.read_page(page) for page in range(3)]
    for page, copy in enumerate(copies):
        ours = operators.read_page(cache.keys, cache.values, page)
        assert ours.dtype == copy.dtype and isinstance(cache.keys, ByteRows) == (bits == 8)
        np.testing.assert_array_equal(ours, copy)
    operators.write_page(cache.keys, cache.values, 1, copies[2])
    for page, expected in enumerate((0, 2, 2)):
        np.testing.assert_array_equal(cache.read_page(page), copies[expected])
