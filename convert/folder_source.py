"""A float16 model folder as the source of a quantised one."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jt.convert.layout import FilePlan, Target, Twin
from moss_jt.convert.pipeline import Recipe, weight_bytes, with_header
from moss_jt.convert.tensors import SourceTensor
from moss_jt.errors import MossError
from moss_jt.store.checksums import verify_file
from moss_jt.store.config import MossConfig
from moss_jt.store.files import read_small
from moss_jt.store.manifest import MANIFEST, REPAIR, Manifest, read_manifest, sha256_of
from moss_jt.store.model_folder import Store, StoreFile, open_store
from moss_jt.store.safetensors_header import TensorSpec


@dataclass(frozen=True)
class ModelFolder:
    """See :class:`moss_jt.convert.pipeline.Source`."""

    store: Store

    @property
    def config(self) -> MossConfig:
        return self.store.config

    def tokenizer_text(self) -> str:
        try:
            return read_small(self.store.tokenizer_path).decode("utf-8")
        except ValueError as error:
            raise MossError(f"{self.store.tokenizer_path} is not text. {REPAIR}") from error

    @property
    def download(self) -> None:
        return None

    def shards_of(self, names: Iterable[str]) -> set[str]:
        return set()

    def close_shards(self, still_needed: Iterable[str]) -> None:
        """Files are mapped while they are read: there is nothing to give back."""

    def check_unchanged(self) -> None:
        """A finished model folder is never written again."""


def folder_recipe(path: Path) -> tuple[ModelFolder, Recipe]:
    """A float16 model folder, and how to make it again tensor by tensor.

    Raises:
        MossError: the folder is damaged, unfinished, or quantised already.
    """
    store = open_store(path)
    if store.bits != 16:
        raise MossError(
            f"{path} is quantised already, to int{store.bits}. Quantize the float16 model that it was made from."
        )
    identity = {"folder": path.resolve().name, "manifest": sha256_of(read_small(path / MANIFEST))}
    manifest = read_manifest(path)
    files = [_plan(file, manifest) for file in store.files]
    total = weight_bytes(store.config, 16, 0)
    # What the float16 model was converted from: what it was trained for is known by that, wherever the folder lies now.
    origin = str(manifest.fields.get("source") or path)
    return ModelFolder(store), Recipe(identity, origin, 16, 0, files, total)


def _plan(file: StoreFile, manifest: Manifest) -> FilePlan:
    entry = manifest.files[file.path.name]

    def target(spec: TensorSpec) -> Target:
        checksum = entry.tensors[spec.name].sha256
        return Target(spec.name, spec.dtype_name, spec.shape, lambda: _chunks(file, spec, checksum))

    def verify(progress: Callable[[int], object]) -> None:
        verify_file(file, entry, progress)

    fields = manifest.fields["files"][file.path.name]
    twin = Twin(file.path, with_header(file.path, fields), verify)
    return FilePlan(file.path.name, (), lambda: [target(spec) for spec in file.tensors.values()], twin)


def _chunks(file: StoreFile, spec: TensorSpec, checksum: str) -> Iterator[np.ndarray]:
    """The tensor, compared with its checksum while it is read: damage must not be quantised and then vouched for."""
    source = SourceTensor(spec.name, spec.dtype_name, spec.shape, file.path, spec.offset)
    digest = hashlib.sha256()
    for chunk in source.chunks(0, spec.shape[0]):
        digest.update(chunk.reshape(-1).view(np.uint8).data)
        yield chunk
    if digest.hexdigest() != checksum:
        raise MossError(f"{file.path}: {spec.name} is not what was written: its checksum differs. {REPAIR}")
