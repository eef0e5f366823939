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
# # 02 · RoPE and YaRN: position as rotation

# %% [markdown]
# ## Why
# Attention compares a query with every key and does not care where they stand: shuffle the keys
# together with their values, and the result is the same. *Rotary position embedding* (RoPE) tells it
# where, by turning each pair of numbers in a query or key like the hand of a clock. V3's clock has
# **32 hands**, from one that turns every 6 tokens to one that needs 47 thousand.
#
# That is also a trap. V3 learnt to read at 4096 tokens, and **9 of the 32 hands** never finished a
# turn. At 128K they point where the model has never seen them. YaRN ("yet another RoPE extension",
# Peng et al., 2023) slows these hands down and lets the fast ones run.

# %%
#| export
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import Config
from dsv3_ref.ops import op

# %%
from dataclasses import replace

from einops import einsum

from dsv3_ref.config import TINY, V2_LITE, V3
from dsv3_ref.ops import use
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, attempt, figure, play, show


# %%
pair_j = torch.arange(32)
turn_j = 2 * math.pi * 10_000 ** (pair_j / 32)  # tokens per turn
unseen = turn_j > 4096
fig, ax = figure(width=8, height=3.2)
ax.plot(pair_j[~unseen], turn_j[~unseen], "o", color=BLUE, label="turned at least once in training")
ax.plot(pair_j[unseen], turn_j[unseen], "s", color=ORANGE, label="never finished a turn")
for length, text in [(4096, "pre-training: 4096 tokens"), (131_072, "use: 131,072 tokens")]:
    ax.axhline(length, color=GRAY, linestyle="--", linewidth=1)
    ax.text(0, length * 1.2, text, color=GRAY)
ax.set(yscale="log", ylim=(4, 500_000), xlabel="pair j of the 32", ylabel="tokens per turn (log)")
ax.set_title(
    f"{int(unseen.sum())} of 32 hands meet angles in long texts that training never showed"
)
ax.legend(loc="lower right")
show(fig)

# %% [markdown]
# ## Paper
# - MLA, V3's attention ([chapter 03](03_mla.ipynb)), splits each query and key into a part without
#   position and a **decoupled** part that carries RoPE (§2.1.1, eq. 3, 4, 8 and 9). The rotary key is 64
#   numbers, *one for all 128 heads*.
# - Pre-training reads 4K tokens. Two short phases of 1000 steps then extend the model to 32K and
#   128K with **YaRN, on the decoupled part only** (the report names the key; its query must turn at
#   the same pace), with $s = 40$, $\alpha = 1$, $\beta = 32$ and the scaling factor $0.1\ln s + 1$,
#   the same in both phases (§4.3). What these four do is explained below.
# - After that and after fine-tuning, the model finds a *needle in a haystack*, one sentence hidden in
#   up to 128K tokens of other text, at every depth (§4.3).

# %% [markdown]
# ## Frequencies
# A head's rotary part has $r$ numbers, taken as $r/2$ pairs. Per token, pair $j$ turns by the angle
#
# $$\omega_j = \theta^{-2j/r}\ \text{radians},\qquad \lambda_j = 2\pi/\omega_j\ \text{tokens per turn},
# \qquad j = 0 \dots r/2 - 1,$$
#
# with $\theta = 10{,}000$: a geometric ladder from fast hands, which tell neighbors apart, to slow
# ones, which tell the beginning of a text from its end.


# %%
#| export
def rope_freqs(rope_dim: int, theta: float) -> Tensor:
    """Return the angle per position of each of the r/2 pairs: ω_j = θ^(−2j/r) radians."""
    return theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)


# %%
freq_j = rope_freqs(64, 10_000.0)
assert freq_j[0] == 1 and len(freq_j) == 32
assert torch.allclose(freq_j[1:] / freq_j[:-1], freq_j[1] / freq_j[0])  # a ladder of equal steps
assert torch.allclose(2 * math.pi / freq_j, turn_j.double())
fig, ax = figure(width=8, height=2.8)
position = torch.arange(0, 101)
for level, (j, style) in enumerate({0: "-", 4: "--", 8: "-.", 16: ":"}.items()):
    ax.plot(position, (freq_j[j] * position).cos() - 2.5 * level, style, color=COLORS[level])
    ax.text(
        101, -2.5 * level, f"pair {j}: {2 * math.pi / freq_j[j]:.0f} tokens per turn", va="center"
    )
ax.set(xlabel="position (tokens)", ylabel="cos of the angle", yticks=[])
ax.set(xlim=(0, 135), xticks=range(0, 101, 20), ylim=(-9.5, 1.5))
ax.spines["bottom"].set_bounds(0, 100)
ax.set_title("Fast hands tell neighbors apart, slow ones keep the long count")
show(fig)


