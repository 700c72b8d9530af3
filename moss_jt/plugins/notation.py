"""What people and models type for arithmetic, as tokens: one reading of signs and numbers for every plugin that computes.

A number is read as what was written, or not at all. Thousands may be marked by commas, single spaces, apostrophes or
underscores, a whole number may have a fraction beside it (``2 1/2``, ``2½``), 万 and 亿 may follow it. A comma between two
digits can part two things or mark thousands; whoever knows what may stand there asks for the one reading that is possible
(:func:`parted`), and where two are, or none, there is none. Decimal commas are not read: ``1,234`` would have two values.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

from moss_jt.errors import ReasonedError

MAX_DOUBTFUL_COMMAS = 8
MAX_TOKENS = 400


class NotationError(ReasonedError):
    """The text is no arithmetic, or can be read in more than one way."""


Kind = Literal["number", "name", "superscript", "sign", "other"]


class Token(NamedTuple):
    """A stretch of the text from ``start`` to ``end``; ``other`` is what no arithmetic has."""

    kind: Kind
    text: str
    start: int
    end: int


SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
FRACTIONS = dict(
    zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(), strict=True)
)
# Ten to the what, as Chinese writes it after digits. 兆 is a million to some and a billion to others.
MYRIADS = {
    "百": 2,
    "千": 3,
    "万": 4,
    "萬": 4,
    "十万": 5,
    "百万": 6,
    "千万": 7,
    "亿": 8,
    "億": 8,
    "十亿": 9,
    "百亿": 10,
    "千亿": 11,
    "万亿": 12,
}
_MYRIAD = "十百千万萬亿億兆"
CHINESE_NUMERAL = re.compile(f"[零〇一二两三四五六七八九{_MYRIAD}]+")

# Full-width forms lie in a row; the others are what keyboards, word processors and web pages make of the same signs. Never
# NFKC: it makes 21⁄2 of 2½ and 102 of 10².
_SIGNS = (
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    | str.maketrans("×·⋅∙∗✕✖÷∕⁄−–﹣", "*******///---")
    | dict.fromkeys(
        map(
            ord,
            "\t\v\f\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000",
        ),
        " ",
    )
    | {ord("\r"): "\n"}
)

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_NUMERAL = rf"(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})"
_LETTER = rf"[^\W\d_π{SUPERSCRIPTS}{SUBSCRIPTS}{''.join(FRACTIONS)}]"
_RADIX = r"0[xX][0-9A-Fa-f]+|0[bB][01]+|0[oO][0-7]+"
_FRACTION = f"[{''.join(FRACTIONS)}]"
# A fraction beside a whole number needs space around it: next to a sign that binds tighter it could belong to that.
_MIXED = r"[0-9]+[ ]+[1-9][0-9]*/[1-9][0-9]*(?=[ ]*(?:[-+)=;|\n]|,(?![0-9])|\*(?!\*)|$))"
TOKEN = re.compile(
    rf"""\ *(?:
    (?P<number>(?:{_RADIX})(?![0-9A-Za-z_]) | {_MIXED}
        | (?:[0-9]+\ ?)?{_FRACTION}
        | [1-9][0-9]{{0,2}}(?:\ [0-9]{{3}})+(?:\.[0-9]+)?(?!\ *[0-9.])
        | [1-9][0-9]{{0,2}}(?:['’][0-9]{{3}})+(?:\.[0-9]+)?(?!['’0-9.])
        | {_NUMERAL}(?:[eE][-+]?{_DIGITS} | [{_MYRIAD}]+(?!{_LETTER}))?)
    | (?P<superscript>[⁺⁻]?[{SUPERSCRIPTS}]+)
    | (?P<name>math\.[a-z0-9]+ | log1p(?=\ *\() | π | {_LETTER}+(?:[0-9]+|[{SUBSCRIPTS}]+)?(?:_(?:{_LETTER}|[0-9])+)*)
    | (?P<sign>\*\*|//|\n|[-+*/^()=,;!|√?])
    | (?P<other>.))""",
    re.VERBOSE,
)
GROUPED = re.compile(rf"[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?(?:[{_MYRIAD}]+)?")
SCIENTIFIC = re.compile(rf"{_NUMERAL}[eE][-+]?{_DIGITS}")
_TO_SUBSCRIBED = str.maketrans(SUBSCRIPTS, "0123456789")
_TO_RAISED = str.maketrans(f"{SUPERSCRIPTS}⁺⁻", "0123456789+-")


def read(text: str) -> list[Token]:
    """The tokens of a text: full-width and typographic signs as ASCII's, line ends only outside brackets.

    Raises:
        NotationError: there are too many, or a name is a number in words.
    """
    tokens: list[Token] = []
    depth = 0
    for match in TOKEN.finditer(text.translate(_SIGNS).strip()):
        kind, start, end = match.lastgroup, *match.span(match.lastgroup or 0)
        token = Token(kind, match[0].strip(" "), start, end)  # type: ignore[arg-type]
        depth += (token.text == "(") - (token.text == ")")
        if token.text == "\n" and (depth > 0 or not tokens or tokens[-1].text == "\n"):
            continue
        if token.kind == "name":
            token = _checked_name(token, tokens[-1] if tokens else None)
        if token.kind == "number" and " " in token.text and tokens:
            _check_reach(tokens[-1], token)
        tokens.append(token)
    if len(tokens) > MAX_TOKENS:
        raise NotationError("the text is too long")
    return tokens


def _check_reach(sign: Token, number: Token) -> None:
    """``6/2 1/2`` and ``x^2 500`` could end before the space."""
    is_fraction = "/" in number.text or number.text[-1] in FRACTIONS
    if sign.text in ("^", "**") or (is_fraction and sign.text in ("/", "//")):
        raise NotationError(
            "how far {sign!r} reaches is not clear before {number!r}", sign=sign.text, number=number.text
        )


def _checked_name(token: Token, before: Token | None) -> Token:
    if any(
        unicodedata.category(sign) in ("Lm", "No", "Nl") or sign in "ªº"
        for sign in token.text.translate(_TO_SUBSCRIBED)
    ):
        raise NotationError("{text!r} is not a name", text=token.text)
    number = (
        before.text if before is not None and before.kind == "number" and before.end == token.start else ""
    )
    goes_on = token.text[0] in _MYRIAD or re.fullmatch("[eE][0-9]+", token.text)
    # 2e-65x may begin with twice e.
    signed = SCIENTIFIC.fullmatch(number) and ("-" in number or "+" in number or token.text[0] in "eE")
    if CHINESE_NUMERAL.fullmatch(token.text) or (number and (goes_on or signed)):
        raise NotationError("{text!r} is part of a number", text=token.text)
    return Token("name", token.text.translate(_TO_SUBSCRIBED), token.start, token.end)


def number_value(text: str) -> int | float:
    """The value of a number token, as Python would read it where Python has the form: ``1e3`` is a float, ``0x10`` whole.

    Raises:
        NotationError: it is none, such as ``007``, which may be a part of something longer.
    """
    if mixed := re.fullmatch(rf"(?:([0-9]+) *)??(?:([0-9]+)/([0-9]+)|({_FRACTION}))", text):
        integer = mixed[1] or "0"
        above, below = mixed[2], mixed[3]
        if mixed[4]:
            above, below = FRACTIONS[mixed[4]].split("/")
        _check_mixed(integer, above, below)
        return int(integer) + int(above) / int(below)
    if re.fullmatch(_RADIX, text):
        return int(text, 0)
    digits = text.rstrip(_MYRIAD)
    plain = re.sub(r"[,'’ ]", "", digits)
    if re.fullmatch(_DIGITS, plain):
        if len(plain) > 1 and plain.startswith("0"):
            raise NotationError("{text!r} begins with a zero", text=text)
        value: int | float = int(plain)
    else:
        value = float(plain)
    if digits != text:
        value = _times_myriad(plain, text[len(digits) :])
    if value == float("inf"):
        raise NotationError("{text!r} is too large", text=text)
    if value == 0 and re.search("[1-9]", plain.lower().partition("e")[0]):
        raise NotationError("{text!r} is too small", text=text)
    return value


def _check_mixed(integer: str, above: str, below: str) -> None:
    """``2 500/1000`` could be 2500/1000, and ``2 3/2`` is no fraction that people write beside a whole number."""
    grouped = len(above) == 3 and len(integer) <= 3
    if (
        above.startswith("0")
        or (len(integer) > 1 and integer.startswith("0"))
        or int(above) >= int(below)
        or grouped
    ):
        raise NotationError("{text!r} can be read in two ways", text=f"{integer} {above}/{below}")


def _times_myriad(digits: str, unit: str) -> int | float:
    """``1.5万`` is 15000: the point is moved in the text, so nothing is rounded."""
    if unit not in MYRIADS:
        raise NotationError("{unit!r} has more than one meaning", unit=unit)
    integer, _, fraction = digits.replace("_", "").partition(".")
    shift = MYRIADS[unit]
    moved, rest = integer + fraction[:shift].ljust(shift, "0"), fraction[shift:].rstrip("0")
    return float(f"{moved}.{rest}") if rest else int(moved)


def superscript_value(text: str) -> int:
    """The value of ``²`` or ``⁻¹``."""
    return int(text.translate(_TO_RAISED))


def split(tokens: Sequence[Token], signs: tuple[str, ...]) -> list[list[Token]]:
    """The parts between these signs, outside brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text == "(") - (token.text == ")")
        if depth == 0 and token.kind == "sign" and token.text in signs:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


Parts = list[list[Token]]


def gaps(parts: Parts) -> list[bool]:
    """For each comma between two parts, whether it touches a digit on either side, as one inside a number would."""
    return [
        bool(left and right)
        and left[-1].kind == right[0].kind == "number"
        and left[-1].end + 1 == right[0].start
        for left, right in pairwise(parts)
    ]


def parted(tokens: Sequence[Token], possible: Callable[[Parts], bool]) -> Parts:
    """The parts between commas outside brackets, in the one reading that is possible there.

    A comma that touches a digit on either side may mark thousands instead: ``3,000`` is one number where a second one,
    ``000``, makes no sense.

    Raises:
        NotationError: no reading is possible, or more than one.
    """
    outside = _outside_brackets(tokens)
    doubtful = [
        index for index in range(1, len(tokens) - 1) if outside[index] and _may_mark_thousands(tokens, index)
    ]
    beside = {tokens[index + side].start for index in doubtful for side in (-1, 1)}
    if len(doubtful) > MAX_DOUBTFUL_COMMAS:
        raise NotationError("its commas can be read in many ways")
    readings: list[Parts] = []
    for count in range(len(doubtful) + 1):
        for thousands in combinations(doubtful, count):
            joined = _joined(tokens, thousands)
            if joined is None:
                continue
            parts = split(joined, (",",))
            if possible(parts) and all(
                _is_number(token) for part in parts for token in part if token.start in beside
            ):
                readings.append(parts)
    if len(readings) != 1:
        if readings:
            raise NotationError("its commas can be read in two ways")
        raise NotationError("a comma does not belong there")
    return readings[0]


def _may_mark_thousands(tokens: Sequence[Token], index: int) -> bool:
    before, comma, after = tokens[index - 1 : index + 2]
    numbers = before.kind == after.kind == "number"
    return comma.text == "," and numbers and before.end == comma.start and comma.end == after.start


def _outside_brackets(tokens: Sequence[Token]) -> list[bool]:
    depth, outside = 0, []
    for token in tokens:
        depth += (token.text == "(") - (token.text == ")")
        outside.append(depth == 0)
    return outside


def _joined(tokens: Sequence[Token], thousands: Sequence[int]) -> list[Token] | None:
    """The tokens with the numbers around these commas made one; None where they do not make one."""
    joined: list[Token] = []
    marks = {index + side for index in thousands for side in (0, 1)}
    for index, token in enumerate(tokens):
        if index not in marks:
            joined.append(token)
            continue
        before = joined.pop()
        joined.append(Token("number", before.text + token.text, before.start, token.end))
    numbers = (token.text for token in joined if token.kind == "number" and "," in token.text)
    return joined if all(GROUPED.fullmatch(text) for text in numbers) else None


def _is_number(token: Token) -> bool:
    try:
        number_value(token.text)
    except NotationError:
        return False
    return True
