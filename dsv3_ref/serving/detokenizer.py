"""From tokens to text: decoding token by token, stop strings, and the bytes of single tokens."""

import codecs
import re
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer, decoders

MAX_CHARACTER_BYTES = 4  # in UTF-8, and so the most tokens that a character needs
REPLACEMENT = "\ufffd"  # stands for bytes that are no character
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # as SentencePiece writes a byte


# ── Decoders ──


class ByteDecoder:
    """Incremental decoder of a byte-level tokenizer, which reads each byte once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.special = special_ids(tokenizer)
        self.broke_pending = False  # the last token began a character before another was complete

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        text = None if token in self.special else self.tokenizer.id_to_token(token)
        pending = self.utf8.getstate()[0]
        data = token_bytes(text) if text else b""
        new = self.utf8.decode(data)
        is_whole = (pending + data).startswith(REPLACEMENT.encode())
        self.broke_pending = bool(pending) and new.startswith(REPLACEMENT) and not is_whole
        return new

    @property
    def has_pending(self) -> bool:
        """True if the last character is incomplete."""
        return bool(self.utf8.getstate()[0])

    def flush(self) -> str:
        """Return “\ufffd” in the place of an incomplete character."""
        return self.utf8.decode(b"", final=True)


class WindowDecoder:
    """Incremental decoder of any other tokenizer.

    It decodes the tokens of the last piece again, since a text may depend on the token before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.window: list[int] = []  # the last tokens that have been read, and what follows
        self.num_read = 0  # tokens of the window whose text has been returned
        self.broke_pending = False  # cannot be told

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        if token in self.special:
            return ""
        self.window.append(token)
        return self.read(self.is_certain())

    def is_certain(self) -> bool:
        """Return whether no further token can change the text of the window."""
        is_whole = not self.tokenizer.decode(self.window).endswith("\ufffd")
        return is_whole or len(self.window) - self.num_read >= MAX_CHARACTER_BYTES

    @property
    def has_pending(self) -> bool:
        """True if the last character may be incomplete."""
        return len(self.window) > self.num_read

    def flush(self) -> str:
        """Return what `push` has held back."""
        return self.read(True)

    def read(self, is_certain: bool) -> str:
        """Return the new text of the window, if it is certain, and move the window."""
        if not is_certain:
            return ""
        old = self.tokenizer.decode(self.window[: self.num_read])
        text = self.tokenizer.decode(self.window)
        if len(text) > len(old):  # a token without text moves nothing: it separates no words
            self.window = self.window[self.num_read :]
        self.num_read = len(self.window)
        return text[len(old) :]


@cache
def byte_of_sign() -> dict[str, int]:
    """Return the byte of each character that byte-level tokens are written with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(text: str) -> bytes:
    """Return the bytes of a byte-level token; a text with other characters stands for itself."""
    signs = byte_of_sign()
    if all(sign in signs for sign in text):
        return bytes(signs[sign] for sign in text)
    return text.encode()


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of special tokens, which are not part of a text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether tokens are strings of bytes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


# ── Stop strings ──


@lru_cache(1024)
def border_lengths(text: str) -> list[int]:
    """Return for each prefix of a text the length of its longest border.

    A border is a shorter prefix that the prefix also ends with.
    """
    lengths = [0]
    for i in range(1, len(text)):
        n = lengths[-1]
        while n and text[i] != text[n]:
            n = lengths[n - 1]
        lengths.append(n + (text[i] == text[n]))
    return lengths


class StopMatcher:
    """The search for a stop string in a growing text, in time linear in the text (Knuth, Morris,
    Pratt): a client chooses both."""

    def __init__(self, stop: str):
        self.stop = stop
        self.borders = border_lengths(stop)
        self.num_matched = 0  # characters of the stop string with which the text ends

    def push(self, new: str) -> int | None:
        """Append to the text; return where in `new` a complete stop string begins, None if nowhere.

        The position is negative if it begins before `new`.
        """
        for i, char in enumerate(new, start=1):
            n = self.num_matched
            while n and char != self.stop[n]:
                n = self.borders[n - 1]
            self.num_matched = n + (char == self.stop[n])
            if self.num_matched == len(self.stop):
                return i - len(self.stop)
        return None


def partial_stop_length(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that may begin a stop string."""
    matcher = StopMatcher(stop)
    matcher.push(text[max(0, len(text) - len(stop) + 1) :])
    return matcher.num_matched


