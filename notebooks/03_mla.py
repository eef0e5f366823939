# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · MLA: attention that remembers 576 numbers per token

# %% [markdown]
# ## Why
# To write its next token, a model looks back at every earlier one. What it keeps of them, layer by
# layer, is the **key-value cache** (KV cache), which grows with every token of every conversation. With
# ordinary multi-head attention (MHA), 128 heads would each keep a key and a value of 128 numbers:
# 32,768 numbers per token in every layer, **4 MB per token** over 61 layers, 524 GB for one conversation
# of 128K tokens. V3's weights take 671 GB in FP8 and 1,342 GB in bf16, so three such conversations would
# need more memory than the model itself. The usual cure is to share keys and values among groups of heads (*grouped-query
# attention*, GQA): the heads of a group then see the past through the same keys, which may cost quality.
# Multi-head latent attention (MLA) keeps 576 numbers, one fifty-seventh, and every head still has keys
# and values of its own.
#
# ## Play: a cache calculator
# How many conversations of 32K tokens fit beside the weights? Which number of groups would make GQA as small as MLA,
# and which latent would make MLA as small as MQA, which keeps one key and one value for all heads?

# %%
from dsv3_ref.config import TINY, V2_LITE, V3
from dsv3_ref.viz.cache import cache_page
from dsv3_ref.viz.component import embed

configs = {"DeepSeek-V3": V3, "V2-Lite": V2_LITE, "tiny": TINY}
embed(cache_page(configs), "a cache calculator", height=820)

# %% [markdown]
# The same against the length of one conversation:

# %%
import os
from dataclasses import replace

import torch

from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, PINK, checker, figure, play, show

CACHED_NUMBERS = {"MHA, 128 heads": 2 * 128 * 128, "GQA, 8 groups": 2 * 8 * 128, "MLA": 512 + 64}


def draw_cache():
    """Plot bytes = 2 (bf16) · layers · numbers kept · tokens."""
    fig, ax = figure(1, 1, 8, 3.6)
    length = torch.tensor([2.0**k for k in range(10, 18)])
    looks = (ORANGE, "--"), (GREEN, "-."), (BLUE, "-")
    for (name, numbers), (color, style) in zip(CACHED_NUMBERS.items(), looks):
        gb = 2 * V3.n_layers * numbers * length / 1e9
        ax.loglog(length, gb, style, base=2, color=color)
        ax.annotate(f"{name}: {numbers:,}", (length[-1], gb[-1]), xytext=(6, -3),
                    textcoords="offset points", color=color)  # fmt: skip
    ax.axhline(80, color=GRAY, lw=1)
    ax.annotate("all memory of one H800: 80 GB", (1024, 80), xytext=(6, 4), color=GRAY,
                textcoords="offset points")  # fmt: skip
    ax.set(title="Cache of one conversation at V3's depth (numbers per token and layer)",
           xlabel="length (tokens)", ylabel="cache (GB)", xlim=(1024, 2**17 * 3.2))  # fmt: skip
    ax.set_yscale("log", base=10)
    ax.set_xticks(length, [f"{int(x) // 1024}K" for x in length])
    show(fig)


assert CACHED_NUMBERS["MHA, 128 heads"] / CACHED_NUMBERS["MLA"] > 56
assert 2 * V3.n_layers * CACHED_NUMBERS["MLA"] == 70_272
draw_cache()

# %% [markdown]
# ## Paper
# Report §2.1.1, eq. 1–11. A token's hidden state is pressed into one short **latent** vector, from
# which the keys and values of all heads can be made again. Only the latent is cached. Rotary
# position (chapter 02) would get in the way of the trick that makes this fast, so it travels
# separately: a single **rotary key** of 64 numbers per token, shared by all heads. Queries go through
# a latent of their own, which saves activation memory in training, not cache. Both latents pass an
# extra RMSNorm (§4.2).
#
# ![Data flow of MLA: x to query latent to content and rotary query; x to latent and rotary key, which are cached; two panels show attention with expanded keys and values of every head, and absorbed, with the latent as the one key and value of all heads](../figures/03_mla.svg)
#
# | report | parameter here | V3's shape |
# |---|---|---|
# | $W^{DKV}$, $W^{KR}$ | `wkv_a` | 7168 → 512 + 64 |
# | $W^{UK}$, $W^{UV}$ | `wkv_b` | 512 → 128 · (128 + 128) |
# | $W^{DQ}$ | `wq_a` | 7168 → 1536 |
# | $W^{UQ}$, $W^{QR}$ | `wq_b` | 1536 → 128 · (128 + 64) |
# | $W^{O}$ | `wo` | 128 · 128 → 7168 |
#
# D is *down*, U is *up*, Q *query*, K *key*, V *value*, R *rotary*. Axes in this chapter: `b` batch, `s`
# query position, `t` key position, `d` model, `h` head, `i` head dim without position (128), `r` rope dim
# (64), `v` value dim (128), `c` latent (512), `x` what is joined (mostly $i + r$).

# %%
#| export
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from dsv3_ref.config import Config
from dsv3_ref.ops import Linear, RMSNorm, impl, linear, op, recompute, upcast
from dsv3_ref.rope import Rope, apply_rotary_emb, softmax_scale

# %% [markdown]
# ## Causal attention
# Where everything arrives in the end (eq. 10), for each head on its own:
#
# $$o_{s} = \sum_{t \le s'} \operatorname{softmax}_t\!\left(\text{scale}\cdot q_s^\top k_t\right) v_t,
# \qquad s' = s + (T - S)$$
#
# with queries $(b, S, h, i{+}r)$, keys $(b, T, h, i{+}r)$, values $(b, T, h, v)$ and $o$ $(b, S, h, v)$.
# While decoding, the $S$ queries are the *last* of $T$ positions, hence the offset $T-S$: one query
# against a long past sees everything, and a mask built as if both began at zero would let it see only
# the first key. The whole is an op (a function with several implementations,
# [chapter 01](01_ops.ipynb)); its reference is the equation as printed, which computes the masked half too.


# %%
#| export
def causal_mask(s: int, t: int, device: torch.device | None = None) -> Tensor:
    """Return True where query s may see key t; the queries are the last s of t positions."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


def causal_softmax(score_bhst: Tensor, scale: float) -> Tensor:
    """Return p = softmax(scale·score) over the keys that a query may see, in fp32 or wider."""
    s, t = score_bhst.shape[-2:]
    mask_st = causal_mask(s, t, score_bhst.device)
    return (scale * upcast(score_bhst)).masked_fill(~mask_st, -torch.inf).softmax(-1)


@op
def attention(q_bshx: Tensor, k_bthx: Tensor, v_bthv: Tensor, scale: float) -> Tensor:
    """Compute causal attention, o = softmax(scale·q·kᵀ) v, with x = i + r.

    The queries are the last s of t positions.
    """
    p_bhst = causal_softmax(einsum(q_bshx, k_bthx, "b s h x, b t h x -> b h s t"), scale)
    return einsum(p_bhst.to(v_bthv.dtype), v_bthv, "b h s t, b t h v -> b s h v")


@impl("attention", "sdpa")
def attention_sdpa(q_bshx: Tensor, k_bthx: Tensor, v_bthv: Tensor, scale: float) -> Tensor:
    """Compute `attention` by torch's fused operator."""
    s, t = q_bshx.shape[1], k_bthx.shape[1]
    mask = None if s in (1, t) else causal_mask(s, t, q_bshx.device)
    q, k, v = (x.transpose(1, 2) for x in (q_bshx, k_bthx, v_bthv))
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=s == t, scale=scale)
    return o.transpose(1, 2)


