"""Weights as Jittor's own Vars under its memory limit: the baseline that the stream is measured against.

Jittor's JT_SAVE_MEM writes Vars to files when an allocation would pass the limit, and reads them when an operator needs
them; nothing is read ahead, and weights are written again at every eviction although they never change.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moss_jt.backend.jittor import jt
from moss_jt.errors import MossError
from moss_jt.kernels.interface import Var
from moss_jt.plan.residency import ResidencyPlan, gib
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import MIB
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.unit_tensors import UnitTensor, extent_of, tensors_of
from moss_jt.weights.weights import HeldUnits

NO_LIMIT = -1


class SwappedTensors(HeldUnits):
    """All tensors in Jittor's care, each a Var of its own. One at a time per process: the limit is Jittor's.

    See moss_jt.weights.weights.Units.

    Raises:
        MossError: the limit is too small for one block, or the disk for the weights; or a file cannot be read.
    """

    streams = True  # one block at a time is computed, so that no other needs to be in memory
    closed_at_exit = True

    def __init__(self, store: Store, plan: ResidencyPlan) -> None:
        # The cache is not Jittor's own memory; Jittor counts the workspace.
        limit = plan.budget_bytes - plan.footprint_bytes - plan.kv_cache_bytes
        largest = max(spec.nbytes for file in (*store.blocks, store.head) for spec in file.tensors.values())
        _check_limit(plan, limit, largest)
        self._folder = swap_folder()
        _check_disk(self._folder, plan)
        super().__init__()
        # While a weight is taken over it is there twice more: as it was read, and as Jittor's copy.
        jt.flags.cpu_mem_limit = limit - 2 * largest
        reader = FileReader(direct=False, bytes_per_s=0)
        try:
            with swap_errors(self._folder):
                for number, unit in enumerate(plan.units):
                    extent, tensors = extent_of(store, unit), tensors_of(store, unit).values()
                    self._memories[number] = {tensor: _taken(reader, extent, tensor) for tensor in tensors}
        except BaseException:
            self.close()
            raise
        finally:
            reader.close()
        jt.flags.cpu_mem_limit = limit

    def weight(self, memory: dict[UnitTensor, Var], tensor: UnitTensor) -> Var:
        return memory[tensor]

    def close(self) -> None:
        """Let the weights go. Jittor removes its files with their Vars; what a failed write left is removed here."""
        super().close()
        jt.flags.cpu_mem_limit = NO_LIMIT
        jt.gc()
        for path in self._folder.glob(f"{os.getpid()}-*.bin"):
            path.unlink(missing_ok=True)


def swap_folder() -> Path:
    """Where Jittor writes its swap files, named after process and Var."""
    return Path(jt.flags.cache_path) / "tmp"


@contextlib.contextmanager
def swap_errors(folder: Path) -> Iterator[None]:
    """Turn Jittor's failure to write or read a swap file into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "swap" not in str(error):
            raise
        free = shutil.disk_usage(folder).free
        raise MossError(
            f"Jittor could not write or read its swap files in {folder} ({gib(free)} free there). Free some space, "
            "or use --offload stream: it writes nothing."
        ) from error


def _check_limit(plan: ResidencyPlan, limit: int, largest: int) -> None:
    """One block with its workspace while computing; while loading, one weight beside its map and copy."""
    needed = max(max(plan.sizes.block_bytes) + plan.workspace_bytes, 4 * largest)
    if limit < needed:
        raise MossError(
            f"{gib(plan.budget_bytes)} is too little to swap in: {gib(plan.budget_bytes - limit + needed + MIB)} is "
            "the least. Raise --memory, or use --offload stream."
        )


def _check_disk(folder: Path, plan: ResidencyPlan) -> None:
    """Everything may be on disk a second time. Files of processes that were killed are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*-*.bin"):
        owner = path.name.split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            path.unlink(missing_ok=True)
    needed, free = sum(unit.n_bytes for unit in plan.units), shutil.disk_usage(folder).free
    if free < needed:
        raise MossError(
            f"swapping may write {gib(needed)} into {folder}, and {gib(free)} are free there. Free some space, or use "
            "--offload stream: it writes nothing."
        )


def _taken(reader: FileReader, unit: Extent, tensor: UnitTensor) -> Var:
    """A tensor as a Var, which Jittor may swap."""
    memory = page_buffer(tensor.n_bytes)
    reader.read(Extent(unit.path, unit.offset + tensor.offset, tensor.n_bytes), memory)
    var = jt.array(tensor._replace(offset=0).view(memory))
    var.sync()
    return var
