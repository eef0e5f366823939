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
# # 00 · Tour: one model, four sizes

# %% [markdown]
# ## Why
# A language model reads tokens and guesses the next one. Make it larger and it guesses better, but
# every weight that takes part costs two operations per token, and every token it remembers costs
# memory. DeepSeek-V3 holds **671 billion** parameters and lets one token touch only **one in
# eighteen** of them. This chapter says where they all are, before we build any.
#
# ![The model: a main stack of 61 blocks, each an MLA and a DeepSeekMoE, and an MTP module](../figures/00_model.svg)
#
# Follow the picture from the bottom. A token becomes a vector, 61 blocks add to it, and a head turns
# it into 129,280 scores, one for each word it knows. The dashed lines open two boxes: attention
# (MLA, *multi-head latent attention*) and the mixture of experts (DeepSeekMoE). At the right a small
# module predicts one token further (MTP, *multi-token prediction*).

# %% [markdown]
# ## Paper
# The technical report (arXiv 2412.19437) describes this architecture in §2 and its size in §4.2.
# Three claims can be checked with nothing but multiplication:
#
# - **671B parameters in total, 37B activated for each token** (§2, §4.2). *Activated* means: the
#   weights that one token's computation really uses. The rest are experts it did not visit.
# - **Attention remembers little** (§2.1.1): a compressed *latent* and one *rotary key*, which carries
#   the position, for each token and layer, instead of keys and values for 128 heads.
# - **It was affordable** (§1, table 1): 180 thousand H800 hours for each trillion training tokens.
#
# To run the chapters: `pip install -e ".[lab]"` in a checkout, then `jupyter lab notebooks`.
#
# What you will meet where:
#
# | chapter | in the picture |
# |---|---|
# | [01](01_ops.ipynb) · [02](02_rope.ipynb) | RMSNorm, products, SwiGLU · how position enters |
# | [03](03_mla.ipynb) · [04](04_moe.ipynb) | the two boxes in the middle |
# | [05](05_model.ipynb) · [06](06_mtp.ipynb) | the stack on the left · the module on the right |
# | [07](07_pretrain.ipynb) · [08](08_generate.ipynb) · [09](09_fp8.ipynb) | training it · using it · products in eight bits |
# | [10](10_triton.ipynb) · [11](11_expert_parallel.ipynb) · [12](12_dualpipe.ipynb) | fast on one GPU · experts on many · layers on many |
# | [14](14_sft_distill.ipynb) · [15](15_rewards.ipynb) · [16](16_grpo.ipynb) | teaching it to answer: examples · rewards · reinforcement |
# | [17](17_scale.ipynb) | the whole run on 2,048 GPUs, by arithmetic |

# %%
#| export config
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

# %%
import itertools
import math
import tempfile

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_ref.viz import COLORS, GRAY, ORANGE, attempt, figure, play, show

# %% [markdown]
# ## A model that runs
# Before the arithmetic, meet the thing itself. `notebooks/models/tiny` is a DeepSeek-V3 of 5.3 million
# parameters, trained in five minutes on two CPU cores by `make train`. It has every mechanism of the large one
# but YaRN, in sizes that fit on a screen: 4 layers instead of 61, 16 experts instead of 256.
# It has read speeches and Python's standard library, so it knows how English *looks*, and little else.

# %%
from dsv3_ref import generate, load
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.viz.explainer import SHIPPED_MODEL

tiny = load(SHIPPED_MODEL, dtype=torch.float32)
tokenizer = load_tokenizer(SHIPPED_MODEL)


def encode(text: str) -> torch.Tensor:
    """Return the tokens of a text, (1, s); the first one marks the beginning of a document."""
    return torch.tensor([tokenizer.encode(text).ids])


random = torch.Generator().manual_seed(3)
written_bs = generate(tiny, encode("My fellow Americans,"), 60, 0.8, random)
print(tokenizer.decode(written_bs[0].tolist()))

# %% [markdown]
# A model of this kind only ever predicts the next token. So **follow one token**: the last one of a
# short text, through one mixture layer. Every step below is a chapter; here only watch the shapes. Letters at
# the end of a name are its axes: `x_bsd` has batch (1 text), sequence (its tokens) and `dim`, 128 numbers.

# %%
from dsv3_ref.rope import Rope

text_bs = encode("The state of the Union is")
pieces = [tokenizer.decode([i]) for i in text_bs[0].tolist()]
pieces[0] = "start"
print(pieces)

with torch.no_grad():
    x_bsd = tiny.embed(text_bs)
    print("1 embedding:       ", tuple(x_bsd.shape), "a row of the embedding matrix per token")

    rope = Rope.from_positions(tiny.config, torch.arange(len(pieces)))
    x_bsd, _ = tiny.layers["0"](x_bsd, rope)
    print("2 after layer 0:   ", tuple(x_bsd.shape), "each block adds to this residual stream")

    block = tiny.layers["1"]
    normed_bsd = block.attn_norm(x_bsd)
    cached_bsx = block.attn.down_project_kv(normed_bsd, rope)
    print("3 the KV cache:    ", tuple(cached_bsx.shape), "a latent of 128 and a rotary key of 32")

    x_bsd = x_bsd + block.attn(normed_bsd, rope)
    route = block.ffn.gate(block.ffn_norm(x_bsd))
    ids, weights = route.topk_ids_bsk[0, -1].tolist(), route.topk_weights_bsk[0, -1].tolist()
    visited = ", ".join(f"{e} (weight {w:.2f})" for e, w in zip(ids, weights))
    print("4 the router:      ", tuple(route.topk_ids_bsk.shape), f"to experts {visited}")

    x_bsd = x_bsd + block.ffn(block.ffn_norm(x_bsd))[0]
    for i in ("2", "3"):
        x_bsd, _ = tiny.layers[i](x_bsd, rope)
    h_bsd = tiny.norm(x_bsd)
    logits_bsw = tiny.head(h_bsd)
    print(
        "5 logits:          ", tuple(logits_bsw.shape), "a score for each token of the vocabulary"
    )
