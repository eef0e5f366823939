"""Rows of data sets as messages: OpenAI's, ShareGPT's, Alpaca's and TRL's forms."""

import json
import re
from contextlib import suppress
from typing import Any, NamedTuple

from dsv3_ref.config import UserError
from dsv3_ref.data.formats import is_too_deep
from dsv3_ref.data.messages import Message

# ShareGPT's names of the roles
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool",
}  # fmt: skip
MEDIA_COLUMNS = "image", "images", "video", "videos", "audio", "audios"
WANTED_COLUMNS = "label", "kto_tag"  # of TRL's and LLaMA-Factory's unpaired preferences
JSON_TURNS = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
HUMAN_OR_ASSISTANT = re.compile(r"\n\n(Human|Assistant):")


class ConversationRow(NamedTuple):
    """The messages of a row, and the tools that they may call."""

    messages: list[Any]
    tools: list[Any] | None = None


def parse_conversation(row: object) -> ConversationRow:
    """Return the conversation of a row, of one of these forms.

    {"messages": [{"role", "content"}, …]} or {"conversations": [{"from", "value"}, …]}, each with
    "system" and "tools" where they are given; {"instruction", "input", "output", "history"};
    {"query", "response", "history"}, as in ms-swift; {"prompt", "completion"} of texts or messages.
    Raises a `UserError` for any other row.
    """
    if not isinstance(row, dict):
        raise no_conversation("")
    values = {name: value for name, value in row.items() if value is not None}
    check_media(values)
    check_wanted(values)
    tools = parse_tools(values.get("tools"))
    for name in ("messages", "conversations", "conversation"):
        # a column of a CSV file is a text
        turns = parse_json_text(values.get(name), f'it has no list of messages: "{name}"')
        if isinstance(turns, list | tuple):
            messages = [rename_speaker(turn) for turn in turns]
            return ConversationRow(with_system(messages, values.get("system")), tools)
    for question, answer in (("instruction", "output"), ("query", "response")):
        if question in values and answer in values:
            return ConversationRow(parse_alpaca(values, question, answer), tools)
    if "prompt" in values and "completion" in values:
        prompt = as_messages(values["prompt"], "user")
        return ConversationRow([*prompt, *as_messages(values["completion"], "assistant")], tools)
    raise no_conversation(", ".join(map(str, row)))


def check_media(row: dict[str, Any]) -> None:
    """Raise a `UserError` if a row has a picture, a video or a sound."""
    for name in MEDIA_COLUMNS:
        if row.get(name):
            raise UserError(f'it has "{name}", which this model cannot see: leave the row out')


def check_wanted(row: dict[str, Any]) -> None:
    """Raise a `UserError` if the answer of a row is labeled as an unwanted one."""
    for name in WANTED_COLUMNS:
        if row.get(name) is False:
            raise UserError(f'its "{name}" is false: an unwanted answer is not learned')


def no_conversation(columns: str) -> UserError:
    """Return the error for a row without a conversation."""
    what = f", only {columns}" if columns else ""
    return UserError(
        f'it has no list of messages{what}: write {{"messages": [{{"role", "content"}}, …]}}'
    )


def with_system(messages: list[Any], system: object) -> list[Any]:
    """Return messages after the system text of their row, unless they begin with one."""
    first = messages[0] if messages else None
    if not system or (isinstance(first, dict) and first.get("role") == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def rename_speaker(turn: Any) -> Any:
    """Return a message of ShareGPT's form, {"from", "value"}, as one with a role and a content."""
    if not isinstance(turn, dict) or turn.get("from") is None:
        return turn
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str):
        raise UserError(f'"from" of a message is {speaker!r}: write the name of a speaker')
    if speaker == "function_call":
        call = parse_json_text(value, "the value of a function_call")
        calls = [{"type": "function", "function": x} for x in as_list(call)]
        return rest | {"role": "assistant", "tool_calls": calls}
    return rest | {"role": SPEAKERS.get(speaker, speaker), "content": value}


