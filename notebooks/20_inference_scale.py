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
# # 20 · Serving at scale: the cost of a token on 32 and on 320 GPUs

# %% [markdown]
# ## Why
# Training reads a weight once for thousands of tokens. Decoding for a single user reads it again for *every* token. 37B
# activated parameters take 13 ms to read from an H800's memory, which costs \$7 per million tokens, and the GPU computes during less
# than a hundredth of that time. Batching helps: the report processes prompts (*prefill*) on units of 32 GPUs and generates tokens (*decode*) on
# units of **320**. Why so many, and how fast can they be? No measurements of these units are published, so we add up
# operators, as [chapter 17](17_scale.ipynb) did.

# %%
import math
from dataclasses import replace

from dsv3_ref.config import V3, Config, count_params
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, checker, figure, play, show

alone = 37e9 / (0.85 * 3.35e12)
print(
    f"37 GB of FP8 weights at 2.85 TB/s: {1e3 * alone:.0f} ms, ${2 / 3600 * alone * 1e6:.1f} per million tokens; "
    f"{2 * 37e9 / 1.358e15 / alone:.1%} of the time computing"
)
fig, ax = figure(1, 1, 7, 2.4)
rows = [2**k for k in range(12)]
read_us = 1e6 * 44e6 / 2.85e12  # an expert's weights, 44 MB
expert_us = [max(read_us, 1e6 * 2 * 44e6 * n / 1.358e15) for n in rows]
ax.loglog(rows, expert_us, color=BLUE, label="one expert: µs per layer")
ax.loglog(
    rows, [t / n for t, n in zip(expert_us, rows)], color=ORANGE, label="… divided by its rows"
)
ax.axvline(256, color=GRAY, ls=":")
ax.set(xlabel="rows per expert (dotted: 256, the report's usual maximum)", ylabel="µs")
ax.set_title("Further rows are nearly free up to about 240")
ax.legend(loc="lower left")
show(fig)

# %% [markdown]
# ## Paper
# - Prefill and decoding run on separate units (§3.4).
# - **Prefill unit**: 4 nodes, 32 GPUs. The attention heads are split over 4 GPUs (tensor parallelism, TP4), which divide their tokens between the
#   attention GEMMs (sequence parallelism, SP); there are eight such groups (DP8). The experts are split over 32 GPUs (EP32), 8 and one redundant expert on each. Two
#   micro-batches are interleaved, so that the computation of one hides the all-to-all (dispatch and combine) of the other (§3.4.1).
# - **Decode unit**: 40 nodes, 320 GPUs; TP4 with SP, DP80, EP320. Each GPU holds *one* expert; 64 GPUs hold redundant and
#   shared experts. The shared expert counts as a routed one that every token chooses: nine per token. Rows are sent directly to their GPU over
#   InfiniBand (IB). An expert usually processes at most 256 rows. *Being explored* at the time: the attention of one micro-batch overlaps dispatch,
#   experts and combine of the other (§3.4.2). We assume that overlap.
# - With the MTP draft, decoding is 1.8 times as fast (§5.4.3).
#
# *Our assumptions*, in addition to those of chapter 17 (`AchievedRates`, `Overheads`): each of a group's four GPUs computes the latents of all its
# tokens. 20 SMs communicate in prefill and none in decode. Direct all-to-all reaches 40 of 50 GB/s (DeepEP's table at 256 ranks)
# and takes 10 µs more per direction. A tenth of the memory stays free.

# %%
#| export
import math
from dataclasses import replace
from typing import NamedTuple

from dsv3_ref.config import Config, ceil_div, count_params
from dsv3_ref.scale import (
    ATTENTION_GEMMS,
    KERNELS_PER_HALF_BLOCK,
    Overheads,
    AchievedRates,
    head_operators,
    link_seconds,
    operators,
    block_gemms,
    dispatch_bytes,
    dispatch_copies,
)

# %% [markdown]
# ## Attention over four GPUs
# Four GPUs share a group's sequences, with 32 heads each. Before the heads, a GPU gathers the tokens of the other three. After
# them, the four partial outputs are summed, and each GPU keeps its quarter of the tokens. For a group's $n$ tokens of width $d$ that is
# $2 \cdot \tfrac34\, n\, d$ elements per GPU over NVLink. The latent cache has no heads, so each of the four GPUs holds and reads *all* of
# it. This is the cost of tensor parallelism with MLA.


