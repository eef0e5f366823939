"""OpenAI's protocol: the fields of requests, and the format of responses and errors."""

import time
from dataclasses import dataclass

from dsv3_ref.serve import LogitsProcessor
from dsv3_ref.serving.fields import (
    MAX_LOGPROBS,
    MAX_SEED,
    Field,
    InvalidField,
    JSONObject,
    anything,
    flag,
    ignored,
    integer,
    logit_bias,
    number,
    only,
    options,
    stop_texts,
    stop_tokens,
    string,
)
from dsv3_ref.serving.thoughts import ThoughtParser, ThoughtPassage
from dsv3_ref.serving.tool_calls import AnswerParser, AnswerPart, CallMarks

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
RELOAD = "/update_weights_from_disk"  # as in SGLang
MAX_TEMPERATURE = 2
MAX_ERROR_LENGTH = 1000  # characters of an error, which may quote the request

# ── Fields ──


@dataclass(frozen=True)
class FieldLimits:
    """The largest values that a server's model and options allow in a request."""

    max_model_len: int
    max_n: int
    vocab_size: int


def common_fields(limits: FieldLimits) -> dict[str, Field]:
    """Return the fields that both endpoints accept."""
    return {
        "model": string(),
        "max_completion_tokens": integer(1, limits.max_model_len),
        "temperature": number(0, MAX_TEMPERATURE),
        "top_p": number(1e-6, 1),
        "top_k": integer(-1, limits.vocab_size),
        "min_p": number(0, 1),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "repetition_penalty": number(0.01, 100),
        "logit_bias": logit_bias(limits.vocab_size),
        "min_tokens": integer(0, limits.max_model_len),
        "seed": integer(-MAX_SEED - 1, MAX_SEED),
        "n": integer(1, limits.max_n),
        "stop": stop_texts(),
        "stop_token_ids": stop_tokens(limits.vocab_size),
        "ignore_eos": flag(),
        "stream": flag(),
        "stream_options": options({"include_usage": flag(), "include_obfuscation": flag()}),
        "user": ignored("string"),
        "metadata": ignored("object"),
        "store": ignored("boolean"),
        "service_tier": ignored("string"),
        "safety_identifier": ignored("string"),
        "prompt_cache_key": ignored("string"),
        "prompt_cache_retention": ignored("string"),
        "prompt_cache_options": ignored("object"),
        "use_beam_search": only(False),
        "length_penalty": only(1),
        "skip_special_tokens": only(True),
        "spaces_between_special_tokens": only(True),
        "include_stop_str_in_output": only(False),
    }


def completion_fields(limits: FieldLimits) -> dict[str, Field]:
    """Return the fields of /v1/completions."""
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": limits.max_model_len}
    one = {"anyOf": [{"type": "string"}, tokens]}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": limits.max_n}
    return common_fields(limits) | {
        "prompt": anything({"anyOf": [{"type": "string"}, tokens, several]}),
        "max_tokens": integer(0, limits.max_model_len),
        "logprobs": integer(0, MAX_LOGPROBS),
        "echo": flag(),
        "suffix": string(),
        "best_of": integer(1, limits.max_n),
        "return_token_ids": flag(),
    }


def tokenize_fields(limits: FieldLimits) -> dict[str, Field]:
    """Return the fields of /tokenize: a prompt, or a conversation as in chat_fields."""
    chat = chat_fields(limits)
    shared = (
        "model", "messages", "tools", "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs",
    )  # fmt: skip
    return {name: chat[name] for name in shared} | {
        "prompt": string(),
        "add_special_tokens": flag(),
        "return_token_strs": flag(),
    }


def detokenize_fields(limits: FieldLimits) -> dict[str, Field]:
    """Return the fields of /detokenize."""
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    return {
        "model": string(),
        "tokens": anything({"type": "array", "items": token}),
    }


def chat_fields(limits: FieldLimits) -> dict[str, Field]:
    """Return the fields of /v1/chat/completions."""
    message = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}
    tool = {"type": "object"}
    return common_fields(limits) | {
        "messages": anything({"type": "array", "items": message, "minItems": 1}),
        "max_tokens": integer(1, limits.max_model_len),
        "logprobs": flag(),
        "top_logprobs": integer(0, MAX_LOGPROBS),
        "tools": anything({"type": "array", "items": tool}),
        "tool_choice": only("none", "auto"),
        "add_generation_prompt": flag(),
        "continue_final_message": flag(),
        "chat_template_kwargs": anything({"type": "object"}),
        "echo": only(False),  # as in vLLM
        "separate_reasoning": flag(),  # as in SGLang
        "parallel_tool_calls": ignored("boolean"),
        "functions": only([]),
        "function_call": only("none", "auto"),
        "response_format": only({"type": "text"}),
        "modalities": only(["text"]),
        "prediction": ignored("object"),
        "verbosity": only("medium"),
        "audio": only(),
        "moderation": only(),
        "reasoning_effort": only(),
        "web_search_options": only(),
    }


