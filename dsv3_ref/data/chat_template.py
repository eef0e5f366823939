"""The one way from conversations to tokens: a directory's chat template, or V3's own form.

A template's text may hold marks, a message's text may not: no user can forge a turn, however the
tokenizer declares its tokens. What a template spells in ordinary words (V2-Lite's `User: `) is not
a mark: the model reads the same words in a message alike.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from tokenizers import Tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.data.jinja_template import JinjaTemplate
from dsv3_ref.data.marks import THINK_TAG, MarkedTextEncoder
from dsv3_ref.data.messages import (
    TEXT_FIELDS,
    CallArguments,
    Message,
    has_place_for_thoughts,
    iter_texts,
    normalize_messages,
    without_thoughts,
)
from dsv3_ref.data.tokenizer import ASSISTANT, BOS, EOS, get_special_tokens, load_tokenizer
from dsv3_ref.data.tokenizer_settings import TokenizerSettings, load_tokenizer_settings

if TYPE_CHECKING:
    from dsv3_ref.sft import SpecialTokens

PRIVATE, LAST = 0xF0000, 0x10FFFF  # Unicode's private characters, up to its last one
OPEN_THOUGHT = re.compile(rf"({THINK_TAG.pattern})\s*$")  # at the end of a prompt
THOUGHT_TOKENS = 12  # that “<think>\n\n” has at most
MAX_MISSED_CHARACTERS = 1 << 27  # of a rendered text that is searched in vain: about 3 s
OWN_ROLES = "system", "user", "assistant"


@dataclass(frozen=True)
class Signs:
    """Characters that occur in no text of a conversation, to follow texts through a template."""

    edge: str  # inside what could be a mark in a message
    tail: str  # after the text to continue
    start: str  # of what the model writes
    end: str

    @classmethod
    def absent_from(cls, value: object) -> "Signs":
        """Return signs that occur in none of the texts of a JSON value.

        Raises a `UserError` if the texts leave no private character unused.
        """
        used = set("".join(iter_texts(value)))
        unused = (char for char in map(chr, range(PRIVATE, LAST + 1)) if char not in used)
        chars = list(islice(unused, 4))
        if len(chars) < 4:
            raise UserError(
                "the conversation uses all private characters of Unicode: leave some out"
            )
        return cls(*chars)


class Conversation(NamedTuple):
    """Messages, tools and variables that a template renders."""

    messages: list[Message]
    tools: list[Any] | None
    variables: dict[str, Any]


class ChatTemplate:
    """A tokenizer with the form of its conversations.

    tokenizer, settings: as `load_tokenizer` and `load_tokenizer_settings` return them. Without a
    chat template in the settings, the form is V3's own (chapter 14).
    """

    def __init__(self, tokenizer: Tokenizer, settings: TokenizerSettings | None = None):
        self.tokenizer = tokenizer
        self.settings = settings or TokenizerSettings()
        self.encoder = MarkedTextEncoder(tokenizer)
        self.encode = self.encoder.encode_text
        self.templates = {
            name: JinjaTemplate(text, self.settings.source)
            for name, text in self.settings.chat_templates.items()
        }

    @classmethod
    def from_dir(cls, directory: Path) -> "ChatTemplate":
        """Read tokenizer and chat template of a run, or of a Hugging Face directory."""
        return cls(load_tokenizer(directory), load_tokenizer_settings(directory))

    # ── Special tokens ──

    @cached_property
    def special_tokens(self) -> "SpecialTokens":
        """The ids of the special tokens; `user` and `assistant` are −1 if the tokenizer has none.

        Raises a `UserError` if it has no end token.
        """
        return get_special_tokens(self.tokenizer, self.settings)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.settings.stop_token_ids | {self.special_tokens.eos}

    @property
    def adds_bos(self) -> bool:
        """True if a plain text begins with the begin token."""
        if self.settings.add_bos_token is not None:
            return self.settings.add_bos_token
        if not self.settings.special_tokens:  # a run of ours
            return True
        return self.special_tokens.bos in self.tokenizer.encode("").ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text to continue, in which no mark is meant."""
        tokens = [self.special_tokens.bos] if self.adds_bos else []
        tokens += self.encode(text)
        return tokens or [self.special_tokens.eos]  # something must precede the first new token

    # ── Prompts ──

    def render_prompt(
        self, messages: Sequence[Message], tools: list[Any] | None = None, **variables: Any
    ) -> list[int]:
        """Return the tokens after which the model answers; it continues a last assistant turn."""
        last = messages[-1] if isinstance(messages, list | tuple) and messages else None
        continues = isinstance(last, dict) and last.get("role") == "assistant"
        return self.render(
            messages, tools, add_generation_prompt=not continues,
            continue_final_message=continues, **variables,
        )  # fmt: skip

    def opened_thought(self, prompt: Sequence[int]) -> str:
        """Return the <think> that a prompt ends with, and white space after it; "" if it does not.

        With R1's template, the model's text begins inside its thoughts.
        """
        end = self.tokenizer.decode(prompt[-THOUGHT_TOKENS:], skip_special_tokens=False)
        match = re.search(r"<think>\s*$", end)
        return match[0] if match else ""

    def encode_next_turn(self, text: str) -> list[int]:
        """Return the tokens that follow an answer's stop token, to ask another question."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answered = self.render(talk)
        longer = self.render_prompt([*talk, {"role": "user", "content": text}])
        if longer[: len(answered)] != answered:
            raise UserError(
                f"the chat template of {self.settings.source} changes an answer when another turn "
                "follows, so that no judge's turn can follow it: use another model"
            )
        stops = [i for i, token in enumerate(answered) if token in self.stop_token_ids]
        return longer[(stops[-1] + 1 if stops else len(answered)) :]

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *,
        add_generation_prompt: bool = False, continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:  # fmt: skip
        """Return the tokens of a conversation, as `apply_chat_template` of transformers does.

        No text of a message produces a mark, except the tags of thoughts in an assistant's.
        variables: further ones that the template reads, such as `enable_thinking`.
        An empty answer is not continued: the prompt is that for a new one. Raises a `UserError` for
        what the form of this model's conversations cannot express. Thoughts of a form without them
        are dropped.
        """
        template = self.find_template(tools)
        mentions = template.mentions if template else OWN_ROLES.__contains__
        if isinstance(messages, list | tuple) and not has_place_for_thoughts(mentions):
            messages = [*map(without_thoughts, messages)]
        if continue_final_message and is_empty_answer(messages[-1]):
            return self.render(messages[:-1], tools, add_generation_prompt=True, **variables)
        if template is None:
            return self.render_own(
                messages, tools, variables, add_generation_prompt, continue_final_message
            )
        turns = normalize_messages(messages, mentions)
        talk = Conversation(turns, tools, variables)
        signs = Signs.absent_from([turns, tools, variables, template.text])
        if continue_final_message:
            text = self.continued_text(template, talk, signs)
        else:
            text = self.render_text(template, talk, signs, add_generation_prompt)
        return self.encoder.encode(text, signs.edge)

    def find_template(self, tools: list[Any] | None) -> JinjaTemplate | None:
        """Return the template for a conversation with these tools; None for V3's own form.

        Raises a `UserError` if there are tools and the form has none, or if there is no form.
        """
        source = self.settings.source
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        template = self.templates.get(name)
        if self.templates and template is None:
            raise UserError(
                f"{source} has chat templates called {', '.join(self.templates)}, but none called "
                "default: rename the one to use"
            )
        if template is None and self.tokenizer.token_to_id(ASSISTANT) is None:
            raise UserError(
                f"{source} has no chat template, and its tokenizer lacks {ASSISTANT}: add "
                "chat_template.jinja, or use the model that is tuned for conversations"
            )
        if tools and not (template and template.mentions("tools")):
            raise UserError(
                f"the form of the conversations of {source} has no tools: leave out 'tools'"
            )
        return template

    def render_text(
        self, template: JinjaTemplate, talk: Conversation, signs: Signs,
        add_generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        """Return the text of a conversation, with `signs.edge` in what messages quote.

        Raises a `UserError` if the template changes texts so that the signs are lost.
        """
        plain = self.fill(template, talk, add_generation_prompt)
        check_said(template, talk.messages, plain)
        quoted = self.quote(template, talk, signs)
        if quoted == talk:
            return plain
        text = self.fill(template, quoted, add_generation_prompt)
        if text.replace(signs.edge, "") != plain:
            raise UserError(
                f"the chat template of {template.source} changes a message so that it could pass "
                "for a mark of this tokenizer: leave out of it what looks like one"
            )
        return text

    def continued_text(self, template: JinjaTemplate, talk: Conversation, signs: Signs) -> str:
        """Return the text of a conversation up to the end of its last answer, to be continued.

        Raises a `UserError` if the template drops part of that answer.
        """
        *turns, last = talk.messages
        if last["role"] != "assistant" or "content" not in last:
            raise UserError("the last turn is not the assistant's: there is nothing to continue")
        content = f"{last['content']}{signs.tail} "
        talk = talk._replace(messages=[*turns, last | {"content": content}])
        text = self.render_text(template, talk, signs)
        end = text.find(signs.tail)
        quoted = self.quote(template, talk, signs).messages[-1]["content"].partition(signs.tail)[0]
        if end >= 0 and quoted.strip() in text[:end]:
            is_trimmed = text[end : end + 2] != f"{signs.tail} "
            return text[:end].rstrip() if is_trimmed else text[:end]
        prompt = self.render_text(
            template, talk._replace(messages=turns), signs, add_generation_prompt=True
        )
        rest = after_open_thought(prompt, quoted)
        if rest is None:
            raise UserError(
                f"the chat template of {template.source} drops part of the last answer, which "
                "cannot be continued: leave out its thoughts, or end with a user's turn"
            )
        return prompt + rest

    def fill(self, template: JinjaTemplate, talk: Conversation, add_generation_prompt: bool) -> str:
        """Render a conversation.

        If that fails, or drops the calls of tools, it is rendered again with null in the place of
        contents that are missing or empty beside calls, as older templates expect. Raises a
        `UserError` if the template reads what the conversation does not have, or drops its calls.
        """
        variables = self.template_tokens | talk.variables
        variables |= {"tools": talk.tools, "add_generation_prompt": add_generation_prompt}
        error: UserError | None = None
        for turns in (talk.messages, [with_null_content(turn) for turn in talk.messages]):
            try:
                text = template.render(turns, **variables)
            except jinja2.UndefinedError as e:
                error = error or missing_value(template, e)
                continue
            if not drops_calls(template, turns, variables, text):
                return text
            error = UserError(
                f"the chat template of {template.source} drops the calls of tools: leave out the "
                "text beside 'tool_calls', or use a model whose template has them"
            )
        assert error is not None  # both attempts have failed
        raise error

    @cached_property
    def template_tokens(self) -> dict[str, Any]:
        """The special tokens that templates read by name."""
        own = {"bos_token": BOS, "eos_token": EOS}
        known = {k: v for k, v in own.items() if self.tokenizer.token_to_id(v) is not None}
        return known | self.settings.special_tokens

    def quote(self, template: JinjaTemplate, talk: Conversation, signs: Signs) -> Conversation:
        """Return a conversation with `signs.edge` in what could be a mark in its texts."""
        others_pattern, own_pattern = self.quoting_patterns[template.text]
        edge = signs.edge
        turns = []
        for turn in talk.messages:
            pattern = own_pattern if turn["role"] == "assistant" else others_pattern
            turns.append(self.quote_value(turn, edge, pattern) | {"role": turn["role"]})
        tools, variables = self.quote_value([talk.tools, talk.variables], edge, others_pattern)
        return Conversation(turns, tools, variables)

    def quote_value(self, value: Any, edge: str, pattern: re.Pattern[str]) -> Any:
        """Return a JSON value whose texts are quoted, the names of fields included."""
        if isinstance(value, str):
            return self.encoder.quote(value, edge, pattern)
        if isinstance(value, CallArguments):
            values = self.quote_value(dict(value), edge, pattern)
            return CallArguments(values, self.encoder.quote(value.text, edge, pattern))
        if isinstance(value, dict):
            keys = (self.quote_value(key, edge, pattern) for key in value)
            items = (self.quote_value(item, edge, pattern) for item in value.values())
            return dict(zip(keys, items))
        if isinstance(value, list | tuple):
            return [self.quote_value(item, edge, pattern) for item in value]
        return value

    @cached_property
    def quoting_patterns(self) -> dict[str, tuple[re.Pattern[str], re.Pattern[str]]]:
        """The patterns by which others' texts and the assistant's are quoted, for each template."""
        return {
            template.text: (
                self.encoder.quoting_pattern(template.literals, keep_tags=False),
                self.encoder.quoting_pattern(template.literals, keep_tags=True),
            )
            for template in self.templates.values()
        }

    def render_own(
        self, messages: Sequence[Message], tools: list[Any] | None, variables: dict[str, Any],
        add_generation_prompt: bool, continue_final_message: bool,
    ) -> list[int]:  # fmt: skip
        """Return the tokens of a conversation in V3's own form (chapter 14)."""
        from dsv3_ref.sft import render_conversation  # needs torch, which `dsv3 data` does not load

        turns = normalize_messages(messages, OWN_ROLES.__contains__)
        tokens = render_conversation(turns, self.encode, self.special_tokens)
        is_answered = turns[-1]["role"] == "assistant"
        if continue_final_message and not is_answered:
            raise UserError("the last turn is not the assistant's: there is nothing to continue")
        if continue_final_message or not (is_answered or add_generation_prompt):
            tokens.pop()
        elif is_answered and add_generation_prompt:
            tokens.append(self.special_tokens.assistant)
        return tokens


