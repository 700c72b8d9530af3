"""The calls in what a model writes as its commands: found wherever they stand, for models do not keep to the form."""

import re
from collections.abc import Collection
from dataclasses import dataclass

MAX_COMMANDS_CHARACTERS = 20_000
MAX_ARGUMENT_CHARACTERS = 2_000
MAX_PARSED = 64

CLOSING_QUOTES = {'"': '"', "“": "”", "”": "”", "'": "'", "＂": "＂"}
OPENING = re.compile(
    r"(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_]{0,63})\s{0,4}[(（]\s{0,4}(?P<quote>[\"“”'＂])?"
)
# What may follow a call: the end, a separator, a comment or a line's end, another call.
AFTER_CALL = re.compile(r"\s*(?:$|[,，;；、.。#]|\n)|\s+[A-Za-z_][A-Za-z0-9_]{0,63}[(（][\"“”'＂]")
NONE_ARGUMENT = re.compile(r"\s*(?:none|null|无)?[\s.。]*", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """``function("argument")``; text is how it is repeated in the Results field."""

    function: str
    argument: str

    @property
    def text(self) -> str:
        return f'{self.function}("{self.argument}")'


def parse_commands(text: str, functions: Collection[str] = ()) -> list[Call]:
    """Every call in a Commands field, in order; at most MAX_PARSED.

    An argument is all between ``("`` and ``")``: inner quotes, commas and brackets belong to it, and of a call with two
    arguments both do. Without quotation marks only the given functions are calls: ``Calculate(2+3)``. ``None`` in all its
    forms, comments, numbers and lists are passed over, and so are calls with an empty argument or ``None``. A text that begins
    with ``Non`` (``None, because f("x") ..``, the truncated ``Non``) holds no calls but those of the given functions.
    """
    text = text[:MAX_COMMANDS_CHARACTERS]
    says_none = text.lstrip().startswith("Non")
    calls: list[Call] = []
    at = 0
    unclosed: set[str] = set()
    while len(calls) < MAX_PARSED and (opening := OPENING.search(text, at)):
        at = opening.end()
        quote = opening["quote"]
        if quote is None:
            span = _bare(text, at) if opening["name"] in functions else None
        elif CLOSING_QUOTES[quote] in unclosed:
            span = None
        else:
            span = _quoted(text, at, CLOSING_QUOTES[quote])
            if span is None:  # then no later one is closed either: without this the search would be quadratic
                unclosed.add(CLOSING_QUOTES[quote])
        if span is None:
            continue
        argument = text[at : span[0]].strip() if quote is None else text[at : span[0]]
        at = span[1]
        if len(argument) > MAX_ARGUMENT_CHARACTERS or NONE_ARGUMENT.fullmatch(argument):
            continue
        if opening["name"] in functions or not says_none:
            calls.append(Call(opening["name"], argument))
    return calls


def _quoted(text: str, start: int, quote: str) -> tuple[int, int] | None:
    """(end of the argument, end of the call).

    The first closing quotation mark and bracket after which a call can end; failing that, the first ones at all.
    """
    closing = re.compile(re.escape(quote) + r"\s{0,4}(?:[)）]|$)")
    first = closing.search(text, start)
    if first is None:
        return None
    following = OPENING.search(text, first.end())
    while following is not None and following["quote"] is None:
        following = OPENING.search(text, following.end())
    limit = following.start() if following else len(text)
    for found in closing.finditer(text, start, limit):
        if AFTER_CALL.match(text, found.end()):
            return found.start(), found.end()
    return first.start(), first.end()


def _bare(text: str, start: int) -> tuple[int, int] | None:
    """(end of the argument, end of the call) of an argument without quotation marks: to the bracket that closes the call."""
    depth = 1
    for at in range(start, min(len(text), start + MAX_ARGUMENT_CHARACTERS)):
        if text[at] == "\n":
            return None
        depth += (text[at] in "(（") - (text[at] in ")）")
        if depth == 0:
            return at, at + 1
    return None
