"""Every kernel on this GPU: its time beside the card's limit, a yardstick and the project's goals.

    python -m dsv3_ref.kernels.bench                     test the kernels, then time all of them
    python -m dsv3_ref.kernels.bench --dry-run           list the cases; needs no GPU
    python -m dsv3_ref.kernels.bench --only fp8 wgrad    cases whose name contains one of these

The median of interleaved rounds, timed by CUDA events with a cold L2. The limit is the larger of
two floors: bytes (inputs once, outputs once) over the rate of a copy, FLOPs over that of cuBLAS,
both measured here; FP8 may do twice the bf16 rate. A case that fails is a row, and exit status 1.
"""

import argparse
import gc
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from dsv3_ref.kernels.launch import BF16, FP32, num_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_ref import fp8, mla, moe, ops
from dsv3_ref.config import V3
from dsv3_ref.ops import use
from dsv3_ref.rope import apply_rotary_emb, softmax_scale

ROOT = Path(__file__).resolve().parent.parent
KERNELS, TORCH = ("triton", "torch"), ("torch",)
FLUSH = 256 * 2**20  # bytes, several times an L2
WARM_UP = 3
SCALE = softmax_scale(V3)


# ── A case, a goal, a row ──


@dataclass(frozen=True)
class Goal:
    """A minimum for a measure(row, rows by name, limits)."""

    text: str
    minimum: float
    measure: Callable


@dataclass(frozen=True)
class Case:
    """make() allocates on torch's default device: a kernel's call, and its yardsticks by name.

    Both are called again and again and need no arguments.
    """

    kind: str  # an op, and perhaps a word about it
    sizes: dict
    make: Callable
    bytes: float  # each input read once, each output written once
    flops: float = 0
    peak: str = "bf16"  # the tensor cores' rate that bounds it
    goals: tuple[Goal, ...] = ()
    memory: float = 0  # bytes it needs at least, where that may be too much
    note: str = ""

    @property
    def name(self) -> str:
        return " ".join([self.kind, *(f"{k}={v}" for k, v in self.sizes.items())])


@dataclass
class Timing:
    """The result of a case: ms, or why there is none; a yardstick's value is ms or a reason."""

    name: str
    bytes: float
    flops: float
    peak: str
    note: str = ""
    ms: float | None = None
    yardsticks: dict = field(default_factory=dict)
    skipped: str = ""
    error: str = ""
    fatal: bool = False  # the process lost its GPU

    @classmethod
    def for_case(cls, case: Case, **rest):
        return cls(case.name, case.bytes, case.flops, case.peak, case.note, **rest)


# ── Rates ──


def tflops(row, *_) -> float:
    return row.flops / row.ms / 1e9


def gbps(row) -> float:
    return row.bytes / row.ms / 1e6


def fraction_of_copy(row, rows, limits) -> float:
    return gbps(row) / limits["copy"]


def speedup_over(yardstick: str):
    """Measure how many times as fast a case is as a yardstick."""
    return lambda row, rows, limits: row.yardsticks[yardstick] / row.ms


def fraction_of_case(name: str):
    """Measure the share of another case's TFLOP/s."""
    return lambda row, rows, limits: tflops(row) / tflops(rows[name])


def roofline(row, limits) -> tuple[str, float]:
    """Return what binds and its floor in ms: max(bytes / copy, FLOPs / peak)."""
    floors = {"copy": row.bytes / limits["copy"] / 1e6}
    floors[row.peak] = row.flops / limits[row.peak] / 1e9
    name = max(floors, key=floors.get)
    return name, floors[name]


COPY = (Goal("of copy", 0.85, fraction_of_copy),)


# ── Calls ──


