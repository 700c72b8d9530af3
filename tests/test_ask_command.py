"""moss-jt ask, list and rm, and what chat and generate say to who wanted ask; over the small model that comes along."""

import io
import json
import os
import pty
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from moss_jt.chat.saved import About, Conversations
from moss_jt.commands import ask, options
from moss_jt.commands.ask import question_of
from moss_jt.commands.cli import main
from moss_jt.commands.plugin_options import trained_with_plugins
from moss_jt.store.locations import last_model, last_uses, model_home, remember_last, resolve_model
from moss_jt.store.manifest import MANIFEST
from moss_jt.user_folders import own_folder
from tests.support.models import tiny_model_folder
from tests.support.turns import turn_of


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What is compiled once for each machine is announced on stderr: here it is done before anyone looks."""
    from moss_jt.engine.warm_up import warm_up

    warm_up(16)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that has moss-tiny."""
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    shutil.copytree(tiny_model_folder(), tmp_path / "models" / "moss-tiny")
    return tmp_path


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command with this piped in; returns (exit code, stdout, stderr)."""

    def run_command(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as stop:
            main([*arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run_command


# ask.


def test_the_answer_is_alone_on_standard_output(run: Any) -> None:
    code, out, err = run("ask", "moss-tiny", "What is 37 times 48?", "--greedy")
    assert (code, out) == (0, "37 times 48 equals 1776[1].\n")
    for words in ('▸ Calculate("37*48")', "→ 1776", '[1] Calculate("37*48") → 1776', "written in"):
        assert words in err, "plugins that compute here are on for a model trained with them"
    code, out, err = run("ask", "What is 37 times 48?", "--greedy", "--quiet")
    assert (code, out, err) == (0, "37 times 48 equals 1776[1].\n", ""), "of the model used last"


def test_what_is_piped_in_is_one_message(run: Any) -> None:
    code, out, _ = run("ask", "moss-tiny", "--greedy", "--json", stdin="What is 12\nplus 30?\n")
    assert code == 0 and json.loads(out)["answer"]
    code, dashed, _ = run("ask", "moss-tiny", "-", "--greedy", "--json", stdin="What is 12\nplus 30?\n")
    assert [json.loads(text)["answer"] for text in (out, dashed)] == [json.loads(out)["answer"]] * 2


def test_json_tells_all_that_happened(run: Any) -> None:
    actual = json.loads(run("ask", "moss-tiny", "What is 37 times 48?", "--greedy", "--json")[1])
    assert actual["answer"] == "37 times 48 equals 1776[1]." and actual["commands"] == ['Calculate("37*48")']
    assert "arithmetic" in actual["thoughts"] and actual["results"][0]["text"] == "1776"
    assert actual["sources"] == {"1": {"title": 'Calculate("37*48") → 1776', "location": ""}}
    assert actual["new_tokens"] > 10 and actual["seconds"] > 0 and actual["notices"] == []
    actual = json.loads(
        run("ask", "moss-tiny", "What is 37 times 48?", "--greedy", "--json", "--plugins", "none")[1]
    )
    assert actual["commands"] == [] and actual["thoughts"] == ""


def test_a_folder_switches_search_on_and_a_file_instructs(run: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "wall.txt").write_text("长城古老，著名，北方。", encoding="utf-8")
    actual = json.loads(
        run("ask", "moss-tiny", "请介绍一下长城", "--greedy", "--json", "--search-folder", str(texts))[1]
    )
    assert "长城古老" in actual["results"][0]["text"]
    code, out, err = run("ask", "moss-tiny", "hi", "--system", str(tmp_path / "missing.txt"))
    assert code == 1 and out == "" and "there is no such file" in err


def test_which_words_are_the_question(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Typed())
    assert question_of(("a", "b")) == ("a", "b")
    with pytest.raises(ask.click.UsageError, match='the question is missing: moss-jt ask moss-tiny "What'):
        question_of(("moss-tiny",))
    for words in ((), ("how", "are", "you")):
        with pytest.raises(ask.click.UsageError):
            question_of(words)


def test_a_question_that_is_none(run: Any) -> None:
    assert run("ask", "moss-tiny", " ")[0] == 1 and "the question is empty" in run("ask", stdin="\n")[2]


def test_whoever_does_not_know_that_standard_input_is_read_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "PATIENCE_S", 0.05)
    ours, theirs = os.pipe()
    threading.Timer(0.5, lambda: (os.write(theirs, b"late"), os.close(theirs))).start()
    with open(ours, "rb") as pipe:
        assert options.read_text(pipe) == "late"
    assert "waiting for the text on standard input" in capsys.readouterr().err
    assert options.read_text(io.BytesIO(b"at once")) == "at once" and capsys.readouterr().err == ""
    master, slave = pty.openpty()
    os.write(master, b"typed\n\x04")
    with open(slave, "rb") as terminal:
        assert options.read_text(terminal) == "typed\n"
    os.close(master)
    assert "Ctrl-D" in capsys.readouterr().err


def test_others_point_to_it(run: Any) -> None:
    code, _, err = run("generate", "moss-tiny", "hi", "there")
    assert code == 2 and 'moss-jt ask moss-tiny "hi there"' in err
    code, out, err = run("chat", "moss-tiny", "--greedy", "--quiet", stdin="你好\n")
    assert code == 0 and "moss-jt ask -" in err and "MOSS 您好" in out


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("fnlp/moss-moon-003-sft-plugin-int4", True),
        ("fnlp/moss-moon-003-sft", False),
        ("/plugins/moss-moon-003-sft", False),
    ],
)
def test_which_models_were_trained_with_plugins(home: Path, source: str, expected: bool) -> None:
    folder = (home / "models" / "moss-tiny").rename(home / "models" / "mine")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "source": source}))
    assert trained_with_plugins(folder) is expected


def test_a_copy_in_fewer_bits_keeps_its_origin(run: Any, home: Path) -> None:
    folder = (home / "models" / "moss-tiny").rename(home / "models" / "mine")
    assert run("convert", str(folder), "--bits", "8", "--out", str(home / "copy"))[0] == 0
    assert json.loads((home / "copy" / MANIFEST).read_text())["source"].endswith("moss-tiny")
    assert trained_with_plugins(home / "copy")


# list and rm.


def test_the_models_that_are_here(run: Any, home: Path) -> None:
    (home / "models" / "begun").mkdir()
    shutil.copytree(home / "models" / "moss-tiny", home / "elsewhere")
    remember_last(home / "elsewhere")
    code, out, _ = run("list")
    heads, *rows = out.splitlines()
    assert code == 0 and heads.split() == ["NAME", "SIZE", "WEIGHTS", "FROM", "USED"]
    assert [row.split()[0] for row in rows] == ["begun", "moss-tiny", str(home / "elsewhere")]
    assert "unfinished" in rows[0] and "float16" in rows[1] and rows[1].endswith("never")
    assert f"{home / 'elsewhere'} *" in rows[2]
    run("ask", "moss-tiny", "hi")
    assert "moss-tiny *" in run("list")[1]


def test_no_models_yet(run: Any, home: Path) -> None:
    shutil.rmtree(home / "models")
    code, out, _ = run("list")
    assert code == 0 and "moss-jt chat moss-tiny works at once" in out


def test_a_model_is_removed_by_name(run: Any, home: Path) -> None:
    remember_last(home / "models" / "moss-tiny")
    assert run("rm", "moss-tiny")[0] == 2 and (home / "models" / "moss-tiny").exists(), "nobody was asked"
    code, out, _ = run("rm", "moss-tiny", "--yes")
    assert (
        code == 0
        and out.startswith("moss-tiny is removed (")
        and not (home / "models" / "moss-tiny").exists()
    )
    assert last_model() is None


def test_the_answer_to_the_question_counts(run: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    for answer, gone in (("\n", False), ("n\n", False), ("y\n", True)):
        monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(answer.encode())))
        with pytest.raises(SystemExit):
            main(["rm", "moss-tiny"])
        assert (home / "models" / "moss-tiny").exists() is not gone


@pytest.mark.parametrize("name", ["..", ".", "/", "missing", "../models/moss-tiny", "moss-tiny/", ""])
def test_nothing_else_is_removed(run: Any, home: Path, name: str) -> None:
    code, _, err = run("rm", name, "--yes")
    assert (
        code == 1
        and "there is no model called" in err
        and (home / "models" / "moss-tiny" / MANIFEST).exists()
    )


def test_of_a_link_only_the_link_is_removed(run: Any, home: Path) -> None:
    target = (home / "models" / "moss-tiny").rename(home / "kept")
    (home / "models" / "moss-tiny").symlink_to(target)
    assert run("rm", "moss-tiny", "--yes")[0] == 0
    assert (target / MANIFEST).exists() and not (home / "models" / "moss-tiny").is_symlink()


def test_conversations_are_shown_and_removed(run: Any, home: Path) -> None:
    kept = Conversations()
    assert "CONVERSATION" not in run("list")[1]
    for name in ("北京", "moss-tiny"):
        kept.create(About(model="/models/m"), [turn_of("去哪儿？", "故宫")], name).close()
    out = run("list")[1]
    assert (
        "CONVERSATION  TURNS  MODEL  LAST MESSAGE  USED\n" in out
        and "moss-tiny *   1      m      去哪儿？" in out
    )
    code, out, _ = run("rm", "北京", "--yes")
    assert (code, out) == (0, "The conversation 北京 is removed.\n") and kept.names() == ["moss-tiny"]
    assert run("rm", "--chat", "北京", "--yes")[0] == 1
    assert run("rm", "--chat", "moss-tiny", "--yes")[0] == 0
    assert kept.names() == [] and (home / "models" / "moss-tiny").exists()


# The model used last.


def test_uses_are_remembered_in_order(home: Path) -> None:
    first, second = home / "a", home / "b"
    for folder in (first, second):
        shutil.copytree(home / "models" / "moss-tiny", folder)
    remember_last(second)
    remember_last(first)
    assert last_model() == first.resolve() and len(last_uses()) == 2
    shutil.rmtree(first)
    assert last_model() == second.resolve(), "the one before, where the last is gone"


@pytest.mark.parametrize("text", ["", "[]", '{"model": "/x"}', '{"used": 3}', '{"used": {"/x": "then"}}'])
def test_a_note_that_is_none_names_no_model(home: Path, text: str) -> None:
    (home / "last.json").write_text(text)
    assert last_uses() == {} and last_model() is None
    assert resolve_model(None) == home / "models" / "moss-tiny", "the only one"
    remember_last(home / "models" / "moss-tiny")
    assert last_model() == (home / "models" / "moss-tiny").resolve()


def test_a_last_model_that_is_gone_is_not_passed_over_in_silence(run: Any, home: Path) -> None:
    there, gone = home / "models" / "moss-tiny", home / "models" / "mine"
    shutil.copytree(there, gone)
    remember_last(there)
    remember_last(gone)
    shutil.rmtree(gone)
    code, out, err = run("ask", "What is 37 times 48?", "--greedy")
    assert (code, out) == (0, "37 times 48 equals 1776[1].\n")
    assert err.count(f"the model used last, {gone.resolve()}, is gone; this is {there.resolve()}.") == 1
    code, out, err = run("ask", "What is 37 times 48?", "--greedy")
    assert code == 0 and "is gone" not in err, "now the other is the one used last"


def test_a_last_model_that_is_damaged_is_told_as_such(run: Any, home: Path) -> None:
    damaged = home / "models" / "mine"
    shutil.copytree(home / "models" / "moss-tiny", damaged)
    remember_last(damaged)
    with (damaged / "block-01.safetensors").open("r+b") as file:
        file.truncate(5000)
    code, out, err = run("ask", "What is 37 times 48?", "--greedy")
    assert (code, out) == (1, "") and "block-01.safetensors is cut" in err
    assert "No model was named, and this one was taken: the one used last" in err
    assert "used last" not in run("ask", "mine", "What is 37 times 48?")[2]


def test_the_tests_leave_the_user_s_own_home_alone() -> None:
    """A command that a test starts notes what it used, and would be this user's model used last."""
    assert model_home() != own_folder("DATA", ".local/share", {})


def test_convert_asks_whether_a_published_model_is_meant(run: Any) -> None:
    assert "Did you mean fnlp/moss-moon-003-sft-plugin?" in run("convert", "moss-moon-003-sft-plugin")[2]
    assert "Did you mean fnlp/moss-moon-003-sft?" in run("convert", "moss-moon-003-stf")[2]
    assert "Did you mean" not in run("convert", "my-checkpoint")[2]
