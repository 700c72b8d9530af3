"""How far a copy drafts: as far as what was seen says that it pays."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from moss_jt.engine import draft_copy
from moss_jt.engine.causal_model import TokenRun
from moss_jt.engine.draft_copy import Ahead, DraftCopy
from moss_jt.engine.draft_length import LONGEST_DRAFT, DraftPace, PassCost, Sure
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.plan.drafting import tokens_per_pass

GREEDY = SamplingParams(temperature=0)
SURE, UNSURE = Sure(0.999, True), Sure(0.3, True)


def test_a_line_is_learned_from_passes_of_all_lengths() -> None:
    cost = PassCost(1.0, 0.5)
    assert cost.of(1) == 1.0
    for tokens in (1, 9, 17, 4, 12, 20, 1, 15) * 4:
        cost.note(tokens, 2.0 + 0.125 * tokens)
    assert cost.of(1) == pytest.approx(2.125, rel=0.02) and cost.of(23) == pytest.approx(4.875, rel=0.02)
    assert cost.per_token == pytest.approx(0.125, rel=0.05)


def test_passes_of_one_length_leave_the_slope_as_it_was_guessed() -> None:
    cost = PassCost(1.0, 0.1)
    for _ in range(50):
        cost.note(1, 3.0)
    assert cost.of(1) == pytest.approx(3.0) and cost.per_token == pytest.approx(0.3, rel=0.01)


def test_the_best_length_is_the_one_of_most_tokens_per_second() -> None:
    """Against all lengths by hand, for chances that do not depend on the number of tokens before."""
    for pass_s, step_s in ((1.0, 0.01), (1.0, 0.1), (1.0, 0.6), (0.1, 0.2)):
        pace = DraftPace(pass_s, 0.02, step_s, 0.0)
        length, rate = pace.best(1)
        rates = [
            tokens_per_pass(pace.chance(0), drafted) / (drafted * step_s + pass_s * (1 + 0.02 * drafted))
            for drafted in range(LONGEST_DRAFT + 1)
        ]
        assert rate == pytest.approx(max(rates)) and rates[length] == pytest.approx(rate)
    assert DraftPace(0.1, 0.02, 0.2, 0.0).best(1)[0] == 0, "a copy that is slower than the model"


def test_what_comes_true_is_learned_and_forgotten() -> None:
    pace = DraftPace(1.0, 0.02, 0.1)
    first = pace.best(1)[0]
    for _ in range(60):
        pace.learn([1, 2, 3], [SURE] * 3, [9])
    assert pace.chance(0) < 0.2 and pace.best(1)[0] == 0 < first, "a copy of garbage"
    for _ in range(400):
        pace.learn([], [], [9])
    assert pace.chance(0) > 0.8 and pace.best(1)[0] > 4, "it is tried again, for the text may be another"
    for _ in range(200):
        pace.learn([1, 2, 3, 4, 5], [SURE] * 5, [1, 2, 3, 4, 5, 6])
    assert pace.best(1)[0] == LONGEST_DRAFT and pace.chance_of(2, SURE) > 0.98


def test_how_sure_it_is_counts() -> None:
    pace = DraftPace()
    dice = random.Random(1)
    for _ in range(800):
        sure = SURE if dice.random() < 0.7 else UNSURE
        right = dice.random() < (0.97 if sure is SURE else 0.4)
        pace.learn([1], [sure], [1 if right else 2])
    assert pace.chance_of(0, SURE) > 0.9 and pace.chance_of(0, UNSURE) < 0.6


@pytest.mark.parametrize("agreement", [0.93, 0.99])
def test_a_copy_that_is_never_sure_and_mostly_right_drafts_far_after_a_few_passes(
    agreement: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As random models do: their best token has next to no probability. A pass takes as long as 30 drafted tokens."""
    pass_s, step_s, dice = 12.0, 0.4, random.Random(3)
    tokens = seconds = 0.0
    for _ in range(30):
        copy = DraftCopy(Certain(lambda token: 0.1), DraftPace(pass_s, 0.0, step_s, 0.0))
        monkeypatch.setattr(copy.pace.steps, "note", lambda tokens, seconds: None)  # not the clock's
        for _ in range(10):
            text = ahead(1)
            copy.write([text])
            right = next((n for n in range(len(text.draft)) if dice.random() > agreement), len(text.draft))
            copy.pace.learn(text.draft, text.sure, [*text.draft[:right], 0])
            tokens += right + 1
            seconds += pass_s + step_s * len(text.draft)
    best = max(tokens_per_pass(agreement, n) / (pass_s + n * step_s) for n in range(LONGEST_DRAFT + 1))
    assert tokens / seconds > 0.88 * best


