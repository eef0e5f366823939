"""Tokenized documents on disk, as `dsv3 data prepare` writes them, read through memory maps.

A folder of shards holds

- `index.json`: `dtype` and `vocab_size` of the tokens, the tokenizer's sha256, `settings` and
  `command`; for each shard its source, split (train or val), documents, tokens, bytes and sha256;
  for each source its weight, documents, tokens and near-duplicates; `complete` once all is there;
- `tokenizer.json`: of these tokens;
- `shard-00000.bin`: tokens, little-endian, one document after another and nothing between;
- `shard-00000.npy`: where each document begins, and the end: documents + 1 numbers, uint64;
- `shard-00000.sum`: the SHA-256 of every 64 KiB of the tokens, compared when they are first read.

A shard belongs to one source and one split. A document that is blank or a near-duplicate keeps its
position but has no tokens, so that positions, and thus the order of training, are those of the
texts. Special tokens, fill-in-the-middle and split line breaks are applied when rows are packed.
"""

import hashlib
import json
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.atomic import check_regular
from dsv3_ref.checkpoints.manifest import file_sha256
from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.data.tokenizer import load_tokenizer

INDEX, TOKENIZER = "index.json", "tokenizer.json"
FORMAT = 1
SUM_BYTES = 1 << 16  # of a shard under one checksum, which is compared when they are first read
OFFSET = np.dtype("<u8")
SHARD_NAME = re.compile(r"shard-\d+", re.ASCII)


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the integer type of token ids: two bytes where they are enough."""
    return np.dtype("<u2" if vocab_size < 65_536 else "<u4")


def is_shards(name: str) -> bool:
    """Return whether this is a folder of shards, finished or not."""
    return (Path(name) / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json, or raise a `UserError`."""
    path = folder / INDEX
    try:
        check_regular(path)
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path} is of format {index['format']}, not {FORMAT}")
        check_index(index)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {INDEX}: it is not a folder of shards") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    return index


def check_index(index: dict[str, Any]) -> None:
    """Raise a `ValueError`, `LookupError` or `TypeError` unless an index describes shards.

    Names are those of files in the folder: an index may come from a stranger.
    """
    if index["dtype"] not in (None, "", "<u2", "<u4"):
        raise ValueError(f"{index['dtype']!r} is not a type of tokens")
    for shard in index["shards"]:
        name = shard["name"]
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a shard")
        for key in ("documents", "tokens", "bytes"):
            if type(shard[key]) is not int or shard[key] < 0:
                raise ValueError(f"{key} of {name} is {shard[key]!r}")
        for suffix in ("bin", "npy", "sum"):
            if not isinstance(shard["sha256"][suffix], str):
                raise ValueError(f"the sha256 of {name}.{suffix} is not a string")


# ── Reading ──


