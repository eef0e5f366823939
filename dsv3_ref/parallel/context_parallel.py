"""Context parallelism: the ranks of a group compute parts of the same sequences (chapter 13).

A cp group consists of neighbors in the data × expert axis, so a mesh has no more ranks with it:
those that would train on rows of their own share rows. Its ranks send different tokens to experts,
and gradients are summed over dp × ep already, so dispatch, buckets and checkpoints know nothing of
it. Attention gathers the latents of a group's ranks, and its backward pass sums their gradients.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import Config, ceil_div
from dsv3_ref.fp8 import BLOCK_SIZE, E4M3
from dsv3_ref.long_context import (
    attend_spans,
    concat_saved_once,
    merge_zigzag,
    query_spans,
    zigzag_chunks,
)
from dsv3_ref.ops import recompute
from dsv3_ref.parallel.watchdog import track_operation
from dsv3_ref.rope import Rope
from dsv3_ref.training.objective import SequenceTokens


class AllGather(torch.autograd.Function):
    """The tensors of all members of a group, (R, …); the backward pass sums their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the tensors of all members, stacked."""
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        if x.numel():
            with track_operation("all-gather of latents", group):
                dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the sum of all members' gradients of this rank's tensor."""
        dx = grad.new_empty(grad.shape[1:])
        if dx.numel():
            with track_operation("sum of the gradients of latents", ctx.group):
                dist.reduce_scatter_tensor(dx, grad.contiguous().flatten(0, 1), group=ctx.group)
        return dx, None


def num_head_groups(h: int, num_rows: int, cp: int, fp8: bool) -> int:
    """Return in how many groups of heads to compute attention over the tokens of cp ranks.

    The keys and values of a group take about twice the memory that those of all heads take for the
    tokens of one rank. num_rows: of W^UK and W^UV; the rows of a group are whole blocks in FP8.
    """
    block = BLOCK_SIZE if fp8 else 1
    sizes = [n for n in range(2, cp // 2 + 1) if h % n == 0 and num_rows // n % block == 0]
    return max(sizes, default=1)


def split_heads(weight: Tensor, n: int) -> list[Any]:
    """Return the rows of a weight in n parts: views with their gradients, scales, and products.

    Their weight gradients are not deferred, since their operands have the tokens of all ranks.
    """
    parts: list[Any] = list(weight.chunk(n))
    for i, part in enumerate(parts):
        part.wgrad_at_once = True
        for name in {"main_grad", "scale"} & vars(weight).keys():
            setattr(part, name, getattr(weight, name).chunk(n)[i])
    return parts


class SequencePart(SequenceTokens):
    """The tokens of a micro-batch's sequences that this rank computes: all, or those of a zig-zag.

    group: the ranks that share the sequences; None: this rank has all tokens. s: tokens of a
    sequence. cu_seqlens: 0 and the end of each of its samples, if it is packed, and the same as
    `bounds` on the host. ahead: the last tokens of the sequence that are left out, as by an MTP
    module.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, s: int, cu_seqlens: Tensor | None = None,
        bounds: Sequence[int] = (), ahead: int = 0,
    ):  # fmt: skip
        self.group, self.cu_seqlens = group, cu_seqlens
        self.s, self.end = s, s - ahead
        self.bounds = bounds or [0, self.end]
        self.chunks: Sequence[range] = [range(self.end)]
        self.size = 1
        if group is not None:
            self.size = dist.get_world_size(group)
            chunks = zigzag_chunks(s, self.size, dist.get_rank(group))
            self.chunks = [c[: max(0, self.end - c.start)] for c in chunks]

    @property
    def num_tokens(self) -> int:
        """The number of this rank's tokens of a sequence."""
        return sum(map(len, self.chunks))

    def without_last(self, k: int) -> "SequencePart":
        """Return this rank's part of the sequences without their last k tokens."""
        return SequencePart(self.group, self.s, ahead=k)

    def take(self, x_bs: Tensor) -> Tensor:
        """Return this rank's entries of all tokens' entries."""
        if self.group is None:
            return x_bs[:, : self.end]
        return torch.cat([x_bs[:, c.start : c.stop] for c in self.chunks], dim=1)

    def take_places(self, place_n: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return this rank's positions of some positions, and their numbers in `place_n`."""
        if self.group is None:
            return super().take_places(place_n, shape)
        number_bs = torch.full((prod(shape),), -1)
        number_bs[place_n] = torch.arange(len(place_n))
        own_n = self.take(number_bs.view(*shape)).flatten()
        own_k = (own_n >= 0).nonzero()[:, 0]
        return own_k, own_n[own_k]

    def complete(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks of the group, with the gradient of this rank's x."""
        if self.group is None:
            return x
        own = x.detach()
        return x + (self.sum_over_ranks(own.clone()) - own)

    @property
    def counts(self) -> bool:
        """True on the first rank of the group."""
        return self.group is None or dist.get_rank(self.group) == 0

    def rope(self, config: Config, device: torch.device) -> Rope:
        """Return the rotations of this rank's tokens, and their attention to those of all ranks."""
        if self.cu_seqlens is not None:
            rope = Rope.from_cu_seqlens(config, self.cu_seqlens, self.s)
            if self.group is None:
                return rope
            cos, sin = (self.take(x[None])[0] for x in (rope.cos, rope.sin))
        else:
            position_s = torch.cat(
                [torch.arange(c.start, c.stop, device=device) for c in self.chunks]
            )
            cos, sin, *_ = Rope.from_positions(config, position_s)
        return Rope(cos, sin, attend=None if self.group is None else self.attend)

    def attend(
        self, q_bshi: Tensor, q_bshr: Tensor, c_bsc: Tensor, k_bsr: Tensor, wkv_b: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Compute attention of this rank's queries to the latents and rotary keys of all ranks.

        Recomputation gathers the latents again instead of saving them, and computes keys and values
        of a group of heads at a time.
        """
        kv_btx = recompute(self.all_gather, c_bsc, k_bsr)
        c_btc, k_btr = kv_btx.tensor_split([c_bsc.shape[-1]], dim=-1)
        spans = query_spans(self.chunks, self.bounds)
        h = q_bshi.shape[2]
        fp8 = wkv_b.dtype == E4M3
        weights = split_heads(wkv_b, num_head_groups(h, len(wkv_b), self.size, fp8))
        outputs = []
        for q_i, q_r, w in zip(*(q.chunk(len(weights), 2) for q in (q_bshi, q_bshr)), weights):
            outputs.append(attend_spans(q_i, q_r, c_btc, k_btr, w, scale, spans))
        return concat_saved_once(outputs, dim=2)

    def all_gather(self, c_bsc: Tensor, k_bsr: Tensor) -> Tensor:
        """Return latents and rotary keys of all ranks' tokens, in their order: (b, t, c + r)."""
        assert self.group is not None, "several ranks"
        x_bsx = torch.cat((c_bsc, k_bsr), dim=-1)
        num_slots = 2 * ceil_div(self.s, 2 * self.size)
        padded = F.pad(x_bsx, (0, 0, 0, num_slots - x_bsx.shape[1]))
        return merge_zigzag(AllGather.apply(padded, self.group))[:, : self.end]

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share the sequences, in place."""
        if self.group is not None:
            with track_operation("loads of sequences", self.group):
                dist.all_reduce(x, group=self.group)
        return x
