"""Pipeline, data and expert parallelism: a mesh of ranks with the results of one process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_ref import ops
from dsv3_ref.checkpoints import native, sharded
from dsv3_ref.checkpoints.atomic import read_json
from dsv3_ref.checkpoints.layout import STATE
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer
from dsv3_ref.parallel.bucket import Precision
from dsv3_ref.parallel.data_parallel import (
    append_signal,
    broadcast_object_from_rank0,
    call_on_ranks,
    find_damage_on_ranks,
    largest_on_ranks,
    straggler_metrics,
)
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.hf_shards import write_hf_shards
from dsv3_ref.parallel.mesh import Mesh, resolve_parallel_dims
from dsv3_ref.parallel.pipeline import Pipeline
from dsv3_ref.parallel.rows import LocalRows, PrefetchingLoader
from dsv3_ref.parallel.token_dispatcher import CUDA_CAPACITY
from dsv3_ref.parallel.watchdog import collective_timeout, track_operation
from dsv3_ref.pretrain import StepStats
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.malloc import free_memory
from dsv3_ref.training.objective import Readout, RowBatch
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.strategy import (
    StepHyperparams,
    resolve_precision,
    state_dtype,
    use_precision,
)
from dsv3_ref.training.task import Batch, Data, RowLoader, RowTask, Task

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run

READER_FAILED = 1 << 16  # in place of the number of a signal


class MeshParallel:
    """A strategy on a mesh (pp × dp × ep) that shards stages, experts and optimizer states.

    Every rank reads the rows of its pipeline, which the ranks of a cp group share.
    With --fully-shard it shards every parameter over all ranks, and each rank runs all layers.
    """

    dp_size, saves_async = 1, True

    def __init__(self, config: TrainConfig, device: torch.device):
        sizes = resolve_parallel_dims(
            dist.get_world_size(), config.pp, config.ep, config.dp or None
        )
        self.config, self.device = config, device
        self.mesh = Mesh(*sizes, device, collective_timeout(config.hang_timeout), config.cp)
        self.cpu_group = dist.new_group(timeout=self.mesh.timeout, backend="gloo")
        self.rows_are_ready = False  # all ranks have read the rows of the next step
        self.is_main = dist.get_rank() == 0

    @property
    def num_params(self) -> int:
        """The number of parameters of the whole model."""
        return self.engine.num_params

    @property
    def description(self) -> str:
        """The sizes of the mesh and the device, for the run's first line."""
        m = self.mesh
        if self.config.fully_shard:
            return f"{m.world} ranks, fully sharded, on {self.device.type}"
        sizes = f"pp {m.pp} × dp {m.dp} × ep {m.ep}" + (f", cp {m.cp}" if m.cp > 1 else "")
        return f"{m.world} ranks ({sizes}) on {self.device.type}"

    # ── Data and model ──

    def build_data(self, task: Task) -> Data:
        """Build the data on every rank; the first one fills the caches that the others use.

        Rows are divided among data indices, except those of a task that replicates its data.
        """
        is_first = self.mesh.rank == 0
        first = call_on_ranks(lambda: task.build_data() if is_first else None)
        with redirect_stderr(sys.stderr if is_first else StringIO()):  # warnings appear once
            data = call_on_ranks(lambda: first or task.build_data())
        self.rows: PrefetchingLoader | None = None
        if task.replicates_data:
            return data
        self.rows = PrefetchingLoader(
            cast(RowLoader, data.loader), self.mesh.data_rank, self.mesh.data_size, self.cpu_group
        )
        return replace(data, loader=self.rows)

    def build_model(self, task: Task, init: Path | None) -> None:
        """Build this rank's part of the model and its optimizer; load its weights from `init`."""
        self.engine = self.build_engine(task)
        if init:
            self.load_weights(init)
        self.model, self.optimizer = self.engine.model, self.engine.optimizer.adamw
        self.checkpointer = sharded.AsyncCheckpointer(self.cpu_group)

    def build_engine(self, task: Task) -> ParallelEngine:
        """Build the engine of a mesh, or that of fully sharded data parallelism."""
        config, engine = task.config, ParallelEngine
        if config.fully_shard:
            from dsv3_ref.parallel.fully_sharded import FullyShardedEngine  # imports for seconds

            engine = FullyShardedEngine
        fp8 = config.dispatch_dtype == "fp8" or (
            config.dispatch_dtype == "auto" and config.precision == "fp8"
        )
        settings = EngineSettings(
            schedule=config.schedule,
            moments=state_dtype(config),
            zero=config.zero,
            micro_batch=config.micro_batch,
            precision=self.precision,
            ranks_per_node=config.ep_ranks_per_node,
            fp8_dispatch=fp8,
            deepep=config.token_dispatcher == "deepep",
            dispatch_capacity=default_capacity(config, self.device),
            fan_out_sms=config.dispatch_sms if config.token_dispatcher == "symmetric" else 0,
        )
        return engine(config.model, config.recipe, self.mesh, settings, config.seed, task.objective)

    def load_weights(self, init: Path) -> None:
        """Load weights: each rank reads its slices of the masters, then all exchange them."""
        targets = sharded.weight_ranges(self.engine)
        self.fill_weights(init, targets)
        self.engine.optimizer.gather_weights()

    def fill_weights(self, directory: Path, targets: dict[str, FlatRange]) -> None:
        """Fill ranges of our tensors from a directory of weights; a collective call."""
        native.newest_whole(
            directory, partial(native.fill_weights, targets), self.config.verify, self.mesh.rank,
            self.mesh.world, call_on_ranks,
        )  # fmt: skip

    @property
    def precision(self) -> Precision:
        """The precision of weights: fp32, bf16 or fp8."""
        return resolve_precision(self.config.precision, self.device)

    def load_frozen(self, task: Task, directory: Path) -> Pipeline:
        """Return the stages of a second model, without optimizer and gradients.

        The trained model cannot take its place: it differs from the first update on.
        """
        frozen = self.engine.build_frozen()
        self.fill_weights(directory, self.engine.weights_of(frozen))
        return frozen

    def read_out(
        self, task: Task, batch: RowBatch, readout: Readout, width: int,
        frozen: Pipeline | None = None,
    ) -> Tensor:  # fmt: skip
        """Return `width` values of each row by a forward pass of the pipeline, (b, width)."""
        return (frozen or self.engine.pipeline).read_out(batch, readout, width)

    @contextmanager
    def precision_context(self) -> Iterator[None]:
        """Compute in the run's precision, on a mesh with backward passes that can be split.

        Unlike one process, FP8 on CPU computes in bf16 what is not in FP8, as on CUDA.
        """
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32")
        with use_precision(self.config.precision, self.device), bf16:
            backends = ops.expand_backends(ops.ACTIVE_BACKENDS, self.device.type)
            with ops.use(*backends if self.config.fully_shard else with_zero_bubble(backends)):
                yield

    # ── A step ──

    def begin_step(self, step: int) -> None:
        """Do nothing: all ranks draw the same random numbers, which need no seed per step."""

    def next_rows(self, run: "Run", n: int) -> LocalRows:
        """Return this pipeline's part of the next n rows of the data.

        End all ranks if one cannot read its rows.
        """
        sizes = run.data.batch_size_schedule[run.state.step :]
        with track_operation(f"rows of step {run.state.step + 1}", range(self.mesh.world)):
            is_stale = self.reader.prefetch(sizes)
            if is_stale or not self.rows_are_ready:
                call_on_ranks(self.raise_failure)
        rows = RowBatch(self.reader.next_part(sizes))  # on the host
        self.reader.prefetch(sizes[1:])
        self.rows_are_ready = False
        return LocalRows(rows, n, self.engine.global_loss_weight(rows))

    @property
    def reader(self) -> PrefetchingLoader:
        """The reader of this data index's rows; tasks that replicate their data have none."""
        assert self.rows is not None, "a task that replicates its data draws no rows"
        return self.rows

    def raise_failure(self) -> None:
        """Raise the error with which this rank could not read its next rows."""
        failure = self.reader.failure()
        if failure:
            raise failure

    def train_step(self, run: "Run", batch: Batch, hyperparams: StepHyperparams) -> StepStats:
        """Run a training step on the rows of a global batch."""
        if not isinstance(batch, LocalRows):
            batch = run.task.row_batch(run, batch)
        return self.engine.train_step(batch, *hyperparams)

    def nll(self, task: RowTask, rows_bs: Tensor) -> float:
        """Return the sum of the main loss over the tokens of the rows, in nats."""
        batch = RowBatch(rows_bs)
        return self.engine.mean_loss(batch) * task.loss_targets(rows_bs).numel()

    def updated_weights(self) -> dict[str, Tensor]:
        """Return this rank's shards of the master weights, for their moving average."""
        return self.engine.optimizer.masters()

    def refresh_model(self) -> None:
        """Round the masters to the weights after they were changed; a collective call."""
        self.engine.optimizer.gather_weights()

    def expert_biases(self) -> list[Tensor | None]:
        """Return the biases of the gates of all MoE layers; None where gates have none."""
        return list(self.engine.gather_expert_biases())

    def step_metrics(self) -> dict:
        """Return the traffic of the last step's all-to-alls."""
        return self.engine.comm_stats()

    def straggler_metrics(self, seconds: float) -> dict[str, Any]:
        """Return which rank computed longest in a step of so many seconds."""
        return straggler_metrics(seconds, self.device)

    def load_whole_model(self, run_dir: Path) -> Transformer | None:
        """Load the whole model of a finished run onto this rank's device; None if it cannot fit.

        It is read into the host's memory first, in fp32.
        """
        needed = 4 * self.num_params
        free = min(free_memory(torch.device("cpu")), free_memory(self.device))
        if needed > free:
            print(
                f"no samples: the model's {needed / 1e9:.1f} GB exceed {free / 1e9:.1f} GB of free "
                f"memory on rank 0; `dsv3 generate {run_dir}` makes some where it fits"
            )
            return None
        return native.load(run_dir).to(self.device)

    # ── Collective operations ──

    def shard(self, items: list) -> list:
        """Return all items, since every rank works on each of them."""
        return items

    def all_gather(self, items: list) -> list:
        """Return the items, since every rank has all of them."""
        return items

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values, which are already sums over all ranks."""
        return values

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return sums over all ranks: the last stages have computed parts of each value."""
        return dict(zip(values, self.engine.all_reduce_sum(*values.values())))

    def call_once(self, make: Callable[[], Any]) -> Any:
        """Return the value of make(), which rank 0 calls, as all ranks share the global batch."""
        return broadcast_object_from_rank0(make)

    def should_stop(self, signals: list[int]) -> bool:
        """Return whether any rank has received a signal.

        End all ranks if one cannot read the rows of the next step.
        """
        own = READER_FAILED if self.rows and self.rows.failure() else max(signals, default=0)
        largest = largest_on_ranks(own, self.device)
        if largest == READER_FAILED:
            call_on_ranks(self.raise_failure)
        self.rows_are_ready = True
        return append_signal(signals, largest)

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        dist.barrier()

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return the value of make(), which only rank 0 calls."""
        return broadcast_object_from_rank0(make)

    # ── Checkpoints ──

    def save_checkpoint(
        self, folder: Path, values: dict, tensors: dict[str, Tensor], ema: EMA | None, about: dict
    ) -> None:
        """Start to write a checkpoint; `wait_for_checkpoint` waits until it is complete."""
        extra = None
        if self.is_main:
            optimizer_steps = self.engine.optimizer.step_count
            counters = {"optimizer_steps": optimizer_steps, "ema_t": ema.t if ema else 0}
            extra = values | counters, tensors, about
        self.checkpointer.save(self.engine, folder, extra, ema)

    def export_weights(self, folder: Path) -> None:
        """Write the model as a Hugging Face directory, each rank its part."""
        with track_operation("weights for the engines", range(self.mesh.world)):
            write_hf_shards(self.engine, folder)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is complete."""
        self.checkpointer.wait()

    def find_damage(self, folder: Path) -> str | None:
        """Return what is damaged in a checkpoint; each rank verifies its share of the files."""
        return find_damage_on_ranks(folder)

    def load_checkpoint(self, folder: Path, ema: EMA | None) -> tuple[dict, dict[str, Tensor]]:
        """Load this rank's part of a checkpoint; return the values and tensors saved with it."""
        if ema:
            ema.wait()  # its thread reads the weights
        own = sharded.held_ranges(self.engine, ema)
        call_on_ranks(partial(native.fill_tensors, folder, own))
        self.engine.optimizer.gather_weights()
        values = read_json(folder / STATE)
        self.engine.optimizer.step_count = values["optimizer_steps"]
        if ema:
            ema.t = values["ema_t"]
        return values, native.read_other_tensors(folder, own)


def default_capacity(config: TrainConfig, device: torch.device) -> float:
    """Return --dispatch-capacity or its default, which depends on the device."""
    if config.dispatch_capacity is None:
        return CUDA_CAPACITY if device.type == "cuda" else 0.0
    return config.dispatch_capacity


def with_zero_bubble(backends: tuple[str, ...]) -> tuple[str, ...]:
    """Return the backends with `zero_bubble` before those that cannot defer weight gradients."""
    if "torch" not in backends:
        raise UserError(
            f"DSV3_BACKEND={','.join(backends)} does not run on several ranks: append ,torch"
        )
    i = min(backends.index(name) for name in ("cpu", "torch") if name in backends)
    return *backends[:i], "zero_bubble", *backends[i:]
