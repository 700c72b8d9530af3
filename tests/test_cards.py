"""The machine's cards are asked for in another process, numbered as CUDA does, and refused by name."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moss_jt.backend import card_probe, cards, device
from moss_jt.backend.cards import Card
from moss_jt.backend.device import CARDS_SWITCH
from moss_jt.errors import MossError
from tests.emulation import sim_gpu

GIB = 1 << 30
CARD = Card("RTX 3060", 12 * GIB, 11 * GIB, (8, 6), (12, 4))


class Driver:
    """libcuda with two cards; ``changes`` replaces answers."""

    def __init__(self, **changes: Any) -> None:
        self.answers = {"count": 2, "init": 0, "major": 8, "minor": 6, "managed": 1, **changes}

    def cuInit(self, flags: int) -> int:
        return int(self.answers["init"])

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.answers["count"]
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"RTX 30%d0" % (6 + device.value)
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = 12 * GIB
        return 0

    def cuDriverGetVersion(self, known: Any) -> int:
        known._obj.value = 12040
        return 0

    def cuDeviceGetPCIBusId(self, bus: Any, size: int, device: Any) -> int:
        bus.value = b"0000:0%d:00.0" % (1 + device.value)
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:
        value._obj.value = self.answers[{75: "major", 76: "minor", 89: "managed"}[number]]
        return 0


def only(name: str, library: Any) -> Callable[..., Any]:
    """A loader that knows only this library."""

    def load(wanted: str, *_: Any) -> Any:
        if wanted != name:
            raise OSError(f"{wanted}: cannot open")
        return library

    return load


def answers(**changes: Any) -> Callable[[], dict[str, Any]]:
    """What the other process says of the driver above."""

    def ask() -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctypes, "CDLL", only("libcuda.so.1", Driver(**changes)))
            return card_probe.probe()

    return ask


class NvmlError(Exception):
    pass


def nvml(free: int | None) -> SimpleNamespace:
    """nvidia-ml-py, which knows the second card or, for None, does not start."""

    def start() -> None:
        if free is None:
            raise NvmlError("Driver Not Loaded")

    def handle(bus: bytes) -> bytes:
        if bus != b"0000:02:00.0":
            raise NvmlError("Not Found")
        return bus

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByPciBusId=handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=free),
    )


def test_cards_are_numbered_and_asked_for_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "ask_driver", answers())
    monkeypatch.setattr(cards, "free_bytes", lambda buses: {"0000:02:00.0": 5 * GIB})
    first, second = cards.find_cards()
    assert first == Card("RTX 3060", 12 * GIB, 12 * GIB, (8, 6), (12, 4), True, 0, "0000:01:00.0")
    assert second == Card("RTX 3070", 12 * GIB, 5 * GIB, (8, 6), (12, 4), True, 1, "0000:02:00.0")
    assert cards.find_card(1) == second


def test_a_card_that_nvml_cannot_tell_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    buses = ["0000:02:00.0"]
    monkeypatch.setitem(sys.modules, "pynvml", nvml(7))
    assert cards.free_bytes(buses) == {"0000:02:00.0": 7}
    assert cards.free_bytes([*buses, "0000:01:00.0"]) == {"0000:02:00.0": 7}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(None))
    assert cards.free_bytes(buses) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cards.free_bytes(buses) == {}


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({"count": 0}, 0, "no card that it can use"),
        ({"init": 100}, 0, "CUDA error 100"),
        ({}, 2, r"no gpu:2: here are 2 cards, gpu:0 \(RTX 3060\), gpu:1 \(RTX 3070\)"),
        ({"count": 1}, 1, r"no gpu:1: here is one card, gpu:0 \(RTX 3060\)"),
        (
            {"major": 5, "minor": 2},
            1,
            r"RTX 3070 has compute capability 5.2; 6.0 \(Pascal\) or newer is needed\.$",
        ),
    ],
)
def test_a_card_that_cannot_is_told(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], number: int, message: str
) -> None:
    monkeypatch.setattr(cards, "ask_driver", answers(**changes))
    with pytest.raises(MossError, match=message):
        cards.find_card(number)


def test_an_old_card_is_refused_with_the_names_of_those_that_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Card("GTX 960", GIB, GIB, (5, 2), (12, 4))
    monkeypatch.setattr(
        cards, "find_cards", lambda: [old, Card("RTX 3060", GIB, GIB, (8, 6), (12, 4), True, 1)]
    )
    with pytest.raises(MossError, match=r"GTX 960 has .*5\.2.*These would do: gpu:1 \(RTX 3060\)"):
        cards.find_card()


def test_a_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", only("none", None))
    monkeypatch.setattr(cards, "ask_driver", card_probe.probe)
    with pytest.raises(MossError, match="no NVIDIA driver"):
        cards.find_cards()


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "PROBE_S", 0.0)
    with pytest.raises(MossError, match="does not answer"):
        cards.find_cards()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Starts this process anew with those cards."""
    monkeypatch.setenv(CARDS_SWITCH, "so that it is restored")

    def start(value: str | None) -> None:
        device.cards_given.cache_clear()
        if value is None:
            monkeypatch.delenv(CARDS_SWITCH)
        else:
            monkeypatch.setenv(CARDS_SWITCH, value)
        device.cards_given()

    yield start
    device.cards_given.cache_clear()


@pytest.mark.parametrize(
    ("value", "number", "wanted"),
    [
        (None, 0, "0"),
        (None, 3, "3"),
        ("2, 0", 1, "0"),
        ("GPU-8f2,GPU-11a", 0, "GPU-8f2"),
        ("1", 1, None),
        ("", 0, None),
    ],
)
def test_a_number_counts_among_the_cards_that_were_given(
    given: Callable[[str | None], None], value: str | None, number: int, wanted: str | None
) -> None:
    given(value)
    if wanted is None:
        with pytest.raises(MossError, match=f"no gpu:{number}: CUDA_VISIBLE_DEVICES is"):
            device.visible(number)
    else:
        assert device.visible(number) == wanted


def test_the_driver_is_asked_for_what_was_given_and_not_for_what_was_chosen(
    given: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the simulated driver, which knows CUDA_VISIBLE_DEVICES."""
    monkeypatch.setenv("LD_LIBRARY_PATH", sim_gpu.build()["LD_LIBRARY_PATH"])
    monkeypatch.setenv("SIM_GPU_CARDS", "3")
    given("2,1")
    os.environ[CARDS_SWITCH] = device.visible(1)
    actual = cards.ask_driver()["cards"]
    assert [card["name"] for card in actual] == ["simulated GPU 2", "simulated GPU 1"]
    given(None)
    assert len(cards.find_cards()) == 3
