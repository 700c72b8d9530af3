"""A model folder's weights, block after block, as the operators take them, whatever holds the units: see Units.

A unit is a block or some rows of the head; every tensor is a region of its unit's memory. Weights are only ever read, and
what stands for them is made once for each memory that a unit may lie in.
"""

import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, PackedMatrix, Var, Weight
from moss_jt.plan.residency import ResidencyPlan, Unit
from moss_jt.store.architecture import BLOCK, HEAD_WEIGHT
from moss_jt.store.model_folder import Store, read_tensor
from moss_jt.weights.unit_tensors import RowReader, UnitMemory, UnitTensor, tensors_of


class Units(Protocol):
    """What holds the units of a plan, which are known by their numbers in it.

    streams         a unit's memory is only its own until the next unit is taken
    closed_at_exit  whether closing is needed, and possible, when the process ends
    """

    streams: bool
    closed_at_exit: bool

    def walk(self, order: Sequence[int]) -> None:
        """These units will be taken next, in this order; and then, as far as anybody knows, once more."""
        ...

    def take(self, number: int) -> UnitMemory:
        """What holds the unit for all that is computed or queued from now on. Waits where it must.

        Raises:
            MossError: it cannot be read. Taking it again tries again.
        """
        ...

    def weight(self, memory: Any, tensor: UnitTensor) -> Weight:
        """The tensor in a unit's memory, for the operators."""
        ...

    def end(self) -> None:
        """Nothing more reads the unit that was taken last, but for what has been queued."""
        ...

    def close(self) -> None:
        """Stop reading ahead and let the memory go."""
        ...


class HeldUnits:
    """What most Units have in common: units that stay where they are, each in memory of its own, by number."""

    def __init__(self) -> None:
        self._memories: dict[int, Any] = {}

    def walk(self, order: Sequence[int]) -> None:
        pass

    def take(self, number: int) -> UnitMemory:
        return UnitMemory(number, self._memories[number])

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._memories.clear()


@dataclass(frozen=True)
class HeadSlab:
    """Rows first_row .. last_row - 1 of the head: weight (rows, C) and bias (rows,), float16."""

    first_row: int
    last_row: int
    weight: Weight
    bias: Var


