"""What a person did wrong, or what the machine lacks: shown on one line by the command line, never with a traceback."""

import re
from typing import Any


class Reason(str):
    """A sentence in English that remembers its template and what was filled in, so that it can be said in another language.

    ``Reason("there is no file {path}", path=path)``; a tuple is a list of names. moss_jt.terminal.reasons has the templates in
    Chinese.
    """

    template: str
    values: dict[str, Any]

    def __new__(cls, template: str, **values: Any) -> "Reason":
        shown = {
            name: ", ".join(value) if isinstance(value, tuple) else value for name, value in values.items()
        }
        self = super().__new__(cls, template.format(**shown) if values else template)
        self.template, self.values = template, values
        return self


class ReasonedError(ValueError):
    """A plugin has no answer, and ``reason`` says why."""

    def __init__(self, reason: str, **values: Any) -> None:
        self.reason = reason if isinstance(reason, Reason) else Reason(reason, **values)
        super().__init__(self.reason)


class MossError(Exception):
    """The message says what is there, what was needed and what to do."""


class MissingFileError(MossError):
    """A checkpoint has no such file."""


def reason_of(error: Exception) -> str:
    """What an error says in the end, at most 200 characters: Jittor's have pages about the operation around the reason."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    reason = re.sub(r"\[\w \d{4} [\d:.]+ \d+ [\w.]+:\d+\] ?", "", text.rpartition("[Reason]:")[2]).split(
        "\n*****"
    )[0]
    lines = [line.strip() for line in reason.splitlines()]
    return next((line[:200] for line in reversed(lines) if line), type(error).__name__)
