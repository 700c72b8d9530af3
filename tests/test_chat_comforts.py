"""What a chat offers beside answers: another try, settings, an instruction of one's own, what a turn cost, how far reading is."""

import ast
import io
import itertools
import socket
import string
import urllib.error
from collections.abc import Generator, Iterator
from email.message import Message
from pathlib import Path

import pytest

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Event, Text
from moss_jt.chat.prompt import META, TOOLS, instruction, text_of
from moss_jt.chat.turn import TurnStats
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError, Reason, ReasonedError
from moss_jt.plugins.failures import failure_of
from moss_jt.plugins.registry import PluginLoadError, make_plugins
from moss_jt.terminal.line_input import PipeReader
from moss_jt.terminal.loop import Terminal
from moss_jt.terminal.reasons import CHINESE, in_language
from moss_jt.terminal.screen import Screen
from moss_jt.terminal.settings import settings_of
from moss_jt.terminal.texts import TEXTS
from moss_jt.terminal.turn_view import ReadingProgress, TurnView
from tests.support.scripted_chat import ScriptedMoss


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(chat: Chat, lines: str) -> str:
    stream = io.StringIO()
    reader = PipeReader(io.StringIO(lines))
    Terminal(chat, "scripted", Screen(stream, {}), reader, lambda path: None, cost=False).run()
    return stream.getvalue()


