"""Ctrl-C as a terminal sends it: to the whole process group, while the real model computes. Every program ends afterwards."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.models import tiny_model_folder
from tests.support.pseudo_terminal import CTRL_C, children_of, program

# Hot, so that it hardly ever ends by itself.
ENDLESS = ("--temperature", "3", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "2000", "--seed", "1")

LOADED = """
import sys
{first}
from moss_jt import Moss
moss = Moss.load(sys.argv[1])
print("loaded", flush=True)
"""
# Jittor's front part was imported before, by somebody else: Jittor starts its pool then.
POOL = "import os; os.environ['cache_name'] = 'default'; import jittor_utils"
INTERRUPTED = """
try:
    while True:
        for count, piece in enumerate(moss.generate("<|Human|>: a", max_new_tokens=1000, temperature=3.0)):
            if not count:
                print("going", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_chat_ends_after_an_interrupted_answer() -> None:
    """It did not: a process of Jittor's pool died of the same Ctrl-C with the pool's lock in its hands."""
    with program("-m", "moss_jt", "chat", str(tiny_model_folder()), *ENDLESS, LANG="C.UTF-8") as chat:
        for _ in range(2):
            chat.wait_for("› ")
            chat.type(b"hello\r")
            chat.wait_for("MOSS ")
            chat.type(CTRL_C)
            chat.wait_for("(Stopped")
        chat.wait_for("› ")
        chat.type(b"stop\r")
        assert chat.end() == 0
        assert "Goodbye" in chat.shown.decode()


def test_a_generation_ends_with_130_and_one_line() -> None:
    arguments = ("generate", str(tiny_model_folder()), "--prompt", "<|Human|>: a", *ENDLESS)
    with program("-m", "moss_jt", *arguments) as generation:
        generation.wait_for(" ")
        os.killpg(generation.pid, signal.SIGINT)
        assert generation.end() == 130
        assert "moss-jt: stopped." in generation.shown.decode()
        assert "Traceback" not in generation.shown.decode()


@pytest.mark.parametrize("first", ["", POOL], ids=["alone", "with a pool"])
def test_a_python_program_goes_on_and_ends(first: str) -> None:
    code = LOADED.format(first=first) + INTERRUPTED
    with program("-c", code, str(tiny_model_folder())) as python:
        python.wait_for("going")
        assert children_of(python.pid) == []
        python.type(CTRL_C)
        python.wait_for("interrupted")
        assert python.end() == 0


def test_a_copy_of_a_process_with_a_model_says_that_it_cannot_compute() -> None:
    """OpenMP's threads are not copied: the copy waited for them for ever. Leaving must not wait for any either."""
    code = (
        LOADED.format(first="")
        + """
import os
from moss_jt.errors import MossError
list(moss.generate("a", max_new_tokens=2, temperature=0))
for attempt in (lambda: moss.logits([1]), lambda: list(moss.generate("a")), lambda: Moss.load(sys.argv[1])):
    child = os.fork()
    if not child:
        try:
            attempt()
        except MossError as error:
            assert "Load the model after the fork" in str(error)
            moss.close()
            sys.exit(7)
        sys.exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert list(moss.generate("a", max_new_tokens=2, temperature=0))
"""
    )
    command = [sys.executable, "-P", "-c", code, str(tiny_model_folder())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
