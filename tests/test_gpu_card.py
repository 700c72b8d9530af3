"""On a real card, where there is one: the same tokens for every plan, the CPU's logits, and the limit kept. Skipped elsewhere.

The first run compiles Jittor for CUDA, for minutes.
"""

from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.errors import MossError
from moss_jt.gpu import require_gpu
from tests.support.gpu_runs import CASES, Case, check_tiers, run_on_gpu
from tests.support.models import tiny_model_folder
from tests.support.random_models import SMALL, random_folder

pytestmark = pytest.mark.gpu
PROMPTS = [list(range(3, 40)), [5, 9, 200, 31, 5, 9, 200, 77, 8, 5, 9]]


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    try:
        require_gpu()
    except MossError as error:
        pytest.skip(f"no GPU: {' '.join(str(error).split())}")


def logits_of(folder: Path) -> tuple[list[list[int]], np.ndarray]:
    """The CPU's tokens and logits."""
    with Moss.load(folder, memory="4GiB", context=96) as moss:
        tokens = []
        for prompt in PROMPTS:
            answer = moss.generate(prompt, max_new_tokens=12, temperature=0)
            assert all(isinstance(piece, str) for piece in answer)
            tokens.append(answer.token_ids)
        return tokens, moss.logits(PROMPTS[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_plan_gives_the_same_tokens(case: Case, tmp_path: Path) -> None:
    folder = tiny_model_folder()
    tokens, logits = logits_of(folder)
    result = run_on_gpu(folder, case, PROMPTS, tmp_path / "logits.npy", {})
    check_tiers(case, result["tiers"])
    assert result["token_ids"] == tokens
    found = np.load(tmp_path / "logits.npy")
    assert np.abs(found - logits).max() < 2e-2 * np.abs(logits).max()
    assert result["used"] <= result["budget"], "more of the card than its limit (or another program uses it)"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_quantised_models_give_the_cpu_s_logits(bits: int, case: Case, tmp_path: Path) -> None:
    folder = random_folder(SMALL, bits)
    _, logits = logits_of(folder)
    run_on_gpu(folder, case, PROMPTS, tmp_path / "logits.npy", {})
    found = np.load(tmp_path / "logits.npy")
    assert np.abs(found - logits).max() < 2e-2 * np.abs(logits).max()
