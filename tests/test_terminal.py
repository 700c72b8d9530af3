"""The terminal: what it shows, what it never lets through, and a whole conversation on a pseudo-terminal."""

import io
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Notice
from moss_jt.plugins import registry
from moss_jt.plugins.interface import Item, Outcome, Plugin, Source
from moss_jt.terminal.line_input import PipeReader, PromptReader, history_path, make_reader, writable
from moss_jt.terminal.loop import PROMPT, Terminal
from moss_jt.terminal.output import harmless
from moss_jt.terminal.screen import Screen, shortened
from moss_jt.terminal.texts import TEXTS, notice_text
from tests.support.own_plugins import Echo, Painter, Shelf
from tests.support.scripted_chat import ScriptedMoss

ROOT = Path(__file__).resolve().parents[1]
EVIL = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x00e\x08f\rg\u202eh\u2066i\x7fj\tk\nl"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def conversation(
    moss: ScriptedMoss,
    lines: str,
    plugins: tuple[Plugin, ...] = (),
    thoughts: bool = True,
    cost: bool = False,
    **options: Any,
) -> str:
    """What a user at a plain terminal without styles sees after typing these lines."""
    screen = Screen(io.StringIO(), {})
    chat = Chat(moss, plugins, temperature=0, **options)
    reader = PipeReader(io.StringIO(lines))
    Terminal(chat, "scripted", screen, reader, lambda path: None, thoughts, cost).run()
    assert isinstance(screen.stream, io.StringIO)
    return screen.stream.getvalue()


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


def test_a_turn_with_a_plugin_as_it_is_seen() -> None:
    moss = ScriptedMoss(" Compute.<eot>", ' Calculate("37*48")<eoc>', " It is 1776<sup><|1|></sup>.<eom>")
    shown = conversation(moss, "37*48?\nstop\n", plugins=("calculator",))  # type: ignore[arg-type]
    assert shown == (
        "scripted is ready. Type a message; clear forgets the conversation, stop leaves, /help lists every command.\n"
        "Plugins: calculator.\n\n"
        '  Compute.\n  ▸ Calculate("37*48")\n  → 1776\nMOSS It is 1776[1].\n  [1] Calculate("37*48") → 1776\n\n'
        "Goodbye!\n"
    )


def test_search_results_and_numbered_sources_are_shown() -> None:
    moss = ScriptedMoss(" S.<eot>", ' Search("tea")<eoc>', " Green<sup><|2|></sup>.<eom>")
    shown = conversation(moss, "tea?\n", (Shelf("black", "green " * 60),))
    assert "  → [1] 'black'\n    [2] 'green green" in shown and "…\n" in shown
    assert "MOSS Green[2].\n  [1] tea, 0  /shelf/0\n  [2] tea, 1  /shelf/1\n" in shown


def test_sources_stay_on_one_line_of_bounded_length() -> None:
    class Endless(Shelf):
        def call(self, argument: str, wanted: int) -> Outcome:
            return Outcome(items=(Item("x", Source("t\n" * 50_000, "http://a/" + "b\n" * 50_000)),))

    moss = ScriptedMoss(" S.<eot>", ' Search("tea")<eoc>', " Green.<eom>")
    shown = conversation(moss, "tea?\n", (Endless(),))
    line = shown.splitlines()[-3]
    assert line.startswith("  [1] t t t") and "…  http://a/b b b" in line and len(line) < 700


def test_failures_say_why_and_thoughts_can_be_hidden() -> None:
    def fail(argument: str) -> str:
        raise ValueError("no such luck")

    moss = ScriptedMoss(" Secret.<eot>", ' Echo("x")<eoc>', " Sorry.<eom>")
    shown = conversation(moss, "go\n", (Echo(fail),), thoughts=False)
    assert "  → no result: ValueError: no such luck\n" in shown
    assert "Secret" not in shown and "MOSS Sorry.\n" in shown


