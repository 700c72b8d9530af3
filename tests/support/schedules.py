"""Random schedules over a scripted model: who comes when, who cancels, whose pass fails, how small the cache is.

The model's next token depends on every token before it and on the way that each was computed (whole page or few tokens), read
from the sequence's own pages; so a page that is another's, stale, lost or computed in another way makes another text. Each client's
texts are then compared with those of the same client alone.
"""

import gc
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from unittest import mock

import numpy as np

from moss_jt.engine import cached_text, engine, kept_pages, next_pass, pace
from moss_jt.engine.causal_model import TokenRun
from moss_jt.engine.draft_copy import DraftCopy
from moss_jt.engine.draft_length import DraftPace
from moss_jt.engine.engine import Engine
from moss_jt.engine.job import Job
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.engine.sequence import Answer
from moss_jt.engine.sequence import Sequence as Text

PAGE = 4  # small pages meet every case in short texts
VOCABULARY = 7
BEGINNINGS = [1, 2, 3, 4, 5, 6, 0, 1, 2] * 3, [3, 3, 3, 3, 3, 3, 3, 3, 3]
GREEDY = SamplingParams(temperature=0)
DICE = SamplingParams(
    temperature=1.5,
    top_k=0,
    top_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={2: 1.5},
)


def state_of(before: int, token: int, whole: bool) -> int:
    """Keys and values of a position: a hash of the way that it was computed and of all that is before it."""
    return hash((before, token, whole)) & 0xFFFFFFFFFF


def logits_after(states: list[int], tokens: list[int]) -> list[float]:
    """Of everything that a token sees, as attention does: itself and what is before it."""
    seed = hash((tuple(states), tuple(tokens))) & 0xFFFFFFFF
    return [((seed >> (4 * token)) & 15) / 3.0 for token in range(VOCABULARY)]


