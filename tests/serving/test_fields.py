"""Fields of requests without a server: the limits of each, defaults, and what contradicts what."""

import math
from itertools import product

import pytest

from dsv3_ref.serve import LogitsProcessor
from dsv3_ref.serving.fields import (
    MAX_SEED,
    Field,
    InvalidField,
    are_token_ids,
    integer,
    is_between,
    number,
    object_schema,
    parse_fields,
    short_json,
    string,
)
from dsv3_ref.serving.protocol import (
    CompletionRequest,
    FieldLimits,
    chat_fields,
    completion_fields,
    error_body,
    format_logprobs,
    make_choice,
    make_request,
    response_head,
    stream_choices,
)
from dsv3_ref.serving.tool_calls import AnswerPart

LIMITS = FieldLimits(max_model_len=256, max_n=16, vocab_size=400)


def completion() -> dict[str, Field]:
    return completion_fields(LIMITS)


def chat() -> dict[str, Field]:
    return chat_fields(LIMITS)


INTEGERS = {  # lowest and highest value
    "max_completion_tokens": (1, 256), "top_k": (-1, 400), "min_tokens": (0, 256),
    "seed": (-(2**63), 2**63 - 1), "n": (1, 16),
}  # fmt: skip
NUMBERS = {
    "temperature": (0, 2), "top_p": (1e-6, 1), "min_p": (0, 1), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
}  # fmt: skip
OWN_INTEGERS = [
    (completion, "max_tokens", 0, 256), (completion, "logprobs", 0, 20),
    (completion, "best_of", 1, 16), (chat, "max_tokens", 1, 256), (chat, "top_logprobs", 0, 20),
    *((chat, name, *limits) for name, limits in INTEGERS.items()),
    *((completion, name, *limits) for name, limits in INTEGERS.items()),
]  # fmt: skip


def refusal(fields, name: str, value: object) -> str:
    """Return the message for a value that a field does not accept."""
    with pytest.raises(InvalidField) as e:
        parse_fields({name: value}, fields)
    assert e.value.name == name
    return str(e.value)


def parsed(fields, name: str, value: object) -> object:
    return parse_fields({name: value}, fields)[name]


# ── Limits ──


@pytest.mark.parametrize("fields, name, low, high", OWN_INTEGERS)
def test_whole_numbers_have_limits(fields, name, low, high):
    fields = fields()
    assert [parsed(fields, name, x) for x in (low, high)] == [low, high]
    for value in (low - 1, high + 1, 1.5, str(low), True, [low]):
        assert f"{name} must be a whole number from {low} to {high}" in refusal(fields, name, value)
    assert fields[name].schema == {"type": "integer", "minimum": low, "maximum": high}
    whole = parsed({"x": integer(0, 9)}, "x", 3.0)
    assert whole == 3 and type(whole) is int


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_limits(name):
    low, high = NUMBERS[name]
    for fields in (completion(), chat()):
        assert [parsed(fields, name, x) for x in (low, high)] == [low, high]
        below, above = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
        for value in (below, above, math.nan, "1", False, {}):
            assert f"{name} must be a number from {low} to {high}" in refusal(fields, name, value)
        assert fields[name].schema == {"type": "number", "minimum": low, "maximum": high}
    assert type(parsed({"x": number(0, 9)}, "x", 3)) is float


def test_stop_strings_are_few_and_short():
    assert parsed(chat(), "stop", "a") == ("a",) and parsed(chat(), "stop", []) == ()
    most = ["x" * 1000] * 16
    assert parsed(chat(), "stop", most) == tuple(most)
    assert "a list of up to 16 of them" in refusal(chat(), "stop", ["a"] * 17)
    assert "must not exceed 1000 characters" in refusal(chat(), "stop", ["a", "x" * 1001])
    for value in ("", [""], [5], {"a": 1}):
        assert "must be a non-empty string" in refusal(chat(), "stop", value)
    one = {"type": "string", "minLength": 1, "maxLength": 1000}
    array = {"type": "array", "items": one, "maxItems": 16}
    assert chat()["stop"].schema == {"anyOf": [one, array]}


