"""How long a user waits for the first word, turn after turn, where the turns are as long as MOSS's usually are."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from moss_jt.engine.sampling import SamplingParams
from moss_jt.measure.bench import prompt_ids

# The trained meta instruction with its switches, and a short question after it; another question; what comes back from a search
# with three results.
BEGINNING, QUESTION, RESULTS = 284, 16, 600
TURNS = (
    ("first turn", BEGINNING + QUESTION),
    ("second turn", QUESTION),
    ("plugin turn with three results", RESULTS),
)


class Text(Protocol):
    """moss_jt.engine.sequence.Sequence."""

    @property
    def position(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def extend(self, token_ids: Sequence[int]) -> None: ...

    def decode(self, params: SamplingParams, max_new_tokens: int) -> Iterator[int]: ...


class TurnTime(NamedTuple):
    """Seconds from a turn's text, of so many tokens, to the first one after it."""

    turn: str
    tokens: int
    seconds: float


def first_words(text: Text, vocabulary: int) -> Iterator[TurnTime]:
    """Each turn's, as far as the context has room for it."""
    ids = prompt_ids(sum(tokens for _, tokens in TURNS), vocabulary)[
        ::-1
    ]  # no beginning that others have read
    for turn, tokens in TURNS:
        if text.position + tokens + 1 > text.capacity:
            return
        begin = time.perf_counter()
        text.extend(ids[:tokens])
        for _ in text.decode(SamplingParams(temperature=0), 1):
            pass
        yield TurnTime(turn, tokens, time.perf_counter() - begin)
        ids = ids[tokens:]


def line_of(word: TurnTime) -> str:
    return f"First word of the {word.turn}, {word.tokens} tokens: {word.seconds:.2f} s"
