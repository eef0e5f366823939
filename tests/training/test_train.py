"""A run: what it leaves behind, that kill -9 costs nothing, and how it ends when it must."""

import errno
import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file
from miniruns import MINI, STEPS, metrics, options, results, start

from dsv3_ref import pretrain
from dsv3_ref.checkpoints import native
from dsv3_ref.checkpoints.manifest import write_manifest
from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.optim import ema_update
from dsv3_ref.training import checkpointer, loop, settings
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.metrics import MetricsWriter
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess
from dsv3_ref.training.task import PretrainTask, evaluate_loss


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing disturbed, with its figures."""
    assert main.main(options(home, home / "whole")) == 0
    return home / "whole"


@pytest.fixture(scope="module")
def interrupted(home):
    """A run stopped in step 8, after the checkpoint of step 6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stop_in(8, loop.take_step))
        assert main.main(options(home, home / "interrupted")) == 130
    return home / "interrupted"


@pytest.fixture
def half(interrupted, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(interrupted, tmp_path / "half")


def stop_in(step: int, take_step, error=KeyboardInterrupt):
    """`take_step` until it raises in this step."""

    def stopping(run):
        if run.state.step + 1 == step:
            raise error
        return take_step(run)

    return stopping


def go_on(run, *more) -> int:
    return main.main(["train", "--resume", "--out", str(run), *more])


def new_run(home, tmp_path, *more) -> Run:
    """A run without a command around it."""
    config = settings.parse_args(options(home, tmp_path, *more)[1:])
    return build_run(PretrainTask(config), SingleProcess(config), tmp_path)


# ── What is left behind ──


def test_a_row_a_step(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows][-1] == 32 * sum(row["batch_size"] for row in rows)
    for row in rows:
        assert len(row["mtp_loss"]) == MINI["n_mtp_layers"]
        assert (
            len(row["expert_load"]) == len(row["expert_bias"]) == len(row["max_vio"]) == 2
        )  # with MTP's
        assert all(len(load) == MINI["n_routed_experts"] for load in row["expert_load"])
        assert all(abs(sum(load) - 1) < 1e-5 for load in row["expert_load"])
        assert row["grad_norm"] > 0 < row["tokens_per_s"]
        assert (
            (row["val_loss"] is None) == (row["val_bpb"] is None) == (row["step"] not in (3, 6, 8))
        )
    assert set(rows[0]) >= {"bias_update_rate", "mtp_weight", "batch_size", "seconds", "lr"}


def test_the_loss_is_the_main_one_in_nats_and_falls(whole):
    """At first all tokens are about equally likely; the total adds λ·MTP and α·balance."""
    first, *_, last = metrics(whole)
    assert first["loss"] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.3)
    extra = first["loss_total"] - first["loss"] - first["mtp_weight"] * first["mtp_loss"][0]
    assert 0 < extra < 0.01
    assert last["loss"] < first["loss"] - 1


def test_max_vio_fits_the_load(whole):
    row = metrics(whole)[-1]
    for share, vio in zip(row["expert_load"], row["max_vio"]):
        assert vio == pytest.approx(max(share) * len(share) - 1, abs=1e-3)


def test_the_run_describes_itself(whole, home):
    run = json.loads((whole / "run.json").read_text())
    assert run["command"].startswith("dsv3 train --config ")
    assert run["moe_layers"] == ["layers.1.ffn", "mtp.0.block.ffn"]
    assert run["settings"]["recipe"]["steps"] == STEPS
    assert run["params"]["trained"] == sum(p.numel() for p in load(whole).parameters())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val_bpb"] == metrics(whole)[-1]["val_bpb"]
    assert summary["val_bpb"] == summary["val_bpb_by_source"][str(home / "text")]
    assert summary["baselines"]["gzip"] > 0
    assert summary["samples"][0]["prompt"].startswith("Number ")
    assert "bits per byte" in (whole / "report.html").read_text()


