"""`dsv3 explain`: a page that contains a small model and shows what it does with each token."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.atomic import replace_text
from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import (
    BOS,
    EOS,
    check_document_tokens,
    load_tokenizer,
    new_tokenizer,
)
from dsv3_ref.viz.explainer import explainer


@dataclass(frozen=True)
class ExplainConfig:
    """Write an HTML file with a small model inside: type a text and follow its tokens."""

    run: Annotated[Path, tyro.conf.Positional]
    """a run, a checkpoint or a Hugging Face directory of a small model"""
    out: Path = Path("explainer.html")
    """the file to write"""
    prompts: tuple[str, ...] = (
        "My fellow Americans,",
        "The state of the Union is",
        "    def __init__(self, ",
    )
    """texts to begin with, offered as buttons"""


def run_explain(args: ExplainConfig) -> None:
    """Write the page; print its size and where it is."""
    if not args.prompts:
        raise UserError("--prompts needs at least one text")
    model = load(args.run, device="cpu")
    tokenizer = load_tokenizer(find_tokenizer_dir(args.run))
    check_document_tokens(tokenizer, needs_fim=False)
    check_splits(tokenizer)
    ids = tokenizer.get_vocab()
    html = explainer(model, tokenizer, ids[BOS], ids[EOS], args.prompts)
    replace_text(args.out, html)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def check_splits(tokenizer: Tokenizer) -> None:
    """Raise a `UserError` unless the tokenizer splits text as DeepSeek-V3's does."""
    ours, theirs = (json.loads(t.to_str()) for t in (new_tokenizer(), tokenizer))
    names = "normalizer", "pre_tokenizer"
    if any(ours[name] != theirs[name] for name in names) or theirs["model"]["type"] != "BPE":
        raise UserError(
            "the page splits text as DeepSeek-V3's tokenizer does, and this model's tokenizer "
            "splits it differently: train one with `dsv3 train`"
        )
