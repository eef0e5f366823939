"""Ranks as (pp, dp, ep) and their process groups; training has no tensor parallelism (§3.2)."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dsv3_ref.config import UserError

AXES = ("pp", "dp", "ep")


def resolve_parallel_dims(
    world: int, pp: int, ep: int, dp: int | None = None
) -> tuple[int, int, int]:
    """Return (pp, dp, ep) with world = pp·dp·ep; dp defaults to world / (pp·ep). V3: 16, 2, 64."""
    if dp is None:
        dp = max(1, world // (pp * ep))
    if min(pp, dp, ep) < 1 or pp * dp * ep != world:
        raise UserError(
            f"--pp {pp} × --dp {dp} × --ep {ep} is {pp * dp * ep} ranks, "
            f"but the world size is {world}"
        )
    return pp, dp, ep


class Mesh:
    """The coordinates of this rank, rank = (pp·DP + dp)·EP + ep, and its process groups.

    An expert group is EP neighboring ranks, so it spans as few nodes as possible. Every (dp, ep)
    coordinate trains on its own rows of a batch; `data_rank` is its number. Rank 0 reads the data
    for all.
    """

    def __init__(self, pp: int, dp: int, ep: int, device: torch.device):
        self.pp, self.dp = pp, dp
        self.ep, self.device = ep, device
        mesh = init_device_mesh(device.type, (pp, dp, ep), mesh_dim_names=AXES)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "every rank belongs to the mesh"
        self.pp_rank, self.dp_rank, self.ep_rank = coordinate
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data_rank = self.dp_rank * ep + self.ep_rank
        self.data_size = dp * ep
        self.ep_group = mesh.get_group("ep")
        # Two groups of the same ranks, so that messages up and down never wait for each other.
        up = [dist.new_group(ranks) for ranks in self.pipeline_ranks()]
        down = [dist.new_group(ranks) for ranks in self.pipeline_ranks()]
        self.up_group, self.down_group = up[self.data_rank], down[self.data_rank]
        self.reduce_groups: dict[tuple[tuple[int, ...], bool], dist.ProcessGroup] = {}

    def rank_of(self, p: int, d: int | None = None, e: int | None = None) -> int:
        """Return the rank at a coordinate; d and e default to this rank's own pipeline."""
        if d is None:
            d = self.dp_rank
        if e is None:
            e = self.ep_rank
        return (p * self.dp + d) * self.ep + e

    def pipeline_ranks(self) -> list[list[int]]:
        """Return the ranks of every pipeline, in the order of data ranks."""
        pipelines = []
        for d in range(self.dp):
            for e in range(self.ep):
                pipelines.append([self.rank_of(p, d, e) for p in range(self.pp)])
        return pipelines

    def create_reduce_groups(self, owners: Iterable[tuple[int, ...]]) -> None:
        """Create the groups that sum the gradients of parameters which these pp ranks own.

        Dense parameters are summed over owners × dp × ep, experts over owners × dp, separately for
        each ep rank. A collective call: every rank must pass the same owners.
        """
        for pp_ranks in sorted(set(owners)):
            self.create_reduce_group(pp_ranks, False, range(self.ep))
            for e in range(self.ep):
                self.create_reduce_group(pp_ranks, True, [e])

    def create_reduce_group(
        self, pp_ranks: tuple[int, ...], expert: bool, ep_ranks: Iterable[int]
    ) -> None:
        """Create one group over pp_ranks × dp × ep_ranks, and keep it if this rank is a member."""
        ranks = []
        for p in pp_ranks:
            for d in range(self.dp):
                ranks += [self.rank_of(p, d, e) for e in ep_ranks]
        group = dist.new_group(ranks)
        if self.rank in ranks:
            self.reduce_groups[pp_ranks, expert] = group

    def create_node_groups(self, ranks_per_node: int) -> list[dist.ProcessGroup]:
        """Return this rank's [internode, intranode] groups; a collective call.

        The first consists of the ranks with the same index in each node, the second of the ranks
        of this node.
        """
        if self.ep % ranks_per_node:
            raise UserError(
                f"an expert group of {self.ep} ranks cannot be divided into nodes of "
                f"{ranks_per_node}: --ep-ranks-per-node must divide --ep"
            )
        nodes = self.ep // ranks_per_node
        internode = [range(i, self.ep, ranks_per_node) for i in range(ranks_per_node)]
        intranode = [range(n * ranks_per_node, (n + 1) * ranks_per_node) for n in range(nodes)]
        own: dict[str, dist.ProcessGroup] = {}
        for p in range(self.pp):
            for d in range(self.dp):
                for kind, sets in (("internode", internode), ("intranode", intranode)):
                    for ep_ranks in sets:
                        ranks = [self.rank_of(p, d, e) for e in ep_ranks]
                        group = dist.new_group(ranks)
                        if self.rank in ranks:
                            own[kind] = group
        return [own["internode"], own["intranode"]]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum x over all ranks in place and return it."""
        dist.all_reduce(x)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Take the maximum of x over all ranks in place and return it."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def broadcast_from_rank0(
        self, x: Tensor | None, shape: tuple[int, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return rank 0's x on every rank; the others pass None, and its shape and dtype."""
        if x is None:
            x = torch.empty(shape, dtype=dtype, device=self.device)
        x = x.to(self.device)
        dist.broadcast(x, 0)
        return x


@contextmanager
def init_distributed(device_name: str = "auto", timeout: float = 600.0) -> Iterator[torch.device]:
    """Join the process group of torchrun or srun in the `with` block; yield this rank's device.

    timeout: seconds that a collective call may take.
    """
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()
