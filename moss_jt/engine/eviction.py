"""What happens when the cache is full: who is admitted, whose pages go to the disk or are forgotten, and how they come back.

Room is given by pages. A job is admitted when its text fits beside what the running jobs still need for theirs. Pages are given up
by idle texts first, those used longest ago before others; then by answers that nobody takes; and to a job that somebody waits for
by later ones in the background. Where running answers grow beyond the cache, the youngest job gives up its pages and waits again.
The oldest always goes on, so nobody starves.
"""

import heapq
from collections import OrderedDict

import numpy as np

from moss_jt.engine.cached_text import CachedText, pages_of
from moss_jt.engine.causal_model import CausalModel
from moss_jt.engine.idle_page_file import PageFile
from moss_jt.engine.job import Job
from moss_jt.engine.pages import PagePool


class CacheUsers:
    """See the module. Only the engine's thread, or who holds its lock, uses it.

    waiting  jobs that want room, the older before the younger
    running  jobs that have it
    file     where pages go; None: they are forgotten, and computed again when needed
    """

    def __init__(self, model: CausalModel, pool: PagePool, file: PageFile | None) -> None:
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.file = file
        self._model = model
        self._pool = pool
        self._texts: OrderedDict[int, CachedText] = OrderedDict()  # with pages, those used longest ago first

    @property
    def jobs(self) -> list[Job]:
        return [*self.waiting, *self.running]

    @property
    def spare(self) -> int:
        """Free pages that running jobs do not need for the texts that they have now; below 0 where they lack some."""
        return self._pool.free - sum(map(_pages_to_come, self.running))

    def queue(self, job: Job) -> None:
        self.waiting.append(job)
        self.waiting.sort(key=lambda one: one.ticket)

    def remove(self, job: Job) -> None:
        for jobs in (self.waiting, self.running):
            if job in jobs:
                jobs.remove(job)

    def touch(self, text: CachedText) -> None:
        """The text is used now."""
        self._texts[id(text)] = text
        self._texts.move_to_end(id(text))

    def forget(self, text: CachedText) -> None:
        """Nobody will ask for the text any more."""
        text.release()
        self._texts.pop(id(text), None)

    def in_order(self) -> list[Job]:
        """Jobs that wait for room. Those that nobody takes anything of do not: they may have lost theirs to others."""
        return [job for job in self.waiting if not job.paused]

    def share_out(self) -> None:
        """Before a pass: those that run get the pages that they need, then those that wait are admitted as far as there is room."""
        while self.spare < 0:
            if not self._make_room(None):
                self._suspend(max(self.running, key=lambda job: job.ticket))
        for job in self.in_order():
            if not self._admit(job):
                break

    def passes_until(self, job: Job) -> int:
        """In how many passes at most a waiting job has room, if all that have it before write to their ends."""
        free = self.spare + sum(len(text.pages) for text in self._idle())
        ends = [(one.left, pages_of(one.end)) for one in self.running]
        heapq.heapify(ends)
        passes = 0
        for one in self.in_order():
            while free < _pages_to_come(one) and ends:
                passes, pages = heapq.heappop(ends)
                free += pages
            if one is job:
                break
            free -= _pages_to_come(one)
            reading = -(-(one.end - one.text.cached) // self._model.pass_tokens)
            heapq.heappush(ends, (passes + reading + one.left, pages_of(one.end)))
        return passes

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _idle(self) -> list[CachedText]:
        """Texts with pages that no running job is about, those used longest ago first."""
        running = {id(job.text) for job in self.running}
        return [text for key, text in self._texts.items() if key not in running and text.pages]

    def _make_room(self, job: Job | None) -> bool:
        """Have some pages given up, for a job or for those that run, by who does not need them now: an idle text, or an answer
        that nobody takes. Whether there was one."""
        for text in self._idle():
            if job is None or text is not job.text:
                self._store(text)
                return True
        for one in self.running:
            if one.paused and one.text.pages:
                self._suspend(one)
                return True
        return False

    def _admit(self, job: Job) -> bool:
        """Let a waiting job run if its text fits. Whether it does."""
        while self.spare < _pages_to_come(job):
            if self._make_room(job):
                continue
            others = [one for one in self.running if one.background and one.ticket > job.ticket]
            if job.background or not others:
                return False
            self._suspend(max(others, key=lambda one: one.ticket))
        self.remove(job)
        if job.text.stored:
            job.text.restore(job.tokens, self._read_page)
        self.running.append(job)
        self.touch(job.text)
        return True

    def _suspend(self, job: Job) -> None:
        self.running.remove(job)
        self._store(job.text)
        self.queue(job)

    def _store(self, text: CachedText) -> None:
        """Move a text's pages to the disk; where that is not possible, they are forgotten and computed anew in time."""
        if self.file is None:
            text.release()
            return
        records: list[int] = []
        for page in text.pages:
            record = self.file.write(self._model.read_page(page))
            if record is None:
                self.file.free(records)
                text.release()
                return
            records.append(record)
        text.store(records)

    def _read_page(self, record: int, page: int) -> bool:
        assert self.file is not None
        data = np.empty_like(self._model.read_page(page))
        if not self.file.read(record, data):
            return False
        self._model.write_page(page, data)
        return True


def _pages_to_come(job: Job) -> int:
    """Pages that the job needs for its text beside those that it has."""
    return max(0, pages_of(job.end) - len(job.text.pages))
