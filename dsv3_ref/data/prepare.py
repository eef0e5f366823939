"""`dsv3 data prepare`: tokenize text once, into shards for training.

The format is described in `shards`; `shard_writer` writes it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from dsv3_ref.checkpoints.atomic import LOCK, lock_dir, remove_new_files, write_json
from dsv3_ref.checkpoints.manifest import available_cores, file_sha256
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data import files, shards
from dsv3_ref.data.dedup import SHINGLES, import_rensa
from dsv3_ref.data.loader import load_or_train_tokenizer
from dsv3_ref.data.progress import ProgressBar
from dsv3_ref.data.shard_writer import SPLITS, ShardWriter, clean_up
from dsv3_ref.data.sources import Source, TextSource
from dsv3_ref.data.tokenizer import load_tokenizer, save_tokenizer, vocab_size


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize text into shards, once, for `dsv3 train --data FOLDER`.

    If the command is killed, run it again: it continues and produces the same bytes.
    """

    out: Path
    """folder of the shards"""
    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources with weights, as for `dsv3 train`"""
    tokenizer: Path | None = None
    """folder with a tokenizer.json; default: train one on the data"""
    vocab_size: int = 0
    """vocabulary size of a tokenizer trained on the data; 0: that of the config tiny"""
    streaming: bool = False
    """stream files from disk instead of loading them into memory"""
    dedup: float = 0.8
    """leave out documents whose Jaccard similarity (of runs of 5 words, or of 5 characters where
    words are not separated by spaces) with an earlier one of any source is at least this; held-out
    documents come first. 0: keep all"""
    shard_tokens: int = 1 << 26
    """tokens per shard; a shard ends with the document that reaches this number"""
    workers: int = available_cores()
    """processes that tokenize; default: one per available core"""


# ── The commands ──


def prepare_shards(args: PrepareConfig, record: dict[str, Any] | None = None) -> None:
    """Write the shards that are missing.

    record: what repeats the command, stored in the index.
    """
    validate_prepare_args(args)
    with lock_shards(args.out):
        index = load_or_create_index(args, record)
        if index["complete"]:
            shards.Shards(args.out)
            clean_up(args.out)
            print(f"{args.out} is finished: {summary(index)}")
            return
        sources = open_text_sources(args)
        writer = ShardWriter(args.out, index, sources, store_tokenizer(args, index, sources))
        bytes_done = sum(s["text_bytes"] for s in index["shards"])
        if index["shards"]:
            print(f"continuing after {len(index['shards'])} shards")
        with ProgressBar(initial=bytes_done, unit="B", unit_scale=True, desc=str(args.out)) as bar:
            writer.write(args.workers, bar)
        writer.finish()
    print(f"{args.out}: {summary(index)}")
    print("\n".join(near_duplicate_lines(index)))


def validate_prepare_args(args: PrepareConfig) -> None:
    """Raise a `UserError` for options that cannot be used."""
    rules = [
        (len(args.data) > 0, "--data needs at least one source"),
        (0 <= args.dedup <= 1, "--dedup is a fraction from 0 to 1; 0 keeps all"),
        (args.shard_tokens >= 1, "--shard-tokens must be at least 1"),
        (args.workers >= 1, "--workers must be at least 1"),
        (args.vocab_size >= 0, "--vocab-size must be at least 0"),
        (
            not (args.tokenizer and args.vocab_size),
            "--tokenizer and --vocab-size exclude each other: a tokenizer has its own size",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def open_text_sources(args: PrepareConfig) -> list[TextSource]:
    """Open the sources; raise a `UserError` for one that holds shards already."""
    specs = [files.parse_source_spec(s) for s in args.data]
    for name, _ in specs:
        if shards.is_shards(name):
            raise UserError(f"{name} holds shards already: dsv3 train --data {name}")
    return [
        TextSource(name, weight, files.open_source(name, args.streaming), seed=0)
        for name, weight in specs
    ]


# ── Settings of a folder of shards ──


def index_settings(args: PrepareConfig) -> dict[str, Any]:
    """Return everything that determines the bytes of the shards, with the hashes of the files."""
    pairs = [files.parse_source_spec(s) for s in args.data]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest() if tokenizer else None
    if args.dedup:
        import_rensa()
    return {
        "data": [list(pair) for pair in pairs],
        "files": [files.content_digest(name) for name, _ in pairs],
        "tokenizer": digest,
        "vocab_size": 0 if tokenizer else args.vocab_size or TINY.vocab_size,
        "streaming": args.streaming,
        "dedup": args.dedup,
        "shard_tokens": args.shard_tokens,
        "rensa": version("rensa") if args.dedup else None,
        "shingles": SHINGLES if args.dedup else None,
    }


def check_settings_match(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a `UserError` if the folder was begun with other settings."""
    remedy = "give another --out"
    for name, new in now.items():
        old = before.get(name)
        if old == new:
            continue
        if name == "files":
            raise UserError(f"files of its sources have changed since {out} was begun: {remedy}")
        if name in ("tokenizer", "rensa", "shingles"):
            raise UserError(f"{out} was begun with another {name}: {remedy}")
        flag = f"--{name.replace('_', '-')}"
        raise UserError(
            f"{out} was begun with {flag} {format_option(old)}, not {format_option(new)}: {remedy}"
        )


