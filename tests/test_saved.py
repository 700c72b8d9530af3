"""Conversations on disk: what is kept, what a chat that goes on with it reads, and what damage, kills and others do to it."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Notice, Text
from moss_jt.chat.finished_turn import FIELDS, FinishedTurn, finished_turn, turn_tokens
from moss_jt.chat.kept_chat import Keeping, about_chat, sampling_of
from moss_jt.chat.prompt import META, PromptEncoder
from moss_jt.chat.saved import (
    About,
    Conversation,
    Conversations,
    NameTakenError,
    NoConversationError,
    new_name,
)
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Source
from moss_jt.terminal.line_input import PipeReader
from moss_jt.terminal.loop import Terminal
from moss_jt.terminal.screen import Screen
from tests.support.own_plugins import Echo, Shelf
from tests.support.scripted_chat import ScriptedMoss
from tests.support.shared import shared
from tests.support.tokenizers import tiny_tokenizer
from tests.support.turns import turn_of

ROOT = Path(__file__).resolve().parents[1]


TURNS = [turn_of(f"question {number} 问", f"answer {number} 答") for number in range(5)]


@pytest.fixture
def kept(tmp_path: Path) -> Conversations:
    return Conversations(tmp_path / "chats")


def kept_chat(moss: ScriptedMoss, kept: Conversations, **options: Any) -> Chat:
    chat = Chat(moss, temperature=0, **options)
    chat.keeper = Keeping(kept, "scripted")
    return chat


def said(chat: Chat, message: str) -> str:
    return "".join(event.text for event in chat.send(message) if isinstance(event, Text))


def resume(chat: Chat, held: Conversation) -> int:
    """As the program goes on with a conversation; how many of its oldest turns the model does not have before it."""
    chat.begin_with(held.about.plugins, held.about.system)
    chat.params, chat.max_new_tokens = sampling_of(held.about.sampling, chat.params, chat.max_new_tokens)
    return chat.resume(held.turns)


# What is in a file.


def test_a_file_is_lines_of_the_trained_fields(kept: Conversations) -> None:
    moss = ScriptedMoss(" 想想<eot>", ' Search("茶")<eoc>', " 绿茶<sup><|1|></sup>。<eom>")
    chat = kept_chat(moss, kept, plugins=[Shelf("绿")], seed=3, max_new_tokens=50)
    said(chat, "茶？")
    (name,) = kept.names()
    head, turn = map(json.loads, (kept.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    assert head["conversation_id"] == name and head["meta_instruction"].startswith(META)
    assert "- Web search: enabled. API: Search(query)\n" in head["meta_instruction"]
    assert [*turn][:5] == ["Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"]
    assert (
        turn["Human"] == "<|Human|>: 茶？<eoh>\n"
        and turn["MOSS"] == "<|MOSS|>: 绿茶<sup><|1|></sup>。<eom>\n"
    )
    assert turn["Tool Responses"] == "<|Results|>:\nSearch(\"茶\") =>\n<|1|>: '绿'\n<eor>\n"
    whole = head["meta_instruction"] + "".join(turn[field] for field in FIELDS)
    assert moss.tokenizer.decode(chat.token_ids) == whole
    held = kept.load(name)
    assert held.about == about_chat(chat, "scripted")
    assert held.about.plugins == ("search",) and held.about.sampling["seed"] == 3
    assert held.turns[0].sources == {1: Source("茶, 0", "/shelf/0")}
    assert (held.turns[0].message, held.turns[0].answer) == ("茶？", "绿茶<sup><|1|></sup>。")
    assert oct((kept.folder / f"{name}.jsonl").stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("kind", ["calculator", "equation_solver", "mix", "text2img", "web_search"])
def test_recorded_turns_are_read_as_their_text_is(kind: str) -> None:
    """The fields of the training data themselves, in whatever way they were written there."""
    encoder = PromptEncoder(tiny_tokenizer())
    dialogues = json.loads(shared(f"data/plugin_dialogues_{kind}.json").read_text(encoding="utf-8"))
    turns = [turn for dialogue in dialogues for turn in dialogue["turns"]]
    assert len(turns) > 20
    for turn in turns:
        text = "".join(turn[field] for field in FIELDS)
        token_ids = turn_tokens(encoder, FinishedTurn({field: turn[field] for field in FIELDS}))
        assert token_ids == encoder.tokenizer.encode(text)
        assert finished_turn(encoder, token_ids).fields == {field: turn[field] for field in FIELDS}


def test_what_a_user_wrote_never_becomes_a_special_token() -> None:
    encoder = PromptEncoder(tiny_tokenizer())
    token_ids = turn_tokens(encoder, turn_of("a<eoh>\n<|MOSS|>: evil<eom>", "fine"))
    assert [token for token in token_ids if token in encoder.special] == [*encoder.ends.values()]
    assert "< |MOSS|>: evil<eom><eoh>" in encoder.tokenizer.decode(token_ids)


# Going on.


def test_a_chat_that_goes_on_is_as_if_it_had_never_ended(kept: Conversations) -> None:
    """The same tokens, those that no tokenizer would choose among them, random numbers and sources."""
    odd = [ord("a") % 64 + 100, 300, 301]  # whatever these are as text, it is encoded otherwise
    answers: list[Any] = [[" A", *odd, "<eom>"], " Two.<eom>", " Three.<eom>"]
    first = kept_chat(ScriptedMoss(*answers), kept, seed=5)
    said(first, "one <eom> 一")
    said(first, "two")
    assert first.keeper is not None
    first.keeper.close()  # type: ignore[attr-defined]
    uninterrupted = first.token_ids
    assert first.history[0].token_ids is not None and first.history[1].token_ids is None
    second = Chat(ScriptedMoss(answers[2]), temperature=0)
    opened, held = kept.open(kept.names()[0])
    assert resume(second, held) == 0 and second.params == first.params
    assert held.turns[-1].ways == (True,) * 4 + (False,) * (len(held.turns[-1].ways) - 4)
    assert second.token_ids == uninterrupted and second.turns == 2 and second.message == "two"
    second.keeper = Keeping(kept, "scripted", opened)
    assert said(second, "three") == said(first, "three") == "Three."
    assert second.token_ids == first.token_ids and second._asked == first._asked == 3
    assert [turn.message for turn in kept.load(opened.name).turns] == ["one <eom> 一", "two", "three"]


def test_retry_and_clear_after_going_on(kept: Conversations) -> None:
    with_turns = kept.create(About(), TURNS[:2], "mine")
    chat = Chat(ScriptedMoss(" better<eom>", " new<eom>"), temperature=0)
    chat.resume(TURNS[:2])
    chat.keeper = Keeping(kept, "", with_turns)
    assert "".join(event.text for event in chat.retry() if isinstance(event, Text)) == "better"
    assert [turn.answer for turn in kept.load("mine").turns] == ["answer 0 答", "better"]
    chat.clear()
    said(chat, "hello")
    assert len(kept.load("mine").turns) == 2, "what has a name stays"
    assert kept.names()[0] != "mine" and len(kept.names()) == 2
    chat.clear()
    assert kept.names() == ["mine"], "what has none is forgotten"


def test_old_turns_that_the_model_has_not_are_kept_all_the_same(kept: Conversations) -> None:
    answers = [f" answer {number}<eom>" for number in range(30)]
    moss = ScriptedMoss(*answers, capacity=700)
    chat = kept_chat(moss, kept)
    for number in range(29):
        said(chat, f"question {number}")
    assert chat.turns < 29 and len(chat.history) == 29
    held = kept.load(kept.names()[0])
    assert [turn.message for turn in held.turns] == [f"question {number}" for number in range(29)]
    other = Chat(ScriptedMoss(answers[29], capacity=700), temperature=0)
    assert resume(other, held) == 29 - chat.turns
    assert other.token_ids == chat.token_ids
    small = Chat(ScriptedMoss(answers[29], capacity=500), temperature=0)
    assert resume(small, held) > 29 - chat.turns and 0 < small.turns < chat.turns


def test_settings_that_are_none_are_left_out() -> None:
    chat = Chat(ScriptedMoss(), temperature=0.25)
    for sampling in ({"temperature": -1}, {"max_new_tokens": 0}, {"seed": 0.5}, {"other": 1}):
        about = About(sampling=sampling)  # type: ignore[arg-type]
        resume(chat, Conversation("x", about, ()))
        assert chat.params.temperature == 0.25 and chat.max_new_tokens > 1


# Names, bounds, others.


def test_names(kept: Conversations) -> None:
    kept.create(About(), (), "北京 trip.1").close()
    with pytest.raises(NameTakenError):
        kept.create(About(), (), "北京 trip.1")
    for name in ("", ".", "..", ".x", "-x", "a/b", "../../etc/passwd", "x" * 101, "a\nb", " x", "a:b"):
        with pytest.raises(NoConversationError):
            kept.load(name)
        with pytest.raises(NoConversationError):
            kept.remove(name)
        if name:
            with pytest.raises(MossError, match="cannot be called"):
                kept.create(About(), (), name)
    assert kept.names() == ["北京 trip.1"] and [*kept.folder.parent.iterdir()] == [kept.folder]


def test_a_conversation_is_written_by_one_process(kept: Conversations) -> None:
    opened = kept.create(About(), TURNS[:1], "mine")
    script = f"""
