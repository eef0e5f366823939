"""The command line of the benchmark: test the kernels, time them, report."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from dsv3_ref.kernels.bench.report import (
    TABLE_HEAD,
    format_plan,
    format_verdict,
    judge_goals,
    write_bench_json,
)
from dsv3_ref.kernels.bench.suite import all_cases
from dsv3_ref.kernels.bench.worker import run_cases

REPOSITORY = Path(__file__).resolve().parents[2]


def kernel_test_command() -> list[str]:
    """Return pytest over the tests of the kernels; without hypothesis, over those without it."""
    paths = sorted(REPOSITORY.glob("tests/kernels/test_kernels_*.py"))
    sources = {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in paths
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x"]
    if find_spec("hypothesis"):
        return [*command, *sources]
    plain = {name: source for name, source in sources.items() if "import given" not in source}
    print(f"without hypothesis, untested: {', '.join(sorted(set(sources) - set(plain)))}")
    needs_conftest = re.compile(r"def (test_\w+)\([^)]*\bmicro\b")  # which imports hypothesis
    deselected = []
    for name, source in plain.items():
        tests = needs_conftest.findall(source)
        deselected += [f"--deselect={name}::{test}" for test in tests]
    return [*command, "--noconftest", *deselected, *plain]


def parse_bench_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `cases` of the result are those that --only selects."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_ref.kernels.bench")
    parser.add_argument("--dry-run", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument("--skip-tests", action="store_true", help="do not test the kernels first")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="select cases whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, default=25, help="timed calls per case")
    parser.add_argument("--seconds", type=float, default=900, help="time limit per case")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_gpu.json"), help="file of the results"
    )
    args = parser.parse_args(argv)
    args.cases = [c for c in all_cases() if not args.only or any(x in c.name for x in args.only)]
    if not args.cases:
        parser.error(f"no case has {' or '.join(args.only)} in its name; --dry-run lists them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a test or a case failed, 2 without a GPU."""
    args = parse_bench_args(argv)
    if args.dry_run:
        print(format_plan(args.cases))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA GPU to time kernels on; --dry-run lists the cases", file=sys.stderr)
        return 2
    if not args.skip_tests and subprocess.run(kernel_test_command(), cwd=REPOSITORY).returncode:
        print("the kernels fail their tests; --skip-tests times them anyway", file=sys.stderr)
        return 1
    print(TABLE_HEAD)
    gpu, timings = run_cases(args.cases, args.rounds, args.seconds)
    verdicts = judge_goals(args.cases, timings, gpu.limits)
    lines = ["", "goals", *map(format_verdict, verdicts), "", json.dumps(asdict(gpu))]
    print("\n".join(lines))
    tests = "skipped" if args.skip_tests else "passed"
    write_bench_json(args.out, gpu, timings, verdicts, tests)
    return int(any(timing.error for timing in timings))
