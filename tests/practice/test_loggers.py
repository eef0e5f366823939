"""`--log tensorboard|wandb|mlflow`: the rows of metrics.jsonl, offline, in the run's directory.

Weights & Biases and MLflow are stand-ins with the documented calls, and themselves where they are
installed.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import miniruns
import pytest
from miniruns import metrics, options

from dsv3_ref.cli.main import main

SHORT = ["--steps", "2", "--save-every", "1"]


pytestmark = pytest.mark.usefixtures("without_reports")

# ── Stand-ins ──


class FakeWandb:
    """wandb.init, Run.define_metric, Run.log, Run.finish."""

    def __init__(self):
        self.runs = []

    def init(self, *, project, name, id, dir, config, resume, settings):  # noqa: A002
        run = SimpleNamespace(id=id, dir=Path(dir), config=config, rows=[], finished=False)
        run.define_metric = lambda glob, step_metric: None
        run.log = run.rows.append
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


class FakeMlflowClient:
    """The calls of mlflow.MlflowClient that write experiments, runs, parameters and metrics."""

    stores: dict[str, "FakeMlflowClient"] = {}

    def __new__(cls, tracking_uri):
        if tracking_uri not in cls.stores:
            store = super().__new__(cls)
            store.experiment, store.runs = None, []
            store.params, store.values = {}, []
            cls.stores[tracking_uri] = store
        return cls.stores[tracking_uri]

    def get_experiment_by_name(self, name):
        return self.experiment

    def create_experiment(self, name):
        self.experiment = SimpleNamespace(experiment_id="1", name=name)
        return "1"

    def search_runs(self, experiment_ids):
        return self.runs

    def create_run(self, experiment_id, run_name):
        info = SimpleNamespace(run_id=str(len(self.runs)), run_name=run_name, status="RUNNING")
        self.runs.append(SimpleNamespace(info=info))
        return self.runs[-1]

    def log_param(self, run_id, key, value):
        assert key not in self.params, "a parameter of MLflow cannot change"
        self.params[key] = value

    def log_metric(self, run_id, key, value, step):
        self.values.append((key, value, step))

    def set_terminated(self, run_id):
        self.runs[int(run_id)].info.status = "FINISHED"


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    module = SimpleNamespace(MlflowClient=FakeMlflowClient)
    monkeypatch.setattr(FakeMlflowClient, "stores", {})
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return module


def resumed(home, run: Path, name: str) -> list[dict]:
    """Train two steps with a logger, remove the last checkpoint, resume; return the rows."""
    assert main(options(home, run, "--log", name, *SHORT)) == 0
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    assert main(["train", "--resume", "--out", str(run), "--log", name]) == 0
    return metrics(run)


def test_wandb_is_offline_and_keeps_its_id_when_resumed(home, tmp_path, wandb):
    rows = resumed(home, tmp_path / "run", "wandb")
    first, second = wandb.runs
    assert first.id == second.id and first.finished and second.finished
    assert first.dir == tmp_path / "run" and first.config["model.dim"] == miniruns.MINI["dim"]
    logged = first.rows + second.rows
    assert [row["step"] for row in logged] == [1, 2, 2]
    assert logged[0]["loss"] == rows[0]["loss"] and "mtp_loss/1" in logged[0]
    assert not any(isinstance(value, list) for value in logged[0].values())
    assert os.environ["WANDB_MODE"] == "offline"


def test_mlflow_writes_a_file_store_and_one_run(home, tmp_path, mlflow):
    rows = resumed(home, tmp_path / "run", "mlflow")
    (uri, store), *others = FakeMlflowClient.stores.items()
    assert not others and uri == (tmp_path / "run" / "mlruns").as_uri()
    assert [x.info.status for x in store.runs] == ["FINISHED"]
    assert [(v, s) for k, v, s in store.values if k == "loss"] == [
        (rows[0]["loss"], 1), (rows[1]["loss"], 2), (rows[1]["loss"], 2),
    ]  # fmt: skip
    assert store.params["seed"] == 0


def test_a_server_is_used_where_the_package_names_one(home, tmp_path, wandb, mlflow, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    argv = options(home, tmp_path / "run", "--log", "wandb", "mlflow", "tensorboard", *SHORT)
    assert main(argv) == 0
    assert list(FakeMlflowClient.stores) == ["http://localhost:5000"]
    assert (tmp_path / "run" / "tensorboard").is_dir() and len(wandb.runs) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_a_sentence_before_anything_is_written(
    name, home, tmp_path, monkeypatch, capsys
):
    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == name or module == "torch.utils.tensorboard":
            raise ImportError(module)
        return real(module, *args, **kwargs)

    real = importlib.import_module
    monkeypatch.setattr("dsv3_ref.training.loggers.import_module", refuse)
    assert main(options(home, tmp_path / "a" / "run", "--log", name)) == 2
    assert capsys.readouterr().err == f"error: --log {name} needs: pip install 'dsv3-ref[{name}]'\n"
    assert list(tmp_path.iterdir()) == []


# ── The packages themselves ──


def needs(module: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


@needs("mlflow")
def test_mlflow_itself(home, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = resumed(home, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    number = client.get_experiment_by_name("dsv3-ref").experiment_id
    (run,) = client.search_runs([number])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {(x.step, x.value) for x in history} == {(r["step"], r["loss"]) for r in rows}
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "0"


@needs("wandb")
def test_wandb_itself(home, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    resumed(home, tmp_path / "run", "wandb")
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.glob("*.wandb")) for folder in folders) and folders
