"""`dsv3 train` on several ranks: losses of one process, signals, and resuming on another mesh."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from itertools import count
from math import inf
from pathlib import Path
from types import SimpleNamespace

import miniruns
import pytest
import torch
import torch.distributed as dist
from miniruns import (
    Command,
    flip_bit,
    launch,
    metrics,
    options,
    run_command,
    start_ranks,
    timeless,
)

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.layout import SHARD_TABLE
from dsv3_ref.checkpoints.manifest import write_manifest
from dsv3_ref.checkpoints.native import list_checkpoints, load, step_number
from dsv3_ref.parallel import launch as launch_module
from dsv3_ref.parallel import mesh_parallel
from dsv3_ref.parallel.mesh import init_distributed
from dsv3_ref.parallel.mesh_parallel import MeshParallel
from dsv3_ref.parallel.watchdog import HEARTBEAT_S, collective_timeout
from dsv3_ref.training import loop
from dsv3_ref.training.task import continue_texts

DEEP = miniruns.MINI | {"n_layers": 4}
PLAN = "--steps 15 --save-every 5 --start-batch-size 3".split()
PLAN += "--skip-grad-norm-factor 0 --ema-decay 0.9".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        (folder / "mini.json").write_text(json.dumps(DEEP))
        yield folder


def start(home, out, world: int, *more, **variables: str) -> list[Command]:
    """Start a training run on ranks, with more environment variables."""
    argv = options(home, out, *miniruns.override(PLAN, more))
    return launch(home, world, argv, **variables)


def wait_for_exit(processes, code: int = 0) -> list[str]:
    """Return the output of every process after all have exited with this code."""
    outputs = [p.communicate(timeout=180)[0] for p in processes]
    assert [p.returncode for p in processes] == [code] * len(processes), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def one(home):
    wait_for_exit(start(home, home / "one", 1))
    return home / "one"


@pytest.fixture(scope="module")
def two(home):
    wait_for_exit(start(home, home / "two", 2, "--ep", "2"))
    return home / "two"


def keep_checkpoint(run: Path, step: int) -> None:
    """Delete all checkpoints of a run but that of this step."""
    for folder in list_checkpoints(run):
        if step_number(folder) != step:
            shutil.rmtree(folder)


def copy_until(step: int, run: Path, out: Path) -> Path:
    """Copy a run as if it had ended before the first checkpoint after this step."""
    shutil.copytree(run, out)
    keep_checkpoint(out, step)
    return out


def near(got: list[dict], want: list[dict], since: int = 0) -> None:
    """Check that rows are of the same run, up to the order in which sums are rounded.

    At first they agree to the last digits. Later some token has chosen another expert,
    and the losses are only close.
    """
    assert [row["step"] for row in got] == [row["step"] for row in want]
    for a, b in zip(got, want):
        early = a["step"] <= since + 8
        for key in ("loss", "loss_total", "val_loss", "val_loss_ema", "grad_norm"):
            if early or key != "grad_norm":
                slack = 1e-4 if early else 0.02
                assert a[key] == (b[key] and pytest.approx(b[key], rel=slack)), (a["step"], key)
        assert (a["lr"], a["batch_size"], a["tokens"]) == (b["lr"], b["batch_size"], b["tokens"])


def test_four_ranks_train_what_one_trains(one, home):
    run, mesh = home / "four", "--pp 2 --ep 2 --schedule dualpipe".split()
    outputs = wait_for_exit(start(home, run, 4, *mesh, FIGURES="1"))
    near(metrics(run), metrics(one))
    assert [row["loss"] for row in metrics(run)][0] == pytest.approx(metrics(one)[0]["loss"], 1e-6)
    for row in metrics(run):
        assert 0 < row["all_to_all_hidden"] < 1 and row["all_to_all_bytes"]["intranode"] > 0
    assert (
        "4 ranks (pp 2 × dp 1 × ep 2)" in outputs[0] and "<svg" in (run / "report.html").read_text()
    )
    ours, theirs = (
        load(list_checkpoints(run)[0]),
        load(list_checkpoints(one)[0]),
    )  # step 5, still close
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert p.shape == q.shape and torch.allclose(p, q, atol=5e-3), name
    save_hf(ours, home / "export")
    assert torch.equal(load(home / "export").head.weight, ours.head.weight)


def signal_rank_1_in_step_5() -> None:
    """Send rank 1 a scheduler's signal while it trains on its fifth batch."""
    real, steps = loop.train_batch, count(1)

    def train_batch(*args):
        if os.environ["RANK"] == "1" and next(steps) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*args)

    pytest.MonkeyPatch().setattr(loop, "train_batch", train_batch)


