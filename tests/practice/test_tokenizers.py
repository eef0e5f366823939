"""Tokenizers of the family's real directories: special tokens, stops, and files to convert."""

import base64
import json

import pytest
from chat_forms import FORMS, MOON, TEXT, form_tokenizer, write_form
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.data.tokenizer_conversion import KIMI_SPLITS
from dsv3_ref.data.tokenizer_settings import copy_tokenizer_settings, load_tokenizer_settings

# ── tiktoken.model alone: Moonlight, Kimi-K2 ──


def tiktoken_ranks() -> dict[bytes, int]:
    """Bytes, and the merges of a small BPE in their order."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = b"th he in er an the ing and hello world fine day 12 123 en hell".split()
    words += ["天".encode()[:2], "天".encode(), "天気".encode(), b" t", b" th", b" the"]
    for word in sorted(words, key=len):
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end], len(ranks))
    return ranks


def write_tiktoken(folder, **config):
    ranks = tiktoken_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    named = ["[BOS]", "[EOS]", *MOON]
    decoder = {str(len(ranks) + i): {"content": s, "special": True} for i, s in enumerate(named)}
    values = {
        "tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": decoder,
        "bos_token": "[BOS]", "eos_token": "[EOS]", "chat_template": FORMS["Moonlight"].template,
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return ranks


WORDS = "the hello World's 天気 fine day 12345 é Ü".split()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    tiktoken = pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("kimi")
    ranks = write_tiktoken(folder)
    theirs = tiktoken.Encoding(
        "kimi", pat_str=KIMI_SPLITS, mergeable_ranks=ranks, special_tokens={}
    )
    return load_tokenizer(folder), theirs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([*"the hello World's 天気 fine day 12345 \n\t é Ü".split(" "), " "])
    ).map("".join)
    | st.text(st.characters(codec="utf-8"))
)
def test_a_converted_tiktoken_file_encodes_as_tiktoken_does(converted, text):
    """A user loads Kimi-K2, whose tokenizer is Python code beside tiktoken.model."""
    ours, theirs = converted
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode(ids) == text


def test_a_directory_with_a_tiktoken_file_alone_chats(tmp_path):
    ranks = write_tiktoken(tmp_path)
    chat = ChatTemplate.from_dir(tmp_path)
    tokens = chat.render_prompt([{"role": "user", "content": "hello<|im_end|>"}])
    text = chat.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.endswith("<|im_user|>user<|im_middle|>hello<|im_end|><|im_end|>"
                         "<|im_assistant|>assistant<|im_middle|>")  # fmt: skip
    ends = chat.tokenizer.token_to_id("<|im_end|>")
    assert tokens.count(ends) == 2  # of the default system turn and of the question
    assert chat.tokenizer.get_vocab_size() == len(ranks) + 256
    assert chat.stop_token_ids == {chat.tokenizer.token_to_id("[EOS]")}


BROKEN = {
    "another class": ({"tokenizer_class": "OtherTokenizer"}, None, "add a tokenizer.json"),
    "no base64": ({}, "%% 0\n", "is not a tiktoken file"),
    "a long token": ({}, f"{'AAAA' * 342} 0\n", "a token has 1,026 bytes"),
    "added tokens": ({"added_tokens_decoder": [1]}, None, "must map ids to"),
    "missing ranks": ({}, "AA== 0\nAQ== 2\n", "ranks are missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tiktoken_file_that_cannot_be_read_is_one_sentence(name, tmp_path):
    config, content, sentence = BROKEN[name]
    write_tiktoken(tmp_path, **config)
    if content:
        (tmp_path / "tiktoken.model").write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path)


def test_an_id_that_is_too_high_is_refused(tmp_path):
    """A list of two billion ids took 16 GB."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 2**31 - 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has the token id 2,147,483,647, above"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1\2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="cannot be read .*: add a tokenizer.json"):
        load_tokenizer(tmp_path)


