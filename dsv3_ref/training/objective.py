"""The objective of a task: what the model reads of a batch, and the loss of its last hidden states.

A strategy on several ranks needs no more of a task: it splits the rows of a batch among data
indices and micro-batches, and the last stage of a pipeline computes the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dsv3_ref.config import ceil_div
from dsv3_ref.data.packing import find_cu_seqlens, read_flags
from dsv3_ref.model import Transformer
from dsv3_ref.moe import Route
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


# (h_bsd, head_wd, rows, places, part) → values of each row
Readout = Callable[[Tensor, Tensor, Any, Any, "SequenceTokens"], Tensor]


class ModelInput(NamedTuple):
    """The input of a model: rows of tokens, or one row of samples with their ends.

    tokens_bs: (b, s). cu_seqlens: 0 and the end of each sample, (m + 1,), int32; None: positions
    count from the start of each row.
    """

    tokens_bs: Tensor
    cu_seqlens: Tensor | None = None


class Targets(NamedTuple):
    """This rank's positions of rows end to end that count, (n,), or None for all; the next tokens.

    Rows are selected by position without asking a GPU for a number, as a mask would.
    """

    place_n: Tensor | None
    y_n: Tensor
    total: int  # of all ranks that share the sequences


Tensors = TypeVar("Tensors", bound=tuple[Any, ...])


def tensors_to(values: Tensors, device: torch.device) -> Tensors:
    """Return a named tuple, or named tuples in it, with its tensors on a device."""
    moved: list[Any] = []
    for x in values:
        if isinstance(x, tuple):
            x = tensors_to(x, device)
        moved.append(x.to(device) if isinstance(x, Tensor) else x)
    return type(values)(*moved)


class SequenceTokens:
    """The tokens of a micro-batch's sequences on this rank: all of them."""

    def take(self, x_bs: Tensor) -> Tensor:
        """Return this rank's entries of all tokens' entries."""
        return x_bs

    def take_places(self, place_n: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return those of the positions that this rank has, among its tokens, and their numbers.

        The numbers are places in `place_n`. shape: (b, s) of all positions.
        """
        return place_n, torch.arange(len(place_n), device=place_n.device)

    def complete(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks that share the sequences.

        Only this rank's x has a gradient, so that the gradients of all ranks add up.
        """
        return x

    @property
    def counts(self) -> bool:
        """True on the one of these ranks that counts what all of them have computed."""
        return True

    def count_once(self, loss: Tensor) -> Tensor:
        """Return a loss that all of these ranks have computed, as 0 on all but one of them.

        The gradient stays.
        """
        return loss if self.counts else loss - loss.detach()


class Objective(Protocol):
    """The loss of a batch, as the mean of its rows' losses by their weights.

    What depends on the values of rows is found by `model_input` and `locate` where the rows are, on
    the host, so that no step waits for its device.
    """

    @property
    def is_cross_entropy(self) -> bool:
        """True if the loss is the mean cross-entropy of `Targets`, which `locate` returns.

        The last stage of a pipeline then adds the gradient of the head during the forward pass.
        """

    @property
    def trains_mtp(self) -> bool:
        """True if the MTP modules are trained, too."""

    def model_input(self, batch: Any) -> ModelInput:
        """Return what the model reads of a batch."""

    def loss_weight(self, batch: Any) -> int:
        """Return the weight of a batch in the mean over several."""

    def locate(self, batch: Any, part: SequenceTokens) -> Any:
        """Return a named tuple of tensors: which of this rank's hidden states count, and for what.

        part: the tokens of the sequences that this rank computes.
        """

    def loss(
        self, h_bsd: Tensor, head_wd: Tensor, batch: Any, places: Any, part: SequenceTokens
    ) -> Tensor:
        """Return the loss of a batch from normalized hidden states; 0 for one without rows.

        places: the result of `locate`.
        """


ALL_TOKENS = SequenceTokens()


def read_hidden_states(
    objective: Objective, model: Transformer, batch: RowBatch, read: Readout
) -> tuple[Tensor, list[Route]]:
    """Return read(…) of a batch under a whole model, and the routes of its tokens."""
    device = model.head.weight.device
    places = tensors_to(objective.locate(batch, ALL_TOKENS), device)
    tokens_bs, cu_seqlens = tensors_to(objective.model_input(batch), device)
    h_bsd, routes = model.hidden_states(tokens_bs, cu_seqlens=cu_seqlens)
    return read(h_bsd, model.head.weight, batch.to(device), places, ALL_TOKENS), routes


def objective_loss(objective: Objective, model: Transformer, batch: RowBatch) -> LossOutput:
    """Return an objective's loss of a batch under a whole model."""
    loss, routes = read_hidden_states(objective, model, batch, objective.loss)
    return LossOutput(loss, [], loss.new_zeros(()), routes)


def find_targets(mask_1n: Tensor, y_1n: Tensor, part: SequenceTokens) -> Targets:
    """Return the targets of a row of samples: where the mask is, and the tokens there."""
    place_m = mask_1n.flatten().nonzero()[:, 0]
    own_k, number_k = part.take_places(place_m, mask_1n.shape)
    return Targets(own_k, y_1n.flatten()[place_m[number_k]], len(place_m))


def mean_cross_entropy(h_bsd: Tensor, head_wd: Tensor, targets: Targets) -> Tensor:
    """Return the mean cross-entropy in nats per token that counts."""
    h_nd = h_bsd.flatten(0, 1)
    if targets.place_n is not None:
        h_nd = h_nd[targets.place_n]
    return linear_cross_entropy(h_nd, head_wd, targets.y_n) / max(1, targets.total)


class NextTokenLoss:
    """The mean cross-entropy of all tokens but the first of each row, and MTP losses."""

    trains_mtp = True
    is_cross_entropy = True

    def model_input(self, batch: RowBatch) -> ModelInput:
        """Return all tokens but the last of each row."""
        return ModelInput(batch.rows_bs[:, :-1])

    def loss_weight(self, batch: RowBatch) -> int:
        """Return the number of rows, which all have the same number of tokens."""
        return len(batch)

    def locate(self, batch: RowBatch, part: SequenceTokens) -> Targets:
        """Return all positions, and their next tokens."""
        y_bs = batch.rows_bs[:, 1:]
        return Targets(None, part.take(y_bs).flatten(), y_bs.numel())

    def loss(
        self, h_bsd: Tensor, head_wd: Tensor, batch: RowBatch, places: Targets, part: SequenceTokens
    ) -> Tensor:
        """Return the mean in nats per token."""
        return mean_cross_entropy(h_bsd, head_wd, places)


class CompletionLoss:
    """The mean cross-entropy of the answers in packed rows with flags: `sft_loss` of chapter 14."""

    trains_mtp = False
    is_cross_entropy = True

    def model_input(self, batch: RowBatch) -> ModelInput:
        """Return all tokens but the last of each row, as one row of samples."""
        rows = read_flags(batch.rows_bs[:, :-1])
        return ModelInput(rows.tokens_bs.reshape(1, -1), find_cu_seqlens(rows.start_bs))

    def loss_weight(self, batch: RowBatch) -> int:
        """Return the number of tokens of answers."""
        return int(read_flags(batch.rows_bs).mask_bs[:, 1:].sum())

    def locate(self, batch: RowBatch, part: SequenceTokens) -> Targets:
        """Return where answers are, and their tokens."""
        rows = read_flags(batch.rows_bs[:, 1:])
        shape = 1, rows.mask_bs.numel()
        return find_targets(rows.mask_bs.reshape(shape), rows.tokens_bs.reshape(shape), part)

    def loss(
        self, h_bsd: Tensor, head_wd: Tensor, batch: RowBatch, places: Targets, part: SequenceTokens
    ) -> Tensor:
        """Return the mean in nats per token."""
        return mean_cross_entropy(h_bsd, head_wd, places)


NEXT_TOKEN_LOSS = NextTokenLoss()
