"""A Hugging Face checkpoint: its configuration, which shard holds which tensor, and shards opened when they are needed."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from moss_jt.convert.disk_space import Download
from moss_jt.convert.tensors import SourceTensor
from moss_jt.convert.tokenizer import build_tokenizer
from moss_jt.convert.torch_file import read_torch_file
from moss_jt.convert.vocabulary import optional_file
from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig
from moss_jt.store.files import read_json, read_small
from moss_jt.store.manifest import sha256_of
from moss_jt.store.safetensors_header import read_header

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# What training leaves beside the weights.
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# What other programs put before a tensor's name: data parallel training, torch.compile, a model inside another.
PREFIXES = ("module.", "_orig_mod.", "model.")
EMBEDDING_WEIGHT, HEAD_WEIGHT = "transformer.wte.weight", "lm_head.weight"

Fetch = Callable[[str], Path]
# Shards up to this size are told apart by their contents, larger ones by size and time.
HASHED_BYTES = 64 << 20


@dataclass
class Checkpoint:
    """A checkpoint whose shards are fetched and opened one after the other.

    Args:
        identify: what tells this checkpoint from others, and from itself after a change; JSON values.
        read_weight_map: which shard holds a tensor; where there is no index, this fetches the only shard.
        fetch: the path of a file by name.
        download: None where the files are local.
    """

    source: str
    config: MossConfig
    fields: dict[str, Any]
    identify: Callable[[], dict[str, Any]]
    read_weight_map: Callable[[], dict[str, str]]
    fetch: Fetch
    download: Download | None = None
    _opened: dict[str, dict[str, SourceTensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = self.identify()

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Shard of each tensor; a tied head has the embedding's."""
        weight_map = self.read_weight_map()
        if self._has_tied_head(weight_map):
            weight_map = {**weight_map, HEAD_WEIGHT: weight_map[EMBEDDING_WEIGHT]}
        return weight_map

    def _has_tied_head(self, weight_map: dict[str, str]) -> bool:
        tied = self.fields.get("tie_word_embeddings") is True
        return tied and HEAD_WEIGHT not in weight_map and EMBEDDING_WEIGHT in weight_map

    def tensor(self, name: str) -> SourceTensor:
        """Where a tensor lies; fetches its shard if it is not there yet."""
        shard = self.weight_map[name]
        tensors = self.open_shard(shard)
        if name == HEAD_WEIGHT and name not in tensors and self.fields.get("tie_word_embeddings") is True:
            name = EMBEDDING_WEIGHT
        if name not in tensors:
            raise MossError(
                f"the index says that {shard} holds {name}, but it does not. Download both again."
            )
        return tensors[name]

    def tokenizer_text(self) -> str:
        """The text of tokenizer.json, made from the checkpoint's own files."""
        return build_tokenizer(self.fetch, self.fields)

    def optional_json(self, name: str) -> dict[str, Any]:
        """The fields of a small file that the checkpoint may have; none where it has not."""
        path = optional_file(self.fetch, name)
        return {} if path is None else read_json(path)

    def open_shard(self, shard: str) -> dict[str, SourceTensor]:
        if shard not in self._opened:
            self._opened[shard] = read_shard(self.fetch(shard))
        return self._opened[shard]

    def shards_of(self, names: Iterable[str]) -> set[str]:
        return {self.weight_map[name] for name in names}

    def close_shards(self, still_needed: Iterable[str]) -> None:
        """Give back every shard that holds none of the tensors that are still needed."""
        for shard in set(self.weight_map.values()) - self.shards_of(still_needed):
            self._opened.pop(shard, None)
            if self.download is not None:
                self.download.release(shard)

    def check_unchanged(self) -> None:
        """Raises MossError where the files are not those that were opened."""
        if self.identify() != self.identity:
            raise MossError(
                f"{self.source} was changed while it was being converted. Run the same command again: it starts anew."
            )


