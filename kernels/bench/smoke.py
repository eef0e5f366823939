"""Call every kernel once per case on random inputs: is it right, and equal to itself?

    python -m dsv3_ref.kernels.bench.smoke --out smoke.json
    TRITON_INTERPRET=1 python -m dsv3_ref.kernels.bench.smoke --device cpu --divisor 128

Each case runs twice, and both results must be equal to the last bit; their difference from the
first yardstick must be within the case's tolerance.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dsv3_ref.kernels.bench.case import Case
from dsv3_ref.kernels.bench.suite import all_cases
from dsv3_ref.kernels.bench.timing import (
    as_results,
    format_error,
    prepare_calls,
    relative_difference,
    warm_up_yardsticks,
)


@dataclass(frozen=True)
class Check:
    """The result of a case: an empty error, or what is wrong with it."""

    name: str
    difference: float | None
    error: str


def check_case(case: Case, device: str) -> Check:
    """Call a case twice and its first yardstick once."""
    torch.seed()  # new numbers in every run
    try:
        call, yardsticks = prepare_calls(case, device)
        first, second = ([x.clone() for x in as_results(call())] for _ in range(2))
        working, _ = warm_up_yardsticks(yardsticks)
        difference = relative_difference(tuple(first), next(iter(working.values()))())
        error = case.make_timing(difference=difference).error
        if not all(torch.equal(bits_of(x), bits_of(y)) for x, y in zip(first, second)):
            error = "two calls differ"
        return Check(case.name, difference, error)
    except Exception as e:
        return Check(case.name, None, format_error(e))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, in which NaN equals itself."""
    return x.contiguous().view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)


def parse_smoke_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_ref.kernels.bench.smoke")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument("--divisor", type=int, default=1, help="of all sizes (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="parts of names")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke.json"), help="the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the first case of every kind; return 1 if any of them is wrong."""
    args = parse_smoke_args(argv)
    first: dict[str, Case] = {}
    for case in all_cases(args.divisor):
        first.setdefault(case.kind, case)
    chosen = [c for c in first.values() if any(part in c.name for part in args.only)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checks: list[Check] = []
    for case in chosen:
        checks.append(check_case(case, args.device))
        check = checks[-1]
        value = "–" if check.difference is None else f"{check.difference:.1e}"
        print(f"{check.name:58}{value:>10}  {check.error.splitlines()[0] if check.error else 'ok'}")
        sys.stdout.flush()
        args.out.write_text(json.dumps([asdict(c) for c in checks], indent=1), encoding="utf-8")
    return int(any(check.error for check in checks))


if __name__ == "__main__":
    sys.exit(main())
