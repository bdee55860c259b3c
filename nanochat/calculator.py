"""The calculator that a model may call while it writes: `27 + 45`, `1,200 * 0.15`,
`'banana'.count('a')`.

- A parser of its own, no eval: what is not in the grammar below has no meaning here.
- Exact: numbers are fractions, so 0.1 + 0.2 is 0.3; what does not end is rounded.
- Bounded in length, depth and size, so that no expression takes time or memory.

    call   := STRING ".count(" STRING ")" | sum
    sum    := product (("+" | "-") product)*
    product:= sign (("*" | "/") sign)*
    sign   := "-"* atom
    atom   := NUMBER | "(" sum ")"
"""

import re
from decimal import Decimal
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 20
MAX_MAGNITUDE = Fraction(10**15)
SIGNIFICANT_DIGITS = 12

TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|([-+*/()]))", re.ASCII)
COUNT = re.compile(r"""\s*(['"])([^'"\\]*)\1\.count\(\s*(['"])([^'"\\]*)\3\s*\)\s*""")


class CalculatorError(ValueError):
    """The expression has no value here."""


def calculate(expression: str) -> str | None:
    """The value of an expression as text, None where it has none."""
    try:
        return _calculate(expression)
    except (CalculatorError, ZeroDivisionError):
        return None


def _calculate(expression: str) -> str:
    if len(expression) > MAX_CHARS:
        raise CalculatorError("too long")
    if count := COUNT.fullmatch(expression):
        return str(count[2].count(count[4]))
    # thousands separators, as in 1,200
    parser = _Parser(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression))
    value = parser.sum(0)
    if parser.token is not None:
        raise CalculatorError(f"unexpected {parser.token}")
    return _as_text(value)


def _as_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    # by way of Decimal, which can write 3e-08 without an exponent
    return format(Decimal(format(float(value), f".{SIGNIFICANT_DIGITS}g")), "f")


class _Parser:
    """Recursive descent with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.token: str | None = None
        self.advance()

    def advance(self) -> None:
        rest = self.text[self.position :]
        if not rest.strip():
            self.token = None
            return
        match = TOKEN.match(rest)
        if match is None:
            raise CalculatorError(f"unknown character in {rest!r}")
        self.token = match[1] or match[2]
        self.position += match.end()

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.token in ("+", "-"):
            sign = 1 if self.token == "+" else -1
            self.advance()
            value = _bounded(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.sign(depth)
        while self.token in ("*", "/"):
            times = self.token == "*"
            self.advance()
            factor = self.sign(depth)
            value = _bounded(value * factor if times else value / factor)
        return value

    def sign(self, depth: int) -> Fraction:
        negative = False
        while self.token == "-":
            negative = not negative
            self.advance()
        value = self.atom(depth)
        return -value if negative else value

    def atom(self, depth: int) -> Fraction:
        token = self.token
        if token is None or depth > MAX_DEPTH:
            raise CalculatorError("incomplete or too deep")
        self.advance()
        if token == "(":
            value = self.sum(depth + 1)
            if self.token != ")":
                raise CalculatorError("missing )")
            self.advance()
            return value
        if token in "+-*/)":
            raise CalculatorError(f"unexpected {token}")
        return _bounded(Fraction(token))


def _bounded(value: Fraction) -> Fraction:
    """The value itself; an error where its digits could grow without end."""
    if abs(value) > MAX_MAGNITUDE or value.denominator > MAX_MAGNITUDE:
        raise CalculatorError("too large or too fine")
    return value