def read_shard(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a shard by its name in MOSS, from a torch zip file or safetensors."""
    if path.suffix != ".safetensors":
        return plain_names(read_torch_file(path), path)
    return plain_names(
        {
            name: SourceTensor(name, spec.dtype_name, spec.shape, path, spec.offset)
            for name, spec in read_header(path).tensors.items()
        },
        path,
    )


Value = TypeVar("Value")


def plain_names(named: Mapping[str, Value], where: Path) -> dict[str, Value]:
    """The same with what other programs put before the names left out."""
    plain: dict[str, Value] = {}
    for name, value in named.items():
        short = name
        while prefix := next((prefix for prefix in PREFIXES if short.startswith(prefix)), ""):
            short = short.removeprefix(prefix)
        if short in plain:
            raise MossError(f"{where} holds {short[:200]!r} twice, once as {name[:200]!r}. Keep one of them.")
        plain[short] = value
    return plain


def choose_index(names: Iterable[str]) -> tuple[str | None, str | None]:
    """(index file, single shard) to read among a checkpoint's file names; one of them is None.

    safetensors is preferred where both formats are there; a file of another name is taken where it is the only one.
    """
    names = set(names)
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if index in names:
            return index, None
        if single in names:
            return None, single
    others = [name for name in names if name.endswith(WEIGHTS) and not name.startswith(NO_WEIGHTS)]
    indexes = [
        name for name in names if name.endswith(".index.json") and name.split(".")[0] in _stems(others)
    ]
    if len(indexes) == 1:
        return indexes[0], None
    shards = sorted(name for name in others if "-of-" in name)
    if shards:
        raise MossError(
            f"{shards[0]} is one of several shards, but the index that lists them ({INDEXES[1]}) is missing."
        )
    for ending in WEIGHTS:
        singles = sorted(name for name in others if name.endswith(ending))
        if len(singles) == 1:
            return None, singles[0]
        if singles:
            raise MossError(
                f"{singles[0]} and {singles[1]} both hold weights. Leave one of them in the folder."
            )
    raise MossError(f"there are no weights: none of {', '.join((*INDEXES, *SINGLES))}.")


def _stems(shards: Iterable[str]) -> set[str]:
    """``gptq_model-4bit-128g-00001-of-00002.safetensors`` -> ``gptq_model-4bit-128g``, of each."""
    return {re.sub(r"-\d+-of-\d+$", "", name.rpartition(".")[0]) for name in shards}


def read_weight_map(index: Path, shards: Iterable[str]) -> dict[str, str]:
    """The index's map from tensor to shard, every shard checked to be a plain name among ``shards``."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MossError(f"{index}: weight_map is missing; this is not the index of a checkpoint.")
    there = set(shards)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard:
            raise MossError(
                f"{index}: the shard of {name[:200]!r} is {str(shard)[:200]!r}, and there is no such file beside it."
            )
        if shard not in there:
            raise MossError(f"{index} lists {shard[:200]!r}, which is missing. Download it.")
    return plain_names(weight_map, index)


def open_local(folder: Path) -> Checkpoint:
    """A checkpoint in a local folder.

    Raises:
        MossError: it is no checkpoint of a MOSS or CodeGen model, or files are missing.
    """
    if not (folder / "config.json").exists():
        raise MossError(f"{folder} is not a checkpoint: {_why_no_checkpoint(folder)}.")
    names = [path.name for path in folder.iterdir()]
    fields = read_json(folder / "config.json")
    config = checkpoint_config(fields, str(folder / "config.json"))
    index, single = choose_index(names)
    if index is not None:
        weight_map = read_weight_map(folder / index, names)
    else:
        assert single is not None
        weight_map = dict.fromkeys(read_shard(folder / single), single)
    shards = sorted(set(weight_map.values()))

    def identify() -> dict[str, Any]:
        return {
            "folder": folder.resolve().name,
            "config": config.to_json(),
            "shards": {shard: _shard_identity(folder / shard) for shard in shards},
        }

    return Checkpoint(str(folder), config, fields, identify, lambda: weight_map, lambda name: folder / name)


def _shard_identity(path: Path) -> str:
    """A copy, or the same files installed again, are the same checkpoint where that costs little to find out."""
    try:
        stat = path.stat()
    except OSError as error:
        raise MossError(f"{path} cannot be read: {error.strerror}.") from error
    if stat.st_size > HASHED_BYTES:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return sha256_of(read_small(path, HASHED_BYTES))


def _why_no_checkpoint(folder: Path) -> str:
    """What a folder without config.json is instead."""
    if (folder / "adapter_config.json").exists():
        return (
            "it is an adapter (LoRA), which holds only what training changed. Merge it into its base model first "
            "(merge_and_unload in peft), and convert that"
        )
    snapshots = sorted(folder.glob("snapshots/*/config.json")) or sorted(
        folder.glob("*/snapshots/*/config.json")
    )
    if snapshots:
        return f"it is a part of the hub's cache. The checkpoint in it is {snapshots[-1].parent}"
    return "config.json is missing"


def checkpoint_config(fields: dict[str, Any], where: str) -> MossConfig:
    """The geometry in a checkpoint's config.json, or why it is none of ours."""
    kind = fields.get("model_type")
    if kind not in ("moss", "codegen"):
        raise MossError(
            f"{where}: model_type is {str(kind)[:60]!r}. moss-jt converts MOSS (moss-moon-003-*) and CodeGen models only."
        )
    if fields.get("n_embd") is None and ("hidden_size" in fields or "num_hidden_layers" in fields):
        raise MossError(
            f"{where} says model_type {kind!r} but describes another architecture (hidden_size instead of n_embd), "
            "as fnlp/moss-base-7b does. moss-jt converts the moss-moon-003 models and CodeGen."
        )
    if kind == "codegen" and "auto_map" in fields:
        raise MossError(
            f"{where} brings model code of its own (auto_map), as CodeGen2 does: its qkv rows may lie in another order than "
            "CodeGen's, and the model would talk nonsense. moss-jt converts the first CodeGen models only."
        )
    activation = fields.get("activation_function", "gelu_new")
    if activation != "gelu_new":
        raise MossError(f"{where}: activation_function is {str(activation)[:60]!r}; only gelu_new is known.")
    return MossConfig.from_json(fields, where)
