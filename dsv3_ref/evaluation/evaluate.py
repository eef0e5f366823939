"""`dsv3 eval`: how good is a model? pass@k and maj@k on our tasks, anything else by lm-eval."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.posttraining.policy import Completion, Policy
from dsv3_ref.posttraining.prompts import Problem, build_messages, get_task, is_task_name
from dsv3_ref.rewards import extract_boxed, majority, pass_at_k
from dsv3_ref.training.strategy import pick_device


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model.

    Our tasks (sums, counting, spelling, or .jsonl files of problems as `dsv3 rl` takes them) are
    answered --samples times each. Other names are tasks of
    lm-eval (pip install 'dsv3-ref[eval]'): `speeches` and `lm-sums` need no network, hellaswag and
    the like do.
    """

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    tasks: tuple[str, ...] = ("sums",)
    """names of tasks, or .jsonl files of problems"""
    samples: int = 6
    """answers to each problem: k of pass@k and maj@k"""
    temperature: float = 0.7
    """temperature of the sampling; 0: the likeliest token"""
    max_new_tokens: int = 48
    """tokens of an answer at most"""
    system: str = ""
    """system prompt before each question"""
    limit: int = 0
    """problems of each task; 0: all"""
    apply_chat_template: bool = False
    """put the texts of lm-eval's tasks into DeepSeek-V3's conversation form"""
    seed: int = 0
    """seed of the problems and of the sampling"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    out: Path | None = None
    """also write the results here, as JSON"""


def validate_args(args: EvalConfig) -> None:
    """Raise a `UserError` for options that cannot be used."""
    rules = [
        (len(args.tasks) > 0, "--tasks needs at least one name"),
        (args.samples >= 1, "--samples must be at least 1"),
        (args.temperature > 0, "--temperature must be above 0: several answers are compared"),
        (args.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
        (args.limit >= 0, "--limit must be at least 0"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    for name in args.tasks:
        if is_task_name(name) and get_task(name).is_open_ended:
            raise UserError(f"{name} has no right answers, so there is nothing to count")


def evaluate(args: EvalConfig) -> dict[str, dict[str, float]]:
    """Evaluate a model, print a line per task, and return the results by task."""
    validate_args(args)
    policy = Policy.from_pretrained(args.model, pick_device(args.device))
    ours = [name for name in args.tasks if is_task_name(name)]
    theirs = [name for name in args.tasks if not is_task_name(name)]
    results = {name: evaluate_task(policy, name, args) for name in ours}
    results |= run_lm_eval(policy, theirs, args) if theirs else {}
    for name, found in results.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"model": str(args.model), "results": results})
    return results


# ── Our tasks ──


def evaluate_task(policy: Policy, name: str, args: EvalConfig) -> dict[str, float]:
    """Measure accuracy of greedy answers, and pass@1, pass@k and maj@k of sampled ones."""
    problems, k = get_task(name).problems[1][: args.limit or None], args.samples
    asked = [build_messages(p.question, system=args.system) for p in problems]
    torch.manual_seed(args.seed)
    (greedy,) = zip(*chunked(policy.generate(asked, 1, args.max_new_tokens, 0.0), 1))
    drawn = chunked(policy.generate(asked, k, args.max_new_tokens, args.temperature), k)
    right = [
        sum(score_completion(name, p, a) == 1 for a in group) for p, group in zip(problems, drawn)
    ]
    out = {
        "greedy": fmean(score_completion(name, p, a) for p, a in zip(problems, greedy)),
        "pass@1": fmean(pass_at_k(r, k, 1) for r in right),
    }
    if k > 1:
        out[f"pass@{k}"] = fmean(pass_at_k(r, k, k) for r in right)
    if k > 1 and not problems[0].cases:  # programs have no majority
        out[f"maj@{k}"] = fmean(score_majority(name, p, g) for p, g in zip(problems, drawn))
    return out | {"tokens": fmean(len(a.tokens) for group in drawn for a in group)}


def chunked(answers: list[Completion], k: int) -> list[list[Completion]]:
    """Cut consecutive answers into groups of k, one group per problem."""
    return [answers[i : i + k] for i in range(0, len(answers), k)]


def score_completion(name: str, problem: Problem, answer: Completion) -> float:
    """Return the score that the task gives to an answer; 0 if it did not end."""
    return get_task(name).score(answer.text, problem) if answer.ended else 0.0


def score_majority(name: str, problem: Problem, group: list[Completion]) -> float:
    """Return the score of the most frequent boxed answer of a group."""
    given = majority([extract_boxed(a.text) if a.ended else None for a in group])
    return 0.0 if given is None else get_task(name).score(f"\\boxed{{{given}}}", problem)


# ── lm-eval's ──


def run_lm_eval(policy: Policy, names: list[str], args: EvalConfig) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval, `speeches` among them, and return their metrics."""
    try:
        import lm_eval
    except ImportError:
        said = f"{', '.join(names)}: tasks of lm-eval need pip install 'dsv3-ref[eval]'"
        raise UserError(said) from None
    from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM, task_config

    tasks = [task_config(name) for name in names]
    with quiet_lm_eval():
        try:
            found = lm_eval.simple_evaluate(
                DSV3LM(policy), tasks=tasks, limit=args.limit or None, bootstrap_iters=0,
                apply_chat_template=args.apply_chat_template, random_seed=args.seed,
                numpy_random_seed=args.seed, torch_random_seed=args.seed,
            )  # fmt: skip
        except Exception as e:  # no network, no such task: whatever the library calls it
            raise UserError(f"lm-eval could not run {', '.join(names)}: {e}") from e
    numbers = lambda row: {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if isinstance(value, float) and "stderr" not in key
    }
    return {name: numbers(row) for name, row in found["results"].items()}


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, and do not let it report downloads of local files."""
    before = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
