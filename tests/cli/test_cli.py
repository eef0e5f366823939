"""The command line: what it accepts, and that every mistake is a sentence and exit code 2."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniruns import metrics, no_report, options, results

from dsv3_ref.checkpoints import native
from dsv3_ref.cli.main import main
from dsv3_ref.config import TINY, V3
from dsv3_ref.optim import RECIPES
from dsv3_ref.training import settings


@pytest.fixture
def said(home, tmp_path, capsys):
    """Run `dsv3 train` with these options more; what it says when it fails with exit code 2."""

    def run(*more) -> str:
        assert main(options(home, tmp_path / "run", *more)) == 2
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        assert not list(tmp_path.glob("run*/*")), "a mistake must not leave a run behind"
        return " ".join((out.out + out.err).replace("│", " ").split())

    return run


# ── Mistakes ──


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--config", "tinny"], ": sizes are tiny, small"),
        (["--config", "tinny"], "(did you mean tiny?)"),
        (["--config", "missing.json"], "no config 'missing.json'"),
        (["--model.n-headz", "3"], "Perhaps you meant: --model.n-heads INT"),
        (["--step", "3"], "Unrecognized options: --step"),
        (["--seed", "x"], "Error parsing --seed: invalid literal for int()"),
        (["--precision", "fp4"], "--precision"),
        (["--model.n-heads", "0"], "n_heads must be a whole number of at least 1, not 0"),
        (["--model.n-expert-groups", "3"], "n_routed_experts (4) must be a multiple of"),
        (["--model.n-activated-experts", "5"], "n_activated_experts (5) must fit into"),
        (["--model.vocab-size", "264"], "vocab_size 264 is too small"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "3000000000"], "--steps must be at most 10,000,000"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--seed", str(2**63)], "--seed must be a whole number from 0"),
        (["--seq-len", "65"], "--seq-len 65 is longer than --model.max-seq-len 64"),
        (["--seq-len", "1"], "--seq-len must exceed the 1 tokens that MTP looks ahead"),
        (["--model.dim", "60"], "--model.dim and --model.moe-inter-dim must be multiples of 8"),
        (
            ["--global-batch-size", "0"],
            "--global-batch-size and --start-batch-size must be at least 1",
        ),
        (["--lr", "nan"], "--lr must be a number"),
        (["--batch-rampup-frac", "0"], "--batch-rampup-frac must be above 0"),
        (["--balance-loss-scope", "rows"], "invalid choice 'rows'"),
        (["--decay-start", "1"], "--decay-start must be below --decay-end"),
        (["--fim-rate", "1.5"], "--fim-rate must be a fraction from 0 to 1"),
        (["--keep-latest-k", "0"], "--keep-latest-k and --val-sequences must be at least 1"),
        (["--micro-batch", "-1"], "--micro-batch and --save-every must be at least 0"),
        (["--ema-decay", "1"], "--ema-decay must be from 0 to below 1"),
        (
            ["--skip-grad-norm-factor", "0.5"],
            "--skip-grad-norm-factor must be above 1, or 0 for no limit",
        ),
        (
            ["--max-skipped-steps", "0"],
            "--grad-norm-window and --max-skipped-steps must be at least 1",
        ),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--data"], "--data needs at least one source"),
        (["--data", "sotu=much"], "the weight in 'sotu=much' is not a number"),
        (["--data", "missing.txt"], "no data at 'missing.txt': give a file, a folder, sotu"),
        (["--tokenizer", "missing"], "no tokenizer.json in missing"),
    ],
)
def test_a_mistake_is_a_sentence(more, sentence, said):
    assert sentence in said(*more)


def test_a_field_of_a_config_that_is_none(said, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"n_head": 3}))
    assert "there is no option 'n_head' (did you mean n_heads" in said("--config", path)
    path.write_text("{")
    assert f"{path} is not JSON" in said("--config", path)


def test_data_that_cannot_be_trained_on(said, tmp_path):
    path = tmp_path / "data.txt"
    path.touch()
    assert f"{path} is empty" in said("--data", path)
    path.write_text("One paragraph\nonly.")
    assert f"{path} is one document, and one must be held out" in said("--data", path)
    path.write_bytes("Caf\xe9\n\nau lait".encode("latin-1"))
    assert f"{path} is not UTF-8 text" in said("--data", path)
    table = tmp_path / "data.jsonl"
    table.write_text('{"body": 1}\n')
    assert f"{table} has no column 'text', only body" in said("--data", table)


def test_out_that_is_a_file_or_cannot_be_made(home, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(options(home, file)) == 2
    assert f"--out {file} is a file; give a directory" in capsys.readouterr().err
    assert main(options(home, file / "run")) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_full_disk_before_the_first_step(home, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dsv3_ref.training.loop.save_tokenizer", full)
    assert main(options(home, tmp_path / "run")) == 2
    assert "No space left on device. No checkpoint was written yet." in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["trian"], ["--tiny"]])
def test_no_such_command(argv, capsys):
    assert main(argv) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: dsv3 COMMAND")
    for name in "train data extend sft reward rl align eval generate chat serve bench".split():
        assert f"\n  {name} " in out
    assert all(f"\n  {name} " in out for name in ("ablate", "preflight", "plan"))


# ── Nothing to resume, or not so ──


def test_resume_of_nothing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "--out", "nowhere"]) == 2
    assert "nothing to resume: nowhere holds no run.json" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "nothing to resume: runs/tiny holds no run.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_ref.training.report.write_report", no_report)
        assert main(options(home, home / "finished", "--steps", "1")) == 0
    return home / "finished"


@pytest.fixture
def one_step(finished, tmp_path):
    """A copy of a finished run of one step."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--steps", "2"], "--steps 1, not 2"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--model.dim", "32"], "--model.dim 64, not 32"),
        (["--config", "tiny"], "mini.json, not tiny"),
        (["--fim-rate", "0"], "--fim-rate 0.1, not 0.0"),
    ],
)
def test_a_resumed_run_keeps_its_settings(more, sentence, one_step, capsys):
    assert main(["train", "--resume", "--out", str(one_step), *more]) == 2
    error = capsys.readouterr().err
    assert f"{one_step} was started with " in error
    assert sentence in error


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": {}}', '{"settings": {"model": {}}}']
)
def test_a_damaged_run_json(text, one_step, capsys):
    path = one_step / "run.json"
    path.write_text(text)
    assert main(["train", "--resume", "--out", str(one_step)]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_data_that_is_gone(home, tmp_path, one_step, capsys):
    path = one_step / "run.json"
    path.write_text(path.read_text().replace(str(home / "text"), str(tmp_path / "gone")))
    assert main(["train", "--resume", "--out", str(one_step)]) == 2
    assert "no data at " in capsys.readouterr().err
    assert path.exists()


# ── What it accepts ──


def test_sizes_give_the_defaults():
    assert settings.parse_args([]).model == TINY
    args = settings.parse_args(["--config", "v3", "--steps", "5", "--model.n-layers", "4"])
    assert args.recipe.steps == 5
    assert args.recipe.lr == RECIPES["v3"].lr
    assert args.model.n_layers == 4
    assert args.model.dim == V3.dim
    assert settings.parse_args(["--config=small"]).config == "small"


def test_a_json_file_gives_the_defaults(home):
    args = settings.parse_args(["--config", str(home / "mini.json"), "--model.dim", "32"])
    assert args.model.dim == 32
    assert args.model.vocab_size == 400
    assert args.recipe == RECIPES["tiny"]


def test_out_defaults_to_the_name_of_the_config(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv3_ref.training.report.write_report", no_report)
    argv = options(home, "x", "--steps", "1")
    at = argv.index("--out")
    for _ in range(2):
        assert main(argv[:at] + argv[at + 2 :]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["mini", "mini-2"]


@pytest.mark.usefixtures("without_reports")
def test_sources_are_mixed_and_named(home, tmp_path, one_step):
    more = ["--data", home / "text=0.5", "stdlib=0.5", "--tokenizer", one_step, "--steps", "1"]
    assert main(options(home, tmp_path / "two", *more)) == 0
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert list(summary["val_bpb_by_source"]) == [str(home / "text"), "stdlib"]
    assert len(summary["samples"]) == 4
    kept, given = (r / "tokenizer.json" for r in (tmp_path / "two", one_step))
    assert kept.read_bytes() == given.read_bytes()


def test_streams_train_too_and_go_on(home, tmp_path, monkeypatch):
    """With more than the 64 documents that a stream holds out."""
    monkeypatch.setattr("dsv3_ref.training.report.write_report", no_report)
    path, run = tmp_path / "data.txt", tmp_path / "run"
    path.write_text("\n\n".join(f.read_text() for f in (home / "text").iterdir()) + "\n\nx y" * 80)
    assert main(options(home, run, "--data", path, "--streaming")) == 0
    before = results(run)
    shutil.rmtree(native.list_checkpoints(run)[-1])
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert results(run) == before


def test_a_model_of_dense_layers_alone(home, tmp_path):
    """Nothing to balance, and the report says so."""
    run = tmp_path / "run"
    more = ["--model.n-dense-layers", "2", "--model.n-mtp-layers", "0", "--steps", "2"]
    assert main(options(home, run, *more)) == 0
    assert [r["expert_load"] for r in metrics(run)] == [[], []]
    assert (run / "report.html").is_file()


def test_help_names_every_option(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("--config ", "--seed ", "--out ", "--resume,", "--steps ", "--model.dim "):
        assert name in out
    assert main(["--help"]) == 0


def test_help_comes_without_the_slow_libraries():
    code = (
        "import sys; from dsv3_ref.cli import main as cli; cli.main(['train', '--help']);"
        "slow = {'datasets', 'matplotlib', 'tokenizers'}; sys.exit(str(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"


# ── As a process ──


@pytest.mark.parametrize(
    "module", ["dsv3_ref", pytest.param("dsv3_ref.cli.main", marks=pytest.mark.full)]
)
def test_the_module_is_the_command(module, home, tmp_path):
    argv = options(home, tmp_path / "run", "--steps", "0")
    done = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --steps must be at least 1\n"


def test_the_console_script_leaves_with_its_code(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["dsv3", "train", "--steps", "0"])
    main()
    assert left[0] == 2
