"""Routing: the router's top-k, and the permutation of tokens to experts and back."""

from typing import Any

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    INT64,
    AOTCase,
    Grid,
    as_rows,
    autotune_bucket,
    cdiv_grid,
    check_tensor,
    kernel_config,
    on_its_device,
)  # fmt: skip
from torch import Tensor
from torch.autograd.function import once_differentiable

import dsv3_ref.moe  # noqa: F401  defines the ops
from dsv3_ref.ops import impl

# ── The router ──


# Sort key of masked and already selected entries; it sorts below −∞.
MASKED_KEY = tl.constexpr(-(2**31))


@triton.jit
def sortable_key(x):
    """Map fp32 to int32 in the same order, above MASKED_KEY: negative numbers flip 31 bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), MASKED_KEY + 1)  # NaN included


@triton.jit
def key_to_float(key):
    """Return the fp32 number that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def masked_argmax(key, index, axis: tl.constexpr):
    """Return the largest key along an axis and its first index, by two reductions."""
    top = tl.max(key, axis=axis, keep_dims=True)
    return top, tl.min(tl.where(key == top, index, 2**31 - 1), axis=axis, keep_dims=True)


@triton.autotune(
    [kernel_config(1, TILE=1), kernel_config(1, TILE=2), kernel_config(1, TILE=4)], key=["bucket"]
)
@triton.jit
def _group_limited_topk_kernel(
    score_ptr, expert_ptr, n, bucket,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, LIMITED: tl.constexpr, BEST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Select the top-k experts of the best groups; one warp processes TILE tokens.

    Scores are compared as integers, so that −∞ or NaN is neither selected twice nor selected from a
    masked group.
    """
    EACH: tl.constexpr = E // G
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group, member = tl.arange(0, BLOCK_G)[None, :, None], tl.arange(0, BLOCK_X)[None, None, :]
    exists = (group < G) & (member < EACH)
    offset = row.to(tl.int64)[:, None, None] * E + group * EACH + member
    score = tl.load(score_ptr + offset, mask=(row < n)[:, None, None] & exists, other=0)
    key = tl.where(exists, sortable_key(score), MASKED_KEY)

    if LIMITED < G:
        remaining, total = key, tl.zeros((TILE, BLOCK_G, 1), tl.float32)
        for _ in tl.static_range(BEST):
            top, first = masked_argmax(remaining, member, 2)
            total += key_to_float(top)
            remaining = tl.where(member == first, MASKED_KEY, remaining)
        remaining = tl.where(group < G, sortable_key(total), MASKED_KEY)
        is_masked = tl.full((TILE, BLOCK_G, 1), 1, tl.int1)
        for _ in tl.static_range(LIMITED):
            top, first = masked_argmax(remaining, group, 1)
            remaining = tl.where(group == first, MASKED_KEY, remaining)
            is_masked = is_masked & (group != first)
        key = tl.where(is_masked, MASKED_KEY, key)

    key = key.reshape(TILE, BLOCK_G * BLOCK_X)
    column, k = tl.arange(0, BLOCK_G * BLOCK_X)[None, :], tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((TILE, BLOCK_K), tl.int32)
    for i in tl.static_range(K):
        top, first = masked_argmax(key, column, 1)
        chosen = tl.where(k == i, first // BLOCK_X * EACH + first % BLOCK_X, chosen)
        key = tl.where(column == first, MASKED_KEY, key)
    offset = row.to(tl.int64)[:, None] * K + k
    tl.store(expert_ptr + offset, chosen.to(tl.int64), mask=(row < n)[:, None] & (k < K))


@impl("group_limited_topk", "triton")
@on_its_device
def group_limited_topk(
    scores_bse: Tensor, topk: int, n_groups: int, topk_groups: int, group_topk: int
) -> Tensor:
    """Select the topk experts of highest score in the best groups, best first: int64, (…, topk).

    The score of a group is the sum of its group_topk highest scores; topk_groups groups remain. Of
    equal scores the lower index comes first; torch.topk guarantees no order.
    """
    check_tensor("scores_bse", scores_bse, dtypes=(FP32,))
    e = scores_bse.shape[-1]
    if e % n_groups:
        raise ValueError(f"scores_bse must have a multiple of {n_groups} experts, not {e}")
    group_size = e // n_groups
    limits = {
        "topk_groups": (topk_groups, n_groups),
        "group_topk": (group_topk, group_size),
        "topk": (topk, topk_groups * group_size),
    }
    for name, (value, limit) in limits.items():
        if not 1 <= value <= limit:
            raise ValueError(
                f"{name} must be from 1 to {limit}, not {value}: scores_bse has {e} experts"
            )
    topk_ids_bsk = scores_bse.new_empty(*scores_bse.shape[:-1], topk, dtype=INT64)
    n = scores_bse.numel() // e
    sizes = {"E": e, "K": topk, "G": n_groups, "LIMITED": topk_groups, "BEST": group_topk}
    for name, size in (("G", n_groups), ("X", group_size), ("K", topk)):
        sizes[f"BLOCK_{name}"] = triton.next_power_of_2(size)
    args = scores_bse, topk_ids_bsk, n, autotune_bucket(n)
    _group_limited_topk_kernel[cdiv_grid(n, "TILE")](*args, **sizes)
    return topk_ids_bsk


# ── Permutation ──


def row_tile_grid(n: int, d: int) -> Grid:
    """Return a grid of programs that each process TILE columns of one row, rows in order."""
    return cdiv_grid(d, "TILE", n)


ROW_CONFIGS = [
    kernel_config(4, TILE=1024),
    kernel_config(4, TILE=2048),
    kernel_config(8, TILE=2048),
    kernel_config(8, TILE=4096),
]


@triton.jit
def row_tile(d, TILE: tl.constexpr):
    """Return the row of a program of `row_tile_grid`, its columns and their mask."""
    across = tl.cdiv(d, TILE)
    col = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    return (tl.program_id(0) // across).to(tl.int64), col, col < d


@triton.autotune(ROW_CONFIGS, key=["d", "bucket"])
@triton.jit
def _permute_kernel(
    x_ptr, row_ids_ptr, y_ptr, d, stride, bucket,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Read each row of x once and write it to K rows of y: y_row(n,k) = x_n."""
    n, col, mask = row_tile(d, TILE)
    x = tl.load(x_ptr + n * stride + col, mask=mask)
    for k in tl.static_range(K):
        row = tl.load(row_ids_ptr + n * K + k)
        tl.store(y_ptr + row * d + col, x, mask=mask)


@triton.autotune(ROW_CONFIGS, key=["d", "bucket"])
@triton.jit
def _unpermute_kernel(
    y_ptr, row_ids_ptr, weight_ptr, o_ptr, d, stride, bucket,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the K rows of a token, weighted if there are weights: o_n = Σ_k w_nk y_row(n,k)."""
    n, col, mask = row_tile(d, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ids_ptr + n * K + k)
        y = tl.load(y_ptr + row * stride + col, mask=mask, other=0).to(tl.float32)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + n * K + k).to(tl.float32)
        total += y
    tl.store(o_ptr + n * d + col, total.to(o_ptr.dtype.element_ty), mask=mask)


def sum_rows(y_md: Tensor, row_ids_nk: Tensor, weight_nk: Tensor | None = None) -> Tensor:
    """Sum the rows of each token by `_unpermute_kernel`: (m, d) → (n, d)."""
    y_md = as_rows(y_md)
    (n, k), d = row_ids_nk.shape, y_md.shape[1]
    o_nd = y_md.new_empty(n, d)
    args = y_md, row_ids_nk, weight_nk, o_nd, d, y_md.stride(0), autotune_bucket(n)
    _unpermute_kernel[row_tile_grid(n, d)](*args, K=k)
    return o_nd


class TritonPermute(torch.autograd.Function):
    """A copy of each token to its k rows; its gradient is the sum of these, without atomics."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, row_ids_nk: Tensor) -> Tensor:
        ctx.save_for_backward(row_ids_nk)
        (n, k), d = row_ids_nk.shape, x_nd.shape[1]
        x_nd = as_rows(x_nd)
        y_md = x_nd.new_empty(n * k, d)
        args = x_nd, row_ids_nk, y_md, d, x_nd.stride(0), autotune_bucket(n)
        _permute_kernel[row_tile_grid(n, d)](*args, K=k)
        return y_md

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_md: Tensor) -> tuple[Tensor, None]:
        return sum_rows(g_md, *ctx.saved_tensors), None


def check_permutation(sorted_ids_m: Tensor, row_ids_nk: Tensor, n: int) -> None:
    """Raise a `ValueError` unless both have the shapes that `sort_by_expert` returns for n tokens.

    row_ids is the inverse of sorted_ids, so the kernels read only row_ids.
    """
    check_tensor("row_ids_nk", row_ids_nk, (n, None), (INT64,))
    check_tensor("sorted_ids_m", sorted_ids_m, (row_ids_nk.numel(),), (INT64,))


@impl("permute", "triton")
@on_its_device
def permute(x_nd: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor) -> Tensor:
    """Copy each token to its k rows, sorted by expert: (n, d) → (m, d)."""
    check_tensor("x_nd", x_nd, (None, None), FLOATS, contiguous=False)
    check_permutation(sorted_ids_m, row_ids_nk, len(x_nd))
    return TritonPermute.apply(x_nd, row_ids_nk)


# ── Its inverse, weighted ──


@triton.autotune(
    [
        kernel_config(4, TILE=512, STAGES=1),
        kernel_config(8, TILE=1024, STAGES=1),
        kernel_config(4, TILE=512, STAGES=2),
        kernel_config(8, TILE=1024, STAGES=3),
    ],
    key=["d", "bucket"],
)
@triton.jit
def _unpermute_backward_kernel(
    g_ptr, y_ptr, weight_ptr, row_ids_ptr, dy_ptr, dweight_ptr, d, stride, bucket,
    K: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dy_row = w_nk g_n and dw_nk = y_row · g_n in one pass over the K rows of a token."""
    n, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    row = tl.load(row_ids_ptr + n * K + k, mask=k < K, other=0)
    weight = tl.load(weight_ptr + n * K + k, mask=k < K, other=0).to(tl.float32)
    dot = tl.zeros((BLOCK_K, TILE), tl.float32)
    for start in tl.range(0, d, TILE, num_stages=STAGES):
        col = start + tl.arange(0, TILE)
        g = tl.load(g_ptr + n * stride + col, mask=col < d, other=0).to(tl.float32)[None, :]
        offset = row[:, None] * d + col[None, :]
        mask = (k < K)[:, None] & (col < d)[None, :]
        dot += tl.load(y_ptr + offset, mask=mask, other=0).to(tl.float32) * g
        tl.store(dy_ptr + offset, (weight[:, None] * g).to(dy_ptr.dtype.element_ty), mask=mask)
    dweight = tl.sum(dot, axis=1).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + n * K + k, dweight, mask=k < K)


class TritonUnpermute(torch.autograd.Function):
    """A weighted sum of the k rows of each token."""

    @staticmethod
    def forward(ctx: Any, y_md: Tensor, weight_nk: Tensor, row_ids_nk: Tensor) -> Tensor:
        ctx.save_for_backward(y_md, weight_nk, row_ids_nk)
        return sum_rows(y_md, row_ids_nk, weight_nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nd: Tensor) -> tuple[Tensor, Tensor, None]:
        y_md, weight_nk, row_ids_nk = ctx.saved_tensors
        g_nd = as_rows(g_nd)
        (n, k), d = row_ids_nk.shape, y_md.shape[1]
        dy_md, dweight_nk = torch.empty_like(y_md), torch.empty_like(weight_nk)
        sizes = d, g_nd.stride(0), autotune_bucket(n)
        args = g_nd, y_md, weight_nk, row_ids_nk, dy_md, dweight_nk, *sizes
        _unpermute_backward_kernel[n,](*args, K=k, BLOCK_K=triton.next_power_of_2(k))
        return dy_md, dweight_nk, None


@impl("unpermute", "triton")
@on_its_device
def unpermute(y_md: Tensor, weight_nk: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor) -> Tensor:
    """Compute the weighted sum of each token's rows: o_n = Σ_k w_nk y_row(n,k), (m, d) → (n, d)."""
    check_tensor("weight_nk", weight_nk, (None, None), FLOATS)
    check_permutation(sorted_ids_m, row_ids_nk, len(weight_nk))
    check_tensor("row_ids_nk", row_ids_nk, weight_nk.shape)
    check_tensor("y_md", y_md, (len(sorted_ids_m), None), FLOATS)
    return TritonUnpermute.apply(y_md, weight_nk, row_ids_nk)


# ── For the ahead-of-time compiler: V3's shapes ──

N, D = 4096, 7168
K = 8
GATE = {"E": 256, "K": K, "G": 8, "LIMITED": 4, "BEST": 2}
GATE |= {"BLOCK_G": 8, "BLOCK_X": 32, "BLOCK_K": K}
TOPK = {"K": K}
BACKWARD_ARGS = BF16, BF16, BF16, INT64, BF16, BF16, D, D, 4
AOT_CASES = [
    AOTCase("group_limited_topk", _group_limited_topk_kernel, (FP32, INT64, N, 4), GATE),
    AOTCase("permute", _permute_kernel, (BF16, INT64, BF16, D, D, 4), TOPK),
    AOTCase("permute_backward", _unpermute_kernel, (BF16, INT64, None, BF16, D, D, 4), TOPK),
    AOTCase("unpermute", _unpermute_kernel, (BF16, INT64, BF16, BF16, D, D, 4), TOPK),
    AOTCase("unpermute_backward", _unpermute_backward_kernel, BACKWARD_ARGS, TOPK | {"BLOCK_K": K}),
]
