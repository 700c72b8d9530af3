"""The probe of the disk: done once per folder, remembered, and right about disks without direct reads."""

import json
from pathlib import Path

import pytest

from moss_jt.errors import MossError
from moss_jt.weights import disk_speed as module
from moss_jt.weights.disk_speed import DiskSpeed, disk_speed
from moss_jt.weights.file_reader import Extent


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "block-00.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(300_000))
    return path


def test_probed_once_and_remembered(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "home" / "disk-speed.json"
    first = disk_speed(weights, memory)
    assert first.buffered > 0 and first.best >= first.buffered

    def never(piece: Extent, direct: bool, in_flight: int) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "_timed", never)
    assert disk_speed(weights, memory) == first
    assert [path.name for path in memory.parent.iterdir()] == ["disk-speed.json"]


def test_folders_that_are_gone_are_forgotten(weights: Path, tmp_path: Path) -> None:
    memory = tmp_path / "disk-speed.json"
    disk_speed(weights, memory)
    weights.parent.rename(tmp_path / "moved")
    disk_speed(tmp_path / "moved" / weights.name, memory)
    assert [key.partition(" on device ")[0] for key in json.loads(memory.read_text())] == [
        str(tmp_path / "moved")
    ]


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 3}', '{"x": {"buffered": "a", "direct": 1}}', "\x00"])
def test_a_spoiled_memory_is_replaced(weights: Path, tmp_path: Path, text: str) -> None:
    memory = tmp_path / "disk-speed.json"
    memory.write_text(text)
    assert disk_speed(weights, memory).buffered > 0
    assert len(json.loads(memory.read_text())) == 1


def test_a_home_that_cannot_be_written_is_no_fault(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert disk_speed(weights, tmp_path / "file" / "below" / "disk-speed.json").buffered > 0


def test_a_disk_without_direct_reads_is_read_buffered(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(piece: Extent, direct: bool, in_flight: int) -> float:
        if direct:
            raise MossError("cannot read: Invalid argument")
        return 7e8

    monkeypatch.setattr(module, "_timed", timed)
    speed = disk_speed(weights, tmp_path / "disk-speed.json")
    assert speed == DiskSpeed(7e8, 0.0, 7e8, 0.0) and not speed.prefer_direct and speed.best == 7e8


def test_the_faster_way_is_chosen() -> None:
    assert DiskSpeed(1.0, 2.0).prefer_direct and not DiskSpeed(2.0, 1.0).prefer_direct


def test_several_reads_at_once_are_made_where_they_are_clearly_faster() -> None:
    assert DiskSpeed(1.0, 2.0, 1.0, 5.0).in_flight > 1 and DiskSpeed(1.0, 2.0, 1.0, 5.0).prefer_direct
    assert DiskSpeed(2.0, 1.0, 5.0, 1.0).in_flight > 1 and not DiskSpeed(2.0, 1.0, 5.0, 1.0).prefer_direct
    assert DiskSpeed(2.0, 1.0, 2.1, 1.0).in_flight == 1 and DiskSpeed(2.0, 1.0).in_flight == 1
    assert DiskSpeed(1.0, 2.0, 1.0, 5.0).best == 5.0
