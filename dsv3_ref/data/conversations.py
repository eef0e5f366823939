"""Conversations and preference pairs: read from files, validated, rendered as tokens.

Rows that cannot be used are reported by number and left out.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dsv3_ref.config import UserError
from dsv3_ref.data import files, sources
from dsv3_ref.data.chat_samples import ChatSample, render_sample
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.marks import THINK_TAGS
from dsv3_ref.data.messages import REASONING, Message, iter_texts
from dsv3_ref.data.packing import flag_sample
from dsv3_ref.data.row_formats import parse_conversation, parse_pair
from dsv3_ref.rewards import judge_prompt

Warn = Callable[[str], object]
Pair = tuple[list[int], list[int]]  # flagged samples: the chosen conversation, the rejected one
Sample = TypeVar("Sample")


# ── Conversations ──


def encode_conversation(row: object, chat: ChatTemplate, max_tokens: int) -> list[int]:
    """Encode a row as a flagged sample; raise a `UserError` if it has nothing to learn."""
    sample = render_sample(chat, *parse_conversation(row))
    if len(sample.tokens) > max_tokens:
        raise UserError(
            f"its {len(sample.tokens)} tokens do not fit a row of {max_tokens}: raise --seq-len or "
            "cut it"
        )
    return flag_sample(*sample)


def read_conversations(
    name: str, chat: ChatTemplate, max_tokens: int, warn: Warn = print
) -> list[list[int]]:
    """Read the conversations of a source of rows as flagged samples.

    `warn` is called with a sentence for each row that is left out, and with the number of rows that
    answer without the thoughts that the prompts of this model open.
    """
    opening = ""
    with suppress(UserError):  # a template may refuse this conversation
        opening = chat.opened_thought(chat.render_prompt([{"role": "user", "content": "a"}]))
    num_unthinking = 0

    def parse(row: object) -> list[int]:
        nonlocal num_unthinking
        sample = encode_conversation(row, chat, max_tokens)
        num_unthinking += bool(opening) and not has_thoughts(parse_conversation(row).messages[-1])
        return sample

    conversations, num_refused = files.valid_rows(name, parse, warn)
    if not conversations:
        raise UserError(
            f"{name} has no conversation to learn from ({num_refused} rows were left out)"
        )
    if num_unthinking:
        warn(
            f"{name}: {num_unthinking} rows answer without thoughts, but the prompts of this model "
            "end with <think>: give thoughts as <think>…</think> or reasoning_content, or use a "
            "model whose chat template opens none"
        )
    return conversations


def has_thoughts(turn: Message) -> bool:
    """Return whether an answer has thoughts, in a field or between tags."""
    in_field = any(turn.get(name) for name in REASONING)
    return in_field or any(THINK_TAGS[1] in text for text in iter_texts(turn.get("content")))


# ── Pairs ──


@dataclass(frozen=True)
class PairFormat:
    """The turns that follow an answer before it is scored (chapter 15), and the longest sample."""

    max_tokens: int
    uses_cot: bool = False  # the judge's turn and a judgment
    with_reference: bool = False  # the judge's turn states the right answer


def encode_answer(row: dict, which: str, chat: ChatTemplate, pair_format: PairFormat) -> list[int]:
    """Encode the prompt, an answer ("chosen" or "rejected") and what follows it by the format.

    Only judgments have a loss: the answers themselves are not trained on.
    """
    pair = parse_pair(row)
    answer = pair.chosen if which == "chosen" else pair.rejected
    turns = [*pair.prompt, *answer]
    if not all(has_text(turn) for turn in answer):
        raise UserError(f"{which!r} or its judgment is not a string: write both as strings")
    if pair_format.with_reference:
        turns.append({"role": "user", "content": judge_prompt(required_reference(row))})
    elif pair_format.uses_cot:
        turns.append({"role": "user", "content": judge_prompt()})
    if not pair_format.uses_cot:
        is_judged = pair_format.with_reference
        tokens = chat.render_prompt(turns) if is_judged else chat.render(turns)
        sample = ChatSample(tokens, [False] * len(tokens))
    else:
        turns = [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in turns]
        judgment = row.get(f"judgment_{which}")
        turns.append({"role": "assistant", "content": judgment})
        if not judgment or not isinstance(judgment, str):
            raise UserError(f"{which!r} or its judgment is not a string: write both as strings")
        sample = render_sample(chat, turns)
    if len(sample.tokens) > pair_format.max_tokens:
        raise UserError(
            f"its {len(sample.tokens)} tokens are more than the {pair_format.max_tokens} that the "
            "model can read: shorten it"
        )
    return flag_sample(*sample)


def has_text(turn: object) -> bool:
    """Return whether this is a message with a text that is not empty."""
    content = turn.get("content") if isinstance(turn, dict) else None
    return bool(content) and isinstance(content, str | list | tuple)


def required_reference(row: dict) -> str:
    """Return the right answer of a row; raise a `UserError` if it has none."""
    reference = row.get("reference")
    if not isinstance(reference, str):
        raise UserError("it has no 'reference': add the right answer as a string")
    return reference


def read_pairs(
    name: str, chat: ChatTemplate, pair_format: PairFormat, warn: Warn = print
) -> list[Pair]:
    """Read the pairs of answers of a source; `warn` as in `read_conversations`."""

    def parse(row: object) -> Pair:
        if not isinstance(row, dict):
            raise UserError("it has no list of messages as its prompt: write an object")
        chosen = encode_answer(row, "chosen", chat, pair_format)
        return chosen, encode_answer(row, "rejected", chat, pair_format)

    pairs, num_refused = files.valid_rows(name, parse, warn)
    if not pairs:
        raise UserError(f"{name} has no pair to learn from ({num_refused} rows were left out)")
    return pairs


# ── Training and validation ──


def split_samples(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split conversations or pairs into (training, validation), the same for every seed.

    One in 20 is held out, at least one and at most 1000.
    """
    if len(samples) < 2:
        raise UserError(
            "one conversation is too few, because one is held out for validation: add more "
            "rows, or give others with --val-data"
        )
    n = min(sources.VAL_MAX, max(1, len(samples) // sources.VAL_EVERY))
    held_out = set(np.random.default_rng(0).permutation(len(samples))[:n].tolist())
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [sample for i, sample in enumerate(samples) if i in held_out]


class PairDataset:
    """Pairs in a new random order each epoch."""

    def __init__(self, pairs: list[Pair], seed: int):
        self.pairs = pairs
        self.seed = seed
        self.num_drawn = 0

    def next_batch(self, n: int) -> list[Pair]:
        """Return the next n pairs."""
        self.num_drawn += n
        return [self.pair_at(i) for i in range(self.num_drawn - n, self.num_drawn)]

    def pair_at(self, position: int) -> Pair:
        """Return the pair at a position of the stream."""
        epoch, i = divmod(position, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        return self.pairs[order[i]]

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position where `state_dict` was called."""
        self.num_drawn = state["drawn"]
