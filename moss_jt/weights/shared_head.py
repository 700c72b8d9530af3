"""The units of a copy that drafts for a model: its own blocks, all resident, and the model's head, which both have alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from moss_jt.kernels.interface import Weight
from moss_jt.plan.residency import ResidencyPlan, Unit
from moss_jt.store.model_folder import Store
from moss_jt.weights.unit_tensors import UnitMemory, UnitTensor
from moss_jt.weights.weights import Units, Weights


class SharedHead:
    """See :class:`moss_jt.weights.weights.Units`.

    Args:
        own: holds the copy's blocks, which have the numbers before ``first_head``; closed with this.
        heads: gives what holds the model's head, unit after unit.
    """

    streams = False

    def __init__(self, own: Units, first_head: int, heads: Sequence[Callable[[], UnitMemory]]) -> None:
        self.closed_at_exit = own.closed_at_exit
        self._own = own
        self._heads = {first_head + number: head for number, head in enumerate(heads)}

    def walk(self, order: Sequence[int]) -> None:
        pass

    def take(self, number: int) -> UnitMemory:
        head = self._heads.get(number)
        return self._own.take(number) if head is None else UnitMemory(("head", number), head().memory)

    def weight(self, memory: object, tensor: UnitTensor) -> Weight:
        return self._own.weight(memory, tensor)

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._heads.clear()
        self._own.close()


def copy_weights(
    store: Store, plan: ResidencyPlan, model: Weights, open_blocks: Callable[[ResidencyPlan], Units]
) -> Weights:
    """The weights of a copy.

    Args:
        store: the copy's folder.
        plan, model: the model's, whose weights are closed later.
        open_blocks: holds the units of a plan of blocks, all of which are resident.
    """
    assert plan.copy is not None, "the plan has no copy"
    blocks = tuple(Unit("block", i, n, tier="device") for i, n in enumerate(plan.copy.block_bytes))
    heads = [unit for unit in plan.units if unit.kind == "head"]
    own = replace(
        plan, sizes=plan.copy, copy=None, units=blocks, ring_buffers=0, buffer_bytes=0, host_ring_buffers=0
    )
    units = SharedHead(open_blocks(own), len(blocks), model.head_memories())
    return Weights(store, replace(own, units=(*blocks, *heads)), units)
