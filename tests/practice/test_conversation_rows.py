"""Rows of conversations as people have them, and which of their tokens have a loss."""

import json
import time

import pytest
from chat_forms import FORMS, form_tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_samples import render_sample
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.conversations import read_conversations, read_pairs
from dsv3_ref.data.conversations import PairFormat
from dsv3_ref.data.packing import TOKEN, first_fit, pack_rows
from dsv3_ref.data.messages import has_loss, iter_texts, normalize_messages
from dsv3_ref.data.row_formats import (
    common_length,
    parse_conversation,
    parse_pair,
    whole_conversation,
)
from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.data.tokenizer_settings import TokenizerSettings
from dsv3_ref.sft import pack_samples

OWN = ChatTemplate(train_tokenizer(["a"], 265))  # one token per byte, V3's own form
ASK, TELL = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}
SYSTEM = {"role": "system", "content": "be brief"}


def chat_of(name: str) -> ChatTemplate:
    form = FORMS[name]
    tokens = {"bos_token": form.bos, "eos_token": form.eos}
    return ChatTemplate(
        form_tokenizer(form), TokenizerSettings(tokens, {"default": form.template}, source=name)
    )


def learned(sample, chat: ChatTemplate) -> str:
    """The text that has a loss."""
    tokens = [token for token, is_learned in zip(*sample) if is_learned]
    return chat.tokenizer.decode(tokens, skip_special_tokens=False)


# ── Forms of rows ──

