"""A streamed model says exactly what the resident one says, and a memory limit holds: seen from outside, and enforced."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory_cgroup import NoGroup, Usage, forget_cached, memory_group, run
from moss_jt import Moss
from moss_jt.backend.threads import compute_threads
from moss_jt.engine.warm_up import warm_up
from moss_jt.plan import placement
from moss_jt.plan.placement import LATER_BYTES
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from tests.support.plans import plan
from tests.support.random_models import SMALL, WIDE, random_folder

THREADS = compute_threads()
# What a process holds beside what the plan counts for the model.
PROCESS = 235 * MIB
# Few weights, and heads as large as MOSS's over as many positions.
MOSS_HEADS = replace(WIDE, n_positions=2048, n_embd=1024, n_head=4, n_inner=1024, n_layer=4)
PROMPT = [5, 9, 200, 31, 5, 9, 200, 77, 8, 5, 9]


def budget_for(folder: Path, context: int, share: float, threads: int = THREADS, parallel: int = 1) -> int:
    """Bytes with which about ``share`` of what could be resident is, in a process that holds nothing else yet."""
    sizes = sizes_of_store(open_store(folder))
    empty = plan(sizes, context, 1 << 40, threads=threads, parallel=parallel)
    fixed = empty.kv_cache_bytes + empty.workspace_bytes + sizes.small_bytes + 2 * max(sizes.block_bytes)
    return fixed + int(share * sum(sizes.block_bytes))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of its own, and compiled operators: a compiler's memory would count in a control group."""
    for bits in (16, 4):
        warm_up(bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def load(folder: Path, share: float | None, draft: str = "off") -> Moss:
    """share None: everything resident. The process counts as empty, or its size today would decide what streams."""
    budget = 4 << 30 if share is None else budget_for(folder, 96, share) + LATER_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "resident_memory_bytes", lambda: 0)
        patch.setattr(
            placement, "_held", []
        )  # nor what models of other tests in this process may come to hold
        return Moss.load(folder, memory=budget, context=96, draft=draft)


@pytest.mark.parametrize("bits", [16, 4])
def test_any_plan_gives_the_resident_model_s_bits(bits: int) -> None:
    folder = random_folder(SMALL, bits)
    with load(folder, None) as moss:
        assert not moss.plan.streams
        logits = moss.logits(PROMPT)
        long_logits = moss.logits(list(range(40)))
    for share in (0.5, 0.0):
        with load(folder, share) as moss:
            resident = sum(unit.resident for unit in moss.plan.units)
            assert moss.plan.streams and (resident > 0) == (share > 0)
            assert np.array_equal(moss.logits(PROMPT), logits)
            assert np.array_equal(moss.logits(list(range(40))), long_logits)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 4}])
def test_plans_and_drafts_never_change_the_answer(sampling: dict[str, float]) -> None:
    folder = random_folder(SMALL)
    answers = {}
    for share in (None, 0.5, 0.0):
        for draft in ("off", "lookup", "3"):
            with load(folder, share, draft) as moss:
                answer = moss.generate(PROMPT, max_new_tokens=40, **sampling)
                for _ in answer:
                    pass
                answers[share, draft] = answer.token_ids
    assert len(answers[None, "off"]) > 10
    assert len({tuple(tokens) for tokens in answers.values()}) == 1, answers


PROGRAM = """
import json, sys
from moss_jt import Moss
folder, memory, context, prompt = sys.argv[1], *map(int, sys.argv[2:])
with Moss.load(folder, memory=memory, context=context, draft="off") as moss:
    answer = moss.generate([i % 500 for i in range(prompt)], max_new_tokens=6, temperature=0)
    for piece in answer:
        pass
    streamed = moss.plan.disk_bytes_per_pass
print(json.dumps({"token_ids": answer.token_ids, "streamed": streamed}))
"""


def answer_within(
    folder: Path,
    budget: int,
    group: Path | None = None,
    context: int = 256,
    prompt: int = 200,
    program: str = PROGRAM,
) -> tuple[dict[str, object], Usage]:
    forget_cached(folder)
    command = [sys.executable, "-P", "-c", program, str(folder), str(budget), str(context), str(prompt)]
    usage = run(command, group, timeout_s=90)
    assert usage.exit_code == 0, usage.errors
    return json.loads(usage.output.splitlines()[-1]), usage


