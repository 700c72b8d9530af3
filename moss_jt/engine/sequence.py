"""A text of tokens that the model reads and continues: text is appended, answers are decoded, only new tokens are computed.

Any number of sequences may be read and answered at once, from any threads; one sequence is one thread's at a time. What they say
does not depend on each other: see moss_jt.engine.engine.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator
from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np

from moss_jt.engine.causal_model import LoadedAdapter
from moss_jt.engine.engine import AHEAD, Engine
from moss_jt.engine.job import Drafter, Job, Queued, StopReason, Timing
from moss_jt.engine.logprobs import Logprob
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.errors import MossError


class Sequence:
    """See the module.

    Args:
        drafter: guesses what follows; its own for each sequence.
        background: others go first.
        adapter: with which it is read and answered.

    token_ids    all text so far, prompts and answers
    stop_reason  why the last answer ended: "eos" (one of the stop ids), "stop" (see ``begin``), "length", "context" (it is
                 full), "time"; None while it goes on
    timing       what the last answer cost
    logprobs     how likely the last answer's tokens were, of those that were taken; empty where that was not asked for
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter | None = None,
        background: bool = False,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.engine = engine
        self.drafter = drafter
        self.background = background
        self.token_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self.timing = Timing()
        self.logprobs: list[Logprob] = []
        self._text = engine.new_text(adapter)
        self._job: Job | None = None
        weakref.finalize(self, engine.drop, self._text)

    @property
    def position(self) -> int:
        return len(self.token_ids)

    @property
    def capacity(self) -> int:
        return self.engine.model.capacity

    @property
    def queued(self) -> Queued | None:
        """Where an answer that was asked for waits for room in the cache, or None where it does not."""
        return None if self._job is None else self.engine.queued(self._job)

    @property
    def unread(self) -> int:
        """Tokens that the next answer must read first; those of the pass that is running do not count."""
        return max(0, self.position - self._text.cached)

    @property
    def ways(self) -> list[bool]:
        """Of each page of the text, whether it was given whole: see :meth:`begin_as`."""
        return self._text.ways()

    def begin_as(self, ways: Tokens[bool]) -> None:
        """The text is to be read, anew, in the ways of one that was given and written piece by piece: what follows has the same
        bits then."""
        self.engine.begin_as(self._text, ways, self.position)

    def keep_beginning(self, length: int) -> None:
        """So many of the first tokens begin other texts, too: what the model makes of them outlives the process."""
        self._text.keep = length

    def keep(self) -> None:
        """What the model has made of the text so far outlives the process, as far as there is room for it."""
        self.engine.keep(self._text, self.token_ids)

    def extend(self, token_ids: Tokens[int]) -> None:
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
        self.engine.cut(self._text, position)

    def assume_read(self, page: np.ndarray) -> None:
        """For measurements: the text counts as read, all but its last token, with this page's keys and values all along.

        It must not have been read before, and there must be room for it.
        """
        self.engine.assume_read(self._text, self.token_ids, page)

    def prefill(self) -> None:
        """Compute what was appended, all but the last token: an answer starts with that one."""
        if self.position < 2:
            return
        job = self._new_job(self.position - 1)
        self._do(job)
        try:
            self.engine.take(job)
        finally:
            self._end(job)

    def logits(self) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of all of the text, part after part: the position of the first, and (R, V) float32 after each.

        It must not have been read before.
        """
        job = self._new_job(self.position)
        job.scored, job.ahead = True, 1
        self._do(job)
        try:
            while (part := self.engine.take(job)) is not None:
                yield part
        finally:
            self._end(job)

    def decode(
        self,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        max_time: float | None = None,
        logprobs: int | None = None,
    ) -> Generator[int]:
        """Choose and append tokens, and yield each, until ``stop_reason`` is set: "eos" (after one of ``stop_ids``,
        which is yielded, too), "length", "context" or "time" (``max_time`` seconds have passed, looked at after each token).

        Args:
            logprobs: note how likely each token was, and so many of the likeliest beside it.

        The iterator may be dropped at any time: the sequence then ends with the token that was yielded last.

        Raises:
            MossError: there is no text to continue, or the model failed.
        """
        answer = self.begin(params, max_new_tokens, stop_ids, max_time, logprobs=logprobs)
        try:
            yield from answer
        finally:
            answer.close()

    def begin(
        self,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        max_time: float | None = None,
        ahead: int | None = AHEAD,
        logprobs: int | None = None,
        ends: Callable[[int], bool] | None = None,
    ) -> "Answer":
        """The same, but written from now on, until it is ``ahead`` tokens ahead of who takes them; None: to its end.

        Args:
            ends: is given each token when it is chosen, and says whether the answer ends with it ("stop").
        """
        if not self.token_ids:
            raise MossError("there is no text to continue: the prompt is empty.")
        job = self._new_job(self.position)
        job.sampler = Sampler(params, self.token_ids, stop_ids)
        job.drafter, job.stop_ids, job.left = self.drafter, frozenset(stop_ids), max_new_tokens
        job.deadline = None if max_time is None else time.monotonic() + max_time
        job.ahead, job.logprobs, job.ends = ahead, logprobs, ends
        self.timing, self.logprobs = job.timing, []
        self.stop_reason = job.limit()
        job.done = self.stop_reason is not None
        if not job.done:
            self._do(job)
        return Answer(self, job)

    def cancel(self) -> None:
        """End what is being read or answered, within one block and from any thread; who waits for it gets no more of it."""
        with self.engine.lock:
            if self._job is not None:
                self._end(self._job)

    def _new_job(self, end: int) -> Job:
        ready = threading.Condition(self.engine.lock)
        return Job(
            self._text, list(self.token_ids), end, ready, capacity=self.capacity, background=self.background
        )

    def _do(self, job: Job) -> None:
        if self._job is not None:
            raise ValueError("this sequence is being read or answered already")
        self._job = job
        try:
            self.engine.submit(job)
        except MossError:
            self._job = None
            raise

    def _end(self, job: Job) -> None:
        # Who cancels may come at the same time, and must not end what begins after this job.
        with self.engine.lock:
            if self._job is job:
                self._job = None
                self.engine.end(job, self.position)


class Answer:
    """An answer that is being written: an iterator of its tokens. Close it, or drop it, to have no more of it."""

    def __init__(self, sequence: Sequence, job: Job) -> None:
        self._sequence = sequence
        self._job = job

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        sequence = self._sequence
        if self._job.done and not self._job.out and self._job.error is None:
            self.close()
            raise StopIteration
        taken = self._at_hand() or sequence.engine.take(self._job)
        if taken is None:
            self.close()
            raise StopIteration
        token, about = taken
        sequence.stop_reason = about.reason
        sequence.token_ids.append(token)
        if about.logprob is not None:
            sequence.logprobs.append(about.logprob)
        return token

    @property
    def ready(self) -> bool:
        """Whether the next token is there, or none comes any more: who asks for it has not to wait."""
        return bool(self._job.out) or self._job.done

    def _at_hand(self) -> tuple[int, Any] | None:
        """A token that is there, without the engine's lock, which is held for long; where nobody waits for it to be taken."""
        try:
            return self._job.out.popleft() if self._job.ahead is None else None
        except IndexError:
            return None

    def close(self) -> None:
        self._sequence._end(self._job)

    def __del__(self) -> None:
        self.close()
