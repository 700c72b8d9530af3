"""Lines that a user types: with editing and history on a terminal, plain ones from a pipe."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from moss_jt.user_folders import own_folder

MAX_LINE_CHARACTERS = 1 << 20
# What is longer was pasted, and is not kept in the history's file.
MAX_KEPT_CHARACTERS, MAX_KEPT_LINES = 500, 5


class LineReader(Protocol):
    """Where messages come from."""

    def read(self) -> str:
        """The next message.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: the user has pressed Ctrl-C instead.
        """
        ...


class PipeReader:
    """One message per line of a stream that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str:
        line = self._stream.readline(MAX_LINE_CHARACTERS)
        if not line:
            raise EOFError
        return line


class PromptReader:
    """Line editing with history: Enter sends, Alt-Enter begins a new line, pasted lines stay together."""

    def __init__(self, prompt: str, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        class KeptHistory(FileHistory):
            """Lines are kept where they can be: a full disk, or bytes that are no text, end no conversation."""

            def store_string(self, string: str) -> None:
                if len(string) > MAX_KEPT_CHARACTERS or string.count("\n") >= MAX_KEPT_LINES:
                    return  # a pasted text: to be recalled in this conversation only
                with contextlib.suppress(OSError):
                    super().store_string(string.encode("utf-8", "replace").decode())

        kept: History = KeptHistory(str(history)) if history is not None else InMemoryHistory()
        self._prompt = FormattedText([("bold ansigreen", prompt)])
        self._session: PromptSession[str] = PromptSession(history=kept, key_bindings=keys, multiline=True)

    def read(self) -> str:
        return self._session.prompt(self._prompt, prompt_continuation="  ")


def history_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Under MOSS_JT_HOME, or else in the user's state directory."""
    return own_folder("STATE", ".local/state", environment) / "history"


def writable(path: Path) -> Path | None:
    """The path, made so that nobody else reads it; None where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return None
    return path


def make_reader(prompt: str) -> LineReader:
    """A reader of standard input, whatever that is."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return PromptReader(prompt, writable(history_path()))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    return PipeReader(sys.stdin)
