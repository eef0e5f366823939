"""The benchmark's table, the verdicts on its goals, and its JSON file."""

import json
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from dsv3_ref.kernels.bench.case import Case, GPULimits, NotTimedError, Timing, roofline
from dsv3_ref.kernels.bench.timing import GPUInfo, first_line

RATES_HEAD = f"{'case':58}{'ms':>9}{'achieved':>15}{'of limit':>15}{'error':>9}"
TABLE_HEAD = f"{RATES_HEAD}  yardstick: ms, × as fast as it"


# ── Rows ──


def format_row(timing: Timing, limits: GPULimits) -> str:
    """Return a row of the table."""
    head = f"{timing.name:58}"
    if timing.error:
        return f"{head}failed: {first_line(timing.error)}"
    if timing.skipped:
        return f"{head}skipped: {timing.skipped}"
    bound, floor = roofline(timing, limits)
    rate = f"{timing.gbps:.0f} GB/s" if bound == "copy" else f"{timing.tflops:.0f} TFLOP/s"
    yardsticks = "; ".join(
        f"{name}: {y}" if isinstance(y, str) else f"{name}: {y:.3f}, ×{y / timing.time:.2f}"
        for name, y in timing.yardsticks.items()
    )
    share = f"{floor / timing.time:.0%} {bound}"
    note = f"  ({timing.note})" if timing.note else ""
    difference = "–" if timing.difference is None else f"{timing.difference:.1e}"
    rates = f"{timing.time:9.3f}{rate:>15}{share:>15}{difference:>9}"
    return f"{head}{rates}  {yardsticks}{note}"


def format_plan(cases: list[Case]) -> str:
    """Return a table of the cases with their bytes, FLOPs and goals; nothing is measured."""
    lines = [f"{'case':58}{'GB':>10}{'TFLOP':>10}{'peak':>6}  goals"]
    for case in cases:
        costs = f"{case.bytes / 1e9:10.4g}{case.flops / 1e12:10.4g}{case.peak:>6}"
        goals = ", ".join(f"{goal.minimum:g} {goal.text}" for goal in case.goals)
        note = f" ({case.note})" if case.note else ""
        lines.append(f"{case.name:58}{costs}  {goals}{note}".rstrip())
    return "\n".join(lines)


def timing_to_json(timing: Timing, limits: GPULimits) -> dict[str, object]:
    """Return a timing and its achieved rates for JSON."""
    row = {name: value for name, value in asdict(timing).items() if value not in ("", False, {})}
    if timing.ms:
        bound, floor = roofline(timing, limits)
        row |= {"tflops": timing.tflops, "gbps": timing.gbps}
        row |= {"bound": bound, "share": floor / timing.ms}
    return row


# ── Goals ──


@dataclass(frozen=True)
class Verdict:
    """A goal of a case, what was measured, and "reached", "missed" or "not measured"."""

    case: str
    measure: str
    goal: float
    measured: float | None
    verdict: str


def judge_goals(cases: list[Case], timings: list[Timing], limits: GPULimits) -> list[Verdict]:
    """Compare every goal of these cases with the measurement."""
    by_name = {timing.name: timing for timing in timings}
    verdicts = []
    for case in cases:
        for goal in case.goals:
            verdict, value = "not measured", None
            with suppress(KeyError, NotTimedError):  # a case not selected, failed or skipped
                value = goal.measure(by_name[case.name], by_name, limits)
                verdict = "missed" if value < goal.minimum else "reached"
            verdicts.append(Verdict(case.name, goal.text, goal.minimum, value, verdict))
    return verdicts


def format_verdict(verdict: Verdict) -> str:
    """Return a row of the table of goals."""
    value = "–" if verdict.measured is None else f"{verdict.measured:.4g}"
    head = f"{verdict.case:58}{verdict.measure:>15}{value:>9}"
    return f"{head} of {verdict.goal:<6g}{verdict.verdict}"


# ── The file ──


def write_bench_json(
    path: Path, gpu: GPUInfo, timings: list[Timing], verdicts: list[Verdict]
) -> None:
    """Write the results with versions, command and date."""
    report = {
        **asdict(gpu), "torch": torch.__version__, "triton": triton.__version__,
        "command": shlex.join(["python", "-m", "dsv3_ref.kernels.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [timing_to_json(timing, gpu.limits) for timing in timings],
        "goals": [asdict(verdict) for verdict in verdicts],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
