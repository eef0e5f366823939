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
# A model trained on sequences of 4,096 tokens has never seen position 5,000. Two obstacles lie between it
# and a text of **131,072** tokens. It must *encode positions* that far: the rotary
# angles of [chapter 02](02_rope.ipynb) reach values that never occurred in training. And it must *store* that much: plain attention with V3's 128 heads would need
# 655 GB of keys and values for this one text. This chapter extends a small model's context 32-fold, in two
# phases as in the report. It tests retrieval with a needle before, between and after the phases, and measures what a long
# context costs on two cores.

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

from dsv3_ref.config import Config, ceil_div
from dsv3_ref.decode import Decoder
from dsv3_ref.mla import attention, concat_nope_rope, up_project_kv
from dsv3_ref.model import Transformer
from dsv3_ref.ops import recompute, save_instead
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.rope import rope_cos_sin

# %%
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref.cluster.plan import PlanConfig, estimate
from dsv3_ref.config import TINY, V3, count_params
from dsv3_ref.mla import LayerKVCache, attend_expanded
from dsv3_ref.rope import softmax_scale
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, PINK, checker, figure, play, show
from dsv3_ref.viz.ablation import load_result

torch.manual_seed(0)
RESULTS = load_result("long_context")

# %%
TOKENS = 131_072
PER_LAYER = {"MLA": 512 + 64, "GQA, 8 heads": 8 * 320, "MHA, 128 heads": 128 * 320}
fig, ax = figure(width=8, height=2.2)
for i, (name, numbers) in enumerate(reversed(PER_LAYER.items())):
    size = 61 * TOKENS * numbers * 2 / 1e9  # layers, tokens, bf16
    ax.barh(name, size, color=GREEN if name == "MLA" else COLORS[i], height=0.6)
    ax.text(size * 1.08, i, f"{size:,.1f} GB", va="center")
ax.axvline(80, color=GRAY, ls="--", lw=1)
ax.text(80, 2.55, "an H800: 80 GB", color=GRAY, ha="center", fontsize=9)
ax.set(
    xscale="log",
    xlim=(5, 1500),
    xlabel="cache of one sequence of 131,072 tokens at V3's shape (GB)",
)
show(fig)

# %% [markdown]
# ## Paper
# Section 4.3. After pre-training at 4K come two phases of 1,000 steps each:
#
# | | length | batch size in sequences | learning rate |
# |---|---|---|---|
# | phase 1 | 32K | 1,920 | $7.3\cdot10^{-6}$ |
# | phase 2 | 128K | 480 | $7.3\cdot10^{-6}$, the final rate of pre-training |
#
# YaRN is applied to the rotary parts $q^R$ and $k^R$ only, with $s = 40$, $\alpha = 1$, $\beta = 32$ and
# $\sqrt t = 0.1\ln s + 1$: the scaling factor, the two ends of the ramp between low and high frequencies, and the factor that sharpens the
# softmax. The settings are *the same in both phases*. Together the phases took 119K of 2,788K GPU hours. Afterwards, a
# needle in a haystack was found at every depth and every length up to 128K (figure 8). The report does not say
# which texts were used.
#
# Axes: `b` rows, `s` query positions, `t` key positions, `d` model width, `h` heads, `c` latent, `r` rotary width, `i` width of a key
# without position, `v` value width, `l` layers, `n` lengths at which recall is measured.

# %% [markdown]
# ## One scaling factor for two phases
# $s$ belongs to the weights, not to the current text ([chapter 02](02_rope.ipynb)): both phases use
# the same frequencies, so that what is learned in phase 1 remains valid in phase 2. The maximum length is
# $40\cdot4096 = 163{,}840$, somewhat more than 128K. The factor $s$, the number of steps and the
# batch sizes carry over to any model; sequences become 8 and 32 times as long as in pre-training. Whatever the report does not
# specify stays as it was at the end of pre-training: $\gamma = 0$, $\lambda = 0.1$.


# %%
#| export
ROPE_FACTOR = 40.0  # YaRN's s
LENGTH_MULTIPLES = {"32k": 8, "128k": 32}  # sequence length relative to pre-training


def extend_config(config: Config) -> Config:
    """Return the config of both phases: s = 40 relative to the pre-training length (§4.3)."""
    factor = max(config.rope_factor, ROPE_FACTOR)
    max_seq_len = max(config.max_seq_len, int(factor * config.original_seq_len))
    return replace(config, rope_factor=factor, max_seq_len=max_seq_len)


def constant_lr_recipe(lr: float, steps: int, batch: int) -> TrainingRecipe:
    """Return a recipe with the final settings of pre-training: constant lr, γ = 0, λ = 0.1."""
    return replace(
        TrainingRecipe(), steps=steps, lr=lr, min_lr=lr, final_lr=lr, warmup_steps=0,
        global_batch_size=batch, start_batch_size=batch, bias_update_rate=0.0, mtp_weight=0.1,
    )  # fmt: skip


EXTENSION_RECIPES = {
    "32k": {
        "v3": constant_lr_recipe(7.3e-6, 1000, 1920),
        "tiny": constant_lr_recipe(1.3e-4, 16, 4),
    },
    "128k": {"v3": constant_lr_recipe(7.3e-6, 1000, 480), "tiny": constant_lr_recipe(1.3e-4, 6, 1)},
}


