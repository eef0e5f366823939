"""Measure how far reward models rely on a spurious feature, and how much votes of a model help.

    python -m dsv3_ref.studies.reward --init runs/align/0/sft --out notebooks/results

The data are sums with a right and a wrong answer. In most training pairs the right one also claims
to be sure, and the wrong one does not. One reward model scores directly, others write a chain of
thought first. The study measures which feature each has learned and which of n answers it picks.
Then a model that was fine-tuned to vote judges open-ended answers.
"""

import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import TASKS, Problem, build_messages
from dsv3_ref.posttraining.reward import RewardModel
from dsv3_ref.rewards import (
    bradley_terry,
    calibration,
    majority_accuracy,
    majority_agreement,
    vote_prompt,
)
from dsv3_ref.studies.align import open_ended_tasks, worsen
from dsv3_ref.studies.stages import StageRunner, round_significant, write_jsonl
from dsv3_ref.training.run_file import git_state

SURE_SENTENCE = " I am quite sure of it."
SPURIOUS_RATE = 0.7  # share of training pairs whose right answer claims to be sure
JUDGES = {
    "direct": ("--judge", "direct"),
    "cot": ("--judge", "cot"),
    "cot with reference": ("--judge", "cot", "--with-reference"),
}
NUM_CANDIDATES = 16  # answers per problem, of which the best is picked
CORRECT_RATE = 0.3  # share of right answers among them
NUM_VOTES = 9
IS_SURE = {  # name → whether the right and the wrong answer of a pair claim to be sure
    "right sounds sure": (True, False),
    "neither": (False, False),
    "wrong sounds sure": (False, True),
}


@dataclass(frozen=True)
class RewardStudyConfig:
    """Train reward models on pairs with a spurious feature, and measure its influence."""

    init: Path
    """model fine-tuned on sums: runs/align/0/sft"""
    out: Path = Path("runs/reward_study")
    """folder of rewards.json"""
    work: Path = Path("runs/reward_study")
    """folder of the training data and the runs"""
    pairs: int = 3000
    """training pairs"""
    epochs: int = 3
    """epochs per training run"""
    seed: int = 0
    """random seed of data and training"""


# ── Answers ──


def format_answer(value: int | str, is_sure: bool) -> str:
    """Write an answer in a box, with or without the sentence that claims to be sure."""
    return f"The answer is \\boxed{{{value}}}.{SURE_SENTENCE if is_sure else ''}"


def wrong_value(problem: Problem, rng: random.Random) -> int:
    """Return a wrong result near the right one."""
    return int(problem.answer) + rng.choice([-1, 1]) * rng.randint(1, 4)


def write_judgment(problem: Problem, value: int | str) -> str:
    """Write the worked sum, both results and a verdict."""
    verdict = "right" if str(value) == problem.answer else "wrong"
    return f"{problem.thought}, given {value}: {problem.answer} {value} {verdict}"


def build_pair(
    problem: Problem, rng: random.Random, right_is_sure: bool, wrong_is_sure: bool
) -> dict:
    """Build a preference pair of a right and a wrong answer, each with its judgment."""
    wrong = wrong_value(problem, rng)
    return {
        "prompt": build_messages(problem.question), "reference": problem.answer,
        "chosen": format_answer(problem.answer, right_is_sure),
        "judgment_chosen": write_judgment(problem, problem.answer),
        "rejected": format_answer(wrong, wrong_is_sure),
        "judgment_rejected": write_judgment(problem, wrong),
    }  # fmt: skip


# ── Scores ──


class AnswerScorer:
    """A reward model that scores answers to problems."""

    def __init__(self, folder: Path):
        self.reward_model = RewardModel(folder)

    def encode(self, problem: Problem, text: str) -> list[int]:
        """Render a question and an answer as tokens."""
        return self.reward_model.chat.render(build_messages(problem.question, text))

    def score(self, answers: Sequence[tuple[Problem, str]]) -> torch.Tensor:
        """Return the reward of each answer, (b,)."""
        torch.manual_seed(0)
        samples = [self.encode(problem, text) for problem, text in answers]
        return self.reward_model.score(samples, [problem.answer for problem, _ in answers])

    def score_pairs(self, pairs: Sequence[tuple[Problem, dict]]) -> torch.Tensor:
        """Return the rewards of chosen and rejected answers in turn, (m,)."""
        answers = []
        for problem, row in pairs:
            answers += [(problem, row["chosen"]), (problem, row["rejected"])]
        return self.score(answers)


def measure_agreement(scorer: AnswerScorer, problems: list[Problem], seed: int) -> dict:
    """Measure agreement on held-out pairs by which answer claims to be sure, and calibration."""
    rng = random.Random(seed)
    agreement, rewards = {}, []
    for name, is_sure in IS_SURE.items():
        reward_m = scorer.score_pairs([(p, build_pair(p, rng, *is_sure)) for p in problems])
        agreement[name] = bradley_terry(reward_m)[1].float().mean().item()
        rewards.append(reward_m)
    chosen_n, rejected_n = torch.cat(rewards).view(-1, 2).unbind(1)
    table = calibration((chosen_n - rejected_n).sigmoid(), torch.ones_like(chosen_n))
    return {"agreement": agreement, "calibration": table.nan_to_num(0).tolist()}


