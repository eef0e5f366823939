"""A process that answers lines, with a limit on its memory, and is killed when it takes too long.

What strangers write, such as chat templates and mathematical answers, is evaluated there: neither
the time nor the memory of such a text can be bounded in the process itself. It is not a sandbox.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import dsv3_ref
from dsv3_ref.config import UserError

STARTUP_TIMEOUT_S = 60.0
SPARE_SECONDS = 60  # after which a process whose answer is no longer awaited ends itself
PATIENCE = 10  # times as long as a process may run it may take, since others run beside it
READY = "ready"


class WorkerProcess:
    """A process of `python -m module`, started on first use and again after it was killed.

    failure: the sentence if it cannot start. Several threads, and processes forked from this one,
    may use it.
    """

    def __init__(self, module: str, failure: str):
        self.module = module
        self.failure = failure
        self.lock = threading.Lock()
        self.owner = 0  # the id of the process that started it
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: queue.Queue[bytes] = queue.Queue()  # of the process, read by a thread
        self.seconds_used = 0.0  # for the last answer

    def ask(self, line: str, seconds: float) -> str:
        """Return the answer to a line; raise a `TimeoutError` if it is late or there is none.

        seconds: of the process's own time, so that other programs make no answer late.
        """
        assert self.process is not None
        start = processor_seconds(self.process.pid)
        try:
            self.write_line(line)
            answer = self.read_answer(start, seconds)
        except (TimeoutError, OSError):
            self.stop()
            raise TimeoutError from None
        if not answer:  # the process has died
            self.stop()
            raise TimeoutError
        return answer

    def ensure_started(self) -> None:
        """Start the process unless this process has one that is alive."""
        is_own = self.process is not None and self.owner == os.getpid()
        if not is_own or (self.process is not None and self.process.poll() is not None):
            self.start()

    def start(self) -> None:
        """Start a process and wait until it has imported its libraries."""
        home = str(Path(dsv3_ref.__file__).parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            # -P: no module of the current directory, which may be a stranger's, is imported
            [sys.executable, "-P", "-m", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
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
            raise UserError(self.failure)

    def write_line(self, line: str) -> None:
        """Send a line to the process."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_answer(self, start: float, seconds: float) -> str:
        """Return the next line, for which the process may run so long.

        start: its `processor_seconds` before. Raises a `TimeoutError` if it is late.
        """
        assert self.process is not None
        patience = time.monotonic() + PATIENCE * seconds
        line, left = None, seconds
        while line is None:
            with suppress(TimeoutError):
                line = self.read_line(left)
            self.seconds_used = processor_seconds(self.process.pid) - start
            left = seconds - self.seconds_used
            if line is None and (left <= 0 or time.monotonic() > patience):
                raise TimeoutError
        return line

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
        with suppress(OSError):  # of what was not sent
            process.stdin.close()


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, or the time of a clock where the system hides it."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:  # not Linux
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forward_lines(pipe: IO[bytes], lines: "queue.Queue[bytes]") -> None:
    """Put the lines of a pipe into a queue, then b"" at its end, and close it."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(b"")


# ── In the process ──


def answer_lines(answer: Callable[[str], str], memory: int) -> None:
    """Print `answer(line)` for each line on stdin until it closes; memory: bytes that it may use.

    Ctrl-C concerns the process that asks. If that one dies while a line is being answered, an alarm
    ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_memory(memory)
    print(READY, flush=True)
    for line in sys.stdin:
        set_alarm(SPARE_SECONDS)
        print(answer(line), flush=True)
        set_alarm(0)


def set_alarm(seconds: int) -> None:
    """End this process after some seconds, where the system can; 0: not anymore."""
    if hasattr(signal, "alarm"):  # Windows has none
        signal.alarm(seconds)


def limit_memory(num_bytes: int) -> None:
    """Limit the memory of this process where the system can."""
    with suppress(ImportError, ValueError):  # Windows; macOS refuses the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
