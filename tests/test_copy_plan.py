"""Plans with a copy that drafts: what is counted, what fits, and which copy is taken."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moss_jt.commands.plan import command
from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.plan.copy_choice import best_copy, may_pay, pays
from moss_jt.plan.drafting import CPU_COPY_SHARE, Outlook, outlook, tokens_per_pass
from moss_jt.plan.report import Speed, Speeds, report
from moss_jt.plan.residency import Copy, ResidencyPlan, TooLittleError
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import GIB, sizes_of_geometry
from tests.support.plans import plan, plan_gpu
from tests.support.random_models import SMALL, random_folder

MOON, INT4 = sizes_of_geometry(MOSS_MOON_003), sizes_of_geometry(MOSS_MOON_003, 4)
COPY = Copy(INT4, CpuNeeds(MOSS_MOON_003, 4))
CARD_COPY = Copy(INT4, CudaNeeds(MOSS_MOON_003, 4))
SPEEDS = Speeds(Speed(3e9, "given"), Speed(20e9, "given"))


def test_the_copy_is_counted_and_the_head_but_once() -> None:
    plain, drafted = (plan(MOON, 2048, 16 * GIB, copy=copy) for copy in (None, COPY))
    assert drafted.copy_bytes == sum(INT4.block_bytes) + INT4.small_bytes and plain.copy_bytes == 0
    assert all(unit.resident for unit in drafted.units if unit.kind == "head")
    assert drafted.peak_bytes <= 16 * GIB < drafted.peak_bytes + max(MOON.block_bytes)
    assert drafted.bytes_on("device") < plain.bytes_on("device")
    # What is lost to the model's own blocks is the copy, its workspace, and one block that does not fit any more.
    lost = plain.bytes_on("device") - drafted.bytes_on("device")
    assert abs(lost - drafted.copy_bytes) < 2 * max(MOON.block_bytes)
    assert drafted.copy_bytes_per_pass == drafted.copy_bytes + MOON.head_bytes
    text = report("moss-moon-003", drafted, SPEEDS)
    amounts = re.findall(r"^  [a-z/ ]+? +([\d.]+) ([GM])iB", text, re.MULTILINE)
    parts = [float(amount) / (1 if unit == "G" else 1024) for amount, unit in amounts]
    assert len(parts) == 7 and abs(sum(parts[:-1]) - parts[-1]) < 0.05 and "int4, writes drafts" in text


def test_a_budget_that_lacks_room_for_the_copy_names_a_context() -> None:
    with pytest.raises(TooLittleError, match="for the copy that drafts") as error:
        plan(MOON, 2048, 12 * GIB, copy=COPY)
    context = error.value.context
    assert 0 < context < 2048 and plan(MOON, context, 12 * GIB, copy=COPY).copy is INT4
    with pytest.raises(TooLittleError):
        plan(MOON, context + 128, 12 * GIB, copy=COPY)
    with pytest.raises(TooLittleError) as hopeless:
        plan(MOON, 2048, 6 * GIB, copy=COPY)
    assert hopeless.value.context == 0


def test_the_law() -> None:
    assert tokens_per_pass(0.93, 0) == pytest.approx(1)
    assert tokens_per_pass(0.93, 16) == pytest.approx(sum(0.93**n for n in range(17)))
    assert tokens_per_pass(1, 22) == 23 and tokens_per_pass(0, 22) == 1
    plain, drafted = (plan(MOON, 2048, 16 * GIB, copy=copy) for copy in (None, COPY))
    assert outlook(plain, 3e9, 20e9).seconds_per_token == pytest.approx(plain.disk_bytes_per_pass / 3e9)
    one = outlook(drafted, 3e9, 20e9, agreement=0.93)
    expected = one.drafted * drafted.copy_bytes_per_pass / (20e9 * CPU_COPY_SHARE) + one.pass_s
    assert one.seconds_per_token == pytest.approx(expected / tokens_per_pass(0.93, one.drafted))
    assert one.seconds_per_token < outlook(plain, 3e9, 20e9).seconds_per_token / 3


def test_a_card_of_16_gib_writes_five_tokens_a_second() -> None:
    """Computed: float16 from pinned memory over PCIe 4."""
    drafted = plan_gpu(MOON, 2048, 16 * GIB, 30 * GIB, copy=CARD_COPY)
    assert drafted.peak_bytes <= 16 * GIB and drafted.copy is INT4
    assert outlook(drafted, 1e9, 400e9, 25e9).seconds_per_token <= 0.2


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, ["moss-moon-003", *arguments, "--memory-speed", "20"])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_takes_the_better_and_says_what_would_do() -> None:
    text = run("--memory", "16GiB", "--disk-speed", "3", "--draft-bits", "4")
    assert "An int4 copy that drafts is counted in; without it a token takes 6.56 s." in text
    assert "  copy                7.51 GiB  int4" in text and "Expected: 1." in text
    text = run("--memory", "12GiB", "--disk-speed", "3", "--draft-bits", "4")
    context = re.search(r"An int4 copy that drafts does not fit here. It would with --context (\d+)\.", text)
    assert context is not None and "  copy " not in text
    text = run("--memory", "12GiB", "--disk-speed", "3", "--draft-bits", "4", "--context", context[1])
    assert "is counted in" in text
    refused = CliRunner().invoke(
        command, ["moss-moon-003", "--bits", "4", "--draft-bits", "4", "--memory", "16GiB"]
    )
    assert refused.exit_code and "fewer bits than the model" in str(refused.exception)


class Given(Speeds):
    """A token takes so long with a copy, and a second without."""

    def __init__(self, seconds: float) -> None:
        object.__setattr__(self, "given", seconds)

    def outlook(self, plan: ResidencyPlan, agreement: float = 0.93) -> Outlook:
        return Outlook(0, 1.0, 0.0, self.given if plan.copy is not None else 1.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("taken", [True, False])
def test_the_copy_of_fewest_bits_that_fits_is_taken_where_it_pays(taken: bool) -> None:
    store = open_store(random_folder(SMALL))
    copies: list[Path] = [random_folder(SMALL, bits) for bits in (4, 8)]
    asked: list[int] = []

    def plan_with(copy: Store | None) -> ResidencyPlan:
        assert copy is not None
        asked.append(copy.bits)
        if copy.bits == 4:
            raise TooLittleError("too little", 64)
        sizes = sizes_of_geometry(SMALL)
        own = Copy(sizes_of_geometry(SMALL, 8), CpuNeeds(SMALL, 8))
        full = plan(sizes, 256, 1 << 40, copy=own)
        return plan(sizes, 256, full.peak_bytes - 2 * max(sizes.block_bytes), copy=own)

    sizes = sizes_of_geometry(SMALL)
    plain = plan(sizes, 256, plan(sizes, 256, 1 << 40).peak_bytes - max(sizes.block_bytes))
    choice = best_copy(store, copies, plain, plan_with, Given(0.9 if taken else 1.1))
    assert asked == [4, 8]
    if taken:
        assert choice.copy is not None and choice.copy.path == copies[1] and choice.plan.copy is not None
    else:
        assert choice.copy is None and choice.plan is plain and choice.notice.endswith("with --context 64.")


def test_where_everything_is_resident_a_copy_must_clearly_pay() -> None:
    plans = {bits: plan(sizes_of_geometry(MOSS_MOON_003, bits), 2048, 62 * GIB) for bits in (16, 8)}
    drafted = {
        bits: plan(sizes_of_geometry(MOSS_MOON_003, bits), 2048, 62 * GIB, copy=COPY) for bits in (16, 8)
    }
    assert not any(one.streams for one in (*plans.values(), *drafted.values()))
    assert may_pay(plans[16]) and pays(plans[16], drafted[16], SPEEDS)
    assert not pays(plans[8], drafted[8], SPEEDS)
    # Room for the model, and not for the copy, too: the model would have to stream.
    budget = plans[16].peak_bytes + max(MOON.block_bytes)
    crowded = plan(MOON, 2048, budget, copy=COPY)
    fast_disk = Speeds(Speed(1e15, "given"), Speed(20e9, "given"))
    assert crowded.streams and fast_disk.seconds(crowded) * 1.2 < fast_disk.seconds(plans[16])
    assert not pays(plan(MOON, 2048, budget), crowded, fast_disk)
    # Small models, whose passes are mostly Python's and Jittor's, and cards, on which this was never measured.
    assert not may_pay(plan(sizes_of_geometry(SMALL), 256, GIB))
    assert not may_pay(plan_gpu(MOON, 2048, 62 * GIB, 62 * GIB))
