"""A model folder: config.json, tokenizer.json, manifest.json, and safetensors files whose data any process may map.

Format 1. ``embedding.safetensors`` holds transformer.wte.weight, ``block-NN.safetensors`` one block each,
``head.safetensors`` the final norm and the head. Matrices are (out, in), float16; qkv rows are all heads' queries, then keys,
then values. A quantised matrix is ``.packed``, ``.scales``, ``.zeros`` and sometimes ``.input_order`` instead of ``.weight`` (see
moss_jt.store.quant). The data of each file begin at a multiple of 4096 bytes and have no holes, so that a block is one read.
The manifest is written last: a folder without it is unfinished.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig

FORMAT, VERSION = "moss-jt", 1
MANIFEST, CONFIG, TOKENIZER = "manifest.json", "config.json", "tokenizer.json"
EMBEDDING, HEAD = "embedding.safetensors", "head.safetensors"
DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "U8": np.dtype("u1"), "I32": np.dtype("<i4")}
MATRICES = ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
MAX_HEADER_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
Wanted = dict[str, tuple[str, tuple[int, ...]]]  # local name -> (safetensors dtype, shape)
MAX_AXES, MAX_LENGTH = 16, 1 << 48


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: ``offset`` counts from the file's first byte."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoreFile:
    """One safetensors file; ``tensors`` is keyed by names without ``transformer.h.N.`` or ``transformer.``."""

    path: Path
    nbytes: int
    data_offset: int
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True)
class Store:
    """An opened model folder: what lies where. Nothing of the weights has been read."""

    path: Path
    config: MossConfig
    bits: int
    group_size: int
    embedding: StoreFile
    blocks: list[StoreFile]
    head: StoreFile

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def files(self) -> list[StoreFile]:
        return [self.embedding, *self.blocks, self.head]


def block_file_name(layer: int) -> str:
    return f"block-{layer:02d}.safetensors"


def local_name(name: str) -> str:
    """``transformer.h.3.ln_1.weight`` -> ``ln_1.weight``; ``transformer.wte.weight`` -> ``wte.weight``."""
    name = name.removeprefix("transformer.")
    return name.split(".", 2)[2] if name.startswith("h.") else name


def matrix_shape(config: MossConfig, layer: str) -> tuple[int, int]:
    """(N out, K in) of a block's matrix."""
    width, inner = config.n_embd, config.n_inner
    return {
        "attn.qkv_proj": (3 * width, width),
        "attn.out_proj": (width, width),
        "mlp.fc_in": (inner, width),
        "mlp.fc_out": (width, inner),
    }[layer]


