"""Checkpoints of a run: written whole, the newest and the best kept, read by --resume."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dsv3_ref.checkpoints import atomic
from dsv3_ref.checkpoints.layout import STATE
from dsv3_ref.checkpoints.native import list_checkpoints
from dsv3_ref.config import UserError

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run


class Checkpointer:
    """Saves and loads the checkpoints of a run, `run_dir/checkpoints/step_…`."""

    def __init__(self, run: "Run"):
        self.run, self.run_dir, self.strategy = run, run.run_dir, run.strategy

    def save(self, row: dict, is_planned: bool, is_final: bool) -> None:
        """Write all that a run is, its metrics on disk before it, and drop old checkpoints.

        row: the metrics of the step, with those of validation if the checkpoint is planned. One
        that a signal asked for is not, and is not ranked. is_final: wait until it is complete.
        """
        state, task = self.run.state, self.run.task
        if state.ema:
            state.ema.wait()
        values, tensors = {}, {}
        if self.strategy.is_main:
            atomic.fsync_path(self.run_dir / "metrics.jsonl")
            values, tensors = state.state_dict()
            monitored = {"name": task.monitor, "mode": task.monitor_mode}
            values["monitored"] = None
            if is_planned:
                values["monitored"] = monitored | {"value": row[task.monitor]}
        if self.strategy.saves_async:
            self.settle()
        folder = self.run_dir / "checkpoints" / f"step_{state.step:07}"
        try:
            self.strategy.save_checkpoint(folder, values, tensors, state.ema)
        except UserError as e:
            raise UserError(f"{e}. {describe_last(self.run_dir)}") from e
        if is_final or not self.strategy.saves_async:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint being written, then drop old ones."""
        self.strategy.wait_for_checkpoint()
        if self.strategy.is_main and list_checkpoints(self.run_dir):
            prune(self.run_dir, self.run.config.keep_latest_k)
        self.strategy.barrier()

    def load_latest(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        if self.strategy.is_main:
            atomic.clean_temp(self.run_dir / "checkpoints")
        self.strategy.barrier()
        if checkpoints := list_checkpoints(self.run_dir):  # else it was killed before the first
            self.load(checkpoints[-1])

    def load(self, folder: Path, data: bool = True) -> None:
        """Load a checkpoint; without `data` the data position stays."""
        state = self.run.state
        try:
            values, tensors = self.strategy.load_checkpoint(folder, state.ema)
            state.load_state_dict(values, tensors, data)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as e:
            earlier = [
                step_number(path)
                for path in list_checkpoints(self.run_dir)
                if step_number(path) < step_number(folder)
            ]
            raise UserError(
                f"the checkpoint {folder} is damaged ({e}): delete it, and --resume "
                f"goes on from step {earlier[-1] if earlier else 0}"
            ) from None

    def find_rollback(self) -> Path | None:
        """Return the newest planned checkpoint that was not taken among skipped steps."""
        if self.strategy.saves_async:
            self.settle()
        return self.strategy.broadcast(lambda: (rollback_point(self.run_dir),))[0]

    def roll_back_to(self, folder: Path) -> None:
        """Load a checkpoint in everything but the data, and drop the later ones."""
        if self.strategy.is_main:
            drop_after(self.run_dir, folder)
        self.strategy.barrier()
        state = self.run.state
        seconds = state.seconds
        self.load(folder, data=False)
        state.seconds, state.spike_guard.last_rollback = seconds, state.step


def step_number(folder: Path) -> int:
    """Return the step of a checkpoint: `step_0000012` → 12."""
    return int(folder.name.removeprefix("step_"))


def describe_last(run_dir: Path) -> str:
    """Return a sentence that says where the newest checkpoint is."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return "No checkpoint was written yet."
    return f"The last good checkpoint is {checkpoints[-1]}."


def prune(run_dir: Path, keep_latest_k: int) -> None:
    """Keep the newest k planned checkpoints, the best of them, and whatever is newest."""
    checkpoints, scores = list_checkpoints(run_dir), {}
    for folder in checkpoints:
        monitored = atomic.read_json(folder / STATE)["monitored"]
        if monitored:
            sign = 1 if monitored["mode"] == "min" else -1
            scores[folder] = sign * monitored["value"]
    planned = list(scores)
    best = sorted(planned, key=scores.__getitem__)[:1]
    keep = {checkpoints[-1], *planned[-keep_latest_k:], *best}
    for folder in checkpoints:
        if folder not in keep:
            atomic.remove_dir(folder)


def rollback_point(run_dir: Path) -> Path | None:
    """Return the newest planned checkpoint that was not taken among skipped steps."""
    for folder in reversed(list_checkpoints(run_dir)):
        state = atomic.read_json(folder / STATE)
        if state["monitored"] and not state["spike_guard"]["consecutive_skips"]:
            return folder
    return None


def drop_after(run_dir: Path, last: Path) -> None:
    """Remove the checkpoints after the one that a run goes back to."""
    for folder in list_checkpoints(run_dir):
        if step_number(folder) > step_number(last):
            atomic.remove_dir(folder)
