"""Where the units of a plan lie in a model folder's files, and where a unit's tensors lie in its memory."""

import math
import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_jt.errors import MossError
from moss_jt.plan.residency import Unit
from moss_jt.store.architecture import HEAD_WEIGHT
from moss_jt.store.files import reading
from moss_jt.store.model_folder import Store, StoreFile, ends_early
from moss_jt.weights.file_reader import Extent


class UnitMemory(NamedTuple):
    """What holds a unit: ``memory``, for Units.weight alone to understand, and a name for it that never changes."""

    key: Hashable
    memory: Any


class UnitTensor(NamedTuple):
    """A tensor within its unit: where it begins, in bytes, its shape as the operators take it, NumPy's name of its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The tensor over the unit's memory (n,) uint8."""
        return memory[self.offset : self.offset + self.n_bytes].view(self.dtype).reshape(self.shape)


def tensors_of(store: Store, unit: Unit) -> dict[str, UnitTensor]:
    """A unit's tensors by their names in the file, in one order, so that units that look alike have equal ones."""
    if unit.kind == "head":
        rows = unit.last_row - unit.first_row
        return {HEAD_WEIGHT: UnitTensor(0, (rows, store.config.n_embd), "float16")}
    file = store.blocks[unit.index]
    tensors = {}
    for name, spec in sorted(file.tensors.items()):
        # Act-order's indices have two axes for the operators.
        shape = (*spec.shape, 1) if spec.dtype == np.int32 else spec.shape
        tensors[name] = UnitTensor(spec.offset - file.data_offset, shape, spec.dtype.name)
    return tensors


def extent_of(store: Store, unit: Unit, keep_cached: bool = False) -> Extent:
    """The range of a file that holds the unit: one contiguous read."""
    if unit.kind == "block":
        file = store.blocks[unit.index]
        return Extent(file.path, file.data_offset, file.nbytes - file.data_offset, keep_cached)
    weight = store.head.tensors[HEAD_WEIGHT]
    offset = weight.offset + unit.first_row * (weight.nbytes // weight.shape[0])
    return Extent(store.head.path, offset, unit.n_bytes, keep_cached)


def map_unit(store: Store, unit: Unit) -> np.ndarray:
    """The unit as read-only memory over the file: no copy, and no time to open, whatever the size.

    Only the CPU's operators may read it. Where the file becomes shorter, they say so (lost_file.h); anything else would
    end with the process.

    Raises:
        MossError: the file cannot be opened, or ends before the unit does.
    """
    extent = extent_of(store, unit)
    with reading(extent.path):
        try:
            return np.memmap(extent.path, np.uint8, "r", extent.offset, extent.n_bytes).view(np.ndarray)
        except ValueError as error:  # NumPy's, where the map would be longer than the file
            raise ends_early(extent.path) from error


class RowReader:
    """Reads single rows of one tensor: a few rows are wanted of an embedding larger than a block.

    Raises:
        MossError: the file cannot be opened.
    """

    def __init__(self, file: StoreFile, name: str) -> None:
        self._spec = file.tensors[name]
        self._path = file.path
        try:
            self._file = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MossError(f"cannot read {file.path}: {error.strerror}.") from error
        # Reading ahead would bring in megabytes around every row.
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """(len(rows), C), newly allocated.

        Raises:
            MossError: a row is not in the table, or cannot be read.
        """
        count, width = self._spec.shape
        if not all(0 <= row < count for row in rows):
            raise MossError(f"token ids must be from 0 to {count - 1}; got {min(rows)} to {max(rows)}.")
        result = np.empty((len(rows), width), self._spec.dtype)
        row_bytes = width * self._spec.dtype.itemsize
        for target, row in zip(result, rows, strict=True):
            try:
                done = os.preadv(
                    self._file, [memoryview(target).cast("B")], self._spec.offset + row * row_bytes
                )
            except OSError as error:
                raise MossError(f"cannot read {self._path}: {error.strerror}.") from error
            if done != row_bytes:
                raise ends_early(self._path)
        return result

    def close(self) -> None:
        os.close(self._file)
