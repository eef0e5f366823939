"""A pipeline stage: the forward pass of some layers, in segments that a `Tape` backpropagates."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_ref.block import MTP, Block
from dsv3_ref.config import Config
from dsv3_ref.model import Transformer
from dsv3_ref.moe import (
    GroupedExperts,
    MoE,
    Route,
    balance_of_load,
    tokens_per_expert,
    tokens_per_sequence_and_expert,
)
from dsv3_ref.ops import cross_entropy_and_grads, linear_cross_entropy
from dsv3_ref.parallel.context_parallel import SequencePart
from dsv3_ref.parallel.tape import Steps, Tape
from dsv3_ref.rope import Rope
from dsv3_ref.scale import partition_layers
from dsv3_ref.training.objective import (
    NEXT_TOKEN_LOSS,
    ModelInput,
    Objective,
    Readout,
    RowBatch,
)


class TapeDispatcher(Protocol):
    """A token dispatcher that records dispatch, experts and combine on a `Tape`."""

    def apply_experts(
        self, tape: Tape, experts: GroupedExperts, x_nd: Tensor, weight_nk: Tensor,
        expert_nk: Tensor,
    ) -> Steps[Tensor]:  # fmt: skip
        """Return Σ_k w_nk·expert_nk(x_n) over experts on many ranks; yields during transfers."""
        ...


@dataclass
class LossWeights:
    """Weights of the loss's terms (eq. 17, 25) for a micro-batch."""

    share: float  # the micro-batch's fraction of the batch
    mtp: float = 0.0  # λ / D, for each MTP depth
    alpha: float = 0.0  # of the balance loss


@dataclass
class LossStats:
    """Sums of the loss's terms, weighted by the micro-batches' shares; expert loads by layer."""

    main: float | Tensor = 0.0
    mtp: dict[int, Tensor] = field(default_factory=dict)
    balance: float | Tensor = 0.0
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)

    def add_expert_load(self, layer: str, expert_nk: Tensor, n_experts: int) -> None:
        """Count the tokens that each expert of a layer received."""
        load_e = tokens_per_expert(expert_nk, n_experts)
        self.tokens_per_expert[layer] = self.tokens_per_expert.get(layer, 0) + load_e


@dataclass
class MicroBatch:
    """A micro-batch in a stage: its rows, what the model reads of them, and the sums so far.

    sequence: the tokens of the input that this rank computes. readout: computed by the last stage
    in place of the loss; its result becomes `output`. places: what the objective has located on the
    host; None: it is located when it is needed.
    """

    rows: RowBatch
    model_input: ModelInput
    sequence: SequencePart
    weights: LossWeights
    stats: LossStats
    readout: Readout | None = None
    output: Tensor | None = None
    places: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """The sequences, and this rank's tokens of each."""
        return len(self.model_input.tokens_bs), self.sequence.num_tokens


