"""What clients of OpenAI's protocol send, and what they read: each case was a report elsewhere."""

import gzip
import json
import math
import shutil
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
from test_serve import NAME, folder, quiet, served

from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3_ref.data.tokenizer_settings import load_tokenizer_settings
from dsv3_ref.serving.fields import MAX_LOGPROBS
from dsv3_ref.serving.json_body import parse_json

__all__ = ["folder"]  # the fixture that makes a model
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "we talk"}]
PLAIN = {
    COMPLETE: {"prompt": "we talk", "max_tokens": 5, "seed": 1},
    CHAT: {"messages": TALK, "max_tokens": 5, "seed": 1},
}


@pytest.fixture(scope="module")
def here(folder):
    with served(folder, num_speculative_tokens=1) as found:
        yield found


@pytest.fixture
def post(here):
    """Return a function that sends a body to an endpoint."""

    def send(path: str, body: object, **options) -> httpx.Response:
        options = {"timeout": 30} | options
        if isinstance(body, bytes):
            kind = {"content-type": "application/json"}
            return httpx.post(here[0] + path, content=body, headers=kind, **options)
        return httpx.post(here[0] + path, json=body, **options)

    return send


def answer(post, path: str, **changes) -> dict:
    """Return the first choice of a response, which must be a success."""
    response = post(path, PLAIN[path] | changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def text_of(choice: dict) -> str:
    """Return the text of a choice of either endpoint."""
    return choice["text"] if "text" in choice else choice["message"]["content"]


# ── Null is absent ──

NULLABLE = [
    "model", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "n",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream",
    "stream_options", "logprobs", "user", "metadata", "store", "service_tier", "min_tokens",
    "stop_token_ids", "ignore_eos",
]  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_null_is_absent(post, path):
    """Clients in Java, Go and C# serialize what is not set as null: vllm #19862 (max_tokens)."""
    more = {
        COMPLETE: ["best_of", "echo", "suffix", "prompt_logprobs"],  # a field of vLLM
        CHAT: [
            "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format",
            "functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort",
            "verbosity", "web_search_options", "prompt_cache_key", "safety_identifier", "echo",
            "guided_json",
        ],
    }  # fmt: skip
    want = text_of(answer(post, path))
    names = NULLABLE + more[path]
    assert text_of(answer(post, path, **dict.fromkeys(names))) == want
    for name in names:
        assert text_of(answer(post, path, **{name: None})) == want, name


@pytest.mark.parametrize(
    "old, new, num_tokens",
    [
        # Both names in one body, one of them null: an adapter fills in what it was not given.
        pytest.param(3, None, 3, id="new name null"),
        pytest.param(None, 4, 4, id="old name null"),
        # llama-cpp-python #1907, ik_llama.cpp pull request #2321: the new name was ignored.
        pytest.param(..., 4, 4, id="new name"),
        pytest.param(4, 4, 4, id="both"),
        pytest.param(3, 4, None, id="both, different"),
    ],
)
def test_the_limit_has_two_names(post, old, new, num_tokens):
    names = {"max_tokens": old, "max_completion_tokens": new}
    body = {"messages": TALK, "ignore_eos": True} | {k: v for k, v in names.items() if v is not ...}
    response = post(CHAT, body)
    if num_tokens is None:
        assert response.status_code == 400 and response.json()["error"]["param"] == "max_tokens"
    else:
        assert response.json()["usage"]["completion_tokens"] == num_tokens


# ── Conversations ──


def render(here, messages: list[dict], **changes) -> str:
    """Return the prompt of a conversation as text, marks included."""
    (tokens,) = here[1].encode_prompts({"messages": messages} | changes, True)
    marks = here[1].tokenizer.decode(tokens, skip_special_tokens=False)
    return marks.replace("<｜begin▁of▁sentence｜>", "").replace("<｜end▁of▁sentence｜>", "$")


def turn(role: str, content: object = "a", **more) -> dict:
    return {"role": role, "content": content} | more


@pytest.mark.parametrize(
    "messages, prompt",
    [
        # halogen-server #3, ogx #6069: coding agents send `developer` in the place of `system`.
        pytest.param(
            [turn("developer"), turn("user", "b")], "a<｜User｜>b<｜Assistant｜>", id="developer"
        ),
        # Clients with several speakers, or that resend after an error, send two user turns.
        pytest.param(
            [turn("user"), turn("user", "b")], "<｜User｜>a\n\nb<｜Assistant｜>", id="two turns"
        ),
        pytest.param(
            [turn("system"), turn("user", "b"), turn("developer", "c")],
            "a\n\nc<｜User｜>b<｜Assistant｜>",
            id="two instructions",
        ),
        # DeepSeek's `prefix`, vLLM's `continue_final_message`: the answer's beginning is given.
        pytest.param(
            [turn("user"), turn("assistant", "b")], "<｜User｜>a<｜Assistant｜>b", id="continue"
        ),
        # vllm pull request #10463, anomalyco/opencode #43089: clients keep their own fields
        pytest.param(
            [turn("user", id=7, opts={"visible": False}, agent="cli", type="text")],
            "<｜User｜>a<｜Assistant｜>", id="fields of the client",
        ),
        # openai/openai-python #1812
        pytest.param(
            [turn("system", []), turn("user", "b")], "<｜User｜>b<｜Assistant｜>", id="no parts"
        ),
        pytest.param(
            [turn("user"), turn("assistant", "b", prefix=True)], "<｜User｜>a<｜Assistant｜>b",
            id="prefix",
        ),
        # The official client's `message.model_dump()` is sent back with all its null fields.
        pytest.param(
            [
                turn("user", name="ann"),
                turn("assistant", "b", refusal=None, tool_calls=None, audio=None, annotations=[]),
                turn("user", [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]),
            ],
            "<｜User｜>a<｜Assistant｜>b$<｜User｜>cd<｜Assistant｜>", id="resent",
        ),
    ],
)  # fmt: skip
def test_conversations_as_clients_send_them(here, messages, prompt):
    assert render(here, messages) == prompt


def test_an_answer_is_continued_unless_a_new_one_is_wanted(here, post):
    messages = [turn("user"), turn("assistant", "b")]
    new = "<｜User｜>a<｜Assistant｜>b$<｜Assistant｜>"
    assert render(here, messages, add_generation_prompt=True) == new
    assert render(here, messages, continue_final_message=False) == new
    assert post(CHAT, {"messages": TALK, "continue_final_message": True}).status_code == 400


@pytest.mark.parametrize(
    "message, name",
    [
        pytest.param(turn("assistant", tool_calls=[{"id": "1"}]), "tool_calls", id="calls"),
        pytest.param(turn("assistant", function_call={"name": "f"}), "function_call", id="call"),
        pytest.param(turn("tool", tool_call_id="1"), "tool", id="tool"),
        pytest.param(turn("user", [{"type": "image_url"}]), "text", id="image"),
        pytest.param(turn("narrator"), "narrator", id="role"),
        pytest.param(turn("user", 5), "5", id="number"),
        pytest.param({"role": "user"}, "content", id="no content"),
        pytest.param("hello", "objects", id="text"),
    ],
)
def test_what_a_form_cannot_express_is_refused_by_name(post, message, name):
    """It was dropped silently, so the model answered another conversation."""
    response = post(CHAT, {"messages": [turn("user"), message, turn("user")]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert name in error["message"] and error["param"] == "messages"


# ── One bad request ──


@pytest.mark.parametrize(
    "body, status",
    [
        # vllm #1623: a small temperature gave NaN, which ended the engine.
        pytest.param({"temperature": 1e-40}, 200, id="tiny temperature"),
        pytest.param({"temperature": 5e-324, "top_p": 1e-6}, 200, id="denormal"),
        pytest.param(b'{"prompt": "we", "temperature": NaN}', 400, id="NaN"),
        pytest.param(b'{"prompt": "we", "temperature": 1e400}', 400, id="1e400"),
        pytest.param(b'{"prompt": "we", "seed": -Infinity}', 400, id="infinity"),
        pytest.param(b'{"prompt": "we", "seed": 1%s}' % (b"0" * 4000), 400, id="huge seed"),
        pytest.param(b'{"prompt": "we", "seed": 1%s}' % (b"0" * 9000), 400, id="too many digits"),
        pytest.param(b'{"prompt": "we", "n": %s1%s}' % (b"[" * 400, b"]" * 400), 400, id="deep"),
        pytest.param(b'{"prompt": %s}' % (b'{"a":' * 50_000), 400, id="very deep"),
        pytest.param(b'{"prompt": "we", "n": 1, "n": 2}', 400, id="the same field twice"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', 400, id="a surrogate in bytes"),
        pytest.param(b'{"prompt": "we", "stop": "\\ud83d"}', 400, id="half an emoji"),
        pytest.param('{"prompt": "we"}'.encode("utf-16"), 400, id="UTF-16"),
        pytest.param(b'\xef\xbb\xbf{"prompt": "we", "max_tokens": 1}', 200, id="a byte order mark"),
        # vllm pull request #16529, sglang #7670: an unknown token in logit_bias ended the engine.
        pytest.param({"logit_bias": {"400": 1}}, 400, id="bias of an unknown token"),
        pytest.param({"logit_bias": {"-1": 1}}, 400, id="bias of a negative token"),
        pytest.param({"logit_bias": {"5": "a"}}, 400, id="bias that is no number"),
        pytest.param({"logit_bias": [5]}, 400, id="bias as a list"),
        pytest.param({"stop_token_ids": [400]}, 400, id="unknown stop token"),
        # vllm #10432: max_tokens 0 ended the engine. vllm #5822: an invalid temperature did.
        pytest.param({"max_tokens": 0}, 400, id="no tokens"),
        pytest.param({"temperature": 3}, 400, id="too hot"),
        pytest.param({"top_k": 10**6}, 400, id="top_k"),
        # abetlen/llama-cpp-python #1645: every answer ended at once
        pytest.param({"max_tokens": -1}, 400, id="unlimited"),
        pytest.param(
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            400,
            id="usage in each event",
        ),
        # EleutherAI/lm-evaluation-harness #3125: a conversation for the other endpoint
        pytest.param({"messages": TALK}, 400, id="a conversation"),
        pytest.param({"min_tokens": 9, "max_tokens": 5}, 400, id="contradiction"),
        pytest.param({"stream_options": {"include_usage": True}}, 400, id="options of a stream"),
        pytest.param({"n": 2, "best_of": 1}, 400, id="best of fewer"),
        pytest.param({"hue": 1}, 400, id="unknown field"),
    ],
)
def test_one_bad_request_ends_nothing_else(here, post, body, status):
    body = body if isinstance(body, bytes) else PLAIN[COMPLETE] | body
    response = post(COMPLETE, body)
    assert response.status_code == status, response.text
    if status == 400:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
    assert httpx.get(f"{here[0]}/health").json() == {"status": "ready"}


def test_a_large_body_does_not_stop_the_event_loop(here, post):
    """A list of two million numbers: the health check is answered meanwhile."""
    data = b'{"prompt": [%s1]}' % (b"1," * 300_000)
    big = threading.Thread(target=post, args=(COMPLETE, data[: here[1].max_body_bytes]))
    big.start()
    slowest = 0.0
    while big.is_alive():
        start = time.monotonic()
        assert httpx.get(f"{here[0]}/health").status_code == 200
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 1


def test_the_two_scanners_read_the_same():
    """Large bodies are read by Python's own scanner."""
    value = {"a": [1, 2.5, None, True, "é\n", {"b": {}}], "c": []}
    small = json.dumps(value).encode()
    assert parse_json(small) == parse_json(small + b" " * 20_000) == value


# ── Bodies and paths ──


def test_a_body_in_chunks(here):
    """Sophomoresty/gemini-web2api pull request #70: proxies send no Content-Length."""
    data = json.dumps(PLAIN[COMPLETE]).encode()
    pieces = (data[i : i + 9] for i in range(0, len(data), 9))
    kind = {"content-type": "application/json; charset=utf-8"}
    response = httpx.post(here[0] + COMPLETE, content=pieces, headers=kind, timeout=30)
    assert response.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br"])
def test_a_compressed_body_is_refused_by_name(here, encoding):
    """zyycn/codex-proxy-rs pull request #66: “must be valid JSON” says nothing about it."""
    kind = {"content-type": "application/json", "content-encoding": encoding}
    data = gzip.compress(json.dumps(PLAIN[COMPLETE]).encode())
    response = httpx.post(here[0] + COMPLETE, content=data, headers=kind)
    assert response.status_code == 415
    assert f"content encoding {encoding} is not" in response.json()["error"]["message"]


def test_curl_asks_before_it_sends_a_large_body(here):
    """curl sends “Expect: 100-continue” with bodies above a megabyte, and waits for it."""
    host, port = here[0].removeprefix("http://").split(":")
    data = json.dumps(PLAIN[COMPLETE]).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 100")
        connection.sendall(data)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models/", "//v1/models", "/models"])
def test_a_base_url_with_a_slash_too_many(here, path):
    """open-webui/open-webui #16749: it seemed to work, and then every request was a 404."""
    response = httpx.get(here[0] + path, follow_redirects=True)
    assert response.status_code in (200, 404)
    if response.status_code == 404:
        assert "/openapi.json" in response.json()["error"]["message"]
    else:
        assert response.json()["data"][0]["id"] == NAME


def test_prometheus_reads_the_metrics(here, post):
    """ggml-org/llama.cpp #17384: a malformed line made every scrape fail."""
    parser = pytest.importorskip("prometheus_client.parser")
    post(COMPLETE, PLAIN[COMPLETE])
    text = httpx.get(f"{here[0]}/metrics").text
    families = list(parser.text_string_to_metric_families(text))
    assert len(families) > 10 and text.endswith("\n")
    for family in families:
        assert all(math.isfinite(sample.value) for sample in family.samples)


# ── OpenAI's error object ──


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        # vllm #12886: errors were not in OpenAI's format, so clients could not show them.
        pytest.param("GET", "/v1/nothing", None, 404, id="unknown path"),
        pytest.param("GET", COMPLETE, None, 405, id="wrong method"),
        pytest.param("DELETE", "/v1/models", None, 405, id="delete"),
        pytest.param("GET", "/v1/models/other", None, 404, id="unknown model"),
        pytest.param("POST", COMPLETE, b"{", 400, id="half a body"),
        pytest.param("POST", COMPLETE, b"[1]", 400, id="a list"),
        pytest.param("POST", COMPLETE, b'{"model": "gpt-4"}', 404, id="another model"),
        pytest.param("POST", COMPLETE, b"x" * (5 << 20), 413, id="a large body"),
    ],
)
def test_every_error_is_an_error_object(here, method, path, body, status):
    kind = {"content-type": "application/json"} if body else {}
    response = httpx.request(method, here[0] + path, content=body, headers=kind)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"x" * (1 << 17)),
    ],
    ids=["garbage", "length", "header", "large header"],
)
def test_what_is_not_http_gets_an_error_object_too(here, data):
    host, port = here[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_errors_name_the_field_and_the_code(post):
    error = post(COMPLETE, {"prompt": "we", "top_p": 7}).json()["error"]
    assert error["param"] == "top_p"
    error = post(COMPLETE, {"prompt": "we", "model": "gpt-4"}).json()["error"]
    assert error["param"] == "model" and error["code"] == "model_not_found"


# ── Load balancers and browsers ──


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/openapi.json"])
def test_load_balancers_may_ask_without_a_body(here, path):
    """HEAD is what haproxy's and uptime monitors' checks send."""
    whole, head = httpx.get(here[0] + path), httpx.head(here[0] + path)
    assert whole.status_code == head.status_code == 200 and whole.content and not head.content


def test_a_page_may_ask_before_it_sends_a_key(folder):
    """sonar #434: the preflight has no key. opencodex #1773: OpenAI's client sends X-Stainless-*.

    hermes-agent pull request #104104: a 401 without CORS headers is only “Failed to fetch”.
    """
    origin = {"origin": "https://page.example"}
    with served(folder, api_key=("k",), allowed_origins=("https://page.example",)) as (base, _):
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        response = httpx.options(base + CHAT, headers=origin | asks)
        assert response.status_code == 200
        assert "x-stainless-lang" in response.headers["access-control-allow-headers"]
        refused = httpx.post(base + CHAT, json={}, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin["origin"]
        foreign = httpx.options(base + CHAT, headers=asks | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers


def test_an_idle_connection_outlives_the_pools_of_clients():
    """llm-d pull request #1564, kserve #5446: uvicorn's 5 s end before a proxy's pool does."""
    from dsv3_ref.serving.http_server import ConnectionLimits

    assert ConnectionLimits().idle == 75


# ── Streams ──


def events(post, path: str, **changes) -> list[dict]:
    """Return the events of a stream, which must end with [DONE]."""
    response = post(path, PLAIN[path] | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line]  # also at U+2028
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
def test_a_line_separator_does_not_split_an_event(here, post, sign, monkeypatch):
    """httpx-sse #34, sseclient #9: clients split lines where Python's `splitlines` does."""
    processor = here[1].engine_thread.processor
    real = processor.make_piece
    monkeypatch.setattr(processor, "make_piece", lambda *args: real(*args)._replace(text=sign))
    texts = [e["choices"][0].get("delta", {}).get("content") for e in events(post, CHAT)]
    assert {*"".join(filter(None, texts))} == {sign}


def test_the_form_of_a_stream(post):
    """A proxy must not buffer it; roles, reasons and usage come where OpenAI's client waits."""
    usage = {"stream_options": {"include_usage": True}}
    response = post(CHAT, PLAIN[CHAT] | {"stream": True} | usage)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *pieces, end, counts = events(post, CHAT, **usage)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "length"
    assert all(e["choices"][0]["finish_reason"] is None for e in (first, *pieces))
    # apfel #100: the last event has no choices, and only if it was asked for.
    assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == 5
    assert all(e["usage"] is None for e in (first, *pieces, end))
    assert all("usage" not in e and e["choices"] for e in events(post, CHAT))
    heads = {
        (e["id"], e["created"], e["model"], e["object"]) for e in (first, *pieces, end, counts)
    }
    assert len(heads) == 1 and first["id"].startswith("chatcmpl-")
    assert first["object"] == "chat.completion.chunk" and first["system_fingerprint"]


OPTIONS = [
    {},
    {"logprobs": 3},
    {"logprobs": 0, "echo": True},
    {"logprobs": 5, "echo": True, "n": 2},
    {"logprobs": 2, "stop": ["e", "alk"], "temperature": 1.5},
    {"logprobs": 1, "frequency_penalty": 1.0, "temperature": 0},
    {"prompt": ["we", [5, 6, 7]], "logprobs": 1, "echo": True, "max_tokens": 0},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_a_stream_says_what_the_whole_answer_says(post, changes):
    """ollama #13497, llama-cpp-python pull request #1037: bytes and offsets were not those."""
    body = {"max_tokens": 40, "seed": 3} | changes
    response = post(COMPLETE, PLAIN[COMPLETE] | body).json()
    streamed: dict[int, dict] = {}
    usage = {"stream_options": {"include_usage": True}}
    for event in events(post, COMPLETE, **body, **usage):
        for choice in event["choices"]:
            kept = streamed.setdefault(choice["index"], {"text": "", "logprobs": None})
            kept["text"] += choice["text"]
            kept["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                kept["logprobs"] = kept["logprobs"] or {}
                before = kept["logprobs"].get(name)
                kept["logprobs"][name] = values if before is None else before + values
    assert event["usage"] == response["usage"]
    for choice in response["choices"]:
        got = streamed[choice["index"]]
        assert got["text"] == choice["text"] and got["finish_reason"] == choice["finish_reason"]
        assert got["logprobs"] == choice["logprobs"]
        check_offsets(choice)


def check_offsets(choice: dict) -> None:
    """Check that every whole token stands where its offset says, unless it has no text."""
    found = choice["logprobs"]
    if not found:
        return
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<｜", "<|")):
            assert choice["text"][start : start + len(token)] == token


def test_half_a_character_is_written_with_its_bytes(here, post):
    """standardcompletions/rfcs #2: DeepSeek writes “\\xf0\\x9f”, others lose the bytes."""
    tokenizer = here[1].tokenizer
    half = tokenizer.token_to_id("ä")  # the sign of byte 0xe4, which begins 世
    bias = {"logit_bias": {str(half): 100}, "max_tokens": 2, "temperature": 0}
    entry = answer(post, CHAT, **bias, logprobs=True, top_logprobs=1)["logprobs"]["content"][0]
    assert entry["token"] == "\\xe4" and entry["bytes"] == [0xE4]
    choice = answer(post, COMPLETE, **bias, logprobs=1)
    assert choice["logprobs"]["tokens"][0] == "bytes:\\xe4" and choice["text"] == "\ufffd\ufffd"
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_the_chosen_token_is_among_the_likeliest(post):
    """OpenAI returns up to logprobs + 1 of them: scripts look the chosen one up."""
    found = answer(post, COMPLETE, logprobs=1, temperature=2)["logprobs"]
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]):
        assert top[token] == value and len(top) <= 2


# ── Fields of OpenAI and vLLM ──


@torch.no_grad()
def logps(service, tokens: list[int]) -> list[float]:
    """Return the model's log-probability of every token after the first."""
    logp_sw = service.policy.model(torch.tensor([tokens]))[0].log_softmax(-1)
    return logp_sw[range(len(tokens) - 1), tokens[1:]].tolist()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_asks(here, post, max_tokens):
    """llama.cpp #27174, lm-evaluation-harness #1411: without it every score is that of chance."""
    prompt = list(range(10, 70))
    ask = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    for _ in range(2):  # the second time its prefix is known
        choice = answer(post, COMPLETE, **ask, temperature=0)
        found = choice["logprobs"]
        assert len(found["tokens"]) == 60 + max_tokens and found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        want = logps(here[1], prompt)
        assert found["token_logprobs"][1:60] == pytest.approx(want, abs=1e-4)
    assert choice["text"].startswith(here[1].tokenizer.decode(prompt))
    assert choice["finish_reason"] == "length"
    assert answer(post, COMPLETE, echo=True, max_tokens=0)["text"] == "we talk"
    only_bos = answer(post, COMPLETE, prompt="", echo=True, max_tokens=0, logprobs=1)
    assert only_bos["text"] == "" and len(only_bos["logprobs"]["tokens"]) == 1


def test_a_suffix_is_filled_in_with_v3s_tokens(here, post):
    """vllm #9976: editors send what follows the cursor."""
    service = here[1]
    (tokens,) = service.encode_prompts({"prompt": "a", "suffix": "b"}, False)
    marks = [service.tokenizer.token_to_id(s) for s in (FIM_BEGIN, FIM_HOLE, FIM_END)]
    begin, hole, end = marks
    bos = service.special_tokens.bos
    want = [bos, begin, *service.chat.encode("a"), hole, *service.chat.encode("b"), end]
    assert tokens == want
    response = post(COMPLETE, {"prompt": "a", "suffix": "b", "max_tokens": 2})
    assert response.json()["usage"]["prompt_tokens"] == len(want)
    assert post(COMPLETE, {"prompt": "a", "suffix": "b", "echo": True}).status_code == 400


def test_what_narrows_the_choice(post):
    """One likeliest word, however hot: its text is the greedy one."""
    greedy = text_of(answer(post, COMPLETE, temperature=0, max_tokens=12))
    for change in ({"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}):
        hot = answer(post, COMPLETE, temperature=2, max_tokens=12, **change)
        assert text_of(hot) == greedy, change
    for change in ({"top_k": -1}, {"top_k": 0}, {"min_p": 0}):
        assert text_of(answer(post, COMPLETE, **change)) == text_of(answer(post, COMPLETE))


def test_biases_and_penalties(here, post):
    token = here[1].tokenizer.token_to_id("Z")
    always = {"logit_bias": {str(token): 100}, "temperature": 1.0, "max_tokens": 6}
    assert text_of(answer(post, COMPLETE, **always)) == "Z" * 6
    assert text_of(answer(post, CHAT, **always)) == "Z" * 6
    few = {str(t): 100 for t in (token, token + 1)}
    ask = {"logit_bias": few, "temperature": 0, "max_tokens": 8, "logprobs": 0}
    tokens = answer(post, COMPLETE, **ask, frequency_penalty=2)["logprobs"]["tokens"]
    assert {tokens.count(t) for t in tokens} == {4}  # whichever is rarer is next
    assert len(set(answer(post, COMPLETE, **ask, presence_penalty=2)["logprobs"]["tokens"])) == 2
    never = {"logit_bias": {str(token): -100}, "max_tokens": 90, "ignore_eos": True}
    assert (
        "Z" not in answer(post, COMPLETE, **never, logprobs=0, temperature=2)["logprobs"]["tokens"]
    )


def test_stop_tokens(here, post):
    token, eos = here[1].tokenizer.token_to_id("Z"), here[1].special_tokens.eos
    ask = {"logit_bias": {str(token): 100}, "max_tokens": 6}
    choice = answer(post, COMPLETE, **ask, stop_token_ids=[token])
    assert choice["finish_reason"] == "stop" and choice["text"] == ""
    ask["min_tokens"] = 3  # until then another token is chosen
    response = post(COMPLETE, PLAIN[COMPLETE] | ask | {"stop_token_ids": [token]}).json()
    assert response["usage"]["completion_tokens"] == 4
    end = {"logit_bias": {str(eos): 100}, "max_tokens": 6}
    assert answer(post, CHAT, **end)["finish_reason"] == "stop"
    assert answer(post, CHAT, **end, ignore_eos=True)["finish_reason"] == "length"


def test_the_best_of_several(here, post):
    ask = {"best_of": 6, "n": 2, "temperature": 1.5, "logprobs": 0, "max_tokens": 6, "seed": 4}
    best = post(COMPLETE, PLAIN[COMPLETE] | ask).json()
    every = post(COMPLETE, PLAIN[COMPLETE] | ask | {"n": 6}).json()

    def mean(choice: dict) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["usage"] == every["usage"]  # all of them cost time


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "high"},
        {"web_search_options": {}},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_by_name(post, field):
    (name,) = field
    error = post(CHAT, PLAIN[CHAT] | field)
    assert error.status_code == 400
    assert name in error.json()["error"]["message"] and error.json()["error"]["param"] == name


def test_what_changes_nothing_is_accepted(post):
    """The defaults that LangChain, LiteLLM and the official clients send."""
    neutral = {
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "functions": [],
        "response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {},
        "stop": [], "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium",
        "echo": False,  # vllm #10111
    }  # fmt: skip
    assert text_of(answer(post, CHAT, **neutral)) == text_of(answer(post, CHAT))


def test_the_official_client_reads_every_field(here):
    with openai.OpenAI(base_url=f"{here[0]}/v1", api_key="none", max_retries=0) as client:
        ask = {"model": NAME, "messages": TALK, "max_tokens": 5}
        done = client.chat.completions.create(**ask, logprobs=True, top_logprobs=MAX_LOGPROBS)
        assert len(done.choices[0].logprobs.content[0].top_logprobs) == MAX_LOGPROBS
        assert done.choices[0].message.refusal is None and done.system_fingerprint
        end = {str(here[1].special_tokens.eos): 100}
        with client.chat.completions.stream(**ask, logit_bias=end) as stream:  # assembles it all
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError) as e:
            client.chat.completions.create(**ask, n=99)
        assert e.value.param == "n" and e.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as e:
            client.models.retrieve("other")
        assert e.value.code == "model_not_found"
    assert quiet(here[1])


def test_an_impossible_token_has_a_finite_logprob(here, post, monkeypatch):
    """JSON has no −∞: a client's parser fails on the whole answer."""
    describer = here[1].engine_thread.processor
    real = describer.describe_token
    monkeypatch.setattr(describer, "describe_token", lambda token, _: real(token, -math.inf))
    found = answer(post, COMPLETE, logprobs=1)["logprobs"]
    assert set(found["token_logprobs"]) == {-9999.0}


# ── Stops ──


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_a_stream_shows_nothing_of_a_stop_text(here, post, path):
    """vllm #3574 and #2577: its beginning had been sent; #13087: empty events came first.

    vllm #11089: with a stop text that does not occur, the answer was empty.
    """
    ask = PLAIN[path] | {"max_tokens": 24, "ignore_eos": True, "seed": 3}
    text = text_of(answer(post, path, **ask))
    assert len(text) > 8
    for stop in (text[3:7], text[5], text[4:8] + "\N{SNOWMAN}"):
        want = text.partition(stop)[0]
        whole = answer(post, path, **ask, stop=[stop])
        assert text_of(whole) == want
        choices = [event["choices"][0] for event in events(post, path, **ask, stop=[stop])]
        first = 1 if path == CHAT else 0  # the role
        pieces = [x["text"] if path == COMPLETE else x["delta"].get("content") for x in choices]
        assert "".join(piece or "" for piece in pieces) == want
        assert all(pieces[first:-1])
        assert choices[-1]["finish_reason"] == whole["finish_reason"]


# ── Tokens ──


def test_tokens_of_a_prompt_and_of_a_conversation(here, post):
    """jjang-ai/vmlx pull request #99: lm-eval and proxies ask vLLM's endpoints for tokens."""
    service = here[1]
    found = post("/tokenize", {"prompt": "we talk", "return_token_strs": True}).json()
    assert found["tokens"] == service.chat.encode_prompt("we talk")
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
    assert found["token_strs"][0] == "<｜begin▁of▁sentence｜>"
    again = post("/detokenize", {"tokens": found["tokens"]}).json()
    assert again == {"prompt": "<｜begin▁of▁sentence｜>we talk"}
    plain = post("/tokenize", {"prompt": "we talk", "add_special_tokens": False}).json()
    assert plain["tokens"] == found["tokens"][1:] and plain["token_strs"] is None
    talk = post("/tokenize", {"messages": TALK}).json()
    assert talk["tokens"] == service.encode_prompts({"messages": TALK}, True)[0]
    answer = post(CHAT, PLAIN[CHAT]).json()
    assert answer["usage"]["prompt_tokens"] == talk["count"]
    assert post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    assert post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"prompt": "a"}, "prompt"),
    ],
)
def test_tokens_that_cannot_be_found_are_an_error_object(post, path, body, param):
    response = post(path, body)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


