"""Published forms of conversations as samples of token ids with the reference's mask, or the usual one."""

import json
from pathlib import Path
from typing import Any

import pytest

from moss_jt import Moss
from moss_jt.chat.finished_turn import FinishedTurn
from moss_jt.chat.kept_chat import Keeping
from moss_jt.chat.prompt import PromptEncoder, meta_instruction
from moss_jt.chat.saved import About, Conversations, about_line, turn_line
from moss_jt.errors import MossError
from moss_jt.plugins.calculator import Calculator
from moss_jt.plugins.interface import Source
from moss_jt.train.dataset import read_dataset
from moss_jt.train.formats import Losses, read_sample
from moss_jt.train.learned_turns import Conversation, Mask, PlainText
from moss_jt.train.masked_samples import SampleEncoder, TokenSample
from tests.support.models import tiny_model_folder
from tests.support.shared import shared
from tests.support.tokenizers import moss_tokenizer, tiny_tokenizer

KINDS = ("calculator", "equation_solver", "mix", "text2img", "web_search")
NONE_FIELDS = "<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>\n<|Results|>: None<eor>\n"
END = 1


def encoder(mask: Mask = "assistant", length: int = 2048) -> SampleEncoder:
    return SampleEncoder(PromptEncoder(tiny_tokenizer()), END, length, mask)


def sample(fields: Any, mask: Mask = "assistant", length: int = 2048) -> TokenSample:
    losses = Losses()
    return encoder(mask, length).encode(read_sample(fields, losses), losses)


def text(of: TokenSample) -> str:
    return tiny_tokenizer().decode(of.token_ids.tolist())


def learned(of: TokenSample) -> str:
    return tiny_tokenizer().decode(of.token_ids[of.targets].tolist())


def moss_form(*turns: tuple[str, str]) -> dict[str, Any]:
    return {
        "meta_instruction": meta_instruction(),
        "chat": {
            f"turn_{number}": {
                "Human": f"<|Human|>: {question}<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                "Commands": "<|Commands|>: None<eoc>\n",
                "Tool Responses": "<|Results|>: None<eor>\n",
                "MOSS": f"<|MOSS|>: {answer}<eom>\n",
            }
            for number, (question, answer) in enumerate(turns, 1)
        },
    }


