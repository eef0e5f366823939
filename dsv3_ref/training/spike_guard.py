"""Skipped steps after gradient spikes, and signals that end a run early."""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
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


EXIT_CODES: dict[int, int] = {
    signal.SIGUSR1: 75,  # EX_TEMPFAIL: resume
    signal.SIGTERM: 143,  # 128 + SIGTERM
}


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list to which the signals of `EXIT_CODES` are appended until the `with` ends."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = {s: signal.signal(s, handle) for s in EXIT_CODES if is_main}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)
