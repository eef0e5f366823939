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
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.data.tokenizer_settings import load_tokenizer_settings
from dsv3_ref.export.gguf_file import find_differences, write_gguf
from dsv3_ref.export.tokenizer_files import (
    copy_tokenizer_files,
    exported_chat_template,
    special_token_ids,
    write_own_files,
)
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
    """Write a model as a Hugging Face directory, complete for transformers, vLLM and SGLang.

    With --gguf, write a file for llama.cpp.
    """

    model: tyro.conf.Positional[Path]
    """directory of a run, of one of its checkpoints, or of a model in Hugging Face format"""
    out: tyro.conf.Positional[Path | None] = None
    """directory to write; it must be new or empty"""
    like: Path | None = None
    """Hugging Face directory, or model of the hub (owner/name), whose tokenizer, chat template,
    generation settings and further fields of config.json are copied; by default the model itself,
    if it is one"""
    fp8: bool = False
    """quantize the matrices of attention and FFN to FP8 in blocks of 128 × 128"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the other weights"""
    gguf: Path | None = None
    """file to write for llama.cpp, instead of a directory or besides; needs the package gguf"""
    gguf_type: Literal["bf16", "f16", "q8_0"] = "bf16"
    """how the matrices of that file are stored"""
    push: str = ""
    """upload the directory to this model repository of the Hugging Face Hub (owner/name), which is
    created as a private one unless it exists"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""


def run_export(args: ExportConfig) -> None:
    """Write the directory and print what it holds."""
    check_options(args)
    model = load(args.model, verify=args.verify)
    if args.gguf:
        export_gguf(args.gguf, model, args)
    if args.out:
        with atomic_dir(args.out) as folder:
            write_export(folder, args.out.name, model, args)
        files = sorted(path.name for path in args.out.iterdir())
        print(f"wrote {args.out}: {', '.join(files)}")
    if args.out and args.push:
        print(f"pushed to {upload(args.out, args.push)}")


def check_options(args: ExportConfig) -> None:
    """Raise a `UserError` if there is nothing to write, or if something is in its place."""
    if not (args.out or args.gguf):
        raise UserError("nothing to write: name a directory, or a file with --gguf")
    if args.push and not args.out:
        raise UserError("--push uploads a directory: name the one to write")
    if args.push:
        check_hub_name(args.push)
    if args.out and args.out.exists() and not is_empty_dir(args.out):
        raise UserError(f"{args.out} is not an empty directory: choose a new name")
    if args.gguf and args.gguf.exists():
        raise UserError(f"--gguf {args.gguf} exists: choose a new name")
    if args.gguf and not args.gguf.parent.is_dir():
        raise UserError(f"--gguf {args.gguf}: there is no folder {args.gguf.parent}: create it")


def is_empty_dir(path: Path) -> bool:
    """Return whether a path is a directory without contents."""
    return path.is_dir() and not any(path.iterdir())


def export_gguf(path: Path, model: Transformer, args: ExportConfig) -> None:
    """Write a GGUF file and print where llama.cpp computes something else."""
    home = local_dir(args.like) if args.like else find_tokenizer_dir(args.model)
    tokenizer, settings = load_tokenizer(home), load_tokenizer_settings(home)
    ids, template = special_token_ids(tokenizer, settings), exported_chat_template(settings)
    adds_bos = ChatTemplate(tokenizer, settings).adds_bos
    write_gguf(path, model, tokenizer, ids, adds_bos, template, args.gguf_type)
    print(f"wrote {path}")
    for note in find_differences(model.config):
        print(f"note: {note}")


def write_export(folder: Path, name: str, model: Transformer, args: ExportConfig) -> None:
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
    (folder / "README.md").write_text(MODEL_CARD.format(name=name), encoding="utf-8")


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
