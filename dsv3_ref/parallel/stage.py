"""A pipeline stage: the forward pass of some layers, in segments that a `Tape` backpropagates."""

from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from dsv3_ref.block import MTP, Block
from dsv3_ref.config import Config
from dsv3_ref.data.packing import TOKEN, find_cu_seqlens, read_flags
from dsv3_ref.model import Transformer
from dsv3_ref.moe import GroupedExperts, MoE, Route, balance_loss, tokens_per_expert
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.parallel.tape import Steps, Tape
from dsv3_ref.rope import Rope
from dsv3_ref.scale import partition_layers


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
    """A micro-batch in a stage: its rows of T + 1 tokens, the loss weights, and the sums so far."""

    rows_bs: Tensor
    weights: LossWeights
    stats: LossStats


class Stage:
    """The layers of one stage, which run on the modules of this rank.

    If `is_packed`, rows are packed samples with flags: the model gets them as one long row, and
    only flagged tokens have a loss.
    """

    def __init__(
        self, model: Transformer, config: Config, stage: int, num_stages: int,
        token_dispatcher: TapeDispatcher | None, is_packed: bool = False,
    ):  # fmt: skip
        self.model, self.config = model, config
        self.token_dispatcher, self.is_packed = token_dispatcher, is_packed
        self.layers = partition_layers(config, num_stages)[stage]
        self.first, self.last = stage == 0, stage == num_stages - 1

    def forward(
        self, tape: Tape, x_bsd: Tensor | None, rows_bs: Tensor, weights: LossWeights,
        stats: LossStats,
    ) -> Steps[Tensor]:  # fmt: skip
        """Run the stage on the previous stage's output, or on the tokens if it is the first stage.

        rows_bs: rows of T + 1 tokens. The last stage adds the losses to `stats`.
        """
        batch = MicroBatch(rows_bs, weights, stats)
        tokens_bs = self.model_input(rows_bs)
        rope = self.rope(tokens_bs.shape[1], tokens_bs.device)
        if self.is_packed:
            cu_seqlens = find_cu_seqlens(read_flags(rows_bs[:, :-1]).start_bs)
            rope = Rope.from_cu_seqlens(self.config, cu_seqlens)
        if self.first:
            x_bsd = tape.run(self.model.embed, tokens_bs)
        assert x_bsd is not None, "only the first stage has no input"
        for i in self.layers:
            block = cast(Block, self.model.layers[str(i)])
            x_bsd = yield from self.block(tape, f"layers.{i}", block, x_bsd, rope, batch)
        if self.last and self.is_packed:
            self.completion_loss(tape, x_bsd, batch)
        elif self.last:
            yield from self.losses(tape, x_bsd, batch)
        return x_bsd

    def model_input(self, rows_bs: Tensor) -> Tensor:
        """Return the input tokens of the model for rows of T + 1 tokens."""
        tokens_bs = rows_bs[:, :-1]
        return (tokens_bs & TOKEN).reshape(1, -1) if self.is_packed else tokens_bs

    def rope(self, s: int, device: torch.device) -> Rope:
        """Return the rotations of the positions 0 … s − 1."""
        return Rope.from_positions(self.config, torch.arange(s, device=device))

    def block(
        self, tape: Tape, name: str, block: Block, x_bsd: Tensor, rope: Rope,
        batch: MicroBatch,
    ) -> Steps[Tensor]:  # fmt: skip
        """Run `Block.forward` as one segment, or as segments around the dispatch of tokens."""
        if not isinstance(block.ffn, MoE):
            return tape.run(lambda x: block(x, rope)[0], x_bsd)
        if self.token_dispatcher is None:
            x_bsd, balance, expert = tape.run(lambda x: block_forward(block, x, rope), x_bsd)
        else:
            x_bsd, u_nd, weight_nk, balance, expert = tape.run(
                lambda x: attention_and_gate(block, x, rope), x_bsd
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

    def completion_loss(self, tape: Tape, x_1nd: Tensor, batch: MicroBatch) -> None:
        """Add the loss on answers to the stats; it is `sft_loss` of chapter 14."""
        rows = read_flags(batch.rows_bs[:, 1:])
        loss_n = rows.mask_bs.flatten()
        y_n = rows.tokens_bs.flatten()[loss_n]
        n = max(1, int(loss_n.sum()))
        h_nd = tape.run(lambda x_1nd: self.model.norm(x_1nd)[0][loss_n], x_1nd)
        value = self.loss(tape, h_nd, y_n, n, batch.weights.share)
        batch.stats.main = batch.stats.main + value

    def losses(self, tape: Tape, x_bsd: Tensor, batch: MicroBatch) -> Steps[None]:
        """Add the main loss and the loss of each MTP depth to the stats (eq. 21–25)."""
        tokens_bs, y_bs = self.model_input(batch.rows_bs), batch.rows_bs[:, 1:]
        weights, stats = batch.weights, batch.stats
        h_bsd = tape.run(self.model.norm, x_bsd)
        n = max(1, tokens_bs.numel())
        stats.main = stats.main + self.loss(tape, h_bsd, y_bs, n, weights.share)
        modules = cast(list[MTP], list(self.model.mtp.values())) if tape.training else []
        for k, module in enumerate(modules, start=1):
            next_bs = tokens_bs[:, k:]
            x_bsd = tape.run(lambda h, m=module, t=next_bs: self.mtp_input(m, t, h), h_bsd)
            rope = self.rope(next_bs.shape[1], tokens_bs.device)
            name = f"mtp.{k - 1}.block"
            x_bsd = yield from self.block(tape, name, module.block, x_bsd, rope, batch)
            h_bsd = tape.run(module.norm, x_bsd)
            value = self.loss(tape, h_bsd, y_bs[:, k:], n, weights.share, weights.mtp)
            stats.mtp[k] = stats.mtp.get(k, 0) + value

    def mtp_input(self, module: MTP, next_tokens_bs: Tensor, h_bsd: Tensor) -> Tensor:
        """Return M [norm(Emb(t)); norm(h)] at the positions that have a next token (eq. 21)."""
        e_bsd = self.model.embed(next_tokens_bs)
        h_bsd = h_bsd[:, : next_tokens_bs.shape[1]]
        return module.eh_proj(torch.cat((module.enorm(e_bsd), module.hnorm(h_bsd)), dim=-1))

    def loss(
        self, tape: Tape, h: Tensor, y: Tensor, n: int, share: float, weight: float = 1.0
    ) -> Tensor:
        """Return share · Σ cross-entropy / n in nats.

        The gradient is that of `weight` times this value, as it counts in the batch's loss.
        """
        head, target_n = self.model.head.weight, y.flatten()

        def mean_nll(h: Tensor) -> Tensor:
            return linear_cross_entropy(h.flatten(0, -2), head, target_n) / n

        value = tape.run(mean_nll, h)
        if tape.training:
            tape.add_grad(value, torch.full_like(value, weight * share))
        return value * share


# ── Segments of a block with experts ──


def balance_loss_or_zero(route: Route) -> Tensor:
    """Return `balance_loss`, or 0 (with an autograd graph) if there are no rows."""
    return balance_loss(route) if route.topk_ids_bsk.numel() else route.scores_bse.sum()


def block_forward(block: Block, x_bsd: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block whose experts are all on this rank; return (x, balance loss, expert ids)."""
    x_bsd, route = block(x_bsd, rope)
    return x_bsd, balance_loss_or_zero(route), route.topk_ids_bsk


def attention_and_gate(block: Block, x_bsd: Tensor, rope: Rope) -> tuple[Tensor, ...]:
    """Run attention and gate; return (x, expert inputs, weights, balance loss, expert ids)."""
    x_bsd = x_bsd + block.attn(block.attn_norm(x_bsd), rope)
    u_bsd = block.ffn_norm(x_bsd)
    route = cast(MoE, block.ffn).gate(u_bsd)
    u_nd, weight_nk = u_bsd.flatten(0, 1), route.topk_weights_bsk.flatten(0, 1)
    return x_bsd, u_nd, weight_nk, balance_loss_or_zero(route), route.topk_ids_bsk.flatten(0, 1)


def add_expert_outputs(block: Block, x_bsd: Tensor, u_nd: Tensor, y_nd: Tensor) -> Tensor:
    """Return x + (routed experts + shared experts)."""
    shared_bsd = cast(MoE, block.ffn).shared_experts(u_nd.view(x_bsd.shape))
    return x_bsd + (y_nd.view(x_bsd.shape) + shared_bsd)
