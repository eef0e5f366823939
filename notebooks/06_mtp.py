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

# %% [markdown]
# ## Why
# A language model learns from each position one thing: the next token. And it generates with each
# pass through its weights one token. Both look like waste. The hidden state that knows the next
# token often knows the one after as well: who has written "New" and is sure of "York" may be just
# as sure of "City".
#
# *Multi-token prediction* (MTP) trains the model to say so. DeepSeek-V3 adds one small module,
# 11.6B parameters next to 671B, that predicts one token further. Training gets a second signal from
# every position. Generation gets a draft of the second token almost for free, which is accepted **85 to
# 90 %** of the time and makes decoding 1.8 times as fast (§5.4.3).
#
# ![Main model, then two MTP modules; each takes the hidden states below and the next token's embedding](../figures/06_mtp.svg)

# %% [markdown]
# ## What the report says
# Section 2.2. Earlier work (Gloeckle et al., 2024) put $D$ independent heads on one hidden state,
# all guessing in parallel. V3 predicts *in sequence* and keeps the causal chain: depth $k$ takes
# the hidden state of depth $k-1$ and the embedding of a token that is already known, so no depth
# guesses blindly. Embedding and output head are those of the main model, not copies.
#
# The purpose is first of all a better main model: in the ablations (table 4) a model trained with
# MTP and evaluated *without* the module gains on most benchmarks, HumanEval from 20.7 to 26.8 at
# 15.7B and from 44.5 to 53.7 at 228.7B. The module can then be thrown away, or kept as a drafter.
# V3 uses $D=1$; the code takes any $D$.

# %%
#| export
from collections.abc import Iterable

import torch
from torch import Tensor

from dsv3_ref.model import Transformer
from dsv3_ref.moe import Route
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.rope import Rope

# %%
import math
import os
from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from dsv3_ref.block import Block
from dsv3_ref.config import TINY, V3, count_mla_params, count_moe_params, count_params
from dsv3_ref.viz import BLUE, COLORS, GRAY, ORANGE, attempt, figure, play, show

SHORT = bool(os.environ.get("DSV3_SHORT"))
# What is trained below: a vocabulary of 32, two layers of width 64, and two MTP modules.
TOY = replace(
    TINY, vocab_size=32, dim=64, inter_dim=128, moe_inter_dim=32, n_layers=2, q_lora_rank=0,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8,
    n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, n_mtp_layers=2, init_std=0.05,
    embed_std=1.0,
)  # fmt: skip

# %% [markdown]
# ## One module
# A row has $T$ tokens, $t_1 \ldots t_T$. Let $h_i^{k-1} \in \mathbb{R}^d$ be the hidden state of position
# $i$ at depth $k-1$, and $h_i^0$ that of the main model. Depth $k$ normalizes it, normalizes the
# embedding of token $t_{i+k}$, sets one beside the other and brings the pair back to width $d$
# (eq. 21). One whole Transformer block follows, $\mathrm{TRM}_k$ with attention and experts (eq. 22),
# then the shared head, which gives the probabilities $P$ of the token after (eq. 23):
#
# $${h'}_i^{k} = M_k\,[\mathrm{RMSNorm}(h_i^{k-1});\ \mathrm{RMSNorm}(\mathrm{Emb}(t_{i+k}))],
#   \qquad M_k \in \mathbb{R}^{d\times 2d} \tag{21}$$
# $$h_{1:T-k}^{k} = \mathrm{TRM}_k({h'}_{1:T-k}^{k}) \tag{22}$$
# $$P_{i+k+1}^{k} = \mathrm{OutHead}(h_i^{k}) \tag{23}$$
#
# The equations leave two things open, and a reader with the released weights should know both.
#
# - **The order of the pair.** Eq. 21 prints [hidden; embedding]. The released matrix `eh_proj`
#   wants the **reverse**, [`enorm`(embedding); `hnorm`(hidden)], and so does the code below. With
#   the printed order nothing fails; the drafts are just wrong.
# - **Which hidden state.** The modules have a norm of their own before the head (`shared_head.norm`
#   in the files, `norm` here). We pass on hidden states *after* that norm, and take $h^0$ **after**
#   the main model's final norm, as Hugging Face's `MtpModel` does. `hnorm` scales its input anyway,
#   so only the final norm's learned weights make a difference.


# %%
#| export block
import torch
from torch import Tensor, nn

from dsv3_ref.config import Config
from dsv3_ref.mla import LayerKVCache
from dsv3_ref.moe import Route
from dsv3_ref.ops import RMSNorm, recompute
from dsv3_ref.rope import Rope


