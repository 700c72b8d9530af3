"""What a user changes during a chat: how tokens are chosen, and the meta instruction, which is read from a file."""

import dataclasses
from pathlib import Path
from typing import Any

from moss_jt.chat.chat import Chat
from moss_jt.engine.generate import check_count
from moss_jt.errors import MossError

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
INTEGRAL = ("top_k", "seed", "max_new_tokens")
# What stands for None, which is a number of its own for each answer, and the reference's penalty.
UNSET = {"seed": "random", "repetition_penalty": "default"}
MAX_FILE_KIB = 256  # more than the longest context holds


class UnreadableError(MossError):
    """A file cannot be read as text; ``code`` names the reason among moss_jt.terminal.texts."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def settings_of(chat: Chat) -> dict[str, str]:
    """Every setting by name, as it is shown and typed."""
    values = {name: getattr(chat.params, name) for name in SAMPLING} | {"max_new_tokens": chat.max_new_tokens}
    return {name: UNSET[name] if value is None else f"{value:g}" for name, value in values.items()}


def change_setting(chat: Chat, name: str, text: str) -> bool:
    """Change one for the answers to come; False where it cannot have that value, and nothing is changed."""
    try:
        value: Any = None if text == UNSET.get(name) else (int if name in INTEGRAL else float)(text)
        if name == "max_new_tokens":
            check_count(value)
            chat.max_new_tokens = value
        else:
            chat.params = dataclasses.replace(chat.params, **{name: value})
    except (ValueError, MossError):
        return False
    return True


def read_text_file(path: Path) -> str:
    """All of a text file in UTF-8, without a byte order mark.

    Raises:
        UnreadableError: it is missing, may not be read, is no UTF-8 or far too long.
    """
    try:
        with path.open("rb") as file:
            data = file.read((MAX_FILE_KIB << 10) + 1)
    except FileNotFoundError as error:
        raise UnreadableError("file_missing") from error
    except (OSError, ValueError) as error:
        raise UnreadableError("file_unreadable") from error
    if len(data) > MAX_FILE_KIB << 10:
        raise UnreadableError("file_too_long")
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError("file_no_text") from error