def after_open_thought(prompt: str, content: str) -> str | None:
    """Return what follows the prompt in an answer, if the prompt opens its thoughts: R1's <think>.

    Returns None if the prompt does not, or if the answer has no thoughts.
    """
    match = OPEN_THOUGHT.search(prompt)
    if not match or not content.lstrip().startswith(match[1]):
        return None
    rest = content.lstrip().removeprefix(match[1])
    return rest.lstrip("\n") if match[0].endswith("\n") else rest


def is_empty_answer(turn: Message) -> bool:
    """Return whether a message is an assistant's with nothing but its role."""
    content = turn.get("content")
    is_empty = (
        content is None or content == [] or (isinstance(content, str) and not content.strip())
    )
    has_more = any(turn.get(name) for name in TEXT_FIELDS)
    return turn.get("role") == "assistant" and is_empty and not has_more


def with_null_content(turn: Message) -> Message:
    """Return a message with null as its content if it has none, or an empty one beside calls."""
    if turn.get("content") or ("content" in turn and "tool_calls" not in turn):
        return turn
    return turn | {"content": None}


def drops_calls(
    template: JinjaTemplate, turns: list[Message], variables: dict[str, Any], text: str
) -> bool:
    """Return whether a template renders the same text without the calls of the messages."""
    bare = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in turns]
    if bare == turns:
        return False
    try:
        return template.render(bare, **variables) == text
    except (jinja2.UndefinedError, UserError):  # it reads the calls
        return False


