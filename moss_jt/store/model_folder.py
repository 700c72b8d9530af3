"""A model folder: config.json, tokenizer.json, manifest.json, and safetensors files whose data any process may map.

docs/model-folder.md is its specification. ``embedding.safetensors`` holds transformer.wte.weight, ``block-NN.safetensors``
one block each, ``head.safetensors`` the final norm and the head. Matrices are (out, in), float16; qkv rows are all heads'
queries, then keys, then values. A quantised matrix is ``.packed``, ``.scales``, ``.zeros`` and sometimes ``.input_order``
instead of ``.weight`` (see moss_jt.store.quant). The data of each file begin at a multiple of 4096 bytes and have no
holes, so that a block is one read. The manifest is written last: a folder without it is unfinished.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.architecture import Wanted, block_tensors, embedding_tensors, head_tensors, order_tensors
from moss_jt.store.config import MossConfig
from moss_jt.store.files import open_regular, parse_json, read_small, reading
from moss_jt.store.manifest import (
    CONFIG,
    MANIFEST,
    REPAIR,
    TEXTS,
    TOKENIZER,
    FileEntry,
    Manifest,
    read_manifest,
    sha256_of,
)
from moss_jt.store.quant import check_group_size
from moss_jt.store.safetensors_header import TensorSpec, read_header

EMBEDDING, HEAD = "embedding.safetensors", "head.safetensors"
ALIGNMENT = 4096


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


def open_store(path: str | Path) -> Store:
    """Open a model folder: reads JSON and safetensors headers and compares their checksums, reads no weights.

    Raises:
        MossError: the folder is unfinished, damaged, of a newer format, or its tensors do not fit its configuration.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise MossError(_why_no_store(path))
    manifest = read_manifest(path)
    for name in TEXTS:
        check_text(path, name, manifest)
    config = MossConfig.from_json(parse_json(read_small(path / CONFIG), path / CONFIG), str(path / CONFIG))
    _check_told_config(path, config, manifest)
    if manifest.bits != 16:
        check_group_size(manifest.group_size, config.n_embd, config.n_inner)
    expected = [EMBEDDING, *map(block_file_name, range(config.n_layer)), HEAD]
    for name in (*(set(expected) - manifest.files.keys()), *(manifest.files.keys() - set(expected))):
        raise MossError(
            f"{path}: {MANIFEST} and {CONFIG} contradict each other about {name[:60]!r}. {REPAIR}"
        )
    files = [open_file(path, name, manifest.files[name], config, manifest) for name in expected]
    return Store(path, config, manifest.bits, manifest.group_size, files[0], files[1:-1], files[-1])


def check_text(folder: Path, name: str, manifest: Manifest) -> None:
    """Raises MossError where config.json or tokenizer.json is missing, or not what the manifest vouches for."""
    data = read_small(folder / name)
    if manifest.texts is not None and sha256_of(data) != manifest.texts[name]:
        raise MossError(f"{folder / name} is not what was written: its checksum differs. {REPAIR}")


def _check_told_config(folder: Path, config: MossConfig, manifest: Manifest) -> None:
    """Raises MossError where config.json says otherwise than what a folder of 0.1.0 was made from."""
    told = manifest.identity.get("config") if isinstance(manifest.identity, dict) else None
    if isinstance(told, dict) and MossConfig.from_json(told) != config:
        raise MossError(f"{folder / CONFIG} is not what was written. {REPAIR}")


def read_tensor(file: StoreFile, name: str) -> np.ndarray:
    """One tensor in fresh memory. It is read and not mapped: where the file becomes shorter, a map ends the process.

    Raises:
        MossError: the file cannot be read, or ends before the tensor does.
    """
    spec = file.tensors[name]
    tensor = np.empty(spec.shape, spec.dtype)
    with reading(file.path), open_regular(file.path) as opened:
        opened.seek(spec.offset)
        count = opened.readinto(tensor.reshape(-1).view(np.uint8).data)
    if count != spec.nbytes:
        raise ends_early(file.path)
    return tensor


