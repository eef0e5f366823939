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
# # 08 · Generation: one token at a time

# %% [markdown]
# ## Why
# A language model does one thing: given $s$ tokens it says how likely each word is to be the next.
# To write, we draw one token, append it, and ask again. Asked naively, the model reads the whole
# text anew for each word: 1,000 words after a prompt of 1,000 cost **1.5 million** token passes.
# With the latent cache of chapter 03 they cost 1,999, because a token's key and value never change
# once it is written. The figure shows the two bills.

# %%
#| export decode
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange

from dsv3_ref.mla import LayerKVCache, attend_expanded, concat_nope_rope, up_project_kv
from dsv3_ref.model import Transformer
from dsv3_ref.moe import MoE
from dsv3_ref.block import MTP, Block
from dsv3_ref.ops import RMSNorm, swiglu, upcast
from dsv3_ref.rope import rope_cos_sin, softmax_scale

# %%
import argparse
import json
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from torch import nn

from dsv3_ref.config import TINY, V3, count_params
from dsv3_ref.mla import attention
from dsv3_ref.mtp import mtp_hidden_states
from dsv3_ref.pretrain import compute_losses
from dsv3_ref.viz import BLUE, GRAY, ORANGE, checker, figure, play, show
from dsv3_ref.viz.ablation import RESULTS_DIR

torch.manual_seed(0)


def passes(prompt: int, new: int, cached: bool) -> int:
    """Tokens that go through the model until `new` tokens are chosen."""
    return prompt + new - 1 if cached else sum(prompt + i for i in range(new))


fig, ax = figure(width=6.5, height=2.8)
news = range(1, 1001, 10)
ax.plot(news, [passes(1000, n, False) for n in news], color=ORANGE, label="read everything again")
ax.plot(news, [passes(1000, n, True) for n in news], color=BLUE, ls="--", label="latent cache")
ax.set(yscale="log", xlabel="new tokens after a prompt of 1,000", ylabel="token passes")
ax.set_title("Without a cache the bill grows with the square of the text")
ax.legend()
show(fig)
assert passes(1000, 1000, True) == 1999 and passes(1000, 1000, False) == 1_499_500

# %% [markdown]
# ## What the report says
# Serving splits into two jobs (section 3.4). *Prefill* reads the prompt: many tokens at once,
# matrix products of full size, limited by arithmetic. *Decoding* adds one token a step: little
# arithmetic, every active weight and the whole cache read from memory, limited by bandwidth. MLA
# was designed for the second job. And because a step that reads all active weights for one token
# could check two tokens for almost the same price, V3 lets its MTP module guess the token after
# next: the guess is right for 85–90 % of tokens, which makes writing 1.8 times as fast (section
# 5.4.3). This chapter builds both: a lean decoding step, and drafts that change neither
# the text nor, where it is drawn, its distribution.
#
# Axes: `b` rows, `s` new positions, `t` positions in the cache, `d` model, `w` words, `h` heads, `c` latent, `r`
# rotary, `k` drafts or chosen experts, `m` terms of a sum, `o` outputs, `x` whatever is joined.

# %% [markdown]
# ## Choosing a token
# The logits $\ell \in \mathbb{R}^{b\times w}$ become probabilities under a temperature $T$:
#
# $$p_w = \frac{e^{\ell_w/T}}{\sum_{w'} e^{\ell_{w'}/T}}$$
#
# At $T=1$ these are the model's own; below, likely words gain; at $T \to 0$ only the likeliest is
# left, which we write as an argmax instead of dividing by zero. *Top-p* cuts off the long tail: of
# the words in order of probability it keeps the fewest (the *nucleus*) that together reach a share
# `top_p`, and scales them up until they sum to 1. We keep the distribution itself at hand, not only a
# draw from it: drafting will need it.


