"""OpenAI's protocol: what a request may ask for, and the form of an answer."""

import json
import time
from dataclasses import dataclass

from dsv3_ref.config import UserError

SUPPORTED_FIELDS = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs",
}  # fmt: skip
NEUTRAL_VALUES = {  # what may be sent because it asks for nothing; other values are refused by name
    "echo": [False], "best_of": [1], "suffix": ["", None], "frequency_penalty": [0, None],
    "presence_penalty": [0, None], "logit_bias": [{}, None], "tools": [[], None],
    "tool_choice": ["none", "auto", None], "response_format": [{"type": "text"}, None],
}  # fmt: skip
IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}


# ── What a request asks for ──


class HTTPError(Exception):
    """A status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class CompletionRequest:
    """A request, checked."""

    prompts: list[list[int]]
    chat: bool
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # of a stream, at its end
    num_logprobs: int  # log-probabilities: of so many likeliest tokens too; −1: none


def parse_number(body: dict, name: str, default, low, high, kind=int):
    """A number of the body within its bounds."""
    x = body.get(name)
    if x is None:
        return default
    good = isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high
    if not good or (kind is int and x != int(x)):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} must be {what} from {low} to {high}, not {json.dumps(x)[:40]}")
    return kind(x)


def parse_flag(body: dict, name: str) -> bool:
    x = body.get(name) or False
    if not isinstance(x, bool):
        raise UserError(f"{name} must be true or false")
    return x


def parse_stop(body: dict) -> tuple[str, ...]:
    """Up to four texts that end an answer."""
    x = body.get("stop") or []
    x = [x] if isinstance(x, str) else x
    if not isinstance(x, list) or len(x) > 4 or not all(isinstance(s, str) and s for s in x):
        raise UserError("stop must be a text that is not empty, or up to four of them")
    return tuple(x)


def reject_unknown(body: dict) -> None:
    """Refuse what would be silently different from what was asked."""
    for name, value in body.items():
        if name in NEUTRAL_VALUES and value not in NEUTRAL_VALUES[name]:
            raise UserError(f"this server cannot do {name}")
        if (
            name not in SUPPORTED_FIELDS
            and name not in NEUTRAL_VALUES
            and name not in IGNORED_FIELDS
        ):
            raise UserError(f"this server knows no {json.dumps(name)[:60]}")


def parse_logprobs(body: dict, chat: bool) -> int:
    """How many likeliest tokens' log-probabilities are asked for beside the chosen one's."""
    if not chat:
        return parse_number(body, "logprobs", -1, 0, 5)
    top = parse_number(body, "top_logprobs", 0, 0, 20)
    return top if parse_flag(body, "logprobs") else -1


def flatten_content(messages) -> list[dict]:
    """Messages whose contents may be lists of texts, as some clients send them."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns")
    out = []
    for turn in messages:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            texts = [p.get("text") if isinstance(p, dict) else None for p in content]
            if not all(isinstance(t, str) for t in texts):
                raise UserError("a message's content may be text only")
            turn = turn | {"content": "".join(texts)}
        out.append(turn)
    return out


def is_token_ids(x: list) -> bool:
    return all(type(t) is int for t in x)


# ── The form of an answer ──


def response_head(ask: CompletionRequest, name: str, model: str) -> dict:
    """What all objects of an answer have in common."""
    kind = "chat.completion" if ask.chat else "text_completion"
    kind += ".chunk" if ask.chat and ask.stream else ""
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def format_logprobs(ask: CompletionRequest, noted: list[dict]) -> dict | None:
    """Log-probabilities in the form of either endpoint."""
    if ask.num_logprobs < 0:
        return None
    if ask.chat:
        return {"content": noted}
    best = [{x["token"]: x["logprob"] for x in t["top_logprobs"]} for t in noted]
    ends = [0]
    for t in noted:
        ends.append(ends[-1] + len(t["token"]))
    return {
        "tokens": [t["token"] for t in noted], "token_logprobs": [t["logprob"] for t in noted],
        "top_logprobs": best if ask.num_logprobs else None, "text_offset": ends[:-1],
    }  # fmt: skip


def make_choice(
    ask: CompletionRequest, index: int, text: str, noted: list[dict], ended: str | None
) -> dict:
    """An answer, whole or a piece of it."""
    out = {"index": index, "logprobs": format_logprobs(ask, noted), "finish_reason": ended or None}
    if not ask.chat:
        return out | {"text": text}
    said = {"content": text} if ask.stream else {"role": "assistant", "content": text}
    return out | {"delta" if ask.stream else "message": said}


def error_body(sentence: str, status: int) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}
