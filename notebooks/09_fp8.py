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
# # 09 · FP8: reading eight-bit weights

# %% [markdown]
# ## Why
# The released weights of DeepSeek-V3 take one byte a parameter: **671 GB** instead of 1,342. They
# were trained that way, not squeezed afterwards. Eight bits in E4M3 form (one sign, four exponent,
# three mantissa bits) name only 253 finite numbers, from $2^{-9}$ to 448. A whole matrix does not
# fit between those two, so each block of 128 × 128 weights brings a scale of its own. This chapter
# holds what is needed to *read* such weights; the recipe for training with them comes in a later
# edition.

# %%
import torch

from dsv3_ref.config import V3, count
from dsv3_ref.viz import BLUE, GREY, ORANGE, attempt, figure, play, show

torch.manual_seed(0)
code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
finite = code[code.isfinite()]
fig, ax = figure(width=7, height=1.8)
ax.vlines(finite[finite > 0].tolist(), 0, 1, color=BLUE, lw=0.8)
ax.set(xscale="log", yticks=[], xlabel="positive values of E4M3 (logarithmic axis)")
ax.set_xscale("log", base=2)
ax.set_title("Eight steps to each power of two, and an end at 448")
show(fig)
assert finite.unique().numel() == 253 and finite.max() == 448
assert finite[finite > 0].min() == 2**-9

# %% [markdown]
# ## What the report says
# Section 3.3.2: activations are scaled in tiles of 1 × 128, weights in blocks of 128 × 128, so that
# one outlier spoils at most its own block. The file stores the codes, and beside each weight a
# small matrix `weight_scale_inv`, by which the codes are *multiplied*, whatever its name says.

# %% [markdown]
# ## Blocks of 128 × 128
# A weight has shape $(o, i)$, its scales $(\lceil o/128\rceil, \lceil i/128\rceil)$, and
#
# $$w_{oi} = q_{oi}\; s_{\lfloor o/128\rfloor,\,\lfloor i/128\rfloor}$$
#
# The edge is where readers go wrong. MLA's `wkv_a` has $512 + 64 = 576 = 4.5\cdot128$ rows: the
# last block is half a block, and its scale is the fifth, not a fraction of the fourth.


