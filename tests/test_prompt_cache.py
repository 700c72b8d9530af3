"""What was read of a beginning is kept beside the model: the same bits, whatever happens to the files."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.engine import prompt_cache as prompt_cache_module
from moss_jt.engine.cache_identity import FOLDER, key_of, prompt_cache, prompt_cache_bytes
from moss_jt.engine.engine import Engine
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE
from moss_jt.moss import Moss
from moss_jt.store.model_folder import open_store
from tests.support.models import tiny_model_folder
from tests.support.scripted_model import ScriptedModel, dice

ROOT = Path(__file__).resolve().parents[1]
NAMES = [bytes([number]) * 16 for number in range(8)]
GREEDY = SamplingParams(temperature=0)


def pieces(seed: int, count: int = 6) -> list[np.ndarray]:
    random_numbers = np.random.default_rng(seed)
    return [random_numbers.integers(0, 1 << 16, (64, 5), np.uint16).view(np.float16) for _ in range(count)]


def empty(count: int = 6) -> list[np.ndarray]:
    return [np.empty((64, 5), np.float16) for _ in range(count)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(left.tobytes() == right.tobytes() for left, right in zip(one, other, strict=True))


def keep(cache: PromptCache, name: bytes, page: list[np.ndarray]) -> bool:
    fresh = cache.save(name, page)
    if fresh is not None:
        cache.publish(name, fresh)
    return fresh is not None


# The files.


def test_pages_come_back_under_their_names_alone(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "key", 1 << 20)
    assert keep(cache, NAMES[0], pieces(0)) and keep(cache, NAMES[1], pieces(1))
    for number in (0, 1):
        found = empty()
        assert cache.load(NAMES[number], found) and same(found, pieces(number))
    assert not cache.load(NAMES[2], empty()) and not PromptCache(tmp_path, "other", 1 << 20).has(NAMES[0])
    first, second = (tmp_path / "key" / f"{name.hex()}.page" for name in NAMES[:2])
    shutil.copy(first, second)
    assert not cache.load(NAMES[1], empty()), "another text's page"
    assert not second.exists()
    (tmp_path / "other").mkdir()
    shutil.copy(first, tmp_path / "other")
    assert not PromptCache(tmp_path, "other", 1 << 20).load(NAMES[0], empty()), "another model's page"
    assert not cache.load(NAMES[0], empty(5)), "a page of another shape"


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "key", 1 << 20)
    small = [np.arange(6, dtype=np.float16), np.arange(4, dtype=np.float16)]
    keep(cache, NAMES[0], small)
    path = tmp_path / "key" / f"{NAMES[0].hex()}.page"
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (0, 7):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            assert not cache.load(NAMES[0], [np.empty_like(piece) for piece in small]), place
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert not cache.load(NAMES[0], [np.empty_like(piece) for piece in small]), length
    path.write_bytes(data)
    found = [np.empty_like(piece) for piece in small]
    assert cache.load(NAMES[0], found) and same(found, small)


def test_the_limit_holds_and_those_used_longest_ago_go(tmp_path: Path) -> None:
    page_bytes = sum(piece.nbytes for piece in pieces(0)) + 100
    cache = PromptCache(tmp_path, "key", 4 * page_bytes)
    for number in range(4):
        assert keep(cache, NAMES[number], pieces(number))
        cache.touch(NAMES[: number + 1])
    assert not keep(cache, NAMES[7], pieces(0, 100)), "larger than all of it"
    assert keep(PromptCache(tmp_path, "another key", 4 * page_bytes), NAMES[4], pieces(4))
    assert [cache.has(name) for name in NAMES[:4]] == [True, True, True, False], (
        "the end of a text before its beginning"
    )
    cache.touch([NAMES[1], NAMES[2]])
    assert keep(cache, NAMES[5], pieces(5))
    assert [cache.has(name) for name in NAMES[:6]] == [False, True, True, False, False, True]
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.page")]
    assert sum(sizes) <= 4 * page_bytes and len(sizes) == 4


def test_what_a_kill_left_goes_in_time(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "key", 1 << 20)
    keep(cache, NAMES[0], pieces(0))
    old, young = tmp_path / "key" / "a.new", tmp_path / "key" / "b.new"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    keep(cache, NAMES[1], pieces(1))
    assert not old.exists() and young.exists()


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache(tmp_path, "key", 1 << 20)
    written, room = 0, 0
    write = os.writev

    def full(descriptor: int, buffers: Any) -> int:
        nonlocal written
        if written >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, [bytes(buffers[0])[: room - written]])
        written += count
        return count

    monkeypatch.setattr(os, "writev", full)
    for limit in (0, 1, 640, 1000, 3839, 3890):
        written, room = 0, limit
        assert not keep(cache, NAMES[0], pieces(0)) and not [*tmp_path.rglob("*.*")]
    room = 1 << 20
    assert (
        keep(cache, NAMES[0], pieces(0)) and cache.load(NAMES[0], found := empty()) and same(found, pieces(0))
    )
    monkeypatch.undo()
    monkeypatch.setattr(prompt_cache_module, "SPARE_BYTES", 1 << 60)
    assert not keep(cache, NAMES[1], pieces(1)), "others need the disk, too"


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PromptCache(tmp_path / "file", "key", 1 << 20)
    assert (
        not keep(cache, NAMES[0], pieces(0)) and not cache.load(NAMES[0], empty()) and not cache.has(NAMES[0])
    )
    cache.touch(NAMES)


# The engine.


class PagedModel(ScriptedModel):
    """Its pages are memory of its own; ``slow`` is waited for before a page's memory is given out."""

    def page_views(self, page: int) -> list[np.ndarray]:
        return [self._cache[page, :32], self._cache[page, 32:]]


