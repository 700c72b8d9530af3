"""Products of packed matrices as integers, on every level of vectors: what this machine lacks through a model of it.

tests/native/instructions has the instructions in plain C++. Inputs have 16 bits, those of few tokens in two signed bytes, of
which the largest pair is 127 * 257; the bounds below follow from that and hold for any numbers.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moss_jt.kernels.cpu.simd import NEEDED, available_simd, definitions
from moss_jt.kernels.interface import PAGE
from moss_jt.kernels.needs import DEFINITIONS
from moss_jt.store import quant
from tests.support.native_flags import FLAGS
from tests.support.operator_weights import random_packed, widened

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [level for level in NEEDED if level != "0"]
EPSILON = 2.0**-24  # float32's


@dataclass(frozen=True)
class Case:
    matrix: quant.PackedArrays
    inputs: np.ndarray  # (T, K) float32

    @property
    def weights(self) -> np.ndarray:
        return widened(self.matrix).astype(np.float64)


def compiled(folder: Path, level: str, modelled: bool) -> Path:
    program = folder / f"products-{level}-{modelled}"
    flags = [f"-I{ROOT / 'tests' / 'native' / 'instructions'}"] if modelled else FLAGS[level]
    macros = {**DEFINITIONS, **definitions(level)}
    command = [
        "g++", "-std=c++17", "-O1", "-fopenmp", "-fno-fast-math", "-ffp-contract=off", "-w", *flags,
        *(f"-D{name}={value}" for name, value in macros.items()), f"-I{ROOT / 'kernels' / 'cpu'}",
        str(ROOT / "tests" / "native" / "products.cc"), "-o", str(program),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def products(program: Path, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) float32 as of few tokens, and as of whole pages."""
    matrix, x = case.matrix, case.inputs
    outputs, groups = matrix.scales.shape
    ordered = matrix.input_order is not None
    sizes = np.array([matrix.bits, outputs, x.shape[1], groups, len(x), ordered], np.int64)
    arrays = [
        sizes,
        matrix.packed,
        matrix.scales,
        matrix.zeros,
        *([matrix.input_order] if ordered else []),
        x,
    ]
    done = subprocess.run(
        [str(program)], input=b"".join(array.tobytes() for array in arrays), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    few, whole = np.frombuffer(done.stdout, np.float32).reshape(2, len(x), outputs)
    return few, whole


def random_case(
    bits: int, outputs: int = 41, inputs: int = 384, group_size: int = 128, ordered: bool = False
) -> Case:
    """Rows that fill no tile, and inputs of which each token has its own size and one in a hundred is far larger."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((PAGE, inputs)) * np.where(rng.random((PAGE, inputs)) < 0.01, 30, 1)
    x *= 10.0 ** rng.uniform(-6, 6, (PAGE, 1))
    return Case(random_packed((outputs, inputs), bits, group_size, 5, ordered), x.astype(np.float32))


def extreme_case(bits: int) -> Case:
    """Every product as large as it can be, with one sign in a row: the sums of integers reach their most."""
    outputs, inputs = 8, 256
    most = 2**bits - 1
    fields = np.repeat(np.array([most, 0] * (outputs // 2), np.uint8)[:, None], inputs, axis=1)
    zeros = np.repeat(
        np.array([0, most] * (outputs // 2), np.uint8)[:, None], 2, axis=1
    )  # minus one, as stored
    matrix = quant.PackedArrays(
        quant.pack(fields, bits), np.ones((outputs, 2), np.float16), zeros, bits, 128, None
    )
    x = np.ones((PAGE, inputs), np.float32) * np.array([1, -1] * (PAGE // 2), np.float32)[:, None]
    x[2:4] *= np.float32(1.9999999)
    x[4:] *= np.random.default_rng(1).uniform(0.9, 1, (PAGE - 4, inputs)).astype(np.float32)
    return Case(matrix, x)


CASES = {
    "random": lambda bits: random_case(bits),
    "ordered": lambda bits: random_case(bits, ordered=True),
    "groups of two spans": lambda bits: random_case(bits, inputs=512, group_size=256),
    "groups of 96": lambda bits: random_case(bits, inputs=192, group_size=96),
    "groups of 32": lambda bits: random_case(bits, inputs=160, group_size=32, outputs=9),
    "extreme": extreme_case,
}


def span_of(group_size: int) -> int:
    return next(length for length in (128, 96, 64, 32) if group_size % length == 0)


def bounds(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What few tokens' products and whole pages' may differ from the exact ones, for any order of float32 sums."""
    matrix, weights = case.matrix, np.abs(case.weights)
    x = np.abs(case.inputs.astype(np.float64))
    spans = x.shape[1] // span_of(matrix.group_size)
    order = matrix.input_order if matrix.input_order is not None else np.arange(x.shape[1])
    largest = np.repeat(x[:, order].reshape(len(x), spans, -1).max(axis=2), x.shape[1] // spans, axis=1)
    in_order = weights[:, order]
    # Sums of field * x and of zero * x apart, in float32: each up to 2**bits times the scale.
    scales = np.repeat(np.abs(matrix.scales.astype(np.float64)), matrix.group_size, axis=1)
    terms = 2 * 2.0**matrix.bits * x[:, order] @ scales.T
    few_sum = (x.shape[1] / 8 + 8) * EPSILON * terms
    whole_sum = (spans + 4) * EPSILON * (x[:, order] @ in_order.T)
    one = 4 * EPSILON * (1 + np.abs(case.inputs.astype(np.float64) @ case.weights.T))
    few = largest @ in_order.T / (2 * 127 * 257) * (1 + 2.0**-10) + few_sum + one
    whole = largest @ in_order.T / 65534 * (1 + 2.0**-10) + whole_sum + one
    return few, whole


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("products")
    wanted = [(level, True) for level in LEVELS] + [
        (level, False) for level in LEVELS if level in available_simd()
    ]
    with ThreadPoolExecutor() as compilers:
        done = compilers.map(lambda key: compiled(folder, *key), wanted)
        return dict(zip(wanted, done, strict=True))


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("name", CASES)
def test_products_stay_within_what_their_inputs_were_rounded_by(
    name: str, bits: int, programs: dict[tuple[str, bool], Path]
) -> None:
    case = CASES[name](bits)
    exact = 1 + case.inputs.astype(np.float64) @ case.weights.T
    few_bound, whole_bound = bounds(case)
    results = {key: products(program, case) for key, program in programs.items()}
    for (level, modelled), (few, whole) in results.items():
        where = f"{level}, {'the model' if modelled else 'this machine'}"
        assert (np.abs(few - exact) <= few_bound).all(), where
        assert (np.abs(whole - exact) <= whole_bound).all(), where
        # The sums are of integers, so every level gives whole pages the same bits.
        assert np.array_equal(whole, results["256", True][1]), where
        if (level, False) in results:
            assert np.array_equal(few, results[level, False][0]), f"{where}: the model is another processor"


@pytest.mark.parametrize("bits", (4, 8))
def test_products_lose_no_more_than_a_rounding_of_their_inputs(
    bits: int, programs: dict[tuple[str, bool], Path]
) -> None:
    """The bound above is for the worst case; here the errors are as large as 15 bits and a sign leave them, and no larger."""
    case = random_case(bits, outputs=200, inputs=1024)
    spans = np.abs(case.inputs.astype(np.float64)).reshape(PAGE, -1, 128).max(axis=2)
    steps = np.repeat(spans, 128, axis=1) / 32767
    expected = np.sqrt(steps**2 @ (case.weights**2).T / 12)
    exact = 1 + case.inputs.astype(np.float64) @ case.weights.T
    large = np.abs(case.inputs).max(axis=1) > 1  # where the one that is added takes no part
    for product in products(programs["256", True], case):
        assert 0.9 < np.sqrt(np.mean(((product - exact) / expected)[large] ** 2)) < 1.1


@pytest.mark.parametrize("bits", (4, 8))
def test_a_row_that_is_not_finite_stays_so_and_changes_no_other(
    bits: int, programs: dict[tuple[str, bool], Path]
) -> None:
    case = random_case(bits)
    broken = case.inputs.copy()
    broken[3, 5], broken[20, 130], broken[40, 7] = np.inf, np.nan, -np.inf
    rows = np.setdiff1d(np.arange(PAGE), [3, 20, 40])
    for program in programs.values():
        before, after = products(program, case), products(program, Case(case.matrix, broken))
        for one, other in zip(before, after, strict=True):
            assert np.array_equal(one[rows], other[rows])
            assert not np.isfinite(other[[3, 20, 40]]).any()
