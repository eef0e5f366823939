"""What does a longer context cost, and what does it find?

    python -m dsv3_ref.studies.long_context --init runs/tiny --out notebooks/results

A tiny model first learns to copy a key within its 256 tokens; two phases of YaRN then take it to
2,048 and 8,192. Needles and losses before, between and after; then the clock: decoding behind
caches of 1K to 128K tokens, and a prompt of 32K. Ten minutes of one core.
"""

import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
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
from dsv3_ref.decode import Decoder
from dsv3_ref.long_context import (
    build_needle,
    extend_config,
    interpolated_decoder,
    log_spaced_bins,
    needle_recall,
    nll_by_position,
    with_config,
)
from dsv3_ref.model import Transformer
from dsv3_ref.studies.align import rounded, stage
from dsv3_ref.training.settings import git_commit

LENGTHS, DEPTHS = [256, 512, 1024, 2048, 4096, 8192], [0.0, 0.5, 1.0]
DECODE, PREFILL = [1024 * 2**i for i in range(8)], [1024 * 2**i for i in range(6)]


@dataclass(frozen=True)
class Study:
    """Extend a tiny model in two phases, and measure."""

    init: Path
    """a run of dsv3 train --config tiny"""
    out: Path = Path("runs/long_study")
    """where long_context.json goes"""
    work: Path = Path("runs/long_study")
    """where the runs go"""
    seed: int = 0


# ── Training ──


def phases(args: Study) -> dict[str, Path]:
    """The model that can copy, then after each phase."""
    fixed = "--seed", args.seed, "--val-sequences", 2, "--save-every", 10_000
    rates = "--lr", 4e-3, "--min-lr", 4e-4, "--final-lr", 4e-4, "--warmup-steps", 10
    plain = "--model.rope-factor", 1, "--model.max-seq-len", 256, "--seq-len", 256
    before = stage(args.work / "before", "extend", "--init", args.init, "--needles", 1, "--steps",
                   100, "--global-batch-size", 8, "--start-batch-size", 8,
                   *plain, *rates, *fixed)  # fmt: skip
    between = stage(args.work / "32k", "extend", "--init", before, "--phase", "32k",
                    "--needles", 0.5, *fixed)  # fmt: skip
    after = stage(args.work / "128k", "extend", "--init", between, "--phase", "128k",
                  "--needles", 0.5, *fixed)  # fmt: skip
    return {"before": before, "between": between, "after": after}


# ── Needles and losses ──


def haystacks(tokens: list[int], length: int, rows: int) -> list[list[int]]:
    """Rows of held-out text."""
    starts = np.linspace(0, len(tokens) - length - 1, rows).astype(int)
    return [tokens[i : i + length] for i in starts.tolist()]


