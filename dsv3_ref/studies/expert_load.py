"""What a model's gates choose: loads of its experts, window by window, on speeches and on source.

    python -m dsv3_ref.studies.expert_load --model runs/tiny --out notebooks/results

Chapter 19 places experts by these loads. A source is cut into parts of equally many files, in the
order of their names (speeches: by year), and the first tokens of each part are a window.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.loader import BUILTIN_SOURCES
from dsv3_ref.eplb import layer_loads
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.training.settings import git_commit

BATCH = 8  # rows of a forward pass


@dataclass(frozen=True)
class Routing:
    """Record the loads of every expert."""

    model: Path = Path("runs/tiny")
    """a run, or one of its checkpoints"""
    out: Path = Path("runs")
    """where routing.json goes"""
    windows: int = 24
    """of each source"""
    rows: int = 16
    """of a window, each as long as the model reads"""


def check(args: Routing) -> None:
    """Raise a `UserError` for options that cannot be used."""
    if args.windows < 1 or args.rows < 1:
        raise UserError("--windows and --rows must be at least 1")


def window(paths: list[str], t: Tokenizer, rows: int, length: int) -> torch.Tensor:
    """The first rows·length tokens of these files end to end, (rows, length)."""
    bos, ids = t.token_to_id(tok.BOS), []
    for path in paths:
        if len(ids) >= rows * length:
            break
        text = Path(path).read_text(encoding="utf-8", errors="ignore")
        ids += [bos, *t.encode(text, add_special_tokens=False).ids]
    if len(ids) < rows * length:
        raise UserError(f"{len(paths)} files hold only {len(ids)} tokens: ask for fewer --windows")
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def loads(model: Transformer, tokens_bs: torch.Tensor) -> torch.Tensor:
    """Tokens that each expert of each MoE layer of the main model received, (l, e)."""
    return sum(layer_loads(model.hidden_states(rows)[1]) for rows in tokens_bs.split(BATCH))


def course(model: Transformer, t: Tokenizer, source: str, args: Routing) -> torch.Tensor:
    """The loads of every window of a source, (windows, l, e)."""
    paths, c = BUILTIN_SOURCES[source](), model.config
    cuts = [i * len(paths) // args.windows for i in range(args.windows + 1)]
    parts = (paths[a:b] for a, b in zip(cuts, cuts[1:]))
    size = args.rows, c.max_seq_len
    return torch.stack([loads(model, window(part, t, *size)) for part in parts])


def record(args: Routing, command: str) -> Path:
    """A small JSON: a window a line."""
    check(args)
    model, t = load(args.model).eval(), tok.load_tokenizer(find_tokenizer_dir(args.model))
    c, names = model.config, [n for n in moe_layers(model) if not n.startswith("mtp")]
    head = {"command": command, "commit": git_commit(), "layers": names, "groups": c.n_expert_groups,
            "chosen": c.n_activated_experts, "tokens": args.rows * c.max_seq_len}  # fmt: skip
    lines = {}
    for source in BUILTIN_SOURCES:
        load_xle = course(model, t, source, args)
        lines[source] = ",\n".join(json.dumps(load_le.tolist()) for load_le in load_xle)
    found = ",\n".join(f'"{name}": [\n{text}\n]' for name, text in lines.items())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "routing.json"
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "load": {{\n{found}\n }}\n}}\n')
    print(f"{args.windows} windows of {len(lines)} sources in {path}")
    return path


if __name__ == "__main__":
    try:
        prog = ["python", "-m", "dsv3_ref.studies.expert_load"]
        record(tyro.cli(Routing, prog=shlex.join(prog)), shlex.join([*prog, *sys.argv[1:]]))
    except UserError as e:
        sys.exit(f"error: {e}")
