"""Sources of documents: shuffled per epoch, resumable, partly held out for validation."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.atomic import describe_json
from dsv3_ref.config import UserError
from dsv3_ref.data import files, shards
from dsv3_ref.data.fingerprint import fingerprint_dataset, fingerprint_files
from dsv3_ref.data.hub import hub_errors
from dsv3_ref.data.permutation import permuted_indices

VAL_EVERY, VAL_MAX = 20, 1000  # one document in 20 is held out, at most 1000
VAL_STREAM = 64  # of a stream the first 64 documents are held out
READ_DOCUMENTS = 256  # documents read at a time in file order

Document = str | np.ndarray  # text, or its tokens


class Source(ABC):
    """An endless stream of documents; epoch, index and tokens_drawn are its position.

    `train_data` and `val_data` are sequences of documents, or streams, which have no length.
    """

    def __init__(self, name: str, weight: float, seed: int):
        self.name, self.weight = name, weight
        self.seed = seed
        self.epoch = 0
        self.index = 0  # documents taken in this epoch
        self.tokens_drawn = 0  # in all epochs
        self.is_stream = False
        self.part, self.parts = 0, 1  # of the documents of each epoch
        self.train_data: Any = None
        self.val_data: Any = None

    @abstractmethod
    def read(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Yield the documents of rows of `train_data` or `val_data`."""

    @abstractmethod
    def to_text(self, document: Any) -> str:
        """Return the text of a document."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return names, sizes and hashes that tell whether the documents are the same."""

    def documents(self, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """Yield this part's documents of an epoch from number `start`; streams are unshuffled."""
        first = start * self.parts + self.part
        if self.is_stream:
            yield from self.read(islice(self.train_data.skip(first), 0, None, self.parts))
            return
        order = permuted_indices(len(self.train_data), [seed, epoch], first, self.parts)
        yield from self.read(self.train_data[i] for i in order)

    def train_documents(self) -> Iterator[Any]:
        """Yield training documents endlessly; `index` counts those of this epoch."""
        while True:
            start, is_empty = self.index, True
            for document in self.documents(self.seed, self.epoch, start):
                self.index += 1
                if not is_blank(document):
                    is_empty = False
                    yield document
            if start == 0 and is_empty:
                raise self.no_text_error("train")
            self.epoch += 1
            self.index = 0

    def take_part(self, part: int, parts: int) -> Self:
        """Return a source of every `parts`-th training document of each epoch, from `part` on."""
        if not self.is_stream and len(self.train_data) < parts:
            raise UserError(
                f"--data-streams {parts} is more than {self.name} has training documents "
                f"({len(self.train_data)}): lower it"
            )
        if parts == 1:
            return self
        own = copy(self)
        own.part, own.parts = part, parts
        return own

    @property
    def document_number(self) -> int:
        """The number, from 1, of the document taken last among all of this epoch."""
        return (self.index - 1) * self.parts + self.part + 1

    @cached_property
    def val_texts(self) -> list[str]:
        """The held-out documents, which are never trained on."""
        texts = [self.to_text(d) for d in self.read(self.val_data) if not is_blank(d)]
        if not texts:
            raise self.no_text_error("val")
        return texts

    def no_text_error(self, split: str) -> UserError:
        """Return the error for a split ("train" or "val") without text."""
        if split == "val":
            return UserError(f"the held-out documents of {self.name} are empty")
        part = f"the first {VAL_STREAM} documents are" if self.is_stream else "a part is"
        return UserError(f"{self.name} has no text to train on ({part} held out for validation)")


class TextSource(Source):
    """A source of texts: a `datasets.Dataset`, or an `IterableDataset`, which is a stream.

    hold_out: whether a part is held out; otherwise training and validation data are all documents.
    """

    def __init__(self, name: str, weight: float, data: Any, seed: int, hold_out: bool = True):
        super().__init__(files.shown(name), weight, seed)
        self.spec, self.data = name, data
        self.is_stream = not hasattr(data, "__len__")
        if not hold_out:
            self.val_data = self.train_data = data
        elif self.is_stream:
            self.val_data, self.train_data = data.take(VAL_STREAM), data.skip(VAL_STREAM)
        else:
            self.val_data, self.train_data = train_val_split(name, data)

    def read(self, rows: Iterable[Any]) -> Iterator[str]:
        """Yield the texts of rows; null is an empty text."""
        with hub_errors(self.name):
            for row in rows:
                text = row["text"]
                if not isinstance(text, str | None):
                    kind = describe_json(text)
                    raise UserError(f"the column 'text' of {self.name} holds {kind}, not a string")
                yield text or ""

    def fingerprint(self) -> dict[str, Any]:
        """Return a hash per block of documents; of a stream only the names and sizes of files."""
        if self.is_stream:
            return fingerprint_files(self.name, files.source_files(self.spec))
        return fingerprint_dataset(self.name, self.data)

    def iter_split(self, split: str, start: int) -> Iterator[str]:
        """Yield the documents of a split ("train" or "val") from the `start`-th, unshuffled."""
        rows = (self.train_data if split == "train" else self.val_data).skip(start)
        for batch in rows.iter(READ_DOCUMENTS):  # ten times as fast as row by row
            yield from self.read({"text": text} for text in batch["text"])

    def to_text(self, document: str) -> str:
        """Return the document, which is its own text."""
        return document


class TokenizedSource(Source):
    """A source of tokenized documents: the `part`-th of a folder of shards."""

    def __init__(self, data: shards.Shards, part: int, share: float, seed: int):
        about = data.sources[part]
        super().__init__(about["name"], about["weight"] * share, seed)
        self.data, self.number = data, part
        self.val_data, self.train_data = data.documents(part, "val"), data.documents(part, "train")

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksums of the shards of this part."""
        return {"name": self.name, "shards": self.data.part_checksums(self.number)}

    def read(self, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the rows, which are documents."""
        yield from rows

    def to_text(self, document: np.ndarray) -> str:
        """Return the text of token ids."""
        return self.data.tokenizer.decode(document.tolist())


def train_val_split(name: str, data: Any) -> tuple[Any, Any]:
    """Hold out a random twentieth of a dataset, the same for every seed: (validation, training)."""
    if len(data) < 2:
        raise UserError(
            f"{name} is one document, and one must be held out for validation: "
            "give a folder of files, or a file with blank lines between documents"
        )
    order = list(range(len(data)))
    random.Random(0).shuffle(order)
    n = min(VAL_MAX, max(1, len(order) // VAL_EVERY))
    return data.select(order[:n]), data.select(sorted(order[n:]))


def is_blank(document: Document) -> bool:
    """Return whether a document holds nothing to learn from."""
    return not (document.strip() if isinstance(document, str) else len(document))


# ── Opening ──


def open_sources(
    specs: Sequence[str], seed: int, streaming: bool, hold_out: bool = True
) -> list[Source]:
    """Return a `Source` for each `name` or `name=weight`; a folder of shards has several.

    Names are those of `files.open_source`. hold_out: of `TextSource`; shards keep what was held out
    when they were prepared.
    """
    sources: list[Source] = []
    for name, weight in map(files.parse_source_spec, specs):
        path = files.existing_path(name)
        if path is None or not shards.is_shards(path):
            data = files.open_source(name, streaming)
            sources.append(TextSource(name, weight, data, seed + 1000 * len(sources), hold_out))
            continue
        folder = shards.Shards(Path(path))
        share = weight / sum(s["weight"] for s in folder.sources)
        for part in range(len(folder.sources)):
            sources.append(TokenizedSource(folder, part, share, seed + 1000 * len(sources)))
    return sources


def stored_tokenizer(sources: Sequence[Source]) -> Tokenizer | None:
    """Return the tokenizer of the tokenized sources; None if there are none."""
    tokenizers = {
        s.data.folder: s.data.tokenizer for s in sources if isinstance(s, TokenizedSource)
    }
    if len({tokenizer.to_str() for tokenizer in tokenizers.values()}) > 1:
        raise UserError(
            f"{' and '.join(map(str, tokenizers))} have different tokenizers: prepare them with one"
        )
    return next(iter(tokenizers.values()), None)
