"""Compare a model folder with the checksums in its manifest."""

import hashlib
from collections.abc import Callable

from moss_jt.errors import MossError
from moss_jt.store.files import open_regular, reading
from moss_jt.store.manifest import REPAIR, FileEntry, read_manifest
from moss_jt.store.model_folder import Store, StoreFile, ends_early
from moss_jt.store.tokenizer import Tokenizer

CHUNK_BYTES = 16 << 20
Progress = Callable[[int], object]


def verify_store(store: Store, progress: Progress = lambda count: None) -> None:
    """Read everything and compare. What a checksum of the manifest covers besides the tensors, opening has compared.

    Raises:
        MossError: something differs from what was converted; it is named.
    """
    manifest = read_manifest(store.path)
    Tokenizer.from_file(store.tokenizer_path).check_size(store.config.vocab_size)
    for file in store.files:
        verify_file(file, manifest.files[file.path.name], progress)


def verify_file(file: StoreFile, entry: FileEntry, progress: Progress = lambda count: None) -> None:
    """Raises MossError where a tensor of the file differs from its checksum, or cannot be read."""
    with reading(file.path), open_regular(file.path) as opened:
        for spec in file.tensors.values():
            digest, left = hashlib.sha256(), spec.nbytes
            opened.seek(spec.offset)
            while left:
                chunk = opened.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise ends_early(file.path)
                digest.update(chunk)
                left -= len(chunk)
                progress(len(chunk))
            if digest.hexdigest() != entry.tensors[spec.name].sha256:
                raise MossError(
                    f"{file.path}: {spec.name} is not what was converted: its checksum differs. {REPAIR}"
                )