def format_option(value: Any) -> str:
    """Return a setting in the notation of the command line."""
    if isinstance(value, list):
        return " ".join(f"{name}={weight:g}" for name, weight in value)
    return str(value)


# ── The folder ──


@contextmanager
def lock_shards(out: Path) -> Iterator[None]:
    """Create the folder and lock it until the end of the `with`.

    If that fails before the first shard is written, remove what it has added.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; shards are a folder")
    with remove_new_files(out, unless=has_shards), lock_dir(out) as free:
        if not free:
            raise UserError(f"another process is preparing {out}")
        yield


def has_shards(folder: Path) -> bool:
    """Return whether a folder has a shard, which a later command continues after."""
    return any(folder.glob("shard-*"))


def load_or_create_index(args: PrepareConfig, record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the index to continue with, or that of a new folder."""
    now = index_settings(args)
    if shards.is_shards(str(args.out)):
        index = shards.read_index(args.out)
        check_settings_match(args.out, index["settings"], now)
        return index
    if foreign := {p.name for p in args.out.iterdir()} - {"index.part", LOCK}:
        raise UserError(f"{args.out} holds other files, such as {min(foreign)}: give another --out")
    index = {
        "format": shards.FORMAT,
        "complete": False,
        "run": record,
        "settings": now,
        "dtype": None,
        "vocab_size": None,
        "tokenizer": None,
        "shards": [],
        "sources": [],
    }
    write_json(args.out / shards.INDEX, index)
    return index


def store_tokenizer(
    args: PrepareConfig, index: dict[str, Any], sources: Sequence[Source]
) -> Tokenizer:
    """Return the folder's tokenizer; if it has none, store --tokenizer or train one first."""
    path = args.out / shards.TOKENIZER
    if index["tokenizer"] is None:
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            size = index["settings"]["vocab_size"]
            tokenizer = load_or_train_tokenizer(sources, size, tqdm.write)
        save_tokenizer(tokenizer, path)
        size = vocab_size(load_tokenizer(path))
        index |= {"tokenizer": file_sha256(path), "vocab_size": size}
        index["dtype"] = shards.dtype_for(size).str
        write_json(args.out / shards.INDEX, index)
    if not path.is_file() or file_sha256(path) != index["tokenizer"]:
        raise shards.damaged_error(path, "it is missing or has changed")
    return load_tokenizer(path)


# ── Messages ──


def summary(index: dict[str, Any]) -> str:
    """Return one line: documents, megabytes, tokens and shards."""
    parts = [source[split] for source, split in product(index["sources"], SPLITS)]
    total = {k: sum(p[k] for p in parts) for k in ("documents", "tokens", "text_bytes")}
    return (
        f"{total['documents']:,} documents of {total['text_bytes'] / 1e6:,.1f} MB as "
        f"{total['tokens']:,} tokens ({np.dtype(index['dtype'])}) in {len(index['shards'])} shards"
    )


def near_duplicate_lines(index: dict[str, Any]) -> list[str]:
    """Return a line per source with the near-duplicates left out, by the source they duplicate."""
    if not index["settings"]["dedup"]:
        return ["near-duplicates were not searched for"]
    lines = []
    for source in index["sources"]:
        near = Counter(source["train"]["near_duplicates_of"])
        near.update(source["val"]["near_duplicates_of"])
        if near:
            origins = ", ".join(f"{n} of {name}" for name, n in near.items())
            lines.append(f"{source['name']}: {near.total()} near-duplicates left out ({origins})")
    return lines or ["no near-duplicates"]