class Weights:
    """The weights of one model folder under one plan. The units are closed with it.

    **Where ``streams`` is true, a block or slab is gone once the next one has been asked for: sync everything that reads
    it before** (on the CPU; a GPU's units keep the order of what is queued).

    block_bytes: of the largest block.
    norm_weight, norm_bias: the final layer norm's Vars, (C,) float16.
    link_s: seconds for which units were waited for.
    """

    def __init__(self, store: Store, plan: ResidencyPlan, units: Units) -> None:
        self.store = store
        self.plan = plan
        self.streams = units.streams
        self.block_bytes = max(plan.sizes.block_bytes)
        self.link_s = 0.0
        self._units = units
        self._tensors = [tensors_of(store, unit) for unit in plan.units]
        alike: dict[Hashable, int] = {}  # units whose tensors lie alike share what is made over a memory
        self._layouts = [alike.setdefault(tuple(tensors.items()), len(alike)) for tensors in self._tensors]
        self._blocks = [number for number, unit in enumerate(plan.units) if unit.kind == "block"]
        self._head = [number for number, unit in enumerate(plan.units) if unit.kind == "head"]
        self._made: dict[Hashable, BlockWeights | Weight] = {}  # by memory and layout
        self._there: list[tuple[int, BlockWeights]] = []  # all blocks, once they are, if they stay
        try:
            self.norm_weight = _small(read_tensor(store.head, "ln_f.weight"))
            self.norm_bias = _small(read_tensor(store.head, "ln_f.bias"))
            bias = read_tensor(store.head, "lm_head.bias")
            heads = [plan.units[number] for number in self._head]
            self._head_bias = {unit.index: _small(bias[unit.first_row : unit.last_row]) for unit in heads}
            self._rows = RowReader(store.embedding, "wte.weight")
        except BaseException:
            units.close()
            raise
        self._closing = weakref.finalize(self, _close, self._rows, units)
        self._closing.atexit = units.closed_at_exit

    def blocks(self, then_head: bool = True, begin: int = 0) -> Iterator[tuple[int, BlockWeights]]:
        """The number and weights of every block from ``begin`` on, in order: one pass.

        Args:
            then_head: head_slabs follows, so that the head's rows may be read ahead.

        Raises:
            MossError: a block cannot be read. A new pass tries again.
        """
        if self._there and begin == 0:
            for there in self._there:
                self._check_open()
                yield there
            return
        blocks = self._blocks[begin:]
        passed = []
        for unit, weights in self.walk(blocks, [*blocks, *self._head] if then_head else blocks):
            passed.append((unit.index, weights))
            yield unit.index, weights
        if not self.streams and begin == 0:
            self._there = passed

    def head_slabs(self) -> Iterator[HeadSlab]:
        """The head's rows, slab after slab, in order.

        Raises:
            MossError: a slab cannot be read.
        """
        for unit, weight in self.walk(self._head, ()):
            yield HeadSlab(unit.first_row, unit.last_row, weight, self._head_bias[unit.index])

    def blocks_there(self, first: int, begin: int = 0) -> Iterator[tuple[int, BlockWeights]]:
        """As :meth:`blocks`, where head_slabs, head_slabs_back and blocks_back(first) follow: a step of training.

        Raises:
            MossError: a block cannot be read.
        """
        blocks = self._blocks[begin:]
        order = [*blocks, *self._head, *self._head[-2::-1], *self._blocks[first:][::-1]]
        for unit, weights in self.walk(blocks, order):
            yield unit.index, weights

    def head_slabs_back(self) -> Iterator[HeadSlab]:
        """The head's slabs from the last but one to the first: the last one is there when the walk turns."""
        for unit, weight in self.walk(self._head[-2::-1], ()):
            yield HeadSlab(unit.first_row, unit.last_row, weight, self._head_bias[unit.index])

    def blocks_back(self, first: int) -> Iterator[tuple[int, BlockWeights]]:
        """The last block to block ``first``."""
        for unit, weights in self.walk(self._blocks[first:][::-1], ()):
            yield unit.index, weights

    def walk(self, numbers: Sequence[int], ahead: Sequence[int] | None = None) -> Iterator[tuple[Unit, Any]]:
        """These units of the plan, in this order, each with its BlockWeights or its rows of the head.

        Args:
            ahead: what may be read ahead, in order: with what will be walked over after these. Nothing in it: what was
                said before holds. None: just these.
        """
        order = numbers if ahead is None else ahead
        if order:
            self._units.walk(order)
        for number in numbers:
            self._check_open()
            yield self.plan.units[number], self._weights_of(number)
        self._units.end()

    def head_memories(self) -> list[Callable[[], UnitMemory]]:
        """What gives what holds the head, all of which must be resident, unit after unit."""
        assert all(self.plan.units[number].resident for number in self._head), "the head streams"
        return [partial(self._units.take, number) for number in self._head]

    def embedding_rows(self, token_ids: Sequence[int]) -> np.ndarray:
        """(T, C) float16, newly allocated.

        Raises:
            MossError: an id is outside the vocabulary, or the file cannot be read.
        """
        return self._rows.read(token_ids)

    def close(self) -> None:
        """Stop reading ahead and let the weights go; none that was handed out may be used after this."""
        self._made.clear()
        self._there = []  # who walks over the old one is told
        self._closing()

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise MossError("the model is closed.")

    def _weights_of(self, number: int) -> Any:
        begin = time.monotonic()
        key, memory = self._units.take(number)
        self.link_s += time.monotonic() - begin
        key = key, self._layouts[number]
        if key not in self._made:
            tensors = self._tensors[number]
            weights = {name: self._units.weight(memory, tensor) for name, tensor in tensors.items()}
            head = weights.get(HEAD_WEIGHT)
            self._made[key] = block_weights(self.store, tensors, weights) if head is None else head
        return self._made[key]


def block_weights(
    store: Store, tensors: Mapping[str, UnitTensor], weights: Mapping[str, Weight]
) -> BlockWeights:
    """A block's weights, given by their names in the file."""

    def matrix(name: str) -> Matrix:
        if f"{name}.weight" in weights:
            return DenseMatrix(weights[f"{name}.weight"])
        columns, groups = tensors[f"{name}.packed"].shape[1], tensors[f"{name}.scales"].shape[1]
        return PackedMatrix(
            packed=weights[f"{name}.packed"],
            scales=weights[f"{name}.scales"],
            zeros=weights[f"{name}.zeros"],
            bits=store.bits,
            group_size=columns * 8 // store.bits if groups == 1 else store.group_size,
            input_order=weights.get(f"{name}.input_order"),
        )

    fields = {t.field: matrix(t.name) if t.is_matrix else weights[t.name] for t in BLOCK}
    return BlockWeights(**fields)


def _small(array: np.ndarray) -> Var:
    """A Var with a copy of its own."""
    var = jt.array(np.array(array))
    var.sync()
    return var


def _close(rows: RowReader, units: Units) -> None:
    units.close()
    rows.close()
