"""Adapters in a pass: what a token's adapter adds is in its products, and is the same bits whoever shares the pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moss_jt.backend.jittor import jt
from moss_jt.kernels.adapters import TARGETS, AdapterBank, AdapterShape
from moss_jt.kernels.cpu.operators import CpuOperators
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.interface import PAGE, BlockWeights
from moss_jt.kernels.places import places_of
from moss_jt.kernels.portable import PortableOperators
from moss_jt.store.config import MossConfig
from tests.emulation.emulator import FakeCupy, aligned
from tests.support import block_oracle
from tests.support.block_oracle import BlockArrays, geometry
from tests.support.operator_weights import dense_block, in_one_memory, packed_block

CONFIG = geometry(160, 4, 8, n_inner=352)
LAYER = 1
SHAPES = (
    AdapterShape(3, TARGETS, range(2)),
    AdapterShape(8, ("fc_out", "qkv"), [LAYER]),
    AdapterShape(17, ("out",), range(2)),
    AdapterShape(4, ("fc_in",), [0]),  # has nothing in this layer
)
SIMD = sorted({chosen_simd(), "256", "0"} & set(available_simd()))


def random_bank(config: MossConfig = CONFIG, seed: int = 3) -> AdapterBank:
    bank = AdapterBank(config, SHAPES)
    draw = np.random.default_rng(seed)
    bank.values[:] = 0.1 * draw.standard_normal(len(bank.values))
    return bank


def weights_of(kind: str) -> tuple[BlockWeights, BlockArrays]:
    if kind == "float16":
        arrays = BlockArrays.random(CONFIG, 1)
        return dense_block(arrays), arrays
    return packed_block(CONFIG, 8 if kind == "int8" else 4, 32, seed=1, ordered=kind == "int8")


def merged(arrays: BlockArrays, bank: AdapterBank, number: int | None) -> BlockArrays:
    """The block with an adapter's products added to its matrices, in float64."""
    wide = arrays.wide()
    for target in TARGETS:
        if number is not None and (pair := bank.pair(number, LAYER, target)) is not None:
            a, b = (matrix.astype(np.float64) for matrix in pair)
            wide[target] = wide[target] + b.T @ a
    return replace(arrays, arrays=wide)


