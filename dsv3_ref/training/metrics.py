"""metrics.jsonl: one row per step, consistent with the checkpoints of the run."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dsv3_ref.checkpoints import atomic
from dsv3_ref.config import UserError
from dsv3_ref.data.progress import ProgressBar
from dsv3_ref.training.loggers import LOGGERS, WriteRow
from dsv3_ref.training.settings import METRICS, TrainConfig, flatten_options


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
def open_log(config: TrainConfig, run_dir: Path, step: int, num_steps: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to metrics.jsonl, to --log and to the progress bar."""
    metrics = MetricsWriter(run_dir / METRICS, step)
    with ExitStack() as stack:
        bar = ProgressBar(total=num_steps, initial=step, unit="step", smoothing=0.05)
        stack.enter_context(bar)
        stack.enter_context(metrics)
        options = flatten_options(config)
        writers: list[WriteRow] = [metrics.write]
        for name in dict.fromkeys(config.log):
            writers.append(stack.enter_context(LOGGERS[name](run_dir, options, step)))

        def write(row: dict[str, Any]) -> None:
            for write_row in writers:
                write_row(row)
            loss = f"skipped: {row['skipped']}" if row["skipped"] else f"loss {row['loss']:.3f}"
            tokens = f"{row['tokens_per_s']:,.0f} tokens/s"
            bar.set_postfix_str(f"{loss}, {tokens}", refresh=False)
            bar.update(row["step"] - bar.n)

        yield write
