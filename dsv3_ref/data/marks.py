"""Marks: the tokens with which a tokenizer structures a text, and texts that must not forge them.

A tokenizer declares its marks as added tokens, many of them with `special: false`: R1-Distill's
`<｜User｜>`, V3's tool tokens. Every added token is a mark unless it consists of letters,
digits and white space.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dsv3_ref.config import UserError

HALF_CHARACTER = (
    "a text has half a character (a lone surrogate, such as \\ud83d): write the whole character"
)
Encode = Callable[[str], list[int]]  # text → tokens, none of them special
# In these tags an assistant writes its thoughts: they are part of what it says.
THINK_TAGS = "<think>", "</think>"
SPACE = re.compile(r"\s*")
THINK_TAG = re.compile(r"[<◁]/?(?:think|thinking|thought|reasoning)[>▷]")


def is_mark(token: AddedToken) -> bool:
    """Return whether an added token is a mark."""
    return token.special or not all(c.isalnum() or c.isspace() for c in token.content)


def find_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of a tokenizer's marks by their texts."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if is_mark(token)}


def plain_tokenizers(tokenizer: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Return tokenizers that know no marks: for the start of a text, and for what follows a mark.

    They differ where the pre-tokenizer puts a space before the first word only.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    values: dict[str, Any] | None = None
    start = tokenizer
    if not tokenizer.encode_special_tokens or any(is_mark(x) and not x.special for x in added):
        values = json.loads(tokenizer.to_str())
        for token in values["added_tokens"]:
            token["special"] |= is_mark(AddedToken(token["content"], special=token["special"]))
        start = plain_tokenizer(values)
    if '"prepend_scheme":"first"' not in tokenizer.to_str():
        return start, start
    values = values or json.loads(tokenizer.to_str())
    never_prepend(values)
    return start, plain_tokenizer(values)


def plain_tokenizer(values: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of these settings; it encodes special tokens as plain characters."""
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.encode_special_tokens = True
    return tokenizer


def never_prepend(values: Any) -> None:
    """Replace "prepend_scheme": "first" by "never" anywhere in a tokenizer's settings."""
    if isinstance(values, dict) and values.get("prepend_scheme") == "first":
        values["prepend_scheme"] = "never"
    parts = values.values() if isinstance(values, dict) else values
    for part in parts:
        if isinstance(part, dict | list):
            never_prepend(part)


def accept_any_length(num_bytes: int) -> None:
    """Do nothing: a text may have any length."""


def num_utf8_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8; a lone half of a character counts as one."""
    return len(text.encode(errors="replace"))


def end_of_space(text: str, position: int) -> int:
    """Return the place of the first character from a position on that is not white space."""
    match = SPACE.match(text, position)
    return match.end() if match else position


class MarkedTextEncoder:
    """Encoder of texts in which some marks are meant and others are quoted.

    check_length: called with the number of bytes of a text before it is tokenized; raises a
    `UserError` if they are too many.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.check_length: Callable[[int], None] = accept_any_length
        self.ids = find_marks(tokenizer)
        unknown = getattr(tokenizer.model, "unk_token", None)
        self.forbidden = {i for text, i in self.ids.items() if text != unknown}
        self.start, self.rest = plain_tokenizers(tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        self.strips = {x.content: (x.lstrip, x.rstrip) for x in added if x.lstrip or x.rstrip}
        texts = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self.first_chars = {text[0] for text in texts}

    def quoting_pattern(self, literals: Iterable[str], keep_tags: bool) -> re.Pattern[str]:
        """Return the pattern for `quote` that leaves harmless ones of these literals as they are.

        keep_tags: the tags of thoughts, too.
        """
        tags = {text for text in (*THINK_TAGS, *self.ids) if THINK_TAG.fullmatch(text)}
        harmless = {text for text in literals if len(text) > 1 and not self.could_begin_mark(text)}
        harmless = harmless | tags if keep_tags else harmless - tags
        whole = [re.escape(text) for text in sorted(harmless, key=len, reverse=True)]
        single = "".join(map(re.escape, sorted(self.first_chars)))
        return re.compile("|".join([*whole, *([f"[{single}]"] if single else [])]) or "(?!)")

    def could_begin_mark(self, text: str) -> bool:
        """Return whether a text holds a mark, or ends with what begins one."""
        ends = {text[i:] for i in range(len(text))}
        return any(mark in text or any(map(mark.startswith, ends)) for mark in self.ids)

    def quote(self, text: str, edge: str, pattern: re.Pattern[str]) -> str:
        """Break every possible mark in a text with `edge`, by a `quoting_pattern`.

        It follows the first character of a mark, and stands twice before a mark of one character.
        """

        def replace(match: re.Match[str]) -> str:
            if len(match[0]) > 1:
                return match[0]
            return f"{edge * 2 if match[0] in self.ids else ''}{match[0]}{edge}"

        return pattern.sub(replace, text)

    def encode_text(self, text: str) -> list[int]:
        """Encode a text in which no mark is meant."""
        self.check_length(num_utf8_bytes(text))
        return self.encode_plain(text, is_start=True)

    def encode(self, text: str, edge: str, is_start: bool = True) -> list[int]:
        """Encode a text in which every mark is meant that `quote` has not broken.

        is_start: nothing precedes the text.
        """
        pieces = [*self.split_at_marks(text, edge)]
        self.check_length(sum(num_utf8_bytes(plain) for plain, _ in pieces))
        tokens: list[int] = []
        for i, (plain, mark) in enumerate(pieces):
            tokens += self.encode_plain(plain, is_start and i == 0)
            if mark:
                tokens.append(self.ids[mark])
        return tokens

    def split_at_marks(self, text: str, edge: str) -> Iterator[tuple[str, str]]:
        """Yield (plain text, mark after it) of a text; the last mark is "".

        Without the signs of `quote`, and the white space that a mark strips beside it.
        """
        position = 0
        for match in self.find_marks(text, edge):
            left, right = self.strips.get(match[0], (False, False))
            before = text[position : match.start()].replace(edge, "")
            yield before.rstrip() if left else before, match[0]
            position = end_of_space(text, match.end()) if right else match.end()
        yield text[position:].replace(edge, ""), ""

    def find_marks(self, text: str, edge: str) -> Iterator[re.Match[str]]:
        """Yield the marks in a text that `quote` has not broken."""
        for match in self.pattern.finditer(text):
            start, end = match.span()
            if end - start > 1 or text[max(0, start - 2) : start] != edge * 2:
                yield match

    def encode_plain(self, text: str, is_start: bool) -> list[int]:
        """Encode plain characters; raise a `UserError` if the tokenizer makes a mark of them."""
        if not text:
            return []
        tokenizer = self.start if is_start else self.rest
        try:
            tokens = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise UserError(HALF_CHARACTER) from None
        if not self.forbidden.isdisjoint(tokens):
            mark = next(text for text, i in self.ids.items() if i in tokens)
            raise UserError(
                f"this tokenizer cannot write {mark} as plain characters: remove it from the text"
            )
        return tokens
