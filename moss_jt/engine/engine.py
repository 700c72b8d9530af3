"""Many sequences over one reading of the weights: one thread that schedules, computes and chooses, pass after pass.

A pass is filled in this order: the next token of every running answer, guesses of what follows it (drafts) as far as rows of
logits are left, and parts of new texts, dealt page by page to all that are being read. Who comes late joins the next pass, and
who wants no more is gone within one block. Interactive jobs go before background ones, and the older before the younger; a
background job counts as that much younger, so that it, too, has its turn in the end. Where answers in the background make a pass
longer that somebody waits for, they are in few of those passes.

An answer is the same bits whoever else is there, because each token's way through the operators is settled by its own text
(moss_jt.engine.cached_text), the operators give a token the same bits in any company (moss_jt.kernels.places), and its random
numbers are its own.

Room in the cache is given by pages. A job is admitted when its text fits; what idle sequences have cached makes room for it, and
goes to the disk. Where an answer grows and no page is left, the youngest job makes room and waits again.
"""

import heapq
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.device import check_process
from moss_jt.engine.cached_text import CachedText, pages_of
from moss_jt.engine.causal_model import CausalModel, LoadedAdapter, Rows, TokenRun
from moss_jt.engine.draft_copy import Ahead, DraftCopy
from moss_jt.engine.draft_length import Sure
from moss_jt.engine.idle_page_file import PageFile
from moss_jt.engine.job import Job, Queued
from moss_jt.engine.kept_pages import KeptPages
from moss_jt.engine.pace import Pace
from moss_jt.engine.pages import PagePool
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE

# Tokens that an answer may be ahead of who takes them.
AHEAD = 16
# A background job is as old as an interactive one that came so many jobs later.
BACKGROUND_JOBS = 64
# One of so many passes reads texts in the background before others.
BACKGROUND_READS = 8
# Without work the thread ends, and a later job starts another.
IDLE_S = 5.0


@dataclass
class PassTimes:
    """Seconds of a pass: of the model, of the copy before it, and of the model's those in which it waited for weights."""

    pass_s: float = 0.0
    drafting_s: float = 0.0
    link_s: float = 0.0


@dataclass
class Part:
    """What a pass computes for one job: the text from ``start`` on, and a draft of what follows it.

    front  what prompt lookup proposes
    sure   how sure the copy is of each of the draft's tokens, where it has written it
    most   tokens that the draft may have
    """

    job: Job
    start: int
    runs: list[TokenRun] = field(default_factory=list)
    front: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    sure: list[Sure] = field(default_factory=list)
    most: int = 0
    prompt_tokens: int = 0


