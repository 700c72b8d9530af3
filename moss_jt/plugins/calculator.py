"""Calculate(expression): Python's arithmetic over numbers and the functions of ``math``, by a grammar of our own.

Nothing is compiled or executed, and every number is bounded (moss_jt.plugins.bounded_arithmetic).
"""

from moss_jt.plugins.bounded_arithmetic import CalculationError, Number
from moss_jt.plugins.expressions import Evaluator, one_part, parse
from moss_jt.plugins.interface import Outcome, Style
from moss_jt.plugins.notation import NotationError, Token, parted, read, split

MAX_CHARACTERS = 1_000


class _Variables(Evaluator):
    """Values with what was assigned before."""

    def __init__(self) -> None:
        self.names: dict[str, Number] = {}

    def name(self, name: str) -> Number:
        return self.names[name] if name in self.names else super().name(name)

    def call(self, function: str, arguments: list[Number]) -> Number:
        if function in self.names:
            raise CalculationError("{name} is a variable", name=function)
        value: Number = super().call(function, arguments)
        return value


def calculate(expression: str) -> str:
    """The value of an expression as Python prints it: ``36``, ``10.0``, ``20.784609690826528``.

    ``^`` is a power; ``a=3;b=4;sqrt(a*a+b*b)`` assigns and then gives the last part's value. What people add to Python's
    arithmetic is in moss_jt.plugins.notation and moss_jt.plugins.expressions.

    Raises:
        CalculationError: it is no arithmetic, can be read in two ways, a name is unknown, or a number is too large.
    """
    if len(expression) > MAX_CHARACTERS or not expression.strip():
        raise CalculationError("the expression is empty or too long")
    try:
        tokens = read(expression)
        _check_exponents(tokens)
        return str(_last_value(split(tokens, (";", "\n"))))
    except CalculationError:
        raise
    except NotationError as error:
        raise CalculationError(error.reason) from error
    except ZeroDivisionError as error:
        raise CalculationError("division by zero") from error
    except (ArithmeticError, MemoryError) as error:
        raise CalculationError("the number is too large") from error
    except (ValueError, TypeError) as error:
        raise CalculationError("a function has no value for such a number") from error


def _check_exponents(tokens: list[Token]) -> None:
    """``1e`` is a number that was cut off, unless a power follows: ``2e^3``."""
    for number, name, after in zip(tokens, tokens[1:], [*tokens[2:], None], strict=False):
        powered = after is not None and (after.kind == "superscript" or after.text in ("^", "**"))
        if number.kind == "number" and name.text == "e" and number.end == name.start and not powered:
            raise CalculationError("a number is cut off")


def without_question(tokens: list[Token]) -> list[Token]:
    """``1+1=?`` without what asks: the equals sign, the question mark, or both at its end."""
    for sign in ("?", "="):
        if len(tokens) > 1 and tokens[-1].text == sign:
            tokens = tokens[:-1]
    return tokens


def _last_value(statements: list[list[Token]]) -> Number:
    *assignments, last = statements
    variables = _Variables()
    for statement in assignments:
        target, *sides = split(statement, ("=",))
        if len(target) != 1 or target[0].kind != "name" or "." in target[0].text or len(sides) != 1:
            raise CalculationError("a part before the last assigns nothing")
        variables.names[target[0].text] = _value(sides[0], variables)
    return _value(without_question(last), variables)


def _value(tokens: list[Token], variables: _Variables) -> Number:
    value: Number = variables.value(parse(parted(tokens, one_part)[0]))
    return value


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
