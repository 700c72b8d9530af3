"""A checkpoint to a model folder: file after file, resumable, the manifest last."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.disk_space import Download, check_disk, on_one_disk
from moss_jt.convert.gptq_checkpoint import format_notes, quantised_files
from moss_jt.convert.journal import JOURNAL, Journal
from moss_jt.convert.layout import FilePlan, dense_files, is_quantised
from moss_jt.convert.writer import Progress, write_file
from moss_jt.errors import MossError
from moss_jt.store.architecture import block_tensors, bytes_of, embedding_tensors, head_tensors
from moss_jt.store.checksums import verify_file, verify_store
from moss_jt.store.config import MossConfig
from moss_jt.store.files import link_over, read_json, read_small, write_json, write_text, writing
from moss_jt.store.manifest import (
    CONFIG,
    FORMAT,
    MANIFEST,
    TEXTS,
    TOKENIZER,
    VERSION,
    Manifest,
    read_manifest,
    sealed,
    sha256_of,
)
from moss_jt.store.model_folder import (
    EMBEDDING,
    HEAD,
    block_file_name,
    open_file,
    open_store,
)
from moss_jt.store.safetensors_header import read_header

SCRATCH = ".scratch"  # ending of files beside the model's that making them needs, removed in the end


@dataclass(frozen=True)
class Recipe:
    """What a model folder will be: its files in order, their total size, and what they are made of.

    ``notes`` are sentences for the user about the source.
    """

    identity: dict[str, Any]
    source: str
    bits: int
    group_size: int
    files: list[FilePlan]
    total_bytes: int
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """What a model folder is made from: a checkpoint, or another model folder."""

    @property
    def config(self) -> MossConfig: ...

    def tokenizer_text(self) -> str:
        """The text of tokenizer.json."""
        ...

    @property
    def download(self) -> Download | None: ...

    def shards_of(self, names: Iterable[str]) -> set[str]:
        """The shards that hold these tensors."""
        ...

    def close_shards(self, still_needed: Iterable[str]) -> None:
        """Give back what holds none of the tensors that are still needed."""
        ...

    def check_unchanged(self) -> None:
        """Raises MossError where the source is no longer what it was when it was opened."""
        ...


def file_bytes(config: MossConfig, bits: int, group_size: int) -> dict[str, int]:
    """Bytes of the tensors in each file of the model folder, headers and input orders apart."""
    block = bytes_of(block_tensors(config, bits, group_size))
    blocks = {block_file_name(layer): block for layer in range(config.n_layer)}
    return {EMBEDDING: bytes_of(embedding_tensors(config)), **blocks, HEAD: bytes_of(head_tensors(config))}


def weight_bytes(config: MossConfig, bits: int, group_size: int) -> int:
    """Bytes of all tensors of the model folder, headers and input orders apart."""
    return sum(file_bytes(config, bits, group_size).values())


def recipe_for(checkpoint: Checkpoint) -> Recipe:
    """How to convert a checkpoint as it is: float16 stays float16, GPTQ stays int4 or int8."""
    notes: tuple[str, ...] = ()
    if is_quantised(checkpoint):
        files, packed = quantised_files(checkpoint)
        bits, group_size = packed.bits, packed.group_size
        notes = (*format_notes(checkpoint.fields, bits, group_size), *packed.notes)
    else:
        files, bits, group_size = dense_files(checkpoint), 16, 0
    total = weight_bytes(checkpoint.config, bits, group_size)
    return Recipe(checkpoint.identity, checkpoint.source, bits, group_size, files, total, notes)


def already_converted(
    out: Path,
    identity: dict[str, Any],
    config: MossConfig,
    progress: Progress = lambda count: None,
    notice: Callable[[str], None] = lambda text: None,
) -> bool:
    """True when ``out`` is finished, made from this very source, and complete: everything in it is read and compared.

    A damaged folder becomes an unfinished one again, whose journal lists the files that are as they should be.

    Args:
        progress: called with bytes of tensors as they are compared.

    Raises:
        MossError: ``out`` was made from something else, or by a newer version.
    """
    if not os.path.lexists(out / MANIFEST):
        return False
    identity = json.loads(json.dumps(identity))
    manifest, reason = _manifest_of(out, identity)
    kept: dict[str, Any] = {}
    if manifest is not None:
        try:
            store = open_store(out)
            verify_store(store, progress)
            if manifest.texts is not None:
                (out / JOURNAL).unlink(missing_ok=True)  # a kill at the very end leaves it
                return True
            reason = "it was written by moss-jt 0.1.0, without checksums of all its parts"
            kept = manifest.fields["files"]
        except MossError as error:
            reason = str(error)
            kept = _intact_files(out, manifest, config)
    notice(f"{out} is not complete: {reason.rstrip('.')}. {len(kept)} of its files are kept.")
    with writing(out), _alone(out):
        journal = Journal(out, identity)
        journal.files = {name: with_header(out / name, entry) for name, entry in kept.items()}
        journal.write()
        (out / MANIFEST).unlink()
    return False


def _manifest_of(out: Path, identity: dict[str, Any]) -> tuple[Manifest | None, str]:
    """The manifest of a folder made from this source, or None and what is wrong with it."""
    try:
        manifest = read_manifest(out)
    except MossError as error:
        if _is_of_another_version(out):
            raise
        return None, str(error)
    if manifest.identity != identity:
        raise MossError(
            f"{out} already holds a model made from something else. Name another folder with --out, or delete that "
            "one first."
        )
    return manifest, ""


def _is_of_another_version(out: Path) -> bool:
    """Whether a manifest that cannot be read is complete, and so a later version's, which must not be written over."""
    try:
        fields = read_json(out / MANIFEST)
    except MossError:
        return False
    return fields.get("version") != VERSION and sealed(fields) == fields


