"""`dsv3 eval`: pass@k and maj@k of a model on prompt tasks, other tasks by lm-eval."""

import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import tyro

from dsv3_ref.checkpoints.atomic import replace_text, write_json
from dsv3_ref.checkpoints.hub import offline_if_unreachable
from dsv3_ref.config import UserError, suggest
from dsv3_ref.posttraining.policy import Completion, Policy, truncate_prompts
from dsv3_ref.posttraining.prompts import (
    TASKS,
    Problem,
    build_messages,
    get_task,
    held_out_problems,
    is_task_name,
)
from dsv3_ref.rewards import extract_boxed, majority, pass_at_k
from dsv3_ref.training.strategy import pick_device

DEFAULT_NEW_TOKENS = 48  # of an answer to a prompt task
BOOTSTRAP_ITERS = 1000  # of the standard errors of lm-eval that have no formula
OFFLINE_ERRORS = "Connection", "Offline", "LocalEntryNotFound", "MaxRetry", "Proxy", "Timeout"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model.

    The held-out problems of the built-in tasks (sums, counting, spelling) and all problems of
    files, as in `dsv3 rl`, are answered --samples times each. Other names are tasks of lm-eval (pip
    install 'dsv3-ref[eval]'): `speeches` and `lm-sums` need no network, hellaswag and the like do.
    """

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    tasks: tuple[str, ...] = ("sums",)
    """names of tasks, or files of problems (.jsonl, .json, .csv, .parquet; docs/data.md)"""
    num_fewshot: int | None = None
    """solved examples before each question; by default none, or as the task of lm-eval says"""
    fewshot_as_multiturn: bool = True
    """with --apply-chat-template, each example of lm-eval is a question and an answer"""
    samples: int = 6
    """answers to each problem: k of pass@k and maj@k"""
    temperature: float = 0.7
    """sampling temperature"""
    max_new_tokens: int | None = None
    """tokens of an answer at most, and a longer one counts as wrong; by default 48, or as the task
    of lm-eval says"""
    truncate: bool = False
    """keep the last tokens of prompts that are too long; otherwise they are an error"""
    system: str = ""
    """system prompt before each question"""
    limit: int = 0
    """problems of each task; 0: all"""
    apply_chat_template: bool = False
    """render the texts of lm-eval's tasks as conversations of the model"""
    batch_size: int = 64
    """answers that are generated, or texts that are scored, at a time"""
    seed: int = 0
    """seed of the problems, the examples and the sampling"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""
    out: Path | None = None
    """also write the results here, as JSON, with the command, the version and the settings"""
    log_samples: Path | None = None
    """also write every question with its answers and their scores here, as JSON Lines"""


def validate_eval_args(args: EvalConfig) -> None:
    """Raise a `UserError` for options that cannot be used."""
    rules = [
        (len(args.tasks) > 0, "--tasks needs at least one name"),
        (len(set(args.tasks)) == len(args.tasks), "--tasks names a task twice: name it once"),
        (args.samples >= 1, "--samples must be at least 1"),
        (
            0 < args.temperature < math.inf,
            "--temperature must be above 0: several answers are compared",
        ),
        (args.max_new_tokens is None or args.max_new_tokens >= 1,
         "--max-new-tokens must be at least 1"),
        (args.num_fewshot is None or args.num_fewshot >= 0, "--num-fewshot must be at least 0"),
        (args.batch_size >= 1, "--batch-size must be at least 1"),
        (args.limit >= 0, "--limit must be at least 0"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    for name in args.tasks:
        if is_task_name(name) and get_task(name).is_open_ended:
            raise UserError(f"{name} has no right answers: choose sums, counting or spelling")


def evaluate_checkpoint(
    args: EvalConfig, record: dict[str, Any] | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a model, print a line per task, and return the results by task.

    record: what produced the results (`describe_run`), written with them.
    """
    validate_eval_args(args)
    prompt_tasks = [name for name in args.tasks if is_task_name(name)]
    lm_eval_tasks = [name for name in args.tasks if not is_task_name(name)]
    manager = find_lm_eval_tasks(lm_eval_tasks) if lm_eval_tasks else None
    policy = Policy.from_pretrained(args.model, pick_device(args.device), verify=args.verify)
    log: list[dict[str, Any]] = []
    results = {name: evaluate_task(policy, name, args, log) for name in prompt_tasks}
    if lm_eval_tasks:
        results |= run_lm_eval(policy, lm_eval_tasks, manager, args, log)
    for name, metrics in results.items():
        print(f"{name}: {format_metrics(metrics)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"model": str(args.model), **(record or {}), "results": results})
    if args.log_samples:
        args.log_samples.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in log)
        replace_text(args.log_samples, "".join(f"{line}\n" for line in lines))
    return results


