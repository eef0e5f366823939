"""Ranks as (pp, dp, ep) and their process groups; training has no tensor parallelism (§3.2)."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.parallel.watchdog import track_operation
from dsv3_ref.training.settings import num_restarts

Owners = tuple[int, ...]  # the pp ranks that hold a parameter


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


class MeshLayout:
    """The coordinates of a rank, rank = (pp·DP + dp)·EP + ep, and the ranks of its groups.

    An expert group is EP neighboring ranks, so it spans as few nodes as possible. Groups of CP
    neighbors among the DP·EP ranks of a pipeline rank share rows of a batch and divide their
    tokens; `data_rank` is the number of such a group. cp adds no ranks to the world: for the
    dispatch to experts its ranks have different tokens, and the sums of gradients over dp × ep
    include them. The groups depend on nothing but these numbers, so `dsv3 plan` counts them
    without any process.
    """

    def __init__(self, pp: int, dp: int, ep: int, rank: int, cp: int = 1):
        self.pp, self.dp = pp, dp
        self.ep, self.cp = ep, cp
        self.rank, self.world = rank, pp * dp * ep
        self.pp_rank, place = divmod(rank, dp * ep)
        self.dp_rank, self.ep_rank = divmod(place, ep)
        self.data_rank, self.cp_rank = divmod(place, cp)
        self.data_size = dp * ep // cp

    def rank_of(self, p: int, d: int | None = None, e: int | None = None) -> int:
        """Return the rank at a coordinate; d and e default to this rank's own pipeline."""
        if d is None:
            d = self.dp_rank
        if e is None:
            e = self.ep_rank
        return (p * self.dp + d) * self.ep + e

    def ranks_of(
        self, pp_ranks: Iterable[int], dp_ranks: Iterable[int], ep_ranks: Iterable[int]
    ) -> list[int]:
        """Return the ranks at all combinations of these coordinates, in rising order."""
        return [self.rank_of(*place) for place in product(pp_ranks, dp_ranks, ep_ranks)]

    def pipeline_ranks(self) -> list[int]:
        """Return the ranks of this rank's pipeline, first stage first."""
        return [self.rank_of(p) for p in range(self.pp)]

    def neighbors(self) -> list[int]:
        """Return the pp ranks next to this one, in an order in which all pairs can meet.

        First the pairs (0, 1), (2, 3) …, then (1, 2), (3, 4) …: no pair waits for a third rank.
        """
        even, odd = self.pp_rank ^ 1, ((self.pp_rank + 1) ^ 1) - 1
        return [p for p in (even, odd) if 0 <= p < self.pp]

    def expert_ranks(self, ranks_per_node: int = 0) -> list[list[int]]:
        """Return the ranks of one group over this rank's experts, or of two across several nodes.

        The first of two consists of the ranks with the same place in each node, the second of those
        of this node. ranks_per_node: ranks of the expert group in one node; 0: all of them.
        """
        if not ranks_per_node or self.ep <= ranks_per_node:
            return [self.ranks_of([self.pp_rank], [self.dp_rank], range(self.ep))]
        place = self.ep_rank % ranks_per_node
        first = self.ep_rank - place
        sets = range(place, self.ep, ranks_per_node), range(first, first + ranks_per_node)
        return [self.ranks_of([self.pp_rank], [self.dp_rank], ep_ranks) for ep_ranks in sets]

    def context_ranks(self) -> list[int]:
        """Return the ranks that share this rank's rows."""
        first = self.rank - self.cp_rank
        return list(range(first, first + self.cp))

    def reduce_ranks(self, owners: Iterable[Owners]) -> dict[tuple[Owners, bool], list[int]]:
        """Return the ranks of the groups in which this rank sums gradients.

        owners: sets of pp ranks that hold a parameter. Dense parameters are summed over owners ×
        dp × ep, experts over owners × dp. The keys are (owners, whether it is for experts). The
        larger sets come first, so that the members of a group have equally many groups before it:
        torch.distributed names a group after that number.
        """
        own = [pp_ranks for pp_ranks in set(owners) if self.pp_rank in pp_ranks]
        groups: dict[tuple[Owners, bool], list[int]] = {}
        for pp_ranks in sorted(own, key=lambda ranks: (-len(ranks), ranks)):
            everywhere = self.ranks_of(pp_ranks, range(self.dp), range(self.ep))
            groups[pp_ranks, False] = everywhere
            groups[pp_ranks, True] = self.ranks_of(pp_ranks, range(self.dp), [self.ep_rank])
        return groups

    def count_communicators(self, owners: Iterable[Owners], ranks_per_node: int) -> dict[str, int]:
        """Return the number of communicators that this rank opens for a training run, by purpose.

        NCCL opens one for each group that has a collective, and one for each pair of neighbors in
        the groups of messages up and down.
        """
        return {
            "all ranks": 1,
            "neighbors": 2 * len(self.neighbors()),
            "experts": len(self.expert_ranks(ranks_per_node)) if self.ep > 1 else 0,
            "context": int(self.cp > 1),
            "gradients": len(self.reduce_ranks(owners)),
        }


