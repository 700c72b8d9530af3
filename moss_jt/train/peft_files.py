"""Adapters in the files of the peft package: adapter_config.json and adapter_model.safetensors.

The rows of qkv_proj stand in another order in a checkpoint than in a model folder (moss_jt.store.qkv_order), and so do those of
its adapter's B.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig
from moss_jt.store.files import open_regular, read_json, reading, write_text, writing
from moss_jt.store.qkv_order import head_runs
from moss_jt.store.safetensors_header import TensorSpec, read_header
from moss_jt.store.tensor_file import FLOATS, read_tensor, write_tensors
from moss_jt.train.lora import MOST_RANK, Adapter, LoraSettings, Pair, pair_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(
    r"base_model\.model\.transformer\.h\.(?P<layer>\d{1,4})\.(?P<matrix>[a-z_.]+)\.lora_(?P<part>[AB])\.weight"
)
NAMES = {tensor.field: tensor.name for tensor in BLOCK if tensor.is_matrix}
FIELDS = {name: field for field, name in NAMES.items()}
# What changes the numbers, and is not done: option -> the values that mean that it is not used.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "trainable_token_indices": ([],),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": ([],),
    "target_parameters": ([],),
    "use_bdlora": (False,),
    "arrow_config": (),
    "corda_config": (),
    "kasa_config": (),
    "lora_ga_config": (),
    "monteclora_config": (),
    # Others (pissa, olora, loftq, ..) take something away from the model's own weights at first, which the files do not hold.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def write_adapter(folder: Path, adapter: Adapter, base: str) -> None:
    """The adapter as peft reads it; each file is replaced in one step.

    Args:
        base: the name of the model that it belongs to.

    Raises:
        MossError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    settings, layers = adapter.settings, range(adapter.first_layer, adapter.config.n_layer)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": [NAMES[target].rpartition(".")[2] for target in settings.targets],
        "layers_to_transform": None if len(layers) == adapter.config.n_layer else list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    write_tensors(folder / WEIGHTS, dict(_tensors(adapter)), {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _tensors(adapter: Adapter) -> list[tuple[str, np.ndarray]]:
    order = np.argsort(_row_order(adapter.config))
    tensors = []
    for (layer, target), pair in adapter.pairs.items():
        base = f"base_model.model.transformer.h.{layer}.{NAMES[target]}.lora_"
        b = pair.b[order] if target == "qkv" else pair.b
        tensors += [(f"{base}A.weight", pair.a), (f"{base}B.weight", b)]
    return tensors


def read_adapter(folder: Path, config: MossConfig) -> Adapter:
    """An adapter for a model of this geometry.

    Raises:
        MossError: it is no LoRA adapter, belongs to another model, is damaged, or has something that is not done.
    """
    file = open_adapter(folder, config)
    adapter = Adapter(config, file.settings)
    for key, pair in file.pairs():
        adapter.pairs[key].a[:], adapter.pairs[key].b[:] = pair
    return adapter


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that fits a model, of which the headers are read."""

    folder: Path
    config: MossConfig
    settings: LoraSettings
    specs: "Mapping[Key, TensorSpec]"

    def pairs(self) -> Iterator[tuple[tuple[int, str], Pair]]:
        """Its matrices, float32, in the model folder's order of rows.

        Raises:
            MossError: it is cut short, or has values that are no numbers.
        """
        path, order = self.folder / WEIGHTS, _row_order(self.config)
        with reading(path), open_regular(path) as file:
            for layer, target in sorted({(layer, target) for layer, target, _ in self.specs}):
                a, b = (read_tensor(path, file, self.specs[layer, target, part]) for part in "AB")
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise MossError(
                        f"{path}: the adapter of block {layer}, {target} has values that are no numbers. It is damaged, or its "
                        "training blew up."
                    )
                yield (layer, target), Pair(a, b[order] if target == "qkv" else b)


def open_adapter(folder: Path, config: MossConfig) -> AdapterFile:
    """An adapter for a model of this geometry, checked by what its headers say: nothing is read that does not fit.

    Raises:
        MossError: as :func:`read_adapter`.
    """
    if not (folder / CONFIG).is_file():
        raise MossError(
            f"{folder} is no adapter: it has no {CONFIG}. Name the folder that peft or moss-jt finetune wrote."
        )
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise MossError(
            f"{folder} has its adapter as a pickle (adapter_model.bin). Save it anew with a current peft, which writes {WEIGHTS}."
        )
    fields = read_json(folder / CONFIG)
    _check_config(folder, fields)
    specs = _by_tensor(folder, read_header(folder / WEIGHTS).tensors)
    settings = _settings(folder, fields, config, specs)
    for (layer, target), shapes in pair_shapes(config, settings):
        for part, shape in zip("AB", shapes, strict=True):
            spec = specs.get((layer, target, part))
            if spec is None or spec.shape != shape or spec.dtype_name not in FLOATS:
                told = "missing" if spec is None else f"{spec.dtype_name} of shape {spec.shape}"
                raise MossError(
                    f"{folder}: lora_{part} of block {layer}, {target} is {told}; this model needs floats of shape {shape}. "
                    "The adapter belongs to another model, or is damaged."
                )
    return AdapterFile(folder, config, settings, specs)


def _check_config(folder: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise MossError(f"{folder} is a {fields.get('peft_type')!s:.40} adapter; only LORA is done.")
    for name, unused in UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and value not in unused:
            raise MossError(f"{folder} has {name} = {json.dumps(value)[:80]}, which is not done.")
    for name in ("r", "lora_alpha"):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1 << 20:
            raise MossError(f"{folder}: {name} is {str(value)[:40]}; a number is needed.")


Key = tuple[int, str, str]  # block, target, A or B


def _by_tensor(folder: Path, tensors: Mapping[str, TensorSpec]) -> dict[Key, TensorSpec]:
    keyed = {}
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None or match["matrix"] not in FIELDS:
            raise MossError(
                f"{folder} has a tensor {name[:120]!r}, which is none of a LoRA adapter's for MOSS."
            )
        keyed[int(match["layer"]), FIELDS[match["matrix"]], match["part"]] = tensor
    if not keyed:
        raise MossError(f"{folder} holds no tensors.")
    return keyed


def _settings(
    folder: Path, fields: Mapping[str, Any], config: MossConfig, tensors: Mapping[Key, TensorSpec]
) -> LoraSettings:
    """What the tensors and the configuration say together."""
    rank = int(fields["r"])
    if not 1 <= rank <= MOST_RANK:
        raise MossError(f"{folder} has a rank of {rank}; ranks from 1 to {MOST_RANK} are done.")
    layers = {layer for layer, _, _ in tensors}
    count = config.n_layer - min(layers)
    if max(layers) >= config.n_layer or layers != set(range(config.n_layer - count, config.n_layer)):
        raise MossError(
            f"{folder} has adapters in blocks {min(layers)} to {max(layers)}, and the model {config.n_layer} blocks; they must "
            "be all of its blocks, or its last ones."
        )
    # rsLoRA (arXiv 2312.03732) divides by the root of the rank.
    alpha = float(fields["lora_alpha"]) * (math.sqrt(rank) if fields.get("use_rslora") is True else 1)
    present = {target for _, target, _ in tensors}
    return LoraSettings(rank, alpha, [target for target in NAMES if target in present], count)


def _row_order(config: MossConfig) -> np.ndarray:
    """The checkpoint's number of each of our qkv rows."""
    return np.concatenate([np.arange(first, first + count) for first, count in head_runs(config)])
