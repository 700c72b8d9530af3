"""What this machine has and lacks for running MOSS: one finding after the other, each with a verdict and what to do."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from moss_jt.backend.build import check_compiler
from moss_jt.backend.cards import OLDEST_CARD, Card, find_cards
from moss_jt.backend.gpu_requirements import (
    CUPY_WHEELS,
    NEWEST_SERIES,
    find_cupy,
    installed_cupy,
    require_gpu,
    series_for,
)
from moss_jt.backend.home import (
    ONEDNN_WHEELS,
    cache_folder,
    has_onednn_wheels,
    onednn_folder,
    onednn_is_linked,
    wheel_folder,
)
from moss_jt.backend.toolkit import find_toolkit
from moss_jt.errors import MossError
from moss_jt.plan.machine import default_budget, process_memory
from moss_jt.plan.residency import BITS_NAMES, gib
from moss_jt.store.locations import model_home, models_folder
from moss_jt.store.model_folder import MANIFEST, open_store
from moss_jt.store.published import CONVERSION_BYTES, RECOMMENDED

PYTHONS = ((3, 11), (3, 12))
# What pip takes for the extras, as seen with CUDA 13.0's wheels and CuPy 13.6.
EXTRA_SIZES = {13: "0.73 GB to download, 1.3 GB on the disk", 12: "0.11 GB to download, 0.23 GB on the disk"}

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """``advice`` says what to do; empty where all is well."""

    what: str
    verdict: Verdict
    text: str
    advice: str = ""


def examine(gpu_wanted: bool = False) -> Iterator[Finding]:
    """Every finding, the needed ones first. Starts no Jittor and downloads nothing.

    Args:
        gpu_wanted: what --gpu lacks is a problem, and not only a note.
    """
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
            yield Finding(what, "problem", "could not be checked", str(error))
    yield from gpu_findings(gpu_wanted)
    yield from models()


def gpu_findings(wanted: bool = False) -> Iterator[Finding]:
    """The parts that only --gpu needs, and whether they suit each other."""
    lacking: Verdict = "problem" if wanted else "note"
    cards, complete = list[Card](), True

    def all_cards() -> Iterator[Finding]:
        cards.extend(find_cards())
        return map(gpu, cards)

    parts: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("GPU", all_cards),
        ("CUDA toolkit", lambda: [cuda_toolkit(series_for(cards[0] if cards else None))]),
        ("CuPy", lambda: [cupy(series_for(cards[0] if cards else None))]),
    )
    for what, probe in parts:
        try:
            yield from probe()
        except MossError as error:
            complete = False
            purpose = "" if wanted else "Only to compute on a GPU: "
            yield Finding(what, lacking, "not ready for --gpu", f"{purpose}{error}")
    if complete:
        for card in cards:
            yield suits(card, len(cards) > 1)
    elif wanted:
        yield what_it_takes(cards[0] if cards else None)


def suits(card: Card, one_of_several: bool) -> Finding:
    what = f"--gpu --device {card.number}" if one_of_several else "--gpu"
    try:
        require_gpu(card.number)
    except MossError as error:
        return Finding(what, "problem", "the parts do not fit together", str(error))
    return Finding(what, "ok", "everything that it needs is there")


def what_it_takes(card: Card | None) -> Finding:
    """The way to --gpu for that card."""
    series = series_for(card)
    steps = [] if card else ["a card of compute capability 6.0 or newer, and its driver"]
    steps.append(f"pip install 'moss-jt[cuda{series}]' ({EXTRA_SIZES[series]})")
    if series != NEWEST_SERIES:
        steps.append("a CUDA Toolkit 12 with nvcc, from NVIDIA or with python -m jittor_utils.install_cuda")
    steps.append("the first start, which compiles Jittor once more, for minutes")
    return Finding("--gpu", "note", "needs these steps", "; ".join(steps) + ". Nothing was downloaded now.")


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
    version = installed("jittor")
    if version is None:
        return Finding("Jittor", "problem", "not installed", "pip install jittor==1.3.11.0")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    release = ".".join(version.split(".")[:3])
    if any(cache_folder().glob(f"jt{release}/**/jittor_core{suffix}")):
        return Finding("Jittor", "ok", f"{version}, compiled in {cache_folder()}")
    return Finding(
        "Jittor",
        "note",
        f"{version}, not compiled yet",
        "The first start compiles it, once: 1 to 3 minutes, with CUDA 2 to 5.",
    )


def onednn() -> Finding:
    if not has_onednn_wheels():
        text = "only for Linux on x86-64: long prompts are read slowly here"
        return Finding("oneDNN", "note", text)
    if os.environ.get("use_mkl") == "0":
        return Finding("oneDNN", "note", "switched off by use_mkl=0: long prompts are read slowly")
    if onednn_is_linked():
        return Finding("oneDNN", "ok", f"in {onednn_folder()}")
    for wheel, needed in ONEDNN_WHEELS.values():
        wheel_folder(wheel, needed)  # what is missing is said by its error
    return Finding("oneDNN", "ok", "installed; the first start links it to where Jittor looks")


def processor() -> Finding:
    from moss_jt.kernels.cpu.simd import available_simd

    names = {
        "512-vnni": "AVX-512 with VNNI",
        "512": "AVX-512",
        "256-vnni": "AVX2 with AVX-VNNI",
        "256": "AVX2",
        "0": "plain C++",
    }
    fastest = available_simd()[0]
    text = f"{os.cpu_count()} cores, kernels for {names[fastest]}"
    if fastest != "0":
        return Finding("Processor", "ok", text)
    return Finding(
        "Processor", "note", text, "Without AVX2, FMA and F16C a token takes several times as long."
    )


def memory() -> Finding:
    memory = process_memory()
    text = f"{gib(memory.total_bytes)}, of which {gib(memory.free_bytes)} are free; default limit "
    return Finding("Memory", "ok", f"{text}{gib(default_budget(memory))} (--memory)")


def disk() -> Finding:
    there = next(parent for parent in (model_home(), *model_home().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.0f} GB free for {model_home()}"
    if free >= CONVERSION_BYTES[16]:
        return Finding("Disk", "ok", text)
    advice = "Converting a float16 model takes 45 GB, an int4 one 22 GB: set MOSS_JT_HOME to a folder on a larger disk."
    return Finding("Disk", "note", text, advice)


def gpu(card: Card) -> Finding:
    """The driver and a card."""
    cuda = f"{card.driver_cuda[0]}.{card.driver_cuda[1]}"
    text = (
        f"{card.number}: {card.name}, sm_{card.compute[0]}{card.compute[1]}, {gib(card.total_bytes)}, of which "
        f"{gib(card.free_bytes)} are free; the driver knows CUDA up to {cuda}"
    )
    if card.is_too_old:
        oldest = f"{OLDEST_CARD[0]}.{OLDEST_CARD[1]}"
        return Finding(
            "GPU", "note", text, f"Too old: --gpu needs compute capability {oldest} (Pascal) or newer."
        )
    return Finding("GPU", "ok", text)


def cuda_toolkit(series: int = NEWEST_SERIES) -> Finding:
    """What Jittor and CuPy compile with."""
    toolkit = find_toolkit(next(filter(None, map(CUPY_WHEELS.get, installed_cupy())), None), series)
    parts = ", completed with pip's wheels at the first start" if toolkit.scattered else ""
    return Finding("CUDA toolkit", "ok", f"{toolkit.release}, {toolkit.nvcc}{parts}")


def cupy(series: int = NEWEST_SERIES) -> Finding:
    find_cupy(series)
    names = [f"{name} {installed(name)}" for name in installed_cupy()]
    return Finding("CuPy", "ok", ", ".join(names) or "not installed by pip")


def models() -> Iterator[Finding]:
    """Each folder under the model home, finished or not."""
    folders = sorted(path for path in models_folder().glob("*") if path.is_dir())
    if not folders:
        advice = f"moss-jt chat moss-tiny works at once; moss-jt convert {RECOMMENDED} gets the real one."
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
    size = gib(sum(file.nbytes for file in store.files))
    return Finding(what, "ok", f"{store.config.n_layer} blocks, {BITS_NAMES[store.bits]}, {size} in {folder}")
