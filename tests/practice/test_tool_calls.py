"""Calls of tools: the marks that a model writes become `tool_calls`, and a client's return."""

import json
from dataclasses import replace
from itertools import chain

import datasets
import httpx
import pytest
import torch
from chat_forms import FORMS, LOOP, TOOLS, V31, ChatForm, form_tokenizer, write_form
from hypothesis import given, settings
from hypothesis import strategies as st
from served import served_saying
from test_serve import served

from dsv3_ref.checkpoints.native import save
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.files import valid_rows
from dsv3_ref.data.row_formats import parse_conversation
from dsv3_ref.data.tokenizer import vocab_size
from dsv3_ref.data.tokenizer_settings import TokenizerSettings
from dsv3_ref.model import Transformer
from dsv3_ref.serving.tool_calls import FORMS as MARKS
from dsv3_ref.serving.tool_calls import AnswerParser, find_call_marks

DEEPSEEK, KIMI = MARKS
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
F_CALL = V31_CALL.format("f", "{}")
KIMI_CALL = "<|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


def between(marks, *calls: str) -> str:
    return marks.begin + "\n".join(calls) + marks.end


def parsed(marks, *pieces: str) -> tuple[str, list]:
    """Return the text and the (name, arguments) of the calls of an answer in pieces."""
    parser = AnswerParser(marks)
    parts = [parser.push(piece) for piece in pieces] + [parser.push("", is_last=True)]
    calls = [call["function"] for call in chain.from_iterable(part.calls for part in parts)]
    return "".join(part.text for part in parts), [(x["name"], x["arguments"]) for x in calls]


