"""A checkpoint to a model folder: file after file, resumable, the manifest last."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moss_jt.config import MossConfig
from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.gptq_checkpoint import format_notes, quantised_files
from moss_jt.convert.journal import Journal, write_json
from moss_jt.convert.layout import FilePlan, dense_files, is_quantised
from moss_jt.convert.writer import Progress, write_file
from moss_jt.errors import MossError
from moss_jt.store import CONFIG, FORMAT, MANIFEST, TOKENIZER, VERSION, open_store, read_json

SPARE_BYTES = 256 << 20
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

    def close_shards(self, still_needed: Iterable[str]) -> None:
        """Give back what holds none of the tensors that are still needed."""
        ...


def weight_bytes(config: MossConfig, bits: int, group_size: int) -> int:
    """Bytes of all tensors of the model folder, headers apart."""
    matrices = 4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner
    per_block = matrices * 2
    if bits != 16:
        per_block = matrices * bits // 8 + 3 * matrices // group_size
    per_block += 2 * (3 * config.n_embd + config.n_inner)
    outside = 2 * (2 * config.vocab_size * config.n_embd + config.vocab_size + 2 * config.n_embd)
    return config.n_layer * per_block + outside


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


def check_disk(folder: Path, needed: int) -> None:
    """Raises MossError where the disk that will hold ``folder`` has less than ``needed`` bytes free."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MossError(
            f"{folder} needs {needed / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are free. "
            "Free some space, or put the model elsewhere with --out."
        )


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
    if out.exists() and any(out.iterdir()) and not (out / "journal.json").exists():
        raise MossError(f"{out} exists and is no unfinished model folder. Name another folder with --out.")
    for note in recipe.notes:
        notice(note)
    tokenizer = source.tokenizer_text()
    journal = Journal(out, json.loads(json.dumps(recipe.identity)))
    if journal.restarted:
        notice(f"{out} was begun from another version of the source; it is written anew.")
    done = sum(entry["bytes"] for entry in journal.files.values())
    check_disk(out, max(0, recipe.total_bytes - done) + SPARE_BYTES)
    out.mkdir(parents=True, exist_ok=True)
    write_json(journal.path, {"identity": journal.identity, "files": journal.files})
    if journal.files:
        notice(f"Going on after {len(journal.files)} of {len(recipe.files)} files.")
        progress(done)
    for number, plan in enumerate(recipe.files):
        if plan.name not in journal.files:
            journal.add(plan.name, write_file(out / plan.name, plan.build(), progress))
        later = recipe.files[number + 1 :]
        source.close_shards({name for next_plan in later for name in next_plan.sources})
    write_json(out / CONFIG, dataclasses.asdict(source.config))
    (out / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    _finish(out, recipe, journal)
    return True


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