class HashedModel:
    """See the module."""

    def __init__(self, pages: int, capacity: int, pass_tokens: int, logit_rows: int) -> None:
        self.pages, self.capacity = pages, capacity
        self.pass_tokens, self.logit_rows, self.score_rows = pass_tokens, logit_rows, max(PAGE, logit_rows)
        self.link_s = 0.0
        self._cache = [[0] * PAGE for _ in range(pages)]
        self._tokens = [[-1] * PAGE for _ in range(pages)]
        self.between: Callable[[], None] = lambda: None  # what happens between two blocks

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        assert 0 < sum(len(run.token_ids) for run in runs) <= self.pass_tokens
        rows = {"none": 0, "last": 1}
        assert sum(rows.get(p.rows, len(p.token_ids)) for p in runs) <= max(self.logit_rows, self.score_rows)
        written: set[tuple[int, int]] = set()
        self.between()
        kept = [wanted(index) for index in range(len(runs))]
        actual: list[np.ndarray] = [np.empty((0, VOCABULARY), np.float32) for _ in runs]
        # As in a block: all keys and values are there before anyone looks at them, in an order of their own.
        order = sorted((i for i in range(len(runs)) if kept[i]), key=lambda i: runs[i].start)
        for index in order:
            run = runs[index]
            assert run.start + len(run.token_ids) <= self.capacity
            if run.whole:
                assert len(run.token_ids) == PAGE and run.start % PAGE == 0
            for position, token in enumerate(run.token_ids, run.start):
                page, slot = run.pages[position // PAGE], position % PAGE
                assert (page, slot) not in written, "two runs write to one place"
                written.add((page, slot))
                before = self._at(run.pages, position - 1) if position else 1
                self._cache[page][slot] = state_of(before, token, run.whole)
                self._tokens[page][slot] = token
        for index in order:
            actual[index] = self._logits(runs[index])
        return actual

    def _at(self, pages: Sequence[int], position: int) -> int:
        return self._cache[pages[position // PAGE]][position % PAGE]

    def _logits(self, run: TokenRun) -> np.ndarray:
        count = len(run.token_ids)
        first = {"none": count, "last": count - 1, "all": 0}[run.rows]
        if first == count:
            return np.empty((0, VOCABULARY), np.float32)
        states = [state for page in run.pages for state in self._cache[page]]
        tokens = [token for page in run.pages for token in self._tokens[page]]
        ends = range(run.start + first + 1, run.start + count + 1)
        return np.array([logits_after(states[:end], tokens[:end]) for end in ends], np.float32)

    def read_page(self, page: int) -> np.ndarray:
        return np.array([self._cache[page], self._tokens[page]])

    def write_page(self, page: int, data: np.ndarray) -> None:
        self._cache[page], self._tokens[page] = data.tolist()


class SteppedEngine(Engine):
    """An engine without a thread: a schedule makes its passes."""

    def _wake(self) -> None:
        pass

    def step(self) -> bool:
        flight = self.plan()
        if flight is not None:
            self.compute(flight)
        return flight is not None


class HashedCopy:
    """A copy that drafts over a HashedModel's cache: its logits are the model's, now and then, and its keys and values never."""

    def __init__(self, model: HashedModel, dice: random.Random) -> None:
        self._model, self._dice = model, dice
        self.agreement = dice.choice([0.0, 0.6, 0.95])
        self.link_s = 0.0

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        self._model.between()
        nothing = np.empty((0, VOCABULARY), np.float32)
        return [self._logits(run) if wanted(index) else nothing for index, run in enumerate(runs)]

    def _logits(self, run: TokenRun) -> np.ndarray:
        cache, tokens = self._model._cache, self._model._tokens
        slots = [(run.pages[n // PAGE], n % PAGE) for n in range(run.start, run.start + len(run.token_ids))]
        for (page, slot), token, position in zip(
            slots, run.token_ids, range(run.start, 1 << 20), strict=False
        ):
            # What the model would write, so that a draft may come true.
            before = self._model._at(run.pages, position - 1) if position else 1
            cache[page][slot] = state_of(before, token, False)
            tokens[page][slot] = token
        logits = self._model._logits(run)
        if self._dice.random() > self.agreement:
            logits = logits[:, ::-1] if self._dice.random() < 0.9 else np.full_like(logits, np.nan)
            for page, slot in slots:
                cache[page][slot] = self._dice.randrange(99)
        return logits

    def close(self) -> None:
        pass


class Guesses:
    """Drafts of all lengths, right and wrong."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.promise = dice.random()

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        return [self._dice.randrange(VOCABULARY) for _ in range(self._dice.randint(0, most))]

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        assert 0 <= accepted <= drafted


class FailingError(Exception):
    """A pass that does not come to its end."""


class Client:
    """One conversation: what it does is drawn beforehand; what it sees is noted, for the same client to be played alone."""

    def __init__(self, dice: random.Random, capacity: int) -> None:
        self.turns: list[dict[str, Any]] = []
        beginning = BEGINNINGS[dice.random() < 0.3]
        for number in range(dice.randint(1, 3)):
            shared = beginning[: dice.randint(0, len(beginning))] if number == 0 else []
            self.turns.append(
                {
                    "text": shared + [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 9))],
                    "new": dice.randint(1, 9),
                    "params": SamplingParams(**(vars(DICE) | {"seed": dice.randrange(99)}))
                    if dice.random() < 0.3
                    else GREEDY,
                    "stop": frozenset([dice.randrange(VOCABULARY)] if dice.random() < 0.3 else []),
                    "cancel": dice.randint(0, 6) if dice.random() < 0.3 else None,  # after so many tokens
                    "cut": dice.random() if dice.random() < 0.3 else None,  # how much of the text stays
                    "ahead": dice.choice([None, 1, 2, 8]),
                }
            )
        self.background = dice.random() < 0.3
        self.sleeps = dice.random() < 0.1  # takes nothing of its answers before all others are done
        self.said: list[list[int]] = []  # of each turn
        self.stopped: list[bool] = []  # whether the turn ended before its answer did
        self.text: Text | None = None
        self.answer: Answer | None = None
        self.turn = 0

    @property
    def done(self) -> bool:
        return self.turn == len(self.turns) and self.answer is None

    def begin(self, engine: Engine, drafter: Guesses | None) -> None:
        if self.text is None:
            self.text = Text(engine, drafter, self.background)
        turn = self.turns[self.turn]
        most = self.text.capacity - self.text.position
        self.text.extend(turn["text"][:most])
        self.said.append([])
        self.stopped.append(False)
        self.answer = self.text.begin(turn["params"], turn["new"], turn["stop"], ahead=turn["ahead"])
        self.turn += 1

    def take(self, stop_after: int | None) -> None:
        """Take what is there; end the turn where it ends, or after so many tokens."""
        assert self.answer is not None
        job = self.answer._job
        while job.out and (stop_after is None or len(self.said[-1]) < stop_after):
            self.said[-1].append(next(self.answer))
        if stop_after is not None and len(self.said[-1]) >= stop_after:
            self.stop()
        elif job.done and not job.out:
            self.stopped[-1] = job.error is not None
            with suppress(FailingError):
                assert next(self.answer, None) is None, "a token after the last"
            self.finish()

    def stop(self) -> None:
        self.stopped[-1] = True
        self.finish()

    def finish(self) -> None:
        assert self.answer is not None and self.text is not None
        self.answer.close()
        self.answer = None
        cut = self.turns[self.turn - 1]["cut"]
        if cut is not None:
            self.text.truncate(int(cut * self.text.position))


class Reader:
    """Somebody who wants the logits of a whole text, as moss-jt eval does, and they are compared with those of the text alone; or
    only that it is read ahead."""

    def __init__(self, dice: random.Random, capacity: int) -> None:
        self.scored = dice.random() < 0.6
        count = dice.randint(1, capacity)
        self.token_ids = [dice.randrange(VOCABULARY) for _ in range(count)]
        if not self.scored:
            self.token_ids = (BEGINNINGS[0] * 2)[: max(2, min(count, capacity))]
        self.background = dice.random() < 0.5
        self.rows: list[list[float]] = []
        self.done = False
        self._job: Job | None = None
        self._text: Text | None = None

    def act(self, engine: Engine) -> None:
        """Ask for them, or take what is there."""
        if self._job is None or self._text is None:
            self._text = Text(engine, background=self.background)
            self._text.extend(self.token_ids)
            self._job = self._text._new_job(len(self.token_ids) - (not self.scored))
            self._job.scored, self._job.ahead = self.scored, 1
            self._text._do(self._job)
        with suppress(FailingError):
            while self._job.out:
                taken = engine.take(self._job)
                assert taken is not None and taken[0] == len(self.rows)
                self.rows += taken[1].tolist()
            if self._job.done:
                assert engine.take(self._job) is None
                assert len(self.rows) == len(self.token_ids) * self.scored
        if self._job.done:
            self._text._end(self._job)
            self._text, self.done = None, True


class Alone:
    """A text, its keys and values, and what follows it, from the model's definition: nobody else, no pages, no passes, no drafts.

    Args:
        whole_pages: a pass has room for a whole page; otherwise all comes token by token.
    """

    def __init__(self, whole_pages: bool) -> None:
        self._whole_pages = whole_pages
        self.tokens: list[int] = []
        self._ways: list[bool] = []  # of each page, whether it is computed as a whole
        self._states: list[int] = []

    def give(self, most: int) -> None:
        """Text was added that is read up to a token: pages that it fills before that one are whole, the last token's never is."""
        known = len(self._ways)
        self._ways += [self._whole_pages and (page + 1) * PAGE <= most for page in range(known, self._pages)]
        self._states.clear()

    def leave_last(self) -> None:
        """The text is to be continued: its last token's page comes token by token."""
        self._ways[-1] = False

    @property
    def _pages(self) -> int:
        return -(-len(self.tokens) // PAGE)

    def add(self, token: int) -> None:
        """The model has written this token."""
        self.tokens.append(token)
        self._ways += [False] * (self._pages - len(self._ways))

    def cut(self, length: int) -> None:
        """A whole page that is cut is one no longer."""
        del self.tokens[length:]
        del self._ways[self._pages :]
        if length % PAGE and self._ways and self._ways[-1]:
            del self._ways[-1]

    def logits(self, length: int) -> list[float]:
        """After so many tokens."""
        for position in range(len(self._states), length):
            before = self._states[-1] if position else 1
            self._states.append(state_of(before, self.tokens[position], self._ways[position // PAGE]))
        return logits_after(self._states[:length], self.tokens[:length])


def told_alone(client: Client, capacity: int, whole_pages: bool) -> list[list[int]]:
    """What the same client is told with nobody beside it."""
    alone, told = Alone(whole_pages), []
    for turn, said, stopped in zip(client.turns, client.said, client.stopped, strict=False):
        alone.tokens += turn["text"][: capacity - len(alone.tokens)]
        answer: list[int] = []
        told.append(answer)
        if len(alone.tokens) < capacity:
            alone.give(len(alone.tokens) - 1)
            alone.leave_last()
            sampler = None if turn["params"].greedy else Sampler(turn["params"], alone.tokens)
            most = min(turn["new"], capacity - len(alone.tokens), len(said) if stopped else capacity)
            while len(answer) < most and not (answer and answer[-1] in turn["stop"]):
                logits = alone.logits(len(alone.tokens))
                if sampler is None:
                    answer.append(logits.index(max(logits)))
                else:
                    answer.append(sampler.choose(np.array(logits, np.float32)))
                    sampler.add(answer[-1])
                alone.add(answer[-1])
        if turn["cut"] is not None:
            alone.cut(int(turn["cut"] * len(alone.tokens)))
    return told


def logits_alone(token_ids: list[int], whole_pages: bool) -> list[list[float]]:
    alone = Alone(whole_pages)
    alone.tokens += token_ids
    alone.give(len(token_ids))
    return np.array([alone.logits(end + 1) for end in range(len(token_ids))], np.float32).tolist()


class Disk:
    """A moss_jt.engine.idle_page_file.PageFile whose disk may be full, and may not give back what it was given."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._faults = dice.choice([0.0, 0.0, 0.1])
        self.pages: dict[int, np.ndarray] = {}
        self._count = 0

    def write(self, page: np.ndarray) -> int | None:
        if self._dice.random() < self._faults:
            return None
        self._count += 1
        self.pages[self._count] = page.copy()
        return self._count

    def read(self, record: int, page: np.ndarray) -> bool:
        if self._dice.random() < self._faults:
            return False
        page[...] = self.pages[record]
        return True

    def free(self, records: list[int]) -> None:
        for record in records:
            del self.pages[record]

    def close(self) -> None:
        pass


def run_schedule(seed: int) -> None:
    """One random schedule; raises AssertionError where a promise is broken."""
    dice = random.Random(seed)
    capacity = dice.choice([7, 16, 30, 44])
    pages = -(-capacity // PAGE) + dice.randint(0, 10)
    pass_tokens, logit_rows = dice.choice([1, 3, 4, 5, 9, 40]), dice.randint(1, 6)
    model = HashedModel(pages, capacity, pass_tokens, logit_rows)
    copy = None
    if dice.random() < 0.4:
        pace = DraftPace(dice.choice([0.0001, 1.0]), 0.0, dice.choice([0.00001, 0.01]))
        copy = DraftCopy(HashedCopy(model, dice), pace, dice.randint(1, 6), dice.random() < 0.5)
    own = SteppedEngine(model, copy=copy)
    disk = Disk(dice) if dice.random() < 0.7 else None
    own._users.file = disk  # type: ignore[assignment]
    clients = [Client(dice, capacity) for _ in range(dice.randint(1, 7))]
    readers = [Reader(dice, capacity) for _ in range(dice.choice([0, 0, 0, 1, 2]))]
    drafter = Guesses(dice) if dice.random() < 0.6 else None
    failures = planned = dice.choice([0, 0, 0, 2])
    busy = dice.choice([0.2, 0.6, 1.0])  # how often a client does something between two passes

    def act() -> None:
        for client in clients:
            asleep = client.sleeps and not all(one.done or one.sleeps for one in clients)
            if dice.random() > busy or (asleep and client.answer is not None):
                continue
            if client.answer is None and client.turn < len(client.turns):
                client.begin(own, drafter)
            elif client.answer is not None:
                client.take(client.turns[client.turn - 1]["cancel"])

        for reader in readers:
            if not reader.done and dice.random() < busy:
                reader.act(own)

    def between() -> None:
        nonlocal failures
        for client in clients:
            if client.answer is not None and client.turns[client.turn - 1]["cancel"] is not None:
                if dice.random() < 0.1:
                    client.stop()
        if dice.random() < 0.2:
            act()
        if failures and dice.random() < 0.05:
            failures -= 1
            raise FailingError

    model.between = between
    for _ in range(4000):
        act()
        own.step()
        for client in clients:
            if client.done and dice.random() < 0.3:
                client.text = None  # its sequence is gone
        if all(one.done for one in [*clients, *readers]):
            break
    assert all(one.done for one in [*clients, *readers]), "somebody starves"
    whole_pages = pass_tokens >= PAGE
    for reader in readers:
        alone = logits_alone(reader.token_ids, whole_pages)
        assert reader.rows == alone[: len(reader.rows)], "a text's logits depend on others"
    for client in clients:
        assert client.said == told_alone(client, capacity, whole_pages), "an answer depends on the others"
        client.text = None
    if failures < planned:
        gc.collect()  # an error's traceback refers to all that it came through
    assert own.plan() is None and not own._users.jobs and not own._users._texts
    assert own.pool.free == pages and not any(own.pool.users(page) for page in range(pages)), "pages leak"
    assert disk is None or not disk.pages, "pages on the disk leak"


def run_schedules(seeds: Iterable[int]) -> None:
    """Schedules one after another; the seed of one that breaks a promise is told."""
    with ExitStack() as stack:
        gc.freeze()  # what was there before need not be looked at by every collection
        stack.callback(gc.unfreeze)
        for module in (engine, cached_text, kept_pages, next_pass, pace):
            stack.enter_context(mock.patch.object(module, "PAGE", PAGE))
        for seed in seeds:
            try:
                run_schedule(seed)
            except BaseException as error:
                error.add_note(f"in the schedule of seed {seed}")
                raise
