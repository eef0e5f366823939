"""The launchers on a real Slurm of two nodes, started here; `make test-slurm` asks for them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import miniruns
import pytest
from miniruns import metrics, timeless

from dsv3_ref.checkpoints import native
from dsv3_ref.checkpoints.native import step_number

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "slurm_local.sh"
STEPS, EVERY = 300, 100
PLAN = f"--steps {STEPS} --seq-len 32 --save-every {EVERY}".split()
PLAN += "--global-batch-size 4 --warmup-steps 2".split()
MINUTES = 3  # that a job may take, with its restarts
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

pytestmark = pytest.mark.skipif(not os.environ.get("DSV3_SLURM"), reason="make test-slurm")


# ── A cluster, and jobs on it ──


@pytest.fixture(scope="module")
def cluster():
    """The folder of a running Slurm, whose SLURM_CONF every command here then reads.

    Not pytest's: others must be able to enter it, or munge refuses.
    """
    if not shutil.which("slurmctld"):
        pytest.skip("Slurm is not installed and could not be")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="slurm-") as lab, pytest.MonkeyPatch.context() as patch:
        env = os.environ | {"SLURM_LAB": lab, "SLURM_PORT": port}
        subprocess.run([LAB, "up"], env=env, check=True)
        patch.setenv("SLURM_CONF", f"{lab}/slurm.conf")
        yield Path(lab)
        subprocess.run([LAB, "down"], env=env, check=True)


class Job:
    """A launcher's job, and what it left."""

    def __init__(self, home: Path, name: str, launcher: str, options: list[str], **settings: str):
        self.run, self.output = home / name, home / f"{name}.out"
        fixed = {"GPUS": "0", "RUN": self.run, "PREFLIGHT": "--min-net-gb-s 0.001"}
        fixed |= {"SBATCH_OPTIONS": f"--exclusive --output={self.output}"}
        fixed |= {"HF_DATASETS_CACHE": home / "hf", "OMP_NUM_THREADS": "1"}
        env = os.environ | {k: str(v) for k, v in (fixed | settings).items()}
        command = [ROOT / "slurm" / launcher, *options]
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        self.id = re.fullmatch(r"Submitted batch job (\d+)\n", said)[1]

    def field(self, name: str) -> str:
        show = ["scontrol", "--oneliner", "show", "job", self.id]
        said = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        return re.search(rf"\b{name}=(\S+)", said)[1]

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 60 * MINUTES
        while not ready():
            assert time.monotonic() < end, f"{what} did not come:\n{self.said()}"
            time.sleep(0.1)

    def end(self) -> str:
        """Wait for it; the state it ended in."""
        states = []  # read once: a living job is briefly SIGNALING or PREEMPTED, and RUNNING again
        self.wait(lambda: states.append(self.field("JobState")) or states[-1] in ENDED, "the end")
        return states[-1]

    def reach(self, step: int) -> None:
        path = self.run / "metrics.jsonl"

        def has_row() -> bool:
            return path.exists() and path.read_bytes().count(b"\n") >= step

        self.wait(has_row, f"step {step}")

    def said(self) -> str:
        logs = [self.output, *sorted(self.run.glob("logs/*/rank-*.txt"))]
        return "\n".join(f"── {log}\n{log.read_text()[-2000:]}" for log in logs if log.exists())

    def started(self, restart: int) -> str:
        """What rank 0 wrote in a start of the job."""
        return (self.run / "logs" / f"{self.id}.{restart}" / "rank-0.txt").read_text()


def train(home: Path, name: str, more=(), **settings: str) -> Job:
    """A run of the tiny model, its experts on as many ranks as there are nodes that train."""
    fixed = ["--config", home / "mini.json", "--data", home / "text", *PLAN]
    options = [*miniruns.override(fixed, more), "--ep", settings["NODES"]]
    return Job(home, name, "train.sbatch", options, **settings)


@pytest.fixture(scope="module")
def undisturbed(cluster, home):
    """Its rows are what disturbed runs must give too."""
    job = train(home, "undisturbed", **BOTH)
    assert job.end() == "COMPLETED", job.said()
    return job


BOTH = {"NODES": "2"}


def curve(job: Job) -> list[dict]:
    return [timeless(row) for row in metrics(job.run)]


# ── What may befall a job ──


def test_a_job_finishes(undisturbed):
    assert [row["step"] for row in curve(undisturbed)] == list(range(1, STEPS + 1))
    assert undisturbed.field("Restarts") == "0"
    assert (undisturbed.run / "report.html").is_file()
    said = undisturbed.output.read_text()
    for node in ("node1", "node2"):
        assert re.search(
            rf"^{node}  healthy: .* MB/s, .*between nodes all-reduce .* GB/s", said, re.M
        )


def test_a_warned_job_saves_is_queued_again_and_goes_on(undisturbed, home):
    """SIGUSR1 to the ranks, as Slurm sends it before the time is over."""
    job = train(home, "warned", **BOTH)
    job.reach(20)
    subprocess.run(["scancel", "--signal=USR1", job.id], check=True)
    job.wait(lambda: job.field("Restarts") == "1", "the restart")
    saved = step_number(native.list_checkpoints(job.run)[-1])
    assert saved % EVERY or saved == EVERY
    assert job.end() == "COMPLETED", job.said()
    assert "exit code 75: stopped on request" in job.output.read_text()
    assert f"continuing after step {saved}" in job.started(1)
    assert curve(job) == curve(undisturbed)


