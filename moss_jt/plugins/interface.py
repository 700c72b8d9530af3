"""What a plugin is: a function that the model calls by name with one text, and how its answer is written for the model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

NO_RESULT = "No result."

# How an answer stands in the Results field:
#   value    Name("argument") => 'answer'
#   lines    Name("argument") =>, then the answer's lines
#   items    Name("argument") =>, then numbered quoted items, which the model cites
#   picture  the answer alone: it names no command
Style = Literal["value", "lines", "items", "picture"]


class PluginFailure(Exception):
    """A call has no answer. The message is a reason for the user; the model reads ``No result.``"""


@dataclass(frozen=True)
class CallContext:
    """What a plugin may know about the turn.

    wanted    how many items a search should give: 3, 2 or 1, by the number of searches in the turn
    deadline  time.monotonic() after which nobody waits for the answer any more
    """

    wanted: int
    deadline: float

    def remaining_s(self) -> float:
        """Seconds until the deadline, for the timeouts of sockets and processes; at least a tenth."""
        return max(0.1, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Source:
    """Where an item comes from: a title, and an address or a path, for the user."""

    title: str
    location: str


@dataclass(frozen=True)
class Item:
    """One search result. An answer box has a label: ``Beijing / Population: '21.54 million (2018)'``."""

    text: str
    source: Source
    label: str = ""


@dataclass(frozen=True)
class Outcome:
    """A call's answer; all of it empty means that there is none.

    text      for the styles value, lines and picture
    items     for the style items, best first
    picture   the file that was drawn
    """

    text: str = ""
    items: tuple[Item, ...] = ()
    picture: Path | None = None


@runtime_checkable
class Plugin(Protocol):
    """A plugin.

    name      what users call it: calculator
    label     its line in the meta instruction: Calculator
    function  what the model calls: Calculate
    argument  what the meta instruction calls its argument: expression
    style     how its answers stand in the Results field
    timeout_s what a call may take; longer is ``No result.``
    """

    name: str
    label: str
    function: str
    argument: str
    style: Style
    timeout_s: float

    def call(self, argument: str, context: CallContext) -> Outcome:
        """Answer a call; runs in a thread of its own. Any exception is a ``No result.``"""
        ...


def switch_line(plugin: Plugin) -> str:
    """The plugin's line in the meta instruction when it is on: ``- Calculator: enabled. API: Calculate(expression)``."""
    return f"- {plugin.label}: enabled. API: {plugin.function}({plugin.argument})"
