"""On a real card, where there is one: the same tokens for every plan, the CPU's logits, and the limit kept. Skipped elsewhere.

The first run compiles Jittor for CUDA, for minutes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.gpu_requirements import require_gpu
from moss_jt.errors import MossError
from tests.support.gpu_runs import IN_INT8, STREAMED, SWAPPED, UNIFIED, Case, run_on_gpu
from tests.support.learned_on_card import LEARNER, check_learning
from tests.support.models import tiny_model_folder
from tests.support.random_models import SMALL, random_folder

pytestmark = pytest.mark.gpu
# One with a whole page, which is read by products of cuBLAS, and one that is read token by token.
PROMPTS = [list(range(3, 73)), [5, 9, 200, 31, 5, 9, 200, 77, 8, 5, 9]]


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    try:
        require_gpu()
    except MossError as error:
        pytest.skip(f"no GPU: {' '.join(str(error).split())}")


def answers_of(
    folder: Path, prompts: Sequence[list[int]], cache_bits: int = 16
) -> tuple[list[list[int]], np.ndarray]:
    """The CPU's tokens after these, and logits of the first of all."""
    with Moss.load(folder, memory="4GiB", context=96, cache_bits=cache_bits) as moss:
        tokens = []
        for prompt in prompts:
            answer = moss.generate(prompt, max_new_tokens=6, temperature=0)
            assert all(isinstance(piece, str) for piece in answer)
            tokens.append(answer.token_ids)
        return tokens, moss.logits(PROMPTS[0])


@pytest.mark.parametrize("cases", [STREAMED, [UNIFIED], [SWAPPED]], ids=["stream", "unified", "swap"])
def test_every_plan_gives_the_same_tokens_within_its_limit(cases: Sequence[Case]) -> None:
    folder = tiny_model_folder()
    tokens, logits = answers_of(folder, PROMPTS)
    for run in run_on_gpu(folder, cases, PROMPTS, {}):
        assert run.token_ids == tokens, run.case
        assert np.abs(run.logits - logits).max() < 2e-2 * np.abs(logits).max(), run.case
        assert run.used <= run.budget, "more of the card than its limit (or another program uses it)"


def test_a_cache_in_int8_gives_the_same_bits_for_every_plan_and_the_cpu_s_logits() -> None:
    folder = random_folder(SMALL)
    _, logits = answers_of(folder, [], 8)
    runs = run_on_gpu(folder, IN_INT8, PROMPTS, {})
    for run in runs:
        assert run.token_ids == runs[0].token_ids and run.used <= run.budget, run.case
        np.testing.assert_array_equal(run.logits, runs[0].logits, str(run.case))
        assert np.abs(run.logits - logits).max() < 2e-2 * np.abs(logits).max(), run.case


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_quantised_models_give_the_cpu_s_logits(bits: int) -> None:
    folder = random_folder(SMALL, bits)
    _, logits = answers_of(folder, [])
    for run in run_on_gpu(folder, [STREAMED[0], STREAMED[2]], [], {}, text=PROMPTS[0]):
        assert np.abs(run.logits - logits).max() < 2e-2 * np.abs(logits).max(), run.case


@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_learns_the_same_by_any_plan(bits: int, tmp_path: Path) -> None:
    check_learning(random_folder(LEARNER, bits), tmp_path, {}, ({}, {}, {}))
