"""The duration of a training step as a waterfall: what each assumption adds, in seconds."""

from math import inf
from typing import NamedTuple

from dsv3_ref.config import Config
from dsv3_ref.dualpipe import Span, Step, simulate
from dsv3_ref.scale import (
    NO_OVERHEADS,
    AchievedRates,
    BlockTime,
    Overheads,
    StageCosts,
    accumulation_seconds,
    add_times,
    attention_flops,
    block_gemms,
    dispatch_copies,
    pair_factor,
    partition_layers,
    stage_seconds,
)


class StepSettings(NamedTuple):
    """All that the duration of a pipeline depends on, apart from rates and overheads."""

    config: Config
    steps: list[list[Step]]
    num_stages: int
    tokens: int  # of a micro-batch
    ep: int
    ranks_per_node: int
    params: list[int]  # on a rank, by stage
    cp: int = 1  # ranks that share a sequence


def stage_times(at: StepSettings, rates: AchievedRates, overheads: Overheads) -> StageCosts:
    """Return the durations of each stage's actions, overheads included."""
    layers = partition_layers(at.config, at.num_stages)
    copies = dispatch_copies(at.config, at.ep, at.ranks_per_node)
    seconds = stage_seconds(at.config, rates, layers, at.tokens, copies, overheads)
    shared = shared_attention_seconds(at, rates)
    times = []
    for t, n, part in zip(seconds, at.params, layers):
        t = t._replace(w=t.w + accumulation_seconds(rates, overheads, n))
        num_layers = len(part) + at.config.n_mtp_layers * (part is layers[-1])
        times.append(add_times([t, *[shared] * num_layers]))
    return StageCosts(times, pair_factor(at.config, rates, at.tokens, copies, overheads))


def shared_attention_seconds(at: StepSettings, rates: AchievedRates) -> BlockTime:
    """Return what the attention of a layer takes longer because cp ranks share its sequence.

    Queries see the keys of all ranks, which every rank computes from latents. These are gathered,
    gathered again for the backward pass, and their gradients summed; nothing hides that.
    """
    if at.cp == 1:
        return BlockTime(0, 0, 0, 0)
    c, s = at.config, at.tokens
    others = (at.cp - 1) * s
    shared, alone = (attention_flops(c, t) for t in (at.cp * s, s))
    up = others * block_gemms(c, False)["wkv_b"].flops / rates.gemm
    forward = s * (shared[0] - alone[0]) / rates.attention + up
    backward = s * (shared[1] - alone[1]) / rates.attention_backward
    backward += 3 * up  # recomputation, Dgrad and Wgrad
    link = rates.nvlink if at.cp <= at.ranks_per_node else rates.ib
    latents = others * 2 * (c.kv_lora_rank + c.qk_rope_head_dim) / link
    sms = rates.compute_sms
    return BlockTime(forward / sms + latents, backward / sms + 2 * latents, 0, 0)


def pipeline_spans(at: StepSettings, rates: AchievedRates, overheads: Overheads) -> list[Span]:
    """Return the span of every step of the schedule."""
    return simulate(at.steps, stage_times(at, rates, overheads))


def end_of(spans: list[Span]) -> float:
    """Return the time at which the last rank is done."""
    return max(span.end for span in spans)


def waterfall(
    at: StepSettings, rates: AchievedRates, overheads: Overheads, tail: float, wall_clock: float
) -> dict[str, float]:
    """Return what each assumption adds to a step, in seconds, in the order in which they are added.

    tail: seconds after the pipeline. wall_clock: over the time of steps. The first entry
    is the mean time of a rank at the best rate of each product, with memory and links infinitely
    fast and all SMs computing; the sum is the whole step.
    """
    ideal = rates._replace(hbm=inf, nvlink=inf, ib=inf, compute_sms=1.0)
    spans = pipeline_spans(at, ideal, NO_OVERHEADS)
    total = sum(span.end - span.start for span in spans) / len(at.steps)
    added = {"matrix products and attention": total}

    def add(name: str, end: float) -> None:
        nonlocal total
        added[name], total = end - total, end

    add("stages wait for each other", end_of(spans))
    used = ideal._replace(compute_sms=rates.compute_sms)
    add(f"{1 - rates.compute_sms:.0%} of the SMs communicate", end_of_run(at, used, NO_OVERHEADS))
    used = used._replace(hbm=rates.hbm)
    add("norms, SwiGLU, quantization", end_of_run(at, used, NO_OVERHEADS))
    add("all-to-alls that nothing hides", end_of_run(at, rates, NO_OVERHEADS))
    so_far = NO_OVERHEADS
    for field, name in OVERHEAD_NAMES.items():
        so_far = so_far._replace(**{field: getattr(overheads, field)})
        add(name, end_of_run(at, rates, so_far))
    add("gradients and weights over IB, AdamW", total + tail)
    add("stragglers and failures", total * wall_clock)
    return added


OVERHEAD_NAMES = {
    "gemm_shapes": "products at the rate of their shape",
    "load_imbalance": "the busiest rank's experts",
    "pair_order": "order of all-to-alls in a pair",
    "pp_stream_bytes": "messages between stages",
    "launch_gap": "gaps between kernels",
    "accumulation_bytes": "sums of gradients in fp32",
}


def end_of_run(at: StepSettings, rates: AchievedRates, overheads: Overheads) -> float:
    """Return the duration of the pipeline."""
    return end_of(pipeline_spans(at, rates, overheads))