def test_a_run_resumes_bit_for_bit_after_a_signal_to_any_rank(two, home):
    run = home / "stopped"
    argv = options(home, run, *miniruns.override(PLAN, ["--ep", "2"]))
    wait_for_exit(start_ranks(2, {}, run_command, home, argv, signal_rank_1_in_step_5), 75)
    assert len(metrics(run)) == 5 and len(list_checkpoints(run))
    wait_for_exit(start(home, run, 2, "--ep", "2", "--resume"))
    assert list(map(timeless, metrics(run))) == list(map(timeless, metrics(two)))


def test_a_run_resumes_on_another_mesh(two, home):
    run = copy_until(5, two, home / "moved")
    wait_for_exit(
        start(home, run, 2, "--ep", "1", "--pp", "2", "--schedule", "dualpipev", "--resume")
    )
    near(metrics(run), metrics(two), since=5)
    assert metrics(run)[4]["loss"] == metrics(two)[4]["loss"]  # before: the same ranks
    assert metrics(run)[5]["loss"] == pytest.approx(metrics(two)[5]["loss"], rel=1e-6)


def test_a_run_moves_between_a_mesh_and_one_process(two, home):
    """The moments of AdamW and the averaged weights move with it."""
    run = copy_until(5, two, home / "wandering")
    wait_for_exit(start(home, run, 1, "--resume", "--ep", "1", "--pp", "1", "--dp", "1"))
    near(metrics(run), metrics(two), since=5)
    assert metrics(run)[5]["loss"] == pytest.approx(metrics(two)[5]["loss"], rel=1e-6)
    keep_checkpoint(run, 10)
    alone = metrics(run)
    wait_for_exit(start(home, run, 2, "--resume", "--ep", "2", "--dp", "1"))
    near(metrics(run), alone, since=10)
    assert metrics(run)[10]["loss"] == pytest.approx(alone[10]["loss"], rel=1e-6)
    assert metrics(run)[10]["grad_norm"] == pytest.approx(alone[10]["grad_norm"], rel=1e-4)


SHORT = "--steps 8 --save-every 3 --ep 2 --hang-timeout 30".split()


def kill_one(processes, rank: int, seconds: float) -> bool:
    """Kill a rank after this time, wait for the others; return whether the run had not ended."""
    try:
        processes[rank].communicate(seconds)
    except subprocess.TimeoutExpired:
        processes[rank].kill()
    for p in processes:
        p.communicate(timeout=90)  # they notice that it is gone
    return any(p.returncode for p in processes)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_kill_9_of_a_rank_at_random_moments(kills, home, tmp_path):
    """Whenever it comes, every later row and every weight are bit for bit the same."""
    began = time.monotonic()
    wait_for_exit(start(home, tmp_path / "undisturbed", 2, *SHORT))
    took, cut = time.monotonic() - began, 0
    want = list(map(timeless, metrics(tmp_path / "undisturbed")))
    weights = load(tmp_path / "undisturbed").state_dict()
    for i in count():
        run, seconds = tmp_path / str(i), random.uniform(0.2 * took, took)
        was_cut = kill_one(start(home, run, 2, *SHORT), i % 2, seconds)
        begun = ["--resume"] if (run / "run.json").exists() else []
        wait_for_exit(start(home, run, 2, *SHORT, *begun))
        assert list(map(timeless, metrics(run))) == want, f"rank {i % 2} after {seconds} seconds"
        for name, x in load(run).state_dict().items():
            assert torch.equal(x, weights[name]), f"{name}, rank {i % 2} after {seconds} seconds"
        took, cut = (took if was_cut else seconds), cut + was_cut
        if cut == kills:
            return


def test_a_damaged_checkpoint_of_ranks_is_set_aside(two, home):
    run = home / "damaged"
    shutil.copytree(two, run)
    newest = list_checkpoints(run)[-1]
    shutil.rmtree(newest)
    newest = list_checkpoints(run)[-1]
    flip_bit(newest / "rank_00001.safetensors", -40)
    outputs = wait_for_exit(start(home, run, 2, "--ep", "2", "--resume"))
    assert sum("rank_00001.safetensors is damaged" in text for text in outputs) == 1
    assert list(map(timeless, metrics(run))) == list(map(timeless, metrics(two)))


def test_an_error_is_printed_once_and_ends_all_ranks(home):
    outputs = wait_for_exit(start(home, home / "wrong", 2, "--data", "nowhere.txt"), 2)
    assert sum("no data at 'nowhere.txt'" in text for text in outputs) == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((1, "--ep", "2"), "--pp 1 × --dp 1 × --ep 2 are 2 ranks, not 1: torchrun --nproc"),
        ((2, "--ep", "2", "--dp", "2"), "are 4 ranks, not 2"),
        ((2, "--pp", "1", "--dp", "1"), "are 1 ranks, not 2"),
        ((2, "--pp", "2", "--schedule", "dualpipev", "--model.n-layers", "3"), "into 4 stages"),
        ((2, "--ep", "2", "--balance-loss-scope", "batch"), "set --balance-loss-scope sequence"),
    ],
)
def test_a_mistake_in_the_mesh_is_reported_once(more, sentence, home):
    """Every rank exits with code 2, and only rank 0 says why."""
    outputs = wait_for_exit(start(home, home / "few", *more), 2)
    assert sentence in outputs[0] and not any(outputs[1:])


