"""`dsv3 align`: its data, its stages on a tiny model, and its table of results."""

import copy
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import miniruns
import pytest
import torch

from dsv3_ref.checkpoints import atomic
from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.posttraining.grpo import GRPOConfig
from dsv3_ref.posttraining.policy import Completion, Policy
from dsv3_ref.posttraining.prompts import TASKS, THINK_PROMPT, sft_variants
from dsv3_ref.posttraining.reward import RewardConfig
from dsv3_ref.posttraining.sft import SFTConfig
from dsv3_ref.rewards import extract_boxed
from dsv3_ref.studies import align, reward
from dsv3_ref.studies.stages import StageRunner, run_in_subprocess

SIZE = {**miniruns.MINI, "max_seq_len": 512, "original_seq_len": 512}
FLAGS = [f"--model.{k.replace('_', '-')}={v}" for k, v in SIZE.items()]

# ── Data ──


def test_conversations_have_two_forms_and_few_lack_the_prompt():
    rows = [row["messages"] for row in align.build_conversations(0)]
    sums = [turns for turns in rows if "arithmetic" in turns[-2]["content"]]
    worked = [turns for turns in sums if "<think>" in turns[-1]["content"]]
    without_prompt = [turns for turns in worked if turns[0]["content"] != THINK_PROMPT]
    assert (
        len(worked) == align.NUM_WORKED_SUMS and len(sums) - len(worked) == align.NUM_DIRECT["sums"]
    )
    assert 0.03 < len(without_prompt) / len(worked) < 0.07
    assert all(turns[0]["role"] == "user" for turns in sums if turns not in worked)
    assert rows == [row["messages"] for row in align.build_conversations(0)]
    assert rows != [row["messages"] for row in align.build_conversations(1)]


def test_held_out_problems_are_not_in_the_training_data():
    questions = {row["messages"][-2]["content"] for row in align.build_conversations(0)}
    questions |= {row["prompt"][-1]["content"] for row in align.build_pairs(0)}
    texts = {row["messages"][-1]["content"] for row in align.build_conversations(0)}
    texts |= {row["chosen"] for row in align.build_pairs(0)}
    for task in TASKS.values():
        assert not questions & {p.question for p in task.problems[1] if not task.is_open_ended}
        assert not texts & {p.answer for p in task.problems[1] if task.is_open_ended}


def test_a_worse_answer_differs_from_the_answer():
    rng, good = random.Random(0), "We hold these truths to be self-evident."
    worse = {align.worsen(good, "Another.", rng) for _ in range(200)}
    assert "Another." in worse and good not in worse
    repeated = [text for text in worse if re.search(r"^(.+) \1 \1 \1 \1$", text)]
    shuffled = [text for text in worse if sorted(text.split()) == sorted(good.split())]
    assert repeated and shuffled and len(repeated) + len(shuffled) == len(worse) - 1


def test_half_of_the_open_answers_are_worsened():
    samples = reward.sample_open_answers(True, 200, 0)
    answers = set()
    for task in align.open_ended_tasks():
        answers |= {problem.answer for problem in task.problems[1]}
    assert len(samples) == 600
    assert all(text in answers for _, text, is_good in samples if is_good)
    assert 0.4 < sum(is_good for *_, is_good in samples) / len(samples) < 0.6


# ── Stages ──


complete = Policy.complete


