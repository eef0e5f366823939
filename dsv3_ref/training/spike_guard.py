"""What may befall a run: steps that must not count, and signals that end it early."""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from dsv3_ref.optim import get_grad_norm_limit
from dsv3_ref.pretrain import StepStats


class SpikeGuard:
    """Norms of the steps taken, steps skipped in succession, and the last step rolled back to."""

    def __init__(self, factor: float, window: int, max_skipped_steps: int):
        self.factor, self.max_skipped_steps = factor, max_skipped_steps
        self.norms: deque[float] = deque(maxlen=window)
        self.consecutive_skips, self.last_rollback = 0, None

    @property
    def grad_norm_limit(self) -> float:
        """The largest norm that the next step may have."""
        return get_grad_norm_limit(self.norms, self.factor, self.norms.maxlen)

    @property
    def should_roll_back(self) -> bool:
        """Whether it is no longer the batch's fault."""
        return self.consecutive_skips >= self.max_skipped_steps

    def update(self, stats: StepStats) -> None:
        """Count a step, taken or skipped."""
        self.consecutive_skips = self.consecutive_skips + 1 if stats.skipped else 0
        if not stats.skipped:
            self.norms.append(stats.grad_norm)

    def state_dict(self) -> dict:
        return {
            "norms": list(self.norms),
            "consecutive_skips": self.consecutive_skips,
            "last_rollback": self.last_rollback,
        }

    def load_state_dict(self, state: dict) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.consecutive_skips, self.last_rollback = (
            state["consecutive_skips"],
            state["last_rollback"],
        )


EXIT_CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 143}  # exit codes: EX_TEMPFAIL; 128 + SIGTERM


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The signals of LEAVE that have come so far, until the end of the `with`."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # others may not listen
    before = {s: signal.signal(s, lambda s, _: came.append(s)) for s in EXIT_CODES if main}
    try:
        yield came
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)