# %%
# Every form equals the printed one at every offset, and no query notices its future.
from dsv3_ref.ops import IMPLS, use

torch.manual_seed(0)
for s, t in [(1, 1), (1, 7), (130, 140), (3, 7), (7, 7)]:
    q, k = torch.randn(2, s, 4, 24), torch.randn(2, t, 4, 24)
    v = torch.randn(2, t, 4, 16)
    want = IMPLS["attention"]["torch"](q, k, v, 0.2)
    for backend in ("cpu", "sdpa"):
        with use(backend, "torch"):
            assert torch.allclose(attention(q, k, v, 0.2), want, atol=1e-6)
k[:, 5:] += 1  # the future of positions 0 … 4
assert torch.allclose(attention(q, k, v, 0.2)[:, :5], want[:, :5], atol=1e-6)
print(f"3 queries, 5 positions:\n{causal_mask(3, 5).int().numpy()}")

# %% [markdown]
# *Several sequences end to end*, of any lengths, make one long row without padding. Each must be blind to
# the others, and the op is given where each begins and ends (`cu_seqlens`: 0, then the ends). The reference attends to one
# after another.
#
# *In practice* the [cpu backend](../dsv3_ref/cpu/attention.py) takes 64 queries at a time, which meet only the keys
# they may see, and writes its gradient down. With $p$ the softmax's weights and $\partial x$ short for
# $\partial L/\partial x$, the gradient of the scores is $p \odot (\partial p - \delta)$, and the sum
# $\delta_s = \sum_t p_{st}\,\partial p_{st}$ equals $\partial o_s \cdot o_s$, so it needs no
# reduction over the keys. FlashAttention's backward pass uses the same identity; what lets it work in the memory
# of a chip is tiling, an online softmax, and the recomputation of $p$. Packed sequences become padded rows of one batch there; a kernel needs
# no such copy.