def test_the_limit_holds_from_start_to_exit() -> None:
    """Peak resident memory, watched from outside: below the limit for every share, and the answer stays the same."""
    folder = random_folder(WIDE)
    everything, _ = answer_within(folder, 2 << 30)
    assert everything["streamed"] == 0
    for share in (0.5, 0.0):
        budget = budget_for(folder, 256, share) + PROCESS
        answer, usage = answer_within(folder, budget)
        assert answer["token_ids"] == everything["token_ids"]
        assert 0 < int(str(answer["streamed"])) <= sum(sizes_of_store(open_store(folder)).block_bytes)
        assert usage.peak_process <= budget, f"{usage.peak_process / MIB:.0f} of {budget / MIB:.0f} MiB"


def test_a_control_group_s_limit_is_kept() -> None:
    """The kernel enforces the limit plus a tenth, page cache included: nothing is killed, the answer is complete."""
    folder = random_folder(WIDE)
    budget = budget_for(folder, 256, 0.0) + PROCESS
    try:
        with memory_group(budget + budget // 10) as group:
            answer, usage = answer_within(folder, budget, group)
    except NoGroup as reason:
        pytest.skip(str(reason))
    assert not usage.killed_for_memory and len(answer["token_ids"]) == 6  # type: ignore[arg-type]
    assert usage.peak_process <= budget


def test_the_limit_counts_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads on however few processors, each with scratch memory and buffers of oneDNN's of its own: they took 580 MiB."""
    folder, context = random_folder(MOSS_HEADS), MOSS_HEADS.n_positions
    budgets = {threads: budget_for(folder, context, 0.0, threads) + PROCESS for threads in (2, 16)}
    assert budgets[16] - budgets[2] > 14 * 3 * MIB
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    try:
        with memory_group(budgets[16] + budgets[16] // 10) as group:
            answer, usage = answer_within(folder, budgets[16], group, context, context - 8)
    except NoGroup:
        answer, usage = answer_within(folder, budgets[16], None, context, context - 8)
    assert not usage.killed_for_memory and len(answer["token_ids"]) == 6  # type: ignore[arg-type]
    assert usage.peak_process <= budgets[16], f"{usage.peak_process / MIB:.0f} MiB, {budgets}"


SIXTEEN = """
import json, sys
from moss_jt import Moss
folder, memory, *_ = sys.argv[1:]
prompts = [[(7 * place + 31 * number) % 4000 for place in range(60 + 9 * number)] for number in range(16)]
with Moss.load(folder, memory=int(memory), context=256, draft="off", parallel=4) as moss:
    answers = [answer.token_ids for answer in moss.generate_many(prompts, max_new_tokens=12, seed=3)]
    print(json.dumps({"answers": answers, "streamed": moss.plan.disk_bytes_per_pass, "passes": moss.engine.passes}))
"""


def test_the_limit_holds_with_sixteen_answers_at_once() -> None:
    """More than the cache has room for: some wait, and their pages with them; in a control group, where one can be made."""
    folder = random_folder(WIDE)
    everything, _ = answer_within(folder, 2 << 30, program=SIXTEEN)
    budget = budget_for(folder, 256, 0.2, parallel=4) + PROCESS
    try:
        with memory_group(budget + budget // 10) as group:
            actual, usage = answer_within(folder, budget, group, program=SIXTEEN)
    except NoGroup:
        actual, usage = answer_within(folder, budget, program=SIXTEEN)
    assert everything["streamed"] == 0 and int(str(actual["streamed"])) > 0
    assert actual["answers"] == everything["answers"] and len(actual["answers"]) == 16  # type: ignore[arg-type]
    assert int(str(actual["passes"])) < 16 * 12, "several share a pass"
    assert usage.peak_process <= budget, f"{usage.peak_process / MIB:.0f} of {budget / MIB:.0f} MiB"


def command_line(folder: Path, budget: int, tokens: int) -> list[str]:
    options = ["--memory", str(budget), "--context", "256", "--max-new-tokens", str(tokens), "--greedy"]
    return [
        sys.executable,
        "-P",
        "-m",
        "moss_jt",
        "generate",
        str(folder),
        "--prompt",
        "One two three",
        *options,
    ]


def test_two_processes_at_once_say_the_same() -> None:
    folder = random_folder(WIDE)
    command = [*command_line(folder, budget_for(folder, 256, 0.2) + PROCESS, 5), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=90)[0]) for process in both]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and answers[0]["new_tokens"] == 5


def test_ctrl_c_while_blocks_stream_stops_at_once() -> None:
    """Sent once text comes, so in the middle of reading ahead: exit code 130, nothing but a line on stderr."""
    folder = random_folder(WIDE)
    command = command_line(folder, budget_for(folder, 256, 0.2) + PROCESS, 250)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.decode().strip() == "moss-jt: stopped."
