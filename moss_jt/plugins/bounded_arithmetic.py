"""Numbers within bounds, and the functions of them: what the calculator computes and the solver's numbers are.

Every number is bounded: huge powers and factorials are refused before they are computed.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from moss_jt.errors import ReasonedError

MAX_BITS = 4_096  # of a whole number, about 1233 decimal digits
MANY = 400  # arguments of max and its like

Number = int | float


class CalculationError(ReasonedError):
    """The expression is no arithmetic, or too large."""


def bounded(value: object) -> Number:
    """The value, where it is a real number within the bounds.

    Raises:
        CalculationError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CalculationError("the result is not a number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise CalculationError("the number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise CalculationError("the number is not finite")
    return value


def power(base: Number, exponent: Number) -> object:
    """``base**exponent``, unless it would be a huge whole number, or so small that it would be 0."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if abs(exponent) * abs(base).bit_length() > 2 * MAX_BITS:
            raise CalculationError("the power is too large")
    value = base**exponent
    if value == 0 and base != 0:
        raise CalculationError("the power is too small")
    return value


OPERATIONS: dict[str, Callable[[Number, Number], object]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "^": power,
}


@dataclass(frozen=True)
class Function:
    """A function of numbers, and how many arguments a call that makes sense has."""

    compute: Callable[..., object]
    least: int = 1
    most: int = 1


def _small(function: Callable[..., object], limit: int) -> Callable[..., object]:
    """A function of whole numbers whose cost grows with them."""

    def within(*values: Number) -> object:
        if any(abs(value) > limit for value in values):
            raise CalculationError("the argument is too large")
        return function(*values)

    return within


def _round(value: Number, digits: Number | None = None) -> object:
    """Python's round. A whole number is rounded by way of ten to the digits, so they are bounded."""
    if digits is not None and (not isinstance(digits, int) or abs(digits) > 400):
        raise CalculationError("that many digits are not there")
    return round(value, digits)


_ONE = (
    "acos acosh asin asinh atan atanh cbrt ceil cos cosh degrees erf erfc exp exp2 expm1 fabs floor gamma isqrt lgamma log10 "
    "log1p log2 radians sin sinh sqrt tan tanh trunc"
).split()
_MATH = {
    **{name: Function(getattr(math, name)) for name in _ONE},
    **{
        name: Function(getattr(math, name), 2, 2)
        for name in ("atan2", "copysign", "fmod", "pow", "remainder")
    },
    "log": Function(math.log, 1, 2),
    "hypot": Function(math.hypot, 2, MANY),
    "factorial": Function(_small(math.factorial, 500)),
    "comb": Function(_small(math.comb, 2_000), 2, 2),
    "perm": Function(_small(math.perm, 500), 1, 2),
    "gcd": Function(_small(math.gcd, 10**1200), 2, MANY),
    "lcm": Function(_small(math.lcm, 10**300), 2, MANY),
}
FUNCTIONS: dict[str, Function] = {
    **_MATH,
    **{f"math.{name}": function for name, function in _MATH.items()},
    "abs": Function(abs),
    "round": Function(_round, 1, 2),
    "max": Function(max, 2, MANY),
    "min": Function(min, 2, MANY),
    "pow": Function(power, 2, 2),  # Python's own, which keeps whole numbers whole; math.pow does not
    "int": Function(lambda value: int(value)),
    "float": Function(lambda value: float(value)),
    "ln": Function(math.log),
    "lg": _MATH["log10"],
    **{f"arc{name}": _MATH[f"a{name}"] for name in ("sin", "cos", "tan")},
}

CONSTANTS: dict[str, Number] = {"pi": math.pi, "π": math.pi, "e": math.e, "tau": math.tau}
CONSTANTS |= {f"math.{name}": CONSTANTS[name] for name in ("pi", "e", "tau")}