@pytest.mark.parametrize("world", [1, 2])
def test_an_incomplete_optimizer_state_of_ranks_is_not_resumed(world, two, home):
    run = home / f"incomplete{world}"
    shutil.copytree(two, run)
    newest = list_checkpoints(run)[-1]
    table = json.loads((newest / SHARD_TABLE).read_text())
    lost = [name for name in table["tensors"] if name.startswith("exp_avg_sq.layers.2.")]
    for name in lost:
        del table["tensors"][name]
    (newest / SHARD_TABLE).write_text(json.dumps(table))
    about = json.loads((newest / "manifest.json").read_text())
    write_manifest(newest, {k: about[k] for k in ("mesh", "fingerprints")})
    mesh = ("--resume", "--ep", str(world), "--pp", "1", "--dp", "1")
    outputs = wait_for_exit(start(home, run, world, *mesh), 2)
    assert lost and "exp_avg_sq.layers.2." in outputs[0]


def test_samples_are_skipped_if_the_model_does_not_fit(monkeypatch, capsys):
    strategy = MeshParallel.__new__(MeshParallel)
    strategy.device, strategy.engine = torch.device("cpu"), SimpleNamespace(num_params=10**9)
    monkeypatch.setattr(mesh_parallel, "free_memory", lambda device: 3.9e9)
    run = SimpleNamespace(strategy=strategy, run_dir="runs/large")
    assert continue_texts(run) == []
    said = capsys.readouterr().out
    assert "4.0 GB exceed 3.9 GB" in said and "dsv3 generate runs/large" in said


def test_torch_aborts_collectives_after_the_watchdog_has_reported(monkeypatch):
    """torch's own limit would be 600 s, below a --hang-timeout of 700."""

    def stop(device, timeout):
        raise TimeoutError(timeout.total_seconds())

    monkeypatch.setattr(launch_module, "init_distributed", stop)
    task = SimpleNamespace(config=SimpleNamespace(hang_timeout=700.0, device="cpu"))
    with pytest.raises(TimeoutError) as reached:
        launch_module.run_on_ranks(task)
    assert reached.value.args[0] > 2 * 700 + HEARTBEAT_S
    assert collective_timeout(2.0).total_seconds() > 2 * 2.0 + HEARTBEAT_S
    assert collective_timeout(inf) > collective_timeout(1e6)


def test_the_slowest_rank_is_named(two):
    for row in metrics(two):
        assert row["slowest_rank"] in (0, 1) and row["slowest_rank_ratio"] >= 1


def test_a_rank_that_hangs_is_named(home):
    run = home / "hung"
    processes = start(home, run, 2, "--ep", "2", "--steps", "3000", "--hang-timeout", "15")
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        time.sleep(0.05)
        assert all(p.poll() is None for p in processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        output = processes[0].communicate(timeout=120)[0]
    finally:
        processes[1].kill()
    assert processes[0].returncode == 70
    assert "hang: held up by rank 1 has not responded" in output
    assert "mesh_parallel.py" in (run / "logs" / "hang-rank0.txt").read_text()  # with its stack


# ── Restarts by torchrun ──


def join_group(rank: int, port: int, restart: int, delay: float) -> None:
    """Join a group of two through torchrun's store, add up a number, and end without a farewell."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart),
    }  # fmt: skip
    time.sleep(delay)
    with init_distributed("cpu", timedelta(seconds=20)):
        x = torch.ones(1)
        dist.all_reduce(x)
        os._exit(0 if x == 2 else 1)


def test_restarted_ranks_do_not_look_for_those_that_have_ended():
    """torchrun keeps its store; the late rank has not written its new address when it is read."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart, delays in enumerate([(0, 0), (1, 0), (0, 1)]):
        ranks = [
            miniruns.FORK.Process(target=join_group, args=(rank, store.port, restart, delay))
            for rank, delay in enumerate(delays)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]


def ranks_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Return the process ids of torchrun's children by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for pid in children:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found |= {int(word[5:]): int(pid) for word in words if word.startswith("RANK=")}
    return found


@pytest.mark.full
def test_torchrun_restarts_a_run_whose_rank_was_killed(home, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += ["--nproc-per-node=2", "-m", "dsv3_ref"]
    command += options(home, run, *"--steps 40 --save-every 2 --ep 2 --device cpu".split())
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log)
        try:
            while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 5:
                assert launcher.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            os.kill(ranks_of(launcher)[1], signal.SIGKILL)
            assert launcher.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            launcher.kill()
    assert [row["step"] for row in metrics(run)] == list(range(1, 41))
