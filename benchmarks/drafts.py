"""What a copy that drafts brings, against the same model without: in a memory control group, with a cold page cache.

    python benchmarks/random_model.py /data/small-int4 --geometry 2.8B --bits 4
    python benchmarks/agreeing_model.py /data/small-int4 /data/small --noise 0.06
    sudo python benchmarks/drafts.py /data/small /data/small-int4 --memory 2.8GB --limit 3GB --context 512 --disk-rate 1GB

Both ways greedy, from the same prompt, each in a process of its own; their tokens must be the same. Prompt lookup is off, so that
all drafts are the copy's. With drafts, more prompts follow, for the greedy text of random weights soon repeats itself. The disk is
measured before and after, by reading blocks one after another; --disk-rate holds it at a speed. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory_cgroup import NoGroup, disk_group, forget_cached, memory_group, run

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

PROMPT_TOKENS = 16
DISK_BYTES = 3 << 30


def prompt(number: int) -> list[int]:
    return [
        17 + (7919 * position) % 1900
        for position in range(number * PROMPT_TOKENS, (number + 1) * PROMPT_TOKENS)
    ]


@dataclass(frozen=True)
class WatchedPass:
    """So many tokens were drafted and written in it, and so many of the drafted ones judged, and right; what it took in all, and of
    that drafting and waiting for the disk.
    """

    drafted: int
    written: int
    judged: int
    right: int
    seconds: float
    drafting_s: float
    waiting_s: float


class WatchedPace(DraftPace):
    """Notes every pass."""

    def __init__(self, pace: DraftPace) -> None:
        super().__init__()
        self.passes, self.steps = pace.passes, pace.steps
        self.watched: list[WatchedPass] = []

    def watch(self, text: Text) -> None:
        """From now on passes are this text's."""
        self._text = text
        self._before = 0.0, 0.0, 0.0

    def learn(self, draft: Sequence[int], sure: Sequence[Sure], text: Sequence[int]) -> None:
        timing = self._text.timing
        now = timing.decode_s, timing.drafting_s, timing.link_s
        took = [after - before for after, before in zip(now, self._before, strict=True)]
        self._before = now
        right = [token == written for token, written in zip(draft, text, strict=False)]
        self.watched.append(WatchedPass(len(draft), len(text), len(right), sum(right), *took))
        super().learn(draft, sure, text)


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """One way: answers of so many tokens, with times of their passes and what the plan expects of it."""
    loading = {"memory": arguments.memory, "context": arguments.context, "prompt_cache": 0}
    drafts = arguments.way == "with"
    with Moss.load(arguments.model, draft_model=arguments.copy if drafts else "off", **loading) as moss:
        pace = None
        if moss.copy is not None:
            pace = moss.copy.pace = WatchedPace(moss.copy.pace)
        texts, seconds, tokens = [], 0.0, 0
        for number in range(arguments.prompts if drafts else 1):
            text = moss.session()
            text.drafter = None
            if pace is not None:
                pace.watch(text)
            text.extend(prompt(number))
            for _ in text.decode(
                SamplingParams(temperature=0), arguments.tokens if drafts else arguments.single
            ):
                pass
            texts.append(text.token_ids)
            seconds += text.timing.decode_s
            tokens += text.position - PROMPT_TOKENS - 1
        plan, memory = moss.plan, arguments.memory_speed
        result = {
            "load_s": moss.load_s,
            "first_s": text.timing.prefill_s,
            "texts": texts,
            "streamed": plan.disk_bytes_per_pass,
            "resident": plan.bytes_on("device"),
            "all_s_per_token": seconds / tokens,
        }
        if pace is None:
            waiting = text.timing.link_s / text.timing.passes
            promise = expected(plan, arguments.disk, memory, AGREEMENT)
            return result | {"s_per_token": seconds / tokens, "waiting_s": waiting, "expected": promise}
        counted = means(pace.watched[min(arguments.learning, len(pace.watched) - 1) :])
        return result | {
            **counted,
            "step_s": pace.steps.of(1),
            "pass_of_1_s": pace.passes.of(1),
            "pass_of_23_s": pace.passes.of(LONGEST + 1),
            "watched": [asdict(one) for one in pace.watched],
            "expected": expected(plan, arguments.disk, memory, counted["right"]),
        }


def means(passes: Sequence[WatchedPass]) -> dict[str, float]:
    """Of these passes, and the seconds per token that they wrote."""
    count, seconds, judged = (
        len(passes),
        sum(one.seconds for one in passes),
        sum(one.judged for one in passes),
    )
    return {
        "s_per_token": seconds / sum(one.written for one in passes),
        "passes": count,
        "judged": judged,
        "right": sum(one.right for one in passes) / judged,
        "pass_s": seconds / count,
        "drafting_s": sum(one.drafting_s for one in passes) / count,
        "waiting_s": sum(one.waiting_s for one in passes) / count,
        "drafted": sum(one.drafted for one in passes) / count,
        "written": sum(one.written for one in passes) / count,
    }


