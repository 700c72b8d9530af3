"""A checkpoint to a model folder: file after file, resumable, the manifest last."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.disk import Download, check_disk, write_text, writing
from moss_jt.convert.gptq_checkpoint import format_notes, quantised_files
from moss_jt.convert.journal import JOURNAL, Journal, write_json
from moss_jt.convert.layout import FilePlan, dense_files, is_quantised
from moss_jt.convert.writer import Progress, write_file
from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import (
    CONFIG,
    DTYPES,
    EMBEDDING,
    FORMAT,
    HEAD,
    MANIFEST,
    TOKENIZER,
    VERSION,
    block_file_name,
    block_tensors,
    embedding_tensors,
    head_tensors,
    open_store,
    read_json,
)

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
    block = _bytes(block_tensors(config, bits, group_size))
    blocks = {block_file_name(layer): block for layer in range(config.n_layer)}
    return {EMBEDDING: _bytes(embedding_tensors(config)), **blocks, HEAD: _bytes(head_tensors(config))}


def weight_bytes(config: MossConfig, bits: int, group_size: int) -> int:
    """Bytes of all tensors of the model folder, headers and input orders apart."""
    return sum(file_bytes(config, bits, group_size).values())


def _bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in tensors.values())


def recipe_for(checkpoint: Checkpoint) -> Recipe:
    """How to convert a checkpoint as it is: float16 stays float16, GPTQ stays int4 or int8."""
    notes: tuple[str, ...] = ()
    if is_quantised(checkpoint):
        files, bits, group_size = quantised_files(checkpoint)
        notes = format_notes(checkpoint.fields, bits, group_size)
    else:
        files, bits, group_size = dense_files(checkpoint), 16, 0
    total = weight_bytes(checkpoint.config, bits, group_size)
    return Recipe(checkpoint.identity, checkpoint.source, bits, group_size, files, total, notes)


def already_converted(out: Path, identity: dict[str, Any]) -> bool:
    """True when ``out`` is finished and made from this very source; an error when it was made from another."""
    if not (out / MANIFEST).exists():
        return False
    if read_json(out / MANIFEST).get("identity") == json.loads(json.dumps(identity)):
        return True
    raise MossError(
        f"{out} already holds a model made from something else. Name another folder with --out, or delete that one first."
    )


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
    if already_converted(out, recipe.identity):
        return False
    for note in recipe.notes:
        notice(note)
    tokenizer = source.tokenizer_text()
    with writing(out):
        _check_ours(out)
        journal = Journal(out, json.loads(json.dumps(recipe.identity)))
        left = [plan for plan in recipe.files if plan.name not in journal.files]
        _check_room(source, recipe, left, out)
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            if journal.restarted:
                notice(f"{out} was begun from another version of the source; it is written anew.")
                for path in (*out.glob("*.safetensors"), *out.glob(f"*{SCRATCH}")):
                    path.unlink()
            write_json(journal.path, {"identity": journal.identity, "files": journal.files})
            if journal.files:
                notice(f"Going on after {len(journal.files)} of {len(recipe.files)} files.")
                progress(sum(entry["bytes"] for entry in journal.files.values()))
            source.close_shards(name for plan in left for name in plan.sources)
            for number, plan in enumerate(left):
                journal.add(plan.name, write_file(out / plan.name, plan.build(), progress))
                source.close_shards(name for later in left[number + 1 :] for name in later.sources)
            source.check_unchanged()
            write_json(out / CONFIG, source.config.to_json())
            write_text(out / TOKENIZER, tokenizer)
            _finish(out, recipe, journal)
    return True


def _check_ours(out: Path) -> None:
    """Raises MossError unless ``out`` is empty, begun by a conversion, or not there."""
    if not out.exists() or (out / JOURNAL).exists():
        return
    # A kill can leave nothing but the first journal, half written.
    if any(not path.name.startswith(JOURNAL) for path in out.iterdir()):
        raise MossError(f"{out} exists and is no unfinished model folder. Name another folder with --out.")


def _check_room(source: Source, recipe: Recipe, left: list[FilePlan], out: Path) -> None:
    sizes = file_bytes(source.config, recipe.bits, recipe.group_size)
    if source.download is None:
        check_disk(out, [sizes[plan.name] for plan in left])
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
    for path in out.glob(f"*{SCRATCH}"):
        path.unlink()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "source": recipe.source,
        "identity": journal.identity,
        "files": journal.files,
    }
    write_json(out / MANIFEST, manifest)
    try:
        open_store(out)
    except MossError:
        (out / MANIFEST).unlink()
        raise
    journal.remove()