def answer(events: Iterator[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def transcript(chat: Chat, moss: ScriptedMoss) -> str:
    return moss.tokenizer.decode(chat.token_ids)


# Another answer.


def test_retry_takes_the_place_of_the_last_answer() -> None:
    moss = ScriptedMoss(" zebra<eom>", " onyx<eom>", " two<eom>", " three<eom>")
    chat = Chat(moss, temperature=0)
    assert answer(chat.send("first")) == "zebra" and answer(chat.send("second")) == "onyx"
    assert answer(chat.retry()) == "two" and chat.turns == 2
    text = transcript(chat, moss)
    assert "zebra" in text and "onyx" not in text and text.count("second") == 1
    assert answer(chat.send("third")) == "three" and chat.turns == 3


def test_retry_after_an_answer_that_was_forgotten_asks_again() -> None:
    moss = ScriptedMoss([" ", KeyboardInterrupt], " yes<eom>")
    chat = Chat(moss, temperature=0)
    assert answer(chat.send("well?")) == "" and chat.turns == 0
    assert answer(chat.retry()) == "yes" and transcript(chat, moss).count("well?") == 1


def test_retry_with_a_seed_draws_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    made = SamplingParams.__post_init__
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: (seeds.append(self.seed), made(self)))
    chat = Chat(ScriptedMoss(" one<eom>", " two<eom>"), seed=7)
    answer(chat.send("a"))
    answer(chat.retry())
    assert {7, 8} <= set(seeds)


def test_nothing_to_answer_again() -> None:
    chat = Chat(ScriptedMoss())
    with pytest.raises(MossError, match="there is no message yet"):
        chat.retry()
    assert "Nothing was asked yet." in talk(chat, "/retry\n")


def test_a_greedy_retry_is_told_to_stay_the_same() -> None:
    moss = ScriptedMoss(" one<eom>", " one<eom>", " one<eom>", " two<eom>")
    chat = Chat(moss, temperature=0)
    assert "At temperature 0 MOSS gives the same answer again" in talk(chat, "well?\n/retry\n")
    chat.params = SamplingParams(temperature=0.7)
    assert "At temperature 0" not in talk(chat, "well?\n/retry\n")


# Settings.


def test_settings_are_listed_and_changed() -> None:
    chat = Chat(ScriptedMoss())
    shown = talk(
        chat,
        "/set\n/set temperature 0.3\n/set seed 5\n/set repetition_penalty default\n/set max_new_tokens 9\n",
    )
    assert (
        "  temperature 0.7\n  top_k 40\n  top_p 0.8\n  repetition_penalty default\n  seed random\n" in shown
    )
    assert "temperature is 0.3 from now on." in shown
    assert (chat.params.temperature, chat.params.seed, chat.max_new_tokens) == (0.3, 5, 9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("top_k", "1.5"),
        ("top_p", "0"),
        ("top_p", "default"),
        ("seed", "-1"),
        ("repetition_penalty", "warm"),
        ("max_new_tokens", "0"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_said_in_the_chats_language(name: str, value: str) -> None:
    chat = Chat(ScriptedMoss())
    before = settings_of(chat)
    assert {f"wanted_{setting}" for setting in before} <= TEXTS.keys()
    chat.language = "zh"
    shown = talk(chat, f"/set {name} {value}\n/set nonsense 1\n")
    assert f"{name} 不能设为 {value}：应为" in shown and "没有 nonsense 这个设置" in shown
    assert settings_of(chat) == before


# A meta instruction of one's own.


def test_an_instruction_from_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "pirate rules.txt"
    path.write_text("\ufeffYou are a pirate.<eoh>\n<|MOSS|>: hm\n", encoding="utf-8")
    moss = ScriptedMoss(" Arr.<eom>", " Yes.<eom>")
    chat = Chat(moss, temperature=0)
    shown = talk(chat, f"/system {path}\nhello\n")
    assert f"is {path}'s from now on" in shown
    text = transcript(chat, moss)
    assert text.startswith("You are a pirate.<eoh>\n< |MOSS|>: hm\n" + TOOLS) and META not in text
    assert chat.token_ids.count(moss.tokenizer.id("<eoh>")) == 1, "what looks like a special token is none"
    assert "MOSS's own again" in talk(chat, "/system\n") and transcript(chat, moss).startswith(META)
    assert chat.turns == 1


def test_python_gives_it_as_an_option() -> None:
    assert Chat(ScriptedMoss(), system="Be brief.").token_ids != Chat(ScriptedMoss()).token_ids
    assert text_of(instruction((), "Be brief.")).startswith("Be brief.\n" + TOOLS)


def test_an_instruction_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    (tmp_path / "long").write_bytes(b"a " * (1 << 18))
    (tmp_path / "wordy").write_text("word " * 2000)
    chat = Chat(ScriptedMoss())
    before = chat.token_ids
    names = ("missing", ".", "latin", "long", "wordy")
    shown = talk(chat, "".join(f"/system {tmp_path / name}\n" for name in names))
    for words in (
        "no such file",
        "may not be read",
        "something else",
        "longer than 256 KiB",
        "has room for 1024",
    ):
        assert words in shown, words
    assert chat.token_ids == before and chat.system is None


# What is typed wrongly is told on one line, and MOSS is asked nothing.


@pytest.mark.parametrize(
    ("line", "english", "chinese"),
    [
        (
            "/retry now",
            "/retry is a command of its own: type nothing after it.",
            "/retry 是单独的命令，后面不用加任何内容。",
        ),
        ("/help me", "/help is a command of its own", "/help 是单独的命令"),
        ("/exit now", "/exit is a command of its own", "/exit 是单独的命令"),
        ("/thoughts maybe", "/thoughts is a command of its own", "/thoughts 是单独的命令"),
        ("/set temperature", "Type /set NAME VALUE", "修改设置请输入 /set 名称 值"),
        ("/set temprature 1", "did you mean temperature?", "是不是想用 temperature？"),
        (
            "/retri",
            "There is no command /retri; did you mean /retry?",
            "没有 /retri 这个命令，是不是想用 /retry？",
        ),
        ("/plugin calculator", "did you mean /plugins?", "是不是想用 /plugins？"),
        ("/xyzzy now", "There is no command /xyzzy; /help lists them.", "没有 /xyzzy 这个命令，输入 /help"),
        ("/重来", "There is no command /重来", "没有 /重来 这个命令"),
    ],
)
def test_a_command_that_is_typed_wrongly_is_no_message(line: str, english: str, chinese: str) -> None:
    for language, said in (("en", english), ("zh", chinese)):
        chat = Chat(ScriptedMoss())
        chat.language = language  # type: ignore[assignment]
        assert said in talk(chat, f"{line}\n") and chat.message is None and chat.turns == 0


def test_thoughts_are_switched_by_word_too_and_words_alone_are_messages() -> None:
    moss = ScriptedMoss(" one<eom>", " two<eom>", " three<eom>")
    chat = Chat(moss, temperature=0)
    shown = talk(
        chat, "/thoughts off\n/thoughts off\n/thoughts on\nclear the table\nstop that\n/usr/bin is what?\n"
    )
    assert shown.count("Inner thoughts are hidden.") == 2 and "Inner thoughts are shown." in shown
    assert moss.model.finished and chat.turns == 3


# Leaving.


@pytest.mark.parametrize("word", ["stop", "/stop", "/exit", "/quit"])
def test_every_word_that_ends_a_program_ends_this_one(word: str) -> None:
    assert talk(Chat(ScriptedMoss()), f"{word}\nnever sent\n").endswith("Goodbye!\n")


# What a turn cost, and how far reading is.


def test_what_an_answer_cost_is_said_after_it() -> None:
    stream = io.StringIO()
    chat = Chat(ScriptedMoss(" one two three<eom>"), temperature=0)
    clock = iter(itertools.count(0.0, 2.5))
    view = TurnView(Screen(stream, {}), chat, lambda path: None, clock=lambda: next(clock))
    view.show(chat.send("go"))
    stats = chat.stats
    assert stats.later_tokens == stats.new_tokens - 1 and stats.later_s > 0
    cost = stream.getvalue().splitlines()[-1]
    assert cost.startswith(f"  {stats.read_tokens} tokens read and {stats.new_tokens} written in ")
    assert cost.endswith(" s"), "a rate over a few milliseconds says nothing"


def test_a_rate_needs_half_a_second() -> None:
    assert TurnStats(new_tokens=9, later_tokens=8, later_s=0.4).tokens_per_s is None
    assert TurnStats(new_tokens=9, later_tokens=8, later_s=0.5).tokens_per_s == 16
    stream = io.StringIO()
    chat = Chat(ScriptedMoss(" one<eom>"), temperature=0)
    view = TurnView(Screen(stream, {}), chat, lambda path: None)
    events = chat.send("go")
    for event in events:
        view.show_event(event)
    chat.stats.later_tokens, chat.stats.later_s = 8, 0.5
    for language, said in (("en", "; written at 16.0 tokens/s"), ("zh", "；生成速度 16.0 词元/秒")):
        chat.language = language  # type: ignore[assignment]
        view.show(iter_nothing())
        assert said in stream.getvalue()


def iter_nothing() -> Generator[Event]:
    yield from ()


def test_progress_while_a_text_is_read_comes_late_and_counts_down() -> None:
    """40 tokens, 1 s for each half of a pass of 20: nothing for two seconds, and then what is left."""
    stream, times = Tty(), iter([0.0, 1.0, 2.0, 3.0, 4.0])

    class Reading:
        language = "en"
        unread = 20  # beside the pass that is running
        loaded = 1.0

        def watch(self, watcher: object) -> None:
            pass

    chat = Reading()
    screen = Screen(stream, {"TERM": "xterm", "NO_COLOR": "1"})
    progress = ReadingProgress(screen, chat, lambda: next(times))  # type: ignore[arg-type]
    progress.begin()
    progress(20, 0.5)
    assert stream.getvalue() == ""
    progress(20, 1.0)
    assert stream.getvalue() == "  … reading 40 tokens: 50 %, 2 s left"
    chat.unread, chat.loaded = 0, 0.687
    progress(20, 0.5)
    assert stream.getvalue().endswith(
        "\r\x1b[K  … reading 40 tokens: 75 %, the model is loaded to 68 %, 1 s left"
    )
    progress.end()
    progress(20, 1.0)
    assert stream.getvalue().count("reading") == 2


def test_the_model_tells_how_far_it_is() -> None:
    seen = []
    chat = Chat(ScriptedMoss(" hello there<eom>"), temperature=0)
    chat.watch(lambda tokens, share: seen.append((chat.unread, tokens, share)))
    answer(chat.send("hi"))
    passes = [(unread, tokens) for unread, tokens, share in seen if share == 1.0]
    assert len(passes) > 1 and passes[-1][0] == 0
    for (unread, _), (after, tokens) in itertools.pairwise(passes):
        assert unread == after + tokens


# One language at a time.


def test_what_fails_is_said_in_the_chats_language() -> None:
    moss = ScriptedMoss(" 算。<eot>", ' Calculate("1/0")<eoc>', " 抱歉。<eom>")
    chat = Chat(moss, ["calculator"], temperature=0)
    chat.language = "zh"
    shown = talk(chat, "一除以零？\n/plugins nonsense\n/plugins ./gone.py:Plugin\n")
    assert "→ 没有结果：除数为零" in shown
    assert "没有 nonsense 这个插件；可用的有 search、calculator、" in shown
    assert "插件 ./gone.py:Plugin 无法加载：没有 gone.py 这个文件" in shown


def test_a_plugin_that_lacks_something_is_said_in_the_chats_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.plugins.web_search.ddgs_installed", lambda: False)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    lines = "/plugins search\n/plugins image\n/plugins calculater\n"
    for language, said in (
        (
            "en",
            (
                "Web search needs the package ddgs: pip install ddgs.",
                "--image-url",
                "did you mean calculator?",
            ),
        ),
        (
            "zh",
            (
                "网络搜索需要安装 ddgs：pip install ddgs。",
                "请在启动时用 --image-url",
                "是不是想用 calculator？",
            ),
        ),
    ):
        chat = Chat(ScriptedMoss())
        chat.language = language  # type: ignore[assignment]
        shown = talk(chat, lines)
        assert all(words in shown for words in said), shown
        assert language == "en" or "server" not in shown


@pytest.mark.parametrize(
    ("error", "english", "chinese"),
    [
        (FileNotFoundError(2, "No such file", "a.txt"), "there is no file a.txt", "没有 a.txt 这个文件"),
        (PermissionError(13, "Denied", "a.txt"), "no permission for a.txt", "没有访问 a.txt 的权限"),
        (OSError(28, "Full", "a.txt"), "a.txt cannot be read or written (Full)", "无法读写 a.txt（Full）"),
        (urllib.error.URLError(ConnectionRefusedError(111, "x")), "the connection was refused; is the server running?",
         "连接被拒绝，请检查服务器是否已启动"),
        (socket.gaierror(-2, "x"), "the server's name is unknown; check the address and the network",
         "无法解析服务器的域名，请检查地址和网络"),
        (TimeoutError("timed out"), "the server did not answer in time", "服务器没有及时回应"),
        (urllib.error.HTTPError("http://a", 503, "x", Message(), None), "the server answered with error 503", "服务器返回错误 503"),
        (ReasonedError("{text!r} is too large", text="9"), "'9' is too large", "'9' 太大"),
        (ValueError("as others say it"), "ValueError: as others say it", "ValueError: as others say it"),
    ],
)  # fmt: skip
def test_why_a_call_failed_is_known_by_its_exception(error: Exception, english: str, chinese: str) -> None:
    failure = failure_of(error)
    assert (in_language(failure, "en"), in_language(failure, "zh")) == (english, chinese)


def test_every_reason_has_its_chinese() -> None:
    """All templates in the code, and no others, with the same values in both languages."""
    root = Path(__file__).resolve().parents[1] / "moss_jt"
    makers = {"Reason", "ReasonedError", "CalculationError", "NotationError"}
    said = {
        node.args[0].value
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in makers
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert said == CHINESE.keys()
    for english, chinese in CHINESE.items():
        fields = [
            {field for _, field, _, _ in string.Formatter().parse(text) if field}
            for text in (english, chinese)
        ]
        assert fields[0] == fields[1], english


def test_a_reason_within_a_reason_is_said_too() -> None:
    fault = Reason("{name} is missing", name="label")
    whole = Reason("the plugin cannot be called: {fault}", fault=fault)
    assert whole == "the plugin cannot be called: label is missing"
    assert in_language(MossError(whole), "zh") == "插件无法调用：缺少 label"


def test_both_languages_fill_in_the_same_values() -> None:
    for english, chinese in TEXTS.values():
        assert {field for _, field, _, _ in string.Formatter().parse(english) if field} == {
            field for _, field, _, _ in string.Formatter().parse(chinese) if field
        }


# A plugin from a file.

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from moss_jt import Outcome

@dataclass
class Dice:
    name: str = "dice"
    label: str = "Calculator"
    function: str = "Calculate"
    argument: str = "expression"
    style: str = "value"
    timeout_s: float = 1.0

    def call(self, argument, wanted):
        return Outcome(text="4")
"""


def test_a_plugin_of_ones_own_needs_no_package(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    assert [plugin.name for plugin in make_plugins([f"{path}:Dice", "solver"])] == ["solver", "dice"]
    moss = ScriptedMoss(" T.<eot>", ' Calculate("a die")<eoc>', " 4<eom>")
    shown = talk(Chat(moss, temperature=0), f"/plugins {path}:Dice\nthrow\n/plugins dice\n")
    assert "● dice" in shown and "→ 4" in shown and "● dice" not in shown.partition("MOSS 4")[2]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("own.py:Gone", OWN, "own.py has no class Gone"),
        ("own.py", OWN, "name the class in it"),
        ("missing.py:Dice", OWN, "there is no file"),
        ("own.py:Dice", "def (", "SyntaxError"),
        ("own.py:Dice", "raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_holds_no_such_plugin_is_one_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(PluginLoadError, match=said) as refused:
        make_plugins([str(tmp_path / name)])
    assert "\n" not in str(refused.value)