# %%
#| export decode
def logits_to_probs(logit_bw, temperature: float, top_p: float = 1.0):
    """What is drawn from, (b, w): softmax(logit / T) within the nucleus; one-hot at T = 0."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0, not {temperature}; top_p in (0, 1]")
    if temperature == 0:
        return torch.zeros_like(logit_bw).scatter_(-1, logit_bw.argmax(-1, keepdim=True), 1.0)
    p_bw = (logit_bw.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked_bw, order_bw = p_bw.sort(-1, descending=True)
        cut_bw = ranked_bw.cumsum(-1) - ranked_bw >= top_p  # those before it already suffice
        p_bw = p_bw.masked_fill(cut_bw.scatter(-1, order_bw, cut_bw), 0.0)
    return p_bw / p_bw.sum(-1, keepdim=True)


def sample(logit_bw, temperature: float, generator: torch.Generator | None = None, top_p=1.0):
    """The next token (b,): the likeliest at temperature 0, else drawn from `logits_to_probs`."""
    if temperature == 0:
        return logit_bw.argmax(-1)
    return multinomial_sample(logits_to_probs(logit_bw, temperature, top_p), generator)


def multinomial_sample(p_bw, generator: torch.Generator | None = None):
    """One token from each distribution, (b,); the weights need not sum to 1."""
    return torch.multinomial(p_bw, 1, generator=generator)[:, 0]


# %%
logit_bw = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
draws = 20_000
for temperature in (0.5, 1.0, 2.0):
    drawn = sample(logit_bw.expand(draws, -1), temperature, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / draws
    exact = (logit_bw[0] / temperature).softmax(-1)
    assert (share - exact).abs().max() < 0.015  # four standard errors of a share are 0.014
    print(f"T = {temperature}:", [f"{x:.2f}" for x in share.tolist()])
assert sample(logit_bw, 0).tolist() == [0]
assert (logits_to_probs(logit_bw, 1.0, 0.7) > 0).tolist() == [[True, True, False, False]]

# %% [markdown]
# ## Rows of unequal length
# Prompts in a batch differ in length, and with drafts rows will also *grow* at different speeds. The
# cache of chapter 03 hands out rows of one length, so here every row gets its own count `at` of
# tokens it holds. New tokens are written behind them, turned by their own positions, and a query
# sees the keys up to its own position. What lies beyond, padding or a rejected draft, is never seen
# and is simply written over later. So *rolling back* a cache means saying a smaller number.


# %%
#| export decode
class DecodePositions(NamedTuple):
    """Where s new tokens of every row go: behind those it holds, whose number may differ."""

    cache_index: tuple  # of the new tokens in a cache (b, t, …)
    end: int  # positions that exist afterwards
    freqs_cis: torch.Tensor  # rotations e^{iω·position}, (b, s, 1, r/2)
    masked: torch.Tensor | None  # keys that a query must not see, (b or none, s, 1, t)
    is_first_prefill: bool  # nothing came before


def cache_index(at: list[int], s: int, device=None):
    """Index of the s positions behind `at` in a cache (b, t, …): a slice where rows are equal."""
    if min(at) == max(at):
        return slice(None), slice(at[0], at[0] + s)
    position_bs = torch.tensor(at, device=device)[:, None] + torch.arange(s, device=device)
    return torch.arange(len(at), device=device)[:, None], position_bs


def positions_for(at: list[int], s: int, freqs_cis_tx) -> DecodePositions:
    """The next s positions of rows that hold `at` tokens each."""
    end, (_, here), device = (
        max(at) + s,
        cache_index(at, s, freqs_cis_tx.device),
        freqs_cis_tx.device,
    )
    if isinstance(here, slice):  # the common case, and one token sees all
        key_t = torch.arange(end, device=device)
        future = key_t[here, None, None] < key_t if s > 1 else None
        return DecodePositions(
            (slice(None), here), end, freqs_cis_tx[None, here, None], future, end == s
        )
    return ragged_positions(here, freqs_cis_tx, end)


def ragged_positions(position_bs, freqs_cis_tx, end: int) -> DecodePositions:
    """The same for any positions, among `end` of which a query sees those up to its own."""
    row_b1 = torch.arange(len(position_bs), device=freqs_cis_tx.device)[:, None]
    future = position_bs[..., None, None] < torch.arange(end, device=freqs_cis_tx.device)
    turn = freqs_cis_tx[position_bs[..., None]]
    return DecodePositions((row_b1, position_bs), end, turn, future, False)


def apply_freqs_cis(x_bshr, freqs_cis_bs1x):
    """Pairs as complex numbers times e^{iω·position}: `apply_rotary_emb` with a position for every row."""
    x = torch.view_as_complex(x_bshr.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(x * freqs_cis_bs1x).flatten(-2).to(x_bshr.dtype)


# %% [markdown]
# ## A product with one row
# A decoding step multiplies every active matrix with a handful of rows, so it is bound by reading
# them. Libraries for matrix products are made for many rows: with one, and matrices that come from
# beyond the second-level cache, MKL (Intel's) read 2 MB of experts in 231 µs on our two cores, where a plain sum
# over the same bytes took 31. Written the other way round,
#
# $$y = xW^\top = \sum_i x_i\,(W^\top)_i\qquad (1,d)\times(d,o)\to(1,o)$$
#
# is a *weighted sum of rows* of $W^\top$, and for that there is a fast routine under another name: recommender
# systems call it an embedding bag. It took 41 µs, and it takes an index, so all experts of all tokens
# can be one call on one tall table.


# %%
#| export decode
MAX_TABLE_TOKENS = 16  # tokens for which weighted sums of rows beat sorting by expert


def arange_view(*shape: int):
    """0, 1, 2, … in this shape."""
    return torch.arange(math.prod(shape)).view(shape)


def embedding_bag_matmul(table_xo, index_bm, weight_bm):
    """Weighted sums of rows of a table: y_bo = Σ_m weight_bm · table[index_bm]_o."""
    start_b = arange_view(len(index_bm)) * index_bm.shape[1]
    flat = index_bm.flatten(), start_b, False, 0, False, weight_bm.flatten()
    return torch.embedding_bag(table_xo, *flat)[0]


def small_matmul(x_nd, table_do):
    """x W of very few rows as a weighted sum of the rows of W, in halves so that threads share."""
    n, d = x_nd.shape
    if n > 2 or d % 2 or not supports_embedding_bag(table_do):
        return x_nd @ table_do
    index = arange_view(2, d // 2) if n == 1 else arange_view(2, d // 2).repeat(n, 1)
    return embedding_bag_matmul(table_do, index, x_nd.reshape(2 * n, -1)).view(n, 2, -1).sum(1)


def supports_embedding_bag(table) -> bool:
    """Whether the fast routine reads this table."""
    return table.device.type == "cpu" and table.dtype == torch.float32


def moe_small_batch(x_nd, expert_nk, weight_nk, up_xo, down_xd):
    """Σ_k w_k·W₂ swiglu(W₁x, W₃x): both products of all chosen experts, each in one call.

    up_xo: rows of all [W₁; W₃]ᵀ, (e·d, 2f); down_xd: rows of all W₂ᵀ, (e·f, d).
    """
    (n, k), d, f = expert_nk.shape, x_nd.shape[1], up_xo.shape[1] // 2
    start_nk1 = expert_nk[..., None]
    index, x = (start_nk1 * d + arange_view(d)).view(n * k, d), x_nd.repeat_interleave(k, 0)
    gate, up = embedding_bag_matmul(up_xo, index, x).chunk(2, -1)
    a_nkf = swiglu(gate, up).view(n, k, f) * weight_nk[..., None]
    return embedding_bag_matmul(
        down_xd, (start_nk1 * f + arange_view(f)).view(n, k * f), a_nkf.view(n, k * f)
    )


# %% [markdown]
# ## A long prompt in pieces
# Prefill wants many tokens at once, but not *all*: the scores of a prompt of $t$ tokens are $t^2$
# numbers a head. So a long prompt is read in pieces of 1,024. A piece attends to the cache, whose
# keys and values are expanded a block at a time, and here a softmax meets a block without knowing
# the next. It keeps what it has and mends it. For every query let $m$ be the largest score so far, $z$ the sum
# of exponentials and $o$ the sum of values that they weigh. A block with scores $x_y$ and values $v_y$ makes of them
#
# $$m' = \max(m, \max_y x_y),\qquad z' = z\,e^{m-m'} + \sum_y e^{x_y-m'},\qquad
# o' = o\,e^{m-m'} + \sum_y e^{x_y-m'} v_y$$
#
# starting from $m=-\infty$ and $z=o=0$; at the end $o/z$ is attention over all blocks, in the memory of one.


# %%
#| export decode
PREFILL_CHUNK, KV_BLOCK = (
    1024,
    512,
)  # tokens of a prompt read at once, and keys of the cache met at once


def blockwise_attention(q_bshx, blocks: Iterable, t: int, scale: float):
    """Causal attention of the last s of t positions, over (k_byhx, v_byhv) by blocks: o/z."""
    q_bhsx, seen, s = (scale * q_bshx).transpose(1, 2), 0, q_bshx.shape[1]
    at_s1 = torch.arange(t - s, t, device=q_bshx.device)[:, None]
    top = o = total = torch.tensor(-torch.inf, device=q_bshx.device)
    for k_byhx, v_byhv in blocks:
        x_bhsy = upcast(q_bhsx @ k_byhx.permute(0, 2, 3, 1))
        at_y = torch.arange(seen, seen + k_byhx.shape[1], device=q_bshx.device)
        if seen + len(at_y) > t - s + 1:
            x_bhsy = x_bhsy.masked_fill_(at_s1 < at_y, -torch.inf)
        new = torch.maximum(top, x_bhsy.amax(-1, keepdim=True))
        p_bhsy, shrink = x_bhsy.sub_(new).exp_(), (top - new).exp()
        part, sum_ = p_bhsy.to(v_byhv.dtype) @ v_byhv.transpose(1, 2), p_bhsy.sum(-1, keepdim=True)
        o, total = (o * shrink + part, total * shrink + sum_) if seen else (part, sum_)
        top, seen = new, seen + len(at_y)
    return (o / total).to(q_bshx.dtype).transpose(1, 2)


# %%
q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 17, 17))
want = attention(q, k, v, 0.3)  # whose queries are the last 5 of 17 as well
for y in (1, 4, 17):
    got = blockwise_attention(q, zip(k.split(y, 1), v.split(y, 1)), 17, 0.3)
    assert torch.allclose(got, want, atol=1e-6)
print("blocks of 1, 4 and 17 keys: the same attention")

# %% [markdown]
# ## A lean step
# Decoding gets a form of its own: the same weights and equations, laid out as such tables, without
# what only training needs. A dense FFN is one expert that is always chosen; so are the shared ones.


# %%
#| export decode
class DecodeWeights:
    """The weights of one block, transposed and joined for decoding."""

    def __init__(self, block: Block):
        attn, ffn = block.attn, block.ffn
        names = ("wq_a", "wq_b", "wkv_a", "wo") if hasattr(attn, "wq_a") else ("wq", "wkv_a", "wo")
        for name in names:
            setattr(self, name, getattr(attn, name).weight.T.contiguous())
        moe = isinstance(ffn, MoE)
        mlp, f = (ffn.shared_experts, ffn.experts.w1.shape[1]) if moe else (ffn, len(ffn.w1.weight))
        up = torch.stack((mlp.w1.weight.unflatten(0, (-1, f)), mlp.w3.weight.unflatten(0, (-1, f))))
        down = mlp.w2.weight.unflatten(1, (-1, f)).transpose(0, 1)
        if moe:
            up = torch.cat((torch.stack((ffn.experts.w1, ffn.experts.w3)), up), dim=1)
            down = torch.cat((ffn.experts.w2, down))
        self.up_xo = rearrange(up, "two e f d -> (e d) (two f)").contiguous()
        self.down_xd = rearrange(down, "e d f -> (e f) d").contiguous()
        always = range(len(down) - len(mlp.w1.weight) // f, len(down))
        self.always_1k = torch.tensor([list(always)], dtype=torch.int64)

    def product(self, name: str, x_bsd):
        """x times one of the attention's matrices."""
        return small_matmul(x_bsd.flatten(0, 1), getattr(self, name)).unflatten(0, x_bsd.shape[:2])


