"""Where a CPU's units lie: mapped from the files where all of them fit, or read into memory and through a ring of buffers.

Mapped, opening takes no time, and the page cache is the only copy. Otherwise resident units are read once into memory that
no page cache can push out, and the others stream from disk. See moss_jt.weights.weights.Units.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import Var
from moss_jt.plan.placement import page_cache_bytes
from moss_jt.plan.residency import ResidencyPlan, Unit, spread
from moss_jt.store.model_folder import Store
from moss_jt.weights.disk_ring import Reader, Ring
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.loading_progress import LoadingProgress
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.shared_head import copy_weights
from moss_jt.weights.unit_tensors import UnitTensor, extent_of, map_unit
from moss_jt.weights.weights import HeldUnits, UnitMemory, Weights


class MappedUnits(HeldUnits):
    """Everything resident, over memory maps."""

    streams: bool = False
    closed_at_exit = True

    def __init__(self, store: Store, plan: ResidencyPlan) -> None:
        self._memories = {number: map_unit(store, unit) for number, unit in enumerate(plan.units)}

    def weight(self, memory: np.ndarray, tensor: UnitTensor) -> Var:
        """A Var over the unit's own memory."""
        return jt.reuse_np_array(tensor.view(memory))


class DiskUnits(MappedUnits):
    """The plan's residents in memory of their own, the others, if any, through a ring that is filled ahead.

    Args:
        reader: fills both, and is closed with them.
        cache_bytes: what of the streamed units may stay in the page cache, for there is memory beside the budget.

    Raises:
        MossError: a file cannot be read.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, reader: Reader, cache_bytes: int = 0) -> None:
        units = dict(enumerate(plan.units))
        self._memories = {}
        progress = LoadingProgress(plan.bytes_on("device"))
        try:
            for number, unit in units.items():
                if unit.resident:
                    self._memories[number] = page_buffer(unit.n_bytes)
                    reader.read(extent_of(store, unit), self._memories[number])
                    progress.advance(unit.n_bytes)
        except BaseException:
            reader.close()
            raise
        finally:
            progress.close()
        streamed = {number: unit for number, unit in units.items() if not unit.resident}
        self.streams = bool(streamed)
        self._ring: Ring | None = None
        if not streamed:
            reader.close()
            return
        kept = _kept(streamed, cache_bytes)
        extents = {number: extent_of(store, unit, number in kept) for number, unit in streamed.items()}
        # It fills while the prompt is prepared.
        self._ring = Ring(extents, plan.ring_buffers, plan.buffer_bytes, reader)

    def walk(self, order: Sequence[int]) -> None:
        if self._ring is not None:
            self._ring.walk(order)

    def take(self, number: int) -> UnitMemory:
        if self._ring is None or number in self._memories:
            return super().take(number)
        buffer = self._ring.take(number)
        return UnitMemory(("buffer", buffer), self._ring.buffers[buffer])

    def end(self) -> None:
        if self._ring is not None:
            self._ring.hand_back()

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        super().close()


def open_weights(store: Store, plan: ResidencyPlan, home: Path) -> Weights:
    """The plan's weights, read in the way that suits this machine.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: a file cannot be read.
    """
    if not plan.streams:
        return Weights(store, plan, MappedUnits(store, plan))
    return Weights(store, plan, DiskUnits(store, plan, reader_for(store, home), page_cache_bytes(plan)))


def open_copy_weights(store: Store, plan: ResidencyPlan, home: Path, model: Weights) -> Weights:
    """The weights of a model's copy, all resident, and the head's the model's own.

    Args:
        store, plan: the copy's folder, and the model's plan.
        model: the model's weights, which are closed later.

    Raises:
        MossError: a file cannot be read.
    """
    return copy_weights(store, plan, model, lambda blocks: DiskUnits(store, blocks, reader_for(store, home)))


def _kept(streamed: Mapping[int, Unit], cache_bytes: int) -> set[int]:
    """Which streamed units stay cached: a fixed, evenly spread set, for a cache of the latest would never hit."""
    numbers = list(streamed)
    for count in range(len(numbers), 0, -1):
        kept = {numbers[i] for i in spread(count, len(numbers))}
        if sum(streamed[number].n_bytes for number in kept) <= cache_bytes:
            return kept
    return set()
