"""Stands in for CuPy on the simulated GPU: what moss_jt.kernels.cuda and Jittor's init_cupy use, over the runtime's memory.

Kernels are the emulation's (tests/emulation), queued on the default stream like the real ones, and conversions and products, too.
Memory is given back in the order of that stream, as CuPy's pool does it.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

from tests.emulation import emulator

__version__ = "simulated"

_runtime = ctypes.CDLL(os.environ["SIM_GPU_CUDART"], ctypes.RTLD_GLOBAL)
_calls: dict[int, Callable[[], None]] = {}
_numbers = iter(range(1, sys.maxsize))


def _run_call(number: int) -> None:
    try:
        _calls.pop(number)()
    except BaseException:  # noqa: BLE001  nothing may pass through the runtime, and nothing be lost
        traceback.print_exc()
        os._exit(71)


_run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_run_call)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C interrupts no kernel, although ours are Python: it comes again a little later."""
    while frame is not None:
        if frame.f_code is _run_call.__code__:
            threading.Timer(0.002, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    signal.default_int_handler(number, frame)


# What is queued when the program ends must not meet a Python that has gone.
atexit.register(_runtime.cudaDeviceSynchronize)
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _on_interrupt)


def _enqueue(call: Callable[[], None]) -> None:
    number = next(_numbers)
    _calls[number] = call
    _runtime.sim_gpu_enqueue(None, _run, ctypes.c_void_p(number))


class _DeviceArray(emulator.DeviceArray):
    """Assigning to some of it is a copy on the card: queued behind what was queued before."""

    def __setitem__(self, key: Any, value: Any) -> None:
        _enqueue(lambda: np.asarray(self).__setitem__(key, value))


def _over(pointer: int, shape: Any, dtype: Any, keep: Any = None) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * max(size, 1)).from_address(pointer)
    if keep is not None:
        keep(memory)
    flat = np.frombuffer(memory, np.uint8, size)
    return flat.view(dtype).reshape(shape).view(_DeviceArray)


def empty(shape: Any, dtype: Any) -> np.ndarray:
    """Full of what is no number; freed after what was queued while it lived."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    pointer = ctypes.c_void_p()
    if _runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(size, 1))):
        raise MemoryError(f"Out of memory allocating {size} bytes")
    address = int(pointer.value or 0)

    def free() -> None:
        _runtime.sim_gpu_free(ctypes.c_void_p(address))

    return _over(address, shape, dtype, lambda memory: weakref.finalize(memory, _enqueue, free))


def ndarray(shape: Any, dtype: Any, memptr: Any) -> np.ndarray:
    """Jittor's init_cupy makes one over each Var of a jt.numpy_code."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if not _runtime.sim_gpu_is_device(ctypes.c_void_p(memptr.ptr), ctypes.c_size_t(size)):
        raise RuntimeError(
            f"a {np.dtype(dtype)} array of shape {shape} is over memory that is not the device's"
        )
    return _over(memptr.ptr, shape, dtype)


def asarray(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    if isinstance(array, emulator.DeviceArray):
        if dtype is None or array.dtype == dtype:
            return array
        out = empty(array.shape, dtype)
        _enqueue(lambda: np.copyto(np.asarray(out), np.asarray(array), casting="unsafe"))
        return out
    out = empty(array.shape, dtype or array.dtype)
    _runtime.cudaDeviceSynchronize()
    np.copyto(np.asarray(out), array, casting="unsafe")
    return out


def asnumpy(array: np.ndarray) -> np.ndarray:
    _runtime.cudaDeviceSynchronize()
    return np.array(np.asarray(array))


class RawModule:
    def __init__(self, code: str, options: Sequence[str] = ()) -> None:
        self._module = emulator.RawModule(code, options)

    def get_function(self, name: str) -> Callable[..., None]:
        function = self._module.get_function(name)

        def launch(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            _enqueue(lambda: function(grid, block, arguments))

        launch.kernel = function.kernel  # type: ignore[attr-defined]
        return launch


def _gemm(*arguments: Any) -> None:
    _enqueue(lambda: emulator.FakeCublas.gemmEx(*arguments))


def _gemm_batched(*arguments: Any) -> None:
    _enqueue(lambda: emulator.FakeCublas.gemmStridedBatchedEx(*arguments))


def get_default_memory_pool() -> Any:
    return SimpleNamespace(free_all_blocks=lambda: None, set_limit=lambda size: None)


class _Device:
    def __init__(self, number: int = 0) -> None:
        self.id = number

    def __enter__(self) -> "_Device":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _memory_info() -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def _memcpy(target: int, source: int, size: int, kind: int, stream: int) -> None:
    code = _runtime.cudaMemcpyAsync(
        ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind, ctypes.c_void_p(stream)
    )
    if code:
        raise RuntimeError(f"cudaMemcpyAsync: {code}")


def _malloc(size: int) -> int:
    pointer = ctypes.c_void_p()
    if _runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
    return int(pointer.value or 0)


class _Unowned:
    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr = ptr


class _Pointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.ptr = mem.ptr + offset


_cublas = SimpleNamespace(
    **{
        name: getattr(emulator.FakeCublas, name)
        for name in dir(emulator.FakeCublas)
        if name.startswith("CUBLAS")
    },
    gemmEx=_gemm,
    gemmStridedBatchedEx=_gemm_batched,
    getVersion=emulator.FakeCublas.getVersion,
)
cuda = SimpleNamespace(
    Device=_Device,
    MemoryPointer=_Pointer,
    memory=SimpleNamespace(UnownedMemory=_Unowned),
    cublas=_cublas,
    device=SimpleNamespace(get_cublas_handle=lambda: emulator.FakeCupy.HANDLE),
    runtime=SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda number: {"name": b"simulated", "multiProcessorCount": 2},
        runtimeGetVersion=lambda: 12090,
        memGetInfo=_memory_info,
        malloc=_malloc,
        free=lambda pointer: _runtime.cudaFree(ctypes.c_void_p(pointer)),
        memcpyAsync=_memcpy,
        deviceSynchronize=lambda: _runtime.cudaDeviceSynchronize(),
    ),
)