@dataclass
class Pass:
    """What is computed together.

    logits  rows of them
    guests  whether answers in the background take part, where interactive jobs are there, too
    times   what it took
    fresh   whole pages that it computes, for any sequence that begins alike
    shared  those of them that more than one sequence has already
    """

    parts: list[Part] = field(default_factory=list)
    rows: int = 0
    logits: int = 0
    prompt_tokens: int = 0
    guests: bool | None = None
    times: PassTimes = field(default_factory=PassTimes)
    fresh: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)


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
        self._kept = None if prompts is None else KeptPages(prompts, model, self.lock)
        self.pool = PagePool(model.pages)
        self.passes = 0
        self._work = threading.Condition(self.lock)
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._held: OrderedDict[int, CachedText] = (
            OrderedDict()
        )  # texts with pages, those used longest ago first
        self._dropped: deque[CachedText] = deque()  # texts whose sequences are gone
        self._late: deque[tuple[Job, int]] = deque()  # jobs that ended while the thread was at its lists
        self._busy = False
        self._file = None if folder is None else PageFile(folder)
        self._pace = Pace()
        self._flight: Pass | None = None
        self._tickets = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []
        weakref.finalize(self, _close_at_exit, weakref.ref(self))

    # For callers.

    def new_text(self, adapter: LoadedAdapter | None = None) -> CachedText:
        """What the cache will have of a sequence that is computed with this adapter."""
        return CachedText(self.pool, self.model.pass_tokens >= PAGE, adapter)

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
            self._free(job.text.settle(len(job.tokens), continued=not job.scored))
            self._queue(job)
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
            self._remove(job)
            for part in self._flight.parts if self._flight is not None else ():
                if part.job is job:
                    self._free(job.text.back_to(min(job.text.cached, part.start)))
            self._free(job.text.cut(length))
            self._touch(job.text)
            self._wake()

    def cut(self, text: CachedText, length: int) -> None:
        """A text that no job is about ends after ``length`` tokens."""
        with self.lock:
            self._free(text.cut(length))

    def begin_as(self, text: CachedText, ways: Sequence[bool], length: int) -> None:
        """See :meth:`moss_jt.engine.cached_text.CachedText.begin_as`; no job is about the text."""
        with self.lock:
            self._free(text.begin_as(ways, length))

    def keep(self, text: CachedText, token_ids: Sequence[int]) -> None:
        """Keep all full pages of a text beyond the end of the process, as far as there is room for them; no job is about it."""
        with self.lock:
            if self._kept is not None and not text.stored:
                self._keep_pages(text, token_ids, text.cached)

    def suppose(self, text: CachedText, token_ids: Sequence[int], page: np.ndarray) -> None:
        """Let a text count as read but for its last token: see moss_jt.engine.sequence.Sequence."""
        with self.lock:
            text.settle(len(token_ids))
            while text.cached < len(token_ids) - 1:
                # Fewer than a page at once, for others must not take made-up pages for theirs.
                text.compute(token_ids, min(PAGE // 2, len(token_ids) - 1 - text.cached))
            for number in text.pages:
                self.model.write_page(number, page)
            self._touch(text)

    def drop(self, text: CachedText) -> None:
        """Nobody will ask for this text any more. To be called from anywhere, the collector of garbage too."""
        self._dropped.append(text)

    def queued(self, job: Job) -> Queued | None:
        """Where the job waits, or None where it does not."""
        with self.lock:
            waiting = self._queue_in_order()
            if job not in waiting:
                return None
            before, pass_s = waiting.index(job), self._pace.pass_s
            return Queued(
                before + 1, None if pass_s is None else pass_s * self._passes_until(waiting[: before + 1])
            )

    def _passes_until(self, waiting: Sequence[Job]) -> int:
        """In how many passes at most the last of these has room, if all that have it before write to their ends."""
        free = self.pool.free - self._promised() + sum(len(text.pages) for text in self._idle())
        ends = [(one.left, pages_of(one.end)) for one in self._running]
        heapq.heapify(ends)
        passes = 0
        for job in waiting:
            while free < self._pages_to_come(job) and ends:
                passes, pages = heapq.heappop(ends)
                free += pages
            free -= self._pages_to_come(job)
            reading = -(-(job.end - job.text.cached) // self.model.pass_tokens)
            heapq.heappush(ends, (passes + reading + job.left, pages_of(job.end)))
        return passes

    @property
    def waiting(self) -> int:
        """Jobs that wait for room in the cache."""
        with self.lock:
            return len(self._queue_in_order())

    def close(self) -> None:
        """Stop within one block; what is not done yet ends with an error. Closing twice is no fault."""
        with self.lock:
            self._closed = True
            thread, self._thread = self._thread, None
            for job in [*self._waiting, *self._running]:
                self._fail(job, MossError("the model is closed."))
            self._work.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._kept is not None:
            self._kept.close()
        if self._file is not None:
            self._file.close()

    # The thread.

    def _wake(self) -> None:
        if self._thread is None and not self._closed and (self._waiting or self._running):
            self._thread = threading.Thread(target=self._run, name="moss-jt engine", daemon=True)
            self._thread.start()
        self._work.notify_all()

    def _run(self) -> None:
        while True:
            with self.lock:
                while (flight := self._plan_safely()) is None:
                    if self._thread is not threading.current_thread():
                        return
                    if not self._work.wait(IDLE_S) and not self._waiting and not self._running:
                        self._thread = None
                        return
            self.compute(flight)

    def _plan_safely(self) -> Pass | None:
        """A fault of ours ends the jobs that it met, and not the thread: their callers wait for an answer."""
        try:
            return self.plan()
        except BaseException as error:  # noqa: BLE001
            self._busy = False
            for job in [*self._waiting, *self._running]:
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
            self._keep_promises()
            for job in self._queue_in_order():
                if not self._admit(job):
                    break
            flight = self._fill()
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
            text = self._dropped.popleft()
            self._free(text.release())
            self._held.pop(id(text), None)

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
                self._pace.note(flight.prompt_tokens, times.drafting_s + times.pass_s, flight.guests)
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
                    self._free(part.job.text.back_to(part.start))
                    self._fail(part.job, error)
                    continue
                try:
                    self._keep_pages(part.job.text, part.job.tokens, part.job.text.keep)
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
                self._free(text.back_to(length + accepted))
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
            self._remove(job)
            self._touch(text)
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
        self._remove(job)
        job.ready.notify_all()
        self._tell()

    # Who has room.

    def _queue(self, job: Job) -> None:
        self._waiting.append(job)
        self._waiting.sort(key=lambda one: one.ticket)

    def _remove(self, job: Job) -> None:
        for jobs in (self._waiting, self._running):
            if job in jobs:
                jobs.remove(job)

    def _pages_to_come(self, job: Job) -> int:
        """Pages that the job needs for its text beside those that it has."""
        return max(0, pages_of(job.end) - len(job.text.pages))

    def _promised(self) -> int:
        """Pages that running jobs need for the texts that they have now."""
        return sum(map(self._pages_to_come, self._running))

    def _idle(self) -> list[CachedText]:
        """Texts with pages that no running job is about, those used longest ago first."""
        running = {id(job.text) for job in self._running}
        return [text for key, text in self._held.items() if key not in running and text.pages]

    def _keep_promises(self) -> None:
        """Answers have grown: where pages lack, others give theirs, at last the youngest jobs, which wait again."""
        while self.pool.free < self._promised():
            if not self._make_room(None):
                self._suspend(max(self._running, key=lambda job: job.ticket))

    def _make_room(self, job: Job | None) -> bool:
        """Have some pages given up by who does not need them now: an idle text, or an answer that nobody takes."""
        for text in self._idle():
            if job is None or text is not job.text:
                self._store(text)
                return True
        for one in self._running:
            if one.paused and one.text.pages:
                self._suspend(one)
                return True
        return False

    def _admit(self, job: Job) -> bool:
        """Let a waiting job run if its text fits. Whether it does."""
        while self.pool.free < self._promised() + self._pages_to_come(job):
            if self._make_room(job):
                continue
            others = [one for one in self._running if one.background and one.ticket > job.ticket]
            if job.background or not others:
                return False
            self._suspend(max(others, key=lambda one: one.ticket))
        self._remove(job)
        if job.text.stored:
            self._free(job.text.restore(job.tokens, self._read_page))
        self._running.append(job)
        self._touch(job.text)
        return True

    def _queue_in_order(self) -> list[Job]:
        """Jobs that wait for room. Those that nobody takes anything of do not: they may have lost theirs to others."""
        return [job for job in self._waiting if not job.paused]

    def _suspend(self, job: Job) -> None:
        self._running.remove(job)
        self._store(job.text)
        self._queue(job)

    def _store(self, text: CachedText) -> None:
        """Move a text's pages to the disk; where that is not possible, they are forgotten and computed anew in time."""
        records: list[int] = []
        for page in text.pages:
            record = None if self._file is None else self._file.write(self.model.read_page(page))
            if record is None:
                self._free(records)
                self._free(text.release())
                return
            records.append(record)
        text.store(records)

    def _read_page(self, record: int, page: int) -> bool:
        assert self._file is not None
        data = np.empty_like(self.model.read_page(page))
        if not self._file.read(record, data):
            return False
        self.model.write_page(page, data)
        return True

    def _keep_pages(self, text: CachedText, token_ids: Sequence[int], length: int) -> None:
        """Have the full pages of the first ``length`` tokens written, as far as they are computed and not kept yet."""
        if self._kept is None or not length:
            return
        for page, name in zip(text.pages, text.full_pages(token_ids, min(length, text.cached)), strict=False):
            if self._kept.wanted(name):
                self.pool.hold(page)
                self._kept.keep(name, page, self._held_page(text, page))

    def _held_page(self, text: CachedText, page: int) -> Callable[[bool], bool]:
        """Gives a page back that was held to be written, and says whether it was left as it was."""
        state, whole = text.state_of(page), text.is_whole(page)

        def finished(written: bool) -> bool:
            self.pool.give_back([page])
            self._work.notify_all()
            return whole or text.state_of(page) == state

        return finished

    def _fetch(self, job: Job) -> bool:
        """Have the next page as it is kept from an earlier process, where it is."""
        text = job.text
        end = text.cached + PAGE
        if self._kept is None or text.cached % PAGE or end > job.end - (job.sampler is not None):
            return False
        names = text.full_pages(job.tokens, end)
        if PAGE * len(names) < end or not self._kept.has(names[-1]):
            return False
        start = text.compute(job.tokens, PAGE)
        if not self._kept.load(names[-1], text.pages[-1]):
            self._free(text.back_to(start))
            return False
        self._kept.used(names)
        return True

    def _free(self, records: list[int]) -> None:
        if records and self._file is not None:
            self._file.free(records)

    def _touch(self, text: CachedText) -> None:
        self._held[id(text)] = text
        self._held.move_to_end(id(text))

    # What goes into a pass.

    def _fill(self) -> Pass:
        ready = [job for job in self._running if not job.paused]
        guests = [job for job in ready if job.background and job.answering]
        if not guests or all(job.background for job in ready):
            return self._fill_from(ready)
        if self._pace.guests():
            flight = self._fill_from(ready)
            flight.guests = True
            return flight
        flight = self._fill_from([job for job in ready if job not in guests])
        flight.guests = False
        return flight

    def _fill_from(self, ready: Sequence[Job]) -> Pass:
        flight = Pass()
        answering = sorted((job for job in ready if job.answering), key=lambda job: job.served)
        answering = answering[: min(self.model.logit_rows, self.model.pass_tokens)]
        texts = sorted((job for job in ready if not job.answering), key=lambda job: job.served)
        if texts and self.model.pass_tokens < PAGE + self.model.logit_rows and self.passes % 2:
            answering = []  # a page may find no room beside them, and must not wait for ever
        spare_pages = self.pool.free - self._promised()
        for number, job in enumerate(answering):
            spare_pages -= self._add_answer(flight, job, len(answering) - number, spare_pages)
        self._add_texts(flight, texts)
        return flight

    def _add_answer(self, flight: Pass, job: Job, sharing: int, spare_pages: int) -> int:
        """The job's last token, with a draft of what follows. Returns pages that the draft takes beyond it.

        Args:
            sharing: so many jobs share the rows that are left.
            spare_pages: pages that nobody needs for what is certain.
        """
        front: list[int] = []
        length, text = len(job.tokens), job.text
        spare = min(self.model.logit_rows - flight.logits, self.model.pass_tokens - flight.rows) - sharing
        most = max(0, min(spare // sharing, job.left - 1, job.capacity - length))
        if job.drafter is not None and most > 0:
            front = job.drafter.propose(job.tokens, most)
        most = len(front) if self._copy is None else min(most, self._copy.longest)
        certain = text.pages_for(1)
        while text.pages_for(1 + most) > certain + spare_pages:
            most -= 1
        front = front[:most]
        extra = text.pages_for(1 + most) - certain
        start = text.compute(job.tokens, 1 + most)
        run = TokenRun(tuple(text.pages), start, [job.tokens[-1], *front], False, "all", text.adapter)
        flight.parts.append(Part(job, start, [run], front, front, most=most))
        flight.rows += 1 + most
        flight.logits += 1 + most
        return extra

    def _add_texts(self, flight: Pass, jobs: Sequence[Job]) -> None:
        """Runs of texts that are being read, dealt in turns so that a long one does not hold up a short one."""
        most = self.model.pass_tokens - flight.rows
        if flight.parts:
            most = min(most, self._pace.prompt_tokens(most))
        parts = [Part(job, job.text.cached) for job in jobs]
        for last in (self.passes % BACKGROUND_READS == 0, self.passes % BACKGROUND_READS != 0):
            turn = deque(part for part in parts if part.job.background == last)
            while turn:
                part = turn.popleft()
                if self._add_run(flight, part, most - flight.prompt_tokens):
                    turn.append(part)
        # Who only shares another's pages goes along: if the pass fails, those are not computed.
        flight.parts += [part for part in parts if part.job.text.cached != part.start]

    def _add_run(self, flight: Pass, part: Part, most: int) -> bool:
        """Add a page, or tokens that fill none, of a text, ``most`` tokens at most. Whether more may follow."""
        job, text = part.job, part.job.text
        if text.cached >= job.end:
            return False
        if not job.scored and text.adopt(job.tokens):
            if text.pages[-1] in flight.fresh:
                flight.shared.add(text.pages[-1])
            return True
        if not job.scored and self._fetch(job):
            return True
        count, whole = text.next_run(job.end)
        count = self._affordable(flight, job, count, whole, most)
        if count == 0:
            return False
        start = text.compute(job.tokens, count)
        rows: Rows = "none"
        if job.scored:
            rows = "all"
        elif job.sampler is not None and text.cached == job.end:
            rows = "last"
        if whole:
            flight.fresh.add(text.pages[-1])
        ids = job.tokens[start : start + count]
        part.runs.append(TokenRun(tuple(text.pages), start, ids, whole, rows, text.adapter))
        part.prompt_tokens += count
        flight.prompt_tokens += count
        flight.rows += count
        flight.logits += {"none": 0, "last": 1, "all": count}[rows]
        return True

    def _affordable(self, flight: Pass, job: Job, count: int, whole: bool, most: int) -> int:
        """Of ``count`` tokens that come next, how many the pass can take: all or none of a whole page."""
        if job.scored:
            most = min(most, self.model.score_rows - flight.logits)
        elif job.sampler is not None and job.text.cached + count == job.end:
            most = min(most, count if flight.logits < self.model.logit_rows else count - 1)
        if whole:
            return count if count <= most else 0
        return max(0, min(count, most))


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
