"""What a plugin is: a function that the model calls by name with one text, and how its answer is written for the model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

NO_RESULT = "No result."

# How an answer stands in the Results field:
#   value    Name("argument") => 'answer'
#   lines    Name("argument") =>, then the answer's lines
#   items    Name("argument") =>, then numbered quoted items, which the model cites
#   picture  one line that names no command
Style = Literal["value", "lines", "items", "picture"]


@dataclass(frozen=True)
class Source:
    """Where an item comes from: a title and an address or a path, for the user."""

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
    failure   why there is no answer, for the user; the model reads ``No result.``
    """

    text: str = ""
    items: tuple[Item, ...] = ()
    picture: Path | None = None
    failure: str = field(default="", compare=False)


class Plugin(Protocol):
    """A plugin; see docs/plugins.md for one in 30 lines.

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

    def call(self, argument: str, wanted: int) -> Outcome:
        """Answer a call. ``wanted`` is how many items the model expects. Any exception is a ``No result.``"""
        ...