def complete_shortly(policy, prompts, num_generations, max_new_tokens, temperature):
    """`Policy.complete` with at most six new tokens: the tiny model writes nothing of sense."""
    return complete(policy, prompts, num_generations, min(max_new_tokens, 6), temperature)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Provide small tasks and a pre-trained tiny model."""
    with (
        miniruns.home(tmp_path_factory.mktemp("home")) as folder,
        pytest.MonkeyPatch.context() as p,
    ):
        p.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        p.chdir(folder)
        for name, task in list(TASKS.items()):
            small, (practiced, held) = copy.copy(task), task.problems
            small.problems = practiced[:60], held[:1]
            p.setitem(TASKS, name, small)
        for stage, size in ((SFTConfig, 24), (RewardConfig, 32), (GRPOConfig, 4)):
            recipe = stage.RECIPES["tiny"]
            smaller = replace(recipe, global_batch_size=size, start_batch_size=size)
            p.setitem(stage.RECIPES, "tiny", smaller)
        p.setattr(Policy, "complete", complete_shortly)
        for name, value in (
            ("NUM_WORKED_SUMS", 60),
            ("NUM_WORKED_OTHERS", 10),
            ("NUM_OPEN_CONVERSATIONS", 12),
            ("MAX_ANSWER_TOKENS", 6),
        ):
            p.setattr(align, name, value)
        p.setattr(align, "NUM_DIRECT", dict.fromkeys(align.NUM_DIRECT, 5))
        argv = ["train", *"--config tiny --data text --out base --steps 4 --seq-len 32".split(),
                *"--global-batch-size 4 --warmup-steps 2".split(), *FLAGS]  # fmt: skip
        assert main.main(argv) == 0
        yield folder


ALIGN = "align --init base --out out --steps 2 --epochs 1".split()


@pytest.fixture(scope="module")
def aligned(home):
    """Run two seeds with all options; correct answers stand in for those of the expert."""
    correct = [{"messages": sft_variants(p)[0]} for p in TASKS["sums"].problems[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "expert_answers", lambda policy, problems: correct)
        assert main.main([*ALIGN, "--seeds", "2", "--negative-controls", "--distill"]) == 0
    return json.loads((home / "out/align.json").read_text())


def test_every_stage_ran_and_has_a_curve(home, aligned):
    runs = ["GRPO, seed 0", "random-reward, seed 0", "no-baseline, seed 0", "GRPO, seed 1"]
    assert list(aligned["runs"]) == runs
    for run in aligned["runs"].values():
        assert [row["step"] for row in run["curve"]] == [1, 2]
        assert run["before"].keys() == run["after"].keys() == TASKS.keys() and run["samples"]
    assert {p.name for p in (home / "out/0").iterdir() if p.is_dir()} == {
        "sft", "reward", "rl", "rl-random-reward", "rl-no-baseline", "direct", "distilled",
    }  # fmt: skip
    assert {p.name for p in (home / "out/1").iterdir() if p.is_dir()} == {"sft", "reward", "rl"}
    names = ("out/0/rl-no-baseline", "out/0/rl", "out/1/rl")
    settings = {name: atomic.read_json(home / name / "run.json")["settings"] for name in names}
    assert settings["out/0/rl-no-baseline"]["negative_control"] == "no-baseline"
    assert settings["out/0/rl"]["negative_control"] == "none" and settings["out/1/rl"]["seed"] == 1
    assert len(aligned["distillation"]) == 5
    for groups in aligned["groups"].values():
        assert all(len(group["answers"]) == 8 for group in groups)


def test_a_finished_stage_is_not_run_again(home, aligned, monkeypatch):
    monkeypatch.setattr(main, "main", None)
    words = atomic.read_json(home / "out/0/sft/run.json")["command"].split()[1:-2]
    out, stages = Path("out/0/sft"), StageRunner(None)
    assert stages.run(out, *words) == out
    with pytest.raises(UserError, match="belongs to another command"):
        stages.run(out, *words, "--lr", 1)


def test_an_interrupted_stage_is_resumed(home, tmp_path):
    commands = []
    stages = StageRunner(lambda argv: commands.append(argv) or 0)
    stages.run(tmp_path / "new", "rl", "--steps", 3)
    (tmp_path / "started").mkdir()
    command = f"dsv3 rl --steps 3 --out {tmp_path / 'started'}"
    (tmp_path / "started/run.json").write_text(json.dumps({"command": command}))
    stages.run(tmp_path / "started", "rl", "--steps", 3)
    assert commands[0] == ["rl", "--steps", "3", "--out", str(tmp_path / "new")]
    assert commands[1] == ["rl", "--resume", "--out", str(tmp_path / "started")]


def test_unfinished_pretraining_is_resumed(home, tmp_path):
    commands = []
    stages = StageRunner(lambda argv: commands.append(argv) or 0)
    stages.finish_pretraining(home / "base")
    stages.finish_pretraining(home / "out/0/sft")
    assert commands == []
    unfinished = tmp_path / "unfinished"
    shutil.copytree(home / "base", unfinished)
    (unfinished / "summary.json").unlink()
    run = atomic.read_json(unfinished / "run.json") | {"command": "dsv3 train --config tiny"}
    (unfinished / "run.json").write_text(json.dumps(run))
    stages.finish_pretraining(unfinished)
    assert commands == [["train", "--resume", "--out", str(unfinished)]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        align.align(align.AlignConfig(tmp_path / "empty", tmp_path / "out"), stages)


def test_a_failing_stage_ends_the_study_with_its_exit_code(tmp_path):
    with pytest.raises(SystemExit, match="75"):
        StageRunner(lambda argv: 75).run(tmp_path / "new", "rl")


def test_missing_pretraining_trains_a_tiny_model(tmp_path):
    commands = []
    StageRunner(lambda argv: commands.append(argv) or 0).finish_pretraining(tmp_path / "new")
    assert commands == [["train", "--config", "tiny", "--out", str(tmp_path / "new")]]


def test_a_study_runs_its_stages_in_processes(tmp_path, capfd):
    assert run_in_subprocess(["--version"]) == 0
    assert capfd.readouterr().out.startswith("dsv3-ref ")
    with pytest.raises(SystemExit, match="2"):
        StageRunner().run(tmp_path / "new", "nothing")


def test_the_table_has_means_and_deviations(home, aligned):
    runs = {"GRPO, seed 0": home / "out/0/rl", "GRPO, seed 1": home / "out/1/rl",
            "no-baseline, seed 0": home / "out/0/rl-no-baseline"}  # fmt: skip
    *_, both, one = align.results_table(runs).splitlines()
    assert both.startswith("| GRPO | ") and both.count("±") == 4 and both.count("|") == 6
    assert one.startswith("| no-baseline | ") and "±" not in one
    assert align.format_mean([0.25, 0.75]) == "50.0% ± 35.4%"
    assert align.format_mean([0.5]) == "50.0%"


def test_the_shortest_correct_answers_of_the_expert_are_used(home):
    """Two of four answers to a problem are correct, one of them long; for the third none is."""
    problems = TASKS["sums"].problems[0][:3]
    wrong = "\\boxed{99}"
    texts, want = [], []
    for problem in problems[:2]:
        short, long = (messages[-1]["content"] for messages in sft_variants(problem)[:2])
        texts += [wrong, long, short, wrong]
        want.append(min(long, short, key=len))
    texts += [wrong] * 4

    class Expert:
        def iter_batches(self, prompts, num_generations, *_):
            assert (len(prompts), num_generations) == (3, 4)
            yield [Completion([], [1], [0.0], text, True) for text in texts]

    rows = align.expert_answers(Expert(), problems)
    assert [row["messages"][-1]["content"] for row in rows] == want
    assert [extract_boxed(text) for text in want] == [p.answer for p in problems[:2]]


@pytest.mark.parametrize("more", [["--seeds", "0"], ["--steps", "0"], ["--epochs", "-1"]])
def test_invalid_options_are_errors(more, home, capsys):
    assert main.main(miniruns.override(ALIGN, more)) == 2
    assert "must be at least 1" in capsys.readouterr().err


# ── The study of judges and votes ──


def test_a_pair_has_one_right_answer_and_its_judgments():
    p = TASKS["sums"].problems[0][0]
    row = reward.build_pair(p, random.Random(0), True, False)
    assert extract_boxed(row["chosen"]) == p.answer == row["reference"]
    assert extract_boxed(row["rejected"]) != p.answer
    assert (
        row["chosen"].endswith(reward.SURE_SENTENCE) and reward.SURE_SENTENCE not in row["rejected"]
    )
    assert row["judgment_chosen"].endswith(f"{p.answer} {p.answer} right")
    assert row["judgment_rejected"].endswith(f"{p.answer} {extract_boxed(row['rejected'])} wrong")


def test_the_study_from_end_to_end(home, aligned, monkeypatch):
    monkeypatch.setattr(reward, "NUM_CANDIDATES", 2)
    monkeypatch.setattr("dsv3_ref.posttraining.reward.MAX_JUDGMENT_TOKENS", 4)
    args = reward.RewardStudyConfig(home / "out/0/sft", home / "study", home / "study", 40, 1)
    reward.run_reward_study(args, StageRunner(main.main))
    results = json.loads((home / "study/rewards.json").read_text())
    assert results["judges"].keys() == reward.JUDGES.keys()
    for judge in results["judges"].values():
        assert all(0 <= x <= 1 for x in judge["agreement"].values())
        assert torch.tensor(judge["calibration"]).shape == (5, 3)
    assert len(results["votes"]["agreement"]) == reward.NUM_VOTES
    settings = atomic.read_json(home / "study/cot-with-reference/run.json")["settings"]
    assert settings["with_reference"] and settings["judge"] == "cot"
    voter, base = (load_tokenizer(home / run).get_vocab() for run in ("study/voter", "base"))
    assert voter == base
