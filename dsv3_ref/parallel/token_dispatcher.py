"""Tokens to the ranks that hold their experts, and back: all-to-all in one hop or two (§3.2.2).

A hop sends a token once to every destination that holds any of its experts. With two hops the
first goes across nodes, once per token and node, the second to the ranks inside the node.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dsv3_ref.config import Config
from dsv3_ref.expert_parallel import (
    IndexAdd,
    apply_local_experts,
    dispatch_layout,
    mask_remote_weights,
    to_local_expert_ids,
)
from dsv3_ref.fp8 import act_dequant, act_quant
from dsv3_ref.parallel.watchdog import track_operation


@dataclass
class Traffic:
    """What went over the links of a group, and how long this rank stood waiting for it."""

    bytes: Counter = field(default_factory=Counter)  # sent by this rank, by link
    in_flight_s: float = 0.0  # seconds from the start of every exchange to its end
    exposed_s: float = 0.0  # seconds of these in which this rank could only wait

    def clear(self) -> None:
        """Begin to count anew."""
        self.bytes.clear()
        self.in_flight_s = self.exposed_s = 0.0

    @property
    def hidden(self) -> float:
        """Share of the exchanges' time that lay behind computation."""
        return 1 - self.exposed_s / self.in_flight_s if self.in_flight_s else 1.0


LINKS = ("local", "intranode", "internode")


@dataclass
class DispatchLevel:
    """One level of the exchange: a group, and how many experts lie behind each of its members."""

    group: dist.ProcessGroup
    experts_per_member: int  # behind one member
    links: list[
        str
    ]  # what lies between this rank and each member: "local", "intranode", "internode"
    traffic: Traffic
    n: int = 0  # exchanges waited for so far: all members wait in the same order

    @property
    def size(self) -> int:
        return len(self.links)

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]):
        """Rows to every member, `send[i]` to the i-th; yields once while they travel."""
        out, start = rows.new_empty(sum(receive), *rows.shape[1:]), time.perf_counter()
        work = dist.all_to_all_single(
            out, rows.contiguous(), receive, send, group=self.group, async_op=True
        )
        for link, n in zip(self.links, send):
            self.traffic.bytes[link] += n * rows[:1].nbytes
        yield
        asked, self.n = time.perf_counter(), self.n + 1
        with track_operation(f"exchange of tokens, number {self.n}", self.group):
            work.wait()
        self.traffic.exposed_s += time.perf_counter() - asked
        self.traffic.in_flight_s += time.perf_counter() - start
        return out


def dispatch_levels(c: Config, mesh, ranks_per_node: int, traffic: Traffic) -> list[DispatchLevel]:
    """One hop over the expert group; or two, if it spans nodes of `ranks_per_node` of its ranks."""
    share, nodes = c.n_routed_experts // mesh.ep, mesh.ep // ranks_per_node if ranks_per_node else 1
    link = lambda e: (
        "local"
        if e == mesh.ep_rank
        else "intranode"
        if on_same_node(e, mesh.ep_rank, ranks_per_node)
        else "internode"
    )
    if nodes == 1:
        return [DispatchLevel(mesh.ep_group, share, [link(e) for e in range(mesh.ep)], traffic)]
    across, inside = mesh.create_node_groups(ranks_per_node)
    first = mesh.ep_rank % ranks_per_node, mesh.ep_rank - mesh.ep_rank % ranks_per_node
    return [
        DispatchLevel(
            across,
            share * ranks_per_node,
            [link(first[0] + n * ranks_per_node) for n in range(nodes)],
            traffic,
        ),
        DispatchLevel(inside, share, [link(first[1] + i) for i in range(ranks_per_node)], traffic),
    ]


def on_same_node(a: int, b: int, ranks_per_node: int) -> bool:
    """Whether two ranks of an expert group share a node; without nodes all do."""
    return not ranks_per_node or a // ranks_per_node == b // ranks_per_node


# ── Many tensors, one message ──


