"""A model folder's weights on a GPU, for moss_jt.engine.model.Model: every tensor a region of its unit's one Var."""

import weakref
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, Region, Var
from moss_jt.plan.residency import ResidencyPlan, Unit
from moss_jt.store.model_folder import Store, StoreFile, TensorSpec, map_tensor
from moss_jt.weights.gpu_units import GpuUnits, Place
from moss_jt.weights.stream import HeadSlab, block_weights
from moss_jt.weights.unit_views import RowReader, layout_of

ALIGNMENT = 16  # bytes that the kernels load at once


class GpuWeights:
    """See :class:`moss_jt.engine.model.Weights`. The units are closed with it."""

    def __init__(self, store: Store, plan: ResidencyPlan, units: GpuUnits) -> None:
        self.store = store
        self.plan = plan
        self.streams = units.streams
        self._units = units
        try:
            self._rows = RowReader(store.embedding, "wte.weight")
        except OSError as error:
            units.close()
            raise MossError(f"cannot read {store.embedding.path}: {error.strerror}.") from error
        self._closing = weakref.finalize(self, _close, self._rows, units)
        self._closing.atexit = (
            False  # closing needs Jittor, which may be gone by then; the process's end frees all of it
        )
        self._made: dict[Hashable, BlockWeights] = {}  # by memory and layout
        self.norm_weight = _small(map_tensor(store.head, "ln_f.weight"))
        self.norm_bias = _small(map_tensor(store.head, "ln_f.bias"))
        bias = np.array(map_tensor(store.head, "lm_head.bias"))
        self._head_bias = {
            unit.index: _small(bias[unit.first_row : unit.last_row])
            for unit in plan.units
            if unit.kind == "head"
        }

    def blocks(self, then_head: bool = True) -> Iterator[tuple[int, BlockWeights]]:
        """Every block's number and weights, in order: one pass.

        Raises:
            MossError: a block cannot be read. A new pass tries again.
        """
        self._check_open()
        kinds = [unit.kind for unit in self.plan.units]
        self._units.begin(len(kinds) - 1 if then_head else kinds.index("head") - 1)
        for number, unit in enumerate(self.plan.units):
            if unit.kind == "block":
                yield unit.index, self._block(unit, self._units.place(number))
        self._units.end()

    def head_slabs(self) -> Iterator[HeadSlab]:
        """The head's rows, slab after slab, in order.

        Raises:
            MossError: a slab cannot be read.
        """
        self._check_open()
        for number, unit in enumerate(self.plan.units):
            if unit.kind == "head":
                rows = unit.last_row - unit.first_row
                weight = Region(
                    self._units.place(number).memory, 0, (rows, self.store.config.n_embd), "float16"
                )
                yield HeadSlab(unit.first_row, unit.last_row, weight, self._head_bias[unit.index])
        self._units.end()

    def embedding_rows(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._rows.read(token_ids)

    def close(self) -> None:
        """Stop reading ahead and let the weights go."""
        self._closing()
        self._made.clear()

    def _block(self, unit: Unit, place: Place) -> BlockWeights:
        key = place.key, layout_of(self.store, unit)
        if key not in self._made:
            file = self.store.blocks[unit.index]

            self._made[key] = block_weights(
                self.store, file.tensors, lambda spec: _region(place.memory, spec, file)
            )
        return self._made[key]

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise MossError("the model is closed.")


def _region(memory: Var, spec: TensorSpec, file: StoreFile) -> Region:
    """The tensor within its unit's memory; act-order's indices have two axes for the operators."""
    offset = spec.offset - file.data_offset
    if offset % ALIGNMENT:
        raise MossError(
            f"{file.path}: {spec.name} does not begin at a multiple of {ALIGNMENT} bytes, as a GPU needs it. "
            "This model runs on the CPU only."
        )
    shape = (spec.shape[0], 1) if spec.dtype.name == "int32" else spec.shape
    return Region(memory, offset, shape, spec.dtype.name)


def _small(array: np.ndarray) -> Var:
    return jt.array(np.array(array))


def _close(rows: RowReader, units: GpuUnits) -> None:
    units.close()
    rows.close()
