"""`dsv3 plan`: what a cluster would hold, send and cost, before it is rented (chapter 17)."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.config import Config, UserError, load_config
from dsv3_ref.dualpipe import Action, Span, min_microbatches, schedule, simulate, stages_by_rank
from dsv3_ref.inference_scale import (
    DeploymentUnit,
    Throughput,
    decode_throughput,
    deployment_units,
    dollars_per_million_tokens,
    max_batch,
    prefill_throughput,
)
from dsv3_ref.inference_scale import weight_bytes as weights_on
from dsv3_ref.model import Transformer
from dsv3_ref.parallel.build import owning_ranks
from dsv3_ref.scale import (
    ACHIEVED_RATES,
    NO_OVERHEADS,
    AchievedRates,
    Overheads,
    StageCosts,
    activation_bytes_per_token,
    attention_flops,
    block_gemms,
    dispatch_bytes,
    dispatch_copies,
    gpu_hours,
    pair_factor,
    partition_layers,
    stage_seconds,
    step_tail,
    wall_clock_factor,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_HOURS = 180e3  # GPU hours per trillion tokens (§1)


@dataclass(frozen=True)
class PlanConfig:
    """Memory, messages, time and cost of training on a cluster; by default the report's V3.

    Or of a unit that serves: --unit prefill, --unit decode (chapter 20).
    """

    config: str = "v3"
    """size: tiny, small, v2_lite, v3, or a .json file"""
    pp: int = 16
    """ranks of a pipeline"""
    ep: int = 64
    """ranks that share the experts of a layer"""
    dp: int = 2
    """copies of the mesh of pp × ep ranks"""
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "dualpipe"
    """order of the pipeline's steps"""
    seq_len: int = 4096
    """tokens of a training sequence"""
    global_batch_size: int = 15_360
    """sequences in a step, over all ranks; a micro-batch is one sequence"""
    precision: Literal["fp8", "bf16"] = "fp8"
    """precision of the linear layers"""
    zero: bool = True
    """ZeRO-1: each rank keeps the moments of its slice only"""
    ep_ranks_per_node: int = 8
    """ranks of an expert group in one node"""
    hardware: Literal["h800", "h100", "h200", "b200"] = "h800"
    """whose rates --rates.* takes where it is not told others"""
    rates: AchievedRates = AchievedRates()
    """what a GPU reaches, and costs"""
    overheads: Overheads = Overheads()
    """what a cluster loses beside kernels' tables (sources: chapter 17)"""
    unit: Literal["train", "prefill", "decode"] = "train"
    """prefill, decode: the report's units of 32 and 320 GPUs; --context, --hardware, --config"""
    context: int = 4096
    """tokens of a sequence that is served"""
    out: Path | None = None
    """where to put a picture (.png, .svg, .pdf)"""

    def __post_init__(self):
        default, theirs = AchievedRates(), ACHIEVED_RATES[self.hardware]
        mine = [b if x == a else x for x, a, b in zip(self.rates, default, theirs)]
        object.__setattr__(self, "rates", AchievedRates(*mine))


class RankMemory(NamedTuple):
    """Bytes on one GPU of a pipeline rank, by kind; and of its host."""

    parameters: int
    gradients: int
    moments: int
    codes: int  # of weights in FP8, while a step runs
    activations: int
    host: int  # the average of the weights

    @property
    def gpu(self) -> int:
        """Bytes on the GPU: everything but the host's."""
        return sum(self) - self.host


@dataclass(frozen=True)
class Estimate:
    """The memory, traffic, duration and cost of a step, as `dsv3 plan` prints them."""

    plan: PlanConfig
    model: Config
    ranks: list[RankMemory]  # of every pp rank
    in_flight: list[int]  # micro-batches
    sent: dict[str, int]  # bytes per step and GPU, of the rank that sends most
    flops: float  # of a step, all GPUs
    spans: list[Span]
    tail: float  # seconds after the pipeline: gradients and weights over IB, AdamW

    @property
    def seconds(self) -> float:
        """The duration of a step."""
        return max(span.end for span in self.spans) + self.tail

    @property
    def gpus(self) -> int:
        """The number of GPUs."""
        return self.plan.pp * self.plan.ep * self.plan.dp

    @property
    def hours(self) -> float:
        """GPU hours per trillion tokens, with slow GPUs and failures."""
        alone = gpu_hours(self.seconds, self.gpus, self.plan.global_batch_size * self.plan.seq_len)
        return alone * wall_clock_factor(self.plan.overheads, self.gpus)


