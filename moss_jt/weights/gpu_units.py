"""Where a GPU's units lie, for each way to exceed the card's memory: streamed by our ring, swapped by Jittor, or unified.

A unit is a block or a slab of the head, one uint8 Var; what must be queued before it may be read is queued when it is asked for.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.copy_engine import CudaCopyEngine, device_memory
from moss_jt.kernels.interface import Queue, Var
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import MIB
from moss_jt.weights.device_ring import DeviceRing
from moss_jt.weights.disk_ring import Reader
from moss_jt.weights.file_reader import Piece
from moss_jt.weights.host_pieces import PinnedPieces
from moss_jt.weights.loading_progress import LoadingProgress
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.unit_views import map_unit, piece_of

STAGING_BYTES = 32 * MIB


class Place(NamedTuple):
    """A unit's memory, and a name for it that is the same whenever a unit lies there."""

    key: Hashable
    memory: Var


class GpuUnits(Protocol):
    """``streams``: a unit's memory is only its own until the next one is asked for."""

    streams: bool

    def begin(self, last: int) -> None:
        """A pass over units 0 .. ``last`` begins."""
        ...

    def place(self, number: int) -> Place:
        """Where unit ``number`` lies for what is queued from now on.

        Raises:
            MossError: it cannot be read from disk. Asking again tries again.
        """
        ...

    def end(self) -> None:
        """Everything that reads the unit asked for last has been queued."""
        ...

    def close(self) -> None: ...


class StreamedUnits:
    """The plan's residents on the card, the others through two buffers there. See moss_jt.weights.device_ring.

    Raises:
        MossError: a file cannot be read, or the system does not pin the plan's host memory.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader) -> None:
        self.streams = plan.streams
        self._engine = CudaCopyEngine()
        self._resident: dict[int, Place] = {}
        self._pieces: dict[int, int] = {}  # number of a piece in the ring by unit number
        self._host: PinnedPieces | None = None
        self._ring: DeviceRing | None = None
        self._reader = reader
        pieces = [piece_of(store, unit) for unit in plan.units]
        residents = [number for number, unit in enumerate(plan.units) if unit.resident]
        try:
            with staged(self._engine, reader, sum(pieces[number].n_bytes for number in residents)) as fill:
                for number in residents:
                    memory = device_memory(pieces[number].n_bytes)
                    fill(memory, pieces[number])
                    self._resident[number] = Place(number, memory)
            if plan.streams:
                self._stream(plan, pieces)
        except BaseException:
            self.close()
            raise

    def _stream(self, plan: ResidencyPlan, pieces: Sequence[Piece]) -> None:
        streamed = [number for number in range(len(pieces)) if number not in self._resident]
        self._pieces = {number: piece for piece, number in enumerate(streamed)}
        self._host = PinnedPieces(
            [pieces[number] for number in streamed],
            [plan.units[number].tier == "host" for number in streamed],
            plan.host_ring_buffers,
            plan.buffer_bytes,
            self._reader,
            self._engine,
        )
        memories = [device_memory(plan.buffer_bytes) for _ in range(plan.ring_buffers)]
        self._ring = DeviceRing(self._engine, self._host, memories, len(streamed))

    def begin(self, last: int) -> None:
        if self._ring is None or self._host is None:
            return
        wanted = [piece for number, piece in self._pieces.items() if number <= last]
        if wanted:
            self._ring.end_cycle_after(max(wanted))
            self._host.end_cycle_after(max(wanted))

    def place(self, number: int) -> Place:
        if number in self._resident:
            return self._resident[number]
        assert self._ring is not None
        buffer = self._ring.take(self._pieces[number])
        return Place(("buffer", buffer), self._ring.memories[buffer])

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
            self._resident.clear()


class UnifiedUnits:
    """All units in managed memory, more of it than the card has: the driver moves pages, told ahead what comes next.

    Nobody writes to weights, so host and card may both have a copy, and the card drops its copies without writing them back.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader) -> None:
        self.streams = plan.streams
        self._engine = CudaCopyEngine()
        self._computed = self._engine.new_event()
        self._moving = [number for number, unit in enumerate(plan.units) if not unit.resident]
        self._memories: list[Var] = []
        pieces = [piece_of(store, unit) for unit in plan.units]
        try:
            with staged(self._engine, reader, sum(piece.n_bytes for piece in pieces)) as fill:
                for piece in pieces:
                    memory = device_memory(piece.n_bytes)
                    fill(memory, piece)
                    self._engine.read_mostly(memory)
                    self._memories.append(memory)
        finally:
            reader.close()

    def begin(self, last: int) -> None:
        pass

    def place(self, number: int) -> Place:
        """The next unit that is not on the card is fetched while this one is computed with, but not earlier."""
        if self._moving:
            following = next((other for other in self._moving if other > number), self._moving[0])
            self._engine.record(self._computed, Queue.COMPUTE)
            self._engine.wait(Queue.COPIES, self._computed)
            self._engine.prefetch(self._memories[following])
        return Place(number, self._memories[number])

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._memories.clear()


class SwappedUnits:
    """All units in Jittor's care, under its limit for the card; the host holds what it moves away."""

    streams = True  # one block at a time is computed, so that no other needs to be on the card

    def __init__(self, store: Store, plan: ResidencyPlan) -> None:
        # CUDA's own footprint and CuPy's workspace are not Jittor's.
        jt.flags.device_mem_limit = plan.budget_bytes - plan.footprint_bytes - plan.workspace_bytes
        progress = LoadingProgress(sum(unit.n_bytes for unit in plan.units))
        self._memories: list[Var] = []
        try:
            for unit in plan.units:
                memory = jt.array(np.asarray(map_unit(store, unit)))
                memory.sync()
                self._memories.append(memory)
                progress.advance(unit.n_bytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise MossError(f"cannot read {error.filename}: {error.strerror}.") from error
            raise
        finally:
            progress.close()

    def begin(self, last: int) -> None:
        pass

    def place(self, number: int) -> Place:
        return Place(number, self._memories[number])

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._memories.clear()
        jt.flags.device_mem_limit = -1


@contextmanager
def staged(
    engine: CudaCopyEngine, reader: Reader, total_bytes: int
) -> Iterator[Callable[[Var, Piece], None]]:
    """A function that fills device memory from a file through two pinned buffers: one is read while the other is copied.

    What it filled is there once the context ends.
    """
    buffers = [page_buffer(STAGING_BYTES) for _ in range(2)]
    copied = [engine.new_event() for _ in buffers]
    computed = engine.new_event()
    progress = LoadingProgress(total_bytes)
    turn = 0

    def fill(memory: Var, piece: Piece) -> None:
        nonlocal turn
        # The memory may have been something else's, which is still computed with.
        engine.record(computed, Queue.COMPUTE)
        engine.wait(Queue.COPIES, computed)
        for start in range(0, piece.n_bytes, STAGING_BYTES):
            count = min(STAGING_BYTES, piece.n_bytes - start)
            engine.synchronize(copied[turn])
            reader.read(Piece(piece.path, piece.offset + start, count), buffers[turn], lambda: False)
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
