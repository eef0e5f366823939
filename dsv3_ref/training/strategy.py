"""Where a task runs: the `Strategy` protocol, and one process that does it all."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv3_ref import ops
from dsv3_ref.checkpoints import manifest, native
from dsv3_ref.checkpoints.atomic import atomic_dir, read_json
from dsv3_ref.checkpoints.layout import STATE, TENSORS
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.optim import AdamW, TrainingRecipe, build_adamw
from dsv3_ref.pretrain import StepStats, train_step
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.task import Data, RowTask

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run


class StepHyperparams(NamedTuple):
    """What an optimizer step needs besides its rows, in the order of `pretrain.train_step`."""

    recipe: TrainingRecipe
    lr: float
    bias_update_rate: float
    mtp_weight: float
    grad_norm_limit: float


class Strategy(Protocol):
    """Where a run is computed: it holds the model, takes steps, and saves and loads it.

    Every process of a run has one. A strategy whose ranks all see the global batch (one process,
    a mesh) gathers and reduces nothing: its `shard`, `all_gather` and `all_reduce` return what
    they get.
    """

    device: torch.device
    model: nn.Module
    """The parameters that this process holds, as a module."""
    optimizer: torch.optim.Optimizer
    is_main: bool
    """Whether this process writes files and messages."""
    dp_size: int
    """Processes among which `shard` divides work."""
    saves_async: bool
    """Whether `save_checkpoint` returns before the checkpoint is complete."""

    @property
    def num_params(self) -> int:
        """The parameters of the whole model."""

    @property
    def description(self) -> str:
        """The device or devices, for the start message."""

    def build_data(self, build: Callable[[], Data]) -> Data:
        """Build the data where it is read; every process gets what it must know of it."""

    def build_model(self, config: TrainConfig, data: Data, init: Path | None) -> None:
        """Build model and optimizer, with the weights of `init` where it is given."""

    def precision_context(self) -> AbstractContextManager[None]:
        """Compute products in the run's precision."""

    def begin_step(self, step: int) -> None:
        """Prepare this process for a step."""

    def broadcast_rows(self, rows: Tensor | None, shape: tuple[int, int], step: int) -> Tensor:
        """Return a batch of rows on the device, read here or by another rank."""

    def train_step(self, run: "Run", batch: Any, hyperparams: StepHyperparams) -> StepStats:
        """Take one optimizer step on a minibatch of the run's task."""

    def nll(self, task: RowTask, rows_bs: Tensor) -> float:
        """Return Σ −log p over the targets of validation rows, in nats."""

    def expert_biases(self) -> list[Tensor | None]:
        """Return the gate biases of all MoE layers."""

    def step_metrics(self) -> dict:
        """Return what the metrics row of a step says about communication."""

    def load_whole_model(self, run_dir: Path) -> nn.Module:
        """Return the whole model as it stands at a checkpoint just written, to sample from."""

    def shard(self, items: list) -> list:
        """Return this process's part of a list."""

    def all_gather(self, items: list) -> list:
        """Return the parts of all processes as one list, in its first order."""

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        """Return sums over all processes."""

    def should_stop(self, signals: list[int]) -> bool:
        """Return whether any process was sent a signal that asks to stop."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Return the value of make(), which the main process alone calls."""

    def save_checkpoint(
        self, folder: Path, values: dict, tensors: dict[str, Tensor], ema: EMA | None, about: dict
    ) -> None:
        """Write model, optimizer and average beside these values for JSON and tensors.

        about: what the manifest says of the run.
        """

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint being written is complete."""

    def find_damage(self, folder: Path) -> str | None:
        """Return what is damaged in a checkpoint, on all processes, or None if it is whole."""

    def load_checkpoint(self, folder: Path, ema: EMA | None) -> tuple[dict, dict[str, Tensor]]:
        """Read model, optimizer and average; return the values and tensors beside them."""


def pick_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def state_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of AdamW's moments."""
    return torch.bfloat16 if config.optimizer_dtype == "bf16" else torch.float32


