"""Exact comparison of expressions in LaTeX by sympy, in a process that can be killed.

An expression such as 9^{9^{9}} would take sympy forever. The comparison therefore runs as
`python -m dsv3_ref.verifiers.math_verifier` with a limit on its memory: a line of JSON in, a line
out. A process that exceeds the time limit is killed, and the next comparison starts another.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from dsv3_ref.data.worker_process import WorkerProcess, answer_lines

TIMEOUT_S = 5.0  # of processor time, for one comparison
MEMORY_BYTES = 4 << 30  # of address space
NUMERIC_DIGITS = 1000  # that tell apart numbers such as √2 and √2 + 10⁻²⁰
SPARE_DIGITS = 100  # of these that rounding may change
MISSING = "comparing mathematical answers needs: pip install 'dsv3-ref[rl]'"
# What the parser would read as a product of letters or as a sum: words, numbers side by side, and
# marks that it drops.
AMBIGUOUS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|\d\s+\d|\d\s*_|'")
DECIMAL = re.compile(r"(\d*)\.(\d+)|(\d+)\.(?!\d)")
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")


class TimeLeft:
    """The processor time that the comparisons of one answer may still take together."""

    def __init__(self, seconds: float):
        self.seconds = seconds


TIME_LEFT: ContextVar[TimeLeft | None] = ContextVar("TIME_LEFT", default=None)


@contextmanager
def limited_together() -> Iterator[None]:
    """Give all comparisons inside the `with` the time of one: an answer may have many parts."""
    token = TIME_LEFT.set(TimeLeft(shared_verifier().seconds))
    try:
        yield
    finally:
        TIME_LEFT.reset(token)


class MathVerifier(WorkerProcess):
    """A process that compares answers, started on first use and again after it was killed."""

    def __init__(self, seconds: float = TIMEOUT_S):
        super().__init__(__name__, MISSING)
        self.seconds = seconds

    def __call__(self, answer: str, truth: str, **options: Any) -> bool:
        """Return whether an answer equals the right one; False after `seconds` of its process."""
        left = TIME_LEFT.get() or TimeLeft(self.seconds)
        if left.seconds <= 0:
            return False
        with self.lock:
            self.ensure_started()
            try:
                line = json.dumps([answer, truth, options])
                return self.ask(line, min(self.seconds, left.seconds)) == "true"
            except TimeoutError:
                left.seconds = 0
                return False
            finally:
                left.seconds -= self.seconds_used


@cache
def shared_verifier() -> MathVerifier:
    """Return the verifier of this process."""
    return MathVerifier()


def expressions_equal(answer: str, truth: str, decimals: int | None = None) -> bool:
    """Return whether two expressions are equal, exactly or to so many decimals."""
    if AMBIGUOUS.search(answer) or AMBIGUOUS.search(truth):
        return False
    return shared_verifier()(answer, truth, decimals=decimals)


def equations_equal(answer: str, truth: str) -> bool:
    """Return whether two equations have the same solutions: one is a multiple of the other."""
    if AMBIGUOUS.search(answer) or AMBIGUOUS.search(truth):
        return False
    return shared_verifier()(answer, truth, are_equations=True)


# ── In the process ──


def parse_expression(text: str) -> Any:
    """Return the expression of sympy that a text in LaTeX stands for, with exact numbers."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import I, Symbol

    text = DECIMAL.sub(exact_fraction, DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text))
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    expression = latex2sympy(text, normalization_config=None, conversion_config=config)
    return expression.subs(Symbol("i"), I).doit()


def exact_fraction(match: re.Match[str]) -> str:
    """Write a decimal number as a fraction of integers."""
    whole, places = match[1] or match[3] or "", match[2] or ""
    return rf"\frac{{{int(whole + places)}}}{{{10 ** len(places)}}}"


def evaluate(number: Any, digits: int) -> tuple[Any, Any]:
    """Return the real and the imaginary part of a number to so many digits, as exact fractions.

    Raise an error if sympy cannot compute it, or if it is infinite.
    """
    from sympy import Rational

    real, imaginary = number.evalf(digits, maxn=digits).as_real_imag()
    # arithmetic with floats would round the right answer to the precision of the other one
    return Rational(real), Rational(imaginary)


def differ_at_most(number: Any, right: Any, digits: int, margin: Any, is_relative: bool) -> bool:
    """Return whether two numbers differ by at most `margin`, times their size if it is relative.

    Each is evaluated alone: in a difference, cancellation can leave noise of any size, and an
    answer such as 10⁴⁰⁰⁰ (sin² 1 + cos² 1 − 1) would equal every number.
    """
    (x, y), (right_x, right_y) = evaluate(number, digits), evaluate(right, digits)
    size = x**2 + y**2 + right_x**2 + right_y**2 if is_relative else 1
    return bool((x - right_x) ** 2 + (y - right_y) ** 2 <= margin**2 * size)


def has_same_value(expression: Any, right: Any) -> bool:
    """Return whether two finite expressions are equal, exactly as far as that can be computed."""
    from sympy import Rational

    difference = expression - right
    if difference.is_Rational:
        return bool(difference == 0)
    if difference.free_symbols:
        return difference.equals(0) is True
    margin = Rational(1, 10 ** (NUMERIC_DIGITS - SPARE_DIGITS))
    return differ_at_most(expression, right, NUMERIC_DIGITS, margin, is_relative=True)


def compare(answer: str, truth: str, decimals: int | None, are_equations: bool) -> bool:
    """Return whether two expressions, or two equations, are equal."""
    from sympy import Expr, Rational, nan, oo, simplify, zoo

    if are_equations:
        sides = [[parse_expression(side) for side in text.split("=")] for text in (answer, truth)]
        ratio = simplify((sides[0][0] - sides[0][1]) / (sides[1][0] - sides[1][1]))
        is_constant = not ratio.free_symbols and ratio not in (0, nan, oo, -oo, zoo)
        return is_constant and max(map(len, sides)) == 2
    expression, right = parse_expression(answer), parse_expression(truth)
    if expression == right:
        return expression is not nan and expression is not zoo
    if not all(isinstance(x, Expr) and not x.has(oo, -oo, zoo, nan) for x in (expression, right)):
        return False
    if decimals is not None:
        margin = Rational(1, 2 * 10**decimals)
        return differ_at_most(expression, right, 30 + decimals, margin, is_relative=False)
    return has_same_value(expression, right)


def answer_line(line: str) -> str:
    """Return "true" or "false" for a line of JSON with an answer, the right one and options."""
    answer, truth, options = json.loads(line)
    try:
        defaults = {"decimals": None, "are_equations": False}
        result = compare(answer, truth, **defaults | options)
    except Exception:  # whatever the libraries raise, the answer is not shown to be equal
        result = False
    return json.dumps(bool(result))


def main() -> None:
    """Compare the pairs of answers on stdin, one line of JSON each, until it closes."""
    import latex2sympy2_extended  # noqa: F401  a missing one ends the process before it is ready

    answer_lines(answer_line, MEMORY_BYTES)


if __name__ == "__main__":
    main()
