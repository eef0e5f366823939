"""Conversations as OpenAI's clients send them, and the tokens that they become."""

from typing import Any

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.messages import Message
from dsv3_ref.serving.fields import InvalidField, JSONObject

RESERVED = {"messages", "tools", "add_generation_prompt", "continue_final_message", "self"}
BETWEEN_TURNS = {"type": "text", "text": "\n\n"}


def render_messages(chat: ChatTemplate, values: JSONObject) -> list[int]:
    """Return the token ids of the conversation in the fields of a request.

    A last assistant turn is continued, unless the request wants a new one after it. Raises
    `InvalidField` for what the form of the model's conversations cannot express.
    """
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise InvalidField("messages", "messages must be a list of turns, which are objects")
    tools = None if values.get("tool_choice") == "none" else values.get("tools") or None
    variables = values.get("chat_template_kwargs", {})
    check_variables(tools, variables)
    try:
        template = chat.find_template(tools)
    except UserError as e:
        raise InvalidField("tools" if tools else "messages", hide_path(chat, e)) from None
    turns = drop_prefix_mark(messages) if template else arrange_turns(drop_prefix_mark(messages))
    continues = continues_answer(values)
    try:
        return chat.render(
            turns, tools, add_generation_prompt=not continues,
            continue_final_message=continues, **variables,
        )  # fmt: skip
    except (UserError, RecursionError) as e:
        raise InvalidField("messages", hide_path(chat, e)) from None


def hide_path(chat: ChatTemplate, error: Exception) -> str:
    """Return the message of an error without the server's directory of the model."""
    path = str(chat.settings.source)
    return str(error).replace(path, "this model") if path else str(error)


def continues_answer(values: JSONObject) -> bool:
    """Return whether the model continues the last turn, which is the assistant's."""
    messages = values["messages"]
    is_answered = bool(messages) and messages[-1].get("role") == "assistant"
    wants_new = values.get("add_generation_prompt", False)
    return values.get("continue_final_message", is_answered and not wants_new)


def drop_prefix_mark(messages: list[Message]) -> list[Message]:
    """Return messages without the mark of DeepSeek's API on an answer that is to be continued."""
    if not messages or messages[-1].get("prefix") is not True:
        return messages
    return [*messages[:-1], {k: v for k, v in messages[-1].items() if k != "prefix"}]


def arrange_turns(messages: list[Message]) -> list[Message]:
    """Return messages for V3's own form, in which a system text is first and turns alternate.

    System texts are moved to the front, as V3's template moves them; consecutive messages of one
    role are one turn, with an empty line between them, in a time linear in their number.
    """
    turns: list[Message] = []
    joined: list[Any] = []  # parts of the last turn
    named = [turn | {"role": "system"} if is_system(turn) else turn for turn in messages]
    for turn in [*filter(is_system, named), *(turn for turn in named if not is_system(turn))]:
        last = turns[-1] if turns else {}
        parts = text_parts(turn.get("content"))
        if last.get("role") == turn.get("role") and joined and parts:
            joined += [BETWEEN_TURNS, *parts]
            last |= {**turn, "content": joined}
        else:
            turns.append({**turn})
            joined = [*parts]
    return turns


def is_system(turn: Message) -> bool:
    """Return whether a message instructs the model; `developer` is OpenAI's newer name."""
    return turn.get("role") in ("system", "developer")


def text_parts(content: object) -> list[Any]:
    """Return a content as a list of parts; an empty one if it is neither a string nor parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def check_variables(tools: object, variables: object) -> None:
    """Raise `InvalidField` unless tools are objects and variables do not replace a conversation."""
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not is_list:
        raise InvalidField("tools", "tools must be a list of objects")
    if not isinstance(variables, dict) or RESERVED & set(variables):
        raise InvalidField(
            "chat_template_kwargs",
            f"chat_template_kwargs must be an object without {', '.join(sorted(RESERVED))}",
        )
