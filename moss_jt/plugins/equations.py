"""Equations as MOSS writes them, parsed by our own grammar and solved by sympy. Runs in a worker process with limits.

Equations stand between ``;`` or ``,``; parts without ``=`` are passed over; ``^`` is a power; a number before a letter or a
bracket, and a bracket before a letter or a bracket, multiply; letters join into names. sympy's own parser evaluates code, so
none of the text reaches it: the tree is built here from numbers, symbols and a few functions.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

MAX_CHARACTERS = 500
MAX_TOKENS = 200
MAX_DEPTH = 40
MAX_UNKNOWNS = 12
MAX_EXPONENT = 64
MAX_ROOTS = 20
MAX_SOLUTIONS = 4  # of a system
MAX_VALUE_CHARACTERS = 80  # of an exact value: the roots of a quartic fill a page, and no model reads that
DIGITS = 15  # of a value that is too long to print exactly, as sympy prints floats

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<name>[^\W\d_]+\d*)|(?P<operator>\*\*|[-+*/^()=]))"
)
# For numbers and for what holds unknowns: as in the recorded answers, numbers stay Python's floats.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "sqrt": (math.sqrt, sympy.sqrt),
    "sin": (math.sin, sympy.sin),
    "cos": (math.cos, sympy.cos),
    "tan": (math.tan, sympy.tan),
    "log": (math.log, sympy.log),
    "ln": (math.log, sympy.log),
    "exp": (math.exp, sympy.exp),
    "abs": (abs, sympy.Abs),
}
CONSTANTS = {"pi": math.pi}
SIGNS = str.maketrans(
    {
        "＝": "=",
        "（": "(",
        "）": ")",
        "；": ";",
        "，": ",",
        "×": "*",
        "÷": "/",
        "−": "-",
        "＋": "+",
        "²": "^2",
        "³": "^3",
    }
)


class EquationError(ValueError):
    """The text is no equation, or beyond the bounds."""


@dataclass
class _Parser:
    """Recursive descent over the tokens of one side: sum, product, power, atom."""

    tokens: list[tuple[str, str]]
    symbols: dict[str, Any]
    at: int = 0
    depth: int = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.at += 1
        return token

    def whole(self) -> Any:
        value = self.sum()
        if self.peek()[0] != "end":
            raise EquationError(f"{self.peek()[1]!r} does not belong there")
        return value

    def sum(self) -> Any:
        value = self.product()
        while self.peek()[1] in ("+", "-"):
            sign = self.take()[1]
            right = self.product()
            value = value + right if sign == "+" else value - right
        return value

    def product(self) -> Any:
        value = self.signed()
        while True:
            kind, text = self.peek()
            if text in ("*", "/"):
                self.take()
                right = self.signed()
                value = value * right if text == "*" else value / right
            elif kind in ("name", "number") or text == "(":
                value = value * self.power()
            else:
                return value

    def signed(self) -> Any:
        sign = 1
        while self.peek()[1] in ("+", "-"):
            sign = -sign if self.take()[1] == "-" else sign
        value = self.power()
        return value if sign == 1 else -value

    def power(self) -> Any:
        base = self.atom()
        if self.peek()[1] not in ("^", "**"):
            return base
        self.take()
        self.nest(1)
        exponent = self.signed()
        self.nest(-1)
        if isinstance(exponent, int | float) and abs(exponent) > MAX_EXPONENT:
            raise EquationError("the exponent is too large")
        return base**exponent

    def atom(self) -> Any:
        kind, text = self.take()
        if kind == "number":
            if len(text) > 40:
                raise EquationError("the number is too long")
            return float(text) if "." in text else int(text)
        if text == "(":
            return self.bracket()
        if kind != "name":
            raise EquationError(f"{text or 'the end'!r} stands where a number is needed")
        if text in FUNCTIONS and self.peek()[1] == "(":
            self.take()
            value = self.bracket()
            return FUNCTIONS[text][0 if isinstance(value, int | float) else 1](value)
        if text in CONSTANTS:
            return CONSTANTS[text]
        return self.symbols.setdefault(text, sympy.Symbol(text))

    def bracket(self) -> Any:
        self.nest(1)
        value = self.sum()
        self.nest(-1)
        if self.take()[1] != ")":
            raise EquationError("a bracket is not closed")
        return value

    def nest(self, by: int) -> None:
        self.depth += by
        if self.depth > MAX_DEPTH:
            raise EquationError("the equation is nested too deeply")


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise EquationError(f"{text[at : at + 10]!r} is not understood")
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    if len(found) > MAX_TOKENS:
        raise EquationError("the equation is too long")
    return found


def parse_equations(text: str) -> tuple[list[Any], list[Any]]:
    """(differences of both sides, unknowns by name) of a system.

    Raises:
        EquationError: the text is outside the grammar or its bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise EquationError("the text is too long")
    text = text.split('"')[0]  # a second argument only names the unknown
    symbols: dict[str, Any] = {}
    differences = []
    for part in re.split(r"[;,\n]", text.translate(SIGNS)):
        sides = part.split("=")
        if len(sides) == 1:
            continue
        if len(sides) != 2:
            raise EquationError("an equation has two sides")
        left, right = (_Parser(_tokens(side), symbols).whole() for side in sides)
        differences.append(sympy.sympify(left - right))
    if not differences or not symbols or len(symbols) > MAX_UNKNOWNS:
        raise EquationError("there is nothing to solve")
    return differences, [symbols[name] for name in sorted(symbols)]


def solve_equations(text: str) -> str:
    """The answer's lines, ``name = value``, as trained: one unknown with several roots counts them ``x_0``, ``x_1``.

    The recorded service left systems with several solutions unanswered; ours counts these in the same way.

    Raises:
        EquationError: no fully determined answer, or too many.
    """
    differences, unknowns = parse_equations(text)
    if len(unknowns) == 1:
        return _roots(differences, unknowns[0])
    solutions = sympy.solve(differences, unknowns, dict=True)
    if not 0 < len(solutions) <= MAX_SOLUTIONS or any(set(found) != set(unknowns) for found in solutions):
        raise EquationError("there is no answer, or too many")
    if any(value.free_symbols for found in solutions for value in found.values()):
        raise EquationError("the equations do not determine every unknown")
    if len(solutions) == 1:
        return "\n".join(f"{unknown} = {_printed(solutions[0][unknown])}" for unknown in unknowns)
    return "\n".join(
        f"{unknown}_{number} = {_printed(found[unknown])}"
        for number, found in enumerate(solutions)
        for unknown in unknowns
    )


def _roots(differences: list[Any], unknown: Any) -> str:
    if len(differences) == 1:
        roots = sympy.solve(differences[0], unknown)
    else:
        roots = [solution[unknown] for solution in sympy.solve(differences, [unknown], dict=True)]
    if (
        not roots
        or len(roots) > MAX_ROOTS
        or any(not hasattr(root, "free_symbols") or root.free_symbols for root in roots)
    ):
        raise EquationError("there is no answer")
    if len(roots) == 1:
        return f"{unknown} = {_printed(roots[0])}"
    return "\n".join(f"{unknown}_{number} = {_printed(root)}" for number, root in enumerate(roots))


def _printed(value: Any) -> str:
    """A value as sympy prints it; as a decimal number where it is too long, or a root that has no formula."""
    text = str(value)
    if len(text) <= MAX_VALUE_CHARACTERS and not value.has(sympy.CRootOf):
        return text
    number = sympy.N(value, DIGITS)
    if not number.is_number or len(str(number)) > MAX_VALUE_CHARACTERS:
        raise EquationError("the answer cannot be printed")
    return str(number)