def extension_recipe(phase: str, size: str, original_seq_len: int) -> TrainingRecipe:
    """Return the recipe of a phase for a config of this size, or V3's if the size has none.

    original_seq_len: the sequence length of pre-training, which the phase multiplies.
    """
    recipe = EXTENSION_RECIPES[phase].get(size, EXTENSION_RECIPES[phase]["v3"])
    return replace(recipe, seq_len=LENGTH_MULTIPLES[phase] * original_seq_len)


# %%
longer = {phase: extension_recipe(phase, "v3", 4096) for phase in EXTENSION_RECIPES}
for phase, r in longer.items():
    tokens = r.steps * r.global_batch_size * r.seq_len
    print(f"{phase:>4}: sequences of {r.seq_len:,}, {tokens / 1e9:.1f}B tokens, rate {r.lr}")
assert [r.seq_len for r in longer.values()] == [32_768, 131_072]
assert len({r.global_batch_size * r.seq_len for r in longer.values()}) == 1  # 63M tokens per step
pretrained = replace(V3, rope_factor=1.0, max_seq_len=4096)
assert extend_config(pretrained) == extend_config(V3) == V3  # as released: 163,840 = 40 · 4096
LONG = extend_config(TINY)
sharpening = softmax_scale(LONG) / softmax_scale(TINY)
print(
    f"tiny: {TINY.max_seq_len} → {LONG.max_seq_len:,} positions, softmax scale × {sharpening:.2f}"
)

# %% [markdown]
# ## Other position encodings for the same weights
# Extension changes no weight, so the same weights can be evaluated with several position encodings: *plain* ($s = 1$),
# *position interpolation*, in which positions advance by $1/s$ per token ($\omega_j \to \omega_j/s$ for every
# pair: `step` $=s$ below), or YaRN, which gives every pair its own frequency $\omega'_j$ and advances by 1 per token. The decoder of chapter 08 holds the table of rotations, so each encoding is a
# decoder with another table. Long prompts are processed in chunks, whose memory does not grow with
# the square of the length.
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


def hidden_states(model: Transformer, step: float = 1.0) -> torch.Tensor:
    decoder = interpolated_decoder(model, 2, 96, step)
    decoder.token_bt[:] = tokens_bs
    with torch.inference_mode():
        return decoder.hidden_states([0, 0], 96)


plain_bsd = hidden_states(model)
scaled = with_config(model, replace(small, rope_factor=8.0))
assert scaled.embed.weight.data_ptr() == model.embed.weight.data_ptr()  # shared
assert torch.allclose(plain_bsd, model.hidden_states(tokens_bs)[0], atol=1e-4)
for name, other_bsd in (
    ("YaRN", hidden_states(scaled)),
    ("interpolation", hidden_states(model, 8.0)),
):
    change = (other_bsd - plain_bsd).norm() / plain_bsd.norm()
    print(f"8 times by {name}: hidden states change by {change:.0%}")
    assert change > 0.01

# %% [markdown]
# ## Loss by position
# A mean over a long sequence hides where the model fails. Per position we compute $-\log p(y_{s+1}\,|\,y_{\le s})$ of tokens $y$,
# shape (b, s + 1) → (b, s), in chunks and without materializing all logits. Single positions are noisy, so they
# are averaged over *thirds of octaves*: bins whose edges grow by $2^{1/3}$.


# %%
#| export
@torch.inference_mode()
def nll_by_position(decoder: Decoder, tokens_bs: Tensor) -> Tensor:
    """Compute −log p of every next token of rows of s + 1 tokens, (b, s), in nats."""
    b, s = tokens_bs.shape[0], tokens_bs.shape[1] - 1
    decoder.token_bt[:, :s] = tokens_bs[:, :-1]
    h_bsd = decoder.hidden_states([0] * b, s)
    chunks = []
    for h_chunk, y_bs in zip(h_bsd.split(256, dim=1), tokens_bs[:, 1:].split(256, dim=1)):
        logit_nw = decoder.logits(h_chunk).flatten(0, 1)
        chunks.append(F.cross_entropy(logit_nw, y_bs.flatten(), reduction="none").view(b, -1))
    return torch.cat(chunks, dim=1)


def log_spaced_bins(length: int, first: int = 16) -> list[int]:
    """Return edges of bins from 0 to `length`; beyond `first` they grow by about 2^(1/3)."""
    n = math.ceil(3 * math.log2(length / first))
    return [0, *(round(first * (length / first) ** (i / n)) for i in range(n + 1))]


# %%
rows_bs = torch.randint(64, (2, 97))
nll_bs = nll_by_position(interpolated_decoder(model, 2, 96), rows_bs)
want = F.cross_entropy(model(rows_bs[:, :-1]).flatten(0, 1), rows_bs[:, 1:].flatten())
assert torch.allclose(nll_bs.mean(), want, atol=1e-5)
print("bins of 8,192 positions end at", log_spaced_bins(8192)[1:])

