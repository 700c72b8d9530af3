"""A model folder's weights, block after block, as Jittor Vars: resident ones at once, the others through the ring.

Everything resident: the Vars lie over memory maps, opening takes no time, and the page cache is the only copy.
Otherwise resident units are read once into memory that no page cache can push out, and the others stream. All Vars
over buffers are made once. Weights are only ever read.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix, PackedMatrix, Var, Weight
from moss_jt.plan.placement import page_cache_bytes
from moss_jt.plan.residency import ResidencyPlan, Unit, spread
from moss_jt.store.model_folder import Store, map_tensor
from moss_jt.weights.disk_ring import Reader, Ring
from moss_jt.weights.disk_speed import disk_speed
from moss_jt.weights.file_reader import FileReader
from moss_jt.weights.loading_progress import LoadingProgress
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.unit_views import HEAD_WEIGHT, RowReader, layout_of, map_unit, piece_of, views_of


@dataclass(frozen=True)
class HeadSlab:
    """Rows first_row .. last_row - 1 of the head: weight (rows, C) and bias (rows,), float16 Vars."""

    first_row: int
    last_row: int
    weight: Var
    bias: Var


class WeightStream:
    """The weights of one model folder under one plan.

    A streamed block's Vars are over a ring buffer, which is filled anew once the next block has been asked for:
    **where ``streams`` is true, sync everything that reads a block or slab before asking for the next.**

    norm_weight, norm_bias: the final layer norm's Vars, (C,) float16.

    Args:
        reader: fills resident memory and the ring, and is closed with them; buffered reads by default.
        cache_bytes: what of the streamed units may stay in the page cache, for there is memory beside the budget.
    """

    def __init__(
        self, store: Store, plan: ResidencyPlan, reader: Reader | None = None, cache_bytes: int = 0
    ) -> None:
        self.store = store
        self.plan = plan
        self.streams = plan.streams
        self.norm_weight = _var(np.array(map_tensor(store.head, "ln_f.weight")))
        self.norm_bias = _var(np.array(map_tensor(store.head, "ln_f.bias")))
        bias = np.array(map_tensor(store.head, "lm_head.bias"))
        self._head_bias = {
            u.index: _var(bias[u.first_row : u.last_row]) for u in plan.units if u.kind == "head"
        }
        self._head: HeadSlab | None = None
        self._made: dict[object, BlockWeights | Var] = {}  # Vars by where they lie
        self._resident: dict[int, np.ndarray] = {}  # memory by unit number
        self._pieces: dict[int, int] = {}  # number of a piece in the ring by unit number
        self._ring: Ring | None = None
        self._rows = RowReader(store.embedding, "wte.weight")
        reader = reader or FileReader(False, 1e9)
        try:
            self._load(reader, cache_bytes)
        except BaseException:
            reader.close()
            self._rows.close()
            raise
        self._closing = weakref.finalize(self, _close, self._rows, self._ring or reader)

    def _load(self, reader: Reader, cache_bytes: int) -> None:
        """Map everything, or read the residents and start the ring, which fills while the prompt is prepared."""
        units = self.plan.units
        progress = LoadingProgress(self.plan.bytes_on("device"))
        for number, unit in enumerate(units):
            if not self.streams:
                self._resident[number] = map_unit(self.store, unit)
            elif unit.resident:
                self._resident[number] = page_buffer(unit.n_bytes)
                reader.read(piece_of(self.store, unit), self._resident[number], _never)
                progress.advance(unit.n_bytes)
        progress.close()
        if self.streams:
            streamed = [number for number in range(len(units)) if number not in self._resident]
            kept = _kept(units, streamed, cache_bytes)
            pieces = [piece_of(self.store, units[number], number in kept) for number in streamed]
            self._pieces = {number: piece for piece, number in enumerate(streamed)}
            self._ring = Ring(pieces, self.plan.ring_buffers, self.plan.buffer_bytes, reader)

    def blocks(self, then_head: bool = True) -> Iterator[tuple[int, BlockWeights]]:
        """Every block's number and weights, in order: one pass.

        Args:
            then_head: head_slabs follows, so that the head's rows may be read ahead.

        Raises:
            MossError: a block cannot be read. A new pass tries again.
        """
        if self._ring is not None:
            self._ring.end_cycle_after(self._last_piece(then_head))
        for number, unit in enumerate(self.plan.units):
            if unit.kind == "block":
                weights = self._vars_of(number, unit)
                assert isinstance(weights, BlockWeights)
                yield unit.index, weights
        self._hand_back()

    def head_slabs(self) -> Iterator[HeadSlab]:
        """The head's rows, slab after slab, in order; all of them as one slab where everything is resident.

        Raises:
            MossError: a slab cannot be read.
        """
        if not self.streams:
            yield self._whole_head()
            return
        for number, unit in enumerate(self.plan.units):
            if unit.kind == "head":
                weight = self._vars_of(number, unit)
                yield HeadSlab(unit.first_row, unit.last_row, weight, self._head_bias[unit.index])
        self._hand_back()

    def _whole_head(self) -> HeadSlab:
        if not self._closing.alive:
            raise MossError("the model is closed.")
        if self._head is None:
            weight = map_tensor(self.store.head, HEAD_WEIGHT).view(np.ndarray)
            bias = np.array(map_tensor(self.store.head, "lm_head.bias"))
            self._head = HeadSlab(0, len(weight), _var(weight), _var(bias))
        return self._head

    def embedding_rows(self, token_ids: Sequence[int]) -> np.ndarray:
        """(T, C) float16, newly allocated.

        Raises:
            MossError: an id is outside the vocabulary, or the file cannot be read.
        """
        return self._rows.read(token_ids)

    def close(self) -> None:
        """Stop reading ahead and let the weights go; no Var that was handed out may be used after this."""
        self._closing()
        self._head = None
        self._made.clear()
        self._resident.clear()

    def _vars_of(self, number: int, unit: Unit) -> BlockWeights | Var:
        """The unit's Vars, made at the first time that it lies there; waits for a streamed unit."""
        if not self._closing.alive:
            raise MossError("the model is closed.")
        if number in self._resident:
            key: object = number
            memory = self._resident[number]
        else:
            assert self._ring is not None
            buffer = self._ring.take(self._pieces[number])
            key = (buffer, layout_of(self.store, unit))
            memory = self._ring.buffers[buffer]
        if key not in self._made:
            arrays = views_of(self.store, unit, memory)
            is_head = unit.kind == "head"
            self._made[key] = (
                _var(arrays[HEAD_WEIGHT]) if is_head else block_weights(self.store, arrays, _var)
            )
        return self._made[key]

    def _hand_back(self) -> None:
        if self._ring is not None:
            self._ring.hand_back()

    def _last_piece(self, then_head: bool) -> int:
        wanted = [p for n, p in self._pieces.items() if then_head or self.plan.units[n].kind == "block"]
        return max(wanted, default=len(self._pieces) - 1)


