"""A conversation of tokens over one model: text is appended, answers are decoded, and only new tokens are computed.

The model's cache belongs to one session at a time. A session that finds another one's tokens in it reads its own text
anew, so sessions may alternate; they are only quicker when they do not.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from moss_jt.engine.causal_model import CausalModel, Rows
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.errors import MossError

StopReason = Literal["eos", "length", "context"]


class Drafter(Protocol):
    """Guesses what follows, for one pass to verify: moss_jt.engine.draft.PromptLookup."""

    def propose(self, token_ids: Sequence[int], room: int) -> list[int]: ...

    def learn(self, drafted: int, accepted: int, seconds: float) -> None: ...


@dataclass
class Timing:
    """What the last decode computed, and how long it took. decode_s is without the pass that read the prompt."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0


class Session:
    """See the module. ``token_ids`` is all text so far, prompts and answers."""

    def __init__(self, model: CausalModel, drafter: Drafter | None = None) -> None:
        self.model = model
        self.drafter = drafter
        self.token_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self.timing = Timing()
        self._cached = 0  # how many of token_ids the cache holds
        self._in_pass = 0  # how many tokens of a text are being read
        self._pass_s: float | None = None  # how long the last decoding pass took

    @property
    def position(self) -> int:
        return len(self.token_ids)

    @property
    def capacity(self) -> int:
        return self.model.capacity

    @property
    def unread(self) -> int:
        """Tokens that the next answer must read first; those of the pass that is running do not count."""
        return self.position - self._in_pass - (self._cached if self.model.cache_owner is self else 0)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append text. It is computed by :meth:`prefill`, or when the next answer needs it.

        Raises:
            MossError: it does not fit.
        """
        total = self.position + len(token_ids)
        if total > self.capacity:
            raise MossError(
                f"the text has {total} tokens, and the context has room for {self.capacity}. Shorten it"
                ", or give --context a larger number where the model and the memory allow it."
            )
        self.token_ids.extend(token_ids)

    def truncate(self, position: int) -> None:
        """Forget everything from ``position`` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"position {position} of {self.position} tokens")
        del self.token_ids[position:]
        self._cached = min(self._cached, position)

    def prefill(self) -> None:
        """Compute what was appended, all but the last token: an answer starts with that one."""
        self._read(self.position - 1)

    def decode(
        self, params: SamplingParams, max_new_tokens: int, stop_ids: Collection[int] = ()
    ) -> Iterator[int]:
        """Choose and append tokens, and yield each, until ``stop_reason`` is set: "eos" (after one of ``stop_ids``,
        which is yielded, too), "length" or "context".

        The iterator may be dropped at any time: the session then ends with the token that was yielded last.

        Raises:
            MossError: there is no text to continue, or the model failed.
        """
        if not self.token_ids:
            raise MossError("there is no text to continue: the prompt is empty.")
        self.timing = Timing()
        self.stop_reason = self._limit(max_new_tokens)
        if self.stop_reason is not None:
            return
        sampler = Sampler(params, self.token_ids)
        logits, draft = self._first_logits(), list[int]()
        while self.stop_reason is None:
            accepted = 0
            for row in logits:
                begin = time.perf_counter()
                token = sampler.choose(row)
                sampler.add(token)
                self.token_ids.append(token)
                max_new_tokens -= 1
                guessed = accepted < len(draft) and draft[accepted] == token
                if guessed:
                    accepted += 1
                    self._cached += 1
                self.stop_reason = "eos" if token in stop_ids else self._limit(max_new_tokens)
                self.timing.decode_s += time.perf_counter() - begin
                yield token
                if self.stop_reason is not None or not guessed:
                    break
            if self.stop_reason is None:
                self._learn(len(draft), accepted)
                logits, draft = self._step(max_new_tokens)

    def _limit(self, max_new_tokens: int) -> StopReason | None:
        """Why no further token may come."""
        if max_new_tokens <= 0:
            return "length"
        return "context" if self.position >= self.capacity else None

    def _first_logits(self) -> np.ndarray:
        """(1, V) after all text so far."""
        begin = time.perf_counter()
        cached = self._claim()
        self._read(self.position - self.model.pass_tokens)
        # An answer that was cut back may end with a token that the cache holds already: it is computed again.
        start = min(self._cached, self.position - 1)
        logits = self._forward(self.token_ids[start:], start, "last")
        self._cached = self.position
        self.timing.prefill_tokens = self.position - min(cached, self.position - 1)
        self.timing.prefill_s = time.perf_counter() - begin
        self._pass_s = None
        return logits

    def _read(self, end: int) -> None:
        """Fill the cache, in full passes, until it holds at least ``end`` tokens."""
        self._claim()
        while self._cached < end:
            start = self._cached
            chunk = self.token_ids[start : min(start + self.model.pass_tokens, self.position - 1)]
            self._forward(chunk, start, "none")
            self._cached = start + len(chunk)

    def _forward(self, token_ids: Sequence[int], start: int, rows: Rows) -> np.ndarray:
        """A pass that reads a text."""
        self._in_pass = len(token_ids)
        try:
            return self.model.forward(token_ids, start, rows)
        finally:
            self._in_pass = 0

    def _claim(self) -> int:
        """Make the cache this session's; returns how many of its tokens it holds."""
        if self.model.cache_owner is not self:
            self.model.cache_owner = self
            self._cached = 0
        return self._cached

    def _step(self, max_new_tokens: int) -> tuple[np.ndarray, list[int]]:
        """Compute the last token and, with it, a draft of what follows: (1 + len(draft), V) and the draft."""
        begin = time.perf_counter()
        # Another session may have come between two tokens.
        if self.model.cache_owner is not self:
            return self._first_logits(), []
        start = self._cached
        draft = []
        room = min(max_new_tokens - 1, self.capacity - self.position, self.model.pass_tokens - 1)
        if self.drafter is not None and room > 0:
            draft = self.drafter.propose(self.token_ids, room)
        logits = self.model.forward([*self.token_ids[start:], *draft], start, "all")
        self._cached = self.position
        self._pass_s = time.perf_counter() - begin
        self.timing.decode_s += self._pass_s
        self.timing.passes += 1
        return logits, draft

    def _learn(self, drafted: int, accepted: int) -> None:
        if self.drafter is not None and self._pass_s is not None:
            self.drafter.learn(drafted, accepted, self._pass_s)