def test_checkpoints_load_and_so_does_the_run(whole):
    steps = native.list_checkpoints(whole)
    assert [p.name for p in steps] == ["step_0000003", "step_0000006", "step_0000008"]
    newest, run = load(steps[-1]).state_dict(), load(whole).state_dict()
    assert all(torch.equal(newest[name], run[name]) for name in newest)
    assert not torch.equal(load(steps[0]).head.weight, run["head.weight"])


def test_a_run_is_never_overwritten(whole, home, without_reports):
    before = results(whole)
    assert main.main(options(home, whole, "--steps", "1", "--seed", "5")) == 0
    assert results(whole) == before
    second = whole.with_name("whole-2")
    assert len(metrics(second)) == 1
    shutil.rmtree(second)


def test_the_seed_decides(whole, home, tmp_path, without_reports):
    """The same again is the same, another seed is another model on other rows."""
    assert main.main(options(home, tmp_path / "again")) == 0
    assert results(tmp_path / "again") == results(whole)
    assert main.main(options(home, tmp_path / "other", "--seed", "1", "--steps", "1")) == 0
    assert metrics(tmp_path / "other")[0]["loss"] != metrics(whole)[0]["loss"]


# ── kill -9 ──


def same_as_whole(run, whole) -> bool:
    hidden = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    return results(run) == results(whole) and hidden == [] and (run / "report.html").is_file()


DEADLY = {
    "before there is a model": ("dsv3_ref.training.strategy.Transformer", 1),
    "writing the first checkpoint": ("dsv3_ref.training.strategy.save_file", 1),
    "before the second has its name": ("dsv3_ref.checkpoints.atomic.publish_dir", 2),
    "before old ones are dropped": ("dsv3_ref.training.checkpointer.prune", 2),
    "dropping an old one": ("shutil.rmtree", 4),
    "after the last step": ("dsv3_ref.training.loop.write_results", 1),
}


@pytest.mark.parametrize("moment", DEADLY)
def test_kill_9_at_the_worst_moments(moment, whole, home, tmp_path, without_reports):
    """What a killed run leaves is swept away, and the rest is as if nothing had happened."""
    run, keep = tmp_path / "run", ["--keep-latest-k", "1"] if moment.startswith("dropping") else []
    process = start(home, options(home, run, *keep), 1, *DEADLY[moment])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (run / "report.html").exists()
    assert go_on(run) == 0
    assert same_as_whole(run, whole)


def killed_once(home, run, threads: int, seconds: float, number: int) -> bool:
    """Send a run a signal after this time; finish it. Whether the signal came before the end."""
    process = start(home, options(home, run), threads)
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    begun = ["--resume"] if (run / "run.json").exists() else []  # else the sentence says so too
    process, cut = start(home, options(home, run, *begun), threads), process.exitcode != 0
    process.join()
    assert process.exitcode == 0
    return cut


KINDS = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]


@pytest.mark.parametrize(
    ("threads", "kills"),
    [(1, 2), (2, 1), *(pytest.param(t, 20, marks=pytest.mark.full) for t in (1, 2))],
)
def test_kill_9_at_random_moments(threads, kills, home, tmp_path):
    """Whenever it comes, every later row and the last checkpoint are bit for bit the same."""
    began, undisturbed = time.monotonic(), tmp_path / "undisturbed"
    start(home, options(home, undisturbed), threads).join()
    took, cut = time.monotonic() - began, 0
    for i in count():
        seconds, number = random.uniform(0, took), KINDS[cut % len(KINDS)]
        cut += (early := killed_once(home, tmp_path / str(i), threads, seconds, number))
        assert same_as_whole(tmp_path / str(i), undisturbed), f"{number} after {seconds} seconds"
        took = took if early else seconds
        if cut == kills:
            return


# ── Signals that ask ──


