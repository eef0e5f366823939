"""Training runs of about a second, in this process or in one that can be killed."""

import io
import json
import multiprocessing
import os
import pkgutil
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

MINI = {
    "vocab_size": 400, "dim": 64, "inter_dim": 96, "moe_inter_dim": 32, "n_layers": 2,
    "n_dense_layers": 1, "n_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
    "n_activated_experts": 2, "n_expert_groups": 2, "n_limited_groups": 2, "n_mtp_layers": 1,
    "max_seq_len": 64, "original_seq_len": 64, "rope_factor": 1.0, "init_std": 0.05,
}  # fmt: skip
STEPS = 8
WORDS = (
    "the sea was calm and old; ships, gulls, rain! a light far off: nobody came (yet).\n".split()
)
CLOCK = {  # metrics that differ between equal runs
    "tokens_per_s", "tokens_per_s_per_device", "mfu", "seconds", "all_to_all_hidden",
    "slowest_rank", "slowest_rank_ratio",
}  # fmt: skip


def flip_bit(path: Path, at: int) -> None:
    """Flip a bit of a file; count from the end if `at` is negative, modulo the file's size."""
    content = bytearray(path.read_bytes())
    content[at // 8 % len(content)] ^= 1 << at % 8
    path.write_bytes(content)


def prose(rng: random.Random, words: int) -> str:
    """Return random words with a few full stops and line breaks."""
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ".\n"]) for _ in range(words))


@contextmanager
def home(folder: Path) -> Iterator[Path]:
    """Write mini.json and text/ into a folder and keep all caches there."""
    rng = random.Random(0)
    (folder / "mini.json").write_text(json.dumps(MINI))
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Number {i}. {prose(rng, 80)}")
    with pytest.MonkeyPatch.context() as patch:
        own_caches(folder, patch)
        yield folder


def own_caches(folder: Path, patch) -> None:
    """Redirect the caches to a folder instead of the user's own; runs end with short samples."""
    import datasets

    patch.setenv("DSV3_CACHE", str(folder / "cache"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    patch.setattr("dsv3_ref.training.task.SAMPLE_TOKENS", 4)  # 160 take longer than the run


def options(home: Path, out: Path, *more) -> list[str]:
    """Return the command line of a run of eight steps with checkpoints after 3, 6 and 8."""
    fixed = ["train", "--config", home / "mini.json", "--data", home / "text", "--out", out]
    fixed += "--steps 8 --seq-len 32 --global-batch-size 4 --warmup-steps 2 --save-every 3".split()
    return override(fixed, more)


def override(fixed: Iterable[object], more: Iterable[object]) -> list[str]:
    """Return a command line whose options in `more` replace those of the same name in `fixed`."""
    from dsv3_ref.cli.main import split_options  # only now: environment variables are set first

    words = [str(x) for x in more]
    given = {flag for flag, _ in split_options(words) if flag}
    kept = [tokens for flag, tokens in split_options([*map(str, fixed)]) if flag not in given]
    return [*chain.from_iterable(kept), *words]


def no_report(folder: Path) -> Path:
    """Write a stub report, since figures take longer than the run."""
    (folder / "report.html").write_text("no figures")
    return folder / "report.html"


# ── Files of a run ──


def metrics(run: Path) -> list[dict]:
    """Return the metrics rows of a run; docs/metrics.md must describe their keys."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unknown = set().union(*rows) - documented_metrics()
    assert not unknown, f"docs/metrics.md does not describe {unknown}"
    return rows


@cache
def documented_metrics() -> set[str]:
    page = Path(__file__).resolve().parent.parent / "docs/metrics.md"
    return set(re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE))


def results(run: Path) -> tuple:
    """Return what equal runs share: rows without times, and the last checkpoint's bytes."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    names = ["model.safetensors", "training.safetensors"]
    rows, state = map(timeless, metrics(run)), json.loads((last / "state.json").read_text())
    return list(rows), last.name, timeless(state), [(last / name).read_bytes() for name in names]


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in CLOCK}


# ── Processes ──


def child(home: Path, argv: list[str], threads=1, deadly="", at=1, number=signal.SIGKILL) -> None:
    """Run a command silently; its `at`-th call of the function `deadly` sends it a signal."""
    import torch

    from dsv3_ref.cli import main

    own_caches(home, pytest.MonkeyPatch())
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr("dsv3_ref.training.report.write_report", no_report)
    if deadly:
        calls = iter(range(1, 1000))
        real = pkgutil.resolve_name(deadly)

        def shot(*args, **kwargs):
            if next(calls) == at:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        patch.setattr(deadly, shot)
    sys.exit(main.main(argv))


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # children share cores: they must not spin
FORK = multiprocessing.get_context("forkserver")  # imports once, then forks a fresh process
PRELOAD = ["pytest", "hypothesis", "datasets", "torch.distributed", "dsv3_ref.training.loop"]
PRELOAD += ["dsv3_ref.training.report", "dsv3_ref.parallel.mesh_parallel", "dsv3_ref.cli.commands"]
PRELOAD += ["torch._dynamo", "dsv3_ref.cpu", "dsv3_ref.parallel.launch"]
FORK.set_forkserver_preload(PRELOAD)


def start(*args):
    """Run `child` in a process of its own."""
    process = FORK.Process(target=child, args=args)
    process.start()
    return process


class Command:
    """A function in its own process, with the part of Popen's interface that tests need."""

    def __init__(self, env: dict[str, str], function, *args):
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115
        self.process = FORK.Process(target=run_logged, args=(env, self.log.name, function, *args))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for the end; return the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a command", timeout)
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for the end; return (output, None) as Popen does."""
        self.wait(timeout)
        return self.log.read(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def run_logged(env: dict[str, str], log: str, function, *args) -> None:
    """Call a function with more environment variables and its output in a file."""
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(out, number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    function(*args)


def run_command(home: Path, argv: list[str], prepare=None) -> None:
    """Run `dsv3 ARGV` after `prepare`; the report is a stub unless FIGURES=1 is set."""
    from dsv3_ref.cli import main

    own_caches(home, pytest.MonkeyPatch())
    if os.environ.get("FIGURES") != "1":
        pytest.MonkeyPatch().setattr("dsv3_ref.training.report.write_report", no_report)
    sys.argv = ["dsv3", *argv]
    if prepare:
        prepare()
    main.main()


def launch(home: Path, world: int, argv: list[str], **variables: str) -> list[Command]:
    """Start a command on every rank, as a launcher does, with more environment variables."""
    return start_ranks(world, variables, run_command, home, argv)


def start_ranks(world: int, variables: dict[str, str], function, *args) -> list[Command]:
    """Call a function in a process per rank, with the environment variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    env |= variables
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [Command(env, function, *args) for env in ranks]


def apart(test, home: Path, *args) -> None:
    """Run `test(*args)` in its own process: after reading Parquet, Python may hang at exit."""
    process = FORK.Process(target=in_home, args=(test, home, *args))
    process.start()
    process.join()
    assert process.exitcode == 0


def in_home(test, home: Path, *args) -> None:
    own_caches(home, pytest.MonkeyPatch())
    test(*args)
