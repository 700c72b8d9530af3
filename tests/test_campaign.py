"""Thousands of damaged and hostile checkpoints and model folders, and killed conversions: refused in one line, or right.

A few hundred of each kind in `make test`; `make test-all` runs the numbers of docs/measurements.md. Each case follows from
its seed: MOSS_JT_CAMPAIGN_SEED=S begins there. Cases run in processes of their own, which may take 10 s and 1 GiB per case.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PER_PROCESS = 1000
FIRST = int(os.environ.get("MOSS_JT_CAMPAIGN_SEED", "0"))


def run_cases(kind: str, first: int, count: int) -> list[dict[str, object]]:
    """One process's cases."""
    command = [sys.executable, "-P", "-m", "tests.support.campaign_worker", kind, str(first), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    cases = [line for line in lines if "outcome" in line]
    if len(cases) < count:
        begun = lines[-1].get("begun") if lines else "none"
        cases.append(
            {
                "seed": begun,
                "outcome": "fault",
                "seconds": 0,
                "done": f"{done.returncode}: {done.stderr[-2000:]}",
            }
        )
    return cases


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("checkpoints", 300),
        ("folders", 200),
        ("kills", 20),
        pytest.param("checkpoints", 10_000, marks=pytest.mark.long),
        pytest.param("folders", 2_000, marks=pytest.mark.long),
        pytest.param("kills", 200, marks=pytest.mark.long),
    ],
)
def test_nothing_but_clean_refusals_and_right_answers(kind: str, count: int) -> None:
    print(f"{kind}: seeds {FIRST} to {FIRST + count - 1}")
    cases: list[dict[str, object]] = []
    for first in range(FIRST, FIRST + count, PER_PROCESS):
        cases += run_cases(kind, first, min(PER_PROCESS, FIRST + count - first))
    outcomes = collections.Counter(str(case["outcome"]) for case in cases)
    slowest = max(float(str(case["seconds"])) for case in cases)
    print(f"{kind}: {dict(outcomes)}, the slowest took {slowest:.2f} s")
    faults = [f"seed {case['seed']}: {case['done']}" for case in cases if case["outcome"] == "fault"]
    assert not faults, "\n".join(faults[:5])
    assert outcomes["right"] and (kind == "kills" or outcomes["refused"])
