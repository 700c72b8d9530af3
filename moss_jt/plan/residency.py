"""Which weights stay in memory and which stream, from sizes and budgets alone. Pure arithmetic: no I/O, no clock.

The device is the memory that the operators compute in: RAM on the CPU, the card's memory on a GPU. Units (a block, or
a slab of the head's rows) that do not fit there stream through a ring of buffers on it: on the CPU from disk, on a GPU
from pinned host memory, and from disk what the host cannot hold either. What streams is fixed and spread evenly, so
that the link is busy all the time; a cache that forgets the least recently used would miss on every access of such a
cycle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from moss_jt.errors import MossError
from moss_jt.store.sizes import (
    CACHE_BITS,
    CACHE_PAGE,
    FOOTPRINT_BYTES,
    GIB,
    MIB,
    PASS_TOKENS,
    ModelSizes,
    page_aligned,
)

Tier = Literal["device", "host", "disk"]
BITS_NAMES = {16: "float16", 8: "int8", 4: "int4"}

# One buffer is computed with while the next is filled. More would only cost memory: the reader is never idle with two.
RING_BUFFERS = 2

# Tokens of a pass of a copy that drafts, at most: a draft by prompt lookup and the token before it, for each sequence.
DRAFT_ROWS = 64

# What the two allocators on a card, Jittor's and CuPy's, keep in fragments that fit nothing, and what Jittor's rounds each
# unit up to.
GPU_POOLS_BYTES = 64 * MIB
GPU_GRANULE_BYTES = 2 * MIB

# CUDA's context, the kernels' code and the libraries' own memory on the card: an allowance where no card has been asked, as in
# moss-jt plan. Where one computes, what they take is measured at its start.
GPU_FOOTPRINT_BYTES = 600 * MIB
# What a process holds on the host when it drives a GPU: as on the CPU, and CUDA's libraries. An allowance, too.
GPU_HOST_FOOTPRINT_BYTES = FOOTPRINT_BYTES + 700 * MIB


class CpuWorkspace(Protocol):
    """What the operators say that they need: moss_jt.kernels.needs.CpuNeeds."""

    def workspace_bytes(self, tokens: int, context: int, threads: int, parallel: int = ...) -> int: ...


class GpuWorkspace(Protocol):
    """The same on a GPU: moss_jt.kernels.needs.CudaNeeds."""

    def workspace_bytes(self, tokens: int) -> int: ...

    def short_pass_bytes(self, tokens: int, context: int) -> int: ...


class TooLittleError(MossError):
    """A budget is below the smallest that works; with a context of ``context`` tokens it would do, or with none where that is 0."""

    def __init__(self, text: str, context: int) -> None:
        super().__init__(text)
        self.context = context


class Copy(NamedTuple):
    """A copy of a model in fewer bits: its sizes, and what its operators need, of the kind that the plan is for."""

    sizes: ModelSizes
    needs: Any


@dataclass(frozen=True)
class Unit:
    """What is moved at once: block ``index``, or rows first_row .. last_row - 1 of the head."""

    kind: Literal["block", "head"]
    index: int
    n_bytes: int
    first_row: int = 0
    last_row: int = 0
    tier: Tier = "device"

    @property
    def resident(self) -> bool:
        return self.tier == "device"


@dataclass(frozen=True)
class ResidencyPlan:
    """Where every unit lives, in the order in which a pass needs them, and what the rest of the budget is for.

    ring_buffers is 0 where everything is resident. The host's fields are about a GPU's second tier only. The cache has room
    for ``parallel`` sequences of ``context`` tokens; more run at once when they are shorter. ``copy``: the same model in fewer
    bits, all of which is on the device, with the model's own head, to write drafts. Adapters are on the device, too.
    """

    sizes: ModelSizes
    context: int
    pass_tokens: int
    budget_bytes: int
    footprint_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    units: tuple[Unit, ...]
    ring_buffers: int
    buffer_bytes: int
    host_budget_bytes: int | None = None
    host_ring_buffers: int = 0
    host_footprint_bytes: int = 0
    parallel: int = 1
    copy: ModelSizes | None = None
    adapter_bytes: int = 0

    @property
    def streams(self) -> bool:
        return self.ring_buffers > 0

    @property
    def ring_bytes(self) -> int:
        return self.ring_buffers * self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that the plan lets the device hold at once; never above the budget."""
        fixed = self.footprint_bytes + self.kv_cache_bytes + self.workspace_bytes + self.sizes.small_bytes
        return fixed + self.ring_bytes + self.copy_bytes + self.adapter_bytes + self.bytes_on("device")

    @property
    def copy_bytes(self) -> int:
        """What the copy takes beside the head, which is the model's."""
        return 0 if self.copy is None else sum(self.copy.block_bytes) + self.copy.small_bytes

    @property
    def host_peak_bytes(self) -> int:
        """The most that a GPU plan lets the host hold at once."""
        return self.host_footprint_bytes + self.host_ring_buffers * self.buffer_bytes + self.bytes_on("host")

    def __str__(self) -> str:
        """In one line: the weights, where they are, and what of the limit is used at most."""
        sizes, device = self.sizes, "RAM" if self.host_budget_bytes is None else "GPU memory"
        by_home = {
            device: self.bytes_on("device"),
            "pinned RAM": self.bytes_on("host"),
            "disk": self.bytes_on("disk"),
        }
        where = ", ".join(f"{gib(n_bytes)} in {name}" for name, n_bytes in by_home.items() if n_bytes)
        each, copy = "token", ""
        if self.copy is not None:
            each, copy = "pass", f", {BITS_NAMES[self.copy.bits]} copy that drafts: {gib(self.copy_bytes)}"
        return (
            f"{BITS_NAMES[sizes.bits]}, {sizes.config.n_layer} blocks, {self.context} tokens; weights: "
            f"{where.replace('in disk', f'read from disk for every {each}')}{copy}; at most {gib(self.peak_bytes)} of "
            f"{gib(self.budget_bytes)} {device}"
        )

    @property
    def copy_bytes_per_pass(self) -> int:
        """Bytes that the operators read for a token that the copy writes."""
        return self.copy_bytes + (self.sizes.head_bytes if self.copy is not None else 0)

    def bytes_on(self, tier: Tier) -> int:
        return sum(unit.n_bytes for unit in self.units if unit.tier == tier)

    @property
    def disk_bytes_per_pass(self) -> int:
        return self.bytes_on("disk")

    @property
    def link_bytes_per_pass(self) -> int:
        """Bytes from the host to a GPU in each pass: what streams from the disk takes that way too. 0 on the CPU."""
        return 0 if self.host_budget_bytes is None else self.bytes_on("host") + self.bytes_on("disk")

    @property
    def weight_bytes_per_pass(self) -> int:
        """Bytes that the operators read in each pass, wherever they come from."""
        return sum(unit.n_bytes for unit in self.units) + self.sizes.small_bytes