# %% [markdown]
# ## A needle
# A sentence with a key is inserted into a text, and at the end of the text the sentence
# begins again. A model that completes it has retrieved the key. Our sentence is *The key is 7 7 7 7.*: a single digit, so that chance is
# 0.1, and four copies of it, because a model of 5M parameters must *learn* to copy, and copying emerges from adjacent
# repetitions. (With a single digit it took ten times as many
# tokens.) We measure the probability of the *first* digit.
#
# Training on such texts is our addition; the report does not mention it for V3. A training row contains
# one key at 2 to 33 positions. Small numbers of positions are drawn more often than large ones, so that some
# gaps are long.


# %%
#| export
class Needle(NamedTuple):
    """A sentence with one of ten keys, in tokens."""

    prefix: list[int]
    keys: list[list[int]]
    suffix: list[int]

    def sentence(self, key: int) -> list[int]:
        """Return the sentence with key number `key`."""
        return [*self.prefix, *self.keys[key], *self.suffix]


def build_needle(encode: Callable[[str], list[int]], repeats: int = 4) -> Needle:
    """Encode the sentence `The key is 7 7 7 7.` for all ten digits."""
    keys = [encode(" ".join([str(digit)] * repeats)) for digit in range(10)]
    return Needle(encode(" The key is "), keys, encode("."))


def insert_needle(
    tokens: list[int], needle: Needle, rng: np.random.Generator, max_places: int = 32
) -> list[int]:
    """Insert one key at 2 … `max_places` + 1 random positions; smaller numbers are more likely.

    The row keeps its length: its end is cut off. A row too short for two needles is unchanged.
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
    """Compute the probability of each row's key after a prompt of each length, (b, n).

    The needle is inserted at `position` of each row; `lengths` must increase. The text is processed
    once: the question at the end of a prompt is overwritten by the text that follows.
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
print(f"a row of {len(row)} tokens has its key at", places)
assert len(row) == 300 and len({tuple(row[i : i + len(n.sentence(0))]) for i in places}) == 1
assert row.count(63) == 300 - len(places) * len(n.sentence(0))

hays, keys = torch.randint(64, (2, 300)).tolist(), [3, 8]
got_bn = needle_recall(interpolated_decoder(model, 2, 96), hays, n, keys, 10, [50, 96])
for row, (hay, key) in enumerate(zip(hays, keys)):
    for col, length in enumerate((50, 96)):
        text = [*hay[:10], *n.sentence(key), *hay[10:]][: length - len(n.prefix)] + n.prefix
        p_w = model(torch.tensor([text]))[0, -1].softmax(-1)
        assert abs(got_bn[row, col] - p_w[n.keys[key][0]]) < 1e-5
print("one pass for all lengths gives the same probabilities as one pass per length")

# %% [markdown]
# ## Cache per token
# Per token and layer MLA caches $c + r$ numbers. Heads with keys and values of their own cache
# $n\,(i + r + v)$, where $n = h$ is multi-head attention (MHA) and a smaller $n$ is grouped-query attention
# (GQA).


# %%
#| export
def kv_cache_numbers_per_token(config: Config, kv_heads: int | None = None) -> int:
    """Return the numbers cached per token and layer: c + r (MLA), or n·(i + r + v) for n heads."""
    if kv_heads is None:
        return config.kv_lora_rank + config.qk_rope_head_dim
    return kv_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def cache_bytes(
    config: Config, tokens: int, kv_heads: int | None = None, bytes_per_number: int = 2
) -> int:
    """Return the bytes of a cache of `tokens` tokens in all layers; `kv_heads=None` is MLA."""
    numbers = kv_cache_numbers_per_token(config, kv_heads)
    return config.n_layers * tokens * numbers * bytes_per_number