# %% [markdown]
# ## The rotation
# The rotation at position $t$, here called $R_t$, turns pair $j$ by $t\,\omega_j$:
#
# $$\begin{pmatrix} y_{2j} \\ y_{2j+1} \end{pmatrix} =
# \begin{pmatrix} \cos t\omega_j & -\sin t\omega_j \\ \sin t\omega_j & \cos t\omega_j \end{pmatrix}
# \begin{pmatrix} x_{2j} \\ x_{2j+1} \end{pmatrix} .$$
#
# Pairs are **neighbors**, $(x_0, x_1), (x_2, x_3), \dots$: the *interleaved* layout of the released
# weights. With a pair as one complex number, $z_j = x_{2j} + \mathrm{i}\,x_{2j+1}$, it is one product,
# $z_j\,e^{\mathrm{i}t\omega_j}$, which the [cpu backend](../dsv3_ref/cpu/fused.py) reads and writes once; the
# reference is the matrix as printed. Both rotate in fp32 and come back in the type of $x$: (b, s, h, r) → (b, s, h, r), with tables of cos and sin
# (s, r/2) for all rows and heads.


# %%
#| export
@op
def apply_rotary_emb(x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x₀, x₁) by their angles to (x₀cos − x₁sin, x₀sin + x₁cos).

    cos and sin are (s, r/2); the rotation is computed in fp32, the result has the dtype of x.
    """
    x0, x1 = x_bshr.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    pairs = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return pairs.flatten(-2).to(x_bshr.dtype)


# %% [markdown]
# Three properties make this a *position* embedding. Lengths stay, so nothing grows or fades. Turns
# add up, $R_s R_t = R_{s+t}$. And so the score of a query at $s$ with a key at $t$ depends on their
# **distance** alone:
#
# $$(R_s q)\cdot(R_t k) = q\cdot R_s^\top R_t\, k = q\cdot R_{t-s}\,k .$$


# %%
def angles(freq_j, position_s):
    """Return (cos, sin) of position · frequency, each (s, r/2)."""
    angle_sj = position_s[:, None].double() * freq_j
    return angle_sj.cos().float(), angle_sj.sin().float()


def turn(x_sr, position_s, freq_j):
    """Apply `apply_rotary_emb` to one head of one row: (s, r) → (s, r)."""
    return apply_rotary_emb(x_sr[None, :, None], *angles(freq_j, position_s))[0, :, 0]


torch.manual_seed(0)
freq_j = rope_freqs(8, 10_000.0)
position_s = torch.arange(5)
x_bshr = torch.randn(2, 5, 3, 8)
cos, sin = angles(freq_j, position_s)
with use("torch"):
    rotated_bshr = apply_rotary_emb(x_bshr, cos, sin)
z_bshj = torch.view_as_complex(x_bshr.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
assert torch.allclose(torch.view_as_real(z_bshj).flatten(-2), rotated_bshr, atol=1e-6)
assert torch.allclose(rotated_bshr.norm(dim=-1), x_bshr.norm(dim=-1))  # lengths stay
x_sr = torch.randn(5, 8)
twice = turn(turn(x_sr, position_s, freq_j), position_s + 7, freq_j)
assert torch.allclose(twice, turn(x_sr, 2 * position_s + 7, freq_j), atol=1e-5)  # turns add up

q_sr, k_tr = torch.randn(8).expand(5, 8), torch.randn(8).expand(5, 8)  # the same at every position
score_st = turn(q_sr, position_s, freq_j) @ turn(k_tr, position_s, freq_j).T
far_st = turn(q_sr, position_s + 1000, freq_j) @ turn(k_tr, position_s + 1000, freq_j).T
assert torch.allclose(score_st, far_st, atol=1e-4)  # a thousand tokens on: the same
for row in score_st:
    print(" ".join(f"{v:6.2f}" for v in row))
print("equal along every diagonal: only t − s matters")

# %% [markdown]
# ## Why only a part of each head
# In MLA the keys of all heads come from one cached latent, $k^C_t = W^{UK} c_t$ (eq. 2), and
# generation never builds them: $W^{UK}$ moves to the query once ([chapter 03](03_mla.ipynb)). A rotation
# would stand between:
#
# $$\underbrace{q \cdot W^{UK} c_t = (W^{UK\top} q)\cdot c_t}_{\text{one query for all } t}
# \qquad\text{but}\qquad q\cdot R_{t-s} W^{UK} c_t = (W^{UK\top} R_{t-s}^\top\, q)\cdot c_t ,$$
#
# a different query for each distance. So V3 keeps most of a head without position (*nope*), and puts
# position into an extra part: $q^R_t = \text{RoPE}(W^{QR} c^Q_t)$ for each head (eq. 8), $k^R_t =
# \text{RoPE}(W^{KR} h_t)$ for all heads together (eq. 3), where $h_t$ is the hidden state and $c^Q_t$ a
# latent of the queries. Concatenated (eq. 4, 9), their scores add:
#
# $$\text{score}_{st} = q^C_s\cdot k^C_t + q^R_s\cdot k^R_t .$$

# %%
w_ic, q_i = torch.randn(8, 6), torch.randn(8)
c_tc, position_t = torch.randn(20, 6), torch.arange(20)
plain_t = (c_tc @ w_ic.T) @ q_i
absorbed_c = w_ic.T @ q_i  # one query for all positions
assert torch.allclose(plain_t, c_tc @ absorbed_c, atol=1e-5)
turned_t = turn(c_tc @ w_ic.T, position_t, freq_j) @ q_i
best_c = torch.linalg.lstsq(c_tc, turned_t[:, None]).solution[:, 0]
missing = (turned_t - c_tc @ best_c).norm() / turned_t.norm()
print(f"with rotated keys even the best single query misses {missing:.0%} of the scores' size")
assert missing > 0.3

# decoupled: the sum is the score of the concatenated head; moving both tokens changes neither part
q_x, k_x = torch.randn(24), torch.randn(24)  # 16 without position, 8 rotary
for s, t in [(3, 1), (103, 101)]:
    q_r = turn(q_x[None, 16:], torch.tensor([s]), freq_j)[0]
    k_r = turn(k_x[None, 16:], torch.tensor([t]), freq_j)[0]
    nope, rotary = q_x[:16] @ k_x[:16], q_r @ k_r
    assert torch.isclose(nope + rotary, torch.cat((q_x[:16], q_r)) @ torch.cat((k_x[:16], k_r)))
    print(f"query at {s}, key at {t}: without position {nope:.2f}, rotary {rotary:.2f}")

# %% [markdown]
# ## A trap: two layouts
# Many code bases pair number $j$ with number $j + r/2$ instead of its neighbor: the *half-split*
# layout, `cat(x1·cos − x2·sin, x2·cos + x1·sin)`. Both are the same rotation after the reordering
#
# $$P:\ (x_0, x_1, x_2, \dots) \mapsto (x_0, x_2, x_4, \dots,\ x_1, x_3, x_5, \dots),\qquad
# \text{half}(P x) = P\,\text{interleaved}(x).$$
#
# A score does not see $P$ if query *and* key carry it, so one may reorder the rows of the weights
# once. But interleaved weights under half-split code give no error: shapes fit, lengths stay, even
# the scores at distance 0 are right. The others are wrong.


# %%
def half_split(x_sr, position_s, freq_j):
    """Rotate in the other layout, in which pair j is (x_j, x_{j + r/2})."""
    cos, sin = angles(freq_j, position_s)
    x1, x2 = x_sr.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


order_r = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))  # P
q_sr, k_sr = torch.randn(2, 5, 8)
right_st = turn(q_sr, position_s, freq_j) @ turn(k_sr, position_s, freq_j).T
q_half, k_half = (half_split(x[:, order_r], position_s, freq_j) for x in (q_sr, k_sr))
assert torch.allclose(q_half, turn(q_sr, position_s, freq_j)[:, order_r], atol=1e-6)
assert torch.allclose(right_st, q_half @ k_half.T, atol=1e-5)
wrong_st = half_split(q_sr, position_s, freq_j) @ half_split(k_sr, position_s, freq_j).T
assert torch.allclose(wrong_st.diag(), right_st.diag(), atol=1e-5)  # distance 0 hides it
print("distance ", *[f"{d:6d}" for d in range(5)])
print("right    ", *[f"{v:6.2f}" for v in right_st[4].flip(0)])
print("unnoticed", *[f"{v:6.2f}" for v in wrong_st[4].flip(0)])
assert (wrong_st - right_st).abs().max() > 1


# %% [markdown]
# ## YaRN's ramp
# To read $s$ times farther one could slow every hand by $s$ (*position interpolation*). No angle
# would be new, but with $s = 40$ neighbors would differ by a 40th of what the model learnt. YaRN treats
# each hand by how often it turned within the trained length $L$. Hands with more than $\beta = 32$ turns
# are left alone: they have seen all angles. Hands with less than $\alpha = 1$ turn are slowed fully.
# Between them is a ramp over $j$,
#
# $$\rho_j = \text{clamp}\Big(\frac{j - j_\text{low}}{j_\text{high} - j_\text{low}},\,0,\,1\Big),\qquad
# j(n) = \frac{r\,\ln\frac{L}{2\pi n}}{2\ln\theta},\quad
# j_\text{low} = \lfloor j(\beta)\rfloor,\ j_\text{high} = \lceil j(\alpha)\rceil ,$$
#
# where $j(n)$ solves $L/\lambda_j = n$ turns. This is the ramp of the released code, linear in the index $j$; YaRN's paper makes it linear
# in the number of turns $L/\lambda_j$. The config calls $\beta$ `beta_fast` and $\alpha$
# `beta_slow`.


# %%
#| export
def yarn_ramp(
    rope_dim: int, theta: float, length: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """Return how far each of the r/2 pairs is interpolated, from 0 to 1.

    The value is 0 for pairs that turn more than β_fast times within `length` positions, 1 for
    those that turn fewer than β_slow times, and linear in the pair's number between.
    """

    def correction_dim(num_rotations: float) -> float:
        """Return the fractional number of the pair that turns `num_rotations` times."""
        return rope_dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(beta_fast)), 0)
    high = min(math.ceil(correction_dim(beta_slow)), rope_dim - 1)
    j = torch.arange(rope_dim // 2, dtype=torch.float64)
    return ((j - low) / max(high - low, 0.001)).clamp(0, 1)


# %%
ramp_j = yarn_ramp(64, 10_000.0, 4096, beta_fast=32.0, beta_slow=1.0)
turns_j = 4096 / turn_j
assert (ramp_j[turns_j > 32] == 0).all() and (ramp_j[turns_j < 1] == 1).all()
for j in (0, 10, 11, 16, 22, 23, 31):
    print(f"pair {j:2}: {turns_j[j]:7.2f} turns in 4096 tokens, {ramp_j[j]:4.0%} of the way to ω/s")
kinds = [int(x.sum()) for x in (ramp_j == 0, (ramp_j > 0) & (ramp_j < 1), ramp_j == 1)]
print("kept, between, slowed:", *kinds)
assert kinds == [11, 12, 9]


# %% [markdown]
# ## YaRN's frequencies
# The ramp mixes the two frequencies of a pair:
#
# $$\omega'_j = (1 - \rho_j)\,\omega_j + \rho_j\,\frac{\omega_j}{s} .$$


# %%
#| export
def yarn_freqs(config: Config) -> Tensor:
    """Return YaRN's angle per position of each pair, (r/2,): ω' = (1−ρ)ω + ρω/s (§4.3)."""
    freqs = rope_freqs(config.qk_rope_head_dim, config.rope_theta)
    if config.rope_factor == 1:
        return freqs
    ramp = yarn_ramp(
        config.qk_rope_head_dim,
        config.rope_theta,
        config.original_seq_len,
        config.beta_fast,
        config.beta_slow,
    )
    return freqs * (1 - ramp) + freqs / config.rope_factor * ramp


# %%
before_j, after_j = rope_freqs(64, V3.rope_theta), yarn_freqs(V3)
assert torch.equal(yarn_freqs(replace(V3, rope_factor=1.0)), before_j)  # s = 1: plain RoPE
assert torch.equal(after_j[:11], before_j[:11]) and torch.allclose(after_j[23:], before_j[23:] / 40)
# what was unseen is gone: at the far end the slow hands stand where they stood at 4096
assert torch.allclose(after_j[23:] * V3.max_seq_len, before_j[23:] * V3.original_seq_len)
for j in (0, 10, 16, 23, 31):
    old, new = (2 * math.pi / f[j] for f in (before_j, after_j))
    print(f"pair {j:2}: {old:9.1f} → {new:11.1f} tokens per turn")


# %% [markdown]
# ## A sharper softmax
# Forty times as many keys also share the softmax, and each irrelevant one takes a little. YaRN
# multiplies queries and keys by $0.1\,m\ln s + 1$ each, hence scores by its square ($m$ is the config's
# `mscale`). It costs nothing if it goes into the softmax scale (eq. 10 divides by $\sqrt{d_h + d_h^R}$,
# here $\sqrt{i + r}$):
#
# $$\text{scale} = \frac{(0.1\,m\ln s + 1)^2}{\sqrt{i + r}},\qquad
# \text{V3: } m = 1,\ s = 40:\quad 1.369^2 = 1.874 .$$
#
# The whole score is sharpened, *nope* part included. V2-Lite has $m = 0.707$.


# %%
#| export
def softmax_scale(config: Config) -> float:
    """Return 1/√(i+r), times YaRN's (0.1·m·ln s + 1)² when s > 1."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return scale * (0.1 * config.mscale * math.log(config.rope_factor) + 1) ** 2