# %%
#| export
@op
def varlen_attention(
    q_nhx: Tensor, k_nhx: Tensor, v_nhv: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Compute `attention` inside each of b sequences laid end to end.

    cu_seqlens: 0 and the end of each sequence, (b + 1,) int32 or int64.
    """
    outputs = [v_nhv[:0]]
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            q, k, v = (x[None, start:end] for x in (q_nhx, k_nhx, v_nhv))
            outputs.append(attention(q, k, v, scale)[0])
    return torch.cat(outputs)


# %%
(q, k), v = torch.randn(2, 10, 4, 24), torch.randn(10, 4, 16)
cu_seqlens = torch.tensor([0, 4, 4, 10])  # the second is empty
packed = varlen_attention(q, k, v, cu_seqlens, 0.2)
assert torch.allclose(packed[4:], attention(q[None, 4:], k[None, 4:], v[None, 4:], 0.2)[0])
v[:4] += 1  # what the first sequence says does not reach the third
assert torch.equal(varlen_attention(q, k, v, cu_seqlens, 0.2)[4:], packed[4:])
one_by_one = IMPLS["varlen_attention"]["torch"](q, k, v, cu_seqlens, 0.2)
with use("cpu", "torch"):
    assert torch.allclose(varlen_attention(q, k, v, cu_seqlens, 0.2), one_by_one, atol=1e-6)

# %% [markdown]
# ## Expanded: keys and values from the latent
# From the latent $c_t$ (512) and the rotary key $k^R_t$ (64), every head $h$ makes its own
#
# $$\begin{aligned}
# k^C_{t,h} &= W^{UK}_h c_t && \text{(2)} & k_{t,h} &= [\,k^C_{t,h};\ k^R_t\,] && \text{(4)}\\
# v_{t,h} &= W^{UV}_h c_t && \text{(5)} & q_{s,h} &= [\,q^C_{s,h};\ q^R_{s,h}\,] && \text{(9)}
# \end{aligned}$$
#
# and then attends (eq. 10). The superscript $C$ marks what was made from a latent and carries no
# position, $R$ what is rotary; shapes are $W^{UK}_h$ $(i, c)$ and $W^{UV}_h$ $(v, c)$. Both live in one
# matrix `wkv_b`: for each head first the $i$ key rows, then the $v$ value rows. This is what training
# and prefill (reading a whole prompt at once) use.


# %%
#| export
def concat_nope_rope(x_bshi: Tensor, x_bshr: Tensor) -> Tensor:
    """Concatenate a head's dims without position and its rotary dims: [x; x^R]."""
    return torch.cat((x_bshi, x_bshr), -1)


def up_project_kv(
    c_btc: Tensor, k_btr: Tensor, wkv_b: Tensor, h: int, i: int
) -> tuple[Tensor, Tensor]:
    """Compute k = [W^UK c; k^R] and v = W^UV c of every head (eq. 2, 4, 5)."""
    kv_bthx = rearrange(linear(c_btc, wkv_b), "b t (h x) -> b t h x", h=h)
    k_bthi, v_bthv = kv_bthx.split([i, kv_bthx.shape[-1] - i], dim=-1)
    return concat_nope_rope(k_bthi, k_btr[:, :, None].expand(-1, -1, h, -1)), v_bthv


def attend_expanded(
    q_bshi: Tensor, q_bshr: Tensor, c_btc: Tensor, k_btr: Tensor, wkv_b: Tensor, scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute o = attention([q; q^R], [W^UK c; k^R], W^UV c), (b, s, h, v); eq. 2, 4, 5, 9, 10.

    wkv_b: (h·(i + v), c), in each head the rows of keys before those of values. cu_seqlens: 0 and
    the end of each of m samples that lie end to end in one row (b = 1).
    """
    h, i = q_bshi.shape[2:]
    q_bshx = recompute(concat_nope_rope, q_bshi, q_bshr)
    k_bthx, v_bthv = recompute(up_project_kv, c_btc, k_btr, wkv_b, h, i)
    if cu_seqlens is None:
        return attention(q_bshx, k_bthx, v_bthv, scale)
    return varlen_attention(q_bshx[0], k_bthx[0], v_bthv[0], cu_seqlens, scale)[None]


# %%
B, S = 2, 3  # no two sizes alike, so that no mix-up passes
T, H = 7, 4
X, R = 16, 8
V, C = 12, 20


def random_inputs(dtype):
    """Return queries, latent, rotary key and wkv_b of a small attention."""
    g = torch.Generator().manual_seed(1)
    shapes = [(B, S, H, X), (B, S, H, R), (B, T, C), (B, T, R), (H * (X + V), C)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def by_head(q_bshi, q_bshr, c_btc, k_btr, wkv_b, scale):
    """Attend by the equations as printed: batch by batch, head by head, with plain matrices."""
    out = torch.empty(B, S, H, V, dtype=q_bshi.dtype)
    for b in range(B):
        for h, w_xc in enumerate(wkv_b.split(X + V)):
            wk_ic, wv_vc = w_xc[:X], w_xc[X:]
            k_tx = torch.cat((c_btc[b] @ wk_ic.T, k_btr[b]), -1)  # eq. 2, 4
            v_tv = c_btc[b] @ wv_vc.T  # eq. 5
            q_sx = torch.cat((q_bshi[b, :, h], q_bshr[b, :, h]), -1)  # eq. 9
            score_st = (scale * q_sx @ k_tx.T).masked_fill(~causal_mask(S, T), -torch.inf)
            out[b, :, h] = score_st.softmax(-1) @ v_tv  # eq. 10
    return out


inputs = random_inputs(torch.float64)
assert torch.allclose(attend_expanded(*inputs, 0.2), by_head(*inputs, 0.2), atol=1e-12)
print(f"cached per token: {C + R} numbers; made from them for attention: {H * (X + R + V)}")

# %% [markdown]
# ## Absorbed: attention inside the latent
# Making keys and values of all past tokens again, for one new query, would be absurd: 128 × 256
# numbers from each latent of 512. But matrix products associate, so the matrix can change sides:
#
# $$q_{s,h}^\top \left(W^{UK}_h c_t\right) = \left(W^{UK\top}_h q_{s,h}\right)^{\!\top} c_t
# \qquad\qquad
# \sum_t p_{t}\left(W^{UV}_h c_t\right) = W^{UV}_h \sum_t p_{t}\, c_t$$
#
# Here $q$ is $q^C$. Left: the query is mapped *into* the latent once, and meets cached latents
# directly. Right: the values are averaged as latents and mapped out once. No token of the past is
# touched by a matrix.
# Seen this way MLA is **multi-query attention** (MQA): all 128 query heads share one key head and one value
# head. The key is the latent followed by the rotary key, $512 + 64 = 576$ wide; the value is the latent
# alone, 512 wide. The core, in shapes $(b,s,h,c)$ against $(b,t,c)$, is an op of its own; on a GPU
# its kernel reads each latent once for all 128 heads. Both forms are equal in exact arithmetic, so
# their difference must shrink with the precision.


# %%
#| export
@op
def latent_attention(
    q_bshc: Tensor, q_bshr: Tensor, c_btc: Tensor, k_btr: Tensor, scale: float
) -> Tensor:
    """Compute causal attention with latents as keys and values: softmax(scale·(q·c + q·k)) c."""
    score_bhst = einsum(q_bshc, c_btc, "b s h c, b t c -> b h s t")
    score_bhst = score_bhst + einsum(q_bshr, k_btr, "b s h r, b t r -> b h s t")
    p_bhst = causal_softmax(score_bhst, scale).to(c_btc.dtype)
    return einsum(p_bhst, c_btc, "b h s t, b t c -> b s h c")


def attend_absorbed(
    q_bshi: Tensor, q_bshr: Tensor, c_btc: Tensor, k_btr: Tensor, wkv_b: Tensor, scale: float
) -> Tensor:
    """Compute what `attend_expanded` does inside the latent: W^UK acts on q, W^UV on the result."""
    h, i = q_bshi.shape[2:]
    w_hxc = rearrange(wkv_b, "(h x) c -> h x c", h=h)
    wk_hic, wv_hvc = w_hxc.tensor_split([i], dim=1)
    q_bshc = einsum(q_bshi, wk_hic, "b s h i, h i c -> b s h c")
    o_bshc = latent_attention(q_bshc, q_bshr, c_btc, k_btr, scale)
    return einsum(o_bshc, wv_hvc, "b s h c, h v c -> b s h v")


# %%
for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-13)]:
    inputs = random_inputs(dtype)
    want = attend_expanded(*inputs, 0.2)
    error = ((attend_absorbed(*inputs, 0.2) - want).norm() / want.norm()).item()
    assert error < tolerance, error
    print(f"{dtype}: relative difference below {tolerance:g}")
q_bshi, q_bshr, c_btc, k_btr, wkv_b = inputs
q_bshc = torch.randn(B, S, H, C, dtype=torch.float64)
k_bthx = torch.cat((c_btc, k_btr), -1)[:, :, None].expand(-1, -1, H, -1)  # one key head for all
v_bthc = c_btc[:, :, None].expand(-1, -1, H, -1)
want = attention(torch.cat((q_bshc, q_bshr), -1), k_bthx, v_bthc, 0.2)
assert torch.allclose(latent_attention(q_bshc, q_bshr, c_btc, k_btr, 0.2), want, atol=1e-12)

# %% [markdown]
# **Why position travels apart.** Had RoPE turned $k^C$ itself, a rotation would stand between the
# two matrices: $q_s^\top R_{t-s} W^{UK} c_t$ (chapter 02). It depends on the distance, so a query would
# need another vector in the latent *for every key*. Below: how many directions these vectors span.

# %%
from dsv3_ref.rope import rope_cos_sin

turning = replace(TINY, qk_rope_head_dim=X)
query, wk_ic = torch.randn(1, 1, 1, X), wkv_b[:X].float()
cos_sin = rope_cos_sin(turning, torch.arange(T))
turned_ti = apply_rotary_emb(query.expand(1, T, 1, X), *cos_sin)[0, :, 0]
without, with_rope = query[0, :, 0] @ wk_ic, turned_ti @ wk_ic
ranks = [torch.linalg.matrix_rank(m).item() for m in (without, with_rope)]
print(f"directions in the latent that one query needs for {T} keys:", end=" ")
print(f"{ranks[0]} without RoPE, {ranks[1]} with")
assert ranks == [1, T]

# %% [markdown]
# ## The latent cache
# One tensor $(b, T_{\max}, c{+}r)$ per layer, allocated once: appending writes in place, nothing is
# copied and no memory fragments. In bf16 at V3's shape a token takes $2 \cdot 576$ bytes per layer.


# %%
#| export
class LayerKVCache:
    """Cache of one layer: a latent and a rotary key per position, (b, t, c + r), allocated once."""

    def __init__(
        self, config: Config, batch: int, max_len: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_btx = torch.zeros(batch, max_len, width, device=device, dtype=dtype)
        self.length = 0

    def append(self, kv_bsx: Tensor) -> Tensor:
        """Write s new positions and return all t positions so far; raise if they do not fit."""
        end = self.length + kv_bsx.shape[1]
        if end > self.kv_btx.shape[1]:
            raise ValueError(f"cache holds {self.kv_btx.shape[1]} positions, {end} are needed")
        self.kv_btx[:, self.length : end] = kv_bsx
        self.length = end
        return self.kv_btx[:, :end]


# %%
cache = LayerKVCache(V3, batch=1, max_len=8, dtype=torch.bfloat16)
start = cache.kv_btx.data_ptr()
views = [cache.append(torch.randn(1, s, 576)) for s in (3, 1, 4)]
assert [len(x[0]) for x in views] == [3, 4, 8] and all(x.data_ptr() == start for x in views)
assert cache.kv_btx[0, 0].nbytes * V3.n_layers == 70_272
try:
    cache.append(torch.randn(1, 1, 576))
    raise AssertionError("a full cache must refuse")
except ValueError as e:
    print(e)

# %% [markdown]
# *Pages.* A server holds thousands of conversations that grow and end. It cuts the cache into pages
# of, say, 64 positions and gives each conversation a list of page numbers, so no memory is reserved
# for what may never be said.


# %%
#| export
@op
def paged_attention(
    q_bshx: Tensor, kv_cache_pyx: Tensor, block_table_bp: Tensor, cache_seqlens_b: Tensor,
    c: int, scale: float,
) -> Tensor:  # fmt: skip
    """Compute `latent_attention` over a paged cache, (b, s, h, c).

    q_bshx: [q^C; q^R], x = c + r; the queries of row b are the last s of its cache_seqlens_b
    positions. kv_cache_pyx: pages of y positions. block_table_bp: the pages of each row, int32.
    """
    outputs = []
    for q_shx, table_p, length in zip(q_bshx, block_table_bp, cache_seqlens_b.tolist()):
        kv_btx = kv_cache_pyx[table_p].flatten(0, 1)[None, :length]
        q_bshc, q_bshr = q_shx[None].tensor_split([c], dim=-1)
        outputs.append(latent_attention(q_bshc, q_bshr, kv_btx[..., :c], kv_btx[..., c:], scale))
    return torch.cat(outputs)


# %%
kv_cache_pyx, q_bshx = torch.randn(5, 4, C + R), torch.randn(2, 1, H, C + R)
block_table_bp = torch.tensor([[3, 0, 1], [4, 2, 2]], dtype=torch.int32)
length_b = torch.tensor([9, 4])
o = paged_attention(q_bshx, kv_cache_pyx, block_table_bp, length_b, C, 0.2)
kv = kv_cache_pyx[[3, 0, 1]].flatten(0, 1)[None, :9]  # the first row's nine positions
whole = latent_attention(q_bshx[:1, ..., :C], q_bshx[:1, ..., C:], kv[..., :C], kv[..., C:], 0.2)
assert torch.allclose(o[:1], whole)
kv_cache_pyx[1, 1:] = torch.nan  # page 1 is only begun: what lies after position 9 is never read
o = paged_attention(q_bshx, kv_cache_pyx, block_table_bp, length_b, C, 0.2)
assert o.isfinite().all()  # (the tuned form for CPUs gathers whole pages and masks their ends)

# %% [markdown]
# ## The layer
# What remains are the projections before and after. With $x_t$ the hidden state:
#
# $$\begin{aligned}
# c_t &= \operatorname{RMSNorm}(W^{DKV} x_t) && \text{(1)} & k^R_t &= \operatorname{RoPE}(W^{KR} x_t) && \text{(3)}\\
# c^Q_t &= \operatorname{RMSNorm}(W^{DQ} x_t) && \text{(6)} & [q^C_{t,1};\dots] &= W^{UQ} c^Q_t && \text{(7)}\\
# [q^R_{t,1};\dots] &= \operatorname{RoPE}(W^{QR} c^Q_t) && \text{(8)} & u_t &= W^O [o_{t,1};\dots;o_{t,H}] && \text{(11)}
# \end{aligned}$$
#
# `wkv_a` stacks $W^{DKV}$ on $W^{KR}$; `wq_b` interleaves $W^{UQ}$ and $W^{QR}$ head by head. Note what
# is cached: the latent *after* its norm and the rotary key *after* its turn, so neither is computed
# again. V2-Lite has no query latent; then a single `wq` makes the queries. The norms of the latents always have
# ε = 10⁻⁶: the released code gives them no other, whatever `norm_eps` the residual stream has (10⁻⁵ in Moonlight).
# (`saved_input_format="e5m6"` is a note for FP8, [chapter 09](09_fp8.ipynb).)


# %%
#| export
LATENT_NORM_EPS = 1e-6  # ε of the norms of the latents


class MLA(nn.Module):
    """Multi-head latent attention, eq. 1–11: x (b, s, d) → (b, s, d)."""

    absorb: bool | None = None  # None: absorb when decoding one token, True always, False never

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        heads_q = config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank:
            self.wq_a = Linear(config.dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.wq_b = Linear(config.q_lora_rank, heads_q)
        else:
            self.wq = Linear(config.dim, heads_q)
        self.wkv_a = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.wkv_b = Linear(
            config.kv_lora_rank, config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.wo = Linear(config.n_heads * config.v_head_dim, config.dim, saved_input_format="e5m6")

    def project_q(self, x_bsd: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Compute q = W^UQ RMSNorm(W^DQ x), with the last r dims of each head rotated (eq. 6–8)."""
        if not self.config.q_lora_rank:
            return self.up_project_q(self.wq, x_bsd, rope.cos, rope.sin)
        c_bsq = self.q_norm(self.wq_a(x_bsd))
        return recompute(self.up_project_q, self.wq_b, c_bsq, rope.cos, rope.sin)

    def up_project_q(
        self, up: Linear, x_bsx: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Project up and split into heads, (b, s, h, i) and (b, s, h, r), the latter rotated."""
        c = self.config
        q = rearrange(up(x_bsx), "b s (h x) -> b s h x", h=c.n_heads)
        q_bshi, q_bshr = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_bshi, apply_rotary_emb(q_bshr, cos, sin)

    def down_project_kv(self, x_bsd: Tensor, rope: Rope) -> Tensor:
        """Compute the cached [RMSNorm(W^DKV x); rotated W^KR x], (b, s, c + r); eq. 1 and 3."""
        c = self.config
        c_bsc, k_bsr = self.wkv_a(x_bsd).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        k_bsr = apply_rotary_emb(k_bsr[:, :, None], rope.cos, rope.sin)[:, :, 0]
        return recompute(concat_nope_rope, self.kv_norm(c_bsc), k_bsr)

    def forward(self, x_bsd: Tensor, rope: Rope, cache: LayerKVCache | None = None) -> Tensor:
        """Attend from each of s positions to earlier ones, those in the cache included."""
        c = self.config
        q_bshi, q_bshr = self.project_q(x_bsd, rope)
        kv = self.down_project_kv(x_bsd, rope)
        kv = kv if cache is None else cache.append(kv)
        c_btc, k_btr = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        decoding = cache is not None and x_bsd.shape[1] == 1
        absorb = decoding if self.absorb is None else self.absorb
        inputs = q_bshi, q_bshr, c_btc, k_btr, self.wkv_b.weight, softmax_scale(c)
        if rope.attend:
            o_bshv = rope.attend(*inputs)
        elif absorb:
            o_bshv = attend_absorbed(*inputs)
        else:
            o_bshv = attend_expanded(*inputs, rope.cu_seqlens)
        return self.wo(rearrange(o_bshv, "b s h v -> b s (h v)"))  # eq. 11


# %% [markdown]
# Two checks. First the layer's parts against eq. 1, 3, 6–8 for one token, with the matrices cut out
# by hand. Then the promise that makes generation possible: token by token on the cache equals the
# whole sequence at once, in either form, and also when a prompt is read in pieces.


# %%
def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw matrices from N(0, 1/fan-in), so that activations keep their size; norms stay 1."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=g)
    return module


c, length = TINY, 12
mla, rope = filled(MLA(c)), Rope.from_positions(c, torch.arange(length))
x_bsd = torch.randn(2, length, c.dim, generator=torch.Generator().manual_seed(2))


def norm(y):
    """Divide a vector by its root mean square."""
    return y / (y.square().mean() + LATENT_NORM_EPS).sqrt()


def turn(y, t: int):
    """Rotate a vector as at position t."""
    return apply_rotary_emb(y[None, None, None], rope.cos[[t]], rope.sin[[t]])[0, 0, 0]


t, head = 5, 2
x_d = x_bsd[0, t]
w_dkv, w_kr = mla.wkv_a.weight.split([c.kv_lora_rank, c.qk_rope_head_dim])
w_uq, w_qr = mla.wq_b.weight.view(c.n_heads, -1, c.q_lora_rank)[head].tensor_split(
    [c.qk_nope_head_dim]
)
cached = mla.down_project_kv(x_bsd, rope)[0, t]
assert torch.allclose(cached, torch.cat((norm(w_dkv @ x_d), turn(w_kr @ x_d, t))), atol=1e-5)
c_q = norm(mla.wq_a.weight @ x_d)
q_bshi, q_bshr = mla.project_q(x_bsd, rope)
assert torch.allclose(q_bshi[0, t, head], w_uq @ c_q, atol=1e-5)
assert torch.allclose(q_bshr[0, t, head], turn(w_qr @ c_q, t), atol=1e-5)


# %%
@torch.no_grad()
def in_pieces(mla, x_bsd, rope, sizes):
    """Return the layer's output when the sequence arrives on a cache in pieces of these sizes."""
    cache, out = LayerKVCache(mla.config, *x_bsd.shape[:2], dtype=x_bsd.dtype), []
    for piece in x_bsd.split(sizes, dim=1):
        at = slice(cache.length, cache.length + piece.shape[1])
        out.append(mla(piece, Rope(rope.cos[at], rope.sin[at]), cache))
    return torch.cat(out, dim=1)


for mla.absorb in (None, False, True):
    whole = mla(x_bsd, rope)
    for sizes in ([1] * length, [length], [5, 1, 4, 2]):
        assert torch.allclose(in_pieces(mla, x_bsd, rope, sizes), whole, atol=1e-5)
    print(f"absorb={mla.absorb!s:6}token by token = in pieces = at once")
mla.absorb = None

# %% [markdown]
# ### What MLA replaces
# To compare fairly we need the others too. In GQA, $n$ heads of keys and values serve $H$ heads of
# queries, each its own group of $H/n$; $n = H$ is MHA, $n = 1$ multi-query attention (MQA). All $r$ dims
# of queries and keys are turned, and the cache holds $n\,(r + v)$ numbers per token:
#
# $$o_{s,h} = \sum_{t \le s} \operatorname{softmax}_t\!\Big(\tfrac{1}{\sqrt r}\, q_{s,h}^\top k_{t,g(h)}\Big) v_{t,g(h)},
# \qquad g(h) = \lfloor h\,n / H \rfloor$$


# %%
#| export
class GQA(nn.Module):
    """Grouped-query attention: h query heads share n key-value heads; (b, s, d) → (b, s, d).

    All r dims of queries and keys are rotated. n = h is MHA. The cache is n·(r + v) wide.
    """

    def __init__(self, config: Config, n_kv_heads: int):
        super().__init__()
        self.config = config
        self.n = n_kv_heads
        self.wq = Linear(config.dim, config.n_heads * config.qk_rope_head_dim)
        self.wkv = Linear(config.dim, n_kv_heads * (config.qk_rope_head_dim + config.v_head_dim))
        self.wo = Linear(config.n_heads * config.v_head_dim, config.dim)
        # `softmax_scale` is for heads of i + r dims, here there are r
        nope_to_rope = config.qk_nope_head_dim / config.qk_rope_head_dim
        self.scale = softmax_scale(config) * (1 + nope_to_rope) ** 0.5

    def forward(self, x_bsd: Tensor, rope: Rope, cache: LayerKVCache | None = None) -> Tensor:
        c = self.config
        q_bshr = apply_rotary_emb(
            rearrange(self.wq(x_bsd), "b s (h r) -> b s h r", h=c.n_heads), rope.cos, rope.sin
        )
        widths = [self.n * c.qk_rope_head_dim, self.n * c.v_head_dim]
        k_bsx, v_bsx = self.wkv(x_bsd).split(widths, dim=-1)
        k_bsnr = rearrange(k_bsx, "b s (n r) -> b s n r", n=self.n)
        k_bsx = apply_rotary_emb(k_bsnr, rope.cos, rope.sin).flatten(2)
        kv_btx = torch.cat((k_bsx, v_bsx), dim=-1)
        kv_btx = kv_btx if cache is None else cache.append(kv_btx)
        k_bthr, v_bthv = (
            rearrange(x, "b t (n y) -> b t n y", n=self.n).repeat_interleave(c.n_heads // self.n, 2)
            for x in kv_btx.split(widths, dim=-1)
        )
        o_bshv = attention(q_bshr, k_bthr, v_bthv, self.scale)
        return self.wo(rearrange(o_bshv, "b s h v -> b s (h v)"))


# %%
# Against torch's own attention with repeated heads, and token by token on a cache.
wide = replace(TINY, qk_rope_head_dim=32, rope_factor=1.0)
for n in (1, 2, 4):
    c = replace(wide, kv_lora_rank=n * (32 + wide.v_head_dim) - 32)  # so that the cache is as wide
    gqa, rope = filled(GQA(c, n)), Rope.from_positions(c, torch.arange(length))
    k_bsnr, v_bsnv = gqa.wkv(x_bsd).view(2, length, 2, n, 32).unbind(2)
    q_bshr = apply_rotary_emb(gqa.wq(x_bsd).view(2, length, 4, 32), *rope[:2])
    q, k, v = (x.transpose(1, 2) for x in (q_bshr, apply_rotary_emb(k_bsnr, *rope[:2]), v_bsnv))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    want = gqa.wo(o.transpose(1, 2).flatten(2))
    assert torch.allclose(gqa(x_bsd, rope), want, atol=1e-5)
    assert torch.allclose(in_pieces(gqa, x_bsd, rope, [1] * length), want, atol=1e-5)
    print(f"{n} key-value heads: {n * (32 + c.v_head_dim)} numbers per token and layer")

# %% [markdown]
# ### The scale after stretching the context
# `softmax_scale` (chapter 02) is $1/\sqrt{i + r}$ of eq. 10; YaRN, which stretches 4K positions to
# 160K, multiplies it by $(0.1\ln 40 + 1)^2 = 1.87$. The whole score is multiplied, content and
# position alike, although RoPE touches only the latter. Why at all? Among forty times the keys, a
# softmax of the same sharpness spreads over forty times as many. How many share the weight is counted
# by $\exp$ of the entropy; $\exp(\ln n) = n$ if all have the same. Scores here are random.

# %%
assert abs(softmax_scale(V3) - 192**-0.5 * (0.1 * torch.log(torch.tensor(40.0)) + 1) ** 2) < 1e-6
factor = softmax_scale(V3) / softmax_scale(replace(V3, rope_factor=1.0))
keys = torch.randn(163_840, generator=torch.Generator().manual_seed(0))
for number, sharpness in [(4096, 1.0), (163_840, 1.0), (163_840, factor)]:
    p = (sharpness * keys[:number]).softmax(0)
    sharing = torch.exp(-(p * p.log()).sum())
    print(f"{number:7,} keys, scale × {sharpness:.2f}: about {sharing:7,.0f} share the weight")

# %% [markdown]
# ## Experiment: how much must a token remember?
# A single layer must do two things at once. *Content*: every token carries a key and a value and asks
# for one earlier key; answer with that key's value. *Position*: name the value two tokens back. The
# heads' full keys and values are 4 × (24 + 16) = 160 numbers; the latent is given 1, 2, 4 or 8, beside
# a rotary key of 8. A last run keeps the latent of 8 and silences the rotary key. Values are one of 24,
# so a blind guess is right in 4 %.

# %%
STEPS = 20 if os.environ.get("DSV3_SHORT") else 240
WORDS, D = 24, 64


def recall_batch(n: int, g: torch.Generator):
    """Return tokens (key, value, asked key), (n, s, 3), and answers (its value, value two back)."""
    key = torch.rand(n, WORDS, generator=g).argsort(-1)  # each key once in a sequence
    value = torch.randint(WORDS, (n, WORDS), generator=g)
    where = (torch.rand(n, WORDS, generator=g) * (torch.arange(WORDS) + 1)).long()
    back = (torch.arange(WORDS) - 2).clamp(min=0).expand(n, WORDS)
    tokens = torch.stack((key, value, key.gather(1, where)), -1)
    return tokens, torch.stack((value.gather(1, where), value.gather(1, back)), -1)


class Recall(nn.Module):
    """Embedding, one MLA, and a head for each of the two questions."""

    def __init__(self, latent: int):
        super().__init__()
        c = replace(TINY, dim=D, n_heads=4, q_lora_rank=0, kv_lora_rank=latent,
                    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, rope_theta=100.0)  # fmt: skip
        self.rope = Rope.from_positions(c, torch.arange(WORDS))
        self.embed, self.mla = nn.Embedding(3 * WORDS, D), filled(MLA(c))
        self.head = nn.Linear(D, 2 * WORDS)

    def embedded(self, tokens):
        return self.embed(tokens + torch.arange(3) * WORDS).sum(-2)

    def forward(self, tokens):
        return self.head(self.mla(self.embedded(tokens), self.rope)).unflatten(-1, (2, WORDS))


# %%
def train_recall(latent: int, rotary: bool = True):
    """Return the share of right answers per step by content and by position, and the model."""
    torch.manual_seed(0)
    g, model = torch.Generator().manual_seed(0), Recall(latent)
    if not rotary:  # cos = sin = 0: q^R and k^R vanish
        model.rope = Rope(0 * model.rope.cos, 0 * model.rope.sin)
    optimizer, right = torch.optim.Adam(model.parameters(), 1e-2), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / STEPS)
        tokens, answer = recall_batch(48, g)
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 2), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(-1) == answer).float().mean((0, 1)))
    return torch.stack(right), model