# ── Memory ──


def num_stages(plan: PlanConfig) -> int:
    """Return the number of stages of the whole pipeline."""
    return 1 + max(map(max, stages_by_rank(plan.schedule, plan.pp)))


def params_by_rank(plan: PlanConfig, config: Config) -> tuple[list[dict], list[tuple[int, ...]]]:
    """Return for every pp rank its parameters by kind, and its stages.

    A kind is (number of ranks that sum the gradient, whether the GEMMs are in FP8). The parameters
    are counted on the meta device, and divided as `ParallelEngine` divides them.
    """
    return count_params_by_rank(config, plan.schedule, plan.pp, plan.dp, plan.ep)


@cache
def count_params_by_rank(
    config: Config, schedule_name: str, pp: int, dp: int, ep: int
) -> tuple[list[dict], list[tuple[int, ...]]]:
    """Return `params_by_rank`, cached because the model is large even on the meta device."""
    with torch.device("meta"):
        model = Transformer(config)
    where = stages_by_rank(schedule_name, pp)
    numbers: list[dict] = [{} for _ in range(pp)]
    for name, w in model.named_parameters():
        ranks, expert = owning_ranks(name, config, where), is_expert(name)
        size = len(ranks) * dp * (1 if expert else ep)
        in_block = name.startswith("layers.") or ".block." in name
        key = size, in_block and w.ndim > 1 and ".gate." not in name
        for rank in ranks:
            number = w.numel() // (ep if expert else 1)
            numbers[rank][key] = numbers[rank].get(key, 0) + number
    return numbers, where


def stage_bytes(plan: PlanConfig, config: Config) -> list[int]:
    """Return the bytes that one micro-batch saves in each stage; head losses save both gradients."""
    block = [
        sum(activation_bytes_per_token(config, dense, plan.precision == "fp8").values())
        for dense in (False, True)
    ]
    out = [
        plan.seq_len * sum(block[i < config.n_dense_layers] for i in layers)
        for layers in partition_layers(config, num_stages(plan))
    ]
    heads = (1 + config.n_mtp_layers) * (
        4 * config.vocab_size * config.dim + 2 * plan.seq_len * config.dim
    )
    mtp = (
        block[False] + (4 + 2 + 4 + 2) * config.dim
    )  # embedding, h, both for the projection, result
    out[-1] += heads + plan.seq_len * (4 * config.dim + config.n_mtp_layers * mtp)
    return [round(x) for x in out]


def peak_activations(mine: list[tuple[Action, ...]], size: list[int]) -> tuple[int, int]:
    """Return a rank's largest sum of saved bytes, and how many micro-batches were in flight then."""
    live, best = [], (0, 0)
    for step in mine:
        live += [op.stage for op in step if op.kind == "F"]
        best = max(best, (sum(size[s] for s in live), len(live)))
        for op in step:
            if op.kind in "BW":
                live.remove(op.stage)
    return best


def rank_bytes(plan: PlanConfig, numbers: dict, activations: int) -> RankMemory:
    """Return a rank's memory.

    Parameters are in fp32 and are their own master weights, gradients are in fp32, moments in bf16;
    FP8 codes have scales.
    """
    total = sum(numbers.values())
    slices = sum(n / (size if plan.zero else 1) for (size, _), n in numbers.items())
    eight = sum(n for (_, eight), n in numbers.items() if eight)
    codes = eight * (1 + 4 / 128**2) if plan.precision == "fp8" else 2 * eight
    gradients = 4 * total + 4 * slices * plan.zero
    return RankMemory(
        4 * total, round(gradients), round(4 * slices), round(codes), activations, 4 * total
    )


