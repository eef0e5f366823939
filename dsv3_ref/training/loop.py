"""The training loop, the same for every task, on one process or many."""

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import save_tokenizer
from dsv3_ref.data.tokenizer_settings import copy_tokenizer_settings
from dsv3_ref.moe import max_vio
from dsv3_ref.optim import get_bias_update_rate, get_lr, get_mtp_weight
from dsv3_ref.pretrain import StepStats
from dsv3_ref.training import checkpointer, profiling, settings
from dsv3_ref.checkpoints.native import step_number
from dsv3_ref.training.checkpointer import Checkpointer
from dsv3_ref.training.malloc import tune_malloc
from dsv3_ref.training.loggers import WriteRow
from dsv3_ref.training.metrics import ignore_row, last_row, open_log
from dsv3_ref.training.recompute import saved_tensors
from dsv3_ref.training.spike_guard import EXIT_CODES, catch_interrupt, catch_signals
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess, StepHyperparams, Strategy
from dsv3_ref.training.task import Batch, Task, tokenizer_dir

# ── The loop ──


def train(
    task: Task, strategy: Strategy, run_dir: Path, command: str | None, signals: list[int]
) -> None:
    """Train from the newest checkpoint, or from step 0, and write the report.

    Every `save_every` steps the loop validates and writes a checkpoint. After a signal it finishes
    the step, writes a checkpoint without validation and exits with the signal's code. Such a
    checkpoint is never ranked nor rolled back to, so the resumed run equals an undisturbed one.
    signals: the signals received so far.
    """
    with profiling.deterministic(task.config.deterministic):
        run_steps(start_run(task, strategy, run_dir, command), signals)