# %%
factor = softmax_scale(V3) * math.sqrt(128 + 64)
assert abs(factor - 1.8739) < 1e-4
assert (
    softmax_scale(TINY) == (TINY.qk_nope_head_dim + TINY.qk_rope_head_dim) ** -0.5
)  # s = 1: no factor
assert abs(softmax_scale(V2_LITE) * math.sqrt(192) - (0.0707 * math.log(40) + 1) ** 2) < 1e-12
# one key that matters, 6 deviations above n − 1 that do not
print("attention on the right key:")
for n in (4096, 163_840):
    noise_t = 2 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    noise_t[0] = 12.0
    plain, sharp = ((k * noise_t).softmax(0)[0] for k in (1.0, factor))
    print(f"  {n:>7,} keys: plain {plain:.2f}, sharpened {sharp:.2f}")


# %% [markdown]
# ## The table
# A model needs cos and sin of its positions once for all layers. Positions are multiplied in fp64: at
# 163,840 an fp32 angle is off by nearly 0.01 radians, and in bf16, whose 8 bits cannot even count to
# 257, it would be noise. Where short samples fill a row together (fine-tuning), each counts from 0.


# %%
#| export
def rope_cos_sin(config: Config, position_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of positions, each (s, r/2) in fp32."""
    angle = position_s[:, None].double() * yarn_freqs(config).to(position_s.device)
    return angle.cos().float(), angle.sin().float()


def to_cu_seqlens(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return the bounds of m samples laid end to end: 0 and the sums of lengths, (m + 1,) int32."""
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()


class Rope(NamedTuple):
    """Rotations of a layer's input positions, and which keys they may attend to."""

    cos: Tensor  # (s, r/2), float32
    sin: Tensor
    cu_seqlens: Tensor | None = None  # (m + 1,): 0 and where each of m samples ends, if packed
    attend: Callable[..., Tensor] | None = None  # if keys are on other ranks, too (chapter 13)

    @classmethod
    def from_positions(cls, config: Config, position_s: Tensor) -> "Rope":
        """Compute the rotations of one sample at these positions."""
        return cls(*rope_cos_sin(config, position_s))

    @classmethod
    def from_cu_seqlens(
        cls, config: Config, cu_seqlens: Tensor, num_tokens: int | None = None
    ) -> "Rope":
        """Compute the rotations of samples laid end to end; positions restart at 0 in each.

        num_tokens: of all samples; if it is given, the host need not wait for a GPU.
        """
        length_m = cu_seqlens.diff()
        start_n = cu_seqlens[:-1].repeat_interleave(length_m, output_size=num_tokens)
        position_n = torch.arange(len(start_n), device=cu_seqlens.device) - start_n
        return cls(*rope_cos_sin(config, position_n), cu_seqlens)


# %%
position_s = torch.arange(163_840 - 64, 163_840)
cos_sj, sin_sj = rope_cos_sin(V3, position_s)
assert cos_sj.shape == (64, 32) and cos_sj.dtype == torch.float32
assert torch.allclose(cos_sj.square() + sin_sj.square(), torch.ones(64, 32))
for dtype in (torch.float32, torch.bfloat16):
    angle_sj = position_s.to(dtype)[:, None] * yarn_freqs(V3).to(dtype)
    print(f"largest error of cos in {dtype}: {(angle_sj.float().cos() - cos_sj).abs().max():.0e}")
whole, late = rope_cos_sin(V3, torch.arange(10)), rope_cos_sin(V3, torch.arange(7, 10))
assert torch.equal(whole[0][7:], late[0])  # decoding continues where prefill stopped
packed = Rope.from_cu_seqlens(V3, to_cu_seqlens([4, 6]))
assert torch.equal(packed.cos, torch.cat((whole[0][:4], whole[0][:6])))

# %% [markdown]
# ## A trap: when is YaRN on?
# Here `rope_factor` alone decides, and V3 is stretched **even for a text of ten tokens**: the
# released weights were trained further with these frequencies. Some code bases switch YaRN on only if
# the maximum length they were *started* with exceeds 4096; the same weights then answer differently
# in a short session. Switching by the *current* length is worse still. Keys lie in the cache
# already turned, so beyond token 4096 a query with new frequencies $\omega'$ would meet keys that
# were turned with $\omega$,
#
# $$(R'_s q)\cdot(R_t k) = q\cdot R_s'^\top R_t\,k,\qquad
# \text{which turns each pair by}\ t\,\omega_j - s\,\omega'_j .$$
#
# That is no longer a function of the distance $s - t$. Nothing fails; the text just goes bad.

# %%
at, short = torch.tensor([10, 1000, 4095]), replace(V3, max_seq_len=64)
assert torch.equal(rope_cos_sin(short, at)[0], rope_cos_sin(V3, at)[0])  # no length is asked for
assert not torch.allclose(rope_cos_sin(V3, at)[0], angles(before_j, at)[0], atol=1e-2)
x_sr = torch.randn(64, generator=torch.Generator().manual_seed(0)).expand(3, 64)
q_sr, cached = turn(x_sr, at, after_j), {"same": after_j, "plain": before_j}
by_cache = {name: (q_sr * turn(x_sr, at - 5, f)).sum(-1) for name, f in cached.items()}
print("five tokens apart, query at  " + "".join(f"{int(s):8}" for s in at))
for name, score_s in by_cache.items():
    print(f"keys cached with {name:6} freqs " + "".join(f"{v:8.2f}" for v in score_s))
assert (by_cache["same"] - by_cache["same"][0]).abs().max() < 1e-2  # distance alone
assert (by_cache["plain"] - by_cache["plain"][0]).abs().max() > 5

# %% [markdown]
# ## Experiment: read eight times farther
# Does it work? Two attention heads of nothing but rotary dims (32 of them, so that position cannot be
# avoided), trained for a second at **128** tokens:
#
# - the **near** head must look exactly three tokens back. It has only position to go by;
# - the **needle** head gets a copy of one random key and must find where it stands, anywhere
#   before. Position should not matter to it.
#
# Their loss is $-\log$ of the attention on the right token. Then we read up to 1024 tokens with
# $s = 8$ *without any further training*, in four ways: unchanged; every hand slowed; YaRN's
# frequencies; and these with the sharper softmax. ($\theta$, $\alpha$ and $\beta$ are V3's.)

# %%
R, TRAINED = 32, 128
S, STEPS = 8.0, 300
MINI = replace(V3, qk_rope_head_dim=R, original_seq_len=TRAINED, rope_factor=S)
PLAIN = rope_freqs(R, MINI.rope_theta)
SHARP = (0.1 * math.log(S) + 1) ** 2
WAYS = {
    "unchanged": (PLAIN, 1.0),
    "all slowed": (PLAIN / S, 1.0),
    "YaRN": (yarn_freqs(MINI), 1.0),
    "YaRN, sharper": (yarn_freqs(MINI), SHARP),
}


def log_attention(q_bnr, k_btr, position_n, right_bn, freq_j, sharp):
    """Return log of the causal attention of queries at `position_n` on their right tokens, (b, n)."""
    position_t = torch.arange(k_btr.shape[1])
    q_bnr = apply_rotary_emb(q_bnr[:, :, None], *angles(freq_j, position_n))[:, :, 0]
    k_btr = apply_rotary_emb(k_btr[:, :, None], *angles(freq_j, position_t))[:, :, 0]
    score_bnt = einsum(q_bnr, k_btr, "b n r, b t r -> b n t") * sharp / math.sqrt(R)
    score_bnt = score_bnt.masked_fill(position_t > position_n[:, None], -torch.inf)
    return score_bnt.log_softmax(-1).gather(2, right_bn[..., None])[..., 0]


def both_heads(heads, length: int, freq_j, sharp, source, batch: int = 8):
    """Return (near, needle) log attention of the last tokens of random texts, (1, n) and (b, n)."""
    wq, wk, q_near, k_near = heads
    position_n = torch.arange(max(3, length - 120), length)
    n = len(position_n)
    key_btr = torch.randn(batch, length, R, generator=source)
    right_bn = (torch.rand(batch, n, generator=source) * (position_n + 1)).long()
    query_bnr = key_btr.gather(1, right_bn[..., None].expand(-1, -1, R))
    needle_bn = log_attention(query_bnr @ wq, key_btr @ wk, position_n, right_bn, freq_j, sharp)
    q, k = q_near.expand(1, n, R), k_near.expand(1, length, R)
    return log_attention(q, k, position_n, (position_n - 3)[None], freq_j, sharp), needle_bn


source = torch.Generator().manual_seed(0)
shapes = [(R, R), (R, R), (R,), (R,)]
heads = [torch.randn(s, generator=source) * (R**-0.5 if len(s) > 1 else 1.0) for s in shapes]
optimizer = torch.optim.Adam([p.requires_grad_() for p in heads])
for step in range(STEPS):
    optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
    near, needle = both_heads(heads, TRAINED, PLAIN, 1.0, source)
    loss = -near.mean() - needle.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"at {TRAINED} tokens: near {near.exp().mean():.1f}, needle {needle.exp().mean():.1f}")