def concat_pair(e_bsd: Tensor, h_bsd: Tensor) -> Tensor:
    """Concatenate the embedding of a token and a hidden state, (b, s, 2d)."""
    return torch.cat((e_bsd, h_bsd), dim=-1)


class MTP(nn.Module):
    """MTP module: h^k = norm(TRM(M_k [norm(Emb(t_{i+k})); norm(h^{k−1})])), eq. 21 and 22."""

    def __init__(self, config: Config):
        super().__init__()
        self.enorm = RMSNorm(config.dim, config.norm_eps)
        self.hnorm = RMSNorm(config.dim, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.dim, config.dim, bias=False)  # bf16 as released
        self.block = Block(config, config.n_layers)  # an index past the dense layers: always MoE
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def project(self, h_bsd: Tensor, embed_bsd: Tensor) -> Tensor:
        """Return M_k [norm(Emb(t_{i+k})); norm(h^{k−1})], (b, s, d) (eq. 21)."""
        pair = recompute(concat_pair, self.enorm(embed_bsd), self.hnorm(h_bsd))
        return self.eh_proj(pair)

    def forward(
        self, h_bsd: Tensor, embed_bsd: Tensor, rope: Rope, cache: LayerKVCache | None = None
    ) -> tuple[Tensor, Route]:
        """Return h^k, (b, s, d), and the route of its experts; the inputs are (b, s, d) too."""
        x_bsd, r = self.block(self.project(h_bsd, embed_bsd), rope, cache)
        return self.norm(x_bsd), r


# %%
with torch.device("meta"):
    released = MTP(V3)
n = sum(t.numel() for t in [*released.parameters(), *released.buffers()])
print(f"one module of V3: {n / 1e9:.2f}B parameters of its own; embedding and head are borrowed")
assert n == count_params(V3).mtp == 11_610_068_224

torch.manual_seed(0)
model = Transformer(TOY)
module = model.mtp["0"]
h_bsd, embed_bsd = torch.randn(2, 1, 5, 64)
rope = Rope.from_positions(TOY, torch.arange(5))
left_half, right_half = module.eh_proj.weight.detach().chunk(2, dim=1)  # left: for embeddings
want = module.enorm(embed_bsd) @ left_half.T + module.hnorm(h_bsd) @ right_half.T
pair = torch.cat((module.enorm(embed_bsd), module.hnorm(h_bsd)), dim=-1)
torch.testing.assert_close(module.eh_proj(pair), want)
same, other = module(h_bsd, embed_bsd, rope)[0], module(embed_bsd, h_bsd, rope)[0]
apart = (same - other).abs().mean()
print(f"hidden and embedding exchanged: outputs differ by {apart:.2f} on average, and no error")
assert apart > 0.3

# %% [markdown]
# ## The causal chain
# Depth $k$ pairs the first $T-k$ hidden states with the embeddings of tokens
# $1+k$ to $T$: everything shifts by one each time, and each depth is one position shorter.
#
# $$h^{k}_{1:T-k} = \mathrm{MTP}_k\big(h^{k-1}_{1:T-k},\ \mathrm{Emb}(t_{1+k:T})\big), \qquad k = 1 \ldots D$$
#
# So $h_i^k$ has seen the tokens up to $t_{i+k}$ and predicts $t_{i+k+1}$. Look at that again: for
# its own target it knows *everything before*, just as the main model would at position $i+k$. What
# it lacks is not knowledge but depth: the newest $k$ tokens pass through $k$ blocks at most, not 61.


# %%
#| export
def mtp_hidden_states(
    model: Transformer, h_bsd: Tensor, tokens_bs: Tensor
) -> list[tuple[Tensor, Route]]:
    """Compute h^1 … h^D from h^0, each with its route.

    h^k has s − k positions; its position i depends on tokens up to i + k.
    """
    depths: list[tuple[Tensor, Route]] = []
    for k, module in enumerate(model.mtp.values(), start=1):
        s = tokens_bs.shape[1] - k
        rope = Rope.from_positions(model.config, torch.arange(s, device=tokens_bs.device))
        h_bsd, r = module(h_bsd[:, :s], model.embed(tokens_bs[:, k:]), rope)
        depths.append((h_bsd, r))
    return depths


# %% [markdown]
# The check that matters: change token $j$ and see which $h_i^k$ move. Seen must be exactly the
# tokens $j \le i+k$. One token more would be a *leak*, the target seen by its own predictor, and
# training would reward it with a wonderful loss. The staircase must step right by one with each
# depth.

# %%
with torch.no_grad():
    sentence_s = torch.randint(TOY.vocab_size, (14,))
    changed_bs = sentence_s.repeat(14, 1)
    changed_bs.diagonal().copy_((sentence_s + 1) % TOY.vocab_size)  # row j: token j changed


