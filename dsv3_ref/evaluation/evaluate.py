"""`dsv3 eval`: pass@k and maj@k of a model on prompt tasks, other tasks by lm-eval."""

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

    Problems of the built-in tasks (sums, counting, spelling) and of .jsonl files, as in `dsv3 rl`,
    are answered --samples times each. Other names are tasks of lm-eval (pip install
    'dsv3-ref[eval]'): `speeches` and `lm-sums` need no network, hellaswag and the like do.
    """

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    tasks: tuple[str, ...] = ("sums",)
    """names of tasks, or files of problems (.jsonl, .json, .csv, .parquet; docs/data.md)"""
    samples: int = 6
    """answers to each problem: k of pass@k and maj@k"""
    temperature: float = 0.7
    """sampling temperature"""
    max_new_tokens: int = 48
    """tokens of an answer at most; a longer one counts as wrong"""
    system: str = ""
    """system prompt before each question"""
    limit: int = 0
    """problems of each task; 0: all"""
    apply_chat_template: bool = False
    """render the texts of lm-eval's tasks as conversations of DeepSeek-V3"""
    seed: int = 0
    """seed of the problems and of the sampling"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""
    out: Path | None = None
    """also write the results here, as JSON"""


def validate_eval_args(args: EvalConfig) -> None:
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
            raise UserError(f"{name} has no right answers: choose sums, counting or spelling")


def evaluate_checkpoint(args: EvalConfig) -> dict[str, dict[str, float]]:
    """Evaluate a model, print a line per task, and return the results by task."""
    validate_eval_args(args)
    policy = Policy.from_pretrained(args.model, pick_device(args.device), verify=args.verify)
    prompt_tasks = [name for name in args.tasks if is_task_name(name)]
    lm_eval_tasks = [name for name in args.tasks if not is_task_name(name)]
    results = {name: evaluate_task(policy, name, args) for name in prompt_tasks}
    if lm_eval_tasks:
        results |= run_lm_eval(policy, lm_eval_tasks, args)
    for name, metrics in results.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"model": str(args.model), "results": results})
    return results


# ── Prompt tasks ──


def evaluate_task(policy: Policy, name: str, args: EvalConfig) -> dict[str, float]:
    """Measure accuracy of greedy answers, and pass@1, pass@k and maj@k of sampled ones."""
    problems = get_task(name).problems[1][: args.limit or None]
    k = args.samples
    prompts = [build_messages(problem.question, system=args.system) for problem in problems]
    torch.manual_seed(args.seed)
    greedy = policy.generate(prompts, 1, args.max_new_tokens, 0.0)
    groups = chunked(policy.generate(prompts, k, args.max_new_tokens, args.temperature), k)
    num_correct = []
    lengths: list[int] = []
    for problem, group in zip(problems, groups):
        num_correct.append(sum(score_completion(name, problem, x) == 1 for x in group))
        lengths += [len(x.tokens) for x in group]
    metrics = {
        "greedy": fmean(score_completion(name, p, x) for p, x in zip(problems, greedy)),
        "pass@1": fmean(pass_at_k(n, k, 1) for n in num_correct),
    }
    if k > 1:
        metrics[f"pass@{k}"] = fmean(pass_at_k(n, k, k) for n in num_correct)
    if k > 1 and not problems[0].cases:  # there is no majority of programs
        scores = [score_majority(name, p, group) for p, group in zip(problems, groups)]
        metrics[f"maj@{k}"] = fmean(scores)
    return metrics | {"tokens": fmean(lengths)}


def chunked(completions: list[Completion], k: int) -> list[list[Completion]]:
    """Cut consecutive completions into groups of k, one group per problem."""
    return [completions[i : i + k] for i in range(0, len(completions), k)]


def score_completion(name: str, problem: Problem, completion: Completion) -> float:
    """Return the score that the task gives to a completion; 0 if it is not finished."""
    return get_task(name).score(completion.text, problem) if completion.is_finished else 0.0


def score_majority(name: str, problem: Problem, group: list[Completion]) -> float:
    """Return the score of the most frequent boxed answer of a group."""
    answer = majority([extract_boxed(x.text) if x.is_finished else None for x in group])
    return 0.0 if answer is None else get_task(name).score(f"\\boxed{{{answer}}}", problem)


# ── Tasks of lm-eval ──


def run_lm_eval(policy: Policy, names: list[str], args: EvalConfig) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval, `speeches` among them, and return their metrics."""
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            f"{', '.join(names)}: tasks of lm-eval need pip install 'dsv3-ref[eval]'"
        ) from None
    from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM, task_config

    tasks = [task_config(name) for name in names]
    with quiet_lm_eval():
        try:
            output = lm_eval.simple_evaluate(
                DSV3LM(policy), tasks=tasks, limit=args.limit or None, bootstrap_iters=0,
                apply_chat_template=args.apply_chat_template, random_seed=args.seed,
                numpy_random_seed=args.seed, torch_random_seed=args.seed,
            )  # fmt: skip
        except Exception as e:  # no network or no such task, under many exception types
            raise UserError(f"lm-eval could not run {', '.join(names)}: {e}") from e
    return {name: select_metrics(row) for name, row in output["results"].items()}


def select_metrics(row: dict[str, object]) -> dict[str, float]:
    """Return the metrics of a result of lm-eval by their names, without standard errors."""
    return {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if isinstance(value, float) and "stderr" not in key
    }


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, and keep it from reporting the use of local files."""
    before = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
