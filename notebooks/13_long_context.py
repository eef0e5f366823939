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
# # 13 · Long context: from 4K to 128K

# %% [markdown]
# ## Why
# A model trained on rows of 4,096 tokens has never met position 5,000. Two things stand between it
# and a text of **131,072** tokens. It must be able to *read* so far: the hands of its clocks reach
# angles they never had. And somebody must *remember* so far: plain attention with V3's 128 heads would keep
# 655 GB of keys and values for this one text. This chapter stretches a small model 32 times, in two
# steps as the report did, looks for a needle before, between and after, and measures what a long
# text costs on two cores.

# %%
#| export
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dsv3_ref.config import Config
from dsv3_ref.decode import Decoder
from dsv3_ref.model import Transformer
from dsv3_ref.optim import Recipe
from dsv3_ref.rope import rope_table

# %%
import time

from torch.profiler import ProfilerActivity, profile

from dsv3_ref.config import TINY, V2_LITE, V3, count
from dsv3_ref.mla import LayerCache
from dsv3_ref.rope import softmax_scale, yarn_freqs
from dsv3_ref.viz import BLUE, COLOURS, GREEN, GREY, ORANGE, PINK, checker, figure, play, show
from dsv3_ref.viz.ablation import stored

torch.manual_seed(0)
FOUND = stored("long_context")

# %% [markdown]
# FIGURE_WHY

# %% [markdown]
# ## Paper
# Section 4.3. After pre-training at 4K, two phases of 1,000 steps each:
#
# | | length | sequences a batch | learning rate |
# |---|---|---|---|
# | phase 1 | 32K | 1,920 | $7.3\cdot10^{-6}$ |
# | phase 2 | 128K | 480 | $7.3\cdot10^{-6}$, the last rate of pre-training |
#
# YaRN stretches the rotary parts $q^R$ and $k^R$ alone, with $s = 40$, $\alpha = 1$, $\beta = 32$ and
# $\sqrt t = 0.1\ln s + 1$, *the same in both phases*. Together they took 119K of 2,788K GPU hours. A
# needle in a haystack was then found at every depth and every length up to 128K (figure 8). Which texts
# the phases read is not told.
#
# Axes: `b` rows, `s` places, `t` keys, `d` model, `h` heads, `c` latent, `r` rotary, `l` layers.

# %% [markdown]
# ## One stretch for two phases
# $s$ belongs to the weights, not to the text at hand ([chapter 02](02_rope.ipynb)): both phases turn
# the hands alike, so that what phase 1 learns is true in phase 2. Its reach is
# $40\cdot4096 = 163{,}840$, somewhat more than 128K. The factor $s$, the number of steps and the
# batches carry over to any model; rows become 8 and 32 times as long as they were. What the report
# does not say we leave as it was when pre-training ended: $\gamma = 0$, $\lambda = 0.1$.


# %%
#| export
STRETCH, TIMES = 40.0, {"32k": 8, "128k": 32}  # YaRN's s; rows, in lengths of pre-training


def extended(c: Config) -> Config:
    """The config of both phases: s = 40 over the length of pre-training (§4.3)."""
    s = max(c.rope_factor, STRETCH)
    reach = int(s * c.original_seq_len)
    return replace(c, rope_factor=s, max_seq_len=max(c.max_seq_len, reach))


def constant(lr: float, steps: int, batch: int) -> Recipe:
    """Pre-training as it ended, on and on: one rate, γ = 0, λ = 0.1."""
    return replace(
        Recipe(), steps=steps, lr=lr, lr_end=lr, lr_last=lr, warmup_steps=0, batch=batch,
        batch_start=batch, gamma=0.0, mtp_weight=0.1,
    )  # fmt: skip


RECIPES = {
    "32k": {"v3": constant(7.3e-6, 1000, 1920), "tiny": constant(1e-3, 16, 4)},
    "128k": {"v3": constant(7.3e-6, 1000, 480), "tiny": constant(1e-3, 16, 1)},
}


def recipe(phase: str, size: str, original: int) -> Recipe:
    """A phase for a config of pre-training length `original`; V3's where a size has none."""
    found = RECIPES[phase].get(size, RECIPES[phase]["v3"])
    return replace(found, seq_len=TIMES[phase] * original)


# %%
longer = {phase: recipe(phase, "v3", 4096) for phase in RECIPES}
for phase, r in longer.items():
    tokens = r.steps * r.batch * r.seq_len
    print(f"{phase:>4}: rows of {r.seq_len:,}, {tokens / 1e9:.1f}B tokens, rate {r.lr}")