def seconds_per_pass(
    plan: ResidencyPlan,
    disk_bytes_per_s: float,
    memory_bytes_per_s: float,
    link_bytes_per_s: float | None = None,
) -> float:
    """The least time that the links allow one pass: they work side by side, so the slowest decides.

    A pass is a token without drafts. ``memory_bytes_per_s`` is what the operators read from the device's own memory.
    """
    times = [plan.weight_bytes_per_pass / memory_bytes_per_s, plan.disk_bytes_per_pass / disk_bytes_per_s]
    if link_bytes_per_s is not None:
        times.append(plan.link_bytes_per_pass / link_bytes_per_s)
    return max(times)


def spread(count: int, total: int) -> set[int]:
    """``count`` of 0 .. total - 1, as evenly as whole numbers allow, the ends not favoured."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}


def plan(
    sizes: ModelSizes,
    needs: CpuWorkspace,
    context: int,
    budget_bytes: int,
    *,
    threads: int,
    pass_tokens: int = PASS_TOKENS,
    footprint_bytes: int = FOOTPRINT_BYTES,
    parallel: int = 1,
    copy: "Copy | None" = None,
    adapter_bytes: int = 0,
) -> ResidencyPlan:
    """A CPU plan: what is not resident streams from disk.

    Args:
        needs: of the operators that will compute.
        context: positions that one sequence has.
        budget_bytes: what the process may hold.
        threads: that compute: each has memory of its own.
        pass_tokens: the most new tokens that one pass takes.
        footprint_bytes: what the process holds without weights, cache and workspace.
        parallel: for so many sequences of that length the cache has room.
        copy: writes drafts, and must be resident.
        adapter_bytes: what the model's adapters take.

    Raises:
        MossError: the budget is below the smallest that works; the message names that one.
    """
    tokens = min(pass_tokens, context * parallel)
    workspace = needs.workspace_bytes(tokens, context, threads, parallel)
    if copy is not None:
        workspace += copy.needs.workspace_bytes(min(tokens, DRAFT_ROWS), context, threads, parallel)
    empty = _without_residents(sizes, context, budget_bytes, tokens, footprint_bytes, workspace, parallel)
    empty = replace(empty, adapter_bytes=adapter_bytes)
    return _choose_resident(_with_copy(empty, None if copy is None else copy.sizes), "--memory")


def smallest_bytes(sizes: ModelSizes, needs: CpuWorkspace, context: int, threads: int) -> int:
    """What the smallest CPU plan takes beside what the process holds itself."""
    tokens = min(PASS_TOKENS, context)
    workspace = needs.workspace_bytes(tokens, context, threads)
    empty = _without_residents(sizes, context, 0, tokens, 0, workspace)
    return min(empty.peak_bytes, _all_resident(empty).peak_bytes)


def plan_gpu(
    sizes: ModelSizes,
    needs: GpuWorkspace,
    context: int,
    device_budget_bytes: int,
    host_budget_bytes: int,
    *,
    pass_tokens: int = PASS_TOKENS,
    footprint_bytes: int = GPU_FOOTPRINT_BYTES,
    host_footprint_bytes: int = GPU_HOST_FOOTPRINT_BYTES,
    parallel: int = 1,
    copy: "Copy | None" = None,
    adapter_bytes: int = 0,
) -> ResidencyPlan:
    """A GPU plan: what is not resident streams from pinned host memory, and from disk where that is short too.

    Args:
        needs: of the operators that will compute.
        footprint_bytes: what CUDA and its libraries hold on the card.
        host_footprint_bytes: what the process holds on the host without weights.
        parallel: for so many sequences of ``context`` tokens the cache has room.
        copy: writes drafts, and must be on the card.
        adapter_bytes: what the model's adapters take there.

    Raises:
        MossError: a budget is below the smallest that works; the message names that one. Or the card's kernels cannot read such a
            cache.
    """
    if sizes.cache_bits == 8 and sizes.config.head_dim % 16:
        raise MossError(
            f"a cache in int8 needs heads of a multiple of 16 dimensions on a GPU, and this model's have {sizes.config.head_dim}. "
            "Leave --cache-bits at 16."
        )
    tokens = min(pass_tokens, context * parallel)
    units = len(sizes.block_bytes) + len(sizes.head_slabs())
    results = needs.workspace_bytes(tokens) + needs.short_pass_bytes(tokens, context)
    if copy is not None:
        rows = min(tokens, DRAFT_ROWS)
        units += len(copy.sizes.block_bytes)
        results += copy.needs.workspace_bytes(rows) + copy.needs.short_pass_bytes(rows, context)
    workspace = results + GPU_POOLS_BYTES + units * GPU_GRANULE_BYTES
    empty = _without_residents(
        sizes, context, device_budget_bytes, tokens, footprint_bytes, workspace, parallel
    )
    empty = replace(
        empty,
        host_budget_bytes=host_budget_bytes,
        host_footprint_bytes=host_footprint_bytes,
        adapter_bytes=adapter_bytes,
    )
    with_copy = _with_copy(empty, None if copy is None else copy.sizes)
    return _choose_on_host(_choose_resident(with_copy, "--gpu-memory"))


def _without_residents(
    sizes: ModelSizes,
    context: int,
    budget_bytes: int,
    tokens: int,
    footprint_bytes: int,
    workspace_bytes: int,
    parallel: int = 1,
) -> ResidencyPlan:
    """The plan of the smallest budget: everything streams."""
    if parallel < 1:
        raise MossError(f"room for {parallel} conversations is not possible. Give --parallel 1 or more.")
    if not 0 < context <= sizes.config.n_positions:
        raise MossError(
            f"a context of {context} tokens is not possible: this model has {sizes.config.n_positions} positions. "
            f"Give --context a number from 1 to {sizes.config.n_positions}."
        )
    blocks = [Unit("block", i, n, tier="disk") for i, n in enumerate(sizes.block_bytes)]
    slabs = [
        Unit("head", i, slab.n_bytes, slab.first_row, slab.last_row, tier="disk")
        for i, slab in enumerate(sizes.head_slabs())
    ]
    units = (*blocks, *slabs)
    return ResidencyPlan(
        sizes=sizes,
        context=context,
        pass_tokens=tokens,
        budget_bytes=budget_bytes,
        footprint_bytes=footprint_bytes,
        kv_cache_bytes=sizes.cache_bytes(context) * parallel,
        workspace_bytes=workspace_bytes,
        units=units,
        ring_buffers=RING_BUFFERS,
        buffer_bytes=page_aligned(max(unit.n_bytes for unit in units)),
        parallel=parallel,
    )


def _with_copy(empty: ResidencyPlan, copy: ModelSizes | None) -> ResidencyPlan:
    """The plan with a copy on the device, and the head, which both have."""
    if copy is None:
        return empty
    units = tuple(replace(unit, tier="device") if unit.kind == "head" else unit for unit in empty.units)
    return replace(empty, units=units, copy=copy)


def _choose_resident(empty: ResidencyPlan, flag: str) -> ResidencyPlan:
    """Make resident what fits: everything, without a ring, or else the spread that streams the fewest bytes."""
    everything = _all_resident(empty)
    if everything.peak_bytes <= empty.budget_bytes:
        return everything
    if empty.peak_bytes > empty.budget_bytes:
        raise _too_little(empty, min(empty.peak_bytes, everything.peak_bytes), flag)
    streamed = [number for number, unit in enumerate(empty.units) if not unit.resident]
    plans = (
        replace(empty, units=_on_device(empty.units, {streamed[i] for i in spread(count, len(streamed))}))
        for count in range(1, len(streamed) + 1)
    )
    fitting = [plan for plan in plans if plan.peak_bytes <= empty.budget_bytes]
    return max(fitting, key=lambda plan: plan.bytes_on("device"))


def _all_resident(empty: ResidencyPlan) -> ResidencyPlan:
    """Without a ring; then the head needs no slabs of a buffer's size."""
    sizes = empty.sizes
    head = Unit("head", 0, sizes.head_bytes, 0, sizes.config.vocab_size)
    units = (*_on_device([unit for unit in empty.units if unit.kind == "block"], set()), head)
    return replace(empty, units=units, ring_buffers=0, buffer_bytes=0)


