"""Many conversations at once: moss-jt beside llama.cpp's server, and beside the law of the machine's disk, memory and arithmetic.

    python benchmarks/serving.py MODEL --parallel 1,4,16 --peer-python PEER/bin/python --gguf /tmp/phi2-q4_0.gguf
    python benchmarks/serving.py MODEL --parallel 1,16 --memory 16GiB --group --context 500 --steps 4 --rounds 1

MODEL is a model folder with random or real weights; PEER is an environment with xllamacpp and gguf, whose model has the same
shape (phi2) and is made once, Q4_0 for an int4 folder and float16 for a float16 one. The rounds go through both in turn, so that
a noisy minute hits neither alone; medians over rounds. Every number of conversations has a process of its own, with a plan of
its own: what sixteen caches take is not there for weights. The law is what was measured between their passes:
reading memory, multiplying, and reading the weights that stream. --group holds it all in a memory control group of a tenth more
than --memory. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from memory_cgroup import forget_cached, memory_group, peak_of_group

from moss_jt.plan.machine import parse_memory, peak_memory_bytes, process_memory
from moss_jt.store.model_folder import Store, open_store

HERE = Path(__file__).resolve().parent
SHAPE = ("n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "vocab_size", "n_positions")
# What is read, and how long a request is, to see how fast the disk is.
READ_BYTES, REQUEST_BYTES = 2 << 30, 256 << 20
MEASURE = "limits"


class Limits:
    """What the machine gives, measured again and again beside what is being judged, and in another process.

    ``rows``: of the products.
    """

    def __init__(self, store: Store, streams: bool, rows: int) -> None:
        self._store = store
        self._streams = streams
        self._rows = rows
        self._next = 0

    def measure(self) -> tuple[float, float, float]:
        """Bytes per second from memory, operations per second, and bytes per second from the disk or 0."""
        from moss_jt.measure.cpu_limits import machine_limits

        limits = machine_limits(self._rows, self._store.config.n_embd, 2)
        return limits.read, limits.sgemm, self._disk_speed() if self._streams else 0.0

    def _disk_speed(self) -> float:
        """Bytes per second of reading blocks one after another, in the way that the ring reads them, and nothing else."""
        from moss_jt.store.locations import model_home
        from moss_jt.weights.disk_speed import reader_for
        from moss_jt.weights.file_reader import Extent
        from moss_jt.weights.page_buffer import page_buffer

        reader = reader_for(self._store, model_home())
        target = page_buffer(REQUEST_BYTES)
        target[::4096] = 1  # the memory itself must be there before the clock runs
        done, begin = 0, time.perf_counter()
        while done < READ_BYTES:
            file = self._store.blocks[self._next % len(self._store.blocks)]
            self._next += 1
            for offset in range(0, file.nbytes, REQUEST_BYTES):
                n_bytes = min(REQUEST_BYTES, file.nbytes - offset)
                reader.read(Extent(file.path, offset, n_bytes), target)
                done += n_bytes
        seconds = time.perf_counter() - begin
        reader.close()
        return done / seconds


def measure_here(arguments: argparse.Namespace) -> None:
    """One number of conversations, and one alone under the same plan, in this process: prints a row as JSON.

    Whenever the limits are to be measured, it prints a line, and goes on when it is given them.
    """
    from moss_jt import Moss
    from moss_jt.measure.cpu_limits import MachineLimits
    from moss_jt.measure.side_by_side import least_seconds, measure_together, positions_for

    limits: list[list[float]] = []

    def between() -> None:
        print(MEASURE, flush=True)
        limits.append(json.loads(input()))

    count, context = int(arguments.parallel), arguments.context
    options = {"memory": arguments.memory, "context": positions_for(context), "parallel": count}
    with Moss.load(arguments.model, draft="off", **options) as moss:
        together = measure_together(
            moss.engine, sorted({1, count}), context, moss.config.vocab_size, arguments.steps, between
        )
        plan, peak = moss.plan, peak_memory_bytes()
    read, sgemm, disk = (statistics.median(column) for column in zip(*limits, strict=True))
    law_s = least_seconds(count, context, plan, MachineLimits(read, sgemm), disk or None)
    row = {
        "conversations": count,
        "pass_s": together[-1].pass_s,
        "tok_s": together[-1].tokens_per_s,
        "alone_pass_s": together[0].pass_s,
        "law_share": law_s / together[-1].pass_s,
        "disk_gb_per_pass": plan.disk_bytes_per_pass / 1e9,
        "disk_gb_s": disk / 1e9,
        "read_gb_s": read / 1e9,
        "sgemm_gflop_s": sgemm / 1e9,
        "peak_gib": peak / 2**30,
    }
    print(json.dumps(row))


def ours(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    store = open_store(arguments.model)
    limits = Limits(store, arguments.memory is not None, max(count, 64))
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
            command = ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(group), *command]
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdin is not None and process.stdout is not None
        last = ""
        for last in process.stdout:
            if last.strip() == MEASURE:
                process.stdin.write(json.dumps(limits.measure()) + "\n")
                process.stdin.flush()
        if process.wait():
            raise SystemExit(f"moss-jt ended with {process.returncode}")
        group_peak, _ = peak_of_group(group)
    row: dict[str, float] = json.loads(last)
    return row | ({} if group_peak is None else {"group_gib": group_peak / 2**30})


def theirs(arguments: argparse.Namespace) -> dict[str, float]:
    store = open_store(arguments.model)
    shape = json.dumps({name: getattr(store.config, name) for name in SHAPE})
    command = [arguments.peer_python, str(HERE / "serving_peer.py"), str(arguments.gguf), "--shape", shape]
    command += ["--parallel", arguments.parallel, "--context", str(arguments.context)]
    command += ["--steps", str(arguments.steps)] + (["--float16"] if store.bits == 16 else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=peer_environment())
    speeds: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return speeds


def peer_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """llama.cpp's threads wait for each other some 700 times a token. Where they wait busily, a virtual machine may leave
    both on one processor, and a token takes seconds; asleep, they are spread, and it is several times as fast."""
    return {**environment, "OMP_WAIT_POLICY": "passive"}


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
        measure_here(arguments)
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
