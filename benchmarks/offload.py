"""Ways to run a model that is larger than memory, in the same memory control group: ours and its peers.

    sudo python benchmarks/offload.py 2.7B --work /data/offload --limit 2.2GB --peer-python PEER/bin/python

Writes a random CodeGen checkpoint (5.6 GB) and converts it, then runs each way in a process of its own, in a control
group with that limit, with a cold page cache. Also measures what the disk gives to plain sequential reads. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint import GEOMETRIES, write_checkpoint
from memory_cgroup import NoGroup, Usage, forget_cached, memory_group, run

from moss_jt.plan.machine import parse_memory
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.page_buffer import page_buffer

HERE = Path(__file__).resolve().parent
OURS = ("stream", "swap", "mmap")
PEERS = ("accelerate", "mmap")


def command_of(name: str, arguments: argparse.Namespace, limit: int) -> list[str]:
    engine, _, way = name.partition(" ")
    # Our limit counts the process and is a tenth below the group's; what a peer's runtime takes is left to it.
    options = ["--way", way, "--tokens", str(arguments.tokens)]
    if engine == "moss-jt":
        folder = arguments.work / f"{arguments.geometry}-moss-jt"
        memory = str(limit * 10 // 11)
        return [
            sys.executable,
            "-P",
            str(HERE / "offload_worker.py"),
            str(folder),
            "--memory",
            memory,
            *options,
        ]
    memory = str(limit - arguments.peer_runtime * 10**6)
    worker = [arguments.peer_python, str(HERE / "offload_peer.py"), str(arguments.work / arguments.geometry)]
    return [*worker, "--memory", memory, "--work", str(arguments.work), *options]


def measure(name: str, arguments: argparse.Namespace, limit: int) -> dict[str, Any]:
    """One run of one way: seconds per token after the first, peaks, or why it failed."""
    for folder in (arguments.work / arguments.geometry, arguments.work / f"{arguments.geometry}-moss-jt"):
        forget_cached(folder)
    with memory_group(limit) as group:
        usage = run(command_of(name, arguments, limit), group, timeout_s=arguments.timeout)
    if usage.exit_code != 0:
        print(f"{name} failed: {why(usage)}", file=sys.stderr, flush=True)
        return {"failed": why(usage)}
    result: dict[str, Any] = json.loads(usage.output.strip().splitlines()[-1])
    result["seconds_per_token"] = statistics.median(result.pop("times")[1:])
    result |= {"peak_process": usage.peak_process, "peak_group": usage.peak_group}
    return result


def why(usage: Usage) -> str:
    if usage.killed_for_memory:
        return "killed for memory"
    return (
        usage.errors.strip().splitlines()[-1][:200]
        if usage.errors.strip()
        else f"exit code {usage.exit_code}"
    )


def sequential_speed(folder: Path) -> float:
    """Bytes per second of reading every block once, one after the other, cold: the better of buffered and direct."""
    files = sorted(folder.glob("block-*.safetensors"))
    buffer = page_buffer(max(file.stat().st_size for file in files))
    buffer[::4096] = 1
    best = 0.0
    for direct in (False, True):
        forget_cached(folder)
        reader = FileReader(direct, 1e9)
        begin = time.perf_counter()
        for file in files:
            reader.read(Extent(file, 0, file.stat().st_size), buffer, lambda: False)
        best = max(best, sum(file.stat().st_size for file in files) / (time.perf_counter() - begin))
        reader.close()
    return best


def prepare(arguments: argparse.Namespace) -> Path:
    """Checkpoint and model folder, made once; returns the model folder."""
    checkpoint = arguments.work / arguments.geometry
    write_checkpoint(checkpoint, arguments.geometry)
    folder: Path = arguments.work / f"{arguments.geometry}-moss-jt"
    if not (folder / "manifest.json").exists():
        command = [sys.executable, "-P", "-m", "moss_jt", "convert", str(checkpoint), "--out", str(folder)]
        subprocess.run(command, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoint and its converted copy"
    )
    parser.add_argument("--limit", default="2.2GB", help="of the control group")
    parser.add_argument(
        "--peer-python", help="Python with torch, transformers and accelerate; without it only ours"
    )
    parser.add_argument(
        "--peer-runtime", type=int, default=700, help="MB of the limit that a peer's libraries get"
    )
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run")
    parser.add_argument(
        "--ways", help="only these, comma-separated, such as 'moss-jt stream,accelerate accelerate'"
    )
    arguments = parser.parse_args()
    limit = parse_memory(arguments.limit, 0)
    folder = prepare(arguments)
    names = [f"moss-jt {way}" for way in OURS]
    if arguments.peer_python:
        names += [f"transformers {way}" for way in PEERS]
    if arguments.ways:
        names = arguments.ways.split(",")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    speeds = []
    try:
        for _ in range(arguments.rounds):
            speeds.append(sequential_speed(folder))
            for name in names:
                results[name].append(measure(name, arguments, limit))
    except NoGroup as reason:
        sys.exit(f"{reason}. Run this as root.")
    report(results, statistics.median(speeds), limit)


def report(results: dict[str, list[dict[str, Any]]], disk: float, limit: int) -> None:
    print(f"group limit {limit / 1e9:.2f} GB, sequential reads {disk / 1e9:.2f} GB/s")
    for name, runs in results.items():
        good = [result for result in runs if "failed" not in result]
        if not good:
            print(f"{name:24} {runs[-1]['failed']}")
            continue
        seconds = statistics.median(result["seconds_per_token"] for result in good)
        peak = max(result["peak_process"] for result in good) / 1e9
        line = f"{name:24} {seconds:7.2f} s/token, {peak:.2f} GB at most"
        if name == "moss-jt stream":
            line += f", {100 * good[0]['streamed'] / disk / seconds:.0f} % of the sequential limit"
        print(line)
    print(json.dumps({"limit": limit, "disk_bytes_per_s": disk, "results": results}))


if __name__ == "__main__":
    main()