class Documents:
    """The documents of one source and split: a sequence of arrays of tokens, mapped from disk."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], dtype: str, vocab_size: int):
        self.folder, self.shards = folder, shards
        self.dtype, self.vocab_size = dtype, vocab_size
        self.ends = list(accumulate(s["documents"] for s in shards))
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.unread: dict[int, dict[int, bytes]] = {}  # shard → block → checksum still to compare

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the documents in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> np.ndarray:
        """Return the tokens of the i-th document; none if it was left out."""
        k = bisect_right(self.ends, i)
        shard, (offsets, tokens) = self.shards[k], self.open_shard(k)
        place = i - self.ends[k] + shard["documents"]
        start, end = int(offsets[place]), int(offsets[place + 1])
        document = tokens[start:end]
        if end > start:
            self.verify_blocks(k, start * tokens.itemsize, end * tokens.itemsize)
        if not start <= end <= len(tokens) or (end > start and document.max() >= self.vocab_size):
            path = self.folder / f"{shard['name']}.bin"
            raise damaged_error(path, f"document {place} is invalid")
        return document

    def open_shard(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return offsets and tokens of the k-th shard."""
        if k not in self.maps:
            path = self.folder / self.shards[k]["name"]
            try:
                for suffix in ("npy", "sum"):
                    check_sha256(path.with_suffix(f".{suffix}"), self.shards[k]["sha256"][suffix])
                sums = path.with_suffix(".sum").read_bytes()
                offsets = np.load(path.with_suffix(".npy"), mmap_mode="r")
                tokens = np.empty(0, self.dtype)
                if self.shards[k]["tokens"] > 0:  # an empty file cannot be mapped
                    tokens = np.memmap(path.with_suffix(".bin"), self.dtype, "r")
            except (OSError, ValueError) as e:
                raise damaged_error(path, str(e)) from None
            self.maps[k] = offsets, tokens.view(np.ndarray)
            self.unread[k] = {i: sums[32 * i : 32 * (i + 1)] for i in range(len(sums) // 32)}
        return self.maps[k]

    def verify_blocks(self, k: int, start: int, end: int) -> None:
        """Compare the checksums of the blocks that hold these bytes of a shard, each once."""
        _, tokens = self.maps[k]
        for i in range(start // SUM_BYTES, ceil_div(end, SUM_BYTES)):
            if i not in self.unread[k]:
                continue
            block = tokens.view(np.uint8)[i * SUM_BYTES : (i + 1) * SUM_BYTES]
            if hashlib.sha256(block.tobytes()).digest() != self.unread[k][i]:
                path = self.folder / f"{self.shards[k]['name']}.bin"
                raise damaged_error(path, f"bytes from {i * SUM_BYTES:,} on have changed")
            del self.unread[k][i]  # only now: a second read must fail, too


@dataclass
class Shards:
    """A finished folder of shards; opening it checks the length of every file."""

    folder: Path

    def __post_init__(self) -> None:
        self.index = read_index(self.folder)
        if not self.index.get("complete"):
            raise UserError(
                f"{self.folder} is not finished: run its command again to continue: "
                f"{self.index.get('command')}"
            )
        for shard in self.index["shards"]:
            check_lengths(self.folder, shard)
        if not (self.folder / TOKENIZER).is_file():
            raise damaged_error(self.folder / TOKENIZER, "it is missing")
        if file_sha256(self.folder / TOKENIZER) != self.index["tokenizer"]:
            raise damaged_error(self.folder / TOKENIZER, "its checksum differs")

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The index entries of the sources."""
        return self.index["sources"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.folder)

    def documents(self, source: int, split: str) -> Documents:
        """Return the documents of one source and split ("train" or "val")."""
        own = [s for s in self.index["shards"] if (s["source"], s["split"]) == (source, split)]
        return Documents(self.folder, own, self.index["dtype"], self.index["vocab_size"])

    def part_checksums(self, source: int) -> list[str]:
        """Return the checksums of all files of a source's shards."""
        checksums: list[str] = []
        for shard in self.index["shards"]:
            if shard["source"] == source:
                checksums += [shard["sha256"][suffix] for suffix in sorted(shard["sha256"])]
        return checksums

    def verify_checksums(self) -> None:
        """Compare every checksum, which reads all files; raise a `UserError` for a difference."""
        for shard in self.index["shards"]:
            for suffix, sha256 in shard["sha256"].items():
                path = self.folder / f"{shard['name']}.{suffix}"
                check_sha256(path, sha256)


# ── Damage ──


def check_sha256(path: Path, expected: str) -> None:
    """Raise a `UserError` if the checksum of a file differs."""
    if file_sha256(path) != expected:
        raise damaged_error(path, "its checksum differs")


def block_sums(path: Path) -> bytes:
    """Return the SHA-256 of every block of a file, one after another."""
    sums = []
    with path.open("rb") as file:
        while block := file.read(SUM_BYTES):
            sums.append(hashlib.sha256(block).digest())
    return b"".join(sums)


def expected_lengths(shard: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that the files of a shard must have, by suffix."""
    return {
        "bin": shard["bytes"],
        "npy": 128 + (shard["documents"] + 1) * OFFSET.itemsize,
        "sum": 32 * ceil_div(shard["bytes"], SUM_BYTES),
    }


def check_lengths(folder: Path, shard: dict[str, Any]) -> None:
    """Raise a `UserError` if a file of a shard is missing or has another length than the index."""
    for suffix, expected in expected_lengths(shard).items():
        path = folder / f"{shard['name']}.{suffix}"
        try:
            about = os.stat(path)
        except FileNotFoundError:
            raise damaged_error(path, "it is missing") from None
        if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device would not end
            raise damaged_error(path, "it is not a regular file")
        if about.st_size != expected:
            raise damaged_error(path, f"it has {about.st_size:,} bytes, not {expected:,}")


def damaged_error(path: Path, why: str) -> UserError:
    """Return the error for a file that differs from the one that was written."""
    return UserError(
        f"the shard {path} is damaged ({why}): restore it from a copy, or prepare the data again"
    )
