"""Verdicts on code that a model wrote: test cases, judged from outside of the sandbox.

Expected answers never enter the sandbox and our process compares: whatever a program reads,
patches or prints, the most it can forge is the right answer, and that is what was asked for.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_ref.verifiers.sandbox import LIMITS, Limits, call, run


@dataclass(frozen=True)
class Prints:
    """A test case: reading this, a program prints that; spaces that end a line do not count."""

    stdin: str
    expected: str

    def holds(self, program: str, limits: Limits = LIMITS) -> bool:
        done = run(program, self.stdin, limits)
        return done.status == "ok" and lines(done.output) == lines(self.expected)


@dataclass(frozen=True)
class Returns:
    """A test case: `name` or `Solution().name`, called with these, returns that; JSON values."""

    function: str
    args: tuple
    expected: object

    def holds(self, program: str, limits: Limits = LIMITS) -> bool:
        expected = json.loads(json.dumps(self.expected))  # tuples and keys as JSON has them
        done = call(program, self.function, self.args, limits)
        try:
            return done.status == "ok" and equal(json.loads(done.value), expected)
        except (ValueError, RecursionError, OverflowError):  # no JSON, or JSON made to hurt
            return False


def lines(text: str) -> list[str]:
    """Lines without the spaces that end them; empty ones at the end are none."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def equal(a, b) -> bool:
    """Equality of JSON values, of floats within 1e-6."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in b)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float | int) and isinstance(b, float | int) and float in (type(a), type(b)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (a != a and b != b)
    return a == b


def passes(program: str, cases: Iterable[Prints | Returns], limits: Limits = LIMITS) -> int:
    """How many of the cases hold, each in a sandbox of its own."""
    return sum(case.holds(program, limits) for case in cases)
