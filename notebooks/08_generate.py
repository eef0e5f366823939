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
# text again for each word: 1,000 words after a prompt of 1,000 cost **1.5 million** token passes.
# With the latent cache of chapter 03 they cost 1,999, because a token's key and value never change
# once it is written. The figure shows the two bills.

# %%
#| export decode
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv3_ref import ops
from dsv3_ref.block import MTP, Block
from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.mla import MLA, LayerKVCache, attend_expanded
from dsv3_ref.model import Transformer
from dsv3_ref.ops import RMSNorm, op
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
from dsv3_ref.ops import use
from dsv3_ref.pretrain import compute_losses
from dsv3_ref.viz import BLUE, GRAY, ORANGE, checker, figure, play, show
from dsv3_ref.viz.ablation import RESULTS_DIR

torch.manual_seed(0)


def passes(prompt: int, new: int, cached: bool) -> int:
    """Return how many tokens pass through the model until `new` tokens are chosen."""
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
# matrix products of full size, limited by arithmetic. *Decoding* adds one token per step: little
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
# `top_p`, and scales them up until they sum to 1. *Top-k* keeps a fixed number of words, and *min-p*
# those with at least a share `min_p` of the likeliest word's probability. We keep the distribution
# itself at hand, not only a draw from it: drafting will need it.
#
# *Penalties* lower the logits of words that have occurred $c_w$ times in the output, before all of this:
#
# $$\ell'_w = \ell_w \, r^{-\operatorname{sign} \ell_w} - f\, c_w - p\, [c_w > 0]$$
#
# with the *frequency* penalty $f$, the *presence* penalty $p$, and the *repetition* penalty $r$, which
# also applies to the words of the prompt.


# Two kinds of input have no such distribution. A temperature below $10^{-5}$ would make $\ell/T$
# overflow, so it counts as 0. Logits that are not finite come from damaged weights or an overflow,
# and every choice from them would be arbitrary: they raise `InvalidLogits`.


# %%
#| export decode
GREEDY_BELOW = 1e-5  # a lower temperature counts as 0: logit / T could overflow


class InvalidLogits(UserError):
    """Logits from which no token can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite: its weights are damaged or its numbers overflow; "
            "examine the model with `dsv3 check`"
        )


def is_greedy(temperature: float) -> bool:
    """Return whether a temperature selects the likeliest token; raise a `UserError` for NaN, ∞."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be at least 0 and finite, not {temperature}")
    return temperature < GREEDY_BELOW