ANSWERS = {
    "V3": (DEEPSEEK, "I look." + between(DEEPSEEK, V3_CALL.format("get_weather", '{"a": 1}'))),
    "V3.1": (DEEPSEEK, between(DEEPSEEK, F_CALL, V31_CALL.format("g", '{"é": "}"}'))),
    "Kimi-K2": (KIMI, "so" + between(KIMI, KIMI_CALL.format("get.it", '{"a": [1]}'))),
    "text after": (DEEPSEEK, between(DEEPSEEK, F_CALL) + " done"),
    # vllm pull request #48367: marks without a call were an empty list of calls, the text was lost
    "no call": (DEEPSEEK, between(DEEPSEEK)[:-1]),
    "no arguments": (DEEPSEEK, between(DEEPSEEK, V31_CALL.format("f", "{'a': 1}"))),
    "a list": (DEEPSEEK, between(DEEPSEEK, V31_CALL.format("f", "[1]"))),
    "junk": (DEEPSEEK, DEEPSEEK.begin + "hello" + F_CALL),
    # vllm #42210: a stop text or the limit ends the answer inside a call
    "cut off": (DEEPSEEK, "I look." + between(DEEPSEEK, V31_CALL.format("f", '{"a": 1}'))[:-40]),
    "half a mark": (DEEPSEEK, "a <｜tool▁ca"),
    "no marks": (None, between(DEEPSEEK, F_CALL)),
}  # fmt: skip
WANT = {
    "V3": ("I look.", [("get_weather", '{"a": 1}')]),
    "V3.1": ("", [("f", "{}"), ("g", '{"é": "}"}')]),
    "Kimi-K2": ("so", [("get.it", '{"a": [1]}')]),
    "text after": (" done", [("f", "{}")]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_parsed_or_the_text_is_kept(name):
    marks, text = ANSWERS[name]
    assert parsed(marks, text) == WANT.get(name, (text, []))


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_pieces_of_a_stream_do_not_matter(name, data):
    """sglang #35563: calls of a stream of two pieces were lost."""
    marks, text = ANSWERS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert parsed(marks, *pieces) == parsed(marks, text)


def test_marks_are_found_in_the_tokenizer():
    assert find_call_marks(form_tokenizer(FORMS["Kimi-K2"])) == KIMI
    assert find_call_marks(form_tokenizer(FORMS["V3"])) is None
    hidden = ChatForm("", (*FORMS["V3"].special, *TOOLS))  # special: no part of a decoded text
    assert find_call_marks(form_tokenizer(hidden)) is None


# ── Over HTTP ──

WITH_TOOLS = V31.replace(
    "{{ bos_token }}", "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
).replace(
    "{%- elif message['role'] == 'assistant' %}",
    "{%- elif message['role'] == 'tool' %}{{ '<result>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' and message['tool_calls'] %}"
    "{% for call in message['tool_calls'] %}"
    "{{ call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] }}{% endfor %}"
    "{%- elif message['role'] == 'assistant' %}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with V3.1's form and its marks of calls."""
    form = ChatForm(WITH_TOOLS, added=(*FORMS["V3.1"].added, *DEEPSEEK.texts))
    out = tmp_path_factory.mktemp("tools") / "model"
    config = replace(
        TINY, vocab_size=vocab_size(form_tokenizer(form)), dim=16, n_layers=2, n_heads=2,
        n_mtp_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    save(Transformer(config), out)
    return write_form(out, form)


@pytest.fixture
def speaking(folder, monkeypatch):
    """Return a server whose model says a text, piece by piece."""
    with served_saying(folder, monkeypatch) as server:
        yield server


ASK = {
    "model": "model", "messages": [{"role": "user", "content": "weather?"}], "tools": [TOOL],
    "max_tokens": 60, "extra_body": {"ignore_eos": True},
}  # fmt: skip


def test_the_official_client_gets_calls(speaking):
    text = "I look." + between(DEEPSEEK, V3_CALL.format("get_weather", '{"city": "Paris"}'))
    say, _, service = speaking
    with say(text) as client:
        choice = client.chat.completions.create(**ASK).choices[0]
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    with say(text) as client:
        deltas = [x.choices[0].delta for x in client.chat.completions.create(**ASK, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    (streamed,) = chain.from_iterable(delta.tool_calls or () for delta in deltas)
    assert (streamed.index, streamed.function.name) == (0, "get_weather")
    assert streamed.function.arguments == '{"city": "Paris"}'
    plain = {k: v for k, v in ASK.items() if k != "tools"}
    with say(text) as client:  # without tools, the marks are text
        assert client.chat.completions.create(**plain).choices[0].message.content == text
    assert service.requests[200] == 3


def test_an_answer_ends_because_of_its_calls(speaking):
    say, base, service = speaking
    eos = service.special_tokens.eos
    text = between(DEEPSEEK, F_CALL)[:7]
    body = ASK | {"logit_bias": {str(eos): 100}, "max_tokens": 9}
    body.pop("extra_body")
    with say(text) as client:  # cut off: text, and the reason is the end token
        choice = client.chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    parser = AnswerParser(DEEPSEEK)
    parser.push(between(DEEPSEEK, F_CALL), is_last=True)
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"


def test_a_call_and_its_result_come_back(speaking):
    """A client sends the assistant's message and the tool's result in the next request."""
    _, base, _ = speaking
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"a":1}'},
    }
    talk = [
        *ASK["messages"], {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]  # fmt: skip
    body = {"messages": talk, "tools": [TOOL], "max_tokens": 1}
    assert httpx.post(f"{base}/v1/chat/completions", json=body, timeout=30).status_code == 200
    tokens = httpx.post(f"{base}/tokenize", json={"messages": talk, "tools": [TOOL]}).json()
    text = httpx.post(f"{base}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert 'get_weather<｜tool▁sep｜>{"a":1}<result>sunny' in text


def test_calls_that_cannot_be_parsed_are_refused_by_name(folder, tmp_path):
    form = ChatForm(WITH_TOOLS, added=FORMS["V3.1"].added)  # without the marks of calls
    for name in ("config.json", "model.safetensors", "manifest.json"):
        if (folder / name).exists():
            (tmp_path / name).symlink_to(folder / name)
    write_form(tmp_path, form)
    with served(tmp_path, verify=False) as (base, _):
        body = {"messages": ASK["messages"], "tools": [TOOL]}
        error = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=30)
        assert error.status_code == 400 and error.json()["error"]["param"] == "tools"
        body["tool_choice"] = "none"
        assert httpx.post(f"{base}/v1/chat/completions", json=body, timeout=30).status_code == 200


# ── Templates ──


def chat_of(template: str) -> ChatTemplate:
    return ChatTemplate(form_tokenizer(FORMS["V3"]), TokenizerSettings({}, {"default": template}))


CALLS = LOOP + (
    "{{ message.role }}{% if message.content %}:{{ message.content }}{% endif %}"
    "{% for c in message.tool_calls %}"
)
ENDS = "{% endfor %};{% endfor %}"


def talk_with(arguments: object, content: object = None) -> list[dict]:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"t": "<warm>"}'},
    ]


@pytest.mark.parametrize(
    "print_arguments",
    [
        # QwenLM/Qwen3-Coder #444: OpenAI's protocol sends JSON text, templates read an object;
        # mudler/vllm.cpp #526: `tojson` of a text is quoted twice.
        pytest.param("{{ c.function.arguments | tojson }}", id="tojson"),
        pytest.param("{{ '' + c.function.arguments }}", id="joined"),
        pytest.param("{{ '' ~ c.function.arguments }}", id="tilde"),
        pytest.param("{{ c.function.arguments }}", id="printed"),
        pytest.param(
            "{% if c.function.arguments is string %}{{ c.function.arguments }}"
            "{% else %}{{ c.function.arguments | tojson }}{% endif %}", id="either",
        ),
        pytest.param(
            '{{ "{" }}{% for k, v in c.function.arguments | items %}"{{ k }}": {{ v | tojson }}'
            '{% endfor %}{{ "}" }}', id="items",
        ),
    ],
)  # fmt: skip
def test_arguments_are_an_object_and_a_text(print_arguments):
    chat = chat_of(CALLS + "{{ c.function.name }}" + print_arguments + ENDS)
    for arguments in ('{"city": "Wörth<"}', {"city": "Wörth<"}):
        text = chat.tokenizer.decode(chat.render(talk_with(arguments)))
        assert 'look{"city": "Wörth<"};' in text


@pytest.mark.parametrize("arguments", ['{"cmd": "l', "[]", '"Paris"', "null x"])
def test_arguments_that_are_no_object_are_kept_or_refused(arguments):
    """vllm #47761: a call that was cut off broke all later turns; sglang pull request #28035."""
    chat = chat_of(CALLS + "{{ c.function.name }}{{ '' + c.function.arguments }}" + ENDS)
    assert f"look{arguments};" in chat.tokenizer.decode(chat.render(talk_with(arguments)))
    chat = chat_of(CALLS + "{{ c.function.name }}{{ c.function.arguments | items | list }}" + ENDS)
    with pytest.raises(UserError, match="fails on this conversation"):
        chat.render(talk_with(arguments))


OLD_V3 = (  # V3's first template takes calls only where content is null
    LOOP + "{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' and message['content'] is none %}"
    "{% for c in message['tool_calls'] %}{{ c['function']['name'] + c['function']['arguments'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'tool' %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def test_a_template_that_drops_a_call_or_a_result_is_refused():
    """Clients send "" beside calls; jekalmin/extended_openai_conversation pull request #456."""
    chat = chat_of(OLD_V3)
    for content in (None, ""):
        assert "look{}" in chat.tokenizer.decode(chat.render(talk_with("{}", content)))
    with pytest.raises(UserError, match="drops the calls of tools"):
        chat.render(talk_with("{}", "I look."))
    with pytest.raises(UserError, match="drops turn 2, by 'tool'"):
        chat_of(FORMS["V3"].template).render(
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "7"}]
        )


def test_tools_of_parquet_have_only_their_own_parameters(tmp_path):
    """modelscope/ms-swift #6467: Arrow gives every tool the parameters of all others, as null."""

    def tool(name: str) -> dict:
        return {"type": "function", "function": {"name": name, "parameters": {name: {"type": "x"}}}}

    call = {"type": "function", "function": {"name": "a", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "b", "arguments": {"b": 2}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call, other]},
            ],
            "tools": [tool("a"), tool("b")],
        }
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (row,), _ = valid_rows(str(tmp_path / "a.parquet"), parse_conversation, str)
    assert json.loads(json.dumps(row.tools)) == rows[0]["tools"]
    assert row.messages[1]["tool_calls"] == [call, other]