RUNS = {"latent 1": (1, True), "latent 2": (2, True), "latent 4": (4, True),
        "latent 8": (8, True), "latent 8, no rotary key": (8, False)}  # fmt: skip
recalled = {name: train_recall(*run) for name, run in RUNS.items()}
final = {name: right[-20:].mean(0).tolist() for name, (right, _) in recalled.items()}
for name, (content, position) in final.items():
    print(f"{name:24} content {content:4.0%}   position {position:4.0%}")

fig, axes = figure(1, 2, 9, 3.2, sharey=True)
colors = (PINK, GRAY, ORANGE, BLUE, GREEN)
styles = (":", "-.", "--", "-", (0, (8, 2, 1, 2)))
for (name, (right, _)), color, style in zip(recalled.items(), colors, styles):
    for question, ax in enumerate(axes):
        smooth = right[:, question].unfold(0, min(10, STEPS), 1).mean(-1)
        ax.plot(smooth, color=color, linestyle=style, label=name)
axes[0].set(title="Recall by content", xlabel="step", ylabel="share of right answers")
axes[1].set(title="Recall by position: two back", xlabel="step")
axes[1].legend(loc="center right", fontsize=8.5)
show(fig)
if STEPS > 100:  # long enough to have learned
    assert min(final["latent 8"]) > 0.95 and max(final["latent 1"]) < 0.5
    assert final["latent 8, no rotary key"][0] > 0.95 > 2 * final["latent 8, no rotary key"][1]

