"""What a person did wrong, or what the machine lacks: shown on one line by the command line, never with a traceback."""


class MossError(Exception):
    """The message says what was found, what was needed and what to do."""
