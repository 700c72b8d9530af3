"""Prompt lookup: what it finds, how long its drafts are, and that a wrong draft is only slow."""

import random

import pytest

from moss_jt.engine.prompt_lookup import (
    DEFAULT_LONGEST,
    LONGEST_DRAFT,
    STREAMED_TOKEN_COST,
    PromptLookup,
    make_drafter,
)
from moss_jt.errors import MossError
from moss_jt.plan.drafting import CPU_TOKEN_SHARES


def streamed() -> PromptLookup:
    return PromptLookup(token_cost=0.0)


def test_the_longest_ngram_decides_and_the_latest_place_wins() -> None:
    text = [1, 2, 3, 4, 50, 3, 4, 60, 9, 2, 3, 4]
    assert streamed().propose(text)[:3] == [50, 3, 4], "2 3 4 occurred once before, though 3 4 did later"
    assert streamed().propose([3, 4, 50, 3, 4, 60, 9, 3, 4])[:2] == [60, 9]


def test_nothing_known_nothing_proposed() -> None:
    assert streamed().propose([]) == []
    assert streamed().propose([5]) == []
    assert streamed().propose([1, 2, 3]) == []


def test_a_repetition_is_taken_to_go_on() -> None:
    assert streamed().propose([7, 7])[:4] == [7, 7, 7, 7]
    assert streamed().propose([1, 2, 1, 2, 1])[:4] == [2, 1, 2, 1]


def test_drafts_keep_to_their_limits() -> None:
    assert len(streamed().propose([7] * 9)) == DEFAULT_LONGEST
    assert len(streamed().propose([7] * 9, most=3)) == 3
    assert streamed().propose([7] * 9, most=0) == []
    assert len(PromptLookup(2, token_cost=0.0).propose([7] * 9)) == 2


def naive(text: list[int]) -> list[int]:
    for length in (4, 3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:] and length < len(text):
                return [text[end + i % (len(text) - end)] for i in range(DEFAULT_LONGEST)]
    return []


def test_the_index_finds_what_a_search_finds_while_the_text_grows() -> None:
    choose = random.Random(3)
    text: list[int] = []
    drafter = streamed()
    for _ in range(300):
        text += [choose.randrange(6) for _ in range(choose.choice([1, 1, 1, 5]))]
        assert drafter.propose(text) == naive(text)


def test_a_cut_conversation_is_noticed() -> None:
    """Proposals come from the text as it is now, not from the one before."""
    drafter = streamed()
    for text in (
        [1, 2, 3, 4, 5, 6],
        [1, 2, 1],
        [*range(100)],
        [*range(40), 200, 3],
        [4, 9, *range(80), 200, 4],
    ):
        assert drafter.propose(text) == naive(text)


def test_free_tokens_are_always_drafted_and_dear_ones_only_if_likely() -> None:
    streaming, resident = PromptLookup(token_cost=0.0), PromptLookup(token_cost=CPU_TOKEN_SHARES[16])
    weak = [1, 8, 2, 3, 4, 1]  # one token in common
    strong = [1, 2, 3, 4, 9, 8, 1, 2, 3, 4]
    assert len(streaming.propose(weak)) == DEFAULT_LONGEST
    assert resident.propose(weak) == []
    assert 0 < len(resident.propose(strong)) < DEFAULT_LONGEST


def test_it_learns_from_what_came_true() -> None:
    drafter = PromptLookup(token_cost=CPU_TOKEN_SHARES[16])
    strong = [1, 2, 3, 4, 9, 8, 1, 2, 3, 4]
    first = len(drafter.propose(strong))
    for _ in range(20):
        count = len(drafter.propose(strong))
        drafter.learn(count, count, 0.0)
    assert len(drafter.propose(strong)) > first
    while drafter.propose(strong):
        drafter.learn(len(drafter.propose(strong)), 0, 0.0)
    passes = 0
    while not drafter.propose(strong):
        drafter.learn(0, 0, 0.1)
        passes += 1
        assert passes < 1000, "it must try again some day: the text may have turned to quoting"


def test_it_learns_what_a_token_costs() -> None:
    drafter = PromptLookup(token_cost=CPU_TOKEN_SHARES[16])
    strong = [1, 2, 3, 4, 9, 8, 1, 2, 3, 4]
    first = len(drafter.propose(strong))
    drafter.learn(0, 0, 1.0)
    for _ in range(40):
        drafter.propose(strong)
        drafter.learn(4, 2, 1.001)
    assert len(drafter.propose(strong)) > first, "a pass of five took no longer than one of one token"


def test_what_the_option_means() -> None:
    assert make_drafter("off", True, 0.2) is None and make_drafter("auto", False, 0.2) is None
    automatic, always, three = (
        make_drafter("auto", True, 0.2),
        make_drafter("lookup", False, 0.2),
        make_drafter(3, False, 0.2),
    )
    assert automatic is not None and automatic._token_cost == STREAMED_TOKEN_COST
    assert always is not None and always.longest == DEFAULT_LONGEST and always._token_cost == 0.2
    assert three is not None and three.longest == 3
    for wrong in ("some", 0, -1, LONGEST_DRAFT + 1, "9" * 30, "²", ""):
        with pytest.raises(MossError, match="is not a kind of draft"):
            make_drafter(wrong, True, 0.2)
