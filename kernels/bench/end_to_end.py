"""Train and decode with the whole model: losses, tokens per second, in bf16 and FP8.

    python -m dsv3_ref.kernels.bench.end_to_end --out end_to_end.json
    python -m dsv3_ref.kernels.bench.end_to_end --device cpu --config tiny --steps 2 --rows 2

The rows are random and stay the same, so that the loss must fall. `--trace FILE` writes a trace of
one training step in FP8 for chrome://tracing.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dsv3_ref.config import CONFIGS, Config
from dsv3_ref.decode import generate
from dsv3_ref.model import Transformer
from dsv3_ref.ops import use
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.pretrain import train_step

BACKENDS = {"bf16": ("auto",), "fp8": ("fp8", "auto")}
LEARNING_RATE = 1e-3
PROMPT_LENGTH, NEW_TOKENS = 32, 64


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_model(config: Config, device: torch.device) -> Transformer:
    """Build a model with the same weights for every precision."""
    torch.manual_seed(0)
    return Transformer(config).to(device)


def train_model(
    config: Config, precision: str, args: argparse.Namespace, trace: Path | None
) -> dict[str, object]:
    """Train on the same rows in each step; return the losses and the rate of the later steps."""
    device = torch.device(args.device)
    model, recipe = make_model(config, device), RECIPES["tiny"]
    optimizer = build_adamw(model, recipe)
    rows = torch.randint(config.vocab_size, (args.rows, config.max_seq_len + 1), device=device)
    losses, seconds = [], []

    def step() -> float:
        with use(*BACKENDS[precision]), torch.autocast(device.type, torch.bfloat16):
            return train_step(model, optimizer, [rows], recipe, LEARNING_RATE, 1e-3, 0.3).loss

    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if trace:
        with torch.profiler.profile() as profile:
            step()
            synchronize(device)
        profile.export_chrome_trace(str(trace))
    usual = sorted(seconds[len(seconds) // 2 :])[len(seconds[len(seconds) // 2 :]) // 2]
    return {"losses": losses, "tokens_per_s": args.rows * config.max_seq_len / usual}


def decode_batch(config: Config, batch_size: int, device: torch.device) -> dict[str, object]:
    """Continue random prompts twice; return the rate of the second time, prompt included."""
    model = make_model(config, device).to(torch.bfloat16).eval()
    prompt_bs = torch.randint(config.vocab_size, (batch_size, PROMPT_LENGTH), device=device)
    for _ in range(2):  # the first time compiles kernels
        synchronize(device)
        start = time.perf_counter()
        generate(model, prompt_bs, NEW_TOKENS)
        synchronize(device)
        seconds = time.perf_counter() - start
    return {"batch_size": batch_size, "tokens_per_s": batch_size * NEW_TOKENS / seconds}


def parse_end_to_end_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_ref.kernels.bench.end_to_end")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument("--config", default="small", choices=list(CONFIGS), help="the model")
    parser.add_argument("--layers", type=int, help="fewer layers than the config has")
    parser.add_argument("--steps", type=int, default=20, help="training steps (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (%(default)s)")
    parser.add_argument("--trace", type=Path, help="write a trace of a step in FP8")
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end.json"), help="results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both precisions and both batch sizes; return 1 if a loss does not fall."""
    args = parse_end_to_end_args(argv)
    config = CONFIGS[args.config]
    config = replace(config, n_layers=args.layers or config.n_layers)
    report: dict[str, object] = {"torch": torch.__version__, "config": args.config}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    falls = []

    def record(name: str, result: dict[str, object]) -> None:
        report[name] = result
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"{name:12}{json.dumps(result)}", flush=True)

    for precision in BACKENDS:
        result = train_model(config, precision, args, args.trace if precision == "fp8" else None)
        losses = result["losses"]
        assert isinstance(losses, list)
        falls.append(losses[-1] < losses[0])
        record(f"train {precision}", result)
    for batch_size in (1, 8):
        record(f"decode {batch_size}", decode_batch(config, batch_size, torch.device(args.device)))
    return int(not all(falls))


if __name__ == "__main__":
    sys.exit(main())
