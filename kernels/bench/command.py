"""The command line of the benchmark: time the kernels and report."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from dsv3_ref.kernels.bench.case import Timing
from dsv3_ref.kernels.bench.report import (
    TABLE_HEAD,
    format_plan,
    format_row,
    format_verdict,
    judge_goals,
    write_bench_json,
)
from dsv3_ref.kernels.bench.suite import all_cases
from dsv3_ref.kernels.bench.worker import run_cases


def parse_bench_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `cases` of the result are those that --only selects."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_ref.kernels.bench")
    parser.add_argument("--dry-run", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="select cases whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, default=25, help="timed calls per case")
    parser.add_argument("--seconds", type=float, default=60, help="time limit per case")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_gpu.json"), help="file of the results"
    )
    args = parser.parse_args(argv)
    args.cases = [c for c in all_cases() if not args.only or any(x in c.name for x in args.only)]
    if not args.cases:
        parser.error(f"no case has {' or '.join(args.only)} in its name; --dry-run lists them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a case failed or was wrong, 2 without a GPU."""
    args = parse_bench_args(argv)
    if args.dry_run:
        print(format_plan(args.cases))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA GPU to time kernels on; --dry-run lists the cases", file=sys.stderr)
        return 2
    print(TABLE_HEAD)
    timings: list[Timing] = []
    for gpu, timing in run_cases(args.cases, args.rounds, args.seconds):
        timings.append(timing)
        print(format_row(timing, gpu.limits), flush=True)
        verdicts = judge_goals(args.cases, timings, gpu.limits)
        write_bench_json(args.out, gpu, timings, verdicts)  # each time, should it be cut off
    lines = ["", "goals", *map(format_verdict, verdicts), "", json.dumps(asdict(gpu))]
    print("\n".join(lines))
    return int(any(timing.error for timing in timings))
