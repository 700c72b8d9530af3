"""What a plugin is: a function that the model calls by name with one text, and how its answer is written for the model."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from moss_jt.errors import Reason

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
    failure   why there is no answer, for the user; a moss_jt.errors.Reason can be told in Chinese, too. The model reads
              ``No result.``
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


def plugin_fault(plugin: object) -> Reason | None:
    """What is wrong with a plugin that others wrote, such as ``timeout_s is missing``; None where it can be called."""
    attributes: dict[str, object] = {}
    for name in ("name", "label", "function", "argument", "style", "timeout_s", "call"):
        try:
            attributes[name] = getattr(plugin, name)
        except Exception as error:  # noqa: BLE001  a property may do anything
            if isinstance(error, AttributeError):
                return Reason("{name} is missing", name=name)
            return Reason("{name} cannot be read", name=name)
    for name in ("name", "label", "function", "argument"):
        if not isinstance(attributes[name], str) or not attributes[name]:
            return Reason("{name} is {type}, and must be text", name=name, type=type_of(attributes[name]))
    seconds = attributes["timeout_s"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        return Reason("timeout_s is {type}, and must be a number of seconds above 0", type=type_of(seconds))
    if attributes["style"] not in get_args(Style):
        return Reason("style is not one of {styles}", styles=get_args(Style))
    return None if callable(attributes["call"]) else Reason("call is not a method")


def outcome_fault(outcome: object) -> Reason | None:
    """What is wrong with what a plugin answered, such as ``its text is int``; None where it can be written down."""
    if not isinstance(outcome, Outcome):
        return Reason(
            "the plugin answered with {type}, and must answer with an Outcome", type=type_of(outcome)
        )
    wanted: dict[str, tuple[type, ...]] = {
        "text": (str,),
        "failure": (str,),
        "items": (tuple, list),
        "picture": (Path, type(None)),
    }
    for name, types in wanted.items():
        value = getattr(outcome, name)
        if not isinstance(value, types):
            return Reason("in the plugin's Outcome, {name} is {type}", name=name, type=type_of(value))
    for item in outcome.items:
        if not isinstance(item, Item) or not isinstance(item.source, Source):
            return Reason("in the plugin's Outcome, an item is {type}, or has no Source", type=type_of(item))
        texts = (item.text, item.label, item.source.title, item.source.location)
        if not all(isinstance(text, str) for text in texts):
            return Reason("in the plugin's Outcome, an item holds something other than text")
    return None


def type_of(value: object) -> str:
    """What a value is, for a message: ``None`` or ``list``."""
    return "None" if value is None else type(value).__name__
