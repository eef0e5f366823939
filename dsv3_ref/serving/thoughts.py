"""Thoughts at the beginning of an answer, as `reasoning_content` of DeepSeek's API."""

from dataclasses import dataclass

from dsv3_ref.data.marks import THINK_TAGS
from dsv3_ref.serving.detokenizer import partial_stop_length

BEGIN, END = THINK_TAGS


@dataclass
class ThoughtPassage:
    """Incremental parser that finds where an answer's thoughts end, and keeps them with their tags.

    What looks like a call of a tool in them is none.
    """

    pending: str = ""  # not yet returned; at first, what the answer begins with
    place: str = "before"  # the thoughts, or "inside" or "past" them

    def push(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """Append text; return what is certain of the thoughts, tags included, and of the rest."""
        self.pending += text
        start = self.pending.lstrip()
        if self.place == "before" and start.startswith(BEGIN):
            self.place = "inside"
        elif self.place == "before" and (is_last or not BEGIN.startswith(start)):
            self.place = "past"
        thoughts, rest = "", ""
        if self.place == "inside":
            before, end, after = self.pending.partition(END)
            keep = 0 if is_last or end else partial_stop_length(before, END)
            thoughts, self.pending = (
                before[: len(before) - keep] + end,
                before[len(before) - keep :],
            )
            if end:
                self.place, self.pending = "past", after
        if self.place == "past":
            rest, self.pending = self.pending, ""
        return thoughts, rest


@dataclass
class ThoughtParser:
    """Incremental parser that divides an answer into thoughts and what follows them.

    The tags around the thoughts, and white space beside the tags, belong to neither. What it
    returns does not depend on how the text is cut into pieces. An answer that does not begin with
    a tag has no thoughts; thoughts without an end are all of an answer.
    """

    pending: str = ""  # not yet returned; at first, the <think> with which the prompt ends
    place: str = "before"  # the thoughts, or "inside", "behind" or "past" them
    has_thoughts: bool = False  # some have been returned

    def push(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """Append text; return the thoughts and the text after them that are now certain."""
        self.pending += text
        if self.place == "before":
            self.find_begin(is_last)
        thoughts = self.take_thoughts(is_last) if self.place == "inside" else ""
        if self.place == "behind":
            self.pending = self.pending.lstrip()
            self.place = "past" if self.pending else "behind"
        if self.place != "past":
            return thoughts, ""
        rest, self.pending = self.pending, ""
        return thoughts, rest

    def find_begin(self, is_last: bool) -> None:
        """Find out whether the answer begins with thoughts, once enough of it is there."""
        start = self.pending.lstrip()
        if start.startswith(BEGIN):
            self.pending, self.place = start.removeprefix(BEGIN), "inside"
        elif is_last or not BEGIN.startswith(start):
            self.place = "past"

    def take_thoughts(self, is_last: bool) -> str:
        """Remove thoughts from `pending` and return them; white space waits for what follows it."""
        if not self.has_thoughts:
            self.pending = self.pending.lstrip()
        thoughts, end, rest = self.pending.partition(END)
        keep = 0 if is_last or end else partial_stop_length(thoughts, END)
        certain = thoughts[: len(thoughts) - keep].rstrip()
        self.pending = rest if end else thoughts[len(certain) :]
        self.place = "behind" if end else "inside"
        self.has_thoughts = self.has_thoughts or bool(certain)
        return certain
