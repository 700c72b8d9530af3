"""How likely tokens were, against plain float64 formulas, and the same alone, beside others, and after penalties."""

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.engine.engine import Engine
from moss_jt.engine.logprobs import logprobs_of
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from tests.support.models import tiny_model_folder
from tests.support.scripted_model import ScriptedModel, dice


def expected(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@pytest.mark.parametrize("top", [0, 1, 5, 20, 300, 301])
def test_they_are_the_log_softmax_of_the_logits(top: int) -> None:
    rows = np.random.default_rng(0).normal(0, 9, (3, 300)).astype(np.float32)
    rows[1, 7] = rows[1, 9] = rows[1].max() + 1  # a tie: the lower id first
    logprobs = logprobs_of(rows, [4, 9, 0], top)
    for row, token, one in zip(rows, [4, 9, 0], logprobs, strict=True):
        wanted = expected(row)
        assert one.token_id == token and one.logprob == pytest.approx(wanted[token], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:top]
        assert [other for other, _ in one.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in one.top], wanted[best], atol=1e-5)


def test_an_answer_s_tokens_have_them_drafts_or_not() -> None:
    class Right:
        def propose(self, token_ids: list[int], room: int) -> list[int]:
            done = len(token_ids) - 3
            return tokens[done : done + min(3, room)]

        def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
            pass

    params = SamplingParams(seed=4, presence_penalty=1.5, logit_bias={3: 5.0})
    plain = Text(Engine(ScriptedModel(dice)))
    plain.extend([1, 2, 3])
    tokens = list(plain.decode(params, 12, logprobs=2))
    for length, one in enumerate(plain.logprobs, 3):
        text = (*[1, 2, 3], *tokens)[:length]
        assert one.token_id == tokens[length - 3]
        assert one.logprob == pytest.approx(expected(dice(text))[one.token_id], abs=1e-5)
    drafted = Text(Engine(ScriptedModel(dice)), Right())
    drafted.extend([1, 2, 3])
    assert list(drafted.decode(params, 12, logprobs=2)) == tokens
    assert drafted.logprobs == plain.logprobs and len(plain.logprobs) == 12
    assert list(plain.decode(params, 2)) and plain.logprobs == []


def test_moss_gives_those_of_a_prompt_and_of_an_answer() -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", parallel=4) as moss:
        token_ids = [7 * number % 1900 + 17 for number in range(150)]
        logits = moss.logits(token_ids)
        logprobs = moss.logprobs(token_ids, top=5)
        assert [one.token_id for one in logprobs] == token_ids[1:]
        for row, one in zip(logits, logprobs, strict=False):
            assert one.logprob == pytest.approx(expected(row)[one.token_id], abs=1e-4)
            assert one.top[0][0] == row.argmax() and len(one.top) == 5
        answer = moss.generate(token_ids, temperature=0, max_new_tokens=3, logprobs=1)
        assert answer.unread == 150 and answer.finish().unread == 0
        assert [one.top[0][0] for one in answer.logprobs] == [one.token_id for one in answer.logprobs]
        again = moss.begin(token_ids, SamplingParams(temperature=0), 3, background=False, logprobs=1).finish()
        assert again.logprobs == answer.logprobs and again.token_ids == answer.token_ids
        assert (answer.stats.cached_tokens, again.stats.cached_tokens) == (128, 128), (
            "logprobs() had read them"
        )
        with pytest.raises(MossError, match="logit_bias"):
            moss.generate(token_ids, logit_bias={moss.config.vocab_size: 1})
        for wrong in (-1, 101, "x", 1.5):
            with pytest.raises(MossError, match="logprobs is"):
                moss.generate(token_ids, logprobs=wrong)  # type: ignore[arg-type]
