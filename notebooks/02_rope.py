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

# %%
#| export
import math

import torch

from dsv3_ref.config import Config
from dsv3_ref.ops import impl, op


# %% [markdown]
# ## Frequencies


# %%
#| export
def rope_freqs(rope_dim: int, theta: float):
    """Angle a position of each of the r/2 pairs: ω_j = θ^(−2j/r), radians."""
    return theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)


# %% [markdown]
# ## YaRN


# %%
#| export
def yarn_ramp(rope_dim: int, theta: float, length: int, beta_fast: float, beta_slow: float):
    """Share of interpolation a pair: 0 if it turns > β_fast times in `length`, 1 if < β_slow."""

    def pair(turns):  # the (fractional) pair that turns so often within `length`
        return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(beta_fast)), 0)
    high = min(math.ceil(pair(beta_slow)), rope_dim - 1)
    j = torch.arange(rope_dim // 2, dtype=torch.float64)
    return ((j - low) / max(high - low, 0.001)).clamp(0, 1)


def yarn_freqs(c: Config):
    """Fast pairs keep ω, slow pairs take ω/s, a ramp between: ω' = (1−ρ)ω + ρω/s (§4.3)."""
    freqs = rope_freqs(c.qk_rope_head_dim, c.rope_theta)
    if c.rope_factor == 1:
        return freqs
    ramp = yarn_ramp(c.qk_rope_head_dim, c.rope_theta, c.original_seq_len, c.beta_fast, c.beta_slow)
    return freqs * (1 - ramp) + freqs / c.rope_factor * ramp


def softmax_scale(c: Config) -> float:
    """1/√(i+r), times YaRN's (0.1·m·ln s + 1)² when s > 1."""
    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    return scale * (0.1 * c.mscale * math.log(c.rope_factor) + 1) ** 2


# %%
#| export
def rope_table(c: Config, position_s):
    """Rotations of positions: (cos, sin), each (s, r/2), float32."""
    angle = position_s[:, None].double() * yarn_freqs(c).to(position_s.device)
    return angle.cos().float(), angle.sin().float()


# %% [markdown]
# ## The rotation


# %%
#| export
@op
def rotate(x_bshr, cos, sin):
    """Turn interleaved pairs (x₀, x₁) by their angle: (x₀cos − x₁sin, x₀sin + x₁cos)."""
    x0, x1 = x_bshr.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # over heads
    pairs = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return pairs.flatten(-2).to(x_bshr.dtype)


@impl("rotate", "naive")
def _(x_bshr, cos, sin):
    x = torch.view_as_complex(x_bshr.float().unflatten(-1, (-1, 2)).contiguous())
    turned = x * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_bshr.dtype)
