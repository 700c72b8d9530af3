"""Equations as MOSS and people write them, parsed by our own grammar and solved by sympy. Runs in a worker process with limits.

Equations stand between ``;`` or ``,``; parts without ``=`` are passed over, unless they are numbers; letters join into names.
sympy's own parser evaluates code, so none of the text reaches it: the tree (moss_jt.plugins.expressions) is computed here with
numbers, symbols and a few functions.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from moss_jt.plugins.bounded_arithmetic import CONSTANTS, FUNCTIONS, OPERATIONS
from moss_jt.plugins.calculator import without_question
from moss_jt.plugins.expressions import Call, Evaluator, Name, Operation, Tree, has_unknowns, nodes, parse
from moss_jt.plugins.notation import SCIENTIFIC, Parts, Token, gaps, parted, read, split

MAX_CHARACTERS = 500
MAX_TOKENS = 200
MAX_NUMBER_CHARACTERS = 40
MAX_UNKNOWNS = 12
MAX_EXPONENT = 64
MAX_ROOTS = 20
MAX_SOLUTIONS = 4  # of a system
MAX_VALUE_CHARACTERS = 80  # of an exact value: the roots of a quartic fill a page, and no model reads that
DIGITS = 15  # of a value that is too long to print exactly, as sympy prints floats

# Of what holds unknowns; numbers stay Python's floats, as in the recorded answers.
SYMBOLIC: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(sympy, name)
        for name in "sqrt sin cos tan asin acos atan sinh cosh tanh log exp cbrt".split()
    },
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": lambda value: sympy.log(value),
    "lg": lambda value: sympy.log(value, 10),
    "log10": lambda value: sympy.log(value, 10),
    "log2": lambda value: sympy.log(value, 2),
    "abs": sympy.Abs,
    "pow": lambda base, exponent: _power(base, exponent),
}
# Words for what is no number: sympy prints them, and nobody asks for their value.
NO_UNKNOWNS = frozenset(("oo", "zoo", "nan", "inf", "infinity"))
# Names that sympy prints for constants: a solution that has one may not hold an unknown of that name, too.
PRINTED_CONSTANTS = {"I": sympy.I, "E": sympy.E}


class EquationError(ValueError):
    """The text is no equation, or beyond the bounds."""


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, int | float) and abs(exponent) > MAX_EXPONENT:
        raise EquationError("the exponent is too large")
    return base**exponent


class _Symbols(Evaluator):
    """Values with unknowns in them; ``e`` is Euler's number where the text says so."""

    def __init__(self, euler: bool, real: bool) -> None:
        self.euler = euler
        self.real = real or None  # sympy solves for absolute values of real numbers only
        self.unknowns: dict[str, Any] = {}

    def name(self, name: str) -> Any:
        if (name in CONSTANTS and name not in ("e", "tau")) or (name == "e" and self.euler):
            return CONSTANTS[name]
        if name in SYMBOLIC or "." in name or name.casefold() in NO_UNKNOWNS:
            raise EquationError(f"{name} is no unknown")
        return self.unknowns.setdefault(name, sympy.Symbol(name, real=self.real))

    def operation(self, sign: str, left: Any, right: Any) -> Any:
        if all(isinstance(value, int | float) for value in (left, right)):
            return super().operation(sign, left, right)
        if sign == "//":
            raise EquationError("// is for numbers")
        if sign != "^":
            return OPERATIONS[sign](left, right)
        return sympy.exp(right) if left == math.e else _power(left, right)

    def call(self, function: str, arguments: list[Any]) -> Any:
        if all(isinstance(value, int | float) for value in arguments):
            return super().call(function, arguments)
        name = function.removeprefix("math.")
        if name not in SYMBOLIC:
            raise EquationError(f"{name} is for numbers")
        return SYMBOLIC[name](*arguments)


def _equations(text: str) -> tuple[list[tuple[Tree, Tree]], list[list[Token]]]:
    """(both sides of each equation, the parts that are none)."""
    if len(text) > MAX_CHARACTERS:
        raise EquationError("the text is too long")
    tokens = read(re.split(r"[\"“”＂]|'\s*[,，]", text)[0])  # a second argument only names the unknown
    if len(tokens) > MAX_TOKENS or any(_too_long(token) for token in tokens):
        raise EquationError("the equation or a number is too long, or in another base")
    equations, others = [], []
    for line in split(tokens, (";", "\n")):
        for part in parted(line, _can_be_equations):
            sides = split(without_question(part), ("=",))
            if len(sides) == 1:
                others.append(sides[0])
            elif len(sides) == 2:
                equations.append((parse(sides[0]), parse(sides[1])))
            else:
                raise EquationError("an equation has two sides")
    others = [part for part in others if part]
    if (len(others) > 1 or equations) and not all(_passed_over(part) for part in others):
        raise EquationError("a number would be passed over")
    euler = _is_euler([side for sides in equations for side in sides])
    _check_exponents(tokens, euler)
    return equations, others


def _too_long(token: Token) -> bool:
    """Numbers of other bases count as such: 0x1 may be no times x1."""
    return token.kind == "number" and (
        len(token.text) > MAX_NUMBER_CHARACTERS or token.text[1:2].lower() in ("x", "b", "o")
    )


