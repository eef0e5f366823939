"""The chat template of a directory decides the form of a conversation, in every command."""

from functools import cache

import pytest
from chat_forms import FORMS, form_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.export.tokenizer_files import CHAT_TEMPLATE
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


@pytest.mark.parametrize("name", FORMS)
def test_an_empty_answer_is_not_continued(name):
    """abdulmominsakib/localmind pull request #11: clients send back an answer that failed as an
    empty one. R1's prompt for an answer was then without its <think>."""
    chat = chat_of(name)
    want = chat.render_prompt(turns("a"))
    for content in ("", " \n", None, []):
        empty = {"role": "assistant", "content": content, "tool_calls": None}
        assert chat.render_prompt([*turns("a"), empty]) == want
    assert chat.render_prompt(turns("a", "b")) != want


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


@pytest.mark.parametrize("talk", TALKS)
def test_the_exported_template_is_v3s_own_form(talk):
    """A user exports a run and loads the directory again: the form is the same."""
    own = ChatTemplate(form_tokenizer(FORMS["V3"]))
    tokens = {"bos_token": FORMS["V3"].bos, "eos_token": FORMS["V3"].eos}
    exported = ChatTemplate(own.tokenizer, TokenizerSettings(tokens, {"default": CHAT_TEMPLATE}))
    if talk != "thoughts":  # whose tags are tokens only where a template can mean them
        assert exported.render_prompt(TALKS[talk]) == own.render_prompt(TALKS[talk])
        assert exported.render(TALKS[talk]) == own.render(TALKS[talk])


REFUSED = {
    "a system text without the role": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        turns("hello", system="be brief"), "drops a system text",
    ),
    "the template's own refusal": (
        "{{ raise_exception('no ' + messages[0].role) }}", turns("hello"), "refuses .*: no user",
    ),
    "a field that is missing": ("{{ messages[0].name.first }}", turns("a"), "needs what"),
    "an error of its own": ("{{ 1 / 0 }}", turns("a"), "fails on this conversation: division"),
    "an unsafe template": (
        "{{ messages.__class__.__mro__ }}", turns("a"), "refuses this conversation: .*unsafe",
    ),
    "a change that hides a mark": (
        "{{ messages[0].content[:3] | replace('\U000f0000', '') }}x", turns("a<<"), "could pass",
    ),
    "tools": ("{{ messages[0].content }}", turns("a"), "has no tools"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_express_is_one_sentence(name):
    template, talk, sentence = REFUSED[name]
    settings = TokenizerSettings({}, {"default": template})
    chat = ChatTemplate(form_tokenizer(FORMS["V3"]), settings)
    tools = [{"type": "function"}] if name == "tools" else None
    with pytest.raises(UserError, match=sentence):
        chat.render_prompt(talk, tools)


def test_tools_and_thoughts_are_rendered_where_the_template_has_them():
    """A user sends tools to Kimi-K2, and reasoning_content to a template that reads it."""
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "parameters": {}}}]
    call = {"id": "f:0", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    talk = [
        *turns("a"), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "f:0", "content": "<|im_end|>7"},
    ]  # fmt: skip
    chat = chat_of("Kimi-K2")
    found = chat.render_prompt(talk, tools)
    want = theirs("Kimi-K2").apply_chat_template(
        talk, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert chat.tokenizer.decode(found, skip_special_tokens=False) == want
    assert found.count(chat.tokenizer.token_to_id("<|im_end|>")) == 4
    thought = [*turns("a"), {"role": "assistant", "reasoning": "so", "content": "b"}]
    text = chat_of("GigaChat3").tokenizer.decode(chat_of("GigaChat3").render(thought))
    assert "<think>so</think>assistant" in text
    assert chat.render(thought) == chat.render([*turns("a"), thought[1] | {"reasoning": None}])
    with pytest.raises(UserError, match="refuses .*: two user turns in a row"):
        chat_of("GigaChat3").render([*turns("a"), *turns("b")])
    assert chat_of("V3").render([*turns("a"), *turns("b")], add_generation_prompt=True)


@pytest.mark.parametrize("name", FORMS)
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
