"""From a checkpoint's tensors to a model folder's files: which tensors, in which order of rows, and what is left out."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.tensors import SourceTensor, to_float16
from moss_jt.errors import MossError
from moss_jt.store.architecture import MATRICES, block_tensors, embedding_tensors, full_name, head_tensors
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import EMBEDDING, HEAD, block_file_name
from moss_jt.store.qkv_order import head_runs

QKV = "attn.qkv_proj"
QUANTISED_PARTS = ("qweight", "qzeros", "scales", "g_idx")

# Buffers that checkpoints carry and a model does not need.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(causal_mask|bias|masked_bias|scale_attn|embed_positions)")

# Some writers give every matrix a bias; these two have none in the model, so that theirs must be zeros.
ZERO_BIASES = re.compile(r"transformer\.h\.\d+\.attn\.(qkv_proj|out_proj)\.bias")


@dataclass(frozen=True)
class Target:
    """A tensor to write: ``produce`` yields arrays whose bytes, one after the other, are the tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class FilePlan:
    """A file to write: the checkpoint's tensors that it takes, and how to make its targets once those are there.

    twin  a file of a finished model folder with these very bytes, and its entry of the manifest: it need not be written again
    """

    name: str
    sources: tuple[str, ...]
    build: Callable[[], list[Target]]
    twin: "Twin | None" = None


@dataclass(frozen=True)
class Twin:
    """A finished file, its entry of the manifest, and what compares it with that (raises MossError)."""

    path: Path
    entry: dict[str, Any]
    verify: Callable[[Callable[[int], object]], None]


def dense_target(source: SourceTensor, name: str, runs: list[tuple[int, int]]) -> Target:
    """A float16 tensor made of runs of the source's rows."""

    def produce() -> Iterator[np.ndarray]:
        for first, count in runs:
            for chunk in source.chunks(first, count):
                yield to_float16(chunk, source.dtype, source.name)

    return Target(name, "F16", source.shape, produce)


def is_quantised(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(".qweight") for name in checkpoint.weight_map)


def expected_names(config: MossConfig, quantised: bool) -> dict[str, list[str]]:
    """File of the model folder -> names of the checkpoint's tensors that it is made of."""
    files = {EMBEDDING: [full_name(name) for name in embedding_tensors(config)]}
    for layer in range(config.n_layer):
        names = []
        for name in block_tensors(config, 16, 0):
            stem = name.removesuffix(".weight")
            packed = quantised and stem in MATRICES and stem != name
            parts = [f"{stem}.{part}" for part in QUANTISED_PARTS] if packed else [name]
            names += [full_name(part, layer) for part in parts]
        files[block_file_name(layer)] = names
    files[HEAD] = [full_name(name) for name in head_tensors(config)]
    return files


def check_names(checkpoint: Checkpoint, files: dict[str, list[str]]) -> None:
    """Raises MossError naming the first tensor that is missing or does not belong."""
    wanted = [name for names in files.values() for name in names]
    missing = [name for name in wanted if name not in checkpoint.weight_map]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise MossError(
            f"{checkpoint.source} lacks the tensor {missing[0]}{more}. It is incomplete, or another model."
        )
    rest = checkpoint.weight_map.keys() - set(wanted)
    extra = sorted(name for name in rest if not BUFFERS.fullmatch(name) and not ZERO_BIASES.fullmatch(name))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise MossError(
            f"{checkpoint.source} holds {extra[0]}{more}, which is not a tensor of a MOSS or CodeGen model."
        )


def zero_biases(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Those biases among a file's tensors that the model does not have; :func:`check_zeros` must accept them."""
    stems = {name.rsplit(".", 1)[0] for name in names}
    return [
        name
        for stem in sorted(stems)
        if ZERO_BIASES.fullmatch(name := f"{stem}.bias") and name in checkpoint.weight_map
    ]


def check_zeros(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises MossError where one of these biases is not all zeros."""
    for name in names:
        if checkpoint.tensor(name).read().any():
            raise MossError(
                f"{checkpoint.source} holds {name}, which is not a tensor of a MOSS or CodeGen model, and not all zeros."
            )


def checked(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> SourceTensor:
    """The tensor of that name, or an error where its shape is not what the configuration says."""
    source = checkpoint.tensor(name)
    if source.shape != shape:
        raise MossError(
            f"{name} in {source.path.name} has shape {source.shape}; the configuration of this model needs {shape}."
        )
    return source


def dense_files(checkpoint: Checkpoint) -> list[FilePlan]:
    """How to write an unquantised checkpoint's model folder, float16."""
    config = checkpoint.config
    files = expected_names(config, quantised=False)
    check_names(checkpoint, files)
    qkv_runs = head_runs(config)
    shapes = {**embedding_tensors(config), **head_tensors(config), **block_tensors(config, 16, 0)}

    def target(name: str) -> Target:
        local = re.sub(r"^transformer\.(h\.\d+\.)?", "", name)
        source = checked(checkpoint, name, shapes[local][1])
        runs = qkv_runs if local == f"{QKV}.weight" else [(0, source.shape[0])]
        return dense_target(source, name, runs)

    def plan(file: str, names: list[str]) -> FilePlan:
        zeros = zero_biases(checkpoint, names)

        def build() -> list[Target]:
            check_zeros(checkpoint, zeros)
            return [target(name) for name in names]

        return FilePlan(file, (*names, *zeros), build)

    return [plan(file, names) for file, names in files.items()]