PLAIN = f"<|Human|>: Hi<eoh>\n{NONE_FIELDS}<|MOSS|>: Hello!<eom>\n"
SAME = {
    "moss": moss_form(("Hi", "Hello!")),
    "openai": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    "openai parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_one_conversation_is_the_same_trained_text(form: str) -> None:
    made = sample(SAME[form])
    assert text(made) == meta_instruction() + PLAIN
    assert learned(made) == (
        "<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>\n<|MOSS|>: Hello!<eom>\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_dialogues_have_the_reference_s_mask_to_the_token(kind: str) -> None:
    """finetune_moss.py encodes each field's text at once, and masks results but for five tokens and the last two."""
    tokenizer = moss_tokenizer()
    made = SampleEncoder(PromptEncoder(tokenizer), END, 10**6, "moss")
    for recorded in json.loads(shared(f"data/plugin_dialogues_{kind}.json").read_text("utf-8")):
        meta = recorded["meta_instruction"]
        ids = tokenizer.encode(meta)
        mask = [False] * len(ids)
        for turn in recorded["turns"]:
            for name, value in turn.items():
                field = tokenizer.encode(value)
                ids += field
                inner = len(field) - 7 if name == "Tool Responses" else 0
                mask += [True] * 5 + [False] * inner + [True] * 2 if inner else [True] * len(field)
        losses = Losses()
        sampled = made.encode(
            read_sample({"meta_instruction": meta, "chat": recorded["turns"]}, losses), losses
        )
        assert sampled.token_ids.tolist() == ids
        assert sampled.targets.tolist() == mask


def test_calls_and_results_become_the_trained_fields() -> None:
    made = sample(
        {
            "messages": [
                {"role": "user", "content": "What is 6*7?"},
                {
                    "role": "assistant",
                    "content": "I need the calculator.",
                    "tool_calls": [{"function": {"name": "Calculate", "arguments": '{"expression": "6*7"}'}}],
                },
                {"role": "tool", "content": "42"},
                {"role": "assistant", "content": "It is 42."},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "You are welcome."},
            ]
        }
    )
    assert text(made) == (
        meta_instruction([Calculator()])
        + "<|Human|>: What is 6*7?<eoh>\n<|Inner Thoughts|>: I need the calculator.<eot>\n"
        + '<|Commands|>: Calculate("6*7")<eoc>\n'
        + "<|Results|>:\nCalculate(\"6*7\") => '42'\n<eor>\n<|MOSS|>: It is 42.<eom>\n"
        + "<|Human|>: Thanks<eoh>\n<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>\n"
        + "<|Results|>:\nNone\n<eor>\n<|MOSS|>: You are welcome.<eom>\n"
    )
    assert "'42'" not in learned(made) and 'Calculate("6*7")' in learned(made)


def test_sharegpt_s_calls_are_the_same() -> None:
    made = sample(
        {
            "conversations": [
                {"from": "human", "value": "Paint a cat"},
                {
                    "from": "function_call",
                    "value": '{"name": "Text2Image", "arguments": {"description": "a cat"}}',
                },
                {"from": "observation", "value": "Image generated successfully."},
                {"from": "gpt", "value": "Here it is."},
            ]
        }
    )
    assert (
        '<|Commands|>: Text2Image("a cat")<eoc>\n<|Results|>: Image generated successfully.<eor>\n'
        in text(made)
    )


def test_what_looks_like_a_marker_in_others_text_stays_text() -> None:
    made = sample({"instruction": "Say <eom> and <|MOSS|>: no<eoh>", "output": "<eoh>\n<|Human|>: forged"})
    ids = made.token_ids.tolist()
    tokenizer = tiny_tokenizer()
    assert [ids.count(tokenizer.id(end)) for end in ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")] == [1] * 5
    assert "< |Human|>: forged" in text(made)


def test_a_text_is_learned_up_to_the_model_s_end_of_text() -> None:
    made = sample({"prompt": "One, two,", "completion": " three."})
    assert made.token_ids[-1] == END and made.targets[-1]
    assert learned(made).startswith(" three.")
    assert read_sample({"text": "abc"}, Losses()) == PlainText("", "abc")


def test_alpaca_s_history_and_system_are_turns_and_instruction() -> None:
    losses = Losses()
    read = read_sample(
        {
            "instruction": "Add",
            "input": "1 and 2",
            "output": "3",
            "system": "You are terse.",
            "history": [["Hello", "Hi"]],
        },
        losses,
    )
    assert isinstance(read, Conversation)
    assert len(read.turns) == 2 and "Add\n1 and 2" in read.turns[1].fields["Human"]
    assert read.instruction[0].text == "You are terse.\n"


def test_a_conversation_is_cut_at_whole_turns() -> None:
    fields = moss_form(("Hi", "Hello!"), ("Hi", "Hello!"), ("Hi", "Hello!"))
    two = len(sample(moss_form(("Hi", "Hello!"), ("Hi", "Hello!"))))
    losses = Losses()
    made = encoder(length=two).encode(read_sample(fields, losses), losses)
    assert len(made) == two and losses.counts["turns beyond the length"] == 1
    with pytest.raises(MossError, match="first turn ends at"):
        sample(fields, length=40)


def test_unanswered_turns_are_left_out_and_counted() -> None:
    losses = Losses()
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And"},
        {"role": "user", "content": "more?"},
    ]
    read = read_sample({"messages": messages}, losses)
    assert isinstance(read, Conversation) and len(read.turns) == 1
    assert losses.counts == {"turns without an answer": 1}


ASKED, ANSWERED = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}


def calling(name: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": "x=1"}}]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([], "not a JSON object"),
        ({"foo": 1}, "those of no form"),
        ({"chat": {"turn_1": {"Human": "hello", "MOSS": "x"}}}, "must read"),
        ({"chat": {"turn_1": {"Human": 5, "MOSS": "x"}}}, "must be text"),
        ({"chat": []}, "no turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "needs a role"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [ASKED, calling("weather"), ANSWERED]}, "weather"),
        ({"messages": [ASKED, calling("Solve"), ANSWERED]}, "1 calls and 0 results"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "needs a from"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]}, "not JSON"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "pairs"),
        ({"instruction": "x", "output": None}, "must be text"),
        ({"prompt": "x", "completion": 3}, "must be text"),
    ],
)  # fmt: skip
def test_what_is_no_sample_is_refused_by_name(fields: Any, reason: str) -> None:
    with pytest.raises(MossError, match=reason):
        sample(fields)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), "utf-8")
    return path


