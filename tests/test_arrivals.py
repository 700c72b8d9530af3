"""Weights that stay arrive while others are computed with: in order, what is waited for first, errors where they are met."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.store.sizes import MEMORY_PAGE
from moss_jt.weights.host_units import populate
from moss_jt.weights.resident_reader import Arrivals

SIZES = {number: 10 + number for number in range(5)}


class Disk:
    """Brings a unit when it is let to, and remembers in which order."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.order: list[int] = []
        self.failing: list[int] = []

    def __call__(self, number: int, unwanted: Callable[[], bool]) -> bool:
        self.order.append(number)
        self.begun.release()
        while not self.allowed.acquire(timeout=0.005):
            if unwanted():
                return False
        if number in self.failing:
            self.failing.remove(number)
            raise MossError(f"cannot read {number}")
        return True


def waiting(arrivals: Arrivals, number: int) -> threading.Thread:
    thread = threading.Thread(target=arrivals.wait, args=(number,), daemon=True)
    thread.start()
    return thread


def test_they_come_in_order_and_what_is_waited_for_comes_first() -> None:
    disk = Disk()
    arrivals = Arrivals(SIZES, disk)
    disk.begun.acquire()
    assert arrivals.missing_bytes == arrivals.total_bytes == sum(SIZES.values())
    thread = waiting(arrivals, 3)
    while arrivals._wanted != 3:
        pass
    disk.allowed.release(2)
    thread.join(10)
    assert disk.order[:2] == [0, 3] and arrivals.missing_bytes == SIZES[1] + SIZES[2] + SIZES[4]
    arrivals.wait(0)  # is there
    disk.allowed.release(3)
    for number in SIZES:
        arrivals.wait(number)
    assert disk.order == [0, 3, 1, 2, 4] and arrivals.missing_bytes == 0
    arrivals.close()


def test_an_error_waits_for_who_needs_it_and_coming_again_tries_again() -> None:
    disk = Disk()
    disk.failing = [1, 1]
    disk.allowed.release(10)
    arrivals = Arrivals(SIZES, disk)
    arrivals.wait(0)
    for _ in range(2):
        with pytest.raises(MossError, match="cannot read 1"):
            arrivals.wait(1)
    arrivals.wait(1)
    arrivals.wait(4)
    assert disk.order == [0, 1, 1, 1, 2, 3, 4]
    arrivals.close()


def test_others_come_after_unless_they_are_waited_for() -> None:
    first, second, third = Disk(), Disk(), Disk()
    arrivals = Arrivals(SIZES, first)
    later = Arrivals({7: 1}, second, after=arrivals)
    urgent = Arrivals({8: 1}, third, after=arrivals)
    third.allowed.release(1)
    urgent.wait(8)
    assert not second.order
    first.allowed.release(5)
    second.allowed.release(1)
    assert second.begun.acquire(timeout=10), "it begins by itself"
    later.wait(7)
    at_once = Arrivals({9: 1}, second, after=arrivals)
    second.allowed.release(1)
    at_once.wait(9)
    for one in (at_once, urgent, later, arrivals):
        one.close()


def test_closing_ends_reading_and_waiting() -> None:
    disk = Disk()
    arrivals = Arrivals(SIZES, disk)
    other = Arrivals({7: 1}, disk, after=arrivals)
    disk.begun.acquire()
    other.close()
    arrivals.close()
    assert disk.order == [0]
    with pytest.raises(MossError, match="closed"):
        arrivals.wait(2)
    with pytest.raises(MossError, match="closed"):
        other.wait(7)


def test_pages_of_a_map_are_there_and_a_shorter_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 16 * 40)
    memory = np.memmap(path, np.uint8, "r", 100, 39 * MEMORY_PAGE).view(np.ndarray)
    assert populate(memory, path, lambda: False) and memory[156] == 0
    assert not populate(memory, path, lambda: True)
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (5, 14):
        return  # the system cannot say so; the operators do (lost_file.h)
    os.truncate(path, 3 * MEMORY_PAGE)
    with pytest.raises(MossError, match="ends early: it became shorter while it was in use"):
        populate(memory, path, lambda: False)
