"""Dispatch of tokens to the ranks of their experts, and combine, by all-to-alls in one or two hops.

A hop sends a token once to every destination that holds any of its experts. With two hops the
first crosses nodes, once per token and node, and the second stays within the node (§3.2.2).

With exact sizes the host waits for the counts of every hop. With fixed sizes (`FixedSizes`) nothing
depends on the routing, so it never waits for the device.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_ref.config import Config
from dsv3_ref.expert_parallel import (
    apply_local_experts,
    dispatch_layout,
    mask_remote_weights,
    padded_dispatch_layout,
    sum_token_rows,
    take_rows,
    to_local_expert_ids,
    visit_probability,
)
from dsv3_ref.fp8 import Quantized, act_dequant, act_quant
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.tape import Grads, Steps, Tape
from dsv3_ref.parallel.watchdog import track_operation

LINKS = ("local", "intranode", "internode")
CUDA_CAPACITY = 1.25  # the default of --dispatch-capacity on CUDA


@dataclass
class Traffic:
    """Bytes that this rank sent over each kind of link, and how long it waited for all-to-alls."""

    bytes: Counter[str] = field(default_factory=Counter)  # by link
    in_flight_s: float = 0.0  # from start to end, summed over all-to-alls
    exposed_s: float = 0.0  # the part of it during which this rank was waiting
    clocks: list["CUDAClock"] = field(default_factory=list)  # not read yet
    counts: list[tuple[list[str], Tensor]] = field(default_factory=list)  # bytes, not read yet

    def clear(self) -> None:
        """Reset all counts to zero."""
        self.bytes.clear()
        self.clocks.clear()
        self.counts.clear()
        self.in_flight_s = self.exposed_s = 0.0

    def start_clock(self, device: torch.device) -> "HostClock | CUDAClock":
        """Return the clock of an all-to-all that starts now."""
        return CUDAClock(self) if device.type == "cuda" else HostClock(self)

    def count_later(self, links: list[str], bytes_i: Tensor) -> None:
        """Note the bytes sent over each link, which only the device knows."""
        self.counts.append((links, bytes_i))

    def read_device(self) -> None:
        """Add the times and bytes that the device has measured; the host waits for them."""
        for clock in self.clocks:
            clock.read()
        for links, bytes_i in self.counts:
            for link, n in zip(links, bytes_i.tolist()):
                self.bytes[link] += n
        self.clocks.clear()
        self.counts.clear()

    @property
    def hidden(self) -> float:
        """The fraction of the all-to-alls' time that was hidden behind computation."""
        return 1 - self.exposed_s / self.in_flight_s if self.in_flight_s else 1.0


class InFlight(Protocol):
    """A transfer that has begun: a `dist.Work`, or kernels."""

    def wait(self) -> object:
        """Wait for it; on CUDA only the current stream does."""


class HostClock:
    """The times of an all-to-all for which the host waits, as with gloo."""

    def __init__(self, traffic: Traffic):
        self.traffic, self.start = traffic, time.perf_counter()

    def wait(self, work: InFlight) -> None:
        """Wait until the rows are there, and add the times."""
        wait_start = time.perf_counter()
        work.wait()
        end = time.perf_counter()
        self.traffic.exposed_s += end - wait_start
        self.traffic.in_flight_s += end - self.start


