"""make setup with a Python that is too new, and after a failed one, with scripts in Python's place: nothing is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def stand_in(path: Path, version: str) -> Path:
    """A Python of that version that makes virtual environments, and has no pip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    older = int(version.split(".")[1]) < 11 or int(version.split(".")[1]) > 12
    path.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  *sys.exit*) exit {int(older)} ;;
  *print*) echo {version} ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/made-by-{version}" ;;
  *) echo no pip here; exit 3 ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def make(python: Path | str, venv: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "setup", f"PYTHON={python}", f"VENV={venv}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("version", ["3.9", "3.10", "3.13", "3.14"])
def test_a_python_that_does_not_fit_is_said_first(tmp_path: Path, version: str) -> None:
    """pip said so in the end, in a traceback's length of lines."""
    python = stand_in(tmp_path / "python", version)
    done = make(python, tmp_path / "venv")
    assert done.returncode == 2
    assert f"needs Python 3.11 or 3.12, and {python} is {version}." in done.stderr
    assert "make setup PYTHON=python3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_a_python_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = make("no-such-python", tmp_path / "venv")
    assert done.returncode == 2 and "needs Python 3.11 or 3.12" in done.stderr


@needs_make
def test_what_a_failed_setup_with_an_older_python_left_goes(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([stand_in(tmp_path / "old", "3.9"), "-m", "venv", venv], check=True)
    done = make(stand_in(tmp_path / "new", "3.12"), venv)
    assert "no pip here" in done.stdout + done.stderr
    assert (venv / "made-by-3.12").exists() and not (venv / "made-by-3.9").exists()


@needs_make
def test_an_environment_of_the_same_python_stays(tmp_path: Path) -> None:
    venv, python = tmp_path / "venv", stand_in(tmp_path / "new", "3.12")
    subprocess.run([python, "-m", "venv", venv], check=True)
    (venv / "downloaded").touch()
    make(python, venv)
    assert (venv / "downloaded").exists()
