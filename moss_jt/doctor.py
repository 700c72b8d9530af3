"""What this machine has and lacks for running MOSS: one finding after the other, each with a verdict and what to do."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from moss_jt.errors import MossError
from moss_jt.folders import model_home, models_folder
from moss_jt.jittor_build import check_compiler
from moss_jt.jittor_home import (
    ONEDNN_WHEELS,
    cache_folder,
    has_onednn_wheels,
    onednn_folder,
    onednn_is_linked,
    wheel_folder,
)
from moss_jt.machine import default_budget, process_memory
from moss_jt.store import MANIFEST, open_store

GIB = 1 << 30
PYTHONS = ((3, 11), (3, 12))
# What converting the 16-billion-parameter model needs at most.
CONVERSION_BYTES = 45 * 10**9
# Where Jittor looks for nvcc beside the PATH.
NVCC_PLACES = ("/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc", "/opt/cuda/bin/nvcc")

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """``advice`` says what to do; empty where all is well."""

    what: str
    verdict: Verdict
    text: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Every finding, the needed ones first. Starts no Jittor and downloads nothing."""
    probes: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("Python", python),
        ("C++ compiler", compiler),
        ("Jittor", jittor),
        ("oneDNN", onednn),
        ("Processor", processor),
        ("Memory", memory),
        ("Disk", disk),
        ("GPU", gpu),
        ("CUDA libraries", cuda_libraries),
        ("CuPy", cupy),
    )
    for what, probe in probes:
        try:
            yield probe()
        except MossError as error:
            yield Finding(what, "problem", "cannot be told", str(error))
    yield from models()


def python() -> Finding:
    text = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("Python", "ok", text)
    return Finding("Python", "problem", text, "Jittor 1.3.11 and numpy 1 need Python 3.11 or 3.12.")


def compiler() -> Finding:
    try:
        check_compiler()
    except MossError as error:
        return Finding("C++ compiler", "problem", "missing", str(error))
    name = os.environ.get("cc_path") or "g++"
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        advice = f"{name} --version fails. Install the compiler again, or name another one in cc_path."
        return Finding("C++ compiler", "problem", f"{name} does not run", advice)
    return Finding("C++ compiler", "ok", done.stdout.split("\n")[0])


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def jittor() -> Finding:
    found = installed("jittor")
    if found is None:
        return Finding("Jittor", "problem", "not installed", "pip install jittor==1.3.11.0")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    release = ".".join(found.split(".")[:3])
    if any(cache_folder().glob(f"jt{release}/**/jittor_core{suffix}")):
        return Finding("Jittor", "ok", f"{found}, compiled in {cache_folder()}")
    return Finding(
        "Jittor", "note", f"{found}, not compiled yet", "The first start compiles it, once: 2 to 5 minutes."
    )


def onednn() -> Finding:
    if not has_onednn_wheels():
        text = "only for Linux on x86-64: long prompts are read slowly here"
        return Finding("oneDNN", "note", text)
    if onednn_is_linked():
        return Finding("oneDNN", "ok", f"in {onednn_folder()}")
    for wheel, needed in ONEDNN_WHEELS.values():
        wheel_folder(wheel, needed)  # what is missing is said by its error
    return Finding("oneDNN", "ok", "installed; the first start links it to where Jittor looks")


def processor() -> Finding:
    from moss_jt.kernels.cpu.simd import available_simd

    names = {512: "AVX-512", 256: "AVX2", 0: "plain C++"}
    widest = max(available_simd())
    text = f"{os.cpu_count()} cores, kernels for {names[widest]}"
    if widest:
        return Finding("Processor", "ok", text)
    return Finding(
        "Processor", "note", text, "Without AVX2, FMA and F16C a token takes several times as long."
    )


def memory() -> Finding:
    found = process_memory()
    text = (
        f"{found.total_bytes / GIB:.1f} GiB, of which {found.free_bytes / GIB:.1f} are free; default limit "
    )
    return Finding("Memory", "ok", f"{text}{default_budget(found) / GIB:.1f} GiB (--memory)")


def disk() -> Finding:
    there = next(parent for parent in (model_home(), *model_home().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.0f} GB free for {model_home()}"
    if free >= CONVERSION_BYTES:
        return Finding("Disk", "ok", text)
    advice = (
        "Converting the float16 model needs 45 GB: set MOSS_JT_HOME to a larger disk, or convert an int4 one."
    )
    return Finding("Disk", "note", text, advice)


def gpu() -> Finding:
    """Whether a driver and a card are there: libcuda answers both without anything installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        advice = "Nothing to do: this version runs on the CPU."
        return Finding("GPU", "note", "no NVIDIA driver (libcuda.so.1)", advice)
    count, supported = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Finding("GPU", "note", "a driver, but no card that it can use", "nvidia-smi tells more.")
    name = ctypes.create_string_buffer(100)
    driver.cuDeviceGetName(name, 100, 0)
    driver.cuDriverGetVersion(ctypes.byref(supported))
    cuda = f"{supported.value // 1000}.{supported.value % 1000 // 10}"
    text = f"{count.value}: {name.value.decode(errors='replace')}; the driver knows CUDA up to {cuda}"
    return Finding("GPU", "note", text, "This version runs on the CPU; its CUDA kernels are not wired in.")


def cuda_libraries() -> Finding:
    """The toolkit that Jittor would compile with: nvcc, and the runtime library beside it."""
    nvcc = shutil.which("nvcc") or next(filter(os.path.exists, NVCC_PLACES), None)
    if nvcc is None:
        advice = "Nothing to do: only a GPU needs them."
        return Finding("CUDA libraries", "note", "no nvcc", advice)
    runtime = Path(nvcc).resolve().parents[1] / "lib64" / "libcudart.so"
    if not runtime.exists():
        text = f"{nvcc} without its runtime library ({runtime})"
        return Finding("CUDA libraries", "note", text, "Nothing to do: moss-jt keeps Jittor from using it.")
    return Finding("CUDA libraries", "ok", f"{nvcc} with {runtime}")


def cupy() -> Finding:
    found = next((name for name in ("cupy-cuda12x", "cupy-cuda11x", "cupy") if installed(name)), None)
    if found is None or importlib.util.find_spec("cupy") is None:
        return Finding("CuPy", "note", "not installed", "Nothing to do: only the CUDA kernels need it.")
    return Finding("CuPy", "ok", f"{found} {installed(found)}")


def models() -> Iterator[Finding]:
    """Each folder under the model home, finished or not."""
    folders = sorted(path for path in models_folder().glob("*") if path.is_dir())
    if not folders:
        advice = (
            "moss-jt chat moss-tiny works at once; moss-jt convert fnlp/moss-moon-003-sft gets the real one."
        )
        yield Finding("Models", "note", "none converted yet", advice)
    for folder in folders:
        yield model(folder)


def model(folder: Path) -> Finding:
    what = f"Model {folder.name}"
    if not (folder / MANIFEST).exists():
        return Finding(
            what, "note", "not finished", "Run the same moss-jt convert again to go on, or delete the folder."
        )
    try:
        store = open_store(folder)
    except MossError as error:
        return Finding(what, "problem", "damaged", str(error))
    size = sum(file.nbytes for file in store.files) / GIB
    precision = "float16" if store.bits == 16 else f"int{store.bits}"
    return Finding(what, "ok", f"{store.config.n_layer} blocks, {precision}, {size:.2f} GiB in {folder}")
