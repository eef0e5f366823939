"""metrics.jsonl: one row per step, consistent with the checkpoints of the run.

The loads and biases of the experts are in the same rows unless there are too many experts; then
they are in gzipped files of their own, in the run's folder `expert_load`.
"""

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from dsv3_ref.checkpoints.atomic import clear_path, open_own
from dsv3_ref.config import UserError
from dsv3_ref.data.progress import ProgressBar
from dsv3_ref.training.loggers import LOGGERS, WriteRow
from dsv3_ref.training.settings import METRICS, TrainConfig, flatten_options

EXPERT_LOAD = "expert_load"  # folder in the directory of a run
PER_EXPERT = ("expert_load", "expert_bias")  # keys whose values grow with experts × layers
MAX_EXPERTS_IN_ROW = 2048  # over all layers; V3 has 14,848
LARGE_EVERY = 10  # steps between rows of larger models


def ignore_row(row: dict[str, Any]) -> None:
    """Do nothing with a row: it is logged elsewhere or not at all."""


class MetricsWriter:
    """A writer of metrics.jsonl, one row per step, that first drops rows after the checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path = path
        open_own(path, "ab").close()
        last = self.cut(step)
        if step and not is_row(last, step):
            raise UserError(
                f"{path} is damaged: it lacks the row of step {step}, the step of the newest "
                "checkpoint. Restore a complete copy, or delete the checkpoints after its last row"
            )

    def cut(self, step: int) -> bytes:
        """Keep only the rows up to a step, if there are so many; return the last of them."""
        self.step, last = step, b""
        with open_own(self.path, "rb+") as file:
            for _ in range(step):
                last = file.readline()
                if not last:  # the step of a damaged checkpoint may be any number
                    break
            if not step or is_row(last, step):
                file.truncate(file.tell())
                os.fsync(file.fileno())
        return last

    def __enter__(self) -> "MetricsWriter":
        self.file = open_own(self.path, "a")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; after a rollback, first drop the rows of the steps that are taken again."""
        if row["step"] <= self.step:
            self.file.close()
            self.cut(row["step"] - 1)
            self.file = open_own(self.path, "a")
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.step = row["step"]


def is_row(line: bytes, step: int) -> bool:
    """Return whether a line is the complete row of a step."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] == step
    except (ValueError, LookupError, TypeError):
        return False


def last_row(run_dir: Path) -> dict[str, Any]:
    """Return the last row of metrics.jsonl."""
    return json.loads((run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-1])


class ExpertLoadWriter:
    """A writer of the loads and biases of experts, which `split` takes out of the metrics rows.

    every: --expert-load-every. Every start of a run writes a file of its own, named by its first
    step; a reader prefers later rows of the same step.
    """

    def __init__(self, folder: Path, step: int, every: int):
        self.path = folder / f"step_{step + 1:07}.jsonl.gz"
        self.every = every
        self.file: TextIO | None = None

    def __enter__(self) -> "ExpertLoadWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def split(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row as metrics.jsonl has it; write the loads of many experts to their file."""
        is_large = sum(map(len, row["expert_load"])) > MAX_EXPERTS_IN_ROW
        is_due = row["step"] % (self.every or (LARGE_EVERY if is_large else 1)) == 0
        if is_due and not is_large:
            return row
        if is_due:
            self.write({key: row[key] for key in ("step", *PER_EXPERT)})
        return row | dict.fromkeys(PER_EXPERT)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, so that it can be read even if the run is killed."""
        if self.file is None:
            self.path.parent.mkdir(exist_ok=True)
            path = clear_path(self.path)
            self.file = gzip.open(path, "wt", encoding="utf-8")  # noqa: SIM115  closed on exit
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


@contextmanager
def open_log(config: TrainConfig, run_dir: Path, step: int, num_steps: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to metrics.jsonl, to --log and to the progress bar."""
    metrics = MetricsWriter(run_dir / METRICS, step)
    with ExitStack() as stack:
        bar = ProgressBar(total=num_steps, initial=step, unit="step", smoothing=0.05)
        stack.enter_context(bar)
        stack.enter_context(metrics)
        options = flatten_options(config)
        loads = ExpertLoadWriter(run_dir / EXPERT_LOAD, step, config.expert_load_every)
        stack.enter_context(loads)
        writers: list[WriteRow] = [metrics.write]
        for name in dict.fromkeys(config.log):
            writers.append(stack.enter_context(LOGGERS[name](run_dir, options, step)))

        def write(row: dict[str, Any]) -> None:
            row = loads.split(row)
            for write_row in writers:
                write_row(row)
            loss = f"skipped: {row['skipped']}" if row["skipped"] else f"loss {row['loss']:.3f}"
            tokens = f"{row['tokens_per_s']:,.0f} tokens/s"
            bar.set_postfix_str(f"{loss}, {tokens}", refresh=False)
            bar.update(row["step"] - bar.n)

        yield write
