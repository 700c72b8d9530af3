"""Tensors of a torch zip file (torch.save since 1.6) without torch: names, dtypes, shapes and where their bytes lie."""

import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from moss_jt.convert.pickle_machine import MAX_BYTES, TensorRecord, read_pickle
from moss_jt.convert.tensors import DTYPES, SourceTensor
from moss_jt.convert.zip_directory import Entry, NoZip, data_offset, read_directory
from moss_jt.errors import MossError
from moss_jt.store.files import open_regular, reading

# What training programs wrap a model's tensors in.
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Every tensor in the file by name. No weights are read.

    Raises:
        MossError: not a zip file, cut short, compressed, of another byte order, or its pickle holds more than tensors.
    """
    with reading(path), open_regular(path) as file:
        try:
            members = read_directory(file, path)
        except NoZip as error:
            raise MossError(_why_no_zip(path, file)) from error
        pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise MossError(f"{path} holds no torch state (one data.pkl is needed, {len(pickles)} found).")
        prefix = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{prefix}byteorder")
        if order is not None and _read(file, order, 64, path) != b"little":
            raise MossError(
                f"{path} was written on a machine of another byte order; this program reads little-endian."
            )
        where = f"{path}: {pickles[0][:200]}"
        state = _unwrapped(read_pickle(_read(file, members[pickles[0]], MAX_BYTES, path), where))
        if state is None:
            raise MossError(f"{path} holds no named tensors.")
        return {
            name: _locate(path, file, name, record, prefix, members)
            for name, record in state.items()
            if isinstance(name, str) and isinstance(record, TensorRecord)
        }


def _read(file: BinaryIO, entry: Entry, limit: int, path: Path) -> bytes:
    """A small entry's bytes, compared with their checksum."""
    if entry.n_bytes > limit:
        raise MossError(
            f"{path}: {entry.name[:200]!r} has {entry.n_bytes} bytes; no checkpoint needs that many."
        )
    file.seek(data_offset(file, entry, path))
    data = file.read(entry.n_bytes)
    if zlib.crc32(data) != entry.crc32:
        raise MossError(
            f"{path} is damaged: the checksum of {entry.name[:200]!r} differs. Download it again."
        )
    return data


def _unwrapped(state: Any) -> dict[Any, Any] | None:
    """The dict that holds the tensors; None where there is none."""
    for _ in range(len(WRAPPERS)):
        if not isinstance(state, dict) or any(isinstance(value, TensorRecord) for value in state.values()):
            break
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), None)
    return state if isinstance(state, dict) else None


def _locate(
    path: Path, file: BinaryIO, name: str, record: TensorRecord, prefix: str, members: dict[str, Entry]
) -> SourceTensor:
    member = members.get(f"{prefix}data/{record.storage.key}")
    if member is None:
        raise MossError(f"{path}: the numbers of {name[:200]!r} are missing.")
    expected, strides = 1, []
    for size in reversed(record.shape):
        strides.append(expected)
        expected *= size
    tight = all(
        size == 1 or stride == want
        for size, stride, want in zip(record.shape, record.stride, strides[::-1], strict=True)
    )
    if not tight:
        raise MossError(
            f"{path}: {name[:200]!r} is stored transposed or with gaps, which MOSS checkpoints never are."
        )
    itemsize = DTYPES[record.storage.dtype].itemsize
    end = (record.offset + math.prod(record.shape)) * itemsize
    if end > member.n_bytes:
        raise MossError(
            f"{path}: {name[:200]!r} is larger than what is stored of it. The file is damaged; download it again."
        )
    offset = data_offset(file, member, path) + record.offset * itemsize
    return SourceTensor(name, record.storage.dtype, record.shape, path, offset)


def _why_no_zip(path: Path, file: BinaryIO) -> str:
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(4)
    if start == b"PK\x03\x04":
        return f"{path} is cut short ({size} bytes). Download it again."
    if start[:2] == b"\x80\x02":
        return f"{path} is in torch's format from before 1.6; save it again with a newer torch."
    if start.startswith(b"vers"):
        return f"{path} is a git-lfs pointer, not the weights. Fetch them with: git lfs pull"
    return f"{path} is not a torch checkpoint (it is not a zip file)."