ASKED = [(1, signal.SIGUSR1, 75), (6, signal.SIGTERM, 143), (8, signal.SIGUSR1, 75)]
ASKED_MORE = [(1, signal.SIGTERM, 143), (6, signal.SIGUSR1, 75), (8, signal.SIGTERM, 143)]


@pytest.mark.parametrize(
    ("at", "number", "code"),
    [*ASKED, *(pytest.param(*case, marks=pytest.mark.full) for case in ASKED_MORE)],
)
def test_a_signal_ends_the_run_after_its_step(
    number, code, at, whole, home, tmp_path, without_reports
):
    """Also in a step with a planned checkpoint; in the last step the run simply ends."""
    run = tmp_path / "run"
    process = start(
        home, options(home, run), 1, "dsv3_ref.training.strategy.train_step", at, number
    )
    process.join()
    assert process.exitcode == (0 if at == STEPS else code)
    assert native.step_number(native.list_checkpoints(run)[-1]) == len(metrics(run)) == at
    assert go_on(run) == 0
    assert same_as_whole(run, whole)
    kept = [p.name for p in native.list_checkpoints(run)]
    assert (
        kept == [p.name for p in native.list_checkpoints(whole)] or at == 1
    )  # no 1 where 3 follow


def test_signals_are_the_callers_again(home, tmp_path, without_reports):
    before = [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)]
    assert main.main(options(home, tmp_path / "run", "--steps", "1")) == 0
    assert [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)] == before


# ── Going on ──


def test_a_half_written_row_and_stale_folders_are_swept(half, whole, without_reports):
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 3.1')
    for name in (".step_0000008.dsv3-tmp", ".step_0000003.dsv3-tmp"):
        (half / "checkpoints" / name).mkdir()
    assert len(metrics_lines(half)) == 8
    assert go_on(half) == 0
    assert same_as_whole(half, whole)


def metrics_lines(run) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_the_same_command_with_resume_goes_on(half, home, whole, without_reports, capsys):
    assert main.main(options(home, half, "--resume")) == 0
    assert same_as_whole(half, whole)
    assert "continuing after step 6" in capsys.readouterr().out


def test_a_finished_run_only_writes_its_report_again(half, whole, without_reports, capsys):
    for _ in range(2):
        assert go_on(half) == 0
        assert same_as_whole(half, whole)


def test_resume_alone_takes_the_newest_run(
    home, interrupted, tmp_path, monkeypatch, without_reports
):
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "mini-2"):
        shutil.copytree(interrupted, tmp_path / "runs" / name)
    assert main.main(["train", "--resume", "--config", str(home / "mini.json")]) == 0
    assert not (tmp_path / "runs" / "mini" / "report.html").exists()
    assert (tmp_path / "runs" / "mini-2" / "report.html").exists()


def test_the_last_and_the_best_are_kept(home, tmp_path, monkeypatch, without_reports):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("dsv3_ref.training.task.evaluate_loss", lambda *_: (next(losses, 9.0), 1.0))
    more = ["--save-every", "1", "--keep-latest-k", "2"]
    assert main.main(options(home, tmp_path / "run", *more)) == 0
    kept = [native.step_number(p) for p in native.list_checkpoints(tmp_path / "run")]
    assert kept == [2, 7, 8]
    assert all(load(p) for p in native.list_checkpoints(tmp_path / "run"))


def test_settings_that_do_not_shape_the_losses_may_change(half, whole, without_reports):
    more = ["--save-every", "2", "--keep-latest-k", "1", "--val-sequences", "8"]
    assert go_on(half, *more) == 0
    assert [row["loss"] for row in metrics(half)] == [row["loss"] for row in metrics(whole)]
    assert [native.step_number(p) for p in native.list_checkpoints(half)] == [8]


# ── Bad ends ──


PATIENT = ["--grad-norm-window", "2", "--max-skipped-steps", "2"]
FACTORS = {"nan": float("nan"), "spike": 1e4}


