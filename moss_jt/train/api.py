"""A training from a model folder and data, step by step as moss-jt finetune does it: samples, a plan, and the training itself."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jt.backend.cards import Card
from moss_jt.backend.device import decide, parse_device
from moss_jt.backend.gpu_requirements import require_gpu
from moss_jt.backend.threads import compute_threads
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.errors import MossError
from moss_jt.kernels.needs import FLOAT32
from moss_jt.measure.machine_speed import product_speed
from moss_jt.plan.machine import memory_budget
from moss_jt.plan.placement import GpuPlanner, footprint_here, gpu_planner, hold, plan_here
from moss_jt.plan.residency import ResidencyPlan, gib, gib_up, in_slabs, residents_from
from moss_jt.store.config import MossConfig
from moss_jt.store.files import read_small
from moss_jt.store.locations import model_home
from moss_jt.store.manifest import MANIFEST, sha256_of
from moss_jt.store.model_folder import Store
from moss_jt.store.sizes import sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import Dataset
from moss_jt.train.finetune import Finetuning, LearningSettings, Training
from moss_jt.train.frozen_front import FrontRows
from moss_jt.train.fused_optimizers import COPIES_REMEMBERED, FullSettings
from moss_jt.train.learned_turns import Mask
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.masked_samples import DEFAULT_LENGTH, SampleEncoder
from moss_jt.train.master_weights import Masters, parameters_of
from moss_jt.train.state import StateFolder
from moss_jt.train.step_memory import CardNeeds, FullNeeds, Keeping, TrainingNeeds
from moss_jt.train.step_time import Speeds, cheapest
from moss_jt.weights.disk_speed import disk_under

if TYPE_CHECKING:
    from moss_jt.train.model import TrainingModel

# Tokens that a block takes at once, or one sample where that is longer.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class DataSettings:
    """
    length  tokens that a sample has at most; None for what the model has, and 2048 at most
    mask    what counts in the loss, see moss_jt.train.learned_turns.turn_segments
    """

    length: int | None = None
    mask: Mask = "assistant"


def encoder_for(store: Store, tokenizer: Tokenizer, settings: DataSettings) -> SampleEncoder:
    """Samples for this model.

    Raises:
        MossError: the length is none that the model has, or it is no MOSS chat model.
    """
    longest = store.config.n_positions
    length = min(DEFAULT_LENGTH, longest) if settings.length is None else settings.length
    if not 2 <= length <= longest:
        raise MossError(f"samples of {length} tokens are not possible: this model has {longest} positions.")
    encoder = PromptEncoder(tokenizer, store.path.name)
    return SampleEncoder(encoder, store.config.eos_token_ids[0], length, settings.mask)


def needs_of(store: Store, data: Dataset, lora: LoraSettings, course: CourseSettings) -> TrainingNeeds:
    """What learning this takes where nothing is kept."""
    longest = max(len(sample) for sample in [*data.training, *data.evaluation])
    return TrainingNeeds(
        store.config,
        step_tokens=max(longest, course.step_tokens),
        batch_tokens=max(longest, BATCH_TOKENS),
        parameters=len(Adapter(store.config, lora).values),
        trained=store.config.n_layer - lora.first_layer(store.config),
    )


def planned(
    store: Store,
    data: Dataset,
    lora: LoraSettings,
    course: CourseSettings,
    memory: str | int | None,
    speeds: Speeds | None = None,
) -> tuple[ResidencyPlan, TrainingNeeds]:
    """Where the weights live while this is learned, and what waits for the way back: as a step is quickest.

    Args:
        speeds: of this machine; None to measure them, or to take what was measured before.

    Raises:
        MossError: the memory is too little; the message names the smallest that works.
    """

    def plan(needs: TrainingNeeds) -> ResidencyPlan:
        # Training has no cache: a context of one token.
        return residents_from(in_slabs(plan_here(store, needs, memory, 1)), lora.first_layer(store.config))

    needs = needs_of(store, data, lora, course)
    return cheapest(needs, plan, speeds_here(store) if speeds is None else speeds)


@dataclass(frozen=True)
class CardPlanner(GpuPlanner):
    """Of a training on a card: what learns is in the blocks from ``first`` on."""

    first: int = 0

    def _plan(self, budget: int, footprint: int) -> ResidencyPlan:
        return residents_from(in_slabs(super()._plan(budget, footprint)), self.first)


def planned_on_card(
    store: Store,
    data: Dataset,
    lora: LoraSettings,
    course: CourseSettings,
    card: Card,
    gpu_memory: str | int | None,
    host_memory: str | int | None,
) -> tuple[CardPlanner, CardNeeds]:
    """The same on a card. Blocks' inputs are on the disk where the host has no memory for them.

    Raises:
        MossError: the memory of the card or of the host is too little; the message names the smallest that works.
    """
    slab_rows = max(slab.last_row - slab.first_row for slab in sizes_of_store(store).head_slabs())
    training = needs_of(store, data, lora, course)
    for keeping in (Keeping(), Keeping(inputs_on_disk=True)):
        needs = CardNeeds(replace(training, keeping=keeping), store.bits, slab_rows)
        usual = gpu_planner(store, needs, card, gpu_memory, host_memory, 1, "stream")
        planner = CardPlanner(**vars(usual), first=lora.first_layer(store.config))
        planner = replace(planner, host_footprint_bytes=usual.host_footprint_bytes + needs.host_bytes)
        try:
            planner.plan()
        except MossError as error:
            if keeping.inputs_on_disk:
                raise MossError(
                    f"{error} A training takes less where samples are shorter (--length) and steps are (--step-tokens)."
                ) from error
        else:
            break
    return planner, needs


def speeds_here(store: Store) -> Speeds:
    """Of this machine, and of the disk under the model.

    Raises:
        MossError: the model cannot be read.
    """
    return Speeds(product_speed(model_home()), disk_under(store, model_home()).best)


def start(
    store: Store,
    data: Dataset,
    out: Path,
    *,
    lora: LoraSettings,
    course: CourseSettings,
    learning: LearningSettings,
    memory: str | int | None = None,
    speeds: Speeds | None = None,
    device: str = "cpu",
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
) -> Finetuning:
    """A training that is ready to run, at its beginning or where it was left. This starts Jittor.

    Args:
        memory: on the CPU, the most that this process may hold; by default what is free, less a margin.
        speeds: on the CPU, see :func:`planned`.
        device: "cpu", "gpu" or "gpu:1", as of Moss.load.
        gpu_memory, host_memory: on a GPU, the same as memory, of the card and of the host.

    Raises:
        MossError: the memory is too little, ``out`` holds another training, a file cannot be read, or something that a GPU needs is
            missing.
    """
    kind, number = parse_device(device)
    if kind == "gpu":
        planner, card_needs = planned_on_card(
            store, data, lora, course, require_gpu(number)[0], gpu_memory, host_memory
        )
    else:
        plan, needs = planned(store, data, lora, course, memory, speeds)
    decide(kind, "stream", number)
    adapter = Adapter.random(store.config, lora, course.seed)
    about = {"model": sha256_of(read_small(store.path / MANIFEST))}
    # Refused first: a front of another model or of other blocks would replace what that training has kept.
    StateFolder(out / "state", {**about, "lora": dataclasses.asdict(lora)}).check()
    front = _front(store, data, out, adapter.first_layer, about) if adapter.first_layer else None
    model: TrainingModel
    if kind == "gpu":
        from moss_jt.train.card import load_training_on_card

        on_card = load_training_on_card(
            store, planner, model_home(), adapter, card_needs, out / "state", front
        )
        model, plan = on_card, on_card.plan
    else:
        from moss_jt.train.load import load_training

        model = load_training(store, plan, model_home(), adapter, needs, out / "state", front)
    hold(plan)
    return Finetuning(model, data, course, learning, out, store.path.name, about)


def _front(store: Store, data: Dataset, out: Path, first: int, about: dict[str, str]) -> FrontRows:
    """What the frozen blocks make of the samples is kept beside the training's state."""
    tokens = sum(map(len, data.training)) + sum(map(len, data.evaluation))
    wanted = tokens * store.config.n_embd * FLOAT32
    return FrontRows(out / "state" / "front", {**about, "block": first}, store.config.n_embd, wanted)


