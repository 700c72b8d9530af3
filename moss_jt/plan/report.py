"""A residency plan as text: what the memory is for, where each block lives, and what each link carries in what time."""

from collections.abc import Iterable
from dataclasses import dataclass

from moss_jt.plan.drafting import AGREEMENT, Outlook, outlook
from moss_jt.plan.residency import BITS_NAMES, ResidencyPlan, Tier, Unit, cache_text, gib

GB = 10**9

# What is assumed where nothing is measured or given, in GB/s: a SATA or cloud disk, two channels of DDR4 under two cores,
# PCIe 3 x16, and a card of the lower middle class. docs/memory.md says so beside its tables.
ASSUMED_DISK = 1.0
ASSUMED_MEMORY = 20.0
ASSUMED_GPU_MEMORY = 400.0
ASSUMED_LINK = 12.0


@dataclass(frozen=True)
class Speed:
    """Bytes per second of a link, and where the number is from: measured, given or assumed."""

    bytes_per_s: float
    source: str

    def __str__(self) -> str:
        return f"{self.bytes_per_s / GB:.2f} GB/s {self.source}"


@dataclass(frozen=True)
class Speeds:
    """The links of a plan; ``link`` is the one between host and GPU, ``memory`` the device's own."""

    disk: Speed
    memory: Speed
    link: Speed | None = None

    def seconds(self, plan: ResidencyPlan) -> float:
        """Of a token, at best: without a copy that of a pass, and with one what its drafts are expected to bring."""
        return self.outlook(plan).seconds_per_token

    def outlook(self, plan: ResidencyPlan, agreement: float = AGREEMENT) -> Outlook:
        link = None if self.link is None else self.link.bytes_per_s
        return outlook(plan, self.disk.bytes_per_s, self.memory.bytes_per_s, link, agreement)


