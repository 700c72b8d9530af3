"""A GPU that is not there: a toolkit, a driver and a CuPy over a simulated CUDA runtime, so that Jittor's own CUDA build runs here.

What runs for real: Jittor compiled with CUDA, its allocators, its copies, its jt.numpy_code into CuPy's arrays, our copy
operation, the plan, the ring, the model. What stands in: the runtime (queues that work late and in adversarial orders), cuBLAS, and
the kernels, which are the emulation's. What it cannot show: a real driver, a real compiler, a card's arithmetic and speed, managed
memory's pages.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from moss_jt.backend.toolkit import Toolkit
from moss_jt.plan.placement import CUDA_LATER_BYTES
from moss_jt.plan.residency import GPU_FOOTPRINT_BYTES

HERE = Path(__file__).resolve().parent / "simulated_gpu"
ROOT = HERE.parents[2]
# CUDA's headers that Jittor and our copies include; here they are one.
HEADERS = (
    "cuda_runtime.h",
    "cuda_runtime_api.h",
    "driver_types.h",
    "cuda_fp16.h",
    "cuda_bf16.h",
    "library_types.h",
)
MEMORY = 2 * 10**9
# What CUDA and its libraries take of the card; with what is allowed for later it is what a plan without a card allows.
CONTEXT = GPU_FOOTPRINT_BYTES - CUDA_LATER_BYTES


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss-jt-simulated-gpu"


def build(real: Toolkit | None = None) -> dict[str, str]:
    """Make toolkit and driver, unless they are there, and return the environment of a process with that GPU.

    Jittor's own build goes into a home beside them: it depends on the headers, not on the runtime's inside.

    Args:
        real: NVIDIA's compiler and headers for it, in one folder, and only the libraries stand in: a card of sm_90.
    """
    if real is not None:
        return build_on(real)
    toolkit = cache() / fingerprint("stand_in_nvcc.py", "sim_cuda.h", "cublas_v2.h", "curand.h") / "toolkit"
    driver = toolkit.parent / "driver"
    for folder in (toolkit / "bin", toolkit / "include", toolkit / "lib64", toolkit.parent / "home", driver):
        folder.mkdir(parents=True, exist_ok=True)
    for name in HEADERS:
        keep(toolkit / "include" / name, b'#include "sim_cuda.h"\n')
    keep(toolkit / "include" / "cublas.h", b'#include "cublas_v2.h"\n')
    for name in ("sim_cuda.h", "cublas_v2.h", "curand.h"):
        keep(toolkit / "include" / name, (HERE / name).read_bytes())
    script = f'#!/bin/sh\nexec "{sys.executable}" -P "{HERE}/stand_in_nvcc.py" "$@"\n'
    keep(toolkit / "bin" / "nvcc", script.encode(), 0o755)
    return environment_of(toolkit, driver, {})


def keep(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that is not there as it should be: another process may be compiling with what is."""
    if path.exists() and path.read_bytes() == data:
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.chmod(mode)
    fresh.replace(path)


def build_on(real: Toolkit) -> dict[str, str]:
    """See :func:`build`."""
    toolkit = cache() / f"{fingerprint()}-cuda{real.release}" / "toolkit"
    driver = toolkit.parent / "driver"
    for folder in (toolkit / "bin", toolkit / "lib64", toolkit.parent / "home", driver):
        folder.mkdir(parents=True, exist_ok=True)
    if not (toolkit / "include").exists():
        (toolkit / "include").symlink_to(real.home / "include")
    keep(toolkit / "bin" / "nvcc", f'#!/bin/sh\nexec "{real.nvcc}" "$@"\n'.encode(), 0o755)
    static = real.home / "lib64" / "libcudadevrt.a"  # nvcc links with it
    if not (toolkit / "lib64" / static.name).exists():
        (toolkit / "lib64" / static.name).symlink_to(static)
    return environment_of(
        toolkit, driver, {"SIM_GPU_DRIVER": f"{real.version[0]}000", "SIM_GPU_COMPUTE": "90"}
    )


def environment_of(toolkit: Path, driver: Path, more: dict[str, str]) -> dict[str, str]:
    """With the libraries that stand in."""
    compiler = toolkit / "bin" / "nvcc"
    runtime = library("cudart.cc", toolkit, toolkit / "lib64" / "libcudart.so")
    for name in ("cublas", "curand", "nvrtc"):
        library("libraries.cc", toolkit, toolkit / "lib64" / f"lib{name}.so")
    for name in ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1"):
        library("driver.cc", toolkit, driver / name)
    return {
        "nvcc_path": str(compiler),
        "LD_LIBRARY_PATH": str(driver),
        "PYTHONPATH": f"{HERE}:{ROOT}",
        # Not JITTOR_HOME: Jittor would note it for good, in the home of whoever runs the tests.
        "HOME": str(toolkit.parent / "home"),
        "SIM_GPU_CUDART": str(runtime),
        "SIM_GPU_MEMORY": str(MEMORY),
        "SIM_GPU_CONTEXT": str(CONTEXT),
        **more,
    }


def fingerprint(*names: str) -> str:
    digest = hashlib.sha256(str(HERE).encode())
    for name in names:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]


def library(source: str, toolkit: Path, target: Path) -> Path:
    """The source as a shared library, compiled when it changed."""
    note = target.with_name(f".{target.name}.made-from")
    made_from = fingerprint(source, "sim_cuda.h")
    if not target.exists() or not note.exists() or note.read_text() != made_from:
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", f"-I{toolkit}/include", str(HERE / source)]
        subprocess.run([*command, "-o", str(fresh)], check=True)
        fresh.replace(target)
        note.write_text(made_from)
    return target
