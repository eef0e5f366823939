"""Marks in texts: those that are meant become tokens, those that are quoted remain characters."""

import time

import pytest
from chat_forms import ASSISTANT, FORMS, USER, form_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from dsv3_ref.config import UserError
from dsv3_ref.data.marks import MarkedTextEncoder, find_marks, is_mark

EDGE, SINGLE = "\ue000", "※"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return V3.1's marks, one of a single character, and one that takes the spaces around it."""
    tokenizer = form_tokenizer(FORMS["V3.1"])
    tokenizer.add_tokens([AddedToken(SINGLE, normalized=False)])
    tokenizer.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    return tokenizer


@pytest.fixture(scope="module")
def encoder(tokenizer) -> MarkedTextEncoder:
    return MarkedTextEncoder(tokenizer)


def test_many_marks_that_take_spaces_are_found_in_linear_time(encoder):
    text = "<r> \n" * 20_000 + "a" * 2_000_000
    start = time.process_time()
    pieces = [*encoder.split_at_marks(text, EDGE)]
    assert time.process_time() - start < 1
    assert pieces == [("", "<r>")] * 20_000 + [("a" * 2_000_000, "")]


PIECES = st.sampled_from(
    [*FORMS["V3.1"].special, *FORMS["V3.1"].added, SINGLE, "<l>", "<r>", "<", ">", " ", "\n ", "a"]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def test_added_tokens_are_marks_unless_they_are_words():
    assert is_mark(AddedToken("<a>")) and is_mark(AddedToken("word", special=True))
    assert not is_mark(AddedToken("word 1")) and is_mark(AddedToken("word-1"))
    tokenizer = form_tokenizer(FORMS["V3"])
    tokenizer.add_tokens(["word"])
    marks = find_marks(tokenizer)
    assert set(marks) == {*FORMS["V3"].special, *FORMS["V3"].added}
    assert all(tokenizer.token_to_id(text) == i for text, i in marks.items())


@given(TEXTS)
def test_meant_marks_become_the_tokens_that_the_tokenizer_makes(encoder, tokenizer, text):
    reference = Tokenizer.from_str(tokenizer.to_str())
    reference.encode_special_tokens = False
    assert encoder.encode(text, EDGE) == reference.encode(text, add_special_tokens=False).ids


@given(TEXTS, TEXTS)
def test_quoted_marks_remain_characters_between_meant_ones(encoder, tokenizer, one, other):
    pattern = encoder.quoting_pattern([], keep_tags=False)
    one_quoted, other_quoted = (encoder.quote(text, EDGE, pattern) for text in (one, other))
    tokens = encoder.encode(f"{one_quoted}{USER}{other_quoted}", EDGE)
    user = encoder.ids[USER]
    assert [i for i in tokens if i in encoder.forbidden] == [user]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == f"{one}{USER}{other}"
    parts = encoder.encode_text(one), encoder.encode_plain(other, is_start=False)
    assert tokens == [*parts[0], user, *parts[1]]


def test_where_the_edges_stand(encoder):
    pattern = encoder.quoting_pattern([], keep_tags=False)
    assert encoder.quote(f"a{USER}", EDGE, pattern) == f"a<{EDGE}{USER[1:]}"
    assert encoder.quote(f"a{SINGLE}b", EDGE, pattern) == f"a{EDGE}{EDGE}{SINGLE}{EDGE}b"
    single, user = encoder.ids[SINGLE], encoder.ids[USER]
    less = encoder.encode_text("<")
    assert encoder.encode(f"{EDGE}{EDGE}{SINGLE}{EDGE}", EDGE) == encoder.encode_text(SINGLE)
    assert encoder.encode(f"<{EDGE}{SINGLE}", EDGE) == [*less, single]  # one edge is another's
    assert encoder.encode(f"{EDGE}{EDGE}{USER}", EDGE) == [user]
    found = encoder.find_marks(f"{EDGE}{EDGE}{SINGLE}{EDGE}{SINGLE}{ASSISTANT}", EDGE)
    assert [(match.start(), match[0]) for match in found] == [(4, SINGLE), (5, ASSISTANT)]


def test_literals_of_a_template_are_left_alone_if_they_cannot_begin_a_mark(encoder):
    literals = ["<b>", "a<", f"x{USER}y", "a", "<", "<｜Us"]
    pattern = encoder.quoting_pattern(literals, keep_tags=False)
    for text in ("<b>", "a", "a<b>"):
        assert encoder.quote(text, EDGE, pattern) == text
    for text in literals[1:3] + literals[4:]:
        assert encoder.quote(text, EDGE, pattern) == text.replace("<", f"<{EDGE}")
    assert [encoder.could_begin_mark(text) for text in literals] == [False, True, True, False,
                                                                     True, True]  # fmt: skip


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_tags_of_thoughts_are_kept_where_the_assistant_speaks(encoder, tag):
    quoted = encoder.quote(tag, EDGE, encoder.quoting_pattern([tag], keep_tags=False))
    assert quoted == f"<{EDGE}{tag[1:]}"
    assert encoder.quote(tag, EDGE, encoder.quoting_pattern([], keep_tags=True)) == tag


def test_without_marks_there_is_nothing_to_quote():
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    encoder = MarkedTextEncoder(tokenizer)
    assert encoder.quote("<a>", EDGE, encoder.quoting_pattern([], keep_tags=False)) == "<a>"
    assert encoder.encode("aa", EDGE) == [0, 0] and not encoder.could_begin_mark("a")


def test_a_space_is_put_before_the_first_word_only():
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<m>"])
    encoder = MarkedTextEncoder(tokenizer)
    mark = tokenizer.token_to_id("<m>")
    assert encoder.encode("a", EDGE) == [2] == encoder.encode_text("a")
    assert encoder.encode("a", EDGE, is_start=False) == [1]
    assert encoder.encode("a<m>a", EDGE) == [2, mark, 1]
    assert encoder.encode("<m>a<m>a", EDGE) == [mark, 1, mark, 1]
    assert encoder.encode("a<m>", EDGE, is_start=False) == [1, mark]
    assert tokenizer.encode("a<m>a").ids == [2, mark, 1]


def test_a_text_that_only_a_mark_can_write_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<m>": 0, "[UNK]": 1, "a": 2}, "[UNK]"))
    tokenizer.add_special_tokens(["<m>", "[UNK]"])
    encoder = MarkedTextEncoder(tokenizer)
    assert encoder.encode_text("zzz") == [1]  # an unknown word is not forged
    with pytest.raises(UserError, match="cannot write <m> as plain characters"):
        encoder.encode_text("<m>")


def test_half_a_character_is_refused(encoder):
    with pytest.raises(UserError, match="half a character"):
        encoder.encode_text("a\ud83d")
    assert encoder.encode_text("") == []
