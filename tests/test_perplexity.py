"""Perplexity, divergence and agreement, from models that say what the test tells them to."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.measure import perplexity
from moss_jt.measure.perplexity import evaluate, log_probabilities, passes_needed


class Scripted:
    """Gives the logits of a table by the last token, three tokens at a time."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.windows: list[list[int]] = []

    def window(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        self.windows.append(list(token_ids))
        for first in range(0, len(token_ids), 3):
            yield self.table[np.asarray(token_ids[first : first + 3])]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    result = evaluate([0, 3, 2, 1, 2], Scripted(np.zeros((5, 5))), None, 8)
    assert result.model.tokens == 4
    assert result.model.perplexity == pytest.approx(5, rel=1e-12)
    assert result.comparison is None


def test_nats_are_the_mean_over_predicted_tokens() -> None:
    """p(1|0) = 1/2, p(0|1) = 1/4, worked out by hand."""
    table = np.log([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [1.0, 1.0, 1.0]])
    result = evaluate([0, 1, 0], Scripted(table + 7.0), None, 3)
    assert result.model.nats_per_token == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)
    assert result.model.perplexity == pytest.approx(math.sqrt(8), rel=1e-6)


def test_divergence_is_from_the_reference_and_agreement_counts_greedy_tokens() -> None:
    ours = np.log([[0.5, 0.5 - 1e-6, 1e-6], [0.2, 0.5, 0.3]])
    theirs = np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    result = evaluate([0, 1, 0], Scripted(ours), Scripted(theirs), 3)
    want = [
        sum(q * math.log(q / p) for p, q in zip(np.exp(a), np.exp(b), strict=True))
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert result.comparison is not None and result.reference is not None
    assert result.comparison.mean_divergence == pytest.approx(sum(want) / 2, rel=1e-6)
    assert result.comparison.agreement == 0.5
    assert result.reference.nats_per_token == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-6)


def test_passes_that_drafts_leave_are_counted() -> None:
    """A pass ends with the first token that differs, or with the one after the draft."""
    assert passes_needed([True] * 10, 4) == 2
    assert passes_needed([True] * 11, 4) == 3
    assert passes_needed([False] * 3, 4) == 3
    assert passes_needed([True, True, False, True, False, False, True], 8) == 4
    assert passes_needed([True, True, False, True, False, False, True], 1) == 5
    assert passes_needed([], 4) == 0


def test_a_model_against_itself_diverges_by_nothing() -> None:
    table = np.random.default_rng(0).standard_normal((9, 9)) * 5
    result = evaluate(list(range(9)) * 3, Scripted(table), Scripted(table), 9)
    assert result.comparison is not None
    assert result.comparison.mean_divergence == 0 and result.comparison.agreement == 1


@pytest.mark.parametrize("together", [1, 2, 5])
def test_windows_are_read_side_by_side(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_ROWS", 2)
    table = np.random.default_rng(1).standard_normal((20, 20))
    ids = list(range(17))
    model = Scripted(table)
    counted: list[int] = []
    result = evaluate(ids, model, None, 8, together, counted.append)
    # 17 = 8 + 8 + 1: the last window has nothing to predict; in the others 7 of 8 are predicted from 7.
    assert model.windows == [ids[0:7], ids[8:15]]
    assert result.model.tokens == sum(counted) == 14
    logs = log_probabilities(table)
    want = -np.mean([logs[i, i + 1] for i in range(15) if i != 7])
    assert result.model.nats_per_token == pytest.approx(want, rel=1e-5)  # the script gives float32


def test_logits_of_any_size_stay_finite() -> None:
    logs = log_probabilities(np.array([[3e38, -3e38, 0.0]], np.float32))
    assert logs[0, 0] == 0 and logs[0, 1] < logs[0, 2] < -1e38
    assert np.isfinite(logs).all()


def test_what_cannot_be_scored_is_refused() -> None:
    model = Scripted(np.zeros((5, 5)))
    with pytest.raises(MossError, match="1 tokens in windows of 8"):
        evaluate([1], model, None, 8)
    with pytest.raises(MossError, match="one predicts 5 tokens, the other 6"):
        evaluate([1, 2, 3], model, Scripted(np.zeros((6, 6))), 8)