def endpoint_fields(limits: FieldLimits) -> dict[str, dict[str, Field]]:
    """Return the fields of each endpoint that reads a body."""
    return {
        CHAT: chat_fields(limits),
        COMPLETIONS: completion_fields(limits),
        TOKENIZE: tokenize_fields(limits),
        DETOKENIZE: detokenize_fields(limits),
    }


# ── Requests ──


class HTTPError(Exception):
    """An HTTP status and the message for the client, with the field and the code it concerns."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class CompletionRequest:
    """A validated request to either endpoint."""

    prompts: list[list[int]]
    chat: bool
    n: int  # completions per prompt
    best_of: int  # completions per prompt of which the n likeliest are returned
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int  # 0: any number of tokens
    min_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    ignores_eos: bool
    logits_processor: LogitsProcessor
    stream: bool
    include_usage: bool  # at the end of a stream
    num_logprobs: int  # alternatives listed with each token's log-probability; −1: no logprobs
    echo: bool  # completions begin with the prompt
    returns_token_ids: bool  # also of the end token, as vLLM does
    call_marks: CallMarks | None = None  # of the calls to parse, if the request has tools
    separates_reasoning: bool = False  # thoughts are `reasoning_content`
    opening: str = ""  # with which an answer begins: the <think> at the end of its prompt

    def make_parser(self) -> AnswerParser:
        """Return a parser of one answer."""
        if self.separates_reasoning:
            return AnswerParser(self.call_marks, thoughts=ThoughtParser(self.opening))
        return AnswerParser(self.call_marks, thoughts=ThoughtPassage(self.opening))

    def make_passage(self) -> ThoughtPassage | None:
        """Return the thoughts that no stop string ends: those that are returned separately."""
        if not self.separates_reasoning:
            return None
        return ThoughtPassage(place="inside" if self.opening else "before")


def make_request(values: JSONObject, chat: bool, seed: int) -> CompletionRequest:
    """Return the request with the parsed fields of a body, as yet without its prompts.

    seed: in the place of one that is not given. Raises `InvalidField` for fields that contradict
    each other.
    """
    check_combinations(values)
    n: int = values.get("n", 1)
    best_of: int = values.get("best_of", n)
    return CompletionRequest(
        prompts=[],
        chat=chat,
        n=n,
        best_of=best_of,
        max_tokens=find_max_tokens(values),
        temperature=values.get("temperature", 1.0),
        top_p=values.get("top_p", 1.0),
        top_k=max(0, values.get("top_k", 0)),
        min_p=values.get("min_p", 0.0),
        seed=values.get("seed", seed),
        stop=values.get("stop", ()),
        stop_token_ids=values.get("stop_token_ids", frozenset()),
        ignores_eos=values.get("ignore_eos", False),
        logits_processor=LogitsProcessor(
            values.get("repetition_penalty", 1.0),
            values.get("presence_penalty", 0.0),
            values.get("frequency_penalty", 0.0),
            values.get("logit_bias", ()),
            values.get("min_tokens", 0),
        ),
        stream=values.get("stream", False),
        include_usage=values.get("stream_options", {}).get("include_usage", False),
        num_logprobs=count_alternatives(values, chat),
        echo=values.get("echo", False),
        returns_token_ids=values.get("return_token_ids", False),
        separates_reasoning=chat and values.get("separate_reasoning", False),
    )


def find_max_tokens(values: JSONObject) -> int | None:
    """Return the limit on new tokens, which has two names; None if there is none."""
    old, new = values.get("max_tokens"), values.get("max_completion_tokens")
    if None not in (old, new) and old != new:
        raise InvalidField(
            "max_tokens",
            f"max_tokens is {old}, but max_completion_tokens is {new}: leave one of them out",
        )
    return new if old is None else old


def count_alternatives(values: JSONObject, chat: bool) -> int:
    """Return how many alternatives to list with each token's log-probability.

    −1: the request asks for no log-probabilities at all.
    """
    if not chat:
        return values.get("logprobs", -1)
    return values.get("top_logprobs", 0) if values.get("logprobs") else -1


def check_combinations(values: JSONObject) -> None:
    """Raise `InvalidField` for fields that contradict each other."""
    for name, holds, sentence in [*range_rules(values), *exclusion_rules(values)]:
        if not holds:
            raise InvalidField(name, sentence)


def range_rules(values: JSONObject) -> list[tuple[str, bool, str]]:
    """Return (field, whether it holds, sentence) of rules that compare numbers."""
    n = values.get("n", 1)
    best_of = values.get("best_of", n)
    max_tokens = find_max_tokens(values)
    return [
        ("best_of", best_of >= n, f"best_of must be at least n ({n}), not {best_of}"),
        (
            "best_of",
            best_of == n or not values.get("stream", False),
            "best_of cannot be streamed: lower it to n",
        ),
        (
            "max_tokens",
            max_tokens != 0 or values.get("echo", False),
            "max_tokens must be a whole number from 1, or 0 with echo: true",
        ),
        (
            "min_tokens",
            max_tokens is None or values.get("min_tokens", 0) <= max_tokens,
            f"min_tokens must not exceed max_tokens ({max_tokens})",
        ),
    ]


def exclusion_rules(values: JSONObject) -> list[tuple[str, bool, str]]:
    """Return (field, whether it holds, sentence) of fields that need or exclude others."""
    stream, echo = values.get("stream", False), values.get("echo", False)
    return [
        (
            "stream_options",
            stream or not values.get("stream_options"),
            "stream_options are only allowed with stream: true",
        ),
        (
            "top_logprobs",
            values.get("logprobs") or not values.get("top_logprobs"),
            "top_logprobs are only allowed with logprobs: true",
        ),
        (
            "suffix",
            not (echo and values.get("suffix")),
            "suffix cannot be combined with echo: leave one of them out",
        ),
        (
            "return_token_ids",
            not (values.get("return_token_ids") and (stream or echo or values.get("stop"))),
            "return_token_ids cannot be combined with stream, echo or stop: leave them out",
        ),
    ]


# ── Responses ──


def response_head(
    request: CompletionRequest, request_id: str, model: str, fingerprint: str
) -> JSONObject:
    """Return the fields that all objects of a response share."""
    kind = "chat.completion" if request.chat else "text_completion"
    if request.chat and request.stream:
        kind += ".chunk"
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def format_logprobs(request: CompletionRequest, logprobs: list[JSONObject]) -> JSONObject | None:
    """Return log-probabilities in the format of the request's endpoint, None if not requested."""
    if request.num_logprobs < 0:
        return None
    if request.chat:
        hidden = {"text_offset"}
        content = [{k: v for k, v in entry.items() if k not in hidden} for entry in logprobs]
        return {"content": content, "refusal": None}
    return {
        "tokens": [completion_token(entry) for entry in logprobs],
        "token_logprobs": [entry["logprob"] for entry in logprobs],
        "top_logprobs": [top_logprobs(e) for e in logprobs] if request.num_logprobs else None,
        "text_offset": [entry["text_offset"] for entry in logprobs],
    }