def planned_full(
    config: MossConfig, data: Dataset, full: FullSettings, course: CourseSettings, memory: str | int | None
) -> FullNeeds:
    """What learning all weights takes; what blocks compute is kept, and gradients are gathered, where there is memory for it.

    Raises:
        MossError: the memory is too little; the message says how much it takes.
    """
    longest = max(len(sample) for sample in [*data.training, *data.evaluation])
    budget, threads, footprint = memory_budget(memory), compute_threads(), footprint_here()
    needs = full_needs(config, longest, full, course).within(budget - footprint, threads)
    least = footprint + needs.bytes(threads)
    if least > budget:
        raise MossError(
            f"learning all weights of this model takes {gib_up(least)} of memory, and the limit is {gib(budget)}. Raise --memory, "
            "lower --step-tokens or --length, or leave out --full: an adapter takes little."
        )
    return needs


def full_needs(config: MossConfig, longest: int, full: FullSettings, course: CourseSettings) -> FullNeeds:
    """Of steps with samples of up to ``longest`` tokens."""
    return FullNeeds(
        config,
        step_tokens=max(longest, course.step_tokens),
        batch_tokens=max(longest, BATCH_TOKENS),
        parameters=parameters_of(config, full.tied),
        copies=COPIES_REMEMBERED[full.optimizer],
        keeps=True,
        gathers=True,
    )


def start_full(
    store: Store,
    data: Dataset,
    out: Path,
    *,
    full: FullSettings,
    course: CourseSettings,
    learning: LearningSettings,
    memory: str | int | None = None,
) -> Training:
    """A training of all weights of a float16 model that is ready to run, as :func:`start` makes one of an adapter.

    ``out/best`` and ``out/last`` become checkpoints, which moss-jt convert makes model folders of.

    Raises:
        MossError: the memory is too little, the model is quantized, ``out`` holds another training, or a file cannot be read.
    """
    needs = planned_full(store.config, data, full, course, memory)
    decide("cpu", "stream", 0)
    from moss_jt.train.full_learner import FullLearner

    masters = Masters.of_store(store, full.tied)
    learner = FullLearner(masters, store.tokenizer_path, full, learning, needs)
    about = {"model": sha256_of(read_small(store.path / MANIFEST))}
    return Training(learner, data, course, learning, out, about)
