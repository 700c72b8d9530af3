"""The plan for this process and this machine: the one place where the arithmetic of residency meets measured memory."""

from moss_jt.machine import memory_budget, process_memory, resident_memory_bytes
from moss_jt.residency import ResidencyPlan, plan
from moss_jt.sizes import MIB, sizes_of_store
from moss_jt.store import Store

# What a process grows by after its tokenizer is there, beside weights, cache and workspace: Jittor, compiled operators,
# oneDNN (45 MiB), the plugins' libraries (30 MiB), sampling, and room for what differs between machines.
LATER_BYTES = 120 * MIB


def plan_here(store: Store, memory: str | int | None, context: int | None) -> ResidencyPlan:
    """The plan for this process, which counts what it holds already; call it once the tokenizer is there.

    Args:
        memory: the limit as users write it; None for what is free less a margin.
        context: tokens of the conversation; None for what the model has.

    Raises:
        MossError: the limit is none, or too small; the message names the smallest that works.
    """
    budget = memory_budget(memory)
    context = store.config.n_positions if context is None else context
    footprint = resident_memory_bytes() + LATER_BYTES
    return plan(sizes_of_store(store), context, budget, footprint_bytes=footprint)


def page_cache_bytes(plan: ResidencyPlan) -> int:
    """Memory beside the budget in which streamed files may stay cached: four fifths of what the plan leaves free.

    The page cache is not this process's memory: the system takes it back as soon as anything else needs it.
    """
    still_needed = max(0, plan.budget_bytes - resident_memory_bytes())
    return max(0, process_memory().free_bytes - still_needed) * 4 // 5
