"""Arithmetic as people type it, beside what it means in Python: random cases for the calculator and the solver.

Every case is made twice at once: the same sum of the same products in Python's own writing, which Python itself computes, and
in one of the many writings that people use.
"""

import math
import random
import re
from dataclasses import dataclass
from typing import Any

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_ONE_SPACE = str.maketrans("\u00a0\u2009", "  ")
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def _absolute(value: Any) -> Any:
    """Python's, but for complex numbers, which the calculator does not have."""
    if isinstance(value, complex):
        raise ValueError
    return abs(value)


PYTHON = {
    **{name: getattr(math, name) for name in dir(math) if not name.startswith("_")},
    **{
        "abs": _absolute,
        "round": round,
        "max": max,
        "min": min,
        "pow": pow,
        "math": math,
        "__builtins__": {},
    },
}
ONE_ARGUMENT = (
    "sqrt sin cos tan log exp floor ceil log10 log2 degrees radians atan tanh abs round cbrt trunc".split()
)
TWO_ARGUMENTS = "hypot max min pow gcd comb atan2 fmod round log lcm".split()


@dataclass(frozen=True)
class Case:
    """``typed`` means ``python``; ``certain`` where there is but one way to read it."""

    typed: str
    python: str
    certain: bool


class Typist:
    """Writes numbers and operations as people do, from a random generator."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.certain = True
        self.names: list[str] = []

    def chance(self, of: float) -> bool:
        return self.draw.random() < of

    def one(self, *choices: str) -> str:
        return self.draw.choice(choices)

    def whole(self) -> tuple[str, str]:
        """A whole number: 1234567 as 1,234,567, as 1 234 567, in full width, in hexadecimal.."""
        value = self.draw.choice(
            (self.draw.randrange(10), self.draw.randrange(1000), self.draw.randrange(10**7))
        )
        python = str(value)
        mark = self.one("", "", "", ",", " ", "'", "’", "_", "，", "\u00a0", "\u2009")
        typed = f"{value:,}".replace(",", mark) if mark else python
        if self.chance(0.05):
            return python, typed.translate(FULL_WIDTH)
        if self.chance(0.03):
            return python, self.one(hex(value), bin(value), oct(value))
        return python, typed

    def number(self) -> tuple[str, str]:
        """Any number but a negative one."""
        kind = self.draw.choice((0, 0, 0, 0, 0, 0, 0, 0, 5, 5, 5, 8, 8, 9, 9, 10, 11, 11))
        if kind < 5:
            return self.whole()
        if kind < 8:
            text = f"{self.draw.randrange(10**4)}.{self.draw.randrange(1000)}"
            typed = f"{int(text.split('.')[0]):,}.{text.split('.')[1]}" if self.chance(0.2) else text
            return text, typed
        if kind == 8:
            text = f"{self.draw.randrange(1, 100)}{self.one('e', 'E')}{self.draw.randrange(-6, 7)}"
            return text, text
        if kind == 9:
            digits, (unit, ten) = (
                self.draw.randrange(1, 10_000),
                self.draw.choice((("万", 10**4), ("亿", 10**8), ("千", 10**3), ("万亿", 10**12))),
            )
            if self.chance(0.5):
                return str(digits * ten), f"{digits}{unit}"
            return str(digits * ten // 100), f"{digits // 100}.{digits % 100:02d}{unit}"
        below = self.draw.choice((2, 3, 4, 5, 6, 8))
        above = self.draw.randrange(1, below)
        whole = self.draw.randrange(1, 200)
        if kind == 10:
            self.certain = False  # beside / and powers it is not read
            return f"({whole}+{above}/{below})", f"{whole} {above}/{below}"
        sign, python = self.draw.choice(
            (("½", "1/2"), ("¼", "1/4"), ("¾", "3/4"), ("⅔", "2/3"), ("⅜", "3/8"))
        )
        return (f"({whole}+{python})", f"{whole}{sign}") if self.chance(0.5) else (f"({python})", sign)

    def atom(self, depth: int) -> tuple[str, str]:
        kind = self.draw.randrange(10) if depth else 0
        if kind < 5:
            if self.names and self.chance(0.3):
                name = self.draw.choice(self.names)
                return name, name
            if self.chance(0.06):
                return self.draw.choice((("pi", "pi"), ("pi", "π"), ("e", "e"), ("pi", "math.pi")))
            return self.number()
        if kind < 7:
            python, typed = self.sum(depth - 1)
            left, right = self.draw.choice((("(", ")"), ("（", "）")))
            return f"({python})", f"{left}{typed}{right}"
        if kind == 7:
            python, typed = self.sum(depth - 1)
            return self.draw.choice(
                (
                    (f"abs({python})", f"|{typed}|"),
                    (f"sqrt({python})", f"√({typed})"),
                    (f"log({python})", f"ln({typed})"),
                )
            )
        if kind == 8:
            name = self.draw.choice(ONE_ARGUMENT)
            python, typed = self.sum(depth - 1)
            self.certain &= not set(",，") & set(typed)
            return f"{name}({python})", f"{name}({typed})"
        name = self.draw.choice(TWO_ARGUMENTS)
        # Whole numbers of these would grow beyond what Python computes in an hour.
        small = name in ("pow", "comb", "lcm", "round")
        first, second = (
            (str(self.draw.randrange(200)),) * 2 if small else self.sum(depth - 1) for _ in range(2)
        )
        comma = self.one(", ", ", ", "，", ",")
        # Without a space it may be inside a number: 1,200.
        self.certain &= comma == ", " and not set(",，") & set(first[1] + second[1])
        return f"{name}({first[0]},{second[0]})", f"{name}({first[1]}{comma}{second[1]})"

    def power(self, depth: int) -> tuple[str, str]:
        python, typed = self.atom(depth)
        kind = self.draw.randrange(14)
        if kind == 0:
            exponent = self.draw.randrange(-3, 5)
            return f"{python}**{exponent}", f"{typed}{str(exponent).translate(RAISED)}"
        if kind == 1:
            exponent = self.one("2", "3", "0.5", "-1", "(1/3)", "2**2")
            sign = self.one("^", "**", "＾")
            return f"{python}**{exponent}", f"{typed}{sign}{exponent.replace('**', sign)}"
        if kind == 2:
            value = self.draw.randrange(12)
            return f"factorial({value})", f"{value}{self.one('!', '！')}"
        return python, typed

    def product(self, depth: int) -> tuple[str, str]:
        python, typed = self.power(depth)
        for _ in range(self.draw.choice((0, 0, 1, 1, 2))):
            more = self.power(depth)
            sign = "" if self.chance(0.07) else self.one("*", "*", "/", "/", "//")
            opens = more[1][0] in "(（√|" or (
                more[1][0].isalpha() and not re.match("e(?![a-z])", more[1])
            )  # 2e-3
            joins = typed[-1].isalpha() and more[1][0].isalpha()  # a tan(1) is atan(1), and 0x1 a is 0x1a
            if not sign and (not opens or joins or "0x" in typed):
                sign = "*"
            if not sign:
                self.certain = False  # 6/2(3): both readings have friends
            space = self.one("", "", " ")
            signs = {"*": ("*", "×", "＊", "·"), "/": ("/", "÷", "／"), "//": ("//",), "": ("",)}[sign]
            if sign == "/" and " " in typed[-5:].translate(_ONE_SPACE):
                self.certain = False  # 2 500/1000 could be a fraction beside a whole number
            python = f"{python}{sign or '*'}{more[0]}"
            typed = f"{typed}{space}{self.one(*signs)}{space}{more[1]}"
        return python, typed

    def sum(self, depth: int) -> tuple[str, str]:
        python, typed = self.product(depth)
        if self.chance(0.15):
            python, typed = f"-{python}", f"{self.one('-', '−', '－')}{typed}"
        for _ in range(self.draw.choice((0, 1, 1, 2))):
            more = self.product(depth)
            sign, space = self.one("+", "-"), self.one("", "", " ")
            signs = {"+": ("+", "＋"), "-": ("-", "−", "－", "–")}[sign]
            python = f"{python}{sign}{more[0]}"
            typed = f"{typed}{space}{self.one(*signs)}{space}{more[1]}"
        return python, typed


def calculation(draw: random.Random) -> Case:
    """One for the calculator, with variables now and then."""
    typist = Typist(draw)
    assigned = []
    for name in ("a", "b", "n_1")[: draw.choice((0, 0, 0, 0, 0, 1, 2, 3))]:
        python, typed = typist.sum(1)
        assigned.append((f"{name}={python}", f"{name}{typist.one('=', ' = ', '＝')}{typed}"))
        typist.names.append(name)
    assigned.append(typist.sum(draw.choice((0, 0, 1, 1, 2))))
    python, typed = (f"{typist.one(';', '；')}".join(part[side] for part in assigned) for side in (0, 1))
    typed += typist.one("", "", "", "=", "=?", " = ？")
    return Case(typed, python.replace("；", ";"), typist.certain)


def python_value(python: str) -> str | None:
    """What Python prints for it; None where it has no real number within some 1233 digits."""
    *assignments, last = python.split(";")
    names: dict[str, Any] = {}
    try:
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            names[name] = eval(text, PYTHON, names)  # noqa: S307  our own text, made above
            if not _is_real(names[name]):
                return None
        value = eval(last, PYTHON, names)  # noqa: S307
    except (ArithmeticError, ValueError, TypeError):
        return None
    return str(value) if _is_real(value) else None


def _is_real(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 4_096
    return isinstance(value, float) and math.isfinite(value)


def mutated(draw: random.Random, text: str) -> str:
    """The text with a few characters lost, doubled, swapped or put in."""
    signs = list(text)
    for _ in range(draw.randrange(1, 4)):
        index = draw.randrange(len(signs) + 1)
        kind = draw.randrange(4)
        if kind == 0 or not signs:
            signs.insert(index, draw.choice("0123456789.,  +-*/()e=;!^|√½²万'_x，（）%"))
        elif kind == 1:
            del signs[index - 1]
        elif kind == 2:
            signs.insert(index, signs[index - 1])
        else:
            signs[index - 1], signs[index % len(signs)] = signs[index % len(signs)], signs[index - 1]
    return "".join(signs)


def plain_python_value(text: str) -> str | None:
    """What Python prints for a text of digits, points, brackets and four signs; None where it is something else."""
    if not set(text) <= set("0123456789.+-*/() ") or "**" in text.replace(" ", ""):
        return None
    try:
        value = eval(text.strip(), {"__builtins__": {}})  # noqa: S307  digits and four signs
    except (SyntaxError, ArithmeticError, TypeError):
        return None
    return str(value) if _is_real(value) else None


@dataclass(frozen=True)
class System:
    """Equations as typed, their sides in Python's writing, and whether there is but one way to read them."""

    typed: str
    sides: tuple[tuple[str, str], ...]
    unknowns: tuple[str, ...]
    certain: bool