def normed(x_bsd, norm: RMSNorm):
    """RMSNorm of one row as x · (weight / ρ) with ρ a plain number; of several as ever."""
    if (
        x_bsd.numel() != x_bsd.shape[-1]
        or not supports_embedding_bag(x_bsd)
        or torch.compiler.is_compiling()
    ):
        return norm(x_bsd)
    x_d = x_bsd.flatten()
    scale = (torch.dot(x_d, x_d).item() / len(x_d) + norm.eps) ** -0.5
    return (x_bsd * norm.weight).mul_(scale)


class DecodeLayer:
    """A block as the decoder sees it: its tables, its cache."""

    def __init__(self, block: Block, tables: DecodeWeights | None, batch: int, max_len: int):
        self.block, self.config, self.tables = block, block.attn.config, tables
        weight = block.attn.wkv_b.weight
        self.kv_btx = LayerKVCache(self.config, batch, max_len, weight.device, weight.dtype).kv_btx
        w_hxc = weight.unflatten(0, (self.config.n_heads, -1))
        i = self.config.qk_nope_head_dim
        self.wk_hic, self.wv_hcv = w_hxc[:, :i], w_hxc[:, i:].mT

    def __call__(self, x_bsd, at: DecodePositions):
        x_bsd = x_bsd + self.attention(normed(x_bsd, self.block.attn_norm), at)
        return x_bsd + self.ffn(normed(x_bsd, self.block.ffn_norm))

    def ffn(self, x_bsd):
        """eq. 12–16, or the dense FFN: few tokens on tables, many as in training."""
        ffn, (b, s, _) = self.block.ffn, x_bsd.shape
        if self.tables is None or b * s > MAX_TABLE_TOKENS:
            return ffn(x_bsd)[0] if isinstance(ffn, MoE) else ffn(x_bsd)
        expert_nk = self.tables.always_1k.expand(b * s, -1)
        weight_nk = torch.ones_like(expert_nk, dtype=x_bsd.dtype)
        if isinstance(ffn, MoE):
            r = ffn.gate(x_bsd)
            expert_nk = torch.cat((r.topk_ids_bsk.flatten(0, 1), expert_nk), dim=1)
            weight_nk = torch.cat((r.topk_weights_bsk.flatten(0, 1), weight_nk), dim=1)
        tables = self.tables.up_xo, self.tables.down_xd
        return moe_small_batch(x_bsd.flatten(0, 1), expert_nk, weight_nk, *tables).view_as(x_bsd)

    def project(self, name: str, x_bsd):
        """x times a matrix of the attention."""
        by_table = self.tables is not None and x_bsd.shape[0] * x_bsd.shape[1] <= MAX_TABLE_TOKENS
        return (
            self.tables.product(name, x_bsd) if by_table else getattr(self.block.attn, name)(x_bsd)
        )

    def project_q(self, x_bsd, at: DecodePositions):
        """eq. 6–8: content part (b, s, h, i) and turned part (b, s, h, r)."""
        c, attn = self.config, self.block.attn
        if c.q_lora_rank:
            q = self.project("wq_b", normed(self.project("wq_a", x_bsd), attn.q_norm))
        else:
            q = self.project("wq", x_bsd)
        sizes = [c.qk_nope_head_dim, c.qk_rope_head_dim]
        q_bshi, q_bshr = q.unflatten(-1, (c.n_heads, -1)).split(sizes, dim=-1)
        return q_bshi, apply_freqs_cis(q_bshr, at.freqs_cis)

    def update_kv_cache(self, x_bsd, at: DecodePositions):
        """eq. 1 and 3 into the cache; returns all that is there, latents and turned keys."""
        c, attn = self.config.kv_lora_rank, self.block.attn
        kv_bsx = self.project("wkv_a", x_bsd)
        k_bsr = apply_freqs_cis(kv_bsx[:, :, None, c:], at.freqs_cis)[:, :, 0]
        kv_bsx = torch.cat((normed(kv_bsx[..., :c], attn.kv_norm), k_bsr), dim=-1)
        self.kv_btx[at.cache_index] = kv_bsx.to(self.kv_btx.dtype)
        return self.kv_btx[:, : at.end]

    def attention(self, x_bsd, at: DecodePositions):
        """eq. 1–11: inside the latent, but for a prompt on expanded keys and values."""
        (q_bshi, q_bshr), kv_btx = self.project_q(x_bsd, at), self.update_kv_cache(x_bsd, at)
        c, scale, weight = (
            self.config.kv_lora_rank,
            softmax_scale(self.config),
            self.block.attn.wkv_b.weight,
        )
        if at.is_first_prefill:
            o_bshv = attend_expanded(
                q_bshi, q_bshr, kv_btx[..., :c], kv_btx[..., c:], weight, scale
            )
            return self.project("wo", o_bshv.flatten(2))
        b, s, h, i = q_bshi.shape
        if s > MAX_TABLE_TOKENS and isinstance(at.cache_index[1], slice):  # a piece of a prompt
            parts = (kv.tensor_split([c], dim=-1) for kv in kv_btx.split(KV_BLOCK, dim=1))
            blocks = (up_project_kv(*part, weight, h, i) for part in parts)
            o_bshv = blockwise_attention(concat_nope_rope(q_bshi, q_bshr), blocks, at.end, scale)
            return self.project("wo", o_bshv.flatten(2))
        q_bshc = (q_bshi.flatten(0, 1).transpose(0, 1) @ self.wk_hic).transpose(0, 1)
        q_bsx = torch.cat((q_bshc.unflatten(0, (b, s)), q_bshr), dim=-1).flatten(1, 2)
        score_bst = (q_bsx @ kv_btx.mT).mul_(scale)  # s runs over positions and heads
        if at.masked is not None:
            score_bst.view(b, s, h, -1).masked_fill_(at.masked, -torch.inf)
        o_bsc = score_bst.softmax(-1) @ kv_btx[..., :c]
        o_hnv = o_bsc.view(b * s, h, c).transpose(0, 1) @ self.wv_hcv
        return self.project("wo", o_hnv.transpose(0, 1).reshape(b, s, -1))


