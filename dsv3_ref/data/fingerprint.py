"""Fingerprints of data: names, sizes and hashes, so that a resumed run reads what it read before.

A source is hashed in blocks of documents: a difference names the first documents that changed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 4096  # documents under one hash
DIGITS = 16  # of a hash, in hexadecimal: against accidents, not against attacks


def short_hash(*parts: bytes | memoryview) -> str:
    """Return the first digits of the SHA-256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def fingerprint_texts(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return the fingerprint of documents: how many there are, and a hash per block."""
    iterator, blocks, documents = iter(texts), [], 0
    while block := list(islice(iterator, BLOCK)):
        documents += len(block)
        encoded = [text.encode("utf-8", "surrogatepass") for text in block]
        lengths = np.array([len(x) for x in encoded], "<i8")
        blocks.append(short_hash(lengths.tobytes(), *encoded))
    return {"name": name, "documents": documents, "block": BLOCK, "blocks": blocks}


def fingerprint_rows(name: str, rows: Iterable[Any]) -> dict[str, Any]:
    """Return the fingerprint of rows of JSON, such as conversations."""
    texts = (json.dumps(row, sort_keys=True, default=str) for row in rows)
    return fingerprint_texts(name, texts)


def fingerprint_dataset(name: str, dataset: Any) -> dict[str, Any]:
    """Return what `fingerprint_texts` does for the column `text` of a `datasets.Dataset`.

    Reads Arrow's buffers, at the speed of hashing.
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
    """Return names and sizes of the files of a stream, whose content is too long to be hashed."""
    files = [[Path(p).name, Path(p).stat().st_size] for p in paths]
    return {"name": name, "files": files}