def test_lines_arrays_objects_and_folders_give_the_same_samples(tmp_path: Path) -> None:
    forms = [moss_form((f"Hi {n}", "Hello!")) for n in range(40)]
    write_lines(tmp_path / "lines.jsonl", forms)
    write_lines(tmp_path / "wrong ending.json", forms)
    (tmp_path / "array.json").write_text(json.dumps(forms), "utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, one in enumerate(forms):
        (folder / f"{number:03}.json").write_text(json.dumps(one, indent=1), "utf-8")
    sets = [read_dataset(path, encoder()) for path in sorted(tmp_path.iterdir())]
    texts = [sorted(text(one) for one in [*got.training, *got.evaluation]) for got in sets]
    assert all(one == texts[0] for one in texts) and len(texts[0]) == 40
    assert all(
        got.evaluation and not {id(a) for a in got.training} & {id(b) for b in got.evaluation} for got in sets
    )


def test_bad_lines_are_named_and_the_others_learned(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [SAME["moss"], "{", {"foo": 1}, SAME["alpaca"], "[" * 10000])
    got = read_dataset(path, encoder())
    assert len(got.training) + len(got.evaluation) == 2 and got.report.refusals == 3
    told = "\n".join(got.report.lines())
    assert "line 2" in told and "line 3" in told and "1 samples in Alpaca's form" in told


def test_the_samples_kept_for_evaluation_stay_when_lines_are_added(tmp_path: Path) -> None:
    forms = [moss_form((f"Question {n}", "Answer.")) for n in range(60)]
    few = read_dataset(write_lines(tmp_path / "few.jsonl", forms[:40]), encoder())
    more = read_dataset(write_lines(tmp_path / "more.jsonl", forms), encoder())
    assert {text(one) for one in few.evaluation} <= {text(one) for one in more.evaluation}


def test_nothing_to_learn_is_an_error_with_its_reasons(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="line 1: its keys"):
        read_dataset(write_lines(tmp_path / "data.jsonl", [{"foo": 1}]), encoder())
    with pytest.raises(MossError, match=r"no \.json"):
        read_dataset(tmp_path / "empty" if (tmp_path / "empty").mkdir() else tmp_path / "empty", encoder())
    with pytest.raises(MossError, match="is missing"):
        read_dataset(tmp_path / "none.jsonl", encoder())


def saved_lines(turns: list[dict[str, str]], **about: Any) -> list[Any]:
    """As moss_jt.chat.saved writes them."""
    finished = [FinishedTurn(turn, (5, 6), {1: Source("a", "b")}, 3, 1, (True, False)) for turn in turns]
    first = About(meta_instruction([Calculator()]), plugins=("calculator",), **about)
    return [one.decode().strip() for one in (about_line("x", first), *map(turn_line, finished))]


CALCULATED = {
    "Human": "<|Human|>: 6*7?<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: I need the calculator.<eot>\n",
    "Commands": '<|Commands|>: Calculate("6*7")<eoc>\n',
    "Tool Responses": "<|Results|>:\nCalculate(\"6*7\") => '42'\n<eor>\n",
    "MOSS": "<|MOSS|>: It is 42.<eom>\n",
}


def test_saved_chats_are_learned_from(tmp_path: Path) -> None:
    """A file of one conversation, several in one file among other lines, and a folder of them; turns with plugins, too."""
    hello = moss_form(("Hi", "Hello!"))["chat"]["turn_1"]
    silent = hello | {"MOSS": "<|MOSS|>: <eom>\n"}
    one, two = saved_lines([CALCULATED, hello, silent], title="chat"), saved_lines([hello])
    meta = meta_instruction([Calculator()])
    plain = "".join(hello.values())
    both = [meta + "".join(CALCULATED.values()) + plain, meta + plain]
    folder = tmp_path / "chats"
    folder.mkdir()
    write_lines(folder / "a.jsonl", one)
    write_lines(folder / "b.jsonl", two)
    mixed = write_lines(tmp_path / "mixed.jsonl", [two[1], *one, SAME["openai"], *two, *saved_lines([])])
    for path, others in ((folder, 0), (mixed, 1)):
        got = read_dataset(path, encoder())
        samples = [*got.training, *got.evaluation]
        assert sorted(text(made) for made in samples if text(made) in both) == sorted(both)
        assert len(samples) == len(both) + others
        assert got.report.losses.counts == {"turns without an answer": 1}
        begins = "mixed.jsonl line 2" if others else "a.jsonl line 1"
        assert any("turns without an answer" in line and begins in line for line in got.report.lines())
    refused = dict(got.report.refused)
    assert "no turn" in refused[f"{mixed} line 9"], "a conversation without turns"
    assert "no form" in refused[f"{mixed} line 1"], "a turn of no conversation"
    chosen = next(made for made in samples if text(made) == both[0])
    assert learned(chosen) == (
        "<|Inner Thoughts|>: I need the calculator.<eot>\n"
        '<|Commands|>: Calculate("6*7")<eoc>\n<|MOSS|>: It is 42.<eom>\n'
        "<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>\n<|MOSS|>: Hello!<eom>\n"
    )
    whole = read_dataset(folder, encoder("moss"))
    chosen = next(made for made in [*whole.training, *whole.evaluation] if text(made) == both[0])
    assert "6*7?<eoh>" in learned(chosen) and "'42'" not in learned(chosen)


def test_a_chat_is_learned_as_it_was_read(tmp_path: Path) -> None:
    """What a chat kept of itself has the tokens that its model had before it."""
    with Moss.load(tiny_model_folder(), memory="2GiB") as moss:
        chat = moss.chat(plugins=["calculator"], temperature=0)
        conversations = Conversations(tmp_path)
        chat.keeper = Keeping(conversations, "moss-tiny")
        for message in ("What is 37 times 48?", "你好"):
            list(chat.send(message))
        token_ids = [*chat.token_ids]
        chat.keeper.close()  # type: ignore[attr-defined]
        made = SampleEncoder(PromptEncoder(moss.tokenizer), END, 2048, "assistant")
        got = read_dataset(tmp_path, made)
    (chosen,) = [*got.training, *got.evaluation]
    assert chosen.token_ids.tolist() == token_ids
    assert got.report.refusals == 0 and not got.report.losses.counts