# %%
#| export decode
class MTPDecodeLayer(DecodeLayer):
    """An MTP module likewise: h^k from the pair (embedding of the token k later, h^{k−1})."""

    def __init__(self, mtp: MTP, *args):
        super().__init__(mtp.block, *args)
        self.mtp = mtp

    def __call__(self, pair, at: DecodePositions):
        embed_bsd, h_bsd = pair
        mtp = self.mtp
        both = torch.cat((normed(embed_bsd, mtp.enorm), normed(h_bsd, mtp.hnorm)), dim=-1)
        return mtp.norm(super().__call__(mtp.eh_proj(both), at))


# %% [markdown]
# Such a step is some 80 small operations a layer, each of which costs a microsecond or two before it
# has computed anything. A *compiler* can fuse them: `torch.compile` turns the steps of a few layers
# into one C++ program, which takes about half the time, once the compiler has run for some 20
# seconds. So it is a choice: worth it for many tokens, never for a few. A compiled program is for
# one shape, so it attends to all places of the cache, the empty ones masked, and their number is
# rounded up.


# %%
#| export decode
LAYERS_PER_GRAPH, LENGTH_MULTIPLE = (
    4,
    128,
)  # layers compiled as one; a compiled step is for a multiple of so many places


def run_layers(layers: list[DecodeLayer], x_bsd, at: DecodePositions):
    """x through several layers."""
    for layer in layers:
        x_bsd = layer(x_bsd, at)
    return x_bsd


def run_layers_ragged(layers: list[DecodeLayer], x_bsd, position_bs, freqs_cis_tx):
    """`run_layers`, the same program for all positions: every place of the cache is attended to."""
    return run_layers(layers, x_bsd, ragged_positions(position_bs, freqs_cis_tx, len(freqs_cis_tx)))


@cache
def compiled():
    """`run_layers_ragged` as one fused program; compiled when first called, for each new shape."""
    torch._dynamo.config.recompile_limit = 64  # kinds of groups × shapes
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    return torch.compile(run_layers_ragged, options={"cpp_wrapper": True})


# %% [markdown]
# The tables are a second copy of the weights, worth it on a CPU where the model is small; elsewhere
# the decoder does without. They are laid out once and again when a weight has changed. The decoder
# then holds one layer for every block, MTP modules included, and keeps two records: which token
# stands where, and the hidden state of every position, from which the MTP modules draft.


# %%
#| export decode
DECODE_WEIGHTS: WeakKeyDictionary = WeakKeyDictionary()  # model → (state of its weights, tables)


@torch.no_grad()
def decode_weights(model: Transformer) -> tuple[list[DecodeWeights | None], torch.Tensor]:
    """Tables of every block, MTP modules last, and the head's."""
    weights = list(model.parameters())
    blocks = [*model.layers.values(), *(m.block for m in model.mtp.values())]
    if not all(supports_embedding_bag(w) for w in weights):
        return [None] * len(blocks), model.head.weight.T
    state = [(w.data_ptr(), w._version) for w in weights]
    if DECODE_WEIGHTS.get(model, (None,))[0] != state:
        head_dw = model.head.weight.T.contiguous()
        DECODE_WEIGHTS[model] = state, [DecodeWeights(block) for block in blocks], head_dw
    return DECODE_WEIGHTS[model][1:]