assert torch.allclose(logits_bsw, tiny(text_bs), atol=1e-4)  # nothing was left out


def most_likely(logits_w: torch.Tensor, n: int = 5) -> str:
    """List the n most likely tokens with their probabilities."""
    best = logits_w.softmax(-1).topk(n)
    pairs = zip(best.values.tolist(), best.indices.tolist())
    return ", ".join(f"{tokenizer.decode([i])!r} {p:.0%}" for p, i in pairs)


print("next token:        ", most_likely(logits_bsw[0, -1]))

# %% [markdown]
# The module for multi-token prediction looks one token further: from the state of a token and the token after it,
# it predicts the one after that, without running the four layers again. When its draft is what the main model
# would have chosen, one step gives two tokens ([chapter 08](08_generate.ipynb)).

# %%
from dsv3_ref.mtp import mtp_hidden_states

with torch.no_grad():
    ahead_bsd, _ = mtp_hidden_states(tiny, h_bsd, text_bs)[0]
    drafts_bsw = tiny.head(ahead_bsd)
print("draft by MTP:      ", most_likely(drafts_bsw[0, -1]))
draft_s = drafts_bsw[0].argmax(-1)
agrees_s = draft_s == logits_bsw[0, 1:].argmax(-1)
print(f"{int(agrees_s.sum())} of {len(agrees_s)} drafts are what the main model would choose")

# %% [markdown]
# The router of every mixture layer chooses for every token by itself. Below, the affinities of the last token to the
# 16 experts, in four groups of which two are open: filled bars are chosen. An expert can be chosen although others
# have a higher bar, because their groups are closed or because of the bias that balances the load
# ([chapter 04](04_moe.ipynb)). The same model runs in a web page
# with all of this drawn token by token, where experts can be switched off: `make play`, or
# `dsv3 explain notebooks/models/tiny`.

# %%
with torch.no_grad():
    routes = tiny.hidden_states(text_bs)[1]
fig, axes = figure(1, len(routes), width=8.6, height=2.4, sharey=True)
for ax, route, layer in zip(axes, routes, range(1, 4)):
    chosen = set(route.topk_ids_bsk[0, -1].tolist())
    colors = [ORANGE if e in chosen else "#d9dee5" for e in range(16)]
    ax.bar(range(16), route.scores_bse[0, -1].tolist(), color=colors, edgecolor=GRAY, lw=0.6)
    for group in (4, 8, 12):
        ax.axvline(group - 0.5, color=GRAY, lw=0.6, ls=":")
    ax.set(title=f"layer {layer}", xlabel="expert, by group", xticks=range(0, 16, 4))
axes[0].set_ylabel("affinity of “is”")
show(fig)

# %% [markdown]
# ## The config
# One frozen dataclass holds the whole shape; **its defaults are the 671B model**. The names are
# those of DeepSeek's own inference code (the released `config.json` uses Hugging Face's, and one table
# translates). The letter in a comment is the axis letter used everywhere in this project: a tensor
# called `q_bshr` has axes batch, position, head and rotary dim, and so its last axis has
# `qk_rope_head_dim` entries. Three words need explaining at once, the others wait for their chapters:
#
# - a **latent** (`q_lora_rank`, `kv_lora_rank`) is a narrow vector from which wide ones are made;
# - a head's query has a part without position, `nope`, and one that carries position, `rope`;
# - an **expert** is a small feed-forward network; *routed* experts are chosen token by token, in
#   *groups*; *shared* ones always run.


# %%
#| export config
@dataclass(frozen=True)
class Config:
    """Shape of a DeepSeek-V3; the defaults are the 671B model, names are DeepSeek's (§2, §4.2)."""

    vocab_size: int = 129_280  # w, tokens in the vocabulary: rows of embedding and head
    dim: int = 7168  # d, width of the residual stream
    inter_dim: int = 18_432  # f, hidden width of a dense FFN
    moe_inter_dim: int = 2048  # f, hidden width of one expert
    n_layers: int = 61  # Transformer blocks of the main model
    n_dense_layers: int = 3  # number of leading blocks with a dense FFN
    n_heads: int = 128  # h, attention heads
    q_lora_rank: int = 1536  # q, width of the query latent; 0: queries are not compressed
    kv_lora_rank: int = 512  # c, width of the latent of keys and values
    qk_nope_head_dim: int = 128  # i, width of queries and keys per head, without position
    qk_rope_head_dim: int = 64  # r, width of queries and keys per head, with RoPE
    v_head_dim: int = 128  # v, width of values per head
    n_routed_experts: int = 256  # e, routed experts per MoE layer
    n_shared_experts: int = 1  # shared experts per MoE layer, used by every token
    n_activated_experts: int = 8  # k, routed experts per token
    n_expert_groups: int = 8  # g, groups of routed experts
    n_limited_groups: int = 4  # groups that a token may use, M in §2.1.2
    score_func: str = "sigmoid"  # affinity of tokens to experts: sigmoid, or softmax (V2-Lite)
    route_scale: float = 2.5  # multiplier of the routing weights
    n_mtp_layers: int = 1  # MTP modules, D in §2.2
    max_seq_len: int = 163_840  # longest sequence, in tokens
    original_seq_len: int = 4096  # sequence length before YaRN, in tokens
    rope_theta: float = 10_000.0  # base of the RoPE frequencies
    rope_factor: float = 40.0  # YaRN's s, factor on the sequence length; 1: plain RoPE
    beta_fast: float = 32.0  # YaRN keeps frequencies with more rotations than this
    beta_slow: float = 1.0  # YaRN interpolates frequencies with fewer rotations than this
    mscale: float = 1.0  # YaRN's factor in the correction of the softmax scale
    norm_eps: float = 1e-6  # ε of the RMSNorms of the residual stream; those of latents have 1e-6
    init_std: float = 0.006  # standard deviation of the initial weights
    embed_std: float = 0.006  # standard deviation of the initial embedding; not in the report

    def __post_init__(self):
        validate_config(self)


