"""MOSS in little memory, with Jittor. Importing this package imports no Jittor.

    from moss_jt import Moss

    with Moss.load("moss-tiny") as moss:
        chat = moss.chat(plugins=["calculator"])
        for event in chat.send("What is 37 times 48?"):
            print(event.kind, event)

Beside Moss and MossError there are the types of what a chat yields (Thought, Command, Result, Text, Notice), and those that
a plugin of your own needs (Plugin, Outcome, Item, Source, and PluginSettings).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jt.chat.chat import Chat
    from moss_jt.chat.events import Command, Event, Notice, Result, Text, Thought
    from moss_jt.errors import MossError
    from moss_jt.moss import Moss
    from moss_jt.plugins.interface import Item, Outcome, Plugin, Source
    from moss_jt.plugins.registry import PluginSettings

__all__ = [
    "Chat",
    "Command",
    "Event",
    "Item",
    "Moss",
    "MossError",
    "Notice",
    "Outcome",
    "Plugin",
    "PluginSettings",
    "Result",
    "Source",
    "Text",
    "Thought",
]

_MODULES = {
    "moss_jt.moss": ("Moss",),
    "moss_jt.errors": ("MossError",),
    "moss_jt.chat.chat": ("Chat",),
    "moss_jt.chat.events": ("Command", "Event", "Notice", "Result", "Text", "Thought"),
    "moss_jt.plugins.interface": ("Item", "Outcome", "Plugin", "Source"),
    "moss_jt.plugins.registry": ("PluginSettings",),
}


def __getattr__(name: str) -> Any:
    """``from moss_jt import Moss`` imports the modules behind a name when it is asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
