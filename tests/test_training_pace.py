"""What a training step takes at least, and what it keeps for its way back: arithmetic over budgets and speeds."""

from dataclasses import replace

import pytest

from moss_jt.errors import MossError
from moss_jt.plan import residency
from moss_jt.plan.residency import ResidencyPlan, in_slabs
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.sizes import GIB, sizes_of_geometry
from moss_jt.train.step_memory import Keeping, TrainingNeeds
from moss_jt.train.step_time import Speeds, cheapest, step_pace

NEEDS = TrainingNeeds(MOSS_MOON_003, 512, 512, 26_700_000)
SLOW = Speeds(250e9, 3e9)  # two cores
QUICK = Speeds(20e12, 1e9)


def planner(budget: int) -> object:
    sizes = sizes_of_geometry(MOSS_MOON_003)
    return lambda needs: in_slabs(residency.plan(sizes, needs, 1, budget, threads=2))


def chosen(budget: int, speeds: Speeds, needs: TrainingNeeds = NEEDS) -> tuple[ResidencyPlan, TrainingNeeds]:
    return cheapest(needs, planner(budget), speeds)  # type: ignore[arg-type]


def test_where_values_wait() -> None:
    keeping = Keeping(in_memory=2, on_disk=3)
    assert [keeping.where(layer, 7) for layer in range(7)] == [
        "nowhere", "nowhere", "disk", "disk", "disk", "memory", "memory",
    ]  # fmt: skip


def test_published_operations_of_a_token() -> None:
    """64 GFLOP with everything kept, as arithmetic has it; what blocks compute again is 7 of 12 parts of their way there."""
    plan, _ = chosen(64 * GIB, SLOW)
    kept = step_pace(plan, replace(NEEDS, keeping=Keeping(34)), SLOW)
    again = step_pace(plan, NEEDS, SLOW)
    per_block = 2 * 12 * 6144**2
    head = 2 * 107008 * 6144
    assert kept.flop == 512 * (2 * 34 * per_block + 3 * head)
    assert again.flop - kept.flop == 512 * 34 * per_block * 7 // 12
    assert 62e9 < kept.flop / 512 < 67e9
    assert step_pace(plan, NEEDS, SLOW, predicted=0).flop == again.flop - 512 * 3 * head


def test_only_what_is_trained_is_read_twice() -> None:
    plan, _ = chosen(8 * GIB, SLOW)
    last = replace(NEEDS, trained=8)
    streamed = [unit for unit in plan.units if not unit.resident]
    often = sum(unit.n_bytes for unit in streamed if unit.kind == "head" or unit.index >= 26)
    seldom = sum(unit.n_bytes for unit in streamed) - often
    assert step_pace(plan, last, SLOW).disk_bytes == 2 * often + seldom
    assert step_pace(plan, last, SLOW, front=False).disk_bytes == 2 * often


def test_two_cores_keep_on_the_disk_what_memory_has_no_room_for() -> None:
    plan, needs = chosen(8 * GIB, SLOW)
    keeping = needs.keeping
    assert keeping.in_memory + keeping.on_disk == 34  # computing is what takes long here
    assert plan.peak_bytes <= 8 * GIB
    plan, needs = chosen(64 * GIB, SLOW)
    assert needs.keeping == Keeping(in_memory=34) and not plan.streams


def test_a_quick_processor_computes_again_what_the_disk_is_too_slow_for() -> None:
    plan, needs = chosen(8 * GIB, QUICK)
    assert plan.streams and not needs.keeping.uses_disk
    everything = replace(needs, keeping=Keeping(0, 34))
    assert step_pace(plan, needs, QUICK).seconds < step_pace(plan, everything, QUICK).seconds


def test_long_steps_go_where_their_inputs_have_no_room_in_memory() -> None:
    long = replace(NEEDS, step_tokens=16 * 512)
    assert long.input_bytes > 6 * GIB
    plan, needs = chosen(6 * GIB, SLOW, long)
    assert needs.keeping.inputs_on_disk and plan.peak_bytes <= 6 * GIB
    with pytest.raises(MossError, match="too little"):
        chosen(3 * GIB, SLOW, long)