# %% [markdown]
# ## What must divide what
# A config is wrong far more often than code is, so every config checks itself when it is made, and
# the error is a sentence that names the field. The rules are those of the architecture: RoPE, which
# carries position ([chapter 02](02_rope.ipynb)), turns *pairs* of numbers, so $r$ is even; $e$ experts
# fall into $g$ equal groups; and the $k$ experts of a token must fit into the $M$ groups it may use,
#
# $$e \bmod g = 0,\qquad k \le M\cdot\frac{e}{g}\qquad (\text{V3: } 8 \le 4\cdot 32).$$


# %%
#| export config
class UserError(ValueError):
    """Mistake of the user: the command line prints its message without a traceback."""


def suggest(name: str, names: Iterable[str]) -> str:
    """Return “ (did you mean x?)” with up to three similar names, or "" if none is similar."""
    similar = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""


def ceil_div(a: int, b: int) -> int:
    """Return ⌈a / b⌉ for whole numbers, b > 0: how many blocks of b cover a."""
    return (a + b - 1) // b


def validate_config(config: Config) -> None:
    """Raise a `UserError` that names the field if a model of this shape cannot be built."""
    for f in fields(config):
        value, least = getattr(config, f.name), 0 if f.name in MAY_BE_ZERO else 1
        if isinstance(f.default, int) and (type(value) is not int or value < least):
            raise UserError(f"{f.name} must be a whole number of at least {least}, not {value!r}")
        if isinstance(f.default, int) and value > LARGEST:
            raise UserError(f"{f.name} must be at most {LARGEST}, not {value}")
        if isinstance(f.default, float) and not (isinstance(value, (int, float)) and value >= 0):
            raise UserError(f"{f.name} must be a number of at least 0, not {value!r}")
        if isinstance(f.default, float) and value > LARGEST_FLOAT:
            raise UserError(f"{f.name} must be at most {LARGEST_FLOAT}, not {value}")
    rules = [
        (config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE turns pairs"),
        (config.n_dense_layers <= config.n_layers, "n_dense_layers cannot exceed n_layers"),
        (config.score_func in ("sigmoid", "softmax"), "score_func is 'sigmoid' or 'softmax'"),
        (config.rope_factor >= 1, "rope_factor must be at least 1 (1 switches YaRN off)"),
        (config.rope_theta > 1, "rope_theta must be above 1"),
        (min(config.beta_fast, config.beta_slow) > 0, "beta_fast and beta_slow must be above 0"),
        (
            config.n_routed_experts % config.n_expert_groups == 0,
            f"n_routed_experts ({config.n_routed_experts}) must be a multiple of "
            f"n_expert_groups ({config.n_expert_groups})",
        ),
        (
            config.n_limited_groups <= config.n_expert_groups,
            "n_limited_groups cannot exceed n_expert_groups",
        ),
        (
            config.n_activated_experts * config.n_expert_groups
            <= config.n_limited_groups * config.n_routed_experts,
            f"n_activated_experts ({config.n_activated_experts}) must fit into the "
            f"{config.n_limited_groups} groups a token may use",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


MAY_BE_ZERO = {"q_lora_rank", "n_shared_experts", "n_dense_layers", "n_mtp_layers"}
LARGEST = 2**31 - 1  # size of anything: a tensor of two such axes can still be described
LARGEST_FLOAT = 1e12  # far above every number of a config


# %%
# Each of these configs is impossible for another reason, and each sentence names the field.
def complaint(make) -> str:
    """Return the message of the `UserError` that `make()` raises, '' if it raises none."""
    try:
        make()
    except UserError as e:
        return str(e)
    return ""


for name, value in [
    ("dim", 0),
    ("n_layers", 2.5),
    ("qk_rope_head_dim", 63),
    ("n_dense_layers", 62),
    ("n_routed_experts", 250),
    ("n_limited_groups", 9),
    ("n_activated_experts", 129),
]:
    sentence = complaint(lambda name=name, value=value: Config(**{name: value}))
    assert name in sentence
    print(f"{name}={value}: {sentence}")
assert complaint(Config) == "" and complaint(lambda: Config(q_lora_rank=0)) == ""


# %% [markdown]
# ## Four sizes
# Small is a *config*, not another implementation: the four sizes run the same lines of code and
# each states only what differs from V3.
#
# - `TINY`, 4M parameters: every mechanism but YaRN (which stretches V3 to long texts) is on, and a CPU
#   trains it. Chapters use it.
# - `SMALL`, 0.5B: for one GPU.
# - `V2_LITE`, 16B: DeepSeek-V2-Lite, the older shape. Its *gate*, which chooses experts, is a softmax,
#   and its queries have no latent.
# - `V3`, 671B.

# %%
#| export config
V3 = Config()
V2_LITE = replace(
    V3, vocab_size=102_400, dim=2048, inter_dim=10_944, moe_inter_dim=1408, n_layers=27,
    n_dense_layers=1, n_heads=16, q_lora_rank=0, n_routed_experts=64, n_shared_experts=2,
    n_activated_experts=6, n_expert_groups=1, n_limited_groups=1, score_func="softmax",
    route_scale=1.0, mscale=0.707, n_mtp_layers=0,
)  # fmt: skip
SMALL = replace(
    V3, vocab_size=32_768, dim=1024, inter_dim=2816, moe_inter_dim=512, n_layers=12,
    n_dense_layers=1, n_heads=8, q_lora_rank=384, kv_lora_rank=256, n_routed_experts=24,
    n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, max_seq_len=2048,
    original_seq_len=2048, rope_factor=1.0, init_std=0.02, embed_std=0.02,
)  # fmt: skip
TINY = replace(
    V3, vocab_size=4096, dim=128, inter_dim=640, moe_inter_dim=128, n_layers=4, n_dense_layers=1,
    n_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32,
    v_head_dim=32, n_routed_experts=16, n_activated_experts=4, n_expert_groups=4,
    n_limited_groups=2, max_seq_len=256, original_seq_len=256, rope_factor=1.0, init_std=0.06,
    embed_std=1.0,
)  # fmt: skip
CONFIGS = {"tiny": TINY, "small": SMALL, "v2_lite": V2_LITE, "v3": V3}


# %%
# Every field in which they differ; of the mechanisms TINY lacks YaRN alone (rope_factor 1).
print(f"{'':22}" + "".join(f"{size:>10}" for size in CONFIGS))
for f in fields(Config):
    row = [getattr(c, f.name) for c in CONFIGS.values()]
    if len(set(row)) > 1:
        print(f"{f.name:22}" + "".join(f"{x:>10}" for x in row))
assert len(set(CONFIGS.values())) == 4
assert TINY.n_expert_groups > TINY.n_limited_groups > 1 and TINY.n_shared_experts > 0
assert 0 < TINY.n_dense_layers < TINY.n_layers and TINY.q_lora_rank > 0 and TINY.n_mtp_layers > 0


# %% [markdown]
# ## Counting attention
# Now the bookkeeping. One MLA has a path for queries (down to the latent $q$, a norm, up to the heads),
# one for keys and values (down to $c$ and the rotary key $r$; a norm on $c$, and up), and an output
# matrix:
#
# $$N_{\text{MLA}} = \underbrace{q\,(d + 1 + h(i+r))}_{\text{queries}}
# + \underbrace{d\,(c+r) + c}_{\text{what is remembered}}
# + \underbrace{c\,h(i+v)}_{\text{keys and values}} + \underbrace{hv\,d}_{\text{output}} .$$
#
# The lone $1$ and $c$ are the scales of the two norms. With no query latent the first term is
# $d\,h(i+r)$.


# %%
#| export config
def count_mla_params(config: Config) -> int:
    """Count one MLA: d→q→h(i+r) (or d→h(i+r)), d→c+r, c→h(i+v), hv→d and two norms."""
    heads_q = config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    q = config.dim * heads_q
    if config.q_lora_rank:
        q = config.q_lora_rank * (config.dim + 1 + heads_q)
    kv = config.dim * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    up = config.kv_lora_rank * config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + kv + up + config.n_heads * config.v_head_dim * config.dim


# %%
# The shapes of one layer, written out as they lie in the released files.
shapes = {
    "wq_a": (1536, 7168), "q_norm": (1536,), "wq_b": (128 * 192, 1536), "wkv_a": (576, 7168),
    "kv_norm": (512,), "wkv_b": (128 * 256, 512), "wo": (7168, 128 * 128),
}  # fmt: skip
sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
for name, n in sizes.items():
    print(f"{name:8}{str(shapes[name]):>16}{n:>14,}")
assert sum(sizes.values()) == count_mla_params(V3) == 187_107_328


# %% [markdown]
# ## Counting experts
# A feed-forward network here has three matrices (chapter 01), so one expert is $3\,d f$. A mixture
# layer has $e$ routed experts, $e_s$ shared ones and a gate with one row per routed expert, to which
# the sigmoid gate adds one bias each:
#
# $$N_{\text{MoE}} = e\,(d + 1) + (e + e_s)\cdot 3\,d f .$$
#
# For one token, replace the $e$ of the second term by $k$: it visits eight, but asks the whole gate.


# %%
#| export config
def count_moe_params(config: Config, n_experts: int) -> int:
    """Count one MoE layer: the gate, and 3·d·f for each of n_experts and of the shared experts."""
    gate = config.n_routed_experts * (config.dim + (config.score_func == "sigmoid"))
    return gate + (n_experts + config.n_shared_experts) * 3 * config.dim * config.moe_inter_dim


# %%
whole = count_moe_params(V3, V3.n_routed_experts)
used = count_moe_params(V3, V3.n_activated_experts)
print(f"one MoE layer: {whole / 1e9:.2f}B parameters, {used / 1e9:.2f}B used by a token")
print(f"one dense FFN: {3 * V3.dim * V3.inter_dim / 1e9:.2f}B, all used")
# the dense FFN is as wide as the nine experts that a token meets: 9 · 2048 = 18,432
assert 3 * V3.dim * V3.inter_dim == used - V3.n_routed_experts * (V3.dim + 1)


# %% [markdown]
# ## Counting parameters and cache
# Each of the $L$ blocks has two norms besides. At its two ends the model has a table with a row for
# each of $w$ words, the embedding and the head, and before the head a last norm, $d$:
#
# $$N = L\,(N_{\text{MLA}} + 2d) + L_{\text{dense}}\cdot 3\,d f_{\text{dense}}
# + (L - L_{\text{dense}})\,N_{\text{MoE}} + 2\,w d + d .$$
#
# The report's "37B activated" depends on a **counting rule**, so we always state it: both tables
# counted (of the embedding a token reads only one row), or the head alone. The MTP module shares
# both tables; its own are one block, three norms and a matrix $2d \to d$. The total includes
# 58 · 256 = 14,848 gate biases, which no gradient moves ([chapter 04](04_moe.ipynb)).
#
# The cache is counted in bytes per token: 2 bytes for each of the $c + r$ numbers that a layer remembers.


# %%
#| export config
@dataclass(frozen=True)
class ParamCount:
    """Numbers of parameters, and bytes of cache per token."""

    total: int  # main model, gate biases included, MTP excluded
    activated: int  # touched by one token, both embeddings counted
    activated_without_input_embedding: int  # the same without the input embedding (one row is read)
    mtp: int  # unique to the MTP modules: embedding and head are shared
    cache_bytes: int  # latent cache of all main layers, bf16


def count_params(config: Config) -> ParamCount:
    """Count parameters and cache bytes by arithmetic alone: V3's total is 671,026,419,200."""
    attn = count_mla_params(config) + 2 * config.dim  # with the block's two norms
    dense = config.n_dense_layers * 3 * config.dim * config.inter_dim
    n_moe, embed = config.n_layers - config.n_dense_layers, config.vocab_size * config.dim
    rest = config.n_layers * attn + dense + 2 * embed + config.dim
    total = rest + n_moe * count_moe_params(config, config.n_routed_experts)
    active = rest + n_moe * count_moe_params(config, config.n_activated_experts)
    mtp = 2 * config.dim * config.dim + 3 * config.dim + attn
    mtp += count_moe_params(config, config.n_routed_experts)
    cache = 2 * config.n_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    return ParamCount(total, active, active - embed, config.n_mtp_layers * mtp, cache)


# %%
# The report's numbers. The weight notes print 11.5B for MTP; its tensors add up to 11.61B.
for size, c in CONFIGS.items():
    n = count_params(c)
    print(f"{size:8} total {n.total:>15,}  activated {n.activated / 1e9:7.3f}B or"
          f" {n.activated_without_input_embedding / 1e9:7.3f}B  MTP {n.mtp / 1e9:6.3f}B"
          f"  cache {n.cache_bytes:>6,} B")  # fmt: skip
v3 = count_params(V3)
assert v3.total == 671_026_419_200
assert round(v3.activated / 1e9, 2) == 37.55
assert round(v3.activated_without_input_embedding / 1e9, 1) == 36.6
assert round(v3.mtp / 1e9, 2) == 11.61 and v3.cache_bytes == 61 * 576 * 2 == 70_272

# %% [markdown]
# *Check, from the other side.* A formula inherits its author's misunderstandings. So let us build the
# model itself, with the code of later chapters, on torch's `meta` device, where tensors have shapes but
# no memory. Its parameters and gate biases must add up to the same number.

# %%
from dsv3_ref.model import KVCache, Transformer, moe_layers


def built(c: Config) -> int:
    """Count parameters and gate biases of the real modules, MTP included."""
    with torch.device("meta"):
        model = Transformer(c)
    biases = [moe.gate.bias for moe in moe_layers(model).values() if moe.gate.bias is not None]
    return sum(t.numel() for t in [*model.parameters(), *biases])


for size, c in CONFIGS.items():
    assert built(c) == count_params(c).total + count_params(c).mtp, size
    print(f"{size:8} {built(c):>15,} in the modules, MTP included: equal")

# %% [markdown]
# ## Where do 671 billion sit?
# Sort the same sum by kind. `experts` is how many routed experts of a layer to count: all of them for
# the total, $k$ for one token.


# %%
def parts(c: Config, experts: int) -> dict[str, int]:
    """Return kind → parameters; the values sum to `count_params(c).total` for experts = e."""
    n_moe, expert = c.n_layers - c.n_dense_layers, 3 * c.dim * c.moe_inter_dim
    latent_norms = c.q_lora_rank + c.kv_lora_rank
    return {
        "embedding": c.vocab_size * c.dim,
        "head": c.vocab_size * c.dim,
        "attention": c.n_layers * (count_mla_params(c) - latent_norms),
        "dense FFN": c.n_dense_layers * 3 * c.dim * c.inter_dim,
        "routed experts": n_moe * experts * expert,
        "shared experts": n_moe * c.n_shared_experts * expert,
        "gates": n_moe * c.n_routed_experts * (c.dim + (c.score_func == "sigmoid")),
        "norms": c.n_layers * (2 * c.dim + latent_norms) + c.dim,
    }


total, token = parts(V3, V3.n_routed_experts), parts(V3, V3.n_activated_experts)
for kind in total:
    share, used = total[kind] / v3.total, token[kind] / v3.activated
    print(f"{kind:16}{total[kind]:>16,}{share:>9.3%} of all{used:>9.3%} of a token's")
for c in CONFIGS.values():
    assert sum(parts(c, c.n_routed_experts).values()) == count_params(c).total
    assert sum(parts(c, c.n_activated_experts).values()) == count_params(c).activated

# %% [markdown]
# Routed experts are 97 % of the model but only 54 % of what a token uses. The price of *holding* a
# model and the price of *using* it have come apart, and that is the whole point of a mixture of
# experts.

# %%
PAINT = dict(zip(total, [GRAY, "#B0B5BD", *COLORS[:1], COLORS[4], ORANGE, *COLORS[2:4], "black"]))
HATCH = dict(zip(total, ["", "//", "", "..", "", "xx", "", ""]))


def stack(ax, y: float, kinds: dict[str, int]) -> None:
    """Draw one horizontal bar of shares; parts above 6 % are labeled inside."""
    left, whole = 0.0, sum(kinds.values())
    for kind, n in kinds.items():
        share = 100 * n / whole
        look = {"color": PAINT[kind], "hatch": HATCH[kind], "edgecolor": "white", "linewidth": 0.5}
        ax.barh(y, share, 0.7, left=left, label=kind if y == 0 else None, **look)
        if share > 6:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
            middle = {"ha": "center", "va": "center"}
            ax.text(left + share / 2, y, f"{share:.0f}", fontsize=9, bbox=box, **middle)
        left += share


def short(n: float) -> str:
    """Return a number as three digits and a unit: 671B, 8.63M."""
    return f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"


fig, ax = figure(width=8, height=4.6)
rows = []
for i, (size, c) in enumerate(CONFIGS.items()):
    n = count_params(c)
    stack(ax, 3 * i, parts(c, c.n_routed_experts))
    stack(ax, 3 * i + 1, parts(c, c.n_activated_experts))
    rows.append((3 * i, f"{size}: all {short(n.total)}"))
    rows.append((3 * i + 1, f"per token {short(n.activated)}"))
ax.set_yticks([y for y, _ in rows], [text for _, text in rows])
ax.invert_yaxis()
ax.set(xlim=(0, 100), xlabel="share of the parameters, %")
ax.set_title("Held and used: the larger the model, the more of it is routed experts")
fig.legend(loc="outside lower center", ncols=4)
show(fig)

# %% [markdown]
# ## What attention remembers
# While a model generates, it keeps something for every token so far. Plain **multi-head attention**
# (MHA) keeps a key and a value for every head; **grouped-query attention** (GQA) lets several heads
# share one pair, and **multi-query** (MQA) lets all of them. MLA keeps the latent and one rotary key:
#
# $$\text{MHA: } 2\,h\,v\,L\cdot 2\,\text{B}\qquad \text{GQA: } 2\,n_{kv}\,v\,L\cdot 2\,\text{B}\qquad
# \text{MLA: } (c + r)\,L\cdot 2\,\text{B}$$
#
# bytes per token, with $n_{kv}$ pairs of key and value in GQA, and 1 in MQA.


# %%
def cache_of_heads(c: Config, n_kv: int) -> int:
    """Return the bytes per token in bf16 if `n_kv` heads each kept a key and a value of v dims."""
    return 2 * c.n_layers * n_kv * 2 * c.v_head_dim


bytes_per_token = {
    f"MHA, {V3.n_heads} heads": cache_of_heads(V3, V3.n_heads),
    "GQA, 8 groups": cache_of_heads(V3, 8),
    "MLA": v3.cache_bytes,
    "MQA, 1 head": cache_of_heads(V3, 1),
}
cache = KVCache(TINY, batch=1, max_len=10, dtype=torch.bfloat16)  # the real one, from chapter 05
assert sum(layer.kv_btx.nbytes for layer in cache) == 10 * count_params(TINY).cache_bytes
assert round(bytes_per_token["MHA, 128 heads"] / bytes_per_token["MLA"], 1) == 56.9

fig, ax = figure(width=8, height=2.6)
sizes = list(bytes_per_token.values())
bars = ax.barh(list(bytes_per_token), sizes, color=[GRAY, GRAY, ORANGE, GRAY])
ax.bar_label(bars, [f" {n:,} B, {n * 131_072 / 1e9:.1f} GB at 128K" for n in sizes])
ax.invert_yaxis()
ax.set(xscale="log", xlim=(1e4, 1e8), xlabel="bytes of cache per token, bf16 (log)")
ax.set_title("MLA remembers as little as 2.25 grouped heads would")
show(fig)

# %% [markdown]
# ## Experiment: do the operations add up?
# A product with a weight costs two operations, one multiplication and one addition, for each number
# in the weight. Attention adds work that grows with the number $t$ of keys a query meets: $i + r$
# products for its score, $v$ for its value, in each head and layer. And a mixture layer weighs its
# $k$ results, a small term that is easily forgotten:
#
# $$\text{FLOPs per token} = 2\,N_{\text{matrices}} + 2\,L\,h\,(i + r + v)\,t
# + 2\,(L - L_{\text{dense}})\,k\,d$$
#
# $N_{\text{matrices}}$ are the activated parameters less the embedding (whose row is looked up, not
# multiplied), norms and gate biases. We count twice: by formula, and by letting torch count every product
# while the real `TINY` runs. It runs in its plainest form here, whose attention computes the whole square
# of scores, so that $t = s$, the length.


# %%
def flops(c: Config, keys: float) -> float:
    """Return forward operations per token that meets t keys: 2·N + 2·L·h·(i+r+v)·t + 2·L'·k·d."""
    n, n_moe = parts(c, c.n_activated_experts), c.n_layers - c.n_dense_layers
    biases = n_moe * c.n_routed_experts * (c.score_func == "sigmoid")
    matrices = sum(n.values()) - n["embedding"] - n["norms"] - biases
    head_dims = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    attention = 2 * c.n_layers * c.n_heads * head_dims * keys
    return 2 * matrices + attention + 2 * n_moe * c.n_activated_experts * c.dim


def counted_flops(model: Transformer, s: int) -> float:
    """Return the same from torch's counter, on the plain forms, whose operations it can see."""
    from dsv3_ref.ops import use  # chapter 01: chooses the implementation

    with use("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, s, dtype=torch.long))
    return counter.get_total_flops() / s


torch.manual_seed(0)
model = Transformer(TINY)
lengths = [8, 16, 32, 64, 128, 256]
measured = [counted_flops(model, s) for s in lengths]
assert measured == [flops(TINY, s) for s in lengths]  # exactly
points = [f"{x / 1e6:.2f} at {s}" for s, x in zip(lengths, measured)]
print("TINY, MFLOPs per token:", ", ".join(points))

# %%
fig, (left, right) = figure(1, 2, width=8.6, height=3.3)
t = torch.logspace(0, 2.6, 50)
left.plot(t, flops(TINY, t) / 1e6, color=GRAY, label="formula")
left.plot(lengths, [x / 1e6 for x in measured], "o", color=ORANGE, label="counted by torch")
left.set(xscale="log", xlabel="keys a query meets", ylabel="MFLOPs per token, forward")
left.set_title("tiny: formula and run agree")
left.legend()
t = torch.logspace(2, 5.3, 80)
fixed = flops(V3, 0) / 1e9
right.axhline(fixed, color=GRAY, linestyle="--", label=f"weights alone: {fixed:.1f}")
right.plot(t, flops(V3, t) / 1e9, label="with attention")
for mean, text, dx in [(2048, "4K training", -8), (65_536, "128K", -8)]:
    y = flops(V3, mean) / 1e9
    right.plot(mean, y, "o", color=ORANGE)
    right.annotate(f"{text}: {y:.0f}", (mean, y), (dx, 8), textcoords="offset points", ha="right")
right.set(xscale="log", xlabel="keys a query meets (mean)", ylabel="GFLOPs per token, forward")
right.set_title("v3: attention takes over with length")
right.legend(loc="upper left")
show(fig)

# %% [markdown]
# And does it run? At first every word is about equally likely, so the loss of an untrained model
# must be close to $\ln w$, the surprise of a blind guess among $w$ words. A little above, in fact: the
# last norm gives every hidden state $d$ numbers of size 1, so the scores (*logits*) have a variance of
# $\sigma^2 = d\cdot\mathtt{init\_std}^2$. They are confident at random, which costs $\sigma^2/2$.

# %%
tokens_bs = torch.randint(TINY.vocab_size, (8, 129))
with torch.no_grad():
    logit_bsw = model(tokens_bs[:, :-1])
loss = torch.nn.functional.cross_entropy(logit_bsw.flatten(0, 1), tokens_bs[:, 1:].flatten())
blind, excess = math.log(TINY.vocab_size), TINY.dim * TINY.init_std**2 / 2
print(f"untrained loss {loss:.2f} nats; ln {TINY.vocab_size} = {blind:.2f}, and {excess:.2f} more")
noise = math.sqrt(2 * excess / (8 * 128))  # σ/√n of the n targets' logits
assert abs(loss - blind - excess) < 3 * noise

# %% [markdown]
# ## Play
# Change a few fields and see what it costs. Look for three things: more experts cost memory but hardly
# any operations; more experts *per token* cost operations but no memory; of all these fields only depth
# and latent touch the cache. An impossible choice shows the config's own sentence.


# %%
def books(
    n_layers=61, n_routed_experts=256, n_activated_experts=8, moe_inter_dim=2048, kv_lora_rank=512
):
    """Draw the accounting of V3 with these fields changed."""
    changes = dict(locals())
    fig, ax = figure(width=8, height=2.5)
    try:
        c = replace(V3, **changes)
    except UserError as e:
        ax.text(0.5, 0.5, f"not a model: {e}", ha="center", wrap=True)
        ax.axis("off")
        return show(fig)
    n = count_params(c)
    stack(ax, 0, parts(c, c.n_routed_experts))
    stack(ax, 1, parts(c, c.n_activated_experts))
    ax.set_yticks([0, 1], [f"all {short(n.total)}", f"per token {short(n.activated)}"])
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="share of the parameters, %")
    ax.set_title(
        f"per token: {flops(c, 2048) / 1e9:.0f} GFLOPs at 4K, {n.cache_bytes:,} B of cache"
    )
    fig.legend(loc="outside lower center", ncols=4)
    return show(fig)


books()

# %%
play(
    books,
    n_layers=(4, 118, 1),
    n_routed_experts=[256, 8, 64, 128, 250, 512],
    n_activated_experts=(1, 15, 1),
    moe_inter_dim=[2048, 512, 1024, 4096],
    kv_lora_rank=[512, 128, 256, 1024],
)

# %% [markdown]
# The same function with twice as many experts, half as wide, twice as many chosen. Little moves: the
# gates double, the shared expert is half as wide. This is what "fine-grained" experts cost: next to
# nothing ([chapter 04](04_moe.ipynb) says what they gain).

# %%
books(n_routed_experts=512, n_activated_experts=16, moe_inter_dim=1024)

# %% [markdown]
# ## In practice: a config from a file
# Configs come from outside, as JSON. Ignoring an unknown key would train the wrong model in
# silence, so an unknown name is an error that offers similar ones.


# %%
#| export config
def from_dict(values: dict[str, Any]) -> Config:
    """Build a Config from DeepSeek's field names; an unknown one raises, with similar ones."""
    known = [f.name for f in fields(Config)]
    for name in values:
        if name not in known:
            raise UserError(f"unknown config field {name!r}{suggest(name, known)}")
    return Config(**values)


def load_config(name: str) -> Config:
    """Return the config of this name (`tiny`), or read it from a JSON file (`my.json`)."""
    if name in CONFIGS:
        return CONFIGS[name]
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            return from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not JSON: {e}") from None
    raise UserError(
        f"no config {name!r}{suggest(name, CONFIGS)}: sizes are {', '.join(CONFIGS)}, "
        "or a .json file"
    )


# %%
# A file gives back the config that was written; a slip of the finger gives a sentence.
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "mine.json"
    file.write_text(json.dumps({"n_layers": 4, "n_dense_layers": 1}), encoding="utf-8")
    assert load_config(str(file)) == replace(V3, n_layers=4, n_dense_layers=1)
    file.write_text('{"n_layers": 4', encoding="utf-8")
    assert "is not JSON" in complaint(lambda: load_config(str(file)))

print(complaint(lambda: from_dict({"n_expert": 8})))
print(complaint(lambda: from_dict({"kv_lora_rnk": 512})))
print(complaint(lambda: load_config("tinny")))
assert "did you mean kv_lora_rank" in complaint(lambda: from_dict({"kv_lora_rnk": 512}))
assert "did you mean tiny?" in complaint(lambda: load_config("tinny"))


# %% [markdown]
# ## Exercises
# Fill in the functions that return `...`; the checkers defined here say how you did.


# %%
def check_cache(fn) -> bool:
    """Check that `fn(c, tokens)` is the size of the latent cache in bytes."""
    cases = list(itertools.product(CONFIGS.values(), (1, 131_072)))
    return attempt(
        lambda: all(abs(fn(c, t) - count_params(c).cache_bytes * t) < 0.5 for c, t in cases),
        "what does one layer remember of one token (two things), and how large is a bf16 number?",
    )


def check_split(fn) -> bool:
    """Check that `fn(c)` is how many parameters splitting every expert in two adds."""

    def test():
        for c in (V3, TINY):
            halves = replace(
                c,
                n_routed_experts=2 * c.n_routed_experts,
                n_activated_experts=2 * c.n_activated_experts,
                n_shared_experts=2 * c.n_shared_experts,
                moe_inter_dim=c.moe_inter_dim // 2,
            )
            if abs(fn(c) - (count_params(halves).total - count_params(c).total)) > 0.5:
                return False
        return True

    return attempt(test, "two halves hold as much as the whole; but what has one row per expert?")


def check_broken(fn) -> bool:
    """Check that `from_dict(fn())` raises because the experts do not fit into the groups."""
    hint = "how many experts lie in the groups that a token may use? ask for more than that"
    return attempt(lambda: "must fit into" in complaint(lambda: from_dict(fn())), hint)


def check_design(fn) -> bool:
    """Check that `fn()` is a Config of 6.5–7.5B parameters; per token < 1.2B and < 20 kB of cache."""

    def test():
        n = count_params(fn())
        print(f"{n.total / 1e9:.2f}B, per token {n.activated / 1e9:.2f}B, cache {n.cache_bytes} B")
        return 6.5e9 <= n.total <= 7.5e9 and n.activated < 1.2e9 and n.cache_bytes < 20_000

    return attempt(test, "start from replace(SMALL, …): depth sets the cache, experts the total")


# %% [markdown]
# **1 · Compute.** How many bytes does the cache of `tokens` tokens take, in bf16?


# %%
def my_cache(c: Config, tokens: int) -> int:
    return ...


check_cache(my_cache)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_cache(c, tokens):
#     return 2 * tokens * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
# ```
#
# V3 at 128K: 9.2 GB, beside 524 GB for multi-head attention of the same shape.
# </details>
#
# **2 · Predict.** Split every expert, shared ones too, into two of half the width, and visit twice as
# many. How many parameters does the model gain?


# %%
def my_split(c: Config) -> int:
    return ...


check_split(my_split)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_split(c):
#     return (c.n_layers - c.n_dense_layers) * c.n_routed_experts * (c.dim + 1)
# ```
#
# Only the gates grow: 106 million for V3, 0.016 % of the model.
# </details>
#
# **3 · Break.** Find fields that `from_dict` refuses because a token's experts do not fit into its
# groups, though every other rule holds.


# %%
def my_broken() -> dict:
    return ...


check_broken(my_broken)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_broken():
#     return {"n_activated_experts": 40, "n_limited_groups": 1}
# ```
#
# One group has 32 experts: a token cannot visit 40 of them.
# </details>
#
# **4 · Extend.** Design a model for one workstation: 6.5 to 7.5B parameters, under 1.2B activated
# (both tables counted), under 20 kB of cache per token.


# %%
def my_design() -> Config:
    return ...


check_design(my_design)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_design():
#     return replace(
#         SMALL, n_layers=24, dim=1536, inter_dim=4096, n_routed_experts=128, n_activated_experts=8
#     )
# ```
#
# One of many. Count the cache first: it bounds depth times $(c + r)$.
# </details>

# %% [markdown]
# ## Scale-up
# What do these sums mean for machines? An H800 has 80 GB of memory and multiplies bf16 numbers at
# about 989 TFLOP/s at best. Training a token costs three times its forward pass, for the backward pass
# makes two products for each of the forward's; and MTP runs one more block and the head again. A
# causal query of a 4K sequence meets 2048 keys on average.

# %%
mtp = 2 * (2 * V3.dim**2 + count_mla_params(V3) + count_moe_params(V3, 8) + V3.vocab_size * V3.dim)
mtp += 2 * V3.n_heads * (128 + 64 + 128) * 2048
train = 3 * (flops(V3, 2048) + mtp)
rate = 1e12 * train / (180e3 * 3600)
dense = 3 * 2 * v3.total
print(f"training: {train / 1e9:.0f} GFLOPs per token, {train * 14.8e12:.1e} for 14.8T tokens")
print(f"at 180K H800 hours per trillion tokens: {rate / 1e12:.0f} TFLOP/s per GPU,", end=" ")
print(f"{rate / 989e12:.0%} of its bf16 peak")
print(f"a dense model of this size: {dense / train:.0f} times as many operations")
print(f"weights in bf16: {2 * v3.total / 1e12:.2f} TB = {2 * v3.total / 80e9:.0f} GPUs' memory")
print(f"with fp32 master and gradients, bf16 moments: {14 * v3.total / 1e12:.1f} TB")
print(f"cache of one 128K conversation: {131_072 * v3.cache_bytes / 1e9:.1f} GB")
assert 380e12 < rate < 420e12

# %% [markdown]
# Three limits bind, in three places. **Memory** binds the weights: no GPU can hold them, so experts are
# spread over 64 GPUs and layers over 16 stages of a pipeline (chapters [11](11_expert_parallel.ipynb) and
# [12](12_dualpipe.ipynb); the one place where experts leave the model is `MoE.token_dispatcher`,
# [chapter 04](04_moe.ipynb)). **Arithmetic** binds training, which is why the large products run in FP8
# ([chapter 09](09_fp8.ipynb)): the rate above is a fifth of what FP8 could do at best. **Memory traffic**
# binds generation, where each new token reads the cache again, and there the latent pays
# ([chapter 03](03_mla.ipynb)).
#
# Next: [01 · Ops](01_ops.ipynb), the four smallest pieces.
