"""Thoughts of a model in its answers: the tag that a prompt opens, and `reasoning_content`."""

import json
from itertools import chain

import httpx
import openai
import pytest
from chat_forms import EOS, FORMS, form_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_family_end_to_end import write_model
from served import served_saying
from test_serve import served

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_samples import render_sample
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.conversations import read_conversations
from dsv3_ref.data.messages import normalize_messages
from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.data.tokenizer_settings import TokenizerSettings
from dsv3_ref.serving.detokenizer import ByteDecoder
from dsv3_ref.serving.thoughts import ThoughtParser, ThoughtPassage
from dsv3_ref.serving.tool_calls import FORMS as MARKS
from dsv3_ref.serving.tool_calls import AnswerParser

ASK = [{"role": "user", "content": "1+1?"}]
ANSWERS = {  # with the <think> of the prompt: thoughts and text
    "whole": ("so\nit is</think>\n\n2", "so\nit is", "2"),
    # deepseek-ai/DeepSeek-R1 #352: line ends beside the tags were shown
    "line ends": ("\n\nso \n</think>\n \n2 \n", "so", "2 \n"),
    # sgl-project/sglang #4539: an answer without an end of its thoughts
    "no end": ("so it is 2", "so it is 2", ""),
    "half an end": ("so </thi", "so </thi", ""),
    "no thoughts": ("\n</think>2", "", "2"),
    "a second tag": ("<think>so</think>2", "<think>so", "2"),
    "thoughts again": ("so</think>2<think>3</think>", "so", "2<think>3</think>"),
}


def divided(opening: str, *pieces: str) -> tuple[str, str]:
    """Return thoughts and text of an answer in pieces."""
    parser = ThoughtParser(opening)
    parts = [parser.push(piece) for piece in pieces] + [parser.push("", is_last=True)]
    thoughts, texts = zip(*parts)
    return "".join(thoughts), "".join(texts)


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_thoughts_are_divided_from_what_follows_however_it_is_cut(name, data):
    """vllm-project/vllm #13125: the prompt opens <think>, so the answer has only its end."""
    answer, *want = ANSWERS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)])]
    assert divided("<think>\n", *pieces) == tuple(want)
    assert divided("", " <think>", *pieces) == tuple(want)  # the model opens it itself


@pytest.mark.parametrize("answer", ["2", " \n2", '{"a": "</think>"}', "<thi", "<b>2", ""])
def test_an_answer_without_a_tag_has_no_thoughts(answer):
    assert divided("", *answer) == ("", answer)


def test_calls_follow_thoughts_and_are_not_found_in_them():
    marks = MARKS[0]
    call = f"{marks.begin}{marks.call}f{marks.separator}{{}}{marks.end_of_call}{marks.end}"
    parser = AnswerParser(marks, thoughts=ThoughtParser("<think>"))
    parts = [parser.push(x) for x in f"I could {call}</think>I look.{call}"]
    parts.append(parser.push("", is_last=True))
    assert "".join(part.thoughts for part in parts) == f"I could {call}"
    assert "".join(part.text for part in parts) == "I look."
    assert len(list(chain.from_iterable(part.calls for part in parts))) == 1
    assert parser.finish_reason("stop") == "tool_calls"


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_calls_in_thoughts_that_stay_text_are_text(marks, opening):
    """If thoughts are returned as text, a tool call that the model mentions in them is text too."""
    call = f"{marks.begin}{marks.call}f{marks.separator}{{}}{marks.end_of_call}{marks.end}"
    thoughts = f"I could {call}</think>"
    parser = AnswerParser(marks, thoughts=ThoughtPassage(opening))
    written = f"{thoughts}I look.{call}" if opening else f"<think>\n{thoughts}I look.{call}"
    parts = [parser.push(x) for x in written]
    parts.append(parser.push("", is_last=True))
    assert "".join(part.text for part in parts) == f"<think>\n{thoughts}I look."
    assert len(list(chain.from_iterable(part.calls for part in parts))) == 1
    assert not any(part.thoughts for part in parts)


@pytest.mark.parametrize("text", ["<think>so</thi", " <thin", "2</think>", "", "<think>", "so"])
def test_thoughts_that_stay_text_lose_no_character(text):
    for whole in (text, [*text]):
        parser = AnswerParser(MARKS[0])
        parts = [parser.push(piece) for piece in whole] + [parser.push("", is_last=True)]
        assert "".join(part.text for part in parts) == text


# ── V3's own form ──


