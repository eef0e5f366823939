"""metrics.jsonl and TensorBoard: one row per step, consistent with the checkpoints of the run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv3_ref.checkpoints import atomic
from dsv3_ref.config import UserError
from dsv3_ref.training.settings import METRICS, TrainConfig

WriteRow = Callable[[dict[str, Any]], None]


def ignore_row(row: dict[str, Any]) -> None:
    """Do nothing with a row: it is logged elsewhere or not at all."""


class MetricsWriter:
    """A writer of metrics.jsonl, one row per step, that first drops rows after the checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if step and not is_row(lines[step - 1 : step], step):
            raise UserError(
                f"{path} is damaged: it lacks the row of step {step}, the step of the newest "
                "checkpoint. Restore a complete copy, or delete the checkpoints after its last row"
            )
        self.cut(lines, step)

    def cut(self, lines: list[bytes], step: int) -> None:
        """Keep only the rows up to a step."""
        self.step = step
        part = self.path.with_suffix(".part")
        part.write_bytes(b"".join(lines[:step]))
        atomic.fsync_path(part)
        part.replace(self.path)

    def __enter__(self) -> "MetricsWriter":
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; after a rollback, first drop the rows of the steps that are taken again."""
        if row["step"] <= self.step:
            self.file.close()
            self.cut(self.path.read_bytes().splitlines(keepends=True), row["step"] - 1)
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.step = row["step"]


def is_row(lines: list[bytes], step: int) -> bool:
    """Return whether the first line is the complete row of a step."""
    try:
        return bool(lines) and lines[0].endswith(b"\n") and json.loads(lines[0])["step"] == step
    except (ValueError, LookupError, TypeError):
        return False


def last_row(run_dir: Path) -> dict[str, Any]:
    """Return the last row of metrics.jsonl."""
    return json.loads((run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-1])


@contextmanager
def open_tensorboard(config: TrainConfig, run_dir: Path, step: int) -> Iterator[WriteRow]:
    """Yield a function that logs a row; without --tensorboard it does nothing.

    TensorBoard hides the rows after `step` that an earlier process has written.
    """
    if not config.tensorboard:
        yield ignore_row
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs: pip install 'dsv3-ref[tensorboard]'") from None
    with SummaryWriter(run_dir / "tensorboard", purge_step=step + 1) as writer:

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, row["step"])
            for depth, value in enumerate(row["mtp_loss"], 1):
                if value is not None:
                    writer.add_scalar(f"mtp_loss/{depth}", value, row["step"])

        yield write


@contextmanager
def open_log(config: TrainConfig, run_dir: Path, step: int, num_steps: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to metrics.jsonl, TensorBoard and the progress bar."""
    progress_bar = tqdm(total=num_steps, initial=step, unit="step", smoothing=0.05)
    metrics = MetricsWriter(run_dir / METRICS, step)
    with progress_bar, metrics, open_tensorboard(config, run_dir, step) as write_tensorboard:

        def write(row: dict[str, Any]) -> None:
            metrics.write(row)
            write_tensorboard(row)
            loss = f"skipped: {row['skipped']}" if row["skipped"] else f"loss {row['loss']:.3f}"
            progress_bar.set_postfix_str(f"{loss}, {row['tokens_per_s']:,.0f} tokens/s")
            progress_bar.update(row["step"] - progress_bar.n)

        yield write