def open_weights(store: Store, plan: ResidencyPlan, home: Path) -> WeightStream:
    """The plan's weights, read in the way that suits this machine.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: a file cannot be read.
    """
    if not plan.streams:
        return WeightStream(store, plan)
    speed = disk_speed(max(store.blocks, key=lambda file: file.nbytes).path, home / "disk-speed.json")
    return WeightStream(store, plan, FileReader(speed.prefer_direct, speed.best), page_cache_bytes(plan))


def _kept(units: Sequence[Unit], streamed: Sequence[int], cache_bytes: int) -> set[int]:
    """Which streamed units stay cached: a fixed, evenly spread set, for a cache of the latest would never hit."""
    for count in range(len(streamed), 0, -1):
        kept = {streamed[i] for i in spread(count, len(streamed))}
        if sum(units[number].n_bytes for number in kept) <= cache_bytes:
            return kept
    return set()


def block_weights(store: Store, arrays: Mapping[str, Any], var: Callable[[Any], Weight]) -> BlockWeights:
    """A block's weights from arrays (or what stands for them) by their names in the file, each made a Var by ``var``."""

    def matrix(name: str) -> Matrix:
        if f"{name}.weight" in arrays:
            return DenseMatrix(var(arrays[f"{name}.weight"]))
        packed, scales = arrays[f"{name}.packed"], arrays[f"{name}.scales"]
        order = arrays.get(f"{name}.input_order")
        return PackedMatrix(
            packed=var(packed),
            scales=var(scales),
            zeros=var(arrays[f"{name}.zeros"]),
            bits=store.bits,
            group_size=packed.shape[1] * 8 // store.bits if scales.shape[1] == 1 else store.group_size,
            input_order=None if order is None else var(order),
        )

    return BlockWeights(
        ln_1_weight=var(arrays["ln_1.weight"]),
        ln_1_bias=var(arrays["ln_1.bias"]),
        qkv=matrix("attn.qkv_proj"),
        out=matrix("attn.out_proj"),
        fc_in=matrix("mlp.fc_in"),
        fc_in_bias=var(arrays["mlp.fc_in.bias"]),
        fc_out=matrix("mlp.fc_out"),
        fc_out_bias=var(arrays["mlp.fc_out.bias"]),
    )


def indices_as_column(array: np.ndarray) -> np.ndarray:
    """Act-order's indices have two axes for the operators; everything else stays as it is."""
    return array.reshape(-1, 1) if array.dtype == np.int32 else array


def _var(array: np.ndarray) -> Var:
    """A Var over the array's own memory."""
    return jt.reuse_np_array(indices_as_column(array))


def _never() -> bool:
    return False


def _close(rows: RowReader, reader: Reader | Ring) -> None:
    reader.close()
    rows.close()
