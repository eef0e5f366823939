"""Packed rows of samples, with the flags that say which tokens count.

Chapter 14 recovers masks and sample boundaries from V3's special tokens. Other models' tokens do
not show them, and a row of data may leave an answer out of the loss. So a row stores two bits with
each token: it travels, shuffled and sent to other ranks, as one tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3_ref.config import UserError

LOSS = 1 << 29  # the model must predict this token
START = 1 << 30  # a sample starts here
TOKEN = LOSS - 1  # the bits of the token id
PACKING_CHUNK = 4096  # samples that are packed together


class FlaggedRows(NamedTuple):
    """Rows of samples: their tokens and what the flags say, each (b, s)."""

    tokens_bs: Tensor
    mask_bs: Tensor  # the model must predict this token
    start_bs: Tensor  # a sample starts here


def flag_sample(tokens: Sequence[int], mask: Sequence[bool]) -> list[int]:
    """Return a sample's tokens with their flags; `mask` says which ones the model must predict."""
    flagged = [token | LOSS * is_learned for token, is_learned in zip(tokens, mask, strict=True)]
    return [flagged[0] | START, *flagged[1:]]


def read_flags(rows_bs: Tensor) -> FlaggedRows:
    """Split packed rows into tokens and flags."""
    return FlaggedRows(rows_bs & TOKEN, (rows_bs & LOSS) != 0, (rows_bs & START) != 0)


def find_cu_seqlens(start_bs: Tensor) -> Tensor:
    """Return 0 and the end of each sample in all rows end to end: (m + 1,), int32."""
    start_bs = start_bs.clone()
    start_bs[:, :1] = True  # a row starts a sample
    start_m = start_bs.flatten().nonzero()[:, 0]
    return torch.cat((start_m, start_m.new_full((1,), start_bs.numel()))).int()


# ── Packing ──


def first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the row in which each item is placed: the first one with room for it.

    A tree over the rows holds the most room below each node, so that an item takes O(log n).
    """
    num_leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * num_leaves)
    rows = []
    for length in lengths:
        node = 1
        while node < num_leaves:
            node *= 2
            node += room[node] < length
        rows.append(node - num_leaves)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack_rows(samples: Sequence[list[int]], length: int, pad: int) -> list[list[int]]:
    """Pack samples into rows as `pack_samples` of chapter 14 does, in O(n log n)."""
    longest_first = sorted(samples, key=len, reverse=True)
    if longest_first and len(longest_first[0]) > length:
        raise UserError(
            f"a sample of {len(longest_first[0])} tokens does not fit a row of {length}: "
            "use longer rows or drop the sample"
        )
    places = first_fit(list(map(len, longest_first)), length)
    rows: list[list[int]] = [[] for _ in range(max(places, default=-1) + 1)]
    for sample, i in zip(longest_first, places):
        rows[i] += sample
    return [row + [pad] * (length - len(row)) for row in rows]


class PackedDataset:
    """Samples packed in rows of `length` tokens, in a new random order each epoch."""

    def __init__(self, samples: list[list[int]], length: int, seed: int, pad: int):
        self.samples = samples
        self.length = length
        self.seed = seed
        self.pad = pad
        self.epoch = 0
        self.index = 0  # rows taken in this epoch
        self.rows = self.pack_epoch()

    def pack_epoch(self) -> list[list[int]]:
        """Pack the samples of this epoch, PACKING_CHUNK at a time, and shuffle the rows."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.samples)).tolist()
        rows = []
        for start in range(0, len(order), PACKING_CHUNK):
            chunk = [self.samples[i] for i in order[start : start + PACKING_CHUNK]]
            rows += pack_rows(chunk, self.length, self.pad)
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
        return self.next_part(n, 0, n)

    def next_part(self, n: int, begin: int, end: int) -> torch.Tensor:
        """Return rows begin … end − 1 of the next n rows, (end − begin, length), int64."""
        rows = list(islice(self, n))[begin:end]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.length)

    def snapshot(self) -> Callable[[], dict[str, int]]:
        """Return a function that returns the present state."""
        state = self.state_dict()
        return lambda: state

    def merge_states(self, states: Iterable[dict[str, int]]) -> dict[str, int]:
        """Return the state of the first reader, which all readers have."""
        return next(iter(states))

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position where `state_dict` was called."""
        self.epoch = state["epoch"]
        self.index = state["index"]
        self.rows = self.pack_epoch()