def ends_early(path: Path) -> MossError:
    """What to say of a file that was longer when it was opened."""
    return MossError(f"{path} ends early: it became shorter while it was in use. {REPAIR}")


def open_file(folder: Path, name: str, entry: FileEntry, config: MossConfig, manifest: Manifest) -> StoreFile:
    """One safetensors file of a model folder.

    Raises:
        MossError: it is missing, or it is not what the manifest says and the configuration needs.
    """
    path = folder / name
    header = read_header(path)
    if header.n_bytes != entry.n_bytes:
        raise MossError(f"{path} has {header.n_bytes} bytes, the manifest says {entry.n_bytes}. {REPAIR}")
    if entry.header not in (None, header.sha256):
        raise MossError(f"{path} is not what was written: the checksum of its header differs. {REPAIR}")
    if header.data_offset % ALIGNMENT:
        raise MossError(f"{path}: its data do not begin at a multiple of {ALIGNMENT} bytes. {REPAIR}")
    needed, optional = _tensors_of(name, config, manifest)
    known = {**needed, **optional}
    for full, spec in header.tensors.items():
        if full not in known:
            raise MossError(f"{path} holds a tensor that does not belong there: {full[:200]!r}.")
        _, dtype, shape = known[full]
        if (spec.dtype_name, spec.shape) != (dtype, shape):
            raise MossError(f"{path}: {full} is {spec.shape} {spec.dtype_name}; {shape} {dtype} is needed.")
        listed = entry.tensors.get(full)
        if listed is None or (listed.dtype, listed.shape) != (dtype, shape):
            raise MossError(f"{path}: {full} is not what {MANIFEST} says of it. {REPAIR}")
    for full in (*needed, *entry.tensors):
        if full not in header.tensors:
            raise MossError(f"{path} lacks {full[:200]}. {REPAIR}")
    tensors = {known[full][0]: spec for full, spec in header.tensors.items()}
    file = StoreFile(path, header.n_bytes, header.data_offset, tensors)
    for full in optional.keys() & header.tensors.keys():
        _check_order(file, known[full][0])
    return file


# Full name -> (local name, safetensors dtype, shape)
Named = dict[str, tuple[str, str, tuple[int, ...]]]


def _tensors_of(name: str, config: MossConfig, manifest: Manifest) -> tuple[Named, Named]:
    """What a file of the model folder must hold, and what it may hold besides."""
    if name == EMBEDDING:
        return _named("transformer.", embedding_tensors(config)), {}
    if name == HEAD:
        return _named("transformer.", head_tensors(config)), {}
    prefix = f"transformer.h.{int(name.removeprefix('block-').removesuffix('.safetensors'))}."
    block = block_tensors(config, manifest.bits, manifest.group_size)
    return _named(prefix, block), _named(prefix, order_tensors(config, manifest.bits))


def _named(prefix: str, tensors: Wanted) -> Named:
    return {
        local if local.startswith("lm_head.") else prefix + local: (local, dtype, shape)
        for local, (dtype, shape) in tensors.items()
    }


def _check_order(file: StoreFile, name: str) -> None:
    """Kernels read the inputs that these numbers say, unchecked: every input must come once."""
    order = read_tensor(file, name)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise MossError(
            f"{file.path}: {file.tensors[name].name} is not an order of {len(order)} inputs. {REPAIR}"
        )


def _why_no_store(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist. Make a model folder with: moss-jt convert CHECKPOINT --out {path}"
    if any(path.glob("*.bin")) or any(path.glob("*.index.json")):
        return f"{path} is a checkpoint, no model folder. Convert it first: moss-jt convert {path}"
    if (path / "journal.json").exists():
        return f"{path} is not finished: its conversion was interrupted. Run the same moss-jt convert again to go on."
    return f"{path} is not a model folder: {MANIFEST} is missing. Make one with: moss-jt convert CHECKPOINT --out {path}"
