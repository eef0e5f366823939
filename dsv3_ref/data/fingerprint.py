"""Fingerprints of data: names, sizes and hashes that show whether a resumed run has the same data.

A source is hashed in blocks of documents, so that an error can name the first changed documents.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 4096  # documents under one hash
HEX_DIGITS = 16  # of a hash: enough against accidents, not against attacks


def short_hash(*parts: bytes | memoryview) -> str:
    """Return the first digits of the SHA-256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:HEX_DIGITS]


def fingerprint_texts(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return the fingerprint of documents: their number, and a hash per block."""
    return fingerprint_bytes(name, (text.encode("utf-8", "surrogatepass") for text in texts))


def fingerprint_bytes(name: str, documents: Iterable[bytes]) -> dict[str, Any]:
    """Return the fingerprint of documents in bytes."""
    iterator = iter(documents)
    blocks: list[str] = []
    count = 0
    while block := list(islice(iterator, BLOCK)):
        count += len(block)
        lengths = np.array([len(x) for x in block], "<i8")
        blocks.append(short_hash(lengths.tobytes(), *block))
    return {"name": name, "documents": count, "block": BLOCK, "blocks": blocks}


def fingerprint_samples(name: str, samples: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Return the fingerprint of tokenized samples."""
    return fingerprint_bytes(name, (np.array(sample, "<i4").tobytes() for sample in samples))


def fingerprint_rows(name: str, rows: Iterable[Any]) -> dict[str, Any]:
    """Return the fingerprint of rows of JSON, such as conversations."""
    texts = (json.dumps(row, sort_keys=True, default=str) for row in rows)
    return fingerprint_texts(name, texts)


def fingerprint_dataset(name: str, dataset: Any) -> dict[str, Any]:
    """Return the fingerprint of the column `text` of a `datasets.Dataset`.

    It equals that of `fingerprint_texts`, but reads Arrow's buffers, at the speed of hashing.
    """
    blocks = [short_hash(*buffers) for buffers in arrow_blocks(dataset)]
    return {"name": name, "documents": len(dataset), "block": BLOCK, "blocks": blocks}


def arrow_blocks(dataset: Any) -> Iterator[list[bytes | memoryview]]:
    """Yield the lengths and the texts of every block of documents; null is an empty text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for table in dataset.with_format("arrow").iter(BLOCK):
        column = table.column("text").cast(pa.large_binary())
        texts = pc.fill_null(column, b"").combine_chunks()
        if isinstance(texts, pa.ChunkedArray):
            texts = pa.concat_arrays(texts.chunks)
        _, offsets_buffer, data = texts.buffers()
        offsets = np.frombuffer(offsets_buffer, "<i8")[texts.offset :][: len(texts) + 1]
        content = memoryview(data)[offsets[0] : offsets[-1]] if data else b""
        yield [np.diff(offsets).astype("<i8").tobytes(), content]


def fingerprint_files(name: str, paths: Sequence[str]) -> dict[str, Any]:
    """Return the names and sizes of the files of a stream, whose content is too long to hash."""
    files = [[Path(p).name, Path(p).stat().st_size] for p in paths]
    return {"name": name, "files": files}
