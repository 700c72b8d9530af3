"""How long a training step takes at least on a machine, and what it therefore keeps for its way back. Arithmetic: no Jittor."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moss_jt.errors import MossError
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.config import MossConfig
from moss_jt.train.step_memory import Keeping, TrainingNeeds

# Steps between keeping nothing and everything in memory that are looked at.
SHARES = 8


class Speeds(NamedTuple):
    """Of float32 products of matrices, and of the disk under the model, which the training is thought to be on, too."""

    flop_per_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True)
class StepPace:
    """What one step takes at least: the disk works while the processor computes.

    flop        of its products
    disk_bytes  that it reads and writes
    """

    flop: float
    disk_bytes: int
    speeds: Speeds

    @property
    def seconds(self) -> float:
        return max(self.flop / self.speeds.flop_per_s, self.disk_bytes / self.speeds.disk_bytes_per_s)


def step_pace(
    plan: ResidencyPlan,
    needs: TrainingNeeds,
    speeds: Speeds,
    predicted: int | None = None,
    front: bool = True,
) -> StepPace:
    """Of a step of ``needs.step_tokens`` tokens.

    Args:
        predicted: tokens of it that count in the loss; None for all.
        front: the blocks before those that are trained are computed, too; False once their results are kept.
    """
    c = needs.config
    first = c.n_layer - needs.trained_blocks
    head = 2 * c.vocab_size * c.n_embd
    per_block = 2 * _matrix_weights(c)
    again = needs.trained_blocks - needs.keeping.in_memory - needs.keeping.on_disk
    flop = needs.step_tokens * (
        (2 * needs.trained_blocks + (first if front else 0)) * per_block
        + again * 2 * c.n_embd * (3 * c.n_embd + c.n_inner)
    )
    # Logits once for the loss and once for its derivative, and the way back through the head.
    flop += (needs.step_tokens if predicted is None else predicted) * 3 * head
    streamed = [unit for unit in plan.units if not unit.resident]
    twice = [unit for unit in streamed if unit.kind == "head" or unit.index >= first]
    once = [unit for unit in streamed if unit.kind == "block" and unit.index < first] if front else []
    read = 2 * sum(unit.n_bytes for unit in twice) + sum(unit.n_bytes for unit in once)
    return StepPace(flop, read + 2 * needs.file_bytes, speeds)


def cheapest(
    needs: TrainingNeeds, planned: Callable[[TrainingNeeds], ResidencyPlan], speeds: Speeds
) -> tuple[ResidencyPlan, TrainingNeeds]:
    """The plan and the keeping with which a step is quickest; of those that are alike, the one that writes least.

    Args:
        needs: of the training, whatever it keeps.
        planned: where the weights live with such needs, or a MossError where they have no room.

    Raises:
        MossError: nothing has room; the message names the smallest memory that works.
    """
    best: tuple[tuple[float, int, int], ResidencyPlan, TrainingNeeds] | None = None
    refused: MossError | None = None
    for keeping in _ways(needs):
        tried = dataclasses.replace(needs, keeping=keeping)
        try:
            plan = planned(tried)
        except MossError as error:
            refused = error  # the last way needs least
            continue
        seconds = step_pace(plan, tried, speeds, front=False).seconds
        key = seconds, tried.file_bytes, -plan.bytes_on("device")
        if best is None or key < best[0]:
            best = key, plan, tried
    if best is None:
        assert refused is not None
        raise refused
    return best[1], best[2]


def _ways(needs: TrainingNeeds) -> Iterator[Keeping]:
    """From the one that needs most memory to the one that needs least."""
    blocks = needs.trained_blocks
    counts = sorted({blocks * share // SHARES for share in range(SHARES + 1)}, reverse=True)
    for inputs_on_disk in (False, True):
        for in_memory in counts:
            yield Keeping(in_memory, blocks - in_memory, inputs_on_disk)
        yield Keeping(0, 0, inputs_on_disk)


def _matrix_weights(c: MossConfig) -> int:
    return 4 * c.n_embd * c.n_embd + 2 * c.n_embd * c.n_inner
