"""What this machine reads per second: the best of what was probed, and never a reason to fail."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_jt.measure import machine_speed
from moss_jt.measure.machine_speed import NOTE, home_disk_speed, memory_speed, product_speed
from moss_jt.store.sizes import MIB


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "MEMORY_BYTES", 4 * MIB)
    monkeypatch.setattr(machine_speed, "DISK_BYTES", MIB)


@pytest.mark.parametrize(
    "measure, probe", [(memory_speed, "_probe_memory"), (product_speed, "_probe_products")]
)
def test_the_best_that_was_seen_counts(
    measure: Callable[[Path], float], probe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(tmp_path / "home") > 0
    for seen, best in (
        (1e15, 1e15),
        (1.0, 1e15),
        (2e15, 2e15),
    ):  # among other work a machine only seems slower
        monkeypatch.setattr(machine_speed, probe, lambda seen=seen: seen)
        assert measure(tmp_path / "home") == best


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bytes_per_s": 3}',
        '{"bytes_per_s": {"x": "fast"}}',
        '{"bytes_per_s": {"KEY": Infinity}}',
    ],
)
def test_a_note_that_is_none_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / NOTE).write_text(text.replace("KEY", machine_speed._key()))
    speed = memory_speed(tmp_path)
    assert 0 < speed < float("inf")
    assert speed in json.loads((tmp_path / NOTE).read_text())["bytes_per_s"].values()


def test_the_disk_is_probed_once_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = home_disk_speed(tmp_path)
    assert first is not None and first > 0 and list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(machine_speed.os, "urandom", lambda count: pytest.fail("written again"))
    assert home_disk_speed(tmp_path) == first


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert home_disk_speed(tmp_path / "file") is None
    assert memory_speed(tmp_path / "file") > 0