def _intact_files(out: Path, manifest: Manifest, config: MossConfig) -> dict[str, Any]:
    """Manifest entries of the safetensors files that are what it says."""
    kept = {}
    for name in file_bytes(config, 16, 0):
        with contextlib.suppress(MossError):
            if name in manifest.files:
                verify_file(
                    open_file(out, name, manifest.files[name], config, manifest), manifest.files[name]
                )
                kept[name] = manifest.fields["files"][name]
    return kept


def with_header(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with the checksum of the file's header, which 0.1.0 did not write."""
    return {"bytes": entry["bytes"], "header": read_header(path).sha256, "tensors": entry["tensors"]}


def convert(
    source: Source,
    recipe: Recipe,
    out: Path,
    progress: Progress = lambda count: None,
    notice: Callable[[str], None] = lambda text: None,
) -> bool:
    """Write the model folder ``out``; False when it was there already. Interrupted anywhere, the next run goes on.

    Args:
        progress: called with bytes of finished tensors as they grow.
        notice: called with a sentence for the user, such as that a conversion goes on.

    Raises:
        MossError: bad source, full disk, or ``out`` is something else. No manifest is left, so nothing looks finished.
    """
    if already_converted(out, recipe.identity, source.config, notice=notice):
        return False
    for note in recipe.notes:
        notice(note)
    tokenizer = source.tokenizer_text()
    with writing(out):
        _check_ours(out)
        journal = Journal(out, json.loads(json.dumps(recipe.identity)))
        left = [plan for plan in recipe.files if plan.name not in journal.files]
        _check_space(source, recipe, left, out)
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            if journal.restarted:
                notice(f"{out} was begun from another version of the source; it is written anew.")
                for path in (*out.glob("*.safetensors"), *out.glob(f"*{SCRATCH}*")):
                    path.unlink()
            journal.write()
            if journal.files:
                notice(f"Going on after {len(journal.files)} of {len(recipe.files)} files.")
                progress(sum(entry["bytes"] for entry in journal.files.values()))
            source.close_shards(name for plan in left for name in plan.sources)
            for number, plan in enumerate(left):
                journal.add(plan.name, _made(out, plan, progress))
                source.close_shards(name for later in left[number + 1 :] for name in later.sources)
            source.check_unchanged()
            write_json(out / CONFIG, source.config.to_json())
            write_text(out / TOKENIZER, tokenizer)
            _finish(out, recipe, journal)
    return True


def _made(out: Path, plan: FilePlan, progress: Progress) -> dict[str, Any]:
    """Make one file, by a second name for its twin where that can be; returns its entry of the manifest."""
    if plan.twin is not None and on_one_disk(plan.twin.path, out):
        plan.twin.verify(progress)
        with contextlib.suppress(OSError):  # a file system without such links: it is written
            link_over(plan.twin.path, out / plan.name)
            return plan.twin.entry
    return write_file(out / plan.name, plan.build(), progress)


# Every file that a conversion writes; one that was killed may leave them with an ending of their own.
_OURS = re.compile(
    r"(config\.json|tokenizer\.json|manifest\.json|journal\.json|(embedding|head|block-\d{2,3})\.safetensors)(\.new|\.part)?"
    r"|calibration-\d{2,3}\.scratch(\.new)?"
)
_WEIGHTS = re.compile(r"(embedding|head|block-\d{2,3})\.safetensors")


def _check_ours(out: Path) -> None:
    """Raises MossError unless ``out`` is empty, begun by a conversion, or not there; or a folder that lost its manifest."""
    if not out.exists() or (out / JOURNAL).exists():
        return
    # A kill can leave nothing but the first journal, half written.
    names = [path.name for path in out.iterdir() if not path.name.startswith(JOURNAL)]
    if not all(map(_OURS.fullmatch, names)) or names and not any(map(_WEIGHTS.fullmatch, names)):
        raise MossError(
            f"{out} exists, and is not an unfinished model folder. Name another folder with --out."
        )


def _check_space(source: Source, recipe: Recipe, left: list[FilePlan], out: Path) -> None:
    sizes = file_bytes(source.config, recipe.bits, recipe.group_size)
    if source.download is None:
        written = [one for one in left if one.twin is None or not on_one_disk(one.twin.path, out)]
        check_disk(out, [sizes[plan.name] for plan in written])
    else:
        growth = source.download.growth([source.shards_of(plan.sources) for plan in left])
        check_disk(out, [sizes[plan.name] for plan in left], source.download.folder, growth)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two conversions into one folder would write over each other's files."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MossError(f"another moss-jt is writing {out} just now. Wait for it, or stop it.") from error
        yield
    finally:
        os.close(descriptor)


def _finish(out: Path, recipe: Recipe, journal: Journal) -> None:
    for path in out.glob(f"*{SCRATCH}*"):
        path.unlink()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "source": recipe.source,
        "identity": journal.identity,
        "files": {plan.name: journal.files[plan.name] for plan in recipe.files},
        "texts": {name: sha256_of(read_small(out / name)) for name in TEXTS},
    }
    write_json(out / MANIFEST, sealed(manifest))
    try:
        open_store(out)
    except MossError:
        (out / MANIFEST).unlink()
        raise
    journal.remove()
