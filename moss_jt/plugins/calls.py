"""The calls in what a model writes as its commands: found wherever they stand, for models do not keep to the form."""

import re
from bisect import bisect_left
from dataclasses import dataclass

MAX_COMMANDS_CHARACTERS = 20_000
MAX_ARGUMENT_CHARACTERS = 2_000
QUOTES = {'"': '"', "“": "”", "'": "'", "”": "”"}


@dataclass(frozen=True)
class Call:
    """``function("argument")``."""

    function: str
    argument: str

    @property
    def text(self) -> str:
        return f'{self.function}("{self.argument}")'


def parse_commands(text: str) -> list[Call]:
    """Every call in a Commands field, in order.

    An argument is all between ``("`` and ``")``: inner quotes, commas and brackets belong to it, and of a call with two
    arguments both do, as in the recorded dialogues. ``None`` in all its forms, comments, numbers and lists are passed over, and
    so are calls of nothing: ``Calculate("None")``.
    """
    text = text[:MAX_COMMANDS_CHARACTERS]
    if is_none(text):
        return []
    calls: list[Call] = []
    at = 0
    ends = {quote: _ends(text, quote) for quote in set(QUOTES.values()) if quote in text}
    while (opening := text.find("(", at)) >= 0:
        function = _name_before(text, opening)
        argument_at = _skip_spaces(text, opening + 1)
        quote = text[argument_at : argument_at + 1]
        end = _closing(ends, argument_at + 1, QUOTES[quote]) if function and quote in QUOTES else None
        if end is None:
            at = opening + 1
            continue
        argument, at = text[argument_at + 1 : end[0]], end[1]
        if len(argument) <= MAX_ARGUMENT_CHARACTERS and argument.strip() not in ("", "None"):
            calls.append(Call(function, argument))
    return calls


def is_none(text: str) -> bool:
    """The field says that there is nothing to call: ``None``, ``None (because ..)``, the truncated ``Non``."""
    return text.strip().startswith("Non") and '("' not in text


def _name_before(text: str, opening: int) -> str:
    start = opening
    while start > 0 and text[start - 1].isascii() and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    name = text[start:opening]
    return name if name and not name[0].isdigit() else ""


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n":
        at += 1
    return at


def _ends(text: str, quote: str) -> list[tuple[int, int]]:
    """(end of an argument, end of its call) wherever a bracket follows the quote, in order.

    Found once for the whole text: looking from every opening bracket anew would take time that grows with its square.
    """
    return [
        (found.start(), found.end()) for found in re.finditer(re.escape(quote) + r"[ \t\n]{0,8}[)）]", text)
    ]


def _closing(ends: dict[str, list[tuple[int, int]]], start: int, quote: str) -> tuple[int, int] | None:
    """The first end at or after ``start``."""
    found = ends.get(quote, [])
    place = bisect_left(found, start, key=lambda end: end[0])
    return found[place] if place < len(found) else None
