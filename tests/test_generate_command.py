"""moss-jt generate, with the small model that comes with the program."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moss_jt.commands.cli import main
from tests.support.models import tiny_model_folder

PROMPT = "<|Human|>: Calculate 37*48<eoh>\n<|Inner Thoughts|>:"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What is compiled once for each machine is announced on stderr: here it is done before anyone looks."""
    from moss_jt.engine.warm_up import warm_up

    warm_up(16)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command and returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))

    def generate(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            main(["generate", *arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return generate


@pytest.fixture
def model() -> str:
    return str(tiny_model_folder())


def test_json_says_everything(run: Any, model: str) -> None:
    code, out, _ = run(model, "--prompt", PROMPT, "--greedy", "--max-new-tokens", "12", "--json")
    assert code == 0
    actual = json.loads(out)
    assert list(actual) == [
        *("text", "token_ids", "prompt_tokens", "new_tokens", "stop_reason"),
        *("passes", "drafted", "accepted", "seconds"),
    ]
    assert len(actual["token_ids"]) == actual["new_tokens"] == 12
    assert actual["prompt_tokens"] > 8 and actual["stop_reason"] == "length"
    seconds = actual["seconds"]
    assert list(seconds) == ["load", "prefill", "decode", "drafting", "waiting", "computing"]
    assert all(seconds[part] > 0 for part in ("load", "prefill", "decode", "computing"))
    assert seconds["drafting"] == actual["drafted"] == actual["accepted"] == 0 < actual["passes"]
    parts = seconds["drafting"] + seconds["waiting"] + seconds["computing"]
    assert parts == pytest.approx(seconds["decode"], abs=1e-5)


def test_text_streams_to_stdout_and_a_pipe_is_a_prompt(run: Any, model: str) -> None:
    options = (model, "--greedy", "--max-new-tokens", "12")
    code, out, _ = run(*options, "--prompt", PROMPT, "--json")
    expected = json.loads(out)["text"] + "\n"
    assert run(*options, "--prompt", PROMPT)[:2] == (0, expected)
    assert run(*options, stdin=PROMPT.encode())[:2] == (0, expected)
    assert run(*options, "--prompt", "-", stdin=PROMPT.encode())[:2] == (0, expected)


def test_a_stop_string_ends_it(run: Any, model: str) -> None:
    options = (model, "--prompt", PROMPT, "--greedy", "--json")
    complete = json.loads(run(*options)[1])["text"]
    stop = complete[5:8]
    actual = json.loads(run(*options, "--stop", "never said", "--stop", stop)[1])
    assert actual["stop_reason"] == "stop"
    assert actual["text"] == complete[: complete.index(stop)]


def test_the_same_seed_gives_the_same_tokens(run: Any, model: str) -> None:
    options = (
        model,
        "--prompt",
        "你好",
        "--temperature",
        "2",
        "--top-k",
        "0",
        "--json",
        "--max-new-tokens",
        "20",
    )
    tokens = [json.loads(run(*options, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert tokens[0] == tokens[1] != tokens[2]


def test_the_small_model_comes_with_the_program(run: Any) -> None:
    code, out, err = run("moss-tiny", "--prompt", "Hi", "--max-new-tokens", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["new_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a b c d e f g h", "--context", "4"), "the context has room for 4"),
        (("--prompt", "a", "--context", "4000"), "this model has 1024 positions"),
        (("--prompt", "a", "--top-p", "1.5"), "top_p is 1.5; it must be"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--prompt", "a", "--draft", "often"), "'often' is not a kind of draft"),
        (("--prompt", "a", "--memory", "1MiB"), "is too little for this model"),
        (("--prompt", "a", "--stop", ""), "a stop string is empty"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(
    run: Any, model: str, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(model, *arguments)
    assert code == 1
    assert out == "" and err.startswith("moss-jt: error: ") and message in err and err.count("\n") == 1


def test_text_that_is_no_utf_8_is_refused(run: Any, model: str) -> None:
    code, _, err = run(model, stdin=b"abc\xff")
    assert code == 1 and "not UTF-8 text (byte 3)" in err


def test_an_unknown_model_and_no_model_say_how_to_get_one(run: Any) -> None:
    code, _, err = run("no-such-model", "--prompt", "a")
    assert code == 1 and "there is no model called 'no-such-model'" in err
    code, _, err = run("--prompt", "a")
    assert code == 1 and "moss-jt chat moss-tiny" in err


def test_usage_errors_exit_with_2(run: Any, model: str) -> None:
    assert run(model, "--no-such-option")[0] == 2
    assert run(model, "--prompt", "a", "--seed", "x")[0] == 2
