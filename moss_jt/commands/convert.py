"""moss-jt convert."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from moss_jt.commands.progress import Status, byte_bar
from moss_jt.commands.quant_options import QuantOptions
from moss_jt.convert.checkpoint import Checkpoint, open_local
from moss_jt.convert.hub import open_hub, remove_download
from moss_jt.convert.model_folder import ModelFolder, folder_recipe
from moss_jt.convert.pipeline import Recipe, convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.folders import TINY, folder_for, model_home, remember_last, tiny_checkpoint
from moss_jt.store import MANIFEST


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
    type=click.Choice(["4", "8", "16"]),
    help="Quantize float16 weights to int4 or int8. [default: as SOURCE has them]",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    help="rtn rounds to nearest: minutes for MOSS. gptq makes up for the rounding in the weights not yet rounded, by what "
    "a text sends through each matrix: about 4 GiB and 4.5 minutes per block, 2.5 hours for MOSS, on two cores. "
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
    help="gptq: UTF-8 text like what the model will be used for. [default: Chinese and English turns of our own]",
)
@click.option(
    "--act-order",
    is_flag=True,
    help="gptq: most important inputs first. Less error, but inputs are permuted at run time.",
)
def command(source: str, out: Path | None, keep_download: bool, **quantization: Any) -> None:
    """Turn a checkpoint into a model folder that moss-jt runs.

    SOURCE is a Hugging Face id (fnlp/moss-moon-003-sft), a folder with a downloaded checkpoint, or moss-tiny, the small
    one that comes with the program. Torch and safetensors files, float16, bfloat16, float32, and GPTQ int4 or int8 are
    read, without torch. Interrupt it whenever you like: the same command goes on where it stopped.

    \b
    moss-jt convert fnlp/moss-moon-003-sft             45 GB of disk while converting, 33 GB afterwards
    moss-jt convert fnlp/moss-moon-003-sft-plugin-int4
    moss-jt convert ./my-checkpoint --out ./my-model
    moss-jt convert ./my-model --bits 4                quantizes a float16 model folder, too
    """
    options = QuantOptions(**quantization)
    out = out or options.folder(folder_for(source))
    folder = float16_folder(source) if options.quantizes else None
    made_from: Checkpoint | ModelFolder
    with terminated_as_interrupted():
        if folder is not None:
            made_from, recipe = folder_recipe(folder)
        else:
            made_from = open_source(source, keep_download)
            recipe = recipe_for(made_from)
        status = Status()
        run_conversion(made_from, options.apply(made_from, recipe, out, status.show), out, status)


def float16_folder(source: str) -> Path | None:
    """The finished model folder that SOURCE is, or where it is no folder, the one that was converted from it before."""
    folder = Path(source) if Path(source).is_dir() else folder_for(source)
    return folder if (folder / MANIFEST).exists() else None


def open_source(source: str, keep_download: bool) -> Checkpoint:
    """The checkpoint that a user means by SOURCE."""
    if (Path(source) / MANIFEST).exists():
        raise MossError(f"{source} is a model folder already. Add --bits 4 or --bits 8 to quantize it.")
    if Path(source).is_dir():
        return open_local(Path(source))
    if source == TINY:
        return open_local(tiny_checkpoint())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise MossError(f"{source} is no folder, and no hub id such as fnlp/moss-moon-003-sft.")
    return open_hub(source, download_folder(source), keep_download, lambda text: click.echo(text, err=True))


def download_folder(source: str) -> Path:
    return model_home() / "downloads" / source.replace("/", "--")


def run_conversion(source: Checkpoint | ModelFolder, recipe: Recipe, out: Path, status: Status) -> None:
    """Convert with a progress bar, remember the folder, and say what to do next."""
    try:
        with byte_bar(recipe.total_bytes, out.name, status) as (progress, notice):
            fresh = convert(source, recipe, out, progress, notice)
    except KeyboardInterrupt:
        raise MossError(
            f"stopped. What is converted so far stays in {out}; run the same command to go on."
        ) from None
    remember_last(out)
    if "repo" in recipe.identity and fresh:
        download = download_folder(recipe.source)
        if not any(download.glob("*.bin")) and not any(download.glob("*.safetensors")):
            remove_download(download)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**30
    click.echo(
        f"{out} is ready ({size:.2f} GiB)." if fresh else f"{out} was converted already; nothing to do."
    )
    click.echo(f"Talk to it with: moss-jt chat {out.name if out == folder_for(out.name) else out}")


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
