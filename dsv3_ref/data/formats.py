"""Files as rows or texts: formats, compressions and encodings.

A reader yields (place in the file, value) pairs. A part of a file that cannot be used is a
`BrokenRow` with the reason, so that the caller can report and leave it out; a file that cannot be
used at all raises a `UserError`. Only Parquet, Arrow and JSON arrays are ever held in memory as a
whole or in large blocks; all other files are read line by line.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import Any, BinaryIO, NamedTuple

from dsv3_ref.checkpoints.atomic import describe_json
from dsv3_ref.config import UserError

PLAIN_TEXT = "text"
SUFFIXES = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), PLAIN_TEXT),
    ".jsonl": "json lines", ".ndjson": "json lines", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
ARCHIVES = {".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"}
NOT_TEXT = {".xlsx", ".xls", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".npy",
            ".npz", ".pkl", ".pickle", ".pt", ".bin", ".safetensors", ".h5", ".db", ".sqlite",
            ".avro", ".orc", ".feather", ".lz4", ".z", ".br", ".warc"}  # fmt: skip
MAGIC = {  # how files begin that are not what their name says
    b"\x1f\x8b": "compressed by gzip: give it the suffix .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: give it the suffix .zst",
    b"\xfd7zXZ\x00": "compressed by xz: give it the suffix .xz",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"%PDF-": "a PDF: extract its text",
    b"PAR1": "Parquet: give it the suffix .parquet",
    b"ARROW1": "Arrow: give it the suffix .arrow",
    b"SQLite format 3": "a database: export its text",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the data by git lfs pull",
    b"\xff\xfe": "UTF-16: convert it by iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16: convert it by iconv -f utf-16 -t utf-8",
}
BOM = b"\xef\xbb\xbf"
MAX_EXPANSION = 200  # of compressed files; text shrinks to a tenth, hardly to a hundredth
SMALL_EXPANSION = 1 << 28  # bytes that any file may expand to
MAX_LINE = 1 << 28  # bytes of a line of JSON, or characters of a field of CSV
MAX_NESTING = 100  # of the lists and objects of a row: code that walks through it recurses
HEAD = 1 << 16  # bytes that are looked at to find out what a file is
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # or half of a pair
ROWS_PER_BATCH = 1000  # rows of Parquet and Arrow that are converted at a time
TOOL_COLUMNS = "tools", "tool_calls"
MESSAGE_COLUMNS = (
    "messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected",
)  # fmt: skip


class DataFile(NamedTuple):
    """A file, its format (a value of `SUFFIXES`) and its compression ("" if none)."""

    path: str
    kind: str
    compression: str = ""


class BrokenRow(NamedTuple):
    """The reason why a row cannot be used."""

    reason: str


PlacedRow = tuple[str, Any]  # place in the file, such as "line 3"; value or `BrokenRow`


# ── What a file is ──


def split_suffix(path: str) -> tuple[str, str]:
    """Return the suffixes of format and compression in lower case: a.JSONL.gz → .jsonl and .gz."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix not in COMPRESSIONS:
        return suffix, ""
    return os.path.splitext(stem)[1], suffix


def known_file(path: str) -> DataFile | None:
    """Return what a file is by its suffix; None if the suffix is not one of data."""
    suffix, compression = split_suffix(path)
    if suffix not in SUFFIXES:
        return None
    return DataFile(path, SUFFIXES[suffix], COMPRESSIONS.get(compression, ""))


def explicit_file(path: str) -> DataFile:
    """Return what a file is that the user has named; with an unknown suffix it must be plain text.

    Raise a `UserError` for archives, formats that are not read, and text that looks like JSON.
    """
    known = known_file(path)
    if known:
        return known
    suffix, compression = split_suffix(path)
    if suffix in ARCHIVES:
        raise UserError(f"{path} is an archive: unpack it and give the folder")
    if suffix in NOT_TEXT:
        raise UserError(f"{path} is not read, because of its suffix {suffix}: {readable()}")
    file = DataFile(path, PLAIN_TEXT, COMPRESSIONS.get(compression, ""))
    with open_data_file(file) as stream:
        head = stream.peek(HEAD)[:HEAD]
    text = head.removeprefix(BOM).lstrip()
    if text[:1] in (b"{", b"[") and is_json_start(text):
        raise UserError(f"{path} looks like JSON: give it the suffix .jsonl or .json")
    try:
        head.decode()
    except UnicodeDecodeError as e:
        if e.start < len(head) - 4:  # not a character that is cut at the end
            raise UserError(f"{path} is not plain text: {readable()}") from None
    return file


