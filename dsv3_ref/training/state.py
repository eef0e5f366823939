"""The state of a run, and the run itself: task, strategy, data and state."""

from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NoReturn

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
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.loader, self.ema = loader, ema
        self.spike_guard = SpikeGuard(
            config.skip_grad_norm_factor, config.grad_norm_window, config.max_skipped_steps
        )
        self.last_stats: StepStats | None = None
        self.rolled_back_from: int | None = None  # for the next metrics row

    def state_dict(self) -> dict[str, Any]:
        """Return everything except model, optimizer and averaged weights."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "spike_guard": self.spike_guard.state_dict(),
            "data": self.loader.state_dict() if self.loader else {},
            "rng": rng_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], with_data: bool = True) -> None:
        """Continue where `state_dict` was taken; without `with_data` keep the data position."""
        self.spike_guard.load_state_dict(state["spike_guard"])
        if with_data and self.loader:
            self.loader.load_state_dict(state["data"])
        load_rng_state_dict(state["rng"])
        self.step, self.tokens = index(state["step"]), index(state["tokens"])
        self.seconds = float(state["seconds"])


def rng_state_dict() -> dict[str, Tensor]:
    """Return the states of torch's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng_state_dict(state: dict[str, Tensor]) -> None:
    """Restore the states of torch's random number generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class Run:
    """A training run: its task, strategy, directory, data and state."""

    task: Task
    strategy: Strategy
    run_dir: Path
    data: Data
    state: TrainState

    @property
    def config(self) -> TrainConfig:
        """The options of the run."""
        return self.task.config

    @property
    def num_steps(self) -> int:
        """The number of training steps."""
        return len(self.data.batch_size_schedule)

    @property
    def progress(self) -> float:
        """The fraction of the run's rows that has been trained on."""
        sizes = self.data.batch_size_schedule
        return sum(sizes[: self.state.step]) / sum(sizes)

    @property
    def is_new_from_init(self) -> bool:
        """True if the weights come from --init: it is set, and the run has no checkpoint yet."""
        return starts_from_init(self.config, self.run_dir)

    def abort(self, name: str, value: float, more: str = "") -> NoReturn:
        """Raise a `UserError` that stops training because of a value, such as a loss of NaN."""
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
    data = strategy.build_data(task)
    torch.manual_seed(config.seed)
    init = config.init if starts_from_init(config, run_dir) else None
    strategy.build_model(task, init)
    ema = None
    if config.ema_decay:
        weights = strategy.updated_weights()
        ema = EMA(weights, strategy.optimizer, config.ema_decay, strategy.refresh_model)
    run = Run(task, strategy, run_dir, data, TrainState(config, data.loader, ema))
    task.prepare(run)
    return run
