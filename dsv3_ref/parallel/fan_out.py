"""The hop within a node by kernels on a few multiprocessors, in place of an all-to-all (§3.2.2).

Ranks of a node write to each other's memory (`torch.distributed._symmetric_memory`, over NVLink),
so a token is read once however many ranks it goes to, and results are summed as they are read. The
kernels are those of `dsv3_ref.kernels.dispatch`; the hop between nodes remains an all-to-all.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_ref.expert_parallel import find_destinations, mask_remote_weights, to_local_expert_ids
from dsv3_ref.fp8 import Quantized, act_dequant, act_quant
from dsv3_ref.parallel.tape import Grads, Steps, Tape
from dsv3_ref.parallel.token_dispatcher import (
    ApplyLocally,
    DispatchLevel,
    FixedSizes,
    empty_rows,
    grad_or_zeros,
)
from dsv3_ref.parallel.watchdog import track_operation

Shared = tuple[Tensor, Tensor]  # own bytes, and the addresses of all members' bytes, int64
NodeWindow = Any  # of dsv3_ref.kernels.dispatch: kernels are imported by name only, where they run
Allocate = Callable[[int, dist.ProcessGroup, torch.device], Shared]


def allocate_symmetric(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Shared:
    """Allocate zeros to which all ranks of a node can write; a collective call."""
    symmetric: Any = import_module("torch.distributed._symmetric_memory")
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, group)
    own.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)  # no peer writes before it is zero
    offset = own.data_ptr() - handle.buffer_ptrs[handle.rank]
    addresses = [address + offset for address in handle.buffer_ptrs]
    return own, torch.tensor(addresses, dtype=torch.int64, device=device)


class LaunchedKernels:
    """Kernels that were launched beside the computation."""

    def __init__(self, launch: Callable[[], None], stream: torch.cuda.Stream | None):
        self.event: torch.cuda.Event | None = None
        if stream is None:
            launch()
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
            self.event = stream.record_event()

    def wait(self) -> None:
        """Let the current stream wait for them."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class FanOut:
    """The last level of a dispatch with fixed sizes, by kernels.

    num_sms: multiprocessors of each kernel. All transfers of a rank run in one stream, in the order
    in which they begin, which is the same on all ranks.
    """

    def __init__(
        self, level: DispatchLevel, num_sms: int, fp8: bool = False,
        allocate: Allocate = allocate_symmetric,
    ):  # fmt: skip
        self.level, self.num_sms = level, num_sms
        self.fp8 = fp8
        self.allocate, self.kernels = allocate, import_module("dsv3_ref.kernels.dispatch")
        self.window: NodeWindow | None = None
        self.stream: torch.cuda.Stream | None = None

    def apply(
        self, tape: Tape, fixed: FixedSizes, capacity: int, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor, quantized: Quantized | None, apply_locally: ApplyLocally,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return the sums of apply_locally's results at the ranks that each token goes to."""
        level = self.level
        sent_ni = find_destinations(expert_nk, level.experts_per_member, level.size).cumsum(0)
        fixed.add_left_out((sent_ni[-1:] - capacity).clamp(min=0).sum())
        sent_ni = sent_ni.clamp(max=capacity).int()
        dispatch = FanOutDispatch(self, capacity, sent_ni, expert_nk, quantized)
        x_md, weight_mk = yield from tape.run_comm(dispatch, x_nd, weight_nk)
        expert_mk, quantized = dispatch.unpack()
        weight_mk = tape.run(lambda w: mask_remote_weights(w, expert_mk), weight_mk)
        y_md = yield from apply_locally(x_md, weight_mk, expert_mk, quantized)
        return (yield from tape.run_comm(FanOutCombine(dispatch), y_md))[0]

    # ── Transfers ──

    def window_for(self, capacity: int, x: Tensor, more: Tensor) -> NodeWindow:
        """Return this rank's window; a collective call when it must become larger."""
        kernels, members = self.kernels, self.level.size
        words = kernels.row_words(x, more)
        need = kernels.half_window_bytes(members, capacity, self.num_sms, words)
        if self.window is None or need > self.window.half_bytes:
            with track_operation("allocation of symmetric memory", self.level.group):
                own, peers_i = self.allocate(2 * need, self.level.group, x.device)
            transfer = torch.zeros(1, dtype=torch.int32, device=x.device)
            rank = self.level.group.rank()
            self.window = kernels.Window(peers_i, rank, capacity, self.num_sms, need, transfer, own)
            self.stream = torch.cuda.Stream(x.device) if x.is_cuda else None
        return replace(self.window, capacity=capacity)

    def run(self, window: NodeWindow, *launches: Callable[[], None]) -> Steps[None]:
        """Launch the kernels of a transfer; yield while they run beside the computation."""

        def launch() -> None:
            window.begin_transfer()
            for kernel in launches:
                kernel()

        clock = self.level.traffic.start_clock(window.transfer.device)
        self.level.num_waited += 1
        with track_operation(
            f"fan-out of tokens, number {self.level.num_waited}", self.level.group
        ):
            work = LaunchedKernels(launch, self.stream)
        yield
        clock.wait(work)

    def dispatch(
        self, capacity: int, sent_ni: Tensor, x_nd: Tensor, more_nw: Tensor
    ) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        """Send rows; return those that arrive, zero where none did, and their channels' ranges."""
        window, kernels = self.window_for(capacity, x_nd, more_nw), self.kernels
        x_md, more_mw = (window.empty_rows(x) for x in (x_nd, more_nw))
        x_md.view(torch.uint8).zero_()
        more_mw.zero_()
        range_icx = window.empty_ranges()
        yield from self.run(
            window,
            lambda: kernels.dispatch_send(window, x_nd, more_nw, sent_ni),
            lambda: kernels.dispatch_receive(window, x_md, more_mw, range_icx),
        )
        self.count_bytes(sent_ni, x_nd, more_nw)
        return x_md, more_mw, range_icx

    def combine(
        self, capacity: int, sent_ni: Tensor, range_icx: Tensor, y_md: Tensor, more_mw: Tensor
    ) -> Steps[tuple[Tensor, Tensor]]:
        """Send results back; return their sums for each token."""
        window, kernels = self.window_for(capacity, y_md, more_mw), self.kernels
        o_nd, more_nw = (x.new_empty(len(sent_ni), x.shape[1]) for x in (y_md, more_mw))
        yield from self.run(
            window,
            lambda: kernels.combine_send(window, y_md, more_mw, range_icx),
            lambda: kernels.combine_receive(window, o_nd, more_nw, sent_ni),
        )
        return o_nd, more_nw

    def count_bytes(self, sent_ni: Tensor, *parts: Tensor) -> None:
        """Count the bytes of the rows that went to each member; the host does not wait."""
        row_bytes = sum(x.shape[1] * x.element_size() for x in parts)
        self.level.traffic.count_later(self.level.links, sent_ni[-1:].sum(0) * row_bytes)


class FanOutDispatch:
    """The transfer of tokens, weights and expert ids to the ranks of the node.

    quantized: the FP8 values and scales in which the tokens arrived, which travel on as they are.
    The backward pass combines the gradients of tokens and weights.
    """

    def __init__(
        self, fan_out: FanOut, capacity: int, sent_ni: Tensor, expert_nk: Tensor,
        quantized: Quantized | None,
    ):  # fmt: skip
        self.fan_out, self.capacity = fan_out, capacity
        self.sent_ni = sent_ni
        self.expert_nk: Tensor | None = expert_nk
        self.quantized = quantized

    def send(self, x_nd: Tensor, *more: Tensor) -> Steps[tuple[Tensor, Quantized | None, Tensor]]:
        """Send tokens; return (rows, FP8 values or None, what else arrived in words)."""
        quantized, self.quantized = self.quantized, None
        words = [x.contiguous().view(torch.int32) for x in more]
        if not self.fan_out.fp8:
            more_nw = torch.cat([x_nd.new_empty(len(x_nd), 0, dtype=torch.int32), *words], 1)
            rows = self.fan_out.dispatch(self.capacity, self.sent_ni, x_nd.contiguous(), more_nw)
            x_md, more_mw, self.range_icx = yield from rows
            return x_md, None, more_mw
        q_nd, s_nz = quantized or act_quant(x_nd.contiguous(), True)
        more_nw = torch.cat([s_nz.contiguous().view(torch.int32), *words], 1)
        rows = self.fan_out.dispatch(self.capacity, self.sent_ni, q_nd.contiguous(), more_nw)
        q_md, more_mw, self.range_icx = yield from rows
        z = s_nz.shape[1]
        s_mz = more_mw[:, :z].contiguous().view(torch.float32)
        return act_dequant(q_md, s_mz).to(x_nd.dtype), (q_md, s_mz), more_mw[:, z:]

    def forward(self, x_nd: Tensor, weight_nk: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the rows; return those that arrive, with their weights."""
        assert self.expert_nk is not None
        ids_nk = (self.expert_nk + 1).int()  # 0: no expert, as in rows that no rank sent
        x_md, self.arrived, more_mw = yield from self.send(x_nd, ids_nk, weight_nk.float())
        ids_mk, bits_mk = more_mw.chunk(2, 1)
        rank = torch.full((len(x_md),), self.fan_out.level.group.rank(), device=x_md.device)
        per = self.fan_out.level.experts_per_member
        self.expert_nk = to_local_expert_ids(ids_mk - 1, rank, per)
        weight_mk = bits_mk.contiguous().view(torch.float32).to(weight_nk.dtype)
        self.like = empty_rows(x_md), empty_rows(weight_mk)
        return x_md, weight_mk

    def unpack(self) -> tuple[Tensor, Quantized | None]:
        """Return the expert ids and FP8 values of the rows that arrived, and release both."""
        expert_mk, quantized = self.expert_nk, self.arrived
        assert expert_mk is not None, "unpacked once"
        self.expert_nk = self.arrived = None
        return expert_mk, quantized

    def combine(self, y_md: Tensor, more_mw: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Send results back; return their sums, and those of what travels with them, in fp32."""
        results = y_md.contiguous(), more_mw.float().contiguous()
        return (
            yield from self.fan_out.combine(self.capacity, self.sent_ni, self.range_icx, *results)
        )

    def backward(self, *grads: Tensor | None) -> Steps[Grads]:
        """Send the gradients of tokens and weights back."""
        m = self.fan_out.level.size * self.capacity
        dx_md, dw_mk = (grad_or_zeros(g, like, m) for g, like in zip(grads, self.like))
        dx_nd, dw_nk = yield from self.combine(dx_md, dw_mk)
        return dx_nd, dw_nk.to(dw_mk.dtype)


class FanOutCombine:
    """The transfer of results back; the backward pass dispatches their gradients."""

    def __init__(self, dispatch: FanOutDispatch):
        self.dispatch = dispatch

    def forward(self, y_md: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the results back and sum them."""
        y_nd, _ = yield from self.dispatch.combine(y_md, y_md.new_empty(len(y_md), 0))
        self.like = empty_rows(y_nd)
        return (y_nd,)

    def backward(self, g_nd: Tensor | None) -> Steps[Grads]:
        """Send the gradients of the results to the experts."""
        g_nd = grad_or_zeros(g_nd, self.like, len(self.dispatch.sent_ni))
        return ((yield from self.dispatch.send(g_nd))[0],)
