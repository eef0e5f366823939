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
# and a text of **131,072** tokens. It must be able to *read* so far: the hands of its clocks (the rotary
# angles of [chapter 02](02_rope.ipynb)) reach places where they never were. And somebody must *remember* so far: plain attention with V3's 128 heads would keep
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
from torch import Tensor

from dsv3_ref.config import Config
from dsv3_ref.decode import Decoder
from dsv3_ref.model import Transformer
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.rope import rope_cos_sin

# %%
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref.config import TINY, V3, count_params
from dsv3_ref.mla import LayerKVCache
from dsv3_ref.rope import softmax_scale
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, PINK, checker, figure, play, show
from dsv3_ref.viz.ablation import load_result

torch.manual_seed(0)
FOUND = load_result("long_context")

# %%
TOKENS, PER_LAYER = 131_072, {"MLA": 512 + 64, "GQA, 8 heads": 8 * 320, "MHA, 128 heads": 128 * 320}
fig, ax = figure(width=8, height=2.2)
for i, (name, numbers) in enumerate(reversed(PER_LAYER.items())):
    size = 61 * TOKENS * numbers * 2 / 1e9  # layers, tokens, bf16
    ax.barh(name, size, color=GREEN if name == "MLA" else COLORS[i], height=0.6)
    ax.text(size * 1.08, i, f"{size:,.1f} GB", va="center")
ax.axvline(80, color=GRAY, ls="--", lw=1)
ax.text(80, 2.55, "an H800: 80 GB", color=GRAY, ha="center", fontsize=9)
ax.set(
    xscale="log", xlim=(5, 1500), xlabel="cache of one text of 131,072 tokens at V3's shape (GB)"
)
show(fig)

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
# $\sqrt t = 0.1\ln s + 1$ (the stretch, the two ends of the ramp between slow hands and fast ones, and what sharpens the
# softmax), *the same in both phases*. Together they took 119K of 2,788K GPU hours. A
# needle in a haystack was then found at every depth and every length up to 128K (figure 8). Which texts
# the phases read is not told.
#
# Axes: `b` rows, `s` places, `t` keys, `d` model, `h` heads, `c` latent, `r` rotary, `i` the part of a key
# without position, `v` value, `l` layers, `n` lengths that are asked about.

# %% [markdown]
# ## One stretch for two phases
# $s$ belongs to the weights, not to the text at hand ([chapter 02](02_rope.ipynb)): both phases turn
# the hands alike, so that what phase 1 learns is true in phase 2. Its reach is
# $40\cdot4096 = 163{,}840$, somewhat more than 128K. The factor $s$, the number of steps and the
# batches carry over to any model; rows become 8 and 32 times as long as they were. What the report
# does not say we leave as it was when pre-training ended: $\gamma = 0$, $\lambda = 0.1$.


# %%
#| export
ROPE_FACTOR = 40.0  # YaRN's s
LENGTH_MULTIPLES = {"32k": 8, "128k": 32}  # length of rows, in lengths of pre-training


def extend_config(config: Config) -> Config:
    """Return the config of both phases: s = 40 over the length of pre-training (§4.3)."""
    factor = max(config.rope_factor, ROPE_FACTOR)
    max_seq_len = max(config.max_seq_len, int(factor * config.original_seq_len))
    return replace(config, rope_factor=factor, max_seq_len=max_seq_len)


def constant_lr_recipe(lr: float, steps: int, batch: int) -> TrainingRecipe:
    """Return a recipe that continues pre-training as it ended: one rate, γ = 0, λ = 0.1."""
    return replace(
        TrainingRecipe(), steps=steps, lr=lr, min_lr=lr, final_lr=lr, warmup_steps=0,
        global_batch_size=batch, start_batch_size=batch, bias_update_rate=0.0, mtp_weight=0.1,
    )  # fmt: skip


RECIPES = {
    "32k": {
        "v3": constant_lr_recipe(7.3e-6, 1000, 1920),
        "tiny": constant_lr_recipe(1.3e-4, 16, 4),
    },
    "128k": {"v3": constant_lr_recipe(7.3e-6, 1000, 480), "tiny": constant_lr_recipe(1.3e-4, 6, 1)},
}


