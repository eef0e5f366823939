"""Where a run stands, and the run as a whole: task, strategy, data and state."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.pretrain import StepStats
from dsv3_ref.training import checkpointer
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.spike_guard import SpikeGuard
from dsv3_ref.training.strategy import Strategy
from dsv3_ref.training.task import Data, Loader, Task


class TrainState:
    """Step, tokens, time, data position, random numbers, spike guard and averaged weights."""

    def __init__(self, config: TrainConfig, loader: Loader | None, ema: EMA | None):
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.loader, self.ema = loader, ema
        self.spike_guard = SpikeGuard(
            config.skip_grad_norm_factor, config.grad_norm_window, config.max_skipped_steps
        )
        self.last_stats: StepStats | None = None
        self.rolled_back_from: int | None = None  # for the next metrics row

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        """Return all but model, optimizer and average: values for JSON, and tensors."""
        data, tensors = self.loader.state_dict() if self.loader else ({}, {})
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "spike_guard": self.spike_guard.state_dict(),
            "data": data,
        }
        return values, {f"data.{k}": v for k, v in tensors.items()} | rng_state_dict()

    def load_state_dict(self, values: dict, tensors: dict[str, Tensor], data: bool = True) -> None:
        """Continue where `state_dict` was taken; without `data` the data position stays."""
        self.spike_guard.load_state_dict(values["spike_guard"])
        if data and self.loader:
            self.loader.load_state_dict(values["data"], strip_prefix(tensors, "data."))
        load_rng_state_dict(tensors)
        self.step, self.tokens = values["step"], values["tokens"]
        self.seconds = values["seconds"]


def rng_state_dict() -> dict[str, Tensor]:
    """Return the states of torch's random generators."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_rng_state_dict(tensors: dict[str, Tensor]) -> None:
    """Restore the states of torch's random generators."""
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass
class Run:
    """One run: what is learned, where it runs, its directory, its data, and where it stands."""

    task: Task
    strategy: Strategy
    run_dir: Path
    data: Data
    state: TrainState

    @property
    def config(self) -> TrainConfig:
        return self.task.config

    @property
    def num_steps(self) -> int:
        return len(self.data.batch_size_schedule)

    @property
    def progress(self) -> float:
        """The fraction of the run's rows that has been trained on."""
        sizes = self.data.batch_size_schedule
        return sum(sizes[: self.state.step]) / sum(sizes)

    @property
    def is_new_from_init(self) -> bool:
        """Whether the weights come from --init: it is given, and there is no checkpoint yet."""
        return starts_from_init(self.config, self.run_dir)

    def abort(self, name: str, value: float, more: str = "") -> None:
        """Stop training with an error, because weights that give this value are of no use."""
        raise UserError(
            f"the {name} became {value:.6g} at step {self.state.step}{more}, so training stopped. "
            f"{checkpointer.describe_last(self.run_dir)} A lower --lr usually helps."
        )


def starts_from_init(config: TrainConfig, run_dir: Path) -> bool:
    """Return whether a run takes its weights from --init: it has no checkpoint of its own yet."""
    return config.init is not None and not checkpointer.list_checkpoints(run_dir)


def build_run(task: Task, strategy: Strategy, run_dir: Path) -> Run:
    """Build data, model, optimizer and state of a run at step 0."""
    config = task.config
    data = strategy.build_data(task.build_data)
    torch.manual_seed(config.seed)
    init = config.init if starts_from_init(config, run_dir) else None
    strategy.build_model(config, data, init)
    ema = None
    if config.ema_decay:
        ema = EMA(strategy.model, strategy.optimizer, config.ema_decay)
    run = Run(task, strategy, run_dir, data, TrainState(config, data.loader, ema))
    task.prepare(run)
    return run