def randn(*shape, dtype=BF16, grad: bool = False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


leaf = partial(randn, grad=True)


def with_backends(backends, fn):
    """Return fn as called under these backends."""

    def run():
        with use(*backends):
            return fn()

    return run


def vs_torch(fn):
    """Return the call, with the torch reference as its yardstick."""
    return fn, {"torch": with_backends(TORCH, fn)}


def backward_call(forward, inputs):
    """The backward pass of forward(*inputs), as often as one likes; the first call runs forward.

    The gradient that comes in is the same for a kernel and its yardstick.
    """
    made = []

    def run():
        if not made:
            y = forward(*inputs)
            seed = torch.Generator(y.device).manual_seed(0)
            made.extend((y, torch.randn(y.shape, generator=seed, device=y.device).to(y.dtype)))
        return torch.autograd.grad(made[0], inputs, made[1], retain_graph=True)

    return run


def backward_vs_torch(forward, *inputs):
    return backward_call(forward, inputs), {
        "torch": with_backends(TORCH, backward_call(forward, inputs))
    }


def num_padded_tiles(m: int, e: int = 1) -> int:
    """Count the tiles of 128 rows that `act_quant_transposed` makes of m rows."""
    return m // 128 + e


def expert_counts(e: int, m: int, skewed: bool = False):
    """Draw the rows of each of e experts, m in all: even, or falling as 1/rank and shuffled."""
    share = 1 / torch.arange(1, e + 1, dtype=torch.float64) if skewed else torch.ones(e)
    tokens_per_expert_e = (m * share / share.sum()).floor().long()
    tokens_per_expert_e[: m - int(tokens_per_expert_e.sum())] += 1
    return tokens_per_expert_e[
        torch.randperm(e, generator=torch.Generator(tokens_per_expert_e.device).manual_seed(0))
    ]


# ── Products ──


def quantize_rows(x):
    """Quantize with one scale per row, as torch._scaled_mm takes it."""
    scale = x.float().abs().amax(1, keepdim=True) / fp8.E4M3_MAX
    return fp8.quantize(x.float(), scale), scale


def scaled_mm_call(x, weight):
    """Return a call of torch._scaled_mm with a scale per row of x and per row of the weight."""
    (x_q, x_s), (w_q, w_s) = quantize_rows(x), quantize_rows(weight)
    return lambda: torch._scaled_mm(x_q, w_q.T, scale_a=x_s, scale_b=w_s.T, out_dtype=BF16)


def dense(m: int, n: int, k: int, goals=()) -> Case:
    """Fprop of a linear layer."""

    def make():
        x, w = randn(m, k), randn(n, k)
        codes = *fp8.act_quant(x), *fp8.weight_quant(w)
        yardsticks = {"cuBLAS bf16": lambda: x @ w.T, "scaled_mm": scaled_mm_call(x, w)}
        return lambda: fp8.fp8_gemm(*codes, BF16), yardsticks

    moved = m * k + n * k + 2 * m * n + 4 * num_blocks(k) * (m + num_blocks(n))
    return Case("fp8_gemm", {"m": m, "n": n, "k": k}, make, moved, 2 * m * n * k, "fp8", goals)


def dense_wgrad(m: int, n: int, k: int) -> Case:
    def make():
        g, x = randn(m, n), randn(m, k)
        codes = *fp8.act_quant_transposed(g), *fp8.act_quant_transposed(x)
        return lambda: fp8.fp8_gemm(*codes), {"cuBLAS bf16": lambda: g.T @ x}

    moved = num_blocks(m) * 132 * (n + k) + 4 * n * k
    sizes = {"m": m, "n": n, "k": k}
    return Case("fp8_gemm wgrad", sizes, make, moved, 2 * m * n * k, "fp8")


def grouped_sizes(e: int, m: int, n: int, k: int, skewed: bool) -> dict:
    return {"e": e, "m": m, "n": n, "k": k, "rows": "skewed" if skewed else "even"}


def grouped_fp8(e: int, m: int, n: int, k: int, skewed: bool, goals=()) -> Case:
    def make():
        x, w, tokens_per_expert_e = randn(m, k), randn(e, n, k), expert_counts(e, m, skewed)
        codes = *fp8.act_quant(x), *fp8.weight_quant(w), tokens_per_expert_e
        product = lambda: moe.grouped_linear(x, w, tokens_per_expert_e)
        yardsticks = {"bf16 torch": with_backends(TORCH, product), "bf16 triton": product}
        return lambda: fp8.fp8_grouped_gemm(*codes, BF16), yardsticks

    moved = m * k + e * n * k + 2 * m * n + 4 * num_blocks(k) * (m + e * num_blocks(n))
    sizes = grouped_sizes(e, m, n, k, skewed)
    return Case("fp8_grouped_gemm", sizes, make, moved, 2 * m * n * k, "fp8", goals)


def grouped_bf16(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    def make():
        x, w, tokens_per_expert_e = randn(m, k), randn(e, n, k), expert_counts(e, m, skewed)
        return vs_torch(lambda: moe.grouped_linear(x, w, tokens_per_expert_e))

    moved = 2 * (m * k + e * n * k + m * n)
    sizes = grouped_sizes(e, m, n, k, skewed)
    return Case("grouped_linear", sizes, make, moved, 2 * m * n * k)


def grouped_bf16_backward(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    """Dgrad and Wgrad."""

    def make():
        tokens_per_expert_e = expert_counts(e, m, skewed)
        forward = lambda x, w: moe.grouped_linear(x, w, tokens_per_expert_e)
        return backward_vs_torch(forward, leaf(m, k), leaf(e, n, k))

    moved = 2 * (m * n + 2 * (e * n * k + m * k))
    sizes = grouped_sizes(e, m, n, k, skewed)
    return Case("grouped_linear backward", sizes, make, moved, 4 * m * n * k)


def grouped_wgrad(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    def make():
        g, x, tokens_per_expert_e = randn(m, n), randn(m, k), expert_counts(e, m, skewed)
        codes = (
            *fp8.act_quant_transposed(g, tokens_per_expert_e),
            *fp8.act_quant_transposed(x, tokens_per_expert_e),
            tokens_per_expert_e,
        )
        end_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
        yardsticks = {"bf16 torch": lambda: F.grouped_mm(g.T, x, offs=end_e)}
        return lambda: fp8.fp8_grouped_wgrad(*codes), yardsticks

    moved = num_blocks(m) * 132 * (n + k) + 4 * e * n * k
    sizes = grouped_sizes(e, m, n, k, skewed)
    return Case("fp8_grouped_wgrad", sizes, make, moved, 2 * m * n * k, "fp8")


# ── Quantizers ──


def act_quant(m: int, k: int) -> Case:
    def make():
        x = randn(m, k)
        return vs_torch(lambda: fp8.act_quant(x))

    moved = 3 * m * k + 4 * m * num_blocks(k)
    return Case("act_quant", {"m": m, "k": k}, make, moved, goals=COPY)


def weight_quant(o: int, i: int, dtype) -> Case:
    def make():
        w = randn(o, i, dtype=dtype)
        return vs_torch(lambda: fp8.weight_quant(w))

    moved = (dtype.itemsize + 1) * o * i + 4 * num_blocks(o) * num_blocks(i)
    sizes = {"o": o, "i": i, "from": str(dtype).removeprefix("torch.")}
    return Case("weight_quant", sizes, make, moved, goals=COPY)


def act_quant_transposed(e: int, m: int, k: int) -> Case:
    def make():
        x, tokens_per_expert_e = randn(m, k), expert_counts(e, m, e > 1) if e > 1 else None
        return vs_torch(lambda: fp8.act_quant_transposed(x, tokens_per_expert_e))

    moved = 2 * m * k + num_padded_tiles(m, e) * 132 * k
    return Case("act_quant_transposed", {"e": e, "m": m, "k": k}, make, moved, goals=COPY)


def requant_transposed(e: int, m: int, k: int) -> Case:
    def make():
        codes, tokens_per_expert_e = (
            fp8.act_quant(randn(m, k)),
            expert_counts(e, m, e > 1) if e > 1 else None,
        )
        return vs_torch(lambda: fp8.requant_transposed(*codes, tokens_per_expert_e))

    moved = m * k + 4 * m * num_blocks(k) + num_padded_tiles(m, e) * 132 * k
    return Case("requant_transposed", {"e": e, "m": m, "k": k}, make, moved, goals=COPY)


# ── Norm, SwiGLU, RoPE ──


def rms_norm(n: int, d: int) -> list[Case]:
    """Forward, backward, and with its tiles."""

    def forward():
        x, weight = randn(n, d), randn(d, dtype=FP32)
        return vs_torch(lambda: ops.rms_norm(x, weight, V3.norm_eps))

    def backward():
        norm = lambda x, weight: ops.rms_norm(x, weight, V3.norm_eps)
        return backward_vs_torch(norm, leaf(n, d), leaf(d, dtype=FP32))

    def quant():
        x, weight = randn(n, d), randn(d, dtype=FP32)
        return vs_torch(lambda: fp8.rms_norm_quant(x, weight, V3.norm_eps))

    sizes = {"n": n, "d": d}
    return [
        Case("rms_norm", sizes, forward, 4 * n * d + 4 * d, goals=COPY),
        Case("rms_norm backward", sizes, backward, 6 * n * d + 8 * d, goals=COPY),
        Case("rms_norm_quant", sizes, quant, 5 * n * d + 4 * n * num_blocks(d) + 4 * d, goals=COPY),
    ]


def swiglu(m: int, f: int) -> list[Case]:
    def forward():
        gate, up = randn(m, f), randn(m, f)
        return vs_torch(lambda: ops.swiglu(gate, up))

    def backward():
        return backward_vs_torch(ops.swiglu, leaf(m, f), leaf(m, f))

    def quant():
        gate, up = randn(m, f), randn(m, f)
        return vs_torch(lambda: fp8.swiglu_quant(gate, up))

    sizes = {"m": m, "f": f}
    return [
        Case("swiglu", sizes, forward, 6 * m * f),
        Case("swiglu backward", sizes, backward, 10 * m * f),
        Case("swiglu_quant", sizes, quant, 5 * m * f + 4 * m * num_blocks(f), goals=COPY),
    ]


def swiglu_quant_backward(e: int, m: int, f: int) -> Case:
    def make():
        g, tokens_per_expert_e = randn(m, f), expert_counts(e, m, e > 1) if e > 1 else None
        codes = *fp8.act_quant(randn(m, f)), *fp8.act_quant(randn(m, f))
        return vs_torch(lambda: fp8.swiglu_quant_backward(g, *codes, tokens_per_expert_e))

    moved = 8 * m * f + 8 * m * num_blocks(f) + num_padded_tiles(m, e) * 132 * f
    return Case("swiglu_quant_backward", {"e": e, "m": m, "f": f}, make, moved, goals=COPY)


def rotation(s: int, h: int) -> Case:
    """Time RoPE on the last r of i + r dims of each head."""
    i, r = V3.qk_nope_head_dim, V3.qk_rope_head_dim

    def make():
        x_bshr, angle = randn(1, s, h, i + r)[..., i:], torch.rand(s, r // 2)
        cos, sin = angle.cos(), angle.sin()
        return vs_torch(lambda: apply_rotary_emb(x_bshr, cos, sin))

    return Case("apply_rotary_emb", {"s": s, "h": h, "r": r}, make, 4 * s * h * r + 4 * s * r)


# ── The gate, to the experts and back ──


def group_limited_topk(n: int, e: int, k: int) -> Case:
    groups = V3.n_expert_groups, V3.n_limited_groups, 2

    def make():
        score_ne = torch.rand(n, e)
        return vs_torch(lambda: moe.group_limited_topk(score_ne, k, *groups))

    return Case("group_limited_topk", {"n": n, "e": e, "k": k}, make, 4 * n * e + 8 * n * k)


def random_permutation(n: int, e: int, k: int):
    """Random experts of n tokens, as `permute` and `unpermute` want them."""
    return moe.sort_by_expert(torch.rand(n, e).topk(k).indices)


def permute(n: int, d: int, e: int, k: int) -> list[Case]:
    def forward():
        x, places = randn(n, d), random_permutation(n, e, k)
        return vs_torch(lambda: moe.permute(x, *places))

    def backward():
        places = random_permutation(n, e, k)
        return backward_vs_torch(lambda x: moe.permute(x, *places), leaf(n, d))

    sizes, moved = {"n": n, "d": d, "k": k}, 2 * n * d * (1 + k) + 8 * n * k
    return [
        Case("permute", sizes, forward, moved, goals=COPY),
        Case("permute backward", sizes, backward, moved, goals=COPY),
    ]


def unpermute(n: int, d: int, e: int, k: int) -> list[Case]:
    def forward():
        y, weight, places = randn(n * k, d), randn(n, k), random_permutation(n, e, k)
        return vs_torch(lambda: moe.unpermute(y, weight, *places))

    def backward():
        places = random_permutation(n, e, k)
        back = lambda y, weight: moe.unpermute(y, weight, *places)
        return backward_vs_torch(back, leaf(n * k, d), leaf(n, k))

    sizes, moved = {"n": n, "d": d, "k": k}, 2 * n * d * (1 + k) + 10 * n * k
    return [
        Case("unpermute", sizes, forward, moved),
        Case("unpermute backward", sizes, backward, moved + 2 * n * k * d + 2 * n * k),
    ]


# ── Attention ──


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE)


def sdpa_calls(call, q, k, v):
    """Yardsticks of causal attention; flash wants values as wide as keys: padded beforehand."""
    wide = F.pad(v.detach(), (0, q.shape[-1] - v.shape[-1])).requires_grad_(v.requires_grad)
    return {
        "SDPA flash": call(partial(sdpa, SDPBackend.FLASH_ATTENTION), (q, k, wide)),
        "SDPA cuDNN": call(partial(sdpa, SDPBackend.CUDNN_ATTENTION), (q, k, v)),
    }


def attention(s: int, h: int, goals=((), ())) -> list[Case]:
    """Forward and backward of one sequence; a query sees half of the keys on average."""
    x, v = V3.qk_nope_head_dim + V3.qk_rope_head_dim, V3.v_head_dim

    def of_model(q, k, v):
        return mla.attention(q, k, v, SCALE)

    def made(call, make):
        qkv = make(1, s, h, x), make(1, s, h, x), make(1, s, h, v)
        return call(of_model, qkv), sdpa_calls(call, *qkv)

    def backward():
        return made(backward_call, leaf)

    def forward():
        return made(lambda fn, qkv: lambda: fn(*qkv), randn)

    sizes, pairs, item = {"s": s, "h": h, "dims": f"{x}/{v}"}, h * s * s / 2, 2 * s * h
    return [
        Case("attention", sizes, forward, 2 * item * (x + v), 2 * pairs * (x + v), goals=goals[0]),
        Case(
            "attention backward", sizes, backward, 4 * item * (x + v), 2 * pairs * (3 * x + 2 * v),
            goals=goals[1],
        ),
    ]  # fmt: skip


def varlen_attention(b: int, s: int, h: int) -> Case:
    """b sequences of s tokens laid end to end."""
    x, v = V3.qk_nope_head_dim + V3.qk_rope_head_dim, V3.v_head_dim

    def make():
        q, k, values = (randn(b * s, h, y) for y in (x, x, v))
        cu_seqlens = torch.arange(0, b * s + 1, s)
        return vs_torch(lambda: mla.varlen_attention(q, k, values, cu_seqlens, SCALE))

    flops = b * h * s * s * (x + v)
    return Case("varlen_attention", {"b": b, "s": s, "h": h}, make, 4 * b * s * h * (x + v), flops)


def decode_costs(b: int, t: int, h: int) -> tuple[int, int]:
    """Bytes and FLOPs of one query a row over t positions: keys and values are one latent."""
    c, x = V3.kv_lora_rank, V3.kv_lora_rank + V3.qk_rope_head_dim
    return 2 * b * t * x + 2 * b * h * (x + c), 2 * b * h * t * (x + c)


def paged(b: int, t: int, h: int, goals=(), page: int = 64) -> Case:
    """One new token for each of b rows that have t behind them."""
    c, x = V3.kv_lora_rank, V3.kv_lora_rank + V3.qk_rope_head_dim
    moved, flops = decode_costs(b, t, h)

    def make():
        pages = math.ceil(t / page)
        q_bshx, kv_cache_pyx = randn(b, 1, h, x), randn(b * pages, page, x)
        block_table_bp = torch.randperm(b * pages).view(b, pages).to(torch.int32)
        args = q_bshx, kv_cache_pyx, block_table_bp, torch.full((b,), t), c, SCALE
        return vs_torch(lambda: mla.paged_attention(*args))

    sizes = {"b": b, "t": t, "h": h}
    return Case("paged_attention", sizes, make, moved, flops, goals=goals, memory=1.2 * moved)


def latent(b: int, t: int, h: int) -> Case:
    c, r = V3.kv_lora_rank, V3.qk_rope_head_dim

    def make():
        q_bshc, q_bshr = randn(b, 1, h, c), randn(b, 1, h, r)
        c_btc, k_btr = randn(b, t, c + r).split([c, r], -1)
        return vs_torch(lambda: mla.latent_attention(q_bshc, q_bshr, c_btc, k_btr, SCALE))

    return Case("latent_attention", {"b": b, "t": t, "h": h}, make, *decode_costs(b, t, h))


# ── The loss, a layer ──


def liger(h, w, target):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: torch.autograd.grad(loss(w, h, target), (h, w))


def cross_entropy(n: int, d: int, w: int) -> Case:
    """Loss and both gradients."""

    def make():
        h_nd, head_wd, target_n = leaf(n, d), leaf(w, d), torch.randint(w, (n,))
        loss = lambda: ops.linear_cross_entropy(h_nd, head_wd, target_n)
        fn, yardsticks = vs_torch(lambda: torch.autograd.grad(loss(), (h_nd, head_wd)))
        if find_spec("liger_kernel"):
            yardsticks["Liger"] = liger(h_nd, head_wd, target_n)
        return fn, yardsticks

    sizes, moved = {"n": n, "d": d, "w": w}, 4 * (n * d + w * d)
    return Case("linear_cross_entropy", sizes, make, moved, 6 * n * d * w)


def step(layer, x, g):
    """All gradients of a layer; x as a new tensor, or FP8 would find its codes of the last step."""
    with torch.autocast(x.device.type, BF16):
        y = layer(x.view_as(x))[0]
    return torch.autograd.grad(y, [x, *layer.parameters()], g)


def moe_step(b: int, s: int, e: int, d: int, f: int) -> Case:
    """Forward and backward of an MoE layer in FP8, fp32 weights; beside it in bf16."""
    c = replace(V3, n_routed_experts=e, dim=d, moe_inter_dim=f)

    def make():
        layer, x = moe.MoE(c), leaf(b, s, d)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=c.init_std)
        run, kernels = partial(step, layer, x, randn(b, s, d)), KERNELS
        yardsticks = {
            "bf16 triton": with_backends(kernels, run),
            "bf16 torch": with_backends(TORCH, run),
        }
        return with_backends(("fp8", *kernels), run), yardsticks

    active = (c.n_activated_experts + c.n_shared_experts) * 3 * d * f + e * d
    weights = (e + c.n_shared_experts) * 3 * d * f + e * d
    return Case(
        "moe_step", {"b": b, "s": s, "e": e, "d": d, "f": f}, make, 8 * weights + 8 * b * s * d,
        6 * b * s * active, "fp8", FASTER,
        note=f"{e} routed experts instead of {V3.n_routed_experts}",
    )  # fmt: skip


# ── All cases, at the shapes of the report ──

LINEARS = (  # (n, k): wkv_a with wq_a, wq_b, wkv_b, wo, an expert's w1 with w3, w2, a dense layer's
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    (36864, 7168), (7168, 18432),
)  # fmt: skip
EXPERTS = ((4096, 7168), (7168, 2048))
HEADLINE = (Goal("TFLOP/s", 1000, tflops), Goal("× cuBLAS bf16", 1.4, speedup_over("cuBLAS bf16")))
PREFILL = (Goal("TFLOP/s", 550, tflops),), (Goal("TFLOP/s", 400, tflops),)
DECODE = (Goal("of copy", 0.8, fraction_of_copy),)
FASTER = tuple(Goal(f"× {x}", 1.0, speedup_over(x)) for x in ("bf16 triton", "bf16 torch"))
TOKENS = 4096


def matmul_cases(z) -> list[Case]:
    """256 experts with 128 rows each are bound by their weights; 8 with 4096 rows are not."""
    m, out = z(TOKENS), []
    for n, k in LINEARS:
        goals = HEADLINE if (n, k) == (7168, 16384) else ()
        out += [dense(m, z(n), z(k), goals), dense_wgrad(m, z(n), z(k))]
    for n, k in EXPERTS:
        goal = Goal("of dense", 0.9, fraction_of_case(dense(m, z(n), z(k)).name))
        for e, skewed in ((8, False), (256, False), (256, True)):
            args = z(e, 4), 8 * m, z(n), z(k), skewed
            out.append(grouped_fp8(*args, goals=(goal,) if e == 8 else ()))
            out += [f(*args) for f in (grouped_wgrad, grouped_bf16, grouped_bf16_backward)]
    return out


def memory_bound_cases(z) -> list[Case]:
    """Whatever moves bytes."""
    n, d, e, k = z(TOKENS), z(V3.dim), V3.n_routed_experts, V3.n_activated_experts
    f, wide, m = z(V3.moe_inter_dim), z(V3.inter_dim), 8 * z(TOKENS)
    return [
        *(act_quant(*x) for x in ((n, d), (n, z(16384)), (m, d), (m, f))),
        *(weight_quant(d, z(16384), dtype) for dtype in (FP32, BF16)),
        *(act_quant_transposed(*x) for x in ((1, n, d), (e, m, d), (e, m, f))),
        *(requant_transposed(*x) for x in ((1, n, d), (e, m, d), (e, m, f))),
        *(case for x in ((n, d), (n, z(V3.q_lora_rank)), (m, d)) for case in rms_norm(*x)),
        *(case for x in ((n, wide), (m, f)) for case in swiglu(*x)),
        *(swiglu_quant_backward(*x) for x in ((1, n, wide), (e, m, f))),
        rotation(n, z(V3.n_heads)),
        *(group_limited_topk(x, e, k) for x in (n, m)),
        *permute(n, d, e, k), *unpermute(n, d, e, k),
    ]  # fmt: skip


def attention_cases(z) -> list[Case]:
    h, thousand = z(V3.n_heads), z(1024)
    out = [
        case
        for s in (1, 2, 4, 8, 16)
        for case in attention(s * thousand, h, PREFILL if s in (4, 16) else ((), ()))
    ]
    out += [varlen_attention(4, 4 * thousand, h), latent(z(32), 4 * thousand, h)]
    for heads in (V3.n_heads, V3.n_heads // 4):  # all of them, or one of four tensor-parallel ranks
        for b, t in ((b, t) for b in (1, 32, 128) for t in (1, 4, 16, 128)):
            goals = DECODE if (b, t) == (128, 4) else ()
            out.append(paged(z(b), t * thousand, z(heads), goals))
    return out


def all_cases(shrink: int = 1) -> list[Case]:
    """Every case; `shrink` divides tokens, widths and heads, so that a CPU may try them."""
    z = lambda n, least=1: max(n // shrink, min(n, least))
    layer = cross_entropy(z(TOKENS), z(V3.dim), z(V3.vocab_size))
    whole = moe_step(4, z(TOKENS), z(32, 16), z(V3.dim), z(V3.moe_inter_dim))
    return [*matmul_cases(z), *memory_bound_cases(z), *attention_cases(z), layer, whole]


# ── The clock ──


def time_interleaved(calls: dict, rounds: int) -> dict[str, float]:
    """Median ms of each call, taking turns.

    Before each one L2 is filled four times: that makes it cold, and gives Python a head start, so
    that launching is not measured.
    """
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    events = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(4):
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def format_error(e: Exception) -> str:
    """An error with its type: a compiler's says first where, and last what."""
    return f"{type(e).__name__}: {str(e).strip()}"


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def warm_up(yardsticks: dict) -> tuple[dict, dict]:
    """Those that run, and the reasons of those that do not."""
    good, reasons = {}, {}
    for name, call in yardsticks.items():
        try:
            for _ in range(WARM_UP):
                call()
            good[name] = call
        except Exception as e:
            reasons[name] = first_line(format_error(e))
    return good, reasons


def prepare_calls(case: Case, device: str):
    """The calls of a case, on this device, under the kernels' backends."""
    with torch.device(device), use(*KERNELS):
        fn, yardsticks = case.make()
    return with_backends(KERNELS, fn), {
        name: with_backends(KERNELS, y) for name, y in yardsticks.items()
    }


def time_case(case: Case, rounds: int) -> Timing:
    free = torch.cuda.mem_get_info()[0]
    if case.memory > free:
        return Timing.for_case(
            case, skipped=f"needs {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        )
    fn, yardsticks = prepare_calls(case, "cuda")
    for _ in range(WARM_UP):
        fn()
    good, reasons = warm_up(yardsticks)
    torch.cuda.synchronize()
    found = time_interleaved({"": fn, **good}, rounds)
    return Timing.for_case(case, ms=found.pop(""), yardsticks=found | reasons)


def try_case(case: Case, rounds: int) -> Timing:
    """`time_case`, or the error of it; memory is given back."""
    try:
        row = time_case(case, rounds)
    except Exception as e:
        row = Timing.for_case(case, error=format_error(e))
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        row.fatal = True
    return row


def describe_gpu(rounds: int) -> dict:
    """What this GPU is, and its limits: GB/s of a copy, read and written; TFLOP/s of cuBLAS."""
    n = 8192
    with torch.device("cuda"):
        x, y, a, b = randn(2**29), randn(2**29), randn(n, n), randn(n, n)
    calls = {"copy": lambda: y.copy_(x), "bf16": lambda: a @ b}
    warm_up(calls)
    ms = time_interleaved(calls, rounds)
    peak = 2 * n**3 / ms["bf16"] / 1e9
    limits = {"copy": 4 * x.numel() / ms["copy"] / 1e6, "bf16": peak, "fp8": 2 * peak}
    return {"device": torch.cuda.get_device_name(), "driver": driver_version(), "limits": limits}


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "unknown"


# ── A process that may die ──


def worker_main(pipe) -> None:
    """Answer with the card, or with the row of a case that is asked for by name."""
    by_name = {case.name: case for case in all_cases()}
    while True:
        name, rounds = pipe.recv()
        pipe.send(try_case(by_name[name], rounds) if name else describe_gpu(rounds))


class Worker:
    """A process with the GPU: a fault of the device, or a kernel that hangs, costs no more."""

    def __init__(self, target=worker_main):
        self.pipe, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=target, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def request(self, name: str, rounds: int, seconds: float):
        """The answer; raises TimeoutError or, if the process died, RuntimeError."""
        try:
            self.pipe.send((name, rounds))
            if not self.pipe.poll(seconds):
                raise TimeoutError(f"no answer within {seconds:g} s")
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(f"the process ended with {self.process.exitcode}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_all(chosen: list[Case], args, worker=Worker) -> tuple[dict, list[Timing]]:
    """The card and every case's row; a worker that was lost is replaced."""
    current, rows = worker(), []
    found = current.request("", args.rounds, args.seconds)
    for case in chosen:
        try:
            row = current.request(case.name, args.rounds, args.seconds)
        except (TimeoutError, RuntimeError) as e:
            row = Timing.for_case(case, error=format_error(e), fatal=True)
        rows.append(row)
        print(format_row(row, found["limits"]), flush=True)
        if row.fatal:
            current.kill()
            current = worker()
    current.kill()
    return found, rows


# ── The report ──

HEAD = f"{'case':58}{'ms':>9}{'achieved':>15}{'of limit':>15}  yardstick: ms, ours is × as fast"


def format_row(row: Timing, limits: dict) -> str:
    """One row of the table."""
    head, note = f"{row.name:58}", f"  ({row.note})" if row.note else ""
    if row.error or row.skipped:
        return head + (
            f"failed: {first_line(row.error)}" if row.error else f"skipped: {row.skipped}"
        )
    bound, floor = roofline(row, limits)
    rate = f"{gbps(row):.0f} GB/s" if bound == "copy" else f"{tflops(row):.0f} TFLOP/s"
    others = [
        f"{name}: {y}" if isinstance(y, str) else f"{name}: {y:.3f}, ×{y / row.ms:.2f}"
        for name, y in row.yardsticks.items()
    ]
    share = f"{floor / row.ms:.0%} {bound}"
    return f"{head}{row.ms:9.3f}{rate:>15}{share:>15}  {'; '.join(others)}{note}"


def judge_goals(chosen: list[Case], rows: list[Timing], limits: dict) -> list[dict]:
    """Every goal of these cases beside what was measured."""
    by_name, out = {row.name: row for row in rows}, []
    for case, goal in ((c, g) for c in chosen for g in c.goals):
        try:
            value = goal.measure(by_name[case.name], by_name, limits)
        except (KeyError, TypeError):  # filtered out, failed or skipped, here or in its yardstick
            value = None
        verdict = "not measured" if value is None else "reached"
        verdict = "missed" if value is not None and value < goal.minimum else verdict
        found = {"measure": goal.text, "goal": goal.minimum, "measured": value, "verdict": verdict}
        out.append({"case": case.name, **found})
    return out


def format_goal(g: dict) -> str:
    value = "–" if g["measured"] is None else f"{g['measured']:.4g}"
    return f"{g['case']:58}{g['measure']:>15}{value:>9} of {g['goal']:<6g}{g['verdict']}"


def format_plan(chosen: list[Case]) -> str:
    """The cases, with nothing measured."""
    head = f"{'case':58}{'GB':>10}{'TFLOP':>10}{'peak':>6}  goals"
    goals = lambda c: ", ".join(f"{g.minimum:g} {g.text}" for g in c.goals)
    return "\n".join(
        [head]
        + [
            f"{c.name:58}{c.bytes / 1e9:10.4g}{c.flops / 1e12:10.4g}{c.peak:>6}  {goals(c)}"
            f"{c.note and f' ({c.note})'}".rstrip()
            for c in chosen
        ]
    )


def row_to_json(row: Timing, limits: dict) -> dict:
    """A row for JSON, with what follows from it."""
    out = {name: value for name, value in asdict(row).items() if value not in ("", False)}
    if row.ms:
        bound, floor = roofline(row, limits)
        out |= {"tflops": tflops(row), "gbps": gbps(row), "bound": bound, "share": floor / row.ms}
    return out


def write_report(
    path: Path, found: dict, rows: list[Timing], goals: list[dict], tests: str
) -> None:
    report = {
        **found, "torch": torch.__version__, "triton": triton.__version__,
        "command": shlex.join(["python", "-m", "dsv3_ref.kernels.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "tests": tests,
        "rows": [row_to_json(row, found["limits"]) for row in rows], "goals": goals,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


# ── The command ──


def test_command() -> list[str]:
    """pytest over the kernels' tests; without hypothesis, over those that can do without it."""
    found = ROOT.glob("tests/kernels/test_kernels_*.py")
    files = {str(p.relative_to(ROOT)): p.read_text() for p in found}
    command = [sys.executable, "-m", "pytest", "-q", "-x"]
    if find_spec("hypothesis"):
        return command + sorted(files)
    plain = {name: text for name, text in files.items() if "import given" not in text}
    print(f"without hypothesis, untested: {', '.join(sorted(set(files) - set(plain)))}")
    fixture = re.compile(r"def (test_\w+)\([^)]*\bmicro\b")  # of conftest.py, which needs it too
    left = [
        f"--deselect={n}::{test}" for n, text in plain.items() for test in fixture.findall(text)
    ]
    return [*command, "--noconftest", *left, *sorted(plain)]


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m dsv3_ref.kernels.bench")
    parser.add_argument("--dry-run", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument("--skip-tests", action="store_true", help="time kernels that are untested")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases that contain one of these")
    parser.add_argument("--rounds", type=int, default=25, help="that the median is taken of")
    parser.add_argument("--seconds", type=float, default=900, help="that a case may take")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu.json"))
    args = parser.parse_args(argv)
    args.cases = [c for c in all_cases() if not args.only or any(x in c.name for x in args.only)]
    if not args.cases:
        parser.error(f"no case has {' or '.join(args.only)} in its name: see --dry-run")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.dry_run:
        print(format_plan(args.cases))
        return 0
    if not torch.cuda.is_available():
        print("No CUDA GPU is here to time kernels on; --dry-run lists them.", file=sys.stderr)
        return 2
    if not args.skip_tests and subprocess.run(test_command(), cwd=ROOT).returncode:
        print("The kernels fail their tests; --skip-tests times them anyway.", file=sys.stderr)
        return 1
    print(HEAD)
    found, rows = run_all(args.cases, args)
    goals = judge_goals(args.cases, rows, found["limits"])
    print("\n".join(["", "goals", *map(format_goal, goals), "", json.dumps(found)]))
    write_report(args.out, found, rows, goals, "skipped" if args.skip_tests else "passed")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