# %% [markdown]
# A latent of eight (and a rotary key of eight) serves where 160 numbers would be stored, one is far too
# few, and without the rotary key the layer cannot count back, however well it finds content: 23 % is
# about what one gets by naming the value seen most often so far. Inside the trained layer a head's score
# is a sum of two terms, $q^C\!\cdot k^C + q^R\!\cdot k^R$, which can be looked at one by one. Heads have
# divided the work: two look two back, one finds the key that was asked for. Where a head looks back, the
# rotary term runs in stripes along the diagonals, since a turn knows only distance; the stripes are
# uneven because $q^R$ and $k^R$ are still made from what the tokens are.


# %%
@torch.no_grad()
def score_parts(model: Recall, tokens):
    """Return the scaled scores (h, s, t) of one sequence: content term and rotary term."""
    mla, c = model.mla, model.mla.config
    x_bsd = model.embedded(tokens)
    q_bshi, q_bshr = mla.project_q(x_bsd, model.rope)
    c_btc, k_btr = mla.down_project_kv(x_bsd, model.rope).split(
        [c.kv_lora_rank, c.qk_rope_head_dim], -1
    )
    wk_hic = rearrange(mla.wkv_b.weight, "(h x) c -> h x c", h=c.n_heads)[:, : c.qk_nope_head_dim]
    content = einsum(q_bshi, wk_hic, c_btc, "b s h i, h i c, b t c -> b h s t")
    position = einsum(q_bshr, k_btr, "b s h r, b t r -> b h s t")
    return softmax_scale(c) * content[0], softmax_scale(c) * position[0]


