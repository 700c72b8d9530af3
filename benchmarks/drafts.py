"""What a copy that drafts brings, against the same model without: in a memory control group, with a cold page cache.

    python benchmarks/random_model.py /data/small-int4 --geometry 2.8B --bits 4
    python benchmarks/agreeing_model.py /data/small-int4 /data/small --noise 0.06
    sudo python benchmarks/drafts.py /data/small /data/small-int4 --memory 2.8GB --limit 3GB --context 512

Both ways greedy, from the same prompt, each in a process of its own; their tokens must be the same. Prompt lookup is off, so that
all drafts are the copy's. The disk is measured before and after, by reading blocks one after another. The last line is
one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory_cgroup import NoGroup, forget_cached, memory_group, run

from moss_jt import Moss
from moss_jt.engine.draft_length import DraftPace, Sure
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.measure.machine_speed import memory_speed
from moss_jt.plan.drafting import AGREEMENT, LONGEST, outlook, tokens_per_pass
from moss_jt.plan.machine import parse_memory
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.weights.disk_speed import IN_FLIGHT
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.page_buffer import page_buffer

PROMPT = [17 + (7919 * position) % 1900 for position in range(16)]
DISK_BYTES = 3 << 29


@dataclass(frozen=True)
class Moment:
    """The end of a pass: when, with so many tokens drafted and written in it, and what drafting and waiting took so far."""

    time: float
    drafted: int
    written: int
    drafting_s: float
    waiting_s: float


class WatchedPace(DraftPace):
    """Notes every pass, and whether a draft's first token, and any that was judged, was the model's."""

    def __init__(self, text: Text, pace: DraftPace) -> None:
        super().__init__()
        self.passes, self.steps = pace.passes, pace.steps
        self._text = text
        self.moments: list[Moment] = []
        self.first: list[bool] = []
        self.judged: list[bool] = []

    def learn(self, draft: Sequence[int], sure: Sequence[Sure], text: Sequence[int]) -> None:
        timing = self._text.timing
        moment = Moment(time.perf_counter(), len(draft), len(text), timing.drafting_s, timing.link_s)
        self.moments.append(moment)
        right = [token == written for token, written in zip(draft, text, strict=False)]
        self.first += right[:1]
        self.judged += right
        super().learn(draft, sure, text)


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """One way: an answer of so many tokens, with times of its passes and what the plan expects of it."""
    loading = {"memory": arguments.memory, "context": arguments.context, "prompt_cache": 0}
    drafts = arguments.way == "with"
    with Moss.load(arguments.model, draft_model=arguments.copy if drafts else "off", **loading) as moss:
        text, times = moss.session(), []
        text.drafter = None
        pace = None
        if moss.copy is not None:
            pace = moss.copy.pace = WatchedPace(text, moss.copy.pace)
        text.extend(PROMPT)
        begin = time.perf_counter()
        for _ in text.decode(SamplingParams(temperature=0), arguments.tokens if drafts else arguments.single):
            times.append(time.perf_counter() - begin)
        plan, memory = moss.plan, arguments.memory_speed
        result = {
            "load_s": moss.load_s,
            "first_s": times[0],
            "token_ids": text.token_ids,
            "streamed": plan.disk_bytes_per_pass,
            "resident": plan.bytes_on("device"),
        }
        if pace is None:
            seconds = (times[-1] - times[0]) / (len(times) - 1)
            waiting = text.timing.link_s / text.timing.passes
            promise = expected(plan, arguments.disk, memory, AGREEMENT)
            return result | {"s_per_token": seconds, "waiting_s": waiting, "expected": promise}
        right = statistics.mean(pace.judged)
        return result | {
            **passes(pace.moments[min(arguments.learning, len(pace.moments) - 2) :]),
            "all_s_per_token": (times[-1] - times[0]) / (len(times) - 1),
            "first_right": statistics.mean(pace.first),
            "right": right,
            "judged": len(pace.judged),
            "step_s": pace.steps.of(1),
            "pass_of_1_s": pace.passes.of(1),
            "pass_of_23_s": pace.passes.of(LONGEST + 1),
            "expected": expected(plan, arguments.disk, memory, right),
        }


def passes(moments: Sequence[Moment]) -> dict[str, float]:
    """Means over the passes after the first of these."""
    first, last, count = moments[0], moments[-1], len(moments) - 1
    tokens = sum(moment.written for moment in moments[1:])
    return {
        "s_per_token": (last.time - first.time) / tokens,
        "passes": count,
        "pass_s": (last.time - first.time) / count,
        "drafting_s": (last.drafting_s - first.drafting_s) / count,
        "waiting_s": (last.waiting_s - first.waiting_s) / count,
        "drafted": sum(moment.drafted for moment in moments[1:]) / count,
        "written": tokens / count,
    }


def expected(plan: ResidencyPlan, disk: float, memory: float, agreement: float) -> dict[str, float]:
    """What the plan says for this disk and this memory."""
    one = outlook(plan, disk, memory, None, agreement)
    return {**asdict(one), "s_per_token": one.seconds_per_token}


def disk_speed(folder: Path) -> float:
    """Bytes per second of some GB of blocks read one after another, cold, in the way that is fastest."""
    files = sorted(folder.glob("block-*.safetensors"))
    files = files[: max(1, DISK_BYTES // files[0].stat().st_size)]
    buffer = page_buffer(max(file.stat().st_size for file in files))
    buffer[::4096] = 1
    best = 0.0
    for direct, in_flight in ((False, 1), (True, 1), (True, IN_FLIGHT)):
        forget_cached(folder)
        reader = FileReader(direct, 1e9, in_flight)
        begin = time.perf_counter()
        for file in files:
            reader.read(Extent(file, 0, file.stat().st_size), buffer)
        best = max(best, sum(file.stat().st_size for file in files) / (time.perf_counter() - begin))
        reader.close()
    return best


def measure(way: str, arguments: argparse.Namespace, disk: float, memory: float) -> dict[str, Any]:
    """One way in a process and a group of its own."""
    for folder in (arguments.model, arguments.copy):
        forget_cached(folder)
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--way", way, "--disk", str(disk)]
    command += ["--memory-speed", str(memory)]
    with memory_group(parse_memory(arguments.limit, 0)) as group:
        usage = run(command, group)
    if usage.exit_code != 0:
        sys.exit(f"{way} copy failed{', killed for memory' * usage.killed_for_memory}: {usage.errors[-500:]}")
    result: dict[str, Any] = json.loads(usage.output.strip().splitlines()[-1])
    return result | {"peak_process": usage.peak_process, "peak_group": usage.peak_group}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--memory", required=True, help="such as 2.8GB")
    parser.add_argument("--limit", required=True, help="of the control group")
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="of the answer with drafts")
    parser.add_argument("--single", type=int, default=5, help="of the answer without")
    parser.add_argument(
        "--learning",
        type=int,
        default=8,
        help="passes not counted, in which it is learned what this copy's confidence means: random weights never have any",
    )
    parser.add_argument("--way", choices=("with", "without"), help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--memory-speed", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(work(arguments)))
        return
    # The speeds that are remembered are those of this call.
    with tempfile.TemporaryDirectory() as home:
        os.environ["MOSS_JT_HOME"] = home
        memory, speeds = memory_speed(Path(home)), [disk_speed(arguments.model)]
        results = {}
        try:
            for way in ("without", "with"):
                results[way] = measure(way, arguments, speeds[0], memory)
            speeds.append(disk_speed(arguments.model))
        except NoGroup as reason:
            sys.exit(f"{reason}. Run this as root.")
    report(results, speeds, memory)


def report(results: dict[str, dict[str, Any]], speeds: Sequence[float], memory: float) -> None:
    without, drafted = results["without"], results["with"]
    ids = without.pop("token_ids"), drafted.pop("token_ids")
    alike = min(map(len, ids))
    assert ids[0][:alike] == ids[1][:alike], "drafts have changed the text"
    print(f"memory {memory / 1e9:.1f} GB/s; disk GB/s:", ", ".join(f"{speed / 1e9:.2f}" for speed in speeds))
    for way, result in results.items():
        print(
            f"{way:8} a copy {result['s_per_token']:.3f} s/token, expected {result['expected']['s_per_token']:.3f}; "
            f"peak {result['peak_process'] / 2**30:.2f} GiB, group {(result['peak_group'] or 0) / 2**30:.2f} GiB"
        )
    law = tokens_per_pass(drafted["right"], round(drafted["drafted"]))
    print(
        f"{without['s_per_token'] / drafted['s_per_token']:.1f} times as fast; {drafted['right']:.3f} of {drafted['judged']} "
        f"tokens alike (first of drafts {drafted['first_right']:.3f}); {drafted['written']:.1f} tokens per pass, law {law:.1f}"
    )
    print(json.dumps({"disk_bytes_per_s": speeds, "memory_bytes_per_s": memory, **results}))


if __name__ == "__main__":
    main()