def needles(model: Transformer, tokens: list[int], n, seed: int) -> list[list[float]]:
    """Mean probability of the key, by depth and length; 8 texts at 256, one from 2,048 on."""
    rng, size, out = np.random.default_rng(seed), len(n.sentence(0)) + len(n.prefix), []
    for length in LENGTHS:
        rows = min(8, max(1, 2048 // length))
        d, column = interpolated_decoder(model, rows, length), []
        for depth in DEPTHS:
            hay, keys = haystacks(tokens, length, rows), rng.integers(10, size=rows).tolist()
            at = round(depth * (length - size))
            column.append(needle_recall(d, hay, n, keys, at, [length]).mean().item())
        out.append(column)
    return np.array(out).T.tolist()


def course(model: Transformer, rows_bs, n_bytes, step: float = 1.0) -> list[float]:
    """Bits a byte in bins of positions."""
    length = rows_bs.shape[1] - 1
    nll_bs = nll_by_position(interpolated_decoder(model, len(rows_bs), length, step), rows_bs)
    bytes_bs, edges = n_bytes[rows_bs[:, 1:]], log_spaced_bins(length)
    part = lambda x, a, b: x[:, a:b].sum().item()
    return [part(nll_bs, a, b) / math.log(2) / max(1, part(bytes_bs, a, b))
            for a, b in zip(edges, edges[1:])]  # fmt: skip


def reading(args: Study, found: dict[str, Path]) -> dict:
    """Every model on held-out speeches, as it is and read otherwise."""
    t = load_tokenizer(args.init)
    encode = lambda text: t.encode(text, add_special_tokens=False).ids
    texts, n = open_sources(["sotu"], 0, False)[0].val_texts, build_needle(encode)
    tokens = [i for text in texts for i in encode(text)]
    before, between, after = (native.load(found[k]) for k in ("before", "between", "after"))
    stretched = with_config(before, extend_config(before.config))
    rows_bs = val_windows(texts, t, LENGTHS[-1])[0][:2]
    n_bytes, loss = torch.tensor(byte_lengths(t)), {}
    for name, model, step in (
        ("plain", before, 1.0),
        ("interpolated", before, stretched.config.rope_factor),
        ("YaRN, untrained", stretched, 1.0),
        ("after 2,048", between, 1.0),
        ("after 8,192", after, 1.0),
    ):
        loss[name] = course(model, rows_bs, n_bytes, step)
        print(name, [round(x, 2) for x in loss[name][::3]], flush=True)
    heat = {}
    for name, model in (("before", before), ("before, YaRN", stretched),
                        ("after 2,048", between), ("after 8,192", after)):  # fmt: skip
        heat[name] = needles(model, tokens, n, args.seed)
        print(name, np.array(heat[name]).round(2), flush=True)
    edges = log_spaced_bins(LENGTHS[-1])
    return {"lengths": LENGTHS, "depths": DEPTHS, "needles": heat, "edges": edges, "loss": loss,
            "loss_rows": len(rows_bs)}  # fmt: skip


# ── The clock ──


def seconds(call, times: int) -> float:
    """The shortest processor time of several calls."""
    took = []
    for _ in range(times):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return min(took)


@torch.inference_mode()
def clock(model: Transformer, seed: int) -> dict:
    """ms a token behind filled caches, and s to read a prompt up to each length."""
    torch.manual_seed(seed)
    d = Decoder(model, 1, DECODE[-1] + 1)
    for layer in d.layers:
        layer.kv_btx.normal_()
    step = lambda n: d.logits(d.hidden_states([n], 1))
    decode = {n: 1e3 * seconds(partial(step, n), 12) for n in DECODE}
    print("ms a token", decode, flush=True)
    d.token_bt[:] = torch.randint(model.config.vocab_size, d.token_bt.shape)
    prefill, read, start = {}, 0, time.process_time()
    for n in PREFILL:
        d.hidden_states([read] if read else [0], n - read)
        prefill[n], read = time.process_time() - start, n
    print("s to read", prefill, flush=True)
    return {"decode_ms": decode, "prefill_s": prefill, "cache_bytes": model.config.n_layers
            * d.layers[0].kv_btx.nbytes}  # fmt: skip


# ── The study ──


def study(args: Study) -> None:
    """Train, look, measure, and a small JSON of it all."""
    start, found = time.process_time(), phases(args)
    ends = {k: atomic.read_json(run / "summary.json") for k, run in found.items()}
    after = native.load(found["after"])
    one = Transformer(replace(after.config, n_mtp_layers=0))
    one.load_state_dict(after.state_dict(), strict=False)
    result = {
        "command": shlex.join(["python", "-m", "dsv3_ref.studies.long_context", *sys.argv[1:]]),
        "commit": git_commit(), "seed": args.seed,
        "runs": {k: {x: end[x] for x in ("tokens", "seconds", "val_bpb")}
                 for k, end in ends.items()},
        **reading(args, found), **clock(one, args.seed),
    }  # fmt: skip
    result["cpu_seconds"] = time.process_time() - start  # of what this process did not find done
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "long_context.json", rounded(result))


if __name__ == "__main__":
    try:
        study(tyro.cli(Study, prog="python -m dsv3_ref.studies.long_context"))
    except UserError as e:
        sys.exit(f"error: {e}")
