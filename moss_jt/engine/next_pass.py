"""What goes into the next pass: which tokens, of which jobs.

It is filled in this order: the next token of every running answer, guesses of what follows it (drafts) as far as rows of logits are
left, and parts of new texts, dealt page by page to all that are being read. Where answers in the background make a pass longer that
somebody waits for, they are in few of those passes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moss_jt.engine.causal_model import CausalModel, Rows, TokenRun
from moss_jt.engine.draft_length import Sure
from moss_jt.engine.eviction import CacheUsers
from moss_jt.engine.job import Job
from moss_jt.engine.kept_pages import KeptPages
from moss_jt.engine.pace import Pace
from moss_jt.kernels.interface import PAGE

# One of so many passes reads texts in the background before others.
BACKGROUND_READS = 8


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

    number      passes that were before it
    logits      rows of them
    background  whether answers in the background take part, where interactive jobs are there, too
    times       what it took
    fresh       whole pages that it computes, for any sequence that begins alike
    shared      those of them that more than one sequence has already
    """

    number: int
    parts: list[Part] = field(default_factory=list)
    rows: int = 0
    logits: int = 0
    prompt_tokens: int = 0
    background: bool | None = None
    times: PassTimes = field(default_factory=PassTimes)
    fresh: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)


class PassPlanner:
    """Fills one pass after another from the jobs that run.

    Args:
        pace: what may ride along.
        kept: pages that need not be computed.
    """

    def __init__(self, model: CausalModel, users: CacheUsers, pace: Pace, kept: KeptPages | None) -> None:
        self._model = model
        self._users = users
        self._pace = pace
        self._kept = kept

    def fill(self, number: int, longest: int | None) -> Pass:
        """The pass after so many others.

        Args:
            longest: tokens that a draft may have, where a copy writes drafts; None: they are what prompt lookup proposes.
        """
        ready = [job for job in self._users.running if not job.paused]
        behind = [job for job in ready if job.background and job.answering]
        flight = Pass(number)
        if behind and not all(job.background for job in ready):
            flight.background = self._pace.takes_background()
            if not flight.background:
                ready = [job for job in ready if job not in behind]
        model, texts = self._model, [job for job in ready if not job.answering]
        if not (texts and model.pass_tokens < PAGE + model.logit_rows and number % 2):
            # Otherwise a page might find no room beside the answers, and must not wait for ever.
            self._add_answers(flight, [job for job in ready if job.answering], longest)
        self._add_texts(flight, sorted(texts, key=lambda job: job.served))
        return flight

    def _add_answers(self, flight: Pass, jobs: Sequence[Job], longest: int | None) -> None:
        most = min(self._model.logit_rows, self._model.pass_tokens)
        jobs = sorted(jobs, key=lambda job: job.served)[:most]
        spare_pages = self._users.spare
        for number, job in enumerate(jobs):
            spare_pages -= self._add_answer(flight, job, len(jobs) - number, spare_pages, longest)

    def _add_answer(self, flight: Pass, job: Job, sharing: int, spare_pages: int, longest: int | None) -> int:
        """The job's last token, with a draft of what follows. Returns pages that the draft takes beyond it.

        Args:
            sharing: so many jobs share the rows that are left.
            spare_pages: pages that nobody needs for what is certain.
        """
        front: list[int] = []
        length, text = len(job.tokens), job.text
        spare = min(self._model.logit_rows - flight.logits, self._model.pass_tokens - flight.rows) - sharing
        most = max(0, min(spare // sharing, job.left - 1, job.capacity - length))
        if job.drafter is not None and most > 0:
            front = job.drafter.propose(job.tokens, most)
        most = len(front) if longest is None else min(most, longest)
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
        most = self._model.pass_tokens - flight.rows
        if flight.parts:
            most = min(most, self._pace.prompt_tokens(most))
        parts = [Part(job, job.text.cached) for job in jobs]
        for last in (flight.number % BACKGROUND_READS == 0, flight.number % BACKGROUND_READS != 0):
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
        if self._kept is not None and not job.scored:
            if self._kept.load_next(text, job.tokens, job.end - (job.sampler is not None)):
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
            most = min(most, self._model.score_rows - flight.logits)
        elif job.sampler is not None and job.text.cached + count == job.end:
            most = min(most, count if flight.logits < self._model.logit_rows else count - 1)
        if whole:
            return count if count <= most else 0
        return max(0, min(count, most))
