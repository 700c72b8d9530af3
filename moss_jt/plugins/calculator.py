"""Calculate(expression): Python's arithmetic over numbers and the functions of ``math``, evaluated by a walk over the parsed text.

Nothing is compiled or executed, and every number is bounded: huge powers and factorials are refused before they are computed.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

from moss_jt.plugins.interface import Outcome, Style

MAX_CHARACTERS = 1_000
MAX_DEPTH = 60
MAX_NODES = 400
MAX_BITS = 4_096  # of a whole number, about 1233 decimal digits

# Nothing but arithmetic reaches Python's parser. A percent sign is refused, as recorded: it would be a remainder where people
# mean hundredths.
ARITHMETIC = re.compile(r"[0-9A-Za-z_+\-*/^().,;=\s]+")
# A number that runs into a letter, and is neither 1e5 nor 0b101; Python's parser would warn on standard error.
NUMBER_INTO_NAME = re.compile(
    r"(?<![A-Za-z0-9_.])(?!0(?:[xX][0-9A-Fa-f]+|[bB][01]+|[oO][0-7]+)(?![A-Za-z0-9_]))[0-9.]+(?![eE][+-]?[0-9])[A-Za-z_]"
)
SIGNS_OF_ARITHMETIC = str.maketrans("×÷−（），；", "*/-(),;")

Number = int | float


class CalculationError(ValueError):
    """The expression is no arithmetic, or too large."""


def _bounded(value: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CalculationError("the result is no number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise CalculationError("the number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise CalculationError("the number is not finite")
    return value


def _power(base: Number, exponent: Number) -> object:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if abs(exponent) * abs(base).bit_length() > 2 * MAX_BITS:
            raise CalculationError("the power is too large")
    return base**exponent


def _small(function: Callable[..., object], limit: int) -> Callable[..., object]:
    """A function of whole numbers whose cost grows with them."""

    def bounded(*values: Number) -> object:
        if any(abs(value) > limit for value in values):
            raise CalculationError("the argument is too large")
        return function(*values)

    return bounded


def _round(value: Number, digits: Number = 0) -> object:
    """Python's round: whole without digits. A whole number is rounded by way of ten to the digits, so they are bounded."""
    if not isinstance(digits, int) or abs(digits) > 400:
        raise CalculationError("that many digits are not there")
    return round(value, digits) if digits else round(value)


OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
SIGNS: dict[type[ast.unaryop], Callable[[Number], object]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_COSTLY = {"factorial": 500, "comb": 2_000, "perm": 500, "gcd": 10**1200, "lcm": 10**300}
_PLAIN = (
    "acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees dist erf erfc exp expm1 fabs floor fmod gamma hypot "
    "lgamma log log10 log1p log2 pow radians remainder sin sinh sqrt tan tanh trunc cbrt exp2 isqrt"
)
FUNCTIONS: dict[str, Callable[..., object]] = {
    **{name: getattr(math, name) for name in _PLAIN.split() if name != "dist" and hasattr(math, name)},
    **{name: _small(getattr(math, name), limit) for name, limit in _COSTLY.items()},
    "abs": abs,
    "round": _round,
    "max": max,
    "min": min,
    "pow": lambda base, exponent: _power(base, exponent),
    "int": lambda value: int(value),
    "float": lambda value: float(value),
}


def calculate(expression: str) -> str:
    """The value of an expression as Python prints it: ``36``, ``10.0``, ``20.784609690826528``.

    ``^`` is a power; ``a=3;b=4;sqrt(a*a+b*b)`` assigns and then gives the last part's value.

    Raises:
        CalculationError: it is no arithmetic, a name is unknown, or a number is too large.
    """
    if len(expression) > MAX_CHARACTERS or not expression.strip():
        raise CalculationError("the expression is empty or too long")
    text = expression.translate(SIGNS_OF_ARITHMETIC).strip()
    if not ARITHMETIC.fullmatch(text) or NUMBER_INTO_NAME.search(text) or text.endswith(";"):
        raise CalculationError("this is no arithmetic")
    text = text.replace("^", "**")
    if _depth(text) > MAX_DEPTH:
        raise CalculationError("the expression is nested too deeply")
    try:
        tree = ast.parse(text, mode="exec")
        value = _run(tree)
    except CalculationError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise CalculationError(str(error)) from error
    return str(value)


def _depth(text: str) -> int:
    """How deeply the parser would nest: brackets, and runs of signs and powers."""
    depth = deepest = run = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        run = run + 1 if character in "+-~* " else 0
        deepest = max(deepest, depth + run // 2)
    return max(deepest, text.count("**") // 2)


def _run(tree: ast.Module) -> Number:
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise CalculationError("the expression is too long")
    names: dict[str, Number] = {}
    value: Number | None = None
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if not isinstance(target, ast.Name):
                raise CalculationError("only names can be assigned to")
            names[target.id] = _value(statement.value, names)
            value = None
        elif isinstance(statement, ast.Expr):
            value = _value(statement.value, names)
        else:
            raise CalculationError("this is no arithmetic")
    if value is None:
        raise CalculationError("nothing is computed")
    return value


def _value(node: ast.expr, names: dict[str, Number]) -> Number:
    if isinstance(node, ast.Constant):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        if node.id in CONSTANTS:
            return CONSTANTS[node.id]
        raise CalculationError(f"{node.id} is unknown")
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = _value(node.left, names), _value(node.right, names)
        return _bounded(OPERATIONS[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return _bounded(SIGNS[type(node.op)](_value(node.operand, names)))
    if isinstance(node, ast.Call):
        return _called(node, names)
    raise CalculationError("this is no arithmetic")


def _called(node: ast.Call, names: dict[str, Number]) -> Number:
    function = node.func
    if (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "math"
    ):
        name = function.attr
    elif isinstance(function, ast.Name):
        name = function.id
    else:
        raise CalculationError("this is no function")
    if name not in FUNCTIONS or node.keywords or name in names:
        raise CalculationError(f"{name} is unknown")
    return _bounded(FUNCTIONS[name](*[_value(argument, names) for argument in node.args]))


class Calculator:
    """The plugin."""

    name = "calculator"
    label = "Calculator"
    function = "Calculate"
    argument = "expression"
    style: Style = "value"
    timeout_s = 5.0

    def call(self, argument: str, wanted: int) -> Outcome:
        return Outcome(text=calculate(argument))
