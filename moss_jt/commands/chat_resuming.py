"""moss-jt chat --resume: a conversation's settings, as if they had been given as options; what is given as an option goes first."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from moss_jt.chat.kept_chat import SAMPLING, sampling_of
from moss_jt.chat.language import user_language
from moss_jt.chat.saved import (
    PLUGIN_SETTINGS,
    Conversation,
    Conversations,
    NoConversationError,
    OpenConversation,
)
from moss_jt.commands.indexing import say
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Plugin
from moss_jt.plugins.registry import PluginSettings, make_plugins, plugin_names
from moss_jt.store.locations import model_names
from moss_jt.terminal.texts import say as text

# Where plugins look on this machine; the others are addresses.
FOLDERS = ("search_folder", "picture_folder")


def open_conversation(conversations: Conversations, name: str) -> tuple[OpenConversation, Conversation]:
    """The conversation of that name, or the one used last; damage in it is told on stderr.

    Raises:
        MossError: there is none, or it is open elsewhere.
    """
    try:
        if not name and not (names := conversations.names()):
            raise MossError("there is no conversation to resume yet. Begin one: moss-jt chat")
        opened, held = conversations.open(name or names[0])
    except NoConversationError as error:
        model = (
            " The name after --resume is a conversation's; name the model before it."
            if name in model_names()
            else ""
        )
        raise MossError(f"{error}{model} moss-jt list shows those that are kept.") from error
    if held.damaged:
        code = "chat_damaged_one" if held.damaged == 1 else "chat_damaged"
        say(text(code, user_language(), lines=held.damaged, name=held.name))
    return opened, held


def with_settings(options: dict[str, Any], held: Conversation, context: click.Context) -> dict[str, Any]:
    """The command's options, those that were not given as the conversation has them."""
    given = {name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT}
    merged = dict(options)
    if "greedy" not in given:
        params, most = sampling_of(held.about.sampling, SamplingParams(), options["max_new_tokens"])
        kept = {**{name: getattr(params, name) for name in SAMPLING}, "max_new_tokens": most}
        merged |= {name: value for name, value in kept.items() if name not in given}
    for name in PLUGIN_SETTINGS:
        value = held.about.plugin_settings.get(name)
        if name in given or value is None:
            continue
        if name != "search_folder" or Path(value).is_dir():
            merged[name] = Path(value) if name in FOLDERS else value
    return merged


def kept_plugins(held: Conversation, settings: PluginSettings) -> list[Plugin]:
    """The conversation's plugins. A class in a file is none: a conversation is text, and runs nobody's code."""
    made: list[Plugin] = []
    known = plugin_names()
    for name in held.about.plugins:
        reason = ""
        try:
            if name in known:
                made += make_plugins([name], settings)
            else:
                reason = f"/plugins ./FILE.py:{name}"
        except MossError as error:
            reason = str(error)
        if reason:
            say(text("plugin_left_out", user_language(), name=name, reason=reason))
    return make_plugins(made, settings)
