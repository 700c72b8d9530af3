"""One thing that a caller wants of the engine for one sequence: an answer, a text read ahead, or the logits of a text."""

import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from moss_jt.engine.cached_text import CachedText
from moss_jt.engine.sampling import Sampler

StopReason = Literal["eos", "length", "context", "time"]


class Drafter(Protocol):
    """Guesses what follows, for one pass to verify: moss_jt.engine.draft.PromptLookup."""

    def propose(self, token_ids: list[int], most: int) -> list[int]: ...

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """``seconds`` of the pass, or None where others shared it."""
        ...


@dataclass
class Timing:
    """What an answer cost. prefill_s is until its first token's logits, waiting included; decode_s everything after."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0


@dataclass(frozen=True)
class Queued:
    """A job that waits for room in the cache: its number in the queue, from 1 on, and how long that may take, where it is known."""

    number: int
    expected_s: float | None


@dataclass(eq=False)
class Job:
    """What the engine and the caller know of it; both hold the engine's lock when they look.

    tokens      the text, and the answer as far as it is written
    end         the job is to compute the text up to here
    sampler     chooses tokens, where an answer is wanted
    scored      the logits of all its tokens are wanted, and are what is taken: position of the first, (R, V)
    stop_ids    tokens that end the answer
    left        tokens that it may have still
    deadline    of time.monotonic, after which it ends
    background  it waits for those that are not
    ahead       so much may there be in ``out``; None for any number
    out         what the caller has not taken: tokens, each with why no other follows, or logits
    ready       is told when something is there to be taken
    """

    text: CachedText
    tokens: list[int]
    end: int
    ready: threading.Condition
    sampler: Sampler | None = None
    scored: bool = False
    drafter: Drafter | None = None
    stop_ids: Collection[int] = ()
    left: int = 0
    capacity: int = 0
    deadline: float | None = None
    background: bool = False
    ahead: int | None = None
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
            reason: StopReason | None = "eos" if token in self.stop_ids else self.limit()
            self.out.append((token, reason))
            if guessed:
                accepted += 1
            if reason is not None:
                self.done = True
            if reason is not None or not guessed:
                break
        self.end = len(self.tokens)
        return accepted
