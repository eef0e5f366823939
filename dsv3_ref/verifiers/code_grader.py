"""Grading of model-written code by test cases, compared outside of the sandbox.

Expected results never enter the sandbox, because this process compares them. Whatever a program
reads, patches or prints, it passes only if it outputs the right result.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_ref.verifiers.sandbox import LIMITS, Limits, call_function, run_program


@dataclass(frozen=True)
class StdinCase:
    """A test case: the program's output for an input; trailing spaces do not matter."""

    stdin: str
    expected: str

    def passed(self, program: str, limits: Limits = LIMITS) -> bool:
        """Return whether the program prints what is expected."""
        result = run_program(program, self.stdin, limits)
        return result.status == "ok" and output_lines(result.stdout) == output_lines(self.expected)


@dataclass(frozen=True)
class FunctionCase:
    """A test case: the JSON value that `function` or `Solution().function` returns."""

    function: str
    args: tuple
    expected: object

    def passed(self, program: str, limits: Limits = LIMITS) -> bool:
        """Return whether the function returns what is expected."""
        expected = json.loads(json.dumps(self.expected))  # tuples become lists, keys texts
        result = call_function(program, self.function, self.args, limits)
        try:
            return result.status == "ok" and json_equal(json.loads(result.value), expected)
        except (ValueError, RecursionError, OverflowError):  # not JSON, or malicious JSON
            return False


def output_lines(text: str) -> list[str]:
    """Split a text into lines without trailing spaces and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def json_equal(value: object, other: object) -> bool:
    """Return whether two JSON values are equal; floats may differ by 1e-6 of their size."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(json_equal, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(json_equal(value[k], other[k]) for k in other)
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    is_float = float in (type(value), type(other))
    if is_float and isinstance(value, float | int) and isinstance(other, float | int):
        both_nan = value != value and other != other
        return both_nan or math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9)
    return value == other


def count_passed(
    program: str, cases: Iterable[StdinCase | FunctionCase], limits: Limits = LIMITS
) -> int:
    """Count the cases that pass, each in a sandbox of its own."""
    return sum(case.passed(program, limits) for case in cases)