def completion_token(entry: JSONObject) -> str:
    """Return a token as /v1/completions writes it: half a character as “bytes:\\\\xe2\\\\x98”."""
    is_whole = bytes(entry["bytes"]) == entry["token"].encode()
    return entry["token"] if is_whole else f"bytes:{entry['token']}"


def top_logprobs(entry: JSONObject) -> dict[str, float] | None:
    """Return the likeliest tokens and the chosen one; None for the first token of a prompt.

    Of tokens that are written alike the likeliest counts.
    """
    if entry["top_logprobs"] is None:
        return None
    logprobs: dict[str, float] = {}
    for alternative in [*entry["top_logprobs"], entry]:
        logprobs.setdefault(completion_token(alternative), alternative["logprob"])
    return logprobs


def make_choice(
    request: CompletionRequest, index: int, part: AnswerPart, logprobs: list[JSONObject],
    finish_reason: str | None,
) -> JSONObject:  # fmt: skip
    """Return one entry of `choices`: a whole completion or, in a stream, its next piece."""
    choice: JSONObject = {
        "index": index,
        "logprobs": format_logprobs(request, logprobs),
        "finish_reason": finish_reason or None,
    }
    if not request.chat:
        return choice | {"text": part.text}
    if request.stream:
        return choice | {"delta": {"content": part.text}}
    message: JSONObject = {"role": "assistant", "content": part.text, "refusal": None}
    if request.separates_reasoning:
        message["reasoning_content"] = part.thoughts or None
    if part.calls:
        message |= {"content": part.text or None, "tool_calls": part.calls}
    return choice | {"message": message}


def stream_choices(
    request: CompletionRequest, index: int, part: AnswerPart, logprobs: list[JSONObject],
    finish_reason: str,
) -> list[JSONObject]:  # fmt: skip
    """Return the entries of `choices` for the next piece of a stream.

    In a conversation the reason comes after the text, with an empty delta, as OpenAI sends it.
    Thoughts and text are never in one delta: many clients read only the first of them. The calls of
    a piece have their `index` already.
    """
    has_text = bool(part.text or (logprobs and request.num_logprobs >= 0 and not part.thoughts))
    if not request.chat:
        choice = make_choice(request, index, part, logprobs, finish_reason)
        return [choice] if has_text or finish_reason else []
    choices = []
    if part.thoughts:
        listed = format_logprobs(request, [] if has_text else logprobs)
        delta: JSONObject = {"reasoning_content": part.thoughts}
        choices.append({"index": index, "logprobs": listed, "finish_reason": None, "delta": delta})
    if has_text:
        choices.append(make_choice(request, index, part, logprobs, None))
    if part.calls:
        delta = {"tool_calls": part.calls}
        choices.append({"index": index, "logprobs": None, "finish_reason": None, "delta": delta})
    if finish_reason:
        end: JSONObject = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        choices.append(end | {"delta": {}})
    return choices


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> JSONObject:
    """Return the body of an error response, with the beginning of a long message."""
    message = message[:MAX_ERROR_LENGTH]
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