class Stage:
    """The layers of one stage, which run on the modules of this rank.

    token_dispatcher: None calls blocks as modules, whose hooks gather their weights. objective: the
    loss that the last stage computes.
    """

    def __init__(
        self, model: Transformer, config: Config, stage: int, num_stages: int,
        token_dispatcher: TapeDispatcher | None, objective: Objective = NEXT_TOKEN_LOSS,
    ):  # fmt: skip
        self.model, self.config = model, config
        self.token_dispatcher, self.objective = token_dispatcher, objective
        self.layers = partition_layers(config, num_stages)[stage]
        self.first, self.last = stage == 0, stage == num_stages - 1

    def forward(self, tape: Tape, x_bsd: Tensor | None, batch: MicroBatch) -> Steps[Tensor]:
        """Run the stage on the previous stage's output, or on the tokens if it is the first stage.

        The last stage adds the losses to `batch.stats`.
        """
        tokens_bs = batch.model_input.tokens_bs
        rope = batch.sequence.rope(self.config, tokens_bs.device)
        if self.first:
            x_bsd = tape.run(self.embed, batch.sequence.take(tokens_bs))
        assert x_bsd is not None, "only the first stage has no input"
        for i in self.layers:
            block = cast(Block, self.model.layers[str(i)])
            x_bsd = yield from self.block(tape, f"layers.{i}", block, x_bsd, rope, batch)
        if self.last:
            yield from self.losses(tape, x_bsd, batch)
        return x_bsd

    def embed(self, tokens_bs: Tensor) -> Tensor:
        """Return the embeddings of tokens, (b, s, d)."""
        return EmbeddingFunction.apply(self.model.embed.weight, tokens_bs)

    def block(
        self, tape: Tape, name: str, block: Block, x_bsd: Tensor, rope: Rope,
        batch: MicroBatch,
    ) -> Steps[Tensor]:  # fmt: skip
        """Run `Block.forward` as one segment, or with experts as segments around their dispatch."""
        sequence = batch.sequence
        if not isinstance(block.ffn, MoE):
            return tape.run(lambda x: block(x, rope)[0], x_bsd)
        if self.token_dispatcher is None:
            x_bsd, balance, expert = tape.run(
                lambda x: block_forward(block, x, rope, sequence), x_bsd
            )
        else:
            x_bsd, u_nd, weight_nk, balance, expert = tape.run(
                lambda x: attention_and_gate(block, x, rope, sequence), x_bsd
            )
            y_nd = yield from self.token_dispatcher.apply_experts(
                tape, block.ffn.experts, u_nd, weight_nk, expert
            )
            x_bsd = tape.run(lambda x, u, y: add_expert_outputs(block, x, u, y), x_bsd, u_nd, y_nd)
        weights, stats = batch.weights, batch.stats
        if tape.training:
            tape.add_grad(balance, torch.full_like(balance, weights.alpha * weights.share))
        stats.balance = stats.balance + balance * weights.share
        stats.add_expert_load(name + ".ffn", expert, self.config.n_routed_experts)
        return x_bsd

    def losses(self, tape: Tape, x_bsd: Tensor, batch: MicroBatch) -> Steps[None]:
        """Add the task's loss and the loss of each MTP depth to the stats, or run the readout."""
        h_bsd = tape.run(self.model.norm, x_bsd)
        head_wd, rows = self.model.head.weight, batch.rows
        share, objective = batch.weights.share, self.objective
        part = batch.sequence
        places = batch.places or objective.locate(rows, part)
        if batch.readout:
            batch.output = batch.readout(h_bsd, head_wd, rows, places, part)
            return
        if objective.is_cross_entropy:
            h_nd = h_bsd
            if places.place_n is not None:
                h_nd = tape.run(lambda h: h.flatten(0, 1)[places.place_n], h_bsd)
            value = self.add_cross_entropy(tape, h_nd, places.y_n, share / max(1, places.total))
        else:
            value = self.add_loss(
                tape, lambda h: objective.loss(h, head_wd, rows, places, part), h_bsd, share
            )
        batch.stats.main = batch.stats.main + value
        if objective.trains_mtp and tape.training:
            yield from self.mtp_losses(tape, h_bsd, batch)

    def mtp_losses(self, tape: Tape, h_bsd: Tensor, batch: MicroBatch) -> Steps[None]:
        """Add the loss of each MTP depth to the stats (eq. 21–25)."""
        tokens_bs, y_bs = batch.model_input.tokens_bs, batch.rows.rows_bs[:, 1:]
        n = max(1, tokens_bs.numel())
        weights, stats = batch.weights, batch.stats
        for k, module in enumerate(cast(list[MTP], list(self.model.mtp.values())), start=1):
            ahead = replace(batch, sequence=batch.sequence.without_last(k))
            next_bs, y_n = (ahead.sequence.take(x[:, k:]) for x in (tokens_bs, y_bs))
            x_bsd = tape.run(lambda h, m=module, t=next_bs: self.mtp_input(m, t, h), h_bsd)
            rope = ahead.sequence.rope(self.config, tokens_bs.device)
            name = f"mtp.{k - 1}.block"
            x_bsd = yield from self.block(tape, name, module.block, x_bsd, rope, ahead)
            h_bsd = tape.run(module.norm, x_bsd)
            value = self.add_cross_entropy(
                tape, h_bsd, y_n.flatten(), weights.share / n, weights.mtp
            )
            stats.mtp[k] = stats.mtp.get(k, 0) + value

    def mtp_input(self, module: MTP, next_tokens_bs: Tensor, h_bsd: Tensor) -> Tensor:
        """Return M [norm(Emb(t)); norm(h)] at the positions that have a next token (eq. 21)."""
        e_bsd = self.embed(next_tokens_bs)
        return module.project(h_bsd[:, : next_tokens_bs.shape[1]], e_bsd)

    def add_loss(
        self, tape: Tape, loss_fn: Callable[[Tensor], Tensor], h: Tensor, share: float
    ) -> Tensor:
        """Return share · loss_fn(h), which is also the loss whose gradient counts.

        It is backpropagated to h and to the head at once, so that the tape keeps nothing of the
        head's size.
        """
        if not tape.training:
            return tape.run(loss_fn, h) * share
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            value = loss_fn(leaf) * share
        if value.requires_grad:  # not without rows
            value.backward()
        if leaf.grad is not None:
            tape.add_grad(h, leaf.grad)
        return value.detach()

    def add_cross_entropy(
        self, tape: Tape, h: Tensor, y_n: Tensor, share: float, weight: float = 1.0
    ) -> Tensor:
        """Return `share`, the weight of a token, times the sum of the cross-entropies, in nats.

        The gradient is that of `weight` times this value, as it counts in the batch's loss. That of
        the head is added during this forward pass, by chunks of tokens.
        """
        head: Any = self.model.head.weight
        if not tape.training:
            return tape.run(lambda h: linear_cross_entropy(h, head, y_n), h.flatten(0, -2)) * share
        args = head, y_n, weight * share, head.main_grad
        nll, dh_nd = cross_entropy_and_grads(h.flatten(0, -2), *args)
        tape.add_grad(h, dh_nd.view_as(h))
        return nll * share


