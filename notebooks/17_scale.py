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
# # 17 · Scale: 671B on 2,048 GPUs, by arithmetic

# %% [markdown]
# ## Why
# The report trained for **180 thousand GPU hours per trillion tokens**: 3.7 days on 2,048 H800. Nobody who reads
# this has those machines, yet most decisions of the report (64-way expert parallelism, four nodes a token,
# DualPipe, FP8, what to compute again) are about them. They can be checked with a pencil. This chapter
# counts operations, bytes kept and bytes sent, turns each into seconds by one rate, lets the simulator of
# [chapter 12](12_dualpipe.ipynb) put them in order, and compares the sum with the bill.

# %%
from dataclasses import replace

import torch

from dsv3_ref.config import TINY, V3, Config
from dsv3_ref.viz import BLUE, COLOURS, GREEN, GREY, ORANGE, checker, figure, play, show

REPORT = 180e3  # H800 hours per trillion tokens (§1)
rate = 1e12 / (REPORT * 3600)
print(f"{rate:,.0f} tokens a second and GPU; {REPORT / 2048 / 24:.1f} days on 2,048 of them")
print(
    f"so a GPU has {1e6 / rate:.0f} µs for a token, and a pipeline rank {1e6 / rate * 16:.0f} µs / 16"
)

# %% [markdown]
# ## Paper
# - 2,048 H800: 16-way pipeline, 64-way experts over 8 nodes, ZeRO-1, no tensor parallelism (§3.2).
# - NVLink 160 GB/s, InfiniBand (IB) 50 GB/s a GPU; a token visits at most 4 nodes; 20 of 132 SMs communicate (§3.2.2).
# - Recomputed: RMSNorm and MLA's up-projections; SwiGLU's output. FP8 for kept inputs, E5M6 after attention (§3.3.3).
# - Moments in bf16, average of the weights on the CPU (§3.2.3, §3.3.2).
# - 2,664K hours for 14.8T tokens, \$2 an hour (§1).
#
# What is *not* published is how 61 layers and the MTP module lie in 16 stages and how fast each kernel ran.
# Where we must assume something, it stands in `Machine`, with its reason, and can be moved.

# %%
#| export
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch

from dsv3_ref.config import Config
from dsv3_ref.dualpipe import Op
from dsv3_ref.expert_parallel import addressed, send_list
from dsv3_ref.moe import route

# %% [markdown]
# ## Operations
# A product with a matrix of $o \times i$ costs $2\,o\,i$ operations a row. A token is one row for attention and shared
# experts, and $k$ rows for the routed ones. Scores and values are apart: causal attention over $s$ tokens meets
# $(s + 1)/2$ keys on average,
#
# $$\text{FLOPs}_{\text{attention}} = 2\,h\,(i + r + v)\,\tfrac{s+1}{2}\ \text{ forward}, \qquad
# 2\,h\,(3(i + r) + 2v)\,\tfrac{s+1}{2}\ \text{ backward}$$
#
# since the backward pass makes scores again and has four more products.


# %%
#| export
class Product(NamedTuple):
    """A matrix (n_out, n_in), and how many rows a token has in its product."""

    n_in: int
    n_out: int
    rows: int = 1

    @property
    def flops(self) -> int:
        """Forward operations a token; Dgrad and Wgrad cost the same again each."""
        return 2 * self.rows * self.n_in * self.n_out


def products(c: Config, dense: bool) -> dict[str, Product]:
    """Every matrix of a block (chapters 03, 04); w1 and w3 as one."""
    h, x, v = c.n_heads, c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    q, kv, rope = c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim
    out = {"wq_a": Product(c.dim, q), "wq_b": Product(q, h * x)} if q else {}
    out |= {} if q else {"wq": Product(c.dim, h * x)}
    out |= {"wkv_a": Product(c.dim, kv + rope), "wo": Product(h * v, c.dim)}
    out |= {"wkv_b": Product(kv, h * (c.qk_nope_head_dim + v))}
    if dense:
        return out | mlp("", c.dim, c.inter_dim)
    shared, k = mlp("shared ", c.dim, c.n_shared_experts * c.moe_inter_dim), c.n_activated_experts
    return (
        out
        | {"gate": Product(c.dim, c.n_routed_experts)}
        | shared
        | mlp("routed ", c.dim, c.moe_inter_dim, k)
    )


