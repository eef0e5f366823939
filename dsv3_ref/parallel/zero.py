"""ZeRO-1: each rank of a group updates its shard of the parameters that the group shares (§3.2).

A reduce-scatter sums the gradients into the rank's part of them, AdamW updates the shard of fp32
masters, each rank rounds its shard to the format of the weights, and an all-gather collects the
other shards.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.config import Config
from dsv3_ref.optim import AdamW, TrainingRecipe, adamw_of_shards
from dsv3_ref.parallel.bucket import (
    Bucket,
    BucketKey,
    Precision,
    StateBytes,
    bucket_key,
    wait_all,
)
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.watchdog import track_operation


class ShardOptimizer(ABC):
    """AdamW over this rank's shards of the master weights, by their names."""

    def __init__(self, mesh: Mesh, shards: dict[str, nn.Parameter], adamw: AdamW):
        self.mesh, self.adamw = mesh, adamw
        self.shards = shards

    def masters(self) -> dict[str, Tensor]:
        """Return this rank's shards of the master weights."""
        return dict(self.shards)

    def adamw_state(self, shard: Tensor) -> dict[str, Tensor]:
        """Return AdamW's state of a shard; initialize it if there was no step yet."""
        if not self.adamw.state[shard]:
            self.adamw.state[shard] = self.adamw.init_state(shard)
        return self.adamw.state[shard]

    def moments(self, shard: Tensor) -> dict[str, Tensor]:
        """Return AdamW's moments of a shard."""
        state = self.adamw_state(shard)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    @property
    def step_count(self) -> int:
        """The number of steps that the moments include."""
        steps = [self.adamw_state(shard)["step"] for shard in self.shards.values()]
        return int(torch.stack(steps).max())

    @step_count.setter
    def step_count(self, n: int) -> None:
        for shard in self.shards.values():
            self.adamw_state(shard)["step"].fill_(n)

    def clip_grads(self, grads: Sequence[Tensor], squares: Tensor, max_norm: float) -> float:
        """Clip gradients to max_norm in place; return their norm over all ranks before.

        squares: the sum of this rank's squares, in fp64.
        """
        norm = math.sqrt(self.mesh.all_reduce_sum(squares).item())
        scale = min(1.0, max_norm / (norm + 1e-6))
        for g in grads:
            g.mul_(scale)
        return norm

    def step(self, lr: float) -> None:
        """Update this rank's shards, and the weights from them."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.gather_weights()

    @abstractmethod
    def reduce_and_clip_grads(self, max_norm: float) -> float:
        """Sum the gradients over ranks, clip them to max_norm, return their norm before."""

    @abstractmethod
    def gather_weights(self) -> None:
        """Compute the weights from changed masters; a collective call."""

    @abstractmethod
    def ranges(
        self, more: Mapping[str, Mapping[str, Tensor]], once: bool
    ) -> Iterator[tuple[str, str, FlatRange]]:
        """Yield (kind, name of a parameter, range) of masters ("model"), moments and `more`.

        more: further shards by kind, each with the names of `masters`. once: only what no other
        rank yields too.
        """

    @abstractmethod
    def zero_grad(self) -> None:
        """Set all gradients to zero."""


class ZeroOptimizer(ShardOptimizer):
    """AdamW over the shards of all buckets, which are its master weights."""

    def __init__(
        self, model: nn.Module, config: Config, mesh: Mesh,
        stages_by_rank: Sequence[Sequence[int]], recipe: TrainingRecipe, moments: torch.dtype,
        sharded: bool = True, precision: Precision = "fp32",
    ):  # fmt: skip
        named: dict[BucketKey, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, p in model.named_parameters():
            named[bucket_key(name, p.ndim, config, stages_by_rank, precision)][name] = p
        self.buckets: list[Bucket] = []
        axes = []
        for key, params in sorted(named.items()):
            group = mesh.reduce_groups[key.owners, key.expert]
            bucket = Bucket(params, group, sharded, key.weight_format)
            self.buckets.append(bucket)
            axes.append((bucket.shard, max(p.ndim for p in params.values())))
        adamw = adamw_of_shards(axes, recipe, moments)
        super().__init__(mesh, {str(i): b.shard for i, b in enumerate(self.buckets)}, adamw)
        self.gather_weights()

    def reduce_and_clip_grads(self, max_norm: float) -> float:
        """Sum the gradients over their groups, clip them to max_norm, return their norm before."""
        with track_operation(f"sum of gradients, step {self.step_count}", range(self.mesh.world)):
            wait_all(b.start_reduce() for b in self.buckets)
        grads = [(b, grad_of(b.shard)) for b in self.buckets]
        squares = sum(
            g.double().square().sum() / (1 if b.sharded else b.size) for b, g in grads
        )  # a gradient that every rank of a group holds counts once
        return self.clip_grads([g for _, g in grads], torch.as_tensor(squares), max_norm)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Round the masters of all ranks to the weights; a collective call.

        To be called after any change of the masters, `Bucket.shard`.
        """
        wait_all(b.start_amax() for b in self.buckets)
        for b in self.buckets:
            b.round_masters()
        wait_all(b.start_all_gather() for b in self.buckets)
        for b in self.buckets:
            torch.autograd.graph.increment_version(b.params)

    @property
    def bytes(self) -> StateBytes:
        """The bytes of this rank's weights, masters, gradients and moments."""
        parts = [b.bytes for b in self.buckets]
        for b in self.buckets:
            parts.append(StateBytes(0, 0, 0, sum(x.nbytes for x in self.moments(b.shard).values())))
        return StateBytes(*map(sum, zip(*parts)))

    def ranges(
        self, more: Mapping[str, Mapping[str, Tensor]], once: bool
    ) -> Iterator[tuple[str, str, FlatRange]]:
        """Yield the ranges of masters, moments and `more`; see `ShardOptimizer`."""
        for i, bucket in enumerate(self.buckets):
            others = {kind: shards[str(i)] for kind, shards in more.items()}
            shards = {"model": bucket.shard.detach(), **self.moments(bucket.shard), **others}
            for kind, shard in shards.items():
                for name, part in bucket.ranges(shard, once):
                    yield kind, name, part

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for b in self.buckets:
            b.grad.zero_()


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, which must have one."""
    assert parameter.grad is not None
    return parameter.grad