def batches(home, tmp_path, *steps: int) -> list[torch.Tensor]:
    """What an undisturbed run reads in these steps."""
    run = new_run(home, tmp_path)
    sizes = run.data.batch_size_schedule
    read = {}
    for step in range(1, max(steps) + 1):
        read[step] = run.state.loader.next_batch(sizes[min(step, STEPS) - 1])
    return [read[step] for step in steps]


def poison(why: str, bad: list[torch.Tensor]):
    """`losses` whose main part, and gradient, is many times too large for some batches."""
    real = pretrain.compute_losses

    def poisoned(model, tokens_bs, *args):
        parts = real(model, tokens_bs, *args)
        factor = FACTORS[why] if any(torch.equal(tokens_bs, x) for x in bad) else 1.0
        return parts._replace(main=parts.main * factor)

    return poisoned


@pytest.mark.parametrize("why", FACTORS)
def test_a_bad_step_is_skipped_and_passed_over(why, home, tmp_path, monkeypatch):
    """Weights, biases and limit stay, the batch and the step are used up, later steps go on."""
    monkeypatch.setattr(pretrain, "compute_losses", poison(why, batches(home, tmp_path, 4)))
    run = new_run(home, tmp_path, *PATIENT)
    rows = []
    for step in range(1, 7):
        before = {name: x.clone() for name, x in run.strategy.model.state_dict().items()}
        norms = list(run.state.spike_guard.norms)
        drawn = run.state.loader.streams[0].rng.bit_generator.state
        rows.append(loop.take_step(run))
        same = all(
            torch.equal(x, before[name]) for name, x in run.strategy.model.state_dict().items()
        )
        assert same == (list(run.state.spike_guard.norms) == norms) == (step == 4)
        assert run.state.loader.streams[0].rng.bit_generator.state != drawn
    assert [row["skipped"] for row in rows] == [None] * 3 + [why] + [None] * 2
    assert rows[3]["grad_norm"] is None or rows[3]["grad_norm"] > 10 * rows[2]["grad_norm"]
    json.loads(json.dumps(rows, allow_nan=False))


def interrupt():
    raise KeyboardInterrupt


def ask_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("death", [interrupt, ask_to_end])
def test_bad_steps_in_succession_go_back_past_their_data(
    death, home, tmp_path, monkeypatch, without_reports
):
    """From step 5 to the checkpoint of step 3; the same with a death before, between or after."""
    monkeypatch.setattr(pretrain, "compute_losses", poison("nan", batches(home, tmp_path, 4, 5)))
    whole = tmp_path / "whole"
    assert main.main(options(home, whole, *PATIENT)) == 0
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["rolled_back_from"] for row in rows] == [None] * 3 + [5] + [None] * 4
    assert not any(row["skipped"] for row in rows)
    for call in (2, 5, 6, 8):
        dies_in_call(call, death, options(home, tmp_path / str(call), *PATIENT))
        assert go_on(tmp_path / str(call)) == 0
        assert results(tmp_path / str(call)) == results(whole), call


