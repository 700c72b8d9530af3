"""Runs of a model on a GPU in a process of its own, with plans of every kind: for a real card and for the simulated one."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from moss_jt.backend.device import DEVICE_SWITCH, MANAGED_SWITCH, SWAP_SWITCH
from moss_jt.plan.placement import GPU_LATER_BYTES
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import sizes_of_store
from tests.support.plans import plan_gpu

CONTEXT = 96
GPU_HOME = "MOSS_JT_TEST_GPU_HOME"  # where Jittor's builds for a GPU are, if not with the others
ROOT = Path(__file__).resolve().parents[2]

# The process counts as empty on the host, or its size today would decide what goes to disk.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from moss_jt import Moss
from moss_jt.plan import placement
placement.resident_memory_bytes = lambda: 0
sys.path.append(sys.argv[5])
from tests.support.gpu_runs import CONTEXT, Case, options_of
folder, cases, (prompts, text), out = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
cases = [Case(**case) for case in cases]
with Moss.load(folder, device="gpu", context=CONTEXT, offload=cases[0].offload, cache_bits=cases[0].cache_bits) as moss:
    footprint = moss.plan.footprint_bytes
for number, case in enumerate(cases):
    options = options_of(Path(folder), case, footprint)
    with Moss.load(folder, device="gpu", **options) as moss:
        tokens = []
        for prompt in prompts:
            answer = moss.generate(prompt, max_new_tokens=6, temperature=0)
            assert all(isinstance(piece, str) for piece in answer)
            tokens.append(answer.token_ids)
        np.save(out / f"{number}.npy", moss.logits(text))
        import cupy
        free, total = cupy.cuda.runtime.memGetInfo()
        tiers = sorted({unit.tier for unit in moss.plan.units})
        used = {"used": total - free, "budget": moss.plan.budget_bytes}
    print(json.dumps({"token_ids": tokens, "tiers": tiers, **used}))
"""


@dataclass(frozen=True)
class Case:
    """share: of the units, on the card; on_host: of the others, in pinned memory."""

    name: str
    share: float
    on_host: float = 1.0
    offload: str = "auto"
    draft: str = "off"
    cache_bits: int = 16


STREAMED = (
    Case("resident", 1),
    Case("half streams", 0.5),
    Case("everything streams", 0),
    Case("with drafts", 0, draft="lookup"),
    Case("the host is short", 0.3, 0.3),
    Case("everything from disk", 0, 0),
)
IN_INT8 = tuple(
    replace(case, name=f"{case.name}, cache in int8", cache_bits=8) for case in (*STREAMED[:4:3], STREAMED[5])
)
UNIFIED = Case("unified", 0.3, offload="unified")
SWAPPED = Case("swap", 0.5, offload="swap")


def options_of(folder: Path, case: Case, footprint: int) -> dict[str, Any]:
    """Options of Moss.load with which the plan is the case's, where CUDA takes ``footprint`` bytes."""
    sizes = sizes_of_store(open_store(folder), case.cache_bits)
    everything = plan_gpu(sizes, CONTEXT, 1 << 40, 1 << 40, footprint_bytes=footprint)
    total = everything.bytes_on("device")
    budget = everything.peak_bytes
    if case.share < 1:
        # Jittor keeps what it frees in pieces that fit nothing: its swapping needs room for two more units.
        budget += 2 * max(sizes.block_bytes) - int((1 - case.share) * total)
    placed = plan_gpu(sizes, CONTEXT, budget, 1 << 40, footprint_bytes=footprint)
    host = GPU_LATER_BYTES + 2 * placed.buffer_bytes + int(case.on_host * placed.bytes_on("host"))
    if case.on_host == 1:
        host += total
    return {
        "gpu_memory": budget,
        "host_memory": host,
        "context": CONTEXT,
        "draft": case.draft,
        "offload": case.offload,
        "cache_bits": case.cache_bits,
    }


@dataclass(frozen=True)
class Run:
    """What a model said in one case: greedy tokens after each prompt, and the logits (T, V) of a text.

    used: bytes of the card that were taken while it was loaded, by anybody.
    """

    case: Case
    token_ids: list[list[int]]
    logits: np.ndarray
    tiers: list[str]
    used: int
    budget: int


def run_on_gpu(
    folder: Path,
    cases: Sequence[Case],
    prompts: list[list[int]],
    environment: dict[str, str],
    timeout: float = 3000,
    text: list[int] | None = None,
) -> list[Run]:
    """The cases, of one way to offload, one after the other in a process; ``environment`` is added to this process's own.

    Args:
        text: of which there are logits; by default the first prompt.
    """
    asked = json.dumps([asdict(case) for case in cases])
    with TemporaryDirectory() as out:
        arguments = [str(folder), asked, json.dumps([prompts, text or prompts[0]]), out, str(ROOT)]
        done = run_python(PROGRAM, arguments, environment, timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        runs = [
            Run(case, logits=np.load(Path(out) / f"{number}.npy"), **result)
            for number, (case, result) in enumerate(zip(cases, said, strict=True))
        ]
    for run in runs:
        check_tiers(run.case, run.tiers)
    return runs


def run_python(
    program: str, arguments: Sequence[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """A program in a process that decides for itself where Jittor computes."""
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment_with(environment),
        check=False,
    )


def environment_with(more: dict[str, str]) -> dict[str, str]:
    """This process's environment, without what Jittor was started with here."""
    decided = ("cache_name", "nvcc_path", "JITTOR_HOME", DEVICE_SWITCH, SWAP_SWITCH, MANAGED_SWITCH)
    kept = {key: value for key, value in os.environ.items() if key not in decided}
    home = {"HOME": os.environ[GPU_HOME]} if GPU_HOME in os.environ else {}
    return {**kept, **home, **more}


def check_tiers(case: Case, tiers: list[str]) -> None:
    """That the plan was the case's: nobody wants to have tested the resident model eight times."""
    assert ("device" in tiers) == (case.share > 0), (case, tiers)
    assert (tiers != ["device"]) == (case.share < 1), (case, tiers)
    assert ("disk" in tiers) == (case.on_host < 1), (case, tiers)