def _passed_over(part: Sequence[Token]) -> bool:
    return any(token.kind == "name" for token in part)


def _can_be_equations(parts: Parts) -> bool:
    """Each part has two sides, or is passed over; beside a comma that touches digits, as in 2,5, only what has two sides."""
    sides = [len(split(without_question(part), ("=",))) for part in parts]
    if len(parts) == 1:
        return sides[0] <= 2
    two_sided = [count == 2 for count in sides]
    if not all(two_sided[comma] and two_sided[comma + 1] for comma, tight in enumerate(gaps(parts)) if tight):
        return False
    return all(two or not part or _passed_over(part) for two, part in zip(two_sided, parts, strict=True))


def _check_exponents(tokens: Sequence[Token], euler: bool) -> None:
    """``2e3`` is 2000, unless the text has an unknown e3, or an unknown e and a sign: ``2e+3``."""
    numbers = [token.text for token in tokens if token.kind == "number" and SCIENTIFIC.fullmatch(token.text)]
    names = {token.text.lower() for token in tokens if token.kind == "name"}
    if numbers and any(re.fullmatch(r"e[0-9]+", name) for name in names):
        raise EquationError("a number can be read as a product")
    signed = any(re.search(r"[eE][-+]", text) for text in numbers)
    if signed and "e" in names and not euler:
        raise EquationError("a number can be read as a sum")


def _is_euler(trees: Sequence[Tree]) -> bool:
    """Whether e is Euler's number: it stands under exponents only, and one of them has an unknown."""
    everywhere = sum(1 for tree in trees for node in nodes(tree) if node == Name("e"))
    exponents = [
        node.right
        for tree in trees
        for node in nodes(tree)
        if isinstance(node, Operation) and node.sign == "^" and node.left == Name("e")
    ]
    return 0 < everywhere == len(exponents) and any(has_unknowns(exponent) for exponent in exponents)


def _values(trees: Sequence[Tree]) -> tuple[list[Any], _Symbols]:
    absolute = any(
        isinstance(node, Call) and node.function == "abs" for tree in trees for node in nodes(tree)
    )
    symbols = _Symbols(_is_euler(trees), absolute)
    return [symbols.value(tree) for tree in trees], symbols


def solve_equations(text: str) -> str:
    """The answer's lines, ``name = value``, as trained: one unknown with several roots counts them ``x_0``, ``x_1``.

    The recorded service left systems with several solutions unanswered; ours counts these in the same way. Of arithmetic
    without an unknown the line is ``1+1 = 2``.

    Raises:
        EquationError, CalculationError, NotationError: no fully determined answer, or too many.
    """
    equations, others = _equations(text)
    if not equations and len(others) == 1:
        return _arithmetic(others[0])
    values, symbols = _values([side for sides in equations for side in sides])
    differences = [sympy.sympify(left - right) for left, right in zip(values[::2], values[1::2], strict=True)]
    if not symbols.unknowns or len(symbols.unknowns) > MAX_UNKNOWNS:
        raise EquationError("there is nothing to solve")
    unknowns = [symbols.unknowns[name] for name in sorted(symbols.unknowns)]
    if len(unknowns) == 1:
        return _roots(differences, unknowns[0])
    solutions = sympy.solve(differences, unknowns, dict=True)
    if not 0 < len(solutions) <= MAX_SOLUTIONS or any(
        set(solution) != set(unknowns) for solution in solutions
    ):
        raise EquationError("there is no answer, or too many")
    if any(value.free_symbols for solution in solutions for value in solution.values()):
        raise EquationError("the equations do not determine every unknown")
    if len(solutions) == 1:
        return "\n".join(f"{unknown} = {_printed(solutions[0][unknown], unknowns)}" for unknown in unknowns)
    return "\n".join(
        f"{unknown}_{number} = {_printed(solution[unknown], unknowns)}"
        for number, solution in enumerate(solutions)
        for unknown in unknowns
    )


def _arithmetic(tokens: list[Token]) -> str:
    if _passed_over(tokens) and any(
        token.text not in FUNCTIONS and token.text not in CONSTANTS
        for token in tokens
        if token.kind == "name"
    ):
        raise EquationError("there is nothing to solve")
    value = Evaluator().value(parse(tokens))
    return f"{''.join(token.text for token in tokens)} = {value}"


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
        return f"{unknown} = {_printed(roots[0], [unknown])}"
    return "\n".join(f"{unknown}_{number} = {_printed(root, [unknown])}" for number, root in enumerate(roots))


def _printed(value: Any, unknowns: Sequence[Any]) -> str:
    """A value as sympy prints it; as a decimal number where it is too long, or a root that has no formula."""
    if value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        raise EquationError("the answer is no number")
    if any(
        str(unknown) in PRINTED_CONSTANTS and value.has(PRINTED_CONSTANTS[str(unknown)])
        for unknown in unknowns
    ):
        raise EquationError("a constant and an unknown have one name")
    text = str(value)
    if len(text) <= MAX_VALUE_CHARACTERS and not value.has(sympy.CRootOf):
        return text
    number = sympy.N(value, DIGITS)
    if not number.is_number or len(str(number)) > MAX_VALUE_CHARACTERS:
        raise EquationError("the answer cannot be printed")
    return str(number)