def in_slabs(plan: ResidencyPlan) -> ResidencyPlan:
    """The same with the head in slabs, as where it streams: what is added up slab by slab is then the same bits in every plan."""
    if plan.streams:
        return plan
    blocks = [unit for unit in plan.units if unit.kind == "block"]
    slabs = [
        Unit("head", i, slab.n_bytes, slab.first_row, slab.last_row)
        for i, slab in enumerate(plan.sizes.head_slabs())
    ]
    return replace(plan, units=(*blocks, *slabs))


def residents_from(plan: ResidencyPlan, first: int) -> ResidencyPlan:
    """The same with as many residents as before or fewer bytes of them, of the head and the blocks from ``first`` on as far as
    these go: the blocks before are not always wanted.
    """
    if not plan.streams:
        return plan
    left = plan.budget_bytes - plan.peak_bytes + plan.bytes_on("device")
    often = [i for i, unit in enumerate(plan.units) if unit.kind == "head" or unit.index >= first]
    seldom = [i for i in range(len(plan.units)) if i not in set(often)]
    resident: set[int] = set()
    for group in (often, seldom):
        chosen = _most(plan.units, group, left)
        resident |= chosen
        left -= sum(plan.units[i].n_bytes for i in chosen)
        if len(chosen) < len(group):
            break
    units = tuple(
        replace(unit, tier="device" if i in resident else "disk") for i, unit in enumerate(plan.units)
    )
    moved = replace(plan, units=units)
    return moved if plan.host_budget_bytes is None else _choose_on_host(moved)