def test_stop_tokens_are_few_and_of_the_vocabulary():
    assert parsed(chat(), "stop_token_ids", [0, 399] * 64) == {0, 399}
    for value in ([0] * 129, [-1], [400], [True], [1.0], "1", {}):
        assert "a list of up to 128 token ids below 400" in refusal(chat(), "stop_token_ids", value)
    schema = chat()["stop_token_ids"].schema
    assert schema["items"] == {"type": "integer", "minimum": 0, "maximum": 399}
    assert schema["maxItems"] == 128


def test_logit_biases_are_few_and_bounded():
    value = {"0": -100, "399": 100}
    assert parsed(chat(), "logit_bias", value) == ((0, -100.0), (399, 100.0))
    assert parsed(chat(), "logit_bias", {}) == ()
    assert parsed(chat(), "logit_bias", {"000000399": 1}) == ((399, 1.0),)
    many = {str(i): 0 for i in range(1024)}
    wide = completion_fields(FieldLimits(256, 16, 2000))
    assert len(parsed(wide, "logit_bias", many)) == 1024
    assert "at most 1024 token ids" in refusal(wide, "logit_bias", many | {"1024": 0})
    for value in ({"400": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": True}, {"٣": 1}, [1], 5,
                  {"0000000399": 1}):  # fmt: skip
        assert "token ids below 400 to numbers from -100 to 100" in refusal(
            chat(), "logit_bias", value
        )
    schema = chat()["logit_bias"].schema
    assert schema["maxProperties"] == 1024
    assert schema["additionalProperties"] == {"type": "number", "minimum": -100, "maximum": 100}
    assert schema["propertyNames"] == {"pattern": "^[0-9]{1,9}$"}


def test_the_schemas_of_prompts_and_messages():
    token = {"type": "integer", "minimum": 0, "maximum": 399}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": 256}
    one = {"anyOf": [{"type": "string"}, tokens]}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": 16}
    assert completion()["prompt"].schema == {"anyOf": [{"type": "string"}, tokens, several]}
    message = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}
    assert chat()["messages"].schema == {"type": "array", "items": message, "minItems": 1}


ONLY = [  # name, accepted values, refused values
    ("use_beam_search", [False], [True, 0, "no"]),
    ("length_penalty", [1, 1.0], [True, 2, 0]),
    ("skip_special_tokens", [True], [False, 1]),
    ("spaces_between_special_tokens", [True], [False]),
    ("include_stop_str_in_output", [False], [True]),
    ("tool_choice", ["none", "auto"], ["required", {}]),
    ("functions", [[]], [[{}]]),
    ("verbosity", ["medium"], ["low"]),
    ("audio", [], [{}, False]),
]


@pytest.mark.parametrize("name, accepted, refused", ONLY)
def test_some_fields_have_few_values(name, accepted, refused):
    assert [parsed(chat(), name, value) for value in accepted] == accepted
    for value in refused:
        message = refusal(chat(), name, value)
        assert message == f"this server does not support {name}: leave it out"


def test_the_schemas_of_fields_with_few_values():
    assert chat()["audio"].schema == {"type": "null"} and chat()["length_penalty"].schema == {
        "enum": [1]
    }
    assert chat()["tool_choice"].schema == {"enum": ["none", "auto"]}
    schemas = [chat()[name].schema for name in ("use_beam_search", "include_stop_str_in_output")]
    assert schemas == [{"enum": [False]}] * 2
    schemas = [chat()[f"{word}special_tokens"].schema for word in ("skip_", "spaces_between_")]
    assert schemas == [{"enum": [True]}] * 2


@pytest.mark.parametrize(
    "name, value, wrong",
    [("user", "u", 5), ("metadata", {}, "a"), ("store", False, 0), ("stream", True, 1)],
)
def test_some_fields_have_a_type(name, value, wrong):
    assert parsed(chat(), name, value) == (value if name == "stream" else None)
    assert name in refusal(chat(), name, wrong)


def test_options_of_a_stream_are_fields_too():
    assert parsed(chat(), "stream_options", {"include_usage": True}) == {"include_usage": True}
    assert "must be an object, not a list" in refusal(chat(), "stream_options", [])
    with pytest.raises(InvalidField, match='unknown field "hue": leave it out'):
        parse_fields({"stream_options": {"hue": 1}}, chat())


