"""Reading the JSON of a request, strictly, and without stopping other threads for long."""

import json
from collections import Counter
from dataclasses import dataclass
from json.scanner import py_make_scanner  # type: ignore[attr-defined]  # not in its stubs
from typing import Any

from dsv3_ref.config import UserError
from dsv3_ref.serve import QueueFull

SMALL_BODY_BYTES = 1 << 14  # which the scanner in C reads in less than a millisecond


@dataclass
class BodyBudget:
    """The bytes of all bodies that are being received or wait to be read."""

    limit: int
    used: int = 0

    def take(self, num_bytes: int, body_bytes: int) -> None:
        """Count more bytes of a body that then has `body_bytes`.

        Raises `QueueFull` beyond the limit, but not for small bodies: large ones cannot keep them
        out.
        """
        if body_bytes > SMALL_BODY_BYTES and self.used + num_bytes > self.limit:
            raise QueueFull
        self.used += num_bytes


class UniqueFieldsDecoder(json.JSONDecoder):
    """A decoder that raises a `UserError` if an object has two fields of the same name."""

    def __init__(self, is_large: bool):
        super().__init__(object_pairs_hook=unique_fields)
        if is_large:  # the scanner in C would hold the interpreter's lock throughout
            self.scan_once = py_make_scanner(self)


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raise a `UserError` for a name that occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise UserError(f"the field {json.dumps(name)[:60]} occurs twice: leave one of them out")
    return fields


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text in UTF-8; raise a `UserError` if it is anything else."""
    try:
        text = data.decode("utf-8-sig")
        value = UniqueFieldsDecoder(len(data) > SMALL_BODY_BYTES).decode(text)
        if "\\ud" in text or "\\uD" in text:  # halves of characters, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode()
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        reason = e.msg if isinstance(e, json.JSONDecodeError) else "an invalid value"
        raise UserError(f"the body must be JSON in UTF-8: {reason}") from None
    return value
