"""What leaves the program: foreign text made harmless for terminals, error messages bounded, faults of the output told.

Texts of models, names in checkpoints and answers of servers are hostile. Everything that a command prints goes through
here, mostly by way of moss_jt.terminal.screen; only what is piped on leaves as it is.
"""

import contextlib
import json
import os
import re
import sys
from typing import Any, TextIO

from moss_jt.errors import MossError

# Control characters (escape sequences begin with one, 7-bit or 8-bit), but for tab and newline; and marks that
# turn the direction of writing around, with which a text can pretend to be another.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

MAX_MESSAGE_CHARACTERS = 2_000
MESSAGE_END = 500  # of these, from its end, which says what to do


def harmless(text: str) -> str:
    """Foreign text as a terminal may get it: without control characters, and without halves of surrogate pairs."""
    return CONTROLS.sub("", text).encode("utf-8", "replace").decode()


def message_of(error: Exception) -> str:
    """What an error says, for people: bounded, and names in it spelled out where a terminal would obey them.

    Lines after the first are indented, so that no name can pretend to be a message of its own.
    """
    text = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        text = f"{error.filename}: {error.strerror}."
    shown = CONTROLS.sub(_spelled, bounded(text)).encode("utf-8", "backslashreplace").decode()
    return "\n  ".join(line.strip() for line in shown.split("\n") if line.strip())


def bounded(text: str) -> str:
    """A message without its middle where it is far too long."""
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return text
    return f"{text[: MAX_MESSAGE_CHARACTERS - MESSAGE_END]} … {text[-MESSAGE_END:]}"


def json_text(value: Any) -> str:
    """JSON on one line, in the output's own characters; what a terminal would obey is escaped, which changes no value."""
    plain = (sys.stdout.encoding or "").lower().startswith("utf")
    return CONTROLS.sub(
        lambda control: f"\\u{ord(control[0]):04x}", json.dumps(value, ensure_ascii=not plain)
    )


def _spelled(control: re.Match[str]) -> str:
    return control[0].encode("unicode_escape").decode()


def pass_on(text: str) -> None:
    """A model's text to standard output: harmless where that is a terminal, to the letter where it is not.

    Raises:
        MossError: it cannot be written; so does :func:`write`.
    """
    if sys.stdout.isatty():
        encoding = sys.stdout.encoding or "ascii"
        text = harmless(text).encode(encoding, "replace").decode(encoding)
    write(sys.stdout, text)


def write(stream: TextIO, text: str) -> None:
    """Write at once.

    Raises:
        MossError: the disk is full, the device fails, or the stream's encoding lacks a character.
        SystemExit: who reads a pipe has gone, which is no fault.
    """
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError as error:
        raise MossError(
            f"the output is in {stream.encoding}, which has no {error.object[error.start]!a}. "
            "Set PYTHONIOENCODING=utf-8 to write UTF-8."
        ) from error
    except BrokenPipeError:
        silence(stream)
        sys.exit(0)
    except OSError as error:
        silence(stream)
        raise MossError(f"the output cannot be written: {error.strerror}.") from error


def silence(stream: TextIO) -> None:
    """Let a stream that failed lead nowhere: Python would try again at exit, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