# ── Messages, operations, time ──


def bytes_sent(
    plan: PlanConfig, config: Config, numbers: list[dict], where: list[tuple[int, ...]]
) -> dict[str, int]:
    """Return the bytes that a GPU sends in a step by link, each of the rank that sends most."""
    m = plan.global_batch_size // (plan.dp * plan.ep)
    cut, (out, back) = (
        partition_layers(config, num_stages(plan)),
        dispatch_bytes(config, plan.precision == "fp8"),
    )
    of_stage = [sum(i >= config.n_dense_layers for i in layers) for layers in cut]  # with experts
    of_stage[-1] += config.n_mtp_layers
    share = (
        0.5 if plan.schedule == "dualpipe" else 1.0
    )  # a stage's micro-batches on one of two ranks
    blocks = max(share * sum(of_stage[s] for s in mine) for mine in where)
    rows = [
        t * m * plan.seq_len * blocks * 2
        for t in dispatch_copies(config, plan.ep, plan.ep_ranks_per_node)
    ]
    gradients = max(sum(4 * n * (s - 1) / s for (s, _), n in rank.items()) for rank in numbers)
    return {
        "experts, across nodes": round(rows[0] * (out + back)),
        "experts, inside nodes": round(rows[1] * (out + back)),
        "pipeline": round(
            share * 2 * len(where[0]) * m * plan.seq_len * 4 * config.dim * (plan.pp > 1)
        ),
        "gradients and weights": round(2 * gradients),
    }


def step_flops(plan: PlanConfig, config: Config) -> float:
    """Return the FLOPs of a step, forward and backward, without recomputation."""
    forward, backward = attention_flops(config, plan.seq_len)
    token = 0.0
    for i in [*range(config.n_layers), *[config.n_layers] * config.n_mtp_layers]:
        token += 3 * sum(x.flops for x in block_gemms(config, i < config.n_dense_layers).values())
        token += forward + backward
    token += (
        6
        * config.dim
        * ((1 + config.n_mtp_layers) * config.vocab_size + 2 * config.n_mtp_layers * config.dim)
    )
    return token * plan.global_batch_size * plan.seq_len