def block_tensors(config: MossConfig, bits: int, group_size: int) -> Wanted:
    """Local name -> (safetensors dtype, shape) of the tensors that every block has."""
    width, inner = config.n_embd, config.n_inner
    found: Wanted = {}
    for layer in MATRICES:
        rows, columns = matrix_shape(config, layer)
        if bits == 16:
            found[f"{layer}.weight"] = ("F16", (rows, columns))
            continue
        groups = columns // group_size
        found[f"{layer}.packed"] = ("U8", (rows, columns * bits // 8))
        found[f"{layer}.scales"] = ("F16", (rows, groups))
        found[f"{layer}.zeros"] = ("U8", (rows, groups))
    for name, shape in {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "mlp.fc_in.bias": (inner,),
        "mlp.fc_out.bias": (width,),
    }.items():
        found[name] = ("F16", shape)
    return found


def order_tensors(config: MossConfig, bits: int) -> Wanted:
    """The same for those that a quantised block may have: where act-order permuted a matrix's inputs."""
    if bits == 16:
        return {}
    return {f"{layer}.input_order": ("I32", (matrix_shape(config, layer)[1],)) for layer in MATRICES}


def embedding_tensors(config: MossConfig) -> Wanted:
    return {"wte.weight": ("F16", (config.vocab_size, config.n_embd))}


def head_tensors(config: MossConfig) -> Wanted:
    width, vocabulary = config.n_embd, config.vocab_size
    return {
        "lm_head.weight": ("F16", (vocabulary, width)),
        "lm_head.bias": ("F16", (vocabulary,)),
        "ln_f.weight": ("F16", (width,)),
        "ln_f.bias": ("F16", (width,)),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise MossError(
                f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; that is no {path.name} of a model."
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MossError(f"{path} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MossError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise MossError(f"{path} does not hold a JSON object.")
    return fields


def open_store(path: str | Path) -> Store:
    """Open a model folder: parses JSON and safetensors headers, reads no weights.

    Raises:
        MossError: the folder is unfinished, damaged, of a newer format, or its tensors do not fit its configuration.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise MossError(_why_no_store(path))
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise MossError(f"{path / MANIFEST}: format is {manifest.get('format')!r}, not {FORMAT!r}.")
    if manifest.get("version") != VERSION:
        raise MossError(
            f"{path} has format version {manifest.get('version')!r}; this program reads version {VERSION}. "
            "Convert the checkpoint again, or use the moss-jt that wrote it."
        )
    config = MossConfig.from_json(read_json(path / CONFIG), str(path / CONFIG))
    bits, group_size = manifest.get("bits"), manifest.get("group_size")
    if bits not in (4, 8, 16) or not isinstance(group_size, int) or (bits != 16 and group_size < 1):
        raise MossError(f"{path / MANIFEST}: bits {bits!r} with group_size {group_size!r} is not possible.")
    listed = manifest.get("files")
    if not isinstance(listed, Mapping):
        raise MossError(f"{path / MANIFEST}: the list of files is missing.")

    def file(name: str, wanted: Wanted, optional: Wanted | None = None) -> StoreFile:
        entry = listed.get(name)
        if not isinstance(entry, Mapping):
            raise MossError(f"{path / MANIFEST} does not list {name}. Convert the checkpoint again.")
        return _open_file(path / name, entry.get("bytes"), wanted, optional or {})

    return Store(
        path=path,
        config=config,
        bits=bits,
        group_size=group_size,
        embedding=file(EMBEDDING, embedding_tensors(config)),
        blocks=[
            file(block_file_name(layer), block_tensors(config, bits, group_size), order_tensors(config, bits))
            for layer in range(config.n_layer)
        ],
        head=file(HEAD, head_tensors(config)),
    )


def map_tensor(file: StoreFile, name: str) -> np.ndarray:
    """One tensor as a read-only memory map: no memory, no time; pages come from the page cache as they are touched."""
    spec = file.tensors[name]
    return np.memmap(file.path, dtype=spec.dtype, mode="r", offset=spec.offset, shape=spec.shape)


def read_header(path: Path) -> tuple[dict[str, TensorSpec], int, int]:
    """Tensors by full name, offset of the data, size of the file; of any safetensors file.

    Source of the format: eight bytes of header length, a JSON header, then the data without holes.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES * 64, size - 8):
                raise MossError(f"{path} is no safetensors file, or it is cut short.")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise MossError(f"{path} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MossError(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise MossError(f"{path}: the safetensors header is no JSON object.")
    specs = {
        name: _spec(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
    }
    ends = [spec.offset + spec.nbytes for spec in specs.values()]
    if max(ends, default=8 + length) > size:
        raise MossError(f"{path} is cut short: {size} bytes of {max(ends)}. Convert or download it again.")
    return specs, 8 + length, size


def _spec(path: Path, name: str, entry: Any, data_offset: int) -> TensorSpec:
    try:
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise MossError(f"{path}: the header's entry of {name} is not understood.") from error
    numbers = (*shape[: MAX_AXES + 1], begin, end)
    whole = all(isinstance(number, int) and 0 <= number < MAX_LENGTH for number in numbers)
    if not whole or len(shape) > MAX_AXES or end - begin != math.prod(shape) * dtype.itemsize:
        raise MossError(f"{path}: the header's sizes of {name} contradict each other.")
    return TensorSpec(name, dtype, shape, data_offset + begin, end - begin)


# bfloat16 has no numpy type: its bit patterns come as uint16 under a name of their own.
SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    **DTYPES,
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype([("bfloat16", "<u2")]),
    "BOOL": np.dtype("?"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I64": np.dtype("<i8"),
}


def _open_file(path: Path, listed_bytes: Any, wanted: Wanted, optional: Wanted) -> StoreFile:
    specs, data_offset, size = read_header(path)
    if size != listed_bytes:
        raise MossError(
            f"{path} has {size} bytes, the manifest says {listed_bytes}. Convert the checkpoint again."
        )
    tensors = {local_name(name): spec for name, spec in specs.items()}
    if len(tensors) != len(specs):
        raise MossError(f"{path} holds two tensors of one name.")
    for name in wanted:
        if name not in tensors:
            raise MossError(f"{path} lacks {name}. Convert the checkpoint again.")
    known = {**optional, **wanted}
    for name, spec in tensors.items():
        if name not in known:
            raise MossError(f"{path} holds a tensor that does not belong there: {name}.")
        dtype, shape = known[name]
        if spec.shape != shape or spec.dtype != DTYPES[dtype]:
            raise MossError(f"{path}: {name} is {spec.shape} {spec.dtype}; {shape} {dtype} is needed.")
    file = StoreFile(path, size, data_offset, tensors)
    for name in optional.keys() & tensors.keys():
        _check_order(file, name)
    return file


def _check_order(file: StoreFile, name: str) -> None:
    """Kernels read the inputs that these numbers say, unchecked: every input must come once."""
    order = map_tensor(file, name)
    seen = np.zeros(len(order), bool)
    seen[order[(order >= 0) & (order < len(order))]] = True
    if not seen.all():
        raise MossError(
            f"{file.path}: {name} is no order of {len(order)} inputs. Convert the checkpoint again."
        )


def _why_no_store(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist. Make a model folder with: moss-jt convert CHECKPOINT --out {path}"
    if any(path.glob("*.bin")) or any(path.glob("*.index.json")):
        return f"{path} is a checkpoint, no model folder. Convert it first: moss-jt convert {path}"
    if (path / "journal.json").exists():
        return f"{path} is not finished: its conversion was interrupted. Run the same moss-jt convert again to go on."
    return f"{path} is no model folder: {MANIFEST} is missing. Make one with: moss-jt convert CHECKPOINT --out {path}"
