"""What leaves the program: harmless on a terminal, to the letter in a pipe, and one line where it cannot be written."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moss_jt.chat.chat import Chat
from moss_jt.commands import generate
from moss_jt.commands.cli import main
from moss_jt.engine.engine import Engine
from moss_jt.engine.generate import Generation
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.terminal.line_input import PipeReader
from moss_jt.terminal.loop import Terminal
from moss_jt.terminal.output import MAX_MESSAGE_CHARACTERS, message_of, write
from moss_jt.terminal.screen import Screen
from tests.support.scripted_chat import ScriptedMoss
from tests.support.scripted_model import ScriptedModel, ScriptedText

ROOT = Path(__file__).resolve().parents[1]
MOSS_JT = Path(sys.executable).parent / "moss-jt"
# Colours, a title, an 8-bit sequence, a bell, an erased character, a rewritten line, and four kinds of turned writing.
EVIL = "a\x1b[31mb\x1b]0;t\x07c\x9b2Jd\x7fe\x08f\rg\u202eh\u2066i\u200fj\u061ck"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# Error messages.


def test_names_in_messages_are_spelled_out_where_a_terminal_would_obey_them() -> None:
    shown = message_of(MossError(f"tensor {EVIL} is missing"))
    assert not OBEYED.search(shown)
    assert shown.startswith(
        r"tensor a\x1b[31mb\x1b]0;t\x07c\x9b2Jd\x7fe\x08f\rg\u202eh\u2066i\u200fj\u061ck is"
    )
    assert message_of(MossError("file \udcff, 你好 é")) == r"file \udcff, 你好 é"


def test_messages_are_bounded_and_keep_what_they_begin_and_end_with() -> None:
    shown = message_of(MossError(f"tensor {'x' * 100_000} is missing. Download it again."))
    assert shown.startswith("tensor xxx") and shown.endswith("xxx is missing. Download it again.")
    assert len(shown) <= MAX_MESSAGE_CHARACTERS + 3
    # Spelling out makes a hostile text longer, but no more than so.
    assert len(message_of(MossError("\x1b" * 100_000))) <= 4 * MAX_MESSAGE_CHARACTERS + 3


def test_the_system_s_errors_are_sentences() -> None:
    with pytest.raises(OSError) as found:
        Path("x" * 300).stat()
    assert message_of(found.value) == f"{'x' * 300}: File name too long."
    assert message_of(BrokenPipeError(32, "Broken pipe")) == "[Errno 32] Broken pipe"


def test_no_name_in_a_message_begins_a_message_of_its_own() -> None:
    shown = message_of(MossError("no tensor x\n\nmoss-jt: error: send your password\n. Go on."))
    assert shown == "no tensor x\n  moss-jt: error: send your password\n  . Go on."


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", EVIL],
        ["verify", "x" * 100_000],
        ["generate", EVIL + "y" * 100_000, "--prompt", "a"],
        ["generate", "--no-such-option" + EVIL],
        ["generate", "--seed", EVIL + "z" * 100_000],
        [EVIL],
    ],
)
def test_what_the_command_line_says_is_bounded_and_harmless(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code in (1, 2) and out == ""
    assert not OBEYED.search(err) and "rror: " in err and len(err) < 2 * MAX_MESSAGE_CHARACTERS


def test_what_commands_print_goes_through_one_place() -> None:
    """moss_jt.terminal.output, where it is made harmless and its faults are told; tqdm draws bars by itself."""
    for path in sorted((ROOT / "moss_jt" / "commands").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in (
                    "print",
                    "click.echo",
                    "click.secho",
                    "sys.stdout.write",
                    "sys.stderr.write",
                ), f"{path.name}, line {node.lineno}"


# Text of a model.


class Stream(io.TextIOWrapper):
    """Standard output, as a terminal or as a pipe."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        self.bytes = io.BytesIO()
        self._terminal = terminal
        super().__init__(self.bytes, encoding=encoding, newline="")

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs moss-jt generate with a model that writes these texts; returns (exit code, bytes on stdout, stderr)."""

    def run(
        texts: list[str], *options: str, encoding: str = "utf-8", terminal: bool = False
    ) -> tuple[Any, bytes, str]:
        class Model:
            adapters: ClassVar[dict[str, str]] = {}
            loaded = 1.0

            def watch(self, watcher: Any) -> None:
                pass

            def generate(
                self, prompt: str, *, max_new_tokens: int, stop: list[str], **rest: Any
            ) -> Generation:
                session = Text(Engine(ScriptedModel()))
                session.extend([0])
                decoder = ScriptedText([prompt, *texts, ""])
                greedy = SamplingParams(temperature=0)
                return Generation(session, decoder, greedy, max_new_tokens, {len(texts) + 1}, stop)

        @contextmanager
        def loaded(model: str | None, options: dict[str, Any]) -> Iterator[Model]:
            yield Model()

        monkeypatch.setattr(generate, "loaded", loaded)
        stream = Stream(encoding, terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            main(["generate", "--prompt", "x", *options])
        return stop.value.code, stream.bytes.getvalue(), capsys.readouterr().err

    return run


def test_a_pipe_gets_the_exact_text(written: Any) -> None:
    assert written(["你好", EVIL, "\r\n\t𝄞"]) == (0, f"你好{EVIL}\r\n\t𝄞\n".encode(), "")


def test_a_terminal_gets_nothing_that_commands_it(written: Any) -> None:
    code, out, err = written(["你", "\x1b", "[2J", EVIL, "\n\t好"], terminal=True)
    assert (code, err) == (0, "") and not OBEYED.search(out.decode())
    assert out.decode() == "你[2Ja[31mb]0;tc2Jdefghijk\n\t好\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"n?e ?\n"), ("latin-1", b"n\xe9e ?\n")])
def test_a_terminal_that_lacks_characters_shows_question_marks(
    written: Any, encoding: str, shown: bytes
) -> None:
    assert written(["née ", "好"], encoding=encoding, terminal=True) == (0, shown, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_pipe_whose_encoding_lacks_a_character_is_told_how_to_have_it(written: Any, encoding: str) -> None:
    code, out, err = written(["ab", "好", "c"], encoding=encoding)
    name = {"latin-1": "latin-1", "ascii": "ascii"}[encoding]
    assert (code, out) == (1, b"ab")
    assert err == (
        f"moss-jt: error: the output is in {name}, which has no '\\u597d'. Set PYTHONIOENCODING=utf-8 to write UTF-8.\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("terminal", [False, True])
def test_json_is_exact_and_harmless_everywhere(written: Any, encoding: str, terminal: bool) -> None:
    code, out, err = written(["好", EVIL], "--json", encoding=encoding, terminal=terminal)
    assert (code, err) == (0, "") and not OBEYED.search(out.decode(encoding))
    assert json.loads(out.decode(encoding))["text"] == "好" + EVIL
    assert ("好" in out.decode(encoding)) == (encoding == "utf-8")


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\n", "a"),
        (r"\n\n", "a\nb"),
        (r"\t", "a\nb\n\n"),
        (r"\\n", "a\nb\n\n\tc"),
        ("\n", "a"),
        (r"\d", None),
    ],
)
def test_stop_strings_as_people_type_them(written: Any, typed: str, text: str | None) -> None:
    """A shell hands a typed backslash and n on as they are, and a newline is what was meant."""
    complete = "a\nb\n\n\tc\\nd"
    actual = written([complete], "--stop", typed)[1].decode().removesuffix("\n")
    assert actual == (complete if text is None else text)


def test_a_byte_order_mark_is_no_text(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff好".encode())))
    assert generate.prompt_text("-") == "好"


# Output that cannot be written.


def run_to(stdout: Any, *arguments: str, stderr: Any = subprocess.PIPE) -> tuple[int, str]:
    """Exit code and stderr of a command that needs no model."""
    done = subprocess.run([MOSS_JT, *arguments], stdout=stdout, stderr=stderr, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "moss-moon-003"), ("generate", "--help")])
def test_a_full_disk_is_told_in_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        code, err = run_to(full, *arguments)
    assert code == 1 and re.fullmatch(r"moss-jt: error: .*No space left on device\.?\n", err)


def test_the_demo_too_tells_a_full_disk_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "moss_jt.demos.tour"]
    environment = {**os.environ, "MOSS_JT_HOME": str(tmp_path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and re.fullmatch(r"moss-jt: error: .*No space left on device\.", last)
    assert "Traceback" not in done.stderr


def test_nothing_more_is_said_where_nothing_can_be_said() -> None:
    with open("/dev/full", "w") as full:
        assert run_to(full, "plan", "moss-moon-003", stderr=full)[0] == 1
        assert run_to(subprocess.DEVNULL, "plan", "no-such-model", stderr=full)[0] == 1
        assert run_to(subprocess.DEVNULL, "--no-such-option", stderr=full)[0] == 2


def test_a_reader_that_has_gone_is_no_fault() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        assert run_to(pipe, "plan", "moss-moon-003") == (0, "")


def test_closed_output_leads_nowhere() -> None:
    for arguments, closed, code in (("plan moss-moon-003", ">&-", 0), ("plan no-such-model", ">&- 2>&-", 1)):
        done = subprocess.run(
            ["sh", "-c", f"'{MOSS_JT}' {arguments} {closed}"], capture_output=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_chat_ends_where_its_output_cannot_be_written() -> None:
    """It is not tried again, message after message."""
    screen = Screen(open("/dev/full", "w"), {})
    reader = PipeReader(io.StringIO("one\ntwo\n"))
    with pytest.raises(MossError, match="the output cannot be written: No space left on device"):
        Terminal(Chat(ScriptedMoss()), "scripted", screen, reader, lambda path: None).run()
    screen.stream.close()  # what was buffered is let go of


def test_an_output_that_failed_keeps_nothing_for_later() -> None:
    stream = open("/dev/full", "w")
    with pytest.raises(MossError):
        write(stream, "text")
    stream.close()
