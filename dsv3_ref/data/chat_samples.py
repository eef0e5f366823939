"""Conversations to learn from: tokens, and the mask of the answers among them."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import (
    OWN_ROLES,
    ChatTemplate,
    Conversation,
    Signs,
    after_open_thought,
)
from dsv3_ref.data.jinja_template import GENERATION_MARKS, JinjaTemplate
from dsv3_ref.data.messages import (
    REASONING,
    Message,
    has_loss,
    has_place_for_thoughts,
    normalize_messages,
    without_thoughts,
)

AnswerSpan = tuple[int, int]  # start and end of an answer in a text


class ChatSample(NamedTuple):
    """A conversation to learn from."""

    tokens: list[int]
    mask: list[bool]  # the tokens that the model must predict


def render_sample(
    chat: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None = None
) -> ChatSample:
    """Return a conversation with the mask of its answers, each with its stop token.

    A message with `"weight": 0` or `"train": false` has no loss. Answers are tokenized apart from
    what surrounds them, as they are when the model writes them. Raises a `UserError` if the last
    turn is not the assistant's, or if the form drops part of a learned answer, such as thoughts.
    """
    template = chat.find_template(tools)
    mentions = template.mentions if template else OWN_ROLES.__contains__
    if isinstance(messages, list | tuple) and not has_place_for_thoughts(mentions):
        messages = [
            m if isinstance(m, dict) and has_loss(m) else without_thoughts(m) for m in messages
        ]
    turns = normalize_messages(messages, mentions)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(turns) - 1 not in answers:
        chat.render(turns, tools)  # a malformed conversation is the first thing to report
        raise UserError("the last turn is not the assistant's: add its answer")
    learned = [i for i in answers if has_loss(messages[i])]
    if template is None:
        sample = own_sample(chat, turns, [i in learned for i in answers])
    else:
        talk = Conversation(turns, tools, {})
        signs = Signs.absent_from([turns, tools, template.text])
        find = generation_spans if template.has_generation_blocks else answer_spans
        text, spans = find(chat, template, talk, signs, learned)
        sample = encode_spans(chat, text, spans, signs)
    if any(not answer_parts(turns[i]) and "tool_calls" not in turns[i] for i in answers):
        raise UserError("an answer is empty: write its text")
    if not any(sample.mask):
        raise UserError("no answer has a loss: leave out the row, or give an answer a weight")
    return sample


def answer_parts(turn: Message) -> list[str]:
    """Return the texts of an answer: its thoughts and its content, without empty ones."""
    texts = [turn.get(REASONING[0]), turn.get("content")]
    return [text for text in texts if text]


def own_sample(chat: ChatTemplate, turns: list[Message], has_loss: list[bool]) -> ChatSample:
    """Return a conversation in V3's own form; `has_loss` says which answers count."""
    tokens = chat.render(turns)
    special_tokens = chat.special_tokens
    mask = []
    number, is_open = -1, False
    for token in tokens:
        mask.append(is_open and has_loss[number])
        if token == special_tokens.assistant:
            number, is_open = number + 1, True
        elif token == special_tokens.eos:
            is_open = False
    return ChatSample(tokens, mask)


# ── Answers in the text of a template ──


def generation_spans(
    chat: ChatTemplate, template: JinjaTemplate, talk: Conversation, signs: Signs,
    learned: Sequence[int],
) -> tuple[str, list[AnswerSpan]]:  # fmt: skip
    """Return the text of a conversation, and the {% generation %} blocks of the learned answers."""
    marked = talk._replace(variables={GENERATION_MARKS: signs.start + signs.end})
    parts = re.split(f"[{signs.start}{signs.end}]", chat.render_text(template, marked, signs))
    answers = [i for i, turn in enumerate(talk.messages) if turn["role"] == "assistant"]
    if len(parts) != 2 * len(answers) + 1:
        raise UserError(
            f"the chat template of {template.source} has {len(parts) // 2} generation blocks for "
            f"{len(answers)} answers: write one block around each answer"
        )
    text = ""
    spans = []
    for number, part in enumerate(parts):  # every second one is an answer
        if number % 2 and answers[number // 2] in learned:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def answer_spans(
    chat: ChatTemplate, template: JinjaTemplate, talk: Conversation, signs: Signs,
    learned: Sequence[int],
) -> tuple[str, list[AnswerSpan]]:  # fmt: skip
    """Return the text of a conversation, and where the learned answers stand in it.

    An answer begins where the prompt for it ends, as far as prompt and conversation agree, and
    ends with its last stop token. Raises a `UserError` if the template renders earlier turns
    otherwise in a longer conversation.
    """
    text = chat.render_text(template, talk, signs)
    spans = []
    for i in learned:
        is_last = i == len(talk.messages) - 1
        before, prompt = prompt_texts(chat, template, talk, signs, i)
        after = text if is_last else chat.render_text(template, until(talk, i + 1), signs)
        start = len(os.path.commonprefix([prompt, text]))
        if start < len(before) or not text.startswith(after):
            raise UserError(
                f"the chat template of {template.source} renders turn {i + 1} otherwise in a "
                'longer conversation: split the row, or give all answers but the last "weight": 0'
            )
        quoted = chat.quote(template, talk, signs).messages[i]
        answer = text[start : len(after)]
        if any(part.strip() not in answer for part in answer_parts(quoted)):
            rest = after_open_thought(prompt, quoted.get("content", "")) if is_last else None
            if rest is None:
                raise UserError(
                    f"the chat template of {template.source} drops part of turn {i + 1}, such as "
                    'its thoughts: leave that part out, or give the message "weight": 0'
                )
            answer = rest + (chat.tokenizer.id_to_token(chat.special_tokens.eos) or "")
            text, start = prompt + answer, len(prompt)
        spans.append((start, start + answer_length(chat, answer, signs)))
    return text, spans


def until(talk: Conversation, i: int) -> Conversation:
    """Return the conversation before message `i`."""
    return talk._replace(messages=talk.messages[:i])


def prompt_texts(
    chat: ChatTemplate, template: JinjaTemplate, talk: Conversation, signs: Signs, i: int
) -> tuple[str, str]:
    """Return the text before message `i`, without and with what prompts for an answer."""
    if i == 0:
        raise UserError("turn 1 is by 'assistant': begin with a user's turn")
    before = until(talk, i)
    return (
        chat.render_text(template, before, signs),
        chat.render_text(template, before, signs, add_generation_prompt=True),
    )


def answer_length(chat: ChatTemplate, answer: str, signs: Signs) -> int:
    """Return the length of an answer with its last stop token, without what follows it."""
    stops = {chat.tokenizer.id_to_token(i) for i in chat.stop_token_ids}
    matches = (m for m in chat.encoder.find_marks(answer, signs.edge) if m[0] in stops)
    return max((match.end() for match in matches), default=len(answer))


def encode_spans(
    chat: ChatTemplate, text: str, spans: list[AnswerSpan], signs: Signs
) -> ChatSample:
    """Tokenize the answers and what surrounds them; mark the tokens of the answers."""
    tokens: list[int] = []
    mask: list[bool] = []
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        for part, is_answer in ((text[position:start], False), (text[start:end], True)):
            new = chat.encoder.encode(part, signs.edge, is_start=not tokens)
            tokens += new
            mask += [is_answer] * len(new)
        position = end
    return ChatSample(tokens, mask)
