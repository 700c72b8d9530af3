"""moss-jt chat."""

from pathlib import Path
from typing import Any

import click

from moss_jt.chat.prompt import PromptEncoder
from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.commands.indexing import IndexingBar, say
from moss_jt.commands.options import (
    loaded,
    loading_options,
    model_argument,
    model_folder,
    sampling_arguments,
    sampling_options,
)
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plugins.registry import PluginSettings, make_plugins
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import open_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.line_input import make_reader
from moss_jt.terminal.loop import PROMPT, Terminal
from moss_jt.terminal.pictures import make_shower
from moss_jt.terminal.screen import Screen


@click.command()
@model_argument
@click.option(
    "--plugins",
    default="",
    metavar="NAMES",
    help="What MOSS may call, with commas between: calculator, solver, search, image, or an installed one's name.",
)
@click.option(
    "--thoughts/--no-thoughts",
    default=True,
    show_default=True,
    help="Show what MOSS thinks before it calls a plugin.",
)
@click.option(
    "--search-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Search in this folder's text files instead of the web; needs no network.",
)
@click.option(
    "--search-url",
    metavar="ADDRESS",
    help="Search with this SearXNG server. [default: Serper where SERPER_API_KEY is set, or else the package ddgs]",
)
@click.option(
    "--image-url", metavar="ADDRESS", help="A server that draws: Automatic1111's or OpenAI's interface."
)
@click.option(
    "--picture-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where pictures are saved. [default: pictures under MOSS_JT_HOME]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=MAX_ANSWER_TOKENS,
    show_default=True,
    help="The most tokens of an answer.",
)
@sampling_options
@loading_options
def command(
    model: str | None,
    plugins: str,
    thoughts: bool,
    search_folder: Path | None,
    search_url: str | None,
    image_url: str | None,
    picture_folder: Path | None,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Talk to MODEL, the one converted last by default.

    \b
    moss-jt chat moss-tiny                     the small model that comes with the program
    moss-jt chat moss-moon-003-sft-plugin --plugins calculator,solver
    moss-jt chat --plugins search --search-folder ~/notes --memory 8GiB

    While MOSS answers, Ctrl-C ends the answer. clear forgets the conversation, stop ends it, /help tells the rest.
    """
    settings = PluginSettings(
        search_folder=search_folder,
        search_url=search_url,
        image_url=image_url,
        picture_folder=picture_folder or model_home() / "pictures",
        progress=IndexingBar(),
        notice=say,
    )
    # Whatever is wrong is said before Jittor starts.
    sampling = sampling_arguments(options)
    SamplingParams(**sampling)
    switched_on = make_plugins([name.strip() for name in plugins.split(",") if name.strip()], settings)
    folder = model_folder(model)
    check_chat_model(folder)
    with loaded(str(folder), options) as moss:
        chat = moss.chat(
            plugins=switched_on,
            settings=settings,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        Terminal(chat, folder.name, Screen(), make_reader(PROMPT), make_shower(), thoughts).run()


def check_chat_model(folder: Path) -> None:
    """Refuse models that know no turns, such as CodeGen's.

    Raises:
        MossError: it is none of MOSS's; the message names what to do instead.
    """
    PromptEncoder(Tokenizer.from_file(open_store(folder).tokenizer_path), folder.name)
