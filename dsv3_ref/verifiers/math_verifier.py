"""Are two mathematical answers equal? math-verify says, in a process that can be killed.

It reads LaTeX, and an expression such as 9^{9^{9}} takes it a lifetime; its own time limits are
alarms, which only a main thread may set. So it runs as
`python -m dsv3_ref.verifiers.math_verifier`, a line of JSON in, a line out, with
limits on its memory, and is replaced when it does not answer.
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

TIMEOUT_S, MEMORY_BYTES = 5.0, 4 << 30  # for one comparison; bytes of addresses
READY = "ready"
# else cat = tac, letters multiplied; names of functions and of LaTeX's commands are no words
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")


class MathVerifier:
    """A process that compares answers, started on first use and again after it was killed."""

    def __init__(self, seconds: float = TIMEOUT_S):
        self.seconds, self.lock, self.process = seconds, threading.Lock(), None

    def __call__(self, given: str, truth: str) -> bool:
        """Return whether an answer equals the right one; one that takes too long does not."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([given, truth]).encode() + b"\n")
                self.process.stdin.flush()
                return self.read_line(self.seconds) == "true"
            except (TimeoutError, BrokenPipeError):
                self.stop()
                return False

    def start(self) -> None:
        """Start a process and wait until it has imported its libraries."""
        command = [sys.executable, "-m", __name__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL)
        try:
            ready = self.read_line(60) == READY
        except TimeoutError:
            ready = False
        if not ready:
            self.stop()
            raise UserError("comparing mathematical answers needs: pip install 'dsv3-ref[rl]'")

    def read_line(self, seconds: float) -> str:
        """Return the next line of the process, "" if it has died; raise `TimeoutError` if it is late."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return self.process.stdout.readline().decode().strip()

    def stop(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


@cache
def shared_verifier() -> MathVerifier:
    """Return the verifier of this process."""
    return MathVerifier()


def answers_equal(given: str, truth: str) -> bool:
    """Return whether two answers have the same value; words must be the same.

    Answers are LaTeX or plain notation.
    """
    if " ".join(given.split()) == " ".join(truth.split()):
        return True
    return not WORD.search(truth) and shared_verifier()(given, truth)


def main() -> None:
    """Compare the pairs of answers on stdin, one JSON line each, until it closes."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            given, truth = (parse(f"${x}$", parsing_timeout=None) for x in json.loads(line))
            same = bool(given and truth and verify(truth, given, timeout_seconds=None))
        except Exception:  # whatever the libraries make of it, it is not equal
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
