"""Write shards: documents from worker processes, without near-duplicates, with an index.

Documents have one fixed order, with the held-out ones of every source first, and the shards depend
on them alone. A shard is complete once index.json names it. Other files that a killed process has
left are written again.
"""

import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.atomic import clear_path, fsync_path, write_json
from dsv3_ref.checkpoints.manifest import file_sha256
from dsv3_ref.config import UserError
from dsv3_ref.data import shards
from dsv3_ref.data.dedup import MinHashLSH
from dsv3_ref.data.sources import TextSource
from dsv3_ref.data.tokenize_workers import TokenizedChunk, TokenizeWorker, imap_ordered

CHUNK_CHARS = 1 << 18  # characters that a worker takes at a time, or a long document
CHUNK_DOCUMENTS = 1024
SPLITS = ("val", "train")


@dataclass
class Shard:
    """A shard being written: documents of one source and split."""

    folder: Path
    name: str
    source: int
    split: str
    dtype: np.dtype
    offsets: list[int] = field(default_factory=lambda: [0])
    signatures: list[np.ndarray] = field(default_factory=list)
    blank: int = 0
    text_bytes: int = 0
    near_duplicates: Counter[int] = field(default_factory=Counter)  # by the earlier one's source

    def __post_init__(self) -> None:
        self.part = self.folder / f"{self.name}.bin.part"
        self.file = clear_path(self.part).open("wb")
        self.digest = hashlib.sha256()

    def add(self, tokens: np.ndarray) -> None:
        """Append a document; one without tokens only keeps its position."""
        raw = tokens.tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.offsets.append(self.offsets[-1] + len(tokens))

    def close(self, is_last: bool) -> dict[str, Any]:
        """Flush the shard to disk under its final name; return its entry for the index."""
        self.file.close()
        fsync_path(self.part)
        path = self.folder / self.name
        self.save_array(path.with_suffix(".npy"), np.array(self.offsets, shards.OFFSET))
        if self.signatures:
            self.save_array(path.with_suffix(".near"), np.stack(self.signatures))
        write_bytes(path.with_suffix(".sum"), shards.block_sums(self.part))
        self.part.replace(path.with_suffix(".bin"))
        sha256 = {
            "bin": self.digest.hexdigest(),
            "npy": file_sha256(path.with_suffix(".npy")),
            "sum": file_sha256(path.with_suffix(".sum")),
        }
        return {
            "name": self.name,
            "source": self.source,
            "split": self.split,
            "end": is_last,
            "documents": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "bytes": self.offsets[-1] * self.dtype.itemsize,
            "blank": self.blank,
            "near": {str(k): n for k, n in sorted(self.near_duplicates.items())},
            "text_bytes": self.text_bytes,
            "sha256": sha256,
        }

    def save_array(self, path: Path, values: np.ndarray) -> None:
        """Write an array whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, values)
        write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    part = clear_path(path.with_name(path.name + ".part"))
    part.write_bytes(content)
    fsync_path(part)
    part.replace(path)


class ShardWriter:
    """A writer of the remaining shards, one part (source and split) after another."""

    def __init__(
        self,
        folder: Path,
        index: dict[str, Any],
        sources: list[TextSource],
        tokenizer: Tokenizer,
    ):
        settings = index["settings"]
        self.folder, self.sources = folder, sources
        self.index = index
        self.shard_tokens: int = settings["shard_tokens"]
        self.near = MinHashLSH(settings["dedup"]) if settings["dedup"] else None
        self.worker = TokenizeWorker(tokenizer, np.dtype(index["dtype"]), self.near is not None)
        self.remove_stale_files()
        for shard in index["shards"]:
            shards.check_lengths(folder, shard)
            path = folder / f"{shard['name']}.near"
            if self.near and path.is_file():
                self.near.insert_all(np.load(path), shard["source"])

    def remove_stale_files(self) -> None:
        """Remove files that do not belong to a shard of the index."""
        names = {s["name"] for s in self.index["shards"]}
        for path in self.folder.glob("shard-*"):
            if path.name.split(".")[0] not in names or path.suffix == ".part":
                path.unlink()

    @property
    def parts(self) -> list[tuple[int, str]]:
        """Source and split in the order of writing: held-out documents of every source first."""
        sources = range(len(self.sources))
        return [*((i, "val") for i in sources), *((i, "train") for i in sources)]

    def remaining(self) -> Iterator[tuple[int, str, int]]:
        """Yield the parts that are not done, each with the documents already written."""
        for i, split in self.parts:
            own = self.shards_of(i, split)
            if not (own and own[-1]["end"]):
                yield i, split, sum(s["documents"] for s in own)

    def shards_of(self, source: int, split: str) -> list[dict[str, Any]]:
        """Return the index entries of a part."""
        key = source, split
        return [s for s in self.index["shards"] if (s["source"], s["split"]) == key]

    def chunks(self, origins: deque[tuple[int, str, bool]]) -> Iterator[list[str]]:
        """Yield all texts that are left, in chunks.

        For each chunk, (source, split, whether it is the last of its part) is appended to
        `origins`.
        """
        for i, split, n_written in self.remaining():
            chunk: list[str] = []
            room = CHUNK_CHARS
            for text in self.sources[i].iter_split(split, n_written):
                chunk.append(text)
                room -= len(text)
                if room <= 0 or len(chunk) == CHUNK_DOCUMENTS:
                    origins.append((i, split, False))
                    yield chunk
                    chunk, room = [], CHUNK_CHARS
            origins.append((i, split, True))
            yield chunk

    def write(self, workers: int, progress: Any) -> None:
        """Write all remaining shards; a part ends its last shard. progress: a bar of text bytes."""
        shard: Shard | None = None
        origins: deque[tuple[int, str, bool]] = deque()
        for chunk in imap_ordered(self.chunks(origins), self.worker, workers):
            source, split, is_last = origins.popleft()
            shard = self.add_documents(shard or self.begin_shard(source, split), chunk)
            if is_last:
                self.end_shard(shard, True)
                self.check_not_empty(source, split)
                shard = None
            progress.update(int(chunk.n_bytes.sum()))

    def begin_shard(self, source: int, split: str) -> Shard:
        """Return a new shard, numbered after those of the index."""
        name = f"shard-{len(self.index['shards']):05}"
        return Shard(self.folder, name, source, split, self.worker.dtype)

    def end_shard(self, shard: Shard, is_last: bool) -> None:
        """Close a shard and add it to the index, which makes it complete."""
        self.index["shards"].append(shard.close(is_last))
        write_json(self.folder / shards.INDEX, self.index)

    def add_documents(self, shard: Shard, chunk: TokenizedChunk) -> Shard:
        """Add the documents of a chunk and begin new shards as they fill; return the last one."""
        signed = self.sign(chunk)
        ends = np.cumsum(chunk.lengths).tolist()
        for j, (start, end) in enumerate(zip([0, *ends], ends)):
            if shard.offsets[-1] >= self.shard_tokens:
                self.end_shard(shard, False)
                shard = self.begin_shard(shard.source, shard.split)
            is_blank = end == start
            shard.blank += is_blank
            shard.text_bytes += int(chunk.n_bytes[j])
            keep = not is_blank
            if keep and signed:
                keep = self.insert_if_new(shard, *signed[j])
            shard.add(chunk.tokens[start : end if keep else start])
        return shard

    def sign(self, chunk: TokenizedChunk) -> list[tuple[np.ndarray, list[int]]]:
        """Return the signature and the band keys of every document; [] without --dedup."""
        if self.near is None or chunk.signatures is None:
            return []
        return list(zip(chunk.signatures, self.near.band_keys(chunk.signatures)))

    def insert_if_new(self, shard: Shard, signature: np.ndarray, keys: list[int]) -> bool:
        """Insert a document unless it is a near-duplicate; return whether it was inserted."""
        if self.near is None:
            return True
        duplicate_of = self.near.query(signature, keys)
        if duplicate_of is not None:
            shard.near_duplicates[duplicate_of] += 1
            return False
        shard.signatures.append(signature)
        self.near.insert(signature, keys, shard.source)
        return True

    def check_not_empty(self, source: int, split: str) -> None:
        """Raise a `UserError` if a part has no tokens: a source needs documents of both splits."""
        own = self.shards_of(source, split)
        if sum(s["tokens"] for s in own):
            return
        if not any(s["near"] for s in own):
            raise self.sources[source].no_text_error(split)
        documents = "held-out documents" if split == "val" else "training documents"
        raise UserError(
            f"all {documents} of {self.sources[source].name} are near-duplicates of earlier ones: "
            "leave this source out, or keep near-duplicates with --dedup 0"
        )

    def finish(self) -> None:
        """Complete the index with the counts of each source, then remove the signatures."""
        about = [self.describe_source(i) for i in range(len(self.sources))]
        self.index |= {"complete": True, "sources": about}
        write_json(self.folder / shards.INDEX, self.index)
        clean_up(self.folder)

    def describe_source(self, i: int) -> dict[str, Any]:
        """Return the name, weight and counts of a source, by split."""
        about: dict[str, Any] = {"name": self.sources[i].name, "weight": self.sources[i].weight}
        for split in SPLITS:
            own = self.shards_of(i, split)
            near: Counter[str] = Counter()
            for shard in own:
                near.update({self.sources[int(k)].name: n for k, n in shard["near"].items()})
            total: dict[str, Any] = {
                k: sum(s[k] for s in own) for k in ("documents", "tokens", "blank")
            }
            total["documents"] -= total["blank"] + near.total()
            total["text_bytes"] = sum(s["text_bytes"] for s in own)
            total["near_duplicates_of"] = dict(near)
            about[split] = total
        return about


def clean_up(folder: Path) -> None:
    """Remove files that only an unfinished folder needs."""
    for path in chain(folder.glob("shard-*.near"), folder.glob("*.part")):
        path.unlink()
