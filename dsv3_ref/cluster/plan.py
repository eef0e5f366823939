"""`dsv3 plan`: estimate memory, traffic and cost of a cluster before renting it (chapter 17)."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.cluster.fully_sharded import KIND_LABELS, sharded_bytes_sent, sharded_memory
from dsv3_ref.cluster.memory import (
    Bytes,
    MemorySettings,
    attention_buffers,
    fixed_rows,
    peak_usage,
    working_set_bytes,
)
from dsv3_ref.cluster.step_time import StepSettings, pipeline_spans, waterfall
from dsv3_ref.config import Config, UserError, load_config
from dsv3_ref.dualpipe import (
    Span,
    Step,
    max_in_flight,
    min_microbatches,
    schedule,
    stages_by_rank,
)
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
from dsv3_ref.long_context import kv_cache_numbers_per_token
from dsv3_ref.parallel.bucket import (
    Precision,
    bucket_key,
    parameter_shapes,
    rank_state_bytes,
    staged_bytes,
)
from dsv3_ref.parallel.build import owning_ranks, stages_with_param
from dsv3_ref.parallel.mesh import MeshLayout
from dsv3_ref.parallel.token_dispatcher import CUDA_CAPACITY
from dsv3_ref.scale import (
    ACHIEVED_RATES,
    NO_OVERHEADS,
    AchievedRates,
    Overheads,
    bytes_after_pipeline,
    dispatch_bytes,
    dispatch_copies,
    dispatch_rows,
    gpu_hours,
    partition_layers,
    step_tail,
    training_flops_per_token,
    wall_clock_factor,
)
from dsv3_ref.training.settings import check_rules, context_rules, mesh_rules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_HOURS = 180e3  # GPU hours per trillion tokens (§1)


@dataclass(frozen=True)
class PlanConfig:
    """Estimate memory, traffic, time and cost of training on a cluster, by default of V3.

    --unit prefill and --unit decode estimate the report's serving units instead (chapter 20); they
    use --config, --context, --hardware, --rates and --overheads.
    """

    config: str = "v3"
    """model size: tiny, small, v2_lite, v3, or a .json file"""
    pp: int = 16
    """pipeline-parallel degree"""
    ep: int = 64
    """expert-parallel degree: ranks that share the experts of a layer"""
    dp: int = 2
    """data-parallel degree: copies of the mesh of pp × ep ranks"""
    cp: int = 1
    """context-parallel degree, a divisor of dp × ep: ranks that share sequences"""
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "dualpipe"
    """pipeline schedule"""
    seq_len: int = 4096
    """tokens per training sequence"""
    global_batch_size: int = 15_360
    """sequences per step, over all ranks; a micro-batch is one sequence"""
    precision: Literal["fp8", "bf16"] = "fp8"
    """precision of the linear layers"""
    zero: bool = True
    """ZeRO-1: shard the optimizer's moments over data-parallel ranks"""
    fully_shard: bool = False
    """plan `dsv3 train --fully-shard` instead: memory and traffic in bf16 on --gpus GPUs, without
    --pp, --ep and --dp"""
    gpus: int = 8
    """GPUs, with --fully-shard"""
    micro_batch: int = 1
    """sequences per GPU in one forward pass, with --fully-shard"""
    ep_ranks_per_node: int = 8
    """expert-parallel ranks per node"""
    dispatch_capacity: float = 0.0
    """rows per destination in a dispatch, as a multiple of the mean, as in `dsv3 train`; 0: exact
    sizes"""
    hardware: Literal["h800", "h100", "h200", "b200"] = "h800"
    """GPU whose achieved rates are used for every --rates option that is left at its default"""
    rates: AchievedRates = AchievedRates()
    """rates that a GPU achieves, and its price"""
    overheads: Overheads = Overheads()
    """overheads of a cluster beyond kernel benchmarks (sources: chapter 17)"""
    unit: Literal["train", "prefill", "decode"] = "train"
    """train: a training cluster; prefill, decode: the report's serving units of 32 and 320 GPUs"""
    context: int = 4096
    """tokens per sequence in a serving unit"""
    out: Path | None = None
    """file for a figure of the memory (.png, .svg or .pdf)"""

    def __post_init__(self) -> None:
        default, of_hardware = AchievedRates(), ACHIEVED_RATES[self.hardware]
        rates = [b if x == a else x for x, a, b in zip(self.rates, default, of_hardware)]
        object.__setattr__(self, "rates", AchievedRates(*rates))


