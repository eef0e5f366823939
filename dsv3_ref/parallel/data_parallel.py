"""Data parallelism: every rank holds the whole model and processes its part of the batch.

Reward models and RL use it while a whole model fits on a rank, which can then sample from it.
Gradients are averaged over ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_ref.checkpoints import manifest
from dsv3_ref.checkpoints.sharded import gather_results
from dsv3_ref.config import UserError
from dsv3_ref.parallel.watchdog import pop_waited_seconds, track_operation
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.strategy import SingleProcess
from dsv3_ref.training.task import Data, Task

T = TypeVar("T")


def broadcast_object_from_rank0(make: Callable[[], T]) -> T:
    """Return the value of make(), which only rank 0 calls; if it raises, all ranks exit."""
    box: list[T | None] = [None]
    try:
        if dist.get_rank() == 0:
            box = [make()]
    finally:
        dist.broadcast_object_list(box, 0)
    if box[0] is None:
        raise SystemExit(2)  # rank 0 has printed why
    return box[0]


def call_on_ranks(make: Callable[[], T]) -> T:
    """Return make() of this rank; if it fails on any, end as `gather_results` does."""
    box: list[T] = []
    gather_results(lambda: box.append(make()))
    return box[0]


def any_rank_should_stop(signals: list[int], device: torch.device) -> bool:
    """Return whether any rank has received a signal, so that all stop after the same step.

    A rank without its own signal appends the largest one of the others to its list.
    """
    return append_signal(signals, largest_on_ranks(max(signals, default=0), device))


def append_signal(signals: list[int], largest: int) -> bool:
    """Append the largest signal of all ranks unless this one has its own; return whether one has.

    largest: 0 if no rank has received a signal.
    """
    if largest and not signals:
        signals.append(largest)
    return bool(largest)


def largest_on_ranks(value: int, device: torch.device) -> int:
    """Return the largest of the values of all ranks."""
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def find_damage_on_ranks(folder: Path) -> str | None:
    """Return, on every rank, the first damage that a rank has found in its share of the files."""
    damages: list[str | None] = [None] * dist.get_world_size()
    own = manifest.find_damage(folder, dist.get_rank(), dist.get_world_size())
    dist.all_gather_object(damages, own)
    return next(filter(None, damages), None)


def straggler_metrics(seconds: float, device: torch.device) -> dict[str, Any]:
    """Return which rank was busy longest in a step, and its time over the median of all ranks.

    seconds: duration of the step on this rank; what it waited for other ranks does not count. The
    clock is the host's: on CUDA it includes what the host waits for its own device.
    """
    busy_r = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    busy_r[dist.get_rank()] = max(seconds - pop_waited_seconds(), 1e-9)
    dist.all_reduce(busy_r)
    slowest = int(busy_r.argmax())
    ratio = float(busy_r[slowest] / busy_r.quantile(0.5))
    return {"slowest_rank": slowest, "slowest_rank_ratio": round(ratio, 4)}


class DataParallel(SingleProcess):
    """A strategy like `SingleProcess`, in which every rank processes its part of the batch."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.dp_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0

    @property
    def description(self) -> str:
        """The number of ranks and their device, for the run's first line."""
        return f"{self.dp_size} ranks with a model each, on {self.device.type}"

    def build_data(self, task: Task) -> Data:
        """Build the data on every rank; raise a `UserError` if the ranks cannot share a batch."""
        data = task.build_data()
        if any(n % (self.dp_size * data.minibatches) for n in data.batch_size_schedule):
            raise UserError(
                f"{self.dp_size} ranks × {data.minibatches} updates per step must divide "
                "--global-batch-size and --start-batch-size"
            )
        return data

    # ── Parts of a list ──

    def shard(self, items: list) -> list:
        """Return this rank's items."""
        return items[self.rank :: self.dp_size]

    def all_gather(self, items: list) -> list:
        """Return the items of all ranks, in their order before `shard`."""
        shards: list[list] = [[] for _ in range(self.dp_size)]
        dist.all_gather_object(shards, items)
        gathered = []
        for i in range(max(map(len, shards))):
            gathered += [shard[i] for shard in shards if i < len(shard)]
        return gathered

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over all ranks."""
        names = sorted(values)
        total = torch.tensor([values[k] for k in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist()))

    # ── A step ──

    def begin_step(self, step: int) -> None:
        """Seed this rank for this step, so that a resumed run draws the same random numbers."""
        torch.manual_seed(hash((self.config.seed, step, self.rank)))

    def reduce_step(self, model: nn.Module, sums: Tensor, load_le: Tensor) -> tuple[Tensor, Tensor]:
        """Average gradients and losses over ranks and sum the loads, as one process has them."""
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            with track_operation("average of gradients", range(self.dp_size)):
                dist.all_reduce(p.grad)
            p.grad /= self.dp_size
        dist.all_reduce(sums)
        dist.all_reduce(load_le)
        return sums / self.dp_size, load_le

    def straggler_metrics(self, seconds: float) -> dict[str, Any]:
        """Return which rank computed longest in a step of so many seconds."""
        return straggler_metrics(seconds, self.device)

    # ── Collective operations ──

    def should_stop(self, signals: list[int]) -> bool:
        """Return whether any rank has received a signal."""
        return any_rank_should_stop(signals, self.device)

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        dist.barrier()

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return the value of make(), which only rank 0 calls."""
        return broadcast_object_from_rank0(make)

    def find_damage(self, folder: Path) -> str | None:
        """Return what is damaged in a checkpoint; each rank verifies its share of the files."""
        return find_damage_on_ranks(folder)

    def save_checkpoint(
        self, folder: Path, values: dict, tensors: dict[str, Tensor], ema: EMA | None, about: dict
    ) -> None:
        """Write a checkpoint on rank 0, which has the same weights as all ranks."""
        if self.is_main:
            super().save_checkpoint(folder, values, tensors, ema, about)

    def export_weights(self, folder: Path) -> None:
        """Write the model on rank 0 as a Hugging Face directory; return when it is complete."""
        if self.is_main:
            super().export_weights(folder)
        self.barrier()
