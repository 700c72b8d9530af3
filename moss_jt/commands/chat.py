"""moss-jt chat."""

import contextlib
import functools
import sys
from typing import Any

import click

from moss_jt.chat.kept_chat import Keeping
from moss_jt.chat.saved import Conversation, Conversations, OpenConversation
from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.commands.chat_resuming import kept_plugins, open_conversation, with_settings
from moss_jt.commands.options import (
    adapter_option,
    loaded,
    loading_options,
    max_new_tokens_option,
    model_argument,
    model_folder,
    only_adapter,
    sampling_arguments,
    sampling_options,
)
from moss_jt.commands.plugin_options import chat_arguments, plugin_options
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
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
@click.option("--quiet", is_flag=True, help="Do not show what each answer cost.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Go on with a conversation, with its settings and its plugins: the one used last, or the one that was saved as NAME.",
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Keep the conversation on disk, turn by turn, so that --resume can go on with it.",
)
@max_new_tokens_option(MAX_ANSWER_TOKENS, "At most this many tokens in an answer.")
@sampling_options
@adapter_option
@loading_options
def command(
    model: str | None,
    thoughts: bool,
    quiet: bool,
    resume: str | None,
    keep: bool,
    **options: Any,
) -> None:
    """Talk to MODEL, by default the one used last.

    \b
    moss-jt chat moss-tiny                     the small model that comes with the program
    moss-jt chat moss-moon-003-sft-plugin-int4 --memory 14GiB
    moss-jt chat --search-folder ~/notes       MOSS searches in your own text files
    moss-jt chat --adapter my-adapter          with what moss-jt finetune has taught it
    moss-jt chat --resume                      go on where the last conversation ended

    Ctrl-C ends an answer. Type clear to forget the conversation, stop to leave, and /help for everything else.
    Lines from a pipe are messages, one after the other; for a single answer, use moss-jt ask.
    """
    # Whatever is wrong is said before Jittor starts.
    context = click.get_current_context()
    conversations = kept_conversations() if keep or resume is not None else None
    opened: OpenConversation | None = None
    held: Conversation | None = None
    if resume is not None:
        if conversations is None:
            raise MossError(
                "there is no folder to keep conversations in: set MOSS_JT_HOME to one that can be written."
            )
        opened, held = open_conversation(conversations, resume)
        options = with_settings(options, held, context)
        model = model or held.about.model or None
    sampling = sampling_arguments(options)
    SamplingParams(**sampling)
    folder = model_folder(model)
    arguments = chat_arguments(options, folder, *continued(context, held))
    keeping = Keeping(conversations, str(folder.resolve()), opened) if keep and conversations else None
    if not sys.stdin.isatty():
        Screen(sys.stderr).line(
            "moss-jt: each line is a message of its own. For one answer alone: moss-jt ask -"
        )
    with contextlib.ExitStack() as stack:
        if (writer := keeping or opened) is not None:
            stack.enter_context(contextlib.closing(writer))
        moss = stack.enter_context(loaded(str(folder), options))
        most, adapter = options["max_new_tokens"], only_adapter(moss)
        chat = moss.chat(**arguments, max_new_tokens=most, adapter=adapter, **sampling)
        dropped = 0 if held is None else chat.resume(held.turns)
        chat.keeper = keeping
        Terminal(
            chat,
            folder.name,
            Screen(),
            make_reader(PROMPT),
            make_shower(),
            thoughts,
            not quiet,
            keeping,
            dropped,
        ).run()
        if keeping is not None and keeping.name is not None:
            chat.keep_cache()


def kept_conversations() -> Conversations | None:
    """Where conversations are kept; None for a user without a folder."""
    try:
        return Conversations()
    except MossError:
        return None


def continued(context: click.Context, held: Conversation | None) -> tuple[Any, ...]:
    """What a conversation that goes on says of plugins and instruction, for chat_arguments."""
    if held is None:
        return ()
    given = any(context.params[name] for name in ("plugins", "search_folder", "search_url", "image_url"))
    return None if given else functools.partial(kept_plugins, held), held.about.system
