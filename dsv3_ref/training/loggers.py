"""`--log`: rows of metrics for TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

All three write to the run's directory and send nothing. WANDB_MODE and MLFLOW_TRACKING_URI, which
their packages read, choose a server instead.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from dsv3_ref.config import UserError

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
WriteRow = Callable[[dict[str, Any]], None]
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def require_packages(names: tuple[LoggerName, ...]) -> None:
    """Raise a `UserError` if the package of a logger is missing."""
    for name in names:
        try:
            import_module(PACKAGES[name])
        except ImportError:
            raise UserError(f"--log {name} needs: pip install 'dsv3-ref[{name}]'") from None


def flatten_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row; MTP losses are `mtp_loss/1`, `mtp_loss/2`, …."""
    values = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
    losses = enumerate(row["mtp_loss"], 1)
    return values | {f"mtp_loss/{depth}": x for depth, x in losses if x is not None}


@contextmanager
def open_tensorboard(run_dir: Path, options: dict[str, Any], step: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to `run_dir/tensorboard`.

    TensorBoard hides the rows after `step` that an earlier process has written.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run_dir / "tensorboard", purge_step=step + 1) as writer:

        def write(row: dict[str, Any]) -> None:
            for name, value in flatten_row(row).items():
                writer.add_scalar(name, value, row["step"])

        yield write


@contextmanager
def open_wandb(run_dir: Path, options: dict[str, Any], step: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to `run_dir/wandb`; `wandb sync` uploads it later.

    A resumed run keeps its id. Rows have a step of their own, because wandb drops a row whose step
    is not above the last one, as after a rollback.
    """
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    name = str(run_dir.resolve())
    run = wandb.init(
        project="dsv3-ref", name=run_dir.name, id=hashlib.sha256(name.encode()).hexdigest()[:16],
        dir=str(run_dir), config=options, resume="allow", settings={"silent": True},
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    try:
        yield lambda row: run.log(flatten_row(row) | {"step": row["step"]})
    finally:
        run.finish()


@contextmanager
def open_mlflow(run_dir: Path, options: dict[str, Any], step: int) -> Iterator[WriteRow]:
    """Yield a function that writes a row to `run_dir/mlruns`, a file store.

    A resumed run is the same run of MLflow if its store has one of that name.
    """
    import mlflow

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir.resolve() / "mlruns").as_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    name = "dsv3-ref"
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    known = [x for x in client.search_runs([number]) if x.info.run_name == run_dir.name]
    run = known[0] if known else client.create_run(number, run_name=run_dir.name)
    if not known:
        for key, value in options.items():
            client.log_param(run.info.run_id, key, value)

    def write(row: dict[str, Any]) -> None:
        for key, value in flatten_row(row).items():
            client.log_metric(run.info.run_id, key, value, step=row["step"])

    try:
        yield write
    finally:
        client.set_terminated(run.info.run_id)


LOGGERS: dict[
    str, Callable[[Path, dict[str, Any], int], AbstractContextManager[WriteRow]]
] = {"tensorboard": open_tensorboard, "wandb": open_wandb, "mlflow": open_mlflow}  # fmt: skip