def mlp(name: str, d: int, f: int, rows: int = 1) -> dict[str, Product]:
    """d → f → d."""
    return {f"{name}w1, w3": Product(d, 2 * f, rows), f"{name}w2": Product(f, d, rows)}


def attention_flops(c: Config, s: int) -> tuple[float, float]:
    """Of causal attention over s tokens, a token and layer: (forward, backward)."""
    x, v = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    return c.n_heads * (s + 1) * (x + v), c.n_heads * (s + 1) * (3 * x + 2 * v)


# %%
from torch.utils.flop_counter import FlopCounterMode

from dsv3_ref.model import Transformer
from dsv3_ref.ops import use


def counted(c: Config, s: int) -> float:
    """Forward operations a token by torch's own counter; naive attention computes the full square."""
    with use("naive", "torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        Transformer(c)(torch.zeros(1, s, dtype=torch.long))
    return counter.get_total_flops() / s


def ours(c: Config, s: int) -> float:
    """The same by `products`, with keys for the full square and the k-fold sum after experts."""
    matrices = sum(
        p.flops for i in range(c.n_layers) for p in products(c, i < c.n_dense_layers).values()
    )
    square = c.n_layers * attention_flops(c, 2 * s - 1)[0]
    sums = 2 * (c.n_layers - c.n_dense_layers) * c.n_activated_experts * c.dim
    return matrices + square + sums + 2 * c.vocab_size * c.dim


for s in (16, 64):
    assert counted(TINY, s) == ours(TINY, s)  # exactly
block = products(V3, dense=False)
for name, p in sorted(block.items(), key=lambda item: -item[1].flops):
    print(
        f"{name:15}{p.n_out:7} × {p.n_in:<6}{p.rows} row{'s' * (p.rows > 1):1}{p.flops / 1e6:8.0f} MFLOPs a token"
    )
print(f"attention at 4K: {attention_flops(V3, 4096)[0] / 1e6:.0f} MFLOPs forward, "
      f"{attention_flops(V3, 4096)[1] / 1e6:.0f} backward")  # fmt: skip

# %% [markdown]
# ## Stages of equal work
# A pipeline is as fast as its slowest stage. The last one has more to do than its layers:
# the head, and MTP, which is a block, a projection and the head once more. Measured in multiplications this is as much as
# *four* layers. So we cut where the sum of squared shares is least,
#
# $$\min_{0 = a_0 \le a_1 \dots \le a_P = L}\ \sum_{p} \Big(\sum_{a_{p-1} \le l < a_p} w_l + [p = P]\,w_{\text{after}}\Big)^2$$
#
# by trying every cut behind every best beginning (61 · 61 · 16 sums). Only the last stage may be without layers.


# %%
#| export
def work(c: Config) -> tuple[list[int], int]:
    """Multiplications a token of every layer, and of what follows the last: head, MTP."""
    block = lambda dense: sum(p.flops // 2 for p in products(c, dense).values())
    head = c.vocab_size * c.dim
    after = head + c.n_mtp_layers * (2 * c.dim**2 + block(False) + head)
    return [block(i < c.n_dense_layers) for i in range(c.n_layers)], after


@cache
def stages(c: Config, n: int) -> tuple[range, ...]:
    """The layers of n stages, as equal in work as can be."""
    layers, after = work(c)
    total = [0, *accumulate(layers)]

    @cache
    def best(k: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Least Σ share² of the first `end` layers in k stages, and where these end."""
        if k == 0:
            return (0, ()) if end == 0 else (1 << 200, ())
        more, least = (after, k - 1) if k == n else (0, k - 1)
        starts = range(least, end + (k == n and n > 1))
        options = ((best(k - 1, a), total[end] - total[a] + more) for a in starts)
        return min((squares + share**2, (*ends, end)) for (squares, ends), share in options)

    ends = best(n, c.n_layers)[1]
    return tuple(range(a, b) for a, b in zip((0, *ends), ends))


# %%
layers, after = work(V3)
print(f"after the last layer: the work of {after / layers[-1]:.2f} layers")
cut = stages(V3, 16)
assert [i for part in cut for i in part] == list(range(61))
even = [61 // 16 + (s < 61 % 16) for s in range(16)]
fig, ax = figure(1, 1, 8, 2.6)
for dx, sizes, color, name in (
    (-0.2, even, GREY, "equal layers"),
    (0.2, [*map(len, cut)], BLUE, "equal work"),
):
    extra = [0] * 15 + [after / layers[-1]]
    ax.bar([s + dx for s in range(16)], sizes, 0.4, color=color, label=name)
    ax.bar([s + dx for s in range(16)], extra, 0.4, bottom=sizes, color=color, alpha=0.45)
ax.set(xlabel="stage", ylabel="work in layers", title="Head and MTP are worth four layers (pale)")
ax.legend(loc="upper left", ncols=2)
show(fig)
assert max(len(part) for part in cut) == 5 or len(cut[-1]) == 0

# %% [markdown]
# ## What a micro-batch leaves behind
# Until its backward pass a micro-batch holds what gradients need. With everything that the report computes again,
# this is left of a block (bytes a token; $z(x) = 4\lceil x/128\rceil$ for the scales of a row of $x$ codes):
#
# - inputs of the two norms on the residual stream, fp32, and of the latent norms, bf16;
# - inputs of matrices as FP8 codes, $x + z(x)$; after attention twelve bits, $\tfrac32 x + z(x)$;
# - attention's output in bf16 and a number a head;
# - gate and up of SwiGLU as codes, in each of $k$ rows; one of them once more for the weights' gradient;
# - the gate's affinities and choices, and where rows came from.
#
# `kept` says so, tensor by tensor. Whether it forgets one is for the machine to say: the real stage of the cluster
# trainer runs under `ops.keeping`, which counts every tensor that autograd holds.


# %%
#| export
def kept(c: Config, dense: bool, fp8: bool = True) -> dict[str, float]:
    """Bytes a token that a block holds for its backward pass (§3.2.3, §3.3.3), rope apart.

    With recomputation; products in FP8, or in bf16. Tokens are `k` rows at their experts.
    """
    scales = lambda x: 4 * -(-x // 128)
    codes = lambda x, again=False: x + scales(x) if fp8 else 0 if again else 2 * x
    h, hv, k, d = c.n_heads, c.n_heads * c.v_head_dim, c.n_activated_experts, c.dim
    q, kv, r, f = c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim, c.moe_inter_dim
    out = {"residual stream": 2 * (4 * d + 4)}
    out["latents"] = (2 * q + 4 + codes(q, True)) * (q > 0)
    out["latents"] += 2 * (kv + r) + 4 + 2 * r + codes(kv, True) + 8 * r  # turns of q and k
    out["input of attention"] = codes(d, True)
    out["output of attention"] = 2 * hv + 4 * h
    if fp8:
        out["output of attention"] += 192 * -(-hv // 128) + scales(hv)
    width = c.inter_dim if dense else c.n_shared_experts * f
    out["dense or shared MLP"] = codes(d, True) + 2 * codes(width)
    if not dense:
        out["gate"] = 4 * c.n_routed_experts + 12 * k + 8
        out["routed experts"] = k * (codes(d) + 2 * codes(f) + 2 * f + 2 + 16)
    return out


# %%
from dsv3_ref import ops
from dsv3_ref.parallel.exchange import Exchange
from dsv3_ref.parallel.stage import Seen, Stage, Weights
from dsv3_ref.parallel.tape import Tape, drain


class Lean(torch.autograd.Function):
    """Attention that keeps what the kernel keeps: inputs (made again), output, a number a head."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, o := torch.zeros_like(v), torch.empty(q.shape[:3]))
        return o


ops.impl("attention", "lean")(lambda q, k, v, scale: Lean.apply(q, k, v))


def held(c: Config, n: int, fp8: bool) -> int:
    """Bytes that autograd holds after the first stage, of one layer, has seen n tokens."""
    stage = Stage(Transformer(c), c, 0, 2, Exchange([]))
    backends, tape = ("lean", "fp8", "torch") if fp8 else ("lean", "torch"), Tape()
    tokens_bs = torch.randint(c.vocab_size, (1, n + 1))
    with ops.use(*backends), ops.keeping(True, stage.model.parameters()) as keeper:
        with torch.autocast("cpu", torch.bfloat16):
            drain(stage.forward(tape, None, tokens_bs, Weights(1.0), Seen()))
        return keeper.bytes


SHAPE = replace(
    TINY, n_layers=1, n_mtp_layers=0, dim=256, inter_dim=384, q_lora_rank=200, kv_lora_rank=160
)
for dense in (True, False):
    for fp8 in (True, False):
        c = replace(SHAPE, n_dense_layers=int(dense))
        found = (held(c, 192, fp8) - held(c, 128, fp8)) / 64  # codes of weights cancel
        rope = 8 + 4 * c.qk_rope_head_dim  # token numbers; cosines and sines, once for all layers
        formula = sum(kept(c, dense, fp8).values()) + rope
        print(
            f"{'dense' if dense else 'MoE':6}{'FP8' if fp8 else 'bf16':5}{found:9,.0f} bytes a token counted, {formula:9,.0f} by formula"
        )
        assert found == formula

# %%
parts, times = kept(V3, dense=False), 4096 / 1e6
wide = kept(V3, dense=False, fp8=False)
fig, ax = figure(1, 1, 8, 2.4)
for y, table in enumerate((wide, parts)):
    left = 0
    for color, (what, size) in zip(COLOURS, table.items()):
        ax.barh(y, size * times, left=left, color=color, label=what if y else None)
        left += size * times
    ax.text(left + 10, y, f"{left:,.0f} MB", va="center")
ax.set(
    yticks=(0, 1),
    yticklabels=("bf16", "FP8"),
    xlabel="MB of one V3 block, one sequence of 4,096 tokens, all recomputation on",
)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, fontsize=8)
ax.set_xlim(0, 1.12 * sum(wide.values()) * times)
show(fig)

# %% [markdown]
# Chapter 12's schedule keeps up to PP + 1 = 17 micro-batches of a stage in flight, hence the report's zeal in not keeping things.
# Only `routed experts` depends on balance: a rank with twice the tokens keeps twice as much.
#
# ## What travels
# A token's row goes to each *node* that has one of its experts over IB, once, and inside each node over NVLink to each
# *GPU* that has one ([chapter 11](11_expert_parallel.ipynb)). With 64 ranks in 8 nodes and balanced experts the
# expected numbers are properties of the gate alone, so we ask the gate, with random affinities.


# %%
#| export
def trips(c: Config, ep: int, per_node: int, n: int = 4096) -> tuple[float, float]:
    """Copies of a token that cross (IB, NVLink) in two hops, mean of n tokens evenly routed."""
    if ep == 1:
        return 0.0, 0.0
    g = torch.Generator().manual_seed(0)
    logit_bse = torch.randn(1, n, c.n_routed_experts, generator=g)
    expert_nk, here_n = route(logit_bse, None, c).expert_bsk[0], torch.arange(n) % ep
    per = c.n_routed_experts // ep
    node_m, token_m = torch.zeros(n, dtype=torch.long), torch.arange(n)
    if ep > per_node:
        token_m, node_m, _ = send_list(expert_nk, per * per_node, ep // per_node)
    ib = (node_m != here_n[token_m] // per_node).sum().item() * (ep > per_node)
    inside_mk = addressed(expert_nk[token_m], node_m, per * min(ep, per_node))
    row_m, place_m, _ = send_list(inside_mk, per, min(ep, per_node))
    nvlink = (place_m != here_n[token_m[row_m]] % per_node).sum().item()
    return ib / n, nvlink / n


def row_bytes(c: Config, fp8: bool = True) -> tuple[int, int]:
    """Of a row (there, back): codes with scales or bf16, with k experts and weights; and bf16."""
    out = c.dim + 4 * -(-c.dim // 128) if fp8 else 2 * c.dim
    return out + 8 * c.n_activated_experts, 2 * c.dim


# %%
def slow_trips(c: Config):
    """By words: nodes other than mine; then GPUs in each node other than where the row landed."""
    expert_nk = route(
        torch.randn(1, 4096, 256, generator=torch.Generator().manual_seed(0)), None, c
    ).expert_bsk[0]
    ib = nvlink = 0
    for token, chosen in enumerate(expert_nk.tolist()):
        home, gpus = token % 64, {e // 4 for e in chosen}
        ib += len({gpu // 8 for gpu in gpus} - {home // 8})
        nvlink += sum(gpu % 8 != home % 8 for gpu in gpus)
    return ib, nvlink


ib, nvlink = trips(V3, 64, 8)
print(
    f"a token crosses IB {ib:.2f} times, NVLink {nvlink:.2f} times; there {row_bytes(V3)[0]:,} bytes, back {row_bytes(V3)[1]:,}"
)
assert (ib * 4096, nvlink * 4096) == slow_trips(V3) and 3.2 < ib <= 4
for limit in (8, 4, 2, 1):
    c = replace(V3, n_limited_groups=limit)
    print(f"at most {limit} nodes: IB {trips(c, 64, 8)[0]:.2f}, NVLink {trips(c, 64, 8)[1]:.2f}")

# %% [markdown]
# ## Seconds
# Each operation is bound by one rate, operations or bytes. A `Machine` holds the rates *reached*, not those of a
# data sheet, and why we believe them:
#
# | | H800 | source |
# |---|---|---|
# | FP8 products | 1,358 TFLOP/s | DeepGEMM's table at 4096 × 7168 × 16384 |
# | attention forward, backward | 0.6 and 0.5 of 989 TFLOP/s | what public kernels reach; assumed |
# | memory | 0.85 of 3.35 TB/s | assumed |
# | NVLink, IB | 153, 50 GB/s | DeepEP's tables at the report's setting |
# | SMs left | 112 of 132 | §3.2.2 |
#
# The exchange of a micro-batch lasts as long as the slower of its two links. Backward it carries the
# same bytes: gradients of results go out as codes, gradients of tokens come back in bf16.


# %%
#| export
class Machine(NamedTuple):
    """What a GPU reaches: operations/s, bytes/s, bytes; an H800, and an hour of it."""

    product: float = 1358e12
    attention: float = 0.6 * 989e12
    attention_backward: float = 0.5 * 989e12
    copy: float = 0.85 * 3.35e12
    nvlink: float = 153e9
    ib: float = 50e9
    sms: float = 112 / 132  # left beside communication
    memory: float = 80e9
    dollars: float = 2.0


def moved(c: Config, dense: bool) -> float:
    """Bytes a token that a block's forward pass moves between its products (kernels of chapter 10).

    Norms read the fp32 stream and write bf16 and codes; sums, RoPE, SwiGLU, quantisers, rows.
    """
    d, h, k = c.dim, c.n_heads, c.n_activated_experts
    x, v = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    out = 2 * 7 * d + 5 * (c.q_lora_rank + c.kv_lora_rank) + 2 * 10 * d
    out += 2 * 4 * h * x + 3.5 * h * v
    width = c.inter_dim if dense else (c.n_shared_experts + k) * c.moe_inter_dim
    rows = 0 if dense else k * (3 + 2 + 4 + 2) * d
    return out + 7 * width + rows


class Seconds(NamedTuple):
    """Of one block and one micro-batch: forward, backward for inputs and for weights, exchange."""

    f: float
    i: float
    w: float
    comm: float


def seconds(c: Config, m: Machine, dense: bool, s: int, trips_: tuple[float, float]) -> Seconds:
    """Of a block on one sequence of s tokens, with what is computed again in the backward pass."""
    table = products(c, dense)
    matrix = sum(p.flops for p in table.values()) / m.product
    again = sum(table[n].flops for n in ("wq_b", "wkv_b") if n in table) / m.product
    forward, backward = attention_flops(c, s)
    copies = moved(c, dense) / m.copy
    out, back = row_bytes(c)
    links = [n * (out + back) / rate for n, rate in zip(trips_, (m.ib, m.nvlink))]
    per_token = (
        (matrix + forward / m.attention + copies) / m.sms,
        (matrix + again + backward / m.attention_backward + 2 * copies) / m.sms,
        matrix / m.sms,
        0.0 if dense else max(links),
    )
    return Seconds(*(s * t for t in per_token))


# %%
H800 = Machine()
one = seconds(V3, H800, False, 4096, trips(V3, 64, 8))
print(
    f"a MoE block, 4,096 tokens: forward {1e3 * one.f:.2f} ms, backward {1e3 * one.i:.2f} + {1e3 * one.w:.2f} ms, "
    f"exchange {1e3 * one.comm:.2f} ms a way"
)
print(f"exchange / computation of a forward pass: {one.comm / one.f:.2f} (the report: about 1)")

# %% [markdown]
# ## Experiment: a step of V3
# A stage's seconds are those of its layers, and the last one's also those of head and MTP. The simulator takes them
# stage by stage: a pair F&B lasts as long as its computation or its two exchanges, whichever is more; alone, a step pays
# for both. A step of training ends with the reduction of gradients (bf16 would do; we send fp32), the optimizer and
# the gathering of weights, which nothing hides.


# %%
#| export
class StageTimes:
    """Seconds of a schedule's steps where stages differ; in the place of chapter 12's `Times`."""

    def __init__(self, stages_: list[Seconds]):
        self.stages = stages_

    def compute(self, op: Op) -> float:
        """Of one operation, without its exchange."""
        t = self.stages[op.stage]
        return {"F": t.f, "I": t.i, "W": t.w, "B": t.i + t.w}[op.kind]

    def of(self, step: tuple[Op, ...]) -> float:
        """A pair hides the exchanges of both; W has none; what is alone waits for its own."""
        compute = sum(map(self.compute, step))
        comm = sum(self.stages[op.stage].comm for op in step if op.kind != "W")
        return max(compute, comm) if len(step) == 2 else compute + comm


def stage_seconds(c: Config, m: Machine, cut, s: int, trips_) -> list[Seconds]:
    """Of every stage, for one sequence of s tokens; the last has norms, heads and MTP too."""
    block = [seconds(c, m, dense, s, trips_) for dense in (False, True)]
    add = lambda parts: Seconds(*map(sum, zip(*parts))) if parts else Seconds(0, 0, 0, 0)
    out = [add([block[i < c.n_dense_layers] for i in layers]) for layers in cut]
    head = (1 + c.n_mtp_layers) * c.vocab_size * c.dim + c.n_mtp_layers * 2 * c.dim**2
    once = 2 * s * head / (m.attention * m.sms)  # in bf16
    out[-1] = add([out[-1], *[block[0]] * c.n_mtp_layers, Seconds(once, once, once, 0)])
    return out


# %%
from dsv3_ref.dualpipe import schedule, simulate

PP, M = 16, 15_360 // (2 * 64)
each = stage_seconds(V3, H800, stages(V3, PP), 4096, trips(V3, 64, 8))
fig, ax = figure(1, 1, 8, 2.6)
bottom = [0.0] * PP
for name, color in (("f", BLUE), ("i", GREEN), ("w", ORANGE)):
    heights = [1e3 * getattr(t, name) for t in each]
    ax.bar(
        range(PP),
        heights,
        bottom=bottom,
        color=color,
        label={"f": "forward", "i": "inputs", "w": "weights"}[name],
    )
    bottom = [b + h for b, h in zip(bottom, heights)]
ax.plot(range(PP), [2e3 * t.comm for t in each], "k_", ms=14, label="exchanges, there and back")
ax.set(xlabel="stage", ylabel="ms a sequence", title="Sixteen stages of V3")
ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28))
show(fig)

results = {}
for name in ("1f1b", "zb1p", "dualpipe"):
    spans = simulate(schedule(name, PP, M), StageTimes(each))
    step = max(span.end for span in spans)
    results[name] = 2048 * step / 3600 / (15_360 * 4096) * 1e12
    busy = sum(t.f + t.i + t.w for t in each) * M / PP
    print(
        f"{name:9} step {step:5.2f} s, computing {busy / step:4.0%}: {results[name] / 1e3:4.0f}K GPU hours a trillion tokens"
    )
print(f"the report: {REPORT / 1e3:.0f}K")
assert results["dualpipe"] < results["zb1p"] < results["1f1b"]

# %% [markdown]
# DualPipe takes a quarter off the bill, by hiding what travels. And our sum ends *below* the report's: every
# product at the speed of the largest one, perfect balance, no slow GPU, nothing after the pipeline. The difference,
# about a fifth, is what a cluster loses between a kernel's table and a month of training. So use these numbers to
# compare plans with each other, and the ratio to the report's bill as the price of reality.


# %%
#| export
def gpu_hours(step_seconds: float, gpus: int, tokens: int) -> float:
    """GPU hours per trillion tokens of a step of so many tokens."""
    return gpus * step_seconds / 3600 / tokens * 1e12


# %%
assert gpu_hours(1.0, 2048, 2048 * 1543) == 1e12 / 1543 / 3600
reality = REPORT / results["dualpipe"]
total = 14.8 * REPORT + 119e3 + 5e3
print(f"reality / arithmetic: {reality:.2f}")
print(
    f"14.8T tokens: {14.8 * REPORT / 1e3:,.0f}K hours; with long context and post-training {total / 1e3:,.0f}K, ${total * 2 / 1e6:.3f}M"
)
assert abs(total * 2 / 5.576e6 - 1) < 2e-3

# %% [markdown]
# ## Play: what if?
# Slower IB, fewer or more nodes a token, no FP8 speed: what does a trillion tokens cost, and which schedule can take it?


# %%
def what_if(ib: int = 50, limit=4, tflops: int = 1358, sms: int = 20):
    """GPU hours per trillion tokens by schedule, other things as above."""
    c = replace(V3, n_limited_groups=limit)
    m = H800._replace(ib=ib * 1e9, product=tflops * 1e12, sms=(132 - sms) / 132)
    times = StageTimes(stage_seconds(c, m, stages(V3, PP), 4096, trips(c, 64, 8, 1024)))
    names, hours = ("1f1b", "zb1p", "dualpipe"), []
    for name in names:
        step = max(span.end for span in simulate(schedule(name, PP, 64), times))
        hours.append(gpu_hours(step, 2048, 128 * 64 * 4096) / 1e3)
    fig, ax = figure(1, 1, 7, 1.9)
    ax.bar_label(ax.barh(names, hours, color=[GREY, GREEN, ORANGE]), fmt="%.0fK", padding=4)
    ax.axvline(REPORT / 1e3, color="black", ls="--", lw=1)
    ax.set(
        xlim=(0, 420),
        xlabel="GPU hours a trillion tokens (dashed: the report); 64 micro-batches",
        title=f"IB {ib} GB/s, {limit} nodes a token, {tflops} TFLOP/s, {sms} SMs for communication",
    )
    show(fig)


what_if()
play(what_if, ib=(10, 100, 10), limit=[4, 1, 2, 8], tflops=(400, 1800, 100), sms=(0, 60, 5))

# %% [markdown]
# ## Exercises
# **1 · Compute.** How many bytes of parameters does a GPU hold for the routed experts of one MoE layer of V3 at
# `ep` ranks, in fp32?


# %%
@checker
def check_bytes(fn):
    """Three matrices of 7168 × 2048 an expert, four bytes a number."""
    assert all(abs(fn(ep) - 4 * (256 // ep) * 3 * 7168 * 2048) < 1 for ep in (64, 256))


@checker
def check_breakeven(fn):
    """Compare the two links: bytes · crossings / rate of each."""
    assert abs(fn(160, 50) - 3.2) < 1e-9 and abs(fn(450, 50) - 9) < 1e-9


@checker
def check_kept(fn):
    """Sum `kept(V3, False)`, times 4,096 tokens and 17 micro-batches."""
    assert abs(fn() - 17 * 4096 * sum(kept(V3, False).values()) / 1e9) < 0.1


def my_bytes(ep: int) -> int:
    return ...


check_bytes(my_bytes)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_bytes(ep):
#     return 4 * (256 // ep) * 3 * 7168 * 2048
# ```
# </details>
#
# **2 · Predict.** A row that has crossed IB at `ib` GB/s is handed on inside the node at `nvlink` GB/s. To how many GPUs can it go
# before NVLink becomes the slower link?


# %%
def my_breakeven(nvlink: float, ib: float) -> float:
    return ...


check_breakeven(my_breakeven)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_breakeven(nvlink, ib):
#     return nvlink / ib  # 3.2 at the report's rates: 4 nodes × 3.2 ≈ 13 experts at no extra cost
# ```
# </details>
#
# **3 · Compute.** How many GB does one MoE layer hold for 17 micro-batches of 4,096 tokens?


# %%
def my_kept() -> float:
    return ...


check_kept(my_kept)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_kept():
#     return 17 * 4096 * sum(kept(V3, False).values()) / 1e9
# ```
# </details>

# %% [markdown]
# ## Scale-up
# `dsv3 plan` puts these functions beside the real thing: it builds the model on the meta device, cuts it as the
# cluster trainer does, and prints for every rank what lies in its memory, what it sends, and what a trillion tokens cost.
# Any config and any cluster are its arguments.
#
# ```
# dsv3 plan                                  V3 on 2,048 H800
# dsv3 plan --config small --pp 2 --ep 4 --gpus 8 --batch 64 --seq-len 2048
# ```
