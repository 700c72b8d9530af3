"""moss-jt plan: for folders, names and machines that are not there, without Jittor and without loading anything."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moss_jt.commands.cli import main
from moss_jt.commands.plan import command
from tests.support.random_models import SMALL, random_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_model_folder_is_measured_and_planned(home: Path) -> None:
    text = plan(str(random_folder(SMALL)), "--memory", "2GiB", "--context", "100").output
    assert "100 tokens" in text and "GB/s measured" in text
    assert f"0-{SMALL.n_layer - 1}; head 0-{SMALL.vocab_size - 1}" in text
    assert (home / "disk-speed.json").exists()


def test_a_name_is_planned_with_nothing_downloaded() -> None:
    text = plan("fnlp/moss-moon-003-sft-int4", "--memory", "8GiB", "--disk-speed", "2.5").output
    assert "int4" in text and "2.50 GB/s given" in text and "2048 tokens" in text


def test_a_gpu_that_is_not_there() -> None:
    text = plan(
        "moss-moon-003", "--gpu-memory", "8GiB", "--host-memory", "32GiB", "--link-speed", "25"
    ).output
    assert "GPU memory" in text and "host, pinned" in text and "25.00 GB/s given" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here", "--memory", "8GiB"], "no model called 'nothing-here'"),
        (["moss-moon-003", "--memory", "1GiB"], "too little for this model"),
        (["moss-moon-003", "--memory", "lots"], "is no amount of memory"),
        (["moss-moon-003", "--memory", "8GiB", "--context", "4096"], "2048 positions"),
        (["moss-moon-003", "--memory", "8GiB", "--disk-speed", "0"], "0.0 GB/s is no speed"),
        (["moss-moon-003", "--gpu-memory", "80%", "--host-memory", "32GiB"], "a share means nothing"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith("moss-jt: error: ") and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "8GiB", "--gpu-memory", "8GiB"], ["--host-memory", "8GiB"], ["--link-speed", "3"]],
)
def test_options_that_contradict_are_usage_errors(arguments: list[str]) -> None:
    assert plan("moss-moon-003", *arguments).exit_code == 2


def test_planning_starts_no_jittor() -> None:
    code = (
        "import sys; from moss_jt.commands.cli import main\n"
        "try: main(['plan', 'moss-moon-003', '--memory', '8GiB'])\n"
        "finally: print(sorted(name for name in sys.modules if name.startswith(('jittor', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
