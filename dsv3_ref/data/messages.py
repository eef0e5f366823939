"""Messages of a conversation: what OpenAI's clients and data sets send, in one form."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv3_ref.checkpoints.atomic import describe_json
from dsv3_ref.config import UserError
from dsv3_ref.data.formats import is_utf8
from dsv3_ref.data.marks import THINK_TAGS

Message = dict[str, Any]

ROLES = frozenset({"system", "user", "assistant", "tool", "developer", "function"})
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the usual first
# Fields with text for the model: a form that does not render one must refuse it.
TEXT_FIELDS = frozenset({
    *REASONING, "tool_calls", "function_call", "audio", "refusal", "images", "prefix",
})  # fmt: skip
LOSS_FIELDS = ("weight", "train", "trainable", "loss_mask")  # 0 or false: no loss on this message


class CallArguments(dict[str, Any]):
    """The arguments of a call, for templates that take them as an object or as JSON text.

    text: the JSON of a client, as OpenAI's protocol sends it. Printed, and joined to other texts,
    the arguments are this text.
    """

    def __init__(self, values: Mapping[str, Any], text: str = ""):
        super().__init__(values)
        self.text = text or json.dumps(values, ensure_ascii=False)

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: str) -> str:
        return self.text + other

    def __radd__(self, other: str) -> str:
        return other + self.text

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Return arguments from an object or its JSON, empty ones as {}; others unchanged."""
        try:
            parsed = json.loads(value or "{}") if isinstance(value, str | None) else value
        except (ValueError, RecursionError):  # a call that was cut off, say
            return value
        if not isinstance(parsed, dict):
            return value
        return cls(parsed, value if isinstance(value, str) else "")


def normalize_messages(messages: object, mentions: Callable[[str], bool]) -> list[Message]:
    """Return messages with texts as contents; raise a `UserError` for what cannot be rendered.

    mentions: whether the form of the conversation reads a field, or has a role, of this name.
    Text parts are joined, fields without a value are dropped, and `developer` is `system`, unless
    the form has this role.
    """
    if not isinstance(messages, list | tuple):
        raise UserError("messages must be a list of turns with at least one entry")
    if not messages:
        raise UserError("a conversation needs a question: add a user message")
    return [
        normalize_message(i, turn, mentions, is_last=i == len(messages))
        for i, turn in enumerate(messages, start=1)
    ]


def normalize_message(
    i: int, turn: object, mentions: Callable[[str], bool], is_last: bool
) -> Message:
    """Return message number `i` as `normalize_messages` does."""
    if not isinstance(turn, dict):
        raise UserError(f'turn {i} is not a role with a string: write {{"role", "content"}}')
    turn = {k: v for k, v in turn.items() if v is not None and k not in LOSS_FIELDS}
    role = turn.get("role")
    if not isinstance(role, str):
        raise UserError(f'turn {i} is not a role with a string: write {{"role", "content"}}')
    if role == "developer" and not mentions(role):
        role = "system"
    if role not in ROLES and not mentions(role):
        raise UserError(f"turn {i} is by {role!r}: roles are system, user, assistant and tool")
    turn = {k: v for k, v in turn.items() if k not in TEXT_FIELDS or v not in ("", [], {}, False)}
    turn = place_thoughts(i, turn, mentions, is_last)
    placed = REASONING if any(map(mentions, REASONING)) else ()
    for name in sorted(TEXT_FIELDS & set(turn) - set(placed)):
        if not mentions(name):
            raise UserError(
                f"turn {i} has {name!r}, which the form of this model's conversations cannot "
                "express: leave it out, or use a model whose chat template has it"
            )
    content = normalize_content(i, turn)
    if isinstance(turn.get("tool_calls"), list | tuple):
        turn["tool_calls"] = [normalize_call(call) for call in turn["tool_calls"]]
    turn = turn | {"role": role} | ({} if content is None else {"content": content})
    if not is_utf8(turn):
        raise UserError(
            f"turn {i} has half a character (a lone surrogate, such as \\ud83d): "
            "write the whole character"
        )
    return turn


