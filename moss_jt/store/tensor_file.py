"""Small safetensors files, written and read at once: adapters, and what a training keeps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.files import open_regular, parse_json, reading, replacing, writing
from moss_jt.store.safetensors_header import DTYPES, MAX_HEADER_BYTES, TensorSpec, read_header

NAMES = {dtype.str: name for name, dtype in DTYPES.items() if dtype.names is None}
FLOATS = ("F16", "BF16", "F32", "F64")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Replace a safetensors file in one step.

    Raises:
        MossError: the disk is full, or it fails; the old file stays.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        entries[name] = {
            "dtype": NAMES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path), replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, floats as float32.

    Raises:
        MossError: it is none, or damaged.
    """
    header = read_header(path)
    with reading(path), open_regular(path) as file:
        return {name: read_tensor(path, file, spec) for name, spec in header.tensors.items()}


def read_tensor(path: Path, file: BinaryIO, spec: TensorSpec) -> np.ndarray:
    """One tensor of an open safetensors file, floats as float32.

    Raises:
        MossError: it is cut short.
    """
    file.seek(spec.offset)
    data = file.read(spec.nbytes)
    if len(data) < spec.nbytes:
        raise MossError(f"{path} is cut short.")
    if spec.dtype_name == "BF16":
        array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(data, spec.dtype)
    wide = array.astype(np.float32) if spec.dtype_name in FLOATS else array
    return wide.reshape(spec.shape)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors.

    Raises:
        MossError: it is none.
    """
    with reading(path), open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise MossError(f"{path} is no safetensors file, or it is damaged.")
        fields = parse_json(file.read(length), path).get("__metadata__", {})
    return fields if isinstance(fields, dict) else {}