def estimate(plan: PlanConfig) -> Estimate:
    """Return the estimate of a plan; raise a `UserError` if the plan is invalid."""
    config = load_config(plan.config)
    validate_plan(plan, config)
    numbers, where = params_by_rank(plan, config)
    m = min_microbatches(plan.schedule, plan.pp, plan.global_batch_size // (plan.dp * plan.ep))
    steps, size = schedule(plan.schedule, plan.pp, m), stage_bytes(plan, config)
    peaks = [peak_activations(mine, size) for mine in steps]
    ranks = [rank_bytes(plan, of, peak) for of, (peak, _) in zip(numbers, peaks)]
    return Estimate(
        plan, config, ranks, [count for _, count in peaks], bytes_sent(plan, config, numbers, where),
        step_flops(plan, config), simulate(steps, stage_times(plan, config)),
        max(sum(step_tail(plan.rates, of)) for of in numbers),
    )  # fmt: skip


def stage_times(plan: PlanConfig, config: Config) -> StageCosts:
    """Return the durations of each stage's actions, overheads included."""
    moves, cut = (
        dispatch_copies(config, plan.ep, plan.ep_ranks_per_node),
        partition_layers(config, num_stages(plan)),
    )
    each = stage_seconds(config, plan.rates, cut, plan.seq_len, moves, plan.overheads)
    return StageCosts(each, pair_factor(config, plan.rates, plan.seq_len, moves, plan.overheads))


def validate_plan(plan: PlanConfig, config: Config) -> None:
    """Raise a `UserError` if a plan is invalid."""
    if (
        min(plan.pp, plan.ep, plan.dp, plan.seq_len, plan.global_batch_size, plan.ep_ranks_per_node)
        < 1
    ):
        raise UserError("every size must be at least 1")
    pipes, n = plan.dp * plan.ep, num_stages(plan)
    full = plan.ep <= plan.ep_ranks_per_node or plan.ep % plan.ep_ranks_per_node == 0
    rules = [
        (n <= config.n_layers, f"{config.n_layers} layers cannot be cut into {n} stages"),
        (
            config.n_routed_experts % plan.ep == 0,
            f"--ep must divide {config.n_routed_experts} routed experts",
        ),
        (
            full,
            f"--ep {plan.ep} ranks do not fill nodes of --ep-ranks-per-node {plan.ep_ranks_per_node}",
        ),
        (
            plan.global_batch_size % pipes == 0,
            f"--global-batch-size must be a multiple of --dp × --ep = {pipes}",
        ),
        (plan.schedule != "dualpipe" or plan.pp % 2 == 0, "dualpipe needs an even --pp"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


# ── A unit that serves ──

MAX_ROWS_PER_EXPERT = 256  # that meet an expert at most, about (§3.4.2)


def describe_unit(plan: PlanConfig) -> str:
    """Describe a prefill or decode unit: its weights, its speed and its cost (chapter 20)."""
    config, m = load_config(plan.config), plan.rates
    unit = deployment_units(config)[plan.unit]
    rules = [
        (plan.context >= 1, "every size must be at least 1"),
        (
            config.n_heads % unit.tp == 0,
            f"a unit divides heads by {unit.tp}: {config.n_heads} cannot be",
        ),
        (
            config.n_routed_experts % 32 == 0 or unit.direct_ib,
            "a prefill unit needs a multiple of 32 experts",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    chosen = config.n_activated_experts + config.n_shared_experts
    n = min(
        max_batch(config, m, unit, plan.context), round(MAX_ROWS_PER_EXPERT * unit.tp / chosen)
    )  # rows = n / tp · chosen
    if unit.direct_ib and not n:
        raise UserError(f"no sequence of {plan.context:,} tokens fits beside the weights")
    s = (
        decode_throughput(config, m, n, plan.context, unit, plan.overheads)
        if unit.direct_ib
        else prefill_throughput(config, m, 4096, plan.context, unit, plan.overheads)
    )
    return format_unit(plan, config, unit, s, n)


def format_unit(
    plan: PlanConfig, config: Config, unit: DeploymentUnit, throughput: Throughput, batch: int
) -> str:
    """Return the text of `describe_unit`."""
    kinds = ("attention", "experts and what lies between", "exchange")
    times = "\n".join(f"  {kind:30}{1e6 * t:9,.0f} µs" for kind, t in zip(kinds, throughput))
    load = f"{batch} sequences per group" if unit.direct_ib else "4,096 tokens per GPU"
    reader = f", {1 / throughput.step:.0f} tokens/s per reader" if unit.direct_ib else ""
    links = f"; direct exchanges at {unit.ib_efficiency:.0%} of IB, {1e6 * unit.latency_s:.0f} µs more a way"
    loss = plan.overheads
    return f"""\
{plan.config}, {plan.unit} unit of {unit.gpus} {plan.hardware.upper()}: TP{unit.tp}, {unit.gpus // unit.tp} groups, \
{unit.experts_per_gpu:g} routed experts a GPU, context {plan.context:,}
{format_weights(config, unit, plan.rates)}
assumed (chapters 17, 20): busiest rank {loss.load_imbalance:g} × the mean, {1e6 * loss.launch_gap:g} µs \
between kernels{links if unit.direct_ib else ""}
two micro-batches of {load}; a MoE layer of one:
{times}
a step of both {1e3 * throughput.step:,.1f} ms; {throughput.tokens_per_s:,.0f} tokens/s and GPU{reader}; \
${dollars_per_million_tokens(plan.rates, throughput.tokens_per_s):.2f} a million tokens at ${plan.rates.dollars_per_hour:g} an hour"""


def format_weights(config: Config, unit: DeploymentUnit, rates: AchievedRates) -> str:
    """Return the sentence about the weights on a GPU of the unit."""
    weights = weights_on(config, unit)
    fits = "fit" if weights < 0.9 * rates.memory else "do NOT fit"
    return f"{weights / 1e9:.1f} GB of weights a GPU {fits} {0.9 * rates.memory / 1e9:g}"


# ── Text and figure ──


def format_memory(result: Estimate) -> str:
    """Return the table of memory by rank, in GB."""
    head = [f.replace("host", "host: average") for f in RankMemory._fields]
    lines = ["rank  " + "  ".join(f"{name:>11}" for name in [*head[:-1], "GPU", head[-1]])]
    for i, rank in enumerate(result.ranks):
        row = [*rank[:-1], rank.gpu, rank.host]
        lines.append(f"{i:4}  " + "  ".join(f"{x / 1e9:11.2f}" for x in row))
    return "\n".join(lines)


def format_estimate(result: Estimate) -> str:
    """Return the estimate as text."""
    plan, m = result.plan, result.plan.rates
    top = max(rank.gpu for rank in result.ranks)
    fits = "fits" if top <= m.memory else "does NOT fit"
    tokens = plan.global_batch_size * plan.seq_len
    speed = result.flops / result.gpus / result.seconds
    best = estimate(replace(plan, overheads=NO_OVERHEADS)).hours
    overheads = ", ".join(f"{k} {v:.3g}" for k, v in plan.overheads._asdict().items())
    sent = "\n".join(f"  {name:24}{n / 1e9:9.2f} GB" for name, n in result.sent.items())
    return f"""\
{plan.config} on {result.gpus:,} {plan.hardware.upper()}: pp {plan.pp} × dp {plan.dp} × ep {plan.ep}, {plan.schedule}, \
{plan.precision}, batch {plan.global_batch_size:,} × {plan.seq_len:,} tokens
GB on each GPU of a pipeline rank, everything recomputed that may be:
{format_memory(result)}
at most {max(result.in_flight)} micro-batches in flight; {top / 1e9:.1f} GB {fits} {m.memory / 1e9:g}

sent by a GPU in a step (the rank that sends most):
{sent}

a step: {result.flops:.3g} FLOPs; {result.seconds:.2f} s, of which {result.tail:.2f} s after the pipeline
{tokens / result.seconds / result.gpus:,.0f} tokens/s and GPU; {speed / 1e12:.0f} TFLOP/s a GPU
overheads assumed (chapter 17): {overheads}
{result.hours / 1e3:,.1f}K GPU hours per trillion tokens, ${result.hours * m.dollars_per_hour / 1e3:,.0f}K at \
${m.dollars_per_hour:g} an hour; without overheads {best / 1e3:,.1f}K \
(the report, V3 on H800: {REPORT_HOURS / 1e3:.0f}K, ${REPORT_HOURS * 2 / 1e3:,.0f}K)"""


def plot_memory(result: Estimate) -> "Figure":
    """Plot the memory of every pipeline rank, by kind."""
    from dsv3_ref.viz import COLORS, figure

    fig, ax = figure(1, 1, 9, 3.6)
    bottom = [0.0] * len(result.ranks)
    for name, color in zip(RankMemory._fields[:-1], COLORS):
        heights = [getattr(rank, name) / 1e9 for rank in result.ranks]
        ax.bar(range(len(heights)), heights, bottom=bottom, color=color, label=name)
        bottom = [b + h for b, h in zip(bottom, heights)]
    ax.axhline(result.plan.rates.memory / 1e9, color="black", ls="--", lw=1, label="memory")
    ax.set(xlabel="pipeline rank", ylabel="GB on each of its GPUs", xticks=range(len(bottom)))
    ax.set_title(
        f"{result.plan.config} on {result.gpus:,} GPUs: "
        f"{result.hours / 1e3:,.0f}K hours per trillion tokens"
    )
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return fig


def print_plan(plan: PlanConfig) -> None:
    """Print the estimate of a plan, and save its figure to --out."""
    e = estimate(plan) if plan.unit == "train" else None
    print(format_estimate(e) if e else describe_unit(plan))
    if e and plan.out:
        plot_memory(e).savefig(plan.out)
        print(plan.out)
