"""Ranks that share sequences: losses and gradients of one process, on every mesh."""

import json
import shutil
from dataclasses import replace

import miniruns
import pytest
import torch
from miniruns import launch, metrics, options
from test_cluster import DEEP, wait_for_exit
from test_parallel import check_a_step

from dsv3_ref.checkpoints.native import list_checkpoints
from dsv3_ref.config import TINY, UserError
from dsv3_ref.optim import RECIPES
from dsv3_ref.posttraining.grpo import GRPOConfig
from dsv3_ref.training.settings import TrainConfig, check_rules, parallelism_rules

TOLERANCE = 1e-13


def case(cp: int, shape, name: str, zero: bool = True, ranks_per_node: int = 0, full: bool = False):
    marks = [pytest.mark.full] if full else []
    return pytest.param(cp, shape, name, zero, ranks_per_node, marks=marks)


MESHES = [
    case(2, (1, 2, 1), "1f1b"), case(4, (1, 2, 2), "1f1b"), case(2, (2, 1, 2), "dualpipe"),
    case(2, (1, 1, 2), "1f1b", full=True),
    case(2, (2, 2, 1), "1f1b", full=True), case(2, (2, 2, 2), "1f1b", False, full=True),
    case(2, (2, 2, 1), "dualpipe", full=True),
    case(4, (2, 2, 2), "dualpipe", full=True), case(4, (2, 1, 4), "1f1b", True, 2, full=True),
    case(2, (2, 1, 2), "zb1p", full=True), case(2, (2, 1, 2), "dualpipev", full=True),
]  # fmt: skip


@pytest.mark.parametrize("cp, shape, name, zero, ranks_per_node", MESHES)
def test_ranks_that_share_sequences_take_the_step_of_one(
    cp, shape, name, zero, ranks_per_node, gang
):
    """MTP's depths leave out the last tokens, which only one rank has."""
    check_a_step(gang, torch.float64, TOLERANCE, shape, name, zero, ranks_per_node, cp=cp)


PACKED = [
    case(2, (1, 1, 2), "1f1b"), case(2, (2, 2, 1), "1f1b", full=True),
    case(2, (2, 1, 2), "dualpipe", full=True), case(4, (1, 2, 2), "1f1b", full=True),
    case(4, (2, 1, 4), "dualpipe", full=True),
]  # fmt: skip


@pytest.mark.parametrize("cp, shape, name, zero, ranks_per_node", PACKED)
def test_packed_samples_may_cross_the_chunks_of_ranks(cp, shape, name, zero, ranks_per_node, gang):
    check_a_step(
        gang, torch.float64, TOLERANCE, shape, name, zero, ranks_per_node, is_packed=True, cp=cp
    )


# ── A run ──


REFUSED = [
    (4, {"cp": 3, "ep": 4}, "--cp 3 must divide --dp 1 × --ep 4 = 4"),
    (1, {"cp": 2}, "--cp 2 must divide --dp 1 × --ep 1 = 1"),
    (2, {"cp": 0}, "--cp must be at least 1"),
    (2, {"cp": 2, "seq_len": 34}, "--seq-len 34 must be a multiple of 2 × --cp 2"),
    (2, {"cp": 2, "seq_len": 4}, "leaves chunks of 1 tokens with --cp 2"),
]  # fmt: skip


@pytest.mark.parametrize("world, options, sentence", REFUSED)
def test_a_sequence_that_ranks_cannot_share_is_refused(world, options, sentence):
    recipe = replace(RECIPES["tiny"], seq_len=options.pop("seq_len", 32))
    with pytest.raises(UserError, match=sentence):
        check_rules(parallelism_rules(TrainConfig(TINY, recipe, **options), world))


def test_ranks_that_hold_the_whole_model_share_no_sequences():
    with pytest.raises(UserError, match="computes whole sequences: set --cp 1, or --pp or --ep"):
        check_rules(parallelism_rules(GRPOConfig(TINY, RECIPES["tiny"], cp=2), 2))
    check_rules(parallelism_rules(GRPOConfig(TINY, RECIPES["tiny"], cp=2, ep=2), 2))


@pytest.mark.full
def test_a_run_that_shares_sequences_resumes_without(tmp_path):
    """The losses, also of validation rows of any length, are those of one process."""
    with miniruns.home(tmp_path) as home:
        (home / "mini.json").write_text(json.dumps(DEEP))

        def train(out: str, world: int, *more: str) -> list[dict]:
            wait_for_exit(launch(home, world, options(home, home / out, *more)))
            return metrics(home / out)

        want = train("one", 1)
        train("run", 2, "--ep", "2", "--cp", "2")
        for folder in list_checkpoints(home / "run")[1:]:
            shutil.rmtree(folder)
        got = train("run", 2, "--ep", "2", "--cp", "1", "--resume")
        for a, b in zip(got, want, strict=True):
            for key in ("loss", "loss_total", "val_loss", "grad_norm", "tokens"):
                assert a[key] == (b[key] and pytest.approx(b[key], rel=1e-4)), (a["step"], key)
