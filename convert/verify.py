"""Compare a model folder's tensors with the checksums in its manifest."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.store.model_folder import MANIFEST, Store, TensorSpec, local_name, read_json

PIECE_BYTES = 16 << 20


def verify_store(store: Store, progress: Callable[[int], object] = lambda count: None) -> None:
    """Read every tensor and compare.

    Raises:
        MossError: a tensor differs from what was converted; it is named.
    """
    listed = read_json(store.path / MANIFEST)["files"]
    for file in store.files:
        checksums = {local_name(name): entry for name, entry in listed[file.path.name]["tensors"].items()}
        for name, spec in file.tensors.items():
            if _checksum(file.path, spec, progress) != checksums.get(name, {}).get("sha256"):
                raise MossError(
                    f"{file.path}: {spec.name} is not what was converted: its checksum differs. The file has been damaged; "
                    f"delete {store.path} and convert again."
                )


def _checksum(path: Path, spec: TensorSpec, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(spec.offset)
        left = spec.nbytes
        while left:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise MossError(f"{path} ends early, inside {spec.name}.")
            digest.update(piece)
            left -= len(piece)
            progress(len(piece))
    return digest.hexdigest()
