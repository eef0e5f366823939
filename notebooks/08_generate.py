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

# %%
#| export decode
import torch

from dsv3_ref.model import Cache, Transformer


# %% [markdown]
# ## Choosing a token


# %%
#| export decode
def sample(logit_bw, temperature: float, generator: torch.Generator | None = None):
    """The next token (b,): the likeliest at temperature 0, else drawn from softmax(logit / T)."""
    if temperature == 0:
        return logit_bw.argmax(-1)
    p_bw = (logit_bw.float() / temperature).softmax(-1)
    return torch.multinomial(p_bw, 1, generator=generator)[:, 0]


# %% [markdown]
# ## Prefill, then decode


# %%
#| export decode
@torch.no_grad()
def generate(
    model: Transformer,
    tokens_bs,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
):
    """Continue prompts of equal length on the latent cache: (b, s) → (b, s + max_new_tokens)."""
    if tokens_bs.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least the begin-of-sentence token")
    weight = model.embed.weight
    cache = Cache(
        model.config,
        len(tokens_bs),
        tokens_bs.shape[1] + max_new_tokens,
        weight.device,
        weight.dtype,
    )
    out, new_bs = [tokens_bs], tokens_bs
    for _ in range(max_new_tokens):
        h_bsd, _ = model.features(new_bs, cache)
        new_bs = sample(model.head(h_bsd[:, -1]), temperature, generator)[:, None]
        out.append(new_bs)
    return torch.cat(out, dim=1)