# %%
#| export decode
class Decoder:
    """A model ready to write: layers with caches, the tokens of every row, their hidden states."""

    prefill_chunk: int = PREFILL_CHUNK

    def __init__(self, model: Transformer, batch: int, max_len: int, compiled: bool = False):
        self.model, self.n_main, w = model, model.config.n_layers, model.embed.weight
        self.compiled, max_len = (
            compiled,
            -(-max_len // LENGTH_MULTIPLE) * LENGTH_MULTIPLE if compiled else max_len,
        )
        tables, self.head_dw = decode_weights(model)
        modules = [*model.layers.values(), *model.mtp.values()]
        self.layers = [
            (DecodeLayer if isinstance(x, Block) else MTPDecodeLayer)(x, t, batch, max_len)
            for x, t in zip(modules, tables)
        ]
        self.freqs_cis_tx = torch.complex(
            *rope_cos_sin(model.config, torch.arange(max_len, device=w.device))
        )
        self.token_bt = torch.zeros(batch, max_len, dtype=torch.int64, device=w.device)
        self.h_btd = torch.zeros(batch, max_len, w.shape[1], device=w.device, dtype=w.dtype)

    def hidden_states(self, at: list[int], s: int):
        """h⁰ of the next s tokens of every row, (b, s, d), normed."""
        here = cache_index(at, s, self.token_bt.device)
        x_bsd = F.embedding(self.token_bt[here], self.model.embed.weight)
        h_bsd = self.model.norm(self.run(self.layers[: self.n_main], x_bsd, at, s))
        self.h_btd[here] = h_bsd
        return h_bsd

    def run(self, layers: list[DecodeLayer], x, at: list[int], s: int):
        """x of the next s tokens through layers: many in pieces, a few perhaps compiled."""
        if s > self.prefill_chunk:
            parts = [
                v.split(self.prefill_chunk, dim=1) for v in (x if isinstance(x, tuple) else (x,))
            ]
            starts = range(0, s, self.prefill_chunk)
            pieces = (p if isinstance(x, tuple) else p[0] for p in zip(*parts))
            each = [self.run(layers, p, [n + i for n in at], min(self.prefill_chunk, s - i))
                    for i, p in zip(starts, pieces)]  # fmt: skip
            return torch.cat(each, dim=1)
        if not self.compiled or len(at) * s > MAX_TABLE_TOKENS or max(at) == 0:
            return run_layers(layers, x, positions_for(at, s, self.freqs_cis_tx))
        start_b1 = torch.tensor(at, device=self.freqs_cis_tx.device)[:, None]
        position_bs = start_b1 + torch.arange(s, device=start_b1.device)
        for first in range(0, len(layers), LAYERS_PER_GRAPH):
            x = compiled()(
                layers[first : first + LAYERS_PER_GRAPH], x, position_bs, self.freqs_cis_tx
            )
        return x

    def logits(self, h):
        """Scores of every word, (…, w)."""
        return small_matmul(h.flatten(0, -2), self.head_dw).unflatten(0, h.shape[:-1])

    def mtp_forward(self, k: int, h_bsd, at: list[int]):
        """eq. 21–22: h^k from h^{k−1} of the positions behind `at` and the tokens k later."""
        s = h_bsd.shape[1]
        token_bs = self.token_bt[cache_index([n + k for n in at], s, h_bsd.device)]
        embed_bsd = F.embedding(token_bs, self.model.embed.weight)
        return self.run([self.layers[self.n_main + k - 1]], (embed_bsd, h_bsd), at, s)


# %% [markdown]
# Three checks: on rows of unequal length, and fed in uneven pieces, the decoder must give the hidden
# states of a plain forward pass; so must a prompt that is read in pieces; and its MTP chain must be
# that of chapter 06.

# %%
small = replace(TINY, vocab_size=256, n_layers=3, n_mtp_layers=2, init_std=0.06, embed_std=1.0)
model = Transformer(small)
with torch.inference_mode():
    tokens_bs = torch.randint(256, (2, 12))
    want_bsd = model.hidden_states(tokens_bs)[0]
    decoder = Decoder(model, 2, 16)
    decoder.token_bt[:, :12] = tokens_bs
    decoder.hidden_states([0, 0], 7)  # the second row's last three will be rolled back
    for step in range(5):
        got_bsd = decoder.hidden_states([7 + step, 4 + step], 1)
        assert torch.allclose(got_bsd[0, 0], want_bsd[0, 7 + step], atol=1e-4)
        assert torch.allclose(got_bsd[1, 0], want_bsd[1, 4 + step], atol=1e-4)
    decoder = Decoder(model, 2, 64)
    decoder.token_bt[:, :60] = torch.randint(256, (2, 60))
    decoder.prefill_chunk = 25  # two pieces and a short one
    pieces_bsd = decoder.hidden_states([0, 0], 60)
    assert torch.allclose(pieces_bsd, model.hidden_states(decoder.token_bt[:, :60])[0], atol=1e-4)
    decoder.token_bt[:, :12] = tokens_bs
    h_bsd = want_bsd
    for k, (chain_bsd, _) in enumerate(mtp_hidden_states(model, want_bsd, tokens_bs), start=1):
        h_bsd = decoder.mtp_forward(k, h_bsd[:, : 12 - k], [0, 0])
        assert torch.allclose(h_bsd, chain_bsd, atol=1e-4)
print("rows of 12 and 9 tokens, one rolled back: as in a plain forward pass")

# %% [markdown]
# ## Drafts that never change the text
# A round of *speculative decoding*: the MTP modules guess the next $D$ tokens; the main model reads
# them all in **one** forward pass, which on a busy server costs little more than one token, because
# the weights are read once either way; then the guesses are judged from left to right. A token $x$, drafted with
# probability $q(x)$ where the main model says $p(x)$, is accepted with probability
#
# $$\min\left(1, \frac{p(x)}{q(x)}\right),\qquad\text{else replaced by a draw from}\quad
# \frac{\max(p-q,\,0)}{\sum_w \max(p_w-q_w,\,0)}$$
#
# and all guesses behind the first rejected one are thrown away. A word comes out either because it
# was drafted and accepted, which happens with probability $\min(q, p)$, or because a rejection chose
# it, which adds $\max(p-q, 0)$, for a round rejects with probability $\sum_w\max(p_w-q_w,0)$, and the denominator
# cancels. The sum is $p$. So the text has exactly the distribution of plain
# decoding, however bad the guesses are. At $T=0$ both are one-hot and the rule reads: accept what
# the main model would have said.


# %%
#| export decode
def verify_draft(p_bsw, q_bkw, guess_bk, generator: torch.Generator | None = None):
    """Tokens accepted in each row (b,), and the next one (b,), distributed as the main model's.

    p_bsw: main model at the s = D + 1 positions; q_bkw: what the D guesses were drawn from.
    """
    p_bk, q_bk = (x.gather(-1, guess_bk[..., None])[..., 0] for x in (p_bsw[:, :-1], q_bkw))
    chance_bk = torch.rand(p_bk.shape, generator=generator, device=p_bk.device)
    n_b = (chance_bk * q_bk < p_bk).long().cumprod(1).sum(1)
    rest_bsw = (p_bsw - F.pad(q_bkw, (0, 0, 0, 1))).clamp(min=0)  # after D guesses: p itself
    row_b = torch.arange(len(n_b), device=n_b.device)
    rest_bw = rest_bsw[row_b, n_b]
    nothing = rest_bw.sum(-1, keepdim=True) == 0  # p = q up to rounding
    return n_b, multinomial_sample(torch.where(nothing, p_bsw[row_b, n_b], rest_bw), generator)


# %%
p_w, q_w = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
g = torch.Generator().manual_seed(0)
guess_b = multinomial_sample(q_w.expand(draws, -1), g)
taken_b, next_b = verify_draft(
    p_w.expand(draws, 2, 4), q_w.expand(draws, 1, 4), guess_b[:, None], g
)
first_b = torch.where(taken_b == 1, guess_b, next_b)
share_w = first_b.bincount(minlength=4) / draws
print(f"accepted {taken_b.float().mean():.3f}, Σ min(p, q) = {torch.minimum(p_w, q_w).sum():.3f}")
print("drawn", [f"{x:.3f}" for x in share_w.tolist()], "wanted", p_w.tolist())
assert (share_w - p_w).abs().max() < 0.015

# %% [markdown]
# ## One loop for all
# Without drafts, a round is a plain decoding step, so there is one loop. Row $b$ holds $n_b$ tokens
# that the main model has read, and one more, chosen but not yet read. Draft $k$ comes from module
# $k$ at the last read position. An MTP module has a cache too, so it must have passed over every
# position: each round it catches up on the ones accepted since the round before. Module $k$ read its
# last $k-1$ positions with guesses in the place of tokens; so all modules go back by $D-1$ and read
# again.


# %%
#| export decode
class SpeculativeDecoder:
    """Continue rows of tokens, with `depth` drafts a round (0: plain decoding)."""

    def __init__(
        self,
        model: Transformer,
        prompts: list[list[int]],
        max_new_tokens: int,
        num_speculative_tokens=0,
        compiled=False,
    ):
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("the prompt is empty: give at least the begin-of-sentence token")
        if not 0 <= num_speculative_tokens <= len(model.mtp):
            raise ValueError(f"draft must be 0 to {len(model.mtp)}, the model's MTP modules")
        self.num_speculative_tokens, self.lengths = (
            num_speculative_tokens,
            [len(p) for p in prompts],
        )
        room = max(self.lengths) + max_new_tokens + 2 * num_speculative_tokens + 1
        self.decoder = Decoder(model, len(prompts), room, compiled)
        for row_t, prompt in zip(self.decoder.token_bt, prompts):
            row_t[: len(prompt)] = torch.tensor(prompt)
        self.mtp_lengths = [0] * len(prompts)  # where the MTP modules go on reading
        self.logit_bw = self.prefill()

    def prefill(self):
        """Read the prompts; logits behind the last token of each, (b, w)."""
        h_bsd = self.decoder.hidden_states([0] * len(self.lengths), max(self.lengths))
        return self.decoder.logits(h_bsd[range(len(self.lengths)), [n - 1 for n in self.lengths]])

    def first_token(self, choose) -> list[list[int]]:
        """The token behind each prompt."""
        token_b = choose.sample(self.logit_bw)
        self.write_token(token_b, 0)
        return token_b[:, None].tolist()

    def write_token(self, token_b, k: int):
        """Write a token k places behind the last one read of every row."""
        token_bt = self.decoder.token_bt
        token_bt[cache_index([n + k for n in self.lengths], 1, token_bt.device)] = token_b[:, None]

    def propose(self, choose):
        """D guesses a row, (b, D), and what each was drawn from, D × (b, w)."""
        d = self.decoder
        s = max(n - at for n, at in zip(self.lengths, self.mtp_lengths))
        h_bsd, out = d.h_btd[cache_index(self.mtp_lengths, s, d.h_btd.device)], []
        for k in range(1, self.num_speculative_tokens + 1):
            h_bsd = d.mtp_forward(k, h_bsd, self.mtp_lengths)
            last = cache_index(
                [n - 1 - at for n, at in zip(self.lengths, self.mtp_lengths)], 1, h_bsd.device
            )
            out.append(choose.draft(d.logits(h_bsd[last][:, 0])))
            self.write_token(out[-1][0], k)
        self.mtp_lengths = [max(0, n + 1 - self.num_speculative_tokens) for n in self.lengths]
        guess, q = zip(*out)
        return torch.stack(guess, 1), q

    def step(self, choose, live: list[bool]) -> list[list[int]]:
        """New tokens of every row, 1 to D + 1 of them; rows that are not live stand still."""
        d, guess_bk = self.decoder, None
        if self.num_speculative_tokens:
            guess_bk, q = self.propose(choose)
        logit_bsw = d.logits(d.hidden_states(self.lengths, self.num_speculative_tokens + 1))
        if guess_bk is None:
            n_b, token_b = [0] * len(self.lengths), choose.sample(logit_bsw[:, 0])
            new = token_b[:, None].tolist()
        else:
            n_b, token_b = choose.verify(logit_bsw, q, guess_bk)
            n_b = n_b.tolist()
            new = [[*g[:n], t] for g, n, t in zip(guess_bk.tolist(), n_b, token_b.tolist())]
        self.lengths = [n + (1 + more) * on for n, more, on in zip(self.lengths, n_b, live)]
        self.write_token(token_b, 0)
        return [tokens if on else [] for tokens, on in zip(new, live)]


# %%
#| export decode
class SamplingParams(NamedTuple):
    """How tokens are chosen: temperature, nucleus, and the random numbers."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def sample(self, logit_bw):
        """The next token of each row."""
        return sample(logit_bw, self.temperature, self.generator, self.top_p)

    def draft(self, logit_bw):
        """A guess for each row, and the distribution it was drawn from."""
        if self.temperature == 0:
            return logit_bw.argmax(-1), None
        q_bw = logits_to_probs(logit_bw, self.temperature, self.top_p)
        return multinomial_sample(q_bw, self.generator), q_bw

    def verify(self, logit_bsw, q: Sequence, guess_bk):
        """`verify_draft` by the main model's logits; at temperature 0 what it would have said itself."""
        if self.temperature == 0:
            said_bs = logit_bsw.argmax(-1)
            n_b = (said_bs[:, :-1] == guess_bk).long().cumprod(1).sum(1)
            return n_b, said_bs.gather(1, n_b[:, None])[:, 0]
        p_bsw = logits_to_probs(logit_bsw, self.temperature, self.top_p)
        return verify_draft(p_bsw, torch.stack(q, 1), guess_bk, self.generator)


@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling_params: SamplingParams = SamplingParams(),  # noqa: B008  a constant
    stop: Iterable[int] = (),
    num_speculative_tokens: int = 0,
    compiled: bool = False,
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of every row, round by round; a row ends with its first stop token.

    Rows may differ in length; `draft` ≤ D lets that many MTP modules guess ahead; `compiled`
    fuses each layer's step, after a pause at the first. A caller may send a list of booleans
    back: rows that are False end there.
    """
    if max_new_tokens < 1:
        return
    writer, stop = (
        SpeculativeDecoder(model, prompts, max_new_tokens, num_speculative_tokens, compiled),
        set(stop),
    )
    room, new = [max_new_tokens] * len(prompts), writer.first_token(sampling_params)
    while True:
        for row, tokens in enumerate(new):
            del tokens[room[row] :]
            ends = [i for i, t in enumerate(tokens) if t in stop]
            del tokens[ends[0] + 1 if ends else len(tokens) :]
            room[row] = 0 if ends else room[row] - len(tokens)
        wanted = yield new
        room = room if wanted is None else [n * bool(on) for n, on in zip(room, wanted)]
        if not any(room):
            return
        new = writer.step(sampling_params, [n > 0 for n in room])


def generate(
    model: Transformer,
    tokens_bs,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    top_p: float = 1.0,
    num_speculative_tokens: int = 0,
    compiled: bool = False,
):
    """Continue prompts of equal length: (b, s) → (b, s + max_new_tokens)."""
    texts, choice = tokens_bs.tolist(), SamplingParams(temperature, top_p, generator)
    for new in stream(
        model,
        texts,
        max_new_tokens,
        choice,
        num_speculative_tokens=num_speculative_tokens,
        compiled=compiled,
    ):
        for text, tokens in zip(texts, new):
            text += tokens
    return torch.tensor(texts, dtype=torch.int64, device=tokens_bs.device)


# %% [markdown]
# The check is the definition: greedy decoding must choose, at every step, the argmax of a full
# forward pass without any cache, whatever the lengths of the rows and with any number of drafts.

# %%
prompts = [torch.randint(0, 256, (n,)).tolist() for n in (9, 4, 13)]
for depth in (0, 1, 2):
    texts = [list(p) for p in prompts]
    for new in stream(model, prompts, 12, num_speculative_tokens=depth):
        for row, tokens in zip(texts, new):
            row += tokens
    with torch.no_grad():
        for row, prompt in zip(texts, prompts):
            said = model(torch.tensor([row[:-1]]))[0].argmax(-1).tolist()
            assert len(row) == len(prompt) + 12 and said[len(prompt) - 1 :] == row[len(prompt) :]
print("greedy, three lengths, 0 to 2 drafts: the argmax of a full forward pass")

# %% [markdown]
# ## Experiment: how far ahead can it guess?
# Random weights guess at random, so we teach this model something: the source of Python's own
# `argparse`, byte by byte, with the MTP loss of chapter 06. (It ends *lower* for the modules than for the main
# model: in training each is shown all the true tokens before the one that it guesses, and adds a layer,
# which is much beside three.) Then it writes, and we count how many
# rounds accept at least $k$ of two drafts. If a verified token is accepted with probability $p$ and a
# round costs $c_{verify} + c_{draft}$ plain steps, one draft speeds writing up by
#
# $$\frac{1 + p}{c_{verify} + c_{draft}}$$

# %%
STEPS = 12 if os.environ.get("DSV3_SHORT") else 140
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
optimizer, at = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95)), 0
for step in range(STEPS):
    start = torch.randint(len(text) - 8000, (8,))
    rows_bs = torch.stack([text[a : a + 129] for a in start])
    parts = compute_losses(model, rows_bs)
    parts.total(0.3, 1e-4).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {parts.main:.2f}, MTP {', '.join(f'{x:.2f}' for x in parts.mtp)} nats a byte")
context = [text[-n : -n + 60].tolist() for n in (7000, 5000, 3000, 1000)]


# %%
def rounds(depth: int, temperature: float, new: int = 100) -> tuple[list[float], float]:
    """Share of rounds that accepted at least 1, 2, … drafts; and tokens a second, by fast rounds."""
    counts, seconds, choice = (
        [],
        [],
        SamplingParams(temperature, 1.0, torch.Generator().manual_seed(0)),
    )
    for prompt in context:
        steps, clock = [], [time.perf_counter()]
        for step in stream(model, [prompt], new, choice, num_speculative_tokens=depth):
            steps.append(step)
            clock.append(time.perf_counter())
        counts += [len(s[0]) - 1 for s in steps[1:-1]]  # the first has no drafts, the last is cut
        seconds += [b - a for a, b in pairwise(clock[1:-1])]
    fast = sorted(seconds)[len(seconds) // 10]  # others use these cores too
    speed = (1 + sum(counts) / len(counts)) / fast
    return [sum(n >= k for n in counts) / len(counts) for k in range(1, depth + 1)], speed


heats = [0.0, 0.5, 1.0]
table = {t: {d: rounds(d, t) for d in (0, 1, 2)} for t in heats}
fig, (left, right) = figure(1, 2, width=9, height=3.0)
for depth, color, style in ((1, BLUE, "-"), (2, ORANGE, "--")):
    left.plot(heats, [table[t][2][0][depth - 1] for t in heats], style, marker="o", color=color,
              label=f"at least {depth} of 2 drafts")  # fmt: skip
    gain = [table[t][depth][1] / table[t][0][1] for t in heats]
    right.plot(
        heats,
        gain,
        style,
        marker="o",
        color=color,
        label=("one draft", "two drafts")[depth - 1] + " a round",
    )
left.set(ylim=(0, 1), xlabel="temperature", ylabel="share of rounds", title="Accepted")
right.axhline(1, color=GRAY, lw=1)
right.set(
    xlabel="temperature", ylabel="speed against plain decoding", title="Three layers gain little"
)
for ax in (left, right):
    ax.legend()
show(fig)
for t in heats:
    print(f"T = {t}: accepted {table[t][2][0][0]:.2f}, then {table[t][2][0][1]:.2f}; "
          f"{table[t][0][1]:.0f} tokens/s plain, {table[t][1][1]:.0f} with one draft, "
          f"{table[t][2][1]:.0f} with two")  # fmt: skip
said = b"".join(bytes(s[0]) for s in stream(model, [context[0]], 90, num_speculative_tokens=1))
print(bytes(context[0]).decode()[-30:], "→", said.decode(errors="replace"))
assert STEPS < 100 or table[0.0][1][0][0] > 0.4

# %% [markdown]
# Which guesses are right? A round at a time: green are drafts that the main model accepted, and below the text stands, struck out, what an
# MTP module guessed where it was wrong. (A model this small soon repeats itself, which is easy to guess.)

# %%
from dsv3_ref.viz.decoding import draw_trace


class Traced(SpeculativeDecoder):
    """A writer that remembers what was guessed."""

    def propose(self, choose):
        found = super().propose(choose)
        self.guessed = found[0][0].tolist()
        return found


@torch.inference_mode()
def trace(drafts: int = 2, temperature: float = 0.0, place: int = 0):
    choice = SamplingParams(temperature, 1.0, torch.Generator().manual_seed(0))
    writer, texts = Traced(model, [context[place]], 160, drafts), lambda ids: list(map(chr, ids))
    rounds = [(texts(writer.first_token(choice)[0]), 0, None)]
    while sum(len(r[0]) for r in rounds) < 150:
        (new,) = writer.step(choice, [True])
        wrong = texts(writer.guessed[len(new) - 1 : len(new)])
        rounds.append((texts(new), len(new) - 1, wrong[0] if wrong else None))
    per_round = sum(len(r[0]) for r in rounds[1:]) / (len(rounds) - 1)
    show(draw_trace(rounds, 50, f"{per_round:.2f} tokens a round"))


trace()

# %%
play(trace, drafts=(1, 2, 1), temperature=(0.0, 1.5, 0.25), place=(0, 3, 1))

# %% [markdown]
# A guess is right more often the surer the model is, and the second guess needs the first. Whether
# that pays depends on the price: here one MTP block is as large as a third of the main model, so a draft
# costs about what it saves, and more when it is often wrong. In V3 it is one block beside 61.
#
# ### Deeper models
# `dsv3 bench --parts speculation` teaches models of 2 to 16 layers for 100 steps each and lets them
# write, plain and with one draft, uncompiled and compiled. The dashed lines are the formula above
# with the acceptance and the two costs of each model, measured one by one.

# %%
found = json.loads((RESULTS_DIR / "bench.json").read_text())
fig, ways = figure(1, 2, width=9, height=3.0, sharey=True)
for ax, way in zip(ways, ("eager", "compiled")):
    names = [name for name in found["speculation"] if "dense" not in name]
    runs = [found["speculation"][name][way] for name in names]
    depths = [int(name.split()[0]) for name in names]
    ax.semilogx(depths, [r["speedup"] for r in runs], "o-", base=2, color=BLUE, label="measured")
    ax.semilogx(
        depths, [r["predicted"] for r in runs], "o--", base=2, color=ORANGE, label="formula"
    )
    dense = found["speculation"]["16 layers, dense"][way]
    ax.plot(16, dense["speedup"], "s", color=BLUE, mfc="none", label="16 dense layers")
    ax.plot(16, dense["predicted"], "s", color=ORANGE, mfc="none")
    ax.axhline(1, color=GRAY, lw=1)
    ax.set(title=f"One draft a round, {way}", xlabel="layers of the main model")
    ax.set_xticks(depths, depths)
ways[0].set_ylabel("speed against plain")
ways[1].legend()
show(fig)
for name, run in found["speculation"].items():
    print(name, "; ".join(f"{way}: p {r['acceptance']:.2f}, verify {r['verify']:.2f}, "
          f"draft {r['draft']:.2f}" for way, r in run.items()))  # fmt: skip

# %% [markdown]
# The draft gets cheaper with depth, 0.87 of a plain step at 2 layers and 0.12 at 16, but *reading two
# tokens* does not: it costs 1.3 to 1.4 steps, uncompiled ("eager"). We expected to blame the experts, for
# a second token chooses others, whose weights must be read too; but the *dense* model of 16 layers, which
# has none to choose, pays 1.38 as well. Our weighted sums of rows go through a table once for every
# token, so here two tokens cost more with experts or without. Only compiled does the dense model pay less, 1.21
# against 1.27. A server with hundreds of rows reads every expert anyway. (The acceptances, 0.67 to 0.98, differ so because these
# models hardly know English and repeat themselves.) Uncompiled, speed is within 5 % of the formula.
# Compiled, the two smallest models fall short of it by almost a quarter: their plain step has become so
# fast that the few operations around a draft, which are not compiled, count.

# %% [markdown]
# ## Play: temperature
# What the model thinks of the byte after `self._ac`, with more or less heat.

# %%
with torch.no_grad():
    logit_w = model(torch.tensor([list(b"        self._ac")]))[0, -1]


def draw_temperature(temperature: float = 1.0):
    top = logit_w.topk(8).indices
    fig, ax = figure(width=6.5, height=2.6)
    p = (logit_w / temperature).softmax(-1)[top].tolist()
    ax.bar([repr(chr(i)) for i in top.tolist()], p, color=BLUE)
    ax.set(ylim=(0, 1), ylabel="probability", xlabel="the eight likeliest bytes")
    ax.set_title(f"Temperature {temperature:.1f}: the order stays, the gaps change")
    show(fig)


draw_temperature(2.0)

# %%
play(draw_temperature, temperature=(0.2, 5.0, 0.2))

# %% [markdown]
# ## Exercises
# Fill in the function, run the cell, and let the check tell.


# %%
@checker
def check_cache(fn):
    """What does a token leave behind in each layer (chapter 03), and how wide is a bf16 number?"""
    for c in (V3, TINY, replace(V3, n_layers=27, kv_lora_rank=256)):
        for batch, length in ((32, 4096), (1, 100)):
            assert fn(c, batch, length) == count_params(c).cache_bytes * length * batch


@checker
def check_gain(fn):
    """How likely is it that draft k is reached and accepted? And what does a round yield at p = 0?"""
    wants = [((0.85, 1, 0.0), 1.85), ((0.0, 3, 0.1), 1 / 1.3), ((0.5, 2, 0.25), 1.75 / 1.5)]
    assert all(abs(fn(*args) - want) < 1e-6 for args, want in wants)


@checker
def check_entropy(fn):
    """Of which distribution is a token drawn? At T = 0 nothing is left to chance."""
    assert abs(float(fn(logit_bw[0], 0.0))) < 1e-4
    for t in (0.5, 1.0, 4.0):
        want = torch.distributions.Categorical(logits=logit_bw[0] / t).entropy()
        assert abs(float(fn(logit_bw[0], t)) - want) < 1e-4


# %% [markdown]
# **1 · Compute.** How many bytes does the bf16 latent cache of a batch take at full size?


# %%
def my_cache(c, batch: int, length: int) -> int:
    return ...


check_cache(my_cache)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_cache(c, batch, length):
#     return batch * length * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 2
# ```
#
# 9.2 GB for V3 and 32 sequences of 4,096 tokens.
# </details>

# %% [markdown]
# **2 · Extend.** If every draft is accepted with the same probability $p$ once those before it were,
# a forward pass over $D+1$ tokens costs as much as over one, and a draft costs $c$ of it: what is the
# speed-up with $D$ drafts?


# %%
def my_gain(p: float, depth: int, c: float) -> float:
    return ...


check_gain(my_gain)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_gain(p, depth, c):
#     return sum(p**k for k in range(depth + 1)) / (1 + depth * c)
# ```
#
# At $p=0.85$ and a free draft, one draft gives 1.85, V3's 1.8; a second adds only $p^2=0.72$.
# </details>

# %% [markdown]
# **3 · Predict.** How uncertain is a draw at temperature $T$? Return the entropy of the draw in
# nats, for $T=0$ too. What does it tend to when $T \to \infty$?


# %%
def my_entropy(logit_w, temperature: float) -> float:
    return ...


check_entropy(my_entropy)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_entropy(logit_w, temperature):
#     if temperature == 0:
#         return 0.0
#     logp = (logit_w / temperature).log_softmax(-1)
#     return -(logp.exp() * logp).sum().item()
# ```
#
# It tends to $\ln w$, the entropy of a fair die with $w$ sides.
# </details>

# %% [markdown]
# ## Scale-up
# At 671B a decoding step reads every active weight once, however many sequences share the step, and
# each sequence's own cache. The bytes below, a weight one (FP8), over the 3.35 TB/s of an H100, bound the speed,
# as if one such memory held everything.

# %%
expert = 3 * V3.dim * V3.moe_inter_dim  # bytes of one expert in FP8
experts = (V3.n_layers - V3.n_dense_layers) * V3.n_routed_experts * expert
for batch in (1, 32):
    asleep = (1 - V3.n_activated_experts / V3.n_routed_experts) ** batch  # if routing were random
    weights = count_params(V3).total - V3.vocab_size * V3.dim - experts * asleep
    for length in (1_000, 100_000):
        cache = batch * length * count_params(V3).cache_bytes
        ms = (weights + cache) / 3.35e12 * 1e3
        print(f"batch {batch:2}, context {length:7,}: weights {weights / 1e9:3.0f} GB "
              f"({1 - asleep:4.0%} of the experts), cache {cache / 1e9:5.1f} GB: {ms:3.0f} ms a step")  # fmt: skip

# %% [markdown]
# Alone, a user waits for weights: 37 GB for one token. Thirty-two users together wake two thirds of
# the experts: twelve times the bytes for thirty-two times the words. Larger batches are cheaper
# still, which is why the report decodes on 320 GPUs with one expert each (section 3.4.2). The
# module of this chapter is `dsv3_ref.decode`; one called `generate` would hide the function of that
# name.
