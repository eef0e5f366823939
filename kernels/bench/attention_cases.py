"""Cases of attention: MLA in training and prefill, and absorbed MLA in decoding."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from dsv3_ref.kernels.bench.calls import (
    Function,
    backward_call,
    forward_call,
    leaf,
    randn,
    vs_torch,
)
from dsv3_ref.kernels.bench.case import Call, Calls, Case, Goal, Sizes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_ref import mla
from dsv3_ref.config import V3, ceil_div
from dsv3_ref.rope import softmax_scale

SCALE = softmax_scale(V3)
QK_HEAD_DIM = V3.qk_nope_head_dim + V3.qk_rope_head_dim
CallMaker = Callable[[Function, tuple[Tensor, ...]], Call]

# ── Training and prefill ──


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention by torch's scaled_dot_product_attention, heads in third place."""
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        return o.transpose(1, 2)


def sdpa_calls(make_call: CallMaker, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Return the yardsticks of causal attention.

    Flash attention requires values as wide as keys, so they are padded in advance.
    """
    wide_v = F.pad(v.detach(), (0, q.shape[-1] - v.shape[-1])).requires_grad_(v.requires_grad)
    flash = partial(sdpa, SDPBackend.FLASH_ATTENTION)
    cudnn = partial(sdpa, SDPBackend.CUDNN_ATTENTION)
    return {
        "SDPA flash": make_call(flash, (q, k, wide_v)),
        "SDPA cuDNN": make_call(cudnn, (q, k, v)),
    }


def attention_calls(make_call: CallMaker, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """Return a call of causal attention and its yardsticks."""

    def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mla.attention(q, k, v, SCALE)

    return make_call(causal_attention, (q, k, v)), sdpa_calls(make_call, q, k, v)


def case_attention(s: int, h: int, goals: tuple[Goal, ...] = ()) -> Case:
    """Return the case of one sequence of s tokens and h heads.

    A query attends to half of the keys on average.
    """
    x, v = QK_HEAD_DIM, V3.v_head_dim

    def make() -> Calls:
        q_k_v = randn(1, s, h, x), randn(1, s, h, x), randn(1, s, h, v)
        return attention_calls(forward_call, *q_k_v)

    sizes: Sizes = {"s": s, "h": h, "dims": f"{x}/{v}"}
    num_bytes = 4 * s * h * (x + v)
    pairs = h * s * s / 2
    return Case("attention", sizes, make, num_bytes, 2 * pairs * (x + v), goals=goals)


def case_attention_backward(s: int, h: int, goals: tuple[Goal, ...] = ()) -> Case:
    """Return the case of the backward pass of `case_attention`."""
    x, v = QK_HEAD_DIM, V3.v_head_dim

    def make() -> Calls:
        q_k_v = leaf(1, s, h, x), leaf(1, s, h, x), leaf(1, s, h, v)
        return attention_calls(backward_call, *q_k_v)

    sizes: Sizes = {"s": s, "h": h, "dims": f"{x}/{v}"}
    num_bytes = 8 * s * h * (x + v)
    flops = 2 * (h * s * s / 2) * (3 * x + 2 * v)
    return Case("attention backward", sizes, make, num_bytes, flops, goals=goals)


def case_varlen_attention(b: int, s: int, h: int) -> Case:
    """Return the case of b sequences of s tokens stored end to end."""
    x, v = QK_HEAD_DIM, V3.v_head_dim

    def make() -> Calls:
        q, k, values = (randn(b * s, h, width) for width in (x, x, v))
        cu_seqlens = torch.arange(0, b * s + 1, s)
        return vs_torch(lambda: mla.varlen_attention(q, k, values, cu_seqlens, SCALE))

    sizes = {"b": b, "s": s, "h": h}
    flops = b * h * s * s * (x + v)
    return Case("varlen_attention", sizes, make, 4 * b * s * h * (x + v), flops)


# ── Decoding ──


def decode_costs(b: int, t: int, h: int) -> tuple[int, int]:
    """Return bytes and FLOPs of one query per row; its t keys are also the values."""
    c, x = V3.kv_lora_rank, V3.kv_lora_rank + V3.qk_rope_head_dim
    return 2 * b * t * x + 2 * b * h * (x + c), 2 * b * h * t * (x + c)


def case_paged_attention(
    b: int, t: int, h: int, goals: tuple[Goal, ...] = (), page: int = 64
) -> Case:
    """Return the case of one new token for each of b requests of t cached tokens, in pages."""
    c, x = V3.kv_lora_rank, V3.kv_lora_rank + V3.qk_rope_head_dim
    num_bytes, flops = decode_costs(b, t, h)

    def make() -> Calls:
        pages = ceil_div(t, page)
        q_bshx, kv_cache_pyx = randn(b, 1, h, x), randn(b * pages, page, x)
        block_table_bp = torch.randperm(b * pages).view(b, pages).to(torch.int32)
        args = q_bshx, kv_cache_pyx, block_table_bp, torch.full((b,), t), c, SCALE
        return vs_torch(lambda: mla.paged_attention(*args))

    sizes = {"b": b, "t": t, "h": h}
    memory = 1.2 * num_bytes
    return Case("paged_attention", sizes, make, num_bytes, flops, goals=goals, memory=memory)


def case_latent_attention(b: int, t: int, h: int) -> Case:
    """Return the case of one new token for each of b requests of t cached tokens."""
    c, r = V3.kv_lora_rank, V3.qk_rope_head_dim

    def make() -> Calls:
        q_bshc, q_bshr = randn(b, 1, h, c), randn(b, 1, h, r)
        c_btc, k_btr = randn(b, t, c + r).split([c, r], -1)
        return vs_torch(lambda: mla.latent_attention(q_bshc, q_bshr, c_btc, k_btr, SCALE))

    return Case("latent_attention", {"b": b, "t": t, "h": h}, make, *decode_costs(b, t, h))
