"""The computed tables of docs/memory.md and docs/cuda.md: python benchmarks/memory_tables.py prints them."""

from moss_jt.errors import MossError
from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.plan.placement import less_margin
from moss_jt.plan.report import (
    ASSUMED_DISK,
    ASSUMED_GPU_MEMORY,
    ASSUMED_LINK,
    ASSUMED_MEMORY,
    BITS_NAMES,
    GB,
    Speed,
    Speeds,
)
from moss_jt.plan.residency import Copy, ResidencyPlan, plan, plan_gpu
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.sizes import GIB, sizes_of_geometry

CONTEXT = MOSS_MOON_003.n_positions
CARDS = (6, 8, 12, 16, 24)
HOSTS = (16, 32, 64)
# Name, memory in GiB, and GB/s that it reads.
REAL_CARDS = (("RTX 3060", 12, 360), ("RTX 4090", 24, 1008), ("A100", 80, 2039))
BITS = (16, 8, 4)
DISKS = (1, 3, 7)  # GB/s: SATA or cloud, NVMe, fast NVMe
LINKS = (12, 25, 50)  # PCIe 3, 4, 5
# A machine's operating system and other programs want some, too: 2 GiB are left to them.
SYSTEM = 2
# Each thread that computes has memory of its own.
THREADS = 8


def speed(gigabytes: float) -> Speed:
    return Speed(gigabytes * GB, "assumed")


def cpu_plan(bits: int, context: int, budget: int, draft_bits: int | None = None) -> ResidencyPlan:
    """``draft_bits``: with a copy in so many that drafts."""
    sizes, needs, copy = sizes_of_geometry(MOSS_MOON_003, bits), CpuNeeds(MOSS_MOON_003, bits), None
    if draft_bits is not None:
        copy = Copy(sizes_of_geometry(MOSS_MOON_003, draft_bits), CpuNeeds(MOSS_MOON_003, draft_bits))
    return plan(sizes, needs, context, budget, threads=THREADS, copy=copy)


def card_plan(bits: int, context: int, card: int, ram: int) -> ResidencyPlan:
    """On a card of so many GiB as --gpu takes it by default, with so much RAM."""
    sizes, needs = sizes_of_geometry(MOSS_MOON_003, bits), CudaNeeds(MOSS_MOON_003, bits)
    return plan_gpu(sizes, needs, context, less_margin(card * GIB), ram * GIB)


def cpu_table() -> str:
    """RAM of the machine against weights: what is resident, what streams, and at best how long a token takes."""
    lines = [
        "| RAM | `--memory` | weights | resident | read from disk per token | s/token at least |",
        "|---|---|---|---|---|---|",
    ]
    speeds = Speeds(speed(ASSUMED_DISK), speed(ASSUMED_MEMORY))
    for ram in HOSTS:
        for bits in BITS:
            plan = cpu_plan(bits, CONTEXT, (ram - SYSTEM) * GIB)
            lines.append(
                f"| {ram} GiB | {ram - SYSTEM}GiB | {BITS_NAMES[bits]} | {share(plan)} | "
                f"{plan.disk_bytes_per_pass / GB:.1f} GB | {speeds.seconds(plan):.2f} |"
            )
    return "\n".join(lines)


def gpu_table() -> str:
    """Cards against host RAM: what is resident, what comes over the link and from disk, and the time at best."""
    rams = " / ".join(str(ram) for ram in HOSTS)
    lines = [
        f"| card | weights | on the card | over the link per token | from disk per token, {rams} GiB of RAM "
        f"| s/token at least, {rams} GiB |",
        "|---|---|---|---|---|---|",
    ]
    speeds = Speeds(speed(ASSUMED_DISK), speed(ASSUMED_GPU_MEMORY), speed(ASSUMED_LINK))
    for card in CARDS:
        for bits in BITS:
            plans = [card_plan(bits, CONTEXT, card, ram - SYSTEM) for ram in HOSTS]
            disk = " / ".join(f"{plan.disk_bytes_per_pass / GB:.1f}" for plan in plans)
            seconds = " / ".join(f"{speeds.seconds(plan):.2f}" for plan in plans)
            link = f"{plans[0].link_bytes_per_pass / GB:.1f} GB"
            lines.append(
                f"| {card} GiB | {BITS_NAMES[bits]} | {share(plans[0])} | {link} | {disk} GB | {seconds} |"
            )
    return "\n".join(lines)