# %%
#| export
def weight_dequant(q_oi, scale_zz, block: int = 128):
    """fp32 weight from codes and one scale a block: w_oi = q_oi · s[⌊o/128⌋, ⌊i/128⌋] (§3.3.2)."""
    o, i = q_oi.shape
    want = (-(-o // block), -(-i // block))
    if tuple(scale_zz.shape) != want:
        raise ValueError(f"a weight of {o}×{i} needs scales {want}, not {tuple(scale_zz.shape)}")
    rows = scale_zz.float().repeat_interleave(block, 0)[:o]
    return q_oi.float() * rows.repeat_interleave(block, 1)[:, :i]


# %% [markdown]
# The check quantises a matrix with ragged edges the plain way, block by block, and reads it back. A
# code has three mantissa bits, so a value is off by at most $2^{-4}$ of itself, or half the finest
# step.

# %%
w_oi = torch.randn(576, 200) * 0.02
w_oi[300, 50] = 3.0  # one outlier


def quantise(w_oi, block: int = 128):
    """Codes and scales, by two loops: each block's largest value becomes 448."""
    o, i = w_oi.shape
    q_oi = torch.empty(o, i, dtype=torch.float8_e4m3fn)
    scale_zz = torch.empty(-(-o // block), -(-i // block))
    for y in range(0, o, block):
        for x in range(0, i, block):
            part = w_oi[y : y + block, x : x + block]
            s = part.abs().max() / 448
            scale_zz[y // block, x // block] = s
            q_oi[y : y + block, x : x + block] = (part / s).to(torch.float8_e4m3fn)
    return q_oi, scale_zz


q_oi, scale_zz = quantise(w_oi)
back_oi = weight_dequant(q_oi, scale_zz)
step_oi = scale_zz.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200] * 2**-10
assert ((back_oi - w_oi).abs() <= torch.maximum(w_oi.abs() / 16, step_oi) * 1.0001).all()
print("scales of a 576 × 200 weight:", tuple(scale_zz.shape))

try:
    weight_dequant(q_oi, scale_zz[:4])
except ValueError as e:
    print("four scales for 4.5 blocks:", e)

# %% [markdown]
# ## Experiment: what one outlier costs
# The same matrix, once with a scale for each block and once with a single scale for all of it. The
# outlier makes the single scale coarse for everyone; with blocks only its neighbours pay.


# %%
def error(block: int, outlier: float) -> float:
    """Root mean square error over all weights but the outlier, relative to their own size."""
    w = w_oi.clone()
    w[300, 50] = outlier
    off = weight_dequant(*quantise(w, block), block) - w
    off[300, 50] = 0
    return (off.norm() / w_oi.std() / off.numel() ** 0.5).item()


outliers = [0.02 * 10**x for x in range(7)]
fig, ax = figure(width=6.5, height=2.8)
for block, label, colour, line in ((1024, "one scale", ORANGE, "--"), (128, "blocks", BLUE, "-")):
    ax.plot(
        outliers, [error(block, o) for o in outliers], line, marker="o", color=colour, label=label
    )
ax.set(xscale="log", yscale="log", xlabel="size of the one outlier", ylabel="relative error")
ax.set_title("With blocks, an outlier spoils no block but its own")
ax.legend()
show(fig)
assert error(1024, 2e4) > 2 * error(128, 2e4)


# %% [markdown]
# ## Play: a number in eight bits


# %%
def draw_code(value: float = 0.3):
    near = torch.tensor(value).to(torch.float8_e4m3fn).float().item()
    fig, ax = figure(width=7, height=1.8)
    lo, hi = value * 0.6, value * 1.4 + 0.01
    ax.vlines(finite[(finite > lo) & (finite < hi)].tolist(), 0, 0.6, color=GREY)
    ax.vlines([value], 0, 1, color=ORANGE, ls="--", label=f"asked for {value:.3f}")
    ax.vlines([near], 0, 0.8, color=BLUE, lw=3, label=f"stored {near:.4f}")
    ax.set(yticks=[], xlabel="value")
    ax.set_title("Stored is the nearest tick")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(fig)


draw_code(0.3)

# %%
play(draw_code, value=(0.02, 2.0, 0.01))

# %% [markdown]
# ## Exercises
# Fill in the function, run the cell, and let the check tell.


# %%
def check_scales(fn) -> bool:
    cases = [(576, 7168), (128, 128), (129, 1), (7168, 2048)]
    return attempt(
        lambda: all(fn(o, i) == -(-o // 128) * -(-i // 128) * 4 for o, i in cases),
        "one fp32 scale a block, and a ragged edge is a block too",
    )


def check_decode(fn) -> bool:
    return attempt(
        lambda: all(fn(i) == code[i].item() for i in range(256) if code[i].isfinite()),
        "exponent 0 is subnormal: no hidden 1, and the exponent of 1",
    )


def check_dequant(fn) -> bool:
    w = torch.randn(300, 140)
    q, s = quantise(w)
    return attempt(
        lambda: torch.allclose(fn(q, s), weight_dequant(q, s)), "which block is row o, column i in?"
    )


# %% [markdown]
# **1 · Compute.** How many bytes do the fp32 scales of an $(o, i)$ weight take?


# %%
def my_scales(o: int, i: int) -> int:
    return ...


check_scales(my_scales)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_scales(o, i):
#     return ((o + 127) // 128) * ((i + 127) // 128) * 4
# ```
#
# For large weights that is 4 bytes to 16,384: 0.02 %.
# </details>

# %% [markdown]
# **2 · Decode.** Turn an E4M3 code (0 … 255) into its value by its bits: sign, 4 exponent bits with
# bias 7, 3 mantissa bits.


# %%
def my_decode(byte: int) -> float:
    return ...


check_decode(my_decode)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_decode(byte):
#     sign = -1.0 if byte & 0x80 else 1.0
#     exponent, mantissa = (byte >> 3) & 15, byte & 7
#     if exponent == 0:
#         return sign * mantissa / 8 * 2.0 ** -6
#     return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
# ```
#
# The two codes with all seven bits set are NaN; E4M3 has no infinity.
# </details>

# %% [markdown]
# **3 · Break and mend.** Write `weight_dequant` without `repeat_interleave`, by indexing the
# scales.


# %%
def my_dequant(q_oi, scale_zz):
    return ...


check_dequant(my_dequant)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_dequant(q_oi, scale_zz):
#     o, i = torch.arange(q_oi.shape[0]) // 128, torch.arange(q_oi.shape[1]) // 128
#     return q_oi.float() * scale_zz[o[:, None], i[None, :]]
# ```
# </details>

# %% [markdown]
# ## Scale-up
# Embedding, head, gates and norms stay in bf16 and fp32 (section 3.3.1); all other weights are
# codes.

# %%
bf16 = 2 * V3.vocab_size * V3.dim + 58 * V3.n_routed_experts * V3.dim
codes = count(V3).total - bf16
print(f"FP8 codes {codes / 1e9:.0f} GB + scales {codes / 128**2 * 4 / 1e9:.2f} GB + "
      f"bf16 parts {2 * bf16 / 1e9:.1f} GB; all in bf16: {2 * count(V3).total / 1e9:.0f} GB")  # fmt: skip

# %% [markdown]
# `dsv3_ref.load` calls `weight_dequant` for each FP8 tensor of a directory, one tensor at a time.
