"""Record the expert loads of a model, window by window, on speeches and on Python source.

    python -m dsv3_ref.studies.expert_load --model runs/tiny --out notebooks/results

Chapter 19 places experts by these loads. The files of a source, sorted by name (speeches: by year),
are split into equal parts; the first tokens of each part are a window.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.files import BUILTIN_SOURCES
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.pretrain import expert_loads
from dsv3_ref.training.run_file import git_state

FORWARD_BATCH = 8  # sequences per forward pass


@dataclass(frozen=True)
class ExpertLoadConfig:
    """Record how many tokens each expert of each MoE layer receives."""

    model: Path = Path("runs/tiny")
    """run directory or checkpoint"""
    out: Path = Path("runs")
    """directory of expert_load.json"""
    windows: int = 24
    """number of windows per source"""
    rows: int = 16
    """sequences per window, each of the model's context length"""


def first_tokens(paths: list[str], tokenizer: Tokenizer, rows: int, length: int) -> torch.Tensor:
    """Return the first rows·length tokens of the concatenated files, (rows, length).

    Each file begins with BOS. Raises `UserError` if the files hold fewer tokens.
    """
    bos = tokenizer.token_to_id(tok.BOS)
    if bos is None:
        raise UserError(f"the tokenizer has no {tok.BOS} token: use that of a trained --model")
    ids: list[int] = []
    for path in paths:
        if len(ids) >= rows * length:
            break
        text = Path(path).read_text(encoding="utf-8", errors="ignore")
        ids += [bos, *tokenizer.encode(text, add_special_tokens=False).ids]
    if len(ids) < rows * length:
        raise UserError(
            f"{len(paths)} files hold only {len(ids)} tokens: lower --windows or --rows"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def count_expert_loads(model: Transformer, tokens_bs: torch.Tensor) -> torch.Tensor:
    """Count the tokens that each expert of each MoE layer of the main model receives, (l, e)."""
    loads = [expert_loads(model.hidden_states(rows)[1]) for rows in tokens_bs.split(FORWARD_BATCH)]
    return torch.stack(loads).sum(0)


def record_source(
    model: Transformer, tokenizer: Tokenizer, source: str, args: ExpertLoadConfig
) -> torch.Tensor:
    """Return the expert loads of every window of a source, (windows, l, e)."""
    paths = BUILTIN_SOURCES[source]()
    cuts = [i * len(paths) // args.windows for i in range(args.windows + 1)]
    loads = []
    for start, end in pairwise(cuts):
        tokens = first_tokens(paths[start:end], tokenizer, args.rows, model.config.max_seq_len)
        loads.append(count_expert_loads(model, tokens))
    return torch.stack(loads)


def record_expert_loads(args: ExpertLoadConfig, command: str) -> Path:
    """Write expert_load.json, one window per line, and return its path.

    Raises `UserError` for options that cannot be used.
    """
    if args.windows < 1 or args.rows < 1:
        raise UserError("--windows and --rows must be at least 1")
    model, tokenizer = load(args.model).eval(), tok.load_tokenizer(find_tokenizer_dir(args.model))
    config = model.config
    header = {
        "command": command,
        "commit": git_state()[0],
        "layers": [name for name in moe_layers(model) if not name.startswith("mtp")],
        "n_expert_groups": config.n_expert_groups,
        "n_activated_experts": config.n_activated_experts,
        "tokens_per_window": args.rows * config.max_seq_len,
    }
    sources = []
    for source in BUILTIN_SOURCES:
        load_xle = record_source(model, tokenizer, source, args)
        lines = ",\n".join(json.dumps(load_le.tolist()) for load_le in load_xle)
        sources.append(f'"{source}": [\n{lines}\n]')
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "expert_load.json"
    head, loads = json.dumps(header, indent=1).removesuffix("\n}"), ",\n".join(sources)
    path.write_text(f'{head},\n "tokens_per_expert": {{\n{loads}\n }}\n}}\n', encoding="utf-8")
    print(f"{args.windows} windows of {len(sources)} sources in {path}")
    return path


if __name__ == "__main__":
    try:
        prog = ["python", "-m", "dsv3_ref.studies.expert_load"]
        options = tyro.cli(ExpertLoadConfig, prog=shlex.join(prog))
        record_expert_loads(options, shlex.join([*prog, *sys.argv[1:]]))
    except UserError as error:
        sys.exit(f"error: {error}")
