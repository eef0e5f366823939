"""ZeRO-1: every rank of a group updates its slice of the parameters that the group shares (§3.2).

Parameters and gradients of a bucket lie in one flat tensor each; the gradient is summed and cut
by a reduce-scatter, AdamW moves the slice, an all-gather brings the others back.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.optim import AdamW, TrainingRecipe
from dsv3_ref.parallel.build import owning_ranks
from dsv3_ref.parallel.watchdog import track_operation


class Bucket:
    """Parameters that are reduced over one group, end to end in one flat tensor."""

    def __init__(self, named: dict[str, nn.Parameter], group, sharded: bool):
        self.names, self.group, self.sharded = list(named), group, sharded
        self.size, self.params = dist.get_world_size(group), list(named.values())
        n, first = sum(p.numel() for p in named.values()), next(iter(named.values()))
        self.flat = first.new_zeros(-(-n // self.size) * self.size)
        self.grad, self.offsets, end = torch.zeros_like(self.flat), {}, 0
        for name, p in named.items():
            self.offsets[name] = end, p.shape
            self.view(self.flat, name).copy_(p.detach())
            p.data, p.grad = self.view(self.flat, name), self.view(self.grad, name)
            end += p.numel()
        self.shard = nn.Parameter(self.shard_of(self.flat))

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """A parameter's place in a flat tensor."""
        start, shape = self.offsets[name]
        return flat[start : start + shape.numel()].view(shape)

    def shard_of(self, flat: torch.Tensor) -> torch.Tensor:
        """What this rank updates."""
        return flat.chunk(self.size)[dist.get_rank(self.group)] if self.sharded else flat

    def start_reduce(self):
        """Start to sum the gradient over the group; returns what to wait for."""
        if not self.sharded:
            self.shard.grad = self.grad
            return dist.all_reduce(self.grad, group=self.group, async_op=True)
        self.shard.grad = torch.empty_like(self.shard)
        return dist.reduce_scatter_tensor(
            self.shard.grad, self.grad, group=self.group, async_op=True
        )

    def start_all_gather(self):
        """Start to bring the other slices; returns what to wait for."""
        if self.sharded:
            mine = self.shard.detach().clone()
            return dist.all_gather_into_tensor(self.flat, mine, group=self.group, async_op=True)
        return None

    def all_gather(self, own: torch.Tensor) -> torch.Tensor:
        """A flat tensor of the whole bucket from every rank's slice of it."""
        if not self.sharded:
            return own
        flat = own.new_empty(self.flat.shape)
        dist.all_gather_into_tensor(flat, own.contiguous(), group=self.group)
        return flat


class ZeroOptimizer:
    """AdamW over the slices of all buckets; `own` parameters are its masters."""

    def __init__(self, model, c, mesh, held, r: TrainingRecipe, moments, sharded: bool = True):
        self.mesh = mesh
        named: dict[tuple, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, p in model.named_parameters():
            key = owning_ranks(name, c, held), is_expert(name)
            named[*key, p.ndim > 1][name] = p
        self.buckets = [
            Bucket(params, mesh.reduce_groups[ps, expert], sharded)
            for (ps, expert, _), params in sorted(named.items())
        ]
        decays = [matrix for _, _, matrix in sorted(named)]
        groups = [
            {"params": [b.shard], "weight_decay": r.weight_decay * matrix}
            for b, matrix in zip(self.buckets, decays)
        ]
        self.adamw = AdamW(groups, r.lr, (r.beta1, r.beta2), moments)

    def reduce_and_clip_grads(self, clip: float) -> float:
        """Sum the gradients over their groups and clip them all; their norm before."""
        with track_operation(f"sum of gradients, step {self.step_count}", range(self.mesh.world)):
            for work in [b.start_reduce() for b in self.buckets]:
                work.wait()
        squares = sum(
            b.shard.grad.double().square().sum() / (1 if b.sharded else b.size)
            for b in self.buckets
        )
        norm = math.sqrt(self.mesh.all_reduce_sum(squares).item())
        scale = min(1.0, clip / (norm + 1e-6))
        for b in self.buckets:
            b.shard.grad.mul_(scale)
        return norm

    def step(self, lr: float) -> None:
        """Move the slices, and bring the others."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for work in [b.start_all_gather() for b in self.buckets]:
            if work:
                work.wait()
        torch.autograd.graph.increment_version([p for b in self.buckets for p in b.params])

    def moments(self, b: Bucket) -> dict[str, torch.Tensor]:
        """AdamW's of this rank's slice of a bucket."""
        s = self.adamw.state[b.shard] = self.adamw.state[b.shard] or self.adamw.init_state(b.shard)
        return {k: s[k] for k in ("exp_avg", "exp_avg_sq")}

    @property
    def step_count(self) -> int:
        """Steps that the moments have seen."""
        self.moments(self.buckets[0])
        return int(self.adamw.state[self.buckets[0].shard]["step"])

    @step_count.setter
    def step_count(self, n: int) -> None:
        for b in self.buckets:
            self.moments(b)
            self.adamw.state[b.shard]["step"].fill_(n)

    def zero_grad(self) -> None:
        for b in self.buckets:
            b.grad.zero_()
