"""An average of the model's weights on the CPU, updated by its own thread (§3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from dsv3_ref.optim import ema_update


class EMA:
    """An exponential moving average of parameters, updated while the next gradients are computed.

    Weights only change in `optimizer.step`, which waits: for the thread where it reads the weights
    themselves (CPU), for a copy to pinned memory on a stream of its own where it does not (CUDA).
    """

    def __init__(self, model, optimizer, decay: float):
        self.decay, self.t = decay, 0
        self.live = dict(model.named_parameters())
        self.mean = {
            n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.live.items()
        }
        self.cuda = next(iter(self.live.values())).is_cuda
        self.thread, self.pending, self.copied = ThreadPoolExecutor(1), None, None
        if self.cuda:
            self.stream = torch.cuda.Stream()
            self.pinned = [
                torch.empty_like(p, device="cpu", pin_memory=True) for p in self.live.values()
            ]
        optimizer.register_step_pre_hook(lambda *_: self.before_step())

    def update(self) -> None:
        """Start adding the current weights to the average."""
        self.wait()
        self.t += 1
        weights = [p.detach() for p in self.live.values()]
        if self.cuda:
            self.copied, weights = self.copy(weights), self.pinned
        self.pending: Future | None = self.thread.submit(
            self.apply_update, weights, self.t, self.copied
        )

    def copy(self, weights: list) -> torch.cuda.Event:
        """Copy weights to pinned memory after the work already queued; return an event for its end."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for pinned, p in zip(self.pinned, weights):
                pinned.copy_(p, non_blocking=True)
            return self.stream.record_event()

    def apply_update(self, weights: list, t: int, copied) -> None:
        """Update the average; runs in the thread."""
        if copied:
            copied.synchronize()
        ema_update(list(self.mean.values()), weights, self.decay, t)

    def before_step(self) -> None:
        """Wait for readers of the weights, which are about to change."""
        if not self.cuda:
            self.wait()
        elif self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def wait(self) -> None:
        """Wait until the average is complete."""
        if self.pending:
            self.pending.result()
            self.pending = None

    @contextmanager
    def swapped_in(self):
        """Give the model the averaged weights until the `with` ends."""
        self.wait()
        before = {name: p.detach().clone() for name, p in self.live.items()}
        self.put(self.mean)
        try:
            yield
        finally:
            self.put(before)

    def put(self, values: dict) -> None:
        for name, p in self.live.items():
            p.detach().copy_(values[name])