def place_thoughts(
    i: int, turn: Message, mentions: Callable[[str], bool], is_last: bool
) -> Message:
    """Return message number `i` with its thoughts where the form of the conversation reads them.

    A form that knows no field for them, but the tag </think>, has them in the content, in R1's
    form.
    """
    thoughts = next((turn[k] for k in REASONING if k in turn), None)
    if thoughts is None:
        return turn
    rest = {k: v for k, v in turn.items() if k not in REASONING}
    if any(map(mentions, REASONING)):
        return rest | dict.fromkeys(("reasoning_content", "thinking"), thoughts)
    if not mentions(THINK_TAGS[1]) or turn["role"] != "assistant" or not isinstance(thoughts, str):
        return turn
    content = normalize_content(i, rest | {"content": rest.get("content", "")})
    begin, end = THINK_TAGS
    gap = "\n\n" if is_last else ""  # earlier thoughts are dropped by templates, this is not
    return rest | {"content": f"{begin}\n{thoughts.strip()}\n{end}{gap}{content}"}


def has_place_for_thoughts(mentions: Callable[[str], bool]) -> bool:
    """Return whether the form of a conversation has thoughts, in a field or between tags."""
    return any(map(mentions, (*REASONING, THINK_TAGS[1])))


def without_thoughts(turn: Any) -> Any:
    """Return a message without its thoughts if it is an assistant's; anything else unchanged.

    Clients send back what they received. vLLM and SGLang ignore fields that a template does not
    read. What is left of an answer that was cut off while the model thought is an empty one.
    """
    is_answer = isinstance(turn, dict) and turn.get("role") == "assistant"
    if not is_answer or not any(turn.get(name) for name in REASONING):
        return turn
    rest = {k: v for k, v in turn.items() if k not in REASONING}
    return rest | ({"content": ""} if rest.get("content") is None else {})


def normalize_call(call: Any) -> Any:
    """Return a call of a tool with `CallArguments`; anything else unchanged."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = CallArguments.parse(function.get("arguments"))
    return call | {"function": function | {"arguments": arguments}}


def normalize_content(i: int, turn: Message) -> str | None:
    """Return the text of a message; None if it has tool calls or reasoning in place of a text."""
    content = turn.get("content")
    if isinstance(content, list | tuple):
        content = join_text_parts(i, content)
    if content is None and not TEXT_FIELDS & set(turn):
        raise UserError(f'turn {i} is not a role with a string: write {{"role", "content"}}')
    if content is not None and not isinstance(content, str):
        raise UserError(
            f"turn {i} is not a role with a string: its content is {str(content)[:40]}, "
            f"{describe_json(content)}; quote it"
        )
    return content


def join_text_parts(i: int, parts: Sequence[object]) -> str:
    """Return the texts of content parts end to end; raise a `UserError` for other parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"the content of a message must be text (turn {i}): leave out images and files"
            )
        texts.append(text)
    return "".join(texts)


def iter_texts(value: object) -> list[str]:
    """Return all texts of a JSON value, keys included, in any order."""
    texts: list[str] = []
    parts: list[object] = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            parts += [*part.values(), *part]
        elif isinstance(part, list | tuple):
            parts += part
    return texts


def has_loss(turn: Message) -> bool:
    """Return whether an assistant message is trained on: none of its `LOSS_FIELDS` is 0 or false.

    Raises a `UserError` for a weight between, which no data set of OpenAI's form has.
    """
    for name in LOSS_FIELDS:
        value = turn.get(name)
        if value is not None and value not in (0, 1):  # True and False equal 1 and 0
            raise UserError(f'"{name}" is {value!r}: write 0 for no loss, or 1')
        if value is not None and not value:
            return False
    return True
