"""Tokenized documents on disk, as `dsv3 data prepare` leaves them, read through memory maps.

A folder of shards holds

- `index.json`: `dtype` and `vocab_size` of the tokens, the tokenizer's sha256, `settings` and
  `command`; for each shard its source, split (train or val), documents, tokens, bytes and sha256;
  for each source its weight, documents, tokens and what was left out; `complete` once all is there;
- `tokenizer.json`: of these tokens;
- `shard-00000.bin`: tokens, little-endian, one document after another and nothing between;
- `shard-00000.npy`: where each document begins, and the end: documents + 1 numbers, uint64.

A shard belongs to one source and one split. A document that was blank or much like an earlier one
keeps its place and has no tokens, so that places, and with them the order of training, are those of
the texts. Begin and end, fill-in-the-middle and line breaks are put in when rows are made.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from dsv3_ref.config import UserError

INDEX, TOKENIZER, FORMAT = "index.json", "tokenizer.json", 1
OFFSET = np.dtype("<u8")


def dtype_for(vocab_size: int) -> np.dtype:
    """Two bytes a token where they do."""
    return np.dtype("<u2" if vocab_size < 65_536 else "<u4")


def is_shards(name: str) -> bool:
    """Whether this is a folder of shards, finished or not."""
    return (Path(name) / INDEX).is_file()


def read_index(folder: Path) -> dict:
    """What index.json says."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise UserError(f"{path} is of format {index['format']}, not {FORMAT}")
        np.dtype(index["dtype"] or "<u2")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {INDEX}: it is no folder of shards") from None
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    return index


def file_sha256(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── Reading ──


class Documents:
    """The documents of one source and split: a sequence of arrays of tokens."""

    def __init__(self, folder: Path, shards: list[dict], dtype: str, vocab_size: int):
        self.folder, self.shards, self.dtype, self.vocab_size = folder, shards, dtype, vocab_size
        self.ends = list(accumulate(s["documents"] for s in shards))
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of the i-th document, none where it was left out."""
        k = bisect_right(self.ends, i)
        shard, (offsets, tokens) = self.shards[k], self.open_shard(k)
        at = i - self.ends[k] + shard["documents"]
        start, end = int(offsets[at]), int(offsets[at + 1])
        found = tokens[start:end]
        if not start <= end <= len(tokens) or (end > start and found.max() >= self.vocab_size):
            raise damaged_error(
                self.folder / f"{shard['name']}.bin", f"document {at} makes no sense"
            )
        return found

    def open_shard(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and tokens of a shard."""
        if k not in self.maps:
            path = self.folder / self.shards[k]["name"]
            try:
                offsets = np.load(path.with_suffix(".npy"), mmap_mode="r")
                empty = self.shards[k]["tokens"] == 0  # which no map can show
                tokens = np.memmap(path.with_suffix(".bin"), self.dtype, "r") if not empty else []
            except (OSError, ValueError) as e:
                raise damaged_error(path, str(e)) from None
            self.maps[k] = offsets, np.asarray(tokens, self.dtype)
        return self.maps[k]


@dataclass
class Shards:
    """A finished folder; opening it looks at the length of every file."""

    folder: Path

    def __post_init__(self):
        self.index = read_index(self.folder)
        if not self.index.get("complete"):
            raise UserError(
                f"{self.folder} is not finished: run its command again, and it goes on where it "
                f"stood: {self.index.get('command')}"
            )
        for shard in self.index["shards"]:
            check_lengths(self.folder, shard)
        if not (self.folder / TOKENIZER).is_file():
            raise damaged_error(self.folder / TOKENIZER, "it is missing")
        if file_sha256(self.folder / TOKENIZER) != self.index["tokenizer"]:
            raise damaged_error(self.folder / TOKENIZER, "its checksum is another")

    @property
    def sources(self) -> list[dict]:
        return self.index["sources"]

    @cached_property
    def tokenizer(self):
        """That of the tokens."""
        from dsv3_ref.data.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def documents(self, source: int, split: str) -> Documents:
        """Of one source, to train on or held out."""
        own = [s for s in self.index["shards"] if (s["source"], s["split"]) == (source, split)]
        return Documents(self.folder, own, self.index["dtype"], self.index["vocab_size"])

    def verify_checksums(self) -> None:
        """Compare every checksum: reads all there is."""
        for shard in self.index["shards"]:
            for suffix, want in shard["sha256"].items():
                path = self.folder / f"{shard['name']}.{suffix}"
                if file_sha256(path) != want:
                    raise damaged_error(path, "its checksum is another")


# ── Damage ──


def expected_lengths(shard: dict) -> dict[str, int]:
    """Bytes that the files of a shard must have."""
    return {"bin": shard["bytes"], "npy": 128 + (shard["documents"] + 1) * OFFSET.itemsize}


def check_lengths(folder: Path, shard: dict) -> None:
    """Raise if a file of a shard is missing or not as long as the index says."""
    for suffix, want in expected_lengths(shard).items():
        path = folder / f"{shard['name']}.{suffix}"
        try:
            found = os.stat(path).st_size
        except FileNotFoundError:
            raise damaged_error(path, "it is missing") from None
        if found != want:
            raise damaged_error(path, f"it has {found:,} bytes, not {want:,}")


def damaged_error(path: Path, why: str) -> UserError:
    return UserError(f"the shard {path} is damaged ({why}): put a whole copy back, or prepare anew")
