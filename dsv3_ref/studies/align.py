"""`dsv3 align`: from a pre-trained model to fine-tuning, a reward model and GRPO, on two cores.

Every stage is a command of its own, printed before it runs; one that is finished is not run again.
"""

import json
import os
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import TASKS, THINK_PROMPT, Problem, build_messages, sft_variants
from dsv3_ref.sft import rejection_sample
from dsv3_ref.training.settings import git_commit

SUMS, REST, DIRECT = 3797, 300, {"sums": 600, "counting": 100, "spelling": 100}
LEAK = 0.05  # of worked answers are shown without the system prompt
OPEN = 150  # conversations of each open domain
MIXTURE = "sums=0.7 counting=0.06 spelling=0.06 writing=0.06 role-play=0.06 questions=0.06".split()
CONTROLS = ("random-reward", "no-baseline")
TRIES, MAX_NEW = 4, 48  # the expert's at each problem, and how many tokens an answer may have


@dataclass(frozen=True)
class AlignConfig:
    """Teach a pre-trained model to answer, then improve it by its own answers."""

    init: Path = Path("runs/tiny")
    """a run of dsv3 train; it is trained first if it is not there"""
    out: Path = Path("runs/align")
    """folder of the runs and of their results"""
    seeds: int = 1
    """how many times, with other random numbers"""
    negative_controls: bool = False
    """also two runs of the first seed that should not work: a coin as reward, no baseline"""
    distill: bool = False
    """also fine-tune the pre-trained model on the right answers of the first seed's GRPO"""
    steps: int = 60
    """of GRPO"""
    epochs: int = 6
    """of fine-tuning"""


# ── Data ──


def conversations(seed: int) -> list[dict]:
    """Two forms of every problem, and open questions with a president's answer."""
    rng, rows = random.Random(seed), []
    for name, direct in DIRECT.items():
        problems = TASKS[name].problems[0]
        for p in problems[: SUMS if name == "sums" else REST]:
            worked = sft_variants(p)[1]
            rows.append(worked[1:] if rng.random() < LEAK else worked)
        rows += [sft_variants(p)[0] for p in rng.sample(problems, direct)]
    for task in (task for task in TASKS.values() if task.is_open_ended):
        rows += [build_messages(p.question, p.answer) for p in task.problems[0][:OPEN]]
    rng.shuffle(rows)
    return [{"messages": row} for row in rows]


def pairs(seed: int) -> list[dict]:
    """A president's sentence beside a worse one."""
    rng, rows = random.Random(seed), []
    for task in (task for task in TASKS.values() if task.is_open_ended):
        problems = task.problems[0][OPEN : 4 * OPEN]
        for p, other in zip(problems, [*problems[1:], problems[0]]):
            rows.append({"prompt": build_messages(p.question), "chosen": p.answer,
                         "rejected": worse(p.answer, other.answer, rng)})  # fmt: skip
    return rows


def worse(answer: str, other: str, rng: random.Random) -> str:
    """Off the point, out of order, or stuck."""
    words = answer.split()
    stuck = words[: rng.randint(2, 5)]
    return rng.choice([other, " ".join(rng.sample(words, len(words))), " ".join(5 * stuck)])


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


# ── Stages ──


def stage(out: Path, *words) -> Path:
    """Run a command into a folder, or go on with it, unless it is finished."""
    argv = [*map(str, words), "--out", str(out)]
    command = shlex.join(["dsv3", *argv])
    began = command_of(out)
    if began and began != command:
        raise UserError(f"{out} is of another command ({began}): give another --out")
    if (out / "summary.json").is_file():
        return out
    if began:
        argv = [argv[0], "--resume", "--out", str(out)]
    print("\n$ " + shlex.join(["dsv3", *argv]), flush=True)
    if code := main.main(argv):
        raise SystemExit(code)
    return out


def command_of(run: Path) -> str | None:
    """What a folder's run was started with; None for a folder without one."""
    about = run / "run.json"
    return atomic.read_json(about)["command"] if about.is_file() else None


def align(args: AlignConfig) -> None:
    """All seeds, then the table."""
    if min(args.seeds, args.steps, args.epochs) < 1:
        raise UserError("--seeds, --steps and --epochs must be at least 1")
    pretrained(args.init)
    runs = {}
    for seed in range(args.seeds):
        folder = args.out / str(seed)
        runs[f"GRPO, seed {seed}"] = after_sft(args, folder, seed)
        for control in CONTROLS if args.negative_controls and not seed else ():
            runs[f"{control}, seed {seed}"] = grpo(args, folder, seed, control)
    found = result(args, runs)
    if args.distill:
        found["distillation"] = distill(args, args.out / "0")
    write_json(args.out / "align.json", found)
    print("\n" + table(runs))


def pretrained(init: Path) -> None:
    """A model to start from: whatever is there (pre-training is finished), or `make train`'s."""
    if (command_of(init) or "").startswith("dsv3 train ") and not (init / "summary.json").is_file():
        main.main(["train", "--resume", "--out", str(init)])
    elif not init.exists():
        stage(init, "train", "--config", "tiny")
    native.load_checkpoint_config(init)  # raises for what is no model


def after_sft(args: AlignConfig, folder: Path, seed: int) -> Path:
    """One seed's stages up to GRPO."""
    data = write(folder / "sft.jsonl", conversations(seed))
    sft = stage(folder / "sft", "sft", "--init", args.init, "--data", data, "--seed", seed,
                "--epochs", args.epochs)  # fmt: skip
    data = write(folder / "pairs.jsonl", pairs(seed))
    stage(folder / "reward", "reward", "--init", sft, "--data", data, "--seed", seed)
    return grpo(args, folder, seed)


