"""Sequences over a scripted model: what is computed, what is chosen, and why it stops."""

import itertools
import time
from collections.abc import Sequence

import pytest

from moss_jt.engine.engine import Engine
from moss_jt.engine.prompt_lookup import PromptLookup
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from tests.support.scripted_model import VOCABULARY, ScriptedModel, count_up, dice, one_hot

GREEDY = SamplingParams(temperature=0)


class GivenDrafts:
    """Proposes what a function of the text says; remembers what became of it."""

    promise = 0.5

    def __init__(self, drafts: Sequence[list[int]]) -> None:
        self._drafts = iter(drafts)
        self.learned: list[tuple[int, int]] = []

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        return next(self._drafts, [])[:most]

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        assert seconds is not None and seconds >= 0
        self.learned.append((drafted, accepted))


def test_only_new_text_is_computed() -> None:
    model = ScriptedModel()
    sequence = Text(Engine(model))
    sequence.extend([1, 2, 3])
    assert list(sequence.decode(GREEDY, 3)) == [4, 5, 6]
    sequence.extend([20, 21])
    assert list(sequence.decode(GREEDY, 2)) == [22, 23]
    assert [(start, tokens) for start, tokens, _ in model.passes] == [
        (0, [1, 2, 3]),
        (3, [4]),
        (4, [5]),
        (5, [6, 20, 21]),  # the last token of an answer is computed with what follows it
        (8, [22]),
    ]
    assert sequence.token_ids == [1, 2, 3, 4, 5, 6, 20, 21, 22, 23]
    assert sequence.position == 10


def test_a_long_prompt_is_read_in_passes_and_the_head_computed_once() -> None:
    model = ScriptedModel(pass_tokens=4)
    sequence = Text(Engine(model))
    sequence.extend(range(10))
    assert next(sequence.decode(GREEDY, 1)) == 10
    assert [(start, len(tokens), rows) for start, tokens, rows in model.passes] == [
        (0, 4, "none"),
        (4, 4, "none"),
        (8, 2, "last"),
    ]
    assert sequence.timing.prefill_tokens == 10


def test_prefill_computes_all_but_the_last_token_ahead() -> None:
    model = ScriptedModel(pass_tokens=4)
    sequence = Text(Engine(model))
    sequence.extend(range(7))
    sequence.prefill()
    assert [(start, tokens) for start, tokens, _ in model.passes] == [(0, [0, 1, 2, 3]), (4, [4, 5])]
    assert next(sequence.decode(GREEDY, 1)) == 7
    assert model.passes[-1] == (6, [6], "last")


def test_it_stops_after_an_end_token() -> None:
    sequence = Text(Engine(ScriptedModel()))
    sequence.extend([7])
    assert list(sequence.decode(GREEDY, 20, stop_ids={10, 30})) == [8, 9, 10]
    assert sequence.stop_reason == "eos"


def test_it_stops_at_the_given_length() -> None:
    sequence = Text(Engine(ScriptedModel()))
    sequence.extend([7])
    assert list(sequence.decode(GREEDY, 2)) == [8, 9]
    assert sequence.stop_reason == "length"
    assert list(sequence.decode(GREEDY, 0)) == []
    assert sequence.stop_reason == "length"


def test_it_stops_when_the_context_is_full() -> None:
    model = ScriptedModel(capacity=6)
    sequence = Text(Engine(model))
    sequence.extend([1, 2, 3])
    assert list(sequence.decode(GREEDY, 20)) == [4, 5, 6]
    assert sequence.stop_reason == "context"
    assert sequence.position == sequence.capacity == 6
    assert list(sequence.decode(GREEDY, 20)) == []
    assert sequence.stop_reason == "context"


def test_text_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    sequence = Text(Engine(ScriptedModel(capacity=6)))
    sequence.extend([1, 2, 3])
    with pytest.raises(MossError, match=r"7 tokens.*room for 6"):
        sequence.extend([4, 5, 6, 7])
    assert sequence.token_ids == [1, 2, 3]


def test_there_must_be_a_text() -> None:
    with pytest.raises(MossError, match="the prompt is empty"):
        next(Text(Engine(ScriptedModel())).decode(GREEDY, 1))


def test_a_sequence_can_be_cut_back_and_goes_on_from_there() -> None:
    model = ScriptedModel()
    sequence = Text(Engine(model))
    sequence.extend([1, 2, 3])
    assert list(sequence.decode(GREEDY, 4)) == [4, 5, 6, 7]
    sequence.truncate(4)
    assert sequence.token_ids == [1, 2, 3, 4]
    sequence.extend([40])
    assert list(sequence.decode(GREEDY, 1)) == [41]
    assert model.passes[-1] == (4, [40], "last"), "what was kept is not computed again"
    sequence.truncate(2)
    assert list(sequence.decode(GREEDY, 1)) == [3]
    assert model.passes[-1] == (1, [2], "last"), "the last token is, for its logits"


