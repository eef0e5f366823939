"""Tokens: every byte comes back, marks are nobody's to forge, and the same text gives the same."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniruns import prose
from tokenizers import AddedToken, Tokenizer, models

from dsv3_ref.config import UserError
from dsv3_ref.data import tokenizer as tok

CODE = "def f(x):\n    return [x, (1234567, '三つ'), {}]\n\n\nclass A:\n\tpass  # über\r\n"


def texts(n: int = 30) -> list[str]:
    rng = random.Random(0)
    return [prose(rng, 60) + CODE for _ in range(n)]


TEXTS, SIZE = texts(), 360
TRAINED = tok.train_tokenizer(TEXTS, SIZE)
UNICODE = st.text(st.characters(codec="utf-8"))
FORGED = st.lists(UNICODE | st.sampled_from(tok.SPECIAL)).map("".join)


def ids(text: str, t: Tokenizer = TRAINED) -> list[int]:
    return t.encode(text, add_special_tokens=False).ids


# ── There and back ──


@given(FORGED)
def test_every_text_comes_back(text):
    assert TRAINED.decode(ids(text)) == text


@given(FORGED)
def test_special_tokens_in_a_text_are_characters(text):
    assert not set(ids(text)) & {TRAINED.token_to_id(s) for s in tok.SPECIAL}


@given(FORGED)
def test_bytes_are_counted(text):
    lengths = tok.byte_lengths(TRAINED)
    assert sum(lengths[i] for i in ids(text)) == len(text.encode())


def test_marks_stand_for_no_bytes():
    lengths = tok.byte_lengths(TRAINED)
    assert len(lengths) == tok.vocab_size(TRAINED) == SIZE
    assert [lengths[TRAINED.token_to_id(s)] for s in tok.SPECIAL] == [0] * len(tok.SPECIAL)
    assert min(length for i, length in enumerate(lengths) if i >= len(tok.SPECIAL)) == 1


def test_added_tokens_that_are_text_count_their_bytes():
    t = Tokenizer.from_str(TRAINED.to_str())
    t.add_tokens([AddedToken("三つ目", normalized=False)])
    lengths = tok.byte_lengths(t)
    assert sum(lengths[i] for i in ids("a 三つ目 b", t)) == len("a 三つ目 b".encode())
    assert lengths[SIZE] == 9


def test_ids_may_have_holes():
    t = Tokenizer(models.BPE(vocab={"a": 0, "Ġab": 7}, merges=[]))
    assert tok.vocab_size(t) == 8
    assert tok.byte_lengths(t) == [1, 0, 0, 0, 0, 0, 0, 3]


# ── Training ──


def test_special_tokens_come_first_and_bytes_next():
    assert [TRAINED.token_to_id(s) for s in tok.SPECIAL] == list(range(len(tok.SPECIAL)))
    assert set(tok.byte_lengths(TRAINED)[9:265]) == {1}


def test_the_same_texts_give_the_same_tokens():
    assert tok.train_tokenizer(iter(TEXTS), SIZE).to_str() == TRAINED.to_str()
    assert tok.train_tokenizer(TEXTS[:5], SIZE).to_str() != TRAINED.to_str()


def test_training_pays():
    text = TEXTS[0]
    assert len(ids(text)) < 0.6 * len(text.encode())


def test_a_text_cannot_smuggle_a_mark_into_training():
    t = tok.train_tokenizer([tok.EOS * 50], 300)
    assert TRAINED.token_to_id(tok.EOS) == t.token_to_id(tok.EOS)
    assert t.decode(ids(tok.EOS, t)) == tok.EOS


def test_too_few_tokens_for_the_bytes():
    with pytest.raises(UserError, match="vocab_size 264 is too small: .* need 265"):
        tok.train_tokenizer(TEXTS, 264)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12345678", ["123", "456", "78"]),
        ("東京の2024年", ["東京の", "202", "4", "年"]),
        ("don't stop", ["don", "'t", " stop"]),
        ("x = y;\n\nz", ["x", " =", " y", ";\n\n", "z"]),
        ("a   b\n", ["a", "  ", " b", "\n"]),
        ("Größe naïve", ["Größe", " naïve"]),
    ],
)
def test_v3_splits_before_it_merges(text, pieces):
    found = tok.new_tokenizer().pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*place)] for _, place in found] == pieces


# ── Punctuation and line breaks ──


def test_tokens_that_join_a_line_break_spell_the_same_in_two():
    splits = tok.newline_splits(TRAINED)
    assert splits
    for joined, parts in splits.items():
        text = TRAINED.decode([joined])
        head, tail = (TRAINED.decode([i]) for i in parts)
        assert head + tail == text
        assert tail.strip("\n") == "" != head.strip("\n")
        assert not head[-1].isalnum()
    assert ids(".\n") != splits[ids(".\n")[0]] == ids(".") + ids("\n")


# ── Files ──


def test_written_and_read(tmp_path):
    tok.save_tokenizer(TRAINED, tmp_path / "a" / "tokenizer.json")
    for place in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        t = tok.load_tokenizer(place)
        assert t.to_str() == TRAINED.to_str()
        assert ids(TEXTS[0] + tok.EOS, t) == ids(TEXTS[0] + tok.EOS)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["tokenizer.json"]


def test_a_second_write_replaces_the_first(tmp_path):
    other, path = tok.train_tokenizer(TEXTS[:5], SIZE), tmp_path / "tokenizer.json"
    for tokenizer in (other, TRAINED):
        tok.save_tokenizer(tokenizer, path)
        assert tok.load_tokenizer(path).to_str() == tokenizer.to_str()


def test_what_is_no_tokenizer_is_said(tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer.json in {tmp_path}"):
        tok.load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path} is not a tokenizer"):
        tok.load_tokenizer(tmp_path)
    values = json.loads(TRAINED.to_str())
    path.write_text(json.dumps(values | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}))
    with pytest.raises(UserError, match=f"{path} is not a tokenizer: chunk size must be"):
        tok.load_tokenizer(tmp_path)  # the library panics, which is no Exception
    values["added_tokens"] = values["added_tokens"][:2]
    for s in tok.SPECIAL[2:]:
        del values["model"]["vocab"][s]
    path.write_text(json.dumps(values))
    loaded = tok.load_tokenizer(tmp_path)
    tok.check_document_tokens(loaded, needs_fim=False)
    with pytest.raises(UserError, match="lacks <｜fim▁begin｜> and .*: pass --fim-rate 0"):
        tok.check_document_tokens(loaded, needs_fim=True)


@pytest.mark.parametrize(
    "option",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                        "stride": 0}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                     "pad_id": 2, "pad_type_id": 0, "pad_token": tok.PAD}},
        {"dropout": 0.5},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_options_of_a_file_that_change_a_text_are_reset(option, tmp_path):
    """Such a file made every document four tokens long, and every run another curve."""
    content = json.loads(TRAINED.to_str())
    (content["model"] if "dropout" in option else content).update(option)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tok.load_tokenizer(tmp_path)
    batch = loaded.encode_batch_fast([CODE, "x"], add_special_tokens=False)
    assert [e.ids for e in batch] == [ids(CODE), ids("x")]