def decode_table() -> str:
    """Cards that hold all of the model: tokens per second at most, at first and with a full cache, which is read, too."""
    names = " | ".join(BITS_NAMES[bits] for bits in sorted(BITS))
    lines = [f"| card | memory, bandwidth | {names} |", "|---|---|---|---|---|"]
    for name, memory, bandwidth in REAL_CARDS:
        cells = []
        for bits in sorted(BITS):
            needs = CudaNeeds(MOSS_MOON_003, bits)
            placed = plan_gpu(
                sizes_of_geometry(MOSS_MOON_003, bits), needs, CONTEXT, memory * GIB, HOSTS[-1] * GIB
            )
            first, last = placed.weight_bytes_per_pass, placed.weight_bytes_per_pass + placed.kv_cache_bytes
            rates = f"{bandwidth * GB / first:.0f} / {bandwidth * GB / last:.0f}"
            cells.append("streams" if placed.streams else rates)
        lines.append(f"| {name} | {memory} GB, {bandwidth} GB/s | {' | '.join(cells)} |")
    return "\n".join(lines)


def drafts_table() -> str:
    """What an int4 copy that drafts for the float16 model brings, by budget and link."""
    lines = [
        "| memory | link | s/token without | drafts of | tokens per pass | s/token with an int4 copy |",
        "|---|---|---|---|---|---|",
    ]
    sizes, copied = (sizes_of_geometry(MOSS_MOON_003, bits) for bits in (16, 4))
    for ram in (14, 16, 22, 30):
        plans = [cpu_plan(16, CONTEXT, ram * GIB, draft_bits) for draft_bits in (None, 4)]
        for disk in DISKS:
            speeds = Speeds(speed(disk), speed(ASSUMED_MEMORY))
            lines.append(_drafts_row(f"`--memory {ram}GiB`", f"disk, {disk:g} GB/s", plans, speeds))
    card_copy = Copy(copied, CudaNeeds(MOSS_MOON_003, 4))
    for card in (16, 24):
        limits = less_margin(card * GIB), (64 - SYSTEM) * GIB
        plans = [
            plan_gpu(sizes, CudaNeeds(MOSS_MOON_003, 16), CONTEXT, *limits, copy=one)
            for one in (None, card_copy)
        ]
        for link in LINKS:
            speeds = Speeds(speed(ASSUMED_DISK), speed(ASSUMED_GPU_MEMORY), speed(link))
            lines.append(_drafts_row(f"a card of {card} GiB", f"PCIe, {link:g} GB/s", plans, speeds))
    return "\n".join(lines)


def _drafts_row(memory: str, link: str, plans: list[ResidencyPlan], speeds: Speeds) -> str:
    without, drafted = (speeds.outlook(one) for one in plans)
    return (
        f"| {memory} | {link} | {without.seconds_per_token:.2f} | {drafted.drafted} | {drafted.tokens:.1f} | "
        f"{drafted.seconds_per_token:.2f} |"
    )


def smallest_table() -> str:
    """The smallest limits that work at all."""
    lines = ["| weights | smallest `--memory`, 2048 tokens | 512 tokens |", "|---|---|---|"]
    for bits in BITS:
        cells = [f"{smallest(bits, context) / GIB:.2f} GiB" for context in (2048, 512)]
        lines.append(f"| {BITS_NAMES[bits]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def smallest(bits: int, context: int) -> int:
    """The smallest budget, as a user would search it: by trying."""
    low, high = 0, 64 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            cpu_plan(bits, context, middle)
            high = middle
        except MossError:
            low = middle
    return high


def share(plan: ResidencyPlan) -> str:
    units = plan.weight_bytes_per_pass - plan.sizes.small_bytes
    return "everything" if not plan.streams else f"{100 * plan.bytes_on('device') / units:.0f} %"


TABLES = {
    "cpu": cpu_table,
    "gpu": gpu_table,
    "drafts": drafts_table,
    "smallest": smallest_table,
    "decode": decode_table,
}

if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"{name}\n{table()}\n")
