"""Skipped steps after gradient spikes, and signals that end a run early."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dsv3_ref.optim import get_grad_norm_limit
from dsv3_ref.pretrain import StepStats


class SpikeGuard:
    """Recent gradient norms, consecutive skipped steps, and the step of the last rollback."""

    def __init__(self, factor: float, window: int, max_skipped_steps: int):
        self.factor, self.max_skipped_steps = factor, max_skipped_steps
        self.window = window
        self.norms: deque[float] = deque(maxlen=window)
        self.consecutive_skips = 0
        self.last_rollback: int | None = None

    @property
    def grad_norm_limit(self) -> float:
        """The largest gradient norm at which the next step is not skipped."""
        return get_grad_norm_limit(self.norms, self.factor, self.window)

    @property
    def should_roll_back(self) -> bool:
        """True after `max_skipped_steps` consecutive skips, which one bad batch cannot cause."""
        return self.consecutive_skips >= self.max_skipped_steps

    def update(self, stats: StepStats) -> None:
        """Record a step, taken or skipped."""
        self.consecutive_skips = self.consecutive_skips + 1 if stats.skipped else 0
        if not stats.skipped:
            self.norms.append(stats.grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms and counters as values for JSON."""
        return {
            "norms": list(self.norms),
            "consecutive_skips": self.consecutive_skips,
            "last_rollback": self.last_rollback,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.consecutive_skips = state["consecutive_skips"]
        self.last_rollback = state["last_rollback"]


INTERRUPTED = b"\nfinishing this step and writing a checkpoint; Ctrl-C again stops at once\n"
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + number
if hasattr(signal, "SIGUSR1"):  # Windows has none
    EXIT_CODES[signal.SIGUSR1] = 75  # EX_TEMPFAIL: resume


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list to which the signals of `EXIT_CODES` but Ctrl-C's are appended."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)

    with handling(handle, *(set(EXIT_CODES) - {signal.SIGINT})):
        yield received


@contextmanager
def catch_interrupt(received: list[int]) -> Iterator[None]:
    """Append the first Ctrl-C to a list of signals; the second one interrupts at once."""

    def handle(number: int, _: object) -> None:
        if number in received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # print could interrupt a print
            os.write(2, INTERRUPTED)

    with handling(handle, signal.SIGINT):
        yield


@contextmanager
def handling(handle: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Handle signals with a function in the `with` block, if this is the main thread."""
    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = {s: signal.signal(s, handle) for s in numbers if is_main}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)