# What stands before an unknown or a bracket: as typed, in Python's writing.
def _coefficient(typist: Typist) -> tuple[str, str]:
    python, typed = typist.whole() if typist.chance(0.8) else (f"{typist.draw.randrange(20)}.5",) * 2
    typist.certain &= "," not in typed and "，" not in typed
    if typed[0] in "0０":  # 0x2 is no number to the solver, whatever it is
        python = typed = "7"
    return f"{python}*", typed + typist.one("", "", "*", " × ", "·", " ")


def _constant(typist: Typist) -> tuple[str, str]:
    python, typed = typist.number() if typist.chance(0.5) else typist.whole()
    if typed[0] == "0" and typed[1:2] in tuple("xbo"):
        typed = python
    return python, typed


def _linear(typist: Typist, unknown: str) -> tuple[str, str]:
    """``3x + 4``, ``2(x-1)``, ``x/4``.."""
    (many, many_typed), (more, more_typed) = _coefficient(typist), _constant(typist)
    sign, space = typist.one("+", "-"), typist.one("", " ")
    shown = f"{space}{typist.one(*{'+': '+＋', '-': '-−－'}[sign])}{space}"
    kind = typist.draw.randrange(5)
    if kind == 0:
        return f"{many}({unknown}{sign}{more})", f"{many_typed}({unknown}{shown}{more_typed})"
    if kind == 1:
        below = typist.draw.randrange(2, 30)
        return f"{unknown}/{below}{sign}{more}", f"{unknown}{typist.one('/', '÷')}{below}{shown}{more_typed}"
    if kind == 2:
        return f"{more}{sign}{many}{unknown}", f"{more_typed}{shown}{many_typed}{unknown}"
    return f"{many}{unknown}{sign}{more}", f"{many_typed}{unknown}{shown}{more_typed}"


