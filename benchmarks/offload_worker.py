"""moss-jt in one of its ways to run in little memory, one process; prints one JSON object with seconds per token."""

import argparse
import json
import time
from pathlib import Path

from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plan import placement

PROMPT = [17 + (7919 * position) % 1900 for position in range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", choices=("stream", "swap", "mmap"), required=True)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.way == "mmap":
        # Plain maps of everything, and the kernel's page cache decides: what --memory exists to avoid.
        placement.memory_budget = lambda text: 1 << 40
    begin = time.perf_counter()
    offload = "swap" if arguments.way == "swap" else "stream"
    with Moss.load(
        arguments.folder, memory=arguments.memory, context=256, draft="off", offload=offload
    ) as moss:
        load_s = time.perf_counter() - begin
        session, times = moss.session(), []
        session.extend(PROMPT)
        begin = time.perf_counter()
        for _ in session.decode(SamplingParams(temperature=0), arguments.tokens):
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
        read = moss.plan.disk_bytes_per_pass
    print(json.dumps({"load_s": load_s, "times": times, "token_ids": session.token_ids, "streamed": read}))


if __name__ == "__main__":
    main()
