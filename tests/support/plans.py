"""Plans with what the operators need, for two threads that compute unless a test says otherwise."""

from typing import Any

from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.plan import residency
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.sizes import ModelSizes


def plan(
    sizes: ModelSizes, context: int, budget_bytes: int, *, threads: int = 2, **more: Any
) -> ResidencyPlan:
    needs = CpuNeeds(sizes.config, sizes.bits, cache_bits=sizes.cache_bits)
    return residency.plan(sizes, needs, context, budget_bytes, threads=threads, **more)


def plan_gpu(
    sizes: ModelSizes, context: int, device_bytes: int, host_bytes: int, **more: Any
) -> ResidencyPlan:
    needs = CudaNeeds(sizes.config, sizes.bits)
    return residency.plan_gpu(sizes, needs, context, device_bytes, host_bytes, **more)
