"""moss-jt finetune."""

from itertools import groupby
from pathlib import Path

import click
import numpy as np
from click.core import ParameterSource
from numpy.typing import NDArray

from moss_jt.commands.convert import resumable, run_conversion, terminated_as_interrupted
from moss_jt.commands.options import device_of
from moss_jt.commands.progress import token_bar
from moss_jt.commands.quant_options import QuantOptions
from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.named import model_folder
from moss_jt.convert.pipeline import recipe_for
from moss_jt.errors import MossError
from moss_jt.store.model_folder import open_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.screen import Screen
from moss_jt.train.api import DataSettings, encoder_for, start, start_full
from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import Dataset, read_dataset
from moss_jt.train.finetune import LearningSettings, Progress, Training
from moss_jt.train.fused_optimizers import USUAL_RATES, FullSettings, OptimizerName
from moss_jt.train.learned_turns import Mask
from moss_jt.train.lora import TARGETS, LoraSettings
from moss_jt.train.masked_samples import TokenSample

SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 1200
SAID_TOKENS = 40


@click.command()
@click.argument("model")
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="The adapter's folder.  [default: MODEL-adapter]",
)
@click.option(
    "--eval",
    "judged_by",
    type=click.Path(exists=True, path_type=Path),
    help="Samples to judge by.  [default: a part of DATA]",
)
@click.option(
    "--rank",
    type=int,
    default=8,
    show_default=True,
    help="Of each adapter: more learns more, and takes more.",
)
@click.option("--alpha", type=float, help="How strongly adapters count.  [default: twice the rank]")
@click.option("--targets", default=",".join(TARGETS), show_default=True, help="Matrices that have adapters.")
@click.option(
    "--full",
    is_flag=True,
    help="All weights of a float16 model learn, instead of an adapter. They must fit into the memory in float32.",
)
@click.option(
    "--optimizer",
    type=click.Choice(list(USUAL_RATES)),
    help="With --full: what each weight remembers; adamw takes three times the memory.  [default: adalomo]",
)
@click.option("--layers", type=int, metavar="N", help="Only the last N blocks have adapters.  [default: all]")
@click.option(
    "--epochs", type=float, default=2.0, show_default=True, help="How often all samples are learned."
)
@click.option("--steps", type=int, help="How many steps there are, instead of --epochs.")
@click.option(
    "--step-tokens",
    type=int,
    default=1024,
    show_default=True,
    help="A step takes about so many tokens; the weights are read twice for it, however many.",
)
@click.option(
    "--lr",
    type=float,
    help="The largest learning rate.  [default: 1e-4; with --full 5e-4, adamw 2e-5, lomo 0.03]",
)
@click.option(
    "--weight-decay", type=float, default=0.0, show_default=True, help="Of matrices; norms and biases keep."
)
@click.option(
    "--clip",
    type=float,
    default=1.0,
    show_default=True,
    help="The longest gradient; inf for any. adalomo needs none; of adamw and lomo it may take a second walk back.",
)
@click.option("--evaluate-every", type=int, metavar="STEPS", help="[default: ten times in all]")
@click.option(
    "--length",
    type=int,
    metavar="TOKENS",
    help="Longer conversations are cut.  [default: 2048, or what the model has]",
)
@click.option(
    "--mask",
    type=click.Choice(["assistant", "moss"]),
    default="assistant",
    show_default=True,
    help="What is learned: what MOSS writes, or as MOSS was trained: all but the instruction and what results say.",
)
@click.option(
    "--seed",
    type=int,
    default=42,
    show_default=True,
    help="The same seed gives the same adapter, to the bit.",
)
@click.option(
    "--memory",
    metavar="AMOUNT",
    help="RAM for the whole process: 8GiB, 80%.  [default: what is free]",
)
@click.option(
    "--gpu",
    is_flag=True,
    help="Learn on the GPU. Weights that do not fit there are copied to it twice for every step.",
)
@click.option(
    "--device",
    type=click.IntRange(min=0, max=999),
    metavar="N",
    help="With --gpu: which card, counted from 0 as moss-jt doctor lists them.  [default: 0]",
)
@click.option(
    "--gpu-memory",
    metavar="AMOUNT",
    help="With --gpu: the limit on the card.  [default: what is free there, less a margin]",
)
@click.option(
    "--host-memory",
    metavar="AMOUNT",
    help="With --gpu: the limit in RAM.  [default: what is free, less a margin]",
)
def command(
    model: str,
    data: Path,
    out: Path | None,
    judged_by: Path | None,
    rank: int,
    alpha: float | None,
    targets: str,
    full: bool,
    optimizer: OptimizerName | None,
    layers: int | None,
    epochs: float,
    steps: int | None,
    step_tokens: int,
    lr: float | None,
    weight_decay: float,
    clip: float,
    evaluate_every: int | None,
    length: int | None,
    mask: Mask,
    seed: int,
    memory: str | None,
    gpu: bool,
    device: int | None,
    gpu_memory: str | None,
    host_memory: str | None,
) -> None:
    """Teach MODEL from conversations: a small adapter (LoRA) learns, the model itself stays as it is. Or all of a small MODEL
    learns, with --full.

    DATA is a file of JSON or JSON lines, or a folder of such files: MOSS's own form, OpenAI's messages, ShareGPT, Alpaca, prompt
    and completion, or text; the form is found out. The same command goes on where it ended, after a kill as well.

    \b
    moss-jt finetune moss-tiny dialogues.jsonl --out my-adapter --epochs 3
    moss-jt finetune moss-moon-003-sft data/ --memory 8GiB --layers 8
    moss-jt finetune moss-moon-003-sft data/ --gpu --gpu-memory 6GiB
    moss-jt merge moss-moon-003-sft my-adapter --out my-moss
    moss-jt finetune moss-tiny dialogues.jsonl --full --out my-tiny
    """
    check_options(full, optimizer)
    if gpu and full:
        raise MossError(
            "all weights (--full) learn on the processor only, in its memory. Leave --gpu away, or --full: an adapter learns on a "
            "card."
        )
    where = device_of(
        {
            "gpu": gpu,
            "device": device,
            "memory": memory,
            "gpu_memory": gpu_memory,
            "host_memory": host_memory,
            "offload": "stream",
        }
    )
    screen = Screen()
    store = open_store(model_folder(model))
    out = Path(f"{store.path.name}-{'full' if full else 'adapter'}") if out is None else out
    tokenizer = Tokenizer.from_file(store.tokenizer_path)
    tokenizer.check_size(store.config.vocab_size)
    lora = LoraSettings(
        rank, 2.0 * rank if alpha is None else alpha, [name.strip() for name in targets.split(",")], layers
    )
    lora.first_layer(store.config)
    course = CourseSettings(epochs, steps, step_tokens, seed)
    all_of_it = FullSettings(optimizer or FullSettings.optimizer)
    if lr is None:
        lr = USUAL_RATES[all_of_it.optimizer] if full else LearningSettings.learning_rate
    learning = LearningSettings(lr, weight_decay=weight_decay, clip=clip, evaluate_every=evaluate_every)
    samples = encoder_for(store, tokenizer, DataSettings(length, mask))
    with token_bar("reading", 0, "samples") as bar:
        dataset = read_dataset(data, samples, judged_by, lambda count: bar.update(count - bar.n))
    show_data(screen, dataset, tokenizer)
    training: Training
    if full:
        training = start_full(
            store, dataset, out, full=all_of_it, course=course, learning=learning, memory=memory
        )
    else:
        training = start(
            store,
            dataset,
            out,
            lora=lora,
            course=course,
            learning=learning,
            memory=memory,
            device=where,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
        )
    if training.state.step:
        screen.line(f"{out} goes on after step {training.state.step} of {training.total}.")
    with terminated_as_interrupted(), resumable(out):
        try:
            run(screen, training, dataset.evaluation, tokenizer)
        except KeyboardInterrupt:
            training.keep()
            raise
        tell_result(screen, training, out)


