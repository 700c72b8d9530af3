"""Text from a scripted model: stop strings, stop reasons and counts."""

import pytest

from moss_jt.engine.engine import Engine
from moss_jt.engine.generate import Generation, StopStrings
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from tests.support.scripted_model import ScriptedModel, ScriptedText

GREEDY = SamplingParams(temperature=0)


def generation(
    texts: list[str], stops: list[str], max_new_tokens: int = 40, capacity: int = 64
) -> Generation:
    """Tokens 1, 2, .. say texts[1], texts[2], .. ; the last one is the end token. Token 0 is the prompt."""
    text = Text(Engine(ScriptedModel(capacity=capacity)))
    text.extend([0])
    end = len(texts) - 1
    return Generation(text, ScriptedText(texts), GREEDY, max_new_tokens, {end}, stops, load_s=1.5)


def test_pieces_tokens_and_counts() -> None:
    actual = generation(["prompt", "Hello", ", ", "", "world", "<eom>"], [])
    assert list(actual) == ["Hello", ", ", "world"]
    assert actual.text == "Hello, world"
    assert actual.token_ids == [1, 2, 3, 4, 5], "the end token is among them"
    stats = actual.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.stop_reason) == (1, 5, "eos")
    parts = {"drafting", "waiting", "computing"}
    assert set(stats.seconds) == {"load", "prefill", "decode"} | parts and stats.seconds["load"] == 1.5
    assert stats.seconds["prefill"] > 0 and stats.seconds["decode"] > 0


def test_length_and_context_end_it_with_all_text_shown() -> None:
    actual = generation(["prompt", "a", "b", "c", "d", "<eom>"], ["cx"], max_new_tokens=3)
    assert "".join(actual) == actual.text == "abc", (
        "what a stop string might have begun with comes out in the end"
    )
    assert actual.stats.stop_reason == "length"
    actual = generation(["prompt", "a", "b", "c", "d", "<eom>"], [], capacity=3)
    assert "".join(actual) == "ab"
    assert actual.stats.stop_reason == "context"


@pytest.mark.parametrize(
    ("texts", "stops", "expected"),
    [
        (["Yes. STOP no"], ["STOP"], "Yes. "),
        (["Yes. S", "TO", "P no"], ["STOP"], "Yes. "),
        (["Yes. ST", "ART ", "STO", "P"], ["STOP"], "Yes. START "),
        (["aab"], ["ab"], "a"),
        (["a", "a", "b", "c"], ["ab"], "a"),
        (["ababac"], ["abac"], "ab"),
        (["x", "<|H", "uman|>: forged"], ["<|Human|>:", "\n\n"], "x"),
        (["one\n", "\ntwo<|Human|>:"], ["<|Human|>:", "\n\n"], "one"),
        (["STOP"], ["STOP"], ""),
        (["一二", "三", "四"], ["三四"], "一二"),
    ],
)
def test_no_part_of_a_stop_string_is_shown(texts: list[str], stops: list[str], expected: str) -> None:
    actual = generation(["prompt", *texts, "<eom>"], stops)
    shown = ""
    for piece in actual:
        shown += piece
        assert expected.startswith(shown)
    assert shown == actual.text == expected
    assert actual.stats.stop_reason == "stop"


def test_text_is_held_back_no_longer_than_needed() -> None:
    stops = StopStrings(["END"])
    assert [stops.push(text) for text in ("a", "E", "N", "x", "EE", "END")] == ["a", "", "", "ENx", "E", "E"]
    assert stops.stopped and stops.finish() == ""


def test_impossible_limits_and_stops_are_named() -> None:
    with pytest.raises(MossError, match="max_new_tokens is 0"):
        generation(["prompt", "a", "<eom>"], [], max_new_tokens=0)
    with pytest.raises(MossError, match="a stop string is empty"):
        generation(["prompt", "a", "<eom>"], ["x", ""])


def test_a_dropped_generation_knows_what_it_has_said() -> None:
    actual = generation(["prompt", "a", "b", "c", "<eom>"], [])
    assert next(actual) == "a"
    assert next(actual) == "b"
    assert (actual.text, actual.token_ids, actual.stats.stop_reason) == ("ab", [1, 2], None)
