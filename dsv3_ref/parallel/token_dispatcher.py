"""Dispatch of tokens to the ranks of their experts, and combine, by all-to-alls in one or two hops.

A hop sends a token once to every destination that holds any of its experts. With two hops the
first crosses nodes, once per token and node, and the second stays within the node (§3.2.2).
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_ref.config import Config
from dsv3_ref.expert_parallel import (
    IndexAdd,
    apply_local_experts,
    dispatch_layout,
    mask_remote_weights,
    to_local_expert_ids,
)
from dsv3_ref.fp8 import Quantized, act_dequant, act_quant
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.tape import Grads, Steps, Tape
from dsv3_ref.parallel.watchdog import track_operation

LINKS = ("local", "intranode", "internode")


@dataclass
class Traffic:
    """Bytes that this rank sent over each kind of link, and how long it waited for all-to-alls."""

    bytes: Counter[str] = field(default_factory=Counter)  # by link
    in_flight_s: float = 0.0  # from start to end, summed over all-to-alls
    exposed_s: float = 0.0  # the part of it during which this rank was waiting

    def clear(self) -> None:
        """Reset all counts to zero."""
        self.bytes.clear()
        self.in_flight_s = self.exposed_s = 0.0

    @property
    def hidden(self) -> float:
        """The fraction of the all-to-alls' time that was hidden behind computation."""
        return 1 - self.exposed_s / self.in_flight_s if self.in_flight_s else 1.0


@dataclass
class DispatchLevel:
    """One hop: a group of ranks, and the number of experts behind each of its members."""

    group: dist.ProcessGroup
    experts_per_member: int
    links: list[str]  # one of LINKS between this rank and each member
    traffic: Traffic
    num_waited: int = 0  # all-to-alls waited for so far; all members wait in the same order

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.links)

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Steps[Tensor]:
        """Send `send[i]` rows to the i-th member, receive `receive[i]` from it, and return those.

        Yields once while the rows are in flight.
        """
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        start = time.perf_counter()
        work = dist.all_to_all_single(
            out, rows.contiguous(), receive, send, group=self.group, async_op=True
        )
        for link, n in zip(self.links, send):
            self.traffic.bytes[link] += n * rows[:1].nbytes
        yield
        wait_start = time.perf_counter()
        self.num_waited += 1
        with track_operation(f"all-to-all of tokens, number {self.num_waited}", self.group):
            work.wait()
        end = time.perf_counter()
        self.traffic.exposed_s += end - wait_start
        self.traffic.in_flight_s += end - start
        return out


def dispatch_levels(
    config: Config, mesh: Mesh, ranks_per_node: int, traffic: Traffic
) -> list[DispatchLevel]:
    """Return one level over the expert group, or two if the group spans several nodes.

    ranks_per_node: ranks of the expert group in one node; 0 if all of them are in one node.
    """
    experts_per_rank = config.n_routed_experts // mesh.ep

    def links_to(ep_ranks: range) -> list[str]:
        return [link_between(mesh.ep_rank, e, ranks_per_node) for e in ep_ranks]

    groups = mesh.create_expert_groups(ranks_per_node)
    if len(groups) == 1:
        return [DispatchLevel(groups[0], experts_per_rank, links_to(range(mesh.ep)), traffic)]
    internode, intranode = groups
    place = mesh.ep_rank % ranks_per_node
    first = mesh.ep_rank - place
    same_place = range(place, mesh.ep, ranks_per_node)
    own_node = range(first, first + ranks_per_node)
    experts_per_node = experts_per_rank * ranks_per_node
    return [
        DispatchLevel(internode, experts_per_node, links_to(same_place), traffic),
        DispatchLevel(intranode, experts_per_rank, links_to(own_node), traffic),
    ]


def link_between(a: int, b: int, ranks_per_node: int) -> str:
    """Return the kind of link between two ranks; ranks_per_node 0 means that they share a node."""
    if a == b:
        return "local"
    if not ranks_per_node or a // ranks_per_node == b // ranks_per_node:
        return "intranode"
    return "internode"


# ── Many tensors in one message ──


def contiguous_copy(x: Tensor) -> Tensor:
    """Return a contiguous copy, which can be viewed as another dtype for any shape."""
    return x.clone(memory_format=torch.contiguous_format)


def pack_bytes(*tensors: Tensor) -> Tensor:
    """Return the rows of several tensors side by side as bytes, to be sent in one message."""
    return torch.cat([contiguous_copy(t).flatten(1).view(torch.uint8) for t in tensors], 1)


def unpack_bytes(rows: Tensor, *like: Tensor) -> list[Tensor]:
    """Undo `pack_bytes`; `like` has the dtypes and widths."""
    widths = [t.shape[1:].numel() * t.element_size() for t in like]
    parts = [contiguous_copy(x).view(t.dtype) for x, t in zip(rows.split(widths, 1), like)]
    return [x.view(len(x), *t.shape[1:]) for x, t in zip(parts, like)]


def empty_rows(x: Tensor) -> Tensor:
    """Return a tensor without rows that has the width, dtype and device of x."""
    return x.new_empty(0, *x.shape[1:])


def grad_or_zeros(grad: Tensor | None, like: Tensor, n: int) -> Tensor:
    """Return a gradient, or zeros for n rows whose result is not used."""
    return like.new_zeros(n, *like.shape[1:]) if grad is None else grad


# ── Transfers ──