# %%
lengths, attention = [128, 256, 512, 1024], {}
with torch.no_grad():
    for way, (freq_j, sharp) in WAYS.items():
        for length in lengths:
            source = torch.Generator().manual_seed(1)
            pair = both_heads(heads, length, freq_j, sharp, source, batch=32)
            attention[way, length] = [x.exp().mean().item() for x in pair]

fig, axes = figure(1, 2, width=8.6, height=3.3, sharey=True)
looks = {"unchanged": ("s--", GRAY, 6), "all slowed": ("^:", BLUE, 11), "YaRN": ("o-", ORANGE, 7)}
looks["YaRN, sharper"] = ("D-.", GREEN, 4)
titles = ["three tokens back: lost if all are slowed", "needle: lost if unchanged"]
for head, (ax, name) in enumerate(zip(axes, titles)):
    for way, (style, color, size) in looks.items():
        y = [attention[way, n][head] for n in lengths]
        ax.plot(lengths, y, style, color=color, label=way, markersize=size, markerfacecolor="none")
    ax.axvline(TRAINED, color=GRAY, linewidth=1, linestyle=":")
    ax.set(xscale="log", xlabel="length read (trained: 128)", title=name, ylim=(-0.06, 1.04))
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.minorticks_off()
axes[0].set_ylabel("attention on the right token")
axes[0].legend(loc="center left", bbox_to_anchor=(0.06, 0.4))
show(fig)
for way in WAYS:
    near, needle = attention[way, 1024]
    print(f"{way:14} at 1024: near {near:.2f}, needle {needle:.2f}")
