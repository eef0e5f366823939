"""Dispatch and combine by DeepEP's kernels, over NVLink and RDMA (§3.2.2).

It uses `deep_ep.Buffer` of DeepEP 1, which DeepEP 2 keeps. It has not been run with the library
itself, which needs several GPUs. tests/parallel/test_deepep.py checks this side of the protocol
against a stand-in written from DeepEP's documentation and its own assertions. Rows are sent in
bf16, or to the experts in FP8; sums are in bf16.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from dsv3_ref.config import Config, UserError
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.fp8 import Quantized, act_dequant, act_quant
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.parallel.tape import Grads, Steps, Tape
from dsv3_ref.parallel.token_dispatcher import empty_rows, grad_or_zeros
from dsv3_ref.parallel.watchdog import track_operation

RANKS_PER_NODE = 8  # in DeepEP; more ranks need RDMA
LAYOUT_ARGUMENTS = (  # results of `get_dispatch_layout` before its event, as `dispatch` names them
    "num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank",
)  # fmt: skip


def import_buffer_class() -> Any:
    """Return `deep_ep.Buffer`; raise a `UserError` if deep_ep cannot be imported."""
    try:
        from deep_ep import Buffer
    except ImportError as e:
        raise UserError(
            f"--token-dispatcher deepep cannot import deep_ep ({e}): build it for these GPUs with "
            "`python setup.py install` in a clone of https://github.com/deepseek-ai/DeepEP"
        ) from e
    return Buffer


def create_buffer(group: dist.ProcessGroup, dim: int) -> Any:
    """Create a buffer for rows of `dim` bf16 numbers, as large as DeepEP's own settings require."""
    buffer_class, n = import_buffer_class(), group.size()
    try:
        configs = buffer_class.get_dispatch_config(n), buffer_class.get_combine_config(n)
    except AssertionError as e:
        raise UserError(f"--token-dispatcher deepep has no settings for --ep {n}: {e}") from e
    nvl_bytes = max(c.get_nvl_buffer_size_hint(2 * dim, n) for c in configs)
    rdma_bytes = 0
    if n > RANKS_PER_NODE:
        rdma_bytes = max(c.get_rdma_buffer_size_hint(2 * dim, n) for c in configs)
    return buffer_class(group, nvl_bytes, rdma_bytes)


class DeepEPDispatch:
    """The transfer of tokens, weights and expert ids to the experts' ranks.

    The backward pass combines the gradients of tokens and weights.
    """

    def __init__(self, deepep: "DeepEPDispatcher", expert_nk: Tensor):
        self.deepep = deepep
        self.expert_nk: Tensor | None = expert_nk

    def forward(self, x_nd: Tensor, weight_nk: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the rows; return those that arrive, with their weights."""
        assert self.expert_nk is not None
        expert_nk, self.expert_nk = self.expert_nk.long().contiguous(), None
        weight_nk = weight_nk.float().contiguous()
        *layout, _ = self.deepep.buffer.get_dispatch_layout(expert_nk, self.deepep.n_experts)
        arguments = {"topk_idx": expert_nk, "topk_weights": weight_nk}
        arguments |= dict(zip(LAYOUT_ARGUMENTS, layout))
        arrived = yield from self.deepep.dispatch(x_nd, **arguments)
        x_md, quantized, expert_mk, weight_mk, _, self.handle = arrived
        self.arrived: tuple[Tensor, Quantized | None] | None = expert_mk, quantized
        self.m = len(x_md)
        self.like = empty_rows(x_md), empty_rows(weight_mk)
        return x_md, weight_mk

    def unpack(self) -> tuple[Tensor, Quantized | None]:
        """Return the expert ids (−1: elsewhere) and FP8 values of the rows, and release both."""
        arrived, self.arrived = self.arrived, None
        assert arrived is not None, "unpacked once"
        return arrived

    def backward(self, *grads: Tensor | None) -> Steps[Grads]:
        """Send the gradients of tokens and weights back."""
        g_md, dw_mk = (grad_or_zeros(g, like, self.m) for g, like in zip(grads, self.like))
        return (yield from self.deepep.combine(g_md, self.handle, dw_mk.contiguous()))


class DeepEPCombine:
    """The transfer of results back to the tokens' ranks, which sums them.

    The backward pass dispatches the gradients.
    """

    def __init__(self, deepep: "DeepEPDispatcher", handle: Any):
        self.deepep, self.handle = deepep, handle

    def forward(self, y_md: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Send the results back and sum them."""
        y_nd, _ = yield from self.deepep.combine(y_md, self.handle)
        self.like, self.n = empty_rows(y_nd), len(y_nd)
        return (y_nd,)

    def backward(self, g_nd: Tensor | None) -> Steps[Grads]:
        """Send the gradients of the results to the experts."""
        g_nd = grad_or_zeros(g_nd, self.like, self.n)
        g_md, *_ = yield from self.deepep.dispatch(g_nd, handle=self.handle)
        return (g_md,)


class DeepEPDispatcher:
    """A dispatcher of a micro-batch's tokens by DeepEP, on a tape."""

    def __init__(self, config: Config, group: dist.ProcessGroup, fp8: bool = False):
        self.n_experts = config.n_routed_experts
        self.group, self.fp8 = group, fp8
        self.buffer = create_buffer(group, config.dim)

    def apply_experts(
        self, tape: Tape, experts: GroupedExperts, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return Σ_k w_nk·expert_nk(x_n) over experts on many ranks; yields during transfers."""
        dispatch = DeepEPDispatch(self, expert_nk)
        rows = yield from tape.run_comm(dispatch, x_nd, weight_nk)
        expert_mk, quantized = dispatch.unpack()
        y_md = tape.run(
            lambda x, w: apply_local_experts(experts, x, w, expert_mk, quantized), *rows
        )
        return (yield from tape.run_comm(DeepEPCombine(self, dispatch.handle), y_md))[0]

    def dispatch(self, x_nd: Tensor, **arguments: Any) -> Steps[tuple[Any, ...]]:
        """Send rows to other ranks; return (rows in x's dtype, FP8 values or None, the rest)."""
        sent = act_quant(x_nd.contiguous(), True) if self.fp8 else x_nd.bfloat16().contiguous()
        with track_operation("dispatch of tokens", self.group):  # waits for the counts of all ranks
            received, *more, event = self.buffer.dispatch(sent, **arguments, async_finish=True)
        yield
        event.current_stream_wait()
        x_md, quantized = (act_dequant(*received), received) if self.fp8 else (received, None)
        return x_md.to(x_nd.dtype), quantized, *more

    def combine(
        self, y_md: Tensor, handle: Any, weight_mk: Tensor | None = None
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """Send rows back and sum them there; return the sums of rows, in y's dtype, and weights."""
        sent = y_md.bfloat16().contiguous()
        y_nd, weight_nk, event = self.buffer.combine(sent, handle, weight_mk, async_finish=True)
        yield
        event.current_stream_wait()
        return y_nd.to(y_md.dtype), weight_nk
