"""`dsv3 export`: a model as a directory for transformers, vLLM, SGLang and lm-eval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from dsv3_ref.checkpoints.atomic import atomic_dir, read_json
from dsv3_ref.checkpoints.hf_config import FP8_CONFIG, check_hf_config, config_like, config_to_hf
from dsv3_ref.checkpoints.huggingface import write_hf
from dsv3_ref.checkpoints.hub import check_hub_name, local_dir, upload
from dsv3_ref.checkpoints.layout import CONFIG
from dsv3_ref.checkpoints.native import find_tokenizer_dir, load, resolve_checkpoint_dir
from dsv3_ref.config import UserError
from dsv3_ref.export.tokenizer_files import copy_tokenizer_files, write_own_files
from dsv3_ref.model import Transformer

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

A model of the DeepSeek-V3 family, exported by `dsv3 export`.

```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}")
```
"""


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a Hugging Face directory, complete for transformers, vLLM and SGLang."""

    model: tyro.conf.Positional[Path]
    """directory of a run, of one of its checkpoints, or of a model in Hugging Face format"""
    out: tyro.conf.Positional[Path]
    """directory to write; it must be new or empty"""
    like: Path | None = None
    """Hugging Face directory, or model of the hub (owner/name), whose tokenizer, chat template,
    generation settings and further fields of config.json are copied; by default the model itself,
    if it is one"""
    fp8: bool = False
    """quantize the matrices of attention and FFN to FP8 in blocks of 128 × 128"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the other weights"""
    push: str = ""
    """upload the directory to this model repository of the Hugging Face Hub (owner/name), which is
    created as a private one unless it exists"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""


def run_export(args: ExportConfig) -> None:
    """Write the directory and print what it holds."""
    if args.push:
        check_hub_name(args.push)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} is not an empty directory: choose a new name")
    model = load(args.model, verify=args.verify)
    with atomic_dir(args.out) as folder:
        write_export(folder, model, args)
    files = sorted(path.name for path in args.out.iterdir())
    print(f"wrote {args.out}: {', '.join(files)}")
    if args.push:
        print(f"pushed to {upload(args.out, args.push)}")


def write_export(folder: Path, model: Transformer, args: ExportConfig) -> None:
    """Write weights, config, tokenizer, generation settings and model card into a folder."""
    dtype = getattr(torch, args.dtype)
    like = local_dir(args.like) if args.like else find_hf_dir(args.model)
    if like:
        values = read_like(like)
        try:
            fields = config_like(model.config, values, dtype, args.fp8)
        except UserError as e:
            raise UserError(f"--like {like}: {e}: choose a directory of the same kind") from None
        copy_tokenizer_files(like, folder)
    else:
        fields = config_to_hf(model.config, dtype)
        fields |= {"quantization_config": FP8_CONFIG} if args.fp8 else {}
        fields |= write_own_files(find_tokenizer_dir(args.model), folder, model.config.max_seq_len)
    write_hf(folder, model, fields, dtype, args.fp8)
    (folder / "README.md").write_text(MODEL_CARD.format(name=args.out.name), encoding="utf-8")


def find_hf_dir(model: Path) -> Path | None:
    """Return the directory of a model if it is in Hugging Face format."""
    folder = resolve_checkpoint_dir(model)
    return folder if "model_type" in read_json(folder / CONFIG) else None


def read_like(folder: Path) -> dict[str, Any]:
    """Return the config.json of `--like`; raise a `UserError` if it is not of the family."""
    if not folder.is_dir():
        raise UserError(f"--like {folder} is not a directory: check the path")
    values = read_json(folder / CONFIG)
    if "model_type" not in values:
        raise UserError(f"--like {folder} is not in Hugging Face format: leave the option out")
    try:
        check_hf_config(values)
    except UserError as e:
        raise UserError(f"--like {folder}: {e}") from None
    return values
