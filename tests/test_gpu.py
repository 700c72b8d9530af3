"""What --gpu needs is found, and what is missing is told at once, with what to do."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moss_jt.backend import gpu
from moss_jt.backend.gpu import Card, Toolkit
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.placement import gpu_budget, plan_gpu_here
from moss_jt.store.model_folder import open_store
from tests.support.models import tiny_model_folder

GIB = 1 << 30
CARD = Card("RTX 3060", 12 * GIB, 11 * GIB, (8, 6), (12, 4))


class Driver:
    """libcuda and libnvidia-ml with one card; ``changes`` replaces answers."""

    def __init__(self, **changes: Any) -> None:
        self.answers = {
            "count": 1,
            "init": 0,
            "major": 8,
            "minor": 6,
            "driver": 12040,
            "managed": 1,
            "free": 11 * GIB,
            **changes,
        }

    def cuInit(self, flags: int) -> int:
        return int(self.answers["init"])

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.answers["count"]
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"RTX 3060"
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = 12 * GIB
        return 0

    def cuDriverGetVersion(self, known: Any) -> int:
        known._obj.value = self.answers["driver"]
        return 0

    def cuDeviceGetPCIBusId(self, bus: Any, size: int, device: Any) -> int:
        bus.value = b"0000:01:00.0"
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:
        value._obj.value = self.answers[{75: "major", 76: "minor", 89: "managed"}[number]]
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:
        assert bus == b"0000:01:00.0"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.free = self.answers["free"]
        return 0

    def nvmlShutdown(self) -> int:
        return 0


def libraries(*names: str, driver: Driver | None = None) -> Callable[[str], Any]:
    """A loader that knows only these."""

    def load(name: str, *_: Any) -> Any:
        if name not in names:
            raise OSError(f"{name}: cannot open")
        return driver or Driver()

    return load


BOTH = ("libcuda.so.1", "libnvidia-ml.so.1")


def test_the_card_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", libraries(*BOTH))
    assert gpu.find_card() == CARD
    monkeypatch.setattr(ctypes, "CDLL", libraries("libcuda.so.1"))
    assert gpu.find_card().free_bytes == 12 * GIB


def test_a_card_without_shared_managed_memory_is_refused_for_unified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", libraries(*BOTH, driver=Driver(managed=0)))
    store = open_store(tiny_model_folder())
    needs = CudaNeeds(store.config, store.bits)
    with pytest.raises(MossError, match="cannot share managed memory.*--offload stream"):
        plan_gpu_here(store, needs, gpu.find_card(), None, None, None, "unified")
    assert not plan_gpu_here(store, needs, gpu.find_card(), None, None, None, "stream").streams


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ((), {}, "no NVIDIA driver"),
        (BOTH, {"count": 0}, "no card that it can use"),
        (BOTH, {"init": 100}, "CUDA error 100"),
        (BOTH, {"major": 5, "minor": 2}, "compute capability 5.2; 6.0"),
    ],
)
def test_a_missing_card_is_told(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], changes: dict[str, int], message: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", libraries(*names, driver=Driver(**changes)))
    with pytest.raises(MossError, match=message):
        gpu.find_card()


def test_the_default_limit_leaves_a_margin_and_too_much_is_refused() -> None:
    assert gpu_budget(None, CARD) == 11 * GIB - 11 * GIB // 20
    assert gpu_budget("50%", CARD) == 6 * GIB and gpu_budget("8GiB", CARD) == 8 * GIB
    with pytest.raises(MossError, match="more than RTX 3060 has, 12.00 GiB"):
        gpu_budget("13GiB", CARD)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a toolkit, and nothing else on this machine that does."""
    for folder in ("bin", "lib64", "include"):
        (tmp_path / folder).mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    compiler.chmod(0o755)
    for name in gpu.LIBRARIES:
        (tmp_path / "lib64" / f"lib{name}.so").touch()
    for name in gpu.HEADERS:
        (tmp_path / "include" / name).touch()
    for name in ("nvcc_path", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JITTOR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(gpu, "NVCC_PLACES", ())
    monkeypatch.setattr(gpu, "SYSTEM_LIBRARIES", tmp_path / "nowhere")
    return tmp_path


@pytest.mark.parametrize("how", ["nvcc_path", "CUDA_HOME", "CUDA_PATH", "PATH", "jtcuda"])
def test_the_toolkit_is_found(toolkit: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    compiler = toolkit / "bin" / "nvcc"
    if how == "jtcuda":
        place = toolkit / "home" / ".cache" / "jittor" / "jtcuda"
        place.mkdir(parents=True)
        (place / "cuda12.2").symlink_to(toolkit)
    else:
        value = {"nvcc_path": compiler, "PATH": f"{toolkit}/bin:/usr/bin:/bin"}.get(how, toolkit)
        monkeypatch.setenv(how, str(value))
    found = gpu.find_toolkit()
    assert (found.nvcc, found.version) == (compiler, (12, 4))
    assert found.libraries["nvrtc"] == found.home / "lib64" / "libnvrtc.so"


def test_an_incomplete_or_wrong_toolkit_is_told(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MossError, match="nvcc, is missing: install CUDA Toolkit 12"):
        gpu.find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / "lib64" / "libcublas.so").unlink()
    (toolkit / "include" / "curand.h").unlink()
    with pytest.raises(MossError, match=r"lacks libcublas.so, curand.h: install"):
        gpu.find_toolkit()
    compiler = toolkit / "bin" / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'release 13.0, V13.0.48'\n")
    with pytest.raises(MossError, match=r"is of CUDA 13.0; Jittor 1.3.11 compiles with CUDA 11 and 12"):
        gpu.find_toolkit()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(MossError, match="--version fails"):
        gpu.find_toolkit()


def test_everything_that_is_missing_is_told_at_once(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", libraries())
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MossError) as raised:
        gpu.require_gpu()
    lines = str(raised.value).splitlines()
    assert len(lines) == 5 and all(line.startswith("  - ") for line in lines[1:4])
    for line, word in zip(lines[1:], ("driver", "nvcc", "CuPy", "Without --gpu"), strict=True):
        assert word in line


def test_parts_that_do_not_fit_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Card("RTX 3060", GIB, GIB, (8, 6), (11, 4))
    monkeypatch.setattr(gpu, "find_card", lambda: old)
    monkeypatch.setattr(gpu, "find_toolkit", lambda: Toolkit(Path("/x/bin/nvcc"), (12, 4), {}))
    monkeypatch.setattr(gpu, "find_cupy", lambda: 11)
    with pytest.raises(MossError) as raised:
        gpu.require_gpu()
    text = str(raised.value)
    assert "pip install 'cupy-cuda12x" in text and "update the driver" in text
    monkeypatch.setattr(gpu, "find_card", lambda: CARD)
    monkeypatch.setattr(gpu, "find_cupy", lambda: None)
    assert gpu.require_gpu()[0] == CARD


@pytest.mark.parametrize(
    ("compute", "release", "wanted"),
    [
        ((8, 6), (11, 0), "11.1"),
        ((9, 0), (11, 4), "11.8"),
        ((12, 0), (12, 4), "12.8"),
        ((12, 0), (12, 8), None),
        ((6, 1), (12, 2), None),
    ],
)
def test_a_card_that_is_newer_than_the_toolkit_is_told(
    monkeypatch: pytest.MonkeyPatch, compute: tuple[int, int], release: tuple[int, int], wanted: str | None
) -> None:
    monkeypatch.setattr(gpu, "find_card", lambda: Card("a card", GIB, GIB, compute, (12, 9)))
    monkeypatch.setattr(gpu, "find_toolkit", lambda: Toolkit(Path("/x/bin/nvcc"), release, {}))
    monkeypatch.setattr(gpu, "find_cupy", lambda: None)
    if wanted is None:
        gpu.require_gpu()
    else:
        with pytest.raises(MossError, match=f"needs CUDA {wanted} or newer"):
            gpu.require_gpu()


def test_the_installed_cupy_tells_its_cuda() -> None:
    names = list(gpu.installed_cupy())
    if not names:
        with pytest.raises(MossError, match="CuPy is missing"):
            gpu.find_cupy()
    else:
        assert gpu.find_cupy() == gpu.CUPY_WHEELS[names[0]]
    assert re.fullmatch(r"cupy(-cuda1\dx)?", names[0] if names else "cupy")
