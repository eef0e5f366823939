"""A start that fails leaves nothing behind: no folder, no run.json, no `-2` the next time."""

import errno
import json
import os

import pytest
import torch
from miniruns import no_report, options

from dsv3_ref.cli.main import main


@pytest.fixture(scope="module")
def base(home):
    """A finished run to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_ref.training.report.write_report", no_report)
        assert main(options(home, home / "base", "--steps", "1")) == 0
    return home / "base"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty current directory, which must be empty afterwards too."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("dsv3_ref.training.report.write_report", no_report)
    yield folder
    assert list(folder.rglob("*")) == []


def fail(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/.cache")


@pytest.mark.parametrize(
    ("place", "error", "code", "sentence"),
    [
        ("training.loop.write_json", FULL, 2, "No space left on device"),
        ("training.loop.save_tokenizer", FULL, 2, "No space left on device"),
        ("training.metrics.MetricsWriter.write", FULL, 2, "No space left on device"),
        ("training.task.open_sources", DENIED, 2, "Permission denied"),
        ("training.task.open_sources", KeyboardInterrupt(), 130, "nothing was written"),
        ("training.strategy.train_step", torch.OutOfMemoryError("x"), 2, "is out of memory"),
        ("training.strategy.build_adamw", MemoryError(), 2, "not enough memory"),
    ],
    ids=["disk, run.json", "disk, tokenizer", "disk, row", "HOME", "Ctrl-C", "GPU", "memory"],
)
def test_a_fault_before_the_first_row(
    place, error, code, sentence, home, empty, monkeypatch, capsys
):
    monkeypatch.setattr(f"dsv3_ref.{place}", fail(error))
    argv = options(home, "a/b/run")
    assert main(argv) == code
    assert sentence in capsys.readouterr().err


def test_an_error_of_our_own_leaves_nothing_either(home, empty, monkeypatch):
    """A traceback is for us, but the user starts again."""
    monkeypatch.setattr("dsv3_ref.training.task.open_sources", fail(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(options(home, "run"))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train --config {mini} --seq-len 32 --data missing.txt", "no data at 'missing.txt'"),
        ("train --config {mini} --seq-len 32 --data {bad} --log tensorboard", "bad.txt"),
        ("train --config {mini} --seq-len 32 --data {text} --tokenizer missing", "tokenizer.json"),
        ("train --init missing", "missing"),
        ("train --resume", "nothing to resume"),
        ("extend --init {base} --data missing.txt --seq-len 32", "no data"),
        ("sft --init {base} --seq-len 32 --data {bad}", "bad.txt"),
        ("reward --init {base} --seq-len 32 --data {bad}", "bad.txt"),
        ("rl --init {base} --tasks missing.jsonl", "missing.jsonl"),
        ("rl --init missing --tasks sums", "missing"),
        ("data prepare --out shards --data {bad} --vocab-size 400", "bad.txt"),
        ("data prepare --out shards --data missing.txt", "no data at 'missing.txt'"),
        ("data prepare --out shards --data {text} --tokenizer missing", "tokenizer.json"),
        ("data bench --data missing.txt --out results/x.json", "no data at 'missing.txt'"),
        ("ablate mtp --config {mini} --data missing.txt --out results", "missing.txt"),
        ("export missing out", "missing"),
        ("export {home} out", "is"),
        ("eval missing --out result.json", "missing"),
        ("eval {base} --tasks missing.jsonl --out result.json", "missing.jsonl"),
        ("generate missing", "missing"),
        ("plan --config missing.json --out plan.png", "missing.json"),
    ],
    ids=lambda x: x.replace("{", "").replace("}", "")[:40],
)
def test_a_start_that_fails(command, sentence, home, base, empty, capsys):
    (home / "bad.txt").write_bytes("Caf\xe9\n\nau lait".encode("latin-1"))
    places = {"mini": home / "mini.json", "text": home / "text", "base": base}
    places |= {"bad": home / "bad.txt", "home": home}
    argv = [word.format(**places) for word in command.split()]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err


def test_a_full_disk_before_the_first_shard(home, empty, monkeypatch, capsys):
    monkeypatch.setattr("dsv3_ref.data.shard_writer.ShardWriter.write", fail(FULL))
    argv = ["data", "prepare", "--out", "shards", "--data", str(home / "text")]
    assert main([*argv, "--vocab-size", "400", "--workers", "1", "--dedup", "0"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_process_pool_without_shared_memory(home, empty, monkeypatch, capsys):
    """Containers without /dev/shm: `OSError: [Errno 30] Read-only file system` from a semaphore."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr("dsv3_ref.data.tokenize_workers.ProcessPoolExecutor", fail(error))
    argv = ["data", "prepare", "--out", "shards", "--data", str(home / "text"), "--dedup", "0"]
    assert main([*argv, "--vocab-size", "400", "--workers", "2"]) == 2
    assert "Read-only file system): --workers 1 needs none" in capsys.readouterr().err


def test_the_next_start_has_the_same_folder(home, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_ref.training.report.write_report", no_report)
    run = tmp_path / "run"
    assert main(options(home, run, "--data", "missing.txt")) == 2
    assert main(options(home, run, "--steps", "1")) == 0
    assert [x.name for x in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("without_reports")
def test_what_was_there_before_stays(home, tmp_path, capsys):
    """A launcher's log, and a run that cannot be resumed."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "output.txt").write_text("started")
    assert main(options(home, tmp_path / "run", "--data", "missing.txt")) == 2
    assert [x.name for x in (tmp_path / "run").rglob("*")] == ["logs", "output.txt"]
    assert main(options(home, tmp_path / "run", "--data", home / "text", "--steps", "1")) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["settings"]["data"] = ["missing.txt"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