class CUDAClock:
    """The times of an all-to-all for which the stream of computation waits, and the host does not.

    A second stream waits for the rows alone, so that their arrival can be told apart from the end
    of the computation.
    """

    streams: ClassVar[dict[int, torch.cuda.Stream]] = {}  # by device, to wait in

    def __init__(self, traffic: Traffic):
        self.traffic, self.start = traffic, self.record()

    def record(self) -> torch.cuda.Event:
        """Return an event at this place of the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, work: InFlight) -> None:
        """Let the current stream wait until the rows are there; `read` adds the times."""
        self.computed = self.record()
        device = torch.cuda.current_device()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(self.streams[device]):
            work.wait()
            self.arrived = self.record()
        torch.cuda.current_stream().wait_event(self.arrived)
        self.resumed = self.record()
        self.traffic.clocks.append(self)

    def read(self) -> None:
        """Add the times, in seconds; the host waits until they are known."""
        self.resumed.synchronize()
        self.traffic.exposed_s += 1e-3 * self.computed.elapsed_time(self.resumed)
        self.traffic.in_flight_s += 1e-3 * self.start.elapsed_time(self.arrived)


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
        clock = self.traffic.start_clock(rows.device)
        work = dist.all_to_all_single(
            out, rows.contiguous(), receive, send, group=self.group, async_op=True
        )
        for link, n in zip(self.links, send):
            self.traffic.bytes[link] += n * rows[:1].nbytes
        yield
        self.num_waited += 1
        with track_operation(f"all-to-all of tokens, number {self.num_waited}", self.group):
            clock.wait(work)
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
    """Return the rows of several tensors side by side as bytes, to be sent in one message.

    The bytes of a single tensor are a view of it.
    """
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].stride(-1) == 1:
        return tensors[0].flatten(1).view(torch.uint8)
    return torch.cat([contiguous_copy(t).flatten(1).view(torch.uint8) for t in tensors], 1)


def unpack_bytes(rows: Tensor, *like: Tensor) -> list[Tensor]:
    """Undo `pack_bytes`; `like` has the dtypes and widths. A single tensor is a view of `rows`."""
    if len(like) == 1:
        return [rows.view(like[0].dtype).view(len(rows), *like[0].shape[1:])]
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


class HopSize(Protocol):
    """The number of members of a hop, and of the experts behind each of them."""

    @property
    def size(self) -> int:
        """The number of members."""

    @property
    def experts_per_member(self) -> int:
        """The number of experts behind a member."""


class FixedSizes:
    """Numbers of rows per destination and of choices per rank that do not depend on the routing.

    They are `factor` times the mean for equally likely experts. Choices beyond them are left out
    and counted on the device; the caller must then repeat the step with exact sizes.

    n_experts, k: experts of a layer and choices per token; num_tokens: the most tokens that a rank
    of the expert group has in a micro-batch, which all of them must agree on.
    """

    def __init__(self, factor: float, n_experts: int, k: int, num_tokens: int = 0):
        self.factor, self.num_tokens = factor, num_tokens
        self.n_experts, self.k = n_experts, k
        self.num_left_out: int | Tensor = 0

    def rows_per_level(self, levels: Sequence[HopSize]) -> list[int]:
        """Return the rows per destination of each level, then the choices to compute on a rank."""
        capacities = []
        rows = num_tokens = self.num_tokens  # with and without empty rows
        for level in levels:
            share = visit_probability(self.n_experts, level.experts_per_member, self.k)
            capacities.append(max(1, min(rows, math.ceil(self.factor * num_tokens * share))))
            rows, num_tokens = level.size * capacities[-1], level.size * num_tokens
        n_local = levels[-1].experts_per_member
        mean = num_tokens * self.k * n_local / self.n_experts
        most = rows * min(self.k, n_local)
        return [*capacities, max(1, min(most, math.ceil(self.factor * mean)))]

    def add_left_out(self, n: Tensor) -> None:
        """Count choices that were left out."""
        self.num_left_out = self.num_left_out + n

    def take_left_out(self) -> int | Tensor:
        """Return the number that was counted, and count from 0 again."""
        count, self.num_left_out = self.num_left_out, 0
        return count


@dataclass
class LevelLayout:
    """The rows that a rank sends at one level, in the order of destinations."""

    plan: LevelPlan
    token_m: Tensor  # the token of each row; the number of tokens: an empty row
    expert_mk: Tensor  # its experts as the destination numbers them; −1: none
    has_empty: bool

    def take(self, x_nd: Tensor, weight_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and their weights, 0 where the expert is elsewhere."""
        weight_mk = take_rows(weight_nk, self.token_m, self.has_empty)
        x_md = take_rows(x_nd, self.token_m, self.has_empty)
        return x_md, mask_remote_weights(weight_mk, self.expert_mk)


# (rows, weights, expert ids, FP8 values and scales or None) → the weighted sums of a rank's experts
ApplyLocally = Callable[[Tensor, Tensor, Tensor, Quantized | None], Steps[Tensor]]


