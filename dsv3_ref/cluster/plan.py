"""`dsv3 plan`: what a cluster would hold, send and cost, before anybody rents it (chapter 17)."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

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
from dsv3_ref.parallel.build import is_expert, owning_ranks
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

REPORT = 180e3  # GPU hours per trillion tokens (§1)


@dataclass(frozen=True)
class Plan:
    """Memory, messages, time and cost of training on a cluster; by default the report's V3.

    Or of a unit that serves: --unit prefill, --unit decode (chapter 20).
    """

    config: str = "v3"
    """size: tiny, small, v2_lite, v3, or a .json file"""
    pp: int = 16
    ep: int = 64
    dp: int = 2
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "dualpipe"
    seq_len: int = 4096
    global_batch_size: int = 15_360
    """sequences in a step, over all ranks; a micro-batch is one sequence"""
    precision: Literal["fp8", "bf16"] = "fp8"
    zero: bool = True
    """ZeRO-1: each rank keeps the moments of its slice only"""
    ep_ranks_per_node: int = 8
    """ranks of an expert group in one node"""
    hardware: Literal["h800", "h100", "h200", "b200"] = "h800"
    """whose rates --machine.* takes where it is not told others"""
    machine: AchievedRates = AchievedRates()
    """what a GPU reaches, and costs"""
    losses: Overheads = Overheads()
    """what a cluster loses beside kernels' tables (sources: chapter 17)"""
    unit: Literal["train", "prefill", "decode"] = "train"
    """prefill, decode: the report's units of 32 and 320 GPUs; --context, --hardware, --config"""
    context: int = 4096
    """tokens of a sequence that is served"""
    out: Path | None = None
    """where to put a picture (.png, .svg, .pdf)"""

    def __post_init__(self):
        default, theirs = AchievedRates(), ACHIEVED_RATES[self.hardware]
        mine = [b if x == a else x for x, a, b in zip(self.machine, default, theirs)]
        object.__setattr__(self, "machine", AchievedRates(*mine))


class Rank(NamedTuple):
    """Bytes on one GPU of a pipeline rank, by kind; and of its host."""

    parameters: int
    gradients: int
    moments: int
    codes: int  # of weights in FP8, while a step runs
    activations: int
    host: int  # the average of the weights

    @property
    def gpu(self) -> int:
        return sum(self) - self.host


@dataclass(frozen=True)
class Estimate:
    """What `dsv3 plan` says."""

    plan: Plan
    model: Config
    ranks: list[Rank]  # of every pp rank
    in_flight: list[int]  # micro-batches
    sent: dict[str, int]  # bytes a step and GPU, of the rank that sends most
    flops: float  # of a step, all GPUs
    spans: list[Span]
    tail: float  # seconds after the pipeline: gradients and weights over IB, AdamW

    @property
    def seconds(self) -> float:
        return max(span.end for span in self.spans) + self.tail

    @property
    def gpus(self) -> int:
        return self.plan.pp * self.plan.ep * self.plan.dp

    @property
    def hours(self) -> float:
        """GPU hours per trillion tokens, with slow GPUs and failures."""
        alone = gpu_hours(self.seconds, self.gpus, self.plan.global_batch_size * self.plan.seq_len)
        return alone * wall_clock_factor(self.plan.losses, self.gpus)


# ── Memory ──


def stages_in(p: Plan) -> int:
    """Of the whole pipeline."""
    return 1 + max(s for of_rank in stages_by_rank(p.schedule, p.pp) for s in of_rank)


def numbers_of(p: Plan, c: Config) -> tuple[list[dict], list[tuple[int, ...]]]:
    """Of every pp rank: {(ranks that sum the gradient, under FP8): numbers}; and its stages.

    From the model on the meta device, cut as the cluster trainer cuts it.
    """
    return counted(c, p.schedule, p.pp, p.dp, p.ep)


@cache
def counted(c: Config, name: str, pp: int, dp: int, ep: int):
    """`numbers_of` a schedule and a mesh, once: the model is large even on meta."""
    with torch.device("meta"):
        model = Transformer(c)
    where, out = stages_by_rank(name, pp), [{} for _ in range(pp)]
    for name, w in model.named_parameters():
        ranks, expert = owning_ranks(name, c, where), is_expert(name)
        size = len(ranks) * dp * (1 if expert else ep)
        in_block = name.startswith("layers.") or ".block." in name
        key = size, in_block and w.ndim > 1 and ".gate." not in name
        for rank in ranks:
            out[rank][key] = out[rank].get(key, 0) + w.numel() // (ep if expert else 1)
    return out, where