class RankMemory(NamedTuple):
    """Bytes on one GPU of a pipeline rank by kind, and on its host."""

    weights: int  # FP8 with scales in linear layers of blocks, bf16 or fp32 elsewhere
    masters: int  # fp32
    gradients: int
    moments: int
    activations: int
    wgrads: int  # operands of deferred weight gradients
    messages: int  # between stages: sent and not known to have arrived, or received in advance
    host: int  # averaged masters

    @property
    def gpu(self) -> int:
        """The bytes on the GPU."""
        return sum(self) - self.host


@dataclass(frozen=True)
class Estimate:
    """The memory, traffic, duration and cost of a step, as `dsv3 plan` prints them."""

    plan: PlanConfig
    model: Config
    ranks: list[RankMemory]  # by pipeline rank
    usage: list[Bytes]  # activations, deferred weight gradients and messages at the peak, by kind
    in_flight: list[int]  # micro-batches in flight at the peak, by pipeline rank
    sent: dict[str, int]  # bytes per step and GPU by link, of the rank that sends most
    communicators: dict[str, int]  # of NCCL by purpose, on the rank that opens most
    flops: float  # per step, of all GPUs
    spans: list[Span]
    tail: float  # seconds after the pipeline: gradients and weights over IB, AdamW
    step: StepSettings
    staged: int  # bytes that a rank copies to its host for a checkpoint, of the one with most

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
        """The GPU hours per trillion tokens, including stragglers and failures."""
        tokens = self.plan.global_batch_size * self.plan.seq_len
        ideal = gpu_hours(self.seconds, self.gpus, tokens)
        return ideal * wall_clock_factor(self.plan.overheads, self.gpus)


# ── Memory ──

# (ranks that sum the gradient, whether the weight is in FP8) → number of parameters
ParamCounts = dict[tuple[int, bool], int]


def num_stages(plan: PlanConfig) -> int:
    """Return the number of stages of the whole pipeline."""
    return 1 + max(map(max, stages_by_rank(plan.schedule, plan.pp)))


def num_data_indices(plan: PlanConfig) -> int:
    """Return the number of ranks of a stage with different rows."""
    return plan.dp * plan.ep // plan.cp


def params_by_rank(
    plan: PlanConfig, config: Config
) -> tuple[list[ParamCounts], list[tuple[int, ...]]]:
    """Return for every pipeline rank its parameters by kind, and its stages.

    The parameters are counted on the meta device, and divided as `ParallelEngine` divides them.
    """
    return count_params_by_rank(config, plan.schedule, plan.pp, plan.dp, plan.ep, plan.precision)


@cache
def count_params_by_rank(
    config: Config, schedule_name: str, pp: int, dp: int, ep: int, precision: Precision
) -> tuple[list[ParamCounts], list[tuple[int, ...]]]:
    """Return `params_by_rank`, cached because chapters and tables ask again."""
    stages = stages_by_rank(schedule_name, pp)
    counts: list[ParamCounts] = [{} for _ in range(pp)]
    for name, shape in parameter_shapes(config).items():
        bucket = bucket_key(name, len(shape), config, stages, precision)
        key = bucket.group_size(dp, ep), bucket.weight_format == "fp8"
        for rank in bucket.owners:
            count = shape.numel() // (ep if bucket.expert else 1)
            counts[rank][key] = counts[rank].get(key, 0) + count
    return counts, stages


mean_rows = cache(dispatch_rows)  # a draw of 4,096 tokens, which every estimate asks for