# %%
#| export
class DeploymentUnit(NamedTuple):
    """GPUs that serve a model together."""

    gpus: int
    tp: int  # GPUs that share the heads of a group's sequences
    experts_per_gpu: float  # redundant ones included
    direct_ib: bool = False  # one hop over IB
    ib_efficiency: float = 0.8  # fraction of IB's rate that the direct all-to-all achieves
    latency_s: float = 10e-6  # added to each direction of a direct all-to-all
    gpus_per_node: int = 8
    shared_is_routed: bool = False  # the shared expert is on GPUs of its own, and tokens go there


def deployment_units(config: Config) -> dict[str, DeploymentUnit]:
    """Return units like the report's (§3.4).

    Prefill runs on 32 GPUs; decode on one GPU per expert plus a quarter more.
    """
    e = config.n_routed_experts
    return {
        "prefill": DeploymentUnit(32, 4, e / 32 + 1),
        "decode": DeploymentUnit(ceil_div(e * 5, 4), 4, 1, True, shared_is_routed=True),
    }


PREFILL, DECODE = deployment_units(Config()).values()
DEFAULT_OVERHEADS = Overheads()
ATTENTION_OPERATORS = ("attention", "RoPE, quantized heads", "norms of attention")


def attention_time(
    config: Config, rates: AchievedRates, unit: DeploymentUnit, tokens: float, keys: float,
    cached: bool,
) -> float:  # fmt: skip
    """Return the seconds of a block's attention for a group's tokens, on each of its tp GPUs."""
    own_heads = replace(config, n_heads=config.n_heads // unit.tp)
    ops = operators(own_heads, True, tokens, keys, (0, 0), 0, cached)
    names = (*ATTENTION_GEMMS, *ATTENTION_OPERATORS)
    seconds = sum(ops[name].seconds(rates) for name in names if name in ops)
    return seconds - ops["norms of attention"].seconds(rates) * (1 - 1 / unit.tp)


def tp_gather_time(
    config: Config, rates: AchievedRates, unit: DeploymentUnit, tokens: float
) -> float:
    """Return the seconds to gather a group's tokens before the heads and to sum after (bf16)."""
    return 2 * (1 - 1 / unit.tp) * tokens * 2 * config.dim / rates.nvlink


# %%
H800 = AchievedRates()
for tp in (1, 2, 4, 8):
    u = DeploymentUnit(320, tp, 1)
    prompt = attention_time(V3, H800, u, 4096 * tp, 2048, cached=False)
    prompt += tp_gather_time(V3, H800, u, 4096 * tp)
    answer = attention_time(V3, H800, u, 28 * tp, 4096, cached=True)
    answer += tp_gather_time(V3, H800, u, 28 * tp)
    print(
        f"TP{tp}: 4,096 tokens per GPU of 4K prompts {1e6 * prompt:6,.0f} µs; "
        f"28 tokens per GPU, decoding after 4K, {1e6 * answer:4,.0f} µs"
    )
assert (PREFILL.gpus, PREFILL.experts_per_gpu) == (32, 9)
assert (DECODE.gpus, DECODE.experts_per_gpu) == (320, 1)
one, four = (attention_time(V3, H800, DeploymentUnit(320, tp, 1), 112, 4096, True) for tp in (1, 4))
assert four < one < 4 * four  # less than four times as fast

# %% [markdown]
# At the same number of tokens per GPU, tensor parallelism therefore only costs time. It buys latency (the same sequences take less time on four
# GPUs, although not a quarter) and memory, since a GPU holds a quarter of attention's large matrices. A later layout, below, does without it.
#
# ## Experts and all-to-all
# With balanced experts, a GPU with $n$ tokens of its own computes as many rows as it sends: $k\,n$, or $(k+1)\,n$ where the
# shared expert counts as a chosen one. The weights of all experts on a GPU are read whatever the batch. In prefill a row takes two hops, in decode one.


# %%
#| export
def mlp_time(
    config: Config, rates: AchievedRates, unit: DeploymentUnit, tokens: float, dense: bool,
    overheads: Overheads,
) -> float:  # fmt: skip
    """Return the seconds of a block's MLP for a GPU's tokens: gate, experts, memory traffic."""
    if unit.shared_is_routed and not dense:
        chosen = config.n_activated_experts + config.n_shared_experts
        config = replace(config, n_activated_experts=chosen, n_shared_experts=0)
    seconds = 0.0
    for name, op in operators(config, dense, tokens, 1, (0, 0), unit.experts_per_gpu).items():
        if name in ATTENTION_GEMMS or name in ATTENTION_OPERATORS or not op.flops:
            continue
        load = overheads.load_imbalance if name.startswith(("routed", "permute")) else 1.0
        seconds += load * op.seconds(rates)
    return seconds


def all_to_all_time(
    config: Config, rates: AchievedRates, unit: DeploymentUnit, tokens: float,
    overheads: Overheads,
) -> float:  # fmt: skip
    """Return the seconds of dispatch and combine for a GPU's tokens."""
    row_bytes = sum(dispatch_bytes(config))
    if not unit.direct_ib:
        copies = dispatch_copies(config, unit.gpus, unit.gpus_per_node)
        return overheads.load_imbalance * tokens * max(link_seconds(rates, copies, row_bytes))
    chosen = config.n_activated_experts + unit.shared_is_routed * config.n_shared_experts
    rows = tokens * chosen * (1 - 1 / unit.gpus)
    sent = overheads.load_imbalance * rows * row_bytes
    return sent / (unit.ib_efficiency * rates.ib) + 2 * unit.latency_s


# %%
for n in (7, 28, 56, 112):
    experts_us = 1e6 * mlp_time(V3, H800, DECODE, n, False, Overheads())
    exchange_us = 1e6 * all_to_all_time(V3, H800, DECODE, n, Overheads())
    print(
        f"{n:4} tokens per GPU, {9 * n:5} rows per expert: experts {experts_us:4.0f} µs, "
        f"all-to-all {exchange_us:4.0f} µs"
    )
even = Overheads()._replace(load_imbalance=1.0)
published = 194 + 360  # µs, DeepEP: 128 tokens, 8 of 256 ranks
summed = 1e6 * all_to_all_time(V3, H800, DECODE._replace(shared_is_routed=False), 128, even)
print(f"128 tokens to 8 experts each: {summed:.0f} µs, DeepEP's table: {published}")
assert abs(summed / published - 1) < 0.1
few_us, more_us = (mlp_time(V3, H800, DECODE, n, False, Overheads()) for n in (7, 28))
assert more_us < 2 * few_us

# %% [markdown]
# ## Tokens per second
# Two micro-batches are interleaved: while one computes, the other is in the all-to-all (prefill), or while one is in attention, the other is in
# dispatch, experts and combine (decode). A layer of both takes in prefill
#
# $$2\max(t_{\text{attention}} + t_{\text{experts}},\ t_{\text{all-to-all}}), \qquad\text{and in decode}\quad
# 2\max(t_{\text{attention}},\ t_{\text{all-to-all}} + t_{\text{experts}})$$
#
# Each half block launches twelve kernels with a gap of 2 µs. The three dense layers have no all-to-all. Decoding ends with the head.


# %%
#| export
class Throughput(NamedTuple):
    """Seconds of a MoE layer's parts on a micro-batch, of a step of both, and tokens/s per GPU."""

    attention: float
    mlp: float
    all_to_all: float
    step: float
    tokens_per_s: float


def prefill_throughput(
    config: Config, rates: AchievedRates, tokens: float, prompt: float,
    unit: DeploymentUnit = PREFILL, overheads: Overheads = DEFAULT_OVERHEADS,
) -> Throughput:  # fmt: skip
    """Return the throughput of prefill with two micro-batches of `tokens` tokens per GPU each.

    prompt: tokens per prompt.
    """
    gap, keys = KERNELS_PER_HALF_BLOCK * overheads.launch_gap, (prompt + 1) / 2
    group_tokens = tokens * unit.tp
    attention = attention_time(config, rates, unit, group_tokens, keys, False) / rates.compute_sms
    attention += tp_gather_time(config, rates, unit, group_tokens) + gap
    dense, moe = (
        mlp_time(config, rates, unit, tokens, is_dense, overheads) / rates.compute_sms + gap
        for is_dense in (True, False)
    )
    all_to_all = all_to_all_time(config, rates, unit, tokens, overheads)
    num_moe = config.n_layers - config.n_dense_layers
    layers = config.n_dense_layers * (attention + dense)
    layers += num_moe * max(attention + moe, all_to_all)
    return Throughput(attention, moe, all_to_all, 2 * layers, tokens / layers)


def decode_throughput(
    config: Config, rates: AchievedRates, sequences: float, context: float,
    unit: DeploymentUnit = DECODE, overheads: Overheads = DEFAULT_OVERHEADS,
) -> Throughput:  # fmt: skip
    """Return the throughput of decoding with two micro-batches of `sequences` per group each.

    context: tokens in the cache of a sequence. A step decodes one token per sequence.
    """
    gap = KERNELS_PER_HALF_BLOCK * overheads.launch_gap
    attention = attention_time(config, rates, unit, sequences, context, True)
    attention += tp_gather_time(config, rates, unit, sequences) + gap
    gpu_tokens = sequences / unit.tp
    dense, moe = (
        mlp_time(config, rates, unit, gpu_tokens, is_dense, overheads) + gap
        for is_dense in (True, False)
    )
    all_to_all = all_to_all_time(config, rates, unit, gpu_tokens, overheads)
    head = head_operators(config, sequences)["head"]
    head = head._replace(flops=head.flops / unit.tp, bytes=head.bytes / unit.tp)
    num_moe = config.n_layers - config.n_dense_layers
    seconds = head.seconds(rates)
    seconds += config.n_dense_layers * (attention + dense)
    seconds += num_moe * max(attention, moe + all_to_all)
    return Throughput(attention, moe, all_to_all, 2 * seconds, gpu_tokens / seconds)


def dollars_per_million_tokens(rates: AchievedRates, tokens_per_s: float) -> float:
    """Return the price of a million tokens at a throughput of `tokens_per_s` per GPU."""
    return rates.dollars_per_hour / 3600 / tokens_per_s * 1e6


# %%
def print_throughput(name: str, s: Throughput) -> None:
    price = dollars_per_million_tokens(H800, s.tokens_per_s)
    times = f"{1e6 * s.attention:7,.0f}{1e6 * s.mlp:8,.0f}{1e6 * s.all_to_all:11,.0f} µs"
    print(
        f"{name:34}{times}{1e3 * s.step:9,.1f} ms"
        f"{s.tokens_per_s:9,.0f} tokens/s per GPU   ${price:.2f} per million"
    )


print(f"{'':34}{'attn':>7}{'experts':>8}{'all-to-all':>11}   {'step':>9}")
for prompt in (1024, 4096, 16_384, 131_072):
    print_throughput(f"prefill, prompts of {prompt:,}", prefill_throughput(V3, H800, 4096, prompt))
for b, context in ((16, 4096), (56, 4096), (112, 4096), (27, 16_384), (3, 131_072)):
    print_throughput(
        f"decode, {b} × {context:,} per group", decode_throughput(V3, H800, b, context)
    )
best = decode_throughput(V3, H800, 112, 4096)
print(
    f"at 112 × 4,096 a user sees {1 / best.step:.0f} tokens per second, {1.8 / best.step:.0f} with the MTP draft"
)

# %% [markdown]
# Prefill is bound by computation, and its all-to-all would fit twice into that time. At 4K, over a third of the attention time is NVLink traffic between the four GPUs;
# longer prompts add to the rest. Decoding at 112 × 4K is bound by attention, which reads caches, with the other half close behind.
# With sixteen sequences, or with short contexts, the other half binds. Batching is what pays: the rows share the cost of reading an expert's
# weights, so seven times the sequences (16 → 112) take less than three times as long.
#
# ## Does it fit?
# A GPU of a unit holds its heads' share of attention, the dense layers, its quarter of embedding and head, its experts,
# and the whole cache of its group, for both micro-batches:


# %%
#| export
def bytes_per_param(precision: str) -> float:
    """Return the bytes per parameter of a block's matrix: FP8 with its scale's share, or bf16."""
    return 1 + 4 / 128**2 if precision == "fp8" else 2


def model_bytes(config: Config, precision: str) -> float:
    """Return the bytes of the whole model without MTP.

    The matrices of blocks, except for the gates, are in FP8 or bf16.
    """
    quantized = 0
    for i in range(config.n_layers):
        for name, gemm in block_gemms(config, i < config.n_dense_layers).items():
            copies = config.n_routed_experts if name.startswith("routed") else 1
            quantized += 0 if name == "gate" else copies * gemm.n_in * gemm.n_out
    others = count_params(config).total - quantized
    return quantized * bytes_per_param(precision) + 2 * others


def weight_bytes(config: Config, unit: DeploymentUnit, precision: str = "fp8") -> float:
    """Return the bytes of weights on one GPU of a unit."""
    gemms = block_gemms(config, False)
    size = {name: gemm.n_in * gemm.n_out for name, gemm in gemms.items()}
    per_head = sum(size.get(name, 0) for name in ("wq", "wq_b", "wkv_b", "wo"))
    shared = sum(size.get(name, 0) for name in ("wq_a", "wkv_a"))
    num_moe = config.n_layers - config.n_dense_layers
    expert = 3 * config.dim * config.moe_inter_dim
    experts = unit.experts_per_gpu + (0 if unit.shared_is_routed else config.n_shared_experts)
    matrices = config.n_layers * (per_head / unit.tp + shared)
    matrices += config.n_dense_layers * 3 * config.dim * config.inter_dim
    matrices += num_moe * experts * expert
    gates = num_moe * config.n_routed_experts * config.dim
    embedding_and_head = 2 * config.vocab_size * config.dim / unit.tp
    return matrices * bytes_per_param(precision) + 2 * gates + 2 * embedding_and_head


def max_batch(
    config: Config, rates: AchievedRates, unit: DeploymentUnit, context: float,
    precision: str = "fp8",
) -> int:  # fmt: skip
    """Return the sequences per micro-batch and group that fit beside the weights.

    A tenth of the memory stays free.
    """
    free = 0.9 * rates.memory - weight_bytes(config, unit, precision)
    return max(0, int(free / (2 * context * count_params(config).cache_bytes)))


def min_gpus(
    config: Config, rates: AchievedRates, precision: str, tokens: float, gpus_per_node: int = 8
) -> int:
    """Return the GPUs, in whole nodes, that hold all weights and a bf16 cache of `tokens`."""
    needed = model_bytes(config, precision) + tokens * count_params(config).cache_bytes
    return gpus_per_node * math.ceil(needed / (0.9 * rates.memory * gpus_per_node))


# %%
from dsv3_ref.scale import ACHIEVED_RATES

fp8_gb, bf16_gb = (model_bytes(V3, precision) / 1e9 for precision in ("fp8", "bf16"))
cache_gb = 131_072 * count_params(V3).cache_bytes / 1e9
print(f"all weights: FP8 {fp8_gb:,.0f} GB, bf16 {bf16_gb:,.0f} GB; cache of 128K {cache_gb:.1f} GB")
for name, u in (("prefill", PREFILL), ("decode", DECODE)):
    fp8_gb, bf16_gb = (weight_bytes(V3, u, precision) / 1e9 for precision in ("fp8", "bf16"))
    print(f"{name:8} {fp8_gb:5.1f} GB of weights per GPU in FP8, {bf16_gb:5.1f} in bf16")
for context in (4096, 16_384, 131_072):
    n = max_batch(V3, H800, DECODE, context)
    print(
        f"decode, {context:7,} tokens of context: {n:4} sequences per micro-batch and group, {n * 9 / 4:4.0f} rows per expert"
    )
names, x = [*ACHIEVED_RATES], range(len(ACHIEVED_RATES))
fig, ax = figure(1, 1, 7, 2.6)
for dx, precision, color in ((-0.2, "fp8", BLUE), (0.2, "bf16", ORANGE)):
    need = [min_gpus(V3, ACHIEVED_RATES[name], precision, 1e6) for name in names]
    ax.bar_label(ax.bar([i + dx for i in x], need, 0.38, color=color, label=precision), padding=2)
ax.set(xticks=x, xticklabels=names, ylabel="GPUs, whole nodes", ylim=(0, 30))
ax.set_title("Fewest GPUs that hold V3 and the cache of a million tokens")
ax.legend(loc="upper right")
show(fig)
assert min_gpus(V3, ACHIEVED_RATES["h200"], "fp8", 1e5) == 8 and min_gpus(V3, H800, "bf16", 0) == 24
assert max_batch(V3, H800, DECODE, 4096) >= 100  # the report's 256 rows per expert: 113 sequences

# %% [markdown]
# This is how we understand the number 320. With one expert per GPU, so much memory is left for the cache that about 110 sequences of 4K fit into a
# group's micro-batch (the table's 112 are two too many). That gives each expert the 240 rows at
# which reading and computing take equally long. Fewer GPUs hold more experts each, with less memory for the cache, while each
# expert's weights are read for fewer rows.

# %% [markdown]
# ## Experiment: how cost grows
# The cost is plotted against the number of experts (chosen experts and their size unchanged), the context, and the number of nodes of a prefill unit:

# %%
fig, (left, mid, right) = figure(1, 3, 11, 3.2)
experts = (64, 128, 256, 512, 1024)
sizes = [replace(V3, n_routed_experts=e) for e in experts]
fixed = [
    decode_throughput(
        config, H800, 100, 4096, DECODE._replace(experts_per_gpu=e / 256)
    ).tokens_per_s
    for config, e in zip(sizes, experts)
]
fitting = []
for config, e in zip(sizes, experts):
    unit = DECODE._replace(experts_per_gpu=e / 256)
    batch = min(100, max_batch(config, H800, unit, 4096))
    fitting.append(decode_throughput(config, H800, batch, 4096, unit).tokens_per_s)
grown = [
    decode_throughput(config, H800, 100, 4096, DECODE._replace(gpus=e * 5 // 4)).tokens_per_s
    for config, e in zip(sizes, experts)
]
left.plot(
    experts,
    [dollars_per_million_tokens(H800, r) for r in grown],
    "o-",
    color=GREEN,
    label="one per GPU, more GPUs",
)
left.plot(
    experts,
    [dollars_per_million_tokens(H800, r) for r in fixed],
    "s-",
    color=BLUE,
    label="320 GPUs, same batch",
)
left.plot(
    experts,
    [dollars_per_million_tokens(H800, r) for r in fitting],
    "^--",
    color=ORANGE,
    label="320 GPUs, batch that fits",
)
left.set(
    xscale="log",
    xticks=experts,
    xticklabels=experts,
    xlabel="routed experts",
    ylabel="$ per million tokens",
    title="Decode: experts",
    ylim=(0, None),
)
left.minorticks_off()
left.legend(fontsize=8)
contexts = [2**k for k in range(10, 18)]
answers = [
    decode_throughput(V3, H800, max(1, min(112, max_batch(V3, H800, DECODE, s))), s).tokens_per_s
    for s in contexts
]
prompts = [prefill_throughput(V3, H800, 4096, s).tokens_per_s for s in contexts]
mid.plot(
    contexts,
    [dollars_per_million_tokens(H800, r) for r in answers],
    "o-",
    color=ORANGE,
    label="decode, batch that fits",
)
mid.plot(
    contexts,
    [dollars_per_million_tokens(H800, r) for r in prompts],
    "s-",
    color=BLUE,
    label="prefill",
)
mid.set(
    xscale="log",
    yscale="log",
    xlabel="tokens of context",
    ylabel="$ per million tokens",
    title="Context",
)
mid.legend(fontsize=8)
nodes = (1, 2, 4, 8)
units_of = [DeploymentUnit(8 * n, 4, 256 / (8 * n) + 1) for n in nodes]
speeds = [prefill_throughput(V3, H800, 4096, 4096, unit) for unit in units_of]
right.plot(nodes, [1e3 * (s.attention + s.mlp) for s in speeds], "k--", lw=1, label="computation")
for color, ib in ((ORANGE, 25), (BLUE, 50), (GREEN, 100)):
    m = H800._replace(ib=ib * 1e9)
    exchange_ms = [1e3 * all_to_all_time(V3, m, unit, 4096, DEFAULT_OVERHEADS) for unit in units_of]
    right.plot(nodes, exchange_ms, "o-", color=color, label=f"all-to-all, IB {ib}")
right.set(
    xlabel="nodes of a prefill unit",
    ylabel="ms per layer",
    title="Prefill: nodes",
    xticks=nodes,
    ylim=(0, 22),
)
right.legend(fontsize=8, loc="upper left")
show(fig)
for n, u in zip(nodes, units_of):
    fits = "fit" if weight_bytes(V3, u) < 0.9 * H800.memory else "do NOT fit"
    crossings = dispatch_copies(V3, u.gpus, 8)[0]
    print(
        f"{n} nodes: {u.experts_per_gpu:.0f} experts per GPU, {weight_bytes(V3, u) / 1e9:.0f} GB "
        f"of weights {fits}, {crossings:.2f} copies per token over IB"
    )
assert grown[0] > 0.99 * grown[-1] and fixed[2] >= fixed[3] > fixed[4] >= fitting[4]

# %% [markdown]
# More experts cost nothing to *compute*. With one per GPU, serving costs the same too, as long as there are enough
# users for a larger unit. On the same GPUs, however, their weights must be read, which is hidden by attention up to two per GPU (512 experts),
# and stored, which displaces the cache. Fewer experts than GPUs do not help, because attention binds.
# Beyond 4K, the cost of decoding grows in proportion to the context: the memory is full, a step reads all of it, and fewer sequences share the step.
# More nodes cost prefill nothing as long as IB keeps up. One node could not even hold the experts. Eight nodes need more copies per token over IB, and
# only there, with IB at half its rate, does the all-to-all take longer than the computation that hides it.
#
# ### Compared with published numbers
# The authors published averages over a day for a *later* layout. Decoding: 1,850 tokens per second and H800 (14.8K per node; 18 nodes,
# no tensor parallelism, two routed experts and the shared one on every GPU, 4,989 tokens of mean context, 20 to 22 tokens per second for a user). Prefill: 73.7K prompt tokens per second and
# node, of which 56.3 % came from a cache, so about 4,000 computed per GPU. The same functions predict for that layout:

# %%
LATER = DeploymentUnit(144, 1, 2, True)
sequences = 1850 / 21  # per GPU: throughput divided by a user's rate
decode = decode_throughput(V3, H800, sequences / 2, 4989, LATER)
prefill = prefill_throughput(V3, H800, 4096, 4989, DeploymentUnit(32, 1, 9))
published_prefill = 73_700 / 8 * (1 - 0.563)
print(
    f"decode with {sequences:.0f} sequences per GPU: {decode.tokens_per_s:,.0f} tokens/s, {1 / decode.step:.0f} "
    f"per user; published 1,850 and 21: {decode.tokens_per_s / 1850:.1f} × as fast"
)
print(
    f"prefill: {prefill.tokens_per_s:,.0f} tokens/s; published about {published_prefill:,.0f}: "
    f"{prefill.tokens_per_s / published_prefill:.1f} × as fast"
)
assert decode.tokens_per_s > 1850 and prefill.tokens_per_s > 4000

# %% [markdown]
# Decoding comes out 15 % faster than published, if a step generates one token per sequence. (Whether drafts were counted was not published; the batch size is the one that the
# two published speeds imply.) Prefill was served at half the speed that the operators allow: a day has hours with few users, prompts
# do not fill batches exactly, and cached prefixes must be looked up and transferred. A sum of operators is a bound; what it shows best is which resource *binds*.

# %% [markdown]
# ## Play: a unit of your own
# Choose sequences per group and micro-batch, context and hardware. Where does a decoding layer spend its time, and does it fit?


# %%
def show_unit(hardware: str = "h800", sequences: int = 100, context: int = 4096, gpus: int = 320):
    """Show one decoding layer on a unit whose GPUs share 320 experts."""
    rates, unit = ACHIEVED_RATES[hardware], DECODE._replace(gpus=gpus, experts_per_gpu=320 / gpus)
    s = decode_throughput(V3, rates, sequences, context, unit)
    most = max_batch(V3, rates, unit, context)
    fig, ax = figure(1, 1, 8, 2)
    ax.barh(1, 1e6 * s.attention, color=BLUE, label="attention")
    ax.barh(0, 1e6 * s.all_to_all, color=ORANGE, label="dispatch, combine")
    ax.barh(0, 1e6 * s.mlp, left=1e6 * s.all_to_all, color=GREEN, label="experts")
    ax.set(
        yticks=(0, 1),
        yticklabels=("one micro-batch", "the other"),
        xlabel="µs per layer",
        ylim=(-0.6, 1.6),
    )
    fits = f"{most} fit" if most >= sequences else f"only {most} FIT"
    ax.set_title(
        f"{gpus} {hardware}, {sequences} × {context:,} per group ({fits}): {s.tokens_per_s:,.0f} tokens/s per GPU, {1 / s.step:.0f} per user",
        fontsize=10,
    )
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    show(fig)


show_unit()
play(
    show_unit,
    hardware=[*ACHIEVED_RATES],
    sequences=(4, 200, 4),
    context=[4096, 1024, 16_384, 65_536, 131_072],
    gpus=[320, 40, 80, 160],
)

# %% [markdown]
# ## Exercises
# **1 · Compute.** How many rows does an expert of the decode unit process in a micro-batch of `b` sequences per group, if all 320 GPUs share the
# work evenly?


# %%
@checker
def check_rows(fn):
    """How many sequences has the whole unit, and how many rows does each of their tokens send?"""
    assert all(abs(fn(b) - 80 * b * 9 / 320) < 1e-9 for b in (4, 100, 112))


@checker
def check_balance(fn):
    """Take one weight: how long does it take to read it once, and to use it for n rows?"""
    cases = [(1358e12, 2.85e12), (3088e12, 6.8e12), (500e12, 1e12)]
    assert all(abs(fn(*case) - case[0] / case[1] / 2) < 1e-6 * case[0] / case[1] for case in cases)


@checker
def check_batch(fn):
    """Which batch sizes are possible? `decode_throughput` gives the step time of each, `max_batch` the largest that fits."""
    for context, ms in ((4096, 20), (4096, 40), (16_384, 60), (4096, 5)):
        most = max_batch(V3, H800, DECODE, context)
        good = [
            b
            for b in range(1, most + 1)
            if decode_throughput(V3, H800, b, context).step <= ms / 1e3
        ]
        assert abs(fn(context, ms) - max(good, default=0)) < 0.5


def my_rows(b: int) -> float:
    return ...


check_rows(my_rows)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_rows(b):
#     return 80 * b * 9 / 320  # 2.25 b
# ```
# </details>
#
# **2 · Predict.** From how many rows on (not rounded) is an expert bound by computation, on a GPU with `rate` operations/s
# and `bandwidth` bytes/s, if only its weights (one byte each) count as memory traffic?


# %%
def my_balance(rate: float, bandwidth: float) -> float:
    return ...


check_balance(my_balance)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_balance(rate, bandwidth):
#     return rate / bandwidth / 2  # 2 operations per weight and row: 238 rows on an H800
# ```
# </details>
#
# **3 · Extend.** A step of both micro-batches must not take longer than `ms` milliseconds. How many sequences of
# `context` tokens can a group's micro-batch on the H800 unit have at most, if they must also fit into memory (0 if none)?


# %%
def my_batch(context: int, ms: float) -> int:
    return ...


check_batch(my_batch)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_batch(context, ms):
#     most = max_batch(V3, H800, DECODE, context)
#     steps = {b: decode_throughput(V3, H800, b, context).step for b in range(1, most + 1)}
#     return max((b for b, step in steps.items() if step <= ms / 1e3), default=0)
# ```
# </details>

# %% [markdown]
# ## Scale-up
# `dsv3 plan --unit decode --context 16384 --hardware h200` prints these sums for other configs and GPUs. Other chapters describe what such a unit
# runs: absorbed attention over cache pages in chapters 03 and 10, the two-hop dispatch and its
# send lists in [chapter 11](11_expert_parallel.ipynb), MTP drafts in [chapter 08](08_generate.ipynb).