def dies_in_call(at: int, death, argv) -> None:
    """A run that meets its death in this step, counted with those that are given up."""
    real, calls = loop.take_step, count(1)

    def take_step(run):
        if next(calls) == at:
            death()
        return real(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        assert main.main(argv) in (130, 143)


@pytest.mark.parametrize("why", FACTORS)
def test_steps_that_stay_bad_stop_the_run(why, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        pretrain, "compute_losses", poison(why, batches(home, tmp_path, *range(4, 20)))
    )
    assert main.main(options(home, tmp_path / "run", *PATIENT)) == 2
    said = capsys.readouterr().err
    assert "back from step 5 to 3" in said
    assert "became" in said.splitlines()[-1]
    assert "at step 5, and 2 consecutive steps were skipped, so training stopped" in said
    assert f"last good checkpoint is {tmp_path}/run/checkpoints/step_0000003" in said
    assert load(tmp_path / "run").head.weight.isfinite().all()


def test_a_wild_learning_rate(home, tmp_path, capsys):
    assert main.main(options(home, tmp_path / "run", "--lr", "1e30")) == 2
    said = capsys.readouterr().err
    assert "became" in said
    assert "A lower --lr usually helps." in said


def test_weights_that_validate_to_no_number_are_not_saved(home, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, float("nan")])
    monkeypatch.setattr("dsv3_ref.training.task.evaluate_loss", lambda *_: (next(losses), 1.0))
    assert main.main(options(home, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "the validation loss became nan at step 6" in said
    assert "step_0000003. A lower" in said
    assert len(native.list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "name",
    ["dsv3_ref.training.strategy.save_file", "dsv3_ref.checkpoints.native.write_safetensors"],
)
def test_a_full_disk_leaves_and_names_the_checkpoint_before(name, half, whole, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        assert go_on(half) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert f"{half}/checkpoints/step_0000006." in said
    assert len(native.list_checkpoints(half)) == 2
    monkeypatch.setattr("dsv3_ref.training.loop.write_results", lambda *_: None)
    assert go_on(half) == 0
    assert results(half) == results(whole)


def test_a_full_disk_may_also_meet_a_row(half, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsWriter, "write", full)
    assert go_on(half) == 2
    assert f"No space left on device. The last good checkpoint is {half}" in capsys.readouterr().err


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut_short),
        ("training.safetensors", cut_short),
        ("training.safetensors", lambda path: path.unlink()),
        ("state.json", cut_short),
        ("state.json", lambda path: path.write_text("{}")),
        ("config.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_resumed(
    file, damage, half, whole, without_reports, capsys
):
    newest = native.list_checkpoints(half)[-1]
    damage(newest / file)
    assert go_on(half) == 0
    said = capsys.readouterr().err
    assert f"{newest / file} is damaged" in said and "resuming from" in said
    assert newest.with_name(f"damaged-{newest.name}").is_dir()
    assert same_as_whole(half, whole)


def test_without_a_whole_checkpoint_nothing_is_resumed(half, capsys):
    for folder in native.list_checkpoints(half):
        (folder / "manifest.json").unlink()
    before = sorted(half.rglob("*"))
    assert go_on(half) == 2
    said = capsys.readouterr().err
    assert "has no manifest.json: it is incomplete" in said
    assert f"all checkpoints of {half} are damaged" in said
    assert sorted(half.rglob("*")) == before
    assert go_on(half, "--no-verify") == 0


def rewrite_training_tensors(folder, change) -> None:
    """Change the optimizer state of a checkpoint; its manifest fits what is there afterwards."""
    tensors = load_file(folder / "training.safetensors")
    change(tensors)
    save_file(tensors, folder / "training.safetensors")
    about = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {k: about[k] for k in ("mesh", "fingerprints")})


@pytest.mark.parametrize("kind", ["exp_avg.", "exp_avg_sq.", "exp_avg.norm.weight"])
def test_an_incomplete_optimizer_state_is_not_resumed(kind, half, capsys):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith(kind)]:
            del tensors[name]

    rewrite_training_tensors(native.list_checkpoints(half)[-1], drop)
    assert go_on(half) == 2
    assert f"lacks {kind}" in capsys.readouterr().err


def edit_text(home, half) -> None:
    path = sorted((home / "text").iterdir())[0]
    path.write_text(path.read_text().replace("e", "E", 1))


def add_file(home, half) -> None:
    (home / "text" / "zz.txt").write_text("one more")


def edit_run_json(home, half) -> None:
    run = json.loads((half / "run.json").read_text())
    run["settings"]["recipe"]["lr"] *= 2
    (half / "run.json").write_text(json.dumps(run))