@contextmanager
def use_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute products in bf16 by autocast, in FP8 by a backend before the active ones."""
    on_gpu = device.type == "cuda"
    bf16 = precision == "bf16" or (on_gpu and precision != "fp32")
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        if precision == "fp8":
            stack.enter_context(ops.use("fp8", *ops.ACTIVE_BACKENDS))
        yield


class SingleProcess:
    """One process with the whole model, the whole batch and all the data."""

    is_main, dp_size, saves_async = True, 1, False

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = pick_device(config.device)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def description(self) -> str:
        return str(self.device)

    def build_data(self, build: Callable[[], Data]) -> Data:
        return build()

    def build_model(self, config: TrainConfig, data: Data, init: Path | None) -> None:
        self.model = Transformer(config.model).to(self.device)
        if init:
            native.load_into(self.model, init, verify=config.verify)
        self.optimizer = build_adamw(self.model, config.recipe, state_dtype(config))

    def precision_context(self) -> AbstractContextManager[None]:
        return use_precision(self.config.precision, self.device)

    def begin_step(self, step: int) -> None:
        """One process needs no preparation."""

    def broadcast_rows(self, rows: Tensor | None, shape: tuple[int, int], step: int) -> Tensor:
        return rows.to(self.device)

    def train_step(self, run: "Run", batch: Any, hyperparams: StepHyperparams) -> StepStats:
        task = run.task
        return train_step(
            self.model, self.optimizer, task.micro_batches(run, batch), *hyperparams,
            task.loss, task.loss_weight, self.reduce_step,
        )  # fmt: skip

    reduce_step: Callable | None = None  # over ranks: see `train_step`

    def nll(self, task: RowTask, rows_bs: Tensor) -> float:
        return task.nll(self.model, rows_bs)

    def expert_biases(self) -> list[Tensor | None]:
        return [m.gate.bias for m in moe_layers(self.model).values()]

    def step_metrics(self) -> dict:
        return {}

    def load_whole_model(self, run_dir: Path) -> nn.Module:
        return self.model

    def shard(self, items: list) -> list:
        return items

    def all_gather(self, items: list) -> list:
        return items

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def should_stop(self, signals: list[int]) -> bool:
        return bool(signals)

    def barrier(self) -> None:
        """There is no other process to wait for."""

    def broadcast(self, make: Callable[[], Any]) -> Any:
        return make()

    def save_checkpoint(
        self, folder: Path, values: dict, tensors: dict[str, Tensor], ema: EMA | None, about: dict
    ) -> None:
        moments, steps = optimizer_tensors(self.model, self.optimizer)
        tensors = tensors | moments | steps
        values = values | {"optimizer_steps": max_step(steps), "ema_t": ema.t if ema else 0}
        if ema:
            tensors |= {f"ema.{name}": x for name, x in ema.mean.items()}
        weights = self.model.state_dict()
        with atomic_dir(folder) as tmp:
            native.write_safetensors(tmp, asdict(self.config.model), weights, native.SHARD_BYTES)
            save_file({name: x.cpu() for name, x in tensors.items()}, tmp / TENSORS)
            (tmp / STATE).write_text(json.dumps(values))
            manifest.write_manifest(tmp, about)

    def wait_for_checkpoint(self) -> None:
        """`save_checkpoint` has already waited."""

    def find_damage(self, folder: Path) -> str | None:
        return manifest.find_damage(folder)

    def load_checkpoint(self, folder: Path, ema: EMA | None) -> tuple[dict, dict[str, Tensor]]:
        values, tensors = read_json(folder / STATE), load_file(folder / TENSORS)
        if ema:
            ema.wait()  # its thread reads the weights
            ema.t = values["ema_t"]
        moments, steps = optimizer_tensors(self.model, self.optimizer)
        targets = {f"model.{name}": x for name, x in self.model.state_dict().items()} | moments
        if ema:
            targets |= {f"ema.{name}": x for name, x in ema.mean.items()}
        with torch.no_grad():
            native.fill_tensors(folder, targets)
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
    """Return the number of optimizer steps of the parameter that has seen most."""
    return max(int(step) for step in steps.values())
