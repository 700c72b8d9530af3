"""A float16 model and its int4 copy, of any size, on a disk of any speed that is a file in memory: all blocks are the same one.

XFS lets files share their bytes, so that MOSS's 33.4 GB and its copy's 9 take 1.3 GB of memory, and reads go through a block device
all the same: past the page cache where they ask for that, and no faster than a control group lets them. So a disk of 3 GB/s is
there where the machine's own is slower, or others use it, too. As root:

    echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory
    mkdir /ram /disk && mount -t tmpfs -o huge=always,size=8G ram /ram
    truncate -s 8G /ram/disk && mkfs.xfs -q -m reflink=1 /ram/disk
    mount -o discard $(losetup --show --direct-io=on -f /ram/disk) /disk
    python benchmarks/equal_blocks.py /disk/moss-int4 /disk/moss --noise 0.06
    python benchmarks/drafts.py /disk/moss /disk/moss-int4 --memory 16GiB --limit 17.6GiB --disk-rate 3GB ...
    umount -d /disk && umount /ram

What a disk would do by itself takes time of a processor here: 0.1 to 0.2 s per GB, more where the RAM disk got no huge pages
(ShmemHugePages in /proc/meminfo says so), and then it gives less while blocks are computed than a probe sees. The control group
lets a tenth of a second's bytes through at once after a rest, so that a short probe sees more than it holds. Noise as in
agreeing_model.py; it is for you to find out how often equal blocks agree with it.
"""

import argparse
import fcntl
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from agreeing_model import write_agreeing_model
from random_model import GEOMETRIES, POOL_BYTES, write_random_model

from moss_jt.store.architecture import full_name
from moss_jt.store.config import MossConfig
from moss_jt.store.manifest import MANIFEST, sha256_of
from moss_jt.store.model_folder import ALIGNMENT, Store, StoreFile, block_file_name, local_name, open_store

FICLONERANGE = 0x4020940D


def share(source: int, start: int, n_bytes: int, target: int, at: int) -> None:
    """Let ``target`` have the source's bytes from ``at`` on, on the disk once; all in whole pages, and 0 bytes for all that follow.

    Raises:
        OSError: the file system cannot.
    """
    fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, start, n_bytes, at))


def share_periods(file: StoreFile) -> None:
    """Random weights repeat after POOL_BYTES: let the disk hold the largest tensor's only once."""
    n_bytes = max(tensor.nbytes for tensor in file.tensors.values())
    with open(file.path, "r+b") as opened:
        for start in range(POOL_BYTES, n_bytes, POOL_BYTES):
            length = min(POOL_BYTES, n_bytes - start) // ALIGNMENT * ALIGNMENT
            share(opened.fileno(), file.data_offset, length, opened.fileno(), file.data_offset + start)
        os.fsync(opened.fileno())


def renamed(name: str, layer: int) -> str:
    """The same tensor's full name in another block."""
    return full_name(local_name(name), layer)


def repeat_block(store: Store, config: MossConfig) -> None:
    """Make a folder of one block one of many equal ones."""
    manifest = json.loads((store.path / MANIFEST).read_text())
    block = store.blocks[0]
    with open(block.path, "rb") as first:
        length = int.from_bytes(first.read(8), "little")
        header = json.loads(first.read(length))
        entry = manifest["files"][block.path.name]
        for layer in range(1, config.n_layer):
            path = store.path / block_file_name(layer)
            text = json.dumps({renamed(name, layer): value for name, value in header.items()}).encode()
            assert len(text) <= length, "the header has no room for the block's number"
            text = length.to_bytes(8, "little") + text.ljust(length)
            with open(path, "wb") as file:
                file.write(text)
                file.flush()
                share(first.fileno(), block.data_offset, 0, file.fileno(), block.data_offset)
                os.fsync(file.fileno())
            manifest["files"][path.name] = entry_of(entry, layer, text)
    (store.path / "config.json").write_text(json.dumps(config.to_json(), indent=2))
    (store.path / MANIFEST).write_text(json.dumps(manifest, indent=1))


def entry_of(entry: dict[str, Any], layer: int, header: bytes) -> dict[str, Any]:
    """A block's entry in the manifest, from that of the first."""
    tensors = {renamed(name, layer): tensor for name, tensor in entry["tensors"].items()}
    return {"bytes": entry["bytes"], "header": sha256_of(header), "tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copy", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="moss-moon-003")
    parser.add_argument("--noise", type=float, required=True)
    arguments = parser.parse_args()
    config = GEOMETRIES[arguments.geometry]
    write_random_model(arguments.copy, replace(config, n_layer=1), bits=4)
    store = open_store(arguments.copy)
    for file in (store.embedding, store.head):
        share_periods(file)
    write_agreeing_model(arguments.copy, arguments.folder, arguments.noise)
    for one in [open_store(arguments.copy), open_store(arguments.folder)]:
        repeat_block(one, config)
        open_store(one.path)


if __name__ == "__main__":
    main()
