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
import torch

from dsv3_ref.model import Cache, Transformer

# %%
from dataclasses import replace

from dsv3_ref.config import TINY, V3, count
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.viz import BLUE, ORANGE, attempt, figure, play, show

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
# was designed for the second job, and this chapter is its plain form: a batch of prompts of equal
# length, greedy or with a temperature. Drafting with the module of chapter 06, *speculative
# decoding*, joins it in a later edition.

# %% [markdown]
# ## Choosing a token
# The logits $\ell \in \mathbb{R}^{b\times w}$ become probabilities under a temperature $T$:
#
# $$p_w = \frac{e^{\ell_w/T}}{\sum_{w'} e^{\ell_{w'}/T}}$$
#
# At $T=1$ these are the model's own; below, likely words gain; at $T \to 0$ only the likeliest is
# left, which we write as an argmax instead of dividing by zero.


# %%
#| export decode
def sample(logit_bw, temperature: float, generator: torch.Generator | None = None):
    """The next token (b,): the likeliest at temperature 0, else drawn from softmax(logit / T)."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if temperature == 0:
        return logit_bw.argmax(-1)
    p_bw = (logit_bw.float() / temperature).softmax(-1)
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

# %% [markdown]
# ## Prefill, then decode
# `Cache` (chapter 05) holds 576 numbers a layer and token at full size. The first call hands the
# whole prompt to the model; each later call hands it one token per sequence, and MLA attends to
# what the cache holds, in its absorbed form. Only the last position's hidden state meets the head:
# at 129,280 words, logits of a long prompt that nobody reads would be the largest tensor of all.


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
    w = model.embed.weight
    room = tokens_bs.shape[1] + max_new_tokens
    cache = Cache(model.config, len(tokens_bs), room, w.device, w.dtype)
    out, new_bs = [tokens_bs], tokens_bs
    for _ in range(max_new_tokens):
        h_bsd, _ = model.features(new_bs, cache)
        new_bs = sample(model.head(h_bsd[:, -1]), temperature, generator)[:, None]
        out.append(new_bs)
    return torch.cat(out, dim=1)


# %% [markdown]
# The check is the definition: greedy decoding on the cache must choose, at every step, the argmax
# of a full forward pass without any cache.

# %%
model = Transformer(
    replace(TINY, vocab_size=256, n_layers=3, n_mtp_layers=0, init_std=0.06, embed_std=1.0)
)
prompt_bs = torch.randint(0, 256, (2, 9))
out_bs = generate(model, prompt_bs, 12)
assert torch.equal(out_bs[:, :9], prompt_bs)
with torch.no_grad():
    for s in range(9, 21):
        assert torch.equal(out_bs[:, s], model(out_bs[:, :s])[:, -1].argmax(-1))

seen = []
watch = model.embed.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
generate(model, prompt_bs, 12)
watch.remove()
assert sum(seen) == passes(9, 12, cached=True)
print("tokens read at each step:", seen)

# %% [markdown]
# ## Experiment: a sentence learnt by heart
# An untrained model writes noise. We teach this one a single sentence, byte by byte, and let it
# write at three temperatures. It knows one thing, so at $T=0$ it says that; heat shows what else it
# would have been willing to say.

# %%
sentence = "The cache remembers what was read, so that each new word is read only once. "
bytes_bs = torch.tensor([list((sentence * 2).encode())])
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
for _ in range(60):
    h_bsd, _ = model.features(bytes_bs[:, :-1])
    loss = linear_cross_entropy(h_bsd[0], model.head.weight, bytes_bs[0, 1:]) / h_bsd.shape[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

start = torch.tensor([list(b"The cache")])
for temperature in (0.0, 0.7, 1.5):
    out = generate(model, start, 70, temperature, torch.Generator().manual_seed(1))[0]
    print(f"T = {temperature}: {bytes(out.tolist()).decode(errors='replace')!r}")
assert bytes(generate(model, start, 67)[0].tolist()).decode() == sentence

# %% [markdown]
# ## Play: temperature
# What the model thinks of the byte after `rea`, with more or less heat.

# %%
with torch.no_grad():
    logit_w = model(torch.tensor([list(b"what was rea")]))[0, -1]


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
def check_cache(fn) -> bool:
    want = count(V3).cache_bytes * 4096 * 32
    return attempt(
        lambda: fn(V3, 32, 4096) == want, "bytes = sequences × tokens × layers × (c + r) × 2"
    )


def check_top_p(fn) -> bool:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def test():
        kept = {q: (fn(p, q) > 0).tolist() for q in (0.4, 0.5, 0.7, 1.0)}
        want = {0.4: 1, 0.5: 1, 0.7: 2, 1.0: 4}
        sums = all(abs(fn(p, q).sum().item() - 1) < 1e-5 for q in want)
        return sums and all(kept[q] == [i < n for i in range(4)] for q, n in want.items())

    return attempt(test, "keep the fewest likeliest words that reach q together, then renormalise")


def check_entropy(fn) -> bool:
    wants = [(0.0, 0.0), (1.0, -(exact_1 * exact_1.log()).sum().item())]
    return attempt(
        lambda: all(abs(float(fn(logit_bw[0], t)) - want) < 1e-4 for t, want in wants),
        "entropy of softmax(ℓ/T) in nats; at T = 0 nothing is left to chance",
    )


exact_1 = logit_bw[0].softmax(-1)

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
# 9.2 GB for 32 sequences of 4,096 tokens.
# </details>

# %% [markdown]
# **2 · Extend.** *Top-p* sampling draws only from the fewest likeliest words that together reach
# probability $q$. Write the function that turns probabilities (w,) into the ones to draw from.


# %%
def my_top_p(p_w, q: float):
    return ...


check_top_p(my_top_p)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_top_p(p_w, q):
#     ranked, order = p_w.sort(descending=True)
#     before = ranked.cumsum(0) - ranked
#     kept = torch.where(before < q - 1e-6, ranked, 0.0)
#     return torch.zeros_like(p_w).scatter(0, order, kept / kept.sum())
# ```
#
# The word that crosses $q$ is kept: a word goes only if those before it already suffice.
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
# each sequence's own cache. The bytes below, over the 3.35 TB/s of an H100, bound the speed.

# %%
expert = 3 * V3.dim * V3.moe_inter_dim  # bytes of one expert in FP8
experts = (V3.n_layers - V3.n_dense_layers) * V3.n_routed_experts * expert
for batch in (1, 32):
    asleep = (1 - V3.n_activated_experts / V3.n_routed_experts) ** batch  # if routing were random
    weights = count(V3).total - V3.vocab_size * V3.dim - experts * asleep
    for length in (1_000, 100_000):
        cache = batch * length * count(V3).cache_bytes
        ms = (weights + cache) / 3.35e12 * 1e3
        print(f"batch {batch:2}, context {length:7,}: weights {weights / 1e9:3.0f} GB "
              f"({1 - asleep:4.0%} of the experts), cache {cache / 1e9:5.1f} GB: {ms:3.0f} ms a step")  # fmt: skip

# %% [markdown]
# Alone, a user waits for weights: 37 GB for one token. Thirty-two users together wake two thirds of
# the experts: twelve times the bytes for thirty-two times the words. Larger batches are cheaper
# still, which is why the report decodes on 320 GPUs with one expert each (section 3.4.2). The
# module of this chapter is `dsv3_ref.decode`; one called `generate` would hide the function of that
# name.
