"""A model folder with random weights at any geometry, straight to disk: for timing and memory, not for talking.

    python benchmarks/random_model.py /data/moss-random                     MOSS itself: 33.4 GB
    python benchmarks/random_model.py /data/moss-random-int4 --bits 4
    python benchmarks/random_model.py /data/codegen-random --geometry 2.8B  5.6 GB

The numbers come from one pool of random values, read from a different offset for each tensor, so that writing costs what
the disk costs. Activations stay finite: matrices are about 0.02, norms are one.
"""

import argparse
import hashlib
import json
import os
import queue
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from moss_jt.convert.tokenizer import build_tokenizer
from moss_jt.store.architecture import (
    DTYPE_BYTES,
    Wanted,
    block_tensors,
    embedding_tensors,
    full_name,
    head_tensors,
)
from moss_jt.store.config import MOSS_MOON_003, MossConfig
from moss_jt.store.locations import tiny_checkpoint

GEOMETRIES = {
    "moss-moon-003": MOSS_MOON_003,
    "2.8B": replace(MOSS_MOON_003, vocab_size=51200, n_embd=2560, n_layer=32, n_head=32, n_inner=10240),
    "small": replace(
        MOSS_MOON_003, vocab_size=8192, n_embd=768, n_layer=12, n_head=12, rotary_dim=32, n_inner=3072
    ),
}
PAGE = 4096
POOL_BYTES = 64 << 20

Spec = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


def specs_of(tensors: Wanted, layer: int | None = None) -> list[Spec]:
    return [(full_name(name, layer), dtype, shape) for name, (dtype, shape) in tensors.items()]


def n_bytes_of(spec: Spec) -> int:
    return DTYPE_BYTES[spec[1]] * int(np.prod(spec[2]))


class RandomPool:
    """Bytes for any tensor, from three pools: small normal numbers, small positive scales, and any bytes."""

    def __init__(self, seed: int, bits: int) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal(POOL_BYTES // 8, np.float32)
        normal = np.tile((values * 0.02).astype(np.float16), 4)
        scales = ((np.abs(values[: 1 << 20]) + 0.5) * (0.08 / (1 << bits))).astype(np.float16)
        self._pools = {
            "weights": memoryview(normal).cast("B"),
            "scales": memoryview(scales).cast("B"),
            "packed": memoryview(self._random.bytes(POOL_BYTES)),
            "zeros": memoryview(bytes([(1 << (bits - 1)) - 1]) * (1 << 20)) if bits < 16 else memoryview(b""),
            "ones": memoryview(np.ones(1 << 16, np.float16)).cast("B"),
            "nothing": memoryview(bytes(1 << 16)),
        }

    def chunks(self, spec: Spec) -> list[memoryview]:
        """Views that together are the tensor's bytes."""
        name, _, shape = spec
        last = name.rsplit(".", 1)[1]
        kind = {"bias": "nothing", "weight": "weights"}.get(last, last)
        if last == "weight" and len(shape) == 1:
            kind = "ones"
        pool, left, views = self._pools[kind], n_bytes_of(spec), []
        start = int(self._random.integers(len(pool) // 2)) // 2 * 2
        while left:
            chunk = pool[start : start + left]
            views.append(chunk)
            left -= len(chunk)
            start = 0
        return views


class Hasher(threading.Thread):
    """Checksums beside the writing: hashing releases Python's lock."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.digests: dict[str, str] = {}
        self._work: queue.Queue[tuple[str, list[memoryview]] | None] = queue.Queue()
        self.start()

    def add(self, name: str, chunks: list[memoryview]) -> None:
        self._work.put((name, chunks))

    def run(self) -> None:
        while (work := self._work.get()) is not None:
            digest = hashlib.sha256()
            for chunk in work[1]:
                digest.update(chunk)
            self.digests[work[0]] = digest.hexdigest()

    def finish(self) -> dict[str, str]:
        self._work.put(None)
        self.join()
        return self.digests


def write_file(path: Path, specs: list[Spec], pool: RandomPool, hasher: Hasher) -> dict[str, object]:
    """One safetensors file, biggest tensors first, data on a page; returns its manifest entry without checksums."""
    specs = sorted(specs, key=n_bytes_of, reverse=True)
    header: dict[str, object] = {}
    offset = 0
    for spec in specs:
        end = offset + n_bytes_of(spec)
        header[spec[0]] = {"dtype": spec[1], "shape": list(spec[2]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            chunks = pool.chunks(spec)
            hasher.add(spec[0], chunks)
            for chunk in chunks:
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        # What is not yet on the disk would be written while something is being measured.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tensors = {name: {"shape": list(shape), "dtype": dtype} for name, dtype, shape in specs}
    return {"bytes": path.stat().st_size, "tensors": tensors}


def tiny_tokenizer() -> str:
    """tokenizer.json of the small checkpoint that comes with the program; most of a larger vocabulary has no text."""
    checkpoint = tiny_checkpoint()
    fields = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return build_tokenizer(lambda name: checkpoint / name, fields)


def write_random_model(
    folder: Path, config: MossConfig, bits: int = 16, group_size: int = 128, seed: int = 0
) -> None:
    """Write the model folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    pool, hasher = RandomPool(seed, bits), Hasher()
    files = {
        "embedding.safetensors": specs_of(embedding_tensors(config)),
        "head.safetensors": specs_of(head_tensors(config)),
    }
    for block in range(config.n_layer):
        files[f"block-{block:02d}.safetensors"] = specs_of(block_tensors(config, bits, group_size), block)
    entries = {name: write_file(folder / name, specs, pool, hasher) for name, specs in files.items()}
    digests = hasher.finish()
    for entry in entries.values():
        for name, tensor in entry["tensors"].items():  # type: ignore[attr-defined]
            tensor["sha256"] = digests[name]
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2))
    (folder / "tokenizer.json").write_text(tiny_tokenizer(), encoding="utf-8")
    manifest = {
        "format": "moss-jt",
        "version": 1,
        "bits": bits,
        "group_size": 0 if bits == 16 else group_size,
        "source": "random",
        "files": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="moss-moon-003")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    write_random_model(arguments.folder, GEOMETRIES[arguments.geometry], arguments.bits)
    n_bytes = sum(path.stat().st_size for path in arguments.folder.iterdir())
    seconds = time.perf_counter() - begin
    print(f"{n_bytes / 1e9:.1f} GB in {seconds:.0f} s ({n_bytes / seconds / 1e9:.2f} GB/s)", file=sys.stderr)


if __name__ == "__main__":
    main()
