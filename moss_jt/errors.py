"""What a person did wrong, or what the machine lacks: shown on one line by the command line, never with a traceback."""

import re


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
