"""The grammar of arithmetic as people type it, and its values: one for the calculator and the solver.

Sums, products, signs and powers bind as in Python; ``^`` is a power, too. A number, a name or a bracket before a name or a
bracket multiplies, ``!`` is a factorial, ``|x|`` an absolute value, ``√`` a root. What mathematicians read in two ways is not
read: ``6/2(1+2)``, ``2^3x``, ``√2x``, ``|a|b|c|``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import Any

from moss_jt.plugins.bounded_arithmetic import CONSTANTS, FUNCTIONS, OPERATIONS, CalculationError, bounded
from moss_jt.plugins.notation import (
    NotationError,
    Parts,
    Token,
    gaps,
    number_value,
    parted,
    superscript_value,
)

MAX_DEPTH = 40
MAX_BARS = 8  # four absolute values: every way to pair them is tried


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Name:
    """A constant, a variable or an unknown."""

    text: str


@dataclass(frozen=True, slots=True)
class Negative:
    """``-of``."""

    of: "Tree"


@dataclass(frozen=True, slots=True)
class Operation:
    """``left sign right``; the sign is one of ``arithmetic.OPERATIONS``."""

    sign: str
    left: "Tree"
    right: "Tree"


@dataclass(frozen=True, slots=True)
class Call:
    """``function(arguments)``."""

    function: str
    arguments: "tuple[Tree, ...]"


Tree = Number | Name | Negative | Operation | Call


def parse(tokens: Sequence[Token]) -> Tree:
    """The tree of one expression.

    Raises:
        NotationError: it is none, can be read in two ways, or is nested too deeply.
    """
    if sum(token.text == "|" for token in tokens) > MAX_BARS:
        raise NotationError("more than {limit} absolute values", limit=MAX_BARS // 2)
    return _Parser(tokens, 0).complete()


def nodes(tree: Tree) -> Iterator[Tree]:
    """The tree and all below it."""
    yield tree
    match tree:
        case Negative(of):
            yield from nodes(of)
        case Operation(_, left, right):
            yield from nodes(left)
            yield from nodes(right)
        case Call(_, arguments):
            for argument in arguments:
                yield from nodes(argument)


def has_unknowns(tree: Tree) -> bool:
    """Whether it has a name that is no constant."""
    return any(isinstance(node, Name) and node.text not in CONSTANTS for node in nodes(tree))


def one_part(parts: Parts) -> bool:
    """Where no comma may part anything."""
    return len(parts) == 1


def are_arguments(parts: Parts) -> bool:
    """Commas part arguments with spaces after them or without: ``hypot(1,5, 2,5)`` has commas of two kinds."""
    spaced = any(left and right and right[0].start > left[-1].end + 1 for left, right in pairwise(parts))
    return all(parts) and not (spaced and any(gaps(parts)))


def _is_fraction(tree: Tree) -> bool:
    """``1/2``, which before an unknown is its coefficient."""
    if not isinstance(tree, Operation) or tree.sign != "/":
        return False
    above = tree.left.of if isinstance(tree.left, Negative) else tree.left
    return isinstance(above, Number) and isinstance(tree.right, Number)


def _pairings(tokens: Sequence[Token]) -> Iterator[frozenset[int]]:
    """Each choice of the bars outside brackets that begin an absolute value, so that every one of them has an end."""
    depths = accumulate((token.text == "(") - (token.text == ")") for token in tokens)
    bars = [
        at
        for at, (token, depth) in enumerate(zip(tokens, depths, strict=True))
        if token.text == "|" and depth == 0
    ]
    for opening in combinations(bars, len(bars) // 2):
        open_now = accumulate(1 if at in opening else -1 for at in bars)
        if len(bars) % 2 == 0 and all(count >= 0 for count in open_now):
            yield frozenset(opening)


class _Parser:
    """Recursive descent over the tokens of one expression: sum, product, sign, power, atom."""

    def __init__(self, tokens: Sequence[Token], depth: int) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = self.outer = depth
        self.opening: frozenset[int] = frozenset()  # indices of the bars that begin an absolute value
        self.loose = False  # the last factor may reach further: 2^3x, √2x

    @property
    def sign(self) -> str:
        """The sign that comes next; empty for anything else."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        return token.text if token is not None and token.kind == "sign" else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else "end"

    def take(self) -> Token:
        if self.at == len(self.tokens):
            raise NotationError("something is missing at the end")
        self.at += 1
        return self.tokens[self.at - 1]

    def complete(self) -> Tree:
        """The tree of all tokens; which bars begin an absolute value and which end one must be clear."""
        readings, error = [], NotationError("an absolute value has no end")
        for opening in _pairings(self.tokens):
            try:
                readings.append(self.read(opening))
            except NotationError as fault:
                error = fault
        if not readings:
            raise error
        if len(readings) > 1:
            raise NotationError("absolute values can be read in two ways")
        return readings[0]

    def read(self, opening: frozenset[int]) -> Tree:
        self.opening, self.at, self.depth = opening, 0, self.outer
        tree = self.sum()
        if self.at < len(self.tokens):
            raise NotationError("{text!r} does not belong there", text=self.tokens[self.at].text)
        return tree

    def sum(self) -> Tree:
        tree = self.product()
        while self.sign in ("+", "-"):
            sign = self.take().text
            tree = Operation(sign, tree, self.product())
        return tree

    def product(self) -> Tree:
        tree, divided = self.signed(), False
        while True:
            if self.sign in ("*", "/", "//"):
                sign = self.take().text
                tree, divided = Operation(sign, tree, self.signed()), sign != "*"
            elif self.kind == "name" or self.sign in ("(", "√") or self.opens():
                if self.loose or self.tokens[self.at - 1].text.endswith("."):
                    raise NotationError("a product can be read in two ways")
                factor = self.power()
                if divided and not (_is_fraction(tree) and has_unknowns(factor)):
                    raise NotationError("a quotient can be read in two ways")
                tree, divided = Operation("*", tree, factor), False
            else:
                return tree

    def opens(self) -> bool:
        return self.sign == "|" and self.at in self.opening

    def signed(self) -> Tree:
        negative = False
        while self.sign in ("+", "-"):
            negative ^= self.take().text == "-"
        tree = self.power()
        return Negative(tree) if negative else tree

    def power(self) -> Tree:
        self.loose = False
        base = self.raised()
        if self.sign not in ("^", "**"):
            return base
        self.take()
        bracketed = self.sign == "("
        self.nest(1)
        exponent = self.signed()
        self.nest(-1)
        self.loose = not bracketed and not has_unknowns(base)
        return Operation("^", base, exponent)

    def raised(self) -> Tree:
        """An atom with its factorial and its superscript."""
        tree = self.atom()
        if self.sign == "!":
            self.take()
            tree = Call("factorial", (tree,))
        if self.kind == "superscript":
            tree = Operation("^", tree, Number(superscript_value(self.take().text)))
            if self.kind == "superscript" or self.sign in ("^", "**", "!"):
                raise NotationError("a power can be read in two ways")
        if self.sign == "!":
            raise NotationError("a double factorial is something else")
        return tree

    def atom(self) -> Tree:
        token = self.take()
        if token.kind == "number":
            return Number(number_value(token.text))
        if token.kind == "name":
            return self.named(token.text)
        if token.text == "(":
            return self.bracket(one_part)[0]
        if token.text == "|" and self.at - 1 in self.opening:
            return self.absolute()
        if token.text == "√":
            return self.root()
        raise NotationError("{text!r} stands where a number is needed", text=token.text)

    def named(self, name: str) -> Tree:
        if self.sign != "(":
            return Name(name)
        if name in FUNCTIONS:
            self.take()
            least, most = FUNCTIONS[name].least, FUNCTIONS[name].most
            arguments = self.bracket(lambda parts: least <= len(parts) <= most and are_arguments(parts))
            return Call(name, tuple(arguments))
        if name == "f" or (len(name) > 1 and name[-1].isalpha() and name not in CONSTANTS):
            raise NotationError("the function {name} is unknown", name=name)  # f(2)=4 is no product
        return Name(name)

    def bracket(self, possible: Callable[[Parts], bool]) -> list[Tree]:
        """What stands between the bracket that was just taken and its end."""
        inside = self.tokens[self.at : self.closing()]
        self.at += len(inside) + 1
        self.nest(1)
        trees = [_Parser(part, self.depth).complete() for part in parted(inside, possible)]
        self.nest(-1)
        return trees

    def closing(self) -> int:
        depth = 1
        for index in range(self.at, len(self.tokens)):
            depth += (self.tokens[index].text == "(") - (self.tokens[index].text == ")")
            if depth == 0:
                return index
        raise NotationError("a bracket is not closed")

    def absolute(self) -> Tree:
        self.nest(1)
        tree = self.sum()
        self.nest(-1)
        if self.opens() or self.take().text != "|":
            raise NotationError("an absolute value has no end")
        self.loose = False
        return Call("abs", (tree,))

    def root(self) -> Tree:
        bracketed = self.sign == "("
        self.nest(1)
        tree = self.atom()
        self.nest(-1)
        if not bracketed and (
            self.kind == "superscript" or self.sign in ("^", "**", "!", "(") or self.kind == "name"
        ):
            raise NotationError("a root can be read in two ways")
        return Call("sqrt", (tree,))

    def nest(self, by: int) -> None:
        self.depth += by
        if self.depth > MAX_DEPTH:
            raise NotationError("it is nested too deeply")


class Evaluator:
    """Computes trees of numbers. What else a name may be, and what is done with that, is a subclass's."""

    def value(self, tree: Tree) -> Any:
        """The tree's value.

        Raises:
            CalculationError: a name or a call is unknown, or a number is too large.
            ArithmeticError, ValueError, TypeError: as Python's operators and functions do.
        """
        match tree:
            case Number(value):
                return bounded(value)
            case Name(text):
                return self.name(text)
            case Negative(of):
                return -self.value(of)
            case Operation(sign, left, right):
                return self.operation(sign, self.value(left), self.value(right))
            case Call(function, arguments):
                return self.call(function, [self.value(argument) for argument in arguments])

    def name(self, name: str) -> Any:
        if name in CONSTANTS:
            return CONSTANTS[name]
        raise CalculationError("{name} is unknown", name=name)

    def operation(self, sign: str, left: Any, right: Any) -> Any:
        return bounded(OPERATIONS[sign](left, right))

    def call(self, function: str, arguments: list[Any]) -> Any:
        return bounded(FUNCTIONS[function].compute(*arguments))
