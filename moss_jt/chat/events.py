"""What a chat yields while it answers, for any front end to show: see moss_jt.chat.chat."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """Something that the user should know. The front end words it, in chat.language: moss_jt.terminal.texts does.

    code    dropped       the ``turns`` oldest turns are forgotten: the conversation has reached the end of the context
            stopped       the user ended the answer
            cut           the answer was cut at ``tokens`` tokens (max_new_tokens)
            full          the answer fills the context and ends there
            empty         there is no answer
            results_cut   the results are longer than the context; only their first part is read
            commands_cut  of ``commands`` commands only the first ``limit`` were run
            not_kept      the conversation could not be kept on the disk, for this ``reason``
    values  what is in it, by these names
    """

    kind: ClassVar[str] = "notice"
    code: str
    values: Mapping[str, int | str] = field(default_factory=dict)


Event = Thought | Command | Result | Text | Notice