def _most(units: Sequence[Unit], group: Sequence[int], n_bytes: int) -> set[int]:
    """As many of a group as have room, evenly spread."""
    for count in range(len(group), 0, -1):
        chosen = {group[i] for i in spread(count, len(group))}
        if sum(units[i].n_bytes for i in chosen) <= n_bytes:
            return chosen
    return set()


def _on_device(units: Sequence[Unit], streamed: set[int]) -> tuple[Unit, ...]:
    return tuple(unit if i in streamed else replace(unit, tier="device") for i, unit in enumerate(units))


def _choose_on_host(plan: ResidencyPlan) -> ResidencyPlan:
    """Of the units that stream to a GPU, as many as fit into pinned host memory; the others come from disk."""
    streamed = [i for i, unit in enumerate(plan.units) if not unit.resident]
    budget = plan.host_budget_bytes or 0
    for count in range(len(streamed) + 1):
        on_disk = {streamed[i] for i in spread(count, len(streamed))} if count else set()
        units = tuple(
            unit if unit.resident or i in on_disk else replace(unit, tier="host")
            for i, unit in enumerate(plan.units)
        )
        chosen = replace(plan, units=units, host_ring_buffers=RING_BUFFERS if on_disk else 0)
        if chosen.host_peak_bytes <= budget:
            return chosen
    raise MossError(
        f"{gib(budget)} of host memory is too little to stream through: the process and "
        f"{RING_BUFFERS} buffers of {gib(plan.buffer_bytes)} need {gib_up(chosen.host_peak_bytes)}. "
        "Raise --host-memory, or use an int8 or int4 model."
    )