def stage_bytes(p: Plan, c: Config) -> list[int]:
    """What one micro-batch holds in each stage; head losses keep both of their gradients."""
    block = [
        sum(activation_bytes_per_token(c, dense, p.precision == "fp8").values())
        for dense in (False, True)
    ]
    out = [
        p.seq_len * sum(block[i < c.n_dense_layers] for i in layers)
        for layers in partition_layers(c, stages_in(p))
    ]
    heads = (1 + c.n_mtp_layers) * (4 * c.vocab_size * c.dim + 2 * p.seq_len * c.dim)
    mtp = block[False] + (4 + 2 + 4 + 2) * c.dim  # embedding, h, both for the projection, result
    out[-1] += heads + p.seq_len * (4 * c.dim + c.n_mtp_layers * mtp)
    return [round(x) for x in out]


def most(mine: list[tuple[Action, ...]], size: list[int]) -> tuple[int, int]:
    """A rank's largest sum of what its micro-batches hold, and how many there were then."""
    live, best = [], (0, 0)
    for step in mine:
        live += [op.stage for op in step if op.kind == "F"]
        best = max(best, (sum(size[s] for s in live), len(live)))
        for op in step:
            if op.kind in "BW":
                live.remove(op.stage)
    return best


def rank_bytes(p: Plan, numbers: dict, activations: int) -> Rank:
    """fp32 parameters are their own masters; fp32 gradients; bf16 moments; codes with scales."""
    total = sum(numbers.values())
    slices = sum(n / (size if p.zero else 1) for (size, _), n in numbers.items())
    eight = sum(n for (_, eight), n in numbers.items() if eight)
    codes = eight * (1 + 4 / 128**2) if p.precision == "fp8" else 2 * eight
    gradients = 4 * total + 4 * slices * p.zero
    return Rank(
        4 * total, round(gradients), round(4 * slices), round(codes), activations, 4 * total
    )


# ── Messages, operations, time ──


def messages(p: Plan, c: Config, numbers: list[dict], where) -> dict[str, int]:
    """Bytes that a GPU sends in a step, by link; of the rank with the most, for each link."""
    m = p.global_batch_size // (p.dp * p.ep)
    cut, (out, back) = partition_layers(c, stages_in(p)), dispatch_bytes(c, p.precision == "fp8")
    of_stage = [sum(i >= c.n_dense_layers for i in layers) for layers in cut]  # with experts
    of_stage[-1] += c.n_mtp_layers
    share = 0.5 if p.schedule == "dualpipe" else 1.0  # a stage's micro-batches on one of two ranks
    blocks = max(share * sum(of_stage[s] for s in mine) for mine in where)
    rows = [t * m * p.seq_len * blocks * 2 for t in dispatch_copies(c, p.ep, p.ep_ranks_per_node)]
    gradients = max(sum(4 * n * (s - 1) / s for (s, _), n in rank.items()) for rank in numbers)
    return {
        "experts, across nodes": round(rows[0] * (out + back)),
        "experts, inside nodes": round(rows[1] * (out + back)),
        "pipeline": round(share * 2 * len(where[0]) * m * p.seq_len * 4 * c.dim * (p.pp > 1)),
        "gradients and weights": round(2 * gradients),
    }


def operations(p: Plan, c: Config) -> float:
    """Of a step, forward and backward, without what is computed again."""
    forward, backward = attention_flops(c, p.seq_len)
    token = 0.0
    for i in [*range(c.n_layers), *[c.n_layers] * c.n_mtp_layers]:
        token += 3 * sum(x.flops for x in block_gemms(c, i < c.n_dense_layers).values())
        token += forward + backward
    token += 6 * c.dim * ((1 + c.n_mtp_layers) * c.vocab_size + 2 * c.n_mtp_layers * c.dim)
    return token * p.global_batch_size * p.seq_len


