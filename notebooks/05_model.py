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
# # 05 · The whole model

# %%
#| export
import torch
from torch import nn

from dsv3_ref.config import Config
from dsv3_ref.mla import MLA, LayerCache
from dsv3_ref.moe import Gate, MoE, Route
from dsv3_ref.ops import MLP, RMSNorm
from dsv3_ref.rope import rope_table


# %% [markdown]
# ## One block


# %%
#| export
class Block(nn.Module):
    """x + MLA(norm(x)), then x + FFN(norm(x)); the first `n_dense_layers` have a dense FFN."""

    def __init__(self, c: Config, index: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.dim, c.norm_eps), MLA(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn = MLP(c.dim, c.inter_dim) if index < c.n_dense_layers else MoE(c)

    def forward(self, x_bsd, rope, cache: LayerCache | None = None):
        x_bsd = x_bsd + self.attn(self.attn_norm(x_bsd), rope, cache)
        y = self.ffn(self.ffn_norm(x_bsd))
        y_bsd, r = y if isinstance(y, tuple) else (y, None)
        return x_bsd + y_bsd, r


# %% [markdown]
# ## Sixty-one of them


# %%
#| export
class Cache(list):
    """A `LayerCache` for every main layer; its length is the number of positions held."""

    def __init__(self, c: Config, batch: int, max_len: int, device=None, dtype=None):
        super().__init__(LayerCache(c, batch, max_len, device, dtype) for _ in range(c.n_layers))

    @property
    def length(self) -> int:
        return self[0].length


class Transformer(nn.Module):
    """Tokens (b, s) → logits (b, s, w); with a cache, the tokens continue what it holds."""

    def __init__(self, c: Config):
        from dsv3_ref.mtp import MTP  # chapter 06 builds its module from this chapter's Block

        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleDict({str(i): Block(c, i) for i in range(c.n_layers)})
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.mtp = nn.ModuleDict({str(k): MTP(c) for k in range(c.n_mtp_layers)})
        init_weights(self, c.init_std)

    def features(self, tokens_bs, cache: Cache | None = None) -> tuple[torch.Tensor, list[Route]]:
        """Normed hidden states (b, s, d) and the route of every MoE layer."""
        start = cache.length if cache else 0
        rope = rope_table(
            self.config, torch.arange(tokens_bs.shape[1], device=tokens_bs.device) + start
        )
        x_bsd, routes = self.embed(tokens_bs), []
        for i, block in enumerate(self.layers.values()):
            x_bsd, r = block(x_bsd, rope, cache[i] if cache else None)
            routes += [r] if r else []
        return self.norm(x_bsd), routes

    def forward(self, tokens_bs, cache: Cache | None = None):
        return self.head(self.features(tokens_bs, cache)[0])


# %% [markdown]
# ## First weights


# %%
#| export
@torch.no_grad()
def init_weights(model: nn.Module, std: float) -> None:
    """Every matrix from N(0, std²), norms 1, gate biases 0 (§4.2)."""
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0.0, std)
        else:
            p.fill_(1.0)
    for gate in (m for m in model.modules() if isinstance(m, Gate)):
        if gate.bias is not None:
            gate.bias.zero_()


# %% [markdown]
# ## Where everything is


# %%
#| export
def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE by name, in the order in which routes are returned (MTP modules last)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