def test_the_schema_of_a_body():
    fields = {"a": string(), "b": integer(0, 1)}
    null = {"type": "null"}
    assert object_schema(fields, ["a"]) == {
        "type": "object", "additionalProperties": False, "required": ["a"],
        "properties": {"a": fields["a"].schema, "b": {"anyOf": [fields["b"].schema, null]}},
    }  # fmt: skip
    assert "required" not in object_schema(fields, [])


def test_long_names_and_values_are_cut_in_messages():
    with pytest.raises(InvalidField) as e:
        parse_fields({"x" * 99: 1}, chat())
    assert e.value.name == "x" * 60 and str(e.value) == f'unknown field "{"x" * 59}: leave it out'
    assert short_json("y" * 99) == '"' + "y" * 39 and short_json([[]]) == "a list"
    assert short_json({}) == "an object" and short_json(None) == "null"


def test_values_of_json():
    assert is_between(2, 2, 2) and is_between(2.5, 2, 3)
    assert not any(is_between(x, 0, 9) for x in (True, "5", None, math.nan, -0.1, 9.1))
    assert are_token_ids([0, 9], 10) and are_token_ids([], 10)
    assert not any(are_token_ids([x], 10) for x in (-1, 10, True, 1.0, "1"))


# ── Requests ──

DEFAULT = CompletionRequest(
    prompts=[], chat=False, n=1, best_of=1, max_tokens=None, temperature=1.0, top_p=1.0, top_k=0,
    min_p=0.0, seed=7, stop=(), stop_token_ids=frozenset(), ignores_eos=False,
    logits_processor=LogitsProcessor(1.0, 0.0, 0.0, (), 0), stream=False, include_usage=False,
    num_logprobs=-1, echo=False, returns_token_ids=False,
)  # fmt: skip


def test_the_defaults_of_a_request():
    assert make_request({}, False, 7) == DEFAULT
    assert make_request({}, True, 7).chat and make_request({}, True, 7).num_logprobs == -1
    assert make_request({"n": 3}, False, 7).best_of == 3
    assert make_request({"top_k": -1}, False, 7).top_k == 0
    assert make_request({"seed": -3}, False, 7).seed == -3
    streamed = make_request({"stream": True, "stream_options": {"include_usage": True}}, True, 7)
    assert streamed.stream and streamed.include_usage
    assert not make_request({"stream": True, "stream_options": {}}, True, 7).include_usage


@pytest.mark.parametrize(
    "values, chat, n",
    [
        ({"logprobs": 0}, False, 0), ({"logprobs": 4}, False, 4), ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 3}, True, 3), ({"logprobs": False}, True, -1),
    ],
)  # fmt: skip
def test_how_many_alternatives_are_listed(values, chat, n):
    assert make_request(values, chat, 7).num_logprobs == n


@pytest.mark.parametrize(
    "old, new, limit", [(3, None, 3), (None, 4, 4), (5, 5, 5), (0, None, 0), (None, None, None)]
)
def test_the_limit_has_two_names(old, new, limit):
    names = {"max_tokens": old, "max_completion_tokens": new, "echo": True}
    values = {name: value for name, value in names.items() if value is not None}
    assert make_request(values, False, 7).max_tokens == limit


COMBINATIONS = [  # values, the field of the error; "" if they fit together
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"n": 2, "best_of": 2}, ""),
    ({"n": 2, "best_of": 3}, ""),
    ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
    ({"n": 2, "best_of": 2, "stream": True}, ""),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {}}, ""),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
    ({"top_logprobs": 0}, ""),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": True}, ""),
    ({"max_tokens": 1}, ""),
    ({"suffix": "a", "echo": True}, "suffix"),
    ({"suffix": "", "echo": True}, ""),
    ({"suffix": "a"}, ""),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 4, "max_tokens": 4}, ""),
    ({"min_tokens": 5}, ""),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
]


@pytest.mark.parametrize("values, name", COMBINATIONS, ids=str)
def test_fields_that_contradict_each_other(values, name):
    if not name:
        assert make_request(values, False, 7).seed == 7
        return
    with pytest.raises(InvalidField) as e:
        make_request(values, False, 7)
    assert e.value.name == name