ROWS = {
    "openai": {"messages": [SYSTEM, ASK, TELL]},
    "sharegpt": {"conversations": [
        {"from": "system", "value": "be brief"}, {"from": "human", "value": "ask"},
        {"from": "gpt", "value": "tell"},
    ]},
    "sharegpt with a system column": {"system": "be brief", "id": "x1", "conversations": [
        {"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"},
    ]},
    "roles under conversations": {"conversations": [SYSTEM, ASK, TELL]},
    "alpaca": {"instruction": "ask", "input": "", "output": "tell", "system": "be brief"},
    "prompt and completion": {"prompt": [SYSTEM, ASK], "completion": [TELL]},
    "JSON in both columns": {"prompt": json.dumps([SYSTEM, ASK]), "completion": "tell"},
    # modelscope/ms-swift #1922 is about rows of this form
    "ms-swift": {"query": "ask", "response": "tell", "system": "be brief", "history": []},
    "developer": {"messages": [SYSTEM | {"role": "developer"}, ASK, TELL]},
    "parts": {"messages": [
        SYSTEM, ASK | {"content": [{"type": "text", "text": "as"}, {"type": "text", "text": "k"}]},
        TELL,
    ]},
    # modelscope/ms-swift pull request #10120: a CSV file holds JSON, with true, false and null
    "a wanted answer": {
        "prompt": [SYSTEM, ASK], "completion": [TELL], "label": True, "images": [], "audio": None,
    },
    "JSON in a column": {
        "messages": json.dumps([SYSTEM, ASK, TELL | {"train": True, "name": None}]),
    },
    # CommandCodeAI/command-code #820: the parts of an assistant's content were dropped
    "parts of the assistant": {"messages": [
        SYSTEM, ASK, TELL | {"content": [{"type": "text", "text": "tell"}]},
    ]},
    # huggingface/datasets #7222 and #7092: null in all rows of one file, a text in another's
    "null fields": {"messages": [SYSTEM, ASK, TELL], "system": None, "tools": None, "id": 1},
    "nulls of a parquet file": {"messages": [
        {**turn, "tool_calls": None, "name": None, "weight": None} for turn in (SYSTEM, ASK, TELL)
    ], "tools": None},
    "empty fields of the client": {"messages": [
        SYSTEM, ASK, TELL | {"refusal": None, "annotations": [], "tool_calls": [], "audio": None}
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_form_of_a_row_is_one_conversation(name):
    """A user trains on a hub data set (hiyouga/LlamaFactory#204 asks for Alpaca's form)."""
    sample = render_sample(OWN, *parse_conversation(ROWS[name]))
    assert sample.tokens == OWN.render([SYSTEM, ASK, TELL])
    assert learned(sample, OWN) == "tell<｜end▁of▁sentence｜>"


def test_fields_without_a_value_are_dropped():
    asked = ASK | {"prefix": False, "images": [], "refusal": "", "audio": {}, "name": None}
    assert normalize_messages([asked], lambda name: False) == [ASK]
    with pytest.raises(UserError, match="turn 1 has 'prefix'"):
        normalize_messages([ASK | {"prefix": True}], lambda name: False)
    assert parse_conversation({"messages": [ASK, TELL], "tools": ""}).tools is None


def test_all_texts_of_a_value():
    assert sorted(iter_texts([{"a": ["b", 5]}, None, ("c", "d")])) == ["a", "b", "c", "d"]
    deep: list = ["a"] * 200_000
    for _ in range(2000):
        deep = [deep]
    start = time.process_time()
    assert len(iter_texts(deep)) == 200_000 and time.process_time() - start < 1


def test_a_weight_is_0_or_1():
    assert has_loss(TELL) and has_loss(TELL | {"weight": 1}) and has_loss(TELL | {"train": True})
    assert not has_loss(TELL | {"weight": 0}) and not has_loss(TELL | {"loss_mask": False})
    with pytest.raises(UserError, match='"weight" is 0.5: write 0 for no loss, or 1'):
        has_loss(TELL | {"weight": 0.5})


def test_the_prompt_of_a_pair_is_what_both_answers_begin_with():
    other = {"role": "assistant", "content": "other"}
    chosen, rejected = [ASK | {"id": 1}, TELL], [ASK | {"id": 2}, other]
    assert parse_pair({"chosen": chosen, "rejected": rejected}) == ([chosen[0]], [TELL], [other])
    mixed = parse_pair({"prompt": "ask", "chosen": [ASK, TELL], "rejected": "other"})
    assert mixed == ([ASK], [ASK, TELL], [other])
    assert common_length([ASK, TELL], [ASK, TELL]) == common_length([ASK, TELL], [ASK, other]) == 1
    assert common_length([ASK], [TELL]) == 0 and common_length([ASK, ASK, TELL], [TELL, ASK]) == 0


def test_what_is_no_whole_conversation():
    assert whole_conversation([ASK], None) == whole_conversation(["a", "b"], None) == []
    assert whole_conversation([TELL, ASK], None) == whole_conversation("a", None) == []
    assert whole_conversation([ASK, TELL], "other") == []
    assert whole_conversation([ASK, TELL], "ask") == [ASK, TELL]


def test_a_talk_of_several_turns_in_one_text():
    """Anthropic's hh-rlhf writes whole talks as texts."""
    text = "\n\nHuman: q0\n\nAssistant: a0\n\nHuman: q\n\nand more\n\nAssistant: a"
    talk = whole_conversation(text, None)
    assert [(turn["role"], turn["content"]) for turn in talk] == [
        ("user", "q0"), ("assistant", "a0"), ("user", "q\n\nand more"), ("assistant", "a")
    ]  # fmt: skip
    other = whole_conversation(text.replace("Assistant: a0", "Assistant: b0"), None)
    assert [common_length(talk, x) for x in (talk, other, talk[:2])] == [3, 1, 1]


def test_history_and_input_of_alpaca():
    row = {"instruction": "q", "input": "x", "output": "a", "history": [["q0", "a0"]]}
    turns = [turn["content"] for turn in parse_conversation(row).messages]
    assert turns == ["q0", "a0", "q\n\nx", "a"]


PAIRS = {
    "texts": {"prompt": "ask", "chosen": "a", "rejected": "b"},
    "messages": {
        "prompt": [ASK], "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
    "implicit": {
        "chosen": [ASK, {"role": "assistant", "content": "a"}],
        "rejected": [ASK, {"role": "assistant", "content": "b"}],
    },
    "a prompt that the answers repeat": {
        "prompt": "ask", "chosen": [ASK, {"role": "assistant", "content": "a"}],
        "rejected": [ASK, {"role": "assistant", "content": "b"}],
    },
    "one text": {
        "chosen": "\n\nHuman: ask\n\nAssistant: a", "rejected": "\n\nHuman: ask\n\nAssistant: b",
    },
    # modelscope/ms-swift #1922 and #2399: its own columns, old and new
    "ms-swift": {"query": "ask", "response": "a", "rejected_response": "b", "history": None},
    "ms-swift's messages": {
        "messages": [ASK, {"role": "assistant", "content": "a"}], "rejected_response": "b",
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "ask"}],
        "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
    },
    "Alpaca": {"instruction": "ask", "input": "", "chosen": "a", "rejected": "b"},
    "a question": {"system": "", "question": "ask", "chosen": "a", "rejected": "b"},
    "JSON of a CSV file": {"prompt": json.dumps([ASK]), "chosen": "a", "rejected": "b"},
    "equal answers": {
        "prompt": [ASK], "chosen": "a", "rejected": "b", "score_chosen": 8.0, "id": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_form_of_a_pair_is_a_prompt_with_two_answers(name, tmp_path):
    """A user trains a reward model on TRL's preference data, with a prompt or without."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps(PAIRS[name])] * 2))
    pairs = read_pairs(str(path), OWN, PairFormat(100))
    want = tuple(OWN.render([ASK, TELL | {"content": answer}]) for answer in "ab")
    assert [tuple([t & TOKEN for t in sample] for sample in pair) for pair in pairs] == [want] * 2


def test_a_pair_has_the_system_text_and_the_input_of_its_row():
    row = {"system": "be brief", "instruction": "ask", "input": "x", "chosen": "a", "rejected": "b"}
    assert parse_pair(row).prompt == [SYSTEM, ASK | {"content": "ask\n\nx"}]
    chosen, rejected = [ASK, TELL], [ASK, TELL | {"content": "other"}]
    row = {"system": "be brief", "chosen": chosen, "rejected": rejected}
    assert parse_pair(row).prompt == [SYSTEM, ASK]
    row = {"prompt": "[{'role': 'user', 'content': 'ask'}]", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="as Python prints them: write JSON"):
        parse_pair(row)


BAD_ROWS = {
    "a number": ({"messages": [ASK | {"content": 7}, TELL]}, "its content is 7, a number"),
    "an image": ({"messages": [ASK | {"content": [{"type": "image_url"}]}, TELL]}, "must be text"),
    "half a character": ({"messages": [ASK | {"content": "\ud83d"}, TELL]}, "a lone surrogate"),
    "tool calls": (
        {"messages": [ASK, TELL | {"tool_calls": [{"function": {"name": "f"}}]}]}, "'tool_calls'",
    ),
    "thoughts": ({"messages": [ASK, TELL | {"reasoning_content": "so"}]}, "'reasoning_content'"),
    "tools": ({"messages": [ASK, TELL], "tools": [{"type": "function"}]}, "has no tools"),
    "tools that are no list": ({"messages": [ASK, TELL], "tools": "{"}, '"tools" is not JSON'),
    "a role": ({"messages": [ASK | {"role": "narrator"}, TELL]}, "turn 1 is by 'narrator'"),
    "all masked": ({"messages": [ASK, TELL | {"weight": 0}]}, "no answer has a loss"),
    "a weight between": ({"messages": [ASK, TELL | {"weight": 0.5}]}, '"weight" is 0.5'),
    "an empty answer": ({"messages": [ASK, TELL | {"content": ""}]}, "an answer is empty"),
    # hiyouga/LlamaFactory #4249: the output is an object; #10116: no messages; #9600: plain text
    "an object as the output": (
        {"instruction": "ask", "output": {"a": 1}}, "its content is {'a': 1}, an object; quote",
    ),
    "no messages": ({"messages": None}, "no list of messages, only messages"),
    "text that is no JSON": ({"messages": "[{'role': 'user'}]"}, '"messages" is not JSON'),
    "plain text": ({"text": "a document"}, "no list of messages, only text"),
    # zai-org/ChatGLM2-6B #349, unslothai/unsloth #337
    "a list": ([ASK, TELL], "it is a list, not an object with named fields"),
    # huggingface/trl #1116: unpaired preferences; hiyouga/LlamaFactory pull request #10656: images
    "an unwanted answer": (
        {"prompt": "ask", "completion": "tell", "label": False}, '"label" is false',
    ),
    "images": ({"messages": [ASK, TELL], "images": ["a.jpg"]}, 'it has "images"'),
    "an empty history": ({"instruction": "a", "output": "b", "history": [["q"]]}, '"history"'),
    "a history that is not a list": (
        {"instruction": "a", "output": "b", "history": 7}, 'its "history" is not a list',
    ),
    "a speaker that is a list": (
        {"messages": [{"from": ["a"], "value": "b"}]}, '"from" of a message is',
    ),
    "deep texts": ({"messages": "[" * 9999 + "]" * 9999}, '"messages" is not JSON: it is nested'),
    "deep tools": (
        {"messages": [ASK, TELL], "tools": "[" * 101 + "]" * 101}, '"tools" is not JSON: it is nes',
    ),
    "a deep message": (
        {"messages": [ASK, TELL], "prompt": '[{"role": ' + "[" * 9999, "label": False}, '"label"',
    ),
    "no columns of ours": ({"text": "hello", "meta": 1}, "only text, meta"),
    "null": ({"messages": [ASK | {"content": None}, TELL]}, "turn 1 is not a role with a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_what_cannot_be_learned_is_left_out_by_number(name, tmp_path):
    """A user's file has one bad row among thousands (vllm and TRL fail with a traceback)."""
    row, sentence = BAD_ROWS[name]
    good = {"messages": [ASK, TELL]}
    path, warnings = tmp_path / "x.jsonl", []
    path.write_text("\n".join(json.dumps(x) for x in (good, row, good)))
    assert len(read_conversations(str(path), OWN, 100, warnings.append)) == 2
    warning, _ = warnings
    assert "line 2 is left out" in warning and sentence in warning


# ── Who has a loss ──

MASKS = {
    "weight": {"weight": 0}, "train": {"train": False}, "trainable": {"trainable": False},
    "loss_mask": {"loss_mask": 0},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["own", *FORMS])
def test_masked_messages_have_no_loss(name, mask):
    """A user marks turns that must not be trained on: OpenAI's `weight`, axolotl's `train`
    (verl-project/verl#5316, #5472)."""
    chat = OWN if name == "own" else chat_of(name)
    end = chat.tokenizer.id_to_token(chat.special_tokens.eos)
    if name in ("Moonlight", "Kimi-K2"):
        chat = ChatTemplate(chat.tokenizer, chat.settings)
        end = "<|im_end|>"
        vars(chat)["stop_token_ids"] = {chat.tokenizer.token_to_id(end)}
    talk = [ASK, TELL | {"content": "one"}, ASK, TELL | {"content": "two"}]
    texts = [text.strip() for text in learned(render_sample(chat, talk), chat).split(end)]
    assert texts == ["one", "two", ""]
    for i, text in ((1, "two"), (3, "one")):
        masked = [turn | MASKS[mask] if j == i else turn for j, turn in enumerate(talk)]
        sample = render_sample(chat, masked)
        assert learned(sample, chat).strip() == text + end
        assert chat.tokenizer.decode(sample.tokens) == chat.tokenizer.decode(chat.render(talk))


def test_blocks_of_the_template_say_what_the_model_writes():
    """A template marks answers by {% generation %} (huggingface/trl's assistant_only_loss)."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )
    settings = TokenizerSettings({}, {"default": template})
    chat = ChatTemplate(OWN.tokenizer, settings)
    talk = [ASK, TELL | {"content": "one", "weight": 0}, ASK, TELL | {"content": "<two"}]
    sample = render_sample(chat, talk)
    assert learned(sample, chat) == "<two<｜end▁of▁sentence｜>"
    assert (
        chat.tokenizer.decode(sample.tokens)
        == "user: ask\nassistant: one\nuser: ask\nassistant: <two\n"
    )


def templated(template: str) -> ChatTemplate:
    return ChatTemplate(OWN.tokenizer, TokenizerSettings({}, {"default": template}))


def test_a_template_without_a_prompt_for_an_answer():
    chat = templated(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    sample = render_sample(chat, [ASK, TELL])
    assert learned(sample, chat) == "assistant: tell<｜end▁of▁sentence｜>"


def test_templates_that_cannot_be_learned_from_are_described():
    some = templated(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.index > 2 %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="has 2 generation blocks for 3 answers"):
        render_sample(some, [ASK, TELL] * 3)
    last = templated(
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
        "{{ m.role + ': ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="renders turn 2 otherwise in a longer conversation"):
        render_sample(last, [ASK, TELL, ASK, TELL])


def test_thoughts_after_an_open_tag_are_learned_and_dropped_ones_are_named():
    """A user fine-tunes R1 on answers with thoughts, which its template drops."""
    chat = chat_of("R1")
    answer = TELL | {"content": "<think>\nso</think>\n\nyes"}
    sample = render_sample(chat, [ASK, answer])
    assert learned(sample, chat) == "so</think>\n\nyes<｜end▁of▁sentence｜>"
    prompt = [token for token, is_learned in zip(*sample) if not is_learned]
    assert prompt == chat.render_prompt([ASK])
    with pytest.raises(UserError, match="drops part of turn 2, such as its thoughts"):
        render_sample(chat, [ASK, answer, ASK, answer])
    with pytest.raises(UserError, match="drops part of turn 2"):
        render_sample(chat_of("V3.1"), [ASK, answer])
    assert learned(render_sample(chat, [ASK, answer | {"weight": 0}, ASK, TELL]), chat) == (
        "tell<｜end▁of▁sentence｜>"
    )


# ── Packing ──


def test_packing_is_chapter_14s_and_takes_seconds_for_many_samples():
    """A user packs 1.5 million conversations: hours in a loop over all rows."""
    lengths = [1 + (i * 7919) % 97 for i in range(3000)]
    samples = [[i] * n for i, n in enumerate(lengths)]
    assert pack_rows(samples, 100, -1) == pack_samples(samples, 100, -1)
    lengths = sorted((1 + (i * 7919) % 4001 for i in range(100_000)), reverse=True)
    start = time.process_time()
    rows = first_fit(lengths, 4096)
    assert time.process_time() - start < 10
    assert max(rows) + 1 < 1.03 * sum(lengths) / 4096