def greedy_token(logit_bw: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row; raise `InvalidLogits` if a row has none."""
    if not logit_bw.amax(-1).isfinite().all():  # NaN is passed on
        raise InvalidLogits
    return logit_bw.argmax(-1)


def truncate_probs(
    p_bw: torch.Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> torch.Tensor:
    """Set the probabilities of words that may not be drawn to 0; the rest need not sum to 1.

    min_p: relative to the likeliest word's. top_k: 0 keeps any number of words. top_p: of what the
    other two have kept. The likeliest word always stays.
    """
    ranked_bw, order_bw = p_bw.sort(-1, descending=True)
    cut_bw = ranked_bw < min_p * ranked_bw[..., :1]
    if top_k:
        cut_bw[..., top_k:] = True
    ranked_bw = ranked_bw.masked_fill(cut_bw, 0.0)
    ranked_bw = ranked_bw / ranked_bw.sum(-1, keepdim=True)
    if top_p < 1:
        cut_bw |= ranked_bw.cumsum(-1) - ranked_bw >= top_p  # those before it already suffice
    cut_bw[..., 0] = False  # also if top_p is 0 in float32
    return p_bw.masked_fill(cut_bw.scatter(-1, order_bw, cut_bw), 0.0)


def logits_to_probs(
    logit_bw: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0,
    min_p: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Return softmax(logit / T) of the words that `truncate_probs` keeps, (b, w), summing to 1.

    One-hot at T = 0.
    """
    if not (0 < top_p <= 1 and 0 <= min_p <= 1 and top_k >= 0):
        raise ValueError(
            f"top_p must be above 0 and at most 1, min_p from 0 to 1, top_k at least 0: not "
            f"{top_p}, {min_p} and {top_k}"
        )
    if is_greedy(temperature):
        return torch.zeros_like(logit_bw).scatter_(-1, greedy_token(logit_bw)[..., None], 1.0)
    best_bw = logit_bw.float().amax(-1, keepdim=True)
    if not best_bw.isfinite().all():
        raise InvalidLogits
    p_bw = ((logit_bw.float() - best_bw) / temperature).softmax(-1)  # at most 0: no overflow
    if top_p < 1 or top_k or min_p:
        p_bw = truncate_probs(p_bw, top_p, top_k, min_p)
    return p_bw / p_bw.sum(-1, keepdim=True)


def penalize(
    logit_w: torch.Tensor, prompt: Sequence[int], output: Sequence[int], repetition: float = 1.0,
    presence: float = 0.0, frequency: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Return the logits of the next word, (w,) in fp32, lowered for words that have occurred.

    repetition: divides positive and multiplies negative logits of words of the prompt and the
    output. presence: subtracted once for each word of the output. frequency: for each occurrence.
    """
    count_w = torch.tensor(output, dtype=torch.int64).bincount(minlength=len(logit_w))
    seen_w = torch.tensor(prompt, dtype=torch.int64).bincount(minlength=len(logit_w)) + count_w > 0
    count_w, seen_w = count_w.to(logit_w.device), seen_w.to(logit_w.device)
    factor_w = torch.where(logit_w > 0, 1 / repetition, repetition)
    logit_w = torch.where(seen_w, logit_w.float() * factor_w, logit_w.float())
    return logit_w - frequency * count_w - presence * (count_w > 0)


def sample(
    logit_bw: torch.Tensor, temperature: float, generator: torch.Generator | None = None,
    top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Return the next token of each row, (b,): argmax at T = 0, else from `logits_to_probs`."""
    if is_greedy(temperature):
        return greedy_token(logit_bw)
    p_bw = logits_to_probs(logit_bw, temperature, top_p, top_k, min_p)
    return multinomial_sample(p_bw, generator)


def multinomial_sample(
    p_bw: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one token from each distribution, (b,); the weights need not sum to 1.

    Raises `InvalidLogits` where torch would end the process's use of the GPU: for weights that are
    not finite, and for a row without any weight.
    """
    total_b = p_bw.sum(-1)
    if not (total_b.isfinite() & (total_b > 0)).all():
        raise InvalidLogits
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
assert sample(logit_bw, 0).tolist() == sample(logit_bw, 1e-38).tolist() == [0]
for options in ({"top_p": 0.7}, {"top_k": 2}, {"min_p": 0.3}):
    assert (logits_to_probs(logit_bw, 1.0, **options) > 0).tolist() == [[True, True, False, False]]
assert penalize(logit_bw[0], [3], [0, 0], 2.0, 0.5, 0.25).tolist() == [0.0, 1.0, 0.0, -2.0]

# %% [markdown]
# ## Rows of unequal length
# Prompts in a batch differ in length, and with drafts rows will also *grow* at different speeds. The
# cache of chapter 03 hands out rows of one length, so here every row has its own length, the number of
# tokens it holds. New tokens are written after them, rotated by their own positions, and a query
# sees the keys up to its own position. What lies beyond, padding or a rejected draft, is never seen
# and is simply written over later. So *rolling back* a cache means passing a smaller length.


# %%
#| export decode
MAX_ABSORBED_TOKENS = 16  # up to so many new tokens, attention stays inside the latent
CacheIndex = tuple[slice, slice] | tuple[torch.Tensor, torch.Tensor]  # (rows, positions)


class DecodePositions(NamedTuple):
    """Positions of s new tokens per row, after rows of any lengths."""

    cache_index: CacheIndex  # of the new tokens in a cache (b, t, …)
    end: int  # number of positions afterwards
    freqs_cis: torch.Tensor  # rotations e^{iω·position}, (b, s, 1, r/2)
    masked: torch.Tensor | None  # keys that a query must not see, (b or none, s, 1, t)
    is_prefill: bool  # many tokens of a prompt: attention on expanded keys and values


def cache_index(lengths: list[int], s: int, device: torch.device | None = None) -> CacheIndex:
    """Return the index of the s positions after `lengths` in a cache (b, t, …).

    It consists of slices if all rows have the same length, else of tensors.
    """
    if min(lengths) == max(lengths):
        return slice(None), slice(lengths[0], lengths[0] + s)
    position_bs = torch.tensor(lengths, device=device)[:, None] + torch.arange(s, device=device)
    return torch.arange(len(lengths), device=device)[:, None], position_bs


def positions_for(lengths: list[int], s: int, freqs_cis_tx: torch.Tensor) -> DecodePositions:
    """Return the next s positions of rows that hold `lengths` tokens."""
    device, end = freqs_cis_tx.device, max(lengths) + s
    index = cache_index(lengths, s, device)
    position = index[1]
    if isinstance(position, torch.Tensor):
        return ragged_positions(position, freqs_cis_tx, end)
    key_t = torch.arange(end, device=device)
    masked = key_t[position, None, None] < key_t if s > 1 else None  # one token sees all
    is_prefill = end == s or s > MAX_ABSORBED_TOKENS
    return DecodePositions(index, end, freqs_cis_tx[None, position, None], masked, is_prefill)


def ragged_positions(
    position_bs: torch.Tensor, freqs_cis_tx: torch.Tensor, end: int
) -> DecodePositions:
    """Return any positions (b, s) below `end`; a query sees the keys up to its own position."""
    row_b1 = torch.arange(len(position_bs), device=freqs_cis_tx.device)[:, None]
    masked = position_bs[..., None, None] < torch.arange(end, device=freqs_cis_tx.device)
    freqs_cis = freqs_cis_tx[position_bs[..., None]]
    return DecodePositions((row_b1, position_bs), end, freqs_cis, masked, False)


def apply_freqs_cis(x_bshr: torch.Tensor, freqs_cis_bs1x: torch.Tensor) -> torch.Tensor:
    """Multiply pairs as complex numbers by e^{iω·position}.

    This is `apply_rotary_emb` with different positions in each row.
    """
    pairs = x_bshr.float().unflatten(-1, (-1, 2))
    x = torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format))
    return torch.view_as_real(x * freqs_cis_bs1x).flatten(-2).to(x_bshr.dtype)


# %% [markdown]
# ## One decoding step
# A step applies the same weights and equations as training, without what only training needs. It uses them
# through two small classes, so that a *backend* can store them in another way: `BlockWeights` multiplies with
# the matrices of one block, `DecodeWeights` holds one per block and the output head. The plain form calls the modules.


# %%
#| export decode
class BlockWeights:
    """Weights of one block as a decoding step uses them; this plain form calls its modules."""

    def __init__(self, block: Block):
        self.block = block

    def project(self, name: str, x_bsd: torch.Tensor) -> torch.Tensor:
        """Multiply x by the attention's matrix of this name, such as `wq_a`."""
        return getattr(self.block.attn, name)(x_bsd)

    def norm(self, x_bsd: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Apply an RMSNorm of the block."""
        return norm(x_bsd)

    def ffn(self, x_bsd: torch.Tensor) -> torch.Tensor:
        """Apply the MoE, eq. 12–16, or the dense FFN."""
        y_bsd = self.block.ffn(x_bsd)
        return y_bsd[0] if isinstance(y_bsd, tuple) else y_bsd


class DecodeWeights(NamedTuple):
    """Weights of a model as a decoding step uses them."""

    blocks: list[BlockWeights]  # the main model's blocks, then those of the MTP modules
    logits: Callable[[torch.Tensor], torch.Tensor]  # h (…, d) → scores of every word (…, w)


def blocks_of(model: Transformer) -> list[Block]:
    """Return the blocks of a model, those of the MTP modules last."""
    return [module for module in model.modules() if isinstance(module, Block)]


@op
def decode_weights(model: Transformer) -> DecodeWeights:
    """Return a model's weights for decoding; call it again after a weight has changed."""
    return DecodeWeights([BlockWeights(block) for block in blocks_of(model)], model.head)


# %% [markdown]
# Attention takes one of two forms. A prompt's many tokens attend on *expanded* keys and values, as in training;
# a few new tokens stay *inside the latent* (chapter 03). Both get queries and latents from the same projections.


# %%
#| export decode
class LatentProjections:
    """Projections of one MLA around its attention: queries, latents, and the output."""

    def __init__(self, attn: MLA, weights: BlockWeights):
        config = attn.config
        self.attn, self.weights = attn, weights
        self.config, self.scale = config, softmax_scale(config)
        self.wkv_b = attn.wkv_b.weight
        w_hxc = self.wkv_b.unflatten(0, (config.n_heads, -1))
        i = config.qk_nope_head_dim
        self.wk_hic, self.wv_hcv = w_hxc[:, :i], w_hxc[:, i:].mT

    def queries(
        self, x_bsd: torch.Tensor, freqs_cis: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries' content part (b, s, h, i) and rotated part (b, s, h, r); eq. 6–8."""
        config, weights = self.config, self.weights
        if config.q_lora_rank:
            c_bsq = weights.norm(weights.project("wq_a", x_bsd), self.attn.q_norm)
            q = weights.project("wq_b", c_bsq)
        else:
            q = weights.project("wq", x_bsd)
        sizes = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        q_bshi, q_bshr = q.unflatten(-1, (config.n_heads, -1)).split(sizes, dim=-1)
        return q_bshi, apply_freqs_cis(q_bshr, freqs_cis)

    def latents(self, x_bsd: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        """Return what a cache stores: latents and rotated keys, (b, s, c + r); eq. 1 and 3."""
        c = self.config.kv_lora_rank
        kv_bsx = self.weights.project("wkv_a", x_bsd)
        k_bsr = apply_freqs_cis(kv_bsx[:, :, None, c:], freqs_cis)[:, :, 0]
        return torch.cat((self.weights.norm(kv_bsx[..., :c], self.attn.kv_norm), k_bsr), dim=-1)

    def absorb(self, q_bshi: torch.Tensor, q_bshr: torch.Tensor) -> torch.Tensor:
        """Map the content part of queries into the latent, (b, s, h, c + r)."""
        q_bshc = (q_bshi.flatten(0, 1).transpose(0, 1) @ self.wk_hic).transpose(0, 1)
        return torch.cat((q_bshc.unflatten(0, q_bshi.shape[:2]), q_bshr), dim=-1)

    def unabsorb(self, o_bshc: torch.Tensor) -> torch.Tensor:
        """Map attention's results out of the latent, (b, s, h, v)."""
        o_hnv = o_bshc.flatten(0, 1).transpose(0, 1) @ self.wv_hcv
        return o_hnv.transpose(0, 1).unflatten(0, o_bshc.shape[:2])

    def output(self, o_bshv: torch.Tensor) -> torch.Tensor:
        """Apply the output projection, eq. 11."""
        return self.weights.project("wo", o_bshv.flatten(2))


@op
def attend_prefill(
    q_bshi: torch.Tensor, q_bshr: torch.Tensor, kv_btx: torch.Tensor, wkv_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attend from the last s of t positions to expanded keys and values, (b, s, h, v)."""
    c_btc, k_btr = kv_btx.tensor_split([wkv_b.shape[1]], dim=-1)
    return attend_expanded(q_bshi, q_bshr, c_btc, k_btr, wkv_b, scale)


class CachedAttention:
    """MLA with a cache of its own, (b, t, c + r), into which every call writes."""

    def __init__(self, projections: LatentProjections, batch: int, max_len: int):
        wkv_b, self.projections = projections.wkv_b, projections
        cache = LayerKVCache(projections.config, batch, max_len, wkv_b.device, wkv_b.dtype)
        self.kv_btx = cache.kv_btx

    def __call__(self, x_bsd: torch.Tensor, positions: DecodePositions) -> torch.Tensor:
        """Attend from the new tokens at these positions, eq. 1–11: (b, s, d) → (b, s, d)."""
        mla = self.projections
        q_bshi, q_bshr = mla.queries(x_bsd, positions.freqs_cis)
        kv_bsx = mla.latents(x_bsd, positions.freqs_cis)
        self.kv_btx[positions.cache_index] = kv_bsx.to(self.kv_btx.dtype)
        kv_btx = self.kv_btx[:, : positions.end]
        if positions.is_prefill:
            return mla.output(attend_prefill(q_bshi, q_bshr, kv_btx, mla.wkv_b, mla.scale))
        q_bshx = mla.absorb(q_bshi, q_bshr)
        score_bst = (q_bshx.flatten(1, 2) @ kv_btx.mT).mul_(mla.scale)  # s: positions and heads
        if positions.masked is not None:
            score_bst.view(*q_bshx.shape[:3], -1).masked_fill_(positions.masked, -torch.inf)
        o_bsc = score_bst.softmax(-1) @ kv_btx[..., : mla.config.kv_lora_rank]
        return mla.output(mla.unabsorb(o_bsc.unflatten(1, q_bshx.shape[1:3])))


# %% [markdown]
# A layer is given its attention, because [chapter 18](18_serve.ipynb) will give it another: over pages. An MTP
# module is such a layer after its own norms and projection. The `Decoder` holds one layer per block
# and keeps two records: which token stands where, and the hidden state of every position, from which the MTP modules
# draft. The scores of a prompt of $t$ tokens are $t^2$ numbers per head, so long prompts pass in chunks.


# %%
#| export decode
Attention = Callable[..., torch.Tensor]  # (x_bsd, positions) → (b, s, d), with a cache of its own


class DecodeLayer:
    """Block in a decoder: its weights, and an attention with its cache."""

    def __init__(self, block: Block, weights: BlockWeights, attention: Attention):
        self.block, self.weights = block, weights
        self.attention = attention

    def __call__(self, x_bsd: torch.Tensor, positions: NamedTuple) -> torch.Tensor:
        """Return u + FFN(norm(u)) with u = x + attention(norm(x))."""
        block, weights = self.block, self.weights
        x_bsd = x_bsd + self.attention(weights.norm(x_bsd, block.attn_norm), positions)
        return x_bsd + weights.ffn(weights.norm(x_bsd, block.ffn_norm))


class MTPDecodeLayer:
    """MTP module in a decoder: h^k from the pair (embedding of the token k later, h^{k−1})."""

    def __init__(self, mtp: MTP, layer: DecodeLayer):
        self.mtp, self.layer = mtp, layer
        self.attention = layer.attention

    def __call__(self, pair_bsd: torch.Tensor, positions: NamedTuple) -> torch.Tensor:
        """Apply eq. 21 and 22 to concatenated pairs: (b, s, 2d) → (b, s, d)."""
        embed_bsd, h_bsd = pair_bsd.chunk(2, dim=-1)
        norm, mtp = self.layer.weights.norm, self.mtp
        both_bsd = torch.cat((norm(embed_bsd, mtp.enorm), norm(h_bsd, mtp.hnorm)), dim=-1)
        return mtp.norm(self.layer(mtp.eh_proj(both_bsd), positions))


Layers = list[DecodeLayer | MTPDecodeLayer]


def decode_layers(
    model: Transformer,
    weights: DecodeWeights,
    make_attention: Callable[[LatentProjections], Attention],
) -> Layers:
    """Return a layer for every block, MTP modules last, each with an attention of its own."""
    block_layers: list[DecodeLayer] = []
    for block, block_weights in zip(blocks_of(model), weights.blocks):
        attention = make_attention(LatentProjections(block.attn, block_weights))
        block_layers.append(DecodeLayer(block, block_weights, attention))
    n_main = len(model.layers)
    layers: Layers = list(block_layers[:n_main])
    modules = [module for module in model.mtp.values() if isinstance(module, MTP)]
    layers += [MTPDecodeLayer(m, layer) for m, layer in zip(modules, block_layers[n_main:])]
    return layers


@op
def run_layers(
    layers: Layers, x_bsd: torch.Tensor, lengths: list[int], freqs_cis_tx: torch.Tensor
) -> torch.Tensor:
    """Pass the next s tokens of rows that hold `lengths` tokens through several layers."""
    positions = positions_for(lengths, x_bsd.shape[1], freqs_cis_tx)
    for layer in layers:
        x_bsd = layer(x_bsd, positions)
    return x_bsd


PREFILL_CHUNK = 1024  # tokens of a prompt that pass through the layers at once
LENGTH_MULTIPLE = 128  # caches of compiled steps are rounded up, so that few programs serve all


class Decoder:
    """Model for decoding: layers with caches, the tokens of every row and their hidden states.

    compiled: steps of a few tokens run as fused programs (backend `compiled`).
    """

    prefill_chunk: int = PREFILL_CHUNK

    def __init__(self, model: Transformer, batch: int, max_len: int, compiled: bool = False):
        if compiled:
            max_len = ceil_div(max_len, LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self.model, self.compiled = model, compiled
        self.n_main = model.config.n_layers
        weights, w = decode_weights(model), model.embed.weight
        self.logits = weights.logits
        make_attention = partial(CachedAttention, batch=batch, max_len=max_len)
        self.layers = decode_layers(model, weights, make_attention)
        position_t = torch.arange(max_len, device=w.device)
        self.freqs_cis_tx = torch.complex(*rope_cos_sin(model.config, position_t))
        self.token_bt = torch.zeros(batch, max_len, dtype=torch.int64, device=w.device)
        self.h_btd = torch.zeros(batch, max_len, w.shape[1], device=w.device, dtype=w.dtype)

    def hidden_states(self, lengths: list[int], s: int) -> torch.Tensor:
        """Return the normed h⁰ of the next s tokens of every row, (b, s, d)."""
        index = cache_index(lengths, s, self.token_bt.device)
        x_bsd = F.embedding(self.token_bt[index], self.model.embed.weight)
        h_bsd = self.model.norm(self.run(self.layers[: self.n_main], x_bsd, lengths))
        self.h_btd[index] = h_bsd
        return h_bsd

    def mtp_forward(self, k: int, h_bsd: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Return h^k from h^{k−1} at the positions after `lengths` and the tokens k later."""
        index = cache_index([n + k for n in lengths], h_bsd.shape[1], h_bsd.device)
        embed_bsd = F.embedding(self.token_bt[index], self.model.embed.weight)
        layer = self.layers[self.n_main + k - 1]
        return self.run([layer], torch.cat((embed_bsd, h_bsd), dim=-1), lengths)

    def run(self, layers: Layers, x_bsd: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Pass x through layers, at most `prefill_chunk` tokens per row at once."""
        if x_bsd.shape[1] > self.prefill_chunk:
            chunks, lengths = [], list(lengths)
            for chunk_bsd in x_bsd.split(self.prefill_chunk, dim=1):
                chunks.append(self.run(layers, chunk_bsd, lengths))
                lengths = [n + chunk_bsd.shape[1] for n in lengths]
            return torch.cat(chunks, dim=1)
        if not self.compiled:
            return run_layers(layers, x_bsd, lengths, self.freqs_cis_tx)
        with ops.use("compiled", *ops.ACTIVE_BACKENDS):
            return run_layers(layers, x_bsd, lengths, self.freqs_cis_tx)


# %% [markdown]
# Three checks: on rows of unequal length, and fed in uneven pieces, the decoder must give the hidden
# states of a plain forward pass; so must a prompt that is read in chunks; and its MTP chain must be
# that of chapter 06. They hold for the plain form and for the fast one of the next section.

# %%
small = replace(
    TINY, vocab_size=256, n_layers=3, n_routed_experts=8, n_activated_experts=2, n_mtp_layers=2,
    init_std=0.06, embed_std=1.0,
)  # fmt: skip
model = Transformer(small)


@torch.inference_mode()
def check_decoder() -> None:
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
    decoder.prefill_chunk = 25  # two chunks and a short one
    chunks_bsd = decoder.hidden_states([0, 0], 60)
    assert torch.allclose(chunks_bsd, model.hidden_states(decoder.token_bt[:, :60])[0], atol=1e-4)
    decoder.token_bt[:, :12] = tokens_bs
    h_bsd = want_bsd
    for k, (chain_bsd, _) in enumerate(mtp_hidden_states(model, want_bsd, tokens_bs), start=1):
        h_bsd = decoder.mtp_forward(k, h_bsd[:, : 12 - k], [0, 0])
        assert torch.allclose(h_bsd, chain_bsd, atol=1e-4)


for backends in (("torch",), ("cpu", "torch")):
    with use(*backends):
        check_decoder()
print("rows of 12 and 9 tokens, one rolled back: as in a plain forward pass")

# %% [markdown]
# ## In practice: a product with one row
# A decoding step multiplies every active matrix with a handful of rows, so it is bound by reading
# them. Libraries for matrix products are made for many rows: with one, and matrices that come from
# beyond the second-level cache, MKL (Intel's) read 2 MB of experts in 231 µs on our two cores, where a plain sum
# over the same bytes took 31. Written the other way round,
#
# $$y = xW^\top = \sum_i x_i\,(W^\top)_i\qquad (1,d)\times(d,o)\to(1,o)$$
#
# is a *weighted sum of rows* of $W^\top$, and for that there is a fast routine under another name: recommender
# systems call it an embedding bag. It took 41 µs, and it takes an index, so all experts of all tokens
# can be one call on one tall table. The backend "cpu" ([`dsv3_ref/cpu/decoder.py`](../dsv3_ref/cpu/decoder.py)), the default on a CPU
# outside this notebook (whose own cells come first), registers a `decode_weights` that stores such tables: a second copy of the
# weights, made once and again after a weight has changed.

# %%
from dsv3_ref.cpu.decoder import blockwise_attention, small_matmul

x_1d, w_do = torch.randn(1, 512), torch.randn(512, 1024)
assert torch.allclose(small_matmul(x_1d, w_do), x_1d @ w_do, atol=1e-3)
print("a weighted sum of 512 rows: the same product")

# %% [markdown]
# ### A long prompt, block by block
# The expanded keys and values of a long prompt are large too: $h\,(i + r + v)$ numbers per position, where the latent has $c + r$.
# So the same backend lets a chunk attend to the cache in blocks of 512 keys, and here a softmax meets a block without knowing
# the next. It keeps what it has and mends it. For every query let $m$ be the largest score so far, $z$ the sum
# of exponentials and $o$ the sum of values that they weigh. A block with scores $x_y$ and values $v_y$ makes of them
#
# $$m' = \max(m, \max_y x_y),\qquad z' = z\,e^{m-m'} + \sum_y e^{x_y-m'},\qquad
# o' = o\,e^{m-m'} + \sum_y e^{x_y-m'} v_y$$
#
# starting from $m=-\infty$ and $z=o=0$; at the end $o/z$ is attention over all blocks, in the memory of one.

# %%
q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 17, 17))
want = attention(q, k, v, 0.3)  # whose queries are the last 5 of 17 as well
for y in (1, 4, 17):
    got = blockwise_attention(q, zip(k.split(y, 1), v.split(y, 1)), 17, 0.3)
    assert torch.allclose(got, want, atol=1e-6)
print("blocks of 1, 4 and 17 keys: the same attention")

# %% [markdown]
# ### Fused steps
# A step is some 80 small operations per layer, each of which costs a microsecond or two before it
# has computed anything. A *compiler* can fuse them: `torch.compile` turns the steps of a few layers
# into one C++ program, which takes about half the time, once the compiler has run for some 20
# seconds. So it is a choice (`compiled=True`): worth it for many tokens, never for a few. A compiled program is for
# one shape, so it attends to all positions of the cache, the empty ones masked, and their number is
# rounded up.

# %% [markdown]
# ## Drafts that never change the text
# A round of *speculative decoding*: the MTP modules guess the next $D$ tokens; the main model reads
# them all in **one** forward pass, which costs little more than one token as long as decoding is bound by reading weights and most experts are read
# anyway (chapter 06 has the numbers: at batch size 1 the second token reads other experts, and at large batches FLOPs bind); then the guesses are judged from left to right. A token $x$, drafted with
# probability $q(x)$ where the main model says $p(x)$, is accepted with probability
#
# $$\min\left(1, \frac{p(x)}{q(x)}\right),\qquad\text{else replaced by a draw from}\quad
# \frac{\max(p-q,\,0)}{\sum_w \max(p_w-q_w,\,0)}$$
#
# and all guesses after the first rejected one are thrown away. A word comes out either because it
# was drafted and accepted, which happens with probability $\min(q, p)$, or because a rejection chose
# it, which adds $\max(p-q, 0)$, for a round rejects with probability $\sum_w\max(p_w-q_w,0)$, and the denominator
# cancels. The sum is $p$. So the text has exactly the distribution of plain
# decoding, however bad the guesses are. At $T=0$ both are one-hot and the rule reads: accept what
# the main model would have said.


# %%
#| export decode
def verify_draft(
    p_bsw: torch.Tensor, q_bkw: torch.Tensor, draft_bk: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return how many drafts are accepted in each row, (b,), and the token after them, (b,).

    The tokens have the main model's distribution. p_bsw: its probabilities at the s = D + 1
    positions. q_bkw: the distributions from which the D drafts were drawn.
    """
    p_bk = p_bsw[:, :-1].gather(-1, draft_bk[..., None])[..., 0]
    q_bk = q_bkw.gather(-1, draft_bk[..., None])[..., 0]
    chance_bk = torch.rand(p_bk.shape, generator=generator, device=p_bk.device)
    n_b = (chance_bk * q_bk < p_bk).long().cumprod(1).sum(1)
    rest_bsw = (p_bsw - F.pad(q_bkw, (0, 0, 0, 1))).clamp(min=0)  # after D drafts: p itself
    row_b = torch.arange(len(n_b), device=n_b.device)
    rest_bw = rest_bsw[row_b, n_b]
    is_empty = rest_bw.sum(-1, keepdim=True) == 0  # p = q up to rounding
    return n_b, multinomial_sample(torch.where(is_empty, p_bsw[row_b, n_b], rest_bw), generator)


# %%
p_w, q_w = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
p_bsw, q_bkw = p_w.expand(draws, 2, 4), q_w.expand(draws, 1, 4)
g = torch.Generator().manual_seed(0)
guess_b = multinomial_sample(q_bkw[:, 0], g)
taken_b, next_b = verify_draft(p_bsw, q_bkw, guess_b[:, None], g)
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
Distributions = Sequence[torch.Tensor | None]  # (b, w) of every draft; None: chosen by argmax


class SamplingParams(NamedTuple):
    """Parameters of sampling: temperature, random numbers, and which words may be drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is chosen, without random numbers."""
        return is_greedy(self.temperature)

    def sample(self, logit_bw: torch.Tensor) -> torch.Tensor:
        """Return the next token of each row, (b,)."""
        return sample(
            logit_bw, self.temperature, self.generator, self.top_p, self.top_k, self.min_p
        )

    def probs(self, logit_bw: torch.Tensor) -> torch.Tensor:
        """Return the distribution from which tokens are drawn, (b, w)."""
        return logits_to_probs(logit_bw, self.temperature, self.top_p, self.top_k, self.min_p)

    def draft(self, logit_bw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft a token for each row; return it and the distribution it is from, None at T = 0."""
        if self.is_greedy:
            return greedy_token(logit_bw), None
        q_bw = self.probs(logit_bw)
        return multinomial_sample(q_bw, self.generator), q_bw

    def verify(
        self, logit_bsw: torch.Tensor, distributions: Distributions, draft_bk: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Verify drafts with the main model's logits: argmax at T = 0, else `verify_draft`."""
        if self.is_greedy:
            argmax_bs = greedy_token(logit_bsw)
            n_b = (argmax_bs[:, :-1] == draft_bk).long().cumprod(1).sum(1)
            return n_b, argmax_bs.gather(1, n_b[:, None])[:, 0]
        p_bsw = self.probs(logit_bsw)
        q_bkw = torch.stack([q_bw for q_bw in distributions if q_bw is not None], 1)
        return verify_draft(p_bsw, q_bkw, draft_bk, self.generator)


class SpeculativeDecoder:
    """Decoder of several rows with drafts of MTP modules; with 0 speculative tokens, without."""

    def __init__(
        self, model: Transformer, prompts: list[list[int]], max_new_tokens: int,
        num_speculative_tokens: int = 0, compiled: bool = False,
    ):  # fmt: skip
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("the prompt is empty: give at least the begin-of-sentence token")
        if not 0 <= num_speculative_tokens <= len(model.mtp):
            raise ValueError(
                f"num_speculative_tokens is {num_speculative_tokens}, but must be 0 to "
                f"{len(model.mtp)}, the number of MTP modules of the model"
            )
        self.num_speculative_tokens = num_speculative_tokens
        self.lengths = [len(p) for p in prompts]  # tokens that the main model has read
        self.mtp_lengths = [0] * len(prompts)  # and the MTP modules
        max_len = max(self.lengths) + max_new_tokens + 2 * num_speculative_tokens + 1
        self.decoder = Decoder(model, len(prompts), max_len, compiled)
        for row_t, prompt in zip(self.decoder.token_bt, prompts):
            row_t[: len(prompt)] = torch.tensor(prompt)
        self.logit_bw = self.prefill()

    def prefill(self) -> torch.Tensor:
        """Prefill the prompts; return the logits after the last token of each, (b, w)."""
        h_bsd = self.decoder.hidden_states([0] * len(self.lengths), max(self.lengths))
        return self.decoder.logits(h_bsd[range(len(self.lengths)), [n - 1 for n in self.lengths]])

    def first_token(self, sampling_params: SamplingParams) -> list[list[int]]:
        """Choose and write the token after each prompt; return it per row."""
        token_b = sampling_params.sample(self.logit_bw)
        self.write_token(token_b, 0)
        return token_b[:, None].tolist()

    def write_token(self, token_b: torch.Tensor, k: int) -> None:
        """Write one token per row, k places after those that the main model has read."""
        token_bt = self.decoder.token_bt
        token_bt[cache_index([n + k for n in self.lengths], 1, token_bt.device)] = token_b[:, None]

    def propose(self, sampling_params: SamplingParams) -> tuple[torch.Tensor, Distributions]:
        """Return D drafts per row, (b, D), and the distributions they came from."""
        decoder, device = self.decoder, self.decoder.h_btd.device
        num_new = [n - m for n, m in zip(self.lengths, self.mtp_lengths)]  # unread by MTP modules
        last = cache_index([n - 1 for n in num_new], 1, device)
        h_bsd = decoder.h_btd[cache_index(self.mtp_lengths, max(num_new), device)]
        drafts: list[torch.Tensor] = []
        distributions: list[torch.Tensor | None] = []
        for k in range(1, self.num_speculative_tokens + 1):
            h_bsd = decoder.mtp_forward(k, h_bsd, self.mtp_lengths)
            draft_b, q_bw = sampling_params.draft(decoder.logits(h_bsd[last][:, 0]))
            self.write_token(draft_b, k)
            drafts.append(draft_b)
            distributions.append(q_bw)
        self.mtp_lengths = [max(0, n + 1 - self.num_speculative_tokens) for n in self.lengths]
        return torch.stack(drafts, 1), distributions

    def step(self, sampling_params: SamplingParams, active: list[bool]) -> list[list[int]]:
        """Return the new tokens of every row, 1 to D + 1; rows that are not active get none."""
        decoder, depth = self.decoder, self.num_speculative_tokens
        if depth:
            draft_bk, distributions = self.propose(sampling_params)
        logit_bsw = decoder.logits(decoder.hidden_states(self.lengths, depth + 1))
        if depth:
            n_b, token_b = sampling_params.verify(logit_bsw, distributions, draft_bk)
            num_accepted, drafts = n_b.tolist(), draft_bk.tolist()
            tokens = [[*d[:n], t] for d, n, t in zip(drafts, num_accepted, token_b.tolist())]
        else:
            token_b = sampling_params.sample(logit_bsw[:, 0])
            tokens = token_b[:, None].tolist()
        tokens = [row if on else [] for row, on in zip(tokens, active)]
        self.lengths = [n + len(row) for n, row in zip(self.lengths, tokens)]
        self.write_token(token_b, 0)
        return tokens


# %% [markdown]
# `stream` ends rows at stop tokens and at their limit, and lets a caller end them; `generate` collects what it yields.


# %%
#| export decode
@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling_params: SamplingParams = SamplingParams(),  # noqa: B008  a constant
    stop: Iterable[int] = (),
    num_speculative_tokens: int = 0,
    compiled: bool = False,
) -> Generator[list[list[int]], list[bool] | None, None]:
    """Yield the new tokens of every row, step by step; a row ends with its first stop token.

    Prompts may differ in length. MTP modules draft `num_speculative_tokens` tokens per step.
    compiled: fuse the steps; the first call compiles. A caller may send back a list of booleans:
    rows with False end there.
    """
    if max_new_tokens < 1:
        return
    decoder = SpeculativeDecoder(model, prompts, max_new_tokens, num_speculative_tokens, compiled)
    stop_ids, remaining = set(stop), [max_new_tokens] * len(prompts)
    new_tokens = decoder.first_token(sampling_params)
    while True:
        for row, tokens in enumerate(new_tokens):
            del tokens[remaining[row] :]
            ends = [i for i, token in enumerate(tokens) if token in stop_ids]
            del tokens[ends[0] + 1 if ends else len(tokens) :]
            remaining[row] = 0 if ends else remaining[row] - len(tokens)
        active = yield new_tokens
        if active is not None:
            remaining = [n if on else 0 for n, on in zip(remaining, active)]
        if not any(remaining):
            return
        new_tokens = decoder.step(sampling_params, [n > 0 for n in remaining])


def generate(
    model: Transformer,
    tokens_bs: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    top_p: float = 1.0,
    num_speculative_tokens: int = 0,
    compiled: bool = False,
) -> torch.Tensor:
    """Continue prompts of equal length: (b, s) → (b, s + max_new_tokens)."""
    rows, params = tokens_bs.tolist(), SamplingParams(temperature, top_p, generator)
    steps = stream(model, rows, max_new_tokens, params, (), num_speculative_tokens, compiled)
    for new_tokens in steps:
        for row, tokens in zip(rows, new_tokens):
            row += tokens
    return torch.tensor(rows, dtype=torch.int64, device=tokens_bs.device)


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
            greedy = model(torch.tensor([row[:-1]]))[0].argmax(-1).tolist()
            assert len(row) == len(prompt) + 12 and greedy[len(prompt) - 1 :] == row[len(prompt) :]
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
STEPS, NEW_TOKENS = (12, 20) if os.environ.get("DSV3_SHORT") else (100, 80)
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
optimizer, at = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95)), 0
for step in range(STEPS):
    start = torch.randint(len(text) - 8000, (4,))
    rows_bs = torch.stack([text[a : a + 129] for a in start])
    parts = compute_losses(model, rows_bs)
    parts.total(0.3, 1e-4).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / STEPS)
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {parts.main:.2f}, MTP {', '.join(f'{x:.2f}' for x in parts.mtp)} nats per byte")
context = [text[-n : -n + 60].tolist() for n in (7000, 5000, 3000, 1000)]


# %%
def rounds(depth: int, temperature: float, new: int = NEW_TOKENS) -> tuple[list[float], float]:
    """Return the share of rounds with at least 1, 2, … accepted drafts, and tokens per second."""
    params = SamplingParams(temperature, 1.0, torch.Generator().manual_seed(0))
    counts, seconds = [], []
    for prompt in context:
        steps, clock = [], [time.perf_counter()]
        for step in stream(model, [prompt], new, params, num_speculative_tokens=depth):
            steps.append(step)
            clock.append(time.perf_counter())
        counts += [len(s[0]) - 1 for s in steps[1:-1]]  # the first has no drafts, the last is cut
        seconds += [b - a for a, b in pairwise(clock[1:-1])]
    fast = sorted(seconds)[len(seconds) // 10]  # others use these cores too
    speed = (1 + sum(counts) / len(counts)) / fast
    return [sum(n >= k for n in counts) / len(counts) for k in range(1, depth + 1)], speed


heats = [0.0, 0.5, 1.0]
with use("cpu", "torch"):  # the tuned forms, as outside this notebook
    table = {t: {d: rounds(d, t) for d in (0, 1, 2)} for t in heats}
fig, (left, right) = figure(1, 2, width=9, height=3.0)
for depth, color, style in ((1, BLUE, "-"), (2, ORANGE, "--")):
    left.plot(heats, [table[t][2][0][depth - 1] for t in heats], style, marker="o", color=color,
              label=f"at least {depth} of 2 drafts")  # fmt: skip
    gain = [table[t][depth][1] / table[t][0][1] for t in heats]
    label = ("one draft", "two drafts")[depth - 1] + " per round"
    right.plot(heats, gain, style, marker="o", color=color, label=label)
left.set(ylim=(0, 1), xlabel="temperature", ylabel="share of rounds", title="Accepted")
right.axhline(1, color=GRAY, lw=1)
right.set(xlabel="temperature", ylabel="speed against plain decoding")
right.set_title("Three layers gain little")
for ax in (left, right):
    ax.legend()
show(fig)
for t in heats:
    print(f"T = {t}: accepted {table[t][2][0][0]:.2f}, then {table[t][2][0][1]:.2f}; "
          f"{table[t][0][1]:.0f} tokens/s plain, {table[t][1][1]:.0f} with one draft, "
          f"{table[t][2][1]:.0f} with two")  # fmt: skip
steps = stream(model, [context[0]], 90, num_speculative_tokens=1)
continuation = b"".join(bytes(step[0]) for step in steps)
print(bytes(context[0]).decode()[-30:], "→", continuation.decode(errors="replace"))
assert STEPS < 100 or table[0.0][1][0][0] > 0.4

# %% [markdown]
# Which guesses are right? Round by round: green are drafts that the main model accepted, and below the text stands, struck out, what an
# MTP module guessed where it was wrong. (A model this small soon repeats itself, which is easy to guess.)

# %%
from dsv3_ref.viz.decoding import draw_trace


class TracedDecoder(SpeculativeDecoder):
    """Decoder that keeps the drafts of its last step."""

    def propose(self, sampling_params):
        drafts, distributions = super().propose(sampling_params)
        self.drafts = drafts[0].tolist()
        return drafts, distributions


@torch.inference_mode()
def trace(drafts: int = 2, temperature: float = 0.0, place: int = 0):
    """Draw 150 tokens of one context, round by round, with accepted and rejected drafts."""
    params = SamplingParams(temperature, 1.0, torch.Generator().manual_seed(0))
    decoder = TracedDecoder(model, [context[place]], 160, drafts)
    rounds = [(list(map(chr, decoder.first_token(params)[0])), 0, None)]
    while sum(len(r[0]) for r in rounds) < 150:
        (new,) = decoder.step(params, [True])
        wrong = decoder.drafts[len(new) - 1 : len(new)]
        rounds.append((list(map(chr, new)), len(new) - 1, chr(wrong[0]) if wrong else None))
    per_round = sum(len(r[0]) for r in rounds[1:]) / (len(rounds) - 1)
    show(draw_trace(rounds, 50, f"{per_round:.2f} tokens per round"))


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
speculation = json.loads((RESULTS_DIR / "bench.json").read_text(encoding="utf-8"))["speculation"]
fig, ways = figure(1, 2, width=9, height=3.0, sharey=True)
for ax, way in zip(ways, ("eager", "compiled")):
    names = [name for name in speculation if "dense" not in name]
    runs = [speculation[name][way] for name in names]
    depths = [int(name.split()[0]) for name in names]
    measured, predicted = [r["speedup"] for r in runs], [r["predicted"] for r in runs]
    ax.semilogx(depths, measured, "o-", base=2, color=BLUE, label="measured")
    ax.semilogx(depths, predicted, "o--", base=2, color=ORANGE, label="formula")
    dense = speculation["16 layers, dense"][way]
    ax.plot(16, dense["speedup"], "s", color=BLUE, mfc="none", label="16 dense layers")
    ax.plot(16, dense["predicted"], "s", color=ORANGE, mfc="none")
    ax.axhline(1, color=GRAY, lw=1)
    ax.set(title=f"One draft per round, {way}", xlabel="layers of the main model")
    ax.set_xticks(depths, depths)
ways[0].set_ylabel("speed against plain")
ways[1].legend()
show(fig)
for name, run in speculation.items():
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
# each sequence's own cache. The bytes below, one per weight (FP8), over the 3.35 TB/s of an H100, bound the speed,
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
              f"({1 - asleep:4.0%} of the experts), cache {cache / 1e9:5.1f} GB: {ms:3.0f} ms per step")  # fmt: skip

# %% [markdown]
# Alone, a user waits for weights: 37 GB for one token. Thirty-two users together wake two thirds of
# the experts: twelve times the bytes for thirty-two times the words. Larger batches are cheaper
# still, which is why the report decodes on 320 GPUs with one expert each (section 3.4.2). The
# module of this chapter is `dsv3_ref.decode`; one called `generate` would hide the function of that
# name.
