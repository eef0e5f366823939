"""Fully sharded data parallelism (ZeRO-3) by PyTorch's `fully_shard`, for one to eight nodes.

Each rank keeps a slice of every parameter, gradient and moment, and trains on its own rows. The
weights of a block are gathered, in bf16, for its forward pass and again for its backward pass, and
its gradients are summed in fp32 into the slices after every micro-batch. A slice consists of
consecutive entries of the first axis: experts of a stack, rows of a matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dsv3_ref.block import MTP, Block
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.checkpoints.storage import split_experts, whole_ranges
from dsv3_ref.config import Config, ceil_div
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Gate, Route, balance_loss
from dsv3_ref.mtp import mtp_hidden_states, mtp_losses
from dsv3_ref.ops import RMSNorm
from dsv3_ref.optim import TrainingRecipe, adamw_of_shards
from dsv3_ref.parallel.bucket import Precision, weight_format
from dsv3_ref.parallel.build import RNGReplay, get_rng_state, set_param, set_rng_state
from dsv3_ref.parallel.engine import DEFAULTS, EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.pipeline import Pipeline
from dsv3_ref.parallel.stage import MicroBatch
from dsv3_ref.parallel.token_dispatcher import Traffic
from dsv3_ref.parallel.watchdog import track_operation
from dsv3_ref.parallel.zero import ShardOptimizer
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, Objective

STAGES_BY_RANK: list[tuple[int, ...]] = [(0,)]  # every rank has all layers

# ── The model ──


class Units:
    """The modules of a model that are gathered together, on a mesh of all ranks.

    precision: that of gathered matrices. Norms and gates are gathered by themselves in fp32, and
    kept until the backward pass has read them: recomputed norms are needed before those gates.
    """

    def __init__(self, device: torch.device, precision: Precision):
        self.device = device
        self.mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
        narrow = torch.bfloat16 if precision == "bf16" else None
        self.policy = MixedPrecisionPolicy(
            narrow, torch.float32 if narrow else None, cast_forward_inputs=False
        )

    def shard(self, module: nn.Module) -> None:
        """Keep this rank's slices of all parameters of a module that are not sharded yet."""
        others = [m for m in module.modules() if not isinstance(m, FSDPModule)]
        wide: list[nn.Module] = [m for m in others if isinstance(m, RMSNorm | Gate)]
        fully_shard(wide, mesh=self.mesh, reshard_after_forward=False)
        fully_shard(module, mesh=self.mesh, mp_policy=self.policy)


def shard_model(model: Transformer, units: Units, fill: Callable[[Tensor], Tensor]) -> None:
    """Keep this rank's slices of a model on meta, of which one block at a time is in memory.

    fill: returns the values of a parameter or buffer on meta.
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    depths = [m for m in model.modules() if isinstance(m, MTP)]
    for module in [*blocks, *depths, model]:
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_meta:
                set_param(module, name, fill(t))
        units.shard(module)
    register_fsdp_forward_method(model, "hidden_states")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a micro-batch's loss has its share of the batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def build_sharded_model(config: Config, units: Units, seed: int) -> Transformer:
    """Build this rank's slices of `Transformer(config)` after `torch.manual_seed(seed)`.

    The values are equal bit for bit, and so is the state of the random generator afterwards.
    """
    torch.manual_seed(seed)
    with RNGReplay(units.device) as replay, torch.device("meta"):
        model = Transformer(config)
    rng_state = get_rng_state(units.device)
    shard_model(model, units, replay.draw)
    set_rng_state(units.device, rng_state)
    return model


def discard_gathered(model: nn.Module) -> None:
    """Discard the gathered weights, so that the next forward pass gathers them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def local_slices(model: nn.Module) -> dict[str, FlatRange]:
    """Return this rank's slices of all parameters, as views; the shapes are those of the whole."""
    slices: dict[str, FlatRange] = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor), "the module is not in use"
        rows = ceil_div(len(p), dist.get_world_size())
        start = min(dist.get_rank() * rows, len(p)) * p.shape[1:].numel()
        slices[name] = FlatRange(p.shape, start, p.to_local().view(-1))
    return slices


# ── The optimizer ──


