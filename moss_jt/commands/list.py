"""moss-jt list."""

import time
from pathlib import Path

import click

from moss_jt.convert.disk import folder_bytes
from moss_jt.errors import MossError
from moss_jt.plan.residency import BITS_NAMES, gib
from moss_jt.store.files import read_json
from moss_jt.store.locations import last_model, last_uses, models_folder
from moss_jt.store.manifest import MANIFEST
from moss_jt.store.model_folder import open_store
from moss_jt.terminal.screen import Screen, shortened

HEADS = ("NAME", "SIZE", "WEIGHTS", "FROM", "USED")
MOST_COLUMNS, MOST_NAME_COLUMNS = (
    48,
    200,
)  # of an origin, and of a name, which is typed again: both were chosen by others


@click.command()
def command() -> None:
    """Show the models that are here: size, weights, what they were converted from, and when they were used last.

    The one with * is what commands take when none is named. moss-jt rm NAME removes one.
    """
    screen = Screen()
    folders = sorted(path for path in models_folder().glob("*") if path.is_dir())
    elsewhere = sorted(path for path in map(Path, last_uses()) if path not in map(Path.resolve, folders))
    rows = [row(folder) for folder in [*folders, *(path for path in elsewhere if (path / MANIFEST).exists())]]
    if not rows:
        screen.line(
            "There are no models yet. moss-jt chat moss-tiny works at once; moss-jt plan says which of MOSS's suits this "
            "machine, and moss-jt convert gets it."
        )
        return
    widths = [max(len(cells[column]) for cells in (HEADS, *rows)) for column in range(len(HEADS))]
    for cells in (HEADS, *rows):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        screen.line("  ".join(padded).rstrip())


def row(folder: Path) -> tuple[str, ...]:
    """What is shown of a model folder, finished or not."""
    default = " *" if last_model() == folder.resolve() else ""
    named = folder.name if folder.parent == models_folder() else str(folder)
    name = shortened(named, MOST_NAME_COLUMNS) + default
    used = last_uses().get(str(folder.resolve()))
    when = "never" if used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    weights, origin = state(folder)
    return name, gib(folder_bytes(folder)), weights, shortened(origin, MOST_COLUMNS), when


def state(folder: Path) -> tuple[str, str]:
    """The weights, and what they were converted from."""
    if not (folder / MANIFEST).exists():
        return "unfinished", "run the same convert again to go on"
    try:
        return BITS_NAMES[open_store(folder).bits], str(read_json(folder / MANIFEST).get("source", ""))
    except MossError:
        return "damaged", "moss-jt verify says what is wrong"