def swap_tokens(home, half) -> None:
    tokenizer = json.loads((half / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (half / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit_text, "has changed: documents from 0 on"),
        (add_file, "documents, not"),
        (edit_run_json, "lr was"),
        (swap_tokens, "the tokenizer has changed"),
    ],
)
def test_a_run_is_not_resumed_with_other_data_tokenizer_or_settings(
    change, words, home, half, capsys
):
    texts = {p: p.read_bytes() for p in (home / "text").iterdir()}
    try:
        change(home, half)
        assert go_on(half) == 2
    finally:
        (home / "text" / "zz.txt").unlink(missing_ok=True)
        for path, content in texts.items():
            path.write_bytes(content)
    said = capsys.readouterr().err
    assert "cannot be resumed" in said and words in said


def test_another_torch_is_noted(half, without_reports, capsys, monkeypatch):
    monkeypatch.setattr(checkpointer, "installed_versions", lambda: {"torch": "2.99.0"})
    assert go_on(half) == 0
    assert "2.99.0 resumes it; results can differ in rounding" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [0, 3, 5.5])
def test_fewer_rows_than_steps_mean_damage(lines, half, capsys):
    path = half / "metrics.jsonl"
    whole_lines = path.read_text().splitlines(keepends=True)
    cut = "".join(whole_lines[: int(lines)]) + whole_lines[int(lines)][: 30 * (lines % 1 > 0)]
    path.write_text(cut)
    assert go_on(half) == 2
    assert "it lacks the row of step 6" in capsys.readouterr().err
    assert path.read_text() == cut


def test_a_stopped_run_says_how_to_go_on(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "take_step", stop_in(2, loop.take_step))
    assert main.main(options(home, tmp_path / "run")) == 130
    assert f"dsv3 train --resume --out {tmp_path}/run" in capsys.readouterr().err


def test_only_one_process_trains_in_a_folder(half, home, capsys, monkeypatch):
    args = settings.parse_args(["--resume", "--out", str(half)])
    with settings.open_run_dir(args):
        assert go_on(half) == 2
    assert f"another process is training in {half}" in capsys.readouterr().err


def test_a_fresh_run_goes_beside_one_that_is_training(home, tmp_path, without_reports):
    """The folder that another process holds is left alone, and never shared."""
    with settings.open_run_dir(settings.parse_args(options(home, tmp_path / "run")[1:])):
        assert main.main(options(home, tmp_path / "run", "--steps", "1")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]
    assert not list((tmp_path / "run").iterdir())


def test_out_of_memory_names_the_remedy(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dsv3_ref.training.strategy.train_step", out_of_memory)
    assert main.main(options(home, tmp_path / "run", "--start-batch-size", "4")) == 2
    assert "cpu is out of memory: --micro-batch 2" in capsys.readouterr().err


def out_of_memory(*_):
    raise torch.OutOfMemoryError


# ── Precision, parts of a batch, TensorBoard ──


def test_micro_batches_change_nothing_but_rounding(home, tmp_path):
    a, b = (new_run(home, tmp_path, "--start-batch-size", "4", "--micro-batch", m) for m in "03")
    for _ in range(3):
        x, y = loop.take_step(a), loop.take_step(b)
        for key in ("loss", "loss_total", "grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-4)
        assert x["expert_load"] == y["expert_load"]
        assert x["expert_bias"] == y["expert_bias"]


def test_bf16_products_over_fp32_weights_and_gradients(home, tmp_path, monkeypatch):
    seen = set()
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        seen.update((p.dtype, p.grad.dtype) for p in parameters)
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    fp32, bf16 = (new_run(home, tmp_path, "--precision", p) for p in ("fp32", "bf16"))
    x, y = loop.take_step(fp32)["loss"], loop.take_step(bf16)["loss"]
    assert seen == {(torch.float32, torch.float32)}
    assert x != y
    assert x == pytest.approx(y, rel=1e-2)
    assert evaluate_loss(bf16.task, bf16, bf16.data.sources[0].name)[0] == pytest.approx(
        evaluate_loss(fp32.task, fp32, fp32.data.sources[0].name)[0], rel=1e-2
    )
    for run, dtype in (
        (bf16, torch.bfloat16),
        (new_run(home, tmp_path, "--optimizer-dtype", "fp32"), None),
    ):
        loop.take_step(run)
        states = run.strategy.optimizer.state.values()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert {state[moment].dtype for state in states} == {dtype or torch.float32}


def test_tensorboard(home, tmp_path, without_reports):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert main.main(options(home, run, "--log", "tensorboard", "--steps", "2")) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    rows = metrics(run)
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows])
    assert {"mtp_loss/1", "val_bpb", "lr", "tokens_per_s"} <= set(events.Tags()["scalars"])


