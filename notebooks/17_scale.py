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
# Training took **180 thousand GPU hours per trillion tokens**: 3.7 days on 2,048 H800. Few readers have such a cluster,
# yet most decisions of the report (64-way expert parallelism, at most four nodes per token, DualPipe, FP8, what to
# recompute) are about it. These decisions can be checked by arithmetic. This chapter counts operations, bytes saved and
# bytes sent, converts each to seconds with one rate, lets the simulator of [chapter 12](12_dualpipe.ipynb) schedule them,
# and compares the sum with the report's GPU hours.

# %%
from dataclasses import replace
from itertools import product

import torch

from dsv3_ref.config import TINY, V3, Config
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show

REPORT = 180e3  # H800 hours per trillion tokens (§1)
rate = 1e12 / (REPORT * 3600)
print(f"{rate:,.0f} tokens/s per GPU; {REPORT / 2048 / 24:.1f} days on 2,048 GPUs")
print(
    f"so a token costs {1e6 / rate:.0f} µs of one GPU: {1e6 / rate / 16:.0f} µs in each of 16 pipeline stages"
)

# %% [markdown]
# ## Paper
# - 2,048 H800: 16-way pipeline parallelism, 64-way expert parallelism over 8 nodes, ZeRO-1, no tensor parallelism (§3.2).
# - NVLink 160 GB/s, InfiniBand (IB) 50 GB/s per GPU; a token visits at most 4 nodes; 20 of a GPU's 132 multiprocessors
#   (SMs) only communicate (§3.2.2).
# - Recomputed: RMSNorm and MLA's up-projections (§3.2.3), SwiGLU's output. Saved inputs are in FP8, after attention in
#   E5M6 (§3.3.3).
# - AdamW's moments in bf16 (§3.3.3), the moving average of the weights on the CPU (§3.2.3).
# - 2,664K hours for 14.8T tokens, \$2 per hour (§1).
#
# The report does *not* say how the 61 layers and the MTP module are distributed over 16 stages, or how fast each kernel
# ran; traces of one forward and one backward chunk in training, and of prefill, are in DeepSeek's repository
# `profile-data`. Our assumptions are the fields of `AchievedRates` and `Overheads`, with their sources, and you can change them.

# %%
#| export
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch

from dsv3_ref.config import Config, ceil_div
from dsv3_ref.dualpipe import Action, Step
from dsv3_ref.expert_parallel import to_local_expert_ids, dispatch_layout
from dsv3_ref.moe import route

# %% [markdown]
# ## Operations
# A product with a matrix of $o \times i$ costs $2\,o\,i$ operations per row. A token is one row for attention and shared
# experts, and $k$ rows for the $k$ routed experts that it chooses. Attention scores and weighted values have no weight
# matrix and are counted separately. In causal attention over $s$ tokens a query sees $(s + 1)/2$ keys on average. With
# $h$ heads, queries and keys of $x$ numbers (RoPE dimensions included) and values of $v$ numbers it costs
#
# $$\text{FLOPs}_{\text{attention}} = 2\,h\,(x + v)\,\tfrac{s+1}{2}\ \text{ forward}, \qquad
# 2\,h\,(3x + 2v)\,\tfrac{s+1}{2}\ \text{ backward}$$
#
# since the backward pass recomputes the scores and has four more products.


# %%
#| export
class Gemm(NamedTuple):
    """A product with a matrix (n_out, n_in), and its number of rows per token."""

    n_in: int
    n_out: int
    rows_per_token: int = 1

    @property
    def flops(self) -> int:
        """Forward FLOPs per token; Dgrad and Wgrad cost as much again each."""
        return 2 * self.rows_per_token * self.n_in * self.n_out


def block_gemms(config: Config, dense: bool) -> dict[str, Gemm]:
    """Return the matrix products of a block (chapters 03, 04) by name, with w1 and w3 as one."""
    h, v = config.n_heads, config.v_head_dim
    x = config.qk_nope_head_dim + config.qk_rope_head_dim
    q, kv = config.q_lora_rank, config.kv_lora_rank
    if q:
        gemms = {"wq_a": Gemm(config.dim, q), "wq_b": Gemm(q, h * x)}
    else:
        gemms = {"wq": Gemm(config.dim, h * x)}
    gemms["wkv_a"] = Gemm(config.dim, kv + config.qk_rope_head_dim)
    gemms["wo"] = Gemm(h * v, config.dim)
    gemms["wkv_b"] = Gemm(kv, h * (config.qk_nope_head_dim + v))
    if dense:
        return gemms | mlp_gemms("", config.dim, config.inter_dim)
    gemms["gate"] = Gemm(config.dim, config.n_routed_experts)
    gemms |= mlp_gemms("shared ", config.dim, config.n_shared_experts * config.moe_inter_dim)
    k = config.n_activated_experts
    return gemms | mlp_gemms("routed ", config.dim, config.moe_inter_dim, k)


def mlp_gemms(name: str, d: int, f: int, rows: int = 1) -> dict[str, Gemm]:
    """Return the products of an MLP d → f → d by name, with w1 and w3 as one."""
    return {f"{name}w1, w3": Gemm(d, 2 * f, rows), f"{name}w2": Gemm(f, d, rows)}


def attention_flops(config: Config, s: int) -> tuple[float, float]:
    """Return (forward, backward) FLOPs of causal attention over s tokens, per token and layer."""
    x, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return config.n_heads * (s + 1) * (x + v), config.n_heads * (s + 1) * (3 * x + 2 * v)


def training_flops_per_token(config: Config, s: int) -> float:
    """Return the FLOPs per token of forward and backward pass over rows of s tokens, with MTP.

    The backward pass counts twice the forward pass, recomputation does not count: the *model
    FLOPs* whose rate is divided by the peak in MFU.
    """
    head, projection = config.vocab_size * config.dim, 2 * config.dim**2
    forward = 2.0 * head * (1 + config.n_mtp_layers) + 2.0 * projection * config.n_mtp_layers
    for i in range(config.n_layers + config.n_mtp_layers):
        gemms = block_gemms(config, i < config.n_dense_layers)
        forward += sum(gemm.flops for gemm in gemms.values()) + attention_flops(config, s)[0]
    return 3 * forward


# %%
from torch.utils.flop_counter import FlopCounterMode

from dsv3_ref.model import Transformer
from dsv3_ref.ops import use


