"""Texts as a `datasets.Dataset` that is mapped from disk, and as a stream that is read again.

The file of a dataset is named by a hash of everything that its texts depend on, contents included:
a changed file is read again even if its size and time are the same.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3_ref.config import UserError
from dsv3_ref.data.formats import DataFile, reading_errors

CACHE_FORMAT = 1  # of the files, and of what readers make of a file
TEXTS_PER_BATCH, CHARS_PER_BATCH = 4096, 1 << 26
LEFT_OUT = b"left out"  # key in the schema's metadata

Texts = Iterator[str]


# ── Folders ──


def cache_dir() -> Path:
    """Return $DSV3_CACHE, or by default ~/.cache/dsv3_ref."""
    return Path(os.environ.get("DSV3_CACHE") or os.path.expanduser("~/.cache/dsv3_ref"))


def writable_cache_dir() -> Path | None:
    """Return the cache's folder, which is made if it is missing; None if it cannot be written."""
    folder = cache_dir()
    return folder if make_writable_dir(folder) else None


def make_writable_dir(folder: Path) -> bool:
    """Make a folder unless it exists; return whether files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


# ── Datasets ──


def content_hash(files: Iterable[DataFile], *settings: object) -> str:
    """Return the SHA-256 of the contents of files, in order, of their formats and of settings."""
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, *settings]).encode())
    for file in files:
        with reading_errors(file.path), open(file.path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(f"{file.kind} {file.compression} ".encode() + content)
    return digest.hexdigest()


def mapped_texts(key: str, read: Callable[[], Texts], summarize: Callable[[], list[Any]]) -> Any:
    """Return the texts of a reader as a `datasets.Dataset` with the column `text`, and its summary.

    They are read only if no file in the cache has this key. Without a cache that can be written
    they are kept in a temporary file, which vanishes with the process.
    """
    folder = writable_cache_dir()
    if folder is None:
        with new_temporary_file() as path:
            write_arrow(path, read(), summarize)
            return map_texts(path)
    path = folder / "texts" / f"{key}.arrow"
    if path.is_file():
        with suppress(Exception):  # a damaged file is written again
            return map_texts(path)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        write_arrow(part, read(), summarize)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return map_texts(path)


@contextmanager
def new_temporary_file() -> Iterator[Path]:
    """Yield the path of an empty file, whose name is removed at the end; maps of it stay valid."""
    try:
        handle, name = tempfile.mkstemp(prefix="dsv3-texts-")
    except OSError as e:
        raise UserError(
            f"neither {cache_dir()} nor the folder for temporary files can be written ({e}): set "
            "DSV3_CACHE to a folder that can"
        ) from None
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with suppress(PermissionError):  # Windows keeps the names of mapped files
            os.unlink(name)


def write_arrow(path: Path, texts: Texts, summarize: Callable[[], list[Any]]) -> None:
    """Write texts as an Arrow stream whose last batch is empty and carries the summary."""
    import pyarrow as pa

    schema = pa.schema({"text": pa.large_string()})
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batched(texts):
                writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema))
            summary = json.dumps(summarize()).encode()
            empty = pa.record_batch([pa.array([], pa.large_string())], schema)
            writer.write_batch(empty, custom_metadata={LEFT_OUT: summary})
    except OSError as e:
        raise UserError(
            f"cannot write the texts to {path.parent}: {e.strerror or e}: set DSV3_CACHE to a "
            "folder with room"
        ) from None


def batched(texts: Texts) -> Iterator[list[str]]:
    """Yield texts in lists of at most TEXTS_PER_BATCH, shorter ones if the texts are long."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == TEXTS_PER_BATCH or size >= CHARS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_texts(path: Path) -> tuple[Any, list[Any]]:
    """Return the dataset in a file that `write_arrow` has written, and the summary."""
    import datasets  # a second to import
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        metadata = None
        for batch in reader.iter_batches_with_custom_metadata():
            metadata = batch.custom_metadata
    if metadata is None or LEFT_OUT not in metadata:
        raise ValueError("the file is not complete")
    return datasets.Dataset.from_file(str(path)), json.loads(metadata[LEFT_OUT])


# ── Streams ──


class TextStream:
    """Texts that are read from the beginning whenever they are iterated over, a part of them."""

    def __init__(self, read: Callable[[], Texts], start: int = 0, stop: int | None = None):
        self.read = read
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[dict[str, str]]:
        for text in islice(self.read(), self.start, self.stop):
            yield {"text": text}

    def skip(self, n: int) -> "TextStream":
        """Return the stream without its first n texts."""
        return TextStream(self.read, self.start + n, self.stop)

    def take(self, n: int) -> "TextStream":
        """Return the first n texts as a stream."""
        stop = self.start + n
        return TextStream(
            self.read, self.start, stop if self.stop is None else min(stop, self.stop)
        )

    def iter(self, batch_size: int) -> Iterator[dict[str, Sequence[str]]]:
        """Yield batches of texts."""
        rows = iter(self)
        while batch := [row["text"] for row in islice(rows, batch_size)]:
            yield {"text": batch}
