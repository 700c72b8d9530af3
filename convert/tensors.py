"""One tensor of a checkpoint: where its bytes lie in a file, and how to read rows of it without reading the rest."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.files import open_regular

CHUNK_BYTES = 64 << 20

# Storage types by the name that safetensors uses; bfloat16 is read as its bit patterns.
DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class SourceTensor:
    """A contiguous tensor in a file; ``dtype`` is a key of DTYPES, ``offset`` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows ``first`` to ``first + count`` of the leading axis, as stored, in fresh memory."""
        tail = self.shape[1:]
        dtype = DTYPES[self.dtype]
        out = np.empty((count, *tail), dtype)
        try:
            with open_regular(self.path) as file:
                file.seek(self.offset + first * math.prod(tail) * dtype.itemsize)
                got = file.readinto(out.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise MossError(f"{self.path}: reading {self.name} failed: {error.strerror}.") from error
        if got != out.nbytes:
            raise MossError(f"{self.path} ends early, inside {self.name}. Download it again.")
        return out

    def read(self) -> np.ndarray:
        """All of the tensor, as stored."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)

    def chunks(self, first: int, count: int) -> Iterator[np.ndarray]:
        """The same rows in chunks of at most CHUNK_BYTES (at least one row)."""
        row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(first, first + count, step):
            yield self.rows(start, min(step, first + count - start))


def to_float16(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Values as stored in a checkpoint, as float16.

    Raises:
        MossError: a value is NaN, infinite or beyond float16's range; the message names the tensor.
    """
    if dtype not in FLOATS:
        raise MossError(f"{name} holds {dtype} numbers; floating-point weights are needed.")
    if dtype == "F16":
        half = values
    elif dtype == "BF16":
        half = _narrow((values.astype(np.uint32) << 16).view(np.float32))
    else:
        half = _narrow(values)
    # All exponent bits set means infinity or NaN.
    if ((half.view(np.uint16) & 0x7C00) == 0x7C00).any():
        raise MossError(_why_not_finite(values, dtype, name))
    return half


def _narrow(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16)


def _why_not_finite(values: np.ndarray, dtype: str, name: str) -> str:
    wide = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values
    if np.isfinite(wide).all():
        largest = float(np.abs(wide).max())
        return f"{name} holds {largest:g}, which float16 (largest 65504) cannot hold."
    return f"{name} holds NaN or infinity: the checkpoint is damaged. Download it again, or ask who published it."