def memory_settings(plan: PlanConfig, config: Config) -> MemorySettings:
    """Return what the memory of a rank depends on besides its weights."""
    per_pipeline = plan.global_batch_size // num_data_indices(plan)
    return MemorySettings(
        config=config,
        schedule=plan.schedule,
        pp=plan.pp,
        ep=plan.ep,
        num_stages=num_stages(plan),
        microbatches=min_microbatches(plan.schedule, plan.pp, per_pipeline),
        tokens=plan.seq_len // plan.cp,
        fp8=plan.precision == "fp8",
        stream=2,  # bf16 in both precisions
        rows=mean_rows(config, plan.ep, plan.ep_ranks_per_node),
        cp=plan.cp,
        fixed=fixed_rows(
            config, plan.ep, plan.ep_ranks_per_node, plan.seq_len // plan.cp, plan.dispatch_capacity
        ),
    )


@cache
def memory_of_ranks(
    settings: MemorySettings, dp: int, precision: Precision, zero: bool
) -> tuple[list[RankMemory], list[Bytes]]:
    """Return the memory of every pipeline rank, and its peak by kind.

    Cached because it does not depend on rates and overheads, which chapters vary.
    """
    stages = stages_by_rank(settings.schedule, settings.pp)
    ranks, peaks = [], []
    for rank in range(settings.pp):
        usage = peak_usage(settings, rank)
        wgrads, messages = usage["deferred weight gradients"], usage["messages"]
        state = rank_state_bytes(
            settings.config, stages, rank, dp, settings.ep, precision, sharded=zero
        )
        peaks.append(usage)
        ranks.append(
            RankMemory(
                *state,
                activations=usage.total() - wgrads - messages,
                wgrads=wgrads,
                messages=messages,
                host=state.moments,  # the average of the shard in fp32: two moments in bf16
            )
        )
    return ranks, peaks


# ── Traffic, operations, time ──


def count_communicators(plan: PlanConfig, config: Config) -> dict[str, int]:
    """Return the communicators of a GPU by purpose, of the pipeline rank that opens most.

    Their number does not depend on --dp, nor on --ep beyond one node.
    """
    stages = stages_by_rank(plan.schedule, plan.pp)
    owners = {owning_ranks(name, config, stages) for name in parameter_shapes(config)}
    layouts = [MeshLayout(plan.pp, 1, plan.ep, p * plan.ep, plan.cp) for p in range(plan.pp)]
    counts = [layout.count_communicators(owners, plan.ep_ranks_per_node) for layout in layouts]
    return max(counts, key=lambda count: sum(count.values()))


def bytes_sent(
    plan: PlanConfig, config: Config, counts: list[ParamCounts], stages: list[tuple[int, ...]]
) -> dict[str, int]:
    """Return the bytes that a GPU sends per step by link, of the rank that sends most."""
    tokens = plan.global_batch_size * plan.seq_len / (plan.dp * plan.ep)
    if plan.schedule == "dualpipe":
        tokens /= 2  # two ranks hold each stage and share its micro-batches
    row_bytes = sum(dispatch_bytes(config, plan.precision == "fp8"))  # to the expert and back
    layers_by_stage = partition_layers(config, num_stages(plan))
    moe_layers = [sum(i >= config.n_dense_layers for i in layers) for layers in layers_by_stage]
    moe_layers[-1] += config.n_mtp_layers
    num_moe_layers = max(sum(moe_layers[s] for s in own) for own in stages)
    num_layers = max(sum(len(layers_by_stage[s]) for s in own) for own in stages)
    across, inside = (
        2 * copies * tokens * num_moe_layers  # forward and backward
        for copies in dispatch_copies(config, plan.ep, plan.ep_ranks_per_node)
    )
    pipeline = 2 * len(stages[0]) * tokens * 2 * config.dim if plan.pp > 1 else 0
    # gathered in both passes; their gradients are summed in the backward pass
    latents = 3 * (plan.cp - 1) * tokens * num_layers * 2 * kv_cache_numbers_per_token(config)
    return {
        "experts, across nodes": round(across * row_bytes),
        "experts, inside nodes": round(inside * row_bytes),
        "pipeline": round(pipeline),
        "latents of sequences": round(latents),
        "gradients and weights": round(max(map(bytes_after_pipeline, counts))),
    }


