"""One thing that a caller wants of the engine for one sequence: an answer, a text read ahead, or the logits of a text."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from moss_jt.engine.cached_text import CachedText
from moss_jt.engine.logprobs import Logprob, logprobs_of
from moss_jt.engine.sampling import Sampler

StopReason = Literal["eos", "stop", "length", "context", "time"]


class Drafter(Protocol):
    """Guesses what follows, for one pass to verify: moss_jt.engine.prompt_lookup.PromptLookup."""

    @property
    def promise(self) -> float:
        """How likely each token of the latest proposal is right."""
        ...

    def propose(self, token_ids: list[int], most: int) -> list[int]: ...

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """``seconds`` of the pass, or None where others shared it."""
        ...


@dataclass
class Timing:
    """What an answer cost. prefill_s is until its first token's logits, waiting included; decode_s everything after.

    passes                in which its tokens were computed, after the prompt
    drafted, accepted     tokens that were guessed, and those of them that came true
    drafting_s, link_s    of decode_s: a copy wrote ahead; weights were waited for
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    drafting_s: float = 0.0
    link_s: float = 0.0


@dataclass(frozen=True)
class Queued:
    """A job that waits for room in the cache: its number in the queue, from 1 on, and how long that may take, where it is known."""

    number: int
    expected_s: float | None


@dataclass(frozen=True)
class Chosen:
    """About a token of an answer: why no other follows, and how likely it was, where that was asked for."""

    reason: StopReason | None
    logprob: Logprob | None = None


@dataclass(eq=False)
class Job:
    """What the engine and the caller know of it; both hold the engine's lock when they look.

    tokens      the text, and the answer as far as it is written
    end         the job is to compute the text up to here
    sampler     chooses tokens, where an answer is wanted
    scored      the logits of all its tokens are wanted, and are what is taken: position of the first, (R, V)
    logprobs    with each token, how likely it and so many others were; None for nothing of that
    stop_ids    tokens that end the answer
    ends        is given each token, and says whether the answer ends with it
    left        tokens that it may have still
    deadline    of time.monotonic, after which it ends
    background  it waits for those that are not
    ahead       so much may there be in ``out``; None for any number
    scores      so many tokens' logits were given; what lost its pages on the way is computed again, and not given again
    out         what the caller has not taken: tokens, each with a Chosen, or logits
    ready       is told when something is there to be taken
    """

    text: CachedText
    tokens: list[int]
    end: int
    ready: threading.Condition
    sampler: Sampler | None = None
    scored: bool = False
    logprobs: int | None = None
    drafter: Drafter | None = None
    stop_ids: Collection[int] = ()
    ends: Callable[[int], bool] | None = None
    left: int = 0
    capacity: int = 0
    deadline: float | None = None
    background: bool = False
    ahead: int | None = None
    scores: int = 0
    out: deque[tuple[int, Any]] = field(default_factory=deque)
    timing: Timing = field(default_factory=Timing)
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # when the first token's logits came
    ticket: int = 0
    served: int = 0  # number of the latest pass that it was in
    done: bool = False
    error: BaseException | None = None

    @property
    def answering(self) -> bool:
        """It only waits for its next token: one token is to be computed."""
        return self.sampler is not None and self.first_s is not None and self.text.cached == self.end - 1

    @property
    def paused(self) -> bool:
        """Its caller must take something first."""
        return self.ahead is not None and len(self.out) >= self.ahead

    def limit(self) -> StopReason | None:
        """Why no further token may come."""
        if self.left <= 0:
            return "length"
        if len(self.tokens) >= self.capacity:
            return "context"
        return "time" if self.deadline is not None and time.monotonic() >= self.deadline else None

    def score(self, start: int, logits: np.ndarray) -> None:
        """Logits (R, V) of the tokens from ``start`` on."""
        known = self.scores - start
        if known < len(logits):
            self.out.append((self.scores, logits[known:]))
            self.scores = start + len(logits)

    def _reason(self, token: int) -> StopReason | None:
        """Why no other follows this token."""
        if token in self.stop_ids:
            return "eos"
        return "stop" if self.ends is not None and self.ends(token) else self.limit()

    def choose(self, logits: np.ndarray, draft: list[int]) -> int:
        """Tokens for rows of logits (R, V), the first of which follows the text and the others the draft; returns how many of
        the draft were right."""
        assert self.sampler is not None
        accepted = 0
        for row in logits:
            token = self.sampler.choose(row)
            self.sampler.add(token)
            self.tokens.append(token)
            self.left -= 1
            guessed = accepted < len(draft) and draft[accepted] == token
            reason = self._reason(token)
            likely = None if self.logprobs is None else logprobs_of(row[None], [token], self.logprobs)[0]
            self.out.append((token, Chosen(reason, likely)))
            if guessed:
                accepted += 1
            if reason is not None:
                self.done = True
            if reason is not None or not guessed:
                break
        self.end = len(self.tokens)
        return accepted
