"""What teaching a model would take, before anything starts: memory, and seconds per step. The arithmetic is that of a training."""

from dataclasses import dataclass, replace

from moss_jt.errors import MossError
from moss_jt.plan.residency import (
    FOOTPRINT_BYTES,
    GPU_HOST_FOOTPRINT_BYTES,
    ResidencyPlan,
    gib,
    gib_up,
    in_slabs,
    plan,
    plan_gpu,
    residents_from,
)
from moss_jt.plan.summary import duration
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig
from moss_jt.store.sizes import ModelSizes
from moss_jt.train.api import BATCH_TOKENS, full_needs
from moss_jt.train.course import CourseSettings
from moss_jt.train.fused_optimizers import FullSettings
from moss_jt.train.lora import LoraSettings
from moss_jt.train.master_weights import parameters_of
from moss_jt.train.step_memory import CardNeeds, TrainingNeeds
from moss_jt.train.step_time import Speeds, cheapest, step_pace

# A day's conversations, or a small data set.
EXAMPLE_TOKENS = 100_000


@dataclass(frozen=True)
class TrainingOutlook:
    """
    peak_bytes   the most that the process holds; on a card, there
    host_bytes   on a card, the most in RAM; 0 otherwise
    tokens       of a step
    seconds      that a step takes at least
    later        the same from the second epoch on, where blocks in front are frozen
    """

    peak_bytes: int
    tokens: int
    seconds: float
    later: float
    host_bytes: int = 0

    def __str__(self) -> str:
        speed = f"{self.tokens / self.seconds:.1f} tokens/s"
        if self.later < 0.99 * self.seconds:
            speed += f", from the second epoch on {self.tokens / self.later:.1f}"
        long = duration(EXAMPLE_TOKENS / self.tokens * self.seconds)
        where = f" of the card and {gib_up(self.host_bytes)} of RAM" if self.host_bytes else ""
        return (
            f"at most {gib_up(self.peak_bytes)}{where}; a step of {self.tokens} tokens takes {duration(self.seconds)} at best "
            f"({speed}), {EXAMPLE_TOKENS} tokens {long}"
        )


def _needs_of(sizes: ModelSizes, lora: LoraSettings, course: CourseSettings) -> TrainingNeeds:
    """What an adapter's training takes where nothing is kept, of samples no longer than a step."""
    return TrainingNeeds(
        sizes.config,
        step_tokens=course.step_tokens,
        batch_tokens=min(BATCH_TOKENS, course.step_tokens),
        parameters=adapter_parameters(sizes.config, lora),
        trained=sizes.config.n_layer - lora.first_layer(sizes.config),
    )


def adapter_outlook(
    sizes: ModelSizes,
    lora: LoraSettings,
    course: CourseSettings,
    budget_bytes: int,
    threads: int,
    speeds: Speeds,
) -> TrainingOutlook:
    """Of an adapter over a frozen model.

    Raises:
        MossError: the memory is too little; the message names the smallest that works.
    """
    first, needs = lora.first_layer(sizes.config), _needs_of(sizes, lora, course)

    def planned(needs: TrainingNeeds) -> ResidencyPlan:
        chosen = plan(sizes, needs, 1, budget_bytes, threads=threads, footprint_bytes=FOOTPRINT_BYTES)
        return residents_from(in_slabs(chosen), first)

    chosen, needs = cheapest(needs, planned, speeds)
    first_time, later = (step_pace(chosen, needs, speeds, front=front).seconds for front in (True, False))
    return TrainingOutlook(chosen.peak_bytes, needs.step_tokens, first_time, later)


def card_outlook(
    sizes: ModelSizes,
    lora: LoraSettings,
    course: CourseSettings,
    card_bytes: int,
    host_bytes: int,
    speeds: Speeds,
    link_bytes_per_s: float,
) -> TrainingOutlook:
    """Of an adapter that learns on a card; ``speeds`` are the card's products and the disk.

    Raises:
        MossError: the memory of the card or the host is too little; the message names the smallest that works.
    """
    first, training = lora.first_layer(sizes.config), _needs_of(sizes, lora, course)
    needs = CardNeeds(
        training, sizes.bits, max(slab.last_row - slab.first_row for slab in sizes.head_slabs())
    )
    footprint = GPU_HOST_FOOTPRINT_BYTES + needs.host_bytes
    chosen = plan_gpu(sizes, needs, 1, card_bytes, host_bytes, host_footprint_bytes=footprint)
    chosen = residents_from(in_slabs(chosen), first)
    from_disk = replace(
        chosen,
        units=tuple(unit if unit.tier == "disk" else replace(unit, tier="device") for unit in chosen.units),
    )
    link = Speeds(speeds.flop_per_s, link_bytes_per_s)
    first_time, later = (
        max(
            step_pace(plan, training, of, front=front).seconds
            for plan, of in ((chosen, link), (from_disk, speeds))
        )
        for front in (True, False)
    )
    return TrainingOutlook(chosen.peak_bytes, training.step_tokens, first_time, later, chosen.host_peak_bytes)


def full_outlook(
    config: MossConfig,
    full: FullSettings,
    course: CourseSettings,
    budget_bytes: int,
    threads: int,
    speeds: Speeds,
) -> TrainingOutlook:
    """Of all weights; a product forwards, and two on the way back.

    Raises:
        MossError: the memory is too little; the message says how much it takes.
    """
    needs = full_needs(config, min(BATCH_TOKENS, course.step_tokens), full, course)
    needs = needs.within(budget_bytes - FOOTPRINT_BYTES, threads)
    peak = FOOTPRINT_BYTES + needs.bytes(threads)
    if peak > budget_bytes:
        raise MossError(f"takes {gib_up(peak)} of memory, and the limit is {gib(budget_bytes)}.")
    products = parameters_of(config) - config.vocab_size * config.n_embd  # the embedding is looked up
    again = 0 if needs.keeps else 2 * config.n_layer * config.n_embd * (3 * config.n_embd + config.n_inner)
    seconds = needs.step_tokens * (6 * products + again) / speeds.flop_per_s
    return TrainingOutlook(peak, needs.step_tokens, seconds, seconds)


def adapter_parameters(config: MossConfig, lora: LoraSettings) -> int:
    layers = config.n_layer - lora.first_layer(config)
    matrices = [tensor.shape(config) for tensor in BLOCK if tensor.is_matrix and tensor.field in lora.targets]
    return layers * sum(lora.rank * sum(shape) for shape in matrices)
