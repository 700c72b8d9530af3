"""Prompt lookup: tokens that followed the latest n-gram earlier in the same text are proposed to follow it again.

Answers repeat what they are about: the question, a file, a plugin's results. The model verifies all of a draft in one
pass; what it would not have said itself is thrown away, so a draft changes the time and never the text. How long a
draft may be depends on how often such drafts came true and on what a longer pass costs: nothing where the weights
stream, a fraction of a pass per token where they are in memory.
"""

from collections.abc import Sequence

from moss_jt.engine.draft_length import LONGEST_DRAFT
from moss_jt.errors import MossError

DEFAULT_LONGEST = 16
LONGEST_NGRAM = 4

# How likely one drafted token is right, by the length of the n-gram that matched: where learning starts and, slowly,
# returns to, for the text may turn from telling to quoting.
FIRST_CHANCE = {1: 0.15, 2: 0.35, 3: 0.55, 4: 0.7}
LEARNING = 0.1
FORGETTING = 0.01

# What one more token adds to a pass of weights that stream, as a share of a pass of one token, until it has been measured.
STREAMED_TOKEN_COST = 0.01


class PromptLookup:
    """Proposes drafts from the tokens so far, and learns from what became of them.

    Args:
        longest: tokens that a draft may have, 1 .. LONGEST_DRAFT.
        token_cost: what one more token adds to a pass at first, as a share of a pass of one token.
    """

    def __init__(self, longest: int = DEFAULT_LONGEST, *, token_cost: float) -> None:
        self.longest = longest
        self._token_cost = token_cost
        self._single_s: float | None = None
        self._chance = dict(FIRST_CHANCE)
        self._matched = 0  # length of the n-gram behind the last draft
        self._seen: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it ended last, before the latest token

    def propose(self, token_ids: Sequence[int], most: int = LONGEST_DRAFT) -> list[int]:
        """A draft of what follows ``token_ids`` (all tokens so far), no longer than ``most``; empty for none."""
        self._index(token_ids)
        for length in range(min(LONGEST_NGRAM, len(token_ids) - 1), 0, -1):
            end = self._ends.get(tuple(token_ids[-length:]))
            if end is not None:
                self._matched = length
                count = min(self._best_length(self._chance[length]), most)
                return _continuation(token_ids, end, count)
        return []

    @property
    def promise(self) -> float:
        """How likely each token of the latest draft is right."""
        return self._chance.get(self._matched, 0.0)

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """What became of a pass: how many tokens it verified and accepted, and how long it took; None if others shared it."""
        for length, first in FIRST_CHANCE.items():
            self._chance[length] += FORGETTING * (first - self._chance[length])
        if drafted == 0:
            if seconds is not None:
                self._single_s = seconds if self._single_s is None else _blend(self._single_s, seconds)
            return
        for trial in range(min(accepted + 1, drafted)):
            outcome = 1.0 if trial < accepted else 0.0
            self._chance[self._matched] = _blend(self._chance[self._matched], outcome)
        if seconds is not None and self._single_s is not None and self._single_s > 0:
            share = (seconds / self._single_s - 1) / drafted
            self._token_cost = _blend(self._token_cost, min(max(share, 0.0), 1.0))

    def _index(self, token_ids: Sequence[int]) -> None:
        """Note the n-grams that end before the latest token: at the latest itself nothing follows yet."""
        before = list(token_ids[:-1])
        known = len(self._seen)
        if before[:known] != self._seen:  # the conversation was cut, or another one began
            known = 0
            self._ends.clear()
        for end in range(known + 1, len(before) + 1):
            for length in range(1, min(LONGEST_NGRAM, end) + 1):
                self._ends[tuple(before[end - length : end])] = end
        self._seen = before

    def _best_length(self, chance: float) -> int:
        """The draft length with the most tokens per time, where each token is right with ``chance``.

        A draft of n tokens yields 1 + chance + .. + chance ** n tokens and costs 1 + n * token_cost passes.
        """
        best, best_rate, tokens = 0, 1.0, 1.0
        for length in range(1, self.longest + 1):
            tokens += chance**length
            rate = tokens / (1 + length * self._token_cost)
            if rate > best_rate:
                best, best_rate = length, rate
        return best


def make_drafter(draft: str | int, streams: bool, token_share: float) -> PromptLookup | None:
    """The drafter that ``--draft`` asks for: auto, lookup, off, or the longest draft's length; None for none.

    Args:
        token_share: what one more token adds to a pass where the weights do not stream, as a share of a pass of one.

    Raises:
        MossError: it is none of these.
    """
    text = str(draft)
    cost = STREAMED_TOKEN_COST if streams else token_share
    if text == "off" or (text == "auto" and not streams):
        return None
    if text in ("auto", "lookup"):
        return PromptLookup(token_cost=cost)
    if text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= LONGEST_DRAFT:
        return PromptLookup(int(text), token_cost=cost)
    raise MossError(
        f"{draft!r} is not a kind of draft: give auto, lookup, off or a length from 1 to {LONGEST_DRAFT}."
    )


def _continuation(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; what repeats up to the very end is taken to repeat on."""
    period = len(token_ids) - start
    return [token_ids[start + i % period] for i in range(count)]


def _blend(old: float, new: float) -> float:
    return old + LEARNING * (new - old)
