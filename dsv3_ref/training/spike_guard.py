"""What may befall a run: steps that must not count, and signals that end it early."""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from dsv3_ref.optim import get_grad_norm_limit
from dsv3_ref.pretrain import StepStats


class Guard:
    """Norms of the steps taken, steps skipped in succession, and the last step rolled back to."""

    def __init__(self, factor: float, window: int, patience: int):
        self.factor, self.patience = factor, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.bad, self.rolled_to = 0, None

    @property
    def limit(self) -> float:
        """The largest norm that the next step may have."""
        return get_grad_norm_limit(self.norms, self.factor, self.norms.maxlen)

    @property
    def lost(self) -> bool:
        """Whether it is no longer the batch's fault."""
        return self.bad >= self.patience

    def note(self, stats: StepStats) -> None:
        """Count a step, taken or skipped."""
        self.bad = self.bad + 1 if stats.skipped else 0
        if not stats.skipped:
            self.norms.append(stats.grad_norm)

    def state(self) -> dict:
        return {"norms": list(self.norms), "bad": self.bad, "rolled_to": self.rolled_to}

    def restore(self, state: dict) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.bad, self.rolled_to = state["bad"], state["rolled_to"]


LEAVE = {signal.SIGUSR1: 75, signal.SIGTERM: 143}  # exit codes: EX_TEMPFAIL; 128 + SIGTERM


@contextmanager
def signals() -> Iterator[list[int]]:
    """The signals of LEAVE that have come so far, until the end of the `with`."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # others may not listen
    before = {s: signal.signal(s, lambda s, _: came.append(s)) for s in LEAVE if main}
    try:
        yield came
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)
