"""Our numbers are the reference's numbers: against transformers' CodeGen in float32, on random checkpoints.

The oracle and we start from the same float16 weights. What remains different is our float16 cache (2**-11 of each key and
value), and the order of sums.
"""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.jittor import jt
from moss_jt.engine.engine import Engine
from moss_jt.engine.kv_cache import KVCache
from moss_jt.engine.model import Model
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.kernels.interface import DenseMatrix
from moss_jt.kernels.portable import PortableOperators
from moss_jt.store.locations import tiny_checkpoint
from tests.support.models import convert_checkpoint

ORACLE = Path(__file__).parent / "oracle" / "codegen.py"
GEOMETRIES = ("heads-4", "heads-8-inner", "heads-16", "heads-24")
TOLERANCE = 1e-3  # of the largest logit


class Case:
    """One geometry: the oracle's arrays, and our model of its checkpoint."""

    def __init__(self, folder: Path, name: str) -> None:
        self.expected = np.load(folder / f"{name}.npz")
        store = convert_checkpoint(folder / name, folder / f"{name}-store")
        self.moss = Moss.load(store, draft="off")
        self.token_ids = [int(token) for token in self.expected["token_ids"]]

    def check(self, logits: np.ndarray) -> None:
        expected = self.expected["logits"]
        error = np.abs(logits - expected)
        assert error.max() <= TOLERANCE * np.abs(expected).max(), f"mean error {error.mean():.2e}"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's folder, filled by one process for all geometries."""
    return run_oracle(tmp_path_factory.mktemp("oracle"))


def run_oracle(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-P", str(ORACLE), str(folder), str(tiny_checkpoint())]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_random_models_are_the_same_on_every_processor(
    oracle: Path, tmp_path: Path, capability: str
) -> None:
    """torch's own generator is not: the last bits of its normal numbers depend on the instruction set, and a greedy choice
    that is clear on one processor is too close to call on another."""
    other = run_oracle(tmp_path / "other", ATEN_CPU_CAPABILITY=capability)
    for name in GEOMETRIES:
        ours, theirs = np.load(oracle / f"{name}.npz"), np.load(other / f"{name}.npz")
        for field in ("token_ids", "prompt", "greedy"):
            np.testing.assert_array_equal(ours[field], theirs[field])
        assert theirs["margin"] > 2 * TOLERANCE
        files = sorted(path.name for path in (other / name).iterdir() if path.suffix == ".safetensors")
        for file in files:
            assert (oracle / name / file).read_bytes() == (other / name / file).read_bytes()


@pytest.fixture(scope="module", params=GEOMETRIES)
def case(oracle: Path, request: pytest.FixtureRequest) -> Iterator[Case]:
    actual = Case(oracle, request.param)
    yield actual
    actual.moss.close()
    shutil.rmtree(oracle / f"{request.param}-store")


def test_logits_of_a_text_read_at_once(case: Case) -> None:
    case.check(case.moss.logits(case.token_ids))


@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_logits_of_a_text_read_in_pieces(case: Case, tokens: int) -> None:
    model, token_ids = case.moss.model, case.token_ids
    starts = range(0, len(token_ids), tokens)
    case.check(np.concatenate([model.forward(token_ids[i : i + tokens], i, "all") for i in starts]))


def test_pieces_of_up_to_23_tokens_agree_bit_for_bit(case: Case) -> None:
    """So drafts, single steps and short prompts cannot disagree, whatever the weights."""
    model, token_ids = case.moss.model, case.token_ids
    actual = [
        np.concatenate([model.forward(token_ids[i : i + n], i, "all") for i in range(0, 69, n)])[:69]
        for n in (1, 3, 23)
    ]
    np.testing.assert_array_equal(actual[0], actual[1])
    np.testing.assert_array_equal(actual[0], actual[2])


def test_64_greedy_tokens(case: Case) -> None:
    assert case.expected["margin"] > 2 * TOLERANCE, "the oracle's own choice was too close to call"
    prompt = [int(token) for token in case.expected["prompt"]]
    generation = case.moss.generate(prompt, max_new_tokens=64, temperature=0)
    text = "".join(generation)
    assert generation.token_ids == case.expected["greedy"].tolist()
    assert generation.stats.stop_reason == "length"
    assert text == generation.text


@pytest.mark.parametrize("case", ["heads-8-inner"], indirect=True)
def test_the_portable_operators_compute_the_same(case: Case) -> None:
    """On one geometry: every new shape costs seconds of compiling."""
    moss = case.moss
    cache = KVCache(moss.config, 96)
    portable = Model(moss.config, PortableOperators(moss.config), moss.model.weights, cache, 96)
    case.check(portable.forward(case.token_ids, 0, "all"))


def loaded_operators() -> set[str]:
    """Files of compiled operators that this process has loaded: Jittor loads one for whatever it compiles."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if line.endswith(".so") and "/jit/" in line}


def test_decoding_compiles_nothing_and_keeps_weights_and_cache_where_they_are(case: Case) -> None:
    kv_cache = KVCache(case.moss.config, 96)
    loaded = case.moss.model
    model = Model(loaded.config, loaded.operators, loaded.weights, kv_cache, 96)
    block = next(iter(loaded.weights.blocks()))[1]
    assert isinstance(block.qkv, DenseMatrix)
    variables = {"keys": kv_cache.keys, "values": kv_cache.values, "qkv": block.qkv.weight}
    session = Text(Engine(model))
    session.extend(case.token_ids[:30])
    list(session.decode(SamplingParams(temperature=0), 5))
    gc.collect()  # of what other tests have left, nothing goes meanwhile
    before = loaded_operators(), jt.number_of_lived_vars(), {n: v.raw_ptr for n, v in variables.items()}
    assert before[0], "the operators themselves must be among them"
    list(session.decode(SamplingParams(temperature=0), 40))
    after = loaded_operators(), jt.number_of_lived_vars(), {n: v.raw_ptr for n, v in variables.items()}
    assert after == before
