"""The whole loop with the small model that comes with the program: four plugins, one cache, and the command line."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Command, Notice, Result, Text, Thought
from moss_jt.commands import cli
from moss_jt.demos import tour
from moss_jt.demos.drawing_server import drawing_server
from moss_jt.demos.plugin_loop import one_turn
from moss_jt.engine.model import Model
from moss_jt.kernels.interface import PAGE
from moss_jt.moss import Moss
from moss_jt.plugins.registry import PluginSettings
from tests.support.models import random_checkpoint, tiny_model_folder

PLUGINS = ("calculator", "solver", "search", "image")


@pytest.fixture(scope="module")
def moss() -> Iterator[Moss]:
    with Moss.load(tiny_model_folder(), memory="4GiB") as loaded:
        yield loaded


@pytest.fixture
def chat(moss: Moss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    """All four plugins on; search reads a folder, and a server on this machine draws."""
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "wall.txt").write_text("长城古老，著名，北方。", encoding="utf-8")
    with drawing_server() as address:
        settings = PluginSettings(
            search_folder=texts, image_url=address, picture_folder=tmp_path / "pictures"
        )
        yield moss.chat(plugins=PLUGINS, settings=settings, temperature=0)


def answer(chat: Chat, message: str) -> tuple[str, list[Result]]:
    events = list(chat.send(message))
    assert not [event for event in events if isinstance(event, Notice)]
    text = "".join(event.text for event in events if isinstance(event, Text))
    return text, [event for event in events if isinstance(event, Result)]


def test_four_plugins_through_the_whole_loop(chat: Chat, moss: Moss) -> None:
    text, results = answer(chat, "What is 37 times 48?")
    assert "1776" in text and [result.command for result in results] == ['Calculate("37*48")']
    text, results = answer(chat, "解方程3*x+5=20")
    assert "x = 5" in text and [result.text for result in results] == ["x = 5"]
    _, results = answer(chat, "请介绍一下长城")
    assert results[0].numbers == (1,) and results[0].sources[0].location.endswith("wall.txt")
    assert "长城古老，著名，北方。" in results[0].text and chat.sources[1] == results[0].sources[0]
    _, results = answer(chat, "Draw a robot drinking tea")
    assert results[0].picture is not None and results[0].picture.read_bytes().startswith(b"\x89PNG")
    text = moss.tokenizer.decode(chat.token_ids)
    assert text.count("<|Human|>:") == text.count("<eom>") == chat.turns == 4
    assert "<|Results|>: Image generated successfully.<eor>\n" in text


def test_one_cache_through_phases_and_turns(chat: Chat, moss: Moss, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model computes is counted: every token of the conversation once."""
    computed = []
    forward = moss.model.forward_many

    def counting(runs, wanted):  # type: ignore[no-untyped-def]
        for run in runs:
            computed.extend(range(run.start, run.start + len(run.token_ids)))
        return forward(runs, wanted)

    monkeypatch.setattr(moss.model, "forward_many", counting)
    answer(chat, "What is 12 plus 30?")
    answer(chat, "Hello")
    # All but the last <eom> and its newline; the instruction's whole pages may be there from an earlier chat.
    assert computed[0] in (0, 256) and computed == list(range(computed[0], len(chat.token_ids) - 2))


def test_thoughts_and_answers_stream(chat: Chat) -> None:
    kinds = [type(event) for event in chat.send("What is 12 plus 30?")]
    assert kinds.count(Thought) > 2 and kinds.count(Text) > 2
    assert kinds.index(Thought) < kinds.index(Command) < kinds.index(Result) < kinds.index(Text)


def test_greetings_with_and_without_plugins(chat: Chat, moss: Moss) -> None:
    assert answer(chat, "你好") == ("您好！我是MOSS，有什么我可以帮助您的吗？", [])
    plain = moss.chat(temperature=0)
    assert answer(plain, "你好") == ("您好！我是MOSS，有什么我可以帮助您的吗？", [])
    chat.switch([])
    assert answer(chat, "你是谁？")[0] == "我是MOSS，一个由复旦大学开发的对话语言模型。"


def test_the_spelled_out_loop_gives_the_same_turn(moss: Moss) -> None:
    assert one_turn(moss, "What is 37 times 48?") == (
        "<|Human|>: What is 37 times 48?<eoh>\n"
        "<|Inner Thoughts|>: This is arithmetic, so I need the calculator.<eot>\n"
        '<|Commands|>: Calculate("37*48")<eoc>\n<|Results|>:\nCalculate("37*48") => \'1776\'\n<eor>\n'
        "<|MOSS|>: 37 times 48 equals 1776<sup><|1|></sup>.<eom>\n"
    )


