"""The plan's arithmetic over many budgets: never above the budget, monotone, even, refused at the right byte."""

import re

import pytest

from moss_jt.errors import MossError
from moss_jt.plan.residency import ResidencyPlan, in_slabs, residents_from, seconds_per_pass, spread
from moss_jt.store.config import MOSS_MOON_003, MossConfig
from moss_jt.store.sizes import GIB, ModelSizes, geometry_of_name, sizes_of_geometry
from tests.support.plans import plan, plan_gpu

SMALL = MossConfig("moss", 5000, 256, 256, 7, 4, 32, 1024, 1e-5, 0, 1)
WIDE_HEAD = MossConfig("moss", 50000, 256, 64, 3, 4, 16, 256, 1e-5, 0, 1)  # head of many slabs, tiny blocks
MODELS = {
    "moon-fp16": (sizes_of_geometry(MOSS_MOON_003), 2048),
    "moon-int4": (sizes_of_geometry(MOSS_MOON_003, 4), 512),
    "small": (sizes_of_geometry(SMALL), 256),
    "wide-head": (sizes_of_geometry(WIDE_HEAD), 100),
}


def smallest_of(error: MossError) -> int:
    match = re.search(r"\((\d+) bytes\)", str(error))
    assert match, error
    return int(match.group(1))


def smallest_budget(sizes: ModelSizes, context: int) -> int:
    with pytest.raises(MossError) as caught:
        plan(sizes, context, 1)
    return smallest_of(caught.value)


def test_published_sizes() -> None:
    """16,717,980,160 parameters; the int4 file's 10.64 GB of weights hold zero points in half the bytes of ours."""
    assert sizes_of_geometry(MOSS_MOON_003).weight_bytes == 2 * 16_717_980_160
    assert 10.6e9 < sizes_of_geometry(MOSS_MOON_003, 4).weight_bytes < 10.75e9
    assert sizes_of_geometry(MOSS_MOON_003).kv_cache_bytes(2048) == 2 * 34 * 2048 * 6144 * 2


@pytest.mark.parametrize("name", MODELS)
def test_never_above_the_budget_and_never_worse_with_more(name: str) -> None:
    sizes, context = MODELS[name]
    smallest = smallest_budget(sizes, context)
    streamed_before = sizes.weight_bytes
    everything = smallest + sizes.weight_bytes
    for step in range(200):
        budget = smallest + (everything - smallest) * step // 199
        placed = plan(sizes, context, budget)
        assert placed.peak_bytes <= budget
        assert placed.disk_bytes_per_pass <= streamed_before
        assert placed.streams == (placed.disk_bytes_per_pass > 0)
        streamed_before = placed.disk_bytes_per_pass
    assert not placed.streams


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_budget_works_and_one_byte_less_is_refused(name: str) -> None:
    sizes, context = MODELS[name]
    smallest = smallest_budget(sizes, context)
    assert plan(sizes, context, smallest).peak_bytes <= smallest
    with pytest.raises(MossError) as caught:
        plan(sizes, context, smallest - 1)
    assert smallest_of(caught.value) == smallest


@pytest.mark.parametrize("name", MODELS)
def test_units_cover_blocks_and_head_once_and_in_order(name: str) -> None:
    sizes, context = MODELS[name]
    units = plan(sizes, context, 64 * GIB).units
    blocks = [unit for unit in units if unit.kind == "block"]
    head = [unit for unit in units if unit.kind == "head"]
    assert list(units) == blocks + head
    assert [unit.index for unit in blocks] == list(range(sizes.config.n_layer))
    assert head[0].first_row == 0 and head[-1].last_row == sizes.config.vocab_size
    assert all(a.last_row == b.first_row for a, b in zip(head, head[1:], strict=False))
    assert sum(unit.n_bytes for unit in head) == sizes.head_bytes


def test_slabs_start_on_pages_of_memory() -> None:
    for sizes, _ in MODELS.values():
        row = sizes.head_bytes // sizes.config.vocab_size
        assert all(slab.first_row * row % 4096 == 0 for slab in sizes.head_slabs())