def report(name: str, plan: ResidencyPlan, speeds: Speeds) -> str:
    """The text that moss-jt plan prints."""
    parts = [
        [_headline(name, plan)],
        _device_lines(plan),
        _host_lines(plan),
        _where(plan),
        _links(plan, speeds),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _headline(name: str, plan: ResidencyPlan) -> str:
    sizes = plan.sizes
    return (
        f"{name}, {BITS_NAMES[sizes.bits]}: {gib(sizes.weight_bytes)} of weights in {sizes.config.n_layer} blocks of "
        f"{gib(max(sizes.block_bytes))}, a head of {gib(sizes.head_bytes)} and an embedding of "
        f"{gib(sizes.embedding_bytes)}, which stays on disk"
    )


def _device_lines(plan: ResidencyPlan) -> list[str]:
    device = "RAM" if plan.host_budget_bytes is None else "GPU memory"
    rows = [
        (device, plan.budget_bytes, "the limit"),
        (
            "  process",
            plan.footprint_bytes,
            "Python, Jittor, tokenizer" if device == "RAM" else "CUDA, an allowance",
        ),
        ("  key/value cache", plan.kv_cache_bytes, cache_text(plan)),
        (
            "  workspace",
            plan.workspace_bytes + plan.sizes.small_bytes,
            f"passes of {plan.pass_tokens} tokens",
        ),
        ("  stream buffers", plan.ring_bytes, f"{plan.ring_buffers}"),
        ("  resident weights", plan.bytes_on("device"), ""),
        *_copy_row(plan),
        *([("  adapters", plan.adapter_bytes, "")] if plan.adapter_bytes else []),
        ("  at most", plan.peak_bytes, ""),
    ]
    return _rows(rows)


def _copy_row(plan: ResidencyPlan) -> list[tuple[str, int, str]]:
    if plan.copy is None:
        return []
    note = f"{BITS_NAMES[plan.copy.bits]}, writes drafts; the head is the model's"
    return [("  copy", plan.copy_bytes, note)]


def _host_lines(plan: ResidencyPlan) -> list[str]:
    if plan.host_budget_bytes is None:
        return []
    buffers = plan.host_ring_buffers
    rows = [
        ("Host memory", plan.host_budget_bytes, "the limit"),
        ("  process", plan.host_footprint_bytes, "Python, Jittor, CUDA's libraries, an allowance"),
        ("  stream buffers", buffers * plan.buffer_bytes, f"{buffers}"),
        ("  pinned weights", plan.bytes_on("host"), ""),
        ("  at most", plan.host_peak_bytes, ""),
    ]
    return _rows(rows)


def _rows(rows: Iterable[tuple[str, int, str]]) -> list[str]:
    return [f"{label:<20}{gib(n_bytes):>10}  {note}".rstrip() for label, n_bytes, note in rows]


def _where(plan: ResidencyPlan) -> list[str]:
    names: dict[Tier, str] = {"device": "RAM", "disk": "disk"}
    if plan.host_budget_bytes is not None:
        names = {"device": "GPU memory", "host": "host, pinned", "disk": "disk"}
    lines = [f"{'Lives in':<14}{'Size':>10}  Blocks, and rows of the head"]
    for tier, name in names.items():
        units = [unit for unit in plan.units if unit.tier == tier]
        if units:
            lines.append(f"{name:<14}{gib(sum(unit.n_bytes for unit in units)):>10}  {ranges_of(units)}")
    return lines


def ranges_of(units: Iterable[Unit]) -> str:
    """``0-3, 5, head 0-53503``: numbers of blocks and rows of the head, as ranges."""
    blocks = _ranges((unit.index, unit.index + 1) for unit in units if unit.kind == "block")
    rows = _ranges((unit.first_row, unit.last_row) for unit in units if unit.kind == "head")
    return "; ".join(part for part in (blocks, f"head {rows}" if rows else "") if part)


def number(value: float) -> str:
    """Two decimals, and more where these would say nothing."""
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    joined: list[tuple[int, int]] = []
    for first, end in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return ", ".join(f"{first}" if end == first + 1 else f"{first}-{end - 1}" for first, end in joined)


def _links(plan: ResidencyPlan, speeds: Speeds) -> list[str]:
    carried = [("disk", plan.disk_bytes_per_pass, speeds.disk)]
    if speeds.link is not None:
        carried.append(("host to GPU", plan.link_bytes_per_pass, speeds.link))
    device = "RAM" if speeds.link is None else "GPU memory"
    carried.append((device, plan.weight_bytes_per_pass, speeds.memory))
    lines = [f"{'Read from':<14}{'GB/token':>9}{'s/token':>9}  Speed"]
    for name, n_bytes, speed in carried:
        lines.append(f"{name:<14}{number(n_bytes / GB):>9}{number(n_bytes / speed.bytes_per_s):>9}  {speed}")
    expected = speeds.outlook(plan)
    if plan.copy is not None:
        return [*lines, *_draft_lines(plan, speeds)]
    seconds = number(expected.seconds_per_token)
    lines.append(f"At best {seconds} s per token: the links work side by side, and the slowest decides.")
    if plan.streams:
        lines.append("Prompt-lookup drafts can share one reading of the model between several tokens.")
    return lines


def _draft_lines(plan: ResidencyPlan, speeds: Speeds) -> list[str]:
    """What the copy brings, at several degrees of agreement."""
    lines = [
        f"The copy writes ahead, {plan.copy_bytes_per_pass / GB:.2f} GB of {'RAM' if speeds.link is None else 'GPU memory'} "
        "per token; a pass of the model verifies what it wrote. The text is the model's own.",
        "",
        f"{'Tokens alike':<14}{'drafted':>9}{'tokens/pass':>13}{'drafting s':>12}{'pass s':>9}{'s/token':>9}",
    ]
    for agreement in (0.85, AGREEMENT, 0.97):
        one = speeds.outlook(plan, agreement)
        lines.append(
            f"{agreement:<14.0%}{one.drafted:>9}{one.tokens:>13.1f}{number(one.drafting_s):>12}{number(one.pass_s):>9}"
            f"{number(one.seconds_per_token):>9}"
        )
    lines.append(f"Expected: {number(speeds.seconds(plan))} s per token.")
    return lines