def format_metrics(metrics: dict[str, float]) -> str:
    """Return metrics as a line: the number of problems first, and means with standard errors."""
    parts = [f"n {metrics['n']}"] if "n" in metrics else []
    for name, value in metrics.items():
        if name != "n" and "_stderr" not in name:
            label, _, filtered = name.partition(",")
            error = metrics.get(f"{label}_stderr{',' * bool(filtered)}{filtered}")
            parts.append(f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
    return ", ".join(parts)


# ── Prompt tasks ──


def evaluate_task(
    policy: Policy, name: str, args: EvalConfig, log: list[dict[str, Any]]
) -> dict[str, float]:
    """Measure accuracy of greedy answers, and pass@1, pass@k and maj@k of sampled ones.

    Each comes with the standard error of its mean over problems, and with the numbers of problems,
    of answers without an end, and of prompts that were truncated. log: a row per problem is added.
    """
    problems = held_out_problems(name)[: args.limit or None]
    k = args.samples
    prompts, num_truncated = render_prompts(policy, name, problems, args)
    torch.manual_seed(args.seed)
    greedy = complete(policy, prompts, 1, 0.0, args)
    samples = complete(policy, prompts, k, args.temperature, args)
    groups = [samples[i : i + k] for i in range(0, len(samples), k)]
    rewards = [[score_completion(name, p, x) for x in g] for p, g in zip(problems, groups)]
    num_correct = [sum(reward == 1 for reward in values) for values in rewards]
    scores = {
        "greedy": [score_completion(name, p, x) for p, x in zip(problems, greedy)],
        "pass@1": [pass_at_k(n, k, 1) for n in num_correct],
    }
    if k > 1:
        scores[f"pass@{k}"] = [pass_at_k(n, k, k) for n in num_correct]
    if k > 1 and not problems[0].cases:  # there is no majority of programs
        scores[f"maj@{k}"] = [score_majority(name, p, group) for p, group in zip(problems, groups)]
    for i, problem in enumerate(problems):
        log.append({
            "task": name, "number": i, "question": problem.transcript, "target": problem.answer,
            "greedy": greedy[i].text, "greedy_score": scores["greedy"][i],
            "answers": [x.text for x in groups[i]], "scores": rewards[i],
        })  # fmt: skip
    metrics: dict[str, float] = {"n": len(problems)}
    for metric, values in scores.items():
        metrics |= mean_with_error(metric, values)
    return metrics | {
        "tokens": fmean(len(x.tokens) for x in samples),
        "unfinished": sum(not x.is_finished for x in greedy + samples),
        "truncated": num_truncated,
    }


def mean_with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean of values and, if there are several, the standard error of the mean."""
    error = {f"{name}_stderr": stdev(values) / math.sqrt(len(values))} if len(values) > 1 else {}
    return {name: fmean(values)} | error


def complete(
    policy: Policy, prompts: list[list[int]], k: int, temperature: float, args: EvalConfig
) -> list[Completion]:
    """Return k consecutive completions of each prompt, --batch-size at a time."""
    max_new_tokens = args.max_new_tokens or DEFAULT_NEW_TOKENS
    n = max(1, args.batch_size // k)
    batches = [prompts[i : i + n] for i in range(0, len(prompts), n)]
    return list(chain.from_iterable(
        policy.complete(batch, k, max_new_tokens, temperature) for batch in batches
    ))  # fmt: skip


def render_prompts(
    policy: Policy, name: str, problems: list[Problem], args: EvalConfig
) -> tuple[list[list[int]], int]:
    """Return the tokens of prompts with their examples, and how many of them were truncated.

    Raises a `UserError` if prompts are too long and --truncate is not given.
    """
    max_new_tokens = args.max_new_tokens or DEFAULT_NEW_TOKENS
    prompts = []
    for i, problem in enumerate(problems):
        turns = problem.messages(args.system)
        examples = draw_examples(name, problem, args.num_fewshot or 0, f"{args.seed} {i}")
        start = int(turns[0]["role"] == "system")
        prompts.append(policy.chat.render_prompt([*turns[:start], *examples, *turns[start:]]))
    return truncate_prompts(policy.model, prompts, max_new_tokens, name, args.truncate)


def draw_examples(name: str, problem: Problem, n: int, seed: str) -> list[dict]:
    """Return the turns of n solved examples: problems to train on, or other rows of a file."""
    if not n:
        return []
    pool = held_out_problems(name) if name not in TASKS else get_task(name).problems[0]
    others = [p for p in pool if p.transcript != problem.transcript]
    if problem.cases or len(others) < n:
        have = "no worked solutions" if problem.cases else f"{len(others)} other problems"
        raise UserError(f"--num-fewshot {n}: {name} has {have}: lower it to 0 or add problems")
    turns = []
    for example in random.Random(seed).sample(others, n):
        answer = f"The answer is \\boxed{{{example.answer}}}."
        turns += [*example.history, *build_messages(example.question, answer)]
    return turns


def score_completion(name: str, problem: Problem, completion: Completion) -> float:
    """Return the score that the task gives to a completion; 0 if it is not finished."""
    return get_task(name).score(completion.text, problem) if completion.is_finished else 0.0


def score_majority(name: str, problem: Problem, group: list[Completion]) -> float:
    """Return the score of the most frequent boxed answer of a group."""
    answer = majority([extract_boxed(x.text) if x.is_finished else None for x in group])
    return 0.0 if answer is None else get_task(name).score(f"\\boxed{{{answer}}}", problem)


# ── Tasks of lm-eval ──


def find_lm_eval_tasks(names: list[str]) -> Any:
    """Return lm-eval's index of tasks; raise a `UserError` if it is missing or lacks a name.

    Reading the index takes seconds, so it is empty if all tasks are defined here.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            f"{', '.join(names)}{suggest(names[0], TASKS)}: not tasks of dsv3, and tasks of "
            "lm-eval need pip install 'dsv3-ref[eval]'"
        ) from None
    from dsv3_ref.evaluation.lm_eval_adapter import task_config

    theirs = [name for name in names if task_config(name) == name]
    manager = TaskManager(include_defaults=bool(theirs))
    for name in theirs:
        check_task_name(name, manager.all_tasks)
    return manager


