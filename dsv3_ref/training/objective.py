"""The objective of a task: what the model reads of a batch, and the loss of its last hidden states.

A strategy on several ranks needs no more of a task: it splits the rows of a batch among data
indices and micro-batches, and the last stage of a pipeline computes the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from dsv3_ref.config import ceil_div
from dsv3_ref.data.packing import find_cu_seqlens, read_flags
from dsv3_ref.model import Transformer
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.pretrain import LossOutput


@dataclass(frozen=True)
class RowBatch:
    """Rows of tokens; every tensor of it, and of its subclasses, has one entry per row."""

    rows_bs: Tensor

    def __len__(self) -> int:
        return len(self.rows_bs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all fields by name; fields that are None are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if x is not None}

    def split(self, size: int) -> list[Self]:
        """Split the rows into parts of at most `size` rows; 0: one part."""
        return self.tensor_split(max(1, ceil_div(len(self), size))) if size else [self]

    def tensor_split(self, n: int) -> list[Self]:
        """Split the rows into n parts, whose sizes differ by at most one."""
        parts = {name: x.tensor_split(n) for name, x in self.tensors().items()}
        return [replace(self, **{name: part[i] for name, part in parts.items()}) for i in range(n)]

    def to(self, device: torch.device) -> Self:
        """Return the same rows on a device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return replace(self, **moved)


def valid_places(x_bs: Tensor, length_b: Tensor) -> Tensor:
    """Return which entries of rows come before their lengths, (b, s); the rest is padding."""
    return torch.arange(x_bs.shape[1], device=x_bs.device) < length_b[:, None]


Readout = Callable[[Tensor, Tensor, Any], Tensor]  # (h_bsd, head_wd, rows) → values of each row


class ModelInput(NamedTuple):
    """The input of a model: rows of tokens, or one row of samples with their ends.

    tokens_bs: (b, s). cu_seqlens: 0 and the end of each sample, (m + 1,), int32; None: positions
    count from the start of each row.
    """

    tokens_bs: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device) -> "ModelInput":
        """Return the same input on a device."""
        ends = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return ModelInput(self.tokens_bs.to(device), ends)


class Targets(NamedTuple):
    """The positions of rows end to end that count, (n,), or None for all; their next tokens, (n,).

    Rows are selected by position without asking a GPU for a number, as a mask would.
    """

    place_n: Tensor | None
    y_n: Tensor

    def to(self, device: torch.device) -> "Targets":
        """Return the same targets on a device."""
        place_n = None if self.place_n is None else self.place_n.to(device)
        return Targets(place_n, self.y_n.to(device))


class Objective(Protocol):
    """The loss of a batch, as the mean of its rows' losses by their weights."""

    @property
    def trains_mtp(self) -> bool:
        """True if the MTP modules are trained, too."""

    def model_input(self, batch: Any) -> ModelInput:
        """Return what the model reads of a batch."""

    def loss_weight(self, batch: Any) -> int:
        """Return the weight of a batch in the mean over several."""

    def loss(self, h_bsd: Tensor, head_wd: Tensor, batch: Any) -> Tensor:
        """Return the loss of a batch from normalized hidden states; 0 for one without rows."""


def objective_loss(objective: Objective, model: Transformer, batch: RowBatch) -> LossOutput:
    """Return an objective's loss of a batch under a whole model."""
    tokens_bs, cu_seqlens = objective.model_input(batch)
    h_bsd, routes = model.hidden_states(tokens_bs, cu_seqlens=cu_seqlens)
    loss = objective.loss(h_bsd, model.head.weight, batch)
    return LossOutput(loss, [], loss.new_zeros(()), routes)


@runtime_checkable
class CrossEntropyLoss(Objective, Protocol):
    """A loss that is the mean cross-entropy of some tokens.

    The last stage of a pipeline then adds the gradient of the head during the forward pass.
    """

    def targets(self, batch: Any) -> Targets:
        """Return the positions that count and their next tokens."""


def mean_cross_entropy(h_bsd: Tensor, head_wd: Tensor, targets: Targets) -> Tensor:
    """Return the mean cross-entropy in nats per token that counts."""
    place_n, y_n = targets
    h_nd = h_bsd.flatten(0, 1)
    if place_n is not None:
        h_nd = h_nd[place_n]
    return linear_cross_entropy(h_nd, head_wd, y_n) / max(1, len(y_n))


class NextTokenLoss:
    """The mean cross-entropy of all tokens but the first of each row, and MTP losses."""

    trains_mtp = True

    def model_input(self, batch: RowBatch) -> ModelInput:
        """Return all tokens but the last of each row."""
        return ModelInput(batch.rows_bs[:, :-1])

    def loss_weight(self, batch: RowBatch) -> int:
        """Return the number of rows, which all have the same number of tokens."""
        return len(batch)

    def targets(self, batch: RowBatch) -> Targets:
        """Return all positions, and their next tokens."""
        return Targets(None, batch.rows_bs[:, 1:].flatten())

    def loss(self, h_bsd: Tensor, head_wd: Tensor, batch: RowBatch) -> Tensor:
        """Return the mean in nats per token."""
        return mean_cross_entropy(h_bsd, head_wd, self.targets(batch))


class CompletionLoss:
    """The mean cross-entropy of the answers in packed rows with flags: `sft_loss` of chapter 14."""

    trains_mtp = False

    def model_input(self, batch: RowBatch) -> ModelInput:
        """Return all tokens but the last of each row, as one row of samples."""
        rows = read_flags(batch.rows_bs[:, :-1])
        return ModelInput(rows.tokens_bs.reshape(1, -1), find_cu_seqlens(rows.start_bs))

    def loss_weight(self, batch: RowBatch) -> int:
        """Return the number of tokens of answers."""
        return int(read_flags(batch.rows_bs).mask_bs[:, 1:].sum())

    def targets(self, batch: RowBatch) -> Targets:
        """Return where answers are, and their tokens."""
        rows = read_flags(batch.rows_bs[:, 1:])
        place_n = rows.mask_bs.flatten().nonzero()[:, 0]
        return Targets(place_n, rows.tokens_bs.flatten()[place_n])

    def loss(self, h_bsd: Tensor, head_wd: Tensor, batch: RowBatch) -> Tensor:
        """Return the mean in nats per token."""
        return mean_cross_entropy(h_bsd, head_wd, self.targets(batch))


NEXT_TOKEN_LOSS = NextTokenLoss()