def every_depth(tokens_bs) -> list[torch.Tensor]:
    """Return [h^0, …, h^D] of the model, without gradients."""
    with torch.no_grad():
        h_bsd, _ = model.hidden_states(tokens_bs)
        return [h_bsd] + [h for h, _ in mtp_hidden_states(model, h_bsd, tokens_bs)]


fig, axes = figure(1, 3, width=9, height=3.3, sharey=True)
states, bases = every_depth(changed_bs), every_depth(sentence_s[None])
for k, (ax, h, base) in enumerate(zip(axes, states, bases)):
    moved_ij = ((h - base).abs().amax(-1) > 1e-4).T  # position i, changed token j
    i, j = torch.meshgrid(torch.arange(14 - k), torch.arange(14), indexing="ij")
    assert torch.equal(moved_ij, j <= i + k), f"depth {k} sees what it should not, or too little"
    ax.imshow(moved_ij.numpy(), cmap="Blues", vmax=1.6)
    ax.plot(range(k + 1, 14), range(13 - k), "x", color=ORANGE, label="its target")
    ax.set(title=f"depth {k}: {14 - k} positions", xlabel="token changed", ylim=(13.5, -0.5))
axes[0].set_ylabel("position i of the hidden state")
axes[0].legend(loc="upper right")
title = "Blue: what a hidden state depends on. Its target is always the first token it has not seen"
fig.suptitle(title, fontsize=11)
show(fig)

# %% [markdown]
# One more detail that looks arbitrary: the code numbers positions from 0 at every depth, though the
# tokens it embeds stand $k$ places later. RoPE only sees differences (chapter 02), so any common
# offset gives the same result. It has to be common, that is all.

# %%
with torch.no_grad():
    shifted = module(h_bsd, embed_bsd, Rope.from_positions(TOY, torch.arange(5) + 1))[0]
torch.testing.assert_close(shifted, same, atol=1e-5, rtol=1e-4)
print("positions 1…5 instead of 0…4: the same hidden states")

# %% [markdown]
# ## One loss per depth
# Each depth has its own cross-entropy (eq. 24), and the training loss takes their mean with a
# weight $\lambda$ (eq. 25), 0.3 for the first 10T tokens and 0.1 for the rest (§4.2):
#
# $$\mathcal{L}_{\mathrm{MTP}}^{k} = -\frac{1}{T}\sum_{i=2+k}^{T+1} \ln P_i^k[t_i] \tag{24}$$
# $$\mathcal{L}_{\mathrm{MTP}} = \frac{\lambda}{D}\sum_{k=1}^{D}\mathcal{L}_{\mathrm{MTP}}^{k} \tag{25}$$
#
# with $P_i^k[t_i]$ the probability that depth $k$ gave to the token that really stands at $i$. Count the terms of eq. 24: from $2+k$ to $T+1$ there are $T-k$ of them, and the sum is divided by
# $T$. We do what is printed. A depth's loss is therefore smaller than the mean surprise of its
# targets, by $k/T$: 0.02 % at 4K tokens, but 6 % in this chapter's rows of 32 at depth 2. Eq. 25 is
# added up where the main loss is, in chapter 07.