def test_the_own_form_forgets_thoughts_of_earlier_turns():
    """Clients send back what they received; the templates of R1 and V3.1 drop it."""
    chat = ChatTemplate(train_tokenizer(["a"], 265))
    answer = {"role": "assistant", "content": "2"}
    plain = [*ASK, answer, *ASK]
    for field in ("reasoning_content", "reasoning", "thinking"):
        thinking = [*ASK, answer | {field: "so"}, *ASK]
        assert chat.render_prompt(thinking) == chat.render_prompt(plain)
    cut_off = {"role": "assistant", "content": None, "reasoning_content": "so it"}
    empty = [*ASK, answer | {"content": ""}, *ASK]
    assert chat.render_prompt([*ASK, cut_off, *ASK]) == chat.render_prompt(empty)
    with pytest.raises(UserError, match="has 'reasoning'.*cannot express"):
        chat.render_prompt([ASK[0] | {"reasoning": "so"}])  # a user's


def test_the_own_form_learns_no_answer_without_its_thoughts():
    chat = ChatTemplate(train_tokenizer(["a"], 265))
    answer = {"role": "assistant", "content": "2"}
    thinking = answer | {"reasoning_content": "so"}
    with pytest.raises(UserError, match="has 'reasoning_content'.*leave it out"):
        render_sample(chat, [*ASK, thinking, *ASK, answer])
    sample = render_sample(chat, [*ASK, thinking | {"weight": 0}, *ASK, answer])
    assert sample == render_sample(chat, [*ASK, answer | {"weight": 0}, *ASK, answer])


# ── Over HTTP ──


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory of R1's form, whose prompts end with <think>."""
    folder = tmp_path_factory.mktemp("r1")
    write_model(folder, "R1")
    return folder


@pytest.fixture
def speaking(home, monkeypatch):
    """Return a server whose model says a text, piece by piece."""
    with served_saying(home, monkeypatch) as (say, _, _):
        yield say


def asked(home, **more) -> dict:
    body = {"model": home.name, "messages": ASK, "max_tokens": 20}
    return body | {"extra_body": {"ignore_eos": True} | more}


def test_an_answer_begins_with_the_tag_that_its_prompt_opens(speaking, home):
    """open-webui/open-webui #9808: without it, pages do not know the thoughts as such."""
    with speaking("so</think>2") as client:
        message = client.chat.completions.create(**asked(home)).choices[0].message
    assert message.content == "<think>\nso</think>2"
    assert not hasattr(message, "reasoning_content")
    with speaking("so</think>2") as client:
        deltas = [x.choices[0].delta for x in client.chat.completions.create(
            **asked(home), stream=True
        )]  # fmt: skip
    assert "".join(x.content or "" for x in deltas) == "<think>\nso</think>2"
    answered = [*ASK, {"role": "assistant", "content": "<think>so"}]
    with speaking(" it is</think>2") as client:  # an answer that is continued has its tag already
        choice = client.chat.completions.create(**asked(home) | {"messages": answered}).choices[0]
    assert choice.message.content == " it is</think>2"


def test_thoughts_are_reasoning_content_where_a_client_wants_them_so(speaking, home):
    """vllm-project/vllm #12468 asks for it: clients of DeepSeek's API read this field."""
    body = asked(home, separate_reasoning=True)
    with speaking("so\n</think>\n\n2") as client:
        message = client.chat.completions.create(**body).choices[0].message
    assert (message.reasoning_content, message.content) == ("so", "2")
    with speaking("so\n</think>\n\n2") as client:
        stream = client.chat.completions.create(**body, stream=True, logprobs=True, top_logprobs=1)
        choices = [x.choices[0] for x in stream]
    deltas = [choice.delta for choice in choices]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thoughts) == "so"
    assert "".join(delta.content or "" for delta in deltas) == "2"
    assert not any(x and delta.content for x, delta in zip(thoughts, deltas))  # as its docs read it
    with speaking("so it") as client:  # ends before </think>
        choice = client.chat.completions.create(**body).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("so it", "")
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("4 is</think>It is 4, yes", "4 is", "It is "),
        ("so 4 or </think", "so 4 or </think", ""),
        ("so</think>4", "so", ""),
        ("<think>4</think>so", "<think>4", "so"),  # the prompt has opened the thoughts already
    ],
)
def test_a_stop_text_ends_no_thoughts(home, monkeypatch, text, thoughts, answer):
    """vllm-project/vllm #38499 and #14170: thoughts ended at it, and the answer was empty."""
    pieces: list[str] = []
    monkeypatch.setattr(ByteDecoder, "push", lambda self, _: pieces.pop(0) if pieces else "")
    body = asked(home, separate_reasoning=True) | {"stop": "4", "max_tokens": len(text)}
    with served(home) as (base, _):
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        pieces[:] = text
        choice = client.chat.completions.create(**body).choices[0]
        assert (choice.message.reasoning_content, choice.message.content) == (thoughts, answer)
        assert choice.finish_reason == (
            "stop" if "4" in text.partition("</think>")[2] else "length"
        )
        pieces[:] = text
        stream = [x.choices[0].delta for x in client.chat.completions.create(**body, stream=True)]
        assert "".join(getattr(x, "reasoning_content", None) or "" for x in stream) == thoughts
        assert "".join(x.content or "" for x in stream) == answer


