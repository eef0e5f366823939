"""Options given more than once: all values count, or the command line is refused."""

import pytest
from tyro import cli

from dsv3_ref.cli.commands import BY_NAME
from dsv3_ref.cli.main import fields_of_several_values, join_repeated_options, load, main
from dsv3_ref.data.prepare import PrepareConfig
from dsv3_ref.evaluation.evaluate import EvalConfig
from dsv3_ref.serving.config import GenerateConfig, ServeConfig

EXPECTED = {  # every option of several values, by command
    "data prepare": {"data"}, "data bench": {"data"}, "train": {"data"}, "extend": {"data"},
    "sft": {"data"}, "reward": {"data"}, "rl": {"data", "tasks"}, "ablate": {"data"},
    "generate": {"prompt", "stop"}, "chat": {"stop", "allowed_hosts"},
    "serve": {"api_key", "allowed_hosts", "allowed_origins"}, "eval": {"tasks"}, "bench": {"parts"},
}  # fmt: skip


def parse(kind, line: str):
    return cli(kind, args=join_repeated_options(line.split(), kind))


@pytest.mark.parametrize("name", BY_NAME)
def test_which_options_have_several_values(name):
    found = fields_of_several_values(load(BY_NAME[name].options))
    assert found >= EXPECTED.get(name, set())


@pytest.mark.parametrize(
    ("kind", "line", "field", "values"),
    [
        # README's own line; only the last one's values counted (smackers/smack#626)
        pytest.param(PrepareConfig, "--out x --data A --data B", "data", ("A", "B"), id="readme"),
        pytest.param(PrepareConfig, "--data A B --out x", "data", ("A", "B"), id="one flag"),
        # both habits at once, as users of augur expected (nextstrain/augur#1445)
        pytest.param(
            PrepareConfig, "--data A B --out x --data C", "data", ("A", "B", "C"), id="mixed"
        ),
        pytest.param(
            PrepareConfig, "--data=A --out=x --data=B=0.5", "data", ("A", "B=0.5"), id="equals"
        ),
        pytest.param(
            PrepareConfig, "--data=A B --out x --data C", "data", ("A", "B", "C"), id="equals and"
        ),
        pytest.param(EvalConfig, "m --tasks a --tasks b", "tasks", ("a", "b"), id="tasks"),
        pytest.param(
            GenerateConfig, "m --prompt a --seed 1 --prompt b", "prompt", ("a", "b"), id="prompts"
        ),
        pytest.param(
            GenerateConfig,
            "--prompt a --seed 1 --prompt b m",
            "prompt",
            ("a", "b"),
            id="model last",
        ),
        # a stop text that begins with a dash can only be given with an equals sign
        pytest.param(GenerateConfig, "m --stop=-x --stop y", "stop", ("-x", "y"), id="dash"),
        pytest.param(
            ServeConfig, "m --api_key a --api-key b", "api_key", ("a", "b"), id="spelling"
        ),
    ],
)
def test_all_values_count(kind, line, field, values):
    assert getattr(parse(kind, line), field) == values


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        # of a script and of its user: the last one won, silently (openSUSE/obs-service-tar_scm#398)
        pytest.param("train --lr 1 --steps 2 --lr 2", "--lr", id="number"),
        pytest.param("train --seed=1 --seed 1", "--seed", id="the same value"),
        pytest.param("train --model.dim 8 --model.dim 8", "--model.dim", id="of the model"),
        pytest.param("train --val_sequences 8 --val-sequences 8", "--val-sequences", id="spelling"),
        pytest.param("train --verify --no-verify", "--verify", id="flag and its opposite"),
        pytest.param("eval m --limit 1 --tasks a --limit 2", "--limit", id="eval"),
        pytest.param("data prepare --out a --data x --out b", "--out", id="prepare"),
    ],
)
def test_one_value_is_not_given_twice(line, flag, capsys):
    assert main(line.split()) == 2
    assert (
        capsys.readouterr().err
        == f"error: {flag} is given twice: give it once, since it has one value\n"
    )


def test_a_flag_may_be_repeated():
    """The launcher adds --resume when a job is requeued, and the user's own is there already."""
    kind = load(BY_NAME["train"].options)
    assert join_repeated_options(["--resume", "--out", "x", "--resume"], kind) == [
        "--out",
        "x",
        "--resume",
    ]


def test_what_follows_two_dashes_is_left_alone():
    argv = ["--seed", "1", "--", "--seed", "2"]
    assert join_repeated_options(argv, GenerateConfig) == argv