def check_options(full: bool, optimizer: OptimizerName | None) -> None:
    """Raises UsageError where an option is of the other way of learning."""
    if optimizer is not None and not full:
        raise click.UsageError("--optimizer goes with --full; an adapter learns by AdamW.")
    context = click.get_current_context()
    for name in ("rank", "alpha", "targets", "layers"):
        if full and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is of adapters; with --full all weights learn.")


def tell_result(screen: Screen, training: Training, out: Path) -> None:
    """Where what was learned stands; of a model that learned as a whole a model folder is made."""
    if training.best_folder == out:
        screen.line(f"The adapter is in {out}; the last one, which may not be the best, in {out / 'last'}.")
        return
    source = open_local(training.best_folder)
    run_conversion(
        source, recipe_for(source), QuantOptions((), None, None, None, act_order=False), out / "model"
    )
    screen.line(f"{out / 'model'} is ready. Talk to it with: moss-jt chat {out / 'model'}")
    screen.line(f"Checkpoints for other programs: {training.best_folder}, and {out / 'last'}.")


def show_data(screen: Screen, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """What the data have become, and three samples with what is learned of them in colour."""
    for line in dataset.report.lines():
        screen.line(line)
    tokens = sum(map(len, dataset.training))
    targets = sum(int(sample.targets.sum()) for sample in dataset.training)
    screen.line(
        f"{len(dataset.training)} samples to learn from ({tokens} tokens, {targets} of them learned), {len(dataset.evaluation)} to "
        "judge by."
    )
    for sample in dataset.training[:SHOWN_SAMPLES]:
        screen.line()
        show_sample(screen, sample, tokenizer)
    screen.line()


def show_sample(screen: Screen, sample: TokenSample, tokenizer: Tokenizer) -> None:
    """The end of a sample; what is learned stands in colour, or, where there is none, between brackets."""
    left = SHOWN_CHARACTERS
    runs = [
        (learned, tokenizer.decode([token for token, _ in run]))
        for learned, run in groupby(
            zip(sample.token_ids.tolist(), sample.targets.tolist(), strict=True), key=lambda pair: pair[1]
        )
    ]
    kept: list[tuple[bool, str]] = []
    for learned, text in reversed(runs):
        kept.append((learned, text[-left:]))
        left -= len(text)
        if left <= 0:
            break
    for learned, text in reversed(kept):
        if learned and not screen.styled:
            text = f"[{text}]"
        screen.write(text, "ok" if learned else "dim")


def run(screen: Screen, training: Training, judged: list[TokenSample], tokenizer: Tokenizer) -> None:
    """All steps, with a bar; for each evaluation a line, and what the model would say to one of the samples."""
    shown = 0
    with token_bar("learning", training.total, "step", done=training.state.step) as bar:
        for progress in training.run():
            bar.set_postfix_str(postfix(progress), refresh=False)
            bar.update()
            if progress.evaluation is not None:
                bar.clear()
                screen.line(evaluation_line(progress))
                number = shown % min(len(judged), SHOWN_SAMPLES)
                screen.line(said(judged, number, progress.evaluation.likeliest, tokenizer))
                shown += 1


def said(judged: list[TokenSample], number: int, likeliest: NDArray[np.int64], tokenizer: Tokenizer) -> str:
    """What sample ``number`` has at its end, and what the model says there: each token after the right ones before it."""
    sample = judged[number]
    before = sum(int(one.targets.sum()) for one in judged[:number])
    positions = np.flatnonzero(sample.targets)[-SAID_TOKENS:]
    last = before + int(sample.targets.sum())
    ours = likeliest[last - len(positions) : last].tolist()
    wanted, written = (tokenizer.decode(ids) for ids in (sample.token_ids[positions].tolist(), ours))
    return f"  wanted: {' '.join(wanted.split())}\n  says:   {' '.join(written.split())}"


def postfix(progress: Progress) -> str:
    result, rate = progress.result, progress.tokens / progress.seconds
    return f"loss {result.loss:.3f}, {result.accuracy:.0%} right, {rate:.1f} tok/s"


def evaluation_line(progress: Progress) -> str:
    result = progress.evaluation
    assert result is not None
    return (
        f"step {progress.step} of {progress.total}: loss {result.loss:.4f}, {result.accuracy:.1%} right on "
        f"{result.targets} tokens that are not learned from"
    )