class FarModel(ScriptedModel):
    """Its pages lie where the host cannot reach them."""

    def page_views(self, page: int) -> None:
        return None


def told(
    model: ScriptedModel, cache: PromptCache | None, text: list[int], keep_first: int
) -> tuple[list[int], int]:
    """An answer to the text, and how many tokens were computed for it."""
    engine = Engine(model, prompts=cache)
    sequence = Sequence(engine)
    sequence.extend(text)
    sequence.keep_beginning(keep_first)
    answer = [*sequence.decode(GREEDY, 5)]
    engine.close()
    return answer, sum(len(tokens) for _, tokens, _ in model.passes)


@pytest.mark.parametrize("kind", [PagedModel, FarModel])
def test_a_beginning_is_computed_once(tmp_path: Path, kind: type[ScriptedModel]) -> None:
    text = [number * number % 50 for number in range(300)]

    def answer(last: int, cached: bool = True, keep_first: int = 284) -> tuple[list[int], int]:
        cache = PromptCache(tmp_path, "key", 1 << 20) if cached else None
        return told(kind(dice, 512, 128), cache, [*text, last], keep_first)

    assert answer(1) == answer(1, cached=False)
    assert len([*tmp_path.rglob("*.page")]) == 284 // PAGE
    (first, computed), (expected, all_of_it) = answer(2), answer(2, cached=False)
    assert first == expected and computed == all_of_it - 284 // PAGE * PAGE
    for path in tmp_path.rglob("*.page"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    assert answer(3) == answer(3, cached=False), "damage is computed anew"
    assert answer(4)[1] == all_of_it - 284 // PAGE * PAGE, "and kept again"


def test_all_of_a_text_may_be_there(tmp_path: Path) -> None:
    """Nothing is left to be computed then, and who waits is told."""
    for _ in range(2):
        engine = Engine(PagedModel(dice, 256, 64), prompts=PromptCache(tmp_path, "key", 1 << 20))
        for _ in range(2):
            sequence = Sequence(engine)
            sequence.extend(range(2 * PAGE + 1))  # type: ignore[arg-type]
            sequence.keep_beginning(2 * PAGE)
            sequence.prefill()
            assert sequence.unread == 1
        engine.close()


def test_a_conversation_is_kept_with_all_that_was_written_token_by_token(tmp_path: Path) -> None:
    """Given again in the ways in which it came to be, it is the same, with the pages and without them."""

    def engine_with(cached: bool) -> tuple[Engine, PagedModel]:
        model = PagedModel(dice, 512, 64)
        return Engine(model, prompts=PromptCache(tmp_path, "key", 1 << 20) if cached else None), model

    engine, model = engine_with(True)
    sequence = Sequence(engine)
    sequence.extend([number % 50 for number in range(100)])
    written = [*sequence.decode(GREEDY, 90)]
    sequence.extend([number % 7 for number in range(150)])
    written += sequence.decode(GREEDY, 3)
    ways, text = sequence.ways, [*sequence.token_ids]
    assert ways == [True, False, False, True, True, False]
    sequence.keep()
    going_on = [*sequence.decode(GREEDY, 40)]
    engine.close()
    computed = []
    for cached in (True, False):
        engine, model = engine_with(cached)
        again = Sequence(engine)
        again.extend(text)
        again.begin_as(ways)
        assert [*again.decode(GREEDY, 40)] == going_on and again.ways[:6] == ways
        engine.close()
        computed.append([sum(len(tokens) for _, tokens, _ in model.passes), model.passes[0][0]])
    full = len(text) // PAGE * PAGE
    assert computed == [[len(text) - full + 39, full], [len(text) + 39, 0]]


def test_a_page_that_changes_while_it_is_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(tmp_path, "key", 1 << 20)
    engine = Engine(PagedModel(dice, 512, 64), prompts=cache)
    sequence = Sequence(engine)
    sequence.extend([1, 2, 3])
    assert len([*sequence.decode(GREEDY, 130)]) == 130
    saving, go_on = threading.Event(), threading.Event()
    save = PromptCache.save

    def slow(self: PromptCache, name: bytes, views: Any) -> Path | None:
        saving.set()
        assert go_on.wait(30)
        return save(self, name, views)

    monkeypatch.setattr(PromptCache, "save", slow)
    sequence.keep()
    assert saving.wait(30)
    sequence.truncate(40)
    sequence.extend([7] * 60)
    assert len([*sequence.decode(GREEDY, 3)]) == 3
    go_on.set()
    engine.close()
    assert not [*tmp_path.rglob("*.page")] and not [*tmp_path.rglob("*.new")]


# Real models.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(tiny_model_folder(), tmp_path / "model", ignore=shutil.ignore_patterns(FOLDER))
    )


