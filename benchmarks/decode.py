"""Decoding with several model folders in one process, in turn, beside the read bandwidth of the same seconds.

    python benchmarks/decode.py MODEL-16 MODEL-8 MODEL-4 --rounds 7

A shared machine's bandwidth changes within minutes, so only what was measured side by side can be compared: in each
round every model decodes a few tokens, with the bandwidth taken just before and after. Shown are medians over rounds: of
the speed, of its share of that bandwidth, and of its ratio to the first model's speed in the same round.
"""

import argparse
import statistics
import time
from pathlib import Path

from moss_jt import Moss
from moss_jt.measure.cpu_limits import read_speed


def prompt_ids(length: int) -> list[int]:
    """Token ids as in our_worker.py, none of them special."""
    return [17 + (7919 * position) % 1900 for position in range(length)]


def token_bytes(moss: Moss, position: int) -> int:
    """What one token reads: the blocks, the head, and the cache as far as it is filled."""
    sizes = moss.plan.sizes
    return sum(sizes.block_bytes) + sizes.head_bytes + sizes.kv_cache_bytes(position)


def decode_seconds(moss: Moss, position: int, steps: int) -> float:
    """Median over ``steps`` single tokens from ``position`` on."""
    durations = []
    for step, token in enumerate(prompt_ids(steps)):
        begin = time.perf_counter()
        moss.model.forward([token], position + step, "last")
        durations.append(time.perf_counter() - begin)
    return statistics.median(durations)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--context", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="tokens of each model in each round")
    arguments = parser.parse_args()
    position, steps = arguments.context, arguments.steps
    models = [Moss.load(folder, context=position + steps + 8, draft="off") for folder in arguments.folders]
    for moss in models:
        moss.model.forward(prompt_ids(position), 0, "none")
        decode_seconds(moss, position, 2)
    seconds: list[list[float]] = [[] for _ in models]
    shares: list[list[float]] = [[] for _ in models]
    bandwidths = []
    for _ in range(arguments.rounds):
        for index, moss in enumerate(models):
            before = read_speed(2)
            seconds[index].append(decode_seconds(moss, position, steps))
            bandwidths.append(max(before, read_speed(2)))
            shares[index].append(token_bytes(moss, position) / seconds[index][-1] / bandwidths[-1])
    for folder, own, share in zip(arguments.folders, seconds, shares, strict=True):
        ratio = statistics.median(first / time_ for first, time_ in zip(seconds[0], own, strict=True))
        print(
            f"{folder.name}: {1 / statistics.median(own):.2f} tokens/s, {100 * statistics.median(share):.0f} % "
            f"of read bandwidth, {ratio:.2f} times {arguments.folders[0].name}"
        )
    print(f"read bandwidth {min(bandwidths) / 1e9:.0f} to {max(bandwidths) / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
