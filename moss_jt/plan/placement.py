"""The plan for this process and this machine: the one module where the arithmetic of residency meets measured memory."""

import contextlib
import weakref
from dataclasses import dataclass

from moss_jt.backend.cards import Card
from moss_jt.backend.device import Offload
from moss_jt.backend.threads import compute_threads
from moss_jt.errors import MossError
from moss_jt.plan.machine import memory_budget, parse_memory, process_memory, resident_memory_bytes
from moss_jt.plan.residency import (
    GPU_FOOTPRINT_BYTES,
    Copy,
    CpuWorkspace,
    GpuWorkspace,
    ResidencyPlan,
    gib,
    gib_up,
    plan,
    plan_gpu,
)
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import MIB, sizes_of_store

# What a process grows by after its tokenizer is there, beside weights, cache and workspace: Jittor, compiled operators,
# oneDNN (45 MiB), the plugins' libraries (30 MiB), sampling, and a reserve for what differs between machines.
LATER_BYTES = 120 * MIB
# The same on a GPU: CUDA's libraries beside it, CuPy, and the buffers through which weights are loaded. An allowance.
GPU_LATER_BYTES = LATER_BYTES + 800 * MIB
# On the card, after CUDA has started: cuBLAS loads a kernel when its shape first comes. An allowance.
CUDA_LATER_BYTES = 64 * MIB

# Plans of the models that this process has loaded: what they may still come to hold is no other's.
_held: list[weakref.ref[ResidencyPlan]] = []


def hold(plan: ResidencyPlan) -> None:
    """Count this plan's memory as taken, until :func:`release`, or until its model is dropped."""
    _held.append(weakref.ref(plan))


def release(plan: ResidencyPlan) -> None:
    """Its model is closed."""
    _held[:] = [other for other in _held if other() not in (None, plan)]


def footprint_here(later_bytes: int = LATER_BYTES) -> int:
    """What this process holds or may come to hold beside the weights, cache and workspace of a model that is now planned.

    A loaded model's cache and workspace are not in the process's size before they were used, so its plan counts.
    """
    plans = [plan for held in _held if (plan := held()) is not None]
    promised = sum(
        plan.peak_bytes - plan.footprint_bytes
        if plan.host_budget_bytes is None
        else plan.host_peak_bytes - plan.host_footprint_bytes
        for plan in plans
    )
    first = max((plan.host_footprint_bytes or plan.footprint_bytes for plan in plans), default=0)
    return max(resident_memory_bytes() + later_bytes, first + promised)


def plan_here(
    store: Store,
    needs: CpuWorkspace,
    memory: str | int | None,
    context: int | None,
    parallel: int = 1,
    copy: Copy | None = None,
    adapter_bytes: int = 0,
    cache_bits: int = 16,
) -> ResidencyPlan:
    """The plan for this process, which counts what it holds already; call it once the tokenizer is there.

    Args:
        needs: of the operators that will compute.
        memory: the limit of the process, as users write it; None for what is free less a margin.
        context: tokens of the conversation; None for what the model has.
        parallel: for so many conversations the cache has room.
        copy: writes drafts, and must be resident.
        adapter_bytes: what the model's adapters take.
        cache_bits: of keys and values.

    Raises:
        MossError: the limit is none, or too small; the message names the smallest that works.
    """
    budget = memory_budget(memory)
    context = store.config.n_positions if context is None else context
    return plan(
        sizes_of_store(store, cache_bits),
        needs,
        context,
        budget,
        threads=compute_threads(),
        footprint_bytes=footprint_here(),
        parallel=parallel,
        copy=copy,
        adapter_bytes=adapter_bytes,
    )


@dataclass(frozen=True)
class StartedCard:
    """A card on which this process computes: what is free there now, and what CUDA and its libraries took when they started."""

    free_bytes: int
    taken_bytes: int


