"""The README's commands and its Python block are true of this commit, in both languages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.commands.cli import COMMANDS
from tests.support.models import tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_file_that_it_names_is_there(name: str) -> None:
    text = text_of(name)
    commands = set(re.findall(r"(?:^|`)moss-jt ([a-z]+)", text, re.MULTILINE))
    assert "chat" in commands and commands <= COMMANDS.keys()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


@pytest.mark.parametrize("name", READMES)
def test_its_python_runs(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text_of(name), re.DOTALL)
    assert blocks
    for block in blocks:
        program = block.replace('"moss-tiny"', repr(str(tiny_model_folder())))
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_both_languages_give_the_same_numbers_and_commands() -> None:
    """Every fenced command and every row of every table is in both, comments and words apart."""
    english, chinese = (text_of(name) for name in READMES)
    for text_of_one, text_of_other in ((english, chinese), (chinese, english)):
        numbers = [
            re.findall(r"\d+(?:\.\d+)?", line) for line in text_of_one.splitlines() if line.startswith("|")
        ]
        others = [
            re.findall(r"\d+(?:\.\d+)?", line) for line in text_of_other.splitlines() if line.startswith("|")
        ]
        assert numbers == others


def test_the_subcommands_explain_themselves() -> None:
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moss_jt", command, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) > 4
