"""moss-jt rm."""

import shutil
import sys
from pathlib import Path

import click

from moss_jt.convert.disk import folder_bytes
from moss_jt.errors import MossError
from moss_jt.plan.residency import gib
from moss_jt.store.locations import models_folder
from moss_jt.store.manifest import MANIFEST
from moss_jt.terminal.screen import Screen


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(names: tuple[str, ...], yes: bool) -> None:
    """Remove models by the names that moss-jt list shows, finished or not.

    Only folders under MOSS_JT_HOME are removed; one that lies elsewhere is yours to delete.
    """
    folders = [folder_of(name) for name in dict.fromkeys(names)]
    if not yes:
        confirm(folders)
    for folder in folders:
        size = 0 if folder.is_symlink() else folder_bytes(folder)
        remove(folder)
        Screen().line(f"{folder.name} is removed ({gib(size)}).")


def folder_of(name: str) -> Path:
    """The folder of that name among the models.

    Raises:
        MossError: there is none.
    """
    folder = models_folder() / name
    if not name or Path(name).name != name or name == ".." or not folder.is_dir():
        known = ", ".join(sorted(path.name for path in models_folder().glob("*") if path.is_dir())) or "none"
        raise MossError(f"there is no model called {name!r} to remove (there are: {known}).")
    return folder


def confirm(folders: list[Path]) -> None:
    """Ask on a terminal.

    Raises:
        UsageError: nobody can be asked.
        Abort: the answer is no.
    """
    if not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here; add --yes to remove.")
    sizes = gib(sum(0 if folder.is_symlink() else folder_bytes(folder) for folder in folders))
    Screen(sys.stderr).write(f"Remove {', '.join(folder.name for folder in folders)} ({sizes})? [y/N] ")
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
