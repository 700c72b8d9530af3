"""moss-jt convert."""

import signal
from pathlib import Path
from typing import Any

import click

from moss_jt.commands.progress import byte_bar
from moss_jt.convert.checkpoint import Checkpoint, open_local
from moss_jt.convert.hub import open_hub, remove_download
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.folders import TINY, folder_for, model_home, remember_last, tiny_checkpoint


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
def command(source: str, out: Path | None, keep_download: bool) -> None:
    """Turn a checkpoint into a model folder that moss-jt runs.

    SOURCE is a Hugging Face id (fnlp/moss-moon-003-sft), a folder with a downloaded checkpoint, or moss-tiny, the small
    one that comes with the program. Torch and safetensors files, float16, bfloat16, float32, and GPTQ int4 or int8 are
    read, without torch. Interrupt it whenever you like: the same command goes on where it stopped.

    \b
    moss-jt convert fnlp/moss-moon-003-sft             45 GB of disk while converting, 33 GB afterwards
    moss-jt convert fnlp/moss-moon-003-sft-plugin-int4
    moss-jt convert ./my-checkpoint --out ./my-model
    """
    out = out or folder_for(source)
    signal.signal(signal.SIGTERM, _stop)
    checkpoint = open_source(source, out, keep_download)
    run_conversion(checkpoint, recipe_for(checkpoint), out)


def open_source(source: str, out: Path, keep_download: bool) -> Checkpoint:
    """The checkpoint that a user means by SOURCE."""
    if Path(source).is_dir():
        return open_local(Path(source))
    if source == TINY:
        return open_local(tiny_checkpoint())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise MossError(f"{source} is no folder, and no hub id such as fnlp/moss-moon-003-sft.")
    return open_hub(source, download_folder(source), keep_download, lambda text: click.echo(text, err=True))


def download_folder(source: str) -> Path:
    return model_home() / "downloads" / source.replace("/", "--")


def run_conversion(checkpoint: Checkpoint, recipe: Any, out: Path) -> None:
    """Convert with a progress bar, remember the folder, and say what to do next."""
    try:
        with byte_bar(recipe.total_bytes, out.name) as (progress, notice):
            fresh = convert(checkpoint, recipe, out, progress, notice)
    except KeyboardInterrupt:
        raise MossError(
            f"stopped. What is converted so far stays in {out}; run the same command to go on."
        ) from None
    remember_last(out)
    if "repo" in checkpoint.identity and fresh:
        download = download_folder(checkpoint.source)
        if not any(download.glob("*.bin")) and not any(download.glob("*.safetensors")):
            remove_download(download)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**30
    click.echo(
        f"{out} is ready ({size:.2f} GiB)." if fresh else f"{out} was converted already; nothing to do."
    )
    click.echo(f"Talk to it with: moss-jt chat {out.name if out == folder_for(out.name) else out}")


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
