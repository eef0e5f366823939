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

# %% [markdown]
# ## Why
# The parts are ready: attention in chapter 03, experts in chapter 04. Stacking them is twenty
# lines, and twenty lines in which nothing raises an error when they are wrong. A norm in the wrong
# place, a cache that is off by one, an embedding tied to the head by mistake: each gives a model
# that runs, trains, and is not DeepSeek-V3.
#
# One number is hard to hit by accident: **671,026,419,200**. Chapter 00 found it by arithmetic.
# Here we build the model at full size, without a byte of memory, count what was built, and demand
# the same number. Then we ask of a small model what no count can tell: does a token see its future,
# does the cache give what the whole sequence gives, do all weights learn?
#
# ![Tokens pass an embedding, 61 blocks along one residual stream, a norm and a head](../figures/05_model.svg)

# %% [markdown]
# ## What the report says
# Section 2.1 keeps the frame of the Transformer and changes its two halves: attention becomes MLA,
# the feed-forward network becomes DeepSeekMoE (figure 2 of the report). Section 4.2 gives the
# sizes: 61 layers of width 7168, the first three with a dense FFN and the others with experts,
# every weight drawn with standard deviation 0.006, and two RMSNorms more than usual, on the two
# latents of MLA. It adds up to 671B parameters, of which a token uses 37B.
#
# Embedding and head are two separate matrices. Nothing has a bias, but for the gate, whose bias is
# no parameter at all (chapter 04).

# %%
#| export
import torch
from torch import Tensor, nn

from dsv3_ref.block import MTP, Block  # below, and chapter 06
from dsv3_ref.config import Config
from dsv3_ref.mla import LayerKVCache
from dsv3_ref.moe import Gate, MoE, Route
from dsv3_ref.ops import RMSNorm
from dsv3_ref.rope import Rope

# %%
import math
import os
from copy import deepcopy
from dataclasses import replace

import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dsv3_ref.config import CONFIGS, TINY, V3, count_params
from dsv3_ref.ops import use
from dsv3_ref.viz import BLUE, COLORS, GRAY, ORANGE, attempt, figure, play, show

_ = torch.manual_seed(0)

# %% [markdown]
# ## One block
# A block never replaces what it is given. It reads the *residual stream* $x$, computes something,
# and adds it back, twice:
#
# $$u = x + \mathrm{MLA}(\mathrm{RMSNorm}(x)), \qquad
#   y = u + \mathrm{FFN}(\mathrm{RMSNorm}(u)), \qquad x, u, y \in \mathbb{R}^{b\times s\times d}$$
#
# The norm stands *before* each half (pre-norm), so an unbroken line of additions leads from the
# last layer back to the embedding, and the gradient with it. In the report these two additions
# appear as the residual connections of figure 2, and as the $u_t +$ of eq. 12.
#
# A block returns its output and, if it has experts, the `Route` its gate chose: the balancing of
# chapter 04 needs it later. It goes to a module of its own, `block`, with the MTP module of chapter 06, which is
# built from it and which the model holds.


# %%
#| export block
from torch import Tensor, nn

from dsv3_ref.config import Config
from dsv3_ref.mla import MLA, LayerKVCache
from dsv3_ref.moe import MoE, Route
from dsv3_ref.ops import MLP, RMSNorm
from dsv3_ref.rope import Rope