(yarn_near, yarn_needle), (sharper_near, _) = (
    attention["YaRN", 1024],
    attention["YaRN, sharper", 1024],
)
assert attention["unchanged", 1024][1] < 0.4 < 0.6 < yarn_needle  # the needle is lost, found
assert attention["all slowed", 1024][0] < 0.1 < 0.8 < yarn_near  # neighbors blur, or not
assert sharper_near > yarn_near

# %% [markdown]
# Left alone, the slow hands betray the needle head; all slowed, the near head can no longer count to
# three; YaRN keeps both. The sharper softmax mends the near head, which YaRN's half-slowed hands had
# blurred a little, and hardly helps the needle. That one is not yet found as surely as at 128, for it
# competes with eight times as many keys; the report trains 2000 steps more.

# %% [markdown]
# ## Play
# What do $s$, $\beta$ and $\theta$ do? Left: how much each pair is slowed. Right: tokens per turn
# before and after. Look for the kept fast pairs, the ramp, and slow pairs that move up in parallel.
# A larger $\theta$ makes hands slower from the start (many models go that way instead).


# %%
def yarn(s: float = 40.0, beta_fast: float = 32.0, beta_slow: float = 1.0, theta: float = 10_000.0):
    """Draw V3's ramp and wavelengths with these settings."""
    c = replace(V3, rope_factor=s, beta_fast=beta_fast, beta_slow=beta_slow, rope_theta=theta)
    r, length = c.qk_rope_head_dim, c.original_seq_len
    ramp_j = yarn_ramp(r, theta, length, beta_fast, beta_slow)
    old_j, new_j = (2 * math.pi / f for f in (rope_freqs(r, theta), yarn_freqs(c)))
    fig, (left, right) = figure(1, 2, width=8.6, height=3.4)
    left.plot(100 * ramp_j, "o-", color=ORANGE, markersize=4)
    left.set(xlabel="pair j", ylabel="slowed, % of the way to 1/s", ylim=(-4, 104))
    left.set_title(
        f"{int((ramp_j == 0).sum())} pairs kept, {int((ramp_j == 1).sum())} slowed fully"
    )
    right.plot(old_j, "o", color=GRAY, markersize=4, label="RoPE")
    right.plot(new_j, "D", color=ORANGE, markersize=4, label=f"YaRN, s = {s:g}")
    for tokens, text in [(length, "trained"), (length * s, "s times trained")]:
        right.axhline(tokens, color=GRAY, linestyle=":", linewidth=1)
        right.text(0, tokens * 1.15, f"{text}: {tokens:,.0f}", color=GRAY, fontsize=9)
    right.set(yscale="log", xlabel="pair j", ylabel="tokens per turn (log)")
    right.set_title(f"softmax scale × {(0.1 * math.log(s) + 1) ** 2:.2f}")
    right.legend(loc="lower right")
    show(fig)