def chat_answer(folder: Path, limit: str, message: str, **loading: Any) -> tuple[list[str], np.ndarray, int]:
    """What is said to a message in a chat, the first page of the cache, and how many tokens were computed."""
    with Moss.load(folder, memory="4GiB", prompt_cache=limit, **loading) as moss:
        computed = 0
        forward = moss.model.forward_many

        def counting(given: Any, wanted: Any) -> Any:
            nonlocal computed
            computed += sum(len(piece.token_ids) for piece in given)
            return forward(given, wanted)

        moss.model.forward_many = counting  # type: ignore[method-assign]
        events = [str(event) for event in moss.chat(["calculator"], temperature=0).send(message)]
        views = moss.model.page_views(0) or []
        return events, np.concatenate([view.reshape(-1).view(np.uint8) for view in views]), computed


def test_the_same_bits_with_and_without(folder: Path) -> None:
    without = chat_answer(folder, "0", "What is 12 plus 30?")
    assert not (folder / FOLDER).exists()
    first = chat_answer(folder, "64MiB", "What is 37 times 48?")
    kept = sorted((folder / FOLDER).rglob("*.page"))
    assert len(kept) == 4 and first[0] != without[0]
    again = chat_answer(folder, "64MiB", "What is 12 plus 30?")
    assert again[0] == without[0] and np.array_equal(again[1], without[1])
    assert again[2] == without[2] - 4 * PAGE
    assert sorted((folder / FOLDER).rglob("*.page")) == kept