def extension_recipe(phase: str, size: str, original_seq_len: int) -> TrainingRecipe:
    """Return the recipe of a phase for a config of this size, or V3's if the size has none.

    original_seq_len: the length of rows in pre-training, which the phase multiplies.
    """
    recipe = RECIPES[phase].get(size, RECIPES[phase]["v3"])
    return replace(recipe, seq_len=LENGTH_MULTIPLES[phase] * original_seq_len)


# %%
longer = {phase: extension_recipe(phase, "v3", 4096) for phase in RECIPES}
for phase, r in longer.items():
    tokens = r.steps * r.global_batch_size * r.seq_len
    print(f"{phase:>4}: rows of {r.seq_len:,}, {tokens / 1e9:.1f}B tokens, rate {r.lr}")
assert [r.seq_len for r in longer.values()] == [32_768, 131_072]
assert (
    len({r.global_batch_size * r.seq_len for r in longer.values()}) == 1
)  # 63M tokens per step, both times
pretrained = replace(V3, rope_factor=1.0, max_seq_len=4096)
assert (
    extend_config(pretrained) == extend_config(V3) == V3
)  # the released config: 163,840 = 40 · 4096
LONG = extend_config(TINY)
print(f"tiny: {TINY.max_seq_len} → {LONG.max_seq_len:,} places, softmax sharper by "
      f"{softmax_scale(LONG) / softmax_scale(TINY):.2f}")  # fmt: skip

# %% [markdown]
# ## Other readings of the same weights
# A stretch changes no weight, so any weights can be read in several ways: *plain* ($s = 1$), by
# *position interpolation*, which simply counts $1/s$ a token ($\omega_j \to \omega_j/s$ for every
# pair: `step` $=s$ below), or by YaRN, which gives every pair a frequency $\omega'_j$ of its own and counts 1 a token. The decoder of chapter 08 holds the table of rotations, so a reading is a
# decoder with another table. Long prompts pass through it in pieces, whose memory does not grow with
# the square of the text.
#
# $$R_{tj} = e^{\mathrm i\,\omega'_j\,t/\text{step}},\qquad \omega' = \text{yarn}(\omega, s)\qquad (t)\times(r/2)\to(t,\,r/2)$$


# %%
#| export
def with_config(model: Transformer, config: Config) -> Transformer:
    """Return a model that shares these weights but encodes positions as `config` says."""
    with torch.device("meta"):
        shared = Transformer(config)
    shared.load_state_dict(model.state_dict(), assign=True)
    return shared.eval()


def interpolated_decoder(model: Transformer, batch: int, length: int, step: float = 1.0) -> Decoder:
    """Build a decoder whose positions advance by 1/`step` per token.

    A step of s is position interpolation; 1 leaves positions as they are.
    """
    decoder = Decoder(model, batch, length)
    position_t = torch.arange(length, device=decoder.token_bt.device) / step
    decoder.freqs_cis_tx = torch.complex(*rope_cos_sin(model.config, position_t))
    return decoder


# %%
small = replace(TINY, vocab_size=64, n_layers=2)
model = Transformer(small).eval()
tokens_bs = torch.randint(64, (2, 96))


def last_h(model, step=1.0, at=0):
    d = interpolated_decoder(model, 2, 96 + at, step)
    d.token_bt[:, at : 96 + at] = tokens_bs
    with torch.inference_mode():
        return d.hidden_states([at, at], 96)


plain_bsd, twice = last_h(model), with_config(model, replace(small, rope_factor=8.0))
assert twice.embed.weight.data_ptr() == model.embed.weight.data_ptr()  # shared
assert torch.allclose(plain_bsd, model.hidden_states(tokens_bs)[0], atol=1e-4)
for name, other_bsd in (("YaRN", last_h(twice)), ("interpolation", last_h(model, 8.0))):
    change = (other_bsd - plain_bsd).norm() / plain_bsd.norm()
    print(f"8 times by {name}: hidden states change by {change:.0%}")
    assert change > 0.01

# %% [markdown]
# ## Loss by position
# A mean over a long row hides where the model fails. Per place: $-\log p(y_{s+1}\,|\,y_{\le s})$ of tokens $y$,
# shape (b, s + 1) → (b, s), here in pieces and without ever holding all logits. Single places are noisy, so they
# are averaged over *thirds of octaves*: bins whose edges grow by $2^{1/3}$.