yarn()

# %%
play(
    yarn,
    s=[40.0, 1.0, 4.0, 8.0, 160.0],
    beta_fast=[32.0, 4.0, 8.0, 16.0, 128.0],
    beta_slow=[1.0, 0.25, 0.5, 2.0],
    theta=[10_000.0, 1000.0, 100_000.0, 1_000_000.0],
)

# %% [markdown]
# The same with $\theta$ a hundred times as large: more hands are slow, so more must be slowed
# further.

# %%
yarn(theta=1_000_000.0)

# %% [markdown]
# ## Exercises
# Fill in the functions that return `...`; the checkers defined here say how you did.


# %%
def check_unseen(fn) -> bool:
    """Check that `fn(theta, r, length)` counts the pairs that finish no turn in `length` tokens."""

    def test():
        for theta, r, n in [(1e4, 64, 4096), (1e6, 64, 4096), (1e4, 32, 256), (1e4, 64, 100_000)]:
            lap_j = 2 * math.pi / rope_freqs(r, theta)
            if fn(theta, r, n) - int((lap_j > n).sum()) != 0:
                return False
        return True

    return attempt(test, "how many tokens are a full turn of pair j? how many pairs are there?")


def check_score(fn) -> bool:
    """Check that `fn(angle)` is the score of x with itself turned by `angle` in each pair."""

    def test():
        x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
        flat = torch.zeros(2, dtype=torch.float64)
        for angle in (0.0, 0.3, math.pi, 5.0):
            score = (turn(x, torch.tensor([1]), flat + angle) @ x[0]).item()
            if abs(fn(angle) - score) > 1e-4:
                return False
        return True

    return attempt(test, "x = (3, 4, 0, 0): which pair has any length, and what is a·b in a plane?")