class LevelPlan:
    """The row counts of one micro-batch at one level, for dispatch and combine."""

    def __init__(self, level: DispatchLevel, send: list[int], receive: list[int], fp8: bool):
        self.level, self.fp8 = level, fp8
        self.send, self.receive = send, receive

    def dispatch(self, x_md: Tensor, *more: Tensor) -> Steps[tuple[list[Tensor], Quantized | None]]:
        """Send rows to their destinations; return (those that arrive, their FP8 values or None).

        FP8 has power-of-two scales, as in the report (§3.2.2, §3.3.3).
        """
        parts = act_quant(x_md.contiguous(), True) if self.fp8 else (x_md,)
        packed = pack_bytes(*parts, *more)
        received = yield from self.level.all_to_all(packed, self.send, self.receive)
        rows = unpack_bytes(received, *parts, *more)
        if not self.fp8:
            return rows, None
        q, s, *others = rows
        return [act_dequant(q, s).to(x_md.dtype), *others], (q, s)

    def combine(self, y_md: Tensor, *more: Tensor) -> Steps[list[Tensor]]:
        """Send rows back to the ranks that dispatched them, without quantization."""
        packed = pack_bytes(y_md, *more)
        received = yield from self.level.all_to_all(packed, self.receive, self.send)
        return unpack_bytes(received, y_md, *more)


class Dispatch:
    """The transfer of tokens, weights and expert ids to their destinations.

    The backward pass combines the gradients of tokens and weights.
    """

    def __init__(self, plan: LevelPlan, expert_mk: Tensor):
        self.plan = plan
        self.expert_mk: Tensor | None = expert_mk
        self.quantized: Quantized | None = None

    def forward(self, x_md: Tensor, weight_mk: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the rows; return those that arrive, with their weights."""
        assert self.expert_mk is not None
        rows, self.quantized = yield from self.plan.dispatch(x_md, weight_mk, self.expert_mk)
        *arrived, self.expert_mk = rows
        self.like = [empty_rows(x) for x in arrived]
        return tuple(arrived)

    def unpack(self) -> tuple[Tensor, Quantized | None]:
        """Return the expert ids and FP8 values of the rows that arrived, and release both."""
        expert_mk, quantized = self.expert_mk, self.quantized
        assert expert_mk is not None, "unpacked once"
        self.expert_mk = self.quantized = None
        return expert_mk, quantized

    def backward(self, *grads: Tensor | None) -> Steps[Grads]:
        """Send the gradients of tokens and weights back."""
        n = sum(self.plan.receive)
        rows = [grad_or_zeros(g, like, n) for g, like in zip(grads, self.like)]
        return (yield from self.plan.combine(*rows))


class Combine:
    """The transfer of results back to the tokens' ranks; the backward pass dispatches gradients."""

    def __init__(self, plan: LevelPlan):
        self.plan = plan

    def forward(self, y_md: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the results back."""
        self.like = empty_rows(y_md)
        return tuple((yield from self.plan.combine(y_md)))

    def backward(self, g_md: Tensor | None) -> Steps[Grads]:
        """Send the gradients of the results to the experts."""
        g_md = grad_or_zeros(g_md, self.like, sum(self.plan.send))
        return (yield from self.plan.dispatch(g_md))[0]


class AllToAllDispatcher:
    """A dispatcher of a micro-batch's tokens by one or two levels of all-to-alls, on a tape."""

    def __init__(self, levels: list[DispatchLevel], fp8: bool = False):
        self.levels, self.fp8 = levels, fp8

    def apply_experts(
        self, tape: Tape, experts: GroupedExperts, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return Σ_k w_nk·expert_nk(x_n) over experts on many ranks; yields during transfers."""
        return self.apply_levels(self.levels, tape, experts, x_nd, weight_nk, expert_nk, None)

    def apply_levels(
        self, levels: list[DispatchLevel], tape: Tape, experts: GroupedExperts, x_nd: Tensor,
        weight_nk: Tensor, expert_nk: Tensor, quantized: Quantized | None,
    ) -> Steps[Tensor]:  # fmt: skip
        """Apply the experts behind these levels, or the local experts if there are no levels.

        quantized: the FP8 values and scales in which x_nd arrived, or None.
        """
        if not levels:
            return tape.run(
                lambda x, w: apply_local_experts(experts, x, w, expert_nk, quantized),
                x_nd, weight_nk,
            )  # fmt: skip
        level, *rest = levels
        token_m, dest_m, count = dispatch_layout(expert_nk, level.experts_per_member, level.size)
        receive = torch.empty_like(count)
        dist.all_to_all_single(receive, count, group=level.group)
        plan = LevelPlan(level, count.tolist(), receive.tolist(), self.fp8)
        expert_mk = to_local_expert_ids(expert_nk[token_m], dest_m, level.experts_per_member)
        rows = tape.run(
            lambda x, w: (x[token_m], mask_remote_weights(w[token_m], expert_mk)), x_nd, weight_nk
        )
        dispatch = Dispatch(plan, expert_mk)
        x_md, w_mk = yield from tape.run_comm(dispatch, *rows)
        y_md = yield from self.apply_levels(rest, tape, experts, x_md, w_mk, *dispatch.unpack())
        (y_md,) = yield from tape.run_comm(Combine(plan), y_md)
        n = len(x_nd)
        return tape.run(lambda y: IndexAdd.apply(y, token_m, n), y_md)
