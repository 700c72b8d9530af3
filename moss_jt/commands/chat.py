"""moss-jt chat."""

import sys
from typing import Any

import click

from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.commands.options import (
    loaded,
    loading_options,
    model_argument,
    model_folder,
    sampling_arguments,
    sampling_options,
)
from moss_jt.commands.plugin_options import chat_arguments, plugin_options
from moss_jt.engine.sampling import SamplingParams
from moss_jt.terminal.line_input import make_reader
from moss_jt.terminal.loop import PROMPT, Terminal
from moss_jt.terminal.pictures import make_shower
from moss_jt.terminal.screen import Screen


@click.command()
@model_argument
@plugin_options
@click.option(
    "--thoughts/--no-thoughts",
    default=True,
    show_default=True,
    help="Show what MOSS thinks before it calls a plugin.",
)
@click.option("--quiet", is_flag=True, help="Do not say after each answer what it cost.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=MAX_ANSWER_TOKENS,
    show_default=True,
    help="The most tokens of an answer.",
)
@sampling_options
@loading_options
def command(model: str | None, thoughts: bool, quiet: bool, max_new_tokens: int, **options: Any) -> None:
    """Talk to MODEL, the one used last by default.

    \b
    moss-jt chat moss-tiny                     the small model that comes with the program
    moss-jt chat moss-moon-003-sft-plugin-int4 --memory 14GiB
    moss-jt chat --search-folder ~/notes       MOSS searches in your own text files

    While MOSS answers, Ctrl-C ends the answer. clear forgets the conversation, stop ends it, /help tells the rest.
    Lines from a pipe are messages, one after the other; for one answer alone see moss-jt ask.
    """
    # Whatever is wrong is said before Jittor starts.
    sampling = sampling_arguments(options)
    SamplingParams(**sampling)
    folder = model_folder(model)
    arguments = chat_arguments(options, folder)
    if not sys.stdin.isatty():
        Screen(sys.stderr).line(
            "moss-jt: each line is a message of its own. For one answer alone: moss-jt ask -"
        )
    with loaded(str(folder), options) as moss:
        chat = moss.chat(**arguments, max_new_tokens=max_new_tokens, **sampling)
        shower, cost = make_shower(), not quiet
        Terminal(chat, folder.name, Screen(), make_reader(PROMPT), shower, thoughts, cost).run()