def check_said(template: JinjaTemplate, messages: Sequence[Message], text: str) -> None:
    """Raise a `UserError` if a template drops what somebody other than the assistant says.

    A template without a role drops such turns without a word. Templates drop an assistant's
    thoughts on purpose. What a role says later stands later, also where the template moves system
    texts to the front, so it is looked for there first: the time is then linear in the text. Of
    what is in another order only so much is looked for that no conversation takes long.
    """
    positions: dict[str, int] = {}  # by role
    as_json: set[str] = set()  # roles whose texts the template writes so
    num_missed = 0
    for i, turn in enumerate(messages, start=1):
        if turn["role"] == "assistant":
            continue
        content = (turn.get("content") or "").strip()
        forms = [content, json.dumps(content, ensure_ascii=False)[1:-1]]
        if turn["role"] in as_json:
            forms.reverse()
        position = positions.get(turn["role"], 0)
        place, form = find_said(text, forms, position)
        if form != content:
            as_json.add(turn["role"])
        num_missed += place < position or form != forms[0]
        if num_missed * len(text) > MAX_MISSED_CHARACTERS:
            raise UserError(
                f"the chat template of {template.source} puts the turns into another order, and "
                "there are too many to follow them: send fewer turns"
            )
        positions[turn["role"]] = max(position, place)
        if place < 0:
            role = "a system text" if turn["role"] == "system" else f"turn {i}, by {turn['role']!r}"
            raise UserError(
                f"the chat template of {template.source} drops {role}: put it into a user's turn, "
                "or use a model whose template has it"
            )


def find_said(text: str, forms: Sequence[str], position: int) -> tuple[int, str]:
    """Return (place, form) of the first form that a text has, from a position on or else before it.

    The place is −1 if the text has none of them.
    """
    for start in (position, 0):
        for form in forms:
            if (place := text.find(form, start)) >= 0:
                return place, form
    return -1, forms[0]


def missing_value(template: JinjaTemplate, error: Exception) -> UserError:
    """Return the error for a template that reads what a conversation does not have."""
    return UserError(
        f"the chat template of {template.source} needs what this conversation lacks: {error}"
    )
