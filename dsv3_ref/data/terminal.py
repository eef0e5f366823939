"""Texts of strangers on a terminal, which obeys the control characters in them."""

import re
from typing import TextIO

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def escape_controls(text: str) -> str:
    r"""Return a text with `\x1b` and the like in the place of control characters."""
    return CONTROL_CHARACTERS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def printable(text: str, stream: TextIO) -> str:
    """Return a text as it is, or without control characters if the stream is a terminal."""
    return escape_controls(text) if stream.isatty() else text
