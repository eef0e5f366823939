"""OpenAI's protocol: parsing of requests and the format of responses."""

import json
import time
from dataclasses import dataclass
from typing import Any, TypeVar

from dsv3_ref.config import UserError

JSONObject = dict[str, Any]  # as `json.loads` returns it
Default = TypeVar("Default")

SUPPORTED_FIELDS = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs",
}  # fmt: skip
# Fields that are accepted only with these values, which have no effect.
NEUTRAL_VALUES: dict[str, list[object]] = {
    "echo": [False], "best_of": [1], "suffix": ["", None], "frequency_penalty": [0, None],
    "presence_penalty": [0, None], "logit_bias": [{}, None], "tools": [[], None],
    "tool_choice": ["none", "auto", None], "response_format": [{"type": "text"}, None],
}  # fmt: skip
IGNORED_FIELDS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
MAX_STOP_LENGTH = 1000  # characters


# ── Requests ──


class HTTPError(Exception):
    """An HTTP status and the message for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class CompletionRequest:
    """A validated request to either endpoint."""

    prompts: list[list[int]]
    chat: bool
    n: int  # completions per prompt
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # at the end of a stream
    num_logprobs: int  # alternatives listed with each token's log-probability; −1: no logprobs


def parse_int(body: JSONObject, name: str, default: Default, low: int, high: int) -> int | Default:
    """Return an integer field of the body, or `default` if it is missing or null.

    Raises a `UserError` if the value is not an integer from `low` to `high`.
    """
    value = body.get(name)
    if value is None:
        return default
    if not is_between(value, low, high) or value != int(value):
        raise UserError(
            f"{name} must be a whole number from {low} to {high}, not {short_json(value)}"
        )
    return int(value)


def parse_float(body: JSONObject, name: str, default: float, low: float, high: float) -> float:
    """Return a numeric field of the body, or `default` if it is missing or null.

    Raises a `UserError` if the value is not a number from `low` to `high`.
    """
    value = body.get(name)
    if value is None:
        return default
    if not is_between(value, low, high):
        raise UserError(f"{name} must be a number from {low} to {high}, not {short_json(value)}")
    return float(value)


def is_between(value: object, low: float, high: float) -> bool:
    """Return whether a JSON value is a number from `low` to `high`; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return low <= value <= high


def short_json(value: object) -> str:
    """Return the first 40 characters of a value as JSON, for error messages."""
    return json.dumps(value)[:40]


def parse_flag(body: JSONObject, name: str) -> bool:
    """Return a Boolean field of the body, False if it is missing or null."""
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false")
    return value


def parse_stop(body: JSONObject) -> tuple[str, ...]:
    """Return the stop strings of a request, at most four of limited length."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    is_list = isinstance(stop, list) and len(stop) <= 4
    if not is_list or not all(isinstance(s, str) and s for s in stop):
        raise UserError("stop must be a non-empty string or a list of up to four of them")
    if any(len(s) > MAX_STOP_LENGTH for s in stop):
        raise UserError(f"a stop string must not exceed {MAX_STOP_LENGTH} characters")
    return tuple(stop)


def reject_unknown(body: JSONObject) -> None:
    """Raise a `UserError` for a field that the server would otherwise silently ignore."""
    known_fields = SUPPORTED_FIELDS | IGNORED_FIELDS | set(NEUTRAL_VALUES)
    for name, value in body.items():
        if name in NEUTRAL_VALUES and value not in NEUTRAL_VALUES[name]:
            raise UserError(f"this server does not support {name}: leave it out")
        if name not in known_fields:
            raise UserError(f"unknown field {json.dumps(name)[:60]}: leave it out")


def parse_logprobs(body: JSONObject, chat: bool) -> int:
    """Return how many alternatives to list with each token's log-probability.

    −1: the request asks for no log-probabilities at all.
    """
    if not chat:
        return parse_int(body, "logprobs", -1, 0, 5)
    num_alternatives = parse_int(body, "top_logprobs", 0, 0, 20)
    return num_alternatives if parse_flag(body, "logprobs") else -1


def flatten_content(messages: object) -> list[JSONObject]:
    """Return messages in which content given as a list of text parts is joined to one string.

    Raises a `UserError` if `messages` is not a list of turns or if a part is not text.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns with at least one entry")
    turns = []
    for turn in messages:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            turn = turn | {"content": join_text_parts(content)}
        turns.append(turn)
    return turns


def join_text_parts(parts: list) -> str:
    """Return the concatenated texts of content parts; raise a `UserError` for other parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise UserError("the content of a message must be text: leave out images and files")
        texts.append(text)
    return "".join(texts)


def is_token_ids(values: list) -> bool:
    """Return whether a list contains only integers."""
    return all(type(value) is int for value in values)


# ── Responses ──


def response_head(request: CompletionRequest, request_id: str, model: str) -> JSONObject:
    """Return the fields that all objects of a response share."""
    kind = "chat.completion" if request.chat else "text_completion"
    if request.chat and request.stream:
        kind += ".chunk"
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def format_logprobs(request: CompletionRequest, logprobs: list[JSONObject]) -> JSONObject | None:
    """Return log-probabilities in the format of the request's endpoint, None if not requested."""
    if request.num_logprobs < 0:
        return None
    if request.chat:
        return {"content": logprobs}
    offset = 0
    offsets = []
    alternatives = []
    for token in logprobs:
        offsets.append(offset)
        offset += len(token["token"])
        alternatives.append({x["token"]: x["logprob"] for x in token["top_logprobs"]})
    return {
        "tokens": [token["token"] for token in logprobs],
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": alternatives if request.num_logprobs else None,
        "text_offset": offsets,
    }


def make_choice(
    request: CompletionRequest, index: int, text: str, logprobs: list[JSONObject],
    finish_reason: str | None,
) -> JSONObject:  # fmt: skip
    """Return one entry of `choices`: a whole completion or, in a stream, its next piece."""
    choice = {
        "index": index,
        "logprobs": format_logprobs(request, logprobs),
        "finish_reason": finish_reason or None,
    }
    if not request.chat:
        return choice | {"text": text}
    if request.stream:
        return choice | {"delta": {"content": text}}
    return choice | {"message": {"role": "assistant", "content": text}}


def error_body(message: str, status: int) -> JSONObject:
    """Return the body of an error response."""
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
