"""What a chat yields while it answers, for any front end to show: see moss_jt.chat.chat."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moss_jt.plugins.interface import Source


@dataclass(frozen=True)
class Thought:
    """A piece of the model's inner thoughts, as it comes."""

    kind: ClassVar[str] = "thought"
    text: str


@dataclass(frozen=True)
class Command:
    """A call that the model wants: ``Calculate("37*48")``."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Result:
    """The answer to a command.

    command  the call, as in its Command event
    text     the answer as the model reads it, without the call
    found    False where there was no result
    numbers  citation numbers of the items of a search; they run on through the turn
    sources  where these items come from, in the same order
    picture  the file that was drawn
    failure  why there was no result
    """

    kind: ClassVar[str] = "result"
    command: str
    text: str
    found: bool = True
    numbers: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    picture: Path | None = None
    failure: str = ""


@dataclass(frozen=True)
class Text:
    """A piece of the answer, as it comes; citations in it read [1]."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Notice:
    """Something that the user should know, in the conversation's language; ``code`` names it for programs."""

    kind: ClassVar[str] = "notice"
    text: str
    code: str


Event = Thought | Command | Result | Text | Notice
