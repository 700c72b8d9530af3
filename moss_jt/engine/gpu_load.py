"""A model folder becomes a model that computes on the GPU. Importing this starts Jittor and CuPy."""

from pathlib import Path
from types import ModuleType

from moss_jt.backend.device import Offload
from moss_jt.backend.jittor import jt
from moss_jt.engine.gpu_model import GpuModel, raise_if_full
from moss_jt.engine.kv_cache import KVCache, device_room
from moss_jt.engine.model import Model
from moss_jt.engine.warm_up import warm_up_gpu
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.weights.disk_speed import disk_speed
from moss_jt.weights.file_reader import FileReader
from moss_jt.weights.gpu_units import GpuUnits, StreamedUnits, SwappedUnits, UnifiedUnits
from moss_jt.weights.gpu_weights import GpuWeights


def load_gpu_model(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> Model:
    """See :func:`moss_jt.engine.load.load_model`."""
    cupy = import_cupy()
    try:
        warm_up_gpu(cupy, store.bits)
        # CuPy keeps freed memory for reuse: no more than the plan has for the results within a pass.
        needs = CudaNeeds(store.config, store.bits)
        cupy.get_default_memory_pool().set_limit(size=needs.workspace_bytes(plan.pass_tokens))
        cache = KVCache(store.config, plan.context, device_room)
        weights = GpuWeights(store, plan, _units(store, plan, home, offload))
        return GpuModel(store.config, CudaOperators(store.config, cupy), weights, cache, plan)
    except BaseException as error:
        jt.gc()  # a second try finds the memory free
        raise_if_full(error, plan)
        raise


def import_cupy() -> ModuleType:
    """CuPy itself: that its package is there does not mean that it works.

    Raises:
        MossError: it does not; the message says why.
    """
    try:
        import cupy

        cupy.cuda.device.get_cublas_handle()  # its library is opened only now
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise MossError(
            f"CuPy is installed and does not start ({error}). Its version must suit the CUDA toolkit: see moss-jt doctor."
        ) from error
    module: ModuleType = cupy
    return module


def _units(store: Store, plan: ResidencyPlan, home: Path, offload: Offload) -> GpuUnits:
    if offload == "swap":
        return SwappedUnits(store, plan)
    speed = disk_speed(max(store.blocks, key=lambda file: file.nbytes).path, home / "disk-speed.json")
    reader = FileReader(speed.prefer_direct, speed.best)
    return UnifiedUnits(store, plan, reader) if offload == "unified" else StreamedUnits(store, plan, reader)
