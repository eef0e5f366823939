"""Cases of memory-bound ops: quantizers, RMSNorm, SwiGLU, RoPE, the router's top-k, permutation."""

import torch
from dsv3_ref.kernels.bench.calls import (
    backward_vs_torch,
    leaf,
    num_padded_tiles,
    randn,
    skewed_counts,
    vs_torch,
)
from dsv3_ref.kernels.bench.case import COPY_GOAL, Calls, Case, Sizes
from dsv3_ref.kernels.launch import BF16, FP32, dtype_name, num_blocks
from torch import Tensor

from dsv3_ref import fp8, moe, ops
from dsv3_ref.config import V3
from dsv3_ref.rope import apply_rotary_emb

# ── Quantizers ──


def case_act_quant(m: int, k: int) -> Case:
    """Return the case of m rows in tiles of 1 × 128."""

    def make() -> Calls:
        x = randn(m, k)
        return vs_torch(lambda: fp8.act_quant(x))

    num_bytes = 3 * m * k + 4 * m * num_blocks(k)
    return Case("act_quant", {"m": m, "k": k}, make, num_bytes, goals=COPY_GOAL)


def case_e5m6_quant(m: int, k: int) -> Case:
    """Return the case of m rows in tiles of 1 × 128 of 12 bits."""

    def make() -> Calls:
        x = randn(m, k)
        return vs_torch(lambda: fp8.e5m6_quant(x))

    num_bytes = 2 * m * k + 196 * m * num_blocks(k)
    return Case("e5m6_quant", {"m": m, "k": k}, make, num_bytes, goals=COPY_GOAL)


def case_e5m6_restore(m: int, k: int) -> Case:
    """Return the case of m rows from 12 bits to bf16."""

    def make() -> Calls:
        packed, s = fp8.e5m6_quant(randn(m, k))
        return vs_torch(lambda: fp8.e5m6_restore(packed, s, k, BF16))

    num_bytes = 2 * m * k + 196 * m * num_blocks(k)
    return Case("e5m6_restore", {"m": m, "k": k}, make, num_bytes, goals=COPY_GOAL)


def case_weight_quant(o: int, i: int, dtype: torch.dtype) -> Case:
    """Return the case of a weight in blocks of 128 × 128."""

    def make() -> Calls:
        w = randn(o, i, dtype=dtype)
        return vs_torch(lambda: fp8.weight_quant(w))

    sizes: Sizes = {"o": o, "i": i, "from": dtype_name(dtype)}
    num_bytes = (dtype.itemsize + 1) * o * i + 4 * num_blocks(o) * num_blocks(i)
    return Case("weight_quant", sizes, make, num_bytes, goals=COPY_GOAL)


def case_act_quant_transposed(e: int, m: int, k: int) -> Case:
    """Return the case of m rows of e experts in tiles of 128 × 1."""

    def make() -> Calls:
        x, tokens_per_expert_e = randn(m, k), skewed_counts(e, m)
        return vs_torch(lambda: fp8.act_quant_transposed(x, tokens_per_expert_e))

    sizes = {"e": e, "m": m, "k": k}
    num_bytes = 2 * m * k + num_padded_tiles(m, e) * 132 * k
    return Case("act_quant_transposed", sizes, make, num_bytes, goals=COPY_GOAL)


def case_requant_transposed(e: int, m: int, k: int) -> Case:
    """Return the case of m rows of e experts from tiles of 1 × 128 to tiles of 128 × 1."""

    def make() -> Calls:
        quantized, tokens_per_expert_e = fp8.act_quant(randn(m, k)), skewed_counts(e, m)
        return vs_torch(lambda: fp8.requant_transposed(*quantized, tokens_per_expert_e))

    sizes = {"e": e, "m": m, "k": k}
    num_bytes = m * k + 4 * m * num_blocks(k) + num_padded_tiles(m, e) * 132 * k
    return Case("requant_transposed", sizes, make, num_bytes, goals=COPY_GOAL)


# ── Norm, SwiGLU, RoPE ──


def case_rms_norm(n: int, d: int) -> Case:
    """Return the case of n rows."""

    def make() -> Calls:
        x, weight = randn(n, d), randn(d, dtype=FP32)
        return vs_torch(lambda: ops.rms_norm(x, weight, V3.norm_eps))

    return Case("rms_norm", {"n": n, "d": d}, make, 4 * n * d + 4 * d, goals=COPY_GOAL)


def case_rms_norm_backward(n: int, d: int) -> Case:
    """Return the case of the backward pass of n rows."""

    def make() -> Calls:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return ops.rms_norm(x, weight, V3.norm_eps)

        return backward_vs_torch(norm, leaf(n, d), leaf(d, dtype=FP32))

    return Case("rms_norm backward", {"n": n, "d": d}, make, 6 * n * d + 8 * d, goals=COPY_GOAL)


def case_rms_norm_quant(n: int, d: int) -> Case:
    """Return the case of n rows whose result is quantized too."""

    def make() -> Calls:
        x, weight = randn(n, d), randn(d, dtype=FP32)
        return vs_torch(lambda: fp8.rms_norm_quant(x, weight, V3.norm_eps))

    num_bytes = 5 * n * d + 4 * n * num_blocks(d) + 4 * d
    return Case("rms_norm_quant", {"n": n, "d": d}, make, num_bytes, goals=COPY_GOAL)


