"""A training from a model folder and data, step by step as moss-jt finetune does it: samples, a plan, and the training itself."""

from dataclasses import dataclass
from pathlib import Path

from moss_jt.backend.device import decide
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.errors import MossError
from moss_jt.kernels.needs import FLOAT32
from moss_jt.measure.machine_speed import product_speed
from moss_jt.plan.placement import hold, plan_here
from moss_jt.plan.residency import ResidencyPlan, in_slabs, residents_from
from moss_jt.store.files import read_small
from moss_jt.store.locations import model_home
from moss_jt.store.manifest import MANIFEST, sha256_of
from moss_jt.store.model_folder import Store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.train.conversation import Mask
from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import Dataset
from moss_jt.train.finetune import Finetuning, LearningSettings
from moss_jt.train.front import FrontRows
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.needs import TrainingNeeds
from moss_jt.train.pace import Speeds, cheapest
from moss_jt.train.samples import DEFAULT_LENGTH, SampleEncoder
from moss_jt.weights.disk_speed import disk_under

# Tokens that a block takes at once, or one sample where that is longer.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class DataSettings:
    """
    length  tokens that a sample has at most; None for what the model has, and 2048 at most
    mask    what counts in the loss, see moss_jt.train.conversation.turn_pieces
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
    longest = max(len(sample) for sample in [*data.training, *data.evaluation])
    first = lora.first_layer(store.config)
    needs = TrainingNeeds(
        store.config,
        step_tokens=max(longest, course.step_tokens),
        batch_tokens=max(longest, BATCH_TOKENS),
        parameters=len(Adapter(store.config, lora).values),
        trained=store.config.n_layer - first,
    )

    def plan(needs: TrainingNeeds) -> ResidencyPlan:
        # Training has no cache: a context of one token.
        return residents_from(in_slabs(plan_here(store, needs, memory, 1)), first)

    return cheapest(needs, plan, speeds_here(store) if speeds is None else speeds)


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
) -> Finetuning:
    """A training that is ready to run, at its beginning or where it was left. This starts Jittor.

    Raises:
        MossError: the memory is too little, ``out`` holds another training, or a file cannot be read.
    """
    plan, needs = planned(store, data, lora, course, memory)
    decide("cpu", "stream", 0)
    from moss_jt.train.load import load_training

    adapter = Adapter.random(store.config, lora, course.seed)
    about = {"model": sha256_of(read_small(store.path / MANIFEST))}
    front = _front(store, data, out, adapter.first_layer, about) if adapter.first_layer else None
    model = load_training(store, plan, model_home(), adapter, needs, out / "state", front)
    hold(plan)
    return Finetuning(model, data, course, learning, out, store.path.name, about)


def _front(store: Store, data: Dataset, out: Path, first: int, about: dict[str, str]) -> FrontRows:
    """What the frozen blocks make of the samples is kept beside the training's state."""
    tokens = sum(map(len, data.training)) + sum(map(len, data.evaluation))
    wanted = tokens * store.config.n_embd * FLOAT32
    return FrontRows(out / "state" / "front", {**about, "block": first}, store.config.n_embd, wanted)
