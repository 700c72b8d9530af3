"""The header of a safetensors file: which tensors it holds, and where their bytes lie. No weights are read.

The format, by its own specification: eight bytes with the length of the header (little-endian), the header as a JSON
object of name -> {dtype, shape, data_offsets}, then the tensors' bytes, without holes, overlaps or anything behind them.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.files import open_regular, parse_json, reading

MAX_HEADER_BYTES = 16 << 20
MAX_AXES, MAX_LENGTH = 16, 1 << 48

# bfloat16 has no numpy type: its bit patterns come as uint16 under a name of their own.
DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype([("bfloat16", "<u2")]),
    "BOOL": np.dtype("?"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I64": np.dtype("<i8"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: ``offset`` counts from the file's first byte. ``dtype_name`` is a key of DTYPES."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A file's tensors by full name, where its data begin, its size, and the SHA-256 of what stands before the data."""

    tensors: dict[str, TensorSpec]
    data_offset: int
    n_bytes: int
    sha256: str


def read_header(path: Path) -> Header:
    """The header of any safetensors file.

    Raises:
        MossError: it is none, it is cut short, or its sizes contradict each other.
    """
    with reading(path), open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise MossError(f"{path} is not a safetensors file, or it is cut short.")
        text = file.read(length)
    fields = parse_json(text, path)
    begin = 8 + length
    specs = [_spec(path, name, entry, begin) for name, entry in fields.items() if name != "__metadata__"]
    at = begin
    for spec in sorted(specs, key=lambda spec: (spec.offset, spec.nbytes)):
        if spec.offset != at:
            raise MossError(f"{path}: the header leaves a hole or an overlap before {spec.name[:200]!r}.")
        at += spec.nbytes
    if at > size:
        raise MossError(f"{path} is cut short: {size} bytes of {at}. Convert or download it again.")
    if at < size:
        raise MossError(f"{path} is damaged: {size - at} bytes stand behind its last tensor. Get it again.")
    digest = hashlib.sha256(first + text).hexdigest()
    return Header({spec.name: spec for spec in specs}, begin, size, digest)


def _spec(path: Path, name: str, entry: Any, data_offset: int) -> TensorSpec:
    try:
        dtype_name, shape = entry["dtype"], tuple(entry["shape"])
        itemsize = DTYPES[dtype_name].itemsize
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise MossError(f"{path}: the header's entry of {name[:200]!r} is not understood.") from error
    numbers = (*shape[: MAX_AXES + 1], begin, end)
    lengths = all(type(number) is int and 0 <= number < MAX_LENGTH for number in numbers)
    if not lengths or len(shape) > MAX_AXES or end - begin != math.prod(shape) * itemsize:
        raise MossError(f"{path}: the header's sizes of {name[:200]!r} contradict each other.")
    return TensorSpec(name, dtype_name, shape, data_offset + begin)
