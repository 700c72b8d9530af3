"""Damage: files of a checkpoint or a model folder changed as disks, transfers, careless tools and enemies change them."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Draw = np.random.Generator

# Put into the place of any JSON value.
HOSTILE_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    255,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    1 << 63,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "1e-05",
    "\ud800",
    "\x1b[31m\u202e",
    "../../etc/passwd",
    "/dev/zero",
    "A" * 100_000,
    [],
    [1, 2],
    [[]] * 1000,
    {},
    {"a": {"b": {}}},
]
HOSTILE_BYTES = [
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"PK\x05\x06",
    b"{",
    b'"',
    b"\n",
]


def mutate(folder: Path, draw: Draw) -> list[str]:
    """Change one to three things in the folder, mostly one; what was done, in words."""
    return [_mutate_once(folder, draw) for _ in range((1, 1, 1, 2, 3)[draw.integers(5)])]


def _mutate_once(folder: Path, draw: Draw) -> str:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not paths:
        return "nothing left"
    path = paths[draw.integers(len(paths))]
    kinds: list[Callable[[Path, Draw], str]] = [_flip, _flip, _bytes, _shape_of_file, _file_itself]
    if path.suffix == ".json":
        kinds += [_json] * 6
    elif path.suffix == ".safetensors":
        kinds += [_header] * 6
    elif path.suffix in (".bin", ".pt"):
        kinds += [_zip_end, _zip_end, _zip_end, _pickle, _pickle, _pickle, _repacked]
    kind = kinds[draw.integers(len(kinds))]
    return f"{path.name}: {kind(path, draw)}"


def _spot(data: bytes | bytearray, draw: Draw, first: int = 0) -> int:
    return int(draw.integers(first, max(first + 1, len(data))))


def _changed(data: bytes, draw: Draw, first: int = 0) -> bytes:
    """A few bytes from ``first`` on flipped, overwritten, inserted, deleted or doubled."""
    changed = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        at = _spot(changed, draw, first)
        kind = draw.integers(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << int(draw.integers(8))
        elif kind == 1:
            value = HOSTILE_BYTES[draw.integers(len(HOSTILE_BYTES))]
            changed[at : at + len(value)] = value
        elif kind == 2:
            changed[at:at] = draw.bytes(int(draw.integers(1, 9)))
        elif kind == 3:
            del changed[at : at + int(draw.integers(1, 9))]
        else:
            changed[at:at] = changed[at : at + int(draw.integers(1, 65))]
    return bytes(changed)


def _flip(path: Path, draw: Draw) -> str:
    """One bit, as memory and disks do it: mostly in a weight, which then is another number, and may be a right one."""
    data = bytearray(path.read_bytes())
    if data:
        data[_spot(data, draw)] ^= 1 << int(draw.integers(8))
    path.write_bytes(data)
    return "bit"


def _bytes(path: Path, draw: Draw) -> str:
    path.write_bytes(_changed(path.read_bytes(), draw))
    return "bytes"


def _shape_of_file(path: Path, draw: Draw) -> str:
    size = path.stat().st_size
    if draw.integers(3):
        os.truncate(path, int(draw.integers(size + 1)))
        return "cut"
    with path.open("ab") as file:
        file.write(draw.bytes(int(draw.integers(1, 5000))))
    return "longer"


def _file_itself(path: Path, draw: Draw) -> str:
    """Something else in its place."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    kind = int(draw.integers(7))
    data = others[draw.integers(len(others))].read_bytes() if others and kind == 0 else b""
    path.unlink()
    if kind == 0:
        path.write_bytes(data)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to(path)
    elif kind == 5:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return ["another file", "a folder", "a pipe", "a device", "a loop", "a pointer", "gone"][kind]


def _json(path: Path, draw: Draw) -> str:
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _bytes(path, draw)
    if draw.integers(40) == 0:
        path.write_text("[" * 100_000)
        return "deep"
    path.write_text(json.dumps(_changed_json(fields, draw)), errors="surrogatepass")
    return "json"


def _changed_json(fields: Any, draw: Draw) -> Any:
    """One value somewhere in the tree replaced, removed, renamed or moved."""
    node = fields
    while True:
        if not isinstance(node, dict | list) or not node:
            return HOSTILE_VALUES[draw.integers(len(HOSTILE_VALUES))]
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[draw.integers(len(keys))]
        if isinstance(node[key], dict | list) and node[key] and draw.integers(4):
            node = node[key]
            continue
        kind = draw.integers(5)
        if kind <= 2:
            node[key] = HOSTILE_VALUES[draw.integers(len(HOSTILE_VALUES))]
        elif kind == 3 or isinstance(node, list):
            del node[key]
        else:
            node[str(key) + "x"] = node.pop(key)
        if isinstance(node, dict) and len(node) > 1 and draw.integers(4) == 0:
            one, other = draw.permutation(len(node))[:2]
            names = list(node)
            node[names[one]], node[names[other]] = node[names[other]], node[names[one]]
        return fields


def _header(path: Path, draw: Draw) -> str:
    """A safetensors header changed as JSON, or its length, or its bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
    except (ValueError, RecursionError, MemoryError):
        return _bytes(path, draw)
    kind = draw.integers(4)
    if kind == 0:
        length = [0, 1, end, 1 << 20, 1 << 40, (1 << 64) - 1][draw.integers(6)]
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        return "header's length"
    if kind == 1:
        path.write_bytes(_changed(data[:end], draw, 8) + data[end:])
        return "header's bytes"
    text = json.dumps(_changed_json(header, draw), separators=(",", ":")).encode("utf-8", "surrogatepass")
    text = text.ljust(end - 8)  # the data stay where they were, where there is room
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return "header's JSON"


def _zip_end(path: Path, draw: Draw) -> str:
    """The directory at the end of a zip file, and the record that says where it is."""
    data = path.read_bytes()
    begin = data.find(b"PK\x01\x02")
    path.write_bytes(_changed(data, draw, begin) if begin >= 0 else _changed(data, draw))
    return "directory"


def _pickle(path: Path, draw: Draw) -> str:
    """The pickle changed, in a zip file that is whole again."""
    return _rewritten(path, draw, zipfile.ZIP_STORED, lambda data: _changed(data, draw))


def _repacked(path: Path, draw: Draw) -> str:
    """Compressed, some of it hugely."""
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    padding = bytes(1 << 22) if draw.integers(2) else b""
    return _rewritten(path, draw, methods[draw.integers(3)], lambda data: data + padding)


def _rewritten(path: Path, draw: Draw, method: int, change: Callable[[bytes], bytes]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # noqa: BLE001  zipfile raises of all kinds for a file that was damaged before
        return _bytes(path, draw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    path.write_bytes(buffer.getvalue())
    return "pickle" if method == zipfile.ZIP_STORED else "compressed"
