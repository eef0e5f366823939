"""Reward models and RL with data parallelism: the results are those of one process."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import miniruns
import pytest
import torch
from miniruns import launch, metrics, options, override
from test_cluster import wait_for_exit

from dsv3_ref.cli import main
from dsv3_ref.parallel.data_parallel import DataParallel
from dsv3_ref.posttraining.grpo import GRPOConfig, GRPOTask, Rollout
from dsv3_ref.posttraining.prompts import Problem, build_messages
from dsv3_ref.training import loop, settings
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess, StepHyperparams

CLOCK = miniruns.CLOCK | {"rollout_seconds"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Make a folder with a model that boxes digits, problems with 0/1 answers, and pairs."""
    with (
        miniruns.home(tmp_path_factory.mktemp("home")) as folder,
        pytest.MonkeyPatch.context() as p,
    ):
        p.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        assert main.main(options(folder, folder / "first")) == 0
        conversations, problems = [], []
        for i in range(64):
            messages = build_messages(f"say {i % 8}", f"\\boxed{{{i % 2}}}")
            conversations.append({"messages": messages})
        for i in range(8):
            problems.append({"question": f"say {i}", "answer": str(i % 2)})
        pairs = [
            {"prompt": build_messages(f"say {i}"), "chosen": "aa", "rejected": "bb" * (1 + i % 3)}
            for i in range(40)
        ]
        for name, rows in (("talks", conversations), ("own", problems), ("pairs", pairs)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        argv = ["sft", "--init", folder / "first", "--data", folder / "talks.jsonl", "--out",
                folder / "base", *"--seq-len 63 --global-batch-size 4 --start-batch-size 4".split(),
                *"--lr 5e-3 --epochs 12 --warmup-steps 1".split()]  # fmt: skip
        assert main.main(list(map(str, argv))) == 0
        yield folder


def reward(home, out) -> list[str]:
    words = ["reward", "--init", home / "base", "--data", home / "pairs.jsonl", "--out", out]
    words += "--seq-len 32 --global-batch-size 8 --start-batch-size 8 --steps 6".split()
    return list(map(str, words))


def rl(home, out, *more) -> list[str]:
    words = ["rl", "--init", home / "base", "--tasks", home / "own.jsonl", "--out", out]
    words += "--seq-len 32 --global-batch-size 4 --start-batch-size 4".split()
    words += "--num-generations 4 --max-new-tokens 12".split()
    words += "--steps 6 --save-every 3 --temperature 1.3".split()
    return override(words, more)


# ── Comparison with one process ──


def test_a_reward_model_on_two_ranks_is_that_of_one(home, tmp_path):
    assert main.main(reward(home, tmp_path / "one")) == 0
    outputs = wait_for_exit(launch(home, 2, reward(home, tmp_path / "two")))
    assert "2 ranks with a model each" in outputs[0] and "agrees with" in outputs[0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
    assert two[-1]["agreement"] == one[-1]["agreement"]


def make_rollouts(run: Run) -> list[Rollout]:
    """Make four groups of two completions of different lengths; in one group advantages are 0."""
    bos, eos, _, user, assistant = run.data.special_tokens
    out = []
    for i in range(8):
        tokens = [*range(20, 21 + i % 5), eos]
        rollout = Rollout(
            Problem("x", f"q{i // 2}", "1"), [bos, user, 30 + i // 2, assistant], tokens,
            [-1.0] * len(tokens), "", 0.0,
        )  # fmt: skip
        rollout.advantage = (-1.0) ** i * (i // 2) / 2
        out.append(rollout)
    return out


def gradients(home: str, folder: str, kind: str, ranks: bool) -> dict[str, torch.Tensor]:
    """Return gradients, loss and KL of a step on these rollouts, in one process or on a rank."""
    argv = rl(Path(home), "unused", "--loss-type", kind, "--beta", "0.01", "--micro-batch", "3")[1:]
    del argv[argv.index("--out") : argv.index("--out") + 2]
    args = settings.parse_args(argv, GRPOConfig)
    Path(folder).mkdir(exist_ok=True)
    strategy = DataParallel(args, torch.device("cpu")) if ranks else SingleProcess(args)
    run = build_run(GRPOTask(args), strategy, Path(folder))
    rollouts, grads = make_rollouts(run), {}

    def save_grads(*_):
        for name, p in run.strategy.model.named_parameters():
            if p.grad is not None:
                grads[name] = p.grad.clone()

    run.strategy.optimizer.register_step_pre_hook(save_grads)
    groups = run.strategy.shard([rollouts[i : i + 2] for i in range(0, 8, 2)])
    recipe = replace(args.recipe, max_grad_norm=1e9)
    hyperparams = StepHyperparams(recipe, 0.0, 0.0, 0.0, float("inf"))
    s = loop.train_minibatches(run, list(chain.from_iterable(groups)), hyperparams)
    return grads | {
        "loss": torch.tensor(s.loss),
        "kl": torch.tensor(run.task.token_means(run)["kl"]),
    }


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "sequence"])
def test_an_update_of_rl_on_two_ranks_is_that_of_one(home, tmp_path, gang, kind):
    want = gradients(str(home), str(tmp_path / "one"), kind, False)
    for got in gang.run(2, gradients, str(home), str(tmp_path / "two"), kind, True):
        for name, g in want.items():
            torch.testing.assert_close(got[name], g, atol=2e-6, rtol=3e-4)


# ── Whole runs ──


@pytest.fixture(scope="module")
def whole(home):
    wait_for_exit(launch(home, 2, rl(home, home / "rl")))
    return home / "rl"


def test_rl_on_two_ranks(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert any(0 < row["reward"] < 1 for row in rows) and rows[-1]["kl"] > 0
    for row in rows:  # 16 completions in 4 groups, of both ranks
        rewards, groups = row["reward"] * 16, row["frac_reward_zero_std"] * 4
        assert rewards == pytest.approx(round(rewards))
        assert groups == pytest.approx(round(groups))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["after"] == rows[-1]["held_out"] and summary["samples"][0]["before"]


def rows_without_times(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(run)]


def test_after_a_signal_to_one_rank_a_resumed_run_has_the_same_metrics(home, whole, tmp_path):
    running = launch(home, 2, rl(home, tmp_path / "rl"))
    rows = tmp_path / "rl" / "metrics.jsonl"
    while not rows.is_file() or not rows.read_text().count("\n"):
        assert running[0].poll() is None
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGUSR1)
    wait_for_exit(running, 75)
    wait_for_exit(launch(home, 2, ["rl", "--resume", "--out", str(tmp_path / "rl")]))
    assert rows_without_times(tmp_path / "rl") == rows_without_times(whole)


@pytest.mark.parametrize(
    "more, why",
    [
        (
            ["--global-batch-size", "3", "--start-batch-size", "3"],
            "must divide --global-batch-size",
        ),
        (["--pp", "2"], "no rank holds a whole model to sample from"),
    ],
)
def test_refusals(home, tmp_path, more, why):
    outputs = wait_for_exit(launch(home, 2, rl(home, tmp_path / "rl", *more)), 2)
    assert any(why in text for text in outputs)
