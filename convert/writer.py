"""Writes one safetensors file so that it is either complete or absent, with a checksum of each tensor."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.convert.layout import Target
from moss_jt.store.files import replacing, writing
from moss_jt.store.manifest import sha256_of
from moss_jt.store.model_folder import ALIGNMENT
from moss_jt.store.safetensors_header import DTYPES

Progress = Callable[[int], object]


def target_bytes(target: Target) -> int:
    return math.prod(target.shape) * DTYPES[target.dtype].itemsize


def file_header(targets: list[Target]) -> bytes:
    """The safetensors header, padded with spaces so that the data begin at a multiple of 4096 bytes."""
    entries: dict[str, Any] = {}
    offset = 0
    for target in targets:
        end = offset + target_bytes(target)
        entries[target.name] = {
            "dtype": target.dtype,
            "shape": list(target.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, targets: list[Target], progress: Progress) -> dict[str, Any]:
    """Write ``path``, biggest tensors first, through a temporary file; returns the file's entry of the manifest.

    Raises:
        MossError: the disk is full, or it fails; the half-written file is removed.
    """
    targets = sorted(targets, key=target_bytes, reverse=True)
    header = file_header(targets)
    tensors = {}
    with writing(path), replacing(path, ".part") as file:
        file.write(header)
        for target in targets:
            checksum = _write_tensor(file, target, progress)
            tensors[target.name] = {"shape": list(target.shape), "dtype": target.dtype, "sha256": checksum}
        size = file.tell()
    return {"bytes": size, "header": sha256_of(header), "tensors": tensors}


def _write_tensor(file: Any, target: Target, progress: Progress) -> str:
    """Write a tensor chunk by chunk while the next chunk is read and the last one is hashed, each in its own thread."""
    digest = hashlib.sha256()
    written = 0
    with ThreadPoolExecutor(1) as hasher:
        hashed: Future[None] | None = None
        for chunk in _ahead(target.produce()):
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, data)
            file.write(data)
            written += len(data)
            progress(len(data))
    assert written == target_bytes(target), (
        f"{target.name}: {written} bytes made, {target_bytes(target)} promised"
    )
    return digest.hexdigest()


def _ahead(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same chunks, each made in another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = maker.submit(next, chunks, None)
            yield chunk
