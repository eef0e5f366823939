"""Calls of tools that a model writes between marks, as OpenAI's API returns them."""

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv3_ref.serving.detokenizer import partial_stop_length, special_ids
from dsv3_ref.serving.fields import JSONObject
from dsv3_ref.serving.thoughts import ThoughtParser, ThoughtPassage

FENCE_BEGIN, FENCE_END = "\n```json\n", "\n```"  # around V3's and R1's arguments


@dataclass(frozen=True)
class CallMarks:
    """The marks of a form of calls, which stand in a model's text around and inside them."""

    begin: str
    call: str
    separator: str  # between a call's name and its arguments
    end_of_call: str
    end: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All marks."""
        return self.begin, self.call, self.separator, self.end_of_call, self.end


FORMS = (
    CallMarks(  # V3 and R1: `function`, separator, name and fenced arguments; V3.1: name, arguments
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    CallMarks(  # Kimi-K2: `functions.NAME:NUMBER`, separator, arguments
        "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
        "<|tool_call_end|>", "<|tool_calls_section_end|>",
    ),
)  # fmt: skip


def find_call_marks(tokenizer: Tokenizer) -> CallMarks | None:
    """Return the marks of calls that a tokenizer has and that stand in a decoded text, or None."""
    special = special_ids(tokenizer)
    for marks in FORMS:
        ids = [tokenizer.token_to_id(text) for text in marks.texts]
        if all(i is not None and i not in special for i in ids):
            return marks
    return None


class AnswerPart(NamedTuple):
    """New text of an answer, and the calls that have become complete."""

    text: str
    calls: list[JSONObject]  # as OpenAI's API writes them, without an index
    thoughts: str = ""  # that come before the text, if they are returned apart from it


@dataclass
class AnswerParser:
    """Incremental parser of an answer: thoughts, text, then calls between marks.

    What it returns does not depend on how the text is cut into pieces. Without marks everything is
    text, as is everything from the first call on that is malformed or has no end.
    """

    marks: CallMarks | None
    pending: str = ""  # not yet returned
    # divides thoughts, in which no call is found, from the answer, or passes them on as its text
    thoughts: ThoughtParser | ThoughtPassage = field(default_factory=ThoughtPassage)
    is_inside: bool = False  # between the marks around calls
    num_searched: int = 0  # pending characters without the end of the call that they begin
    num_calls: int = 0
    ids: set[str] = field(default_factory=set)

    def push(self, text: str, is_last: bool = False) -> AnswerPart:
        """Append text and return what is now certain. is_last: nothing will follow."""
        thoughts, text = self.thoughts.push(text, is_last)
        self.pending += text
        texts: list[str] = []
        if isinstance(self.thoughts, ThoughtPassage):
            texts, thoughts = [thoughts], ""
        calls: list[JSONObject] = []
        while self.marks and self.may_read(self.marks) and self.read_part(self.marks, texts, calls):
            self.num_searched = 0
        if is_last or self.marks is None:
            is_space = self.is_inside and not self.pending.strip()
            texts.append("" if is_space else self.pending)
            self.pending = ""
        self.num_calls += len(calls)
        return AnswerPart("".join(texts), calls, thoughts)

    def finish_reason(self, reason: str) -> str:
        """Return the reason why the answer ended, which is its calls if it has any."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def may_read(self, marks: CallMarks) -> bool:
        """Return whether more than before may be certain; a long call is searched only once."""
        start = max(0, self.num_searched - len(marks.end_of_call))
        if self.num_searched and marks.end_of_call not in self.pending[start:]:
            self.num_searched = len(self.pending)
            return False
        return True

    def read_part(self, marks: CallMarks, texts: list[str], calls: list[JSONObject]) -> bool:
        """Move a text or a call from `pending` to a list; return whether more may be certain."""
        if not self.is_inside:
            before, begin, after = self.pending.partition(marks.begin)
            keep = 0 if begin else partial_stop_length(before, marks.begin)
            texts.append(before[: len(before) - keep])
            self.pending = begin + after if begin else before[len(before) - keep :]
            self.is_inside = bool(begin)
            return self.is_inside
        rest = self.pending.removeprefix(marks.begin).lstrip()
        if rest.startswith(marks.end):
            self.pending = rest.removeprefix(marks.end)
            self.is_inside = False
            return True
        body, end, after = rest.partition(marks.end_of_call)
        if end and body.startswith(marks.call):
            call = parse_call(body.removeprefix(marks.call), marks)
            if call:
                calls.append(self.with_own_id(call))
                self.pending = after
                return True
        if not end and body.startswith(marks.call):
            self.num_searched = len(self.pending)
            return False
        could_begin = any(mark.startswith(rest[: len(mark)]) for mark in (marks.call, marks.end))
        if end or not could_begin:
            self.marks = None  # the rest is text
        return False

    def with_own_id(self, call: JSONObject) -> JSONObject:
        """Return a call with an id that no other call of this answer has."""
        if not call["id"] or call["id"] in self.ids:
            call = call | {"id": f"call_{secrets.token_hex(12)}"}
        self.ids.add(call["id"])
        return call


def parse_call(body: str, marks: CallMarks) -> JSONObject | None:
    """Return a call from the text between its marks; None if it is malformed.

    Its arguments must be a JSON object. Kimi-K2 names a call `functions.NAME:NUMBER`, which is its
    id.
    """
    head, separator, rest = body.partition(marks.separator)
    name, arguments = head.strip(), rest.strip()
    call_id = ""
    fenced_name, fence, fenced = arguments.partition(FENCE_BEGIN)
    if fence and fenced.endswith(FENCE_END):
        name, arguments = fenced_name.strip(), fenced.removesuffix(FENCE_END)
    elif numbered := re.fullmatch(r"functions\.(.+):\d+", name):
        name, call_id = numbered[1], name
    try:
        is_object = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        return None
    if not (separator and name and is_object):
        return None
    function = {"name": name, "arguments": arguments or "{}"}
    return {"id": call_id, "type": "function", "function": function}
