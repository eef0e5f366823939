"""The duration of a training step as a waterfall: what each assumption adds, in seconds."""

from math import inf
from typing import NamedTuple

from dsv3_ref.config import Config
from dsv3_ref.dualpipe import Span, Step, simulate
from dsv3_ref.scale import (
    NO_OVERHEADS,
    AchievedRates,
    Overheads,
    StageCosts,
    accumulation_seconds,
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


def stage_times(at: StepSettings, rates: AchievedRates, overheads: Overheads) -> StageCosts:
    """Return the durations of each stage's actions, overheads included."""
    layers = partition_layers(at.config, at.num_stages)
    copies = dispatch_copies(at.config, at.ep, at.ranks_per_node)
    seconds = stage_seconds(at.config, rates, layers, at.tokens, copies, overheads)
    times = [
        t._replace(w=t.w + accumulation_seconds(rates, overheads, n))
        for t, n in zip(seconds, at.params)
    ]
    return StageCosts(times, pair_factor(at.config, rates, at.tokens, copies, overheads))


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
