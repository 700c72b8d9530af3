"""The engine: what many sequences are told is what each is told alone, whoever comes, goes, fails or finds no room."""

import gc
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.engine.engine import Engine
from moss_jt.engine.generate import Generation
from moss_jt.engine.idle_page_file import PageFile
from moss_jt.engine.job import Job
from moss_jt.engine.pace import Pace
from moss_jt.engine.pages import PagePool, beginning_of
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Answer
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE
from tests.support.schedules import run_schedules
from tests.support.scripted_model import ScriptedModel, count_up, dice

GREEDY = SamplingParams(temperature=0)
LONG_RUN = 1_000_000


def test_random_schedules() -> None:
    run_schedules(range(1500))


@pytest.mark.long
@pytest.mark.parametrize("part", range(100))
def test_a_million_random_schedules(part: int) -> None:
    run_schedules(range(part * LONG_RUN // 100, (part + 1) * LONG_RUN // 100))


def test_who_cancels_before_the_job_has_come_leaves_none_behind() -> None:
    """Between an answer's beginning and its place in the queue: nobody would end it again, and its pages would be lost."""
    engine = Engine(ScriptedModel())
    text = Text(engine)
    text.extend([1, 2, 3])
    submit = engine.submit

    def cancelled_first(job: Job) -> None:
        cancelling = threading.Thread(target=text.cancel)
        cancelling.start()
        cancelling.join()
        submit(job)

    engine.submit = cancelled_first  # type: ignore[method-assign]
    assert list(text.decode(GREEDY, 5)) == []
    assert engine.waiting == 0 and engine.plan() is None and not engine._users.running
    engine.submit = submit  # type: ignore[method-assign]
    assert len(list(text.decode(GREEDY, 5))) == 5


def answers_of(engine: Engine, prompts: list[list[int]], new: int, params: SamplingParams) -> list[list[int]]:
    """All at once, each in a thread of its own."""
    collected: list[list[int]] = [[] for _ in prompts]

    def ask(number: int) -> None:
        text = Text(engine)
        text.extend(prompts[number])
        collected[number] = list(text.decode(params, new))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return collected


def test_threads_get_what_they_would_get_alone() -> None:
    prompts = [[number, 2, 3 + number] * (1 + number * 7) for number in range(12)]
    params = SamplingParams(seed=3)
    alone = [answers_of(Engine(ScriptedModel(dice, 400, 100)), [prompt], 20, params)[0] for prompt in prompts]
    together = Engine(ScriptedModel(dice, 400, 100, pages=12))
    assert answers_of(together, prompts, 20, params) == alone


def test_the_interpreter_s_collector_may_close_an_answer_anywhere() -> None:
    engine = Engine(ScriptedModel(pages=4))
    for number in range(40):
        text = Text(engine)
        text.extend([number])
        answer = text.begin(GREEDY, 60)
        next(answer)
        cycle = [text, answer]
        cycle.append(cycle)
        del text, answer, cycle
    gc.collect()
    text = Text(engine)
    text.extend([1])
    assert list(text.decode(GREEDY, 3)) == [2, 3, 4]


class GatedModel(ScriptedModel):
    """Its passes wait until they are let through, or until nobody wants them."""

    def __init__(self, **options: int) -> None:
        super().__init__(count_up, **options)
        self.gate = threading.Semaphore(0)
        self.entered = threading.Event()

    def forward_many(self, runs, wanted):  # type: ignore[no-untyped-def]
        self.entered.set()
        while not self.gate.acquire(timeout=0.01):
            if not any(wanted(index) for index in range(len(runs))):
                return [np.empty((0, 50), np.float32) for _ in runs]
        return super().forward_many(runs, wanted)


def test_who_wants_no_more_does_not_wait_for_the_pass() -> None:
    """A pass that would never end: it is given up, and the next one comes."""
    model = GatedModel()
    engine = Engine(model)
    text = Text(engine)
    text.extend([1])
    answer = text.begin(GREEDY, 5)
    assert model.entered.wait(10)
    answer.close()
    text.extend([7])
    for _ in range(20):
        model.gate.release()
    assert list(text.decode(GREEDY, 2)) == [8, 9]


def test_who_comes_late_joins_the_next_pass() -> None:
    model = GatedModel(pages=4)
    engine = Engine(model)
    first, second = Text(engine), Text(engine)
    first.extend([1])
    second.extend([20])
    one = first.begin(GREEDY, 6)
    model.gate.release()
    assert next(one) == 2
    assert model.entered.wait(10)
    two = second.begin(GREEDY, 6)
    while not engine._flight or len(engine._flight.parts) < 2:
        model.gate.release()
        time.sleep(0.005)
    for _ in range(50):
        model.gate.release()
    assert (list(one), list(two)) == ([3, 4, 5, 6, 7], [21, 22, 23, 24, 25, 26])
    assert len(model.passes) == 12


def test_who_finds_no_room_waits_and_is_told_its_number() -> None:
    model = GatedModel(capacity=PAGE, pages=1)
    engine = Engine(model)
    texts = [Text(engine) for _ in range(3)]
    for text in texts:
        text.extend([1])
    answers = [text.begin(GREEDY, 4) for text in texts]
    assert model.entered.wait(10)
    assert texts[0].queued is None
    waiting = [text.queued for text in texts[1:]]
    assert [job.number for job in waiting if job is not None] == [1, 2]
    assert all(job.expected_s is None for job in waiting if job is not None), "nothing was measured yet"
    model.gate.release()
    next(answers[0])
    model.entered.clear()
    model.gate.release()
    next(answers[0])
    assert model.entered.wait(10)
    place = texts[1].queued
    assert place is not None and place.expected_s is not None and place.expected_s > 0
    for _ in range(30):
        model.gate.release()
    assert [list(answer) for answer in answers] == [[4, 5], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_who_waits_is_told_how_long_those_before_may_take() -> None:
    """One page of cache: each of those before writes 20 tokens and is read in one pass; one pass takes a second."""
    model = GatedModel(capacity=PAGE, pages=1)
    engine = Engine(model)
    engine._pace.note(0, 1.0)
    texts = [Text(engine) for _ in range(4)]
    for text in texts:
        text.extend([1])
    answers = [text.begin(GREEDY, 20) for text in texts]
    assert model.entered.wait(10)
    waits = [text.queued for text in texts[1:]]
    assert [(one.number, one.expected_s) for one in waits if one is not None] == [(1, 20), (2, 41), (3, 62)]
    for answer in answers:
        answer.close()


def test_interactive_jobs_go_before_background_ones_and_these_come_to_their_turn() -> None:
    model = GatedModel(capacity=PAGE, pages=1)
    engine = Engine(model)

    def ask(token: int, background: bool) -> Answer:
        text = Text(engine, background=background)
        text.extend([token])
        return text.begin(GREEDY, 2, ahead=None)

    answers = [ask(1, False)]
    assert model.entered.wait(10)
    answers += [ask(10, True), ask(20, False)]
    for _ in range(60):
        model.gate.release()
    assert [list(answer) for answer in answers] == [[2, 3], [11, 12], [21, 22]]
    assert [tokens[0] for _, tokens, _ in model.passes] == [1, 2, 20, 21, 10, 11]


def test_an_idle_conversation_s_pages_go_to_the_disk_and_come_back(tmp_path: Path) -> None:
    """Room for one conversation, and three that take turns: what was read once is not computed again."""
    model = ScriptedModel(dice, 200, 100, pages=4)
    engine = Engine(model, tmp_path / "cache")
    texts = [Text(engine) for _ in range(3)]
    for number, text in enumerate(texts):
        text.extend([number, 5, 9] * 50)
    actual: list[list[int]] = [[] for _ in texts]
    for _, number in itertools.product(range(3), range(3)):
        actual[number] += texts[number].decode(SamplingParams(seed=1), 4)
    assert sum(len(tokens) for _, tokens, _ in model.passes) == 3 * (150 + 3 * 4) - 3
    for number in range(3):
        alone = Text(Engine(ScriptedModel(dice, 200, 100)))
        alone.extend([number, 5, 9] * 50)
        own = [token for _ in range(3) for token in alone.decode(SamplingParams(seed=1), 4)]
        assert actual[number] == own
    assert list((tmp_path / "cache").iterdir()) == [], "the file has no name"
    engine.close()


def test_beginnings_are_shared() -> None:
    """The second conversation with the same instruction reads only what is its own."""
    model = ScriptedModel(count_up, 400, 100, pages=20)
    engine = Engine(model)
    beginning = [number % 40 for number in range(2 * PAGE + 5)]
    texts = [Text(engine) for _ in range(3)]
    for number, text in enumerate(texts):
        text.extend([*beginning, number])
        assert list(text.decode(GREEDY, 2)) == [number + 1, number + 2]
    computed = sum(len(tokens) for _, tokens, _ in model.passes)
    assert computed == 2 * PAGE + 3 * 6 + 3
    assert engine.pool.free == 20 - 2 - 3


def test_two_that_begin_alike_are_read_in_one_pass() -> None:
    model = GatedModel(capacity=400, pass_tokens=200, pages=20)
    engine = Engine(model)
    texts = [Text(engine) for _ in range(2)]
    with engine.lock:
        for text in texts:
            text.extend([number % 40 for number in range(PAGE + 3)])
        answers = [text.begin(GREEDY, 1) for text in texts]
    model.gate.release()
    assert [list(answer) for answer in answers] == [[27], [27]]
    assert sorted(len(tokens) for _, tokens, _ in model.passes) == [3, 3, PAGE]


def test_logits_of_a_text_come_page_after_page() -> None:
    model = ScriptedModel(count_up, 200, 100)
    text = Text(Engine(model))
    token_ids = [number % 50 for number in range(150)]
    text.extend(token_ids)
    actual = list(text.logits())
    assert [first for first, _ in actual] == [0, 64, 128]
    rows = np.concatenate([logits for _, logits in actual])
    assert [int(row.argmax()) for row in rows] == [(token + 1) % 50 for token in token_ids]


def test_a_closed_engine_says_so() -> None:
    model = GatedModel()
    engine = Engine(model)
    text, late = Text(engine), Text(engine)
    text.extend([1])
    late.extend([1])
    answer = text.begin(GREEDY, 5)
    assert model.entered.wait(10)
    engine.close()
    engine.close()
    with pytest.raises(MossError, match="the model is closed"):
        next(answer)
    with pytest.raises(MossError, match="the model is closed"):
        next(late.decode(GREEDY, 5))


def test_an_answer_ends_when_its_time_is_over() -> None:
    class Slow(ScriptedModel):
        def forward_many(self, runs, wanted):  # type: ignore[no-untyped-def]
            time.sleep(0.02)
            return super().forward_many(runs, wanted)

    text = Text(Engine(Slow()))
    text.extend([1])
    tokens = list(text.decode(GREEDY, 60, max_time=0.1))
    assert text.stop_reason == "time" and 1 <= len(tokens) <= 6


def test_the_pool_keeps_named_pages_until_their_room_is_needed() -> None:
    pool = PagePool(2)
    page = pool.take()
    name = beginning_of(b"", [1, 2])
    pool.name(page, name)
    pool.give_back([page])
    assert pool.free == 2 and pool.share(name) == page and pool.free == 1
    pool.give_back([page])
    assert {pool.take(), pool.take()} == {0, 1} and pool.share(name) is None
    assert beginning_of(name, [3]) != beginning_of(b"", [1, 2, 3])


def test_a_full_disk_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert PageFile(tmp_path / "file").write(np.zeros(8)) is None
    file = PageFile(tmp_path)
    records = [file.write(np.full(8, value)) for value in (1.0, 2.0)]
    assert records == [0, 1]
    page = np.zeros(8)
    assert file.read(1, page) and page[0] == 2
    file.free([0])
    assert file.write(np.full(8, 3.0)) == 0
    file.close()


def test_who_waits_for_a_token_is_freed_by_who_ends_the_answer() -> None:
    """As a server does when its client goes away: the answer is closed from another thread."""
    model = GatedModel()
    text = Text(Engine(model))
    text.extend([1])
    answer = text.begin(GREEDY, 5)
    taken: list[list[int]] = []
    waiting = threading.Thread(target=lambda: taken.append(list(answer)))
    waiting.start()
    assert model.entered.wait(10)
    answer.close()
    waiting.join(10)
    assert not waiting.is_alive() and taken == [[]]
    for _ in range(20):
        model.gate.release()
    assert list(text.decode(GREEDY, 2)) == [2, 3]


def test_an_answer_that_was_begun_ends_at_its_stop_string() -> None:
    """Whether its pieces are taken at once, or only later."""

    class Letters:
        def push(self, token_id: int) -> str:
            return chr(ord("a") + token_id)

        def finish(self) -> str:
            return ""

    class Slowing(ScriptedModel):
        """Takes its time once the answer has been written: whoever takes the pieces may be slower than a scripted model."""

        def forward_many(self, *given: Any) -> list[np.ndarray]:
            if len(self.passes) > 20:
                time.sleep(0.2)
            return super().forward_many(*given)

    model = Slowing(count_up, 400, pages=8)
    text = Text(Engine(model))
    text.extend([0])
    answer = Generation(text, Letters(), GREEDY, 300, (), ["ef"], begin=True)
    assert answer.finish().text == "bcd" and answer.stats.stop_reason == "stop"
    assert text.engine.plan() is None and len(model.passes) < 300, "nothing is written that nobody wants"
    later = Text(Engine(ScriptedModel(count_up, 400, pages=8)))
    later.extend([0])
    answer = Generation(later, Letters(), GREEDY, 300, (), ["never", "ef"], begin=True, ahead=Letters())
    while not later._job or not later._job.done:
        time.sleep(0.001)
    assert later._job.tokens == [0, 1, 2, 3, 4, 5]
    assert answer.finish().text == "bcd" and answer.stats.stop_reason == "stop"


def test_what_others_had_read_ahead_is_read() -> None:
    """Whole pages, all of them shared: nothing is left to compute."""
    engine = Engine(ScriptedModel(count_up, 400, 200, pages=20))
    for _ in range(2):
        text = Text(engine)
        text.extend([number % 40 for number in range(PAGE + 1)])
        text.prefill()
        assert text.unread == 1


def test_answers_in_the_background_are_in_few_passes_that_they_make_longer() -> None:
    for seconds, shares in ((1.3, (0.9, 0.97)), (1.5, (0.2, 0.3))):
        pace, background = Pace(), []
        for _ in range(400):
            background.append(pace.takes_background())
            pace.note(0, seconds if background[-1] else 1.0, background[-1])
        assert shares[0] <= sum(background[100:]) / 300 <= shares[1]


@pytest.mark.parametrize("cost", [0.0, 0.01])
def test_who_is_waited_for_goes_before_the_background_in_every_pass(
    cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight answers in the background and one that somebody waits for, where rows cost time and where they do not."""

    class Timed(ScriptedModel):
        def forward_many(self, runs, wanted):  # type: ignore[no-untyped-def]
            clock[0] += 0.002 + cost * (len(runs) - 1)
            sizes.append(len(runs))
            return super().forward_many(runs, wanted)

    sizes: list[int] = []
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    engine = Engine(Timed(count_up, PAGE, pages=9))
    background = []
    with engine.lock:
        for number in range(8):
            text = Text(engine, background=True)
            text.extend([number])
            background.append(text.begin(GREEDY, 50, ahead=None))
        text = Text(engine)
        text.extend([9])
        answer = text.begin(GREEDY, 40, ahead=None)
    assert list(answer) == [token % 50 for token in range(10, 50)]
    alone = sum(size == 1 for size in sizes)
    assert alone >= 25 if cost else alone <= 12
    assert [list(one) for one in background] == [
        [(first + 1 + n) % 50 for n in range(50)] for first in range(8)
    ]
