"""An average of the model's weights on the CPU, updated by a thread of its own (§3.2.3)."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv3_ref.optim import ema_update


class EMA:
    """An exponential moving average of weights, updated while the next gradients are computed.

    weights: the fp32 masters that the optimizer changes, by name. refresh: computes the model's
    weights from them.
    Weights change only in `optimizer.step`, which first waits until they have been read. On a CPU
    the thread reads the weights themselves. On CUDA they are first copied to pinned memory, on a
    stream of their own, and the step waits only for that copy.
    """

    def __init__(
        self, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, decay: float,
        refresh: Callable[[], None],
    ):  # fmt: skip
        self.decay, self.refresh = decay, refresh
        self.t = 0
        self.live = weights
        self.mean = {
            n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.live.items()
        }
        self.cuda = next(iter(self.live.values())).is_cuda
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.copied: torch.cuda.Event | None = None
        if self.cuda:
            self.stream = torch.cuda.Stream()
            self.pinned = [
                torch.empty_like(p, device="cpu", pin_memory=True) for p in self.live.values()
            ]
        optimizer.register_step_pre_hook(lambda *_: self.before_step())

    def update(self) -> None:
        """Start to add the current weights to the average."""
        self.wait()
        self.t += 1
        weights = [p.detach() for p in self.live.values()]
        if self.cuda:
            self.copied, weights = self.copy(weights), self.pinned
        self.pending = self.thread.submit(self.apply_update, weights, self.t, self.copied)

    def copy(self, weights: list[Tensor]) -> torch.cuda.Event:
        """Copy weights to pinned memory after the work already queued; return the end's event."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for pinned, p in zip(self.pinned, weights):
                pinned.copy_(p, non_blocking=True)
            return self.stream.record_event()

    def apply_update(self, weights: list[Tensor], t: int, copied: torch.cuda.Event | None) -> None:
        """Update the average with the weights of step t; runs in the thread."""
        if copied:
            copied.synchronize()
        ema_update(list(self.mean.values()), weights, self.decay, t)

    def before_step(self) -> None:
        """Wait until the weights have been read, since the optimizer is about to change them."""
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
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights until the `with` ends."""
        self.wait()
        before = {name: p.detach().clone() for name, p in self.live.items()}
        self.copy_to_model(self.mean)
        try:
            yield
        finally:
            self.copy_to_model(before)

    def copy_to_model(self, values: dict[str, Tensor]) -> None:
        """Copy these values to the masters, and refresh the model's weights."""
        for name, p in self.live.items():
            p.detach().copy_(values[name])
        self.refresh()
