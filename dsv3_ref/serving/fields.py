"""Fields of request bodies: each with its JSON Schema and the function that validates it.

The API's description is made of the same schemas, so it is true to what the server accepts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_ref.config import UserError

JSONObject = dict[str, Any]  # as `json.loads` returns it

MAX_STOP_LENGTH = 1000  # characters
MAX_STOPS = 16
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_LISTED = 1 << 16  # log-probabilities in one response; formatting more would hold up streams
MAX_LISTED_AT_ONCE = 1 << 20  # in all responses that have not been sent
MAX_SEED = (1 << 63) - 1


class InvalidField(UserError):
    """A mistake in one field of a request."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Field:
    """The values that a field accepts; null means everywhere that the field is absent."""

    schema: JSONObject
    parse: Callable[[str, Any], Any]  # (name, value that is not null) → value, or `InvalidField`


def parse_fields(body: JSONObject, fields: Mapping[str, Field]) -> JSONObject:
    """Return the values of all fields that are given and not null.

    Raises `InvalidField` for a field that the server would otherwise silently ignore, and for a
    value that it does not accept.
    """
    values = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in fields:
            raise InvalidField(name[:60], f"unknown field {json.dumps(name)[:60]}: leave it out")
        values[name] = fields[name].parse(name, value)
    return values


def object_schema(fields: Mapping[str, Field], required: list[str]) -> JSONObject:
    """Return the JSON Schema of a body with these fields."""
    properties = {}
    for name, field in fields.items():
        is_required = name in required
        schema = field.schema if is_required else {"anyOf": [field.schema, {"type": "null"}]}
        properties[name] = schema
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


# ── Kinds of fields ──


def integer(low: int, high: int) -> Field:
    """Return a field for whole numbers from `low` to `high`."""

    def parse(name: str, value: Any) -> int:
        if not is_between(value, low, high) or value != int(value):
            raise InvalidField(
                name, f"{name} must be a whole number from {low} to {high}, not {short_json(value)}"
            )
        return int(value)

    return Field({"type": "integer", "minimum": low, "maximum": high}, parse)


def number(low: float, high: float) -> Field:
    """Return a field for numbers from `low` to `high`."""

    def parse(name: str, value: Any) -> float:
        if not is_between(value, low, high):
            raise InvalidField(
                name, f"{name} must be a number from {low} to {high}, not {short_json(value)}"
            )
        return float(value)

    return Field({"type": "number", "minimum": low, "maximum": high}, parse)


def flag() -> Field:
    """Return a field for true and false."""

    def parse(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidField(name, f"{name} must be true or false, not {short_json(value)}")
        return value

    return Field({"type": "boolean"}, parse)


def string() -> Field:
    """Return a field for strings."""

    def parse(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InvalidField(name, f"{name} must be a string, not {short_json(value)}")
        return value

    return Field({"type": "string"}, parse)


def only(*values: Any) -> Field:
    """Return a field that is accepted only with these values."""

    def parse(name: str, value: Any) -> Any:
        if not any(value == v and isinstance(value, bool) is isinstance(v, bool) for v in values):
            raise InvalidField(name, f"this server does not support {name}: leave it out")
        return value

    return Field({"enum": list(values)} if values else {"type": "null"}, parse)


def ignored(kind: str) -> Field:
    """Return a field for values of a JSON type that have no effect on a completion."""
    types = {"string": str, "object": dict, "boolean": bool}

    def parse(name: str, value: Any) -> None:
        if not isinstance(value, types[kind]):
            raise InvalidField(name, f"{name} must be of the type {kind}")

    return Field({"type": kind, "description": "accepted, without effect"}, parse)


def options(fields: Mapping[str, Field]) -> Field:
    """Return a field for an object with these fields."""

    def parse(name: str, value: Any) -> JSONObject:
        if not isinstance(value, dict):
            raise InvalidField(name, f"{name} must be an object, not {short_json(value)}")
        return parse_fields(value, fields)

    return Field(object_schema(fields, []), parse)


def anything(schema: JSONObject) -> Field:
    """Return a field that is validated where it is used."""
    return Field(schema, lambda _, value: value)


# ── Single fields ──


def stop_texts() -> Field:
    """Return the field of stop strings: one, or a list of some, of limited length."""

    def parse(name: str, value: Any) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        is_list = isinstance(texts, list) and len(texts) <= MAX_STOPS
        if not is_list or not all(isinstance(s, str) and s for s in texts):
            raise InvalidField(
                name, f"{name} must be a non-empty string or a list of up to {MAX_STOPS} of them"
            )
        if any(len(s) > MAX_STOP_LENGTH for s in texts):
            raise InvalidField(name, f"a stop string must not exceed {MAX_STOP_LENGTH} characters")
        return tuple(texts)

    one = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    return Field({"anyOf": [one, {"type": "array", "items": one, "maxItems": MAX_STOPS}]}, parse)


def stop_tokens(vocab_size: int) -> Field:
    """Return the field of token ids that end a completion."""

    def parse(name: str, value: Any) -> frozenset[int]:
        is_list = isinstance(value, list) and len(value) <= MAX_STOP_TOKENS
        if not is_list or not are_token_ids(value, vocab_size):
            raise InvalidField(
                name,
                f"{name} must be a list of up to {MAX_STOP_TOKENS} token ids below {vocab_size}",
            )
        return frozenset(value)

    items = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    return Field({"type": "array", "items": items, "maxItems": MAX_STOP_TOKENS}, parse)


def logit_bias(vocab_size: int) -> Field:
    """Return the field of logit biases: an object of token ids and numbers from −100 to 100."""

    def parse(name: str, value: Any) -> tuple[tuple[int, float], ...]:
        pairs: list[tuple[str, Any]] = [("", None)]
        if isinstance(value, dict):
            pairs = list(value.items())
        if len(pairs) > MAX_BIASES or not all(is_valid(*pair) for pair in pairs):
            raise InvalidField(
                name,
                f"{name} must map at most {MAX_BIASES} token ids below {vocab_size} to numbers "
                "from -100 to 100",
            )
        return tuple((int(token), float(bias)) for token, bias in pairs)

    def is_valid(token: str, bias: object) -> bool:
        is_id = token.isascii() and token.isdecimal() and len(token) < 10
        return is_id and int(token) < vocab_size and is_between(bias, -100, 100)

    bias = {"type": "number", "minimum": -100, "maximum": 100}
    return Field(
        {
            "type": "object", "maxProperties": MAX_BIASES, "additionalProperties": bias,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        },
        parse,
    )  # fmt: skip


# ── Values ──


def is_between(value: object, low: float, high: float) -> bool:
    """Return whether a JSON value is a number from `low` to `high`; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return low <= value <= high


def are_token_ids(values: list, vocab_size: int) -> bool:
    """Return whether a list contains only integers that are tokens."""
    return all(type(value) is int and 0 <= value < vocab_size for value in values)


def short_json(value: object) -> str:
    """Return a value as JSON, at most 40 characters of it, for error messages."""
    if isinstance(value, (list, dict)):  # which may be deep
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]