class LastHop(Protocol):
    """Kernels that take the place of the last level's all-to-alls if sizes are fixed."""

    def apply(
        self, tape: Tape, fixed: FixedSizes, capacity: int, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor, quantized: Quantized | None, apply_locally: ApplyLocally,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return the sums of apply_locally's results at the ranks that each token goes to."""


class AllToAllDispatcher:
    """A dispatcher of a micro-batch's tokens by one or two levels of all-to-alls, on a tape.

    Without levels all experts are on this rank. fixed: the sizes of all messages and products, or
    None for exact sizes. last_hop: kernels for the last level, which only fixed sizes use.
    """

    def __init__(
        self, levels: list[DispatchLevel], fp8: bool = False, fixed: FixedSizes | None = None,
        last_hop: LastHop | None = None,
    ):  # fmt: skip
        self.levels, self.fp8 = levels, fp8
        self.fixed, self.last_hop = fixed, last_hop

    @contextmanager
    def exact_sizes(self) -> Iterator[None]:
        """Dispatch with exact sizes in the `with` block."""
        fixed, self.fixed = self.fixed, None
        try:
            yield
        finally:
            self.fixed = fixed

    def apply_experts(
        self, tape: Tape, experts: GroupedExperts, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return Σ_k w_nk·expert_nk(x_n) over experts on many ranks; yields during transfers."""
        sizes = self.fixed.rows_per_level(self.levels) if self.fixed else []
        return self.apply_levels(self.levels, sizes, tape, experts, x_nd, weight_nk, expert_nk)

    def apply_levels(
        self, levels: list[DispatchLevel], sizes: list[int], tape: Tape, experts: GroupedExperts,
        x_nd: Tensor, weight_nk: Tensor, expert_nk: Tensor, quantized: Quantized | None = None,
    ) -> Steps[Tensor]:  # fmt: skip
        """Apply the experts behind these levels, or the local experts if there are no levels.

        sizes: the fixed sizes from here on, if any; quantized: the FP8 values and scales in which
        x_nd arrived, or None.
        """
        if not levels:
            max_rows = self.max_local_rows(sizes, expert_nk)
            return tape.run(
                lambda x, w: apply_local_experts(experts, x, w, expert_nk, quantized, max_rows),
                x_nd, weight_nk,
            )  # fmt: skip
        if self.fixed and self.last_hop and len(levels) == 1:
            apply_locally = partial(self.apply_levels, [], sizes[1:], tape, experts)
            return (
                yield from self.last_hop.apply(
                    tape, self.fixed, sizes[0], x_nd, weight_nk, expert_nk, quantized,
                    apply_locally,
                )
            )  # fmt: skip
        if sizes:
            layout = self.fixed_layout(levels[0], sizes[0], expert_nk)
        else:
            layout = self.exact_layout(levels[0], expert_nk)
        dispatch = Dispatch(layout.plan, layout.expert_mk)
        n, sent = len(x_nd), tape.run(layout.take, x_nd, weight_nk)
        del x_nd, weight_nk  # no level holds what it was given until its results are back
        received = tape.run_comm(dispatch, *sent)
        del sent
        x_md, w_mk = yield from received
        inner = self.apply_levels(
            levels[1:], sizes[1:], tape, experts, x_md, w_mk, *dispatch.unpack()
        )
        del received, x_md, w_mk
        y_md = yield from inner
        (y_md,) = yield from tape.run_comm(Combine(layout.plan), y_md)
        return tape.run(lambda y: sum_token_rows(y, layout.token_m, n, layout.has_empty), y_md)

    def exact_layout(self, level: DispatchLevel, expert_nk: Tensor) -> LevelLayout:
        """Return the rows to send; the host waits for their numbers, and for those to receive."""
        per = level.experts_per_member
        token_m, dest_m, count = dispatch_layout(expert_nk, per, level.size)
        receive = torch.empty_like(count)
        dist.all_to_all_single(receive, count, group=level.group)
        plan = LevelPlan(level, count.tolist(), receive.tolist(), self.fp8)
        expert_mk = to_local_expert_ids(expert_nk[token_m], dest_m, per)
        return LevelLayout(plan, token_m, expert_mk, has_empty=False)

    def fixed_layout(self, level: DispatchLevel, capacity: int, expert_nk: Tensor) -> LevelLayout:
        """Return `capacity` rows for each member, some of them empty."""
        assert self.fixed is not None
        per, counts = level.experts_per_member, [capacity] * level.size
        token_m, dest_m, left_out = padded_dispatch_layout(expert_nk, per, level.size, capacity)
        self.fixed.add_left_out(left_out)
        expert_mk = take_rows(expert_nk + 1, token_m, has_empty=True) - 1  # of an empty row: −1
        plan = LevelPlan(level, counts, counts, self.fp8)
        return LevelLayout(plan, token_m, to_local_expert_ids(expert_mk, dest_m, per), True)

    def max_local_rows(self, sizes: list[int], expert_nk: Tensor) -> int | None:
        """Return the fixed number of choices to compute on this rank, or None if it is exact.

        If all experts are here, every choice is computed, so that the number is known.
        """
        if not self.levels:
            return expert_nk.numel()
        if self.fixed is None:
            return None
        self.fixed.add_left_out(((expert_nk >= 0).sum() - sizes[0]).clamp(min=0))
        return sizes[0]
