"""The ring of buffers: right contents in any order of use, and a clear end after every fault. No model, no Jittor."""

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.store.sizes import MEMORY_PAGE
from moss_jt.weights import file_reader
from moss_jt.weights.disk_ring import Ring
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.parallel_read import library, read_side_by_side

UNITS = {i: Extent(Path("weights"), i * MEMORY_PAGE, MEMORY_PAGE) for i in range(7)}


class FakeReader:
    """Fills a buffer with the unit's number, in two halves; can be told to fail, and to wait for a go."""

    def __init__(self) -> None:
        self.fail: set[int] = set()
        self.read_units: list[int] = []
        self.closed = False
        self.go: threading.Semaphore | None = None

    def read(self, extent: Extent, target: np.ndarray, stopped: Callable[[], bool]) -> bool:
        number = extent.offset // MEMORY_PAGE
        self.read_units.append(number)
        if self.go is not None:
            while not self.go.acquire(timeout=0.01):
                if stopped():
                    return False
        if number in self.fail:
            raise MossError(f"unit {number} is unreadable.")
        target[: MEMORY_PAGE // 2] = number
        if stopped():
            return False
        target[MEMORY_PAGE // 2 :] = number
        return True

    def close(self) -> None:
        self.closed = True


def reader_threads() -> int:
    return sum(thread.name == "moss-jt reader" for thread in threading.enumerate())


@pytest.mark.parametrize("buffers", [2, 3])
def test_passes_in_order_read_every_unit_once_per_pass(buffers: int) -> None:
    reader = FakeReader()
    ring = Ring(UNITS, buffers, MEMORY_PAGE, reader)
    for _ in range(5):
        for number in range(7):
            assert (ring.buffers[ring.take(number)] == number).all()
    ring.close()
    ahead = len(reader.read_units) - 35
    assert 0 <= ahead <= buffers
    assert reader.read_units == [i % 7 for i in range(35 + ahead)]
    assert reader.closed and reader_threads() == 0


@pytest.mark.parametrize("how", ["take", "hand_back"])
def test_a_buffer_is_being_filled_before_the_consumer_goes_on(how: str) -> None:
    """The consumer computes in operators that hold Python's lock: who has not begun to read by then, leaves the disk idle."""
    reader = FakeReader()
    reader.go = threading.Semaphore(2)
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    ring.take(0)
    while not ring.is_ready(1):
        time.sleep(0.001)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the lock is let go of only by who waits
    try:
        if how == "take":
            ring.take(1)
        else:
            ring.hand_back()
        begun = list(reader.read_units)
    finally:
        sys.setswitchinterval(interval)
    ring.close()
    assert begun == [0, 1, 2]


def test_any_order_of_use_gives_the_right_unit_and_leaves_it_alone() -> None:
    """Interrupted passes, left-out units, turns, starts over: what was taken is right and stays until the next take."""
    choose = random.Random(7)
    ring = Ring(UNITS, 2, MEMORY_PAGE, FakeReader())
    unit = 0
    for _ in range(2000):
        if choose.random() < 0.2:
            ring.walk(choose.choice([range(5), range(7), range(6, -1, -1), [1, 3, 9]]))
        after = (unit + 1) % 7
        unit = choose.choice([unit, 0, choose.randrange(7), after, after, after])
        contents = ring.buffers[ring.take(unit)]
        assert (contents == unit).all()
        if choose.random() < 0.1:
            ring.hand_back()
    ring.close()


def test_passes_without_the_last_units_do_not_read_them() -> None:
    reader = FakeReader()
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    ring.walk(range(5))
    for _ in range(4):
        for number in range(5):
            ring.take(number)
    ring.close()
    assert 5 not in reader.read_units and 6 not in reader.read_units


def test_forwards_and_backwards_in_turn_nothing_is_read_that_was_not_asked_for() -> None:
    """As training walks. What is read ahead at a turn is a guess, and at most as many units as there are buffers."""
    reader = FakeReader()
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    for order in (range(7), range(6, -1, -1)) * 3:
        ring.walk(order)
        for number in order:
            assert (ring.buffers[ring.take(number)] == number).all()
        ring.hand_back()
    ring.close()
    assert 6 * 7 <= len(reader.read_units) <= 6 * (7 + 3)


def test_a_read_error_reaches_the_consumer_and_a_second_try_can_succeed() -> None:
    reader = FakeReader()
    reader.fail = {2}
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    assert ring.take(0) is not None and ring.take(1) is not None
    with pytest.raises(MossError, match="unit 2"):
        ring.take(2)
    with pytest.raises(MossError, match="unit 2"):
        ring.take(2)
    assert (ring.buffers[ring.take(5)] == 5).all(), "another unit is not spoiled by the error"
    reader.fail = set()
    assert (ring.buffers[ring.take(2)] == 2).all()
    ring.close()


def test_closing_while_a_read_waits_ends_the_thread() -> None:
    reader = FakeReader()
    reader.go = threading.Semaphore(0)
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    ring.close()
    assert reader_threads() == 0 and reader.closed
    with pytest.raises(MossError, match="closed"):
        ring.take(0)


def test_an_interruption_while_waiting_leaves_the_ring_usable() -> None:
    """Ctrl-C in the consumer's wait: the next pass begins at the first unit and gets it."""
    reader = FakeReader()
    reader.go = threading.Semaphore(2)
    ring = Ring(UNITS, 2, MEMORY_PAGE, reader)
    ring.take(0)
    ring.take(1)
    interrupted = threading.Event()
    original = ring._changed.wait

    def interrupt(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return original(timeout)

    ring._changed.wait = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ring.take(2)
    reader.go.release(100)
    for number in (0, 1, 2):
        assert (ring.buffers[ring.take(number)] == number).all()
    ring.close()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.arange(5 * MEMORY_PAGE + 100, dtype=np.uint64).tobytes())
    return path


def never() -> bool:
    return False


@pytest.mark.parametrize("keep_cached", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_the_reader_gives_the_file_s_bytes(weights: Path, direct: bool, keep_cached: bool) -> None:
    reader = FileReader(direct, 1e9)
    reader.request_bytes = 2 * MEMORY_PAGE
    contents = weights.read_bytes()
    for offset, n_bytes in (
        (0, MEMORY_PAGE),
        (MEMORY_PAGE, 3 * MEMORY_PAGE),
        (2 * MEMORY_PAGE, len(contents) - 2 * MEMORY_PAGE),
    ):
        target = page_buffer(n_bytes + 5 * MEMORY_PAGE)
        try:
            assert reader.read(Extent(weights, offset, n_bytes, keep_cached), target, never)
        except MossError as error:
            if direct and "Invalid argument" in str(error):
                pytest.skip("this file system has no direct reads")
            raise
        assert target[:n_bytes].tobytes() == contents[offset : offset + n_bytes]
        assert not target[n_bytes + MEMORY_PAGE :].any(), "nothing is read beyond the extent's last page"
    reader.close()


@pytest.mark.parametrize("direct", [False, True])
def test_several_reads_at_once_give_the_same_bytes(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shares are uneven, a request begins within the file, and the file ends within its last page."""
    if library() is None:
        pytest.skip("this C library has no reads of its own threads")
    monkeypatch.setattr(file_reader, "LEAST_SHARE", MEMORY_PAGE)
    path = tmp_path / "weights"
    contents = np.random.default_rng(0).bytes(23 * MEMORY_PAGE + 100)
    path.write_bytes(contents)
    reader = FileReader(direct, 1e9, in_flight=4)
    reader.request_bytes = 9 * MEMORY_PAGE
    for start, n_bytes in (
        (0, 23 * MEMORY_PAGE),
        (MEMORY_PAGE, 22 * MEMORY_PAGE + 100),
        (0, 5 * MEMORY_PAGE),
    ):
        target = page_buffer(n_bytes + MEMORY_PAGE)
        try:
            assert reader.read(Extent(path, start, n_bytes), target, never)
        except MossError as error:
            if direct and "Invalid argument" in str(error):
                pytest.skip("this file system has no direct reads")
            raise
        assert target[:n_bytes].tobytes() == contents[start : start + n_bytes]
    os.truncate(path, 7 * MEMORY_PAGE)
    with pytest.raises(MossError, match=r"ends early: it has 28672 bytes, 94208 are needed"):
        reader.read(Extent(path, 0, 23 * MEMORY_PAGE), page_buffer(23 * MEMORY_PAGE), never)
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_side_by_side([9999, 9998], page_buffer(2 * MEMORY_PAGE).data, 0)


def test_a_file_that_shrinks_is_named_and_one_deleted_is_still_read(weights: Path) -> None:
    reader = FileReader(False, 1e9)
    target = page_buffer(8 * MEMORY_PAGE)
    extent = Extent(weights, 0, 8 * MEMORY_PAGE)
    assert reader.read(extent, target, never)
    os.truncate(weights, 3 * MEMORY_PAGE)
    with pytest.raises(MossError, match=r"weights ends early: it has 12288 bytes, 32768 are needed"):
        reader.read(extent, target, never)
    weights.unlink()
    assert reader.read(Extent(weights, 0, 3 * MEMORY_PAGE), target, never)
    reader.close()
    with pytest.raises(MossError, match="No such file"):
        reader.read(extent, target, never)
    reader.close()


def test_a_disk_s_error_is_told(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    reader = FileReader(False, 1e9)
    with pytest.raises(MossError, match="cannot read .*weights: Input/output error"):
        reader.read(Extent(weights, 0, MEMORY_PAGE), page_buffer(MEMORY_PAGE), never)
    reader.close()


def test_a_stop_between_requests_is_obeyed(weights: Path) -> None:
    reader = FileReader(False, 1e9)
    reader.request_bytes = MEMORY_PAGE
    answers = iter([False, False, True])
    assert not reader.read(
        Extent(weights, 0, 5 * MEMORY_PAGE), page_buffer(5 * MEMORY_PAGE), lambda: next(answers)
    )
    reader.close()