class Mesh(MeshLayout):
    """The coordinates of this rank and its process groups.

    Each rank creates only the groups to which it belongs, in the order of `MeshLayout`, and opens
    their communicators at once. NCCL would open them at the first use, which blocks the host until
    the peers arrive: a pipeline that posts its receives first would wait forever. The communicators
    are not split from the one of all ranks: torch.distributed would then run the messages of all
    pairs in one queue.

    timeout: the time limit of a collective call.
    """

    def __init__(
        self, pp: int, dp: int, ep: int, device: torch.device, timeout: timedelta | None = None,
        cp: int = 1,
    ):  # fmt: skip
        super().__init__(pp, dp, ep, dist.get_rank(), cp)
        assert self.world == dist.get_world_size(), "every rank belongs to the mesh"
        self.device, self.timeout = device, timeout
        self.open_communicator(None)
        # Two groups of the same ranks, so that messages up and down never wait for each other.
        self.up_group = self.create_group(self.pipeline_ranks())
        self.down_group = self.create_group(self.pipeline_ranks())
        self.connect_neighbors()
        self.reduce_groups: dict[tuple[Owners, bool], dist.ProcessGroup] = {}

    # ── Groups ──

    def create_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """Create a group; a collective call of its members alone."""
        return dist.new_group(ranks, self.timeout, use_local_synchronization=True)

    def create_open_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """Create a group and open its communicator; a collective call of its members alone."""
        group = self.create_group(ranks)
        self.open_communicator(group)
        return group

    def open_communicator(self, group: dist.ProcessGroup | None) -> None:
        """Run the first collective of a group; None: the group of all ranks."""
        with track_operation("opening of a communicator", group or range(self.world)):
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)

    def connect_neighbors(self) -> None:
        """Send one message between neighbors in the pipeline, up and down, in a fixed order."""
        for neighbor in self.neighbors():
            peer = self.rank_of(neighbor)
            with track_operation("connection of neighbors", [peer]):
                for group, is_up in ((self.up_group, True), (self.down_group, False)):
                    sends = is_up == (neighbor > self.pp_rank)
                    start = dist.isend if sends else dist.irecv
                    work = start(torch.zeros(1, device=self.device), peer, group=group)
                    assert work is not None, "both are members"
                    work.wait()

    @cached_property
    def ep_group(self) -> dist.ProcessGroup:
        """The group of this rank's experts, created at its first use: a collective call."""
        return self.create_expert_groups()[0]

    @cached_property
    def cp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share rows, or None if each has its own; created at its first use."""
        return self.create_open_group(self.context_ranks()) if self.cp > 1 else None

    def create_expert_groups(self, ranks_per_node: int = 0) -> list[dist.ProcessGroup]:
        """Return the group of this rank's experts, or [internode, intranode]; a collective call."""
        return [self.create_open_group(ranks) for ranks in self.expert_ranks(ranks_per_node)]

    def create_reduce_groups(self, owners: Iterable[Owners]) -> None:
        """Create the groups that sum the gradients of parameters which these pp ranks own.

        A collective call: every rank must pass the same owners.
        """
        for key, ranks in self.reduce_ranks(owners).items():
            self.reduce_groups[key] = self.create_open_group(ranks)

    # ── Collectives ──

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum x over all ranks in place and return it."""
        with track_operation("sum over all ranks", range(self.world)):
            dist.all_reduce(x)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Take the maximum of x over all ranks in place and return it."""
        with track_operation("maximum over all ranks", range(self.world)):
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x


@contextmanager
def init_distributed(device_name: str, timeout: timedelta) -> Iterator[torch.device]:
    """Join the process group of torchrun or srun in the `with` block; yield this rank's device.

    timeout: the time limit of a collective call.
    """
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    # torchrun keeps its store when it restarts ranks. Under the same keys they would find the
    # addresses of ranks that have ended, and could not connect.
    store = dist.PrefixStore(f"start_{num_restarts()}", store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    try:
        yield device
    finally:
        dist.destroy_process_group()