def counted(config: Config, s: int) -> float:
    """Return forward FLOPs per token by torch's counter; naive attention computes the full square."""
    with use("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        Transformer(config)(torch.zeros(1, s, dtype=torch.long))
    return counter.get_total_flops() / s


def ours(config: Config, s: int) -> float:
    """Return the same by `block_gemms`, with the full square and the k-fold sum after the experts."""
    matrices = 0
    for i in range(config.n_layers):
        gemms = block_gemms(config, i < config.n_dense_layers)
        matrices += sum(gemm.flops for gemm in gemms.values())
    square = config.n_layers * attention_flops(config, 2 * s - 1)[0]
    sums = 2 * (config.n_layers - config.n_dense_layers) * config.n_activated_experts * config.dim
    return matrices + square + sums + 2 * config.vocab_size * config.dim


for s in (16, 64):
    assert counted(TINY, s) == ours(TINY, s)  # exactly
block = block_gemms(V3, dense=False)
for name, p in sorted(block.items(), key=lambda item: -item[1].flops):
    print(
        f"{name:15}{p.n_out:7} × {p.n_in:<6}{p.rows_per_token} row{'s' * (p.rows_per_token > 1):1}{p.flops / 1e6:8.0f} MFLOPs per token"
    )
print(f"attention at 4K: {attention_flops(V3, 4096)[0] / 1e6:.0f} MFLOPs forward, "
      f"{attention_flops(V3, 4096)[1] / 1e6:.0f} backward")  # fmt: skip

# %% [markdown]
# ## Stages of equal work
# A pipeline is as fast as its slowest stage. The last stage computes more than its layers: also the head, and MTP, which
# is a block, a projection and the head a second time. Counted in multiplications these are worth *four* layers. Layer $l$
# of $L$ has $w_l$ multiplications. Stage $p$ of $P$ gets the layers from $a_{p-1}$ up to, but not including, $a_p$; the
# last one ($[p = P]$ is 1 there, 0 elsewhere) also $w_{\text{after}}$. We minimize the sum of squares of the stages' work,
#
# $$\min_{0 = a_0 \le a_1 \dots \le a_P = L}\ \sum_{p} \Big(\sum_{a_{p-1} \le l < a_p} w_l + [p = P]\,w_{\text{after}}\Big)^2$$
#
# by dynamic programming: try every last cut after the best partition of the layers before it (at most 61 · 61 · 16 sums).
# Only the last stage may have no layers.


# %%
#| export
def layer_costs(config: Config) -> tuple[list[int], int]:
    """Return multiplications per token: of every layer, and of head and MTP after the last one."""

    def block_cost(is_dense: bool) -> int:
        return sum(gemm.flops // 2 for gemm in block_gemms(config, is_dense).values())

    dense, moe = block_cost(True), block_cost(False)
    head = config.vocab_size * config.dim
    after = head + config.n_mtp_layers * (2 * config.dim**2 + moe + head)
    return [dense if i < config.n_dense_layers else moe for i in range(config.n_layers)], after


@cache
def partition_layers(config: Config, num_stages: int) -> tuple[range, ...]:
    """Partition the layers into stages whose work is as equal as possible."""
    layers, after = layer_costs(config)
    total = [0, *accumulate(layers)]

    @cache
    def best(k: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Return the least Σ work² of the first `end` layers in k stages, and the stages' ends."""
        if k == 0:
            return (0, ()) if end == 0 else (1 << 200, ())
        is_last = k == num_stages
        may_be_empty = is_last and num_stages > 1  # the last stage has the head
        options = []
        for start in range(k - 1, end + may_be_empty):
            squares, ends = best(k - 1, start)
            work = total[end] - total[start] + (after if is_last else 0)
            options.append((squares + work**2, (*ends, end)))
        return min(options)

    ends = best(num_stages, config.n_layers)[1]
    return tuple(range(a, b) for a, b in zip((0, *ends), ends))


# %%
layers, after = layer_costs(V3)
print(f"after the last layer: the work of {after / layers[-1]:.2f} layers")
cut = partition_layers(V3, 16)
assert sum(map(list, cut), []) == list(range(61))
even = [61 // 16 + (s < 61 % 16) for s in range(16)]
fig, ax = figure(1, 1, 8, 2.6)
for dx, sizes, color, name in (
    (-0.2, even, GRAY, "equal layers"),
    (0.2, [*map(len, cut)], BLUE, "equal work"),
):
    extra = [0] * 15 + [after / layers[-1]]
    ax.bar([s + dx for s in range(16)], sizes, 0.4, color=color, label=name)
    ax.bar([s + dx for s in range(16)], extra, 0.4, bottom=sizes, color=color, alpha=0.45)
ax.set(xlabel="stage", ylabel="work in layers", xticks=range(16))
ax.set_title("Head and MTP are worth four layers (pale)")
ax.legend(loc="upper left", ncols=2)
show(fig)
assert max(len(part) for part in cut) == 5 or len(cut[-1]) == 0

# %% [markdown]
# ## What a micro-batch leaves behind
# Until its backward pass a micro-batch holds the tensors that gradients need. With all of the report's recomputation, a
# block saves the following (in bytes per token; $z(x) = 4\lceil x/128\rceil$ is for the scales of a row of $x$ FP8 values):
#
# - inputs of the two norms on the residual stream, and of the latent norms in bf16;
# - attention's output in twelve bits, $\tfrac32 x + z(x)$, for $W^O$ and for attention itself, and one number per head;
# - rows that arrive at experts in FP8, $x + z(x)$, once per rank, whatever the number of the token's experts there;
# - gate and up of the routed experts in FP8, and the routing weight, for each of $k$ rows;
# - the gate's affinities and choices, and the sources of the rows.
#
# The inputs of all other matrices are recomputed: those after a norm from the input of the norm, and those of a dense or
# shared $W_2$ from the input of the whole MLP. `activation_bytes_per_token` lists the rest tensor by tensor. To check that
# none is missing, the real pipeline stage of `dsv3_ref.parallel` runs under `saved_tensors`, which counts every tensor
# that autograd saves. `tests/cluster/test_memory.py` counts *all* tensors of real ranks.


# %%
#| export
def scale_bytes(width: int) -> int:
    """Return the bytes of a row's FP8 scales: one in fp32 for every 128 numbers."""
    return 4 * ceil_div(width, 128)


def activation_bytes_per_token(
    config: Config, dense: bool, fp8: bool = True, stream: int = 4, arrived: float | None = None,
    computed: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the bytes per token that a block saves for its backward pass (§3.2.3, §3.3.3).

    The result is by tensor, with recomputation and without RoPE's tables. fp8: products are in
    FP8, else in bf16. stream: bytes per number of the residual stream. arrived: rows that arrive at
    a rank per token. computed: rows of its experts per token. Both are k by default.
    """
    d, k = config.dim, config.n_activated_experts
    h, hv = config.n_heads, config.n_heads * config.v_head_dim
    q, kv = config.q_lora_rank, config.kv_lora_rank
    r, f = config.qk_rope_head_dim, config.moe_inter_dim
    latents = (2 * q + 4 if q else 0) + 2 * (kv + r) + 4 + 2 * r
    attention_output = 4 * h + (192 * ceil_div(hv, 128) + scale_bytes(hv) if fp8 else 2 * hv)
    saved: dict[str, float] = {
        "residual stream": 2 * (stream * d + 4),
        "latents": latents,
        "output of attention": attention_output,
    }
    if not dense:
        own = k if computed is None else computed
        rows = k if arrived is None else arrived
        saved["gate"] = 4 * config.n_routed_experts + 12 * k + 8
        saved["expert inputs"] = rows * (d + scale_bytes(d)) if fp8 else own * 2 * d
        saved["gate and up of experts"] = own * 2 * (f + scale_bytes(f) if fp8 else 2 * f)
        saved["rows of experts"] = own * (4 + 8 + 8)  # routing weight, token and place of a row
    return saved


# %%
from dsv3_ref import ops
from dsv3_ref.parallel.context_parallel import SequencePart
from dsv3_ref.parallel.token_dispatcher import AllToAllDispatcher
from dsv3_ref.parallel.stage import LossStats, LossWeights, MicroBatch, Stage
from dsv3_ref.parallel.tape import Tape, run_to_completion
from dsv3_ref.training.objective import ModelInput, RowBatch
from dsv3_ref.training.recompute import saved_tensors


class Lean(torch.autograd.Function):
    """Attention that saves what the kernel saves: inputs (recomputed), output, a number per head."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, o := torch.zeros_like(v), torch.empty(q.shape[:3]))
        return o


ops.impl("attention", "lean")(lambda q, k, v, scale: Lean.apply(q, k, v))


def count_saved_bytes(config: Config, n: int, fp8: bool) -> int:
    """Return the bytes that autograd has saved after the first stage, of one layer, ran on n tokens."""
    stage = Stage(Transformer(config), config, 0, 2, AllToAllDispatcher([]))
    backends, tape = ("lean", "fp8", "auto") if fp8 else ("lean", "auto"), Tape()
    rows_bs = torch.randint(config.vocab_size, (1, n + 1))
    sequence, model_input = SequencePart(None, n), ModelInput(rows_bs[:, :-1])
    batch = MicroBatch(RowBatch(rows_bs), model_input, sequence, LossWeights(1.0), LossStats())
    with ops.use(*backends), saved_tensors(True, stage.model.parameters()) as saved:
        with torch.autocast("cpu", torch.bfloat16):
            run_to_completion(stage.forward(tape, None, batch))
        return saved.bytes


SHAPE = replace(
    TINY, n_layers=1, n_mtp_layers=0, dim=256, inter_dim=384, q_lora_rank=200, kv_lora_rank=160
)
for dense, fp8 in product((True, False), repeat=2):
    c = replace(SHAPE, n_dense_layers=int(dense))
    # in the difference quantized weights cancel
    counted_bytes = (count_saved_bytes(c, 192, fp8) - count_saved_bytes(c, 128, fp8)) / 64
    rope = 8 + 4 * c.qk_rope_head_dim  # token ids; cosines and sines, once for all layers
    formula = sum(activation_bytes_per_token(c, dense, fp8).values()) + rope
    print(
        f"{'dense' if dense else 'MoE':6}{'FP8' if fp8 else 'bf16':5}{counted_bytes:9,.0f} bytes per token counted, {formula:9,.0f} by formula"
    )
    assert counted_bytes == formula

# %%
block_parts, times = activation_bytes_per_token(V3, dense=False), 4096 / 1e6
wide = activation_bytes_per_token(V3, dense=False, fp8=False)
fig, ax = figure(1, 1, 8, 2.4)
for y, table in enumerate((wide, block_parts)):
    left = 0
    for color, (what, size) in zip(COLORS, table.items()):
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
# In the schedule of chapter 12 up to PP + 1 = 17 micro-batches are in flight on a rank, in its two stages together, which is why the report saves
# so little. Only what the experts save depends on balance: a rank with twice the tokens saves twice as much.
#
# ## What travels
# A token's row is sent over IB once to each *node* that has one of its experts, and within each node over NVLink to each
# *GPU* that has one ([chapter 11](11_expert_parallel.ipynb)). With 64 ranks in 8 nodes and balanced experts the expected
# numbers of copies depend on the gate alone, so we run the gate on random affinities.


# %%
#| export
class DispatchRows(NamedTuple):
    """Copies of a token that its dispatch makes, as a mean."""

    ib: float  # that cross nodes
    nvlink: float  # that cross GPUs within a node
    sent: tuple[float, ...]  # in each hop, those that stay on their GPU included

    @property
    def arrived(self) -> float:
        """The rows that arrive at the ranks of the token's experts, one per rank."""
        return self.sent[-1]


def dispatch_rows(config: Config, ep: int, ranks_per_node: int, n: int = 4096) -> DispatchRows:
    """Return the copies of a token in one or two hops, as the mean of n tokens.

    The experts are chosen by random affinities, so that the load is even.
    """
    if ep == 1:
        return DispatchRows(0.0, 0.0, ())
    g = torch.Generator().manual_seed(0)
    logit_bse = torch.randn(1, n, config.n_routed_experts, generator=g)
    expert_nk = route(logit_bse, None, config).topk_ids_bsk[0]
    rank_n = torch.arange(n) % ep
    experts_per_rank = config.n_routed_experts // ep
    token_m, node_m = torch.arange(n), torch.zeros(n, dtype=torch.long)
    ib, sent = 0, []
    if ep > ranks_per_node:
        per_node, nodes = experts_per_rank * ranks_per_node, ep // ranks_per_node
        token_m, node_m, _ = dispatch_layout(expert_nk, per_node, nodes)
        ib = int((node_m != rank_n[token_m] // ranks_per_node).sum())
        sent.append(len(token_m) / n)
    node_size = min(ep, ranks_per_node)
    local_mk = to_local_expert_ids(expert_nk[token_m], node_m, experts_per_rank * node_size)
    row_m, place_m, _ = dispatch_layout(local_mk, experts_per_rank, node_size)
    nvlink = int((place_m != rank_n[token_m[row_m]] % ranks_per_node).sum())
    return DispatchRows(ib / n, nvlink / n, (*sent, len(row_m) / n))


def dispatch_copies(
    config: Config, ep: int, ranks_per_node: int, n: int = 4096
) -> tuple[float, float]:
    """Return how many copies of a token cross (IB, NVLink) in two hops, as the mean of n tokens."""
    rows = dispatch_rows(config, ep, ranks_per_node, n)
    return rows.ib, rows.nvlink


def dispatch_bytes(config: Config, fp8: bool = True) -> tuple[int, int]:
    """Return the bytes of a row in (dispatch, combine).

    Dispatch sends FP8 with scales, or bf16, with k expert ids and weights. Combine sends bf16.
    """
    values = config.dim + scale_bytes(config.dim) if fp8 else 2 * config.dim
    return values + 8 * config.n_activated_experts, 2 * config.dim


# %%
def slow_trips(config: Config):
    """Count by the definition: other nodes; then GPUs other than the one where the row arrived."""
    expert_nk = route(
        torch.randn(1, 4096, 256, generator=torch.Generator().manual_seed(0)), None, config
    ).topk_ids_bsk[0]
    ib = nvlink = 0
    for token, chosen in enumerate(expert_nk.tolist()):
        home, gpus = token % 64, {e // 4 for e in chosen}
        ib += len({gpu // 8 for gpu in gpus} - {home // 8})
        nvlink += sum(gpu % 8 != home % 8 for gpu in gpus)
    return ib, nvlink


ib, nvlink = dispatch_copies(V3, 64, 8)
print(
    f"a token crosses IB {ib:.2f} times, NVLink {nvlink:.2f} times; dispatch {dispatch_bytes(V3)[0]:,} bytes, combine {dispatch_bytes(V3)[1]:,}"
)
assert (ib * 4096, nvlink * 4096) == slow_trips(V3) and 3.2 < ib <= 4
for limit in (8, 4, 2, 1):
    c = replace(V3, n_limited_groups=limit)
    print(
        f"at most {limit} nodes: IB {dispatch_copies(c, 64, 8)[0]:.2f}, NVLink {dispatch_copies(c, 64, 8)[1]:.2f}"
    )

# %% [markdown]
# ## Seconds
# Each operation is limited by one rate, of operations or of bytes. `GPUSpec` holds the rates of a data sheet and
# `AchievedRates` those that are *achieved*, with these sources:
#
# | | H800 | source |
# |---|---|---|
# | FP8 products | 1,358 of 1,979 TFLOP/s | DeepGEMM's first table, 4096 × 7168 × 16384 |
# | attention forward, backward | 0.6 and 0.5 of 989 TFLOP/s | typical of public kernels; assumed |
# | memory | 0.85 of 3.35 TB/s | assumed |
# | NVLink | 153 of 200 GB/s | DeepEP's table (the report: 160) |
# | IB | 50 GB/s | the report; DeepEP's table has 46 and 45 for 64 ranks |
# | SMs for computation | 112 of 132 | §3.2.2 |
#
# For other GPUs we assume the same *fractions* of their data sheets and the report's \$2 per hour, although they cost
# more.


# %%
#| export
class AchievedRates(NamedTuple):
    """Rates that a GPU achieves, its memory, and the price of an hour; by default of an H800."""

    gemm: float = 1358e12  # FLOP/s of FP8 matrix products
    attention: float = 0.6 * 989e12  # FLOP/s of attention, forward
    attention_backward: float = 0.5 * 989e12  # FLOP/s of attention, backward
    hbm: float = 0.85 * 3.35e12  # bytes/s of the GPU's memory
    nvlink: float = 153e9  # bytes/s between GPUs of a node
    ib: float = 50e9  # bytes/s between nodes
    compute_sms: float = 112 / 132  # fraction of the SMs that do not communicate
    memory: float = 80e9  # bytes of memory of a GPU
    dollars_per_hour: float = 2.0  # price of a GPU hour


class GPUSpec(NamedTuple):
    """A data sheet: dense FP8 and bf16 FLOP/s, bytes/s (links: per direction), bytes, SMs."""

    fp8: float
    bf16: float
    hbm: float
    nvlink: float
    ib: float
    memory: float
    sms: int


GPU_SPECS = {
    "h800": GPUSpec(1979e12, 989e12, 3.35e12, 200e9, 50e9, 80e9, 132),
    "h100": GPUSpec(1979e12, 989e12, 3.35e12, 450e9, 50e9, 80e9, 132),
    "h200": GPUSpec(1979e12, 989e12, 4.8e12, 450e9, 50e9, 141e9, 132),
    "b200": GPUSpec(4500e12, 2250e12, 8e12, 900e9, 50e9, 180e9, 148),
}


def achieved_rates(spec: GPUSpec) -> AchievedRates:
    """Return a GPU's rates at an H800's fractions of the data sheet; 20 SMs communicate."""
    h800 = AchievedRates()
    fp8, bf16, hbm, nvlink, ib, memory, _ = (a / b for a, b in zip(spec, GPU_SPECS["h800"]))
    return AchievedRates(
        gemm=h800.gemm * fp8,
        attention=h800.attention * bf16,
        attention_backward=h800.attention_backward * bf16,
        hbm=h800.hbm * hbm,
        nvlink=h800.nvlink * nvlink,
        ib=h800.ib * ib,
        compute_sms=1 - 20 / spec.sms,
        memory=h800.memory * memory,
        dollars_per_hour=h800.dollars_per_hour,
    )


ACHIEVED_RATES = {name: achieved_rates(spec) for name, spec in GPU_SPECS.items()}

# %% [markdown]
# Between the products are kernels that only move bytes: norms, which read the fp32 stream and write bf16 and FP8; sums,
# RoPE, SwiGLU and quantization; and the permutation of rows by expert and back. A row that is sent crosses IB and then
# NVLink. Both links work at the same time, so an all-to-all takes as long as the slower one:
#
# $$\text{seconds} = \max\left(\frac{\text{IB crossings}\cdot\text{bytes}}{50\ \text{GB/s}},\
# \frac{\text{NVLink crossings}\cdot\text{bytes}}{153\ \text{GB/s}}\right)$$


# %%
#| export
def memory_traffic(config: Config, dense: bool) -> dict[str, float]:
    """Return the bytes per token that a block's forward pass moves between its products.

    The kernels are those of chapter 10.
    """
    d, h = config.dim, config.n_heads
    x, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    k = config.n_activated_experts
    width = config.inter_dim if dense else (config.n_shared_experts + k) * config.moe_inter_dim
    return {
        "norms of attention": (7 + 10) * d + 5 * (config.q_lora_rank + config.kv_lora_rank),
        "RoPE, quantized heads": 8 * h * x + 3.5 * h * v,
        "norm of MLP": (7 + 10) * d,
        "SwiGLU": 7 * width,
        "permute, combine": 0 if dense else k * (3 + 2 + 4 + 2) * d,
    }


def link_seconds(
    rates: AchievedRates, copies: tuple[float, float], row_bytes: float
) -> tuple[float, float]:
    """Return the seconds per token on (IB, NVLink); the slower one bounds an all-to-all."""
    return copies[0] * row_bytes / rates.ib, copies[1] * row_bytes / rates.nvlink


# %%
H800, limits = ACHIEVED_RATES["h800"], (1, 2, 3, 4, 5, 6, 8)
assert AchievedRates() == H800  # fractions of its own data sheet give the H800's own rates
many = [dispatch_copies(replace(V3, n_limited_groups=limit), 64, 8) for limit in limits]
both = [[1e3 * 4096 * t for t in link_seconds(H800, x, sum(dispatch_bytes(V3)))] for x in many]
fig, ax = figure(1, 1, 7, 2.8)
ax.plot(limits, [ib for ib, _ in both], "o-", color=BLUE, label="IB, once per node")
ax.plot(limits, [nvlink for _, nvlink in both], "s-", color=ORANGE, label="NVLink, once per GPU")
ax.axhline(
    1e3 * 4096 * 8 * 63 / 64 * sum(dispatch_bytes(V3)) / 50e9,
    color=GRAY,
    ls="--",
    label="IB, one hop: every row",
)
ax.axvline(4, color="black", lw=0.8, ls=":")
ax.set(
    xlabel="nodes a token may visit, M (dotted: the report)",
    ylabel="ms, dispatch and combine",
    ylim=(0, 17),
)
ax.set_title("All-to-all of 4,096 tokens among 64 GPUs in 8 nodes")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
show(fig)
assert all(a[0] <= b[0] + 1e-9 for a, b in zip(both, both[1:]))
print(
    f"at M = 4: IB {both[3][0]:.1f} ms, NVLink {both[3][1]:.1f} ms; at M = 2 they are closest: {both[1][0]:.1f}, {both[1][1]:.1f}"
)

# %% [markdown]
# ## Every operator under its roof
# An operator of $F$ operations and $B$ bytes takes $\max(F / \text{rate},\ B / \text{bandwidth})$ seconds. Its
# *intensity* $F/B$ decides which of the two is larger. The bytes of a matrix product are its weights, its input rows and
# its output rows, in FP8 or bf16. Attention reads $q, k, v$ and writes $o$ in training; in decoding (absorbed, chapter 03)
# the same 576 numbers of each cached token serve all heads. Copies count as one operation per number. Four quantities
# determine the times: the tokens of a GPU, the keys that each of them sees, the experts that the GPU holds, and the
# number of copies that are sent.


# %%
#| export
class Operator(NamedTuple):
    """FLOPs and bytes of one operator of a layer on one GPU, and the rate that applies to it."""

    flops: float
    bytes: float
    kind: str = "gemm"  # FP8; or bf16 (attention's rate), ib, nvlink

    def times_by_limit(self, rates: AchievedRates) -> dict[str, float]:
        """Return the seconds that each limit alone would require."""
        if self.kind in ("ib", "nvlink"):
            return {self.kind: self.bytes / getattr(rates, self.kind)}
        rate = rates.gemm if self.kind == "gemm" else rates.attention
        return {"operations": self.flops / rate, "memory": self.bytes / rates.hbm}

    def seconds(self, rates: AchievedRates) -> float:
        """Return the time of the operator, which its bottleneck sets."""
        return max(self.times_by_limit(rates).values())

    def bottleneck(self, rates: AchievedRates) -> str:
        """Return the limit that sets the time."""
        return max(self.times_by_limit(rates).items(), key=lambda item: item[1])[0]


def attention_operator(config: Config, num_tokens: float, keys: float, cached: bool) -> Operator:
    """Return the attention operator of some tokens with `keys` keys each.

    cached: absorbed attention of one token for each of `num_tokens` sequences, over their caches.
    """
    h, n = config.n_heads, num_tokens
    kv, r = config.kv_lora_rank, config.qk_rope_head_dim
    if cached:
        flops = 2 * n * h * keys * (2 * kv + r)
        return Operator(flops, 2 * n * (keys * (kv + r) + h * (2 * kv + r)), "bf16")
    width = config.qk_nope_head_dim + r + config.v_head_dim
    return Operator(2 * n * h * keys * width, 4 * n * h * width, "bf16")


def operators(
    config: Config, dense: bool, num_tokens: float, keys: float, copies: tuple[float, float],
    local_experts: float, cached: bool = False,
) -> dict[str, Operator]:  # fmt: skip
    """Return the operators of a block's forward pass by name.

    keys, cached: see `attention_operator`. copies: see `dispatch_copies`. local_experts: routed
    experts on the GPU.
    """
    n = num_tokens
    out = {"attention": attention_operator(config, n, keys, cached)}
    for name, gemm in block_gemms(config, dense).items():
        width = 4 if name == "gate" else 1  # bytes of a weight and of an input
        weights = gemm.n_in * gemm.n_out * (local_experts if name.startswith("routed") else 1)
        rows = n * gemm.rows_per_token * (width * gemm.n_in + 2 * gemm.n_out)
        kind = "bf16" if name == "gate" else "gemm"
        out[name] = Operator(n * gemm.flops, width * weights + rows, kind)
    for name, moved in memory_traffic(config, dense).items():
        if moved:
            out[name] = Operator(n * moved / 2, n * moved, "bf16")
    if not dense:
        for link, crossings in zip(("ib", "nvlink"), copies):
            if crossings:
                sent = n * crossings * sum(dispatch_bytes(config))
                out[f"all-to-all, {link}"] = Operator(0, sent, link)
    return out


def head_operators(config: Config, num_tokens: float) -> dict[str, Operator]:
    """Return the operators outside of blocks: the head (bf16), and MTP's projection of 2 d to d."""
    d, w = config.dim, config.vocab_size
    n = num_tokens
    return {
        "head": Operator(2 * n * d * w, 2 * d * w + n * (2 * d + 4 * w), "bf16"),
        "MTP's projection": Operator(4 * n * d * d, 2 * d * d + n * 4 * d),
    }


# %% [markdown]
# Three situations: a training rank with one sequence (4 experts on each of 64 ranks); a prefill rank, whose prompts have
# 16K tokens; and a decode rank, where 32 heads serve 112 sequences with 4K of context, and one expert gets 9/320 of the
# rows of 80 such groups.

# %%
few = replace(V3, n_heads=32)  # tensor parallelism over four GPUs
dense, moe = (
    operators(V3, True, 4096, 2048, (0, 0), 0),
    operators(V3, False, 4096, 2048, dispatch_copies(V3, 64, 8), 4),
)
wide = {f"dense {n}": op for n, op in dense.items() if n in ("w1, w3", "w2")}
training = moe | wide | head_operators(V3, 4096)
prefill = {"attention, 16K prompts": attention_operator(V3, 4096, 8192, False)}
decoding = {
    f"{n}, decode": op
    for n, op in operators(few, False, 112, 4096, (0, 0), 1, cached=True).items()
    if n in ("attention", "wq_a", "wq_b", "wkv_b", "wo", "norms of attention")
}
expert = operators(V3, False, 80 * 112 * 9 / 320 / 8, 1, (0, 0), 1)
decoding |= {f"{n}, decode": expert[n] for n in ("routed w1, w3", "routed w2")}
decoding |= {"all-to-all, ib, decode": Operator(0, 28 * 9 * sum(dispatch_bytes(V3)), "ib")}
everything = training | prefill | decoding
print(
    f"{'':25}{'GFLOPs':>8}{'MB':>8}{'FLOP/B':>8}   {'  '.join(f'{n:>6}' for n in ACHIEVED_RATES)}  µs    limit on h800, b200"
)
for name, op in everything.items():
    times = "  ".join(f"{1e6 * op.seconds(rates):6.0f}" for rates in ACHIEVED_RATES.values())
    print(
        f"{name:25}{op.flops / 1e9:8.1f}{op.bytes / 1e6:8.1f}{op.flops / op.bytes:8.0f}   {times}        "
        f"{op.bottleneck(H800)}, {op.bottleneck(ACHIEVED_RATES['b200'])}"
    )
assert all(
    op.bottleneck(H800) == "memory"
    for name, op in decoding.items()
    if name[:2] in ("wq", "wo", "wk")
)
assert (
    training["wo"].bottleneck(H800) == "operations"
    and training["SwiGLU"].bottleneck(H800) == "memory"
)


# %%
def crowds(rates, ops: dict[str, Operator]):
    """Return [(kind, [(number, FLOPs/byte, TFLOP/s)])], with neighboring points in one group."""
    out = []
    points = [(n, op.flops / op.bytes, op) for n, op in enumerate(ops.values(), start=1)]
    for number, i, op in sorted(points, key=lambda p: (p[2].kind, p[1])):
        point = number, i, op.flops / op.seconds(rates) / 1e12
        if out and out[-1][0] == op.kind and i < 1.3 * out[-1][1][-1][1]:
            out[-1][1].append(point)
        else:
            out.append((op.kind, [point]))
    return out


def roof(rates, ops: dict[str, Operator], ax) -> None:
    """Draw operators by number under the roofs of products and of attention."""
    x = [2.0**k for k in range(-2, 14)]
    ax.loglog(
        x, [min(rates.gemm, i * rates.hbm) / 1e12 for i in x], color=BLUE, label="FP8 products"
    )
    ax.loglog(
        x,
        [min(rates.attention, i * rates.hbm) / 1e12 for i in x],
        color=ORANGE,
        label="bf16: attention, head, copies",
    )
    for kind, group in crowds(rates, ops):
        names = ("\n" if group[0][1] > 1 else ", ").join(str(number) for number, *_ in group)
        x, y = group[len(group) // 2][1:]
        up, left = kind == "gemm", "center" if x > 1 else "left"
        color, align = (BLUE, "bottom") if up else (ORANGE, "top")
        ax.plot([i for _, i, _ in group], [v for *_, v in group], "o", ms=4, color=color)
        ax.annotate(
            names,
            (x, y),
            (0, 6 if up else -6),
            textcoords="offset points",
            ha=left,
            va=align,
            fontsize=8,
        )
    for number, name in enumerate(ops, start=1):
        ax.plot([], [], " ", label=f"{number} {name}")
    ax.set(xlabel="FLOPs per byte", ylabel="TFLOP/s", ylim=(0.3, 20_000))


fig, ax = figure(1, 1, 10, 5.4)
roof(H800, {n: op for n, op in everything.items() if op.flops}, ax)
ax.set_title("V3's operators under the two roofs of an H800 (achieved rates)")
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5, ncols=1)
show(fig)

# %% [markdown]
# In training nearly all products are under the flat roof, that is, compute-bound (wkv_b, with its short sums, is nearest
# to the slope). Every kernel between products is under the slope, that is, memory-bound: hence fused quantization
# (chapter 10). All of decoding is memory-bound: weights are read for one or two hundred rows, caches for one query. Since
# 32 heads share each cached number, its attention has 60 operations per byte; with all 128 heads on one GPU it would reach
# the corner. An H200 raises only the slope, a B200 both.
#
# ## What kernels' tables leave out
# Now the time of a training block. A table of kernel benchmarks does not include the overheads of a month on 2,048 GPUs.
# Each of them has a name and can be switched off; `NO_OVERHEADS` has none:
#
# | `Overheads` | value | source |
# |---|---|---|
# | `gemm_shapes` | each product at the rate of its own shape | DeepGEMM's first table: wkv_b 590, wq_b 990, experts 1,288 and 1,093 … TFLOP/s; dense MLP unmeasured, 1,358 |
# | `load_imbalance` | busiest rank 1.1 × the mean | our assumption |
# | `pair_order` | an all-to-all waits for its input | the order of F&B in Figure 4 of §3.2.1, simulated |
# | `pp_stream_bytes` | 2 bytes per number between stages | our trainer; shares IB with the all-to-alls |
# | `launch_gap` | 2 µs between two kernels, 12 per half block and pass | our assumption |
# | `straggler_factor` | slowest GPU and link 1.03 | our assumption |
# | `failure_rate` | 419 in 54 days on 16,384 GPUs | the Llama 3 report |
# | `hours_lost` | half an hour each | our assumption: restart and work since the checkpoint |
# | `accumulation_bytes` | 8 per parameter and micro-batch | our kernels: Wgrad reads and writes the sum in fp32; 16 if it is added in a pass of its own |
#
# After the pipeline, gradients are summed in fp32 and weights gathered in FP8 over IB, and AdamW moves 20 bytes per number of its
# shard.


# %%
#| export
class Overheads(NamedTuple):
    """Overheads between kernel benchmarks and a month of training; sources in chapter 17."""

    gemm_shapes: bool = True  # matrix products run at the rate of their shape
    load_imbalance: float = 1.1  # tokens of the busiest rank over the mean
    pair_order: bool = True  # a pair of chunks runs in the order of its dependencies
    pp_stream_bytes: int = 2  # bytes per number sent between pipeline stages
    launch_gap: float = 2e-6  # seconds between two kernels
    straggler_factor: float = 1.03  # time of the slowest rank over the mean
    failure_rate: float = 419 / (54 * 24 * 16384)  # failures per GPU and hour
    hours_lost: float = 0.5  # hours lost per failure
    accumulation_bytes: int = 8  # moved per parameter and micro-batch to sum gradients in fp32


NO_OVERHEADS = Overheads(False, 1.0, False, 0, 0.0, 1.0, 0.0, 0.0, 0)
ATTENTION_GEMMS = ("wq", "wq_a", "wq_b", "wkv_a", "wkv_b", "wo")
BEST_TFLOPS, KERNELS_PER_HALF_BLOCK = 1358, 12
GEMM_TFLOPS = {  # of DeepGEMM, for 4,096 rows and more
    "wq_a": 1058, "wkv_a": 1058, "wq_b": 990, "wkv_b": 590, "shared w1, w3": 1304,
    "shared w2": 1025, "routed w1, w3": 1288, "routed w2": 1093,
}  # fmt: skip


def gemm_seconds(
    gemms: dict[str, Gemm], rates: AchievedRates, overheads: Overheads
) -> dict[str, float]:
    """Return the seconds per token of each product."""
    seconds = {}
    for name, gemm in gemms.items():
        speed = rates.gemm
        if overheads.gemm_shapes:
            speed *= GEMM_TFLOPS.get(name, BEST_TFLOPS) / BEST_TFLOPS
        load = overheads.load_imbalance if name.startswith("routed") else 1
        seconds[name] = load * gemm.flops / speed
    return seconds


class BlockTime(NamedTuple):
    """Seconds of a block on one micro-batch: forward, backward (inputs, weights), all-to-alls."""

    f: float
    i: float
    w: float
    comm: float


def add_times(times: Iterable[BlockTime]) -> BlockTime:
    """Return the sum of times, field by field."""
    total = BlockTime(0, 0, 0, 0)
    for time in times:
        total = BlockTime(*(a + b for a, b in zip(total, time)))
    return total


def block_parts(
    config: Config, rates: AchievedRates, dense: bool, s: int, copies: tuple[float, float],
    overheads: Overheads = NO_OVERHEADS,
) -> tuple[BlockTime, BlockTime]:  # fmt: skip
    """Return the times of a block's attention, and of its MLP with all-to-alls, on s tokens."""
    gemms = gemm_seconds(block_gemms(config, dense), rates, overheads)
    traffic = {name: moved / rates.hbm for name, moved in memory_traffic(config, dense).items()}
    imbalance = 1 if dense else overheads.load_imbalance
    scale, gap = s / rates.compute_sms, KERNELS_PER_HALF_BLOCK * overheads.launch_gap

    products = sum(t for name, t in gemms.items() if name in ATTENTION_GEMMS)
    recomputed = sum(gemms.get(name, 0) for name in ("wq_b", "wkv_b"))
    between = traffic["norms of attention"] + traffic["RoPE, quantized heads"]
    forward, backward = attention_flops(config, s)
    forward_time = products + forward / rates.attention + between
    input_time = products + recomputed + backward / rates.attention_backward + 2 * between
    attention = BlockTime(
        scale * forward_time + gap, scale * input_time + 2 * gap, scale * products + gap, 0.0
    )

    products = sum(gemms.values()) - products
    recomputed = sum(gemms.get(name, 0) for name in ("w1, w3", "shared w1, w3"))
    between = imbalance * (traffic["SwiGLU"] + traffic["permute, combine"])
    between += traffic["norm of MLP"]
    all_to_all = 0.0
    if not dense:
        all_to_all = imbalance * s * max(link_seconds(rates, copies, sum(dispatch_bytes(config))))
    mlp = BlockTime(
        scale * (products + between) + gap,
        scale * (products + recomputed + 2 * between) + 2 * gap,
        scale * products + gap, all_to_all,
    )  # fmt: skip
    return attention, mlp


def block_time(
    config: Config, rates: AchievedRates, dense: bool, s: int, copies: tuple[float, float],
    overheads: Overheads = NO_OVERHEADS,
) -> BlockTime:  # fmt: skip
    """Return the time of a block on one sequence of s tokens, including recomputation."""
    return add_times(block_parts(config, rates, dense, s, copies, overheads))


# %%
one = block_time(V3, H800, False, 4096, dispatch_copies(V3, 64, 8))
print(
    f"a MoE block, 4,096 tokens: forward {1e3 * one.f:.2f} ms, backward {1e3 * one.i:.2f} + {1e3 * one.w:.2f} ms, "
    f"all-to-alls {1e3 * one.comm:.2f} ms per pass"
)
print(f"all-to-alls / computation of a forward pass: {one.comm / one.f:.2f} (the report: about 1)")

# %% [markdown]
# ## What hides behind what
# DualPipe overlaps the forward pass (F) of one micro-batch with the backward pass (B) of another: a pair F&B. Each part
# waits for its inputs. Two clocks, one for the GPU's computation and one for its links, follow the report's order:
#
# > compute: MLP(B) · MLP(W) · MLP(F) · attention(B) · attention(W) · attention(F) <br>
# > links: dispatch(F) · dispatch(B) · combine(F) · combine(B)
#
# (W: the part of B that computes the gradients of the weights. The backward pass of a combine sends gradients *to* the
# experts, in FP8; that of a dispatch brings them back, in bf16.) The cost of this order is the time per layer in the
# steady state, divided by the longer of the two sums.


# %%
#| export
def overlapped_pair_time(
    attention: BlockTime, mlp: BlockTime, dispatch: float, combine: float, layers: int = 40
) -> float:
    """Return the seconds per layer of a pair F&B by two clocks, in the order of Figure 4 (§3.2.1).

    dispatch, combine: seconds of one dispatch and of one combine. The first half of the layers is
    warm-up.
    """
    compute = link = attention_f = combine_b = warmup = 0.0
    for layer in range(layers):
        if layer == layers // 2:
            warmup = max(compute, link)
        dispatch_f = max(link, attention_f) + dispatch
        mlp_b = max(compute, combine_b) + mlp.i
        dispatch_b = max(dispatch_f, mlp_b) + combine
        mlp_f = max(mlp_b + mlp.w, dispatch_f) + mlp.f
        combine_f = max(dispatch_b, mlp_f) + combine
        attention_b = max(mlp_f, dispatch_b) + attention.i
        link = combine_b = max(combine_f, attention_b) + dispatch
        compute = attention_f = max(attention_b + attention.w, combine_f) + attention.f
    return (max(compute, link) - warmup) / (layers - layers // 2)


def pair_factor(
    config: Config, rates: AchievedRates, s: int, copies: tuple[float, float],
    overheads: Overheads,
) -> float:  # fmt: skip
    """Return the time of a pair F&B over the longer of its computation and its all-to-alls.

    It is 1 without the overhead `pair_order`.
    """
    if not overheads.pair_order:
        return 1.0
    attention, mlp = block_parts(config, rates, False, s, copies, overheads)
    least = max(sum(attention[:3]) + sum(mlp[:3]), 2 * mlp.comm)
    dispatch, combine = dispatch_bytes(config)
    per_byte = mlp.comm / (dispatch + combine)
    pair = overlapped_pair_time(attention, mlp, dispatch * per_byte, combine * per_byte)
    return pair / least


# %%
zero = BlockTime(0, 0, 0, 0)
assert abs(overlapped_pair_time(zero, BlockTime(1, 1, 1, 0), 0, 0) - 3) < 1e-9  # nothing is sent
assert abs(overlapped_pair_time(zero, zero, 1, 1) - 4) < 1e-9  # nothing is computed
moves = dispatch_copies(V3, 64, 8)
for name, m in (
    ("IB at 50 GB/s", H800),
    ("at half of it", H800._replace(ib=25e9)),
    ("at a quarter", H800._replace(ib=12.5e9)),
):
    a, e = block_parts(V3, m, False, 4096, moves, Overheads())
    print(
        f"{name:16}computation {1e3 * (sum(a[:3]) + sum(e[:3])):5.1f} ms, links {2e3 * e.comm:5.1f} ms, "
        f"cost of the order {pair_factor(V3, m, 4096, moves, Overheads()) - 1:.1%}"
    )

# %% [markdown]
# ## Experiment: a step of V3
# The time of a stage is the sum over its layers; the last one also has head and MTP. The simulator gets the times by
# stage: a pair F&B takes as long as its computation or its all-to-alls, whichever is longer; an unpaired pass pays for
# both in turn. A training step ends with the reduction of gradients (bf16 would suffice; we send fp32), the optimizer and
# the all-gather of weights, which nothing hides. First without overheads.


# %%
#| export
class StageCosts:
    """The durations of a schedule's steps with unequal stages, in place of `ActionCosts`."""

    def __init__(self, stages: list[BlockTime], pair_factor: float = 1.0):
        self.stages, self.pair_factor = stages, pair_factor

    def compute(self, action: Action) -> float:
        """Return the duration of one action without its all-to-alls."""
        t = self.stages[action.stage]
        return {"F": t.f, "I": t.i, "W": t.w, "B": t.i + t.w}[action.kind]

    def duration(self, step: Step) -> float:
        """Return the duration of a step.

        A pair hides the all-to-alls of both actions. A single action waits for its own; W has none.
        """
        compute = sum(map(self.compute, step))
        comm = sum(self.stages[action.stage].comm for action in step if action.kind != "W")
        if len(step) == 2:
            return self.pair_factor * max(compute, comm)
        return compute + comm


def stage_seconds(
    config: Config, rates: AchievedRates, stages: Sequence[range], s: int,
    copies: tuple[float, float], overheads: Overheads = NO_OVERHEADS,
) -> list[BlockTime]:  # fmt: skip
    """Return the times of every stage for one sequence of s tokens.

    stages: the layers of each; the last one also has the heads and MTP.
    """
    moe, dense = (
        block_time(config, rates, is_dense, s, copies, overheads) for is_dense in (False, True)
    )
    times = [
        add_times(dense if i < config.n_dense_layers else moe for i in part) for part in stages
    ]
    head = (1 + config.n_mtp_layers) * config.vocab_size * config.dim
    head += config.n_mtp_layers * 2 * config.dim**2
    once = 2 * s * head / (rates.attention * rates.compute_sms)  # in bf16
    mtp_and_heads = [moe] * config.n_mtp_layers + [BlockTime(once, once, once, 0)]
    times[-1] = add_times([times[-1], *mtp_and_heads])
    if len(stages) == 1:
        return times
    stream = overheads.pp_stream_bytes * config.dim * s / rates.ib
    return [t._replace(comm=t.comm + stream) for t in times]


def accumulation_seconds(rates: AchievedRates, overheads: Overheads, params: int) -> float:
    """Return the seconds in which the gradients of a micro-batch are added to those before."""
    return overheads.accumulation_bytes * params / rates.hbm


def exchanged_bytes(in_fp8: bool) -> float:
    """Return the bytes of a weight that ranks exchange: FP8 with a scale per 128 × 128, or bf16."""
    return 1 + 4 / 128**2 if in_fp8 else 2


def bytes_after_pipeline(params: dict[tuple[int, bool], int]) -> float:
    """Return the bytes that a rank sends after the pipeline: gradients in fp32, then weights."""
    total = 0.0
    for (size, in_fp8), n in params.items():
        total += (4 + exchanged_bytes(in_fp8)) * n * (size - 1) / size
    return total


def step_tail(rates: AchievedRates, params: dict[tuple[int, bool], int]) -> tuple[float, float]:
    """Return a rank's seconds after the pipeline: (gradients and weights over IB, AdamW).

    params: parameters of the rank by (number of ranks that shard their optimizer state, in FP8).
    """
    moved = sum((20 + exchanged_bytes(in_fp8)) * n / size for (size, in_fp8), n in params.items())
    sent = bytes_after_pipeline(params)
    return sent / rates.ib, moved / rates.hbm


# %%
from dsv3_ref.dualpipe import schedule, simulate

PP, M = 16, 15_360 // (2 * 64)  # M: sequences of each of the 128 pipelines
each = stage_seconds(V3, H800, partition_layers(V3, PP), 4096, dispatch_copies(V3, 64, 8))
fig, ax = figure(1, 1, 8, 2.6)
bottom = [0.0] * PP
for name, color in (("f", BLUE), ("i", GREEN), ("w", ORANGE)):
    heights = [1e3 * getattr(t, name) for t in each]
    ax.bar(
        range(PP),
        heights,
        bottom=bottom,
        color=color,
        label={"f": "forward", "i": "backward, inputs", "w": "backward, weights"}[name],
    )
    bottom = [b + h for b, h in zip(bottom, heights)]
ax.plot(range(PP), [2e3 * t.comm for t in each], "k_", ms=14, label="all-to-alls, both passes")
ax.set(xlabel="stage", ylabel="ms per sequence", title="Sixteen stages of V3", xticks=range(PP))
ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28))
show(fig)

results = {}
for name in ("1f1b", "zb1p", "dualpipe"):
    spans = simulate(schedule(name, PP, M), StageCosts(each))
    step = max(span.end for span in spans)
    results[name] = 2048 * step / 3600 / (15_360 * 4096) * 1e12
    busy = sum(t.f + t.i + t.w for t in each) * M / PP
    print(
        f"{name:9} step {step:5.2f} s, computing {busy / step:4.0%}: {results[name] / 1e3:4.0f}K GPU hours per trillion tokens"
    )
print(f"the report: {REPORT / 1e3:.0f}K")
assert results["dualpipe"] < results["zb1p"] < results["1f1b"]

# %% [markdown]
# DualPipe needs nearly a quarter fewer GPU hours than 1F1B, mostly because it hides communication. This estimate is *below*
# the report's: it assumes every product at the rate of the largest one, perfect balance, no slow GPU, and nothing after the
# pipeline.
#
# ## The bill from first principles
# Now with every overhead named above. `dsv3 plan` computes the same sum with the parameters that each rank really holds, so
# we use it here. Its step includes the overheads of the pipeline. A slow GPU lengthens it, and each failure costs `lost` hours
# (failures are per GPU and hour):
#
# $$\text{hours} = \frac{\text{GPUs}\cdot\text{step}}{\text{tokens}}\cdot\text{slowest}\cdot(1 + \text{failures}\cdot\text{GPUs}\cdot\text{lost})$$


# %%
#| export
def gpu_hours(step_seconds: float, gpus: int, tokens: int) -> float:
    """Return the GPU hours per trillion tokens, for steps of `tokens` tokens."""
    return gpus * step_seconds / 3600 / tokens * 1e12


def wall_clock_factor(overheads: Overheads, gpus: int) -> float:
    """Return wall-clock time over the time of steps: straggler · (1 + failures·GPUs·hours lost)."""
    return overheads.straggler_factor * (1 + overheads.failure_rate * gpus * overheads.hours_lost)


# %%
from dsv3_ref.cluster.plan import PlanConfig, estimate, format_waterfall

assert gpu_hours(1.0, 2048, 2048 * 1543) == 1e12 / 1543 / 3600


def bill(overheads: Overheads, **options) -> float:
    """Return the GPU hours per trillion tokens that `dsv3 plan` estimates."""
    return estimate(PlanConfig(overheads=overheads, **options)).hours


total, best = bill(Overheads()), bill(NO_OVERHEADS)
print(
    f"without overheads {best / 1e3:.1f}K, with all of them {total / 1e3:.1f}K hours per trillion tokens: {total / REPORT - 1:+.1%} relative to the report"
)
print("one step of 15,360 × 4,096 tokens, in seconds:")
print(format_waterfall(estimate(PlanConfig())))
step_seconds = estimate(PlanConfig()).seconds  # without stragglers and failures
assert 18.3 <= step_seconds < 18.4 and round(100 * (1 - step_seconds / 19.926)) == 8
doubled = Overheads(
    load_imbalance=1.2, pp_stream_bytes=4, launch_gap=4e-6, straggler_factor=1.06, hours_lost=1.0,
    accumulation_bytes=16,
)  # fmt: skip
less, more = {}, {}
for field in (
    "gemm_shapes",
    "load_imbalance",
    "pair_order",
    "pp_stream_bytes",
    "launch_gap",
    "straggler_factor",
    "hours_lost",
    "accumulation_bytes",
):
    less[field] = bill(Overheads()._replace(**{field: getattr(NO_OVERHEADS, field)})) - total
    more[field] = bill(Overheads()._replace(**{field: getattr(doubled, field)})) - total
    print(
        f"  {field:16}{getattr(Overheads(), field)!s:>6}: without it {less[field] / 1e3:+6.1f}K, twice as bad {more[field] / 1e3:+6.1f}K"
    )
rates = {
    "products ±10 %": "gemm", "attention ±10 %": "attention", "its backward ±10 %": "attention_backward",
    "memory ±10 %": "hbm", "IB ±10 %": "ib", "compute SMs ±10 %": "compute_sms",
}  # fmt: skip
for label, field in rates.items():
    slow, quick = (
        bill(Overheads(), rates=H800._replace(**{field: getattr(H800, field) * x}))
        for x in (0.9, 1.1)
    )
    less[label], more[label] = quick - total, slow - total
    print(f"  {label:20} faster {less[label] / 1e3:+6.1f}K, slower {more[label] / 1e3:+6.1f}K")
early = bill(Overheads(), global_batch_size=9216)
print(
    f"  batch 3,072 → 15,360 over the first 469B of 14.8T tokens: {0.469 / 14.8 * (early - total) / 1e3:+.2f}K (not counted)"
)

# %%
names = sorted(less, key=lambda n: less[n] - more[n], reverse=True)
fig, ax = figure(1, 1, 8, 3.6)
ax.barh(
    names,
    [less[n] / 1e3 for n in names],
    left=total / 1e3,
    color=GREEN,
    label="absent, or a faster rate",
)
ax.barh(
    names,
    [more[n] / 1e3 for n in names],
    left=total / 1e3,
    color=ORANGE,
    label="twice as bad, or a slower rate",
)
ax.axvline(REPORT / 1e3, color="black", ls="--", lw=1, label="the report")
ax.set(xlabel="thousand GPU hours per trillion tokens", title="Sensitivity of the estimate")
ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=3)
ax.invert_yaxis()
show(fig)

# %%
gap = REPORT - total
print(f"each of these alone would close the gap of {gap / 1e3:+.1f}K, by linear extrapolation:")
print(f"  the busiest rank at {1.1 + 0.1 * gap / more['load_imbalance']:.2f} × the mean")
print(
    f"  products at {1 - 0.1 * gap / more['products ±10 %']:.0%} of DeepGEMM's rates, or all compute at {1 - 0.1 * gap / more['compute SMs ±10 %']:.0%}"
)
print(
    f"  the slowest GPU at {1.03 + 0.03 * gap / more['straggler_factor']:.2f} × the mean time, or {0.5 + 0.5 * gap / more['hours_lost']:.1f} hours per failure"
)

# %% [markdown]
# So the sum is within a tenth of the report's 180K. The step can be compared by itself: DeepSeek's paper at ISCA 2025 states 19.926 s, and
# our step, without stragglers and failures, is 18.3 s, 8 % less. (The assumptions were made before the first estimate, though
# with knowledge of the target, and were not changed after it; the traffic of summing gradients was added later.) But look at
# the bars. The longest by far is a guess: how much of a benchmark on 132 SMs the remaining 112 achieve. Links and the order
# of all-to-alls, which are known, hardly matter. The order of all-to-alls costs nothing here, since computation takes twice
# as long as what it hides.
#
# And in dollars, by the report's rental price per hour:

# %%
pretraining = 14.8 * REPORT
spent = {"pre-training": 2664e3, "long context": 119e3, "post-training": 5e3}
assert pretraining == spent["pre-training"]
for what, hours in (spent | {"all": sum(spent.values())}).items():
    print(
        f"{what:15}{hours / 1e3:7,.0f}K H800 hours   ${2 * hours / 1e6:.3f}M   {hours / 2048 / 24:5.1f} days on 2,048"
    )
assert sum(spent.values()) == 2788e3 and 2 * sum(spent.values()) == 5.576e6
print(
    f"by our estimate: {14.8 * total / 1e3:,.0f}K + 124K hours, ${2 * (14.8 * total + 124e3) / 1e6:.2f}M"
)

# %% [markdown]
# ## How many SMs should talk?
# Copying rows occupies SMs, which then compute nothing. With $n$ such SMs computation takes $132 / (132 - n)$ times as long,
# and the links get at most $n$ times the rate at which one SM copies. A token's row crosses IB $t_{IB}$ times and NVLink
# $t_{NVLink}$ times (`dispatch_copies`). It is copied once to be sent over IB, and for NVLink once by the sender and once by
# the receiver: $t_{IB} + 2\,t_{NVLink}$ copies. If an SM has 1/132 of the memory bandwidth, counting reads and writes (our
# assumption), it copies 12.7 GB/s.


# %%
#| export
def with_comm_sms(
    rates: AchievedRates, n: int, copies: tuple[float, float],
    per_sm: float = 3.35e12 / 132 / 2, sms: int = 132,
) -> AchievedRates:  # fmt: skip
    """Return the rates with n SMs for communication, each of which copies `per_sm` bytes/s."""
    ib, nvlink = copies
    row_rate = n * per_sm / (ib + 2 * nvlink)  # bytes/s of rows
    return rates._replace(
        compute_sms=1 - n / sms, ib=min(rates.ib, row_rate * ib),
        nvlink=min(rates.nvlink, row_rate * nvlink),
    )  # fmt: skip


def pair_seconds(
    config: Config, rates: AchievedRates, s: int, copies: tuple[float, float],
    overheads: Overheads,
) -> float:  # fmt: skip
    """Return the seconds per layer of a pair F&B."""
    t = block_time(config, rates, False, s, copies, overheads)
    longest = max(t.f + t.i + t.w, 2 * t.comm)
    return pair_factor(config, rates, s, copies, overheads) * longest


# %%
def split(per_sm: float = 12.7, ib: int = 50):
    """Plot the time of F&B per layer by the number of SMs that communicate."""
    n = range(2, 61)
    on = [with_comm_sms(H800._replace(ib=ib * 1e9), k, moves, per_sm * 1e9) for k in n]
    pair = [1e3 * pair_seconds(V3, rates, 4096, moves, Overheads()) for rates in on]
    links = [2e3 * block_time(V3, rates, False, 4096, moves, Overheads()).comm for rates in on]
    compute = [
        1e3 * sum(block_time(V3, rates, False, 4096, moves, Overheads())[:3]) for rates in on
    ]
    low = n[min(range(len(n)), key=pair.__getitem__)]
    fig, ax = figure(1, 1, 7, 2.8)
    ax.plot(n, compute, color=BLUE, label="computation · 132 / (132 − n)")
    ax.plot(n, links, color=ORANGE, label="links")
    ax.plot(n, pair, color="black", lw=1, label="a pair, both overlapped")
    ax.axvline(20, color=GRAY, ls=":", label="the report: 20")
    ax.plot(low, min(pair), "o", color="black", ms=5)
    ax.set(ylim=(0, 3 * min(compute)), xlabel="SMs for communication", ylabel="ms per layer")
    ax.set_title(f"An SM copies {per_sm:g} GB/s, IB {ib} GB/s: best {low} of 132 SMs")
    ax.legend(loc="upper right", fontsize=8)
    show(fig)


split()

# %% [markdown]
# The links are saturated at about the report's twenty SMs, as the report says. But a *pair* is fastest with eleven:
# computation takes longer than communication, so slower links cost less than missing SMs. Two effects could move the
# optimum to 20: all-to-alls that nothing hides (at the pipeline's ends), and SMs that copy less than their share of the
# bandwidth. According to its authors, DeepEP's second version needs 4 to 6 SMs where the first needed 24: fewer SMs do
# leave more for computation.

# %% [markdown]
# ## Play: what if?
# Slower IB, fewer or more nodes per token, products no faster than in bf16: what does a trillion tokens cost, and which
# schedule suffers least?


# %%
def what_if(ib: int = 50, limit=4, tflops: int = 1358, sms: int = 20):
    """Plot the GPU hours per trillion tokens by schedule, everything else as above."""
    config = replace(V3, n_limited_groups=limit)
    rates = H800._replace(ib=ib * 1e9, gemm=tflops * 1e12, compute_sms=(132 - sms) / 132)
    times = StageCosts(
        stage_seconds(
            config, rates, partition_layers(V3, PP), 4096, dispatch_copies(config, 64, 8, 1024)
        )
    )
    names, hours = ("1f1b", "zb1p", "dualpipe"), []
    for name in names:
        step = max(span.end for span in simulate(schedule(name, PP, 64), times))
        hours.append(gpu_hours(step, 2048, 128 * 64 * 4096) / 1e3)
    fig, ax = figure(1, 1, 7, 1.9)
    ax.bar_label(ax.barh(names, hours, color=[GRAY, GREEN, ORANGE]), fmt="%.0f", padding=4)
    ax.axvline(REPORT / 1e3, color="black", ls="--", lw=1)
    ax.set(
        xlim=(0, 420),
        xlabel="thousand GPU hours per trillion tokens (dashed: the report); 64 micro-batches",
        title=f"IB {ib} GB/s, {limit} nodes per token, {tflops} TFLOP/s, {sms} SMs for communication",
    )
    show(fig)


what_if()
play(what_if, ib=(10, 100, 10), limit=[4, 1, 2, 8], tflops=(400, 1800, 100), sms=(0, 60, 5))

# %%
play(split, per_sm=(4.0, 60.0, 2.0), ib=(10, 100, 10))

# %% [markdown]
# ## Exercises
# **1 · Compute.** How many bytes of parameters does a GPU hold for the routed experts of one MoE layer of V3, in fp32,
# with `ep` expert-parallel ranks?


# %%
@checker
def check_bytes(fn):
    """How many experts are on a GPU, how many matrices in an expert, how many bytes in a number?"""
    assert all(abs(fn(ep) - 4 * (256 // ep) * 3 * 7168 * 2048) < 1 for ep in (64, 256))


@checker
def check_breakeven(fn):
    """Write down the seconds of one row on each link and set them equal."""
    assert abs(fn(160, 50) - 3.2) < 1e-9 and abs(fn(450, 50) - 9) < 1e-9


@checker
def check_kept(fn):
    """`activation_bytes_per_token` is for one token of one block. How many tokens are in flight?"""
    assert abs(fn() - 17 * 4096 * sum(activation_bytes_per_token(V3, False).values()) / 1e9) < 0.1


@checker
def check_idle(fn):
    """How many failures are there per hour of work, and how long does that hour take in all?"""
    cases = [(2048, 2e-5, 0.5), (16384, 2e-5, 0.5), (1024, 1e-4, 0.25)]
    assert all(
        abs(fn(*case) - case[0] * case[1] * case[2] / (1 + case[0] * case[1] * case[2])) < 1e-9
        for case in cases
    )


@checker
def check_nodes(fn):
    """Try each limit with `dispatch_copies` and `link_seconds`. Which link is the slower one?"""
    for ib in (50e9, 100e9):
        free = 0
        for limit in (1, 2, 3, 4, 5, 6, 8):
            copies = dispatch_copies(replace(V3, n_limited_groups=limit), 64, 8)
            ib_seconds, nvlink_seconds = link_seconds(H800._replace(ib=ib), copies, 1)
            free = limit if ib_seconds <= nvlink_seconds else free
        assert abs(fn(ib) - free) < 0.5


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
# **2 · Predict.** A row that has crossed IB at `ib` GB/s is forwarded within the node at `nvlink` GB/s. To how many GPUs can
# it be sent before NVLink becomes the slower link? (This is a mean over many rows: do not round.)


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
# **3 · Compute.** How many GB ($10^9$ bytes) of activations does one MoE layer save for 17 micro-batches of 4,096 tokens, if all that a rank has in flight were in one of its stages, with
# products in FP8?


# %%
def my_kept() -> float:
    return ...


check_kept(my_kept)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_kept():
#     return 17 * 4096 * sum(activation_bytes_per_token(V3, False).values()) / 1e9
# ```
# </details>
#
# **4 · Extend.** A failure stops all `gpus` GPUs for `lost` hours; a GPU fails `rate` times per hour of work. What fraction of
# the paid hours is lost? (Lost hours are paid in addition to the hours of work.)


# %%
def my_idle(gpus: int, rate: float, lost: float) -> float:
    return ...


check_idle(my_idle)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_idle(gpus, rate, lost):
#     x = gpus * rate * lost  # hours lost per hour of work
#     return x / (1 + x)  # eight times the GPUs: nearly eight times the fraction
# ```
# </details>
#
# **5 · Predict.** With IB at `ib` bytes/s, to how many nodes (1, 2, 3, 4, 5, 6 or 8) can a token be sent at most before IB
# becomes slower than NVLink? (V3 in training, 64 GPUs in 8 nodes.)


# %%
def my_nodes(ib: float) -> int:
    return ...


check_nodes(my_nodes)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_nodes(ib):
#     m, best = H800._replace(ib=ib), 0
#     for limit in (1, 2, 3, 4, 5, 6, 8):
#         copies = dispatch_copies(replace(V3, n_limited_groups=limit), 64, 8)
#         a, b = link_seconds(m, copies, 1)
#         best = limit if a <= b else best
#     return best  # 50 GB/s: 2 (the report accepts 4 and a slower IB); 100 GB/s: 5
# ```
# </details>

# %% [markdown]
# ## Scale-up
# `dsv3 plan` applies these functions to the real model: it builds it on the meta device, partitions it as
# `dsv3_ref.parallel` does, and prints the memory of every rank, the bytes it sends, and the cost of a trillion tokens.
# Config, cluster and every assumption are options. Serving has [its own chapter](20_inference_scale.ipynb).
#
# ```
# dsv3 plan                                  V3 on 2,048 H800
# dsv3 plan --hardware h200                  the same on H200
# dsv3 plan --overheads.load-imbalance 1.3   with one assumption changed
# dsv3 plan --unit decode --context 16384    a decode unit (chapter 20)
# dsv3 plan --config small --pp 2 --ep 4 --dp 1 --global-batch-size 64 --seq-len 2048
# ```

# %% [markdown]
# ### One to eight nodes
# V2-Lite's size needs no pipeline. `--fully-shard` (ZeRO-3 by PyTorch's `fully_shard`) divides weights, gradients and
# moments among all GPUs and gathers one block at a time, for its forward and again for its backward pass. Every GPU computes
# all experts for its own tokens. What it sends grows with the parameters, not with the tokens, so micro-batches must be
# large; `--ep 8` keeps whole gradients of dense layers and of its experts, but sends only tokens.

# %%
from dsv3_ref.cluster.fully_sharded import sharded_bytes_sent, sharded_memory
from dsv3_ref.config import V2_LITE

SEQUENCES = 2304  # per step, of 4,096 tokens
print("V2-Lite, micro-batches of two sequences with recomputation; --ep 8: of one")
for gpus in (8, 64):
    memory = sharded_memory(V2_LITE, gpus, 4096, 2, recompute=True)
    sent = sharded_bytes_sent(V2_LITE, gpus) * SEQUENCES / gpus / 2
    print(
        f"{gpus:2} GPUs, --fully-shard: {memory.total / 1e9:5.1f} GB, {sent / 1e12:5.2f} TB sent per step"
    )
    plan = PlanConfig(
        "v2_lite", 1, 8, gpus // 8, schedule="1f1b", global_batch_size=SEQUENCES, precision="bf16"
    )
    experts = estimate(plan)
    sent_experts = sum(experts.sent.values())
    print(
        f"               --ep 8: {experts.ranks[0].gpu / 1e9:5.1f} GB, {sent_experts / 1e12:5.2f} TB"
    )
    assert sent > 4 * sent_experts and memory.total < 80e9

# %% [markdown]
# Choose `--ep` while its memory suffices and the experts can be divided evenly, because it sends less. Choose
# `--fully-shard` if weights and gradients are what does not fit, if the number of GPUs does not divide the experts, or if
# uneven experts would make GPUs wait. `dsv3 plan --config v2_lite --fully-shard --gpus 8 --micro-batch 3` itemizes the memory.
