"""The calls in what a model writes as its commands: wherever they stand, for models do not keep to the form."""

import re
from bisect import bisect_left
from dataclasses import dataclass

MAX_COMMANDS_CHARACTERS = 20_000
MAX_ARGUMENT_CHARACTERS = 2_000
# Quotation marks of one kind stand for each other: models open with one and close with the next.
DOUBLE = '"“”„＂«»「」『』'
SINGLE = "'‘’＇"
SPACE = r"[ \t\n\u3000]{0,8}"
OPENING = re.compile(
    r"(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_]{0,63})(?P<space>[ \t\u3000]{0,8})[(（]"
    rf"{SPACE}(?P<mark>[{DOUBLE}{SINGLE}])"
)
END = re.compile(rf"(?P<mark>[{DOUBLE}{SINGLE}]){SPACE}[)）]")
# What follows a call. Before anything else, the mark and the bracket may be the argument's own.
AFTER = re.compile(r"[ \t\u3000]*(?:[,;，；、\n#]|$)")


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
    arguments both do, as in the recorded dialogues. Full-width brackets and all quotation marks are taken for the trained
    ones. ``None`` in all its forms, comments, numbers and lists are passed over, and so are calls of nothing:
    ``Calculate("None")``.
    """
    text = text[:MAX_COMMANDS_CHARACTERS]
    openings = [opening for opening in OPENING.finditer(text) if _is_called(opening)]
    # Once for all of the text: looking from every opening bracket anew would take time that grows with its square.
    ends = {
        kind: [end.span() for end in END.finditer(text) if end["mark"] in kind] for kind in (DOUBLE, SINGLE)
    }
    starts = [opening.start() for opening in openings]
    calls: list[Call] = []
    at = 0
    for opening in openings:
        kind = DOUBLE if opening["mark"] in DOUBLE else SINGLE
        end = _end(text, ends[kind], opening.end(), starts) if opening.start() >= at else None
        if end is None:
            continue
        argument, at = text[opening.end() : end[0]], end[1]
        if len(argument) <= MAX_ARGUMENT_CHARACTERS and argument.strip() not in ("", "None"):
            calls.append(Call(opening["name"], argument))
    return calls


def _is_called(opening: re.Match[str]) -> bool:
    """Not ``None`` or the truncated ``Non``; after a space only a name like the trained ones, for prose has brackets, too."""
    name = opening["name"]
    return name not in ("None", "Non") and (not opening["space"] or name[0].isupper())


def _end(text: str, ends: list[tuple[int, int]], start: int, openings: list[int]) -> tuple[int, int] | None:
    """Where an argument that begins at ``start``, and its call, end: at the first end that nothing follows but another call.

    Where there is none, at the first of all: what follows is then no part of it.
    """
    first = index = bisect_left(ends, (start, 0))
    if first == len(ends):
        return None
    while not AFTER.match(text, ends[index][1]):
        following = bisect_left(openings, ends[index][1])
        index += 1
        if index == len(ends) or (following < len(openings) and openings[following] < ends[index][0]):
            return ends[first]
    return ends[index]
