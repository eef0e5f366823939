"""`dsv3 export`: a model as a directory for transformers, vLLM, SGLang and lm-eval."""

import os
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro

from dsv3_ref.checkpoints.atomic import TMP, atomic_dir, clear_path, read_json, temp_sibling
from dsv3_ref.checkpoints.hf_config import FP8_CONFIG, check_hf_config, config_like, config_to_hf
from dsv3_ref.checkpoints.huggingface import write_hf_files
from dsv3_ref.checkpoints.hub import check_hub_name, local_dir, upload
from dsv3_ref.checkpoints.layout import CONFIG
from dsv3_ref.checkpoints.native import (
    find_tokenizer_dir,
    hf_tensors,
    newest_whole,
    open_weights,
    resolve_checkpoint_dir,
)
from dsv3_ref.checkpoints.safetensors_files import (
    SHARD_BYTES,
    WrittenTensor,
    write_config,
    write_index,
)
from dsv3_ref.checkpoints.sharded import gather_results
from dsv3_ref.config import Config, UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.tokenizer import check_vocab_size, load_tokenizer
from dsv3_ref.data.tokenizer_settings import load_tokenizer_settings
from dsv3_ref.export.gguf_file import find_differences, write_gguf
from dsv3_ref.export.tokenizer_files import (
    TOKENIZER,
    copy_tokenizer_files,
    exported_chat_template,
    special_token_ids,
    write_own_files,
)
from dsv3_ref.parallel.data_parallel import call_on_ranks
from dsv3_ref.parallel.mesh import init_distributed
from dsv3_ref.training.settings import world_size

MAX_WAIT = timedelta(days=1)  # for the rank that has most to write
OTHER_TOKENIZER = "name a directory with the tokenizer of this model with --like"
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
    shard_bytes: int = SHARD_BYTES
    """bytes of a file of weights before another one starts; each rank holds one at a time"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""


def run_export(args: ExportConfig) -> None:
    """Write the directory and print what it holds; under a launcher, as one of several ranks."""
    with init_distributed("cpu", MAX_WAIT) if world_size() > 1 else nullcontext():
        call_on_ranks(lambda: check_options(args))
        if args.gguf:
            export_gguf(args.gguf, args)
        if args.out:
            write_directory(args.out, args)
        if this_rank()[0] == 0:
            print_result(args)


def print_result(args: ExportConfig) -> None:
    """Print what the directory holds, and upload it."""
    if args.out:
        files = sorted(path.name for path in args.out.iterdir())
        print(f"wrote {args.out}: {', '.join(files)}")
    if args.out and args.push:
        print(f"pushed to {upload(args.out, args.push)}")


class Weights(NamedTuple):
    """The weights that a rank has written, and what they belong to."""

    tensors: list[WrittenTensor]
    fields: dict[str, Any]  # of config.json
    max_seq_len: int


def write_directory(out: Path, args: ExportConfig) -> None:
    """Write a Hugging Face directory; each rank writes its files, the first one the rest.

    Files of weights are written one at a time, from tensors that are read one at a time, so that
    memory is bounded by --shard-bytes whatever the size of the model.
    """
    rank, world = this_rank()
    with ExitStack() as stack:

        def open_folder() -> Path:
            if rank == 0:
                return stack.enter_context(atomic_dir(out))
            return temp_sibling(out.resolve(), TMP)

        folder = call_on_ranks(open_folder)
        own = newest_whole(
            args.model, lambda checkpoint: write_weights(checkpoint, folder, args), args.verify,
            rank, world, call_on_ranks,
        )  # fmt: skip
        written = chain.from_iterable(gather_results(lambda: own.tensors))
        call_on_ranks(lambda: None if rank else write_rest(folder, own, written, args))


def this_rank() -> tuple[int, int]:
    """Return the number of this process and of all processes of this export."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write_weights(checkpoint: Path, folder: Path, args: ExportConfig) -> Weights:
    """Write this rank's files of the weights of one checkpoint."""
    reader = open_weights(checkpoint)
    fields = read_fields(reader.config, args)
    home = find_like(args) or find_tokenizer_dir(args.model)
    if (home / TOKENIZER).is_file():
        check_vocab_size(load_tokenizer(home), reader.config.vocab_size, OTHER_TOKENIZER)
    tensors = write_hf_files(
        folder, hf_tensors(reader), fields, getattr(torch, args.dtype), args.fp8, args.shard_bytes,
        *this_rank(),
    )  # fmt: skip
    return Weights(tensors, fields, reader.config.max_seq_len)


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
    if args.gguf and world_size() > 1:
        raise UserError("--gguf is written by one process: start it without torchrun or srun")
    if args.gguf and args.gguf.exists():
        raise UserError(f"--gguf {args.gguf} exists: choose a new name")
    if args.gguf and not args.gguf.parent.is_dir():
        raise UserError(f"--gguf {args.gguf}: there is no folder {args.gguf.parent}: create it")


def is_empty_dir(path: Path) -> bool:
    """Return whether a path is a directory without contents."""
    return path.is_dir() and not any(path.iterdir())


def export_gguf(path: Path, args: ExportConfig) -> None:
    """Write a GGUF file, which appears when it is complete.

    Print where llama.cpp computes something else.
    """
    home = local_dir(args.like) if args.like else find_tokenizer_dir(args.model)
    tokenizer, settings = load_tokenizer(home), load_tokenizer_settings(home)
    ids, template = special_token_ids(tokenizer, settings), exported_chat_template(settings)
    adds_bos = ChatTemplate(tokenizer, settings).adds_bos
    part = clear_path(path.with_name(f".{path.name}.dsv3-tmp"))

    def write(checkpoint: Path) -> Config:
        reader = open_weights(checkpoint)
        check_vocab_size(tokenizer, reader.config.vocab_size, OTHER_TOKENIZER)
        write_gguf(part, reader, tokenizer, ids, adds_bos, template, args.gguf_type)
        return reader.config

    try:
        config = newest_whole(args.model, write, args.verify)
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"could not write {path} ({e}): choose another place") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {path}")
    for note in find_differences(config):
        print(f"note: {note}")


def read_fields(config: Config, args: ExportConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    dtype = getattr(torch, args.dtype)
    like = find_like(args)
    if like is None:
        fields = config_to_hf(config, dtype)
        return fields | ({"quantization_config": FP8_CONFIG} if args.fp8 else {})
    try:
        return config_like(config, read_like(like), dtype, args.fp8)
    except UserError as e:
        raise UserError(f"--like {like}: {e}: choose a directory of the same kind") from None


def write_rest(
    folder: Path, own: Weights, written: Iterable[WrittenTensor], args: ExportConfig
) -> None:
    """Write index, config, tokenizer, generation settings and model card into a folder."""
    assert args.out is not None, "`folder` becomes this directory"
    like, fields = find_like(args), own.fields
    if like:
        copy_tokenizer_files(like, folder)
    else:
        home = find_tokenizer_dir(args.model)
        fields = fields | write_own_files(home, folder, own.max_seq_len)
    write_config(folder, fields)
    write_index(folder, written)
    (folder / "README.md").write_text(MODEL_CARD.format(name=args.out.name), encoding="utf-8")


def find_like(args: ExportConfig) -> Path | None:
    """Return the directory whose tokenizer and fields are copied, if there is one."""
    return local_dir(args.like) if args.like else find_hf_dir(args.model)


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