def contiguous_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: only that can be viewed as another dtype, whatever its shape."""
    return x.clone(memory_format=torch.contiguous_format)


def pack_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """Rows of several tensors side by side, (m, bytes): one message, and no dtype is refused."""
    return torch.cat([contiguous_copy(t).flatten(1).view(torch.uint8) for t in tensors], 1)


def unpack_bytes(rows: torch.Tensor, *like: torch.Tensor) -> list[torch.Tensor]:
    """The reverse of `pack_bytes`, with the dtypes and widths of `like`."""
    widths = [t.shape[1:].numel() * t.element_size() for t in like]
    parts = [contiguous_copy(x).view(t.dtype) for x, t in zip(rows.split(widths, 1), like)]
    return [x.view(len(x), *t.shape[1:]) for x, t in zip(parts, like)]


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """No rows of the width, dtype and device of x."""
    return x.new_empty(0, *x.shape[1:])


def zero_rows(like: torch.Tensor, n: int) -> torch.Tensor:
    """The gradient of n rows that nobody used."""
    return like.new_zeros(n, *like.shape[1:])


class LevelPlan:
    """One hop of one micro-batch's tokens: rows (m, d) out, and the same rows back."""

    def __init__(self, hop: DispatchLevel, send: list[int], receive: list[int], fp8: bool):
        self.hop, self.send, self.receive, self.fp8 = hop, send, receive, fp8

    def dispatch(self, x_md, *more):
        """To the destinations: (rows, codes of the first of them if they went as FP8).

        FP8 with power-of-two scales, as the report dispatches (§3.2.2, §3.3.3).
        """
        codes = act_quant(x_md.contiguous(), True) if self.fp8 else (x_md,)
        rows = yield from self.hop.all_to_all(pack_bytes(*codes, *more), self.send, self.receive)
        rows = unpack_bytes(rows, *codes, *more)
        if not self.fp8:
            return rows, None
        return [act_dequant(*rows[:2]).to(x_md.dtype), *rows[2:]], rows[:2]

    def combine(self, y_md, *more):
        """To where the rows came from, in bf16 or wider."""
        rows = yield from self.hop.all_to_all(pack_bytes(y_md, *more), self.receive, self.send)
        return unpack_bytes(rows, y_md, *more)


class Dispatch:
    """Transfer: tokens, their weights and experts to the destinations; gradients come back."""

    def __init__(self, leg: LevelPlan, expert_mk):
        self.leg, self.expert_mk = leg, expert_mk

    def forward(self, x_md, weight_mk):
        rows, self.codes = yield from self.leg.dispatch(x_md, weight_mk, self.expert_mk)
        *arrived, self.expert_mk = rows
        self.like = [empty_rows(a) for a in arrived]
        return tuple(arrived)

    def unpack(self):
        """Experts of the rows that arrived, and the rows' codes; the tape keeps neither."""
        unpacked, self.expert_mk, self.codes = (self.expert_mk, self.codes), None, None
        return unpacked

    def backward(self, *gs):
        gs = [
            zero_rows(a, sum(self.leg.receive)) if g is None else g for g, a in zip(gs, self.like)
        ]
        return (yield from self.leg.combine(*gs))


class Combine:
    """Transfer: results to where the tokens came from; their gradients travel as tokens do."""

    def __init__(self, leg: LevelPlan):
        self.leg = leg

    def forward(self, y_md):
        self.like = empty_rows(y_md)
        return tuple((yield from self.leg.combine(y_md)))

    def backward(self, g_md):
        g_md = zero_rows(self.like, sum(self.leg.send)) if g_md is None else g_md
        return (yield from self.leg.dispatch(g_md))[0]


class AllToAllDispatcher:
    """Dispatch of a micro-batch's tokens to experts of other ranks through all hops, on a tape."""

    def __init__(self, levels: list[DispatchLevel], fp8: bool = False):
        self.levels, self.fp8 = levels, fp8

    def apply_experts(self, tape, experts, x_nd, weight_nk, expert_nk):
        """Σ_k w_nk·expert_nk(x_n) over experts on many ranks; a generator."""
        return self.apply_levels(tape, experts, x_nd, weight_nk, expert_nk, None, self.levels)

    def apply_levels(self, tape, experts, x_nd, weight_nk, expert_nk, codes, levels):
        """Hop by hop, then the experts that are here."""
        if not levels:
            here = lambda x_nd, weight_nk: apply_local_experts(
                experts, x_nd, weight_nk, expert_nk, codes
            )
            return tape.run(here, x_nd, weight_nk)
        hop, *rest = levels
        token_m, dest_m, count = dispatch_layout(expert_nk, hop.experts_per_member, hop.size)
        theirs = torch.empty_like(count)
        dist.all_to_all_single(theirs, count, group=hop.group)
        leg = LevelPlan(hop, count.tolist(), theirs.tolist(), self.fp8)
        expert_mk = to_local_expert_ids(expert_nk[token_m], dest_m, hop.experts_per_member)
        rows = lambda x_nd, weight_nk: (
            x_nd[token_m],
            mask_remote_weights(weight_nk[token_m], expert_mk),
        )
        dispatch = Dispatch(leg, expert_mk)
        sent = yield from tape.run_comm(dispatch, *tape.run(rows, x_nd, weight_nk))
        arrived = *sent, *dispatch.unpack()
        y_md = yield from self.apply_levels(tape, experts, *arrived, rest)
        (y_md,) = yield from tape.run_comm(Combine(leg), y_md)
        n = len(x_nd)
        return tape.run(lambda y_md: IndexAdd.apply(y_md, token_m, n), y_md)
