"""Ranks as (pp, dp, ep), and the groups that talk; no tensor parallelism in training (§3.2)."""

import os
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3_ref.config import UserError

AXES = ("pp", "dp", "ep")


def resolve_parallel_dims(
    world: int, pp: int, ep: int, dp: int | None = None
) -> tuple[int, int, int]:
    """(pp, dp, ep) with world = pp·dp·ep; dp defaults to what is left. V3: 16, 2, 64."""
    if dp is None:
        dp = max(1, world // (pp * ep))
    if min(pp, dp, ep) < 1 or pp * dp * ep != world:
        raise UserError(f"--pp {pp} × --dp {dp} × --ep {ep} ranks are not the {world} there are")
    return pp, dp, ep


class Mesh:
    """This rank's place, rank = (p·dp + d)·ep + e, and its groups.

    An expert group is ep neighbors: it spans as few nodes as it can. Every (dp, ep) index reads
    its own rows; `data` counts them, rank (0, 0, 0) reads for all.
    """

    def __init__(self, pp: int, dp: int, ep: int, device: torch.device):
        self.pp, self.dp, self.ep, self.device = pp, dp, ep, device
        mesh = init_device_mesh(device.type, (pp, dp, ep), mesh_dim_names=AXES)
        self.pp_rank, self.dp_rank, self.ep_rank = mesh.get_coordinate()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_size = self.dp_rank * ep + self.ep_rank, dp * ep
        self.ep_group = mesh.get_group("ep")
        up, down = ([dist.new_group(ranks) for ranks in self.pipeline_ranks()] for _ in "ud")
        self.up_group, self.down_group = up[self.data_rank], down[self.data_rank]
        self.reduce_groups: dict[tuple, dist.ProcessGroup] = {}

    def rank_of(self, p: int, d: int | None = None, e: int | None = None) -> int:
        """The rank at a place; by default in this rank's own pipeline."""
        d, e = self.dp_rank if d is None else d, self.ep_rank if e is None else e
        return (p * self.dp + d) * self.ep + e

    def pipeline_ranks(self) -> list[list[int]]:
        """The ranks of every pipeline, by data index."""
        return [
            [self.rank_of(p, d, e) for p in range(self.pp)]
            for d in range(self.dp)
            for e in range(self.ep)
        ]

    def create_reduce_groups(self, holders: Iterable[tuple[int, ...]]) -> None:
        """Make the groups over which the gradients of what these pp ranks hold are summed.

        Dense parameters: over holders × dp × ep. Experts: over holders × dp, for every e its own.
        A collective call: every rank names the same holders.
        """
        for ps in sorted(set(holders)):
            for expert in (False, True):
                for es in [[e] for e in range(self.ep)] if expert else [range(self.ep)]:
                    ranks = [self.rank_of(p, d, e) for p in ps for d in range(self.dp) for e in es]
                    group = dist.new_group(ranks)
                    if self.rank in ranks:
                        self.reduce_groups[ps, expert] = group

    def create_node_groups(self, ranks_per_node: int):
        """Of this rank: the group across nodes at its place, and the one inside its node."""
        if self.ep % ranks_per_node:
            raise UserError(f"an expert group of {self.ep} ranks has no nodes of {ranks_per_node}")
        nodes, mine = self.ep // ranks_per_node, [None, None]
        for p in range(self.pp):
            for d in range(self.dp):
                across = [
                    [n * ranks_per_node + i for n in range(nodes)] for i in range(ranks_per_node)
                ]
                inside = [
                    [n * ranks_per_node + i for i in range(ranks_per_node)] for n in range(nodes)
                ]
                for kind, sets in enumerate((across, inside)):
                    for es in sets:
                        ranks = [self.rank_of(p, d, e) for e in es]
                        group = dist.new_group(ranks)
                        mine[kind] = group if self.rank in ranks else mine[kind]
        return mine

    def all_reduce_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(x)
        return x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def broadcast_from_rank0(self, x: torch.Tensor | None, shape=None, dtype=None) -> torch.Tensor:
        """What rank 0 has, everywhere."""
        x = torch.empty(shape, dtype=dtype, device=self.device) if x is None else x.to(self.device)
        dist.broadcast(x, 0)
        return x


def is_launched_distributed() -> bool:
    """Whether a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def init_distributed(name: str = "auto", timeout: float = 600.0):
    """The process group of torchrun, until the end of the `with`; yields this rank's device."""
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield torch.device(device)
    finally:
        dist.destroy_process_group()