def step_flops(plan: PlanConfig, config: Config) -> float:
    """Return the FLOPs of a step, forward and backward, without recomputation."""
    tokens = plan.global_batch_size * plan.seq_len
    return training_flops_per_token(config, plan.seq_len) * tokens


def estimate(plan: PlanConfig) -> Estimate:
    """Return the estimate of a plan; raise a `UserError` if the plan is invalid."""
    config = load_config(plan.config)
    validate_plan(plan, config)
    counts, stages = params_by_rank(plan, config)
    settings = memory_settings(plan, config)
    steps = schedule(plan.schedule, plan.pp, settings.microbatches)
    step = step_settings(plan, config, steps)
    ranks, usage = memory_of_ranks(settings, plan.dp, plan.precision, plan.zero)
    return Estimate(
        plan=plan,
        model=config,
        ranks=ranks,
        usage=usage,
        in_flight=max_in_flight(steps),
        sent=bytes_sent(plan, config, counts, stages),
        communicators=count_communicators(plan, config),
        flops=step_flops(plan, config),
        spans=pipeline_spans(step, plan.rates, plan.overheads),
        step=step,
        tail=max(sum(step_tail(plan.rates, rank)) for rank in counts),
        staged=max(
            staged_bytes(config, stages, rank, plan.dp, plan.ep, plan.precision)
            for rank in range(plan.pp)
        ),
    )


def step_settings(plan: PlanConfig, config: Config, steps: list[list[Step]]) -> StepSettings:
    """Return what the duration of the pipeline depends on, apart from rates and overheads."""
    n = num_stages(plan)
    params = params_by_stage(config, n, plan.ep)
    return StepSettings(
        config, steps, n, plan.seq_len // plan.cp, plan.ep, plan.ep_ranks_per_node, params, plan.cp
    )


@cache
def params_by_stage(config: Config, num_stages: int, ep: int) -> list[int]:
    """Return the number of parameters of each stage on a rank."""
    counts = [0] * num_stages
    for name, shape in parameter_shapes(config).items():
        for stage in stages_with_param(name, config, num_stages):
            counts[stage] += shape.numel() // (ep if is_expert(name) else 1)
    return counts