def parse_alpaca(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    """Return the messages of a row of texts with "input", "system" and "history".

    question, answer: names of its columns, such as "instruction" and "output".
    """
    history = row.get("history") or []
    is_list = isinstance(history, list | tuple)
    if not is_list or any(not isinstance(x, list | tuple) or len(x) != 2 for x in history):
        raise UserError('its "history" is not a list of [question, answer]: correct it')
    messages = []
    for pair in [*history, (with_input(row[question], row), row[answer])]:
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return with_system(messages, row.get("system"))


def with_input(question: object, row: dict[str, Any]) -> object:
    """Return a question with the text in the row's column "input" below it."""
    has_input = row.get("input") and isinstance(question, str)
    return f"{question}\n\n{row['input']}" if has_input else question


def as_messages(value: object, role: str) -> list[Any]:
    """Return a text as the one message of a role; a message, or a list of them, as it is."""
    value = parse_turns([value] if isinstance(value, dict) else value)
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def parse_turns(value: object) -> Any:
    """Return a list of messages, which may be JSON as in CSV files; anything else unchanged.

    Raises a `UserError` for a list as Python prints it, which pandas writes.
    """
    if isinstance(value, str) and PYTHON_TURNS.match(value):
        raise UserError("its messages are written as Python prints them: write JSON (json.dumps)")
    if isinstance(value, str) and JSON_TURNS.match(value):
        with suppress(ValueError):
            value = load_nested(value)
    return [rename_speaker(x) for x in value] if isinstance(value, list | tuple) else value


def as_list(value: Any) -> list[Any]:
    """Return a list unchanged, and anything else in a list of its own."""
    return value if isinstance(value, list) else [value]


def parse_tools(value: object) -> list[Any] | None:
    """Return the tools of a row, a list or its JSON; None if there are none."""
    tools = parse_json_text(value, '"tools"') if isinstance(value, str) and value else value
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise UserError('its "tools" are not a list: write [{"type": "function", …}, …]')
    return list(tools)


def parse_json_text(text: object, name: str) -> Any:
    """Return the value of a JSON text; raise a `UserError` that names the field if it is none."""
    try:
        return load_nested(text) if isinstance(text, str) else text
    except ValueError as e:
        raise UserError(f"{name} is not JSON: {e}") from None


def load_nested(text: str) -> Any:
    """Return the value of a JSON text; raise a `ValueError` if it is none or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_too_deep(value, text.count("[") + text.count("{")):
        raise ValueError("it is nested too deeply")
    return value


# ── Pairs ──

# Columns in which data sets keep the prompt of two answers; the first that a row has counts.
PROMPT_COLUMNS = "prompt", "question", "query", "instruction", "messages", "conversations"


class PairRow(NamedTuple):
    """The messages of a prompt, and those of two answers to it."""

    prompt: list[Any]
    chosen: list[Any]
    rejected: list[Any]


def parse_pair(row: object) -> PairRow:
    """Return the pair of answers of a row {"prompt", "chosen", "rejected"}, of texts or messages.

    The prompt may have another name (`PROMPT_COLUMNS`), and ms-swift calls the answers "response"
    and "rejected_response". Without a prompt, or if both answers repeat it, the prompt is what both
    begin with. Raises a `UserError` for any other row.
    """
    if not isinstance(row, dict):
        raise UserError('it has no prompt and answers: write {"prompt", "chosen", "rejected"}')
    prompt, chosen, rejected = parse_pair_columns(row)
    answers = chosen, rejected
    talks = [whole_conversation(answer, prompt) for answer in answers]
    if talks[0] and talks[1]:
        n = common_length(*talks)
        shared = with_system(talks[0][:n], row.get("system"))
        return PairRow(shared, talks[0][n:], talks[1][n:])
    if not isinstance(prompt, list | tuple | str) or prompt == "":
        raise UserError(
            "it has no list of messages as its prompt, and its answers are no whole conversations: "
            f'write {{"prompt": messages or a string, "chosen", "rejected"}}, not {", ".join(row)}'
        )
    turns = with_system(as_messages(prompt, "user"), row.get("system"))
    return PairRow(turns, *(as_messages(answer, "assistant") for answer in answers))


def parse_pair_columns(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the prompt of a row, None if it has none, and its two answers, as they stand in it."""
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), "prompt")
    prompt = parse_turns(with_input(row.get(column), row))
    if row.get("rejected_response") is None:
        chosen, rejected = (parse_turns(row.get(name)) for name in ("chosen", "rejected"))
    else:
        chosen, rejected = row.get("response"), row["rejected_response"]
        if chosen is None and isinstance(prompt, list):  # the messages end with the better answer
            prompt, chosen = prompt[:-1], prompt[-1:]
    return prompt, chosen, rejected


def whole_conversation(answer: object, prompt: object) -> list[Any]:
    """Return the messages of an answer that includes its prompt; [] if it does not."""
    if isinstance(answer, str) and prompt is None and answer.startswith("\n\nHuman:"):
        _, *parts = HUMAN_OR_ASSISTANT.split(answer)
        roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
        return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2])]
    turns = [rename_speaker(turn) for turn in answer] if isinstance(answer, list | tuple) else []
    if len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        return []
    stated = as_messages(prompt, "user") if prompt is not None else []
    begins_alike = [said(x) for x in turns[: len(stated)]] == [said(x) for x in stated]
    return turns if begins_alike and turns[0].get("role") != "assistant" else []


def said(turn: Any) -> tuple[object, object]:
    """Return who says what in a message."""
    return (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)


def common_length(first: list[Any], second: list[Any]) -> int:
    """Return how many messages two conversations begin with in common, at most all but one."""
    most = min(len(first), len(second)) - 1
    differ = (i for i in range(most) if said(first[i]) != said(second[i]))
    return next(differ, most)
