"""How a program ends: with one line where something went wrong, whatever has become of its streams."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from moss_jt.errors import MossError
from moss_jt.terminal.output import message_of, silence
from moss_jt.terminal.screen import Screen


def open_closed_streams() -> None:
    """Let streams that were closed before the program began (``<&-``, ``>&-``) lead nowhere, and not into the next file to be
    opened: input is then empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextlib.contextmanager
def told_on_one_line() -> Iterator[None]:
    """End the program with exit code 1 where the input or the machine is at fault, and 130 on Ctrl-C."""
    try:
        yield
    except (MossError, OSError) as error:
        if isinstance(error, OSError):
            silence(sys.stdout)  # it may be the one that failed
        end(f"moss-jt: error: {message_of(error)}", 1)
    except KeyboardInterrupt:
        end("moss-jt: stopped.", 130)


def end(text: str, code: int) -> NoReturn:
    """Say why the program ends, where anybody can still read it."""
    with contextlib.suppress(MossError, SystemExit):
        Screen(sys.stderr).line(text)
    sys.exit(code)
