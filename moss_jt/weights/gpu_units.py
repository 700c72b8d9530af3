"""Where a GPU's units lie, for each way to exceed the card's memory: streamed by our ring, swapped by Jittor, or unified.

A unit is a block or a slab of the head, one uint8 Var; what must be queued before it may be read is queued when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.copy_engine import CudaCopyEngine, device_memory
from moss_jt.kernels.interface import Queue, Region, Var
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import MIB
from moss_jt.weights.device_ring import DeviceRing
from moss_jt.weights.disk_ring import Reader
from moss_jt.weights.file_reader import Extent
from moss_jt.weights.loading_progress import LoadingProgress
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.pinned_units import PinnedUnits
from moss_jt.weights.unit_tensors import UnitMemory, UnitTensor, extent_of
from moss_jt.weights.weights import HeldUnits

STAGING_BYTES = 32 * MIB
ALIGNMENT = 16  # bytes that the kernels load at once


class CardUnits(HeldUnits):
    """What GPU units share: each is one Var, and its tensors are regions of that.

    Raises:
        MossError: a tensor does not begin where the kernels could load it.
    """

    closed_at_exit = (
        False  # closing needs Jittor, which may be gone by then; the process's end frees all of it
    )

    def __init__(self, store: Store, plan: ResidencyPlan) -> None:
        super().__init__()
        for file in store.blocks:
            for spec in file.tensors.values():
                if (spec.offset - file.data_offset) % ALIGNMENT:
                    raise MossError(
                        f"{file.path}: {spec.name} does not begin at a multiple of {ALIGNMENT} bytes, as a GPU needs it. "
                        "This model runs on the CPU only."
                    )
        self.streams = plan.streams

    def weight(self, memory: Var, tensor: UnitTensor) -> Region:
        return Region(memory, *tensor)


class StreamedUnits(CardUnits):
    """The plan's residents on the card, the others through two buffers there. See moss_jt.weights.device_ring.

    Raises:
        MossError: a file cannot be read, or the system does not pin the plan's host memory.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader) -> None:
        self._reader = reader
        self._host: PinnedUnits | None = None
        self._ring: DeviceRing | None = None
        try:
            super().__init__(store, plan)
            self._engine = CudaCopyEngine()
            extents = {number: extent_of(store, unit) for number, unit in enumerate(plan.units)}
            residents = [number for number, unit in enumerate(plan.units) if unit.resident]
            total = sum(extents[number].n_bytes for number in residents)
            with staged(self._engine, reader, total) as fill:
                for number in residents:
                    extent = extents.pop(number)
                    memory = device_memory(extent.n_bytes)
                    fill(memory, extent)
                    self._memories[number] = memory
            if plan.streams:
                on_host = {number for number in extents if plan.units[number].tier == "host"}
                buffers = plan.host_ring_buffers, plan.buffer_bytes
                self._host = PinnedUnits(extents, on_host, *buffers, reader, self._engine)
                memories = [device_memory(plan.buffer_bytes) for _ in range(plan.ring_buffers)]
                self._ring = DeviceRing(self._engine, self._host, memories, list(extents))
        except BaseException:
            self.close()
            raise

    def walk(self, order: Sequence[int]) -> None:
        if self._ring is not None and self._host is not None:
            self._host.walk(order)
            self._ring.walk(order)

    def take(self, number: int) -> UnitMemory:
        if self._ring is None or number in self._memories:
            return super().take(number)
        buffer = self._ring.take(number)
        return UnitMemory(("buffer", buffer), self._ring.memories[buffer])

    def end(self) -> None:
        if self._ring is not None:
            self._ring.hand_back()

    def close(self) -> None:
        """No copy is under way after this, and no thread."""
        try:
            if self._ring is not None:
                self._ring.close()
        finally:
            (self._host or self._reader).close()
            self._ring = self._host = None
            super().close()