def test_the_option_of_the_server_is_the_default_of_its_requests(home):
    with served(home, separate_reasoning=True) as (base, _):
        url = f"{base}/v1/chat/completions"
        body = {"messages": ASK, "max_tokens": 3}
        first = httpx.post(url, json=body, timeout=30).json()["choices"][0]["message"]
        assert set(first) == {"role", "content", "refusal", "reasoning_content"}
        body |= {"separate_reasoning": False}
        other = httpx.post(url, json=body, timeout=30).json()["choices"][0]["message"]
        assert other["content"].startswith("<think>\n") and "reasoning_content" not in other
        sent = {"messages": [*ASK, first, *ASK], "max_tokens": 1}  # what came is sent back
        assert httpx.post(url, json=sent, timeout=30).status_code == 200


# ── In conversations ──


def chat_of(name: str) -> ChatTemplate:
    form = FORMS[name]
    tokens = {"bos_token": form.bos, "eos_token": form.eos}
    return ChatTemplate(
        form_tokenizer(form), TokenizerSettings(tokens, {"default": form.template}, source=name)
    )


@pytest.mark.parametrize("name", [None, "V2-Lite", "Moonlight"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_clients_send_back_are_dropped_where_a_form_has_none(name, field):
    """can1357/oh-my-pi #1157, defilantech/LLMKube #1276: a client sends back what it received, and
    a server that refuses it ends the conversation."""
    chat = chat_of(name) if name else ChatTemplate(train_tokenizer(["a"], 265))
    answer = {"role": "assistant", "content": "2"}
    for rest in (ASK, []):  # another question, and an answer to continue
        want = chat.render_prompt([*ASK, answer, *rest])
        assert chat.render_prompt([*ASK, answer | {field: "so"}, *rest]) == want
    cut_off = [*ASK, {"role": "assistant", "content": None, field: "so it"}]
    assert chat.render_prompt(cut_off) == chat.render_prompt(ASK)
    with pytest.raises(UserError, match="has 'reasoning_content'.*leave it out"):
        render_sample(chat, [*ASK, answer | {"reasoning_content": "so"}])
    unlearned = answer | {"weight": 0}
    talk = [*ASK, answer]
    sample = render_sample(chat, [*ASK, unlearned | {field: "so"}, *talk])
    assert sample == render_sample(chat, [*ASK, unlearned, *talk])


@pytest.mark.parametrize("name", ["R1", "V3.1"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_earlier_thoughts_in_a_field_are_dropped_as_those_in_tags(name, field):
    """These templates know no field for thoughts, but drop what stands before </think>."""
    chat = chat_of(name)
    answer, tagged = ({"role": "assistant", "content": x} for x in ("2", "<think>so</think>2"))
    want = chat.render_prompt([*ASK, answer, *ASK])
    assert chat.render_prompt([*ASK, tagged, *ASK]) == want
    assert chat.render_prompt([*ASK, answer | {field: "so"}, *ASK]) == want


def test_thoughts_in_a_field_are_learned():
    """Data of R1's distillations keep them apart: they are what the model shall write."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    chat = chat_of("R1")
    sample = render_sample(chat, [*ASK, answer | {"reasoning_content": "so"}])
    tokens = [token for token, is_learned in zip(*sample) if is_learned]
    text = chat.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == f"so\n</think>\n\n2{EOS}"


def test_a_field_for_thoughts_hides_no_other_field():
    """A form with thoughts but without calls dropped the calls of a turn that has both."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "a", "reasoning_content": "so", "tool_calls": [call]}
    with pytest.raises(UserError, match="turn 2 has 'tool_calls'"):
        normalize_messages([*ASK, turn], {"reasoning_content"}.__contains__)
    assert json.dumps(normalize_messages([*ASK, turn], lambda name: True)[1]["tool_calls"])


def test_answers_without_the_thoughts_that_a_prompt_opens_are_told(tmp_path):
    """huggingface/trl #4147: what a model learned did not follow the prompt that it is given."""
    path = tmp_path / "a.jsonl"
    plain, thinking = ({"role": "assistant", "content": x} for x in ("2", "<think>so</think>2"))
    answers = [plain, thinking, plain, plain | {"reasoning_content": "so"}]
    path.write_text("\n".join(json.dumps({"messages": [*ASK, x]}) for x in answers))
    for name, told in (("R1", True), ("V3", False)):
        warnings: list[str] = []
        rows = read_conversations(str(path), chat_of(name), 200, warnings.append)
        assert len(rows) == (4 if told else 3)  # V3's form has no field for thoughts
        assert any("2 rows answer without thoughts" in x for x in warnings) is told
