"""ZeRO-1: each rank of a group updates its shard of the parameters that the group shares (§3.2).

The parameters of a bucket are views of one flat tensor, and so are their gradients. A
reduce-scatter sums and shards the gradients, AdamW updates the shard, and an all-gather collects
the other shards.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.config import Config, ceil_div
from dsv3_ref.optim import AdamW, TrainingRecipe
from dsv3_ref.parallel.build import owning_ranks
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.watchdog import track_operation


class Bucket:
    """Parameters whose gradients one group reduces, concatenated in one flat tensor."""

    def __init__(self, named: dict[str, nn.Parameter], group: dist.ProcessGroup, sharded: bool):
        self.names, self.params = list(named), list(named.values())
        self.group, self.sharded = group, sharded
        self.size = dist.get_world_size(group)
        numel = sum(p.numel() for p in self.params)
        self.flat = self.params[0].new_zeros(ceil_div(numel, self.size) * self.size)
        self.grad = torch.zeros_like(self.flat)
        self.offsets: dict[str, tuple[int, torch.Size]] = {}
        end = 0
        for name, p in named.items():
            self.offsets[name] = end, p.shape
            self.view(self.flat, name).copy_(p.detach())
            p.data = self.view(self.flat, name)
            p.grad = self.view(self.grad, name)
            end += p.numel()
        self.shard = nn.Parameter(self.shard_of(self.flat))

    def view(self, flat: Tensor, name: str) -> Tensor:
        """Return the view of a parameter in a flat tensor."""
        start, shape = self.offsets[name]
        return flat[start : start + shape.numel()].view(shape)

    def shard_of(self, flat: Tensor) -> Tensor:
        """Return the part of a flat tensor that this rank updates."""
        return flat.chunk(self.size)[dist.get_rank(self.group)] if self.sharded else flat

    def start_reduce(self) -> dist.Work:
        """Start to sum the gradient over the group; return the work to wait for."""
        if not self.sharded:
            self.shard.grad = self.grad
            return dist.all_reduce(self.grad, group=self.group, async_op=True)
        self.shard.grad = torch.empty_like(self.shard)
        return dist.reduce_scatter_tensor(
            self.shard.grad, self.grad, group=self.group, async_op=True
        )

    def start_all_gather(self) -> dist.Work | None:
        """Start to collect the other shards; return the work to wait for, or None if unsharded."""
        if not self.sharded:
            return None
        own = self.shard.detach().clone()
        return dist.all_gather_into_tensor(self.flat, own, group=self.group, async_op=True)

    def all_gather(self, shard: Tensor) -> Tensor:
        """Return the whole flat tensor from each rank's shard of it."""
        if not self.sharded:
            return shard
        flat = shard.new_empty(self.flat.shape)
        dist.all_gather_into_tensor(flat, shard.contiguous(), group=self.group)
        return flat


class ZeroOptimizer:
    """AdamW over the shards of all buckets, which are its master weights."""

    def __init__(
        self, model: nn.Module, config: Config, mesh: Mesh,
        stages_by_rank: Sequence[Sequence[int]], recipe: TrainingRecipe, moments: torch.dtype,
        sharded: bool = True,
    ):  # fmt: skip
        self.mesh = mesh
        named: dict[tuple[tuple[int, ...], bool, bool], dict[str, nn.Parameter]] = defaultdict(dict)
        for name, p in model.named_parameters():
            key = owning_ranks(name, config, stages_by_rank), is_expert(name), p.ndim > 1
            named[key][name] = p
        self.buckets: list[Bucket] = []
        groups = []
        for (owners, expert, is_matrix), params in sorted(named.items()):
            bucket = Bucket(params, mesh.reduce_groups[owners, expert], sharded)
            self.buckets.append(bucket)
            decay = recipe.weight_decay if is_matrix else 0.0
            groups.append({"params": [bucket.shard], "weight_decay": decay})
        self.adamw = AdamW(groups, recipe.lr, (recipe.beta1, recipe.beta2), moments)

    def reduce_and_clip_grads(self, max_norm: float) -> float:
        """Sum the gradients over their groups, clip them to max_norm, return their norm before."""
        with track_operation(f"sum of gradients, step {self.step_count}", range(self.mesh.world)):
            for work in [b.start_reduce() for b in self.buckets]:
                work.wait()
        grads = [(b, grad_of(b.shard)) for b in self.buckets]
        squares = sum(
            g.double().square().sum() / (1 if b.sharded else b.size) for b, g in grads
        )  # a gradient that every rank of a group holds counts once
        norm = math.sqrt(self.mesh.all_reduce_sum(torch.as_tensor(squares)).item())
        scale = min(1.0, max_norm / (norm + 1e-6))
        for _, g in grads:
            g.mul_(scale)
        return norm

    def step(self, lr: float) -> None:
        """Update this rank's shards and collect those of the other ranks."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for work in [b.start_all_gather() for b in self.buckets]:
            if work:
                work.wait()
        for b in self.buckets:
            torch.autograd.graph.increment_version(b.params)

    def adamw_state(self, bucket: Bucket) -> dict[str, Tensor]:
        """Return AdamW's state of this rank's shard; initialize it if there was no step yet."""
        shard = bucket.shard
        if not self.adamw.state[shard]:
            self.adamw.state[shard] = self.adamw.init_state(shard)
        return self.adamw.state[shard]

    def moments(self, bucket: Bucket) -> dict[str, Tensor]:
        """Return AdamW's moments of this rank's shard of a bucket."""
        state = self.adamw_state(bucket)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    @property
    def step_count(self) -> int:
        """The number of steps that the moments include."""
        return int(self.adamw_state(self.buckets[0])["step"])

    @step_count.setter
    def step_count(self, n: int) -> None:
        for b in self.buckets:
            self.adamw_state(b)["step"].fill_(n)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for b in self.buckets:
            b.grad.zero_()


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, which must have one."""
    assert parameter.grad is not None
    return parameter.grad