def test_a_picture_is_shown_and_its_path_named() -> None:
    moss = ScriptedMoss(" D.<eot>", ' Text2Image("a rock")<eoc>', "  Here.<eom>")
    screen = Screen(io.StringIO(), {})
    terminal = Terminal(
        Chat(moss, [Painter()], temperature=0),
        "scripted",
        screen,
        PipeReader(io.StringIO("draw\n")),
        lambda path: f"<{path.name}>",
    )
    terminal.run()
    assert "<a rock.png>\n  → picture: /pictures/a rock.png\nMOSS Here.\n" in screen.stream.getvalue()  # type: ignore[attr-defined]


def test_the_words_of_the_chat() -> None:
    moss = ScriptedMoss(" one<eom>", " two<eom>")
    shown = conversation(
        moss, "hello\nclear\n/help\n/nonsense\n/etc/hosts is what?\n/thoughts\n\nstop\nnever sent\n"
    )
    assert "The conversation is forgotten." in shown and "Alt-Enter" in shown
    assert "There is no command /nonsense" in shown and "MOSS two" in shown
    assert "Inner thoughts are hidden." in shown and shown.endswith("Goodbye!\n") and moss.model.finished


def test_plugins_are_listed_and_toggled() -> None:
    moss = ScriptedMoss(" T.<eot>", ' Calculate("1+1")<eoc>', " 2<eom>")
    shown = conversation(moss, "/plugins calculator\n1+1\n/plugins calculator, solver\n/plugins nonsense\n")
    assert "○ search\n  ● calculator\n  ○ solver" in shown and "○ calculator\n  ● solver" in shown
    assert "MOSS 2" in shown and "There is no plugin 'nonsense'; there are " in shown


def test_the_conversations_language_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    shown = conversation(ScriptedMoss(" Hi.<eom>"), "/help\nhello\nstop\n")
    assert "scripted 已就绪" in shown and "清空对话" in shown and shown.endswith("Goodbye!\n")


def test_a_message_that_is_too_long_is_said_and_the_chat_goes_on() -> None:
    moss = ScriptedMoss(" fine<eom>", capacity=400)
    shown = conversation(moss, f"{'word ' * 900}\n{'很长' * 500}\nshort\n")
    assert re.search(
        r"The message has \d+ tokens, and the context has room for \d+. Shorten it, or .* --context", shown
    )
    assert "这条消息有" in shown and "MOSS fine" in shown


def test_ctrl_c_in_the_loop_that_shows_ends_the_answer() -> None:
    """An interruption does not only come while the model computes: here it comes while a piece is being written."""

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if text.strip() == "c":
                raise KeyboardInterrupt
            return super().write(text)

    moss = ScriptedMoss(" a b c d<eom>", " fine<eom>")
    screen = Screen(Interrupting(), {})
    reader = PipeReader(io.StringIO("count\nmore\n"))
    Terminal(Chat(moss, temperature=0), "scripted", screen, reader, lambda path: None).run()
    shown = screen.stream.getvalue()  # type: ignore[attr-defined]
    assert "MOSS a b\n(Stopped.)\n" in shown and "MOSS fine" in shown


# Plugins that others installed.


