"""Text on a terminal: styles where it has any, and nothing from a model, a file or the network that could command it."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from io import TextIOWrapper
from typing import TextIO

from moss_jt.terminal.output import harmless, message_of, write

STYLES = {
    "dim": "2",
    "bold": "1",
    "command": "36",
    "warning": "33",
    "name": "1;32",
    "ok": "32",
    "note": "33",
    "problem": "31",
}


def columns_of(text: str) -> int:
    """Columns that a text takes on a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def shortened(text: str, columns: int) -> str:
    """A text on one line of at most so many columns."""
    text, used = " ".join(text.split()), 0
    for index, character in enumerate(text):
        used += columns_of(character)
        if used > columns - 1 and index < len(text) - 1:
            return text[:index] + "…"
    return text


class Screen:
    """Writes to a stream, at once. Everything but ``raw`` is made harmless first.

    Raises:
        MossError: by every method: the stream cannot be written.
    """

    def __init__(self, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self.stream = sys.stdout if stream is None else stream
        if isinstance(self.stream, TextIOWrapper):
            self.stream.reconfigure(errors="replace")  # where the encoding is no UTF-8
        self.terminal = self.stream.isatty() and environment.get("TERM", "dumb") != "dumb"
        self.styled = self.terminal and not environment.get("NO_COLOR")
        self._column_0 = True
        self._waiting = ""

    @property
    def columns(self) -> int:
        return shutil.get_terminal_size((100, 24)).columns if self.terminal else 100

    def write(self, text: str, style: str | None = None) -> None:
        """Part of a line, or several lines."""
        text = harmless(text)
        if not text:
            return
        self.end_wait()
        shown = text
        if self.styled and style is not None:
            shown = f"\x1b[{STYLES[style]}m{text}\x1b[0m"
        self.raw(shown)
        self._column_0 = text.endswith("\n")

    def line(self, text: str = "", style: str | None = None) -> None:
        """A line of its own."""
        self.fresh_line()
        self.write(text, style)
        self.raw("\n")
        self._column_0 = True

    def error(self, error: Exception, before: str = "") -> None:
        """What is wrong, as people read it."""
        self.line(before + message_of(error), "warning")

    def fresh_line(self) -> None:
        """Be at the beginning of a line."""
        self.end_wait()
        if not self._column_0:
            self.raw("\n")
            self._column_0 = True

    def wait(self, text: str) -> None:
        """Show, where the output is a terminal, that something is going on; what comes next replaces it."""
        if self.terminal and self._column_0 and self._waiting != text:
            self.end_wait()
            self.raw(f"\x1b[2m{text}\x1b[0m" if self.styled else text)
            self._waiting = text

    def end_wait(self) -> None:
        if self._waiting:
            self.raw("\r\x1b[K")
            self._waiting = ""

    def raw(self, text: str) -> None:
        """Our own text, escape sequences included."""
        write(self.stream, text)
