"""Verdicts on code that a model wrote: test cases, judged from outside of the sandbox.

Expected answers never enter the sandbox and our process compares: whatever a program reads,
patches or prints, the most it can forge is the right answer, and that is what was asked for.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_ref.verifiers.sandbox import LIMITS, Limits, call_function, run_program


@dataclass(frozen=True)
class StdinCase:
    """A test case: the program's output for this input, but for spaces at ends of lines."""

    stdin: str
    expected: str

    def passed(self, program: str, limits: Limits = LIMITS) -> bool:
        """Return whether the program prints what is expected."""
        done = run_program(program, self.stdin, limits)
        return done.status == "ok" and output_lines(done.stdout) == output_lines(self.expected)


@dataclass(frozen=True)
class FunctionCase:
    """A test case: the JSON value of a call of `name` or `Solution().name`."""

    function: str
    args: tuple
    expected: object

    def passed(self, program: str, limits: Limits = LIMITS) -> bool:
        """Return whether the function returns what is expected."""
        expected = json.loads(json.dumps(self.expected))  # tuples and keys as JSON has them
        done = call_function(program, self.function, self.args, limits)
        try:
            return done.status == "ok" and json_equal(json.loads(done.value), expected)
        except (ValueError, RecursionError, OverflowError):  # no JSON, or JSON made to hurt
            return False


def output_lines(text: str) -> list[str]:
    """Split a text into lines without trailing spaces and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def json_equal(a, b) -> bool:
    """Return whether two JSON values are equal, floats within 1e-6."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in b)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float | int) and isinstance(b, float | int) and float in (type(a), type(b)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (a != a and b != b)
    return a == b


def count_passed(
    program: str, cases: Iterable[StdinCase | FunctionCase], limits: Limits = LIMITS
) -> int:
    """Count the cases that pass, each in a sandbox of its own."""
    return sum(case.passed(program, limits) for case in cases)