def readable() -> str:
    """Return the remedy for a file that is not read: what is."""
    return f"files of data end in {', '.join(SUFFIXES)}, also with {', '.join(COMPRESSIONS)}"


def is_json_start(text: bytes) -> bool:
    """Return whether the first line of a text is a JSON object, or the beginning of a list."""
    line = text.split(b"\n", 1)[0].strip()
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return bool(re.match(rb'\[\s*\{|\{\s*"\w+"\s*:|[\[{]$', line))


# ── Opening ──


@contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Turn errors of reading a file into a `UserError` with its name."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: it has been removed; start again") from None
    except PermissionError:
        raise UserError(f"cannot read {path}: permission denied; allow it by chmod +r") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
        raise UserError(f"cannot read {path}: {e}; it is damaged or incomplete") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text: convert it, for example by iconv -f latin1 -t utf-8"
        ) from None
    except (OSError, ValueError, RuntimeError) as e:  # among them those of pyarrow
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise UserError(f"cannot read {path}: {reason[0]}") from None


@contextmanager
def open_data_file(file: DataFile) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes, decompressed; raise a `UserError` if it is something else."""
    with reading_errors(file.path):
        if not stat.S_ISREG(os.stat(file.path).st_mode):
            raise UserError(
                f"{file.path} is a pipe or a device: save the data to a file first, because it is "
                "read more than once"
            )
        with decompressed(file) as raw, io.BufferedReader(raw, 1 << 18) as stream:
            check_magic(file, stream.peek(HEAD)[:HEAD])
            yield stream


class BoundedStream(io.RawIOBase):
    """The decompressed bytes of a file; reading far more than text expands to is an error."""

    def __init__(self, raw: Any, path: str):
        self.raw, self.path = raw, path
        self.limit = max(SMALL_EXPANSION, MAX_EXPANSION * os.path.getsize(path))
        self.num_read = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; raise a `UserError` if the file expands too much."""
        count = self.raw.readinto(buffer)
        self.num_read += count
        if self.num_read > self.limit:
            raise UserError(
                f"{self.path} expands to more than {MAX_EXPANSION} times its size, which no text "
                "does: decompress it yourself if you trust it"
            )
        return count

    def close(self) -> None:
        """Close the file."""
        self.raw.close()
        super().close()


def decompressed(file: DataFile) -> Any:
    """Return a raw stream of the decompressed bytes of a file."""
    if not file.compression:
        return open(file.path, "rb", buffering=0)
    return BoundedStream(open_compressed(file), file.path)


def open_compressed(file: DataFile) -> Any:
    """Return a stream that decompresses a file."""
    match file.compression:
        case "gzip":
            return gzip.GzipFile(file.path)
        case "bz2":
            return bz2.BZ2File(file.path)
        case "xz":
            return lzma.LZMAFile(file.path)
        case "zstd":
            import pyarrow as pa  # a quarter of a second to import

            if not pa.Codec.is_available("zstd"):
                raise UserError(f"{file.path}: pyarrow was built without zstd: pip install pyarrow")
            return pa.input_stream(file.path, compression="zstd")
    raise ValueError(f"{file.compression!r} is not a compression")


def check_magic(file: DataFile, head: bytes) -> None:
    """Raise a `UserError` if a file does not begin as files of its format do."""
    if file.kind in ("parquet", "arrow") and not head.startswith(b"version"):
        return
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{file.path} is {what}")
    if b"\0" in head and file.kind == PLAIN_TEXT:
        raise UserError(f"{file.path} is not plain text: it has NUL characters; {readable()}")


# ── Reading ──


def read_rows(file: DataFile, column: str | None = None) -> Iterator[PlacedRow]:
    """Yield the rows of a table, as dicts; blank lines are skipped.

    column: the only one that is needed, which saves time with Parquet.
    """
    with open_data_file(file) as stream:
        match file.kind:
            case "json lines" | "json":
                yield from read_json_rows(file, stream)
            case "csv" | "tsv":
                yield from read_csv(file, stream)
            case "parquet":
                yield from read_parquet(stream, column)
            case "arrow":
                yield from read_arrow(stream)
            case _:
                raise UserError(
                    f"{file.path} is text, not rows: give .jsonl, .json, .csv or .parquet"
                )