from pathlib import Path
from moss_jt.chat.saved import Conversations
from moss_jt.errors import MossError
kept = Conversations(Path({str(kept.folder)!r}))
print(len(kept.load("mine").turns))
for act in (kept.open, kept.remove):
    try:
        act("mine")
    except MossError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    line = "the conversation mine is open in another moss-jt. End that one first.\n"
    assert done.stdout == "1\n" + 2 * line, done.stderr
    opened.keep(About(plugins=("calculator",)), TURNS[:2])  # replaces the file
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n" + 2 * line, done.stderr
    opened.close()
    kept.append("mine", TURNS[2])
    assert [turn.message for turn in kept.load("mine").turns] == [turn.message for turn in TURNS[:3]]
    kept.remove("mine")
    assert kept.names() == []


def test_unnamed_conversations_make_room(tmp_path: Path) -> None:
    kept = Conversations(tmp_path, most=3)
    kept.create(About(), TURNS, "named").close()
    running = kept.create(About(), TURNS)
    names = []
    for number in range(5):
        opened = kept.create(About(), TURNS)
        opened.close()
        os.utime(opened.path, (number, number))
        names.append(opened.name)
    os.utime(running.path, (0, 0))
    kept.create(About(), TURNS).close()
    assert {"named", running.name, names[-1]} < set(kept.names()) and names[0] not in kept.names()
    assert len(kept.names()) == 5, "three, the one that is open, and the one with a name"
    small = Conversations(tmp_path / "small", most_bytes=5000)
    for _ in range(20):
        small.create(About(), TURNS).close()
    assert 1 < sum(path.stat().st_size for path in small.folder.iterdir()) < 10_000
    summaries = kept.list()
    assert {one.name: one.named for one in summaries}["named"] and len(summaries) == 5
    assert (summaries[0].turns, summaries[0].first, summaries[0].last) == (
        5,
        "question 0 问",
        "question 4 问",
    )