# %%
#| export
@torch.inference_mode()
def nll_by_position(decoder: Decoder, tokens_bs: Tensor) -> Tensor:
    """Compute −log p of every next token of rows of T + 1 tokens, (b, T), in nats."""
    b, s = tokens_bs.shape[0], tokens_bs.shape[1] - 1
    decoder.token_bt[:, :s] = tokens_bs[:, :-1]
    h_bsd = decoder.hidden_states([0] * b, s)
    parts = []
    for h_chunk, y_bs in zip(h_bsd.split(256, dim=1), tokens_bs[:, 1:].split(256, dim=1)):
        logit_nw = decoder.logits(h_chunk).flatten(0, 1)
        parts.append(F.cross_entropy(logit_nw, y_bs.flatten(), reduction="none").view(b, -1))
    return torch.cat(parts, dim=1)


def log_spaced_bins(length: int, first: int = 16) -> list[int]:
    """Return edges of bins from 0 to `length`; from `first` on each is about 2^(1/3) times larger."""
    n = math.ceil(3 * math.log2(length / first))
    return [0, *(round(first * (length / first) ** (i / n)) for i in range(n + 1))]


# %%
rows_bs = torch.randint(64, (2, 97))
nll_bs = nll_by_position(interpolated_decoder(model, 2, 96), rows_bs)
want = F.cross_entropy(model(rows_bs[:, :-1]).flatten(0, 1), rows_bs[:, 1:].flatten())
assert torch.allclose(nll_bs.mean(), want, atol=1e-5)
print("bins of 8,192 places end at", log_spaced_bins(8192)[1:])

# %% [markdown]
# ## A needle
# A sentence with a key is hidden in a text, the text continues, and at its end the sentence begins
# again. A model that completes it has read it. Ours is *The key is 7 7 7 7.*: a digit, so that chance is
# one in ten, and four times, because a model of 5M parameters must *learn* to copy, and repeats next
# to each other are what copying starts from (said once, it took ten times as many
# tokens). What counts is the probability of the *first* digit.
#
# To train on such texts is our addition: the report does not say that V3 did. A row of text hides
# one key and says it again at 1 to 32 further places. Few places are drawn more often than many, so that some
# gaps are long.


# %%
#| export
class Needle(NamedTuple):
    """A sentence that hides one of ten keys, in tokens."""

    prefix: list[int]
    keys: list[list[int]]
    suffix: list[int]

    def sentence(self, key: int) -> list[int]:
        """Return the sentence with key number `key`."""
        return [*self.prefix, *self.keys[key], *self.suffix]


def build_needle(encode: Callable[[str], list[int]], repeats: int = 4) -> Needle:
    """Encode `The key is 7 7 7 7.` for the ten digits."""
    keys = [encode(" ".join([str(digit)] * repeats)) for digit in range(10)]
    return Needle(encode(" The key is "), keys, encode("."))


