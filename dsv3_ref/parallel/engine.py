"""A training step over all ranks, with the same losses on every mesh."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.checkpoints.sharded import first_expert
from dsv3_ref.checkpoints.storage import split_experts
from dsv3_ref.config import Config, UserError
from dsv3_ref.dualpipe import stages_by_rank
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import update_expert_bias
from dsv3_ref.optim import TrainingRecipe, skip_reason
from dsv3_ref.parallel.bucket import Precision
from dsv3_ref.parallel.build import (
    build_empty_model,
    build_local_model,
    count_stages,
    owning_ranks,
)
from dsv3_ref.parallel.deepep import DeepEPDispatcher
from dsv3_ref.parallel.fan_out import FanOut
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.pipeline import Pipeline
from dsv3_ref.parallel.rows import LocalRows
from dsv3_ref.parallel.stage import LossWeights, TapeDispatcher
from dsv3_ref.parallel.token_dispatcher import (
    LINKS,
    AllToAllDispatcher,
    FixedSizes,
    Traffic,
    dispatch_levels,
)
from dsv3_ref.parallel.zero import ShardOptimizer, ZeroOptimizer
from dsv3_ref.pretrain import StepStats
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, Objective, RowBatch


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine, apart from model, recipe, mesh and objective.

    In bf16 and FP8 the caller computes under autocast to bf16, and in FP8 with the backend `fp8`.
    """

    schedule: str = "1f1b"
    moments: torch.dtype = torch.bfloat16  # of AdamW
    zero: bool = True  # ZeRO-1
    micro_batch: int = 0  # rows; 0: see `Pipeline`
    precision: Precision = "fp32"  # of weights and residual stream
    ranks_per_node: int = 0  # of an expert group; 0: dispatch in one hop
    fp8_dispatch: bool = False  # tokens are sent to experts in FP8
    deepep: bool = False
    dispatch_capacity: float = 0.0  # the factor of `FixedSizes`; 0: exact sizes
    fan_out_sms: int = 0  # of the kernels within a node; 0: all-to-alls there too


DEFAULTS = EngineSettings()


