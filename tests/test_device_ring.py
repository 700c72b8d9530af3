"""The order of copies, events and computations on a GPU, proven over a simulated device that works in adversarial orders."""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.kernels.interface import Queue
from moss_jt.weights.device_ring import DeviceRing
from tests.support.simulated_device import ForgetfulDevice, SimulatedDevice, Work, WrongOrder

SIZE = 8
SEEDS = range(60)


class HostUnits:
    """Unit k is SIZE times k. Those in ``passing`` lie in two buffers; one is overwritten as soon as it is handed back."""

    def __init__(self, count: int, passing: set[int], seed: int = 0) -> None:
        self.pinned = {unit: np.full(SIZE, unit) for unit in range(count) if unit not in passing}
        self.buffers = [np.full(SIZE, -1) for _ in range(2)]
        self.passing = passing
        self.fails_at: int | None = None
        self._taken: int | None = None
        self._random = random.Random(seed)

    def is_passing(self, unit: int) -> bool:
        return unit in self.passing

    def is_ready(self, unit: int) -> bool:
        if unit == self.fails_at:
            return False
        return unit not in self.passing or self._random.random() < 0.5

    def take(self, unit: int) -> np.ndarray:
        if unit not in self.passing:
            return self.pinned[unit]
        if self._taken is not None:
            self.buffers[self._taken][:] = -7
        if self.fails_at == unit:
            self._taken, self.fails_at = None, None
            raise MossError("the disk fails")
        self._taken = 0 if self._taken is None else 1 - self._taken
        self.buffers[self._taken][:] = unit
        return self.buffers[self._taken]


def compute(device: SimulatedDevice, ring: DeviceRing, unit: int) -> None:
    """Take the unit, and queue what looks whether its buffer holds it."""
    memory = ring.memories[ring.take(unit)]

    def look(part: slice) -> None:
        if not (memory[part] == unit).all():
            raise WrongOrder(f"unit {unit} is computed with {memory[part]}")

    device.compute(look, SIZE)


def run(device: SimulatedDevice, units: int, buffers: int, passing: set[int], seed: int) -> None:
    """Walks over all units, some without the last ones, some backwards, some broken off."""
    chance = random.Random(seed)
    host = HostUnits(units, passing, seed)
    ring = DeviceRing(device, host, [np.full(SIZE, -2) for _ in range(buffers)], range(units))
    for _ in range(4):
        last = chance.randrange(units) if chance.random() < 0.3 else units - 1
        broken = chance.randrange(units) if chance.random() < 0.2 else units
        if passing and chance.random() < 0.2:
            host.fails_at = chance.choice(sorted(passing))
        order = list(range(last + 1))
        if chance.random() < 0.3:
            order.reverse()
        ring.walk(order)
        try:
            for unit in order[:broken]:
                compute(device, ring, unit)
        except MossError:
            continue
        if broken == units:
            ring.hand_back()
    ring.close()
    host.buffers[0][:] = host.buffers[1][:] = -9
    device.finish()


def cases() -> Iterator[tuple[int, int, set[int], int]]:
    for seed in SEEDS:
        chance = random.Random(seed)
        units, buffers = chance.randint(1, 6), chance.randint(2, 3)
        passing = {unit for unit in range(units) if chance.random() < chance.choice([0, 0.5, 1])}
        yield units, buffers, passing, seed


ORDERS = [(favour, eager) for favour in (None, *Queue) for eager in (0.0, 0.3, 0.9)]


@pytest.mark.parametrize(("favour", "eager"), ORDERS)
def test_every_computation_sees_its_unit_in_every_order(favour: Queue | None, eager: float) -> None:
    for units, buffers, passing, seed in cases():
        run(SimulatedDevice(seed, favour, eager), units, buffers, passing, seed)


class InterruptedDevice(SimulatedDevice):
    """Now and then Ctrl-C comes right after a call has been queued, before anybody could note it."""

    chance = 0.0

    def _add(self, queue: Queue, work: Work, call: str) -> None:
        super()._add(queue, work, call)
        if self._random.random() < self.chance:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("favour", "eager"), ORDERS)
def test_an_interruption_anywhere_spoils_nothing_that_comes_after(favour: Queue | None, eager: float) -> None:
    interrupted = 0
    for units, buffers, passing, seed in cases():
        device = InterruptedDevice(seed, favour, eager)
        host = HostUnits(units, passing, seed)
        ring = DeviceRing(device, host, [np.full(SIZE, -2) for _ in range(buffers)], range(units))
        for chance in (0.1, 0.1, 0.1, 0.0):
            device.chance = chance
            try:
                for unit in range(units):
                    compute(device, ring, unit)
                ring.hand_back()
            except KeyboardInterrupt:
                interrupted += 1
        ring.close()
        host.buffers[0][:] = host.buffers[1][:] = -9
        device.finish()
    assert interrupted > len(SEEDS)


@pytest.mark.parametrize(
    "forgotten", ["wait COMPUTE", "wait COPIES", "record COMPUTE", "record COPIES", "synchronize"]
)
def test_a_missing_event_is_found(forgotten: str) -> None:
    with pytest.raises(WrongOrder):
        for (favour, eager), case in itertools.product(ORDERS, cases()):
            units, buffers, passing, seed = case
            run(ForgetfulDevice(forgotten, seed, favour, eager), units, buffers, passing, seed)


def test_the_next_copies_are_done_while_a_unit_is_computed() -> None:
    """With the computation held back, the copies of the next unit run to their end: nothing that they wait for is later."""
    device = SimulatedDevice(0, Queue.COPIES, eager=0.0)
    ring = DeviceRing(device, HostUnits(5, set()), [np.full(SIZE, -2) for _ in range(2)], range(5))
    compute(device, ring, 0)
    assert device.calls.count("copy") == 2, "the second buffer is filled from the start"
    compute(device, ring, 1)
    assert device.calls.count("copy") == 3, "the first is filled anew as soon as its use has been queued"
    while device.pending(Queue.COPIES) and device._step():
        pass
    assert device.pending(Queue.COPIES) == 0
    assert device.pending(Queue.COMPUTE) > 0, "all copies ran before the last computation"


def test_the_host_does_not_wait_for_the_device_where_all_is_pinned() -> None:
    device = SimulatedDevice(0, eager=0.0)
    ring = DeviceRing(device, HostUnits(4, set()), [np.full(SIZE, -2) for _ in range(2)], range(4))
    for unit in (0, 1, 2, 3, 0, 1):
        compute(device, ring, unit)
    assert "synchronize" not in device.calls
    device.finish()


def test_a_walk_there_and_back_copies_what_it_takes_and_no_more() -> None:
    """Whether the disk was ahead or not: a unit that it comes to twice is followed by another one each time."""
    there = list(range(6))
    order = [*there, *there[-2::-1]]
    for seed in SEEDS:
        device, host = SimulatedDevice(seed), HostUnits(6, set(there), seed)
        ring = DeviceRing(device, host, [np.full(SIZE, -2) for _ in range(2)], there)
        ring.walk(order)
        for unit in order:
            compute(device, ring, unit)
        ring.close()
        device.finish()
        assert device.calls.count("copy") <= len(order) + 2, seed


def test_a_ring_needs_two_buffers() -> None:
    with pytest.raises(ValueError, match="two buffers"):
        DeviceRing(SimulatedDevice(0), HostUnits(2, set()), [np.zeros(SIZE)], range(2))