# ── Responses ──

ENTRY = {"token": "a", "logprob": -0.5, "bytes": [97], "text_offset": 3,
         "top_logprobs": [{"token": "b", "logprob": -0.1, "bytes": [98]}]}  # fmt: skip
HALF = {"token": "\\xe2", "logprob": -1.5, "bytes": [0xE2], "text_offset": 4, "top_logprobs": None}


def asked(**values) -> CompletionRequest:
    chat = values.pop("chat", False)
    return make_request(values, chat, 7)


def test_the_head_of_a_response():
    kinds = [
        response_head(asked(chat=chat, stream=stream), "id", "m", "fp")["object"]
        for chat, stream in product((False, True), repeat=2)
    ]
    assert kinds == [
        "text_completion", "text_completion", "chat.completion", "chat.completion.chunk"
    ]  # fmt: skip


def test_logprobs_in_both_forms():
    assert format_logprobs(asked(), [ENTRY]) is None
    assert format_logprobs(asked(logprobs=2), [ENTRY, HALF]) == {
        "tokens": ["a", "bytes:\\xe2"], "token_logprobs": [-0.5, -1.5], "text_offset": [3, 4],
        "top_logprobs": [{"b": -0.1, "a": -0.5}, None],
    }  # fmt: skip
    assert format_logprobs(asked(logprobs=0), [ENTRY])["top_logprobs"] is None
    (entry,) = format_logprobs(asked(chat=True, logprobs=True), [ENTRY])["content"]
    assert entry == {k: v for k, v in ENTRY.items() if k != "text_offset"}


def said(text: str) -> AnswerPart:
    return AnswerPart(text, [])


def test_choices_of_whole_answers_and_of_streams():
    assert make_choice(asked(), 2, said("a"), [], "stop") == {
        "index": 2, "logprobs": None, "finish_reason": "stop", "text": "a"
    }  # fmt: skip
    message = make_choice(asked(chat=True), 0, said("a"), [], "stop")["message"]
    assert message == {"role": "assistant", "content": "a", "refusal": None}
    delta = make_choice(asked(chat=True, stream=True), 0, said("a"), [], "")
    assert delta["delta"] == {"content": "a"} and delta["finish_reason"] is None


def test_pieces_of_a_stream():
    plain, chat = asked(stream=True), asked(chat=True, stream=True)
    assert (
        stream_choices(plain, 0, said(""), [], "")
        == stream_choices(chat, 0, said(""), [], "")
        == []
    )
    assert [c["finish_reason"] for c in stream_choices(plain, 0, said("a"), [], "stop")] == ["stop"]
    assert [c["text"] for c in stream_choices(plain, 0, said(""), [], "stop")] == [""]
    assert [c["finish_reason"] for c in stream_choices(chat, 0, said("a"), [], "stop")] == [
        None,
        "stop",
    ]
    (end,) = stream_choices(chat, 1, said(""), [ENTRY], "length")
    assert end == {"index": 1, "logprobs": None, "finish_reason": "length", "delta": {}}
    told = asked(chat=True, stream=True, logprobs=True)
    (told_choice,) = stream_choices(told, 0, said(""), [ENTRY], "")
    assert told_choice["logprobs"] is not None
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    whole = make_choice(asked(chat=True), 0, AnswerPart("", [call]), [], "tool_calls")
    assert whole["message"]["content"] is None and whole["message"]["tool_calls"] == [call]
    (piece,) = stream_choices(chat, 0, AnswerPart("", [call]), [], "")
    assert piece["delta"] == {"tool_calls": [call]} and piece["finish_reason"] is None


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"), (429, "rate_limit_error"), (499, "invalid_request_error"),
        (500, "server_error"), (503, "server_error"),
    ],
)  # fmt: skip
def test_the_type_of_an_error(status, kind):
    body = error_body("no", status, "n", "c")["error"]
    assert body == {"message": "no", "type": kind, "param": "n", "code": "c"}


def test_seeds_are_those_of_64_bits():
    assert MAX_SEED == 2**63 - 1