# ── A growing text ──


class Passage(Protocol):
    """A passage at the beginning of a growing text."""

    pending: str  # characters that may belong to it or not

    def push(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """Append text; return what is certain of the passage and of what follows it."""


class StreamDetokenizer:
    """Incremental detokenizer that withholds incomplete characters and stop strings.

    It reads token by token, so that the text does not depend on how many tokens arrive together.
    thoughts: those with which the text may begin, which no stop string ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), thoughts: Passage | None = None
    ):
        decoder = ByteDecoder if is_byte_level(tokenizer) else WindowDecoder
        self.decoder: ByteDecoder | WindowDecoder = decoder(tokenizer)
        self.matchers = [StopMatcher(s) for s in stop]
        self.thoughts = thoughts
        self.withheld = ""  # complete characters that may begin a stop string
        self.num_emitted = 0  # characters
        self.start_of_token = 0  # characters before the one in which the last token begins
        self.ended = False  # a stop string was found

    def push(self, tokens: list[int]) -> str:
        """Append tokens and return the text that is now certain and was not returned before."""
        return "".join([self.push_token(token) for token in tokens])

    def push_token(self, token: int) -> str:
        """Append one token, as `push` does, and update `start_of_token`."""
        num_characters = self.num_emitted + self.num_withheld
        new = self.decoder.push(token)
        self.start_of_token = num_characters + self.decoder.broke_pending
        return self.emit(new)

    def flush(self) -> str:
        """Return the withheld text; call it when no more tokens will come."""
        return self.emit(self.decoder.flush(), is_last=True)

    @property
    def num_withheld(self) -> int:
        """The number of complete characters that were not returned yet."""
        return len(self.withheld) + (len(self.thoughts.pending) if self.thoughts else 0)

    @property
    def end_of_token(self) -> int:
        """The number of characters that must be returned before the last token's text has been."""
        return self.num_emitted + self.num_withheld + self.decoder.has_pending + self.ended

    def emit(self, new: str, is_last: bool = False) -> str:
        """Return the text up to a stop string or to what may begin one."""
        if self.ended:
            return ""
        before = ""
        if self.thoughts:
            before, new = self.thoughts.push(new, is_last)
        text = self.withheld + new
        starts = [start for matcher in self.matchers if (start := matcher.push(new)) is not None]
        if starts:
            self.ended = True
            end = len(self.withheld) + min(starts)
        else:
            partial = max((matcher.num_matched for matcher in self.matchers), default=0)
            end = len(text) - (0 if is_last else partial)
        self.withheld = "" if self.ended else text[end:]
        self.num_emitted += len(before) + end
        return before + text[:end]


# ── One token ──


class TokenText(NamedTuple):
    """A token by itself: its bytes, and how OpenAI's API writes them."""

    text: str  # half a character is written as “\\xe2\\x98”
    data: bytes

    @property
    def is_whole(self) -> bool:
        """True if the bytes are complete characters."""
        return self.data == self.text.encode()


def to_token_text(data: bytes) -> TokenText:
    """Return bytes with their text, which names the bytes if they are no whole characters."""
    try:
        return TokenText(data.decode(), data)
    except UnicodeDecodeError:
        return TokenText("".join(f"\\x{byte:02x}" for byte in data), data)


class TokenDescriber:
    """A tokenizer that returns what its tokens look like by themselves."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.is_byte_level = is_byte_level(tokenizer)
        self.described: dict[int, TokenText] = {}

    def describe(self, token: int) -> TokenText:
        """Return the text and the bytes of a token; nothing for an id without a token."""
        if token not in self.described:
            self.described[token] = to_token_text(self.bytes_of(token))
        return self.described[token]

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; a special token has those of its name."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self.special:
            return name.encode()
        if self.is_byte_level:
            return token_bytes(name)
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        return self.tokenizer.decode([token]).encode()