# %%
class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors allocated in a `with` block: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak_bytes = 0

    @property
    def live_bytes(self) -> int:
        self.live = {key: x for key, x in self.live.items() if not x[0].expired()}
        return sum(size for _, size in self.live.values())

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        result = fn(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result


for name, make, want in (
    ("MLA", lambda: LayerKVCache(TINY, 1, 4096), kv_cache_numbers_per_token(TINY)),
    (
        "MHA",
        lambda: torch.zeros(1, 4096, kv_cache_numbers_per_token(TINY, TINY.n_heads)),
        kv_cache_numbers_per_token(TINY, TINY.n_heads),
    ),
):
    with Allocations() as tally:
        cache = make()  # the reference keeps the tensors alive
        got = tally.live_bytes
    print(f"{name}: {got / 4096 / 4:.0f} numbers per token allocated, {want} by the formula")
    assert got == 4 * 4096 * want
assert cache_bytes(V3, 1) == count_params(V3).cache_bytes == 70_272

for name, heads in {"MLA": None, "GQA, 8 heads": 8, "MHA, 128 heads": 128}.items():
    assert kv_cache_numbers_per_token(V3, heads) == PER_LAYER[name]
    print(f"{name:15}{cache_bytes(V3, TOKENS, heads) / 1e9:7.1f} GB for {TOKENS:,} tokens of V3")

# %% [markdown]
# ## Chunked prefill
# Prefill is the other half of the memory. Attention over a whole prompt of $t$ tokens holds up to
# $h\,t^2/2$ probabilities. In chunks of $p$ tokens that attend to the cache in blocks of $k$ keys
# ([chapter 08](08_generate.ipynb)), it holds $h\,p\,k$. The hidden states are the same; the allocator
# shows the difference.


# %%
def measure_prefill(chunk: int, length: int = 1536) -> tuple[int, torch.Tensor]:
    """Return the peak bytes of prefill without the cache, and the last hidden state."""
    decoder = interpolated_decoder(model, 1, length)
    decoder.prefill_chunk = chunk
    decoder.token_bt[:] = torch.arange(length) % 64
    with torch.inference_mode(), Allocations() as tally:
        h_bsd = decoder.hidden_states([0], length)
    return tally.peak_bytes, h_bsd[0, -1]


model = with_config(model, extend_config(small))
chunks = [64, 128, 256, 512, 1024, 1536]
peaks = {size: measure_prefill(size) for size in chunks}
assert all(torch.allclose(h_d, peaks[1536][1], atol=1e-4) for _, h_d in peaks.values())
fig, ax = figure(width=7, height=2.6)
ax.plot(chunks, [peaks[x][0] / 2**20 for x in chunks], "o-", color=BLUE)
ax.set(xscale="log", xlabel="tokens per chunk, prompt of 1,536", ylabel="peak MiB", ylim=0)
ax.set_xticks(chunks, chunks)
ax.minorticks_off()
ax.set_title("The same hidden states from a fraction of the memory")
show(fig)

# %% [markdown]
# ## One sequence on several GPUs
# Training needs all activations of a sequence at once. In *context parallelism* (CP), the ranks of a group hold
# different tokens of the same sequence. All layers but attention treat tokens one by one, so each rank computes them for its own tokens. In
# attention a query needs the keys and values of all earlier tokens, on whichever rank they are. For MLA they follow from
# the latent and the rotary key, 576 numbers per token instead of $128\cdot320$: an **all-gather of latents** moves
# 1.4 % of what an all-gather of keys and values would. Each rank then computes keys and values itself.
#
# The first tokens have few keys and the last ones many. If rank $r$ of $R$ took the $r$-th of $R$ parts, the last rank would
# compute almost twice the mean. Rank $r$ takes chunks $r$ and $2R-1-r$ of $2R$ instead, a *zig-zag*: every rank then has
# equally many pairs of query and key.


# %%
#| export
def zigzag_chunks(s: int, num_ranks: int, rank: int) -> tuple[range, range]:
    """Return the positions of a rank: chunks r and 2·R − 1 − r of 2·R.

    The last chunks are shorter than the others, or empty, if 2·R does not divide s.
    """
    n = ceil_div(s, 2 * num_ranks)
    low, high = (
        range(min(s, i * n), min(s, (i + 1) * n)) for i in (rank, 2 * num_ranks - 1 - rank)
    )
    return low, high


def merge_zigzag(parts_jbsx: Tensor) -> Tensor:
    """Bring the tokens of all ranks into their order: (j, b, s, x) → (b, t, x)."""
    low_jbsx, high_jbsx = parts_jbsx.chunk(2, dim=2)
    return torch.cat((*low_jbsx, *high_jbsx.flip(0)), dim=1)


class QuerySpan(NamedTuple):
    """Consecutive queries of one sample, and the keys that they see."""

    first_key: int
    first_query: int
    end: int  # of queries and keys


def query_spans(chunks: Sequence[range], bounds: Sequence[int]) -> list[QuerySpan]:
    """Return the spans of a rank's chunks; `bounds`: 0 and the end of each sample in the row."""
    spans = []
    for chunk in chunks:
        for first, end in pairwise(bounds):
            a, b = max(first, chunk.start), min(end, chunk.stop)
            if a < b:
                spans.append(QuerySpan(first, a, b))
    return spans


def attend_spans(
    q_bshi: Tensor, q_bshr: Tensor, c_btc: Tensor, k_btr: Tensor, wkv_b: Tensor, scale: float,
    spans: Sequence[QuerySpan],
) -> Tensor:  # fmt: skip
    """Compute the rows of `attend_expanded` that belong to a rank's queries, (b, s, h, v).

    q_bshi, q_bshr: the queries of the spans. c_btc, k_btr: the latents and rotary keys of all
    tokens. The queries of a span are the last of its positions, as `attention` expects.
    """
    h, i = q_bshi.shape[2:]
    q_bshx = recompute(concat_nope_rope, q_bshi, q_bshr)
    k_bthx, v_bthv = recompute(up_project_kv, c_btc, k_btr, wkv_b, h, i)
    outputs = [v_bthv[:, :0]]  # for a rank without tokens
    parts = q_bshx.split([span.end - span.first_query for span in spans], dim=1)
    for part_bshx, (first, _, end) in zip(parts, spans):
        outputs.append(attention(part_bshx, k_bthx[:, first:end], v_bthv[:, first:end], scale))
    return concat_saved_once(outputs, dim=1)


def concat_saved_once(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors; a step that recomputes saves the result in place of the parts."""
    whole = torch.cat(tuple(parts), dim)
    start = 0
    for part in parts:
        save_instead(part.detach(), copy_part, whole.detach(), dim, start, part.shape[dim])
        start += part.shape[dim]
    return whole


def copy_part(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Return a contiguous copy of a part of an axis."""
    return x.narrow(dim, start, length).contiguous()


# %% [markdown]
# Check: the rows that the ranks compute are those of one rank with all tokens, also for packed samples that end anywhere.
# And the work, in pairs of query and key, is the same on all ranks.

# %%
s, ranks = 24, 3
q_bshi, q_bshr = torch.randn(1, s, 4, 8), torch.randn(1, s, 4, 6)
keys = torch.randn(1, s, 10), torch.randn(1, s, 6), torch.randn(4 * (8 + 5), 10)  # c, k, W
for bounds in ([0, s], [0, 5, 6, 17, s]):
    parts = []
    for rank in range(ranks):
        chunks = zigzag_chunks(s, ranks, rank)
        own = [*chunks[0], *chunks[1]]
        spans = query_spans(chunks, bounds)
        parts.append(attend_spans(q_bshi[:, own], q_bshr[:, own], *keys, 0.3, spans))
    want = attend_expanded(q_bshi, q_bshr, *keys, 0.3, torch.tensor(bounds))
    got = merge_zigzag(torch.stack(parts).flatten(3)).view_as(want)
    assert torch.allclose(got, want, atol=1e-5)


def num_pairs(chunks: Sequence[range]) -> int:
    """Count pairs of a query in these chunks and a key that it sees."""
    return sum(sum(chunk) + len(chunk) for chunk in chunks)


zigzag = [num_pairs(zigzag_chunks(4096, 8, rank)) for rank in range(8)]
in_order = [num_pairs([range(512 * rank, 512 * (rank + 1))]) for rank in range(8)]
print("busiest of 8 ranks over the mean:",
      ", ".join(f"{name} {max(n) * 8 / sum(n):.2f}"
                for name, n in (("in order", in_order), ("zig-zag", zigzag))))  # fmt: skip
assert max(zigzag) == min(zigzag)

# %% [markdown]
# ## Experiment: 256, 2,048, 8,192
# `dsv3 train --config tiny` gives a model trained on a million tokens in rows of 256. One command
# does the rest in ten minutes on one core:
#
# ```
# python -m dsv3_ref.studies.long_context --init runs/tiny --out notebooks/results
# ```
#
# 1. *Before.* The model learns to copy a key within 256 tokens: 100 steps on rows with needles.
# 2. `dsv3 extend --phase 32k --needles 0.5`: 16 steps of 4 rows of 2,048, half of them with a needle.
# 3. `dsv3 extend --phase 128k --needles 0.5`: 6 steps of one row of 8,192.
#
# As in the report, both phases have the same number of tokens per step and use the final learning rate of
# pre-training ($1.3\cdot10^{-4}$ in the tiny recipe). Unlike the report, they take 16 and 6 steps,
# not 1,000. Each cell below is the probability of the correct digit (chance: 0.1), averaged over eight
# texts at 256 tokens, four at 512, two at 1,024 and *one* beyond; only the pattern is meaningful, not a single cell. Depth is the position of
# the needle: 0 % at the beginning of the text, 100 % right before the question. All texts are held out.

# %%
HEAT = RESULTS["needles"]
names = {
    "before": "before: trained at 256",
    "before, YaRN": "the same weights with YaRN",
    "after 2,048": "after phase 1 (2,048)",
    "after 8,192": "after phase 2 (8,192)",
}
fig, axes = figure(1, 4, width=11, height=2.9, sharey=True)
for ax, (key, title) in zip(axes, names.items()):
    image = ax.imshow(HEAT[key], vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for (y, x), p in np.ndenumerate(np.array(HEAT[key])):
        dark = "white" if p > 0.6 else "black"
        ax.text(x, y, f"{p:.1f}", ha="center", va="center", fontsize=8, color=dark)
    ax.set_xticks(range(len(RESULTS["lengths"])), RESULTS["lengths"], rotation=45, fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("tokens")
axes[0].set_yticks(range(len(RESULTS["depths"])), [f"{d:.0%}" for d in RESULTS["depths"]])
axes[0].set_ylabel("depth of the needle")
fig.colorbar(image, ax=axes, label="p(correct digit)", shrink=0.9)
show(fig)
for key in names:
    by_length = np.array(HEAT[key]).mean(0)
    print(f"{key:14}", "  ".join(f"{n:,}: {p:.2f}" for n, p in zip(RESULTS["lengths"], by_length)))

# %% [markdown]
# The plain model finds the key at its training length (0.67) and less reliably beyond it (0.31 at 1,024). From 2,048 on it
# never does: below 0.1 it does not even predict a digit. **YaRN alone extends this range** without a single training step: 0.44 at 4,096. Even
# at 256 the recall rises (0.93), probably because the softmax is sharper by a factor of 1.87, so that a head
# that had only partly learned to attend to the key now does. The two phases, at the report's low learning rate and with 22 steps instead
# of 2,000, change little: recall improves at 1,024, is rather lower at 2,048 and 4,096 (single texts), and at 8,192 *no model* finds the key. This is
# what we measured; the report's two phases took 126 billion tokens.
#
# We also tried a rate of $10^{-3}$, expecting that so few steps at a low rate would have no effect.
# It did harm: 0.69 instead of 0.92 at 256, 0.43 instead of 0.81 at 1,024 ([LOG](../LOG.md)). The low,
# constant rate protects what the model has already learned.

# %%
edges = np.array(RESULTS["edges"])
loss = {name: np.array(x) for name, x in RESULTS["loss"].items()}
LINES = {
    "interpolated": (PINK, ":"), "YaRN, untrained": (ORANGE, "-."),
    "after 2,048": (GREEN, "--"), "after 8,192": (BLUE, "-"),
}  # fmt: skip
octaves = {n: (edges[1:] > n / 2) & (edges[1:] <= n) for n in (64, 256, 1024, 2048, 4096, 8192)}
fig, ax = figure(width=8.5, height=3)
for name, (color, line) in LINES.items():
    rise = [100 * (loss[name] / loss["plain"] - 1)[bins].mean() for bins in octaves.values()]
    ax.plot(range(len(octaves)), rise, line, marker="o", ms=4, color=color, label=name)
ax.axhline(0, color=GRAY, lw=1)
ax.set_xticks(range(len(octaves)), [f"{n // 2:,}–{n:,}" for n in octaves])
ax.set(xlabel="position (tokens)", ylabel="loss relative to plain (%)")
ax.set_title("Held-out speeches: weights trained at 256, other encodings, further training")
ax.legend(ncol=2, fontsize=9)
show(fig)
plain = ", ".join(f"{n:,}: {loss['plain'][bins].mean():.2f}" for n, bins in octaves.items())
print(f"plain, bits per byte by end of the octave: {plain}")

# %% [markdown]
# The loss behaves differently: a model of 5M parameters predicts from the last few words
# and hardly depends on its position, even at 8,000. Interpolation blurs these few words (forty positions
# become one: [chapter 02](02_rope.ipynb)) and costs 2 to 5 %, most in the first thousand
# positions. YaRN keeps the high frequencies and costs 0 to 2 %. The phases recover that and gain 3 to 4 % beyond
# 1,024, perhaps only by training on more of such speeches. Long context should be judged by retrieval, not by mean loss.

# %% [markdown]
# ### What it costs
# We time the same model without its MTP module on one thread. For decoding, the cache is *filled* with random
# latents, because prefill of 128K would take long; prefill up to 32K is measured, in chunks.
# All times are CPU times; for a decoding step the best of twelve.

# %%
decode = {int(n): ms for n, ms in RESULTS["decode_ms"].items()}
prefill = {int(n): s for n, s in RESULTS["prefill_s"].items()}


def fit_powers(points: dict[int, float], powers: tuple[float, ...]) -> np.ndarray:
    """Fit the coefficients of Σ a_p·n^p by least squares of relative errors."""
    n, y = np.array(list(points)), np.array(list(points.values()))
    return np.linalg.lstsq(np.stack([n**p / y for p in powers], 1), np.ones(len(n)), rcond=None)[0]


line, square = fit_powers(decode, (0.0, 1.0)), fit_powers(prefill, (1.0, 2.0))
ns = np.geomspace(1024, TOKENS, 60)
prefill_128k = square @ [TOKENS, TOKENS**2]
slope = np.polyfit(np.log(list(prefill))[-3:], np.log(list(prefill.values()))[-3:], 1)[0]
fig, (left, right) = figure(1, 2, width=9, height=3)
left.plot(list(decode), list(decode.values()), "o", color=BLUE)
left.plot(ns, line[0] + line[1] * ns, color=BLUE, lw=1)
left.set(xlabel="tokens in the cache", ylabel="ms per token", ylim=0, xlim=0)
left.set_xticks([0, 32_768, 65_536, 98_304, 131_072], ["0", "32K", "64K", "96K", "128K"])
left.set_title(f"decoding: {line[0]:.1f} ms + {1000 * line[1]:.3f} ms per thousand", fontsize=10)
right.plot(list(prefill), list(prefill.values()), "o", color=ORANGE)
right.plot(ns, square @ np.stack([ns, ns**2]), color=ORANGE, lw=1, ls="--")
right.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="s")
right.set_title(
    f"prefill: exponent {slope:.2f} at the end; 128K: {prefill_128k / 60:.0f} min", fontsize=10
)
show(fig)
print("ms per token:", ", ".join(f"{n // 1024}K {ms:.1f}" for n, ms in decode.items()))
print("prefill in s:", ", ".join(f"{n // 1024}K {s:.1f}" for n, s in prefill.items()))

# %% [markdown]
# The decoding time is linear: a constant for everything except the cache, plus a slope. The cache of 128K tokens
# takes 336 MB here (in fp32) and is read once per token. Prefill costs $a\,n + b\,n^2$, so its exponent on
# log-log axes rises from 1 towards 2. We extrapolate with these *two* terms, not with the slope.
# Prefill of 128K takes long, but in chunks it needs little more memory than the cache itself.

# %% [markdown]
# ## Play
# How many tokens fit into a given amount of memory? Every token takes the same number of bytes, which depends on the attention.


# %%
def draw_capacity(
    memory_gb: int = 40, layers: int = 61, kv_heads: int = 8, latent: int = 512, bits: int = 16
):
    """Draw the tokens that fit into memory with MLA, GQA and MHA of V3's head sizes."""
    config = replace(V3, n_layers=layers, kv_lora_rank=latent)
    numbers_by_kind = {
        f"MLA, latent {latent}": kv_cache_numbers_per_token(config),
        f"GQA, {kv_heads} heads": kv_cache_numbers_per_token(config, kv_heads),
        "MHA, 128 heads": kv_cache_numbers_per_token(config, 128),
    }
    fig, ax = figure(width=8, height=2.3)
    for i, (name, numbers) in enumerate(reversed(numbers_by_kind.items())):
        tokens = memory_gb * 1e9 / (layers * numbers * bits / 8)
        ax.barh(name, tokens, color=GREEN if "MLA" in name else COLORS[i], height=0.6)
        ax.text(tokens * 1.08, i, f"{tokens:,.0f}", va="center")
    ax.axvline(TOKENS, color=GRAY, ls="--", lw=1)
    ax.set(xscale="log", xlim=(1e3, 3e7), xlabel="tokens (dashed: 128K)")
    ax.set_title(f"{memory_gb} GB of cache, {layers} layers, {bits} bits per number")
    show(fig)


draw_capacity()
play(
    draw_capacity,
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
    """One token and one layer are enough for the comparison; how many numbers does a key-value head cache?"""
    wide = replace(V3, kv_lora_rank=2048)
    for c in (V3, wide, TINY, replace(V3, v_head_dim=64)):
        n, per_head = fn(c), kv_cache_numbers_per_token(c, 1)
        assert n * per_head <= kv_cache_numbers_per_token(c) < (n + 1) * per_head


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
# One, at V3's shape: 576 numbers against 320 per head. Each of the 128 query heads still has its own
# keys, computed from the latent.
# </details>
#
# **2 · Extend.** Two GPUs have each attended to half of a long cache. Each has, for its half,
# the attention output `o` (b, v) and `lse` (b,), the log of the sum of the exponentiated
# scores. Merge them.


# %%
@checker
def check_merged(fn):
    """Which share of the whole sum lies in each half? (Scores may be in the thousands.)"""
    for scale in (1.0, 2000.0):
        x_bt, v_btv = scale * torch.rand(3, 12), torch.randn(3, 12, 5)
        halves = [slice(0, 4), slice(4, 12)]
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
# A softmax of two numbers is a sigmoid of their difference. By this rule a cache can be split over
# many GPUs, or over blocks of one GPU.
# </details>
#
# **3 · Predict.** `seconds` maps two prompt lengths in tokens to their prefill times, which follow $a\,n + b\,n^2$ exactly.
# Predict the time of a third length `n`.


# %%
@checker
def check_prediction(fn):
    """Two unknowns, two equations; the equation gets simpler if you divide t by something."""
    for a, b in ((1e-3, 1e-8), (0.0, 2e-9), (5e-4, 0.0)):
        seconds = {n: a * n + b * n * n for n in (2048, 8192)}
        for n in (4096, 131_072):
            assert math.isclose(fn(seconds, n), a * n + b * n * n, rel_tol=1e-6)


def my_prediction(seconds: dict[int, float], n: int) -> float:
    return ...


check_prediction(my_prediction)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_prediction(seconds, n):
#     (n1, t1), (n2, t2) = seconds.items()
#     b = (t2 / n2 - t1 / n1) / (n2 - n1)
#     return n * (t1 / n1 + b * (n - n1))
# ```
#
# A straight line on log-log axes through two short prompts would predict far too little.
# </details>

# %% [markdown]
# ## Scale-up
# At 671B: the computation per token in each phase, the sequence length at which attention costs as much as the GEMMs, and the size of the cache
# of a 128K sequence on a decoding GPU.

# %%
gemm_flops = 6 * count_params(V3).activated_without_input_embedding  # per token, without MTP
head_dims = V3.qk_nope_head_dim + V3.qk_rope_head_dim + V3.v_head_dim
pair_flops = V3.n_layers * V3.n_heads * 2 * head_dims  # per pair of query and key, forward


def training_flops(length: int) -> float:
    """Return the FLOPs per token, forward and backward; a query sees half of its sequence on average."""
    return gemm_flops + 3 * pair_flops * length / 2


for length in (4096, 32_768, 131_072):
    attention_flops = training_flops(length) - gemm_flops
    print(f"{length:7,}: {gemm_flops / 1e9:.0f} GFLOPs per token in GEMMs, "
          f"{attention_flops / 1e9:,.0f} in attention ({attention_flops / training_flops(length):.0%})")  # fmt: skip
print(f"equal at sequences of {gemm_flops / (3 * pair_flops / 2):,.0f} tokens")
total = sum(r.steps * r.global_batch_size * r.seq_len * training_flops(r.seq_len)
            for r in longer.values())  # fmt: skip
rate = training_flops(4096) * 14.8e12 / (2.664e6 * 3600)  # FLOP/s per GPU in pre-training
print(f"both phases: {total:.1e} FLOPs, {total / rate / 3600 / 1e3:.0f}K GPU hours at the rate of "
      "pre-training; the report: 119K")  # fmt: skip
cache_gb = cache_bytes(V3, TOKENS) / 1e9
print(f"cache of one sequence of 128K: {cache_gb:.1f} GB; reading it once takes "
      f"{cache_gb / 3350 * 1e3:.1f} ms at 3.35 TB/s")  # fmt: skip

# %% [markdown]
# Training at 128K is bound by **arithmetic**, four fifths of it in attention. Extrapolated from the rate of pre-training, both
# phases take 75K GPU hours; the report states 119K. The layout of pre-training cannot have been used unchanged: a batch
# of 480 sequences over its 128 pipelines is 3.75 micro-batches for 16 stages, so most of a step would be bubble.
# The report does not say what was changed; the next section shows one possibility. Decoding
# is bound by reading the cache: 2.7 ms per token for *one* sequence, if one GPU held all layers. In V3's decoding
# units many GPUs share the sequences of a batch.
#
# Kernels: prefill uses `varlen_attention`, which keeps no probabilities in memory, and decoding uses `paged_attention`
# ([chapter 10](10_triton.ipynb)).
#
# ### In practice: `--cp`
# If no two GPUs share a sequence, its activations must fit into one pipeline stage.
# Recomputation is not enough for that: about 182 kB per token and MoE layer remain ([chapter 17](17_scale.ipynb)), which is
# 95 GB for 131,072 tokens in the four layers of a stage. So a sequence has to be divided, which the report does not mention.
#
# With `dsv3 extend --cp 8`, eight neighbors among the ranks that would read different rows read the same rows
# (`parallel/context_parallel.py`). The world does not grow: these ranks already sum gradients, and the dispatch to experts sees different tokens on
# each, as before. Positions, MTP's targets and the bounds of packed samples follow from the rows, which every rank of a group has.
# Only three things travel: the latents, their gradients, and the loads of each sequence for the balance loss of
# [chapter 04](04_moe.ipynb), whose $f_i$ counts all tokens of a sequence.
#
# The price is that every rank computes the keys and values of *all* tokens from the latents. Three measures keep them out of
# memory: gathered latents are gathered again in the backward pass instead of being saved; attention runs
# over groups of heads, one after another; and the weight gradient of $W^{UK}$ and $W^{UV}$ is never deferred. Without the groups
# of heads the keys and values of one layer at 128K would take:

# %%
expanded = 2 * TOKENS * V3.n_heads * head_dims  # bytes in bf16
latents = 2 * TOKENS * kv_cache_numbers_per_token(V3)
print(f"one layer at {TOKENS:,} tokens: {expanded / 1e9:.1f} GB of keys and values, "
      f"{latents / 1e6:.0f} MB of latents")  # fmt: skip
assert round(100 * latents / expanded, 1) == 1.4

# %% [markdown]
# `dsv3 plan` on 2,048 H800, `--pp 16 --dp 2 --ep 64 --schedule dualpipe`, with the report's batches:
# The last column is for 1,000 steps.

# %%
plans = {
    "pre-training": PlanConfig(),
    "phase 1": PlanConfig(seq_len=32_768, global_batch_size=1920, cp=8),
    "phase 2": PlanConfig(seq_len=131_072, global_batch_size=480, cp=32),
}
print(f"{'':13} cp  micro-batches × tokens  GB (fullest)  GB of latents sent  s/step  GPU hours")
phase_hours = {}
for name, plan in plans.items():
    e = estimate(plan)
    count = plan.global_batch_size * plan.cp // (plan.dp * plan.ep)
    phase_hours[name] = 1000 * plan.global_batch_size * plan.seq_len / 1e12 * e.hours
    print(f"{name:13} {plan.cp:2} {count:14} × {plan.seq_len // plan.cp:,}"
          f"{max(rank.gpu for rank in e.ranks) / 1e9:14.1f} {e.sent['latents of sequences'] / 1e9:18.0f}"
          f"{e.seconds:9.1f}{phase_hours[name] / 1e3:8.0f}K")  # fmt: skip
    assert max(rank.gpu for rank in e.ranks) < 70e9 and (count, plan.seq_len // plan.cp) == (
        120,
        4096,
    )
both = phase_hours["phase 1"] + phase_hours["phase 2"]
print(f"both phases: {both / 1e3:.0f}K GPU hours; the report: 119K")

# %% [markdown]
# A rank holds what it holds in pre-training, less the weight gradients that are not deferred; attention needs 3 GB beside that. Stragglers and failures count in
# the hours, not in the seconds. All of this is planned, not measured: neither phase has been run on a GPU, and
# nothing hides the gather of latents. With 2,048 GPUs and these flags, run
# `slurm/long_context.sbatch --init … --cp 8`, then the same with `PHASE=128k` and `--cp 32`. Losses and gradients are those of one process to
# 13 digits in fp64, also with packed samples (`tests/parallel/test_context_parallel.py`), and
# `tests/cluster/test_memory.py` counts the bytes that ranks hold after every step of a schedule.
#
# Next: [14 · Fine-tuning](14_sft_distill.ipynb), on shorter sequences.
