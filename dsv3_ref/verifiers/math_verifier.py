"""Comparison of mathematical answers by math-verify, in a process that can be killed.

math-verify reads LaTeX. An expression such as 9^{9^{9}} would take it forever, and its own time
limits are alarms, which only a main thread may set. It therefore runs as
`python -m dsv3_ref.verifiers.math_verifier` with a limit on its memory: a line of JSON in, a line
out. A process that exceeds the time limit is killed, and the next comparison starts another.
"""

import json
import math
import queue
import re
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import IO, Any, Protocol

from dsv3_ref.config import UserError

TIMEOUT_S = 5.0  # of one comparison
STARTUP_TIMEOUT_S = 60.0
MEMORY_BYTES = 4 << 30  # of address space
NUMERIC_DIGITS = 1000  # that tell apart numbers such as √2 and √2 + 10⁻²⁰
READY = "ready"
# Words are compared as texts: math-verify would multiply their letters, so that cat = tac. Names of
# functions and LaTeX commands are not words.
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")


class Expression(Protocol):
    """An expression or a matrix of sympy, which has no types."""

    def atoms(self, *types: type) -> set[float]:
        """Return the parts of these types that have no parts."""

    def xreplace(self, rule: dict[Any, Any]) -> "Expression":
        """Return the expression with parts replaced."""


class MathVerifier:
    """A process that compares answers, started on first use and again after it was killed."""

    def __init__(self, seconds: float = TIMEOUT_S):
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: queue.Queue[bytes] = queue.Queue()  # of the process, read by a thread

    def __call__(self, answer: str, truth: str) -> bool:
        """Return whether an answer equals the right one; False after `seconds`."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                self.write_line(json.dumps([answer, truth]))
                return self.read_line(self.seconds) == "true"
            except (TimeoutError, BrokenPipeError):
                self.stop()
                return False

    def start(self) -> None:
        """Start a process and wait until it has imported its libraries."""
        command = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        self.lines = queue.Queue()
        forward = (self.process.stdout, self.lines)
        threading.Thread(target=forward_lines, args=forward, daemon=True).start()
        try:
            is_ready = self.read_line(STARTUP_TIMEOUT_S) == READY
        except TimeoutError:
            is_ready = False
        if not is_ready:
            self.stop()
            raise UserError("comparing mathematical answers needs: pip install 'dsv3-ref[rl]'")

    def write_line(self, line: str) -> None:
        """Send a line to the process."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_line(self, seconds: float) -> str:
        """Return the next line of the process, "" if it has died; raise `TimeoutError` if late."""
        try:
            return self.lines.get(timeout=seconds).decode().strip()
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> None:
        """Kill the process and close its pipes."""
        process, self.process = self.process, None
        assert process is not None and process.stdin is not None
        process.kill()
        process.wait()
        process.stdin.close()


def forward_lines(pipe: IO[bytes], lines: "queue.Queue[bytes]") -> None:
    """Put the lines of a pipe into a queue, then b"" at its end, and close it."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(b"")


@cache
def shared_verifier() -> MathVerifier:
    """Return the verifier of this process."""
    return MathVerifier()


def answers_equal(answer: str, truth: str) -> bool:
    """Return whether two answers have the same value; words must be the same.

    Answers are LaTeX or plain notation.
    """
    if " ".join(answer.split()) == " ".join(truth.split()):
        return True
    return not WORD.search(truth) and shared_verifier()(answer, truth)


def find_decimals(parsed: list[Expression | str]) -> set[float]:
    """Return the decimal numbers in what math-verify has parsed."""
    from math_verify.grader import Float

    decimals: set[float] = set()
    return decimals.union(*(x.atoms(Float) for x in parsed if not isinstance(x, str)))


def parsed_equal(answer: list[Expression | str], truth: list[Expression | str]) -> bool:
    """Return whether an answer that math-verify has parsed equals the right one.

    math-verify rounds to 6 decimals whenever either is a decimal number, so that 0.333333 = 1/3.
    Here the right answer must be one, and keeps at least 6 significant digits; an answer equals any
    other only exactly.
    """
    from math_verify.grader import Rational, verify

    if decimals := find_decimals(truth):
        exponent = min(math.floor(math.log10(abs(x))) if x else 0 for x in decimals)
        return verify(truth, answer, float_rounding=max(6, 5 - exponent), timeout_seconds=None)
    fractions = {decimal: Rational(str(decimal)) for decimal in find_decimals(answer)}
    answer = [x if isinstance(x, str) else x.xreplace(fractions) for x in answer]
    return verify(truth, answer, numeric_precision=NUMERIC_DIGITS, timeout_seconds=None)


def limit_memory() -> None:
    """Limit the memory of this process where the system can."""
    with suppress(ImportError, ValueError):  # Windows; macOS refuses the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    """Compare the pairs of answers on stdin, one line of JSON each, until it closes."""
    from math_verify import parse

    limit_memory()
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            answer, truth = (parse(f"${x}$", parsing_timeout=None) for x in json.loads(line))
            is_equal = bool(answer and truth and parsed_equal(answer, truth))
        except Exception:  # whatever the libraries raise, the answer is not shown to be equal
            is_equal = False
        print(json.dumps(is_equal), flush=True)


if __name__ == "__main__":
    main()
