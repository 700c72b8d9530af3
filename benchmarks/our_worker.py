"""moss-jt's side of the comparison: loads a model folder and times prefill and decode beside the machine's limits.

Prints one JSON object as peer_worker.py does, with shares: decode_share of the read bandwidth for the bytes that a token
reads (weights, and the cache as far as it is filled), prefill_share of sgemm's speed for the operations of the prompt.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from moss_jt import Moss
from moss_jt.measure.cpu_limits import MachineLimits, machine_limits


def prompt_ids(length: int) -> list[int]:
    """The same token ids for every engine, none of them special."""
    return [17 + (7919 * position) % 1900 for position in range(length)]


def matrix_weights(moss: Moss) -> int:
    """Weights of the blocks' matrices: what every token is multiplied by, the head apart."""
    config = moss.config
    return config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner)


def measure(moss: Moss, length: int, steps: int, limits: MachineLimits) -> dict[str, float]:
    """Prefill of ``length`` tokens with the first token's logits, then ``steps`` single tokens."""
    config, model = moss.config, moss.model
    ids = prompt_ids(length)
    begin = time.perf_counter()
    for start in range(0, length, model.pass_tokens):
        part = ids[start : start + model.pass_tokens]
        logits = model.forward(part, start, "last" if start + len(part) == length else "none")
    prefill_s = time.perf_counter() - begin
    durations = []
    for step in range(steps):
        token = int(logits[-1].argmax())
        begin = time.perf_counter()
        logits = model.forward([token], length + step, "last")
        durations.append(time.perf_counter() - begin)
    decode_s = statistics.median(durations)
    sizes = moss.plan.sizes
    cache = sizes.kv_cache_bytes(length + steps // 2)
    read_bytes = sum(sizes.block_bytes) + sizes.head_bytes + cache
    head = config.vocab_size * config.n_embd
    operations = 2 * (length * matrix_weights(moss) + head) + 2 * length**2 * config.n_embd * config.n_layer
    return {
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "decode_share": read_bytes / decode_s / limits.read,
        "prefill_share": operations / prefill_s / limits.sgemm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", default="32,256,1024")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with Moss.load(arguments.folder, context=max(contexts) + arguments.steps + 8, draft="off") as moss:
        before = machine_limits(256, moss.config.n_embd)
        measure(moss, contexts[0], 4, before)
        timings: dict[str, Any] = {
            str(length): measure(moss, length, arguments.steps, before) for length in contexts
        }
        after = machine_limits(256, moss.config.n_embd)
        load_s = moss.load_s
    # The machine's limit may change while we measure: the mean of both ends is what we are compared with.
    for timing in timings.values():
        timing["decode_share"] *= 2 * before.read / (before.read + after.read)
        timing["prefill_share"] *= 2 * before.sgemm / (before.sgemm + after.sgemm)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    limits = {
        "read_gb_s": (before.read + after.read) / 2e9,
        "sgemm_gflop_s": (before.sgemm + after.sgemm) / 2e9,
    }
    print(json.dumps({"load_s": load_s, "contexts": timings, "peak_gib": peak_gib, **limits}))


if __name__ == "__main__":
    main()