def test_a_preempted_job_makes_room_and_goes_on(undisturbed, home):
    """SIGTERM to the ranks, as Slurm sends it when a job of higher priority wants the nodes."""
    job = train(home, "preempted", **BOTH)
    job.reach(20)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=true"], check=True, capture_output=True)
    assert job.end() == "COMPLETED", job.said()
    assert "exit code 143: stopped on request" in job.output.read_text()
    assert job.field("Restarts") == "1"
    assert curve(job) == curve(undisturbed)


def test_a_killed_rank_fails_the_job_and_the_retry_recovers(undisturbed, home):
    """From the last planned checkpoint: what came after it is computed again, to the same."""
    job = train(home, "killed", **BOTH)
    job.reach(EVERY + 60)  # the checkpoint is written while training goes on
    os.kill(pid_of_rank(job, 1), signal.SIGKILL)
    assert job.end() == "COMPLETED", job.said()
    assert re.search(r"^exit code \d+: failed, see ", job.output.read_text(), re.M)
    assert f"continuing after step {EVERY}\n" in job.started(1)
    assert job.field("Restarts") == "1"
    assert curve(job) == curve(undisturbed)


def pid_of_rank(job: Job, rank: int) -> int:
    """The process whose environment says so."""
    wanted = {f"SLURM_JOB_ID={job.id}".encode(), f"RANK={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                return int(process.name)
        except OSError:
            continue  # it has just ended, or is not ours
    raise AssertionError(f"no rank {rank} of job {job.id} is running")


def test_a_bad_node_is_dropped_with_its_reason(cluster, home):
    """Python on node1 finds a torch that cannot be loaded; the spare takes its place."""
    alone = train(home, "alone", NODES="1")
    assert alone.end() == "COMPLETED", alone.said()
    broken = home / "broken" / "torch"
    broken.mkdir(parents=True)
    reason = "libcudart.so.12: cannot open shared object file"
    (broken / "__init__.py").write_text(f"raise ImportError({reason!r})\n")
    plant = cluster / "plant.node1"
    plant.write_text(f"export PYTHONPATH={broken.parent}\n")
    try:
        job = train(home, "dropped", NODES="1", SPARES="1")
        assert job.end() == "COMPLETED", job.said()
    finally:
        plant.unlink()
    said = job.output.read_text()
    assert f"node1  ImportError: {reason}\n" in said
    assert re.search(r"^node2  healthy: ", said, re.M)
    assert " on node2, 1 ranks each" in said
    assert curve(job) == curve(alone)


def test_too_few_good_nodes_give_up_in_the_end(cluster, home):
    """After as many starts as settings allow, with the sentence that says why."""
    job = train(home, "hopeless", RETRIES="2", PREFLIGHT="--min-free-gb 1e9", **BOTH)
    assert job.end() == "FAILED"
    said = job.output.read_text()
    assert re.search(r"^node1  unhealthy: .* GB free, below 1e\+09$", said, re.M)
    assert "error: 0 of 2 nodes are healthy, but --min-nodes is 2" in said
    assert said.count("the job is requeued") == 1
    assert "exit code 1, and no new checkpoint in 2 starts: giving up" in said


def test_a_mistake_is_not_tried_again(cluster, home):
    job = train(home, "mistake", ["--steps", "0"], NODES="1")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert "error: --steps must be at least 1" in job.output.read_text()


def test_a_cancelled_job_is_not_queued_again(cluster, home):
    job = train(home, "cancelled", NODES="1")
    job.reach(20)
    subprocess.run(["scancel", job.id], check=True)
    assert job.end() == "CANCELLED"
    assert job.field("Restarts") == "0"


# ── The launchers ──


# ── What comes after pre-training ──


def test_longer_texts_fine_tuning_and_rl_have_launchers(undisturbed, home):
    """From the run's weights, each by its launcher; fine-tuning on both nodes."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ships, gulls"}]
    (home / "talks.jsonl").write_text(40 * (json.dumps({"messages": talk}) + "\n"))
    short = "--seq-len 32 --global-batch-size 4 --start-batch-size 4".split()
    init = ["--init", undisturbed.run]
    longer = [*init, "--data", home / "text", *short, "--steps", "4", "--model.rope-factor", "2"]
    jobs = {
        "longer": Job(home, "longer", "long_context.sbatch", longer, PHASE="128k", NODES="1"),
        "tuned": Job(home, "tuned", "sft.sbatch", [
            *init, "--data", home / "talks.jsonl", *short, "--steps", "4", "--ep", "2"], **BOTH),
    }  # fmt: skip
    assert jobs["tuned"].end() == "COMPLETED", jobs["tuned"].said()
    own = [json.dumps({"question": f"say {i}", "answer": str(i)}) for i in range(8)]
    (home / "own.jsonl").write_text("\n".join(own))
    asked = "--global-batch-size 2 --start-batch-size 2".split()
    asked += "--num-generations 2 --steps 2 --max-new-tokens 4 --seq-len 32".split()
    asked += ["--init", jobs["tuned"].run, "--tasks", home / "own.jsonl"]
    jobs["rl"] = Job(home, "rl", "rl.sbatch", asked, **BOTH)
    for job in jobs.values():
        assert job.end() == "COMPLETED", job.said()
    assert [len(metrics(job.run)) for job in jobs.values()] == [4, 4, 2]
    assert {row["lr"] for row in metrics(jobs["longer"].run)} == {7.3e-6}
    assert " on node1,node2, 1 ranks each" in jobs["tuned"].output.read_text()
