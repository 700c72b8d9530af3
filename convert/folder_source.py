"""A float16 model folder as the source of a quantised one."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moss_jt.convert.layout import FilePlan, Target
from moss_jt.convert.pipeline import Recipe, weight_bytes
from moss_jt.convert.tensors import PIECE_BYTES
from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import DTYPES, MANIFEST, Store, StoreFile, TensorSpec, map_tensor, open_store


@dataclass(frozen=True)
class ModelFolder:
    """See :class:`moss_jt.convert.pipeline.Source`."""

    store: Store

    @property
    def config(self) -> MossConfig:
        return self.store.config

    def tokenizer_text(self) -> str:
        try:
            return self.store.tokenizer_path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MossError(
                f"{self.store.tokenizer_path} cannot be read: {error}. Convert the checkpoint again."
            ) from error

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
    identity = {"folder": path.resolve().name, "manifest": _checksum(path / MANIFEST)}
    files = [_plan(file) for file in store.files]
    total = weight_bytes(store.config, 16, 0)
    return ModelFolder(store), Recipe(identity, str(path), 16, 0, files, total)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plan(file: StoreFile) -> FilePlan:
    names = {dtype: name for name, dtype in DTYPES.items()}

    def target(local: str, spec: TensorSpec) -> Target:
        return Target(spec.name, names[spec.dtype], spec.shape, lambda: _pieces(file, local))

    return FilePlan(file.path.name, (), lambda: [target(local, spec) for local, spec in file.tensors.items()])


def _pieces(file: StoreFile, local: str) -> Iterator[np.ndarray]:
    tensor = map_tensor(file, local)
    step = max(1, PIECE_BYTES // (tensor.nbytes // len(tensor)))
    for first in range(0, len(tensor), step):
        yield tensor[first : first + step]