class Certain:
    """Goes on counting, and is as sure as it is told for each token."""

    def __init__(self, logits: Callable[[int], float]) -> None:
        self._logits = logits
        self.passes: list[list[list[int]]] = []
        self.link_s = 0.0

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        self.passes.append([list(run.token_ids) for run in runs])
        return [np.stack([self._row(token + 1) for token in run.token_ids]) for run in runs]

    def _row(self, token: int) -> np.ndarray:
        row = np.zeros(200, np.float32)
        row[token] = self._logits(token)
        return row

    def close(self) -> None:
        pass


def ahead(last: int, most: int = LONGEST_DRAFT, **more: object) -> Ahead:
    return Ahead((0,), 5, last, Sampler(GREEDY, []), most, **more)  # type: ignore[arg-type]


def test_a_draft_goes_on_while_the_copy_is_sure() -> None:
    model = Certain(lambda token: 20.0 if token < 30 else 5.5)  # probabilities of 1 and of about 0.55
    copy = DraftCopy(model, DraftPace(1.0, 0.02, 0.05))
    certain, doubtful = ahead(1), ahead(27)
    copy.write([certain, doubtful])
    assert certain.draft == list(range(2, 2 + len(certain.draft))) and len(certain.draft) > 12
    assert 2 <= len(doubtful.draft) < 8
    assert len(model.passes[0]) == 2 and len(model.passes[-1]) == 1, "side by side, as long as both go on"


def test_waiting_for_the_copy_s_weights_is_no_cost_of_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive while it writes its first draft, for seconds: counted as a step's, nothing would be drafted ever after."""
    now = 0.0

    class Arriving(Certain):
        def forward_many(self, *arguments: Any) -> list[np.ndarray]:
            nonlocal now
            arriving = 60.0 if not self.passes else 0.0
            self.link_s += arriving
            now += arriving + 0.05
            return super().forward_many(*arguments)

    monkeypatch.setattr(draft_copy.time, "monotonic", lambda: now)
    copy = DraftCopy(Arriving(lambda token: 20.0), DraftPace(1.0, 0.0, 0.01))
    copy.write([ahead(1)])
    assert copy.pace.steps.of(1) == pytest.approx(0.05, rel=0.01)
    text = ahead(1)
    copy.write([text])
    assert len(text.draft) > 5


def test_limits_of_a_draft() -> None:
    copy = DraftCopy(Certain(lambda token: 20.0), DraftPace(1.0, 0.0, 0.001), longest=7)
    texts = [ahead(1, 3), ahead(1), ahead(1, end_ids=frozenset({4})), ahead(1)]
    copy.write(texts, lambda index: index < 3)
    assert [text.draft for text in texts] == [[2, 3, 4], list(range(2, 9)), [2, 3, 4], []]


def test_lookup_goes_in_front_or_alone() -> None:
    """The copy reads what lookup proposes in one pass, and goes on after the first token with which it does not agree."""
    model = Certain(lambda token: 20.0)
    copy = DraftCopy(model, DraftPace(1.0, 0.0, 0.001), longest=9, adaptive=False)
    text = ahead(1, front=[2, 3, 4, 99, 98], front_chance=0.3)
    copy.write([text])
    assert model.passes[:2] == [[[1, 2, 3, 4, 99, 98]], [[5]]] and text.draft == list(range(2, 11))
    dear = DraftCopy(model, DraftPace(1.0, 0.0, 0.5))
    alone = ahead(1, front=[7, 7, 7, 7], front_chance=0.95)
    count = len(model.passes)
    dear.write([alone])
    assert alone.draft == [7, 7, 7, 7] and not alone.sure and len(model.passes) == count, "for nothing"