def check_task_name(name: str, known: Sequence[str]) -> None:
    """Raise a `UserError` with similar names if lm-eval knows no task of this name."""
    if name not in known:
        own = [*TASKS, "speeches", *(f"lm-{task}" for task in TASKS)]
        raise UserError(
            f"no task {name!r}{suggest(name, [*own, *known])}: choose {', '.join(TASKS)}, a file "
            "such as problems.jsonl, or a task of `lm-eval ls tasks`"
        )


def run_lm_eval(
    policy: Policy, names: list[str], manager: Any, args: EvalConfig, log: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval, `speeches` among them, and return their metrics.

    log: a row per document is added.
    """
    import lm_eval

    from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM, task_config

    model = DSV3LM(policy, args.batch_size, args.max_new_tokens, args.truncate)
    downloads = any(task_config(name) == name for name in names)
    with quiet_lm_eval(), offline_if_unreachable() if downloads else nullcontext():
        try:
            output = lm_eval.simple_evaluate(
                model, tasks=[task_config(name) for name in names], limit=args.limit or None,
                task_manager=manager, num_fewshot=args.num_fewshot, bootstrap_iters=BOOTSTRAP_ITERS,
                system_instruction=args.system or None,
                apply_chat_template=args.apply_chat_template,
                fewshot_as_multiturn=args.fewshot_as_multiturn and args.apply_chat_template,
                random_seed=args.seed, numpy_random_seed=args.seed,
                torch_random_seed=args.seed, fewshot_random_seed=args.seed,
            )  # fmt: skip
        except UserError:
            raise
        except Exception as e:  # no network or a data set that has changed, of many types
            raise UserError(f"lm-eval could not run {', '.join(names)}: {explain(e)}") from e
    for name, documents in output.get("samples", {}).items():
        log += lm_eval_log(name, documents)
    samples = output.get("n-samples", {})
    results = {}
    for name, row in output["results"].items():
        n = {"n": samples[name]["effective"]} if name in samples else {}
        results[name] = n | select_metrics(row)
    if model.num_truncated:
        print(f"{model.num_truncated} of lm-eval's texts were truncated", file=sys.stderr)
        results = {name: row | {"truncated": model.num_truncated} for name, row in results.items()}
    return results


def lm_eval_log(name: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per document of a task, which lm-eval lists once for each of its filters."""
    rows: dict[int, dict[str, Any]] = {}
    for document in documents:
        number = document["doc_id"]
        row = rows.setdefault(number, {
            "task": name, "number": number, "question": document["arguments"][0][0],
            "target": document["target"], "answers": document["resps"], "scores": {},
        })  # fmt: skip
        row["scores"][document["filter"]] = {key: document[key] for key in document["metrics"]}
    return list(rows.values())


def explain(error: BaseException) -> str:
    """Return the message of an error, and the remedy if there is no network."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    if any(word in text for word in OFFLINE_ERRORS):
        return (
            f"{error} (its data set is downloaded on first use, and the hub cannot be reached: "
            "run it once with a network, or copy that machine's HF_HOME and set HF_HUB_OFFLINE=1)"
        )
    return str(error) or type(error).__name__


def select_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics and standard errors of a result of lm-eval by their names."""
    return {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("sample_len", "alias")
    }


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, keep it in this process and from reporting the use of local files."""
    settings = {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_MULTIPROC": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