def test_each_level_and_model_has_pages_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(folder)
    keys = {key_of(store, "cpu 512"), key_of(store, "cpu 256")}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    keys.add(key_of(store, "cpu 512"))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    keys.add(key_of(open_store(folder), "cpu 512"))
    assert len(keys) == 4
    assert prompt_cache(store, "x", 0) is None
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("moss_jt.engine.cache_identity.is_writable", lambda path: False)
    elsewhere = prompt_cache(store, "x", 1 << 20)
    assert elsewhere is not None and keep(elsewhere, NAMES[0], pieces(0))
    assert [*(tmp_path / "home" / FOLDER).rglob("*.page")] and not (folder / FOLDER).exists()


def test_amounts() -> None:
    assert prompt_cache_bytes("2GiB") == 2 << 30 and prompt_cache_bytes(0) == 0 == prompt_cache_bytes(" 0 ")
    for amount in ("20%", "many", "-1", "3"):
        with pytest.raises(MossError):
            prompt_cache_bytes(amount)


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[list[str], np.ndarray]]:
    events, page, _ = chat_answer(tiny_model_folder(), "0", "What is 12 plus 30?")
    yield events, page


def killed_chats(folder: Path, seconds: list[float], expected: tuple[list[str], np.ndarray]) -> None:
    """Processes that write the cache, two at a time, and are killed; what is said afterwards is as without a cache."""
    script = f"""
import itertools
from pathlib import Path
from moss_jt.moss import Moss
moss = Moss.load({str(folder)!r}, memory="4GiB", prompt_cache="64MiB")
for number in itertools.count():
    chat = moss.chat(["calculator"], temperature=0, system="word " * (50 + number % 40))
    list(chat.send("hi"))
    print(number, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wait in seconds:
        running = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(wait)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        assert [*(folder / FOLDER).rglob("*.*")], "nothing was written that a kill could meet"
        events, page, _ = chat_answer(folder, "64MiB", "What is 12 plus 30?")
        assert events == expected[0] and np.array_equal(page, expected[1])


def test_kills_cost_no_word(folder: Path, expected: tuple[list[str], np.ndarray]) -> None:
    killed_chats(folder, [0.2], expected)


def writing_until_killed(folder: Path, seconds: float) -> None:
    """A process that writes pages, until it is killed: every file that has a page's name is whole."""
    script = f"""
import itertools
from pathlib import Path
from tests.test_prompt_cache import NAMES, keep, pieces
from moss_jt.engine.prompt_cache import PromptCache
cache = PromptCache(Path({str(folder)!r}), "key", 20000)
print("ready", flush=True)
for number in itertools.count():
    keep(cache, NAMES[number % 8], pieces(number % 8))
    if number == 8: print("written", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(seconds)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    cache = PromptCache(folder, "key", 20000)
    for number, name in enumerate(NAMES):
        if cache.has(name):
            found = empty()
            assert cache.load(name, found) and same(found, pieces(number))


@pytest.mark.long
def test_two_hundred_kills(tmp_path: Path, folder: Path, expected: tuple[list[str], np.ndarray]) -> None:
    random_numbers = random.Random(4)
    for _ in range(180):
        writing_until_killed(tmp_path / "cache", random_numbers.random() * 0.2)
    killed_chats(folder, [random_numbers.random() for _ in range(20)], expected)


@pytest.mark.long
def test_flipped_bytes_in_a_real_models_pages(folder: Path, expected: tuple[list[str], np.ndarray]) -> None:
    random_numbers = random.Random(5)
    chat_answer(folder, "64MiB", "What is 12 plus 30?")
    for _ in range(100):
        paths = sorted((folder / FOLDER).rglob("*.page"))
        assert len(paths) == 4
        path = random_numbers.choice(paths)
        data = bytearray(path.read_bytes())
        data[random_numbers.randrange(len(data))] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(data)
        events, page, _ = chat_answer(folder, "64MiB", "What is 12 plus 30?")
        assert events == expected[0] and np.array_equal(page, expected[1])