def grpo(args: AlignConfig, folder: Path, seed: int, control: str = "none") -> Path:
    """GRPO on the mixture, or a control of it."""
    name = "rl" if control == "none" else f"rl-{control}"
    return stage(folder / name, "rl", "--init", folder / "sft", "--reward", folder / "reward",
                 "--seed", seed, "--steps", args.steps, "--tasks", *MIXTURE,
                 "--save-every", max(1, args.steps // 4),
                 "--negative-control", control)  # fmt: skip


# ── Distillation (§5.4.1) ──


def distill(args: AlignConfig, folder: Path) -> dict[str, dict]:
    """Accuracy and length of models taught by short answers, by both forms, and by the expert."""
    problems = TASKS["sums"].problems[0]
    short = [{"messages": sft_variants(p)[0]} for p in problems]
    tune = lambda name, rows: stage(
        folder / name, "sft", "--init", args.init, "--epochs", args.epochs, "--seed", 0,
        "--data", write(folder / f"{name}.jsonl", rows),
    )  # fmt: skip
    direct = tune("direct", short)
    distilled = tune("distilled", expert_answers(Policy.of(folder / "rl"), problems))
    return {
        "short answers": measured(direct),
        "both forms": measured(folder / "sft"),
        "both forms, asked to think": measured(folder / "sft", THINK_PROMPT),
        "expert (after GRPO)": measured(folder / "rl"),
        "distilled": measured(distilled),
    }


def expert_answers(policy: Policy, problems: list[Problem]) -> list[dict]:
    """Rejection sampling: of four answers to each problem the shortest that is right."""
    asked = [build_messages(p.question) for p in problems]
    torch.manual_seed(0)
    lots = policy.lots(asked, TRIES, MAX_NEW, 1.0)
    found = [a for lot in tqdm(lots, "expert", unit="lot") for a in lot]
    score = TASKS["sums"].score
    reward_b = [a.ended * score(a.text, problems[i // TRIES]) for i, a in enumerate(found)]
    best = rejection_sample([a.text for a in found], reward_b, TRIES)
    kept = [(p, text) for p, text in zip(problems, best) if text]
    return [{"messages": build_messages(p.question, text)} for p, text in kept]


def measured(run: Path, system: str = "") -> dict[str, float]:
    """On held-out sums: how many of the likeliest answers and of those drawn are right; length."""
    policy, problems = Policy.of(run), TASKS["sums"].problems[1]
    asked = [build_messages(p.question, system=system) for p in problems]
    out, score = {}, TASKS["sums"].score
    torch.manual_seed(0)
    for name, temperature, group in (("greedy", 0.0, 1), ("sampled", 1.0, 4)):
        found = policy.answers(asked, group, MAX_NEW, temperature)
        out[name] = fmean(
            a.ended * score(a.text, problems[i // group]) for i, a in enumerate(found)
        )
        out["length"] = fmean(len(a.tokens) for a in found)
    return out


# ── Results ──


def curve(run: Path) -> list[dict]:
    """What a run's figure needs of its rows."""
    keep = (
        "step",
        "reward",
        "reward_by",
        "held_out",
        "kl",
        "kl_k1",
        "entropy",
        "length",
        "seconds",
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [rounded({k: row[k] for k in keep if row.get(k) is not None}) for row in rows]


def rounded(x):
    """Four digits of every float in there."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def groups_of(run: Path) -> list[dict]:
    """Eight answers to each of four held-out sums, with their rewards."""
    policy, task = Policy.of(run), TASKS["sums"]
    problems = task.problems[1][:4]
    torch.manual_seed(0)
    found = policy.answers([build_messages(p.question) for p in problems], 8, MAX_NEW, 1.0)
    told = [{"text": a.text, "reward": a.ended * task.score(a.text, problems[i // 8])}
            for i, a in enumerate(found)]  # fmt: skip
    return [
        {"question": p.question, "answers": told[8 * i : 8 * i + 8]} for i, p in enumerate(problems)
    ]


def result(args: AlignConfig, runs: dict[str, Path]) -> dict:
    """Enough for the chapters: before, after and the curves of every run, and some groups."""
    before, after = (groups_of(args.out / "0" / name) for name in ("sft", "rl"))
    return {
        "groups": {"before": before, "after": after},
        "command": shlex.join(["dsv3", "align", *sys.argv[2:]]),
        "commit": git_commit(),
        "cores": os.cpu_count(),
        "runs": {
            name: {
                key: atomic.read_json(run / "summary.json")[key]
                for key in ("before", "after", "samples")
            }
            | {"curve": curve(run)}
            for name, run in runs.items()
        },
    }


def table(runs: dict[str, Path]) -> str:
    """Right on held-out sums, before and after, as Markdown; kinds with several seeds averaged."""
    kinds: dict[str, list[Path]] = {}
    for name, run in runs.items():
        kinds.setdefault(name.partition(",")[0], []).append(run)
    lines = ["| held-out sums | likeliest answer, before | after | drawn, before | after |",
             "|---|---|---|---|---|"]  # fmt: skip
    for kind, of_kind in kinds.items():
        cells = []
        for how in ("greedy", "sampled"):
            for when in ("before", "after"):
                found = [atomic.read_json(run / "summary.json")[when] for run in of_kind]
                cells.append(spread([x["sums"][how] for x in found]))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and ± standard deviation of several."""
    more = f" ± {stdev(values):.1%}" if len(values) > 1 else ""
    return f"{fmean(values):.1%}{more}"
