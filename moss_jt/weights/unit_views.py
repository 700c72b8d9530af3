"""Where the units of a plan lie in a model folder's files, and NumPy views of their tensors over memory."""

import os
from collections.abc import Sequence

import numpy as np

from moss_jt.errors import MossError
from moss_jt.plan.residency import Unit
from moss_jt.store.model_folder import Store, StoreFile
from moss_jt.weights.file_reader import Piece

Arrays = dict[str, np.ndarray]
HEAD_WEIGHT = "lm_head.weight"


def piece_of(store: Store, unit: Unit, keep_cached: bool = False) -> Piece:
    """The range of a file that holds the unit: one contiguous read."""
    if unit.kind == "block":
        file = store.blocks[unit.index]
        return Piece(file.path, file.data_offset, file.nbytes - file.data_offset, keep_cached)
    weight = store.head.tensors[HEAD_WEIGHT]
    offset = weight.offset + unit.first_row * _row_bytes(store.head)
    return Piece(store.head.path, offset, unit.n_bytes, keep_cached)


def layout_of(store: Store, unit: Unit) -> object:
    """Equal for units whose tensors lie alike in a buffer, so that they can share the Vars over it."""
    if unit.kind == "head":
        return unit.last_row - unit.first_row
    file = store.blocks[unit.index]
    return tuple(
        (name, spec.dtype.str, spec.shape, spec.offset - file.data_offset)
        for name, spec in file.tensors.items()
    )


def views_of(store: Store, unit: Unit, memory: np.ndarray) -> Arrays:
    """The unit's tensors over memory that holds its piece."""
    if unit.kind == "head":
        weight = store.head.tensors[HEAD_WEIGHT]
        values = memory[: unit.n_bytes].view(weight.dtype)
        return {HEAD_WEIGHT: values.reshape(unit.last_row - unit.first_row, -1)}
    file = store.blocks[unit.index]
    starts = {name: spec.offset - file.data_offset for name, spec in file.tensors.items()}
    return {
        name: memory[starts[name] : starts[name] + spec.nbytes].view(spec.dtype).reshape(spec.shape)
        for name, spec in file.tensors.items()
    }


def map_unit(store: Store, unit: Unit) -> np.ndarray:
    """The unit's piece as read-only memory over the file: no copy, and no time to open, whatever the size."""
    piece = piece_of(store, unit)
    return np.memmap(piece.path, np.uint8, "r", piece.offset, piece.n_bytes).view(np.ndarray)


def _row_bytes(head: StoreFile) -> int:
    weight = head.tensors[HEAD_WEIGHT]
    return weight.nbytes // weight.shape[0]


class RowReader:
    """Reads single rows of one tensor: a few rows are wanted of an embedding larger than a block."""

    def __init__(self, file: StoreFile, name: str) -> None:
        self._spec = file.tensors[name]
        self._path = file.path
        self._file = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
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
        found = np.empty((len(rows), width), self._spec.dtype)
        row_bytes = width * self._spec.dtype.itemsize
        for target, row in zip(found, rows, strict=True):
            try:
                done = os.preadv(
                    self._file, [memoryview(target).cast("B")], self._spec.offset + row * row_bytes
                )
            except OSError as error:
                raise MossError(f"cannot read {self._path}: {error.strerror}.") from error
            if done != row_bytes:
                raise MossError(
                    f"{self._path} ends early. It changed while it was in use; convert the model again."
                )
        return found

    def close(self) -> None:
        os.close(self._file)
