"""moss-jt convert."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from moss_jt.commands.progress import byte_bar
from moss_jt.commands.quant_options import QuantOptions
from moss_jt.convert.checkpoint import Checkpoint, open_local
from moss_jt.convert.disk_space import folder_bytes
from moss_jt.convert.folder_source import ModelFolder, folder_recipe
from moss_jt.convert.hub import open_hub
from moss_jt.convert.pipeline import Recipe, already_converted, convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.plan.residency import gib
from moss_jt.store.locations import TINY, folder_for, model_home, remember_last, tiny_checkpoint
from moss_jt.store.manifest import MANIFEST, read_manifest
from moss_jt.store.published import RECOMMENDED, hub_id_of
from moss_jt.terminal.output import harmless
from moss_jt.terminal.screen import Screen


def bits_of(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """``16,4`` as bits, most first.

    Raises:
        BadParameter: they are none.
    """
    bits = [] if text is None else [part.strip() for part in text.split(",")]
    if not set(bits) <= {"4", "8", "16"} or len(set(bits)) < len(bits):
        raise click.BadParameter(f"{text!r} is none of 4, 8, 16, or several of them as 16,4.")
    return tuple(sorted(bits, key=int, reverse=True))


@click.command()
@click.argument("source")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Model folder to write. [default: one under MOSS_JT_HOME, by SOURCE's name]",
)
@click.option(
    "--keep-download",
    is_flag=True,
    help="Keep the downloaded shards instead of removing each once it is converted.",
)
@click.option(
    "--bits",
    callback=bits_of,
    metavar="4|8|16|16,4",
    help="Quantize float16 weights to int4 or int8; with 16,4 both are made, from one reading of SOURCE: the int4 model then "
    "drafts for the float16 one. [default: as SOURCE has them]",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    help="rtn rounds to nearest: minutes for MOSS. gptq corrects for each rounding in the weights that are not yet rounded, by "
    "what a text sends through each matrix: about 4 GiB and 4.5 minutes per block, 2.5 hours for MOSS, on two cores. "
    "[default: gptq for 4 bits, rtn for 8]",
)
@click.option(
    "--group-size",
    type=int,
    help="Weights that share a scale. [default: 128, or the largest below that fits the model]",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="gptq: a UTF-8 text like those that the model will be used for. [default: Chinese and English turns of our own]",
)
@click.option(
    "--act-order",
    is_flag=True,
    help="gptq: quantize the most important inputs first. Less error, but inputs are permuted at run time.",
)
def command(source: str, out: Path | None, keep_download: bool, **quantization: Any) -> None:
    """Turn a checkpoint into a model folder that moss-jt runs.

    SOURCE is a Hugging Face id (fnlp/moss-moon-003-sft-plugin), a folder with a downloaded checkpoint, or moss-tiny, the small
    one that comes with the program. Torch and safetensors files, float16, bfloat16, float32, and GPTQ int4 or int8 are
    read, without torch. Interrupt it whenever you like: the same command goes on where it stopped.

    \b
    moss-jt convert fnlp/moss-moon-003-sft-plugin-int4 22 GB of disk while converting, 11 GB afterwards
    moss-jt convert fnlp/moss-moon-003-sft-plugin      float16: 45 GB, and 33 GB afterwards
    moss-jt convert ./my-checkpoint --out ./my-model
    moss-jt convert ./my-model --bits 4                quantizes a float16 model folder, too
    moss-jt convert fnlp/moss-moon-003-sft --bits 16,4 the model itself, and a copy that makes it quicker
    """
    options = QuantOptions(**quantization)
    if len(options.bits) > 1:
        first = convert_several(source, out, keep_download, options)
    else:
        first = out or options.folder(folder_for(source))
        convert_one(source, first, keep_download, options)
    remember_last(first)
    Screen().line(f"Talk to it with: moss-jt chat {first.name if first == folder_for(first.name) else first}")


def convert_several(source: str, out: Path | None, keep_download: bool, options: QuantOptions) -> Path:
    """The model in each of the bits, the first of which is read from SOURCE, and the others from that; returns its folder.

    Raises:
        MossError: the first is not the float16 model.
    """
    dense, *quantized = options.each()
    if dense.quantizes:
        raise MossError(
            f"--bits {','.join(options.bits)} needs the float16 model, too: --bits 16,{options.bits[-1]}."
        )
    folder = float16_folder(source) if Path(source).is_dir() else None
    if folder is None:
        folder = out or folder_for(source)
        convert_one(source, folder, keep_download, dense)
    elif out is not None:
        raise MossError(
            f"{source} is the float16 model already. Leave out --out, or give --bits {options.bits[-1]} alone."
        )
    for one in quantized:
        convert_one(str(folder), one.folder(folder.resolve()), keep_download, one)
    return folder


def convert_one(source: str, out: Path, keep_download: bool, options: QuantOptions) -> None:
    """One model folder, and a line that says so."""
    folder = float16_folder(source) if options.quantizes else None
    with terminated_as_interrupted(), resumable(out):
        if folder is not None:
            fresh = run_conversion(*folder_recipe(folder), options, out)
        else:
            fresh = convert_source(open_source(source, keep_download, out), options, out)
    Screen().line(
        f"{out} is ready ({gib(folder_bytes(out))})."
        if fresh
        else f"{out} was converted already; nothing to do."
    )


def float16_folder(source: str) -> Path | None:
    """The finished model folder that SOURCE is, or where it is no folder, the one that was converted from it before."""
    folder = Path(source) if Path(source).is_dir() else folder_for(source)
    return folder if (folder / MANIFEST).exists() else None


def open_source(source: str, keep_download: bool, out: Path) -> Checkpoint:
    """The checkpoint that a user means by SOURCE."""
    if (Path(source) / MANIFEST).exists():
        raise MossError(f"{source} is a model folder already. Add --bits 4 or --bits 8 to quantize it.")
    if Path(source).is_dir():
        return open_local(Path(source))
    if source == TINY:
        return open_local(tiny_checkpoint())
    if Path(source).is_file():
        raise MossError(
            f"{source} is a file. Name the folder that it is in: config.json and the tokenizer's files belong beside it."
        )
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        meant = hub_id_of(source)
        advice = f"Did you mean {meant}?" if meant else f"An id looks like {RECOMMENDED}."
        raise MossError(f"{source} is neither a folder nor the id of a model on the hub. {advice}")
    folder = model_home() / "downloads" / source.replace("/", "--")
    return open_hub(source, folder, keep_download, out, Screen(sys.stderr).line)


def convert_source(checkpoint: Checkpoint, options: QuantOptions, out: Path) -> bool:
    """Convert, and clear away what was downloaded for it; False where ``out`` is finished already."""
    # That is asked first: a checkpoint of one file must be there completely, to plan its conversion.
    done = not options.quantizes and has_bits(out, options) and finished(out, checkpoint, checkpoint.identity)
    fresh = not done and run_conversion(checkpoint, recipe_for(checkpoint), options, out)
    if checkpoint.download is not None:
        checkpoint.download.remove()
        if checkpoint.download.keep:
            Screen(sys.stderr).line(f"The download stays in {checkpoint.download.folder}.")
    return fresh


def has_bits(out: Path, options: QuantOptions) -> bool:
    """Whether a finished folder, where there is one, has the bits that are wanted."""
    return not options.bits or not (out / MANIFEST).exists() or str(read_manifest(out).bits) in options.bits


def run_conversion(
    source: Checkpoint | ModelFolder, recipe: Recipe, options: QuantOptions, out: Path
) -> bool:
    """Convert with a progress bar; False where ``out`` is finished already."""
    recipe = options.apply(source, recipe, out, lambda text: bar.set_postfix_str(text))
    if finished(out, source, recipe.identity):
        return False
    with byte_bar(out.name, recipe.total_bytes) as bar:
        return convert(source, recipe, out, bar.update, noticing(bar))


def finished(out: Path, source: Checkpoint | ModelFolder, identity: dict[str, Any]) -> bool:
    """Whether ``out`` was made from this source and is complete, which takes reading all of it; a bar shows how far it is."""
    if not (out / MANIFEST).exists():
        return False
    n_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    with byte_bar(f"checking {out.name}", n_bytes) as bar:
        return already_converted(out, identity, source.config, bar.update, noticing(bar))


def noticing(bar: tqdm) -> Callable[[str], None]:
    """Prints a sentence above the bar."""
    return lambda text: bar.write(harmless(text), file=sys.stderr)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Ctrl-C, while downloading too, is one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise MossError(
            f"stopped. What is done so far is kept for {out}; run the same command to go on."
        ) from None


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, in this process and only here: a process forked later must die of it as usual."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
