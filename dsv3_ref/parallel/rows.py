"""Rows on every data-parallel index: each rank reads those of its pipeline, ahead of the step.

All ranks of a pipeline read the same rows, which costs less than sending them: V3 needs 6 rows per
second and data-parallel index.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from dsv3_ref.checkpoints.sharded import gather_on_first
from dsv3_ref.data.streams import part_bounds
from dsv3_ref.training.objective import RowBatch
from dsv3_ref.training.task import RowLoader

PREFETCH = 2  # batches that are drawn ahead


@dataclass(frozen=True)
class LocalRows:
    """The rows of this rank's pipeline; the length is that of the global batch."""

    rows: RowBatch
    num_rows: int  # of the global batch
    weight: int  # of the global batch in the mean loss

    def __len__(self) -> int:
        """Return the number of rows of the global batch."""
        return self.num_rows


class DrawnRows(NamedTuple):
    """Rows that are ready, and the state of the loader after them."""

    rows_bs: Tensor
    snapshot: Callable[[], dict[str, Any]]


class PrefetchingLoader:
    """The rows of the `index`-th of `size` readers of a loader, drawn ahead by a thread.

    Its state is that of the rows that were returned, whatever has been drawn ahead.
    """

    def __init__(self, loader: RowLoader, index: int, size: int, group: dist.ProcessGroup):
        self.loader, self.group = loader, group
        self.index, self.size = index, size
        self.thread = ThreadPoolExecutor(1, "rows")
        self.pending: deque[tuple[int, Future[DrawnRows]]] = deque()
        self.snapshot = loader.snapshot()

    def draw(self, n: int) -> DrawnRows:
        """Draw this reader's part of the next n rows; runs in the thread."""
        rows_bs = self.loader.next_part(n, *part_bounds(n, self.size, self.index))
        return DrawnRows(rows_bs, self.loader.snapshot())

    def prefetch(self, sizes: Sequence[int]) -> bool:
        """Start to draw batches of these sizes.

        Return whether batches had been drawn in other sizes; those are drawn again.
        """
        is_stale = any(n != size for (n, _), size in zip(self.pending, sizes))
        if is_stale:
            self.rewind(self.snapshot())
        for n in sizes[len(self.pending) : PREFETCH + 1]:
            self.pending.append((n, self.thread.submit(self.draw, n)))
        return is_stale

    def rewind(self, state: dict[str, Any]) -> None:
        """Discard what has been drawn ahead, and continue from a state."""
        while self.pending:
            _, future = self.pending.pop()
            if not future.cancel():
                future.exception()  # wait
        self.loader.load_state_dict(state)
        self.snapshot = self.loader.snapshot()

    def next_part(self, sizes: Sequence[int]) -> Tensor:
        """Return this reader's part of the next batch; sizes: rows of it and of those after it."""
        self.prefetch(sizes)
        rows_bs, self.snapshot = self.pending[0][1].result()
        self.pending.popleft()
        return rows_bs

    def failure(self) -> BaseException | None:
        """Return the error of the next batch, which is waited for; None if it can be used."""
        return self.pending[0][1].exception() if self.pending else None

    def next_batch(self, n: int) -> Tensor:
        """Return this reader's part of the next n rows."""
        return self.next_part([n])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all rows on the first rank, and on the others their own.

        A collective call: a stream is known to those ranks that read it.
        """
        own = self.snapshot()
        states = gather_on_first(own, self.group)
        return self.loader.merge_states(states) if states else own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.rewind(state)
