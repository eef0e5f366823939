"""`dsv3 data bench`: text into shards and shards into rows, each beside the plain way."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.data import loader, prepare
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.studies.bench import format_result, processor_name, time_interleaved

ROWS, LENGTH = 256, 257  # taken from text and from shards


def run_data_bench(args: prepare.DataBenchConfig) -> None:
    """Measure, print, and write the numbers with their command."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print("\n".join(format_result("megabytes of text a second", found)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["dsv3", *sys.argv[1:]]), "processor": processor_name()}
    write_json(args.out, about | {"workers": args.workers, "rounds": args.rounds} | found)
    print(f"all numbers: {args.out}")


def measure(args: prepare.DataBenchConfig, folder: Path) -> dict:
    """Medians of interleaved rounds, MB/s and rows/s."""
    texts = training_texts(args)
    sources = loader.open_sources(write_texts(texts, folder / "text"), 0, False)
    t = loader.load_or_train_tokenizer(sources, prepare.TINY.vocab_size, tqdm.write)
    tok.save_tokenizer(t, folder / "tokenizer.json")
    plain = lambda: t.encode_batch(texts, add_special_tokens=False)
    ids = lambda: [np.array(e.ids, np.uint16) for e in plain()]
    options = prepare.PrepareConfig(folder / "0", tokenizer=folder, dedup=0.0, workers=args.workers)
    works = {"encode_batch": plain, "encode_batch to arrays": ids}
    for name, threshold in {"prepare": 0.0, "prepare without near-duplicates": 0.8}.items():
        works[name] = lambda x=threshold: write_shards(replace(options, dedup=x), sources, t)
    seconds = time_interleaved(args.rounds, **works)
    size = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: size / s for name, s in seconds.items()}
    best = max(rates["encode_batch"], rates["encode_batch to arrays"])
    return {
        "megabytes": size, "MB_s": rates,
        "ratio": {name: rates[name] / best for name in list(works)[2:]},
        "rows_s": rows_per_second(args, sources, write_shards(options, sources, t), t),
    }  # fmt: skip


def training_texts(args: prepare.DataBenchConfig) -> list[str]:
    """Training documents of the sources in turn, up to so many megabytes."""
    return loader.sample_texts(loader.open_sources(args.data, 0, False), int(args.megabytes * 1e6))


def write_texts(texts: list[str], folder: Path) -> list[str]:
    """A folder with a file each."""
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:06}.txt").write_text(text, encoding="utf-8")
    return [str(folder)]


def write_shards(args: prepare.PrepareConfig, sources: list, t) -> Path:
    """Shards of sources that are open, from the first process started to the last byte."""
    args = replace(args, out=Path(tempfile.mkdtemp(dir=args.out.parent)))
    index = prepare.load_or_create_index(args, None)
    writer = prepare.ShardWriter(
        args, index, sources, prepare.store_tokenizer(args, index, sources)
    )
    writer.write(args.workers, tqdm(disable=True))
    writer.finish()
    return args.out


def rows_per_second(
    args: prepare.DataBenchConfig, sources: list, folder: Path, t
) -> dict[str, float]:
    """Rows a second that a run takes, from text and from shards."""
    makers = {"text": sources, "shards": loader.open_sources([str(folder)], 0, False)}
    works = {}
    for name, own in makers.items():
        stream = loader.PackedDataLoader(own, t, LENGTH, 0)
        works[name] = lambda stream=stream: stream.next_batch(ROWS)
    seconds = time_interleaved(args.rounds, **works)
    return {name: ROWS / s for name, s in seconds.items()}
