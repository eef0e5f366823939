"""A training step over all ranks: the same losses on every mesh."""

import math

import torch

from dsv3_ref.config import Config, UserError
from dsv3_ref.dualpipe import stages_by_rank as stages_held
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import update_expert_bias
from dsv3_ref.optim import TrainingRecipe, skip_reason
from dsv3_ref.parallel.build import build_local_model, owning_ranks
from dsv3_ref.parallel.deepep import DeepEPDispatcher
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.pipeline import Pipeline
from dsv3_ref.parallel.stage import LossWeights
from dsv3_ref.parallel.token_dispatcher import LINKS, AllToAllDispatcher, Traffic, dispatch_levels
from dsv3_ref.parallel.zero import ZeroOptimizer
from dsv3_ref.pretrain import StepStats
from dsv3_ref.sft import SpecialTokens, num_loss_tokens


class ParallelEngine:
    """What a rank needs to train: its part of the model, its optimizer, its pipeline."""

    def __init__(
        self, c: Config, r: TrainingRecipe, mesh: Mesh, schedule: str = "1f1b", seed: int = 0,
        moments=torch.bfloat16, zero: bool = True, micro_batch: int = 0, ranks_per_node: int = 0,
        fp8: bool = False, deepep: bool = False, special_tokens: SpecialTokens | None = None,
    ):  # fmt: skip
        self.config, self.mesh, self.micro_batch, self.special_tokens = (
            c,
            mesh,
            micro_batch,
            special_tokens,
        )
        stages_of_rank = stages_held(schedule, mesh.pp)
        stages = 1 + max(s for of_rank in stages_of_rank for s in of_rank)
        if stages > c.n_layers:
            raise UserError(f"{c.n_layers} layers cannot be cut into {stages} stages")
        with torch.device("meta"):
            whole = Transformer(c)
        mesh.create_reduce_groups(
            owning_ranks(name, c, stages_of_rank) for name, _ in whole.named_parameters()
        )
        self.moe_names = list(moe_layers(whole))
        self.num_params = sum(p.numel() for p in whole.parameters())
        self.model = build_local_model(c, mesh, stages_of_rank[mesh.pp_rank], stages, seed)
        self.traffic = Traffic()
        self.counts_traffic = mesh.ep > 1 and not deepep  # what DeepEP carries, only DeepEP knows
        token_dispatcher = (
            AllToAllDispatcher(dispatch_levels(c, mesh, ranks_per_node, self.traffic), fp8)
            if self.counts_traffic
            else None
        )
        if mesh.ep > 1 and deepep:
            token_dispatcher = DeepEPDispatcher(c, mesh.ep_group, fp8)
        self.pipeline = Pipeline(
            self.model, c, mesh, schedule, stages_of_rank, token_dispatcher, special_tokens
        )
        self.optimizer = ZeroOptimizer(self.model, c, mesh, stages_of_rank, r, moments, zero)

    # ── Rows ──

    def split_microbatches(self, tokens_bs: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        """This pipeline's rows in micro-batches, and the share of the batch that each is.

        All pipelines cut alike; where rows run short, a micro-batch is empty.
        """
        of_pipe = -(-len(tokens_bs) // self.mesh.data_size)
        size = self.micro_batch or (of_pipe if self.mesh.pp == 1 else 1)
        n = self.pipeline.min_microbatches(-(-of_pipe // size))
        mine = tokens_bs.tensor_split(self.mesh.data_size)[self.mesh.data_rank].tensor_split(n)
        return list(mine), [self.loss_weight(m) / self.loss_weight(tokens_bs) for m in mine]

    def loss_weight(self, tokens_bs) -> int:
        """What rows count in a mean over the batch: themselves, or the tokens of answers."""
        return (
            len(tokens_bs)
            if self.special_tokens is None
            else num_loss_tokens(tokens_bs, self.special_tokens)
        )

    # ── A step ──

    def train_step(
        self,
        tokens_bs,
        r: TrainingRecipe,
        lr: float,
        gamma: float,
        mtp_weight: float,
        limit=math.inf,
    ) -> StepStats:
        """`train_step` of chapter 07 on the rows (of T + 1 tokens) of a global batch."""
        if r.balance_loss_scope != "sequence":
            raise UserError("on several ranks the balance loss is over sequences only")
        depth = self.config.n_mtp_layers
        micros, shares = self.split_microbatches(tokens_bs)
        weights = [
            LossWeights(share, mtp_weight / max(1, depth), r.balance_loss_coeff) for share in shares
        ]
        self.optimizer.zero_grad()
        self.traffic.clear()
        seen = self.pipeline.run(micros, weights)
        main, balance, *mtp = self.all_reduce_sum(
            seen.main, seen.balance, *map(seen.mtp.get, self.mtp_depths)
        )
        total = main + mtp_weight / max(1, depth) * sum(mtp) + r.balance_loss_coeff * balance
        load_le, grad_norm = (
            self.tokens_per_expert(seen.tokens_per_expert),
            self.optimizer.reduce_and_clip_grads(r.max_grad_norm),
        )
        skipped = skip_reason(total, grad_norm, limit)
        if not skipped:
            self.optimizer.step(lr)
            self.update_expert_biases(load_le, gamma)
        return StepStats(main, mtp, total, grad_norm, load_le, skipped)

    @property
    def mtp_depths(self) -> range:
        return range(1, 1 + self.config.n_mtp_layers)

    def all_reduce_sum(self, *values) -> list[float]:
        """Over all ranks; each part of a loss was computed by exactly one of them."""
        values = [float(v) if v is not None else 0.0 for v in values]
        return self.mesh.all_reduce_sum(
            torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        ).tolist()

    def tokens_per_expert(self, load: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tokens each expert of each MoE layer received in the global batch, (l, e)."""
        shape = len(self.moe_names), self.config.n_routed_experts
        load_le = torch.zeros(shape, dtype=torch.int64, device=self.mesh.device)
        for name, load_e in load.items():
            load_le[self.moe_names.index(name)] = load_e
        return self.mesh.all_reduce_sum(load_le)

    def update_expert_biases(self, load_le: torch.Tensor, gamma: float) -> None:
        """Move the biases of the gates that are here by the load of the global batch."""
        for name, moe in moe_layers(self.model).items():
            if moe.gate.bias is not None:
                update_expert_bias(moe.gate.bias, load_le[self.moe_names.index(name)], gamma)

    def comm_stats(self) -> dict:
        """Of the last step, over all ranks: bytes by link, and the share of time hidden."""
        if not self.counts_traffic:
            return {}
        t = self.traffic
        sent = [t.bytes[link] for link in LINKS]
        *sent, under_way, exposed = self.all_reduce_sum(*sent, t.in_flight_s, t.exposed_s)
        total = Traffic(dict(zip(LINKS, map(int, sent))), under_way, exposed)
        return {"all_to_all_bytes": total.bytes, "all_to_all_hidden": total.hidden}

    def gather_expert_biases(self) -> list:
        """Of the gates of all MoE layers, wherever they are."""
        if self.config.score_func != "sigmoid":
            return [None] * len(self.moe_names)
        shape = len(self.moe_names), self.config.n_routed_experts
        bias_le = torch.full(shape, -torch.inf, device=self.mesh.device)
        for name, moe in moe_layers(self.model).items():
            bias_le[self.moe_names.index(name)] = moe.gate.bias
        return list(self.mesh.all_reduce_max(bias_le))

    @torch.no_grad()
    def sum_nll(self, rows_bs: torch.Tensor) -> float:
        """Σ of the main loss over rows of T + 1 tokens, in nats a token, times the rows."""
        micros, shares = self.split_microbatches(rows_bs)
        seen = self.pipeline.run(micros, list(map(LossWeights, shares)), training=False)
        n = rows_bs[:, 1:].numel() if self.special_tokens is None else self.loss_weight(rows_bs)
        return self.all_reduce_sum(seen.main)[0] * n