def read_texts(file: DataFile, by_paragraph: bool) -> Iterator[PlacedRow]:
    """Yield the documents of a text file: the whole of it, or the parts between blank lines."""
    with open_data_file(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        if not by_paragraph:
            yield "line 1", stream.read()
            return
        first, lines = 1, list[str]()
        for number, line in enumerate(stream, start=1):
            if line.strip():
                first = first if lines else number
                lines.append(line)
            elif lines:
                yield f"line {first}", "".join(lines).rstrip("\n")
                lines = []
        if lines:
            yield f"line {first}", "".join(lines).rstrip("\n")


# ── JSON ──


def read_json_rows(file: DataFile, stream: BinaryIO) -> Iterator[PlacedRow]:
    """Yield the rows of JSON lines, of a JSON array, or of the list "data" of a JSON object."""
    lines = enumerate((raw.removeprefix(BOM).strip() for raw in read_lines(file, stream)), start=1)
    number, first = next(((n, line) for n, line in lines if line), (0, b""))
    is_document = first.startswith(b"[") or (file.kind == "json" and not is_json(first))
    if is_document or (file.kind == "json" and b'"data"' in first):
        text = (b"\n" * (number - 1) + first + b"\n" + stream.read()).decode()
        yield from read_json_document(file.path, text)
        return
    for n, line in chain([(number, first)], lines):
        if line:
            yield f"line {n}", parse_json_line(line)


def read_lines(file: DataFile, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; raise a `UserError` if one is too long.

    Any line of a .json file may be long, because it may hold the whole document.
    """
    limit = -1 if file.kind == "json" else MAX_LINE + 1
    for number in count(1):
        line = stream.readline(limit)
        if not line:
            return
        if len(line) > MAX_LINE and limit > 0:
            raise UserError(
                f"{file.path}, line {number} has more than {MAX_LINE:,} bytes: write a row per line"
            )
        yield line


def is_json(line: bytes) -> bool:
    """Return whether a line is a whole JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parse_json_line(raw: bytes) -> Any:
    """Return the JSON object of a line as a dict, or a `BrokenRow`."""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        return BrokenRow("it is not UTF-8 text")
    except RecursionError:
        return BrokenRow("it is nested too deeply")
    except json.JSONDecodeError as e:
        return BrokenRow(f"it is not JSON ({e.msg} at column {e.colno})")
    except ValueError as e:  # a number of too many digits
        return BrokenRow(f"it is not JSON ({e})")
    if is_too_deep(value, raw.count(b"[") + raw.count(b"{")):
        return BrokenRow("it is nested too deeply")
    return checked_row(value, LONE_SURROGATE.search(raw) is not None)


def is_too_deep(value: Any, num_brackets: int) -> bool:
    """Return whether a JSON value with so many opening brackets is nested too deeply for a row."""
    return num_brackets > MAX_NESTING and nesting(value) > MAX_NESTING


def nesting(value: Any) -> int:
    """Return how deep the lists and objects of a JSON value are nested."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = list(chain.from_iterable(x.values() if isinstance(x, dict) else x for x in level))
    return depth


def checked_row(value: Any, may_have_surrogates: bool = True) -> Any:
    """Return a row, or a `BrokenRow` if it is not a dict or has half of a surrogate pair."""
    if not isinstance(value, dict):
        return BrokenRow(f"it is {describe_json(value)}, not an object with named fields")
    if may_have_surrogates and not is_utf8(value):
        return BrokenRow("it has half of a character (a lone surrogate such as \\ud83d)")
    return value


def is_utf8(value: Any) -> bool:
    """Return whether all texts in a JSON value can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_document(path: str, text: str) -> Iterator[PlacedRow]:
    """Yield the rows of a whole JSON text: a list, an object with a list "data", or objects."""
    at = skip_space(text, 0)
    if text.startswith("[", at):
        yield from read_json_list(path, text, at + 1)
        return
    is_first = True
    for line, value, end in decode_values(path, text, at):
        is_only = is_first and end == len(text)
        if is_only and isinstance(value, dict) and isinstance(value.get("data"), list):
            for number, row in enumerate(value["data"], start=1):
                yield f"row {number}", checked_row(row)
        else:
            yield f"line {line}", checked_row(value)
        is_first, at = False, end
    if at < len(text):
        raise UserError(f"{path} has a ] without a [ before it: correct it")


def read_json_list(path: str, text: str, at: int) -> Iterator[PlacedRow]:
    """Yield the elements of a list that begins at a position of a text."""
    line, at = 1, skip_space(text, at)
    has_lines = text.find("\n", at, text.rfind("]")) >= 0
    values = decode_values(path, text, at, between=",")
    for number, (line, value, end) in enumerate(values, start=1):
        yield f"line {line}" if has_lines else f"row {number}", checked_row(value)
        at = end
    if not text.startswith("]", at):
        raise UserError(f"{path}, line {line}: no comma or ] after this row: correct it")
    if skip_space(text, at + 1) < len(text):
        raise UserError(f"{path} has text after its list: keep the list only, or a row per line")


def decode_values(
    path: str, text: str, at: int, between: str = ""
) -> Iterator[tuple[int, Any, int]]:
    """Yield (line, value, position after it) of consecutive JSON values, up to a ] or the end."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}, line {line}: it is not JSON ({e}): correct it") from None
        at = skip_space(text, at)
        is_last = not text.startswith(between, at)
        yield line, value, at
        if is_last:
            return
        at = skip_space(text, at + len(between))


def skip_space(text: str, at: int) -> int:
    """Return the position of the next character that is not white space."""
    match = re.compile(r"[ \t\r\n]*").match(text, at)
    return match.end() if match else at


# ── CSV ──


def read_csv(file: DataFile, stream: BinaryIO) -> Iterator[PlacedRow]:
    """Yield the rows of a table whose first line names the columns; all values are texts."""
    csv.field_size_limit(MAX_LINE)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="," if file.kind == "csv" else "\t", strict=True)
    names: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if "unexpected end" in str(e):
                raise UserError(
                    f"{file.path}, {place}: a quote is opened and never closed: correct it"
                ) from None
            yield place, BrokenRow(f"it is not {file.kind.upper()} ({e})")
            continue
        if not names:
            names = check_header(file.path, fields)
        elif len(fields) not in (0, len(names)):
            yield place, BrokenRow(f"it has {len(fields)} fields, the first line {len(names)}")
        elif not is_utf8("".join(fields)):
            yield place, BrokenRow("it is not UTF-8 text")
        elif fields:
            yield place, dict(zip(names, fields))


def check_header(path: str, names: list[str]) -> list[str]:
    """Return the names of the columns; raise a `UserError` if two are equal."""
    twice = {name for name, count in Counter(names).items() if name and count > 1}
    if twice:
        raise UserError(f"{path} has two columns {min(twice)!r}: rename one")
    return names


# ── Parquet and Arrow ──


def read_parquet(stream: BinaryIO, column: str | None) -> Iterator[PlacedRow]:
    """Yield the rows of a Parquet file."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(seekable(stream))
    columns = [column] if column in table.schema_arrow.names else None
    yield from read_batches(table.iter_batches(ROWS_PER_BATCH, columns=columns))


def seekable(stream: BinaryIO) -> BinaryIO:
    """Return the stream, or its content in memory if it is read from a compressed file."""
    return stream if stream.seekable() else io.BytesIO(stream.read())


def read_arrow(stream: io.BufferedReader) -> Iterator[PlacedRow]:
    """Yield the rows of an Arrow file or stream, such as those of `Dataset.save_to_disk`."""
    import pyarrow as pa

    if stream.peek(6).startswith(b"ARROW1"):
        reader = pa.ipc.open_file(seekable(stream))
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(stream))
    yield from read_batches(batches)


def read_batches(batches: Iterator[Any]) -> Iterator[PlacedRow]:
    """Yield the rows of record batches; one whose text is not UTF-8 is broken."""
    number = 0
    for whole in batches:
        for start in range(0, len(whole), ROWS_PER_BATCH):
            batch = whole.slice(start, ROWS_PER_BATCH)
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [row_of_batch(batch, i) for i in range(len(batch))]
            for row in rows:
                number += 1
                yield f"row {number}", without_filler(row)


def without_filler(row: Any) -> Any:
    """Return a row whose tools and calls have only the fields that they were given.

    Arrow gives all structs of a column the same fields and fills up with null: each tool would
    have the parameters of all others.
    """
    if not isinstance(row, dict):
        return row
    changed = {name: without_nulls(row[name]) for name in TOOL_COLUMNS if row.get(name)}
    for name in MESSAGE_COLUMNS:
        if isinstance(row.get(name), list):
            changed[name] = [without_filler(turn) for turn in row[name]]
    return row | changed if changed else row


def without_nulls(value: Any) -> Any:
    """Return a JSON value without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def row_of_batch(batch: Any, i: int) -> Any:
    """Return a row of a record batch, or a `BrokenRow`."""
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BrokenRow("it is not UTF-8 text")
