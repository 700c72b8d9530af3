"""What the threads that write answers put into their logs, whatever interface asked for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moss_jt.engine.logprobs import Logprob


@dataclass(frozen=True)
class Token:
    """A token of a text: its share of it, its bytes (a character may span several), and how likely it was.

    logprob  None for a text's first token, which follows nothing
    offset   where its text begins
    """

    text: str
    bytes: bytes
    logprob: Logprob | None
    offset: int = 0


@dataclass(frozen=True)
class Words:
    """A piece of an answer, with its tokens where those were asked for."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True)
class Thinking:
    """A piece of inner thoughts."""

    choice: int
    text: str


@dataclass(frozen=True)
class Extra:
    """What happens beside the text, as a client that knows of it reads it: {"type": "command", ..}."""

    choice: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """
    prompt  tokens that were read; cached, of them, that had not to be computed
    new     tokens that the model wrote
    """

    prompt: int = 0
    new: int = 0
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.new + other.new, self.cached + other.cached)


@dataclass(frozen=True)
class Finished:
    """Nothing more comes of a choice. ``reason`` is OpenAI's: stop or length; None where it was cancelled before its end."""

    choice: int
    reason: str | None
    usage: Usage
    seconds: tuple[float, float] = (0.0, 0.0)  # until the first token, and after it