def expected(plan: ResidencyPlan, disk: float, memory: float, agreement: float) -> dict[str, float]:
    """What the plan says for this disk and this memory."""
    one = outlook(plan, disk, memory, None, agreement)
    return {**asdict(one), "s_per_token": one.seconds_per_token}


def disk_speed(folder: Path) -> float:
    """Bytes per second of some GB of blocks read one after another, cold, in the way that is fastest."""
    files = sorted(folder.glob("block-*.safetensors"))
    # One is read before the clock runs: after a rest a control group lets a tenth of a second's bytes through at once.
    first, *files = files[: 1 + max(1, DISK_BYTES // files[0].stat().st_size)]
    buffer = page_buffer(max(file.stat().st_size for file in [first, *files]))
    buffer[::4096] = 1
    best = 0.0
    for direct, in_flight in ((False, 1), (True, 1), (True, IN_FLIGHT)):
        forget_cached(folder)
        reader = FileReader(direct, 1e9, in_flight)
        reader.read(Extent(first, 0, first.stat().st_size), buffer)
        begin = time.perf_counter()
        for file in files:
            reader.read(Extent(file, 0, file.stat().st_size), buffer)
        best = max(best, sum(file.stat().st_size for file in files) / (time.perf_counter() - begin))
        reader.close()
    return best


def measure(
    way: str, arguments: argparse.Namespace, disk: float = 0.0, memory: float = 0.0
) -> dict[str, Any]:
    """One way, or the disk's speed, in a process and groups of its own."""
    for folder in (arguments.model, arguments.copy):
        forget_cached(folder)
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--way", way, "--disk", str(disk)]
    command += ["--memory-speed", str(memory)]
    with memory_group(parse_memory(arguments.limit, 0)) as group, held_disk(arguments) as disk_held:
        usage = run(command, group, disk=disk_held)
    if usage.exit_code != 0:
        sys.exit(f"{way} copy failed{', killed for memory' * usage.killed_for_memory}: {usage.errors[-500:]}")
    result: dict[str, Any] = json.loads(usage.output.strip().splitlines()[-1])
    return result | {"peak_process": usage.peak_process, "peak_group": usage.peak_group}


@contextmanager
def held_disk(arguments: argparse.Namespace) -> Iterator[Path | None]:
    """The group that holds the disk at the speed that was asked for, if any was."""
    if arguments.disk_rate is None:
        yield None
        return
    with disk_group(arguments.model, parse_memory(arguments.disk_rate, 0)) as group:
        yield group


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--memory", required=True, help="such as 2.8GB")
    parser.add_argument("--limit", required=True, help="of the control group")
    parser.add_argument(
        "--disk-rate", help="hold the disk at so much per second, such as 1GB; it must give more"
    )
    parser.add_argument("--context", type=int)
    parser.add_argument("--prompts", type=int, default=1, help="answers with drafts")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer with drafts")
    parser.add_argument("--single", type=int, default=5, help="of the answer without, two at least")
    parser.add_argument(
        "--learning",
        type=int,
        default=0,
        help="passes not counted, in which it is learned what this copy's confidence means: random weights never have any",
    )
    parser.add_argument("--way", choices=("with", "without", "disk"), help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--memory-speed", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.single < 2:
        parser.error("--single must be 2 or more: the first token of an answer comes with its prompt")
    if arguments.way:
        print(
            json.dumps({"speed": disk_speed(arguments.model)} if arguments.way == "disk" else work(arguments))
        )
        return
    # The speeds that are remembered are those of this call.
    with tempfile.TemporaryDirectory() as home:
        os.environ["MOSS_JT_HOME"] = home
        results = {}
        try:
            memory, speeds = memory_speed(Path(home)), [measure("disk", arguments)["speed"]]
            for way in ("without", "with"):
                results[way] = measure(way, arguments, speeds[0], memory)
            speeds.append(measure("disk", arguments)["speed"])
        except NoGroup as reason:
            sys.exit(f"{reason}. Run this as root.")
    report(results, speeds, memory)


def report(results: dict[str, dict[str, Any]], speeds: Sequence[float], memory: float) -> None:
    without, drafted = results["without"], results["with"]
    ids = without.pop("texts")[0], drafted.pop("texts")[0]
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
        f"tokens alike; {drafted['written']:.1f} tokens per pass, law {law:.1f}"
    )
    print(json.dumps({"disk_bytes_per_s": speeds, "memory_bytes_per_s": memory, **results}))


if __name__ == "__main__":
    main()