def measure_best_of(scorer: AnswerScorer, problems: list[Problem], seed: int) -> dict:
    """Measure best-of-n by reward among answers; 30 % are right and half claim to be sure."""
    rng = random.Random(seed)
    answers = []
    right, sure = [], []
    for problem in problems:
        for _ in range(NUM_CANDIDATES):
            right.append(rng.random() < CORRECT_RATE)
            sure.append(rng.random() < 0.5)
            value = problem.answer if right[-1] else wrong_value(problem, rng)
            answers.append((problem, format_answer(value, sure[-1])))
    measures = {
        name: torch.as_tensor(values).float().view(len(problems), NUM_CANDIDATES)
        for name, values in (("right", right), ("sure", sure), ("reward", scorer.score(answers)))
    }
    results = {}
    for n in (1, 2, 4, 8, 16):
        best = measures["reward"][:, :n].argmax(1, keepdim=True)
        results[n] = {name: x.gather(1, best).mean().item() for name, x in measures.items()}
    return results


# ── Votes ──


def sample_open_answers(held_out: bool, limit: int, seed: int) -> list[tuple[str, str, bool]]:
    """Sample (question, answer, is good) of open-ended tasks; half of the answers are worsened.

    limit: questions per task, held-out ones or training ones.
    """
    rng = random.Random(seed)
    answers = []
    for task in open_ended_tasks():
        problems = task.problems[held_out][:limit]
        for problem, other in zip(problems, [*problems[1:], problems[0]]):
            is_good = rng.random() < 0.5
            text = problem.answer if is_good else worsen(problem.answer, other.answer, rng)
            answers.append((problem.question, text, is_good))
    return answers


def measure_votes(args: RewardStudyConfig, stages: StageRunner) -> dict:
    """Fine-tune a model to vote; compare its majorities with those of independent votes."""
    rows = [
        {"messages": build_messages(vote_prompt(question, answer), "yes" if is_good else "no")}
        for question, answer, is_good in sample_open_answers(False, 1000, args.seed)
    ]
    data = write_jsonl(args.work / "votes.jsonl", rows)
    voter = stages.run(args.work / "voter", "sft", "--init", args.init, "--data", data, "--epochs",
                       args.epochs, "--seed", args.seed, "--lr", 1e-3)  # fmt: skip
    answers = sample_open_answers(True, 200, args.seed)
    torch.manual_seed(args.seed)
    yes_nk = Policy.from_pretrained(voter).sample_votes(
        [(question, text) for question, text, _ in answers], NUM_VOTES
    )
    good_n = torch.tensor([is_good for *_, is_good in answers])
    accuracy = (yes_nk == good_n[:, None]).float().mean().item()
    ks = range(1, NUM_VOTES + 1)
    return {
        "one vote": accuracy,
        "agreement": [majority_agreement(yes_nk, good_n, k) for k in ks],
        "independent": [majority_accuracy(accuracy, k) for k in ks],
    }


# ── The study ──


def run_reward_study(args: RewardStudyConfig, stages: StageRunner) -> None:
    """Train the reward models and the voter, measure them, and write rewards.json."""
    train, held_out = TASKS["sums"].problems
    rng = random.Random(args.seed)
    rows = []
    for problem in train[: args.pairs]:
        right_is_sure = rng.random() < SPURIOUS_RATE
        wrong_is_sure = not rng.random() < SPURIOUS_RATE
        rows.append(build_pair(problem, rng, right_is_sure, wrong_is_sure))
    data = write_jsonl(args.work / "pairs.jsonl", rows)
    judges: dict[str, dict] = {}
    for name, options in JUDGES.items():
        folder = args.work / name.replace(" ", "-")
        stages.run(folder, "reward", "--init", args.init, "--data", data, "--epochs", args.epochs,
                   "--seed", args.seed, *options)  # fmt: skip
        scorer = AnswerScorer(folder)
        measures = measure_agreement(scorer, held_out, args.seed)
        measures["best of"] = measure_best_of(scorer, held_out, args.seed)
        judges[name] = measures
        print(name, measures)
    results = {
        "command": shlex.join(["python", "-m", "dsv3_ref.studies.reward", *sys.argv[1:]]),
        "commit": git_state()[0],
        "spurious_rate": SPURIOUS_RATE,
        "judges": judges,
        "votes": measure_votes(args, stages),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "rewards.json", round_significant(results))


if __name__ == "__main__":
    try:
        config = tyro.cli(RewardStudyConfig, prog="python -m dsv3_ref.studies.reward")
        run_reward_study(config, StageRunner())
    except UserError as e:
        sys.exit(f"error: {e}")
