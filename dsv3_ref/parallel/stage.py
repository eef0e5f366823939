"""A stage: the forward pass of some layers, in pieces that a `Tape` can play backwards."""

from dataclasses import dataclass, field
from functools import partial

import torch

from dsv3_ref.config import Config
from dsv3_ref.model import Transformer
from dsv3_ref.moe import MoE, balance_loss, tokens_per_expert
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.rope import Rope
from dsv3_ref.scale import partition_layers
from dsv3_ref.sft import assistant_mask, sample_cu_seqlens


@dataclass
class LossWeights:
    """What each part of the loss counts (eq. 17, 25); the micro-batch is `share` of the batch."""

    share: float
    mtp: float = 0.0  # λ / D
    alpha: float = 0.0


@dataclass
class LossStats:
    """Parts of the loss, each times its micro-batch's share, and loads by layer; of one step."""

    main: float | torch.Tensor = 0.0
    mtp: dict[int, torch.Tensor] = field(default_factory=dict)
    balance: float | torch.Tensor = 0.0
    tokens_per_expert: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_expert_load(self, place: str, expert, n_experts: int) -> None:
        """Tokens each expert of a layer received."""
        self.tokens_per_expert[place] = self.tokens_per_expert.get(place, 0) + tokens_per_expert(
            expert, n_experts
        )