def validate_plan(plan: PlanConfig, config: Config) -> None:
    """Raise a `UserError` if a plan is invalid."""
    for name in ("pp", "ep", "dp", "cp", "seq_len", "global_batch_size", "ep_ranks_per_node"):
        if getattr(plan, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    check_rules(mesh_rules(config, plan.pp, plan.ep, plan.schedule, plan.ep_ranks_per_node))
    if not (plan.dispatch_capacity == 0 or 1 <= plan.dispatch_capacity < math.inf):
        raise UserError("--dispatch-capacity must be 0 or a number from 1")
    check_rules(context_rules(config, plan.seq_len, plan.cp, plan.dp, plan.ep))
    n, divisor = num_data_indices(plan), " / --cp" if plan.cp > 1 else ""
    if plan.global_batch_size % n:
        raise UserError(f"--global-batch-size must be a multiple of --dp × --ep{divisor} = {n}")


# ── Fully sharded ──


def describe_fully_sharded(plan: PlanConfig) -> str:
    """Return what each GPU holds and sends with --fully-shard; raise a `UserError` if invalid."""
    for name in ("gpus", "micro_batch", "seq_len"):
        if getattr(plan, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    config = load_config(plan.config)
    lean, fast = (
        sharded_memory(config, plan.gpus, plan.seq_len, plan.micro_batch, recompute)
        for recompute in (True, False)
    )
    rows = [
        f"  {KIND_LABELS[kind]:44}{size / 1e9:8.2f}{getattr(fast, kind) / 1e9:10.2f}"
        for kind, size in lean._asdict().items()
    ]
    rows.append(f"  {'sum':44}{lean.total / 1e9:8.2f}{fast.total / 1e9:10.2f}")
    limit = plan.rates.memory
    verdicts = [
        f"{'fits' if memory.total <= limit else 'does NOT fit'} in {limit / 1e9:g} GB {how}"
        for memory, how in ((lean, "with --recompute"), (fast, "without"))
    ]
    table = "\n".join(rows)
    sent, tokens = sharded_bytes_sent(config, plan.gpus), plan.micro_batch * plan.seq_len
    products = training_flops_per_token(config, plan.seq_len) * tokens / (plan.rates.gemm / 2)
    return f"""\
{plan.config} on {plan.gpus:,} {plan.hardware.upper()}, fully sharded, micro-batches of \
{plan.micro_batch} × {plan.seq_len:,} tokens per GPU
GB on each GPU at the peak of a step, with --recompute and without:
{table}
{"; ".join(verdicts)}
sent by a GPU per micro-batch: {sent / 1e9:.1f} GB, at least {sent / plan.rates.nvlink:.2f} s, \
beside {products:.2f} s of products in bf16, at half of --rates.gemm"""


# ── A serving unit ──

MAX_ROWS_PER_EXPERT = 256  # in a batch, about (§3.4.2)
PREFILL_TOKENS = 4096  # per GPU and micro-batch


def describe_unit(plan: PlanConfig) -> str:
    """Describe a prefill or decode unit: its weights, throughput and cost (chapter 20)."""
    config, rates = load_config(plan.config), plan.rates
    unit = deployment_units(config)[plan.unit]
    rules = [
        (plan.context >= 1, "--context must be at least 1"),
        (
            config.n_heads % unit.tp == 0,
            f"a unit divides the heads among {unit.tp} GPUs: n_heads {config.n_heads} must be a "
            "multiple",
        ),
        (
            config.n_routed_experts % 32 == 0 or unit.direct_ib,
            "a prefill unit needs n_routed_experts to be a multiple of 32, not "
            f"{config.n_routed_experts}",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    num_chosen = config.n_activated_experts + config.n_shared_experts
    batch = min(
        max_batch(config, rates, unit, plan.context),
        round(MAX_ROWS_PER_EXPERT * unit.tp / num_chosen),  # rows = batch / tp · num_chosen
    )
    if not unit.direct_ib:
        throughput = prefill_throughput(
            config, rates, PREFILL_TOKENS, plan.context, unit, plan.overheads
        )
    elif batch:
        throughput = decode_throughput(config, rates, batch, plan.context, unit, plan.overheads)
    else:
        raise UserError(
            f"no sequence of {plan.context:,} tokens fits in memory beside the weights: lower "
            "--context"
        )
    return format_unit(plan, config, unit, throughput, batch)


def format_unit(
    plan: PlanConfig, config: Config, unit: DeploymentUnit, throughput: Throughput, batch: int
) -> str:
    """Return the text of `describe_unit`."""
    kinds = ("attention", "experts and the rest", "dispatch and combine")
    times = "\n".join(f"  {kind:30}{1e6 * t:9,.0f} µs" for kind, t in zip(kinds, throughput))
    load = f"{PREFILL_TOKENS:,} tokens per GPU"
    assumptions = [
        f"busiest rank {plan.overheads.load_imbalance:g} × the mean",
        f"{1e6 * plan.overheads.launch_gap:g} µs between kernels",
    ]
    results = [
        f"step of both {1e3 * throughput.step:,.1f} ms",
        f"{throughput.tokens_per_s:,.0f} tokens/s per GPU",
    ]
    if unit.direct_ib:
        load = f"{batch} sequences per group"
        assumptions += [
            f"direct transfers at {unit.ib_efficiency:.0%} of IB",
            f"{1e6 * unit.latency_s:.0f} µs of latency each",
        ]
        results.append(f"{1 / throughput.step:.0f} tokens/s per sequence")
    price = dollars_per_million_tokens(plan.rates, throughput.tokens_per_s)
    hour = f"${plan.rates.dollars_per_hour:g} per GPU hour"
    groups = f"{unit.gpus // unit.tp} groups of TP{unit.tp}"
    return f"""\
{plan.config}, {plan.unit} unit of {unit.gpus} {plan.hardware.upper()}: {groups}, \
{unit.experts_per_gpu:g} routed experts per GPU, context {plan.context:,}
{format_weights(config, unit, plan.rates)}
assumptions (chapters 17, 20): {", ".join(assumptions)}
two micro-batches of {load}; one MoE layer of one micro-batch:
{times}
{", ".join(results)}; ${price:.2f} per million tokens at {hour}"""


def format_weights(config: Config, unit: DeploymentUnit, rates: AchievedRates) -> str:
    """Return a sentence that compares the weights on a GPU of the unit with its memory."""
    weights = weights_on(config, unit)
    verb = "fit" if weights < 0.9 * rates.memory else "do NOT fit"
    return f"{weights / 1e9:.1f} GB of weights per GPU {verb} in {0.9 * rates.memory / 1e9:g} GB"


# ── Text and figure ──


def format_memory(result: Estimate) -> str:
    """Return the table of memory by rank, in GB."""
    head = [f.replace("host", "host: average") for f in RankMemory._fields]
    lines = ["rank  " + "  ".join(f"{name:>11}" for name in [*head[:-1], "GPU", head[-1]])]
    for i, rank in enumerate(result.ranks):
        row = [*rank[:-1], rank.gpu, rank.host]
        lines.append(f"{i:4}  " + "  ".join(f"{x / 1e9:11.2f}" for x in row))
    return "\n".join(lines)


def format_usage(result: Estimate) -> str:
    """Return the table of what micro-batches and messages hold, in GB by kind.

    Its columns are the ranks that need the most and the least memory, at their peaks.
    """
    by_size = sorted(range(len(result.ranks)), key=lambda rank: result.ranks[rank].gpu)
    columns = sorted({by_size[0], by_size[-1]})
    usages = [result.usage[rank] for rank in columns]
    kinds: dict[str, None] = {}
    for usage in usages:
        kinds |= dict.fromkeys(usage)
    lines = ["kind" + " " * 23 + "".join(f"  rank {rank:2}" for rank in columns)]
    for kind in kinds:
        lines.append(f"{kind:27}" + "".join(f"{usage[kind] / 1e9:9.2f}" for usage in usages))
    return "\n".join(lines)


def describe_mesh(plan: PlanConfig) -> str:
    """Return the sizes of the mesh in words."""
    return f"pp {plan.pp} × dp {plan.dp} × ep {plan.ep}" + f", cp {plan.cp}" * (plan.cp > 1)


def format_buffers(result: Estimate) -> str:
    """Return a line of what attention holds while it runs, in GB by kind; none if cp is 1."""
    if result.plan.cp == 1:
        return ""
    buffers = attention_buffers(memory_settings(result.plan, result.model))
    sizes = ", ".join(f"{kind} {n / 1e9:.1f} GB" for kind, n in buffers.items())
    return f"\nattention's part of the working set: {sizes}"


def format_waterfall(result: Estimate) -> str:
    """Return what each assumption adds to a step, and the sum beside the report's step."""
    plan, tokens = result.plan, result.plan.global_batch_size * result.plan.seq_len
    factor = wall_clock_factor(plan.overheads, result.gpus)
    added = waterfall(result.step, plan.rates, plan.overheads, result.tail, factor)
    lines = [f"  {name:42}{seconds:+8.2f}" for name, seconds in added.items()]
    report = REPORT_HOURS * 3600 / result.gpus * tokens / 1e12
    lines.append(f"  {'sum':42}{sum(added.values()):8.2f}; at the report's hours {report:.2f}")
    return "\n".join(lines)


def format_capacity(capacity: float) -> str:
    """Return what sizes the messages of a dispatch have."""
    sizes = f"sizes of {capacity:g} × the mean" if capacity else "exact sizes"
    return f"{sizes} (--dispatch-capacity {capacity:g})"


def format_default_capacity(plan: PlanConfig) -> str:
    """Return the most memory of a rank with the capacity that `dsv3 train` has on CUDA."""
    plan = replace(plan, dispatch_capacity=CUDA_CAPACITY)
    padded = memory_settings(plan, load_config(plan.config))
    ranks, _ = memory_of_ranks(padded, plan.dp, plan.precision, plan.zero)
    top, working = max(rank.gpu for rank in ranks), working_set_bytes(padded)
    return (
        f"{top / 1e9:.1f} GB with {format_capacity(CUDA_CAPACITY)}, the default of training on "
        f"CUDA, and a working set of about {working / 1e9:.1f} GB"
    )


def format_fit(result: Estimate) -> str:
    """Return whether the ranks fit in their memory, and what else needs some of it."""
    plan, memory = result.plan, result.plan.rates.memory
    top = max(rank.gpu for rank in result.ranks)
    working = working_set_bytes(memory_settings(plan, result.model))
    left = memory - top - working
    fits = "fit in" if left >= 0 else "do NOT fit in"
    text = f"{top / 1e9:.1f} GB and a working set of about {working / 1e9:.1f} GB "
    text += f"{fits} {memory / 1e9:g} GB"
    if left >= 0:
        text += f"; {left / 1e9:.1f} GB are left for buffers: NCCL, CUDA's context"
    text += format_buffers(result)
    if not plan.dispatch_capacity and plan.ep > 1:
        text += f"\n{format_default_capacity(plan)}"
    return text


def format_checkpoint(result: Estimate) -> str:
    """Return what a rank copies to its host for a checkpoint."""
    return (
        f"a checkpoint stages at most {result.staged / 1e9:.2f} GB per GPU on its host, averaged "
        "masters included"
    )


def format_estimate(result: Estimate) -> str:
    """Return the estimate as text."""
    plan, m = result.plan, result.plan.rates
    tokens = plan.global_batch_size * plan.seq_len
    speed = result.flops / result.gpus / result.seconds
    rows = plan.global_batch_size / result.seconds
    best = estimate(replace(plan, overheads=NO_OVERHEADS)).hours
    overheads = ", ".join(f"{k} {v:.3g}" for k, v in plan.overheads._asdict().items())
    sent = "\n".join(f"  {name:24}{n / 1e9:9.2f} GB" for name, n in result.sent.items() if n)
    communicators = ", ".join(f"{k} {n}" for k, n in result.communicators.items() if n)
    duration = f"{result.seconds:.2f} s, of which {result.tail:.2f} s after the pipeline"
    cost = f"${result.hours * m.dollars_per_hour / 1e3:,.0f}K at ${m.dollars_per_hour:g} per hour"
    return f"""\
{plan.config} on {result.gpus:,} {plan.hardware.upper()}: {describe_mesh(plan)}, {plan.schedule}, \
{plan.precision}, batch {plan.global_batch_size:,} × {plan.seq_len:,} tokens
GB on each GPU, by pipeline rank, with recomputation and {format_capacity(plan.dispatch_capacity)}:
{format_memory(result)}
{format_checkpoint(result)}
of these, activations, weight gradients and messages:
{format_usage(result)}
at most {max(result.in_flight)} micro-batches in flight; {format_fit(result)}

sent by a GPU per step (the rank that sends most):
{sent}
communicators per GPU: {sum(result.communicators.values())} ({communicators})

step: {result.flops:.3g} FLOPs; {duration}
the step as a sum, in seconds, in the order in which assumptions are added (chapter 17):
{format_waterfall(result)}
{tokens / result.seconds / result.gpus:,.0f} tokens/s per GPU; {speed / 1e12:.0f} TFLOP/s per GPU
{rows:,.0f} rows of data per second, {rows / num_data_indices(plan):,.1f} per data-parallel index
overheads assumed (chapter 17): {overheads}
{result.hours / 1e3:,.1f}K GPU hours per trillion tokens, {cost}; \
without overheads {best / 1e3:,.1f}K \
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
    """Print the estimate of a plan; with --out, save a figure of its memory."""
    if plan.unit != "train":
        print(describe_unit(plan))
        return
    if plan.fully_shard:
        print(describe_fully_sharded(plan))
        return
    result = estimate(plan)
    print(format_estimate(result))
    if plan.out:
        plot_memory(result).savefig(plan.out)
        print(plan.out)