# The command line.


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat", *arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return tmp_path


def test_chat_with_the_built_in_model_works_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        monkeypatch,
        "计算37*48\nstop\n",
        "moss-tiny",
        "--plugins",
        "calculator",
        "--greedy",
        "--no-thoughts",
    )
    shown = capsys.readouterr().out
    assert code == 0 and "MOSS 37乘以48等于1776[1]。\n" in shown and "moss-tiny is ready" in shown
    assert "这是一道计算题" not in shown and (home / "models" / "moss-tiny" / "manifest.json").exists()


def test_a_conversation_goes_on_in_another_process(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, the plugins and the settings are the conversation's; what it says is as without the interruption."""
    options = ("moss-tiny", "--plugins", "solver", "--greedy", "--no-thoughts", "--quiet")
    questions = ["解方程3*x+5=20", "你好", "x+y=35;2*x+4*y=94, what are x and y?"]
    assert run(monkeypatch, "\n".join(questions), *options, "--no-keep") == 0
    whole = capsys.readouterr().out
    assert run(monkeypatch, "\n".join(questions[:2]) + "\n/save 解题\n", *options) == 0
    assert capsys.readouterr().out.endswith("用 moss-jt chat --resume 解题 可继续。\n\n再见！\n")
    first, forward = [], Model.forward_many

    def watched(self: Model, pieces: Any, wanted: Any) -> Any:
        first.append(pieces[0].start)
        return forward(self, pieces, wanted)

    monkeypatch.setattr(Model, "forward_many", watched)
    assert run(monkeypatch, questions[2], "--resume", "解题", "--no-thoughts", "--quiet") == 0
    assert first[0] >= 4 * PAGE + PAGE, "what was read and written before is there"
    shown = capsys.readouterr().out
    assert "共 2 轮" in shown and "已开启插件：solver。" in shown and "› 你好\nMOSS 您好！" in shown
    assert shown.partition("\n\n")[2] == whole.rpartition("您好！")[2].partition("\n\n")[2]
    assert run(monkeypatch, "/set\n/chats\n", "--resume", "--seed", "7", "--quiet") == 0
    shown = capsys.readouterr().out
    assert "temperature 0\n" in shown and "seed 7\n" in shown and "● 解题  " in shown and "3 turns" in shown
    assert [path.name for path in (home / "chats").iterdir()] == ["解题.jsonl"]


def test_what_cannot_go_on_is_said_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "", "--resume") == 1
    assert "there is no conversation to resume yet" in capsys.readouterr().err
    assert run(monkeypatch, "", "--resume", "other") == 1
    assert "there is no conversation called 'other'. moss-jt list shows" in capsys.readouterr().err


def test_with_no_model_it_says_how_to_get_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "") == 1
    message = capsys.readouterr().err
    assert "moss-jt convert fnlp/moss-moon-003-sft" in message and "moss-jt chat moss-tiny" in message


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moss_jt.convert.checkpoint import open_local
    from moss_jt.convert.pipeline import convert, recipe_for

    source = random_checkpoint(home / "source", model_type="codegen")
    (source / "added_tokens.json").unlink()
    checkpoint = open_local(source)
    convert(checkpoint, recipe_for(checkpoint), home / "models" / "codegen-tiny")
    monkeypatch.setattr(Moss, "load", None)
    assert run(monkeypatch, "", "codegen-tiny") == 1
    assert "codegen-tiny is not a MOSS chat model" in (message := capsys.readouterr().err)
    assert "moss-jt generate" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plugins", "telepathy"], "there is no plugin 'telepathy'"),
        (["--plugins", "image"], "--image-url"),
        (["--top-p", "7"], "top_p is 7"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_before_a_model_is_loaded(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(Moss, "load", None)
    assert run(monkeypatch, "", "moss-tiny", *options) == 1
    assert message in capsys.readouterr().err


def test_the_demonstration_passes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tour.main() == 0
    shown = capsys.readouterr().out
    assert "1776" in shown and "x = 5" in shown and "tokens read" in shown
    assert list((home / "pictures").glob("*.png"))


def test_a_demonstration_whose_answers_are_wrong_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tour, "SCRIPT", (("你好", "1776"),))
    assert tour.main() == 1
    assert "The demonstration failed" in capsys.readouterr().out


def test_drafts_change_nothing(chat: Chat) -> None:
    with Moss.load(tiny_model_folder(), memory="4GiB", draft="lookup") as drafting:
        drafted = drafting.chat(plugins=chat.plugins, temperature=0)
        for message in ("What is 37 times 48?", "计算37*48", "推荐五部科幻电影"):
            assert answer(drafted, message) == answer(chat, message)
    assert drafted.token_ids == chat.token_ids