def test_evaluation_weighs_tokens_and_bytes(home, tmp_path):
    """Against log-probabilities of one window after the other, written out."""
    run = new_run(home, tmp_path)
    name = run.data.sources[0].name
    nll, n = 0.0, 0
    for batch in run.data.val[name]:
        for window in batch:
            with torch.no_grad():
                log_p = run.strategy.model(window[None, :-1]).log_softmax(-1)[0]
            nll -= log_p.gather(-1, window[1:, None]).sum().item()
            n += len(window) - 1
    n_bytes = len("".join(run.data.sources[0].val_texts).encode())
    loss, bpb = evaluate_loss(run.task, run, name)
    assert loss == pytest.approx(nll / n, rel=1e-5)
    assert bpb == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-5)


def test_a_tokenizer_too_large_for_the_model(home, whole, tmp_path):
    args = settings.parse_args(options(home, tmp_path, "--tokenizer", whole)[1:])
    with pytest.raises(UserError, match="the model only 300: raise --model.vocab-size to 3"):
        PretrainTask(replace(args, model=replace(args.model, vocab_size=300))).build_data()


# ── The average of the weights ──


EMA_OPTIONS = ["--ema-decay", "0.8"]


def test_the_average_is_the_obvious_loop(home, tmp_path, monkeypatch):
    """Bit for bit, though a thread folds it in, slowly, while the next gradients are computed."""
    fold = EMA.apply_update

    def slowly(self, *args):
        time.sleep(0.02)
        fold(self, *args)

    monkeypatch.setattr(EMA, "apply_update", slowly)
    run = new_run(home, tmp_path, *EMA_OPTIONS)
    want = [torch.zeros_like(p) for p in run.strategy.model.parameters()]
    for step in range(1, 5):
        loop.take_step(run)
        ema_update(want, [p.detach() for p in run.strategy.model.parameters()], 0.8, step)
    run.state.ema.wait()
    assert all(torch.equal(a, b) for a, b in zip(want, run.state.ema.mean.values()))
    before = [p.detach().clone() for p in run.strategy.model.parameters()]
    with run.state.ema.swapped_in():
        assert all(torch.equal(a, p) for a, p in zip(want, run.strategy.model.parameters()))
    assert all(torch.equal(a, p) for a, p in zip(before, run.strategy.model.parameters()))


def test_a_skipped_step_does_not_count_in_the_average(home, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "compute_losses", poison("nan", batches(home, tmp_path, 2)))
    run = new_run(home, tmp_path, *EMA_OPTIONS)
    assert [loop.take_step(run)["skipped"] for _ in range(3)] == [None, "nan", None]
    assert run.state.ema.t == 2


def test_an_averaged_run_goes_on_bit_for_bit_and_is_reported(home, tmp_path, whole):
    """Training itself does not notice the average."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert main.main(options(home, a, *EMA_OPTIONS)) == 0
    dies_in_call(5, interrupt, options(home, b, *EMA_OPTIONS))
    assert go_on(b) == 0
    assert results(a) == results(b)
    rows = metrics(a)
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(whole)]
    assert [row["step"] for row in rows if row["val_loss_ema"] is not None] == [3, 6, 8]
    assert "averaged weights" in (a / "report.html").read_text()
