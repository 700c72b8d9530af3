"""What this machine reads per second: probed once and remembered, and never a reason to fail."""

import json
from pathlib import Path

import pytest

from moss_jt.measure import machine_speed
from moss_jt.measure.machine_speed import NOTE, home_disk_speed, memory_speed, product_speed
from moss_jt.store.sizes import MIB


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "MEMORY_BYTES", 4 * MIB)
    monkeypatch.setattr(machine_speed, "DISK_BYTES", MIB)


def test_memory_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = memory_speed(tmp_path / "home")
    assert first > 0
    monkeypatch.setattr(machine_speed, "_probe_memory", lambda: pytest.fail("probed again"))
    assert memory_speed(tmp_path / "home") == first


def test_products_are_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = product_speed(tmp_path)
    assert first > 0
    monkeypatch.setattr(machine_speed, "_probe_products", lambda: pytest.fail("probed again"))
    assert product_speed(tmp_path) == first


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bytes_per_s": 3}', '{"bytes_per_s": {"x": "fast"}}'])
def test_a_note_that_is_none_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / NOTE).write_text(text)
    speed = memory_speed(tmp_path)
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