class Stage:
    """Layers of one stage over the model of a rank; what losses and gates say goes to `seen`.

    With `special_tokens`, rows are packed conversations: the loss is on answers only.
    """

    def __init__(
        self,
        model: Transformer,
        c: Config,
        stage: int,
        n: int,
        token_dispatcher,
        special_tokens=None,
    ):
        self.model, self.config, self.token_dispatcher, self.special_tokens = (
            model,
            c,
            token_dispatcher,
            special_tokens,
        )
        self.layers = partition_layers(c, n)[stage]
        self.first, self.last = stage == 0, stage == n - 1

    def forward(self, tape, x_bsd, tokens_bs, weights: LossWeights, seen: LossStats):
        """From tokens or the stage before to the stage after, or to the losses; a generator."""
        rows_bs, tokens_bs, y_bs = tokens_bs, self.model_input(tokens_bs), tokens_bs[:, 1:]
        rope = self.rope(tokens_bs.shape[1], tokens_bs.device)
        if self.special_tokens:
            rope = Rope.from_cu_seqlens(
                self.config, sample_cu_seqlens(rows_bs[:, :-1], self.special_tokens)
            )
        if self.first:
            x_bsd = tape.run(self.model.embed, tokens_bs)
        for i in self.layers:
            block = self.model.layers[str(i)]
            x_bsd = yield from self.block(tape, f"layers.{i}", block, x_bsd, rope, weights, seen)
        if self.last and self.special_tokens:
            self.answers(tape, x_bsd, rows_bs, weights, seen)
        elif self.last:
            yield from self.losses(tape, x_bsd, tokens_bs, y_bs, weights, seen)
        return x_bsd

    def model_input(self, tokens_bs):
        """What the model reads of rows of T + 1 tokens."""
        return tokens_bs[:, :-1].reshape(1, -1) if self.special_tokens else tokens_bs[:, :-1]

    def rope(self, s: int, device):
        return Rope.from_positions(self.config, torch.arange(s, device=device))

    def block(self, tape, place: str, block, x_bsd, rope, weights, seen):
        """`Block.forward`: one piece, or pieces around the exchange of tokens."""
        if not isinstance(block.ffn, MoE):
            return tape.run(lambda x_bsd: block(x_bsd, rope)[0], x_bsd)
        if self.token_dispatcher is None:
            x_bsd, balance, expert = tape.run(
                lambda x_bsd: block_forward(block, x_bsd, rope), x_bsd
            )
        else:
            x_bsd, *tokens, balance, expert = tape.run(
                lambda x: attention_and_gate(block, x, rope), x_bsd
            )
            y_nd = yield from self.token_dispatcher.apply_experts(
                tape, block.ffn.experts, *tokens, expert
            )
            shared = lambda x_bsd, x_nd, y_nd: add_expert_outputs(block, x_bsd, x_nd, y_nd)
            x_bsd = tape.run(shared, x_bsd, tokens[0], y_nd)
        if tape.training:
            tape.add_grad(balance, torch.full_like(balance, weights.alpha * weights.share))
        seen.balance = seen.balance + balance * weights.share
        seen.add_expert_load(place + ".ffn", expert, self.config.n_routed_experts)
        return x_bsd

    def answers(self, tape, x_1nd, rows_bs, weights, seen):
        """`sft_loss` of chapter 14."""
        loss_n = assistant_mask(rows_bs, self.special_tokens)[:, 1:].flatten()
        y_n, n = rows_bs[:, 1:].flatten()[loss_n], max(1, int(loss_n.sum()))
        h_nd = tape.run(lambda x_1nd: self.model.norm(x_1nd)[0][loss_n], x_1nd)
        seen.main = seen.main + self.loss(tape, h_nd, y_n, n, weights.share)

    def losses(self, tape, x_bsd, tokens_bs, y_bs, weights, seen):
        """`losses` of chapter 07: the main one, then a module deeper at a time (eq. 21–25)."""
        h_bsd = tape.run(self.model.norm, x_bsd)
        n = max(1, tokens_bs.numel())
        seen.main = seen.main + self.loss(tape, h_bsd, y_bs, n, weights.share)
        for k, module in enumerate(self.model.mtp.values() if tape.training else (), start=1):
            s = tokens_bs.shape[1] - k
            pair = partial(self.pair, module, tokens_bs[:, k:])
            x_bsd, rope = tape.run(pair, h_bsd), self.rope(s, tokens_bs.device)
            place = f"mtp.{k - 1}.block"
            x_bsd = yield from self.block(tape, place, module.block, x_bsd, rope, weights, seen)
            h_bsd = tape.run(module.norm, x_bsd)
            value = self.loss(tape, h_bsd, y_bs[:, k:], n, weights.share, weights.mtp)
            seen.mtp[k] = seen.mtp.get(k, 0) + value

    def pair(self, module, next_tokens_bs, h_bsd):
        """eq. 21: M [norm(Emb(t)); norm(h)] at the positions that have a token ahead."""
        e_bsd, h_bsd = self.model.embed(next_tokens_bs), h_bsd[:, : next_tokens_bs.shape[1]]
        return module.eh_proj(torch.cat((module.enorm(e_bsd), module.hnorm(h_bsd)), dim=-1))

    def loss(self, tape, h, y, n: int, share: float, weight: float = 1.0):
        """share · Σ cross-entropy / n in nats, of which the batch's loss holds `weight`."""
        head, target_n = self.model.head.weight, y.flatten()
        nll = lambda h: linear_cross_entropy(h.flatten(0, -2), head, target_n) / n
        value = tape.run(nll, h)
        if tape.training:
            tape.add_grad(value, torch.full_like(value, weight * share))
        return value * share


# ── Pieces of a block with experts ──


def balance_loss_or_zero(r):
    """`balance_loss`, 0 for no rows."""
    return balance_loss(r) if r.topk_ids_bsk.numel() else r.scores_bse.sum()


def block_forward(block, x_bsd, rope):
    """All of it, where all experts are here."""
    x_bsd, r = block(x_bsd, rope)
    return x_bsd, balance_loss_or_zero(r), r.topk_ids_bsk


def attention_and_gate(block, x_bsd, rope):
    """Attention and gate: (x, tokens for the experts, their weights, balance loss, experts)."""
    x_bsd = x_bsd + block.attn(block.attn_norm(x_bsd), rope)
    u_bsd = block.ffn_norm(x_bsd)
    r = block.ffn.gate(u_bsd)
    tokens = u_bsd.flatten(0, 1), r.topk_weights_bsk.flatten(0, 1)
    return x_bsd, *tokens, balance_loss_or_zero(r), r.topk_ids_bsk.flatten(0, 1)


def add_expert_outputs(block, x_bsd, u_nd, y_nd):
    """x + (routed experts + shared ones)."""
    u_bsd = u_nd.view(x_bsd.shape)
    return x_bsd + (y_nd.view(x_bsd.shape) + block.ffn.shared_experts(u_bsd))