class ParallelEngine:
    """A rank's part of a training step: its model part, its optimizer shard and its pipeline.

    objective: the loss, which the task chooses.
    """

    def __init__(
        self, config: Config, recipe: TrainingRecipe, mesh: Mesh,
        settings: EngineSettings = DEFAULTS, seed: int = 0,
        objective: Objective = NEXT_TOKEN_LOSS,
    ):  # fmt: skip
        self.config, self.mesh = config, mesh
        self.stages_by_rank = stages = stages_by_rank(settings.schedule, mesh.pp)
        num_stages = count_stages(stages)
        if num_stages > config.n_layers:
            raise UserError(
                f"{config.n_layers} layers cannot be cut into {num_stages} stages: reduce --pp"
            )
        whole = build_on_meta(config)
        mesh.create_reduce_groups(
            owning_ranks(name, config, stages) for name, _ in whole.named_parameters()
        )
        self.moe_names = list(moe_layers(whole))
        self.num_params = sum(p.numel() for p in whole.parameters())
        self.model = build_local_model(config, mesh, stages[mesh.pp_rank], num_stages, seed)
        self.traffic, self.num_left_out = Traffic(), 0
        # DeepEP does not report what it sends
        self.counts_traffic = mesh.ep > 1 and not settings.deepep
        self.optimizer: ShardOptimizer = ZeroOptimizer(
            self.model, config, mesh, stages, recipe, settings.moments, settings.zero,
            settings.precision,
        )  # fmt: skip
        self.build_pipeline: Callable[[Transformer], Pipeline] = partial(
            Pipeline, config=config, mesh=mesh, schedule_name=settings.schedule,
            stages_by_rank=stages, token_dispatcher=self.create_dispatcher(settings),
            objective=objective, micro_batch=settings.micro_batch,
        )  # fmt: skip
        self.pipeline = self.build_pipeline(self.model)

    def build_frozen(self) -> Pipeline:
        """Build this rank's stages of a second model, whose weights are loaded afterwards.

        It has no optimizer and no gradients, and shares the dispatcher with its communicators.
        """
        stages = [*self.pipeline.stages]
        model = build_empty_model(self.config, self.mesh, stages, self.pipeline.last + 1)
        return self.build_pipeline(model)

    def weights_of(self, pipeline: Pipeline) -> dict[str, FlatRange]:
        """Return this rank's part of the weights of a pipeline by their global names, as views."""
        first = first_expert(self)
        ranges: dict[str, FlatRange] = {}
        for name, x in pipeline.model.state_dict().items():
            ranges |= split_experts(name, FlatRange(x.shape, 0, x.detach().view(-1)), first)
        return ranges

    def create_dispatcher(self, settings: EngineSettings) -> TapeDispatcher:
        """Create the dispatcher of tokens to the experts, which may all be on this rank."""
        config, capacity = self.config, settings.dispatch_capacity
        fp8 = settings.fp8_dispatch
        if self.mesh.ep == 1:
            return AllToAllDispatcher([])
        if settings.deepep:
            return DeepEPDispatcher(config, self.mesh.ep_group, fp8)
        levels = dispatch_levels(config, self.mesh, settings.ranks_per_node, self.traffic)
        if settings.fan_out_sms and not (capacity and self.mesh.device.type == "cuda"):
            raise UserError(
                "--token-dispatcher symmetric needs GPUs and fixed sizes: "
                "set --dispatch-capacity, or leave it out"
            )
        if not capacity:
            return AllToAllDispatcher(levels, fp8)
        fixed = FixedSizes(capacity, config.n_routed_experts, config.n_activated_experts)
        last_hop = FanOut(levels[-1], settings.fan_out_sms, fp8) if settings.fan_out_sms else None
        return AllToAllDispatcher(levels, fp8, fixed, last_hop)

    def is_first_holder(self, name: str) -> bool:
        """Return whether this rank is the first of those that hold a dense parameter or buffer."""
        owners = owning_ranks(name, self.config, self.stages_by_rank)
        return self.mesh.pipeline_ranks()[0] == 0 and self.mesh.pp_rank == owners[0]

    def tensors_to_write(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a model that this rank writes, by our names, with its own experts.

        Of the ranks that hold a tensor, the first pp rank and the first replica write it. A
        collective call.
        """
        mesh = self.mesh
        for name, x in self.model.state_dict().items():
            owner = owning_ranks(name, self.config, self.stages_by_rank)[0]
            is_replica = mesh.dp_rank or (mesh.ep_rank and not is_expert(name))
            if owner == mesh.pp_rank and not is_replica:
                yield name, x

    # ── A step ──

    def global_loss_weight(self, rows: RowBatch) -> int:
        """Return the weight of a global batch from the rows of each pipeline."""
        own = self.pipeline.objective.loss_weight(rows)
        return round(self.all_reduce_sum(own)[0]) // (self.mesh.pp * self.mesh.cp)

    def train_step(
        self, rows: LocalRows | RowBatch | Tensor, recipe: TrainingRecipe, lr: float, gamma: float,
        mtp_weight: float, limit: float = math.inf,
    ) -> StepStats:  # fmt: skip
        """Run `train_step` of chapter 07 on the rows of a global batch.

        rows: with what the objective needs beside the tokens, or only the tokens; or those of this
        pipeline. gamma: the update rate of the gates' biases. limit: the update is skipped if the
        gradient norm exceeds it.
        """
        if recipe.balance_loss_scope != "sequence":
            raise UserError(
                "on several ranks the balance loss is over sequences only: "
                "set --balance-loss-scope sequence"
            )
        mtp = mtp_weight / max(1, self.config.n_mtp_layers)
        alpha = recipe.balance_loss_coeff
        batch = RowBatch(rows) if isinstance(rows, Tensor) else rows
        microbatches = self.pipeline.split(batch)
        shares = self.pipeline.shares(batch, microbatches)
        weights = [LossWeights(share, mtp, alpha) for share in shares]
        self.clear_step()
        stats = self.pipeline.run(microbatches, weights, clear=self.clear_step)
        self.num_left_out = self.pipeline.num_left_out
        mtp_sums = [stats.mtp.get(k) for k in range(1, 1 + self.config.n_mtp_layers)]
        main, balance, *mtp_losses = self.all_reduce_sum(stats.main, stats.balance, *mtp_sums)
        total = main + mtp * sum(mtp_losses) + alpha * balance
        load_le = self.tokens_per_expert(stats.tokens_per_expert)
        grad_norm = self.optimizer.reduce_and_clip_grads(recipe.max_grad_norm)
        skipped = skip_reason(total, grad_norm, limit)
        if not skipped:
            self.optimizer.step(lr)
            self.update_expert_biases(load_le, gamma)
        if not self.pipeline.objective.trains_mtp:  # as in one process: only layers that ran
            load_le = load_le[: sum(name.startswith("layers.") for name in self.moe_names)]
        return StepStats(main, mtp_losses, total, grad_norm, load_le, skipped)

    def clear_step(self) -> None:
        """Set the gradients and the counts of the traffic to zero."""
        self.optimizer.zero_grad()
        self.traffic.clear()

    def all_reduce_sum(self, *values: float | Tensor | None) -> list[float]:
        """Sum each value over all ranks; None counts as 0.

        Each part of a loss is computed by exactly one rank.
        """
        numbers = [0.0 if v is None else float(v) for v in values]
        x = torch.tensor(numbers, dtype=torch.float64, device=self.mesh.device)
        return self.mesh.all_reduce_sum(x).tolist()

    def tokens_per_expert(self, local: dict[str, Tensor]) -> Tensor:
        """Return the number of tokens of each expert of each MoE layer in the batch, (l, e).

        local: this rank's counts by layer.
        """
        shape = len(self.moe_names), self.config.n_routed_experts
        load_le = torch.zeros(shape, dtype=torch.int64, device=self.mesh.device)
        for name, load_e in local.items():
            load_le[self.moe_names.index(name)] = load_e
        return self.mesh.all_reduce_sum(load_le)

    def update_expert_biases(self, load_le: Tensor, gamma: float) -> None:
        """Update the biases of this rank's gates from the loads of the global batch."""
        for name, moe in moe_layers(self.model).items():
            if moe.gate.bias is not None:
                update_expert_bias(moe.gate.bias, load_le[self.moe_names.index(name)], gamma)

    def comm_stats(self) -> dict:
        """Return metrics of the last step's all-to-alls over all ranks.

        They are the bytes by link, the fraction of time that was hidden, and the rows that exceeded
        fixed sizes, for which the step was repeated. The result is empty if bytes are not counted.
        """
        if not self.counts_traffic:
            return {}
        own = self.traffic
        own.read_device()
        sent = self.all_reduce_sum(*(own.bytes[link] for link in LINKS))
        in_flight_s, exposed_s = self.all_reduce_sum(own.in_flight_s, own.exposed_s)
        return {
            "all_to_all_bytes": dict(zip(LINKS, map(int, sent))),
            "all_to_all_hidden": Traffic(in_flight_s=in_flight_s, exposed_s=exposed_s).hidden,
            "dispatch_overflow": self.num_left_out,
        }

    def gather_expert_biases(self) -> list[Tensor | None]:
        """Return the biases of the gates of all MoE layers; None where gates have none."""
        if self.config.score_func != "sigmoid":
            return [None] * len(self.moe_names)
        shape = len(self.moe_names), self.config.n_routed_experts
        bias_le = torch.full(shape, -torch.inf, device=self.mesh.device)
        for name, moe in moe_layers(self.model).items():
            bias_le[self.moe_names.index(name)] = cast(Tensor, moe.gate.bias)
        return list(self.mesh.all_reduce_max(bias_le))

    @torch.no_grad()
    def mean_loss(self, batch: RowBatch) -> float:
        """Return the loss of a global batch without MTP, in a forward pass."""
        microbatches = self.pipeline.split(batch)
        weights = list(map(LossWeights, self.pipeline.shares(batch, microbatches)))
        stats = self.pipeline.run(microbatches, weights, training=False)
        return self.all_reduce_sum(stats.main)[0]
