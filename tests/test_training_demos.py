"""The examples of training: a moss-tiny from nothing, and a habit that moss-tiny learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.demos import teach_sums

TRAINING = Path(__file__).resolve().parents[1] / "demos" / "moss-tiny-training"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(TRAINING / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_moss_tiny_from_nothing_is_the_same_from_the_same_seed(tmp_path: Path) -> None:
    def trained(name: str, seed: int) -> bytes:
        run("train.py", "--out", tmp_path / name, "--steps", 3, "--seed", seed)
        return (tmp_path / name / "model" / "block-00.safetensors").read_bytes()

    assert trained("one", 1) == trained("same", 1) != trained("other", 2)
    counts = run("evaluate.py", tmp_path / "one" / "model", "--count", 1)
    assert re.search(r"in all: commands \d of 4, answers \d of 4", counts)


@pytest.mark.long
def test_moss_tiny_learns_a_habit(tmp_path: Path) -> None:
    before, after = teach_sums.main([str(tmp_path)])
    assert before == 0 and after > teach_sums.ASKED // 2