# ── The embedding ──


class EmbeddingFunction(torch.autograd.Function):
    """`F.embedding`, whose backward pass adds the gradients of tokens to the table's `main_grad`.

    Autograd would allocate a gradient of the whole table in every micro-batch: 1.9 GB for V3.
    """

    @staticmethod
    def forward(ctx: Any, weight_wd: Tensor, tokens_bs: Tensor) -> Tensor:
        """Return the rows of the tokens, (b, s, d)."""
        ctx.weight_wd = weight_wd
        ctx.save_for_backward(tokens_bs)
        return F.embedding(tokens_bs, weight_wd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bsd: Tensor) -> tuple[None, None]:
        """Add each token's gradient to its row, in the dtype of `main_grad`."""
        (tokens_bs,), grad_wd = ctx.saved_tensors, ctx.weight_wd.main_grad
        grad_nd = grad_bsd.flatten(0, 1).to(grad_wd.dtype)
        grad_wd.index_add_(0, tokens_bs.flatten(), grad_nd)
        return None, None


# ── Segments of a block with experts ──


def balance_loss_or_zero(route: Route, sequence: SequencePart) -> Tensor:
    """Return this rank's part of `balance_loss`, or 0 (with an autograd graph) without rows."""
    ids_bsk, scores_bse = route.topk_ids_bsk, route.scores_bse
    if not len(ids_bsk) * sequence.end:
        return scores_bse.sum()
    load_be = tokens_per_sequence_and_expert(ids_bsk, scores_bse)
    return balance_of_load(sequence.sum_over_ranks(load_be), scores_bse, sequence.end)


def block_forward(
    block: Block, x_bsd: Tensor, rope: Rope, sequence: SequencePart
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block whose experts are all on this rank; return (x, balance loss, expert ids)."""
    x_bsd, route = block(x_bsd, rope)
    return x_bsd, balance_loss_or_zero(route, sequence), route.topk_ids_bsk


def attention_and_gate(
    block: Block, x_bsd: Tensor, rope: Rope, sequence: SequencePart
) -> tuple[Tensor, ...]:
    """Run attention and gate; return (x, expert inputs, weights, balance loss, expert ids)."""
    x_bsd = x_bsd + block.attn(block.attn_norm(x_bsd), rope)
    u_bsd = block.ffn_norm(x_bsd)
    route = cast(MoE, block.ffn).gate(u_bsd)
    u_nd, weight_nk = u_bsd.flatten(0, 1), route.topk_weights_bsk.flatten(0, 1)
    balance = balance_loss_or_zero(route, sequence)
    return x_bsd, u_nd, weight_nk, balance, route.topk_ids_bsk.flatten(0, 1)


def add_expert_outputs(block: Block, x_bsd: Tensor, u_nd: Tensor, y_nd: Tensor) -> Tensor:
    """Return x + (routed experts + shared experts)."""
    shared_bsd = cast(MoE, block.ffn).shared_experts(u_nd.view(x_bsd.shape))
    return x_bsd + (y_nd.view(x_bsd.shape) + shared_bsd)
