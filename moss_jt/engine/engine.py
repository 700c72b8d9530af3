"""Many sequences over one reading of the weights: one thread that computes and chooses for all of them, pass after pass.

What a pass takes is planned by moss_jt.engine.next_pass, and who has room in the cache is settled by moss_jt.engine.eviction. Who
comes late joins the next pass, and who wants no more is gone within one block. Interactive jobs go before background ones, and the
older before the younger; a background job counts as that much younger, so that it, too, has its turn in the end.

An answer is the same bits whoever else is there, because each token's way through the operators is settled by its own text
(moss_jt.engine.cached_text), the operators give a token the same bits in any company (moss_jt.kernels.places), and its random
numbers are its own.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.device import check_process
from moss_jt.backend.threads import start_with_lock_held
from moss_jt.engine.cached_text import CachedText
from moss_jt.engine.causal_model import CausalModel, LoadedAdapter, TokenRun
from moss_jt.engine.draft_copy import Ahead, DraftCopy
from moss_jt.engine.eviction import CacheUsers
from moss_jt.engine.idle_page_file import PageFile
from moss_jt.engine.job import Job, Queued
from moss_jt.engine.kept_pages import KeptPages
from moss_jt.engine.next_pass import Part, Pass, PassPlanner
from moss_jt.engine.pace import Pace
from moss_jt.engine.pages import PagePool
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE

# Tokens that an answer may be ahead of who takes them.
AHEAD = 16
# A background job is as old as an interactive one that came so many jobs later.
BACKGROUND_JOBS = 64
# Without work the thread ends, and a later job starts another.
IDLE_S = 5.0


class Engine:
    """See the module. Its methods may be called from any thread.

    Args:
        folder: where pages go that find no room in the cache; None: they are forgotten, and computed again when needed.
        copy: writes ahead of the model, over its cache; closed by who has made it.
        prompts: where pages are kept that outlive the process; None keeps none.
    """

    def __init__(
        self,
        model: CausalModel,
        folder: Path | None = None,
        copy: DraftCopy | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        self.model = model
        self._copy = copy
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)
        self.pool = PagePool(model.pages)
        self.passes = 0
        self._users = CacheUsers(model, self.pool, None if folder is None else PageFile(folder))
        self._kept = None if prompts is None else KeptPages(prompts, model, self.lock, self._work.notify_all)
        self._pace = Pace()
        self._planner = PassPlanner(model, self._users, self._pace, self._kept)
        self._dropped: deque[CachedText] = deque()  # texts whose sequences are gone
        self._late: deque[tuple[Job, int]] = deque()  # jobs that ended while the thread was at its lists
        self._busy = False
        self._flight: Pass | None = None
        self._tickets = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []
        weakref.finalize(self, _close_at_exit, weakref.ref(self))

    # For callers.

    def new_text(self, adapter: LoadedAdapter | None = None) -> CachedText:
        """What the cache will have of a sequence that is computed with this adapter."""
        return CachedText(self.pool, self._users.file, self.model.pass_tokens >= PAGE, adapter)

    def submit(self, job: Job) -> None:
        """Have the job done; :meth:`take` gives what comes of it, and :meth:`end` must be called.

        Raises:
            MossError: the model is closed, or this process was forked from the one that loaded it.
        """
        check_process()
        with self.lock:
            if self._closed:
                raise MossError("the model is closed.")
            if job.done:  # who cancels was quicker, and nobody would end it again
                return
            job.ticket = self._tickets + (BACKGROUND_JOBS if job.background else 0)
            self._tickets += 1
            job.text.settle(len(job.tokens), continued=not job.scored)
            self._users.queue(job)
            self._wake()

    def take(self, job: Job) -> tuple[int, Any] | None:
        """What the job gives next, once it is there: a token, and a Chosen; or a position, and the logits of the
        tokens from it on. None when the job is done.

        Raises:
            MossError: the job failed.
        """
        with self.lock:
            while not job.out and not job.done:
                self._wake()
                job.ready.wait()
            if job.out:
                self._work.notify_all()
                return job.out.popleft()
            if job.error is not None:
                error, job.error = job.error, None
                try:
                    raise error
                finally:
                    del error  # it refers to all who pass it on, and they must be free to go
            return None

    def listen(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have this called whenever there may be something new to be taken, once for all jobs of a pass; returns what ends that.

        Any thread calls it, holding the engine's lock perhaps: it must not wait for anything.
        """
        self._listeners.append(call)
        return lambda: self._listeners.remove(call)

    def _tell(self) -> None:
        for call in [*self._listeners]:
            call()

    def end(self, job: Job, length: int) -> None:
        """The caller wants no more of this job, and its text ends after ``length`` tokens. Who waits for it waits no longer."""
        with self.lock:
            job.done = True
            job.out.clear()
            job.ready.notify_all()
            self._tell()
            if self._busy:  # a generator that the collector of garbage closes, at any moment of the thread's
                self._late.append((job, length))
                return
            self._users.remove(job)
            for part in self._flight.parts if self._flight is not None else ():
                if part.job is job:
                    job.text.back_to(min(job.text.cached, part.start))
            job.text.cut(length)
            self._users.touch(job.text)
            self._wake()

    def cut(self, text: CachedText, length: int) -> None:
        """A text that no job is about ends after ``length`` tokens."""
        with self.lock:
            text.cut(length)

    def begin_as(self, text: CachedText, ways: Sequence[bool], length: int) -> None:
        """See :meth:`moss_jt.engine.cached_text.CachedText.begin_as`; no job is about the text."""
        with self.lock:
            text.begin_as(ways, length)

    def keep(self, text: CachedText, token_ids: Sequence[int]) -> None:
        """Keep all full pages of a text beyond the end of the process, as far as there is room for them; no job is about it."""
        with self.lock:
            if self._kept is not None and not text.stored:
                self._kept.keep(text, token_ids, text.cached)

    def assume_read(self, text: CachedText, token_ids: Sequence[int], page: np.ndarray) -> None:
        """Let a text count as read but for its last token: see moss_jt.engine.sequence.Sequence."""
        with self.lock:
            text.settle(len(token_ids))
            while text.cached < len(token_ids) - 1:
                # Fewer than a page at once, for others must not take made-up pages for theirs.
                text.compute(token_ids, min(PAGE // 2, len(token_ids) - 1 - text.cached))
            for number in text.pages:
                self.model.write_page(number, page)
            self._users.touch(text)

    def drop(self, text: CachedText) -> None:
        """Nobody will ask for this text any more. To be called from anywhere, the collector of garbage too."""
        self._dropped.append(text)

    def queued(self, job: Job) -> Queued | None:
        """Where the job waits, or None where it does not."""
        with self.lock:
            waiting = self._users.in_order()
            if job not in waiting:
                return None
            pass_s = self._pace.pass_s
            expected_s = None if pass_s is None else pass_s * self._users.passes_until(job)
            return Queued(waiting.index(job) + 1, expected_s)

    @property
    def waiting(self) -> int:
        """Jobs that wait for room in the cache."""
        with self.lock:
            return len(self._users.in_order())

    def close(self) -> None:
        """Stop within one block; what is not done yet ends with an error. Closing twice is no fault."""
        with self.lock:
            self._closed = True
            thread, self._thread = self._thread, None
            for job in self._users.jobs:
                self._fail(job, MossError("the model is closed."))
            self._work.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._kept is not None:
            self._kept.close()
        self._users.close()

    # The thread.

    def _wake(self) -> None:
        if self._thread is None and not self._closed and self._users.jobs:
            self._thread = threading.Thread(target=self._run, name="moss-jt engine", daemon=True)
            start_with_lock_held(self._thread)
        self._work.notify_all()

    def _run(self) -> None:
        while True:
            with self.lock:
                while (flight := self._plan_safely()) is None:
                    if self._thread is not threading.current_thread():
                        return
                    if not self._work.wait(IDLE_S) and not self._users.jobs:
                        self._thread = None
                        return
            self.compute(flight)

    def _plan_safely(self) -> Pass | None:
        """A fault of ours ends the jobs that it met, and not the thread: their callers wait for an answer."""
        try:
            return self.plan()
        except BaseException as error:  # noqa: BLE001
            self._busy = False
            for job in self._users.jobs:
                self._fail(job, error)
            return None

    # One pass, in two steps.

    def plan(self) -> Pass | None:
        """The next pass, or None while there is nothing to compute."""
        with self.lock:
            if self._closed:
                return None
            self._clear_up()
            self._busy = True
            self._users.share_out()
            flight = self._planner.fill(self.passes, None if self._copy is None else self._copy.longest)
            self._busy = False
            if not any(part.runs for part in flight.parts):
                for part in flight.parts:  # all that they wanted read is there, because others had it read
                    self._deliver(part, [], flight)
                return self.plan() if flight.parts else None
            self.passes += 1
            for part in flight.parts:
                part.job.served = self.passes
            self._flight = flight
            return flight

    def _clear_up(self) -> None:
        """What came while the thread was busy."""
        while self._late:
            self.end(*self._late.popleft())
        while self._dropped:
            self._users.forget(self._dropped.popleft())

    def compute(self, flight: Pass) -> None:
        """Compute a pass, and hand out what it gives."""
        runs: list[tuple[Part, TokenRun]] = []

        def wanted(index: int) -> bool:
            part, run = runs[index]
            return not part.job.done or (run.whole and run.pages[run.start // PAGE] in flight.shared)

        error: BaseException | None = None
        logits: list[np.ndarray] = []
        times = flight.times
        try:
            times.drafting_s = self._write_ahead(flight)
            runs += [(part, run) for part in flight.parts for run in part.runs]
            begin, waited = time.monotonic(), self.model.link_s
            logits = self.model.forward_many([run for _, run in runs], wanted)
            times.pass_s, times.link_s = time.monotonic() - begin, self.model.link_s - waited
        except BaseException as raised:  # noqa: BLE001  the callers get it
            error = raised
        with self.lock:
            self._flight = None
            self._busy = True
            if error is None and not any(part.job.done for part in flight.parts):
                self._pace.note(flight.prompt_tokens, times.drafting_s + times.pass_s, flight.background)
                if self._copy is not None and not flight.prompt_tokens:
                    self._copy.pace.passes.note(
                        len([token for _, run in runs for token in run.token_ids]), times.pass_s
                    )
            rows = iter(logits)
            for part in flight.parts:
                own = [next(rows, None) for _ in part.runs]
                if part.job.done:
                    continue
                if error is not None:
                    part.job.text.back_to(part.start)
                    self._fail(part.job, error)
                    continue
                try:
                    if self._kept is not None:
                        self._kept.keep(part.job.text, part.job.tokens, part.job.text.keep)
                    self._deliver(part, [rows for rows in own if rows is not None], flight)
                except BaseException as raised:  # noqa: BLE001
                    self._fail(part.job, raised)
            self._busy = False
            error = None  # or it would refer to itself, by way of this call
        self._tell()

    def _write_ahead(self, flight: Pass) -> float:
        """Have the copy write drafts, where there is one; returns the seconds that took."""
        begin = time.monotonic()
        parts = [part for part in flight.parts if part.most]
        if self._copy is None or not parts:
            return 0.0
        texts = []
        for part in parts:
            job = part.job
            assert job.sampler is not None
            promise = job.drafter.promise if job.drafter is not None and part.front else 0.0
            pages, limits = part.runs[0].pages, (part.most, frozenset(job.stop_ids))
            sampler = job.sampler.fork()
            last, adapter = job.tokens[-1], job.text.adapter
            texts.append(Ahead(pages, part.start, last, sampler, *limits, part.front, promise, adapter))
        self._copy.write(texts, lambda index: not parts[index].job.done)
        for part, text in zip(parts, texts, strict=True):
            part.draft, part.sure = text.draft, text.sure
            ids = [text.last, *text.draft]
            part.runs = [TokenRun(text.pages, part.start, ids, False, "all", text.adapter)]
        return time.monotonic() - begin

    def _deliver(self, part: Part, logits: Sequence[np.ndarray], flight: Pass) -> None:
        job, text = part.job, part.job.text
        job.timing.passes += part.prompt_tokens == 0
        job.timing.prefill_tokens += part.prompt_tokens
        if job.scored:
            for run, rows in zip(part.runs, logits, strict=True):
                job.score(run.start, rows)
        elif job.sampler is not None and logits and len(logits[-1]):
            first = job.first_s is None
            if job.first_s is None:
                job.first_s = time.monotonic()
                job.timing.prefill_s = job.first_s - job.began
            length = len(job.tokens)
            accepted = job.choose(logits[-1], part.draft)
            for position in range(length, len(job.tokens)):
                text.grown(position + 1)
            if part.most:
                text.back_to(length + accepted)
            timing = job.timing
            timing.decode_s = time.monotonic() - job.first_s
            if not first:
                timing.drafted += len(part.draft)
                timing.accepted += accepted
                timing.drafting_s += flight.times.drafting_s
                timing.link_s += flight.times.link_s
                self._learn(part, accepted, job.tokens[length:], flight)
        if job.sampler is None and text.cached >= job.end:
            job.done = True
        if job.done:
            self._users.remove(job)
            self._users.touch(text)
        job.ready.notify_all()

    def _learn(self, part: Part, accepted: int, written: Sequence[int], flight: Pass) -> None:
        """What the model has written in a pass, and what had been guessed."""
        job = part.job
        if self._copy is not None:
            self._copy.pace.learn(part.draft, part.sure, written)
        if job.drafter is None or job.done:
            return
        if self._copy is None:
            alone = len(flight.parts) == 1 and part.prompt_tokens == 0
            job.drafter.learn(len(part.draft), accepted, flight.times.pass_s if alone else None)
        else:
            right = _alike(part.front, written)
            judged = right + (right < min(len(part.front), len(written)))
            job.drafter.learn(judged, right, None)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.error, job.done = error, True
        self._users.remove(job)
        job.ready.notify_all()
        self._tell()


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _close_at_exit(engine: "weakref.ref[Engine]") -> None:
    """The interpreter must not end while the thread computes."""
    alive = engine()
    if alive is not None:
        alive.close()
