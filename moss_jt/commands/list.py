"""moss-jt list."""

from pathlib import Path

import click

from moss_jt.chat.saved import Conversations, Summary
from moss_jt.convert.disk_space import folder_bytes
from moss_jt.errors import MossError
from moss_jt.plan.residency import BITS_NAMES, gib
from moss_jt.store.files import read_json
from moss_jt.store.locations import last_model, last_uses, models_folder
from moss_jt.store.manifest import MANIFEST
from moss_jt.store.model_folder import open_store
from moss_jt.terminal.saved_chats import when
from moss_jt.terminal.screen import Screen, columns_of, shortened

CHAT_HEADS = ("CONVERSATION", "TURNS", "MODEL", "LAST MESSAGE", "USED")
HEADS = ("NAME", "SIZE", "WEIGHTS", "FROM", "USED")
MOST_COLUMNS, MOST_NAME_COLUMNS = (
    48,
    200,
)  # of an origin, and of a name, which is typed again: both were chosen by others


@click.command()
def command() -> None:
    """Show the models that are here: size, weights, what they were converted from, and when they were used last; and the
    conversations that are kept.

    The model with * is what commands take when none is named, the conversation with * what moss-jt chat --resume goes on with.
    moss-jt rm NAME removes either.
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
    else:
        show_table(screen, HEADS, rows)
    chats = [chat_row(number, one) for number, one in enumerate(Conversations().list())]
    if chats:
        screen.line()
        show_table(screen, CHAT_HEADS, chats)


def show_table(screen: Screen, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(columns_of(cells[column]) for cells in (heads, *rows)) for column in range(len(heads))]
    for cells in (heads, *rows):
        padded = [cell + " " * (width - columns_of(cell)) for cell, width in zip(cells, widths, strict=True)]
        screen.line("  ".join(padded).rstrip())


def chat_row(number: int, one: Summary) -> tuple[str, ...]:
    """What is shown of a conversation; the first one was used last."""
    name = shortened(one.name, MOST_NAME_COLUMNS) + ("" if number else " *")
    model = shortened(Path(one.model).name, MOST_COLUMNS)
    return name, str(one.turns), model, shortened(one.last, MOST_COLUMNS), when(one.used)


def row(folder: Path) -> tuple[str, ...]:
    """What is shown of a model folder, finished or not."""
    default = " *" if last_model() == folder.resolve() else ""
    named = folder.name if folder.parent == models_folder() else str(folder)
    name = shortened(named, MOST_NAME_COLUMNS) + default
    used = last_uses().get(str(folder.resolve()))
    last = "never" if used is None else when(used)
    weights, origin = state(folder)
    return name, gib(folder_bytes(folder)), weights, shortened(origin, MOST_COLUMNS), last


def state(folder: Path) -> tuple[str, str]:
    """The weights, and what they were converted from."""
    if not (folder / MANIFEST).exists():
        return "unfinished", "run the same convert again to go on"
    try:
        return BITS_NAMES[open_store(folder).bits], str(read_json(folder / MANIFEST).get("source", ""))
    except MossError:
        return "damaged", "moss-jt verify says what is wrong"
