"""The Python interface, with the small model that comes with the program."""

import gc
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.plan.machine import resident_memory_bytes
from moss_jt.store.sizes import MIB
from tests.support.models import tiny_model_folder
from tests.support.random_models import WIDE, random_folder

TEXT = "<|Human|>: Calculate 37*48<eoh>\n<|Inner Thoughts|>:"


@pytest.fixture(scope="module")
def moss() -> Iterator[Moss]:
    with Moss.load(tiny_model_folder()) as loaded:
        yield loaded


def test_logits_have_a_row_for_each_token(moss: Moss) -> None:
    token_ids = moss.tokenizer.encode(TEXT)
    logits = moss.logits(token_ids)
    assert logits.dtype == np.float32 and logits.shape == (len(token_ids), moss.config.vocab_size)
    generation = moss.generate(token_ids, max_new_tokens=1, temperature=0)
    list(generation)
    assert generation.token_ids == [int(logits[-1].argmax())]


def test_logits_of_more_tokens_than_one_pass_takes(moss: Moss) -> None:
    token_ids = (moss.tokenizer.encode(TEXT) * 60)[:600]
    assert moss.model.pass_tokens < 600
    complete = moss.logits(token_ids)
    np.testing.assert_allclose(
        complete[:100], moss.logits(token_ids[:100]), atol=1e-3 * np.abs(complete).max()
    )


def test_text_and_its_token_ids_are_the_same_prompt(moss: Moss) -> None:
    answers = []
    for prompt in (TEXT, moss.tokenizer.encode(TEXT)):
        generation = moss.generate(prompt, max_new_tokens=20, temperature=0)
        pieces = list(generation)
        assert "".join(pieces) == generation.text and len(pieces) > 3
        answers.append((generation.text, generation.token_ids))
    assert answers[0] == answers[1]


def test_no_stop_strings_and_a_byte_order_mark_change_nothing(moss: Moss) -> None:
    answers = [
        list(moss.generate(text, max_new_tokens=8, temperature=0, stop=stop))
        for text in (TEXT, "\ufeff" + TEXT)
        for stop in (None, (), [])
    ]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("stop", [3, [3], ("a", None), {"a": 1, 2: 3}])
def test_what_is_no_stop_string_is_named(moss: Moss, stop: Any) -> None:
    with pytest.raises(MossError, match=f"^stop is {re.escape(repr(stop))}; it must be text"):
        moss.generate(TEXT, stop=stop)


def test_it_stops_at_the_end_of_the_answer(moss: Moss) -> None:
    generation = moss.generate("<|Human|>: Hello<eoh>\n<|Inner Thoughts|>: None<eot>\n", temperature=0)
    text = "".join(generation)
    assert generation.stats.stop_reason == "eos"
    assert generation.token_ids[-1] == moss.tokenizer.id("<eom>")
    assert "<eom>" not in text


def test_an_answer_is_the_same_the_second_time_and_whatever_came_between(moss: Moss) -> None:
    def answer() -> list[int]:
        generation = moss.generate(TEXT, max_new_tokens=30, seed=4, temperature=1.5)
        list(generation)
        return generation.token_ids

    first = answer()
    other = moss.generate("你好", max_new_tokens=9, seed=1)
    next(other)
    assert answer() == first
    list(other)
    assert answer() == first


def test_two_answers_may_be_written_in_turns(moss: Moss) -> None:
    def generations() -> list[Iterator[str]]:
        return [moss.generate(prompt, max_new_tokens=12, temperature=0) for prompt in (TEXT, "你好")]

    alone = ["".join(generation) for generation in generations()]
    together = generations()
    texts = ["", ""]
    for _ in range(12):
        for i, generation in enumerate(together):
            texts[i] += next(generation, "")
    assert [text + "".join(rest) for text, rest in zip(texts, together, strict=True)] == alone


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, 10**6], "token ids must be from 0 to"),
        ([-1], "token ids must be from 0 to"),
        ([1] * 1025, "the prompt has 1025 tokens, and the context has room for 1024"),
    ],
)
def test_impossible_prompts_are_refused(moss: Moss, prompt: str | list[int], message: str) -> None:
    with pytest.raises(MossError, match=message):
        moss.generate(prompt)
    if not isinstance(prompt, str):
        with pytest.raises(MossError, match=message):
            moss.logits(prompt)


@pytest.mark.parametrize("prompt", [["text"], None, 3, [1.5], b"text", np.array([[1, 2]])], ids=repr)
def test_what_is_neither_a_text_nor_token_ids_is_said(moss: Moss, prompt: Any) -> None:
    for use in (moss.generate, moss.logits):
        with pytest.raises(MossError, match="one text, or token ids as a list of whole numbers"):
            use(prompt)
    with pytest.raises(MossError, match="it is 'text'"):
        moss.logits("text")  # type: ignore[arg-type]