assert [r.seq_len for r in longer.values()] == [32_768, 131_072]
assert len({r.batch * r.seq_len for r in longer.values()}) == 1  # 63M tokens a step, both times
pretrained = replace(V3, rope_factor=1.0, max_seq_len=4096)
assert extended(pretrained) == extended(V3) == V3  # the released config: 163,840 = 40 · 4096
LONG = extended(TINY)
print(f"tiny: {TINY.max_seq_len} → {LONG.max_seq_len:,} places, softmax sharper by "
      f"{softmax_scale(LONG) / softmax_scale(TINY):.2f}")  # fmt: skip

# %% [markdown]
# ## Other readings of the same weights
# A stretch changes no weight, so any weights can be read in several ways: *plain* ($s = 1$), by
# *position interpolation*, which simply counts $1/s$ a token ($\omega_j \to \omega_j/s$ for every
# pair), or by YaRN. The decoder of chapter 08 holds the table of rotations, so a reading is a
# decoder with another table. Long prompts pass through it in pieces, whose memory does not grow with
# the square of the text.
#
# $$R_t = e^{i\,\omega\,t/\text{step}},\qquad \omega = \text{yarn}(\omega, s)$$


# %%
#| export
def under(model: Transformer, c: Config) -> Transformer:
    """The same weights, shared, under another config of positions."""
    with torch.device("meta"):
        other = Transformer(c)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def reader(model: Transformer, batch: int, length: int, step: float = 1.0) -> Decoder:
    """A decoder whose positions advance by 1/`step` a token: `step` s is position interpolation."""
    d = Decoder(model, batch, length)
    at = torch.arange(length, device=d.token_bt.device) / step
    d.turn_tx = torch.complex(*rope_table(model.config, at))
    return d


READINGS = {"plain": (1.0, False), "interpolated": (8.0, False), "YaRN": (1.0, True)}


# %%
small = replace(TINY, vocab_size=64, n_layers=2)
model = Transformer(small).eval()
tokens_bs = torch.randint(64, (2, 96))


def last_h(model, step=1.0, at=0):
    d = reader(model, 2, 96 + at, step)
    d.token_bt[:, at : 96 + at] = tokens_bs
    with torch.inference_mode():
        return d.features([at, at], 96)


plain_bsd, twice = last_h(model), under(model, replace(small, rope_factor=8.0))
assert (
    twice.head.weight is not None and twice.embed.weight.data_ptr() == model.embed.weight.data_ptr()
)
assert torch.allclose(plain_bsd, model.features(tokens_bs)[0], atol=1e-4)
for name, other_bsd in (("YaRN", last_h(twice)), ("interpolation", last_h(model, 8.0))):
    change = (other_bsd - plain_bsd).norm() / plain_bsd.norm()
    print(f"8 times by {name}: hidden states change by {change:.0%}")
    assert change > 0.01

# %% [markdown]
# ## Loss by position
# A mean over a long row hides where the model fails. Per place: $-\log p(t_{s+1}\,|\,t_{\le s})$,
# shape (b, s) → (b, s), here in pieces and without ever holding all logits.


# %%
#| export
@torch.inference_mode()
def nll_by_position(d: Decoder, tokens_bs):
    """−log p of every next token of rows of T + 1, (b, T), nats."""
    b, s = tokens_bs.shape[0], tokens_bs.shape[1] - 1
    d.token_bt[:, :s] = tokens_bs[:, :-1]
    parts = zip(d.features([0] * b, s).split(256, dim=1), tokens_bs[:, 1:].split(256, dim=1))
    each = [F.cross_entropy(d.logits(h).flatten(0, 1), y.flatten(), reduction="none")
            for h, y in parts]  # fmt: skip
    return torch.cat([x.view(b, -1) for x in each], dim=1)


def by_thirds_of_octaves(length: int, first: int = 16) -> list[int]:
    """Edges of bins that grow by 2^(1/3), from 0 to `length`."""
    n = math.ceil(3 * math.log2(length / first))
    return [0, *(round(first * (length / first) ** (i / n)) for i in range(n + 1))]


# %%
rows_bs = torch.randint(64, (2, 97))
nll_bs = nll_by_position(reader(model, 2, 96), rows_bs)
want = F.cross_entropy(model(rows_bs[:, :-1]).flatten(0, 1), rows_bs[:, 1:].flatten())
assert torch.allclose(nll_bs.mean(), want, atol=1e-5)
print("bins of 8,192 places end at", by_thirds_of_octaves(8192)[1:])

# %% [markdown]
# ## A needle
# A sentence with a key is hidden in a text, the text goes on, and at its end the sentence begins
# again. Who can fill it in has read it. Ours is *The key is 7 7 7 7.*: a digit, so that chance is
# one in ten, and four times, because a model of 5M parameters must *learn* to copy, and repeats next
# to each other are what copying starts from (said once, it took three times as long).
#
# With such texts among what it trains on, V3 is not imitated: the report does not say that it had
# any. A row of text hides one key and says it again at 1 to 32 further places, few of them more often
# than many, so that some gaps are long.