def check_alias(fn) -> bool:
    """Check that `fn()` is a distance ≤ 4096 at which the fastest hand is back to 1e-4 radians."""

    def test():
        d = fn()
        off = abs(math.remainder(d, 2 * math.pi))
        return d == int(d) and 1 <= d <= 4096 and off < 1e-4

    return attempt(test, "d radians must be nearly a whole number of turns: halves do not count")


def check_rows(fn) -> bool:
    """Check that rows in the order of `fn(weight_oi, heads)` give half-split code the same scores."""

    def test():
        source = torch.Generator().manual_seed(2)
        wq, wk = torch.randn(2, 3 * 8, 6, generator=source)
        x, at = torch.randn(4, 6, generator=source), torch.arange(4)
        freq = rope_freqs(8, 100.0)

        def head(w, h):
            return x @ w.unflatten(0, (3, 8))[h].T

        for h in range(3):
            want = turn(head(wq, h), at, freq) @ turn(head(wk, h), at, freq).T
            q, k = (half_split(head(fn(w, 3), h), at, freq) for w in (wq, wk))
            if not torch.allclose(q @ k.T, want, atol=1e-3):
                return False
        return True

    return attempt(test, "it is P, but of which rows? each head has pairs of its own")


# %% [markdown]
# **1 · Compute.** How many pairs never finish a turn within `length` tokens?


