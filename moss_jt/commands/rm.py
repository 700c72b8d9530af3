"""moss-jt rm."""

import shutil
import sys
from pathlib import Path

import click

from moss_jt.chat.saved import Conversations
from moss_jt.convert.disk_space import folder_bytes
from moss_jt.errors import MossError
from moss_jt.plan.residency import gib
from moss_jt.store.locations import models_folder
from moss_jt.store.manifest import MANIFEST
from moss_jt.terminal.screen import Screen


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--chat", is_flag=True, help="The names are those of conversations, even where a model has the same name."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(names: tuple[str, ...], chat: bool, yes: bool) -> None:
    """Remove models and conversations by the names that moss-jt list shows, finished or not.

    Only what lies under MOSS_JT_HOME is removed; a model that lies elsewhere is yours to delete.
    """
    conversations, folders, chats = Conversations(), [], []
    kept = set(conversations.names())
    for name in dict.fromkeys(names):
        if name in kept and (chat or not is_model(name)):
            chats.append(name)
        elif chat:
            raise MossError(f"there is no conversation called {name!r} to remove; moss-jt list shows them.")
        else:
            folders.append(folder_of(name))
    if not yes:
        confirm(folders, chats)
    for folder in folders:
        size = 0 if folder.is_symlink() else folder_bytes(folder)
        remove(folder)
        Screen().line(f"{folder.name} is removed ({gib(size)}).")
    for name in chats:
        conversations.remove(name)
        Screen().line(f"The conversation {name} is removed.")


def is_model(name: str) -> bool:
    """Whether a folder of that name is among the models."""
    return name not in ("", "..") and Path(name).name == name and (models_folder() / name).is_dir()


def folder_of(name: str) -> Path:
    """The folder of that name among the models.

    Raises:
        MossError: there is none.
    """
    if not is_model(name):
        known = ", ".join(sorted(path.name for path in models_folder().glob("*") if path.is_dir())) or "none"
        raise MossError(f"there is no model called {name!r} to remove (there are: {known}).")
    return models_folder() / name


def confirm(folders: list[Path], chats: list[str]) -> None:
    """Ask on a terminal.

    Raises:
        UsageError: nobody can be asked.
        Abort: the answer is no.
    """
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: add --yes to remove without being asked.")
    sizes = gib(sum(0 if folder.is_symlink() else folder_bytes(folder) for folder in folders))
    things = [f"{', '.join(folder.name for folder in folders)} ({sizes})"] if folders else []
    if chats:
        things.append(f"the conversation{'s' if len(chats) > 1 else ''} {', '.join(chats)}")
    Screen(sys.stderr).write(f"Remove {' and '.join(things)}? [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise click.Abort


def remove(folder: Path) -> None:
    """The manifest goes first, so that what an interruption leaves is an unfinished model and no damaged one.

    Raises:
        MossError: it cannot be removed.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise MossError(f"{folder} cannot be removed ({error.strerror}). Check who owns it.") from error
