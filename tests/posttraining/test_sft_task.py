"""`dsv3 sft`: runs on files of conversations."""

import json

import miniruns
import pytest
import torch
from miniruns import metrics, options, override, results

from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.data.conversations import (
    read_conversations,
    split_samples,
)
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.packing import PackedDataset
from dsv3_ref.data.tokenizer import get_special_tokens, load_tokenizer
from dsv3_ref.training import loop


def talk(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        assert main.main(options(folder, folder / "base")) == 0
        lines = [
            json.dumps(talk(f"count {i % 7}", "one, two, three! " * (i % 3 + 1))) for i in range(60)
        ]
        (folder / "talks.jsonl").write_text("\n".join(lines))
        yield folder
        patch.undo()


def sft(home, out, *more) -> int:
    fixed = ["sft", "--init", home / "base", "--data", home / "talks.jsonl", "--out", out]
    fixed += "--seq-len 63 --global-batch-size 2 --start-batch-size 2".split()
    fixed += "--warmup-steps 1 --lr 3e-3 --epochs 3".split()
    return main.main(override(fixed, more))


@pytest.fixture(scope="module")
def tuned(home):
    assert sft(home, home / "tuned") == 0
    return home / "tuned"


def test_a_run_learns_its_answers(home, tuned):
    rows = metrics(tuned)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["val_loss"] < rows[0]["loss"]
    assert rows[0]["mtp_loss"] == [] and rows[0]["bias_update_rate"] == 0
    before, after = load(home / "base"), load(tuned)
    for (name, x), y in zip(before.state_dict().items(), after.state_dict().values()):
        rests = name.startswith("mtp") or name.endswith("bias")
        assert torch.equal(x, y) == rests, name
    summary = json.loads((tuned / "summary.json").read_text())
    assert "count" in summary["samples"][0]["prompt"]


def test_epochs_say_how_long(home, tuned):
    tokenizer = load_tokenizer(tuned)
    special_tokens = get_special_tokens(tokenizer)
    conversations = read_conversations(str(home / "talks.jsonl"), ChatTemplate(tokenizer), 64)
    dataset = PackedDataset(split_samples(conversations)[0], 64, 0, special_tokens.pad)
    assert len(metrics(tuned)) == round(3 * len(dataset.rows) / 2)


def test_resumed_it_is_the_same_run(home, tuned, tmp_path, monkeypatch, capsys):
    real = loop.take_step

    def stopping(run):
        if run.state.step == 5:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        assert sft(home, tmp_path / "run", "--save-every", 2) == 130
    talks = (home / "talks.jsonl").read_text()
    try:
        first = json.loads(talks.splitlines()[0])
        first["messages"][-1]["content"] += "!"
        (home / "talks.jsonl").write_text("\n".join([json.dumps(first), *talks.splitlines()[1:]]))
        assert main.main(["sft", "--resume", "--out", str(tmp_path / "run")]) == 2
    finally:
        (home / "talks.jsonl").write_text(talks)
    assert "talks.jsonl has changed" in capsys.readouterr().err
    assert main.main(["sft", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert sft(home, tmp_path / "whole", "--save-every", 2) == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_run_takes_up_where_another_ended(home, tmp_path):
    """`dsv3 train --init`: shape, tokenizer and weights are the other's."""
    argv = options(home, tmp_path / "on", "--init", home / "base", "--lr", 0, "--min-lr", 0)
    i = argv.index("--config")
    del argv[i : i + 2]
    assert main.main([*argv, "--final-lr", "0", "--bias-update-rate", "0"]) == 0
    before, after = load(home / "base"), load(tmp_path / "on")
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    assert metrics(tmp_path / "on")[0]["loss"] < 0.9 * metrics(home / "base")[0]["loss"]


REFUSED = [
    (["--data", "x.jsonl"], "--init is missing"),
    (["--init", "{base}"], "--data needs at least one file"),
    (["--init", "{base}", "--data", "x.jsonl", "--epochs", "0"], "--epochs must be above 0"),
    (["--init", "{base}", "--data", "{talks}", "--balance-loss-coeff", "0.1"],
     "--balance-loss-coeff must be 0: this loss has no such term"),
    (["--init", "{base}", "--data", "./x.jsonl"], "no data at './x.jsonl'"),
    (["--init", "{base}", "--data", "{talks}", "--model.dim", "32"], "does not fit this model"),
]  # fmt: skip


@pytest.mark.parametrize("argv, why", REFUSED, ids=[why for _, why in REFUSED])
def test_refusals(argv, why, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [x.format(base=home / "base", talks=home / "talks.jsonl") for x in argv]
    assert main.main(["sft", *argv, "--out", "run", "--seq-len", "63"]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