def insert_needle(
    tokens: list[int], needle: Needle, rng: np.random.Generator, max_places: int = 32
) -> list[int]:
    """Insert one key at 2 … `max_places` + 1 random places; few places are likelier than many.

    The row keeps its length: its end makes room. A row too short for two needles is unchanged.
    """
    size = len(needle.sentence(0))
    key = int(rng.integers(10))
    max_places = min(max_places, len(tokens) // size - 1)
    if max_places < 1:
        return tokens
    places = 1 + round(max_places ** rng.random())
    hay = tokens[: len(tokens) - places * size]
    cuts = sorted(rng.integers(len(hay) + 1, size=places).tolist())
    row = []
    for start, stop in pairwise([0, *cuts]):
        row += hay[start:stop] + needle.sentence(key)
    return row + hay[cuts[-1] :]


@torch.inference_mode()
def needle_recall(
    decoder: Decoder, hay_bt: Sequence[list[int]], needle: Needle, keys: Sequence[int],
    position: int, lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """Compute the probability of each row's key when it is asked for at each length, (b, n).

    The needle lies at `position` of each row; `lengths` must increase. The text is read once: a
    question is asked, then overwritten by the text that follows.
    """
    b, question = len(hay_bt), torch.tensor(needle.prefix)
    texts = [
        hay[:position] + needle.sentence(key) + hay[position:] for hay, key in zip(hay_bt, keys)
    ]
    decoder.token_bt.copy_(torch.tensor([text[: decoder.token_bt.shape[1]] for text in texts]))
    text_bt = decoder.token_bt.clone()
    key_b1 = torch.tensor([[needle.keys[key][0]] for key in keys], device=text_bt.device)
    start, columns = 0, []
    for length in lengths:
        stop = length - len(question)
        decoder.hidden_states([start] * b, stop - start)
        decoder.token_bt[:, stop:length] = question
        h_bsd = decoder.hidden_states([stop] * b, len(question))
        p_bw = decoder.logits(h_bsd[:, -1]).softmax(-1)
        columns.append(p_bw.gather(1, key_b1)[:, 0])
        decoder.token_bt[:, stop:length] = text_bt[:, stop:length]
        start = stop
    return torch.stack(columns, 1)


# %%
def letters(text: str) -> list[int]:
    """Encode a text as one token per letter."""
    return [ord(c) % 64 for c in text]


n, rng = build_needle(letters), np.random.default_rng(0)
hay = [63] * 300
row = insert_needle(hay, n, rng)
places = [i for i in range(300) if row[i : i + len(n.prefix)] == n.prefix]
print(f"a row of {len(row)} has its key at", places)
assert len(row) == 300 and len({tuple(row[i : i + len(n.sentence(0))]) for i in places}) == 1
assert row.count(63) == 300 - len(places) * len(n.sentence(0))

hays, keys = torch.randint(64, (2, 300)).tolist(), [3, 8]
got_bn = needle_recall(interpolated_decoder(model, 2, 96), hays, n, keys, 10, [50, 96])
for row, (hay, key) in enumerate(zip(hays, keys)):
    for col, length in enumerate((50, 96)):
        text = [*hay[:10], *n.sentence(key), *hay[10:]][: length - len(n.prefix)] + n.prefix
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
def kv_cache_numbers_per_token(config: Config, kv_heads: int | None = None) -> int:
    """Return numbers cached per token and layer: c + r (MLA), or n·(i + r + v) for n heads."""
    if kv_heads is None:
        return config.kv_lora_rank + config.qk_rope_head_dim
    return kv_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def cache_bytes(
    config: Config, tokens: int, kv_heads: int | None = None, bytes_per_number: int = 2
) -> int:
    """Return bytes of the cache of all layers for so many tokens; kv_heads as above."""
    numbers = kv_cache_numbers_per_token(config, kv_heads)
    return config.n_layers * tokens * numbers * bytes_per_number


# %%
class Allocations(TorchDispatchMode):
    """Follows what tensors hold while a block runs: bytes kept so far, and the most there were."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    @property
    def held(self) -> int:
        self.live = {key: x for key, x in self.live.items() if not x[0].expired()}
        return sum(size for _, size in self.live.values())

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.held)
        return out


for name, make, want in (
    ("MLA", lambda: LayerKVCache(TINY, 1, 4096), kv_cache_numbers_per_token(TINY)),
    (
        "MHA",
        lambda: torch.zeros(1, 4096, kv_cache_numbers_per_token(TINY, TINY.n_heads)),
        kv_cache_numbers_per_token(TINY, TINY.n_heads),
    ),
):
    with Allocations() as tally:
        cache = make()  # keeps the tensors alive while they are counted
        got = tally.held
    print(f"{name}: {got / 4096 / 4:.0f} numbers per token allocated, {want} by the formula")
    assert got == 4 * 4096 * want
assert cache_bytes(V3, 1) == count_params(V3).cache_bytes == 70_272

for name, heads in {"MLA": None, "GQA, 8 heads": 8, "MHA, 128 heads": 128}.items():
    assert kv_cache_numbers_per_token(V3, heads) == PER_LAYER[name]
    print(f"{name:15}{cache_bytes(V3, TOKENS, heads) / 1e9:7.1f} GB for {TOKENS:,} tokens of V3")

# %% [markdown]
# ## A prompt in pieces
# Reading is the other half of the memory. Attention over a whole prompt of $t$ tokens holds up to
# $h\,t^2/2$ probabilities; read in pieces of $p$ tokens that meet the cache in blocks of $k$ keys
# ([chapter 08](08_generate.ipynb)), it holds $h\,p\,k$. Same hidden states; here is what the allocator
# says.


# %%
def peak(piece: int, length: int = 1536) -> tuple[int, torch.Tensor]:
    """The most that reading a prompt holds at once, without the cache; its last hidden state."""
    d = interpolated_decoder(model, 1, length)
    d.prefill_chunk, d.token_bt[:] = piece, torch.arange(length) % 64
    with torch.inference_mode(), Allocations() as tally:
        h_bsd = d.hidden_states([0], length)
    return tally.peak, h_bsd[0, -1]


model = with_config(model, extend_config(small))
pieces, whole = [64, 128, 256, 512, 1024, 1536], peak(1536)
peaks = {size: peak(size) for size in pieces}
assert all(torch.allclose(h_d, whole[1], atol=1e-4) for _, h_d in peaks.values())
fig, ax = figure(width=7, height=2.6)
ax.plot(pieces, [peaks[x][0] / 2**20 for x in pieces], "o-", color=BLUE)
ax.set(xscale="log", xlabel="tokens read at once, of a prompt of 1,536", ylabel="peak MiB", ylim=0)
ax.set_xticks(pieces, pieces)
ax.minorticks_off()
ax.set_title("The same hidden states from a fraction of the memory")
show(fig)

# %% [markdown]
# ## Experiment: 256, 2,048, 8,192
# `dsv3 train --config tiny` gives a model that has read a million tokens in rows of 256. One command
# does all that follows, ten minutes of one core:
#
# ```
# python -m dsv3_ref.studies.long_context --init runs/tiny --out notebooks/results
# ```
#
# 1. *Before.* The model learns to copy a key within 256 tokens: 100 steps on rows with needles.
# 2. `dsv3 extend --phase 32k --needles 0.5`: 16 steps of 4 rows of 2,048, a needle in half of them.
# 3. `dsv3 extend --phase 128k --needles 0.5`: 6 steps of one row of 8,192.
#
# As in the report both phases read the same number of tokens per step, at the rate with which
# pre-training ended ($1.3\cdot10^{-4}$ in the tiny recipe); unlike there they take 16 and 6 steps,
# not 1,000. Each cell below is the probability of the right digit (chance: 0.1), in the mean of eight
# texts at 256, four at 512, two at 1,024 and *one* beyond: look at the pattern, not at a cell. Depth is where
# the needle lies: 0 % at the beginning of the text, 100 % right before the question. All text is held out.

# %%
HEAT = FOUND["needles"]
names = {
    "before": "before: trained at 256",
    "before, YaRN": "the same weights, stretched",
    "after 2,048": "after phase 1 (2,048)",
    "after 8,192": "after phase 2 (8,192)",
}
fig, axes = figure(1, 4, width=11, height=2.9, sharey=True)
for ax, (key, title) in zip(axes, names.items()):
    image = ax.imshow(HEAT[key], vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for (y, x), p in np.ndenumerate(np.array(HEAT[key])):
        dark = "white" if p > 0.6 else "black"
        ax.text(x, y, f"{p:.1f}", ha="center", va="center", fontsize=8, color=dark)
    ax.set_xticks(range(len(FOUND["lengths"])), FOUND["lengths"], rotation=45, fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("tokens")
axes[0].set_yticks(range(len(FOUND["depths"])), [f"{d:.0%}" for d in FOUND["depths"]])
axes[0].set_ylabel("depth of the needle")
fig.colorbar(image, ax=axes, label="p(right digit)", shrink=0.9)
show(fig)
for key in names:
    by_length = np.array(HEAT[key]).mean(0)
    print(f"{key:14}", "  ".join(f"{n:,}: {p:.2f}" for n, p in zip(FOUND["lengths"], by_length)))

# %% [markdown]
# The plain model finds the key where it was trained (0.67), less surely further on (0.31 at 1,024), and from 2,048 on
# never: below 0.1 it does not even expect a digit. **The stretch alone moves this edge out**, without a step of training: 0.44 at 4,096. Even
# at 256 the key is found more surely than before (0.93), probably because the softmax is sharper by 1.87 and a head
# that had only half learnt to look now looks. The two phases, at the report's gentle rate and with 22 steps instead
# of 2,000, change little: better at 1,024, on single texts rather worse at 2,048 and 4,096, and at 8,192 *no model* finds it. That is
# what we measured; the report's two phases took 126 billion tokens.
#
# We also tried a rate of $10^{-3}$, thinking that so few steps at a small one would move nothing.
# It moved too much: 0.69 instead of 0.92 at 256, 0.43 instead of 0.81 at 1,024 ([LOG](../LOG.md)). A low,
# constant rate is not thrift: a trained model has something to lose.

# %%
edges, loss = np.array(FOUND["edges"]), {k: np.array(x) for k, x in FOUND["loss"].items()}
looks = {
    "interpolated": (PINK, ":"), "YaRN, untrained": (ORANGE, "-."),
    "after 2,048": (GREEN, "--"), "after 8,192": (BLUE, "-"),
}  # fmt: skip
octaves = {n: (edges[1:] > n / 2) & (edges[1:] <= n) for n in (64, 256, 1024, 2048, 4096, 8192)}
fig, ax = figure(width=8.5, height=3)
for name, (color, line) in looks.items():
    rise = [100 * (loss[name] / loss["plain"] - 1)[bins].mean() for bins in octaves.values()]
    ax.plot(range(len(octaves)), rise, line, marker="o", ms=4, color=color, label=name)
ax.axhline(0, color=GRAY, lw=1)
ax.set_xticks(range(len(octaves)), [f"{n // 2:,}–{n:,}" for n in octaves])
ax.set(xlabel="position (tokens)", ylabel="loss against plain (%)")
ax.set_title("Held-out speeches: weights trained at 256, read in two more ways or trained further")
ax.legend(ncol=2, fontsize=9)
show(fig)
plain = ", ".join(f"{n:,}: {loss['plain'][bins].mean():.2f}" for n, bins in octaves.items())
print(f"plain, bits per byte of the octave that ends at {plain}")

# %% [markdown]
# The loss tells another story, a quiet one: a model of 5M parameters predicts from the last few words,
# and hardly notices that it is at position 8,000. Interpolation blurs these few words (forty places
# become one: [chapter 02](02_rope.ipynb)) and costs 2 to 5 %, most in the first thousand
# places; YaRN leaves the fast hands alone and costs 0 to 2 %; the phases win it back, and 3 to 4 % more beyond
# 1,024, perhaps just by reading more of such speeches. Judge long context by needles, not by a mean loss.

# %% [markdown]
# ### What it costs
# The same model (without its MTP module), one thread. For decoding the cache is *filled* with random
# latents, because a prompt of 128K would take long to read; prompts up to 32K are really read, in pieces.
# Processor time; of a decoding step the best of twelve.

# %%
decode = {int(n): ms for n, ms in FOUND["decode_ms"].items()}
prefill = {int(n): s for n, s in FOUND["prefill_s"].items()}


def fitted(points: dict[int, float], powers) -> np.ndarray:
    """Coefficients of Σ a_p·n^p, least squares of relative errors."""
    n, y = np.array(list(points)), np.array(list(points.values()))
    return np.linalg.lstsq(np.stack([n**p / y for p in powers], 1), np.ones(len(n)), rcond=None)[0]


line, square = fitted(decode, (0.0, 1.0)), fitted(prefill, (1.0, 2.0))
ns = np.geomspace(1024, TOKENS, 60)
reach = square @ [TOKENS, TOKENS**2]
slope = np.polyfit(np.log(list(prefill))[-3:], np.log(list(prefill.values()))[-3:], 1)[0]
fig, (left, right) = figure(1, 2, width=9, height=3)
left.plot(list(decode), list(decode.values()), "o", color=BLUE)
left.plot(ns, line[0] + line[1] * ns, color=BLUE, lw=1)
left.set(xlabel="tokens in the cache", ylabel="ms per token", ylim=0, xlim=0)
left.set_xticks([0, 32_768, 65_536, 98_304, 131_072], ["0", "32K", "64K", "96K", "128K"])
left.set_title(f"decoding: {line[0]:.1f} ms + {1000 * line[1]:.3f} ms a thousand", fontsize=10)
right.plot(list(prefill), list(prefill.values()), "o", color=ORANGE)
right.plot(ns, square @ np.stack([ns, ns**2]), color=ORANGE, lw=1, ls="--")
right.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="s to read it")
right.set_title(
    f"prefill: exponent {slope:.2f} at the end; 128K: {reach / 60:.0f} min", fontsize=10
)
show(fig)
print("ms per token:", ", ".join(f"{n // 1024}K {ms:.1f}" for n, ms in decode.items()))
print("s to read: ", ", ".join(f"{n // 1024}K {s:.1f}" for n, s in prefill.items()))

# %% [markdown]
# Decoding is a straight line: what does not look at the cache, plus a slope. The cache of 128K tokens
# weighs 336 MB here (in fp32), and is read once a token. A prompt costs $a\,n + b\,n^2$, so its exponent on
# double logarithmic paper creeps from 1 towards 2; we extrapolate with the *two* terms, not with the slope.
# Those minutes are long, but read in pieces they need hardly more memory than the cache itself.

# %% [markdown]
# ## Play
# How long a text fits into how much memory? Every token takes the same number of bytes; choose how many.


# %%
def room(
    memory_gb: int = 40, layers: int = 61, kv_heads: int = 8, latent: int = 512, bits: int = 16
):
    """Tokens that fit into some memory, by MLA, GQA and MHA of V3's head sizes."""
    c = replace(V3, n_layers=layers, kv_lora_rank=latent)
    fits = {
        f"MLA, latent {latent}": kv_cache_numbers_per_token(c),
        f"GQA, {kv_heads} heads": kv_cache_numbers_per_token(c, kv_heads),
        "MHA, 128 heads": kv_cache_numbers_per_token(c, 128),
    }
    fig, ax = figure(width=8, height=2.3)
    for i, (name, numbers) in enumerate(reversed(fits.items())):
        tokens = memory_gb * 1e9 / (layers * numbers * bits / 8)
        ax.barh(name, tokens, color=GREEN if "MLA" in name else COLORS[i], height=0.6)
        ax.text(tokens * 1.08, i, f"{tokens:,.0f}", va="center")
    ax.axvline(TOKENS, color=GRAY, ls="--", lw=1)
    ax.set(xscale="log", xlim=(1e3, 3e7), xlabel="tokens (dashed: 128K)")
    ax.set_title(f"{memory_gb} GB of cache, {layers} layers, {bits} bits a number")
    show(fig)


room()
play(
    room,
    memory_gb=(5, 640, 5),
    layers=(8, 96, 1),
    kv_heads=[8, 1, 4, 16, 32],
    latent=(128, 1024, 64),
    bits=[16, 8],
)

# %% [markdown]
# ## Exercises
# **1 · Compute.** How many key-value heads may GQA have without a larger cache than MLA's?


# %%
@checker
def check_heads(fn):
    """one token and one layer are enough to compare; what does a key-value head keep?"""
    wide = replace(V3, kv_lora_rank=2048)
    for c in (V3, wide, TINY, replace(V3, v_head_dim=64)):
        n = fn(c)
        assert (
            n * kv_cache_numbers_per_token(c, 1)
            <= kv_cache_numbers_per_token(c)
            < (n + 1) * kv_cache_numbers_per_token(c, 1)
        )


def my_heads(c: Config) -> int:
    return ...


check_heads(my_heads)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_heads(c):
#     head = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
#     return (c.kv_lora_rank + c.qk_rope_head_dim) // head
# ```
#
# One, at V3's shape: 576 numbers against 320 a head. Each of the 128 query heads still gets keys of its
# own out of the latent.
# </details>
#
# **2 · Extend.** Two machines have each attended to half of a long cache. Each knows for its half
# the output `o` (b, v) of its softmax, and `lse` (b,), the log of the sum of the exponentiated
# scores. Merge them.


# %%
@checker
def check_merged(fn):
    """how much of the whole sum lies in each half? (scores may be in the thousands)"""
    for scale in (1.0, 2000.0):
        x_bt, v_btv = scale * torch.rand(3, 12), torch.randn(3, 12, 5)
        halves = [(slice(0, 4)), (slice(4, 12))]
        o = [(x_bt[:, h].softmax(-1)[:, None] @ v_btv[:, h])[:, 0] for h in halves]
        lse = [x_bt[:, h].logsumexp(-1) for h in halves]
        want = (x_bt.softmax(-1)[:, None] @ v_btv)[:, 0]
        got = fn(o[0], lse[0], o[1], lse[1])
        assert torch.allclose(got, want, atol=1e-4), got


def my_merged(o1_bv, lse1_b, o2_bv, lse2_b):
    return ...


check_merged(my_merged)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_merged(o1_bv, lse1_b, o2_bv, lse2_b):
#     share_b1 = torch.sigmoid(lse1_b - lse2_b)[:, None]
#     return share_b1 * o1_bv + (1 - share_b1) * o2_bv
# ```
#
# A softmax of two numbers is a sigmoid of their difference. With this rule a cache may be cut over
# many GPUs, or over the blocks of one.
# </details>
#
# **3 · Predict.** `seconds` holds what prompts took, tokens → s, and time is $a\,n + b\,n^2$ exactly.
# From two of them, foretell a third length.


# %%
@checker
def check_foretold(fn):
    """two unknowns, two equations; what is simpler than t, if you divide it by something?"""
    for a, b in ((1e-3, 1e-8), (0.0, 2e-9), (5e-4, 0.0)):
        took = {n: a * n + b * n * n for n in (2048, 8192)}
        for n in (4096, 131_072):
            assert math.isclose(fn(took, n), a * n + b * n * n, rel_tol=1e-6)


def my_foretold(seconds: dict[int, float], n: int) -> float:
    return ...


check_foretold(my_foretold)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_foretold(seconds, n):
#     (n1, t1), (n2, t2) = seconds.items()
#     b = (t2 / n2 - t1 / n1) / (n2 - n1)
#     return n * (t1 / n1 + b * (n - n1))
# ```
#
# A straight line on double logarithmic paper, drawn through two short prompts, would promise far too little.
# </details>

# %% [markdown]
# ## Scale-up
# At 671B: what a step of each phase computes, where the two halves of a token's bill meet, and what a
# text of 128K weighs on a decoding GPU.

# %%
c, products = (
    V3,
    6 * count_params(V3).activated_without_input_embedding,
)  # main model; one embedding is looked up
pair = c.n_layers * c.n_heads * 2 * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
for length in (4096, 32_768, 131_072):
    attention = 3 * pair * length / 2  # a query meets half of its row on average; forward, backward
    print(f"{length:7,}: {products / 1e9:.0f} GFLOPs a token in matrices, "
          f"{attention / 1e9:,.0f} in attention ({attention / (attention + products):.0%})")  # fmt: skip
meet = products / (3 * pair / 2)
print(f"they meet at rows of {meet:,.0f} tokens")
ops = sum(r.steps * r.global_batch_size * r.seq_len * (products + 1.5 * pair * r.seq_len)
          for r in longer.values())  # fmt: skip
rate = (products + 1.5 * pair * 4096) * 14.8e12 / (2.664e6 * 3600)  # attention counted there too
print(f"both phases: {ops:.1e} operations, {ops / rate / 3600 / 1e3:.0f}K GPU hours at the rate of "
      "pre-training; the report: 119K")  # fmt: skip
per_gpu = cache_bytes(V3, TOKENS) / 1e9
print(f"cache of one text of 128K: {per_gpu:.1f} GB; read for each token: "
      f"{per_gpu / 3350 * 1e3:.1f} ms at 3.35 TB/s")  # fmt: skip

# %% [markdown]
# **Arithmetic** binds training at 128K, and four fifths of it are attention. The estimate of both
# phases from the rate of pre-training is 75K GPU hours, the report's bill 119K. Where the difference lies we can only guess;
# perhaps attention and the activations of such rows run less well than experts do. In
# decoding the cache is what is read: 2.7 ms per token for *one* text, if one GPU held all layers; in V3's decoding
# units many GPUs share the texts of a batch.
#
# Kernels: prefill is `varlen_attention` (no probabilities in memory), decoding `paged_attention`
# ([chapter 10](10_triton.ipynb)). On many GPUs no two share a row here, nor did the report say that any did; the activations of a
# row's 131,072 tokens must fit into one pipeline stage, for which `--recompute` exists. On Slurm,
# `slurm/long_context.sbatch --init …`, then `PHASE=128k`. No GPU has run either.
#
# Next: [14 · Fine-tuning](14_sft_distill.ipynb), which reads shorter things.
