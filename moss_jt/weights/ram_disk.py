"""Model folders in a RAM disk: their weights are in memory already, and are computed with where they lie."""

import os
from pathlib import Path

from moss_jt.store.model_folder import Store

RAM_DISKS = frozenset({"tmpfs", "ramfs"})
MOUNTS = Path("/proc/self/mountinfo")


def is_in_ram(store: Store, mounts: Path = MOUNTS) -> bool:
    """Whether all of a model's weights lie in RAM disks; false where nobody can tell."""
    kinds = {}
    try:
        for line in mounts.read_text().splitlines():
            mount, _, file_system = line.partition(" - ")
            kinds[mount.split()[2]] = file_system.split()[0]
        devices = {os.stat(file.path).st_dev for file in (*store.blocks, store.head)}
    except (OSError, IndexError):
        return False
    return all(kinds.get(f"{os.major(device)}:{os.minor(device)}") in RAM_DISKS for device in devices)
