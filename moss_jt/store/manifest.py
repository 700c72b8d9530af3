"""manifest.json: what a model folder holds, with a checksum of everything in it. docs/model-folder.md describes it.

moss-jt 0.1.0 wrote checksums of the tensors only. Such a manifest is read too; what it cannot vouch for is None here.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.errors import MossError
from moss_jt.store.files import read_json
from moss_jt.store.quant import BITS

MANIFEST, CONFIG, TOKENIZER = "manifest.json", "config.json", "tokenizer.json"
FORMAT, VERSION = "moss-jt", 1
TEXTS = (CONFIG, TOKENIZER)
_KEYS = {"format", "version", "bits", "group_size", "source", "identity", "files", "texts", "sha256"}
REPAIR = "Run the same moss-jt convert again: it makes anew what is missing or damaged."
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its safetensors dtype, its shape, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file: its size, the SHA-256 of what stands before the data, its tensors by full name."""

    n_bytes: int
    header: str | None
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Manifest:
    """``texts``: the SHA-256 of config.json and tokenizer.json. ``fields``: the JSON object itself."""

    bits: int
    group_size: int
    identity: Any
    files: dict[str, FileEntry]
    texts: dict[str, str] | None
    fields: dict[str, Any]


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """The manifest's fields with the checksum of all others, however they are laid out in the file."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": sha256_of(text.encode("ascii"))}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a model folder, every part of it checked.

    Raises:
        MossError: it is missing, of another version, or damaged.
    """
    path = folder / MANIFEST
    fields = read_json(path)
    if fields.get("format") != FORMAT:
        raise MossError(f"{path}: format is {str(fields.get('format'))[:60]!r}, not {FORMAT!r}.")
    if type(fields.get("version")) is not int or fields["version"] != VERSION:
        raise MossError(
            f"{folder} has format version {str(fields.get('version'))[:60]}; this program reads version {VERSION}. "
            "Convert the checkpoint again, or use the moss-jt that wrote it."
        )
    unknown = sorted(fields.keys() - _KEYS)
    if unknown:
        raise MossError(f"{path}: {unknown[0][:60]!r} does not belong into a manifest. {REPAIR}")
    # 0.1.0 wrote neither; where only the seal is gone, it was lost.
    if fields.keys() & {"sha256", "texts"} and sealed(fields) != fields:
        raise MossError(f"{path} is not what was written: its checksum differs. {REPAIR}")
    bits, group_size = _packing(fields, path)
    files = fields.get("files")
    if not isinstance(files, dict):
        raise MossError(f"{path}: the list of files is missing. {REPAIR}")
    texts = fields.get("texts")
    if texts is not None and (
        not isinstance(texts, dict) or texts.keys() != set(TEXTS) or not all(map(_is_sha256, texts.values()))
    ):
        raise MossError(f"{path}: the checksums of {' and '.join(TEXTS)} are damaged. {REPAIR}")
    entries = {
        name: file_entry(entry, f"{path}: the entry of {name[:60]!r}") for name, entry in files.items()
    }
    return Manifest(bits, group_size, fields.get("identity"), entries, texts, fields)


def _packing(fields: dict[str, Any], path: Path) -> tuple[int, int]:
    """(bits, group size) of the manifest, checked."""
    bits, group_size = fields.get("bits"), fields.get("group_size")
    if type(bits) is int and type(group_size) is int:  # True is an int to isinstance
        if (bits == 16 and group_size == 0) or (bits in BITS and group_size > 0):
            return bits, group_size
    raise MossError(
        f"{path}: bits {str(bits)[:60]} with group_size {str(group_size)[:60]} is not possible. {REPAIR}"
    )


def file_entry(fields: Any, where: str) -> FileEntry:
    """One file's entry, checked; raises MossError with ``where`` where it is none."""
    try:
        header = fields.get("header")
        tensors = {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
            for name, entry in fields["tensors"].items()
        }
        n_bytes = fields["bytes"]
    except (KeyError, TypeError, AttributeError) as error:
        raise MossError(f"{where} is damaged. {REPAIR}") from error
    sums = [entry.sha256 for entry in tensors.values()] + ([] if header is None else [header])
    if type(n_bytes) is not int or not all(map(_is_sha256, sums)):
        raise MossError(f"{where} is damaged. {REPAIR}")
    return FileEntry(n_bytes, header, tensors)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
