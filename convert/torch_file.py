"""Tensors of a torch zip file (torch.save since 1.6) without torch: names, dtypes, shapes and where their bytes lie."""

import math
import zipfile
from pathlib import Path

from moss_jt.convert.pickle_machine import MAX_BYTES, TensorRecord, read_pickle
from moss_jt.convert.tensors import DTYPES, SourceTensor
from moss_jt.errors import MossError

LOCAL_HEADER_BYTES = 30


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Every tensor in the file by name. No weights are read.

    Raises:
        MossError: not a zip file, cut short, compressed, of another byte order, or its pickle holds more than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1 or members[pickles[0]].file_size > MAX_BYTES:
                raise MossError(
                    f"{path} holds no torch state (one data.pkl is needed, {len(pickles)} found)."
                )
            prefix = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{prefix}byteorder")
            if order is not None and order.file_size < 64 and archive.read(order) != b"little":
                raise MossError(
                    f"{path} was written on a machine of another byte order; this program reads little-endian."
                )
            state = read_pickle(archive.read(pickles[0]), f"{path}: {pickles[0]}")
    except zipfile.BadZipFile as error:
        raise MossError(_why_no_zip(path)) from error
    except FileNotFoundError as error:
        raise MossError(f"{path} is missing.") from error
    except (OSError, RuntimeError, NotImplementedError) as error:
        raise MossError(f"{path} cannot be read: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise MossError(f"{path} holds no named tensors.")
    tensors = {}
    for name, record in state.items():
        if isinstance(name, str) and isinstance(record, TensorRecord):
            tensors[name] = _locate(path, name, record, prefix, members)
    return tensors


def _locate(
    path: Path, name: str, record: TensorRecord, prefix: str, members: dict[str, zipfile.ZipInfo]
) -> SourceTensor:
    member = members.get(f"{prefix}data/{record.storage.key}")
    if member is None:
        raise MossError(f"{path}: the numbers of {name} are missing.")
    if member.compress_type != zipfile.ZIP_STORED:
        raise MossError(
            f"{path} was compressed after it was saved; unpack and zip it again without compression."
        )
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
            f"{path}: {name} is stored transposed or with gaps, which MOSS checkpoints never are."
        )
    itemsize = DTYPES[record.storage.dtype].itemsize
    end = (record.offset + math.prod(record.shape)) * itemsize
    if end > member.file_size:
        raise MossError(
            f"{path}: {name} is larger than what is stored of it. The file is damaged; download it again."
        )
    offset = _data_offset(path, member) + record.offset * itemsize
    return SourceTensor(name, record.storage.dtype, record.shape, path, offset)


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, whose name and extra field have their own lengths."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise MossError(f"{path} is damaged: an entry's header is not where it should be. Download it again.")
    name_length, extra_length = (
        int.from_bytes(header[26:28], "little"),
        int.from_bytes(header[28:30], "little"),
    )
    return member.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length


def _why_no_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        return f"{path} is cut short ({path.stat().st_size} bytes). Download it again."
    if start[:2] == b"\x80\x02":
        return f"{path} is in torch's format from before 1.6; save it again with a newer torch."
    if start.startswith(b"vers"):
        return f"{path} is a git-lfs pointer, not the weights. Fetch them with: git lfs pull"
    return f"{path} is no torch checkpoint (no zip file)."