tokens, _ = recall_batch(1, torch.Generator().manual_seed(7))
content_hst, position_hst = score_parts(recalled["latent 8"][1], tokens)
p_hst = causal_softmax((content_hst + position_hst)[None], scale=1.0)[0]
two_back = p_hst.diagonal(-2, 1, 2).mean(-1)  # weight each head puts two tokens back
asked_st = tokens[0, :, 2, None] == tokens[0, :, 0]
finds = (p_hst * asked_st).sum(-1).mean(-1)  # weight on the token whose key was asked for
print("weight two back  ", [f"{x:.2f}" for x in two_back.tolist()])
print("weight on the key", [f"{x:.2f}" for x in finds.tolist()])

fig, axes = figure(1, 3, 9.5, 3.4, sharey=True)
h = int(two_back.argmax())
panels = [("looks back: rotary score", position_hst[h]), ("looks back: attention", p_hst[h]),
          ("finds the key: attention", p_hst[int(finds.argmax())])]  # fmt: skip
for ax, (title, x_st) in zip(axes, panels):
    visible_st = x_st.masked_fill(~causal_mask(WORDS, WORDS), torch.nan)
    image = ax.imshow(visible_st, cmap="cividis")
    fig.colorbar(image, ax=ax, shrink=0.75)
    ax.set(title=title, xlabel="key position t")