# %%
def my_unseen(theta: float, r: int, length: int) -> int:
    return ...


check_unseen(my_unseen)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_unseen(theta, r, length):
#     return sum(2 * math.pi * theta ** (2 * j / r) > length for j in range(r // 2))
# ```
#
# 9 for V3; with θ = 1,000,000 it would be 16.
# </details>
#
# **2 · Predict.** $x = (3, 4, 0, 0)$ is turned by `angle` in both pairs. What is its score with the
# unturned $x$?


# %%
def my_score(angle: float) -> float:
    return ...


check_score(my_score)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_score(angle):
#     return 25 * math.cos(angle)
# ```
#
# Length squared times the cosine; the empty pair adds nothing. A hand that turns by π makes a match
# look like an opposite: this is what lost the needle.
# </details>
#
# **3 · Break.** One hand alone confuses distances. Find a distance below 4096 at which the fastest
# hand (1 radian per token) is back where it was, to 0.0001 radians. (π is nearly 355/113.)


# %%
def my_alias() -> int:
    return ...


check_alias(my_alias)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_alias():
#     return 710
# ```
#
# 710 = 2 · 355 is 113 turns, but for 0.00006 radians. The other hands tell the two apart.
# </details>
#
# **4 · Extend.** Reorder the rows of an interleaved weight (heads · r, in) for half-split code.


# %%
def my_rows(weight_oi, heads: int):
    return ...


check_rows(my_rows)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_rows(weight_oi, heads):
#     pairs = weight_oi.unflatten(0, (heads, -1, 2))
#     return pairs.transpose(1, 2).flatten(0, 2)
# ```
#
# In a full head, only the last $r$ rows move; the *nope* rows stay.
# </details>

# %% [markdown]
# ## Scale-up
# What does position cost at 671B?

# %%
heads = V3.n_heads + 1  # every query head, and one key for all
pairs = V3.qk_rope_head_dim // 2
flops = V3.n_layers * heads * pairs * 6  # four products and two sums per pair
moved = V3.n_layers * heads * V3.qk_rope_head_dim * 2 * 2  # read and written in bf16
table_bytes = V3.max_seq_len * pairs * 2 * 4
share = V3.qk_rope_head_dim / (V3.kv_lora_rank + V3.qk_rope_head_dim)
print(f"operations: {flops / 1e6:.1f} MFLOPs per token, {flops / 73.3e9:.3%} of its products")
print(
    f"traffic: {moved / 1e6:.1f} MB per token, {moved / flops:.1f} bytes per operation: bound by memory"
)
print(f"table of all {V3.max_seq_len:,} positions: {table_bytes / 1e6:.0f} MB, once for all layers")
print(
    f"cache: the rotary key is {share:.0%} of it; per head it would be {128 * 64 / 576:.0f}× the whole"
)
phases = {"32K": 1000 * 1920 * 32_768, "128K": 1000 * 480 * 131_072}
for name, tokens in phases.items():
    print(
        f"extension to {name}: {tokens / 1e9:.0f}B tokens, {tokens / 14.8e12:.2%} of pre-training"
    )
assert phases["32K"] == phases["128K"]

# %% [markdown]
# RoPE is **bound by memory traffic**: a kernel turns $q^R$ and $k^R$ where they are read or written
# anyway, inside the attention kernel or just before the cache. It registers as
# `@impl("apply_rotary_emb", "triton")`. Each GPU computes the table for its own positions, so no division of the
# work among GPUs has to know of it.
#
# The 1,000 steps of either phase read the same number of tokens, and yet the second costs more:
# attention's own work grows with length ([chapter 00](00_tour.ipynb)). Next:
# [03 · MLA](03_mla.ipynb), where these 64 numbers meet the latent.