@dataclass(frozen=True)
class GpuPlanner:
    """The same on the machine's GPU, once before anything starts there and again when it is known what that took.

    gpu_memory  the limit of what the process may hold on the card; None for what is free there less a margin
    copy        writes drafts, and must be on the card
    adapter_bytes  what the model's adapters take there
    cache_bits  of keys and values
    """

    store: Store
    needs: GpuWorkspace
    card: Card
    gpu_memory: str | int | None
    host_budget_bytes: int
    host_footprint_bytes: int
    context: int
    offload: Offload
    parallel: int = 1
    copy: Copy | None = None
    adapter_bytes: int = 0
    cache_bits: int = 16

    def plan(self) -> ResidencyPlan:
        """Before CUDA starts: what it takes is an allowance, and counts for nothing where that would refuse a plan.

        Raises:
            MossError: a limit is none, or too small; the message names the smallest that works.
        """
        budget = gpu_budget(self.gpu_memory, self.card)
        try:
            return self._plan(budget, GPU_FOOTPRINT_BYTES)
        except MossError:
            with contextlib.suppress(MossError):
                return self._plan(budget, 0)
            raise

    def plan_again(self, started: StartedCard, at_most: int | None = None) -> ResidencyPlan:
        """With what was measured on the card.

        Args:
            at_most: a smaller limit than the user's.

        Raises:
            MossError: as :meth:`plan`.
        """
        free_bytes = started.free_bytes + started.taken_bytes
        budget = (
            less_margin(free_bytes) if self.gpu_memory is None else gpu_budget(self.gpu_memory, self.card)
        )
        footprint = started.taken_bytes + CUDA_LATER_BYTES
        return self._plan(budget if at_most is None else min(budget, at_most), footprint)

    def _plan(self, budget: int, footprint: int) -> ResidencyPlan:
        plan = plan_gpu(
            sizes_of_store(self.store, self.cache_bits),
            self.needs,
            self.context,
            budget,
            self.host_budget_bytes,
            footprint_bytes=footprint,
            host_footprint_bytes=self.host_footprint_bytes,
            parallel=self.parallel,
            copy=self.copy,
            adapter_bytes=self.adapter_bytes,
        )
        if self.offload != "stream":
            _check_host(plan, self.offload)
        return plan


def gpu_planner(
    store: Store,
    needs: GpuWorkspace,
    card: Card,
    gpu_memory: str | int | None,
    host_memory: str | int | None,
    context: int | None,
    offload: Offload,
    parallel: int = 1,
    adapter_bytes: int = 0,
    cache_bits: int = 16,
) -> GpuPlanner:
    """For this process, which counts what it holds on the host already.

    Args:
        host_memory: the limit in RAM; None for what is free less a margin.
        adapter_bytes: what the model's adapters take on the card, and on the host, from where they are copied.
        cache_bits: of keys and values.

    Raises:
        MossError: a limit is none, or the card cannot do what ``offload`` needs.
    """
    if offload == "unified" and not card.unified:
        raise MossError(
            f"{card.name} cannot share managed memory with the host here (WSL and Windows' drivers do not). Use --offload stream."
        )
    context = store.config.n_positions if context is None else context
    footprint = footprint_here(GPU_LATER_BYTES) + adapter_bytes
    budget = memory_budget(host_memory)
    return GpuPlanner(
        store,
        needs,
        card,
        gpu_memory,
        budget,
        footprint,
        context,
        offload,
        parallel,
        adapter_bytes=adapter_bytes,
        cache_bits=cache_bits,
    )


def gpu_budget(text: str | int | None, card: Card) -> int:
    """The limit that ``--gpu-memory`` sets; by default nineteen twentieths of what is free: a display's needs vary.

    Raises:
        MossError: it is not an amount of memory, or more than the card has.
    """
    if text is None:
        return less_margin(card.free_bytes)
    n_bytes = parse_memory(text, card.total_bytes)
    if n_bytes > card.total_bytes:
        raise MossError(
            f"--gpu-memory {text} is more than {card.name} has, {gib(card.total_bytes)}. Give a smaller amount."
        )
    return n_bytes


def less_margin(n_bytes: int) -> int:
    return n_bytes - n_bytes // 20


def _check_host(plan: ResidencyPlan, offload: Offload) -> None:
    """Jittor's swapping and unified memory know no disk behind the host: it must hold all that the card does not.

    Unified memory may have all of it on the host for a while: the driver decides. Jittor takes a unit over in two copies.
    """
    units = plan.units if offload == "unified" else [unit for unit in plan.units if not unit.resident]
    copies = 0 if offload == "unified" else 2 * max(unit.n_bytes for unit in plan.units)
    needed = plan.host_footprint_bytes + copies + sum(unit.n_bytes for unit in units)
    if needed > (plan.host_budget_bytes or 0):
        raise MossError(
            f"--offload {offload} keeps on the host what the card cannot hold, and needs {gib_up(needed)} of memory there. "
            "Raise --host-memory, or use --offload stream: it streams from disk what the host cannot hold."
        )


def page_cache_bytes(plan: ResidencyPlan) -> int:
    """Memory beside the budget in which streamed files may stay cached: four fifths of what the plan leaves free.

    The page cache is not this process's memory: the system takes it back as soon as anything else needs it.
    """
    still_needed = max(0, plan.budget_bytes - resident_memory_bytes())
    return max(0, process_memory().free_bytes - still_needed) * 4 // 5
