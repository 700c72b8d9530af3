"""A CPU's units as its operators take them: Vars over the memory that moss_jt.weights.host_units holds."""

from pathlib import Path

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import Var
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.host_units import HostUnits, open_host_units
from moss_jt.weights.ram_disk import is_in_ram
from moss_jt.weights.shared_head import copy_weights
from moss_jt.weights.unit_tensors import UnitTensor
from moss_jt.weights.weights import Weights


class CpuUnits:
    """See the module, and moss_jt.weights.weights.Units. What was not begun is read from now on."""

    def __init__(self, host: HostUnits) -> None:
        host.begin()
        self.streams, self.closed_at_exit = host.streams, host.closed_at_exit
        self.walk, self.take, self.end, self.close = host.walk, host.take, host.end, host.close

    def weight(self, memory: np.ndarray, tensor: UnitTensor) -> Var:
        """A Var over the unit's own memory."""
        return jt.reuse_np_array(tensor.view(memory))


def open_weights(store: Store, plan: ResidencyPlan, home: Path) -> Weights:
    """The plan's weights, read in the way that suits this machine.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: a file cannot be read.
    """
    return Weights(store, plan, CpuUnits(open_host_units(store, plan, home)))


def open_copy_weights(
    store: Store, plan: ResidencyPlan, home: Path, model: Weights, host: HostUnits
) -> Weights:
    """The weights of a model's copy, all resident, and the head's the model's own.

    Args:
        store, plan: the copy's folder, and the model's plan.
        model, host: the model's weights, which are closed later, and what holds them, which is read first.

    Raises:
        MossError: a file cannot be read.
    """

    def own(blocks: ResidencyPlan) -> CpuUnits:
        reader = None if is_in_ram(store) else reader_for(store, home)
        return CpuUnits(HostUnits(store, blocks, reader, after=host.arrivals))

    return copy_weights(store, plan, model, own)