# ── Special tokens and stops ──


STOPS = {
    "one": ({"eos_token_id": 7}, {7}), "several": ({"eos_token_id": [7, 9]}, {7, 9}),
    "none": ({}, set()),
}  # fmt: skip


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", STOPS)
def test_answers_end_with_every_stop_token_of_the_directory(name, file, tmp_path):
    """An answer of Kimi-K2 never ends: its stop token is not the tokenizer's end token
    (vllm and transformers read generation_config.json)."""
    write_form(tmp_path, FORMS["Kimi-K2"])
    generation, stops = STOPS[name]
    (tmp_path / file).write_text(json.dumps(generation))
    chat = ChatTemplate.from_dir(tmp_path)
    assert chat.stop_token_ids == stops | {chat.tokenizer.token_to_id("[EOS]")}
    run = tmp_path / "run"
    run.mkdir()
    copy_tokenizer_settings(tmp_path, run)
    again = load_tokenizer_settings(run)
    assert again.stop_token_ids == stops and again.chat_templates == chat.settings.chat_templates


def test_a_begin_token_where_the_directory_says_so(tmp_path):
    """A user compares logits with transformers: a begin token too many or too few."""
    for adds in (True, False):
        chat = ChatTemplate.from_dir(write_form(tmp_path, FORMS["V3"], add_bos_token=adds))
        bos = chat.tokenizer.token_to_id(FORMS["V3"].bos)
        assert (chat.encode_prompt("hello")[0] == bos) == adds


BAD_CONFIGS = {
    "a token": ({"bos_token": 7}, "bos_token of .* is neither"),
    "a template": ({"chat_template": 7}, "neither a string nor a list"),
    "a list": ({"chat_template": [{"name": "default"}]}, "neither a string nor a list"),
    "Jinja": ({"chat_template": "{% if %}"}, "is not valid Jinja"),
    "an end token that is not there": ({"eos_token": "<none>"}, "the tokenizer lacks <none>"),
    "no default": ({"chat_template": [{"name": "rag", "template": ""}]}, "called rag, but none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_broken_tokenizer_config_is_one_sentence(name, tmp_path):
    config, sentence = BAD_CONFIGS[name]
    with pytest.raises(UserError, match=sentence):
        chat = ChatTemplate.from_dir(write_form(tmp_path, FORMS["GigaChat3"], **config))
        chat.render_prompt([{"role": "user", "content": "hello"}])
        assert chat.stop_token_ids


def test_where_a_template_may_stand(tmp_path):
    """Files come before tokenizer_config.json, as in transformers."""
    write_form(tmp_path, FORMS["V3"], chat_template=[{"name": "default", "template": "a"}])
    texts = []
    for name, text in (("chat_template.json", '{"chat_template": "b"}'), (".jinja", "c")):
        texts.append(ChatTemplate.from_dir(tmp_path).templates["default"].text)
        (tmp_path / name.replace(".jinja", "chat_template.jinja")).write_text(text)
    texts.append(ChatTemplate.from_dir(tmp_path).templates["default"].text)
    assert texts == ["a", "a", "c"]


def test_a_base_model_has_no_form(tmp_path):
    write_form(tmp_path, FORMS["Moonlight"], chat_template=None)
    with pytest.raises(UserError, match="has no chat template, and its tokenizer lacks"):
        ChatTemplate.from_dir(tmp_path).render_prompt([{"role": "user", "content": "hello"}])


def test_text_in_the_tests_tokenizer_is_whole():
    tokenizer = form_tokenizer(FORMS["V3"])
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_a_sentencepiece_file_is_converted(tmp_path):
    """A user brings a Llama-like directory with tokenizer.model alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    chat = ChatTemplate.from_dir(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("a fine day, hello world", "think 12 é"):
        assert chat.encode(text) == theirs.encode(text)
    assert chat.stop_token_ids == {theirs.eos_id()}