class UnifiedUnits(CardUnits):
    """All units in managed memory, more of it than the card has: the driver moves pages, told ahead what comes next.

    Nobody writes to weights, so host and card may both have a copy, and the card drops its copies without writing them back.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader) -> None:
        try:
            super().__init__(store, plan)
            self._engine = CudaCopyEngine()
            self._computed = self._engine.new_event()
            self._moving = [number for number, unit in enumerate(plan.units) if not unit.resident]
            self._order: Sequence[int] = self._moving
            with staged(self._engine, reader, sum(unit.n_bytes for unit in plan.units)) as fill:
                for number, unit in enumerate(plan.units):
                    extent = extent_of(store, unit)
                    memory = device_memory(extent.n_bytes)
                    fill(memory, extent)
                    self._engine.read_mostly(memory)
                    self._memories[number] = memory
        finally:
            reader.close()

    def walk(self, order: Sequence[int]) -> None:
        self._order = order

    def take(self, number: int) -> UnitMemory:
        """The next unit that is not on the card is fetched while this one is computed with, but not earlier."""
        if self._moving:
            order = list(self._order)
            at = order.index(number) + 1 if number in order else 0
            following = next(other for other in (*order[at:], *order, *self._moving) if other in self._moving)
            self._engine.record(self._computed, Queue.COMPUTE)
            self._engine.wait(Queue.COPIES, self._computed)
            self._engine.prefetch(self._memories[following])
        return super().take(number)


class SwappedUnits(CardUnits):
    """All units in Jittor's care, under its limit for the card; the host holds what it moves away."""

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader) -> None:
        super().__init__(store, plan)
        self.streams = True  # one block at a time is computed, so that no other needs to be on the card
        # CUDA's own footprint and CuPy's workspace are not Jittor's.
        jt.flags.device_mem_limit = plan.budget_bytes - plan.footprint_bytes - plan.workspace_bytes
        progress = LoadingProgress(sum(unit.n_bytes for unit in plan.units))
        try:
            buffer = page_buffer(max(unit.n_bytes for unit in plan.units))
            for number, unit in enumerate(plan.units):
                reader.read(extent_of(store, unit), buffer)
                memory = jt.array(buffer[: unit.n_bytes])
                memory.sync()
                self._memories[number] = memory
                progress.advance(unit.n_bytes)
        except BaseException:
            self.close()
            raise
        finally:
            reader.close()
            progress.close()

    def close(self) -> None:
        super().close()
        jt.flags.device_mem_limit = -1


@contextmanager
def staged(
    engine: CudaCopyEngine, reader: Reader, total_bytes: int
) -> Iterator[Callable[[Var, Extent], None]]:
    """A function that fills device memory from a file through two pinned buffers: one is read while the other is copied.

    What it filled is there once the context ends.
    """
    buffers = [page_buffer(STAGING_BYTES) for _ in range(2)]
    copied = [engine.new_event() for _ in buffers]
    computed = engine.new_event()
    progress = LoadingProgress(total_bytes)
    turn = 0

    def fill(memory: Var, extent: Extent) -> None:
        nonlocal turn
        # The memory may have been something else's, which is still computed with.
        engine.record(computed, Queue.COMPUTE)
        engine.wait(Queue.COPIES, computed)
        for start in range(0, extent.n_bytes, STAGING_BYTES):
            count = min(STAGING_BYTES, extent.n_bytes - start)
            engine.synchronize(copied[turn])
            reader.read(Extent(extent.path, extent.offset + start, count), buffers[turn])
            engine.copy(memory, start, buffers[turn][:count])
            engine.record(copied[turn], Queue.COPIES)
            turn = (turn + 1) % len(buffers)
            progress.advance(count)

    pinned: list[np.ndarray] = []
    try:
        for buffer in buffers:
            engine.pin(buffer)
            pinned.append(buffer)
        yield fill
    finally:
        engine.record(copied[0], Queue.COPIES)  # once more: an interruption may have come before the last one
        engine.synchronize(copied[0])
        for buffer in pinned:
            engine.unpin(buffer)
        progress.close()