class Block(nn.Module):
    """Transformer block: u = x + MLA(norm(x)), then u + FFN(norm(u)).

    The FFN is dense in the first `n_dense_layers` blocks and a mixture of experts in the others.
    """

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = MLA(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        is_dense = index < config.n_dense_layers
        self.ffn = MLP(config.dim, config.inter_dim) if is_dense else MoE(config)

    def forward(
        self, x_bsd: Tensor, rope: Rope, cache: LayerKVCache | None = None
    ) -> tuple[Tensor, Route | None]:
        """Return the residual stream after the block, and the route if it has experts."""
        x_bsd = x_bsd + self.attn(self.attn_norm(x_bsd), rope, cache)
        y = self.ffn(self.ffn_norm(x_bsd))
        y_bsd, r = y if isinstance(y, tuple) else (y, None)
        return x_bsd + y_bsd, r


# %%
# Thanks to the norm, a stream a thousand times larger gets the same addition, and is changed a
# thousand times less by it in proportion.
block = Block(TINY, index=0)
for p in block.parameters():
    if p.ndim > 1:
        nn.init.normal_(p, std=0.02)
x_bsd, rope = torch.randn(2, 10, TINY.dim), Rope.from_positions(TINY, torch.arange(10))
added, added_large = (block.attn(block.attn_norm(a * x_bsd), rope) for a in (1, 1000))
torch.testing.assert_close(added, added_large, atol=1e-6, rtol=1e-4)
for a, y in ((1, added), (1000, added_large)):
    print(f"stream of rms {a:4}: attention adds {y.square().mean().sqrt():.4f}")
# With both output matrices at zero, a block hands its input through, bit for bit.
for p in (block.attn.wo.weight, block.ffn.w2.weight):
    nn.init.zeros_(p)
assert torch.equal(block(x_bsd, rope)[0], x_bsd)
assert isinstance(Block(TINY, 0).ffn, MLP) and isinstance(Block(TINY, 1).ffn, MoE)

# %% [markdown]
# ## A cache for every layer
# While decoding, each layer keeps the latent of every past position (chapter 03). The model's cache
# is therefore just a list, and it holds as many positions as its first layer does.


# %%
#| export
class KVCache(list[LayerKVCache]):
    """List of one `LayerKVCache` per main layer; `length` is the number of cached positions."""

    def __init__(
        self, config: Config, batch: int, max_len: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(
            LayerKVCache(config, batch, max_len, device, dtype) for _ in range(config.n_layers)
        )

    @property
    def length(self) -> int:
        """Number of positions in the cache, the same in all layers."""
        return self[0].length


# %%
cache = KVCache(V3, batch=1, max_len=1, device="meta", dtype=torch.bfloat16)
per_token = sum(layer.kv_btx.nbytes for layer in cache)
assert per_token == count_params(V3).cache_bytes == 70_272
numbers = cache[0].kv_btx.shape[-1]
print(f"V3: {len(cache)} layers × {numbers} numbers in bf16 = {per_token:,} bytes per token")

# %% [markdown]
# ## Sixty-one of them
# With $t$ the tokens (b, s), every $h$ of shape (b, s, d), and $L = 61$ blocks numbered from 0:
#
# $$h_0 = \mathrm{Emb}(t), \qquad h_{l+1} = \mathrm{Block}_l(h_l), \qquad
#   \mathrm{logit} = W^{\mathrm{out}}\,\mathrm{RMSNorm}(h_{L}), \qquad
#   W^{\mathrm{out}} \in \mathbb{R}^{w\times d}$$
#
# Three choices are worth a look before the code. (Its `cu_seqlens` waits for chapter 14,
# where a row holds many conversations.)
#
# - **`hidden_states` and `forward` are apart.** `hidden_states` stops at the normed hidden state. Training
#   multiplies it with the head inside the loss, chapter 06 hands it on to the MTP module,
#   generation needs logits of the last position only. At V3's vocabulary, logits of one 4K sequence
#   in fp32 take 2.1 GB; whoever does not need them should not pay.
# - **Layers sit in a `ModuleDict` under their global number**, not in a list. When a pipeline stage
#   drops the layers that it does not own, `layers.37` is still called `layers.37`, and a checkpoint
#   fits whatever the cut was.
# - **Positions are counted from what the cache holds.** This is the off-by-one of many a model.


# %%
#| export
class Transformer(nn.Module):
    """DeepSeek-V3: tokens (b, s) → logits (b, s, w); with a cache, tokens follow those in it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleDict({str(k): MTP(config) for k in range(config.n_mtp_layers)})
        init_weights(self, config.init_std)
        nn.init.normal_(self.embed.weight, std=config.embed_std)

    def hidden_states(
        self, tokens_bs: Tensor, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Route]]:
        """Compute the normed hidden states (b, s, d) and the route of every MoE layer.

        cu_seqlens: 0 and the end of each sample, if several lie end to end in one row (b = 1).
        """
        if cu_seqlens is None:
            start = cache.length if cache else 0
            position_s = torch.arange(start, start + tokens_bs.shape[1], device=tokens_bs.device)
            rope = Rope.from_positions(self.config, position_s)
        else:
            rope = Rope.from_cu_seqlens(self.config, cu_seqlens, tokens_bs.numel())
        x_bsd = self.embed(tokens_bs)
        routes: list[Route] = []
        for i, block in enumerate(self.layers.values()):
            x_bsd, r = block(x_bsd, rope, cache[i] if cache else None)
            if r is not None:
                routes.append(r)
        return self.norm(x_bsd), routes

    def forward(self, tokens_bs: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.head(self.hidden_states(tokens_bs, cache)[0])


# %% [markdown]
# ## First weights
# Every matrix is drawn from a normal distribution, every norm starts as 1, every gate bias as 0
# (§4.2):
#
# $$W_{oi} \sim \mathcal{N}(0,\ \mathrm{std}^2), \qquad \mathrm{std} = 0.006 \text{ for V3}$$
#
# There is no special rule by depth or by width. What counts is how much a matrix enlarges a vector,
# std·√(fan-in): 0.006·√7168 = 0.51 at V3's width. Our small configs are narrower, so they take a
# larger std to come near it: `SMALL` 0.02·√1024 = 0.64, `TINY` 0.06·√128 = 0.68.
#
# One liberty is ours. `embed_std` lets the embedding start at another size, the last line of the
# constructor above. In V3 the two are equal; in `TINY` it is 1, so that the residual stream starts
# as large as a norm would make it.


# %%
#| export
@torch.no_grad()
def init_weights(model: nn.Module, std: float) -> None:
    """Draw every matrix from N(0, std²); norms start at 1, gate biases at 0 (§4.2)."""
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0.0, std)
        else:
            p.fill_(1.0)
    for gate in (m for m in model.modules() if isinstance(m, Gate)):
        if gate.bias is not None:
            gate.bias.zero_()


# %% [markdown]
# A forward pass on `TINY`, and a number that can be predicted without running it. The head sees
# a vector with mean square 1 (it was normed), so each logit $z$ is a normal variable of variance
# $\sigma^2 = d\cdot\mathrm{std}^2$. The loss is $\ln\sum e^z$ less the target's own $z$. The mean of
# $e^z$ is $e^{\sigma^2/2}$, that of $z$ is 0, and so the expected loss of the untrained model is
#
# $$\mathcal{L}_0 = \ln w + \tfrac12\, d\,\mathrm{std}^2$$
#
# The first term is blind guessing; the second is the price of guessing with confidence and
# without knowledge. Over the 512 targets below the loss scatters by $\sigma/\sqrt{512} = 0.03$.

# %%
model = Transformer(TINY)
tokens_bs = torch.randint(TINY.vocab_size, (8, 65))
with torch.no_grad():
    logit_bsw = model(tokens_bs[:, :-1])
first_loss = F.cross_entropy(logit_bsw.flatten(0, 1), tokens_bs[:, 1:].flatten()).item()
predicted = math.log(TINY.vocab_size) + TINY.dim * TINY.init_std**2 / 2
print(f"logits {tuple(logit_bsw.shape)}, ln w = {math.log(TINY.vocab_size):.3f}")
print(f"loss {first_loss:.3f}, predicted {predicted:.3f}")
assert logit_bsw.shape == (8, 64, TINY.vocab_size)
sigma = TINY.dim**0.5 * TINY.init_std
assert abs(first_loss - predicted) < 4 * sigma / 512**0.5  # 512 targets: four standard errors
assert abs(logit_bsw.var().item() / sigma**2 - 1) < 0.02

# %% [markdown]
# ## Where everything is
# Balancing experts, counting their load, sharding them: all of these walk over the MoE layers by
# name. One function lists them, in the order in which `hidden_states` returns their routes.


# %%
#| export
def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return name → MoE of every MoE layer, in the order of the routes, MTP modules last."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


# %%
with torch.no_grad():
    routes = model.hidden_states(tokens_bs)[1]
names = list(moe_layers(model))
print(names)
assert names == [f"layers.{i}.ffn" for i in (1, 2, 3)] + ["mtp.0.block.ffn"]
assert len(routes) == 3  # the main model's; the MTP module adds its own in chapter 06

# %% [markdown]
# ## The count
# `torch.device("meta")` makes tensors with a shape and no storage: 671 billion parameters in a
# second or two. The sum must be chapter 00's number, exactly, gate biases included and the MTP
# module left out. The MTP module is counted by itself.

# %%
with torch.device("meta"):
    giant = Transformer(V3)
size = {n: t.numel() for n, t in [*giant.named_parameters(), *giant.named_buffers()]}


def part(name: str) -> str:
    """Return the row of the table to which a parameter belongs."""
    kinds = {"mtp": "MTP module", "embed": "embedding", "head": "head", ".attn.": "attention (MLA)",
             ".experts.": "routed experts", ".shared_experts.": "shared expert", ".gate.": "gate and its bias",
             ".ffn.": "dense FFN"}  # fmt: skip
    return next((row for key, row in kinds.items() if key in name), "norms")


rows = dict.fromkeys(map(part, size), 0)
for name, n in size.items():
    rows[part(name)] += n
mtp = rows.pop("MTP module")
share = V3.n_activated_experts / V3.n_routed_experts
used = {row: int(n * share) if row == "routed experts" else n for row, n in rows.items()}
for row in sorted(rows, key=rows.get, reverse=True):
    print(f"{row:18}{rows[row]:>17,}  used by a token {used[row]:>15,}")
print(f"{'all':18}{sum(rows.values()):>17,}  used by a token {sum(used.values()):>15,}")
assert sum(rows.values()) == count_params(V3).total == 671_026_419_200
assert sum(used.values()) == count_params(V3).activated == 37_552_297_472
assert mtp == count_params(V3).mtp

# %%
fig, ax = figure(width=8, height=3.8)
order = sorted((r for r in rows if r != "norms"), key=rows.get)
y = range(len(order))
ax.barh([i + 0.2 for i in y], [rows[r] / 1e9 for r in order], 0.38, color=GRAY, label="stored")
ax.barh([i - 0.2 for i in y], [used[r] / 1e9 for r in order], 0.38, color=ORANGE, hatch="///",
        edgecolor="white", label="used by one token")  # fmt: skip
for i, r in enumerate(order):
    ax.text(rows[r] / 1e9 * 1.1, i + 0.2, f"{rows[r] / 1e9:.2f}", va="center", fontsize=8)
    ax.text(used[r] / 1e9 * 1.1, i - 0.2, f"{used[r] / 1e9:.2f}", va="center", fontsize=8)
ax.set(xscale="log", xlabel="billion parameters (log scale)", xlim=(0.05, 3000))
ax.set_yticks(list(y), order)
ax.set_title("V3 stores 671B parameters, 97 % of them in routed experts; a token uses 37.6B")
ax.legend(loc="lower right")
show(fig)

# %% [markdown]
# "37B activated" hides a counting rule. With both embeddings it is 37.55B, as above. But a token
# reads a single row of the input embedding; without that matrix it is 36.63B, which the report's
# 37B is when rounded (the first would be 38B). State the rule whenever you state the number.
#
# ## No token sees its future
# Change token $i$ and look at every logit. Positions before $i$ must not move; all others should.
# One batch does all changes at once: row $i$ is the same sentence with token $i$ replaced.

# %%
with torch.no_grad():
    sentence_s = tokens_bs[0, :24]
    changed_bs = sentence_s.repeat(24, 1)
    changed_bs.diagonal().copy_((sentence_s + 1) % TINY.vocab_size)
    delta_ijw = model(changed_bs) - model(sentence_s[None])  # row i: token i changed
delta_ij = delta_ijw.abs().amax(-1)
before = delta_ij.tril(-1).max().item()
after = delta_ij[torch.ones(24, 24, dtype=torch.bool).triu()].min().item()
print(f"largest change before the changed token {before:.0e}, smallest from it on {after:.0e}")
assert before < 1e-5 < 1e-3 < after

fig, ax = figure(width=5.4, height=3.9)
image = ax.imshow(delta_ij.clamp(min=1e-7).log10().numpy(), cmap="cividis", vmin=-7, vmax=0)
fig.colorbar(image, label="log₁₀ of the largest logit change")
ax.set(xlabel="position whose logits are read", ylabel="position of the changed token")
ax.set_title("A changed token moves only logits at and after it")
show(fig)

# %% [markdown]
# What remains below the diagonal is rounding: the experts' products sum in another order when
# other tokens share the batch.
#
# ## A cache changes nothing but the time
# *Prefill* reads a prompt at once and fills the cache; *decode* then feeds one token at a time. MLA
# even uses two different forms for the two (expanded and absorbed, chapter 03). All of it together
# must give the logits of one plain pass, whatever the cuts.


# %%
def in_pieces(model: Transformer, tokens_bs, lengths: list[int]):
    """Return the logits (b, s, w) of tokens fed piece by piece through a cache."""
    cache = KVCache(model.config, *tokens_bs.shape)
    return torch.cat([model(piece, cache) for piece in tokens_bs.split(lengths, dim=1)], dim=1)


with torch.no_grad():
    whole = model(tokens_bs)
    for lengths in ([64, 1], [40] + [1] * 25, [1] * 65, [7, 30, 1, 27]):
        error = (in_pieces(model, tokens_bs, lengths) - whole).abs().max().item()
        print(
            f"{len(lengths):3} pieces, first of {lengths[0]:2}: agrees within 1e-4: {error < 1e-4}"
        )
        assert error < 1e-4

# %% [markdown]
# ## Two sets of names
# Our parameters carry the names of DeepSeek's own inference code. The files on Hugging Face use
# other names for the same tensors; `dsv3_ref/checkpoints/huggingface.py` translates, in both directions. All
# under `model.layers.N.` on their side and `layers.N.` on ours, but for the last two rows:
#
# | here | Hugging Face | shape in V3 |
# |---|---|---|
# | `attn_norm`, `ffn_norm` | `input_layernorm`, `post_attention_layernorm` | 7168 |
# | `attn.wq_a`, `attn.q_norm`, `attn.wq_b` | `self_attn.q_a_proj`, `.q_a_layernorm`, `.q_b_proj` | 1536×7168, 1536, 24576×1536 |
# | `attn.wkv_a` | `self_attn.kv_a_proj_with_mqa` | 576×7168 |
# | `attn.kv_norm`, `attn.wkv_b` | `self_attn.kv_a_layernorm`, `.kv_b_proj` | 512, 32768×512 |
# | `attn.wo` | `self_attn.o_proj` | 7168×16384 |
# | `ffn.w1`, `ffn.w2`, `ffn.w3` (dense) | `mlp.gate_proj`, `.down_proj`, `.up_proj` | 18432×7168 and its transpose |
# | `ffn.gate.weight`, `ffn.gate.bias` | `mlp.gate.weight`, `.gate.e_score_correction_bias` | 256×7168, 256 |
# | `ffn.experts.w1[e]`, … | `mlp.experts.{e}.gate_proj`, … | 256 × 2048×7168 |
# | `ffn.shared_experts.w1`, … | `mlp.shared_experts.gate_proj`, … | 2048×7168 |
# | `mtp.0.enorm`, `.hnorm`, `.eh_proj`, `.block.*`, `.norm` | `model.layers.61.enorm`, `.hnorm`, `.eh_proj`, the block's names, `.shared_head.norm` | eh_proj 7168×14336 |
# | `embed`, `norm`, `head` | `model.embed_tokens`, `model.norm`, `lm_head` | 129280×7168 |
#
# One trap: `w1` is the *gate* of SwiGLU and `w3` the *up* projection; `w2` leads back down. And the
# experts, 256 separate matrices of each kind there, are one stacked tensor here, because a grouped
# product wants them side by side.

# %%
shapes = {n: tuple(p.shape) for n, p in giant.named_parameters()}
assert shapes["layers.60.attn.wkv_a.weight"] == (576, 7168)
assert shapes["layers.60.attn.wkv_b.weight"] == (32_768, 512)
assert shapes["layers.60.ffn.experts.w1"] == (256, 2048, 7168)
assert shapes["mtp.0.eh_proj.weight"] == (7168, 14_336)
assert giant.layers["60"].ffn.gate.bias.shape == (256,) and "layers.60.ffn.gate.bias" not in shapes
biases = len(size) - len(shapes)
print(f"{len(shapes):,} parameter tensors, {biases} gate biases (58 layers and the MTP module)")

# %% [markdown]
# ## Experiment: learn one batch by heart
# The shortest proof that all parts are joined: a few random tokens, the same every step. Random
# tokens have nothing to be understood, so the loss can fall only if the model memorizes them, and
# for that the gradient has to reach every part. It starts at the number predicted above.
#
# Beside it, a question that a shallow model cannot answer: what becomes of the residual stream in
# 61 blocks? The sum of additions that are independent of each other should grow like √depth. Only
# width and std decide how large one is, so a narrow model of 61 dense layers will do, with three
# sizes of weights; the largest has V3's std·√d.

# %%
STEPS = 12 if os.environ.get("DSV3_SHORT") else 50
torch.manual_seed(1)
pupil = Transformer(replace(TINY, n_mtp_layers=0))
batch_bs = torch.randint(TINY.vocab_size, (4, 65))
optimizer = torch.optim.AdamW(pupil.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def learn_step(model, tokens_bs) -> float:
    """Take one AdamW step on the mean cross-entropy, gradients clipped at norm 1 (§4.2)."""
    loss = F.cross_entropy(model(tokens_bs[:, :-1]).flatten(0, 1), tokens_bs[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


curve = [learn_step(pupil, batch_bs) for _ in range(STEPS)]
silent = [n for n, p in pupil.named_parameters() if not p.grad.abs().sum() > 0]
print(f"loss {curve[0]:.2f} → {curve[-1]:.2f} nats;", end=" ")
print(f"parameters without gradient: {silent or 'none'}")
assert abs(curve[0] - predicted) < 0.05 and not silent
assert curve[-1] < (0.75 if STEPS < 50 else 0.25) * curve[0]


# %%
def stream_rms(model: Transformer, tokens_bs) -> list[float]:
    """Return the rms of the residual stream after the embedding and after every dense block."""
    rms = []

    def record(_module, _args, y):
        x_bsd = y[0] if isinstance(y, tuple) else y
        rms.append(x_bsd.square().mean().sqrt().item())

    hooks = [m.register_forward_hook(record) for m in (model.embed, *model.layers.values())]
    with torch.no_grad():
        model.hidden_states(tokens_bs)
    for hook in hooks:
        hook.remove()
    return rms


fig, (left, right) = figure(1, 2, width=9, height=3.2)
left.plot(curve, color=BLUE)
left.axhline(predicted, color=GRAY, linestyle="--")
look = {"color": GRAY, "ha": "right", "va": "top", "fontsize": 9}
left.text(STEPS * 0.98, predicted - 0.15, "predicted at init", **look)
left.set(title="One batch, learned by heart", xlabel="step", ylabel="loss (nats per token)")
left.set_ylim(0, 9)
for std, color, line in ((0.045, COLORS[2], ":"), (0.028, ORANGE, "--"), (0.014, BLUE, "-")):
    torch.manual_seed(2)
    deep = replace(TINY, n_layers=61, n_dense_layers=61, n_mtp_layers=0, init_std=std)
    deep = replace(deep, embed_std=std)
    rms = stream_rms(Transformer(deep), batch_bs[:2, :32])
    right.plot(rms, line, color=color, label=f"std·√d = {std * deep.dim**0.5:.2f}")
    print(f"std·√d = {std * deep.dim**0.5:.2f}: ×{rms[60] / rms[15]:.2f} from block 15 to 60")
    assert 1.5 < rms[60] / rms[15] < 2.6  # √depth from block 15 to 60 would be ×2
right.set(xlabel="after block", ylabel="rms of the stream")
right.set_title("At init the residual stream grows like √depth")
right.legend()
show(fig)

# %% [markdown]
# From block 15 to block 60 the depth is four times as large, and the stream about twice, as √4 wants.
#
# ## Play: where the FLOPs go
# A matrix costs two FLOPs (a multiplication and an addition) per weight and token. Attention costs,
# on top, $2h(i{+}r{+}v)$ for every key that a query sees ($h$ heads, keys of width $i+r$, values of
# width $v$, as in chapter 03), on average half the context. Below,
# `flops` counts a token's forward pass by part. First it must agree with what PyTorch itself counts
# while `TINY` runs; there a query multiplies with all $s$ keys, masked or not.


# %%
def flops(c: Config, keys: float) -> dict[str, float]:
    """Return part → forward FLOPs of one token whose queries meet `keys` keys each."""
    n_moe, expert = c.n_layers - c.n_dense_layers, 6 * c.dim * c.moe_inter_dim
    q_in = c.q_lora_rank or c.dim
    q = c.dim * c.q_lora_rank + q_in * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    kv = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim)
    up = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    out = c.n_heads * c.v_head_dim * c.dim
    per_key = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return {
        "MLA matrices": 2 * c.n_layers * (q + kv + up + out),
        "attention to keys": 2 * c.n_layers * per_key * keys,
        "routed experts": n_moe * c.n_activated_experts * (expert + 2 * c.dim),  # and their sum
        "shared expert": n_moe * c.n_shared_experts * expert,
        "gate": 2 * n_moe * c.n_routed_experts * c.dim,
        "dense FFN": 6 * c.n_dense_layers * c.dim * c.inter_dim,
        "head": 2 * c.dim * c.vocab_size,
    }


with torch.no_grad(), use("torch"), FlopCounterMode(display=False) as counter:
    model(tokens_bs)
counted = counter.get_total_flops()
ours = sum(flops(TINY, keys=65).values()) * tokens_bs.numel()
print(f"PyTorch counts {counted:,} FLOPs, we {ours:,}")
assert counted == ours

# %%
PARTS = list(flops(V3, 1))
HATCH = ["", "///", "", "...", "", "\\\\\\", "xx"]


def draw_flops(size: str = "v3", longest: int = 17):
    """Draw a token's forward FLOPs by part, in %, for contexts of 2^10 … 2^longest tokens."""
    lengths = range(10, longest + 1)
    table = [flops(CONFIGS[size], keys=2**n / 2) for n in lengths]
    total = [sum(row.values()) for row in table]
    fig, ax = figure(width=8.6, height=3.6)
    bottom = [0.0] * len(table)
    for name, color, hatch in zip(PARTS, COLORS, HATCH):
        value = [100 * row[name] / t for row, t in zip(table, total)]
        look = {"color": color, "hatch": hatch, "edgecolor": "white"}
        ax.bar(range(len(table)), value, 0.75, bottom, label=name, **look)
        bottom = [b + v for b, v in zip(bottom, value)]
    labels = [f"{2**n // 1024}K\n{t / 1e9:.3g} G" for n, t in zip(lengths, total)]
    ax.set(xticks=range(len(table)), xticklabels=labels, ylabel="share of FLOPs (%)",
           xlabel="context, with forward GFLOPs per token below")  # fmt: skip
    ax.set_title(f"{size}: long contexts turn a model of experts into a model of attention")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    show(fig)


draw_flops()

# %% [markdown]
# At 4K tokens routed experts do half of V3's work; at 32K the meeting of queries and keys has taken
# over that half. Does the same happen to the smaller sizes, and where?

# %%
play(draw_flops, size=list(CONFIGS)[::-1], longest=(11, 20, 1))

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checks, which come first here, answer with a hint.


# %%
def check_share(fn) -> bool:
    truth = {V3: 653_908_770_816 / 671_026_419_200, TINY: 2_359_296 / count_params(TINY).total}
    return attempt(lambda: all(math.isclose(fn(c), t, rel_tol=1e-9) for c, t in truth.items()),
                   "how many layers have experts, and how many matrices has one?")  # fmt: skip


def check_first_loss(fn) -> bool:
    sizes = [TINY, replace(TINY, vocab_size=256)]
    sizes += [replace(TINY, init_std=x) for x in (0.03, 0.12)]

    def test():
        for c in sizes:
            torch.manual_seed(3)
            with torch.no_grad():
                logit = Transformer(replace(c, n_mtp_layers=0))(tokens_bs[:, :-1] % c.vocab_size)
            target_n = (tokens_bs[:, 1:] % c.vocab_size).flatten()
            got = F.cross_entropy(logit.flatten(0, 1), target_n).item()
            if abs(got - fn(c)) > 4 * c.dim**0.5 * c.init_std / 512**0.5:  # four standard errors
                return False
        return True

    return attempt(test, "ln w is only the first term: what is the variance of a logit?")


def check_parallel(fn) -> bool:
    x = torch.randn(2, 6, TINY.dim)
    rope = Rope.from_positions(TINY, torch.arange(6))

    def test():
        for i in ("0", "1"):  # dense, and with experts
            b = deepcopy(model.layers[i])
            nn.init.constant_(b.ffn_norm.weight, 0.5)  # at the start both norms are the same
            y = b.ffn(b.ffn_norm(x))
            want = x + b.attn(b.attn_norm(x), rope) + (y[0] if isinstance(y, tuple) else y)
            if not torch.allclose(fn(b, x, rope), want, atol=1e-5):
                return False
        return True

    return attempt(test, "which x and which norm does each half read, and what does a MoE return?")


def check_prefill(fn) -> bool:
    fed, read = [], []  # tokens per row of every piece, positions that met the head
    watch = [
        model.layers["0"].register_forward_pre_hook(lambda _, a: fed.append(a[0].shape[1])),
        model.head.register_forward_pre_hook(lambda _, a: read.append(a[0][..., 0].numel())),
    ]

    def test():
        cache = KVCache(TINY, *tokens_bs.shape)
        with torch.no_grad():
            got = fn(model, tokens_bs, cache, 16)
            longest, positions = max(fed, default=0), sum(read)
            close = torch.allclose(got, model(tokens_bs)[:, -1], atol=1e-4)
        return close and longest <= 16 and cache.length == 65 and positions == len(tokens_bs)

    right = attempt(test, "which pieces, with which cache, and how many positions meet the head?")
    for hook in watch:
        hook.remove()
    return right


# %% [markdown]
# **1 · Compute.** Which fraction of all main-model parameters sits in routed experts? Use only
# fields of the config and `count_params`.


# %%
def my_share(c: Config) -> float:
    return ...


check_share(my_share)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_share(c):
#     n_moe = c.n_layers - c.n_dense_layers
#     return n_moe * c.n_routed_experts * 3 * c.dim * c.moe_inter_dim / count_params(c).total
# ```
# 97.45 % for V3. This is why expert parallelism comes before every other kind.
# </details>
#
# **2 · Predict.** The loss of an untrained model of any config, in nats. The check builds four
# of them, two with half and with twice the std, and compares.


# %%
def my_first_loss(c: Config) -> float:
    return ...


check_first_loss(my_first_loss)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_first_loss(c):
#     return math.log(c.vocab_size) + c.dim * c.init_std**2 / 2
# ```
# For V3: ln 129,280 + 7168·0.006²/2 = 11.77 + 0.13 = 11.90 nats. A first loss far from this number
# is the cheapest alarm of a training run.
# </details>
#
# **3 · Break.** Some models compute both halves of a block from the *same* input, so that they can
# run at once: $y = x + \mathrm{MLA}(\mathrm{norm}_1(x)) + \mathrm{FFN}(\mathrm{norm}_2(x))$. Write
# it for our `Block`. (Loading V3's weights into it would give nonsense, and no error.)


# %%
def my_parallel(block: Block, x_bsd, rope):
    return ...


check_parallel(my_parallel)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_parallel(block, x_bsd, rope):
#     y = block.ffn(block.ffn_norm(x_bsd))
#     y_bsd = y[0] if isinstance(y, tuple) else y
#     return x_bsd + block.attn(block.attn_norm(x_bsd), rope) + y_bsd
# ```
# </details>
#
# **4 · Extend.** A prompt of 100,000 tokens at once needs much memory for activations. Prefill it
# in chunks: feed at most `chunk` tokens at a time into the cache and return the logits of the last
# position, (b, w). Do not compute logits that are not used.


# %%
def my_prefill(model: Transformer, tokens_bs, cache: KVCache, chunk: int):
    return ...


check_prefill(my_prefill)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_prefill(model, tokens_bs, cache, chunk):
#     for piece_bs in tokens_bs.split(chunk, dim=1):
#         h_bsd, _ = model.hidden_states(piece_bs, cache)
#     return model.head(h_bsd[:, -1])
# ```
# </details>

# %% [markdown]
# ## Scale-up
# What one copy of the model asks of the hardware, and how fast the report's machines really ran.
# An H800 has 80 GB of memory and, like the H100, a peak near 989 TFLOP/s in bf16 and 1979 in FP8.
#
# - **Training is bound by FLOPs**, once the all-to-all between experts is hidden behind them. The *model FLOPs
#   utilization* (MFU) is the rate at which the FLOPs of forward and backward pass are done, divided by the peak. The
#   387 TFLOP/s per GPU leave out the MTP module, and MFU never counts recomputation. Four fifths of the FP8 peak are
#   missing: attention runs in bf16, tensor cores do not reach their peak, memory-bound operations, bubbles, the 20 SMs
#   that communicate, stragglers and restarts take the rest ([chapter 17](17_scale.ipynb) adds them up).
# - **Decoding is bound by memory**: a single token reads the 37B weights that it uses; many tokens
#   read nearly all 671B, and share the cost.
# - **Who takes over.** The products go through the ops of chapter 01 (`linear`, `grouped_linear`):
#   a kernel of the same signature takes the same calls. The experts, 97 % of the bytes, are spread
#   over 64 GPUs in the report (chapter 11), and the `ModuleDict` of layers is cut into 16 pipeline
#   stages (chapter 12). Neither changes a line of this chapter.

# %%
n = count_params(V3).total
forward = sum(flops(V3, keys=4096 / 2).values())
spent = 3 * forward * 14.8e12  # backward costs two forwards; 14.8T tokens
rate = spent / (2664e3 * 3600)
for kind, width in (("FP8", 1), ("bf16", 2)):
    gpus = math.ceil(width * n / 80e9)
    print(f"weights in {kind}: {width * n / 1e9:.0f} GB, at least {gpus} GPUs of 80 GB")
print(f"training state, fp32 master and gradient, two bf16 moments: {12 * n / 1e12:.1f} TB")
print(f"forward at 4K: {forward / 1e9:.1f} GFLOPs per token;", end=" ")
print(f"14.8T tokens trained: {spent:.1e} FLOPs")
print(f"in 2664K GPU hours (§1): {rate / 1e12:.0f} TFLOP/s per GPU,", end=" ")
print(f"{100 * rate / 989e12:.0f} % of the bf16 peak, {100 * rate / 1979e12:.0f} % of FP8's")
assert math.ceil(n / 80e9) == 9 and 380e12 < rate < 400e12
