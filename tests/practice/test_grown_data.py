"""Data that changed before --resume: refused, so that no document changes sides of the split."""

import json
import os
from itertools import chain

import miniruns
import pytest
from miniruns import options, override

from dsv3_ref.cli import main
from dsv3_ref.posttraining.prompts import load_file_task


def conversation(i: int) -> dict:
    turns = [("user", f"say {i}"), ("assistant", "one, two")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def pair(i: int) -> dict:
    question = [{"role": "user", "content": f"say {i}"}]
    return {"prompt": question, "chosen": "one, two", "rejected": "two"}


def problem(i: int) -> dict:
    return {"question": f"say {i}", "answer": str(i)}


def document(i: int) -> dict:
    return {"text": f"Document {i} is about the sea, the ships and the number {i}."}


ROWS = {"texts": document, "talks": conversation, "pairs": pair, "own": problem}
SHORT = "--seq-len 32 --steps 2 --global-batch-size 2 --start-batch-size 2 --warmup-steps 1"
RUNS = {
    "train": ("train --config mini.json --data texts.jsonl", "texts"),
    "train streaming": ("train --config mini.json --data texts.jsonl --streaming", "texts"),
    "extend": ("extend --init base --seq-len 64 --data texts.jsonl", "texts"),
    "sft": ("sft --init base --data talks.jsonl", "talks"),
    "reward": ("reward --init base --data pairs.jsonl", "pairs"),
    "rl": ("rl --init base --tasks own.jsonl --num-generations 2 --max-new-tokens 4", "own"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with (
        miniruns.home(tmp_path_factory.mktemp("home")) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        patch.chdir(folder)
        for name, row in ROWS.items():
            write_rows(name, map(row, range(100)))
        assert main.main(override(options(folder, folder / "base"), ["--steps", "1"])) == 0
        yield folder


def write_rows(name: str, rows) -> None:
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def grown(row) -> list[dict]:
    return [row(i) for i in range(130)]


def prepended(row) -> list[dict]:
    return [row(i) for i in chain([100], range(100))]


def shrunk(row) -> list[dict]:
    return [row(i) for i in range(99)]


MORE = {"train streaming", "extend", "reward"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n in MORE else n for n in RUNS]
)
def test_a_run_is_not_resumed_with_other_data(name, home, capsys):
    """New rows silently moved the split into training and validation (TensorAuto/OpenTau#502)."""
    words, data = RUNS[name]
    command, *argv = words.split()
    out = f"run-{name.replace(' ', '-')}"
    assert main.main([command, *override(SHORT.split(), argv), "--out", out]) == 0
    before = sorted(os.listdir(f"{out}/checkpoints"))
    for change in (grown, prepended, shrunk):
        write_rows(data, change(ROWS[data]))
        load_file_task.cache_clear()  # of this process; another one would read the file
        capsys.readouterr()
        assert main.main([command, "--resume", "--out", out]) == 2
        said = capsys.readouterr().err
        assert "cannot be resumed: the data" in said and "or start a new run" in said
    write_rows(data, map(ROWS[data], range(100)))
    load_file_task.cache_clear()
    assert main.main([command, "--resume", "--out", out]) == 0
    assert sorted(os.listdir(f"{out}/checkpoints")) == before
