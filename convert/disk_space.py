"""Space on the disk: asked for before anything is written."""

import itertools
import operator
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.plan.residency import gib

SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class Download:
    """The shards that a hub sends: they lie in ``folder`` while they are needed, or stay there with ``keep``."""

    folder: Path
    shard_bytes: dict[str, int]
    keep: bool

    def release(self, shard: str) -> None:
        if not self.keep:
            (self.folder / shard).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what a finished conversion leaves: small files, broken transfers, huggingface_hub's own notes."""
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def growth(self, steps: Sequence[set[str]]) -> list[int]:
        """How much more than now the folder holds in each step, each of which needs some shards (may be negative)."""
        there = folder_bytes(self.folder)
        last = {shard: number for number, shards in enumerate(steps) for shard in shards}
        needed: set[str] = set()
        growths = []
        for number, shards in enumerate(steps):
            needed |= shards
            growths.append(sum(self.shard_bytes[shard] for shard in needed) - there)
            if not self.keep:
                needed = {shard for shard in needed if last[shard] > number}
        return growths


def folder_bytes(folder: Path) -> int:
    """What the files of a folder hold; one that goes away meanwhile, as a conversion's do, counts for nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def check_disk(
    out: Path, sizes: Sequence[int], download: Path | None = None, growth: Sequence[int] = ()
) -> None:
    """Check that files of these sizes fit into ``out``, one after the other, beside what is downloaded for them.

    Args:
        growth: for each file, how much more than now the ``download`` folder holds while it is written.

    Raises:
        MossError: they do not; it says how much is needed and how much is free.
    """
    written = list(itertools.accumulate(sizes))
    if download is None:
        peaks = {out: max(written, default=0)}
    elif _device(download) == _device(out):
        peaks = {out: max(map(operator.add, written, growth), default=0)}
    else:
        peaks = {out: max(written, default=0), download: max(growth, default=0)}
    for folder, peak in peaks.items():
        needed, free = peak + SPARE_BYTES, shutil.disk_usage(_nearest(folder)).free
        if free < needed:
            raise MossError(
                f"{folder} needs {gib(needed)} of disk and {gib(free)} are free. "
                "Free some space, or put the model elsewhere with --out, or all of it with MOSS_JT_HOME."
            )


def on_one_disk(path: Path, folder: Path) -> bool:
    """Whether a file lies where files of a folder, which need not be there yet, come to lie."""
    return _device(path) == _device(folder)


def _nearest(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _device(folder: Path) -> int:
    return os.stat(_nearest(folder)).st_dev
