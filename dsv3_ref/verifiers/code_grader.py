"""Grading of model-written code by test cases, compared outside of the sandbox.

Expected results never enter the sandbox, because this process compares them. Whatever a program
reads, patches or prints, it passes only if it outputs the right result.

Models write for judges that have imported the usual modules, so programs find their names, such as
`List` or `heapq`, without an import.
"""

import builtins
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from dsv3_ref.verifiers.sandbox import LIMITS, Limits, call_function, run_program

RELATIVE_TOLERANCE = 1e-6  # of an expected float
ZERO_TOLERANCE = 1e-9  # of an expected 0.0
SPACES = " \t\r\n\v\f"
USUAL_MODULES = (  # a later one has precedence if two have a name in common
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip


@dataclass(frozen=True)
class StdinCase:
    """A test case: the program's output for an input; trailing spaces do not matter.

    A program reads `unix_lines` of the input.
    """

    stdin: str
    expected: str

    def passed(self, program: str, limits: Limits = LIMITS) -> bool:
        """Return whether the program prints what is expected."""
        result = run_program(program, unix_lines(self.stdin), limits, usual_imports(program))
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
        result = call_function(program, self.function, self.args, limits, usual_imports(program))
        try:
            return result.status == "ok" and json_equal(json.loads(result.value), expected)
        except (ValueError, RecursionError, OverflowError):  # not JSON, or malicious JSON
            return False


@cache
def usual_names() -> dict[str, str]:
    """Return the expressions of what `USUAL_MODULES` export, and of the modules, by name."""
    names = {}
    for module in USUAL_MODULES:
        content = vars(importlib.import_module(module))
        public = [name for name in content if not name.startswith("_")]
        for name in content.get("__all__", public):
            names[name] = f"__import__('{module}').{name}"
    names |= {module: f"__import__('{module}')" for module in USUAL_MODULES}
    return {name: value for name, value in names.items() if not hasattr(builtins, name)}


def usual_imports(program: str) -> str:
    """Return statements that make the usual names builtins, as far as a program has these words.

    They are no globals: a program that lacks a function does not have that of a module instead.
    """
    names = usual_names()
    words = sorted(names.keys() & set(re.findall(r"[A-Za-z]\w*", program)))
    return "\n".join(f"__import__('builtins').{word} = {names[word]}" for word in words)


def unix_lines(text: str) -> str:
    """Return an input as judges on Linux give it: every line, also the last one, ends with a \\n.

    Otherwise `input()` returns the \\r of a data set that was written on Windows, and
    `readline()[:-1]` cuts a character off the last line.
    """
    text = text.replace("\r\n", "\n")
    return text if not text or text.endswith("\n") else f"{text}\n"


def output_lines(text: str) -> list[str]:
    """Split a text into lines without trailing ASCII spaces and without empty lines at the end."""
    return [line.rstrip(SPACES) for line in text.rstrip(SPACES).split("\n")]


def json_equal(value: object, expected: object) -> bool:
    """Return whether a JSON value equals an expected one; only an expected float has a tolerance.

    Numbers are compared by value: 2.0 equals an expected 2, and True does not equal 1.
    """
    if isinstance(expected, list):
        if not isinstance(value, list) or len(value) != len(expected):
            return False
        return all(map(json_equal, value, expected))
    if isinstance(expected, dict):
        if not isinstance(value, dict) or value.keys() != expected.keys():
            return False
        return all(json_equal(value[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(expected, float) and isinstance(value, int | float):
        return is_close(value, expected)
    return value == expected


def is_close(value: float, expected: float) -> bool:
    """Return whether a number differs from the expected one by at most 1e-6 of its size.

    It may differ from 0 by 1e-9. NaN and the infinities equal only themselves.
    """
    if not math.isfinite(expected):
        return value == expected or (math.isnan(expected) and value != value)
    margin = RELATIVE_TOLERANCE * abs(expected) if expected else ZERO_TOLERANCE
    is_finite = -sys.float_info.max <= value <= sys.float_info.max  # an integer may be larger
    return is_finite and expected - margin <= value <= expected + margin


def count_passed(
    program: str, cases: Iterable[StdinCase | FunctionCase], limits: Limits = LIMITS
) -> int:
    """Count the cases that pass, each in a sandbox of its own."""
    return sum(case.passed(program, limits) for case in cases)
