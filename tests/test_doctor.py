"""moss-jt doctor: a verdict for everything, also where things are missing or damaged."""

import shutil
from pathlib import Path

import pytest

from moss_jt import doctor
from moss_jt.cli import main
from moss_jt.errors import MossError
from tests.support.models import tiny_model_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    return int(str(left.value.code)), capsys.readouterr().out


def test_every_part_has_a_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == 0
    for what in (
        "Python",
        "C++ compiler",
        "Jittor",
        "oneDNN",
        "Processor",
        "Memory",
        "Disk",
        "GPU",
        "CuPy",
        "Models",
    ):
        assert f" {what} " in text
    assert "moss-jt chat moss-tiny" in text


def test_a_missing_compiler_is_a_problem_with_its_remedy(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MossError("g++ is missing: install it")

    monkeypatch.setattr(doctor, "check_compiler", missing)
    code, text = run(capsys)
    assert code == 1
    assert "g++ is missing: install it" in text
    assert "1 problem(s)" in text


def test_what_is_missing_is_noted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(doctor, "has_onednn_wheels", lambda: False)
    assert doctor.jittor().verdict == "problem"
    assert doctor.onednn().advice.startswith("pip install onednn")
    assert doctor.cupy().text == "not installed"
    usage = shutil.disk_usage(home)._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "45 GB" in doctor.disk().advice
    monkeypatch.setattr(doctor.ctypes, "CDLL", no_library)
    assert "no NVIDIA driver" in doctor.gpu().text


def no_library(name: str) -> None:
    raise OSError(name)


def test_model_folders_are_judged(home: Path) -> None:
    shutil.copytree(tiny_model_folder(), home / "models" / "good")
    shutil.copytree(tiny_model_folder(), home / "models" / "cut")
    (home / "models" / "cut" / "head.safetensors").write_bytes(b"")
    (home / "models" / "begun").mkdir()
    found = {finding.what: finding for finding in doctor.models()}
    assert [found[f"Model {name}"].verdict for name in ("good", "cut", "begun")] == ["ok", "problem", "note"]
    assert "4 blocks, float16" in found["Model good"].text
    assert "head.safetensors" in found["Model cut"].advice
