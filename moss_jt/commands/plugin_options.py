"""The options that say what MOSS may call, of moss-jt chat and moss-jt ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moss_jt.chat.prompt import PromptEncoder
from moss_jt.commands.indexing import IndexingBar, say
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Plugin
from moss_jt.plugins.registry import HARMLESS, PluginSettings, make_plugins
from moss_jt.store.files import read_json
from moss_jt.store.locations import TINY, model_home
from moss_jt.store.manifest import MANIFEST
from moss_jt.store.model_folder import open_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.settings import MAX_FILE_KIB, UnreadableError, read_text_file
from moss_jt.terminal.texts import say as text

_OPTIONS = (
    click.option(
        "--plugins",
        metavar="NAMES",
        help="What MOSS may call, separated by commas: calculator, solver, search, image, the name of an installed plugin, "
        "or ./FILE.py:CLASS; none for none. [default: calculator,solver where the model was trained with plugins]",
    ),
    click.option(
        "--search-folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Search in this folder's text files instead of the web; needs no network. Switches search on.",
    ),
    click.option(
        "--search-url",
        metavar="ADDRESS",
        help="Search with this SearXNG server; switches search on. [default: Serper if SERPER_API_KEY is set, otherwise "
        "the package ddgs]",
    ),
    click.option(
        "--image-url",
        metavar="ADDRESS",
        help="A server that draws, with Automatic1111's or OpenAI's interface. Switches image on.",
    ),
    click.option(
        "--picture-folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where pictures are saved. [default: pictures under MOSS_JT_HOME]",
    ),
    click.option(
        "--system",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="A meta instruction of your own, in a UTF-8 text file.",
    ),
)
NAMES = ("plugins", "search_folder", "search_url", "image_url", "picture_folder", "system")


def plugin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chat_arguments(
    options: dict[str, Any],
    folder: Path,
    choose: Callable[[PluginSettings], list[Plugin]] | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """What these options mean, as parameters of Moss.chat.

    Args:
        choose: which plugins are on where no option says so; by default what the model was trained with.
        system: the meta instruction where no option names one.

    Raises:
        MossError: there is no such plugin, or it lacks something; the instruction's file cannot be read; the model is none
            of MOSS's.
    """
    PromptEncoder(Tokenizer.from_file(open_store(folder).tokenizer_path), folder.name)
    settings = PluginSettings(
        search_folder=options["search_folder"],
        search_url=options["search_url"],
        image_url=options["image_url"],
        picture_folder=options["picture_folder"] or model_home() / "pictures",
        progress=IndexingBar(),
        notice=say,
    )
    if options["system"] is not None:
        system = instruction_of(options["system"])
    plugins = choose(settings) if choose is not None else switched_on(options, settings, folder)
    return {"plugins": plugins, "settings": settings, "system": system}


def switched_on(options: dict[str, Any], settings: PluginSettings, folder: Path) -> list[Plugin]:
    """The plugins that were named, or else those that compute on this machine; and whatever an option sets up."""
    given = options["plugins"]
    if given is None:
        names = list(HARMLESS) if trained_with_plugins(folder) else []
    else:
        names = [name for part in given.split(",") if (name := part.strip()) not in ("", "none")]
    if settings.search_folder is not None or settings.search_url is not None:
        names.append("search")
    if settings.image_url is not None:
        names.append("image")
    return make_plugins(dict.fromkeys(names), settings)


def trained_with_plugins(folder: Path) -> bool:
    """By the name of the folder, or of what it was converted from."""
    source = str(read_json(folder / MANIFEST).get("source", ""))
    return any(Path(name).name == TINY or "plugin" in Path(name).name for name in (folder.name, source))


def instruction_of(path: Path) -> str:
    try:
        return read_text_file(path)
    except UnreadableError as error:
        reason = text(error.code, "en", limit=MAX_FILE_KIB)
        raise MossError(text("system_failed", "en", path=str(path), reason=reason)) from error
