"""moss-jt merge."""

import hashlib
from pathlib import Path

import click
import numpy as np

from moss_jt.commands.convert import resumable, run_conversion, terminated_as_interrupted
from moss_jt.commands.quant_options import QuantOptions
from moss_jt.convert.disk_space import folder_bytes
from moss_jt.convert.folder_source import folder_recipe
from moss_jt.convert.merge import Rows, merged_recipe
from moss_jt.convert.named import model_folder
from moss_jt.plan.residency import gib
from moss_jt.store.files import read_small
from moss_jt.terminal.screen import Screen
from moss_jt.train.lora import Adapter
from moss_jt.train.peft_files import CONFIG, FIELDS, WEIGHTS, read_adapter

MAX_ADAPTER_BYTES = 4 << 30


@click.command()
@click.argument("model")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model folder to write.")
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantize what comes out to int4 or int8.")
def command(model: str, adapter: Path, out: Path, bits: str | None) -> None:
    """Make an ADAPTER part of MODEL: a model folder of its own, which runs as fast as MODEL.

    MODEL is a float16 model; ADAPTER a folder that moss-jt finetune or peft wrote.

    \b
    moss-jt merge moss-moon-003-sft my-adapter --out my-moss
    moss-jt merge moss-moon-003-sft my-adapter --out my-moss-int4 --bits 4
    """
    source, recipe = folder_recipe(model_folder(model))
    learned = read_adapter(adapter, source.config)
    identity = {
        name: hashlib.sha256(read_small(adapter / name, MAX_ADAPTER_BYTES)).hexdigest()
        for name in (CONFIG, WEIGHTS)
    }
    recipe = merged_recipe(
        recipe, source.config, identity, lambda layer, name: rows_of(learned, layer, FIELDS[name])
    )
    options = QuantOptions((bits,) if bits else (), None, None, None, act_order=False)
    with terminated_as_interrupted(), resumable(out):
        run_conversion(source, recipe, options, out)
    Screen().line(f"{out} is ready ({gib(folder_bytes(out))}). Talk to it with: moss-jt chat {out}")


def rows_of(adapter: Adapter, layer: int, target: str) -> Rows | None:
    """What an adapter adds to a matrix; None where it has nothing for it."""
    pair = adapter.pairs.get((layer, target))
    if pair is None:
        return None
    a, b = pair

    def rows(first: int, last: int) -> np.ndarray:
        return np.float32(adapter.scale) * (b[first:last] @ a)

    return rows
