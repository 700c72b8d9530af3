"""The reference's sampling rules, on distributions small enough to work out by hand."""

import math

import numpy as np
import pytest

from moss_jt.engine.sampling import Sampler, SamplingParams, candidates, penalized
from moss_jt.errors import MossError

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def test_the_defaults_are_the_references() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.penalty) == (0.7, 40, 0.8, 1.02)
    assert SamplingParams(temperature=0).penalty == 1.0, "plain greedy unless asked"
    assert SamplingParams(temperature=0, repetition_penalty=1.1).penalty == 1.1


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores_once_per_token() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    actual = penalized(logits, {0, 1, 3}, 2.0)
    assert actual.tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0], "the model's logits stay as they are"


def test_a_token_that_came_many_times_is_penalized_once() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    logits = np.array([1.0, 1.6, 1.1], np.float32)
    assert Sampler(params, [1]).choose(logits) == 2
    assert Sampler(params, [1] * 9).choose(logits * np.float32(1.5)) == 2
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5), [])
    assert sampler.choose(logits) == 1
    sampler.add(1)
    assert sampler.choose(logits) == 2, "the answer's own tokens count, too"


def test_temperature_sharpens() -> None:
    _, plain = candidates(logits_of(0.6, 0.3, 0.1), SamplingParams(**OFF))
    np.testing.assert_allclose(plain, [0.6, 0.3, 0.1], rtol=1e-6)  # float32 logits
    _, sharp = candidates(logits_of(0.6, 0.3, 0.1), SamplingParams(**(OFF | {"temperature": 0.5})))
    squares = np.array([0.36, 0.09, 0.01])
    np.testing.assert_allclose(sharp, squares / squares.sum(), rtol=1e-6)


def test_a_tiny_temperature_is_greedy_and_no_overflow() -> None:
    params = SamplingParams(**(OFF | {"temperature": 1e-30, "seed": 1}))
    assert Sampler(params, []).choose(np.array([5.0, 9.0, 8.9999], np.float32)) == 1


@pytest.mark.parametrize(("top_k", "kept"), [(0, 5), (1, 1), (2, 2), (3, 4), (4, 4), (5, 5), (9, 5)])
def test_top_k_keeps_what_ties_with_the_last(top_k: int, kept: int) -> None:
    logits = np.array([1.0, 7.0, 3.0, 3.0, 5.0], np.float32)
    token_ids, _ = candidates(logits, SamplingParams(**(OFF | {"top_k": top_k})))
    assert token_ids.tolist() == [1, 4, 2, 3, 0][:kept]


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_token_that_reaches_p_and_at_least_one(top_p: float, kept: int) -> None:
    token_ids, _ = candidates(logits_of(0.05, 0.5, 0.15, 0.3), SamplingParams(**(OFF | {"top_p": top_p})))
    assert token_ids.tolist() == [1, 3, 2, 0][:kept]


def test_top_k_comes_before_top_p() -> None:
    """Of 0.4, 0.3, 0.3: two remain, then 0.57 reaches 0.5 alone; the other way round two would remain."""
    params = SamplingParams(**(OFF | {"top_k": 1, "top_p": 0.5}))
    assert candidates(logits_of(0.4, 0.35, 0.25), params)[0].tolist() == [0]
    params = SamplingParams(**(OFF | {"top_k": 2, "top_p": 0.5}))
    assert candidates(logits_of(0.4, 0.35, 0.25), params)[0].tolist() == [0]
    params = SamplingParams(**(OFF | {"top_p": 0.5}))
    assert candidates(logits_of(0.4, 0.35, 0.25), params)[0].tolist() == [0, 1]


def test_draws_follow_the_probabilities() -> None:
    """20000 draws: a share lies within 4.5 deviations (0.016) of its probability but for one seed in 10**5."""
    sampler = Sampler(SamplingParams(**(OFF | {"seed": 3})), [])
    logits = logits_of(0.5, 0.3, 0.2)
    draws = np.array([sampler.choose(logits) for _ in range(20000)])
    shares = np.bincount(draws, minlength=3) / len(draws)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=4.5 * math.sqrt(0.25 / 20000))


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(**(OFF | {"seed": seed})), [])
        return [sampler.choose(logits) for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None), "once in 10**24 runs they agree"


def test_every_token_costs_one_random_number_however_sure_the_model_is() -> None:
    unsure, sure = np.zeros(1000, np.float32), np.eye(1, 1000, 5, dtype=np.float32)[0] * 1000
    params = SamplingParams(**(OFF | {"seed": 11}))
    first, second = Sampler(params, []), Sampler(params, [])
    first.choose(unsure)
    second.choose(sure)
    assert first.choose(unsure) == second.choose(unsure)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    logits = np.zeros(4, np.float32)
    logits[2] = value
    with pytest.raises(MossError, match="not a number"):
        Sampler(SamplingParams(temperature=0), []).choose(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_an_impossible_value_is_named(field: str, value: float) -> None:
    with pytest.raises(MossError, match=f"{field} is {value}; it must be"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_presence_and_frequency_penalties_are_about_the_answer_s_own_tokens() -> None:
    logits = np.array([1.0, 1.9, 1.5], np.float32)
    params = SamplingParams(temperature=0, presence_penalty=0.3, frequency_penalty=0.2)
    sampler = Sampler(params, [1, 1, 1])
    chosen = []
    for _ in range(5):
        chosen.append(sampler.choose(logits))
        sampler.add(chosen[-1])
    # 1.9, then 1.4 after one and 1.2 after two; 1.5, then 1.0 and 0.8.
    assert chosen == [1, 2, 1, 1, 0], (
        "1.9; 1.5 over 1.4; 1.4 over 1.0; 1.2 over 1.0; then 1.0 over 1.0 comes first"
    )
    assert logits.tolist() == pytest.approx([1.0, 1.9, 1.5])
    negative = Sampler(SamplingParams(temperature=0, frequency_penalty=-2.0), [])
    negative.add(0)
    assert negative.choose(logits) == 0


def test_biases_forbid_and_force() -> None:
    logits = np.array([1.0, 7.0, 3.0], np.float32)
    assert Sampler(SamplingParams(temperature=0, logit_bias={1: -100}), []).choose(logits) == 2
    params = SamplingParams(**(OFF | {"logit_bias": {0: 100.0, 1: -100.0}, "seed": 1}))
    assert {Sampler(params, []).choose(logits) for _ in range(20)} == {0}
    assert SamplingParams(**vars(params)) == params and hash(params)
    for wrong in ({-1: 3}, {"a": 3}, {1: 101}, {1: "x"}, {1: float("nan")}):
        with pytest.raises(MossError, match="logit_bias"):
            SamplingParams(logit_bias=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.2, 3), (0.3, 3), (0.31, 2), (0.61, 1), (1.0, 1)])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: int) -> None:
    token_ids, _ = candidates(logits_of(0.05, 0.5, 0.151, 0.3), SamplingParams(**(OFF | {"min_p": min_p})))
    assert token_ids.tolist() == [1, 3, 2, 0][:kept]