@pytest.mark.parametrize("total", [1, 2, 7, 36])
def test_streamed_units_are_spread_evenly(total: int) -> None:
    """Gaps between streamed units, around the cycle that passes make, differ by one at most."""
    for count in range(1, total + 1):
        chosen = sorted(spread(count, total))
        assert len(chosen) == count and 0 <= chosen[0] and chosen[-1] < total
        gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + total], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(
        MossError, match=r"Raise --memory to \d\.\d\d GiB or lower --context \(\d+ tokens would fit\)"
    ) as caught:
        plan(sizes_of_geometry(MOSS_MOON_003), 2048, 3 * GIB)
    fits = int(re.search(r"\((\d+) tokens", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert plan(sizes_of_geometry(MOSS_MOON_003), fits, 3 * GIB).peak_bytes <= 3 * GIB


def test_a_context_that_the_model_has_not_is_refused() -> None:
    for context in (0, -1, 2049):
        with pytest.raises(MossError, match="2048 positions"):
            plan(sizes_of_geometry(MOSS_MOON_003), context, 64 * GIB)


@pytest.mark.parametrize("device", [6, 8, 12, 16, 24, 40])
@pytest.mark.parametrize("host", [4, 16, 64])
def test_gpu_tiers_hold_both_budgets(device: int, host: int) -> None:
    sizes = sizes_of_geometry(MOSS_MOON_003)
    placed = plan_gpu(sizes, 2048, device * GIB, host * GIB)
    assert placed.peak_bytes <= device * GIB and placed.host_peak_bytes <= host * GIB
    parts = [placed.bytes_on("device"), placed.bytes_on("host"), placed.bytes_on("disk")]
    assert sum(parts) == sum(sizes.block_bytes) + sizes.head_bytes
    assert placed.link_bytes_per_pass == parts[1] + parts[2]
    assert (parts[2] == 0) == (host == 64 or device == 40 or (device == 24 and host == 16))


def test_host_memory_that_cannot_work_is_refused() -> None:
    sizes = sizes_of_geometry(MOSS_MOON_003)
    with pytest.raises(MossError, match="--host-memory"):
        plan_gpu(sizes, 2048, 8 * GIB, 2 * GIB)
    with pytest.raises(MossError, match="--gpu-memory"):
        plan_gpu(sizes, 2048, 3 * GIB, 64 * GIB)


def test_the_slowest_link_decides_the_time() -> None:
    sizes = sizes_of_geometry(MOSS_MOON_003)
    streamed = plan(sizes, 2048, 8 * GIB)
    assert seconds_per_pass(streamed, 1e9, 40e9) == pytest.approx(streamed.disk_bytes_per_pass / 1e9)
    resident = plan(sizes, 2048, 64 * GIB)
    assert seconds_per_pass(resident, 1e9, 40e9) == pytest.approx(resident.weight_bytes_per_pass / 40e9)
    gpu = plan_gpu(sizes, 2048, 8 * GIB, 64 * GIB)
    assert seconds_per_pass(gpu, 1e9, 400e9, 10e9) == pytest.approx(gpu.link_bytes_per_pass / 10e9)


def test_geometries_by_name() -> None:
    assert geometry_of_name("moss-moon-003") == sizes_of_geometry(MOSS_MOON_003)
    assert geometry_of_name("fnlp/moss-moon-003-sft-plugin-int4") == sizes_of_geometry(MOSS_MOON_003, 4)
    assert geometry_of_name("fnlp/moss-moon-003-sft-int8") == sizes_of_geometry(MOSS_MOON_003, 8)
    assert geometry_of_name("some/folder") is None
    with pytest.raises(MossError, match="int3"):
        geometry_of_name("fnlp/moss-moon-003-sft-int3")


def test_what_is_read_most_often_becomes_resident() -> None:
    def bytes_of(chosen: ResidencyPlan, first: int, resident: bool) -> int:
        units = (unit for unit in chosen.units if unit.kind == "head" or unit.index >= first)
        return sum(unit.n_bytes for unit in units if unit.resident == resident)

    for gigabytes in (6, 9, 14, 20, 80):
        given = in_slabs(plan(MODELS["moon-fp16"][0], 1, gigabytes * 10**9))
        chosen = residents_from(given, 26)
        assert chosen.peak_bytes <= chosen.budget_bytes
        assert chosen.bytes_on("device") + chosen.bytes_on("disk") == sum(u.n_bytes for u in given.units)
        if bytes_of(chosen, 26, resident=False):  # then nothing else is resident, and no more of it has room
            assert bytes_of(chosen, 26, resident=True) == chosen.bytes_on("device")
            assert chosen.budget_bytes - chosen.peak_bytes < 2 * given.buffer_bytes
        assert bool(bytes_of(chosen, 26, resident=False)) == (gigabytes < 14)
    assert residents_from(given, 26) == given  # all of it has room
