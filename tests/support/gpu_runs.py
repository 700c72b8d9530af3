"""Runs of a model on a GPU in a process of its own, with plans of every kind: for a real card and for the simulated one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.placement import GPU_LATER_BYTES
from moss_jt.residency import plan_gpu
from moss_jt.sizes import sizes_of_store
from moss_jt.store import open_store

CONTEXT = 96

# The process counts as empty on the host, or its size today would decide what goes to disk.
PROGRAM = """
import json, sys
import numpy as np
from moss_jt import Moss, placement
placement.resident_memory_bytes = lambda: 0
folder, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = []
with Moss.load(folder, device="gpu", **options) as moss:
    for prompt in prompts:
        answer = moss.generate(prompt, max_new_tokens=12, temperature=0)
        for piece in answer:
            pass
        found.append(answer.token_ids)
    logits = moss.logits(prompts[0])
    import cupy
    free, total = cupy.cuda.runtime.memGetInfo()
    tiers = sorted({unit.tier for unit in moss.plan.units})
np.save(sys.argv[4], logits)
print(json.dumps({"token_ids": found, "tiers": tiers, "used": total - free, "budget": moss.plan.budget_bytes}))
"""


@dataclass(frozen=True)
class Case:
    """share: of the units, on the card; on_host: of the others, in pinned memory."""

    name: str
    share: float
    on_host: float = 1.0
    offload: str = "auto"
    draft: str = "off"


CASES = (
    Case("resident", 1),
    Case("half streams", 0.5),
    Case("everything streams", 0),
    Case("with drafts", 0, draft="lookup"),
    Case("the host is short", 0.3, 0.3),
    Case("everything from disk", 0, 0),
    Case("unified", 0.3, offload="unified"),
    Case("swap", 0.5, offload="swap"),
)


def options_of(folder: Path, case: Case) -> dict[str, Any]:
    """Options of Moss.load with which the plan is the case's."""
    sizes = sizes_of_store(open_store(folder))
    room = plan_gpu(sizes, CONTEXT, 1 << 40, 1 << 40)
    total = room.bytes_on("device")
    budget = room.peak_bytes
    if case.share < 1:
        # Jittor keeps what it frees in pieces that fit nothing: its swapping needs room for two more units.
        budget += 2 * max(sizes.block_bytes) - int((1 - case.share) * total)
    placed = plan_gpu(sizes, CONTEXT, budget, 1 << 40)
    host = GPU_LATER_BYTES + 2 * placed.buffer_bytes + int(case.on_host * placed.bytes_on("host"))
    if case.on_host == 1:
        host += total
    return {
        "gpu_memory": budget,
        "host_memory": host,
        "context": CONTEXT,
        "draft": case.draft,
        "offload": case.offload,
    }


def run_on_gpu(
    folder: Path,
    case: Case,
    prompts: list[list[int]],
    logits: Path,
    environment: dict[str, str],
    timeout: float = 500,
) -> dict[str, Any]:
    """What the program says; ``environment`` is added to this process's own."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("cache_name", "MOSS_JT_DEVICE")
    }
    arguments = [str(folder), json.dumps(options_of(folder, case)), json.dumps(prompts), str(logits)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**inherited, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_tiers(case: Case, tiers: list[str]) -> None:
    """That the plan was the case's: nobody wants to have tested the resident model eight times."""
    assert ("device" in tiers) == (case.share > 0), (case, tiers)
    assert (tiers != ["device"]) == (case.share < 1), (case, tiers)
    assert ("disk" in tiers) == (case.on_host < 1), (case, tiers)