# %%
#| export
def mtp_losses(
    model: Transformer, hidden_states: Iterable[tuple[Tensor, Route]], tokens_bs: Tensor,
    target_bs: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Compute L^k = −1/T Σ log P^k(t_{i+k+1}) of each depth k, in nats (eq. 24).

    T counts all positions, although only T − k of them have a target.
    """
    losses = []
    for k, (h_bsd, _) in enumerate(hidden_states, start=1):
        target_n = target_bs[:, k:].flatten()
        nll = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, target_n)
        losses.append(nll / tokens_bs.numel())
    return losses


# %% [markdown]
# The same as a loop that reads like the report: for every depth, row and position $i$, find
# $t_{i+k+1}$ in the row of $T+1$ tokens and take its log-probability.


# %%
def loop_losses(model: Transformer, row_bs) -> list[float]:
    """Compute eq. 23–24 one token at a time; a row is t_1 … t_{T+1}, and row[i − 1] is t_i."""
    b, length = row_bs.shape
    depths, T = every_depth(row_bs[:, :-1]), length - 1
    losses = [0.0] * (len(depths) - 1)
    for k in range(1, len(depths)):
        for row, h_sd in zip(row_bs.tolist(), depths[k]):
            for i in range(1, T - k + 1):
                logp_w = (model.head.weight @ h_sd[i - 1]).log_softmax(-1)
                losses[k - 1] -= logp_w[row[i + k + 1 - 1]].item() / (T * b)
    return losses


row_bs = torch.randint(TOY.vocab_size, (3, 13))
x_bs, y_bs = row_bs[:, :-1], row_bs[:, 1:]
h0_bsd, _ = model.hidden_states(x_bs)
fast = mtp_losses(model, mtp_hidden_states(model, h0_bsd, x_bs), x_bs, y_bs)
slow = loop_losses(model, row_bs)
print(f"blind guessing would be ln w = {math.log(TOY.vocab_size):.4f} per target")
for k, (a, b) in enumerate(zip(fast, slow), start=1):
    mean = a.item() * 12 / (12 - k)
    print(f"depth {k}: eq. 24 {a:.4f}, loop {b:.4f}; mean over its {12 - k} targets {mean:.4f}")
torch.testing.assert_close(torch.stack(fast), torch.tensor(slow), atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## Shared weights, two paths
# Embedding and head exist once. So the depth-1 loss reaches the embedding table in two ways:
# through $\mathrm{Emb}(t_{i+1})$ directly, and through $h^0$ and the whole main model below it. The
# second is how the main model may become better: its states must help to *plan ahead*. Let us take
# each way alone; the two gradients must add up to the whole (as vectors: their norms need not).

# %%
table, top = model.embed.weight, model.head.weight


def depth_one(h_bsd):
    """Return the depth-1 loss from a given h^0."""
    return mtp_losses(model, mtp_hidden_states(model, h_bsd, x_bs), x_bs, y_bs)[0]


def gradient(loss, weight):
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


whole = gradient(depth_one(h0_bsd), table)
direct = gradient(depth_one(h0_bsd.detach()), table)  # no way down through the main model
dh0_bsd = gradient(depth_one(h0_bsd), h0_bsd)
(through,) = torch.autograd.grad(h0_bsd, table, dh0_bsd, retain_graph=True)
torch.testing.assert_close(direct + through, whole, atol=1e-6, rtol=1e-4)
print(f"embedding: direct {direct.norm():.3f},", end=" ")
print(f"through the main model {through.norm():.3f}, together {whole.norm():.3f}")
main = F.cross_entropy(model.head(h0_bsd).flatten(0, 1), y_bs.flatten())
both, ahead = gradient(main + depth_one(h0_bsd), top), gradient(depth_one(h0_bsd), top)
torch.testing.assert_close(both, gradient(main, top) + ahead, atol=1e-6, rtol=1e-4)
print(f"head: from the main loss {gradient(main, top).norm():.3f}, from depth 1 {ahead.norm():.3f}")
assert min(direct.norm(), through.norm(), ahead.norm()) > 0.01

# %% [markdown]
# ## Would the draft be accepted?
# In *speculative decoding* the main model settles token $i+1$ and the module drafts token $i+2$; the
# next pass of the main model reads both and so shows whether the draft was what it would have
# chosen itself. So the number that counts is agreement, not correctness:
#
# $$a_k = \Pr\big[\arg\max P^k_{i+k+1} = \arg\max P^0_{i+k+1}\big], \qquad \text{tokens per pass} = 1 + a_1$$
#
# with $P^0$ read at position $i+k$, which has seen as much.


# %%
#| export
@torch.no_grad()
def mtp_draft_matches(model: Transformer, tokens_bs: Tensor) -> list[Tensor]:
    """Return where the greedy token of depth k at i is that of the main model at i + k.

    One boolean tensor (b, s − k) per depth: the draft that speculative decoding would accept.
    """
    h_bsd, _ = model.hidden_states(tokens_bs)
    greedy_bs = model.head(h_bsd).argmax(-1)
    drafts = (model.head(h).argmax(-1) for h, _ in mtp_hidden_states(model, h_bsd, tokens_bs))
    return [draft_bs == greedy_bs[:, k:] for k, draft_bs in enumerate(drafts, start=1)]


# %%
greedy = [model.head(h).argmax(-1)[0].tolist() for h in every_depth(sentence_s[None])]
for k, agrees in enumerate(mtp_draft_matches(model, sentence_s[None]), start=1):
    assert agrees[0].tolist() == [greedy[k][i] == greedy[0][i + k] for i in range(14 - k)]

# %% [markdown]
# ## Experiment: songs with wrong notes
# A language that a laptop learns in seconds: 24 fixed songs of 4 to 8 notes, each row repeats one
# of them from a random beat, and one note in ten is replaced by a random one. After a few notes the
# song is clear; the wrong notes cannot be foreseen. We train with $D = 0, 1, 2$ on the same data,
# $\lambda = 0.3$.

# %%
STEPS = 30 if SHORT else 140
notes = torch.Generator().manual_seed(7)
LENGTH_N = torch.randint(4, 9, (24,), generator=notes)
SONG_NL = torch.randint(TOY.vocab_size, (24, 8), generator=notes)


def sing(generator, rows: int = 16, length: int = 33):
    """Return rows of songs, each from a random beat, a tenth of the notes wrong: (rows, length)."""
    song = torch.randint(24, (rows, 1), generator=generator)
    beat = torch.arange(length) + torch.randint(99, (rows, 1), generator=generator)
    right = SONG_NL[song, beat % LENGTH_N[song]]
    wrong = torch.rand(right.shape, generator=generator) < 0.1
    return torch.where(wrong, torch.randint(32, right.shape, generator=generator), right)


def train(depths: int):
    """Return the model, each step's losses (main, depth 1, …) and every tenth step's agreement."""
    torch.manual_seed(1)
    model, data = Transformer(replace(TOY, n_mtp_layers=depths)), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    fresh_bs = sing(torch.Generator().manual_seed(3), rows=64)
    curve, agree = [], []
    for step in range(STEPS):
        row_bs = sing(data)
        x_bs, y_bs = row_bs[:, :-1], row_bs[:, 1:]
        h_bsd, _ = model.hidden_states(x_bs)
        main = F.cross_entropy(model.head(h_bsd).flatten(0, 1), y_bs.flatten())
        depth_losses = mtp_losses(model, mtp_hidden_states(model, h_bsd, x_bs), x_bs, y_bs)
        optimizer.zero_grad()
        (main + 0.3 / max(1, depths) * sum(depth_losses)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append([main.item(), *(a.item() for a in depth_losses)])
        if depths and step % 10 == 9:
            agree.append(mtp_draft_matches(model, fresh_bs)[0].float().mean().item())
    return model, torch.tensor(curve), agree


trained = {depths: train(depths) for depths in (0, 1, 2)}
for depths, (_, curve, agree) in trained.items():
    first, last = curve[0], curve[-10:].mean(0)
    agreement = f"; drafts agree {100 * agree[-1]:.0f} %" if depths else ""
    names = ("main", *(f"depth {k}" for k in range(1, depths + 1)))
    falls = (f"{name} {a:.2f} → {b:.2f}" for name, a, b in zip(names, first, last))
    print(f"D = {depths}: {', '.join(falls)}{agreement}")
    assert (last < (0.9 if SHORT else 0.5) * first).all()


# %%
def smooth(x):
    """Return the means of ten consecutive steps."""
    return x.unfold(0, 10, 1).mean(-1).numpy()


fig, (left, right) = figure(1, 2, width=9, height=3.4)
for depths, color, line in ((0, GRAY, "-"), (1, BLUE, "--"), (2, ORANGE, ":")):
    left.plot(smooth(trained[depths][1][:, 0]), line, color=color, label=f"D = {depths}")
left.set(title="Main loss with 0, 1 and 2 MTP modules", xlabel="step")
left.set(ylabel="main loss (nats per token)", ylim=(0, 3.7))
left.legend()
for k, color, line in ((0, GRAY, "-"), (1, BLUE, "--"), (2, ORANGE, ":")):
    scale = 32 / (32 - k)  # eq. 24 divides by T; here the mean over targets, to compare depths
    label = "main" if k == 0 else f"depth {k}"
    right.plot(smooth(trained[2][1][:, k]) * scale, line, color=color, label=label)
right.set(title="D = 2: all three depths learn", xlabel="step")
right.set(ylabel="mean over targets (nats)", ylim=(0, 3.7))
right.legend()
show(fig)

# %% [markdown]
# What this shows and what it does not. (The curves are means over targets, the printed losses eq. 24,
# a little lower.) All depths learn, together, and the main loss is not disturbed. The deeper losses even lie *below* the main one: their targets come later in the row,
# when the song is clear already, and they have one more block of attention to find it with. That
# MTP makes the main model *better* cannot be seen on a language of 24 songs. The report sees it on
# benchmarks, at sizes from 15.7B.
#
# Here is the agreement of depth 1 on rows not trained on.

# %%
fig, ax = figure(width=7, height=3)
at = range(10, STEPS + 1, 10)
for depths, color, line in ((1, BLUE, "o-"), (2, ORANGE, "s--")):
    percent = [100 * a for a in trained[depths][2]]
    ax.plot(at, percent, line, color=color, label=f"trained with D = {depths}")
ax.axhspan(85, 90, color=GRAY, alpha=0.25)
ax.text(10, 92, "V3: 85–90 %", fontsize=9)
ax.set(xlabel="step", ylabel="agreement (%)", ylim=(0, 100))
ax.set_title("Depth 1 learns to predict what the main model will choose")
ax.legend(loc="lower right")
show(fig)
assert SHORT or all(trained[d][2][-1] > 0.7 for d in (1, 2))

# %% [markdown]
# That the toy ends in V3's band is an accident of its one wrong note in ten. And here the token
# that depth 1 is given comes from the text; a decoder gives it the main model's own choice.

# %% [markdown]
# ### On text
# The question again with words instead of songs: `dsv3 ablate mtp` trains one main model of 1.7M
# parameters with $D = 0, 1, 2$ modules, on speeches and Python source (300 steps of 8 × 128 tokens,
# three seeds, 11 minutes on one core). Agreement is counted on held-out text, each draft given the
# true tokens before it.

# %%
from dsv3_ref.viz import ablation

compared = ablation.load_ablation("mtp")
print(compared["command"])
ablation.print_table(compared, against="D=0")
losses = ablation.values_by_variant(compared)
print("D=1 less D=0, seed by seed:", [f"{x:+.3f}" for x in losses["D=1"] - losses["D=0"]])
CHAINS = {"depth 1, D = 1": ("D=1", 0), "depth 1, D = 2": ("D=2", 0), "both, D = 2": ("D=2", 1)}
for name, (variant, k) in CHAINS.items():
    runs = [run["acceptance_chain"][k] for run in compared["runs"] if run["variant"] == variant]
    print(f"{name}: {100 * sum(runs) / len(runs):.1f} % of drafts agree")

fig, axes = figure(1, 2, width=9.5, height=3.2)


def agreement_at(k: int):
    """Return a function of a point of a curve: the agreement of depth k + 1 in %, or nan."""

    def percent(point) -> float:
        return point["acceptance"][k] * 100 if len(point["acceptance"]) > k else math.nan

    return percent


ablation.plot_dots(axes[0], losses, "Main loss on held-out text", "nats per token")
for k in (0, 1):
    title = "Drafts agree with the main model"
    ablation.plot_curves(axes[1], compared, agreement_at(k), title, "%")
for line, name in zip(axes[1].lines, ("depth 1, D = 1", "depth 1, D = 2", "depth 2, D = 2")):
    line.set_label(name)
axes[1].lines[-1].set(color=GRAY, ls=":")
axes[1].legend()
show(fig)

# %% [markdown]
# At this size MTP is a *cost*: 0.013 ± 0.006 nats of main loss with one module, the same sign in all
# three seeds. It need not contradict the report, whose gains are on benchmarks at 15.7B and more; a
# model of 1.7M parameters may simply have no room for a second question. Drafts agree 58 % of the
# time (the curves, on fewer rows, end at 55 %), far from V3's 85–90 % and still rising. Depth 2 agrees as often as depth 1, for it was given
# one true token more; both in a row agree 35 % of the time, hardly more than two independent
# guesses would (0.58² = 34 %).

# %% [markdown]
# ## Play: how much faster?
# If every draft is accepted with probability $a$ (the **acceptance rate**) and the first refusal ends the chain, $D$
# drafts yield $1 + a + \dots + a^D$ tokens per pass on average. What does such a pass cost? It computes $1 + D$ positions per sequence instead of
# one, and every draft is a pass of an MTP module. A pass over $n$ tokens takes the longer of two times:
#
# $$t(n) = \max\Big(\frac{\text{bytes of the weights read}}{\text{bandwidth}},\ \frac{2\,N_{\text{act}}\,n}{\text{FLOP/s}}\Big).$$
#
# With dense layers the first would not depend on $n$, and a second token would be free as long as decoding is memory-bound. In
# a MoE layer it is not: two tokens choose different experts. If every token chooses $k$ of $E$ at random, $n$ tokens read
#
# $$E\,\big(1 - (1 - k/E)^n\big)$$
#
# distinct experts: 8 for one token, 15.75 for two. So at batch size 1 a draft nearly doubles the bytes. Once a batch reads all experts anyway, a draft
# costs little more memory traffic; and when the batch is so large that FLOPs bind, every refused draft is a loss.


# %%
BANDWIDTH, FLOPS = (
    3.35e12,
    1979e12,
)  # of an H800: bytes/s, FP8 FLOP/s; their ratio is all that counts
EXPERT = 3 * V3.dim * V3.moe_inter_dim  # parameters, a byte each
N_MOE = V3.n_layers - V3.n_dense_layers
HEAD = V3.vocab_size * V3.dim
ACTIVATED = count_params(V3).activated_without_input_embedding
MODULE = 2 * V3.dim**2 + count_mla_params(V3) + count_moe_params(V3, V3.n_activated_experts) + HEAD


def distinct_experts(n: float) -> float:
    """Return how many experts of a layer n tokens choose, if they choose at random."""
    return V3.n_routed_experts * (1 - (1 - V3.n_activated_experts / V3.n_routed_experts) ** n)


def pass_seconds(n: float, activated: int, n_moe: int) -> float:
    """Return the time of a pass over n tokens through n_moe MoE layers; the cache is left out."""
    others = activated - n_moe * V3.n_activated_experts * EXPERT
    read = others + n_moe * distinct_experts(n) * EXPERT
    return max(read / BANDWIDTH, 2 * activated * n / FLOPS)


def speedup(a: float, depth: int, batch: int) -> float:
    """Return tokens per second relative to plain decoding of `batch` sequences."""
    main = pass_seconds(batch * (1 + depth), ACTIVATED, N_MOE)
    drafts = depth * pass_seconds(batch, MODULE, 1)
    tokens = sum(a**k for k in range(depth + 1))
    return tokens * pass_seconds(batch, ACTIVATED, N_MOE) / (main + drafts)


def draw_speedup(acceptance: int = 87) -> None:
    """Draw the speed-up against the batch size, for 1 to 4 drafts."""
    fig, ax = figure(width=7.5, height=3.4)
    batches = [2 ** (i / 4) for i in range(57)]
    for d, color, line in zip(range(1, 5), COLORS, ("-", "--", ":", "-.")):
        gain = [speedup(acceptance / 100, d, b) for b in batches]
        ax.plot(batches, gain, line, color=color, label=f"{d} drafted")
    ax.axhline(1, color=GRAY, lw=1)
    ax.axhline(1.8, color=GRAY, lw=1, ls="--")
    ax.annotate("1.8×, reported", (1.1, 1.8), xytext=(0, 4), textcoords="offset points", color=GRAY)
    ax.set(xscale="log", xlabel="batch size (sequences that read the same weights)")
    ax.set(ylabel="tokens per second (plain = 1)", ylim=(0, 4.3))
    ax.set_title(f"V3, {acceptance} % of drafts accepted: the gain depends on the batch")
    ax.legend(loc="upper left", ncols=2)
    show(fig)


draw_speedup()
print(
    f"distinct experts of 1, 2, 64 tokens: {', '.join(f'{distinct_experts(n):.2f}' for n in (1, 2, 64))}"
)
print(
    f"a draft's pass at batch 1 reads {100 * MODULE / ACTIVATED:.1f} % of what the main model reads"
)
for batch in (1, 8, 64, 256, 16_384):
    low, high = (speedup(a, 1, batch) for a in (0.85, 0.90))
    print(f"batch {batch:6}, one draft: {low:.2f}× to {high:.2f}×")
assert 1.15 < speedup(0.85, 1, 1) < speedup(0.90, 1, 1) < 1.22
assert speedup(0.85, 1, 256) > 1.8 and speedup(0.9, 1, 16_384) < 1

# %%
play(draw_speedup, acceptance=(0, 100, 1))

# %% [markdown]
# The reported 1.8× needs a batch that reads nearly all experts in any case, here more than a hundred sequences, but not so many
# that FLOPs bind, here some thousands. V3's decoding units lie between: an expert usually gets at most 256 tokens at a time and is bound by
# memory (§3.4.2). A single user gains least, 1.17 to 1.20×, and a few users gain even less. The model leaves out communication and the KV
# cache, whose bytes do not depend on the number of positions that are checked; experts chosen by neighboring tokens are also more alike than random ones.

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checks, which come first here, answer with a hint.


# %%
def check_size(fn) -> bool:
    sizes = [V3, TINY, TOY]
    return attempt(lambda: [fn(c) - count_params(c).mtp for c in sizes] == [0, 0, 0],
                   "what does `MTP` hold besides its block, and does `count_mla_params` count a block's norms?")  # fmt: skip


def check_first_loss(fn) -> bool:
    def test():
        row = torch.randint(32, (64, 9), generator=torch.Generator().manual_seed(5))
        x, y = row[:, :-1], row[:, 1:]
        with torch.no_grad():
            quiet = Transformer(replace(TOY, init_std=0.005))
            got = mtp_losses(quiet, mtp_hidden_states(quiet, quiet.hidden_states(x)[0], x), x, y)
        return all(abs(fn(32, 8, k) - got[k - 1].item()) < 0.02 for k in (1, 2))

    return attempt(test, "how many terms has the sum of eq. 24, and what divides it?")


def check_reorder(fn) -> bool:
    def test():
        printed_do2 = fn(module.eh_proj.weight.detach())
        hidden, embedding = module.hnorm(h_bsd), module.enorm(embed_bsd)
        pair = torch.cat((hidden, embedding), dim=-1)  # eq. 21 as printed
        want = module.eh_proj(torch.cat((embedding, hidden), dim=-1))
        return torch.allclose(pair @ printed_do2.T, want, atol=1e-5)

    return attempt(test, "the first d columns meet the first half of the pair")


def check_draft(fn) -> bool:
    singer, prompt_bs = trained[1][0], sing(torch.Generator().manual_seed(6), rows=64, length=20)

    def test():
        with torch.no_grad():
            got_b2 = fn(singer, prompt_bs)
            h_bsd, _ = singer.hidden_states(prompt_bs)
            first_b1 = singer.head(h_bsd)[:, -1:].argmax(-1)
            longer_bs = torch.cat((prompt_bs, first_b1), dim=1)
            ahead_bsd, _ = mtp_hidden_states(singer, h_bsd, longer_bs)[0]
            second_b = singer.head(ahead_bsd[:, -1]).argmax(-1)
        return torch.equal(got_b2, torch.cat((first_b1, second_b[:, None]), dim=1))

    return attempt(test, "which token must depth 1 be given at the prompt's last position?")


# %% [markdown]
# **1 · Compute.** The number of parameters that MTP adds to a config, by arithmetic. `count_mla_params`
# and `count_moe_params` of chapter 00 may help; `count_params(c).mtp` is what you are to find.


# %%
def my_size(c: Config) -> int:
    return ...


check_size(my_size)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_size(c):
#     block = count_mla_params(c) + 2 * c.dim + count_moe_params(c, c.n_routed_experts)
#     return c.n_mtp_layers * (2 * c.dim * c.dim + 3 * c.dim + block)
# ```
# 11.61B for V3, nearly all of it the 256 experts.
# </details>
#
# **2 · Predict.** What is eq. 24 for an untrained model (small weights) with vocabulary `w`, rows
# of `T` positions, at depth `k`?


# %%
def my_first_loss(w: int, T: int, k: int) -> float:
    return ...


check_first_loss(my_first_loss)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_first_loss(w, T, k):
#     return (T - k) / T * math.log(w)
# ```
# </details>
#
# **3 · Break, and mend.** Somebody trained with eq. 21 as printed, [hidden; embedding]. Write the
# function that turns an `eh_proj` weight (d, 2d) from one order into the other. (Why does the same
# function serve for both directions?)


# %%
def my_reorder(weight_do):
    return ...


check_reorder(my_reorder)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_reorder(weight_do):
#     first, second = weight_do.chunk(2, dim=1)
#     return torch.cat((second, first), dim=1)
# ```
# Exchanging two halves twice changes nothing.
# </details>
#
# **4 · Extend.** Draft: given prompts (b, s), return (b, 2): the main model's greedy next token,
# and what depth 1 expects after it.


# %%
def my_draft(model: Transformer, tokens_bs):
    return ...


check_draft(my_draft)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_draft(model, tokens_bs):
#     h_bsd, _ = model.hidden_states(tokens_bs)
#     next_b1 = model.head(h_bsd[:, -1:]).argmax(-1)
#     longer_bs = torch.cat((tokens_bs, next_b1), dim=1)
#     ahead_bsd, _ = mtp_hidden_states(model, h_bsd, longer_bs)[0]
#     return torch.cat((next_b1, model.head(ahead_bsd[:, -1:]).argmax(-1)), dim=1)
# ```
# </details>

# %% [markdown]
# ## Scale-up
# What $D=1$ costs V3 in training, and where it goes.
#
# - **FLOPs bind**, as in all of pre-training: one block and one more product with the head, 4.4 % of
#   a step. The head is the larger part of it.
# - **Memory.** The module is the 62nd layer of the pipeline, with experts sharded like any other's.
#   Embedding and head are needed at both ends of the model; the report keeps the first and the last
#   layers on the *same* pipeline rank, so that MTP shares parameters and gradients without sending
#   them (§3.2.3).
# - **Kernels.** The second head product runs through the same `linear_cross_entropy` op as the main
#   one. A kernel that never stores the logits saves twice.

# %%
matrices = count_params(V3).activated_without_input_embedding
logits = 4096 * V3.vocab_size * 4
print(f"one token: {2 * MODULE / 1e9:.1f} GFLOPs more on {2 * matrices / 1e9:.1f},", end=" ")
print(f"{100 * MODULE / matrices:.1f} % (attention scores aside)")
print(f"of that the head: {100 * V3.vocab_size * V3.dim / MODULE:.0f} %")
share = 100 * count_params(V3).mtp / count_params(V3).total
print(f"weights: {2 * count_params(V3).mtp / 1e9:.1f} GB in bf16, {share:.2f} % of the main model")
print(f"fp32 logits of a second 4K sequence, if they were stored: {logits / 1e9:.1f} GB")
layer_bytes = count_params(V3).cache_bytes // V3.n_layers
print(f"latent cache: one layer more, {layer_bytes:,} bytes per token")
assert 0.04 < MODULE / matrices < 0.05
