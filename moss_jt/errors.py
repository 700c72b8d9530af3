"""What a person did wrong, or what the machine lacks: shown on one line by the command line, never with a traceback."""


class MossError(Exception):
    """The message says what was found, what was needed and what to do."""


def last_line(error: Exception) -> str:
    """What an error says in the end, at most 200 characters: Jittor's begin with pages about the operation."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line[:200] for line in reversed(lines) if line), type(error).__name__)
