"""Programs that are started without standard streams, or in the background: one line, never a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model_folder

MODEL = "the small model's folder"


def run(arguments: tuple[str, ...], redirect: str) -> subprocess.CompletedProcess[str]:
    """By a shell, which can close streams."""
    actual = [str(tiny_model_folder()) if argument == MODEL else argument for argument in arguments]
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-P", "-m", *actual]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


GENERATE = ("moss_jt", "generate", MODEL, "--greedy", "--max-new-tokens", "3")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((*GENERATE, "--prompt", "a"), 0, ""),
        (GENERATE, 1, "the prompt is empty"),
        ((*GENERATE, "--prompt", "-"), 1, "the prompt is empty"),
        (("moss_jt", "chat", MODEL), 0, ""),
    ],
)
def test_a_closed_standard_input_is_an_empty_one(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run(arguments, "0<&-")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert said in done.stderr


@pytest.mark.parametrize("redirect", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_outputs_take_no_files_place(redirect: str) -> None:
    done = run((*GENERATE, "--prompt", "a"), redirect)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_without_streams_loads_a_model() -> None:
    code = f"from moss_jt import Moss; import os; Moss.load({str(tiny_model_folder())!r}).logits([1]); os._exit(7)"
    command = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", sys.executable, "-P", "-c", code]
    assert subprocess.run(command, check=False, timeout=120).returncode == 7


@pytest.mark.parametrize("redirect", ["0<&-", "</dev/null"])
def test_the_drawing_server_needs_no_standard_input(redirect: str) -> None:
    command = [
        "sh",
        "-c",
        f'exec "$@" {redirect}',
        "sh",
        sys.executable,
        "-P",
        "-m",
        "moss_jt.demos.drawing_server",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("drawing at http://127.0.0.1:")
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "٣"])
def test_the_drawing_server_says_what_a_port_is(port: str) -> None:
    done = run(("moss_jt.demos.drawing_server", port), "")
    assert done.returncode == 2 and "is not a port" in done.stderr


@pytest.mark.parametrize("command", [("plan",), ("verify",)])
def test_the_small_model_needs_no_converting_first(command: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [sys.executable, "-P", "-m", "moss_jt", *command, "moss-tiny"]
    environment = {**os.environ, "MOSS_JT_HOME": str(tmp_path)}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "moss-tiny" in done.stdout
