"""What this machine has and lacks for running MOSS: one finding after the other, each with a verdict and what to do."""

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

from moss_jt.backend.build import check_compiler
from moss_jt.backend.gpu import find_card, find_cupy, find_toolkit, installed_cupy, require_gpu
from moss_jt.backend.home import (
    ONEDNN_WHEELS,
    cache_folder,
    has_onednn_wheels,
    onednn_folder,
    onednn_is_linked,
    wheel_folder,
)
from moss_jt.errors import MossError
from moss_jt.plan.machine import default_budget, process_memory
from moss_jt.store.locations import model_home, models_folder
from moss_jt.store.model_folder import MANIFEST, open_store

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
    probes: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("Python", python),
        ("C++ compiler", compiler),
        ("Jittor", jittor),
        ("oneDNN", onednn),
        ("Processor", processor),
        ("Memory", memory),
        ("Disk", disk),
    )
    for what, probe in probes:
        try:
            yield probe()
        except MossError as error:
            yield Finding(what, "problem", "cannot be told", str(error))
    yield from gpu_findings()
    yield from models()


def gpu_findings() -> Iterator[Finding]:
    """The parts that only --gpu needs, and whether they suit each other: nothing that is missing is a problem."""
    parts: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("GPU", gpu),
        ("CUDA toolkit", cuda_toolkit),
        ("CuPy", cupy),
    )
    complete = True
    for what, probe in parts:
        try:
            yield probe()
        except MossError as error:
            complete = False
            yield Finding(what, "note", "not ready for --gpu", f"Only to compute on a GPU: {error}")
    if complete:
        try:
            require_gpu()
        except MossError as error:
            yield Finding("moss-jt --gpu", "problem", "the parts do not suit each other", str(error))
        else:
            yield Finding("moss-jt --gpu", "ok", "all that it needs is there")


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
    """The driver and the card."""
    card = find_card()
    cuda = f"{card.driver_cuda[0]}.{card.driver_cuda[1]}"
    text = (
        f"{card.name}, sm_{card.compute[0]}{card.compute[1]}, {card.total_bytes / GIB:.1f} GiB, of which "
        f"{card.free_bytes / GIB:.1f} are free; the driver knows CUDA up to {cuda}"
    )
    return Finding("GPU", "ok", text)


def cuda_toolkit() -> Finding:
    """What Jittor and CuPy compile with."""
    toolkit = find_toolkit()
    return Finding("CUDA toolkit", "ok", f"{toolkit.version[0]}.{toolkit.version[1]}, {toolkit.nvcc}")


def cupy() -> Finding:
    find_cupy()
    names = [f"{name} {installed(name)}" for name in installed_cupy()]
    return Finding("CuPy", "ok", ", ".join(names) or "not installed by pip")


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
