"""Conversations and preference pairs: read from files, validated, rendered as tokens, shuffled.

Rows that cannot be used are reported by number and left out; the tokens are those of chapter 14.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from dsv3_ref.config import UserError
from dsv3_ref.data import files, sources
from dsv3_ref.data.marks import Encode
from dsv3_ref.rewards import judge_prompt
from dsv3_ref.sft import SpecialTokens, pack_samples, render_conversation

PACKING_CHUNK = 4096  # conversations that are packed together

Warn = Callable[[str], object]
Pair = tuple[list[int], list[int]]  # tokens of the chosen conversation and of the rejected one
Sample = TypeVar("Sample")


# ── Conversations ──


def encode_conversation(
    row: object, encode: Encode, special_tokens: SpecialTokens, max_tokens: int
) -> list[int]:
    """Encode a row {"messages": […]}; raise a `UserError` if there is nothing to learn from it."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list | tuple):
        raise UserError('it has no list of messages: write {"messages": [{"role", "content"}, …]}')
    tokens = render_conversation(messages, encode, special_tokens)
    if tokens[-1] != special_tokens.eos:
        raise UserError("the last turn is not the assistant's: add its answer")
    if not all(turn["content"] for turn in messages if turn["role"] == "assistant"):
        raise UserError("an answer is empty: write its text")
    if len(tokens) > max_tokens:
        raise UserError(
            f"its {len(tokens)} tokens do not fit a row of {max_tokens}: raise --seq-len or cut it"
        )
    return tokens


def read_conversations(
    name: str, encode: Encode, special_tokens: SpecialTokens, max_tokens: int, warn: Warn = print
) -> list[list[int]]:
    """Read the conversations of .jsonl or .parquet files, a folder of them, or a hub dataset.

    `warn` is called with a sentence for each row that is left out.
    """

    def parse(row: object) -> list[int]:
        return encode_conversation(row, encode, special_tokens, max_tokens)

    conversations, num_refused = files.valid_rows(name, parse, warn)
    if not conversations:
        raise UserError(
            f"{name} has no conversation to learn from ({num_refused} rows were left out)"
        )
    return conversations


# ── Pairs ──


@dataclass(frozen=True)
class PairFormat:
    """The turns that follow an answer before it is scored (chapter 15), and the longest sample."""

    max_tokens: int
    uses_cot: bool = False  # the judge's turn and a judgment
    with_reference: bool = False  # the judge's turn states the right answer


def encode_answer(
    row: dict, which: str, encode: Encode, special_tokens: SpecialTokens, pair_format: PairFormat
) -> list[int]:
    """Encode the prompt, an answer ("chosen" or "rejected") and what follows it by the format."""
    texts = [row.get(which)]
    if pair_format.with_reference:
        texts.append(judge_prompt(required_reference(row)))
    elif pair_format.uses_cot:
        texts.append(judge_prompt())
    if pair_format.uses_cot:
        texts.append(row.get(f"judgment_{which}"))
    turns = []
    for role, text in zip(("assistant", "user", "assistant"), texts):
        if not isinstance(text, str) or not text:
            raise UserError(f"{which!r} or its judgment is not a string: write both as strings")
        turns.append({"role": role, "content": text})
    tokens = render_conversation([*row["prompt"], *turns], encode, special_tokens)
    if len(tokens) > pair_format.max_tokens:
        raise UserError(
            f"its {len(tokens)} tokens are more than the {pair_format.max_tokens} that the model "
            "can read: shorten it"
        )
    return tokens


def required_reference(row: dict) -> str:
    """Return the right answer of a row; raise a `UserError` if it has none."""
    reference = row.get("reference")
    if not isinstance(reference, str):
        raise UserError("it has no 'reference': add the right answer as a text")
    return reference


def read_pairs(
    name: str,
    encode: Encode,
    special_tokens: SpecialTokens,
    pair_format: PairFormat,
    warn: Warn = print,
) -> list[Pair]:
    """Read the pairs of answers of a source; `warn` as in `read_conversations`."""

    def parse(row: object) -> Pair:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), list | tuple):
            raise UserError("it has no list of messages as its prompt")
        chosen = encode_answer(row, "chosen", encode, special_tokens, pair_format)
        return chosen, encode_answer(row, "rejected", encode, special_tokens, pair_format)

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
            "one conversation is too few, because one is held out for validation: add more rows"
        )
    n = min(sources.VAL_MAX, max(1, len(samples) // sources.VAL_EVERY))
    held_out = set(np.random.default_rng(0).permutation(len(samples))[:n].tolist())
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [sample for i, sample in enumerate(samples) if i in held_out]


class PackedDataset:
    """Conversations packed in rows of `length` tokens, in a new random order each epoch."""

    def __init__(self, samples: list[list[int]], length: int, seed: int, pad: int):
        self.samples = samples
        self.length = length
        self.seed = seed
        self.pad = pad
        self.epoch = 0
        self.index = 0  # rows taken in this epoch
        self.rows = self.pack_epoch()

    def pack_epoch(self) -> list[list[int]]:
        """Pack the conversations of this epoch, PACKING_CHUNK at a time, and shuffle the rows."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.samples)).tolist()
        rows = []
        for start in range(0, len(order), PACKING_CHUNK):
            chunk = [self.samples[i] for i in order[start : start + PACKING_CHUNK]]
            rows += pack_samples(chunk, self.length, self.pad)
        return [rows[i] for i in rng.permutation(len(rows))]

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            if self.index == len(self.rows):
                self.epoch += 1
                self.index = 0
                self.rows = self.pack_epoch()
            self.index += 1
            yield self.rows[self.index - 1]

    def next_batch(self, n: int) -> torch.Tensor:
        """Return the next n rows, (n, length), int64."""
        return torch.tensor(list(islice(self, n)))

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position where `state_dict` was called."""
        self.epoch = state["epoch"]
        self.index = state["index"]
        self.rows = self.pack_epoch()


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