def case_swiglu(m: int, f: int) -> Case:
    """Return the case of m rows."""

    def make() -> Calls:
        gate, up = randn(m, f), randn(m, f)
        return vs_torch(lambda: ops.swiglu(gate, up))

    return Case("swiglu", {"m": m, "f": f}, make, 6 * m * f)


def case_swiglu_backward(m: int, f: int) -> Case:
    """Return the case of the backward pass of m rows."""

    def make() -> Calls:
        return backward_vs_torch(ops.swiglu, leaf(m, f), leaf(m, f))

    return Case("swiglu backward", {"m": m, "f": f}, make, 10 * m * f)


def case_swiglu_quant(m: int, f: int) -> Case:
    """Return the case of m rows whose result is quantized."""

    def make() -> Calls:
        gate, up = randn(m, f), randn(m, f)
        return vs_torch(lambda: fp8.swiglu_quant(gate, up))

    num_bytes = 5 * m * f + 4 * m * num_blocks(f)
    return Case("swiglu_quant", {"m": m, "f": f}, make, num_bytes, goals=COPY_GOAL)


def case_swiglu_quant_backward(e: int, m: int, f: int) -> Case:
    """Return the case of the backward pass, from quantized inputs, of m rows of e experts."""

    def make() -> Calls:
        g, tokens_per_expert_e = randn(m, f), skewed_counts(e, m)
        gate_up = *fp8.act_quant(randn(m, f)), *fp8.act_quant(randn(m, f))
        return vs_torch(lambda: fp8.swiglu_quant_backward(g, *gate_up, tokens_per_expert_e)[:4])

    sizes = {"e": e, "m": m, "f": f}
    num_bytes = 8 * m * f + 8 * m * num_blocks(f) + num_padded_tiles(m, e) * 132 * f
    return Case("swiglu_quant_backward", sizes, make, num_bytes, goals=COPY_GOAL)


def case_apply_rotary_emb(s: int, h: int) -> Case:
    """Return the case of RoPE on the last r of the i + r dims of each head."""
    i, r = V3.qk_nope_head_dim, V3.qk_rope_head_dim

    def make() -> Calls:
        x_bshr, angle = randn(1, s, h, i + r)[..., i:], torch.rand(s, r // 2)
        cos, sin = angle.cos(), angle.sin()
        return vs_torch(lambda: apply_rotary_emb(x_bshr, cos, sin))

    return Case("apply_rotary_emb", {"s": s, "h": h, "r": r}, make, 4 * s * h * r + 4 * s * r)


# ── Routing ──


def case_group_limited_topk(n: int, e: int, k: int) -> Case:
    """Return the case of k of e experts for n tokens, in V3's groups."""
    groups = V3.n_expert_groups, V3.n_limited_groups, 2

    def make() -> Calls:
        score_ne = torch.rand(n, e)
        return vs_torch(lambda: moe.group_limited_topk(score_ne, k, *groups))

    return Case("group_limited_topk", {"n": n, "e": e, "k": k}, make, 4 * n * e + 8 * n * k)


def random_permutation(n: int, e: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the permutation of n tokens to k of e random experts each, by `sort_by_expert`."""
    return moe.sort_by_expert(torch.rand(n, e).topk(k).indices)


def case_permute(n: int, d: int, e: int, k: int) -> Case:
    """Return the case of copying n tokens to k of e experts each."""

    def make() -> Calls:
        x, permutation = randn(n, d), random_permutation(n, e, k)
        return vs_torch(lambda: moe.permute(x, *permutation))

    sizes = {"n": n, "d": d, "k": k}
    num_bytes = 2 * n * d * (1 + k) + 8 * n * k
    return Case("permute", sizes, make, num_bytes, goals=COPY_GOAL)


def case_permute_backward(n: int, d: int, e: int, k: int) -> Case:
    """Return the case of the backward pass of `case_permute`."""

    def make() -> Calls:
        permutation = random_permutation(n, e, k)
        return backward_vs_torch(lambda x: moe.permute(x, *permutation), leaf(n, d))

    sizes = {"n": n, "d": d, "k": k}
    num_bytes = 2 * n * d * (1 + k) + 8 * n * k
    return Case("permute backward", sizes, make, num_bytes, goals=COPY_GOAL)


def case_unpermute(n: int, d: int, e: int, k: int) -> Case:
    """Return the case of summing the rows of n tokens, from k of e experts each."""

    def make() -> Calls:
        y, weight = randn(n * k, d), randn(n, k)
        permutation = random_permutation(n, e, k)
        return vs_torch(lambda: moe.unpermute(y, weight, *permutation))

    sizes = {"n": n, "d": d, "k": k}
    return Case("unpermute", sizes, make, 2 * n * d * (1 + k) + 10 * n * k)


def case_unpermute_backward(n: int, d: int, e: int, k: int) -> Case:
    """Return the case of the backward pass of `case_unpermute`."""

    def make() -> Calls:
        permutation = random_permutation(n, e, k)

        def unpermute(y: Tensor, weight: Tensor) -> Tensor:
            return moe.unpermute(y, weight, *permutation)

        return backward_vs_torch(unpermute, leaf(n * k, d), leaf(n, k))

    sizes = {"n": n, "d": d, "k": k}
    num_bytes = 2 * n * d * (1 + 2 * k) + 12 * n * k
    return Case("unpermute backward", sizes, make, num_bytes)
