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
# # 03 · MLA: attention that remembers 576 numbers a token

# %%
#| export
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

from dsv3_ref.config import Config
from dsv3_ref.ops import Linear, RMSNorm, impl, op
from dsv3_ref.rope import rotate, softmax_scale


# %% [markdown]
# ## Causal attention


# %%
#| export
def causal_mask(s: int, t: int, device=None):
    """True where query s may see key t; the queries are the last s of t positions."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


@op
def attention(q_bshx, k_bthx, v_bthv, scale: float):
    """Causal attention, o = softmax(scale·q·kᵀ) v; x = i + r, the queries are the last s of t."""
    s, t = q_bshx.shape[1], k_bthx.shape[1]
    mask = None if s in (1, t) else causal_mask(s, t, q_bshx.device)
    q, k, v = (x.transpose(1, 2) for x in (q_bshx, k_bthx, v_bthv))
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=s == t, scale=scale)
    return o.transpose(1, 2)


@impl("attention", "naive")
def _(q_bshx, k_bthx, v_bthv, scale):
    score_bhst = einsum(q_bshx, k_bthx, "b s h x, b t h x -> b h s t").float() * scale
    mask = causal_mask(*score_bhst.shape[-2:], score_bhst.device)
    p_bhst = score_bhst.masked_fill(~mask, -torch.inf).softmax(-1).to(v_bthv.dtype)
    return einsum(p_bhst, v_bthv, "b h s t, b t h v -> b s h v")


# %% [markdown]
# ## Attention inside the latent


# %%
#| export
@op
def latent_attention(q_bshc, q_bshr, c_btc, k_btr, scale: float):
    """Causal attention with the latent as key and value: o = softmax(scale·(q·c + q·k)) c."""
    score_bhst = einsum(q_bshc, c_btc, "b s h c, b t c -> b h s t")
    score_bhst = score_bhst + einsum(q_bshr, k_btr, "b s h r, b t r -> b h s t")
    s, t = score_bhst.shape[-2:]
    score_bhst = score_bhst.float() * scale
    if s > 1:
        score_bhst = score_bhst.masked_fill(~causal_mask(s, t, c_btc.device), -torch.inf)
    p_bhst = score_bhst.softmax(-1).to(c_btc.dtype)
    return einsum(p_bhst, c_btc, "b h s t, b t c -> b s h c")


@impl("latent_attention", "naive")
def _(q_bshc, q_bshr, c_btc, k_btr, scale):
    q_bshx = torch.cat((q_bshc, q_bshr), -1)
    k_bthx = torch.cat((c_btc, k_btr), -1)[:, :, None].expand(-1, -1, q_bshc.shape[2], -1)
    v_bthc = c_btc[:, :, None].expand(-1, -1, q_bshc.shape[2], -1)
    return attention(q_bshx, k_bthx, v_bthc, scale)


# %% [markdown]
# ## The latent cache


# %%
#| export
class LayerCache:
    """One layer's memory: per position a latent and a rotary key, (b, t, c + r), allocated once."""

    def __init__(self, c: Config, batch: int, max_len: int, device=None, dtype=None):
        width = c.kv_lora_rank + c.qk_rope_head_dim
        self.kv_btx = torch.zeros(batch, max_len, width, device=device, dtype=dtype)
        self.length = 0

    def append(self, kv_bsx):
        """Write s new positions and return all t positions so far."""
        end = self.length + kv_bsx.shape[1]
        if end > self.kv_btx.shape[1]:
            raise ValueError(f"cache holds {self.kv_btx.shape[1]} positions, {end} are needed")
        self.kv_btx[:, self.length : end] = kv_bsx
        self.length = end
        return self.kv_btx[:, :end]


# %% [markdown]
# ## The layer


# %%
#| export
class MLA(nn.Module):
    """Multi-head latent attention, eq. 1–11: (b, s, d) → (b, s, d)."""

    absorb: bool | None = None  # None: absorb when decoding one token, True always, False never

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        heads_q = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.wq_a = Linear(c.dim, c.q_lora_rank)
            self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
            self.wq_b = Linear(c.q_lora_rank, heads_q)
        else:
            self.wq = Linear(c.dim, heads_q)
        self.wkv_a = Linear(c.dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = RMSNorm(c.kv_lora_rank, c.norm_eps)
        self.wkv_b = Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.wo = Linear(c.n_heads * c.v_head_dim, c.dim)

    def queries(self, x_bsd, rope):
        """eq. 6–9: q = W^UQ RMSNorm(W^DQ x), its last r dims of each head turned."""
        c = self.config
        q = self.wq_b(self.q_norm(self.wq_a(x_bsd))) if c.q_lora_rank else self.wq(x_bsd)
        q = rearrange(q, "b s (h x) -> b s h x", h=c.n_heads)
        q_bshi, q_bshr = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_bshi, rotate(q_bshr, *rope)

    def latent(self, x_bsd, rope):
        """eq. 1 and 3: what is remembered, RMSNorm(W^DKV x) beside the turned key W^KR x."""
        c = self.config
        c_bsc, k_bsr = self.wkv_a(x_bsd).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        k_bsr = rotate(k_bsr[:, :, None], *rope)[:, :, 0]
        return torch.cat((self.kv_norm(c_bsc), k_bsr), dim=-1)

    def expanded(self, q_bshi, q_bshr, c_btc, k_btr):
        """eq. 2, 4, 5, 10: keys and values of every head from the latent (training, prefill)."""
        c = self.config
        kv = rearrange(self.wkv_b(c_btc), "b t (h x) -> b t h x", h=c.n_heads)
        k_bthi, v_bthv = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_bthr = k_btr[:, :, None].expand(-1, -1, c.n_heads, -1)
        q_bshx, k_bthx = torch.cat((q_bshi, q_bshr), -1), torch.cat((k_bthi, k_bthr), -1)
        return attention(q_bshx, k_bthx, v_bthv, softmax_scale(c))

    def absorbed(self, q_bshi, q_bshr, c_btc, k_btr):
        """The same without expanding: W^UK moves to the query, W^UV to the output (decoding)."""
        c = self.config
        w = rearrange(self.wkv_b.weight, "(h x) c -> h x c", h=c.n_heads)
        wk_hic, wv_hvc = w.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_bshc = einsum(q_bshi, wk_hic, "b s h i, h i c -> b s h c")
        o_bshc = latent_attention(q_bshc, q_bshr, c_btc, k_btr, softmax_scale(c))
        return einsum(o_bshc, wv_hvc, "b s h c, h v c -> b s h v")

    def forward(self, x_bsd, rope, cache: LayerCache | None = None):
        c = self.config
        q_bshi, q_bshr = self.queries(x_bsd, rope)
        kv = self.latent(x_bsd, rope)
        kv = kv if cache is None else cache.append(kv)
        c_btc, k_btr = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        decoding = cache is not None and x_bsd.shape[1] == 1
        absorb = decoding if self.absorb is None else self.absorb
        o_bshv = (self.absorbed if absorb else self.expanded)(q_bshi, q_bshr, c_btc, k_btr)
        return self.wo(rearrange(o_bshv, "b s h v -> b s (h v)"))