def run_steps(run: Run, signals: list[int]) -> None:
    """Load the newest checkpoint, take the remaining steps and write the results."""
    task, strategy = run.task, run.strategy
    run_dir = run.run_dir
    state, checkpoints = run.state, Checkpointer(run)
    checkpoints.load_latest()
    every = run.config.save_every or max(1, run.num_steps // 10)
    row: dict[str, Any] | None = None
    profiling.require_device(run.config, strategy.device)
    with open_main_log(run) as write_row, catch_interrupt(signals):
        while state.step < run.num_steps:
            if state.spike_guard.should_roll_back:
                roll_back(run, checkpoints)
            with profiling.profile_step(run.config, run_dir, state.step + 1, strategy.device):
                row = take_step(run)
            is_due = state.step == run.num_steps or state.step % every == 0
            if is_due:
                row |= task.validate(run)
            write_row(row)  # before the checkpoint, so that a checkpoint has all its rows
            should_stop = strategy.should_stop(signals)
            if is_due or should_stop:
                is_final = state.step == run.num_steps or should_stop
                checkpoints.save(row, is_due, is_final)
            if should_stop:
                break
    if state.step < run.num_steps:
        raise SystemExit(EXIT_CODES[signals[-1]])
    if strategy.is_main:
        write_results(run, row or last_row(run_dir))
    else:
        task.summarize_rank(run)


def start_run(task: Task, strategy: Strategy, run_dir: Path, command: str | None) -> Run:
    """Write run.json and build a run at step 0."""
    if strategy.is_main and not task.config.resume:
        write_json(run_dir / "run.json", settings.describe_training(task.config, command))
    return build_run(task, strategy, run_dir)


def open_main_log(run: Run) -> AbstractContextManager[WriteRow]:
    """Save the tokenizer, print what is trained, and open the log; on other ranks do nothing."""
    if not run.strategy.is_main:
        return nullcontext(ignore_row)
    save_tokenizer(run.data.tokenizer, run.run_dir / "tokenizer.json")
    if folder := tokenizer_dir(run.config):
        copy_tokenizer_settings(folder, run.run_dir)
    print(
        f"{run.config.config}: {run.strategy.num_params / 1e6:.1f}M parameters (MTP included) "
        f"on {run.strategy.description}"
    )
    print(f"{run.num_steps} steps, {run.task.describe_data(run)} → {run.run_dir}")
    if run.state.step:
        print(f"continuing after step {run.state.step}")
    return open_log(run.config, run.run_dir, run.state.step, run.num_steps)


def write_results(run: Run, row: dict[str, Any]) -> None:
    """Write the summary and the report, and print the result."""
    from dsv3_ref.training.report import write_report  # imports matplotlib: half a second

    write_json(run.run_dir / "summary.json", run.task.summarize(run, row))
    report = write_report(run.run_dir)
    print(f"{run.task.result_line(run, row)}; open {report}")


# ── One step ──


def take_step(run: Run) -> dict[str, Any]:
    """Train one step and return its metrics row, without validation."""
    state, recipe = run.state, run.config.recipe
    run.strategy.begin_step(state.step)
    start, progress = time.perf_counter(), run.progress
    hyperparams = StepHyperparams(
        recipe,
        get_lr(recipe, state.step, progress),
        get_bias_update_rate(recipe, progress),
        get_mtp_weight(recipe, progress),
        state.spike_guard.grad_norm_limit,
    )
    batch, stats = train_batch(run, hyperparams)
    state.step += 1
    if state.ema and not stats.skipped:
        state.ema.update()
    state.spike_guard.update(stats)
    state.last_stats = stats
    num_tokens = run.strategy.all_reduce({"tokens": run.task.num_tokens(batch)})["tokens"]
    seconds = time.perf_counter() - start
    state.tokens += int(num_tokens)
    state.seconds += seconds
    row = {"step": state.step, "tokens": state.tokens} | stats_row(run, stats)
    rate_per_device = num_tokens / seconds / settings.world_size()
    row |= run.strategy.straggler_metrics(seconds)
    return run.task.metrics(run, row) | {
        "lr": hyperparams.lr, "bias_update_rate": hyperparams.bias_update_rate,
        "mtp_weight": hyperparams.mtp_weight, "batch_size": len(batch),
        "tokens_per_s": num_tokens / seconds, "tokens_per_s_per_device": rate_per_device,
        "mfu": profiling.mfu(run.config, run.strategy.device, rate_per_device),
        "seconds": state.seconds,
    }  # fmt: skip


def train_batch(run: Run, hyperparams: StepHyperparams) -> tuple[Batch, StepStats]:
    """Draw the batch of the current step and train on it.

    Raise a `UserError` with a smaller --micro-batch if the device runs out of memory.
    """
    config, strategy = run.config, run.strategy
    batch: Batch = None
    try:
        batch = run.task.next_batch(run, run.data.batch_size_schedule[run.state.step])
        recompute = saved_tensors(True) if config.recompute else nullcontext()
        with strategy.precision_context(), recompute:
            return batch, train_minibatches(run, batch, hyperparams)
    except torch.OutOfMemoryError:
        rows = config.micro_batch or (2 if batch is None else len(batch))
        hint = f"--micro-batch {max(1, rows // 2)} computes fewer rows at a time"
        raise UserError(f"{strategy.device} is out of memory: {hint}") from None


def train_minibatches(run: Run, batch: Batch, hyperparams: StepHyperparams) -> StepStats:
    """Take the optimizer steps of a batch; return their mean loss and summed expert loads.

    The other statistics are those of the first skipped step or, without one, of the last step.
    """
    steps = [
        run.strategy.train_step(run, minibatch, hyperparams)
        for minibatch in run.task.minibatches(run, batch)
    ]
    worst = next((stats for stats in steps if stats.skipped), steps[-1])
    loss = sum(stats.loss for stats in steps) / len(steps)
    load_le = torch.stack([stats.load_le for stats in steps]).sum(0)
    return worst._replace(loss=loss, load_le=load_le)


def stats_row(run: Run, stats: StepStats) -> dict[str, Any]:
    """Return the part of a metrics row that the step has measured."""
    fraction_le = stats.load_le / stats.load_le.sum(-1, keepdim=True)
    biases = run.strategy.expert_biases()
    rolled_back_from, run.state.rolled_back_from = run.state.rolled_back_from, None
    return {
        "loss": finite_or_none(stats.loss),
        "loss_total": finite_or_none(stats.total),
        "mtp_loss": [finite_or_none(x) for x in stats.mtp],
        "val_loss": None,
        "val_bpb": None,
        "val_loss_ema": None,
        "grad_norm": finite_or_none(stats.grad_norm),
        "skipped": stats.skipped,
        "rolled_back_from": rolled_back_from,
        "expert_load": [[round(x, 6) for x in layer] for layer in fraction_le.tolist()],
        "max_vio": [round(max_vio(load_e), 4) for load_e in stats.load_le],
        "expert_bias": [[] if b is None else [round(x, 6) for x in b.tolist()] for b in biases],
    } | run.strategy.step_metrics()


def finite_or_none(value: float) -> float | None:
    """Return a finite value as it is, and None for NaN and ±∞, which JSON lacks."""
    return value if math.isfinite(value) else None


def roll_back(run: Run, checkpoints: Checkpointer) -> None:
    """Load the newest good checkpoint without its data position; abort on a second rollback to it.

    The run then continues with data that it has not seen.
    """
    state = run.state
    folder = checkpoints.find_rollback()
    if folder is None or step_number(folder) == state.spike_guard.last_rollback:
        abort_after_skips(run)
    rolled_back_from = state.step
    checkpoints.roll_back_to(folder)
    state.rolled_back_from = rolled_back_from
    if run.strategy.is_main:
        tqdm.write(
            f"{state.spike_guard.max_skipped_steps} steps skipped: rolled back from step "
            f"{rolled_back_from} to {state.step}; the data in between is not replayed",
            sys.stderr,
        )


def abort_after_skips(run: Run) -> NoReturn:
    """Raise the `UserError` of a run that a rollback cannot help."""
    stats = run.state.last_stats
    assert stats is not None, "a rollback follows a step"
    more = f", and {run.state.spike_guard.consecutive_skips} consecutive steps were skipped"
    if stats.skipped == "nan" and not math.isfinite(stats.total):
        run.abort("loss", stats.total, more)
    run.abort("gradient", stats.grad_norm, more)


# ── A run in one process ──


def run_in_process(task: Task, command: str | None = None) -> Path:
    """Train a task in this process and return the directory of the run."""
    config = task.config
    settings.validate_args(config)
    tune_malloc()
    with settings.open_run_dir(config) as run_dir, catch_signals() as signals:
        try:
            train(task, SingleProcess(config), run_dir, command, signals)
        except BrokenPipeError:  # the reader of the output has left
            raise
        except OSError as e:
            last = checkpointer.describe_last(run_dir)
            raise UserError(f"training stopped: {e}. {last}") from e
        except (KeyboardInterrupt, SystemExit):
            remedy = "before the first step: nothing was written"
            if settings.has_metrics(run_dir):
                remedy = f"resume with: dsv3 {config.COMMAND} --resume --out {run_dir}"
            print(f"\nstopped; {remedy}", file=sys.stderr)
            raise
    return run_dir
