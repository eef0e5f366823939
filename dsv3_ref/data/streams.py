"""Rows that any number of readers can share: each reads its own part, and all see the same rows.

The documents are divided among a fixed number of streams, each packed and shuffled on its own. A
batch of n rows has a consecutive part of every stream. So a row is a function of the seed and its
number, whatever the number of readers; a reader of streams that no other reader needs reads only
its own rows.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.data.loader import PackedDataLoader

TENSORS = ("buffer", "remainder")  # of a stream's state


def part_bounds(n: int, parts: int, i: int) -> tuple[int, int]:
    """Return begin and end of the i-th of `parts` consecutive parts of n rows.

    Sizes differ by one row at most. Bounds are also bounds of any multiple of `parts`.
    """
    return i * n // parts, (i + 1) * n // parts


class StreamLoader:
    """The rows of several streams; a stream is read when one of its rows is asked for."""

    def __init__(self, streams: Sequence[PackedDataLoader]):
        self.streams = streams
        self.behind = [0] * len(streams)  # rows of each stream that were skipped, not read yet

    def next_batch(self, n: int) -> Tensor:
        """Return the next n rows, (n, length), int64."""
        return self.next_part(n, 0, n)

    def next_part(self, n: int, begin: int, end: int) -> Tensor:
        """Return rows begin … end − 1 of the next n rows, (end − begin, length), int64."""
        rows: list[np.ndarray] = []
        for i in range(len(self.streams)):
            first, stop = part_bounds(n, len(self.streams), i)
            if max(first, begin) < min(stop, end):
                drawn = self.draw(i, stop - first)
                rows += drawn[max(0, begin - first) : end - first]
            else:
                self.behind[i] += stop - first
        shape = len(rows), self.streams[0].length
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(shape))

    def draw(self, i: int, n: int) -> list[np.ndarray]:
        """Return the next n rows of a stream, after those that were skipped."""
        skipped, self.behind[i] = self.behind[i], 0
        return [next(self.streams[i]) for _ in range(skipped + n)][skipped:]

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the present state; it is cheap until it is called."""
        states = [
            None if behind else stream.snapshot()
            for stream, behind in zip(self.streams, self.behind)
        ]

        def state_dict() -> dict[str, Any]:
            state: dict[str, Any] = {"streams": []}
            for i, make in enumerate(states):
                own = make() if make else None
                if own:
                    state |= {f"{name}.{i}": own.pop(name) for name in TENSORS}
                state["streams"].append(own)
            return state

        return state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return the position in all streams: values for JSON, and tensors at the top level."""
        return self.snapshot()()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; it must have the state of every stream."""
        if len(state["streams"]) != len(self.streams):
            raise UserError(
                f"the checkpoint has {len(state['streams'])} streams of documents, not "
                f"{len(self.streams)}: resume with its --data-streams"
            )
        for i, (stream, values) in enumerate(zip(self.streams, state["streams"])):
            stream.load_state_dict(values | {name: state[f"{name}.{i}"] for name in TENSORS})
        self.behind = [0] * len(self.streams)

    def merge_states(self, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of every stream from those readers that have it."""
        merged: dict[str, Any] = {"streams": [None] * len(self.streams)}
        for state in states:
            for i, values in enumerate(state["streams"]):
                if values and merged["streams"][i] is None:
                    merged["streams"][i] = values
                    merged |= {f"{name}.{i}": state[f"{name}.{i}"] for name in TENSORS}
        return merged