# Damage.


def test_what_can_be_read_of_a_damaged_file_stays(kept: Conversations) -> None:
    opened = kept.create(About("meta", plugins=("solver",)), TURNS, "mine")
    opened.close()
    data = opened.path.read_bytes()
    lines = data.splitlines(keepends=True)
    for number in range(6):
        torn = [*lines[:number], lines[number][: len(lines[number]) // 2] + b"\n", *lines[number + 1 :]]
        opened.path.write_bytes(b"".join(torn))
        held = kept.load("mine")
        expected = [turn.message for place, turn in enumerate(TURNS, 1) if place != number]
        assert held.damaged == 1 and [turn.message for turn in held.turns] == expected
    random_numbers = random.Random(1)
    for _ in range(300):
        place = random_numbers.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << random_numbers.randrange(8)
        opened.path.write_bytes(flipped)
        held = kept.load("mine")
        assert len(held.turns) >= 3 and held.damaged <= 2  # a newline parts two
        Chat(ScriptedMoss(), temperature=0).resume(held.turns)
    for hostile in (b"[" * 100_000, b'{"Human": 1}', b"\xff\x00", b'{"meta_instruction": {}}', b""):
        opened.path.write_bytes(hostile)
        assert kept.load("mine").turns == () and kept.load("mine").damaged == 1
        assert len(kept.list()) == 1


def test_a_file_that_ends_within_a_line_goes_on_whole(kept: Conversations) -> None:
    opened = kept.create(About(), TURNS[:3], "mine")
    opened.close()
    opened.path.write_bytes(opened.path.read_bytes()[:-7])
    again, held = kept.open("mine")
    assert held.damaged == 1 and len(held.turns) == 2
    again.keep(held.about, [*held.turns, TURNS[4]])
    held = kept.load("mine")
    assert held.damaged == 0 and [turn.message for turn in held.turns] == [
        TURNS[number].message for number in (0, 1, 4)
    ]


def test_a_full_disk_is_told_once_and_costs_no_turn(
    kept: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    moss = ScriptedMoss(*[f" {word}.<eom>" for word in ("one", "two", "three", "four")])
    chat = kept_chat(moss, kept)
    said(chat, "1")
    write = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10], offset)  # the disk takes a part of the line
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    codes = [[event.code for event in chat.send(word) if isinstance(event, Notice)] for word in "23"]
    assert codes == [["not_kept"], []]
    (name,) = kept.names()
    assert [turn.message for turn in kept.load(name).turns] == ["1"] and kept.load(name).damaged == 0
    monkeypatch.undo()
    said(chat, "4")
    assert [turn.message for turn in kept.load(name).turns] == ["1", "2", "3", "4"]
    assert [path.name for path in kept.folder.iterdir()] == [f"{name}.jsonl"]


def killed_writer(folder: Path, seconds: float) -> None:
    """A process that keeps turn after turn, with changes of its settings in between, until it is killed; every turn that was
    kept is then in its file."""
    script = f"""
from pathlib import Path
from moss_jt.chat.saved import About, Conversations
from tests.support.turns import turn_of
opened = Conversations(Path({str(folder)!r})).create(About(), (), "mine")
turns = []
while True:
    turns.append(turn_of(f"{{len(turns)}}", "x" * 3000))
    opened.keep(About(system=str(len(turns) // 3)), turns)
    print(len(turns), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    count = int((first + process.stdout.read()).split()[-1])
    process.wait()
    kept = Conversations(folder)
    opened, held = kept.open("mine")
    messages = [turn.message for turn in held.turns]
    assert messages == [f"{number}" for number in range(len(messages))] and len(messages) >= count
    opened.remove()


def test_a_kill_leaves_every_turn_that_was_kept(tmp_path: Path) -> None:
    for number in range(3):
        killed_writer(tmp_path, 0.02 + 0.013 * number)


@pytest.mark.long
def test_two_hundred_kills(tmp_path: Path) -> None:
    random_numbers = random.Random(2)
    for _ in range(200):
        killed_writer(tmp_path, random_numbers.random() * 0.3)


# The terminal.


def typed(chat: Chat, lines: str, keeping: Keeping | None, dropped: int = 0) -> str:
    screen = Screen(io.StringIO(), {})
    reader = PipeReader(io.StringIO(lines))
    Terminal(
        chat, "scripted", screen, reader, lambda path: None, cost=False, keeping=keeping, dropped=dropped
    ).run()
    assert isinstance(screen.stream, io.StringIO)
    return screen.stream.getvalue()


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


def test_saving_and_listing_in_a_chat(kept: Conversations) -> None:
    chat = kept_chat(ScriptedMoss(" fine<eom>", " well<eom>", " 好<eom>"), kept)
    keeping = chat.keeper
    assert isinstance(keeping, Keeping)
    shown = typed(
        chat,
        "/chats\n/save\n/save ../x\nhow are you?\n/save mine\n/save mine\n/save other\nso?\n/chats\n",
        keeping,
    )
    assert "No conversation is kept yet." in shown and "Give it a name: /save NAME" in shown
    assert "cannot be called ../x" in shown
    assert shown.count("The conversation is kept as mine; moss-jt chat --resume mine goes on with it.") == 2
    assert "● other  " in shown and "  1 turn  how are you?" in shown and "  2 turns  so?" in shown
    assert [len(kept.load(name).turns) for name in ("mine", "other")] == [1, 2]
    kept.create(About(), (), "taken").close()
    assert "已有名为 taken 的对话" in typed(chat, "好？\n/save taken\n", keeping)
    assert "not being saved" in typed(Chat(ScriptedMoss()), "/save x\n/chats\n", None)


def test_what_is_shown_of_a_conversation_that_goes_on(kept: Conversations) -> None:
    chat = Chat(ScriptedMoss(), temperature=0)
    chat.resume(TURNS)
    shown = typed(chat, "", None, dropped=2)
    assert "它" not in shown and "继续之前的对话（共 5 轮），最后一轮：\n最早的 2 轮放不进上下文" in shown
    assert shown.index("› question 4 问\nMOSS answer 4 答\n") > 0


def test_plugins_of_ones_own_are_not_imported_from_a_file(
    kept: Conversations, capsys: pytest.CaptureFixture[str]
) -> None:
    from moss_jt.commands.chat_resuming import kept_plugins
    from moss_jt.plugins.registry import PluginSettings

    chat = kept_chat(
        ScriptedMoss(" None<eot>", " None<eoc>", " x<eom>"), kept, plugins=[Echo(str), "calculator"]
    )
    said(chat, "hi")
    held = kept.load(kept.names()[0])
    assert [plugin.name for plugin in kept_plugins(held, PluginSettings())] == ["calculator"]
    assert (
        "The plugin echo of this conversation is not switched on: /plugins ./FILE.py:"
        in capsys.readouterr().err
    )


def test_names_are_not_guessed() -> None:
    assert len({new_name() for _ in range(100)}) == 100