axes[2].plot(*asked_st.nonzero().T.flip(0), "o", mfc="none", mec="#D55E00", ms=7, mew=1.2)
axes[0].set_ylabel("query position s")
axes[2].set_xlabel("key position t (○: asked-for key)")
show(fig)

# %% [markdown]
# ### On text: what does a smaller cache cost?
# `dsv3 ablate mla` trains a model of 1.7M parameters, three layers with eight heads of 16, on
# speeches and Python source (300 steps of 8 × 128 tokens, three seeds, 16 minutes on one core) with
# MHA, GQA of 2 and 1 key-value heads, and MLA of the same two cache sizes (a latent of 56 or 24, beside
# a rotary key of 8). GQA and MLA save parameters as well as cache; what they save is given to the dense
# feed-forward network (FFN), so that all have equally many. `notebooks/results` keeps the file that it
# wrote; ± is the standard deviation over seeds.

# %%
from dsv3_ref.viz import ablation

compared = ablation.load_ablation("mla")
print(compared["command"])
ablation.print_table(compared, against="MHA")
sizes = {name: v["params"] for name, v in compared["variants"].items()}
assert max(sizes.values()) < 1.01 * min(sizes.values())

fig, ax = figure(1, 1, 8, 3.4)
losses = ablation.values_by_variant(compared)
looks = ((ORANGE, "s"), (GREEN, "^"), (BLUE, "o"), (GREEN, "^"), (BLUE, "o"))
for (name, nats), (color, mark) in zip(losses.items(), looks):
    nats = nats - losses["MHA"]
    cache_bytes = compared["variants"][name]["cache_bytes"]
    aside = cache_bytes * (0.97 if name.startswith("GQA") else 1.03)  # equal caches side by side
    ax.semilogx([aside] * len(nats), nats, mark, base=2, color=color, alpha=0.5, mec="none")
    ax.semilogx(aside, nats.mean(), mark, base=2, color=color, ms=10, mfc="none", mew=2)
    ax.annotate(name, (aside, nats.mean()), xytext=(9, -3), textcoords="offset points", color=color)
ax.set(title="What a smaller cache costs (dots: seeds; open: their mean)", xlim=(150, 2300),
       xlabel="cache (bytes per token, bf16, three layers)",
       ylabel="loss above MHA, same seed (nats)")  # fmt: skip
ax.set_xticks([192, 384, 1536], ["192", "384", "1536"])
show(fig)

# %% [markdown]
# Not what one hopes for: at equal cache MLA is *behind* GQA, by 0.04 and 0.05 nats and in every seed,
# and GQA gives up little against MHA. V3's report does not compare them; V2's found MLA ahead of MHA,
# in models ten thousand times as large. The gap of MLA 56 to MHA is mostly on source code
# (0.085 ± 0.004, speeches 0.016 ± 0.006). The runs do not tell why: MLA turns 8 dims per head where GQA
# turns 16, its keys pass through two matrices that start from one small σ, and 0.3M tokens are only the
# beginning of a training. With eight heads there is also little to save: one pair shared by all costs
# 0.015 ± 0.011. MLA is made for 128.

# %% [markdown]
# ## Play: when does which form win?
# Both forms of one layer, in multiply-adds × 2, for $s$ new queries against a cache of $t$ latents, of
# which $n = s\,t - s(s-1)/2$ pairs are visible:
#
# $$\text{expanded} = 2h\,[\,t\,c(i+v) + n(i+r+v)\,], \qquad \text{absorbed} = 2h\,[\,s\,c(i+v) + n(2c+r)\,]$$
#
# Expanding costs once per *key*, absorbing once per *query*; but inside the latent each pair costs 1088
# instead of 320. So a single query wants to be absorbed and a whole prompt expanded; they break even
# near 170 queries. `MLA` keeps to a simple rule, absorbed for one token on a cache and expanded for
# more; a decoder that checks a few drafted tokens at once should set `absorb = True`. Watch how the
# crossing moves with the width of the latent.


# %%
def attention_flops(c: Config, s, t):
    """Return the FLOPs of (expanded, absorbed) attention of one layer without x's projections."""
    head = c.qk_nope_head_dim + c.v_head_dim
    pairs = s * t - s * (s - 1) / 2
    expand = t * c.kv_lora_rank * head + pairs * (head + c.qk_rope_head_dim)
    absorb = s * c.kv_lora_rank * head + pairs * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return 2 * c.n_heads * expand, 2 * c.n_heads * absorb


