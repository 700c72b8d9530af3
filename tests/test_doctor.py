"""moss-jt doctor: a verdict for everything, also where things are missing or damaged."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moss_jt.backend.cards import Card
from moss_jt.backend.toolkit import Toolkit
from moss_jt.commands.cli import main
from moss_jt.errors import MossError
from moss_jt.measure import doctor
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
        "CUDA toolkit",
        "CuPy",
        "Models",
    ):
        assert f" {what} " in text
    assert "moss-jt chat moss-tiny" in text


def test_onednn_that_is_switched_off_is_said(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("use_mkl", "0")
    assert "oneDNN         switched off by use_mkl=0" in run(capsys)[1]


def test_a_missing_compiler_is_a_problem_with_its_remedy(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MossError("g++ is missing: install it")

    monkeypatch.setattr(doctor, "check_compiler", missing)
    code, text = run(capsys)
    assert code == 1
    assert "g++ is missing: install it" in text
    assert "1 problem to solve" in text


def test_what_is_missing_is_noted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(doctor, "has_onednn_wheels", lambda: False)
    assert doctor.jittor().verdict == "problem"
    assert "long prompts are read slowly" in doctor.onednn().text
    usage = shutil.disk_usage(home)._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "45 GB" in doctor.disk().advice


def test_a_missing_onednn_is_a_problem_with_its_remedy(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("use_mkl", raising=False)
    monkeypatch.setattr(doctor, "has_onednn_wheels", lambda: True)
    monkeypatch.setattr(doctor, "onednn_is_linked", lambda: False)
    monkeypatch.setattr(doctor, "ONEDNN_WHEELS", {"lib": ("no-such-wheel-of-moss-jt", "libmkldnn.so")})
    code, text = run(capsys)
    assert code == 1
    assert "no-such-wheel-of-moss-jt is not installed" in text and "pip install" in text


def test_jittor_that_is_not_compiled_yet_is_no_problem(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITTOR_HOME", str(home))
    actual = doctor.jittor()
    assert (
        actual.verdict == "note" and "not compiled yet" in actual.text and "1 to 3 minutes" in actual.advice
    )


def test_a_compiler_that_does_not_run_is_a_problem(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("cc_path", str(broken))
    assert doctor.compiler().verdict == "problem"


CARD = Card("Card 9000", 12 * (1 << 30), 11 * (1 << 30), (8, 6), (13, 0))


def missing(text: str) -> Callable[..., Any]:
    def probe(*_: object) -> Any:
        raise MossError(text)

    return probe


def test_what_a_gpu_needs_is_noted_and_what_does_not_suit_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "find_cards", lambda: [CARD])
    monkeypatch.setattr(doctor, "find_toolkit", missing("nvcc is missing: install it."))
    monkeypatch.setattr(doctor, "find_cupy", lambda series: 13)
    actual = {finding.what: finding for finding in doctor.gpu_findings()}
    assert (
        actual["GPU"].text
        == "0: Card 9000, sm_86, 12.00 GiB, of which 11.00 GiB are free; the driver knows CUDA up to 13.0"
    )
    assert actual["CUDA toolkit"].verdict == "note" and "install it" in actual["CUDA toolkit"].advice
    assert "--gpu" not in actual
    monkeypatch.setattr(
        doctor, "find_toolkit", lambda *_: Toolkit(Path("/x/bin/nvcc"), (13, 0), {}, scattered=True)
    )
    monkeypatch.setattr(doctor, "require_gpu", lambda number: None)
    toolkit, last = list(doctor.gpu_findings())[1], list(doctor.gpu_findings())[-1]
    assert toolkit.text == "13.0, /x/bin/nvcc, completed with pip's wheels at the first start"
    assert last.text == "everything that it needs is there"
    monkeypatch.setattr(doctor, "require_gpu", missing("update the driver."))
    last = list(doctor.gpu_findings())[-1]
    assert (last.what, last.verdict, last.advice) == ("--gpu", "problem", "update the driver.")


def test_each_card_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(CARD, name="Card 1", compute=(5, 2), number=1)
    monkeypatch.setattr(doctor, "find_cards", lambda: [CARD, old])
    monkeypatch.setattr(doctor, "find_toolkit", lambda *_: Toolkit(Path("/x/bin/nvcc"), (13, 0), {}))
    monkeypatch.setattr(doctor, "find_cupy", lambda series: 13)
    monkeypatch.setattr(doctor, "require_gpu", lambda number: number and missing("too old")())
    actual = list(doctor.gpu_findings())
    assert [(finding.what, finding.verdict) for finding in actual] == [
        ("GPU", "ok"),
        ("GPU", "note"),
        ("CUDA toolkit", "ok"),
        ("CuPy", "ok"),
        ("--gpu --device 0", "ok"),
        ("--gpu --device 1", "problem"),
    ]
    assert actual[1].text.startswith("1: Card 1") and "6.0 (Pascal)" in actual[1].advice


@pytest.mark.parametrize(
    ("cards", "wanted"),
    [
        (missing("no driver"), ("a card of compute capability 6.0", "moss-jt[cuda13]")),
        (lambda: [CARD], ("moss-jt[cuda13]", "GB to download")),
        (lambda: [replace(CARD, compute=(6, 1))], ("moss-jt[cuda12]", "CUDA Toolkit 12 with nvcc")),
    ],
)
def test_with_gpu_doctor_says_what_it_takes(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cards: Any,
    wanted: tuple[str, ...],
) -> None:
    monkeypatch.setattr(doctor, "find_cards", cards)
    monkeypatch.setattr(doctor, "find_toolkit", missing("nvcc is missing."))
    monkeypatch.setattr(doctor, "find_cupy", missing("CuPy is missing."))
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--gpu"])
    text = capsys.readouterr().out
    assert left.value.code == 1 and "Only to compute on a GPU" not in text
    assert "needs these steps" in text and "Nothing was downloaded" in text
    for words in wanted:
        assert words in text


def test_what_cannot_be_told_does_not_end_the_examination(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable() -> None:
        raise MossError("cannot read /proc/meminfo")

    monkeypatch.setattr(doctor, "process_memory", unreadable)
    code, text = run(capsys)
    assert code == 1
    assert "cannot read /proc/meminfo" in text and " Models " in text


def test_model_folders_are_judged(home: Path) -> None:
    shutil.copytree(tiny_model_folder(), home / "models" / "good")
    shutil.copytree(tiny_model_folder(), home / "models" / "cut")
    (home / "models" / "cut" / "head.safetensors").write_bytes(b"")
    (home / "models" / "begun").mkdir()
    actual = {finding.what: finding for finding in doctor.models()}
    assert [actual[f"Model {name}"].verdict for name in ("good", "cut", "begun")] == ["ok", "problem", "note"]
    assert "4 blocks, float16, " in actual["Model good"].text and " MiB in " in actual["Model good"].text
    assert "head.safetensors" in actual["Model cut"].advice