def _too_little(empty: ResidencyPlan, smallest: int, flag: str) -> TooLittleError:
    """What the budget was, what is needed and for what, and which two ways out there are."""
    per_token = empty.sizes.kv_cache_bytes(1) * empty.parallel
    fits = empty.context - -(-(smallest - empty.budget_bytes) // per_token)
    fits = fits // CACHE_PAGE * CACHE_PAGE  # the cache is pages
    fits = fits if fits >= 64 else 0
    copy = "" if empty.copy is None else f"{gib(empty.copy_bytes_per_pass)} for the copy that drafts, "
    adapters = f"{gib(empty.adapter_bytes)} for adapters, " if empty.adapter_bytes else ""
    context = f" or lower --context ({fits} tokens would fit)" if fits else ""
    bits = " or use an int8 or int4 model" if empty.sizes.bits == 16 else ""
    if empty.copy is not None:
        bits = ", or go without the copy that drafts (--draft-model off)"
    return TooLittleError(
        f"{gib(empty.budget_bytes)} is too little for this model: it needs at least {gib_up(smallest)} "
        f"({smallest} bytes): {gib(empty.footprint_bytes)} for the process, {gib(empty.kv_cache_bytes)} for the "
        f"key/value cache of {cache_text(empty)}, {gib(empty.workspace_bytes + empty.sizes.small_bytes)} of "
        f"workspace, {copy}{adapters}and {RING_BUFFERS} buffers for blocks. Raise {flag} to {gib_up(smallest)}{context}{bits}.",
        fits,
    )


def check_cache_bits(bits: int) -> None:
    """
    Raises:
        MossError: there is no cache of so many bits.
    """
    if bits not in CACHE_BITS:
        raise MossError(f"a cache of {bits!r:.20} bits is not possible. Give 16, or 8 for int8.")


def cache_text(plan: ResidencyPlan) -> str:
    """For how many tokens the cache is, and of what numbers where these are not float16."""
    times = "" if plan.parallel == 1 else f"{plan.parallel} times "
    return f"{times}{plan.context} tokens{' in int8' if plan.sizes.cache_bits == 8 else ''}"


def gib(n_bytes: int) -> str:
    """As people read it: GiB, below one MiB, and KiB where that would be nearly nothing."""
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    if n_bytes >= MIB:
        return f"{n_bytes / MIB:.{0 if n_bytes >= 100 * MIB else 1}f} MiB"
    return f"{n_bytes / 1024:.1f} KiB" if n_bytes else "nothing"


def gib_up(n_bytes: int) -> str:
    """Rounded up: a limit typed back as shown must not be too small."""
    return f"{-(-n_bytes * 100 // GIB) / 100:.2f} GiB" if n_bytes >= GIB else f"{-(-n_bytes // MIB)} MiB"