def _one_equation(typist: Typist, unknown: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """(sides in Python's writing, sides as typed), of one unknown."""
    small = str(typist.draw.randrange(1, 40))
    left, right = _linear(typist, unknown), _constant(typist)
    kind = typist.draw.randrange(10)
    if kind == 0:
        left = (
            f"{unknown}**2-{small}*{unknown}",
            f"{unknown}{typist.one('²', '^2', '**2')}-{small}{unknown}",
        )
    elif kind == 1:
        left = (f"({unknown}+{small})*({unknown}-3)", f"({unknown}+{small})({unknown}-3)")
        right = ("0", "0")
    elif kind == 2:
        left = (f"abs({unknown}-{small})", typist.one(f"|{unknown}-{small}|", f"abs({unknown}-{small})"))
    elif kind == 3:
        left = (f"exp({unknown})", typist.one(f"e^{unknown}", f"exp({unknown})"))
    elif kind == 4:
        left = (f"log({unknown})", typist.one(f"ln({unknown})", f"log({unknown})"))
        right = (small, small)
    elif kind == 5:
        left = (f"2*pi*{unknown}", f"2π{unknown}")
    elif kind == 6:
        left = (f"{unknown}**{typist.draw.choice((3, 4))}", "")
        left = (left[0], left[0].replace("**3", "³").replace("**4", "⁴"))
        right = (str(typist.draw.randrange(1, 6) ** 12), "")
        right = (right[0], f"{int(right[0]):,}".replace(",", " "))
    elif kind == 7:
        right = _linear(typist, unknown)
    return (left[0], right[0]), (left[1], right[1])


def equations(draw: random.Random) -> System:
    """One for the solver: an equation, or a system of two or three."""
    typist = Typist(draw)
    count = draw.choice((1, 1, 1, 2, 2, 3))
    unknowns = draw.choice(
        (("x", "y", "z"), ("a", "b", "c"), ("r", "s", "t"), ("x1", "x2", "x3"), ("苹果", "梨", "桃"))
    )[:count]
    sides, typed = [], []
    for number in range(count):
        if count == 1:
            python, shown = _one_equation(typist, unknowns[0])
        else:
            parts = [_linear(typist, unknown) for unknown in unknowns[: max(2, number + 1)]]
            right = _constant(typist)
            python, shown = (
                ("+".join(part[0] for part in parts), right[0]),
                ("+".join(part[1] for part in parts), right[1]),
            )
        sides.append(python)
        typed.append(f"{shown[0]}{typist.one('=', ' = ', '＝')}{shown[1]}")
    mark = typist.one("; ", ";", "；", "\n", ", ")
    text = mark.join(typed)
    typist.certain &= mark != ", " and "," not in text and "，" not in text
    return System(text, tuple(sides), tuple(sorted(unknowns)), typist.certain)


def sympy_lines(system: System) -> str | None:
    """What sympy finds, a line each as the solver writes them; None where it does not determine every unknown."""
    import sympy

    real = True if any("abs(" in side for sides in system.sides for side in sides) else None
    symbols = {name: sympy.Symbol(name, real=real) for name in system.unknowns}
    known = {
        **{name: getattr(sympy, name) for name in ("log", "exp")},
        "abs": sympy.Abs,
        "pi": math.pi,
        "__builtins__": {},
    }
    left_right = [[eval(side, known, symbols) for side in sides] for sides in system.sides]  # noqa: S307
    differences = [sympy.sympify(left - right) for left, right in left_right]
    if len(symbols) == 1:
        (unknown,) = symbols.values()
        roots = sympy.solve(differences[0], unknown)
        if not roots:
            return None
        if len(roots) == 1:
            return f"{unknown} = {_shown(roots[0])}"
        return "\n".join(f"{unknown}_{index} = {_shown(root)}" for index, root in enumerate(roots))
    actual = sympy.solve(differences, list(symbols.values()), dict=True)
    if (
        len(actual) != 1
        or set(actual[0]) != set(symbols.values())
        or any(value.free_symbols for value in actual[0].values())
    ):
        return None
    return "\n".join(f"{unknown} = {_shown(actual[0][unknown])}" for unknown in symbols.values())


def _shown(value: Any) -> str:
    import sympy

    exact = str(value)
    return exact if len(exact) <= 80 and not value.has(sympy.CRootOf) else str(sympy.N(value, 15))
