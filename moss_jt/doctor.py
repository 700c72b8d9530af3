"""What this machine has and lacks for running MOSS: one finding after the other, each with a verdict and what to do."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from moss_jt.errors import MossError
from moss_jt.folders import model_home, models_folder
from moss_jt.jittor_build import check_compiler
from moss_jt.jittor_home import cache_folder, has_onednn_wheels
from moss_jt.machine import default_budget, process_memory
from moss_jt.store import MANIFEST, open_store

GIB = 1 << 30
PYTHONS = ((3, 11), (3, 12))
# What converting the 16-billion-parameter model needs at most.
CONVERSION_BYTES = 45 * 10**9

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
    probes: tuple[Callable[[], Finding], ...] = (
        python,
        compiler,
        jittor,
        onednn,
        processor,
        memory,
        disk,
        gpu,
        cupy,
    )
    for probe in probes:
        yield probe()
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
    first = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )[0]
    return Finding("C++ compiler", "ok", first)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def jittor() -> Finding:
    found = installed("jittor")
    if found is None:
        return Finding("Jittor", "problem", "not installed", "pip install jittor==1.3.11.0")
    if any(cache_folder().glob("**/jittor_core*.so")):
        return Finding("Jittor", "ok", f"{found}, compiled in {cache_folder()}")
    return Finding(
        "Jittor", "note", f"{found}, not compiled yet", "The first start compiles it, once: 2 to 5 minutes."
    )


def onednn() -> Finding:
    if has_onednn_wheels():
        return Finding("oneDNN", "ok", f"{installed('onednn-cpu-gomp')}: fast products for long prompts")
    advice = "pip install onednn-cpu-gomp==2021.4.0 onednn-devel-cpu-gomp==2021.4.0 (Linux on x86-64)"
    return Finding("oneDNN", "note", "not installed: long prompts are read slowly", advice)


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
        return Finding(
            "GPU", "note", "no NVIDIA driver (libcuda.so.1)", "Nothing to do: this version runs on the CPU."
        )
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Finding("GPU", "note", "a driver, but no card that it can use", "nvidia-smi tells more.")
    return Finding(
        "GPU",
        "note",
        f"{count.value} card(s)",
        "This version runs on the CPU; its CUDA kernels are not wired in.",
    )


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