class FullyShardedOptimizer(ShardOptimizer):
    """AdamW over this rank's slices of all parameters, which are the fp32 masters."""

    def __init__(
        self, model: Transformer, mesh: Mesh, recipe: TrainingRecipe, moments: torch.dtype
    ):
        self.model, self.slices = model, local_slices(model)
        shards = {name: nn.Parameter(part.values) for name, part in self.slices.items()}
        axes = [(x, len(self.slices[name].shape)) for name, x in shards.items()]
        super().__init__(mesh, shards, adamw_of_shards(axes, recipe, moments))

    def reduce_and_clip_grads(self, max_norm: float) -> float:
        """Clip the gradients, which are already sums, to max_norm; return their norm before."""
        for name, p in self.model.named_parameters():
            if isinstance(p.grad, DTensor):  # the loss depends on this parameter
                self.shards[name].grad = p.grad.to_local().view(-1)
        grads = [x.grad for x in self.shards.values() if x.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for g in grads:
            squares += g.double().square().sum()
        return self.clip_grads(grads, squares, max_norm)

    def gather_weights(self) -> None:
        """Discard what is gathered, so that the next forward pass gathers the changed masters."""
        discard_gathered(self.model)

    def ranges(
        self, more: Mapping[str, Mapping[str, Tensor]], once: bool
    ) -> Iterator[tuple[str, str, FlatRange]]:
        """Yield the ranges of masters, moments and `more`; no two ranks hold the same element."""
        for name, part in self.slices.items():
            others = {kind: values[name] for kind, values in more.items()}
            tensors = {"model": part.values, **self.moments(self.shards[name]), **others}
            for kind, values in tensors.items():
                if len(values):
                    yield kind, name, part._replace(values=values)

    def zero_grad(self) -> None:
        """Release all gradients."""
        for shard in self.shards.values():
            shard.grad = None
        for p in self.model.parameters():
            p.grad = None


# ── A step ──


class GatheringPipeline(Pipeline):
    """All layers on every rank: micro-batches one after another, through autograd.

    Every rank runs equally many, since each gathers weights from all; those without tokens that
    count have the loss 0.
    """

    def __init__(
        self, model: Transformer, config: Config, mesh: Mesh, objective: Objective,
        micro_batch: int, dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__(model, config, mesh, "1f1b", STAGES_BY_RANK, None, objective, micro_batch)
        self.dtype = dtype
        self.moe_names = list(moe_layers(model))

    def run_microbatches(self, microbatches: list[MicroBatch], training: bool) -> None:
        """Run the forward pass of every micro-batch and, in training, its backward pass."""
        for i, batch in enumerate(microbatches):
            with track_operation(f"micro-batch {i}"):
                loss = self.forward(batch, training)
                if training:
                    loss.backward()
        if not training:  # no backward pass has done so
            discard_gathered(self.model)

    def forward(self, batch: MicroBatch, training: bool) -> Tensor:
        """Return the loss that a micro-batch adds to the batch's; add its terms to the stats."""
        model = self.model
        weights, stats = batch.weights, batch.stats
        tokens_bs, cu_seqlens = batch.model_input
        h_bsd, routes = model.hidden_states(tokens_bs, cu_seqlens=cu_seqlens)
        part = batch.sequence
        places = batch.places or self.objective.locate(batch.rows, part)
        if batch.readout:
            batch.output = batch.readout(h_bsd, model.head.weight, batch.rows, places, part)
            return h_bsd
        depths: list[tuple[Tensor, Route]] = []
        if training and self.objective.trains_mtp:
            depths = mtp_hidden_states(model, h_bsd, tokens_bs)
        routes = routes + [route for _, route in depths]
        for name, route in zip(self.moe_names, routes):
            stats.add_expert_load(name, route.topk_ids_bsk, self.config.n_routed_experts)
        if not weights.share:  # the gradients are 0, but every rank takes part in their sums
            outputs = [h_bsd, *(h for h, _ in depths), model.head.weight]
            return 0.0 * sum((x.sum() for x in outputs), h_bsd.new_zeros(()))
        main = weights.share * self.objective.loss(
            h_bsd, model.head.weight, batch.rows, places, part
        )
        balance = weights.share * sum(map(balance_loss, routes), main.new_zeros(()))
        stats.main, stats.balance = stats.main + main.detach(), stats.balance + balance.detach()
        loss = main + weights.alpha * balance
        targets_bs = batch.rows.rows_bs[:, 1:]
        for k, value in enumerate(mtp_losses(model, depths, tokens_bs, targets_bs), start=1):
            stats.mtp[k] = stats.mtp.get(k, 0) + weights.share * value.detach()
            loss = loss + weights.mtp * weights.share * value
        return loss


class FullyShardedEngine(ParallelEngine):
    """A rank's part of a training step: its slices, and the rows of its micro-batches."""

    def __init__(
        self, config: Config, recipe: TrainingRecipe, mesh: Mesh,
        settings: EngineSettings = DEFAULTS, seed: int = 0,
        objective: Objective = NEXT_TOKEN_LOSS,
    ):  # fmt: skip
        self.config, self.mesh = config, mesh
        self.precision = precision = settings.precision
        self.stages_by_rank = STAGES_BY_RANK
        self.units = Units(mesh.device, precision)
        self.model = build_sharded_model(config, self.units, seed)
        self.moe_names = list(moe_layers(self.model))
        self.num_params = sum(p.numel() for p in self.model.parameters())
        self.traffic, self.counts_traffic = Traffic(), False
        self.optimizer = FullyShardedOptimizer(self.model, mesh, recipe, settings.moments)
        dtype = torch.bfloat16 if precision == "bf16" else self.model.head.weight.dtype
        self.build_pipeline: Callable[[Transformer], Pipeline] = partial(
            GatheringPipeline, config=config, mesh=mesh, objective=objective,
            micro_batch=settings.micro_batch, dtype=dtype,
        )  # fmt: skip
        self.pipeline = self.build_pipeline(self.model)

    def build_frozen(self) -> Pipeline:
        """Build this rank's slices of a second model, whose weights are loaded afterwards."""
        model = build_on_meta(self.config)
        shard_model(model, self.units, partial(torch.empty_like, device=self.units.device))
        return self.build_pipeline(model.requires_grad_(False))

    def weights_of(self, pipeline: Pipeline) -> dict[str, FlatRange]:
        """Return this rank's slices of the weights of a pipeline, and its buffers, as views."""
        ranges: dict[str, FlatRange] = {}
        for name, part in local_slices(pipeline.model).items():
            if len(part.values):
                ranges |= split_experts(name, part)
        for name, x in pipeline.model.named_buffers():
            ranges |= whole_ranges(name, x)
        return ranges

    def tensors_to_write(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors of the model, an equal share of them on each rank, on the CPU.

        One tensor at a time is gathered, in the dtype that products read. A collective call.
        """
        for i, (name, x) in enumerate(self.model.state_dict().items()):
            if weight_format(name, x.ndim, self.precision) == "bf16":
                x = x.bfloat16()
            if isinstance(x, DTensor):
                x = x.full_tensor()
            if i % self.mesh.world == self.mesh.rank:
                yield name, x.cpu()
