"""The README's commands and its Python block are true of this commit, in both languages."""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_tables import CONTEXT, SYSTEM, card_plan, cpu_plan
from moss_jt.commands.cli import COMMANDS
from moss_jt.commands.plan import ASSUMED_PRODUCTS
from moss_jt.errors import MossError
from moss_jt.plan.first_word import GFLOP, first_word
from moss_jt.plan.report import ASSUMED_DISK, ASSUMED_MEMORY, GB, Speed, Speeds
from moss_jt.plan.residency import BITS_NAMES
from moss_jt.plan.summary import duration
from moss_jt.store.sizes import GIB
from tests.support.models import tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")

SPEEDS = Speeds(Speed(ASSUMED_DISK * GB, "assumed"), Speed(ASSUMED_MEMORY * GB, "assumed"))


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
        if block.startswith("# my_plugin.py"):
            continue  # the next test's
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("name", READMES)
def test_its_plugin_answers(name: str, tmp_path: Path) -> None:
    """As a reader would try it: the file, and what the README says to ask."""
    (block,) = re.findall(r"```python\n(# my_plugin.py\n.*?)```", text_of(name), re.DOTALL)
    command, question = re.findall(
        r"^moss-jt chat moss-tiny (--plugins .*?) +# .*?[:：] ?(Tell .*)$", text_of(name), re.MULTILINE
    )[0]
    (tmp_path / "my_plugin.py").write_text(block, encoding="utf-8")
    done = moss_jt(
        "ask", str(tiny_model_folder()), question, *command.split(), "--greedy", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)
    assert (
        actual["commands"] == ['Search("the Moon")']
        and "old quiet bright stone" in actual["results"][0]["text"]
    )


def moss_jt(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "moss_jt", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


def commands_of(name: str) -> list[list[str]]:
    """Every moss-jt line of its shell blocks, as the shell splits it; what follows < or # is left out."""
    collected = []
    for block in re.findall(r"```sh\n(.*?)```", text_of(name), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("moss-jt "):
                collected.append(shlex.split(line.partition(" < ")[0], comments=True)[1:])
    return collected


@pytest.mark.parametrize("name", READMES)
def test_every_option_in_its_commands_is_there(name: str) -> None:
    commands = commands_of(name)
    assert len(commands) > 12
    for command, *arguments in commands:
        module = importlib.import_module(f"moss_jt.commands.{COMMANDS[command][0]}")
        known = {option for parameter in module.command.params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= known, arguments


def test_the_commands_that_need_no_download_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    runnable = [
        words for words in commands_of("README.md") if words[0] == "plan" or words[:2] == ["ask", "moss-tiny"]
    ]
    assert len(runnable) == 3
    for words in runnable:
        done = moss_jt(*words)
        assert done.returncode == 0, done.stderr
        assert "Runs. 100 tokens take about" in done.stdout or "1776" in done.stdout
    assert commands_of("README.md") == commands_of("README.zh.md")


@pytest.mark.parametrize("name", READMES)
def test_what_it_says_of_sizes_and_machines_is_what_the_plan_says(name: str) -> None:
    text = text_of(name)
    rows = re.findall(
        r"^\| (float16|int8|int4)[^|]*\| [\d.]+ GB \| ([\d.]+) GB \| ([\d.]+) GiB \|$", text, re.MULTILINE
    )
    expected = []
    for bits, precision in BITS_NAMES.items():
        placed = cpu_plan(bits, CONTEXT, 64 * GIB)
        assert not placed.streams
        expected.append(
            (precision, f"{placed.sizes.weight_bytes / GB:.1f}", f"{placed.peak_bytes / GIB:.1f}")
        )
    assert rows == expected
    times = re.findall(
        r"^\| `--memory (\d+)GiB`[^|]*\| ([\d.]+) \| ([\d.–]+) \| ([\d.]+) \| ([\d.]+) \|$",
        text,
        re.MULTILINE,
    )
    assert len(times) == 4
    for gibibytes, *cells in times:
        budget = int(gibibytes) * GIB
        seconds = [SPEEDS.seconds(cpu_plan(bits, CONTEXT, budget)) for bits in (16, 8, 4)]
        drafted = None
        with contextlib.suppress(MossError):
            drafted = SPEEDS.seconds(cpu_plan(16, CONTEXT, budget, draft_bits=4))
        if drafted is not None and drafted < seconds[0]:
            seconds.insert(1, drafted)
        expected = [f"{one:.0f}" if one >= 10 else f"{one:.1f}" for one in seconds]
        assert cells == (expected if len(expected) == 4 else [expected[0], "–", *expected[1:]])
    smallest_with_copy = cpu_plan(16, CONTEXT, 13 * GIB, draft_bits=4)
    assert "13 GiB" in text and smallest_with_copy.copy is not None
    assert round(smallest_with_copy.copy_bytes / GB) == 8 and "8 GB" in text
    # "holds int4" and "holds float16" of the blocks for each machine, and their seconds per token.
    assert not cpu_plan(4, CONTEXT, 14 * GIB).streams and not cpu_plan(16, CONTEXT, 62 * GIB).streams
    assert not card_plan(4, 1024, 12, 16 - SYSTEM).streams and card_plan(4, CONTEXT, 12, 16 - SYSTEM).streams
    wait = first_word(
        cpu_plan(4, CONTEXT, 14 * GIB), SPEEDS.disk.bytes_per_s, Speed(ASSUMED_PRODUCTS * GFLOP, "assumed")
    )
    assert f"{duration(wait.load_s)} and {duration(wait.read_s)};" in text_of("README.md")
    assert (
        f"{wait.load_s:.1f} 秒和 {wait.read_s:.0f} 秒" in text_of("README.zh.md") and ASSUMED_PRODUCTS == 100
    )


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