def estimate(p: Plan) -> Estimate:
    """All of it."""
    c = load_config(p.config)
    check(p, c)
    numbers, where = numbers_of(p, c)
    m = min_microbatches(p.schedule, p.pp, p.global_batch_size // (p.dp * p.ep))
    steps, size = schedule(p.schedule, p.pp, m), stage_bytes(p, c)
    peaks = [most(mine, size) for mine in steps]
    ranks = [rank_bytes(p, of, peak) for of, (peak, _) in zip(numbers, peaks)]
    return Estimate(
        p, c, ranks, [count for _, count in peaks], messages(p, c, numbers, where),
        operations(p, c), simulate(steps, stage_times(p, c)),
        max(sum(step_tail(p.machine, of)) for of in numbers),
    )  # fmt: skip


def stage_times(p: Plan, c: Config) -> StageCosts:
    """Seconds of each stage's operations, losses counted."""
    moves, cut = dispatch_copies(c, p.ep, p.ep_ranks_per_node), partition_layers(c, stages_in(p))
    each = stage_seconds(c, p.machine, cut, p.seq_len, moves, p.losses)
    return StageCosts(each, pair_factor(c, p.machine, p.seq_len, moves, p.losses))


def check(p: Plan, c: Config) -> None:
    """Raise a `UserError` for a cluster that cannot be."""
    if min(p.pp, p.ep, p.dp, p.seq_len, p.global_batch_size, p.ep_ranks_per_node) < 1:
        raise UserError("every size must be at least 1")
    pipes, n = p.dp * p.ep, stages_in(p)
    full = p.ep <= p.ep_ranks_per_node or p.ep % p.ep_ranks_per_node == 0
    rules = [
        (n <= c.n_layers, f"{c.n_layers} layers cannot be cut into {n} stages"),
        (c.n_routed_experts % p.ep == 0, f"--ep must divide {c.n_routed_experts} routed experts"),
        (full, f"--ep {p.ep} ranks do not fill nodes of --ep-ranks-per-node {p.ep_ranks_per_node}"),
        (
            p.global_batch_size % pipes == 0,
            f"--global-batch-size must be a multiple of --dp × --ep = {pipes}",
        ),
        (p.schedule != "dualpipe" or p.pp % 2 == 0, "dualpipe needs an even --pp"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


# ── A unit that serves ──

ROWS = 256  # that meet an expert at most, about (§3.4.2)


def serve(p: Plan) -> str:
    """A prefill or decode unit in words: what it holds, how fast it is, what binds (chapter 20)."""
    c, m = load_config(p.config), p.machine
    u = deployment_units(c)[p.unit]
    rules = [
        (p.context >= 1, "every size must be at least 1"),
        (c.n_heads % u.tp == 0, f"a unit divides heads by {u.tp}: {c.n_heads} cannot be"),
        (
            c.n_routed_experts % 32 == 0 or u.direct_ib,
            "a prefill unit needs a multiple of 32 experts",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    chosen = c.n_activated_experts + c.n_shared_experts
    n = min(max_batch(c, m, u, p.context), round(ROWS * u.tp / chosen))  # rows = n / tp · chosen
    if u.direct_ib and not n:
        raise UserError(f"no sequence of {p.context:,} tokens fits beside the weights")
    s = (
        decode_throughput(c, m, n, p.context, u, p.losses)
        if u.direct_ib
        else prefill_throughput(c, m, 4096, p.context, u, p.losses)
    )
    return said(p, c, u, s, n)


def said(p: Plan, c: Config, u: DeploymentUnit, s: Throughput, n: int) -> str:
    """The lines of `serve`."""
    kinds = ("attention", "experts and what lies between", "exchange")
    times = "\n".join(f"  {kind:30}{1e6 * t:9,.0f} µs" for kind, t in zip(kinds, s))
    load = f"{n} sequences a group" if u.direct_ib else "4,096 tokens a GPU"
    reader = f", {1 / s.step:.0f} tokens/s a reader" if u.direct_ib else ""
    links = (
        f"; direct exchanges at {u.ib_efficiency:.0%} of IB, {1e6 * u.latency_s:.0f} µs more a way"
    )
    loss = p.losses
    return f"""\
{p.config}, {p.unit} unit of {u.gpus} {p.hardware.upper()}: TP{u.tp}, {u.gpus // u.tp} groups, \
{u.experts_per_gpu:g} routed experts a GPU, context {p.context:,}
{scale_of(c, u, p.machine)}
assumed (chapters 17, 20): busiest rank {loss.load_imbalance:g} × the mean, {1e6 * loss.launch_gap:g} µs \
between kernels{links if u.direct_ib else ""}
two micro-batches of {load}; a MoE layer of one:
{times}
a step of both {1e3 * s.step:,.1f} ms; {s.tokens_per_s:,.0f} tokens/s and GPU{reader}; \
${dollars_per_million_tokens(p.machine, s.tokens_per_s):.2f} a million tokens at ${p.machine.dollars_per_hour:g} an hour"""


def scale_of(c: Config, u: DeploymentUnit, m: AchievedRates) -> str:
    """What a GPU of the unit holds."""
    weights = weights_on(c, u)
    fits = "fit" if weights < 0.9 * m.memory else "do NOT fit"
    return f"{weights / 1e9:.1f} GB of weights a GPU {fits} {0.9 * m.memory / 1e9:g}"


# ── Said and drawn ──


def table(e: Estimate) -> str:
    """Memory by rank, in GB."""
    head = [f.replace("host", "host: average") for f in Rank._fields]
    lines = ["rank  " + "  ".join(f"{name:>11}" for name in [*head[:-1], "GPU", head[-1]])]
    for i, rank in enumerate(e.ranks):
        row = [*rank[:-1], rank.gpu, rank.host]
        lines.append(f"{i:4}  " + "  ".join(f"{x / 1e9:11.2f}" for x in row))
    return "\n".join(lines)


def say(e: Estimate) -> str:
    """Everything in words."""
    p, m = e.plan, e.plan.machine
    top = max(rank.gpu for rank in e.ranks)
    fits = "fits" if top <= m.memory else "does NOT fit"
    tokens, speed = p.global_batch_size * p.seq_len, e.flops / e.gpus / e.seconds
    best = estimate(replace(p, losses=NO_OVERHEADS)).hours
    losses = ", ".join(f"{k} {v:.3g}" for k, v in p.losses._asdict().items())
    sent = "\n".join(f"  {name:24}{n / 1e9:9.2f} GB" for name, n in e.sent.items())
    return f"""\
{p.config} on {e.gpus:,} {p.hardware.upper()}: pp {p.pp} × dp {p.dp} × ep {p.ep}, {p.schedule}, \
{p.precision}, batch {p.global_batch_size:,} × {p.seq_len:,} tokens
GB on each GPU of a pipeline rank, everything recomputed that may be:
{table(e)}
at most {max(e.in_flight)} micro-batches in flight; {top / 1e9:.1f} GB {fits} {m.memory / 1e9:g}

sent by a GPU in a step (the rank that sends most):
{sent}

a step: {e.flops:.3g} FLOPs; {e.seconds:.2f} s, of which {e.tail:.2f} s after the pipeline
{tokens / e.seconds / e.gpus:,.0f} tokens/s and GPU; {speed / 1e12:.0f} TFLOP/s a GPU
losses assumed (chapter 17): {losses}
{e.hours / 1e3:,.1f}K GPU hours per trillion tokens, ${e.hours * m.dollars_per_hour / 1e3:,.0f}K at \
${m.dollars_per_hour:g} an hour; without losses {best / 1e3:,.1f}K \
(the report, V3 on H800: {REPORT / 1e3:.0f}K, ${REPORT * 2 / 1e3:,.0f}K)"""


def picture(e: Estimate):
    """Memory of every pipeline rank, by kind."""
    from dsv3_ref.viz import COLORS, figure

    fig, ax = figure(1, 1, 9, 3.6)
    bottom = [0.0] * len(e.ranks)
    for name, color in zip(Rank._fields[:-1], COLORS):
        heights = [getattr(rank, name) / 1e9 for rank in e.ranks]
        ax.bar(range(len(heights)), heights, bottom=bottom, color=color, label=name)
        bottom = [b + h for b, h in zip(bottom, heights)]
    ax.axhline(e.plan.machine.memory / 1e9, color="black", ls="--", lw=1, label="memory")
    ax.set(xlabel="pipeline rank", ylabel="GB on each of its GPUs", xticks=range(len(bottom)))
    ax.set_title(
        f"{e.plan.config} on {e.gpus:,} GPUs: {e.hours / 1e3:,.0f}K hours a trillion tokens"
    )
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return fig


def plan(p: Plan) -> None:
    """Print it, and draw it where --out says."""
    e = estimate(p) if p.unit == "train" else None
    print(say(e) if e else serve(p))
    if e and p.out:
        picture(e).savefig(p.out)
        print(p.out)
