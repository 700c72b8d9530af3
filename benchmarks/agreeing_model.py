"""A float16 model folder that agrees with an int4 one as often as you like: its weights are the int4 ones plus noise.

Random weights agree with nothing, so that drafts by a copy cannot be measured with them. With no noise both models say the
same; the more noise, the less. Head, embedding, norms and biases are the same files or bytes, so that the int4 folder counts as
the float16 one's copy.

    python benchmarks/random_model.py /data/small-int4 --geometry 2.8B --bits 4
    python benchmarks/agreeing_model.py /data/small-int4 /data/small --noise 0.02
    moss-jt generate /data/small --draft-model /data/small-int4 --memory 3GB --json ...

Noise is in parts of each group's scale, so that 0.29 would be what rounding to int4 does.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.convert.layout import Target
from moss_jt.convert.writer import file_header
from moss_jt.store.architecture import MATRICES, block_tensors, full_name
from moss_jt.store.files import link_over
from moss_jt.store.manifest import MANIFEST, sha256_of
from moss_jt.store.model_folder import Store, open_store, read_tensor
from moss_jt.store.quant import PackedArrays, dequantize_rows, row_slabs

COPIED = ("config.json", "tokenizer.json", "embedding.safetensors", "head.safetensors")
POOL = 1 << 24


class NoisyBlocks:
    """Blocks of a quantized folder as float16, with noise from one pool of normal numbers."""

    def __init__(self, store: Store, noise: float) -> None:
        self._store, self._noise = store, noise
        self._random = np.random.default_rng(0)
        self._pool = self._random.standard_normal(POOL, np.float32)

    def tensors(self, layer: int) -> dict[str, np.ndarray]:
        """All tensors of a block by full name, in the order of the file."""
        file = self._store.blocks[layer]
        tensors = {}
        for name in block_tensors(self._store.config, 16, 0):
            matrix = name.removesuffix(".weight")
            is_matrix = matrix in MATRICES
            array = self._matrix(layer, matrix) if is_matrix else np.array(read_tensor(file, name))
            tensors[full_name(name, layer)] = array
        return dict(sorted(tensors.items(), key=lambda item: item[1].nbytes, reverse=True))

    def _matrix(self, layer: int, name: str) -> np.ndarray:
        file = self._store.blocks[layer]
        parts = [read_tensor(file, f"{name}.{part}") for part in ("packed", "scales", "zeros")]
        packed = PackedArrays(*parts, self._store.bits, self._store.group_size)
        rows, columns = len(parts[0]), parts[1].shape[1] * self._store.group_size
        weight = np.empty((rows, columns), np.float16)

        def fill(part: slice, start: int) -> None:
            values = dequantize_rows(packed, part)
            if self._noise:
                count = values.size
                normal = np.concatenate([self._pool[start:], self._pool])[:count].reshape(values.shape)
                scales = np.repeat(parts[1][part].astype(np.float32), self._store.group_size, axis=1)
                values += self._noise * scales * normal
            weight[part] = values

        slabs = list(row_slabs(rows, columns))
        starts = self._random.integers(POOL, size=len(slabs))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, slabs, starts.tolist()))
        return weight


def write_block(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write a file of float16 tensors, past the page cache in the end; returns its entry of the manifest."""
    targets = [Target(name, "F16", array.shape, lambda: iter(())) for name, array in tensors.items()]
    header = file_header(targets)
    entries = {}
    with open(path, "wb") as file:
        file.write(header)
        for name, array in tensors.items():
            data = array.reshape(-1).view(np.uint8).data
            file.write(data)
            entries[name] = {
                "shape": list(array.shape),
                "dtype": "F16",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": path.stat().st_size, "header": sha256_of(header), "tensors": entries}


def write_agreeing_model(copy: Path, folder: Path, noise: float) -> None:
    """Write the float16 model folder; ``copy`` is the int4 one, on the same disk."""
    store = open_store(copy)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in COPIED:
        link_over(copy / name, folder / name)
    blocks = NoisyBlocks(store, noise)
    manifest = json.loads((copy / MANIFEST).read_text())
    files = manifest["files"]
    for layer, file in enumerate(store.blocks):
        files[file.path.name] = write_block(folder / file.path.name, blocks.tensors(layer))
    manifest = {key: value for key, value in manifest.items() if key not in ("sha256", "texts")}
    (folder / MANIFEST).write_text(
        json.dumps({**manifest, "bits": 16, "group_size": 0, "files": files}, indent=1)
    )
    open_store(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copy", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--noise", type=float, required=True)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    write_agreeing_model(arguments.copy, arguments.folder, arguments.noise)
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