def draw_flops(log2_context: int = 15, latent: int = 512):
    """Draw FLOPs against new queries, and the two forms' ratio, with V3's heads."""
    c, t = replace(V3, kv_lora_rank=latent), 2**log2_context
    s = torch.logspace(0, log2_context, 2000, base=2, dtype=torch.float64)
    expand, absorb = attention_flops(c, s, t)
    even = s[(absorb > expand).int().argmax()] if absorb[-1] > expand[-1] else None
    fig, axes = figure(1, 2, 9.5, 3.4)
    axes[0].loglog(s, expand, "--", base=2, color=ORANGE, label="expanded")
    axes[0].loglog(s, absorb, base=2, color=BLUE, label="absorbed")
    axes[0].set_yscale("log", base=10)
    axes[0].legend()
    axes[0].set(title=f"{t:,} positions, latent of {latent}", ylabel="FLOPs, one layer")
    axes[1].semilogx(s, absorb / expand, base=2, color=BLUE)
    axes[1].axhline(1, color=GRAY, lw=1)
    note = "absorbed always cheaper" if even is None else f"break even near {even:.0f} queries"
    axes[1].set(title=note, ylabel="absorbed / expanded", ylim=(0, None))
    for ax in axes:
        ax.set_xlabel("new queries s")
        ax.set_xticks([4**k for k in range(log2_context // 2 + 1)])
        ax.get_xaxis().set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.tick_params(axis="x", rotation=45)
    show(fig)


one, one_absorbed = attention_flops(V3, 1, 32_768)
prompt, prompt_absorbed = attention_flops(V3, 32_768, 32_768)
print(f"expanded / absorbed: {one / one_absorbed:.0f} for one query, "
      f"{prompt / prompt_absorbed:.2f} for a prompt of 32K")  # fmt: skip
assert one > 100 * one_absorbed and prompt < prompt_absorbed / 3
draw_flops()
play(draw_flops, log2_context=(10, 17, 1), latent=[512, 64, 128, 256, 1024])

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** How many groups could GQA afford, at a head dim of 128, with the cache of MLA?


# %%
@checker
def check_groups(fn):
    """How many numbers per token does MLA keep, and how many one group of GQA (a key, a value)?"""
    assert abs(fn(V3) - 2.25) < 1e-9
    assert abs(fn(replace(V3, kv_lora_rank=448)) - 2) < 1e-9


@checker
def check_break_even(fn):
    """Set both FLOPs equal; what stands before s·t on either side, what before t and s alone?"""
    for c in (V3, replace(V3, kv_lora_rank=256)):
        for t in (4096, 131_072):
            s = fn(c, t)
            expand, absorb = attention_flops(c, s, t)
            extra = c.n_heads * s * (s - 1) * (2 * c.kv_lora_rank - 256)  # the mask's corner
            assert abs((absorb + extra) / expand - 1) < 1e-6


@checker
def check_forgetful(fn):
    """Right for s = t; with a past, a query still sees some key, no future one, yet not all before."""
    assert torch.equal(fn(6, 6).bool(), causal_mask(6, 6))
    mine, right = fn(2, 5).bool(), causal_mask(2, 5)
    assert mine.shape == (2, 5) and mine.any(-1).all()
    assert (right & ~mine).any() and not (mine & ~right).any()


@checker
def check_fold(fn):
    """Which v columns of wo_dx belong to head h? The result is (h, d, c)."""
    g = torch.Generator().manual_seed(3)
    wv_hvc, wo_dx = torch.randn(3, 4, 5, generator=g), torch.randn(7, 12, generator=g)
    o_hc = torch.randn(3, 5, generator=g)
    want, fold_hdc = wo_dx @ torch.einsum("hvc,hc->hv", wv_hvc, o_hc).flatten(), fn(wv_hvc, wo_dx)
    assert fold_hdc.shape == (3, 7, 5)
    assert torch.allclose(torch.einsum("hdc,hc->d", fold_hdc, o_hc), want, atol=1e-5)


# %%
def my_groups(c: Config) -> float:
    return ...


check_groups(my_groups)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Two and a quarter: MLA gives 128 heads a view of their own for the price of 2.25 shared ones.
#
# ```python
# def my_groups(c):
#     return (c.kv_lora_rank + c.qk_rope_head_dim) / (2 * c.v_head_dim)
# ```
# </details>
#
# **2 · Predict.** At how many new queries do both forms cost the same for a cache of $t$ positions? Take
# $n = s\,t$ pairs, as if nothing were masked. What does it tend to for $t \to \infty$?


# %%
def my_break_even(c: Config, t: int) -> float:
    return ...


check_break_even(my_break_even)

# %% [markdown]
# <details><summary>Answer</summary>
#
# $t\,c(i+v) = s\,[\,c(i+v) + t(2c-i-v)\,]$; for long contexts $s \to 131072/768 = 171$ at V3's shape.
#
# ```python
# def my_break_even(c, t):
#     up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
#     return t * up / (up + t * (2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim))
# ```
# </details>
#
# **3 · Break.** Write the causal mask that many first versions have: faultless in training, wrong as
# soon as there is a cache. What would one notice, if single tokens are spared because they need no mask?


# %%
def my_forgetful_mask(s: int, t: int):
    return ...


check_forgetful(my_forgetful_mask)

# %% [markdown]
# <details><summary>Answer</summary>
#
# No error, and a perfect training curve; but reading a prompt in pieces, or checking several drafted
# tokens at once, gives other text than reading everything at once.
#
# ```python
# def my_forgetful_mask(s, t):
#     return torch.ones(s, t, dtype=torch.bool).tril()
# ```
# </details>
#
# **4 · Extend.** $W^{UV}$ could be absorbed into $W^O$ as well. Fold them: from `wv_hvc` and `wo_dx`, where
# $x = h\,v$ counts head by head, make one table $(h, d, c)$. Then count its numbers at V3's shape: would
# you store it?


# %%
def my_fold(wv_hvc, wo_dx):
    return ...


check_fold(my_fold)

# %% [markdown]
# <details><summary>Answer</summary>
#
# $128 \cdot 7168 \cdot 512 = 470$M numbers per layer where the two factors hold 8.4M + 117M: more bytes to
# read for every token decoded. Associativity allows much that arithmetic forbids.
#
# ```python
# def my_fold(wv_hvc, wo_dx):
#     wo_dhv = rearrange(wo_dx, "d (h v) -> d h v", h=wv_hvc.shape[0])
#     return einsum(wo_dhv, wv_hvc, "d h v, h v c -> h d c")
# ```
# </details>

# %% [markdown]
# ## Scale-up
# At 671B, one layer, decoding one token against each cached latent: 1152 bytes come from memory and
# meet 128 heads. Whether the memory or the arithmetic of a GPU binds is decided by operations per byte.
#
# - **Decoding** sits just below the 295 at which an H800 is in balance (chapter 01): bandwidth binds at
#   one query, arithmetic at two. Hence the two headlines of FlashMLA, DeepSeek's kernel: 3000 GB/s in the
#   one case and 660 TFLOP/s in the other. The kernel in `kernels/decode.py` takes the place of
#   `latent_attention`; long caches are split among blocks whose partial softmaxes are merged.
# - **Training** expands, and keys and values of one token weigh seventy times its latent. The report
#   keeps the latent and computes the up-projections again in the backward pass (§3.2.3).
# - **Many GPUs.** Heads can be divided among them (*tensor parallelism*), the latent cannot: each would
#   keep the whole cache. Training does without; decoding uses a little (4-way) and spreads *conversations*
#   over 80 groups of GPUs (§3.4).

# %%
bytes_read = 2 * (V3.kv_lora_rank + V3.qk_rope_head_dim)
flops = 2 * V3.n_heads * (2 * V3.kv_lora_rank + V3.qk_rope_head_dim)
ridge = 989e12 / 3.35e12  # H800: bf16 FLOP/s over bytes/s
print(
    f"MLA decode: {flops / bytes_read:.0f} FLOPs per byte, MHA 1; an H800 balances at {ridge:.0f}"
)
print(f"two queries per step (MTP, chapter 06): {2 * flops / bytes_read:.0f}")
expanded_bytes = 2 * V3.n_heads * (V3.qk_nope_head_dim + V3.qk_rope_head_dim + V3.v_head_dim)
print(f"per token and layer: keys and values {expanded_bytes:,} bytes, latent {bytes_read:,} bytes")
print(f"cache of 128K tokens: {2**17 * V3.n_layers * bytes_read / 1e9:.1f} GB")
