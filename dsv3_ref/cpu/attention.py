"""Causal attention in blocks of queries, with a gradient by hand; packed samples as padded rows."""

from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_ref import mla
from dsv3_ref.ops import impl, recompute, upcast

QUERY_BLOCK = 64


def causal_query_blocks(s: int, t: int, size: int = QUERY_BLOCK) -> list[tuple[slice, int]]:
    """Return blocks of the last s of t positions, each with the keys its last query may see."""
    return [(slice(a, b), b + t - s) for a, b in pairwise([*range(0, s, size), s])]


def to_batched_heads(x_bshx: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale·x with rows and heads in one axis, (b·h, s, x)."""
    return rearrange(x_bshx if scale == 1 else scale * x_bshx, "b s h x -> (b h) s x")


class BlockAttention(torch.autograd.Function):
    """Causal attention, 64 queries at a time; keys after a block's last query are not read."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs, outputs = [], []
        for rows, end in causal_query_blocks(q.shape[1], k.shape[1]):
            score = upcast(q[:, rows] @ k[:, :end].mT)
            n = score.shape[1]
            score[..., end - n :].masked_fill_(~mla.causal_mask(n, n, q.device), -torch.inf)
            probs.append(score.softmax(-1).to(v.dtype))
            outputs.append(probs[-1] @ v[:, :end])
        o = torch.cat(outputs, 1)
        ctx.save_for_backward(q, k, v, o, *probs)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, *probs = ctx.saved_tensors
        delta = (g * o).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for (rows, end), p_st in zip(causal_query_blocks(q.shape[1], k.shape[1]), probs):
            dv[:, :end].baddbmm_(p_st.mT, g[:, rows])
            dp_st = g[:, rows] @ v[:, :end].mT
            ds_st = dp_st.sub_(delta[:, rows]).mul_(p_st)
            dq[:, rows] = ds_st @ k[:, :end]
            dk[:, :end].baddbmm_(ds_st.mT, q[:, rows])
        return dq, dk, dv


@impl("attention", "cpu")
def attention(q_bshx: Tensor, k_bthx: Tensor, v_bthv: Tensor, scale: float) -> Tensor:
    """Compute causal attention, o = softmax(scale·q·kᵀ) v; the queries are the last s of t keys."""
    q = recompute(to_batched_heads, q_bshx, scale)
    k, v = recompute(to_batched_heads, k_bthx), recompute(to_batched_heads, v_bthv)
    o = BlockAttention.apply(q, k, v)
    return rearrange(o, "(b h) s v -> b s h v", h=q_bshx.shape[2])


@impl("varlen_attention", "cpu")
def varlen_attention(
    q_nhx: Tensor, k_nhx: Tensor, v_nhv: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Compute `attention` inside each of b sequences, as padded rows of one batch.

    The padding lies after the tokens of a sequence, where causality hides it.
    """
    length_b = cu_seqlens.diff().long()
    row_n = torch.arange(len(length_b), device=cu_seqlens.device).repeat_interleave(length_b)
    position_n = torch.arange(len(row_n), device=cu_seqlens.device) - cu_seqlens[row_n]
    shape = len(length_b), max([1, *length_b.tolist()])
    q_bshx, k_bshx, v_bshv = (
        x.new_zeros(*shape, *x.shape[1:]).index_put((row_n, position_n), x)
        for x in (q_nhx, k_nhx, v_nhv)
    )
    return mla.attention(q_bshx, k_bshx, v_bshv, scale)[row_n, position_n]
