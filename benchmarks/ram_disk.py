"""How fast a model computes with weights that stream from a RAM disk, beside what copying them would allow.

    cp -r /data/small /dev/shm/small
    python benchmarks/ram_disk.py /dev/shm/small --memory 2GB

In rounds, in turn, in one process: answers of a model that streams; the same, all resident, which is the computing alone;
all streamed bytes copied by two threads from the mapped files to buffers; the ring that reads disks, alone. Two processors that
never wait would need the time of the computing and that of the copying: that is what copying would allow. The last line is one
JSON object; medians of the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import open_store
from moss_jt.weights.disk_ring import Ring
from moss_jt.weights.disk_speed import DiskSpeed, disk_under, reader_for
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.unit_tensors import extent_of, map_unit

PROMPT = [17 + (7919 * position) % 1900 for position in range(16)]


def pass_seconds(text: Sequence, tokens: int) -> tuple[float, float]:
    """Of a pass of one token: all of it, and what of it was waiting for weights. One before it is not counted."""
    for _ in text.decode(SamplingParams(temperature=0), tokens + 1):
        pass
    return text.timing.decode_s / tokens, text.timing.link_s / tokens


class Copying:
    """Copies a plan's streamed units from the page cache to two buffers for each thread."""

    def __init__(self, model: Path, plan: ResidencyPlan, threads: int) -> None:
        store = open_store(model)
        units = [map_unit(store, unit) for unit in plan.units if not unit.resident]
        self._parts = [units[number::threads] for number in range(threads)]
        self._buffers = [[page_buffer(plan.buffer_bytes) for _ in range(2)] for _ in self._parts]
        self._pool = ThreadPoolExecutor(threads)

    def seconds(self) -> float:
        begin = time.perf_counter()
        list(self._pool.map(self._copy, self._parts, self._buffers))
        return time.perf_counter() - begin

    @staticmethod
    def _copy(units: list[np.ndarray], buffers: list[np.ndarray]) -> None:
        for number, unit in enumerate(units):
            np.copyto(buffers[number % 2][: len(unit)], unit)


def ring_seconds(ring: Ring, units: Iterable[int]) -> float:
    """Of a walk over the streamed units in which nothing is computed."""
    begin = time.perf_counter()
    for number in units:
        ring.take(number)
    ring.hand_back()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", required=True, help="such as 2GB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="of a round, each a pass")
    arguments = parser.parse_args()
    loading = {"draft": "off", "draft_model": "off", "context": arguments.context, "prompt_cache": 0}
    with (
        Moss.load(arguments.model, memory=arguments.memory, **loading) as streaming,
        Moss.load(arguments.model, **loading) as resident,
    ):
        plan = streaming.plan
        assert plan.streams and not resident.plan.streams, (
            "give --memory an amount that does not hold the weights"
        )
        texts = [moss.session() for moss in (streaming, resident)]
        for text in texts:
            text.extend(PROMPT)
            pass_seconds(text, 1)
        copying = Copying(arguments.model, plan, 2)
        copying.seconds()
        store = open_store(arguments.model)
        streamed = {n: extent_of(store, unit) for n, unit in enumerate(plan.units) if not unit.resident}
        ring = Ring(streamed, plan.ring_buffers, plan.buffer_bytes, reader_for(store, model_home()))
        rounds = []
        for _ in range(arguments.rounds):
            pass_s, waiting_s = pass_seconds(texts[0], arguments.tokens)
            computing_s, _ = pass_seconds(texts[1], arguments.tokens)
            rounds.append((pass_s, waiting_s, computing_s, copying.seconds(), ring_seconds(ring, streamed)))
        ring.close()
    report(plan.disk_bytes_per_pass, rounds, disk_under(store, model_home()))


def report(n_bytes: int, rounds: list[tuple[float, ...]], disk: DiskSpeed) -> None:
    names = ("pass_s", "waiting_s", "computing_s", "copying_s", "ring_s")
    result = {
        name: statistics.median(column) for name, column in zip(names, zip(*rounds, strict=True), strict=True)
    }
    allowed = [computing + copying for _, _, computing, copying, _ in rounds]
    shares = [least / one[0] for least, one in zip(allowed, rounds, strict=True)]
    result |= {
        "streamed": n_bytes,
        "delivered_bytes_per_s": n_bytes / result["pass_s"],
        "allowed_bytes_per_s": n_bytes / statistics.median(allowed),
        "share": statistics.median(shares),
        "reads": [disk.buffered, disk.direct, disk.several_buffered, disk.several_direct],
    }
    print(
        f"a pass over {n_bytes / 1e9:.2f} GB that stream {result['pass_s']:.3f} s, {result['waiting_s']:.3f} s of it waiting: "
        f"{result['delivered_bytes_per_s'] / 1e9:.2f} GB/s; computing alone {result['computing_s']:.3f} s, two threads' copying "
        f"alone {result['copying_s']:.3f} s: {result['allowed_bytes_per_s'] / 1e9:.2f} GB/s, of which that is "
        f"{100 * result['share']:.0f} %; the ring alone {n_bytes / result['ring_s'] / 1e9:.2f} GB/s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
