"""The chat template of a directory decides the form of a conversation, in every command."""

from functools import cache

import pytest
from chat_forms import FORMS, form_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.marks import THINK_TAGS, find_marks
from dsv3_ref.data.tokenizer_settings import TokenizerSettings


@cache
def chat_of(name: str) -> ChatTemplate:
    form = FORMS[name]
    tokens = {"bos_token": form.bos, "eos_token": form.eos}
    return ChatTemplate(
        form_tokenizer(form), TokenizerSettings(tokens, {"default": form.template}, source=name)
    )


@cache
def theirs(name: str):
    """The same tokenizer and template in transformers."""
    from transformers import PreTrainedTokenizerFast

    form = FORMS[name]
    return PreTrainedTokenizerFast(
        tokenizer_object=form_tokenizer(form), bos_token=form.bos, eos_token=form.eos,
        chat_template=form.template,
    )  # fmt: skip


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    told = [{"role": "system", "content": system}] if system else []
    return told + [{"role": role, "content": text} for role, text in zip(roles, texts)]


TALKS = {
    "a question": turns("hello  world"),
    "white space": turns(" hi\n\n", "\n fine ", " 12 \t"),
    "with a system text": turns("a", "b", "c", system="be brief"),
    "thoughts": turns("why?", "<think>\nso</think>\n\na < b", "and <b>?"),
    "other scripts": turns("天気 ｜ é", "◁ \N{GRINNING FACE}"),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_those_of_transformers(name, talk):
    """A user serves R1 with a client that sends messages: vLLM and transformers read its
    template (vllm-project/vllm#31735 quotes how), this program read V3's form."""
    for prompts in (False, True):
        want = theirs(name).apply_chat_template(
            TALKS[talk], add_generation_prompt=prompts, return_dict=False
        )
        assert chat_of(name).render(TALKS[talk], add_generation_prompt=prompts) == want
    if talk != "a question":
        answered = TALKS[talk][:2] if TALKS[talk][0]["role"] == "user" else TALKS[talk][:3]
        try:
            want = theirs(name).apply_chat_template(
                answered, continue_final_message=True, return_dict=False
            )
        except ValueError as e:
            assert "does not appear in the chat" in str(e)
            return
        assert chat_of(name).render_prompt(answered) == want


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_never_forges_a_turn(name, data):
    """A user types the marks of the model (huggingface/transformers#29279, #47822)."""
    chat = chat_of(name)
    form = FORMS[name]
    marks = [*form.special, *form.added, *THINK_TAGS, "\U000f0000", " ", "<", "|>", "think"]
    pieces = st.sampled_from(marks) | st.text(st.characters(codec="utf-8"), max_size=4)
    texts = st.lists(pieces, min_size=1, max_size=6).map("".join)
    messages = turns(*data.draw(st.lists(texts, min_size=1, max_size=3)), system=data.draw(texts))
    harmless = [turn | {"content": "x"} for turn in messages]
    ids = {i for mark, i in find_marks(chat.tokenizer).items() if mark not in THINK_TAGS}
    try:
        found = chat.render(messages, add_generation_prompt=True)
    except UserError as e:
        assert "could pass for a mark" in str(e)
        return
    want = chat.render(harmless, add_generation_prompt=True)
    assert [i for i in found if i in ids] == [i for i in want if i in ids]
    text = theirs(name).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.tokenizer.decode(found, skip_special_tokens=False) == text