def test_an_answer_that_is_dropped_ends_with_the_token_that_was_seen_last() -> None:
    sequence = Text(Engine(ScriptedModel(), GivenDrafts([[5, 6, 7]])))
    sequence.extend([3])
    answer = sequence.decode(GREEDY, 20)
    assert [next(answer) for _ in range(3)] == [4, 5, 6]
    answer.close()
    assert sequence.token_ids == [3, 4, 5, 6]
    sequence.extend([20])
    assert list(sequence.decode(GREEDY, 2)) == [21, 22]


def test_sequences_may_alternate_on_one_model() -> None:
    engine = Engine(ScriptedModel(dice))
    alone = []
    for start in ([1, 2], [3, 4]):
        sequence = Text(Engine(ScriptedModel(dice)))
        sequence.extend(start)
        alone.append(list(sequence.decode(SamplingParams(seed=1), 12)))
    sequences = [Text(engine), Text(engine)]
    answers = []
    for sequence, start in zip(sequences, ([1, 2], [3, 4]), strict=True):
        sequence.extend(start)
        answers.append(sequence.decode(SamplingParams(seed=1), 12))
    together = list(zip(*answers, strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(seed=5), SamplingParams(temperature=2.0, top_k=0, seed=6)]
)
@pytest.mark.parametrize("seed", range(3))
def test_drafts_change_the_passes_and_never_the_tokens(params: SamplingParams, seed: int) -> None:
    """Drafts that are partly right: the tokens that come anyway, with every third one wrong."""
    plain_model = ScriptedModel(dice)
    plain = Text(Engine(plain_model))
    plain.extend([seed, 2, 3])
    expected = list(plain.decode(params, 40))

    class NearlyRight(GivenDrafts):
        def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
            done = len(token_ids) - 3
            guess = expected[done : done + min(most, 5)]
            if done % 3 == 0 and len(guess) > 2:
                guess[2] = (guess[2] + 1) % VOCABULARY
            return guess

    model, drafter = ScriptedModel(dice), NearlyRight([])
    sequence = Text(Engine(model), drafter)
    sequence.extend([seed, 2, 3])
    assert list(sequence.decode(params, 40)) == expected
    assert sequence.stop_reason == plain.stop_reason == "length"
    assert len(model.passes) < len(plain_model.passes) / 2
    assert sum(accepted for _, accepted in drafter.learned) > 20


def test_a_draft_is_cut_where_the_answer_or_the_context_ends() -> None:
    model = ScriptedModel(capacity=8)
    sequence = Text(Engine(model), GivenDrafts([[3, 4, 5, 6, 7, 8, 9]] * 5))
    sequence.extend([1])
    assert list(sequence.decode(GREEDY, 3)) == [2, 3, 4]
    assert model.passes[-1] == (1, [2, 3], "all")
    assert list(sequence.decode(GREEDY, 30)) == [5, 6, 7, 8]
    assert sequence.stop_reason == "context"
    assert max(start + len(tokens) for start, tokens, _ in model.passes) <= 8


def test_a_stop_inside_a_draft_ends_the_answer_there() -> None:
    sequence = Text(Engine(ScriptedModel(), GivenDrafts([[3, 4, 5, 6]])))
    sequence.extend([1])
    assert list(sequence.decode(GREEDY, 20, stop_ids=[4])) == [2, 3, 4]
    assert sequence.token_ids == [1, 2, 3, 4]
    sequence.extend([30])
    assert list(sequence.decode(GREEDY, 1)) == [31]


def test_the_drafter_learns_what_became_of_its_drafts() -> None:
    drafter = GivenDrafts([[3, 4], [], [7, 9, 9], [9]])
    sequence = Text(Engine(ScriptedModel()), drafter)
    sequence.extend([1])
    assert list(sequence.decode(GREEDY, 9)) == list(range(2, 11))
    assert drafter.learned[:3] == [(2, 2), (0, 0), (3, 1)]


def test_prompt_lookup_saves_passes_on_text_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # how long a pass takes decides a draft's length
    follow = {a: b for a, b in itertools.pairwise([1, 2, 3, 4, 5, 6, 1])}
    model = ScriptedModel(lambda text: one_hot(follow[text[-1]]))
    sequence = Text(Engine(model), PromptLookup(token_cost=0.01))
    sequence.extend([1, 2, 3, 4, 5, 6, 1])
    assert list(sequence.decode(GREEDY, 48)) == ([2, 3, 4, 5, 6, 1] * 8)
    assert len(model.passes) < 24, "half a pass a token, or better"


def test_an_interrupted_pass_leaves_the_sequence_whole() -> None:
    class Interrupted(ScriptedModel):
        fail_from = 3

        def forward_many(self, runs, wanted):  # type: ignore[no-untyped-def]
            result = super().forward_many(runs, wanted)
            if runs[0].start >= self.fail_from:
                raise KeyboardInterrupt
            return result

    model = Interrupted(count_up)
    sequence = Text(Engine(model))
    sequence.extend([1])
    answer = sequence.decode(GREEDY, 9)
    assert [next(answer), next(answer), next(answer)] == [2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    model.fail_from = 99
    assert sequence.token_ids == [1, 2, 3, 4]
    assert list(sequence.decode(GREEDY, 2)) == [5, 6]