class BrokenPoint:
    """An entry point of a package that cannot be imported, or whose plugin cannot be made."""

    name = "broken"

    def __init__(self, error: BaseException, when: str) -> None:
        self._error, self._when = error, when

    def load(self) -> Any:
        if self._when == "import":
            raise self._error
        return self._make

    def _make(self) -> Any:
        raise self._error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("when", ["import", "call"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'gone'"), "ModuleNotFoundError: No module named 'gone'"),
        (AttributeError(f"no {EVIL}"), "AttributeError: no a"),
        (SyntaxError("invalid syntax", ("x.py", 1, 1, "def", 1, 2)), "SyntaxError: invalid syntax"),
        (SystemExit(3), "SystemExit: 3"),
        (RuntimeError("x" * 100_000), "RuntimeError: xxx"),
        (Unprintable(), "Unprintable"),
        (OSError(13, "Permission denied"), "PermissionError"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_said_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str, when: str
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [BrokenPoint(error, when)])
    moss = ScriptedMoss(" one<eom>", " two<eom>")
    shown = conversation(moss, "hello\n/plugins broken\n/plugins broken, calculator\nand now?\n/plugins\n")
    told = [line for line in shown.splitlines() if line.startswith("The plugin broken cannot be loaded: ")]
    assert len(told) == 2 and reason in told[0] and len(told[0]) < 300
    assert "MOSS one" in shown and "MOSS two" in shown and "○ calculator" in shown and "○ broken" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", shown)


def test_ctrl_c_while_a_plugin_is_switched_on_ends_that_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [BrokenPoint(KeyboardInterrupt(), "import")])
    shown = conversation(ScriptedMoss(" one<eom>"), "/plugins broken\nhello\n")
    assert "Stopped." in shown and "MOSS one" in shown and shown.endswith("Goodbye!\n")


def test_turns_that_a_switch_costs_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wordy(Echo):
        name, label = "wordy", " a" * 60

    point = EntryPoint("wordy", "somewhere:Wordy", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Wordy)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    moss = ScriptedMoss(f" 0{' a' * 60}<eom>", f" 1{' a' * 60}<eom>", capacity=500)
    shown = conversation(moss, "first\nsecond\n/plugins wordy\n")
    assert shown.count("its oldest turn is forgotten") == 1 and "● wordy" in shown


# Notices.


def test_notices_are_worded_in_both_languages() -> None:
    assert notice_text(Notice("dropped", {"turns": 1}), "en").endswith("its oldest turn is forgotten.")
    assert notice_text(Notice("dropped", {"turns": 3}), "zh") == "对话已达上下文上限，最早的 3 轮已丢弃。"
    assert "at 20 tokens" in notice_text(Notice("cut", {"tokens": 20}), "en")
    assert notice_text(Notice("commands_cut", {"commands": 12, "limit": 10}), "en") == (
        "MOSS gave 12 commands; only the first 10 were run."
    )
    for code in ("stopped", "full", "empty", "results_cut"):
        english, chinese = (notice_text(Notice(code), language) for language in ("en", "zh"))
        assert (english, chinese) == TEXTS[code]


def test_only_the_terminal_knows_its_options() -> None:
    """Other front ends show what a chat yields, too."""
    for path in (ROOT / "moss_jt" / "chat").glob("*.py"):
        assert not re.search(r"--[a-z]", path.read_text(encoding="utf-8")), path.name


def test_a_full_disk_or_odd_bytes_in_the_history_end_no_conversation(tmp_path: Path) -> None:
    reader = PromptReader(PROMPT, Path("/dev/full"))
    reader._session.history.append_string("text")
    reader = PromptReader(PROMPT, tmp_path / "history")
    reader._session.history.append_string("a\udcff")
    assert (tmp_path / "history").read_text().endswith("+a?\n")


def test_pasted_texts_are_not_kept_in_the_history(tmp_path: Path) -> None:
    reader = PromptReader(PROMPT, tmp_path / "history")
    for text in ("short", "x" * 501, "\n".join("abcdef"), "two\nlines"):
        reader._session.history.append_string(text)
    kept = [line[1:] for line in (tmp_path / "history").read_text().splitlines() if line.startswith("+")]
    assert kept == ["short", "two", "lines"] and len(reader._session.history.get_strings()) == 4


def test_no_control_character_reaches_the_terminal() -> None:
    assert harmless(EVIL) == "a[31mb]0;titlec2Jdefghij\tk\nl"
    assert harmless("你好 🙂 é") == "你好 🙂 é"
    assert harmless("\ud800") == "?"
    stream = Tty()
    screen = Screen(stream, {"TERM": "xterm", "NO_COLOR": "1"})
    screen.write(EVIL)
    screen.line(EVIL, "dim")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", stream.getvalue())


def test_nothing_that_a_model_or_a_plugin_says_commands_the_terminal() -> None:
    moss = ScriptedMoss(f" {EVIL}<eot>", f' Search("{EVIL}")<eoc>', f" {EVIL}<eom>")
    shown = conversation(moss, "go\n", (Shelf(EVIL),))
    assert "a[31mb" in shown and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", shown)


def test_styles_only_on_terminals_that_have_them() -> None:
    plain, styled = io.StringIO(), Tty()
    Screen(plain, {"TERM": "xterm"}).write("text", "dim")
    Screen(styled, {"TERM": "xterm"}).write("text", "dim")
    assert (plain.getvalue(), styled.getvalue()) == ("text", "\x1b[2mtext\x1b[0m")


def test_waiting_is_shown_on_terminals_and_taken_back() -> None:
    stream = Tty()
    screen = Screen(stream, {"TERM": "xterm", "NO_COLOR": "1"})
    screen.wait("...")
    screen.wait("...")
    screen.write("text")
    assert stream.getvalue() == "...\r\x1b[Ktext"


def test_lines_are_cut_by_columns() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("你好世界", 5) == "你好…"
    assert shortened("a\n b", 9) == "a b"


def test_a_byte_order_mark_before_piped_messages_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff/help\n\ufeff".encode())))
    reader = make_reader(PROMPT)
    assert reader.read() == "/help\n" and reader.read() == "\ufeff", "it is one at the beginning only"


def test_where_the_history_lies(tmp_path: Path) -> None:
    assert history_path({"MOSS_JT_HOME": "/m"}) == Path("/m/history")
    assert history_path({"XDG_STATE_HOME": "/s"}) == Path("/s/moss-jt/history")
    kept = writable(tmp_path / "new" / "history")
    assert kept is not None and stat.S_IMODE(kept.stat().st_mode) == 0o600
    (tmp_path / "file").touch()
    assert writable(tmp_path / "file" / "history") is None


# A conversation on a pseudo-terminal, in a process of its own.


class Pty:
    """The user's side of the terminal."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, limit_s: float = 60) -> None:
        """Read until ``text`` comes after what was expected before."""
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal shows {self.seen!r}"
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"{text!r} did not come; the terminal shows {self.seen!r}") from None
        self.seen = self.seen.partition(text)[2]


@pytest.fixture
def chat_process(tmp_path: Path) -> Iterator[tuple[Pty, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "MOSS_JT_HOME": str(tmp_path),
        "TERM": "xterm",
        "PYTHONPATH": str(ROOT),
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.support.scripted_terminal"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(slave)
    yield Pty(master), process
    process.kill()
    process.wait()
    os.close(master)


def test_a_conversation_on_a_terminal(
    chat_process: tuple[Pty, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Line editing, an answer that holds escape sequences, Ctrl-C in an answer that never goes on, history, the end."""
    user, process = chat_process
    user.expect("scripted is ready")
    user.expect("› ")
    user.type("helXX\x7f\x7flo\r")  # the backspaces work: this is line editing
    user.expect("evil [2Jtext31m")
    user.expect("› ")
    user.type("go\r")
    user.expect("begun")
    user.type("\x03")
    user.expect("Stopped.")
    user.expect("› ")
    user.type("\x03")  # at the prompt it ends nothing
    user.expect("Ctrl-D")
    user.expect("› ")
    user.type("more\r")
    user.expect("still here")
    user.expect("› ")
    user.type("stop\r")
    user.expect("Goodbye!")
    assert process.wait(60) == 0
    history = tmp_path / "history"
    assert [line[1:] for line in history.read_text().splitlines() if line.startswith("+")] == [
        "hello",
        "go",
        "more",
        "stop",
    ]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