# %%
#| export
class Needle(NamedTuple):
    """The sentence that hides a key, in tokens: say, key, end."""

    say: list[int]
    keys: list[list[int]]
    end: list[int]

    def sentence(self, key: int) -> list[int]:
        """With one of the keys."""
        return [*self.say, *self.keys[key], *self.end]


def needle(encode: Callable[[str], list[int]], times: int = 4) -> Needle:
    """`The key is 7 7 7 7.` for the ten digits."""
    keys = [encode(" ".join([str(i)] * times)) for i in range(10)]
    return Needle(encode(" The key is "), keys, encode("."))


def plant(tokens: list[int], n: Needle, rng: np.random.Generator, most: int = 32) -> list[int]:
    """A row of the same length that says one key at 2 … `most` + 1 random places, often few."""
    size, key = len(n.sentence(0)), int(rng.integers(10))
    most = min(most, len(tokens) // size - 1)
    if most < 1:
        return tokens
    times = 1 + round(most ** rng.random())
    hay = tokens[: len(tokens) - times * size]
    cuts = sorted(rng.integers(len(hay) + 1, size=times).tolist())
    out = []
    for a, b in pairwise([0, *cuts]):
        out += hay[a:b] + n.sentence(key)
    return out + hay[cuts[-1] :]


@torch.inference_mode()
def recall(d: Decoder, hay_bt: list[list[int]], n: Needle, keys: list[int], at: int,
           lengths: Sequence[int]):  # fmt: skip
    """Probability of each row's key, asked for at these lengths; its needle at place `at`, (b, n).

    The text is read once: a question is asked, and then written over by what follows.
    """
    texts = [hay[:at] + n.sentence(key) + hay[at:] for hay, key in zip(hay_bt, keys)]
    d.token_bt.copy_(torch.tensor([x[: d.token_bt.shape[1]] for x in texts]))
    key_b1 = torch.tensor([[n.keys[key][0]] for key in keys], device=d.token_bt.device)
    read, out, kept_bt = 0, [], d.token_bt.clone()
    for length in lengths:
        stop, b = length - len(n.say), len(texts)
        d.features([read] * b, stop - read)
        d.token_bt[:, stop:length] = torch.tensor(n.say)
        p_bw = d.logits(d.features([stop] * b, len(n.say))[:, -1]).softmax(-1)
        out.append(p_bw.gather(1, key_b1)[:, 0])
        d.token_bt[:, stop:length] = kept_bt[:, stop:length]
        read = stop
    return torch.stack(out, 1)


# %%
letters = lambda text: [ord(c) % 64 for c in text]
n, rng = needle(letters), np.random.default_rng(0)
hay = [63] * 300
row = plant(hay, n, rng)
said = [i for i in range(300) if row[i : i + len(n.say)] == n.say]
print(f"a row of {len(row)} says its key at", said)
assert len(row) == 300 and len({tuple(row[i : i + len(n.sentence(0))]) for i in said}) == 1
assert row.count(63) == 300 - len(said) * len(n.sentence(0))

hays, keys = torch.randint(64, (2, 300)).tolist(), [3, 8]
got_bn = recall(reader(model, 2, 96), hays, n, keys, 10, [50, 96])
for row, (hay, key) in enumerate(zip(hays, keys)):
    for col, length in enumerate((50, 96)):
        text = [*hay[:10], *n.sentence(key), *hay[10:]][: length - len(n.say)] + n.say
        p_w = model(torch.tensor([text]))[0, -1].softmax(-1)
        assert abs(got_bn[row, col] - p_w[n.keys[key][0]]) < 1e-5
print("one reading, several questions: as each text read on its own")

# %% [markdown]
# ## What a token leaves behind
# Per token and layer MLA keeps $c + r$ numbers. Heads with keys and values of their own keep
# $n\,(i + r + v)$, where $n = h$ is multi-head attention (MHA), and fewer is grouped-query attention
# (GQA).


# %%
#| export
def kept(c: Config, kv_heads: int | None = None) -> int:
    """Numbers a token and layer: c + r of MLA, or n·(i + r + v) of n key-value heads."""
    if kv_heads is None:
        return c.kv_lora_rank + c.qk_rope_head_dim
    return kv_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)


def cache_bytes(c: Config, tokens: int, kv_heads: int | None = None, each: int = 2) -> int:
    """Bytes of cache of all layers, `each` a number."""
    return c.n_layers * tokens * kept(c, kv_heads) * each


# %%
def allocated(make) -> int:
    """Bytes that a call takes from torch's allocator and keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        held = make()  # kept until the count ends
    del held
    return sum(e.self_cpu_memory_usage for e in p.key_averages())