# ── Defaults of the model ──


def with_generation_config(folder, copy, **values):
    """Return a copy of a directory with a generation_config.json."""
    shutil.copytree(folder, copy / NAME)
    (copy / NAME / "generation_config.json").write_text(json.dumps(values))
    return copy / NAME


SAMPLED = {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 1, "min_p": 0.0}


def test_requests_take_the_defaults_of_the_model(folder, here, tmp_path, capsys):
    """Blaizzy/mlx-vlm #1331: the sampling settings of generation_config.json had no effect."""
    home = with_generation_config(folder, tmp_path, **SAMPLED, repetition_penalty=1.3)
    body = PLAIN[COMPLETE] | {"max_tokens": 12, "logprobs": 0}
    with served(home) as (base, _):
        told = capsys.readouterr().err
        got = httpx.post(base + COMPLETE, json=body, timeout=30).json()["choices"][0]
        free = body | {"temperature": 2, "top_k": -1, "top_p": 1, "repetition_penalty": 1}
        own = httpx.post(base + COMPLETE, json=free, timeout=30).json()["choices"][0]
        null = body | dict.fromkeys(SAMPLED.keys() - {"do_sample"})
        absent = httpx.post(base + COMPLETE, json=null, timeout=30).json()["choices"][0]
    assert "temperature 1.7, top_p 0.9, top_k 1, min_p 0, repetition_penalty 1.3" in told
    with served(folder) as (base, _):
        same = body | {"temperature": 0, "repetition_penalty": 1.3}  # top_k 1 is greedy
        greedy = httpx.post(base + COMPLETE, json=same, timeout=30).json()["choices"][0]
        hot = httpx.post(base + COMPLETE, json=body | {"temperature": 2}, timeout=30).json()
    assert got["text"] == absent["text"] == greedy["text"]
    assert own["text"] == hot["choices"][0]["text"]


@pytest.mark.parametrize(
    "values, options",
    [
        # vllm #15241: an explicit temperature seemed to be ignored, because of a top_k of the model
        pytest.param(SAMPLED, {"generation_config": False}, id="not wanted"),
        pytest.param(SAMPLED | {"do_sample": False}, {}, id="sampling is off"),
        pytest.param({"eos_token_id": 1}, {}, id="none"),
    ],
)
def test_defaults_are_openais(values, options, folder, tmp_path, capsys):
    home = with_generation_config(folder, tmp_path, **values)
    with served(home, **options) as (_, service):
        request = service.read_request(json.dumps(PLAIN[COMPLETE]).encode(), chat=False)
    assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)
    assert "generation_config" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "field", [{"top_k": 2.5}, {"top_k": "50"}, {"temperature": -1}, {"top_p": True}, {"min_p": 3}],
    ids=str,
)  # fmt: skip
def test_a_default_that_makes_no_sense_is_a_sentence(field, folder, tmp_path):
    home = with_generation_config(folder, tmp_path, **field)
    with pytest.raises(UserError, match="generation_config.json is .*: correct it"):
        load_tokenizer_settings(home)
    assert load_tokenizer_settings(folder).sampling == {}