def test_token_ids_may_be_an_array(moss: Moss) -> None:
    np.testing.assert_array_equal(moss.logits(np.array([5, 6])), moss.logits([5, 6]))
    assert moss.generate(np.array([5, 6])).stats.prompt_tokens == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_values_of_the_wrong_type_are_said(moss: Moss, options: dict[str, Any], message: str) -> None:
    for use in (lambda: moss.generate("a", **options), lambda: moss.chat(**options)):
        with pytest.raises(MossError, match=message):
            use()


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("calculator", r"plugins is 'calculator'; give a list of names: plugins=\['calculator'\]"),
        ("search, solver", r"plugins=\['search', 'solver'\]"),
        (None, "give a list of names"),
        (3, "give a list of names"),
        ([3], "the plugin int cannot be called"),
        ([None], "the plugin NoneType cannot be called"),
    ],
)
def test_plugins_that_are_no_list_of_names_are_said(moss: Moss, plugins: Any, message: str) -> None:
    for use in (lambda: moss.chat(plugins=plugins), lambda: moss.chat().switch(plugins)):
        with pytest.raises(MossError, match=message):
            use()


def test_a_message_that_is_no_text_is_said(moss: Moss) -> None:
    with pytest.raises(MossError, match="a message is text, not int"):
        moss.chat().send(3)  # type: ignore[arg-type]


def test_a_prompt_that_fills_the_context_has_no_answer(moss: Moss) -> None:
    generation = moss.generate([5] * 1024, temperature=0)
    assert list(generation) == [] and generation.token_ids == []
    assert generation.stats.stop_reason == "context"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "there is no device 'abacus'"),
        ({"memory": "much"}, "'much' is not an amount of memory"),
        ({"context": 5000}, "this model has 1024 positions"),
        ({"context": "5"}, "context is '5'"),
        ({"context": 2.5}, "context is 2.5"),
        ({"memory": "16"}, "Say which unit is meant: 16GiB"),
        ({"draft": "maybe"}, "'maybe' is not a kind of draft"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(MossError, match=message):
        Moss.load(tiny_model_folder(), **options)  # type: ignore[arg-type]


def test_a_closed_model_says_so_and_may_be_closed_again() -> None:
    moss = Moss.load(tiny_model_folder(), context=64)
    moss.close()
    moss.close()
    for use in (lambda: moss.logits([1]), lambda: list(moss.generate("a"))):
        with pytest.raises(MossError, match="the model is closed"):
            use()


def test_closing_gives_the_memory_back() -> None:
    """200 MB of mapped weights and a cache: after two rounds the process holds no more than after the first."""
    held = []
    for _ in range(3):
        moss = Moss.load(random_folder(WIDE), draft="off")
        model, variables = weakref.ref(moss.model), jt.number_of_lived_vars()
        list(moss.generate([5] * 200, max_new_tokens=3))
        moss.close()
        del moss
        gc.collect()
        assert model() is None
        held.append((jt.number_of_lived_vars(), resident_memory_bytes()))
    assert held[2][0] <= held[1][0] <= variables
    assert held[2][1] < held[0][1] + 32 * MIB


def test_loading_compiles_all_that_an_answer_needs() -> None:
    """In a process of its own: what this one has loaded for other tests would hide it."""
    code = f"""
from pathlib import Path
from moss_jt import Moss
def operators():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {{line.split()[-1] for line in lines if line.endswith(".so") and "/jit/" in line}}
with Moss.load({str(tiny_model_folder())!r}) as moss:
    before = operators()
    list(moss.generate([5] * 200, max_new_tokens=5))
    list(moss.generate([5, 6], max_new_tokens=5))
    moss.logits([5] * 70)
    assert before and operators() == before, operators() - before
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_names_what_it_has() -> None:
    import moss_jt

    assert moss_jt.Moss is Moss
    with pytest.raises(AttributeError, match="no attribute 'Mess'"):
        moss_jt.Mess  # noqa: B018


@pytest.mark.parametrize("model", [3, b"moss-tiny"])
def test_what_is_no_name_of_a_model_is_said(model: Any) -> None:
    for name in ("x" * 1000, "a\0b"):  # such a file cannot be
        with pytest.raises(MossError, match="there is no model called"):
            Moss.load(name)
    with pytest.raises(MossError, match="a model is a name or a path"):
        Moss.load(model)


def test_a_model_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="is not a model folder"):
        Moss.load(tmp_path)
