"""What --gpu needs is found, and what is missing is told at once, with what to do."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moss_jt.backend import gpu_requirements, toolkit
from moss_jt.backend.cards import Card
from moss_jt.backend.toolkit import Toolkit
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.placement import gpu_budget, gpu_planner
from moss_jt.store.model_folder import open_store
from tests.support.models import tiny_model_folder

GIB = 1 << 30
CARD = Card("RTX 3060", 12 * GIB, 11 * GIB, (8, 6), (12, 4))


def test_a_card_without_shared_managed_memory_is_refused_for_unified() -> None:
    store, card = open_store(tiny_model_folder()), replace(CARD, unified=False)
    needs = CudaNeeds(store.config, store.bits)
    with pytest.raises(MossError, match="cannot share managed memory.*--offload stream"):
        gpu_planner(store, needs, card, None, None, None, "unified")
    assert not gpu_planner(store, needs, card, None, None, None, "stream").plan().streams


def test_the_default_limit_leaves_a_margin_and_too_much_is_refused() -> None:
    assert gpu_budget(None, CARD) == 11 * GIB - 11 * GIB // 20
    assert gpu_budget("50%", CARD) == 6 * GIB and gpu_budget("8GiB", CARD) == 8 * GIB
    with pytest.raises(MossError, match="more than RTX 3060 has, 12.00 GiB"):
        gpu_budget("13GiB", CARD)


def missing(text: str) -> Callable[..., Any]:
    def probe(*_: Any) -> Any:
        raise MossError(text)

    return probe


def test_everything_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_requirements, "find_card", missing("there is no NVIDIA driver"))
    monkeypatch.setattr(gpu_requirements, "find_toolkit", missing("nvcc is missing"))
    monkeypatch.setattr(gpu_requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MossError) as raised:
        gpu_requirements.require_gpu()
    lines = str(raised.value).splitlines()
    assert len(lines) == 5 and all(line.startswith("  - ") for line in lines[1:4])
    for line, word in zip(lines[1:], ("driver", "nvcc", "CuPy", "Without --gpu"), strict=True):
        assert word in line


def parts(monkeypatch: pytest.MonkeyPatch, card: Card, release: tuple[int, int], cupy: int | None) -> None:
    """Those are what this machine has."""
    monkeypatch.setattr(gpu_requirements, "find_card", lambda number: card)
    monkeypatch.setattr(
        gpu_requirements, "find_toolkit", lambda *_: Toolkit(Path("/x/bin/nvcc"), release, {})
    )
    monkeypatch.setattr(gpu_requirements, "find_cupy", lambda series: cupy)


def test_parts_that_do_not_fit_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch, replace(CARD, driver_cuda=(11, 4)), (12, 4), 11)
    with pytest.raises(MossError) as raised:
        gpu_requirements.require_gpu()
    text = str(raised.value)
    assert "pip uninstall cupy-cuda11x" in text and "pip install 'cupy-cuda12x" in text
    assert "knows CUDA up to 11.4" in text and "update the driver" in text
    parts(monkeypatch, CARD, (12, 4), None)
    assert gpu_requirements.require_gpu()[0] == CARD


@pytest.mark.parametrize(
    ("compute", "release", "wanted"),
    [
        ((8, 6), (11, 0), "11.1"),
        ((9, 0), (11, 4), "11.8"),
        ((12, 0), (12, 4), "12.8"),
        ((12, 0), (12, 8), None),
        ((12, 0), (13, 0), None),
        ((6, 1), (12, 2), None),
        ((7, 5), (13, 0), None),
    ],
)
def test_a_card_that_is_newer_than_the_toolkit_is_told(
    monkeypatch: pytest.MonkeyPatch, compute: tuple[int, int], release: tuple[int, int], wanted: str | None
) -> None:
    parts(monkeypatch, Card("a card", GIB, GIB, compute, (13, 0)), release, None)
    if wanted is None:
        gpu_requirements.require_gpu()
    else:
        with pytest.raises(MossError, match=f"a card .* needs CUDA {wanted} or newer.*moss-jt.cuda13"):
            gpu_requirements.require_gpu()


def test_a_card_that_is_too_old_for_the_toolkit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch, Card("Titan V", GIB, GIB, (7, 0), (13, 0)), (13, 0), 13)
    with pytest.raises(MossError) as raised:
        gpu_requirements.require_gpu()
    text = str(raised.value)
    assert "Titan V (compute capability 7.0) is too old for CUDA 13" in text
    assert "install CUDA Toolkit 12" in text and "moss-jt[cuda12]" in text and text.count("\n") == 2


@pytest.mark.parametrize(
    ("compute", "driver", "series"),
    [((8, 6), (13, 0), 13), ((8, 6), (12, 4), 12), ((6, 1), (13, 0), 12), ((12, 0), (13, 1), 13)],
)
def test_the_newest_cuda_that_card_and_driver_do_is_advised(
    monkeypatch: pytest.MonkeyPatch, compute: tuple[int, int], driver: tuple[int, int], series: int
) -> None:
    monkeypatch.setattr(
        gpu_requirements, "find_card", lambda number: Card("a card", GIB, GIB, compute, driver)
    )
    monkeypatch.setattr(gpu_requirements.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolkit, "nvcc_paths", lambda: [])
    with pytest.raises(MossError, match=f"CuPy is missing: pip install 'moss-jt.cuda{series}") as raised:
        gpu_requirements.require_gpu()
    wanted = {12: "install CUDA Toolkit 12", 13: "pip install 'moss-jt[cuda13]' brings one"}[series]
    assert f"nvcc, is missing: {wanted}" in str(raised.value)


@pytest.mark.parametrize(("code", "count", "refused"), [(3, 0, False), (0, 1, False), (0, 2, True)])
def test_a_card_cannot_be_chosen_once_cuda_runs(
    monkeypatch: pytest.MonkeyPatch, code: int, count: int, refused: bool
) -> None:
    def count_cards(actual: Any) -> int:
        actual._obj.value = count
        return code

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDeviceGetCount=count_cards))
    if not refused:
        gpu_requirements.check_cuda_has_not_started()
        return
    with pytest.raises(MossError, match="uses CUDA already, with 2 cards.*CUDA_VISIBLE_DEVICES"):
        gpu_requirements.check_cuda_has_not_started()


def test_the_installed_cupy_tells_its_cuda() -> None:
    names = list(gpu_requirements.installed_cupy())
    if not names:
        with pytest.raises(MossError, match="CuPy is missing"):
            gpu_requirements.find_cupy()
    else:
        assert gpu_requirements.find_cupy() == gpu_requirements.CUPY_WHEELS[names[0]]
    assert re.fullmatch(r"cupy(-cuda1\dx)?", names[0] if names else "cupy")
