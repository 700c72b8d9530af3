"""Checkpoints and model folders for tests, made with numpy alone."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.store.locations import tiny_checkpoint
from moss_jt.store.model_folder import Store, read_tensor
from moss_jt.store.quant import PackedArrays

TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


def convert_checkpoint(source: Path, out: Path) -> Path:
    """Convert a local checkpoint."""
    checkpoint = open_local(source)
    convert(checkpoint, recipe_for(checkpoint), out)
    return out


@cache
def tiny_model_folder() -> Path:
    """moss-tiny converted, once per test run; tests must not change it."""
    import atexit

    folder = Path(mkdtemp(prefix="moss-jt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return convert_checkpoint(tiny_checkpoint(), folder / "moss-tiny")


def small_config(**changes: Any) -> dict[str, Any]:
    """config.json of a small MOSS whose vocabulary is moss-tiny's."""
    fields = json.loads((tiny_checkpoint() / "config.json").read_text())
    fields.update(
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": None, "n_positions": 128}
    )
    fields.update(changes)
    return fields


def random_tensors(fields: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of such a model in float16, names as in a published checkpoint; qkv in the published row order."""
    draw = np.random.default_rng(seed)
    width, vocabulary = fields["n_embd"], fields["vocab_size"]
    inner = fields["n_inner"] or 4 * width
    shapes = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }
    for layer in range(fields["n_layer"]):
        block = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.qkv_proj.weight": (3 * width, width),
            "attn.out_proj.weight": (width, width),
            "mlp.fc_in.weight": (inner, width),
            "mlp.fc_in.bias": (inner,),
            "mlp.fc_out.weight": (width, inner),
            "mlp.fc_out.bias": (width,),
        }
        shapes.update({f"transformer.h.{layer}.{name}": shape for name, shape in block.items()})
    shapes.update({"lm_head.weight": (vocabulary, width), "lm_head.bias": (vocabulary,)})
    tensors = {}
    for name, shape in shapes.items():
        values = draw.standard_normal(shape, dtype=np.float32) * 0.1
        if ".ln_" in name and name.endswith("weight"):
            values += 1
        tensors[name] = values.astype(np.float16)
    return tensors


def write_checkpoint(folder: Path, fields: dict[str, Any], shards: list[dict[str, np.ndarray]]) -> Path:
    """A checkpoint of safetensors shards with an index (or one file), config and moss-tiny's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_checkpoint() / name, folder / name)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def random_checkpoint(folder: Path, seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """A small random checkpoint; tensors are dealt to the shards in turn, so that blocks straddle them."""
    fields = small_config(**changes)
    tensors = list(random_tensors(fields, seed).items())
    return write_checkpoint(folder, fields, [dict(tensors[first::shards]) for first in range(shards)])


def stored_matrix(store: Store, layer: int, name: str) -> PackedArrays:
    """A block's quantised matrix by local name, as it lies in the folder."""
    file = store.blocks[layer]
    order = read_tensor(file, f"{name}.input_order") if f"{name}.input_order" in file.tensors else None
    arrays = [read_tensor(file, f"{name}.{part}") for part in ("packed", "scales", "zeros")]
    return PackedArrays(arrays[0], arrays[1], arrays[2], store.bits, store.group_size, order)
