"""The `Strategy` protocol, which says where a task runs, and the strategy of one process."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3_ref import ops
from dsv3_ref.checkpoints import manifest, native
from dsv3_ref.checkpoints.atomic import atomic_dir, read_json
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.layout import STATE, TENSORS
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.checkpoints.storage import whole_ranges
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.optim import AdamW, TrainingRecipe, build_adamw
from dsv3_ref.pretrain import StepStats, train_step
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.objective import Readout, RowBatch, read_hidden_states
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.task import Batch, Data, RowTask, Task

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run

Item = TypeVar("Item")


class StepHyperparams(NamedTuple):
    """The arguments of `pretrain.train_step` after the micro-batches, in its order."""

    recipe: TrainingRecipe
    lr: float
    bias_update_rate: float
    mtp_weight: float
    grad_norm_limit: float


class Strategy(Protocol):
    """The processes that compute a run: they hold the model, take steps, save and load.

    Every process of a run has one strategy object. If all its ranks see the global batch (one
    process, a mesh), `shard`, `all_gather` and `all_reduce` return their argument.
    """

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    @property
    def model(self) -> nn.Module:
        """The parameters that this process holds, as a module."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of those parameters."""

    @property
    def is_main(self) -> bool:
        """True on the process that writes files and messages."""

    @property
    def dp_size(self) -> int:
        """The number of processes among which `shard` divides work."""

    @property
    def saves_async(self) -> bool:
        """True if `save_checkpoint` returns before the checkpoint is complete."""

    @property
    def num_params(self) -> int:
        """The number of parameters of the whole model."""

    @property
    def description(self) -> str:
        """The device or devices, for the start message."""

    def build_data(self, task: Task) -> Data:
        """Build a task's data on every rank, with a loader of this rank's part."""

    def build_model(self, task: Task, init: Path | None) -> None:
        """Build model and optimizer of a task; with `init`, load the model's weights."""

    def precision_context(self) -> AbstractContextManager[None]:
        """Return a context that computes products in the run's precision."""

    def begin_step(self, step: int) -> None:
        """Prepare this process for a step."""

    def next_rows(self, run: "Run", n: int) -> Batch:
        """Return this process's part of the next n rows of the data, on the device."""

    def train_step(self, run: "Run", batch: Batch, hyperparams: StepHyperparams) -> StepStats:
        """Take one optimizer step on a minibatch of the run's task."""

    def nll(self, task: RowTask, rows_bs: Tensor) -> float:
        """Return Σ −log p over the targets of validation rows, in nats."""

    def updated_weights(self) -> dict[str, Tensor]:
        """Return the weights that a moving average follows: this process's masters, by name."""

    def refresh_model(self) -> None:
        """Compute the model's weights from changed masters; a collective call."""

    def load_frozen(self, task: Task, directory: Path) -> Any:
        """Return a second model for `read_out`, without optimizer and gradients.

        It has the shape of the trained model, is divided among ranks alike, and has the weights of
        `directory`.
        """

    def read_out(
        self, task: Task, batch: RowBatch, readout: Readout, width: int, frozen: Any = None,
    ) -> Tensor:  # fmt: skip
        """Return `width` values of each row by a forward pass without gradients, (b, width).

        frozen: the result of `load_frozen`; None: the trained model.
        """

    def expert_biases(self) -> list[Tensor | None]:
        """Return the gate biases of all MoE layers."""

    def step_metrics(self) -> dict[str, Any]:
        """Return the communication metrics of the last step."""

    def straggler_metrics(self, seconds: float) -> dict[str, Any]:
        """Return which process computed longest in a step of so many seconds."""

    def load_whole_model(self, run_dir: Path) -> Transformer | None:
        """Return the whole model of the checkpoint just written, to sample from.

        Return None, after a message that says how to sample from it, if it does not fit.
        """

    def shard(self, items: list[Item]) -> list[Item]:
        """Return this process's part of a list."""

    def all_gather(self, items: list[Item]) -> list[Item]:
        """Return the parts of all processes as one list, in the order it had before `shard`."""

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Return sums over all processes of what each has counted in its part of a batch."""

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return sums over all processes of what each has computed, with the same names on all."""

    def call_once(self, make: Callable[[], Item]) -> Item:
        """Return the value of make(), called by one of the processes that share a batch's part."""

    def should_stop(self, signals: list[int]) -> bool:
        """Return whether any process has received a signal to stop."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def broadcast(self, make: Callable[[], Item]) -> Item:
        """Return the value of make(), called on the main process only."""

    def save_checkpoint(
        self,
        folder: Path,
        values: dict[str, Any],
        tensors: dict[str, Tensor],
        ema: EMA | None,
        about: dict[str, Any],
    ) -> None:
        """Write model, optimizer and averaged weights, and these values and tensors of the run.

        about: what the manifest records about the run.
        """

    def export_weights(self, folder: Path) -> None:
        """Write the model as a Hugging Face directory for engines, each rank its part."""

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint being written is complete."""

    def find_damage(self, folder: Path) -> str | None:
        """Return a description of damage to a checkpoint, on all processes, or None."""

    def load_checkpoint(
        self, folder: Path, ema: EMA | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load model, optimizer and averaged weights; return the run's values and tensors."""


def pick_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA if it is available, else the CPU.

    Raise a `UserError` if the device or the backends of DSV3_BACKEND cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise UserError(
            f"device {name!r} cannot be used: {reason}; --device auto chooses one"
        ) from None
    require_backends(name)
    return torch.device(name)


def require_backends(device: str) -> None:
    """Raise a `UserError` if a backend of DSV3_BACKEND is unknown or needs another device."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if "triton" in ops.ACTIVE_BACKENDS and not device.startswith("cuda") and not is_interpreted:
        raise UserError(
            f"DSV3_BACKEND={','.join(ops.ACTIVE_BACKENDS)} needs an NVIDIA GPU, and the device is "
            f"{device}: unset it, or set it to cpu,torch"
        )
    with ops.use(*ops.ACTIVE_BACKENDS):
        pass


def state_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of AdamW's moments."""
    return torch.bfloat16 if config.optimizer_dtype == "bf16" else torch.float32


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16", "fp8"]:
    """Return what --precision means on a device: `auto` is fp32 on CPU and bf16 on CUDA."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return cast(Literal["fp32", "bf16", "fp8"], precision)


@contextmanager
def use_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute matrix products in bf16 by autocast, or in FP8 by the backend `fp8`."""
    on_gpu = device.type == "cuda"
    bf16 = precision == "bf16" or (on_gpu and precision != "fp32")
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        if precision == "fp8":
            stack.enter_context(ops.use("fp8", *ops.ACTIVE_BACKENDS))
        yield


class SingleProcess:
    """One process with the whole model, the whole batch and all the data."""

    is_main: bool = True
    dp_size: int = 1
    saves_async: bool = False

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = pick_device(config.device)

    @property
    def num_params(self) -> int:
        """The number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def description(self) -> str:
        """The name of the device."""
        return str(self.device)

    def build_data(self, task: Task) -> Data:
        """Return the task's data."""
        return task.build_data()

    def build_model(self, task: Task, init: Path | None) -> None:
        """Build model and optimizer of a task; with `init`, load the model's weights."""
        config = task.config
        self.model = Transformer(config.model).to(self.device)
        if init:
            native.load_into(self.model, init, verify=config.verify)
        self.optimizer = build_adamw(self.model, config.recipe, state_dtype(config))

    def precision_context(self) -> AbstractContextManager[None]:
        """Return a context that computes products in the run's precision."""
        return use_precision(self.config.precision, self.device)

    def begin_step(self, step: int) -> None:
        """Do nothing: one process needs no preparation."""

    def next_rows(self, run: "Run", n: int) -> Batch:
        """Return the next n rows of the data, on the device."""
        assert run.data.loader is not None, "the data has rows"
        return run.data.loader.next_batch(n).to(self.device)

    def train_step(self, run: "Run", batch: Batch, hyperparams: StepHyperparams) -> StepStats:
        """Take one optimizer step on a minibatch of the run's task."""
        task = run.task
        return train_step(
            self.model, self.optimizer, task.micro_batches(run, batch), *hyperparams,
            task.loss, task.loss_weight, self.reduce_step,
        )  # fmt: skip

    def reduce_step(self, model: nn.Module, sums: Tensor, load_le: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses and loads, which are those of the whole batch."""
        return sums, load_le

    def nll(self, task: RowTask, rows_bs: Tensor) -> float:
        """Return Σ −log p over the targets of validation rows, in nats."""
        return task.nll(self.model, rows_bs)

    def updated_weights(self) -> dict[str, Tensor]:
        """Return the parameters, which are their own masters."""
        return dict(self.model.named_parameters())

    def refresh_model(self) -> None:
        """Do nothing: the masters are the model's weights."""

    def load_frozen(self, task: Task, directory: Path) -> Transformer:
        """Return the model of a directory in fp32, which is not trained."""
        model = native.load(directory, dtype=torch.float32, verify=task.config.verify)
        return model.to(self.device).requires_grad_(False)

    @torch.no_grad()
    def read_out(
        self, task: Task, batch: RowBatch, readout: Readout, width: int, frozen: Any = None,
    ) -> Tensor:  # fmt: skip
        """Return `width` values of each row by a forward pass without gradients, (b, width)."""
        model = frozen or self.model
        values = []
        for part in batch.split(task.config.micro_batch):
            values.append(read_hidden_states(task.objective, model, part, readout)[0])
        return torch.cat(values)

    def expert_biases(self) -> list[Tensor | None]:
        """Return the gate biases of all MoE layers."""
        return [m.gate.bias for m in moe_layers(self.model).values()]

    def step_metrics(self) -> dict[str, Any]:
        """Return no metrics: one process does not communicate."""
        return {}

    def straggler_metrics(self, seconds: float) -> dict[str, Any]:
        """Return no metrics: one process waits for no other."""
        return {}

    def load_whole_model(self, run_dir: Path) -> Transformer:
        """Return the model, which is whole."""
        return self.model

    def shard(self, items: list[Item]) -> list[Item]:
        """Return the items."""
        return items

    def all_gather(self, items: list[Item]) -> list[Item]:
        """Return the items."""
        return items

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values."""
        return values

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values, summed like those of `all_reduce`."""
        return self.all_reduce(values)

    def call_once(self, make: Callable[[], Item]) -> Item:
        """Return the value of make(): no other process has this part of a batch."""
        return make()

    def should_stop(self, signals: list[int]) -> bool:
        """Return whether this process has received a signal."""
        return bool(signals)

    def barrier(self) -> None:
        """Do nothing: there is no other process to wait for."""

    def broadcast(self, make: Callable[[], Item]) -> Item:
        """Return the value of make()."""
        return make()

    def save_checkpoint(
        self,
        folder: Path,
        values: dict[str, Any],
        tensors: dict[str, Tensor],
        ema: EMA | None,
        about: dict[str, Any],
    ) -> None:
        """Write model, optimizer and averaged weights, and these values and tensors of the run.

        about: what the manifest records about the run.
        """
        moments, steps = optimizer_tensors(self.model, self.optimizer)
        tensors = tensors | moments | steps
        values = values | {"optimizer_steps": max_step(steps), "ema_t": ema.t if ema else 0}
        if ema:
            tensors |= {f"ema.{name}": x for name, x in ema.mean.items()}
        weights = self.model.state_dict()
        with atomic_dir(folder) as tmp:
            native.write_safetensors(tmp, asdict(self.config.model), weights, native.SHARD_BYTES)
            save_file({name: x.cpu() for name, x in tensors.items()}, tmp / TENSORS)
            (tmp / STATE).write_text(json.dumps(values), encoding="utf-8")
            manifest.write_manifest(tmp, about)

    def export_weights(self, folder: Path) -> None:
        """Write the model as a Hugging Face directory."""
        save_hf(self.model, folder)

    def wait_for_checkpoint(self) -> None:
        """Do nothing: `save_checkpoint` returns when the checkpoint is complete."""

    def find_damage(self, folder: Path) -> str | None:
        """Return a description of damage to a checkpoint, or None."""
        return manifest.find_damage(folder)

    def load_checkpoint(
        self, folder: Path, ema: EMA | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load model, optimizer and averaged weights; return the run's values and tensors."""
        values = read_json(folder / STATE)
        if ema:
            ema.wait()  # its thread reads the weights
            ema.t = values["ema_t"]
        moments, steps = optimizer_tensors(self.model, self.optimizer)
        whole = {f"model.{name}": x for name, x in self.model.state_dict().items()} | moments
        if ema:
            whole |= {f"ema.{name}": x for name, x in ema.mean.items()}
        targets: dict[str, FlatRange] = {}
        for name, x in whole.items():
            targets |= whole_ranges(name, x)
        with torch.no_grad():
            native.fill_tensors(folder, targets)
            tensors = native.read_other_tensors(folder, targets)
            for name, step in steps.items():
                step.copy_(tensors.get(name, torch.tensor(values["optimizer_steps"])))
        return values, tensors


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return AdamW's own tensors: moments as `exp_avg.<parameter>`, step counts as `step.<…>`.

    A parameter without state, because it has had no gradient, gets that of step 0.
    """
    assert isinstance(optimizer, AdamW)
    moments: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not optimizer.state[p]:
            optimizer.state[p] = optimizer.init_state(p)
        state = dict(optimizer.state[p])
        steps[f"step.{name}"] = state.pop("step")
        moments |= {f"{kind}.{name}": x for kind, x in state.items()}
    return moments, steps


def max_step(steps: dict[str, Tensor]) -> int:
    """Return the largest step count of a parameter."""
    return max(int(step) for step in steps.values())
