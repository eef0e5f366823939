"""`dsv3 align`: fine-tuning, a reward model and GRPO on a pre-trained model, on two cores.

Every stage is a `dsv3` command, printed before it runs. A finished stage is not run again.
"""

import json
import os
import random
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch

from dsv3_ref.checkpoints import native
from dsv3_ref.checkpoints.atomic import read_json, write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.progress import ProgressBar
from dsv3_ref.posttraining.policy import Completion, Policy
from dsv3_ref.posttraining.prompts import (
    TASKS,
    THINK_PROMPT,
    Problem,
    ReasoningGymTask,
    SpeechTask,
    build_messages,
    sft_variants,
)
from dsv3_ref.sft import rejection_sample
from dsv3_ref.studies.stages import StageRunner, round_significant, write_jsonl
from dsv3_ref.training.run_file import git_state

NUM_WORKED_SUMS = 3797  # sums with worked solutions in the SFT data
NUM_WORKED_OTHERS = 300  # problems with worked solutions of each other task
NUM_DIRECT = {
    "sums": 600,
    "counting": 100,
    "spelling": 100,
}  # direct answers in the SFT data, by task
NO_PROMPT_RATE = 0.05  # share of worked solutions without the system prompt
NUM_OPEN_CONVERSATIONS = 150  # conversations of each open-ended task
MIXTURE = "sums=0.7 counting=0.06 spelling=0.06 writing=0.06 role-play=0.06 questions=0.06".split()
CONTROLS = ("random-reward", "no-baseline")
NUM_EXPERT_SAMPLES = 4  # completions of the expert per problem
MAX_ANSWER_TOKENS = 48  # tokens per answer
CURVE_METRICS = (
    "step", "reward", "reward_by", "held_out", "kl", "kl_k1", "entropy", "length", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class AlignConfig:
    """Fine-tune a pre-trained model and improve it by reinforcement learning."""

    init: Path = Path("runs/tiny")
    """run of dsv3 train to start from; trained first if it does not exist"""
    out: Path = Path("runs/align")
    """folder of all stages and of align.json"""
    seeds: int = 1
    """number of repetitions, with seeds 0, 1, …"""
    negative_controls: bool = False
    """also run two negative controls of the first seed: random rewards, no baseline"""
    distill: bool = False
    """also fine-tune the pre-trained model on correct answers of the first seed's GRPO model"""
    steps: int = 60
    """GRPO steps"""
    epochs: int = 6
    """epochs of SFT"""


# ── Data ──


def open_ended_tasks() -> Iterator[SpeechTask]:
    """Yield the tasks whose questions have no single correct answer."""
    for task in TASKS.values():
        if isinstance(task, SpeechTask):
            yield task


def build_conversations(seed: int) -> list[dict]:
    """Build SFT data: problems with direct and worked answers, and open questions."""
    rng = random.Random(seed)
    rows = []
    for name, num_direct in NUM_DIRECT.items():
        problems = TASKS[name].problems[0]
        for problem in problems[: NUM_WORKED_SUMS if name == "sums" else NUM_WORKED_OTHERS]:
            worked = sft_variants(problem)[1]
            rows.append(worked[1:] if rng.random() < NO_PROMPT_RATE else worked)
        rows += [sft_variants(problem)[0] for problem in rng.sample(problems, num_direct)]
    for task in open_ended_tasks():
        rows += [
            build_messages(p.question, p.answer) for p in task.problems[0][:NUM_OPEN_CONVERSATIONS]
        ]
    rng.shuffle(rows)
    return [{"messages": row} for row in rows]


def build_pairs(seed: int) -> list[dict]:
    """Build preference pairs: a sentence of a speech, and a worsened one."""
    rng = random.Random(seed)
    rows = []
    for task in open_ended_tasks():
        problems = task.problems[0][NUM_OPEN_CONVERSATIONS : 4 * NUM_OPEN_CONVERSATIONS]
        for problem, other in zip(problems, [*problems[1:], problems[0]]):
            rejected = worsen(problem.answer, other.answer, rng)
            row = {"prompt": build_messages(problem.question), "chosen": problem.answer}
            rows.append(row | {"rejected": rejected})
    return rows


def worsen(answer: str, other: str, rng: random.Random) -> str:
    """Return a worse answer: that of another question, shuffled words, or a repeated beginning."""
    words = answer.split()
    beginning = words[: rng.randint(2, 5)]
    shuffled = " ".join(rng.sample(words, len(words)))
    return rng.choice([other, shuffled, " ".join(5 * beginning)])


# ── Stages ──


def align(args: AlignConfig, stages: StageRunner) -> None:
    """Run all seeds, write align.json and print the table of results."""
    if min(args.seeds, args.steps, args.epochs) < 1:
        raise UserError("--seeds, --steps and --epochs must be at least 1")
    stages.finish_pretraining(args.init)
    native.load_checkpoint_config(args.init)  # raises if --init is not a model
    runs = {}
    for seed in range(args.seeds):
        folder = args.out / str(seed)
        runs[f"GRPO, seed {seed}"] = run_seed(args, stages, folder, seed)
        for control in CONTROLS if args.negative_controls and seed == 0 else ():
            runs[f"{control}, seed {seed}"] = run_grpo(args, stages, folder, seed, control)
    results = collect_results(args, runs)
    if args.distill:
        results["distillation"] = distill(args, stages, args.out / "0")
    write_json(args.out / "align.json", results)
    print("\n" + results_table(runs))


def run_seed(args: AlignConfig, stages: StageRunner, folder: Path, seed: int) -> Path:
    """Run the stages of one seed; return the folder of its GRPO run."""
    data = write_jsonl(folder / "sft.jsonl", build_conversations(seed))
    sft = stages.run(folder / "sft", "sft", "--init", args.init, "--data", data, "--seed", seed,
                     "--epochs", args.epochs)  # fmt: skip
    data = write_jsonl(folder / "pairs.jsonl", build_pairs(seed))
    stages.run(folder / "reward", "reward", "--init", sft, "--data", data, "--seed", seed)
    return run_grpo(args, stages, folder, seed)


def run_grpo(
    args: AlignConfig, stages: StageRunner, folder: Path, seed: int, control: str = "none"
) -> Path:
    """Run GRPO on the mixture of tasks, or one of its negative controls; return its folder."""
    name = "rl" if control == "none" else f"rl-{control}"
    return stages.run(folder / name, "rl", "--init", folder / "sft", "--reward", folder / "reward",
                      "--seed", seed, "--steps", args.steps, "--tasks", *MIXTURE,
                      "--save-every", max(1, args.steps // 4),
                      "--negative-control", control)  # fmt: skip


# ── Distillation (§5.4.1) ──


def distill(args: AlignConfig, stages: StageRunner, folder: Path) -> dict[str, dict]:
    """Measure models fine-tuned on direct answers, on both forms, and on the expert's answers."""
    problems = TASKS["sums"].problems[0]

    def tune(name: str, rows: list[dict]) -> Path:
        data = write_jsonl(folder / f"{name}.jsonl", rows)
        return stages.run(folder / name, "sft", "--init", args.init, "--epochs", args.epochs,
                          "--seed", 0, "--data", data)  # fmt: skip

    direct = tune("direct", [{"messages": sft_variants(problem)[0]} for problem in problems])
    distilled = tune("distilled", expert_answers(Policy.from_pretrained(folder / "rl"), problems))
    return {
        "short answers": measure_sums(direct),
        "both forms": measure_sums(folder / "sft"),
        "both forms, asked to think": measure_sums(folder / "sft", THINK_PROMPT),
        "expert (after GRPO)": measure_sums(folder / "rl"),
        "distilled": measure_sums(distilled),
    }


def expert_answers(policy: Policy, problems: list[Problem]) -> list[dict]:
    """Sample answers to each problem; return conversations with the shortest correct ones."""
    prompts = [build_messages(problem.question) for problem in problems]
    torch.manual_seed(0)
    completions = []
    batches = policy.iter_batches(prompts, NUM_EXPERT_SAMPLES, MAX_ANSWER_TOKENS, 1.0)
    for batch in ProgressBar(iterable=batches, desc="expert", unit="batch"):
        completions += batch
    rewards = score_sums(completions, problems, NUM_EXPERT_SAMPLES)
    best = rejection_sample(
        [completion.text for completion in completions], rewards, NUM_EXPERT_SAMPLES
    )
    return [
        {"messages": build_messages(problem.question, text)}
        for problem, text in zip(problems, best)
        if text
    ]


def score_sums(
    completions: list[Completion], problems: list[Problem], num_generations: int
) -> list[float]:
    """Score completions of sums: 1 for a correct answer that ended, else 0."""
    task = TASKS["sums"]
    assert isinstance(task, ReasoningGymTask)
    return [
        x.is_finished * task.score(x.text, problems[i // num_generations])
        for i, x in enumerate(completions)
    ]


def measure_sums(run: Path, system: str = "") -> dict[str, float]:
    """Measure accuracy on held-out sums, greedy and sampled, and the length of sampled answers."""
    policy = Policy.from_pretrained(run)
    problems = TASKS["sums"].problems[1]
    prompts = [build_messages(problem.question, system=system) for problem in problems]
    measures = {}
    torch.manual_seed(0)
    for name, temperature, num_generations in (("greedy", 0.0, 1), ("sampled", 1.0, 4)):
        completions = policy.generate(prompts, num_generations, MAX_ANSWER_TOKENS, temperature)
        measures[name] = fmean(score_sums(completions, problems, num_generations))
        measures["length"] = fmean(len(x.tokens) for x in completions)
    return measures


# ── Results ──


def read_curve(run: Path) -> list[dict]:
    """Read the metrics of a run that chapters plot."""
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        round_significant({key: row[key] for key in CURVE_METRICS if row.get(key) is not None})
        for row in rows
    ]


def sample_groups(run: Path) -> list[dict]:
    """Sample eight answers to each of four held-out sums, with their rewards."""
    policy = Policy.from_pretrained(run)
    problems = TASKS["sums"].problems[1][:4]
    torch.manual_seed(0)
    prompts = [build_messages(problem.question) for problem in problems]
    completions = policy.generate(prompts, 8, MAX_ANSWER_TOKENS, 1.0)
    rewards = score_sums(completions, problems, 8)
    answers = [{"text": x.text, "reward": reward} for x, reward in zip(completions, rewards)]
    return [
        {"question": problem.question, "answers": answers[8 * i : 8 * i + 8]}
        for i, problem in enumerate(problems)
    ]


def collect_results(args: AlignConfig, runs: dict[str, Path]) -> dict:
    """Collect what chapters show: results before and after, curves, and groups of completions."""
    before, after = (sample_groups(args.out / "0" / name) for name in ("sft", "rl"))
    results = {}
    for name, run in runs.items():
        summary = read_json(run / "summary.json")
        results[name] = {key: summary[key] for key in ("before", "after", "samples")}
        results[name]["curve"] = read_curve(run)
    return {
        "groups": {"before": before, "after": after},
        "command": shlex.join(["dsv3", "align", *sys.argv[2:]]),
        "commit": git_state()[0],
        "cores": os.cpu_count(),
        "runs": results,
    }


def results_table(runs: dict[str, Path]) -> str:
    """Format accuracy on held-out sums as Markdown, averaged over the seeds of a kind of run."""
    kinds: dict[str, list[Path]] = {}
    for name, run in runs.items():
        kinds.setdefault(name.partition(",")[0], []).append(run)
    lines = ["| held-out sums | greedy, before | after | sampled (T=1), before | after |",
             "|---|---|---|---|---|"]  # fmt: skip
    for kind, folders in kinds.items():
        summaries = [read_json(run / "summary.json") for run in folders]
        cells = []
        for name, moment in product(("greedy", "sampled"), ("before", "after")):
            cells.append(format_mean([summary[moment]["sums"][name] for summary in summaries]))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_mean(values: list[float]) -> str:
    """Format the mean as a percentage, with ± standard deviation for several values."""
    deviation = f" ± {stdev(values):.1%}" if len(values) > 1 else ""
    return f"{fmean(values):.1%}{deviation}"
