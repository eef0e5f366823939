"""Comparison of mathematical answers by math-verify, in a process that can be killed.

math-verify reads LaTeX. An expression such as 9^{9^{9}} would take it forever, and its own time
limits are alarms, which only a main thread may set. It therefore runs as
`python -m dsv3_ref.verifiers.math_verifier` with a limit on its memory: a line of JSON in, a line
out. A process that exceeds the time limit is killed, and the next comparison starts another.
"""

import json
import re
import resource
import select
import subprocess
import sys
import threading
from functools import cache

from dsv3_ref.config import UserError

TIMEOUT_S = 5.0  # of one comparison
STARTUP_TIMEOUT_S = 60.0
MEMORY_BYTES = 4 << 30  # of address space
READY = "ready"
# Words are compared as texts: math-verify would multiply their letters, so that cat = tac. Names of
# functions and LaTeX commands are not words.
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")


class MathVerifier:
    """A process that compares answers, started on first use and again after it was killed."""

    def __init__(self, seconds: float = TIMEOUT_S):
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

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
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return self.process.stdout.readline().decode().strip()

    def stop(self) -> None:
        """Kill the process and close its pipes."""
        process, self.process = self.process, None
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


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


def main() -> None:
    """Compare the pairs of answers on stdin, one line of JSON each, until it closes."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            answer, truth = (parse(f"${x}$", parsing_timeout=None) for x in json.loads(line))
            is_equal = bool(answer and truth and verify(truth, answer, timeout_seconds=None))
        except Exception:  # whatever the libraries raise, the answer is not shown to be equal
            is_equal = False
        print(json.dumps(is_equal), flush=True)


if __name__ == "__main__":
    main()
