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
# # 06 · MTP: predicting the token after next

# %%
#| export
import torch
from torch import nn

from dsv3_ref.config import Config
from dsv3_ref.model import Block, Transformer
from dsv3_ref.moe import Route
from dsv3_ref.ops import Linear, RMSNorm, linear_cross_entropy
from dsv3_ref.rope import rope_table


# %% [markdown]
# ## One module


# %%
#| export
class MTP(nn.Module):
    """eq. 21–22: h^k = norm(TRM(M_k [norm(Emb(t_{i+k})); norm(h^{k−1})])), all (b, s, d)."""

    def __init__(self, c: Config):
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
        self.eh_proj = Linear(2 * c.dim, c.dim)
        self.block = Block(c, c.n_layers)  # an index past the dense layers: always MoE
        self.norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, h_bsd, embed_bsd, rope, cache=None) -> tuple[torch.Tensor, Route]:
        pair = torch.cat((self.enorm(embed_bsd), self.hnorm(h_bsd)), dim=-1)
        x_bsd, r = self.block(self.eh_proj(pair), rope, cache)
        return self.norm(x_bsd), r


# %% [markdown]
# ## The causal chain


# %%
#| export
def mtp_features(model: Transformer, h_bsd, tokens_bs) -> list[tuple[torch.Tensor, Route]]:
    """h^1 … h^D from h^0: the k-th has s − k positions, position i has seen tokens up to i + k."""
    out = []
    for k, module in enumerate(model.mtp.values(), start=1):
        s = tokens_bs.shape[1] - k
        rope = rope_table(model.config, torch.arange(s, device=tokens_bs.device))
        h_bsd, r = module(h_bsd[:, :s], model.embed(tokens_bs[:, k:]), rope)
        out.append((h_bsd, r))
    return out


# %%
#| export
def mtp_losses(model: Transformer, features, tokens_bs, target_bs) -> list[torch.Tensor]:
    """eq. 24: L^k = −1/T Σ log P^k(t_{i+k+1}), T all positions, though T − k have a target."""
    losses = []
    for k, (h_bsd, _) in enumerate(features, start=1):
        target_n = target_bs[:, k:].flatten()
        nll = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, target_n)
        losses.append(nll / tokens_bs.numel())
    return losses
