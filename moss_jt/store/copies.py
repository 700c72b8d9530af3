"""Model folders that were made from the same checkpoint, in fewer bits: copies of a model, which draft for it.

What quantizing leaves as it is (embedding, head, norms, biases) has the same bytes in both, so the checksums in their
manifests tell, whichever program quantized and whenever that was.
"""

from collections.abc import Iterable
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.store.architecture import MATRICES
from moss_jt.store.locations import models_folder
from moss_jt.store.manifest import MANIFEST, TOKENIZER, Manifest, TensorEntry, read_manifest
from moss_jt.store.model_folder import Store, open_store


def copies_of(store: Store) -> list[Path]:
    """Copies beside the model folder and under the model home, fewest bits first."""
    own = read_manifest(store.path)
    copies = [
        (manifest.bits, path) for path, manifest in _folders_near(store.path) if _is_copy(own, manifest)
    ]
    return [path for _, path in sorted(copies)]


def check_copy(store: Store, copy: Store) -> None:
    """Raises MossError unless ``copy`` is the same model in fewer bits; the message names what differs."""
    if copy.bits >= store.bits:
        raise MossError(
            f"{copy.path} has {copy.bits} bits, and {store.path} has {store.bits}: a model that drafts has fewer. "
            f"Make one with: moss-jt convert {store.path} --bits 4"
        )
    own, other = read_manifest(store.path), read_manifest(copy.path)
    different = _difference(own, other)
    if different is not None or copy.config != store.config:
        what = "its geometry" if copy.config != store.config else different
        raise MossError(
            f"{copy.path} was not made from the same checkpoint as {store.path}: {what} differs. "
            f"Make a copy with: moss-jt convert {store.path} --bits 4"
        )


def _folders_near(path: Path) -> Iterable[tuple[Path, Manifest]]:
    folders = {
        manifest.parent.resolve()
        for parent in (path.resolve().parent, models_folder())
        for manifest in parent.glob(f"*/{MANIFEST}")
    }
    for folder in sorted(folders):
        try:
            yield folder, read_manifest(folder)
        except MossError:
            continue  # another version's, or damaged: no copy for now


def _is_copy(own: Manifest, other: Manifest) -> bool:
    return other.bits < own.bits and _difference(own, other) is None


def _difference(own: Manifest, other: Manifest) -> str | None:
    """A file or tensor that both should have alike and have not; None where there is none."""
    if own.files.keys() != other.files.keys():
        return "the number of blocks"
    if own.texts is not None and other.texts is not None and own.texts[TOKENIZER] != other.texts[TOKENIZER]:
        return TOKENIZER
    for name in own.files:
        kept, others = _kept_tensors(own, name), _kept_tensors(other, name)
        for tensor in sorted(kept.keys() | others.keys()):
            if kept.get(tensor) != others.get(tensor):
                return f"{tensor[:200]} in {name}"
    return None


def _kept_tensors(manifest: Manifest, name: str) -> dict[str, TensorEntry]:
    """Those of a file that quantizing leaves as they are: all but the blocks' matrices."""
    tensors = manifest.files[name].tensors
    return {full: entry for full, entry in tensors.items() if not _is_of_matrix(full)}


def _is_of_matrix(full: str) -> bool:
    stem, _, part = full.rpartition(".")
    return part != "bias" and stem.endswith(tuple(f".{name}" for name in MATRICES))


def open_copy(store: Store, path: Path) -> Store:
    """Open a copy of a model.

    Raises:
        MossError: it is damaged, or no copy of this one.
    """
    copy = open_store(path)
    check_copy(store, copy)
    return copy
