"""Many conversations at once: moss-jt beside llama.cpp's server, and beside the law of the machine's disk, memory and arithmetic.

    python benchmarks/serving.py MODEL --parallel 1,4,16 --peer-python PEER/bin/python --gguf /tmp/phi2-q4_0.gguf
    python benchmarks/serving.py MODEL --parallel 1,16 --memory 16GiB --group --context 500 --steps 4 --rounds 1

MODEL is a model folder with random or real weights; PEER is an environment with xllamacpp and gguf, whose model has the same
shape (phi2) and is made once, Q4_0 for an int4 folder and float16 for a float16 one. The rounds go through both in turn, so that
a noisy minute hits neither alone; medians over rounds. Every number of conversations has a process of its own, with a plan of
its own: what sixteen caches take is not there for weights. The law is what the same process measured just before and after:
reading memory, multiplying, and reading the weights that stream. --group holds it all in a memory control group of a tenth more
than --memory. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memory_cgroup import forget_cached, memory_group, run

from moss_jt.plan.machine import parse_memory, peak_memory_bytes, process_memory
from moss_jt.store.model_folder import Store, open_store

HERE = Path(__file__).resolve().parent
SHAPE = ("n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "vocab_size", "n_positions")
# Blocks that are read to see how fast the disk is.
READ_BLOCKS = 6


def disk_speed(store: Store, blocks: range) -> float:
    """Bytes per second of reading whole blocks one after another, in the way that the ring reads them, and nothing else."""
    from moss_jt.store.locations import model_home
    from moss_jt.weights.disk_speed import reader_for
    from moss_jt.weights.file_reader import Extent
    from moss_jt.weights.page_buffer import page_buffer

    reader = reader_for(store, model_home())
    target = page_buffer(max(store.blocks[block].nbytes for block in blocks))
    target[::4096] = 1  # the memory itself must be there before the clock runs
    n_bytes, begin = 0, time.perf_counter()
    for block in blocks:
        file = store.blocks[block]
        reader.read(Extent(file.path, 0, file.nbytes // 4096 * 4096), target)
        n_bytes += file.nbytes // 4096 * 4096
    seconds = time.perf_counter() - begin
    reader.close()
    return n_bytes / seconds


def measure_here(arguments: argparse.Namespace) -> dict[str, float]:
    """One number of conversations, in this process."""
    from moss_jt import Moss
    from moss_jt.measure.cpu_limits import MachineLimits, machine_limits
    from moss_jt.measure.side_by_side import least_seconds, measure_together, positions_for

    count = int(arguments.parallel)
    store = open_store(arguments.model)
    streams = arguments.memory is not None
    before = disk_speed(store, range(READ_BLOCKS)) if streams else None
    with Moss.load(
        arguments.model,
        memory=arguments.memory,
        context=positions_for(arguments.context),
        draft="off",
        parallel=count,
    ) as moss:
        width, plan = moss.config.n_embd, moss.plan
        first = machine_limits(max(count, 64), width, 2) if not streams else None
        (found,) = measure_together(
            moss.engine, [count], arguments.context, moss.config.vocab_size, arguments.steps
        )
        peak = peak_memory_bytes()
    second = machine_limits(64, width, 2)
    limits = (
        second
        if first is None
        else MachineLimits((first.read + second.read) / 2, (first.sgemm + second.sgemm) / 2)
    )
    disk = None
    if before is not None:
        disk = (before + disk_speed(store, range(READ_BLOCKS, 2 * READ_BLOCKS))) / 2
    law_s = least_seconds(count, arguments.context, plan, limits, disk)
    return {
        "conversations": count,
        "pass_s": found.pass_s,
        "tok_s": found.tokens_per_s,
        "law_share": law_s / found.pass_s,
        "disk_gb_per_pass": plan.disk_bytes_per_pass / 1e9,
        "disk_gb_s": 0.0 if disk is None else disk / 1e9,
        "read_gb_s": limits.read / 1e9,
        "sgemm_gflop_s": limits.sgemm / 1e9,
        "peak_gib": peak / 2**30,
    }


def last_json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def ours(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    command = [sys.executable, str(HERE / "serving.py"), str(arguments.model), "--here"]
    command += ["--context", str(arguments.context), "--steps", str(arguments.steps)]
    command += ["--parallel", str(count)]
    command += ["--memory", arguments.memory] if arguments.memory else []
    with ExitStack() as stack:
        group = None
        if arguments.group:
            budget = parse_memory(arguments.memory, process_memory().total_bytes)
            group = stack.enter_context(memory_group(budget + budget // 10))
            forget_cached(arguments.model)
        usage = run(command, group)
    if usage.exit_code:
        raise SystemExit(f"moss-jt ended with {usage.exit_code}: {usage.errors[-2000:]}")
    found = last_json(usage.output)
    return found | ({} if usage.peak_group is None else {"group_gib": usage.peak_group / 2**30})


def theirs(arguments: argparse.Namespace) -> dict[str, float]:
    store = open_store(arguments.model)
    shape = json.dumps({name: getattr(store.config, name) for name in SHAPE})
    command = [arguments.peer_python, str(HERE / "serving_peer.py"), str(arguments.gguf), "--shape", shape]
    command += ["--parallel", arguments.parallel, "--context", str(arguments.context)]
    command += ["--steps", str(arguments.steps)] + (["--float16"] if store.bits == 16 else [])
    return last_json(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--parallel", default="1,4,16")
    parser.add_argument("--context", type=int, default=128, help="tokens of each conversation")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="moss-jt's limit; what does not fit streams")
    parser.add_argument("--group", action="store_true", help="enforce the limit; usually needs root")
    parser.add_argument("--peer-python", help="without it only moss-jt runs")
    parser.add_argument("--gguf", type=Path, help="the peer's model; written if it is not there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_here(arguments)))
        return
    counts = [int(count) for count in arguments.parallel.split(",")]
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(arguments.rounds):
        peer = theirs(arguments) if arguments.peer_python else {}
        for count in counts:
            row = ours(arguments, count)
            if str(count) in peer:
                row |= {"peer_tok_s": peer[str(count)], "ratio": row["tok_s"] / peer[str(count)]}
            rounds[count].append(row)
            print(json.dumps(row), file=sys.stderr)
    summary = {
        count: {name: statistics.median(entry[name] for entry in entries) for name in entries[0]}
        for count, entries in rounds.items()
    }
    alone = summary[min(summary)]["tok_s"] / min(summary)
    print("conversations  tokens/s  times one  s/token of each  of the law  llama.cpp  ratio")
    for count, row in summary.items():
        other = f"{row['peer_tok_s']:9.2f}  {row['ratio']:5.2f}" if "ratio" in row else ""
        print(
            f"{count:13}  {row['tok_s']:8.2f}  {row['tok_s'] / alone:9.2f}  {row['pass_s']:15.3f}  "
            f"{row['law_share']:10.0%}  {other}"
        )
    print(json.dumps({"model": arguments.model.name, "conversations": summary}))


if __name__ == "__main__":
    main()