class Texts:
    """Sequences with an adapter each, over one cache whose pages lie in disorder."""

    def __init__(self, operators: Any, weights: BlockWeights, adapters: list[int | None], pages: int) -> None:
        self.operators, self.adapters = operators, adapters
        self.weights = in_one_memory(weights) if isinstance(operators, CudaOperators) else weights
        count = len(adapters) * pages
        shape = (2, count * PAGE, CONFIG.n_head, CONFIG.head_dim)
        self.memory = [aligned(np.zeros(shape, np.float16)) for _ in range(2)]
        self.keys, self.values = (jt.reuse_np_array(array) for array in self.memory)
        self.pages = np.random.default_rng(7).permutation(count).reshape(len(adapters), pages)

    def read(self, pieces: list[tuple[int, np.ndarray, int]]) -> np.ndarray:
        """One pass over (slot, states, start) of each piece; whole pages come first."""
        slots = np.concatenate([[slot] * len(h) for slot, h, _ in pieces])
        positions = np.concatenate([start + np.arange(len(h)) for _, h, start in pieces])
        whole = sum(len(h) for _, h, _ in pieces if len(h) == PAGE)
        places = places_of(slots, positions, self.pages.tolist(), whole, self.adapters)
        h = jt.array(np.concatenate([h for _, h, _ in pieces]))
        result: np.ndarray = self.operators.block(
            h, self.weights, self.keys, self.values, LAYER, places
        ).numpy()
        return result

    def cache(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        lies = (self.pages[slot][:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        keys, values = (array[LAYER][lies] for array in self.memory)
        return keys, values


def states(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, CONFIG.n_embd)).astype(np.float32)


OPERATORS = [("portable", kind) for kind in ("float16", "int8")] + [
    (simd, kind) for simd in (*SIMD, "cuda") for kind in ("float16", "int8", "int4")
]


def operators_of(level: str, bank: AdapterBank | None) -> Any:
    if level == "portable":
        return PortableOperators(CONFIG, bank)
    if level == "cuda":
        return CudaOperators(CONFIG, FakeCupy(), bank)
    return CpuOperators(CONFIG, level, bank)


@pytest.mark.parametrize(("level", "kind"), OPERATORS)
def test_a_token_has_its_adapter_in_its_products(level: str, kind: str) -> None:
    """Against the block with merged matrices in float64, for tokens of all adapters in one pass."""
    bank = random_bank()
    weights, arrays = weights_of(kind)
    adapters = [None, 0, 1, 2, 3]
    texts = Texts(operators_of(level, bank), weights, adapters, 1)
    for start, tokens in ((0, 3), (3, 1)):
        h = [states(tokens, 10 * start + slot) for slot in range(len(adapters))]
        rows = texts.read([(slot, h[slot], start) for slot in range(len(adapters))])
        for slot, number in enumerate(adapters):
            keys, values = texts.cache(slot)
            oracle = merged(arrays, bank, number)
            expected = block_oracle.block_over_cache(h[slot], oracle, keys, values, start)
            actual = rows[slot * tokens : (slot + 1) * tokens]
            assert np.abs(actual - expected).max() <= 2e-5 * np.abs(expected).max(), (slot, start)
            for cached, exact in zip(
                (keys, values), block_oracle.new_keys_values(h[slot], oracle, start), strict=True
            ):
                error = np.abs(cached[start : start + tokens] - exact)
                assert (error <= 2.0**-11 * np.abs(exact) + 3e-5 * np.abs(exact).max()).all()


@pytest.mark.parametrize(
    ("simd", "kind"),
    [
        *[(simd, kind) for simd in SIMD for kind in ("float16", "int4")],
        *[pytest.param(simd, "int8", marks=pytest.mark.long) for simd in SIMD],
        ("cuda", "float16"),
        pytest.param("cuda", "int4", marks=pytest.mark.long),
    ],
)
def test_a_token_has_the_same_bits_in_any_company(kind: str, simd: str) -> None:
    """A whole page and then single tokens and a draft, alone and among others with other adapters; and without any, what
    operators without adapters give."""
    bank = random_bank()
    weights, _ = weights_of(kind)
    adapters: list[int | None] = [0, None, 2] if simd == "cuda" else [0, None, 2, 1, 0]
    pieces = [[(0, PAGE), (PAGE, PAGE + 1), (PAGE + 1, PAGE + 24)] for _ in adapters]
    pieces[1] = [(0, PAGE), (PAGE, PAGE + 5), (PAGE + 5, PAGE + 6)]
    h = [states(PAGE + 24, 20 + slot) for slot in range(len(adapters))]
    alone = Texts(operators_of(simd, bank), weights, adapters, 2)
    among = Texts(operators_of(simd, bank), weights, adapters, 2)
    plain = Texts(operators_of(simd, None), weights, [None] * len(adapters), 2)
    for turn in range(3):
        now = [
            (slot, h[slot][slice(*pieces[slot][turn])], pieces[slot][turn][0])
            for slot in range(len(adapters))
        ]
        rows = among.read(now)
        first = 0
        for piece in now:
            own = rows[first : first + len(piece[1])]
            assert np.array_equal(own, alone.read([piece])), piece[0]
            same = np.array_equal(own, plain.read([piece]))
            assert same == (adapters[piece[0]] is None)
            first += len(piece[1])
    for slot in range(len(adapters)):
        for ours, own in zip(among.cache(slot), alone.cache(slot), strict=True):
            assert np.array_equal(ours, own)


def test_blocks_at_once_have_each_their_own_pairs() -> None:
    bank = random_bank()
    weights, _ = weights_of("float16")
    operators = operators_of(chosen_simd(), bank)
    one, other = (Texts(operators, weights, [0, 1, 2], 1) for _ in range(2))
    rows = states(3, 0)
    places = places_of([0, 1, 2], [0, 0, 0], one.pages.tolist(), 0, [0, 1, 2])
    expected = jt.array(rows)
    for layer in range(2):
        expected = operators.block(expected, weights, one.keys, one.values, layer, places)
    actual = operators.blocks(jt.array(rows), [weights, weights], other.keys, other.values, 0, places)
    assert np.array_equal(actual.numpy(), expected.numpy())
    for ours, own in zip(other.memory, one.memory, strict=True):
        assert np.array_equal(ours, own)
        assert ours[0].any() and ours[1].any()


def test_an_adapter_that_is_not_there_is_refused() -> None:
    weights, _ = weights_of("float16")
    for level in ("portable", chosen_simd(), "cuda"):
        for bank, number in ((random_bank(), 4), (random_bank(), -2), (None, 0)):
            texts = Texts(operators_of(level, bank), weights, [number], 1)
            with pytest.raises(ValueError, match="adapters"):
                texts.read([(0, states(1, 0), 0)])
