"""Validation on a user's own files (axolotl-ai-cloud/axolotl #2781): nothing else is held out."""

import json

import miniruns
import pytest
from miniruns import metrics, options

from dsv3_ref.cli.main import main

ASK, TELL = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
TALK = {"messages": [ASK, TELL]}
PAIR = {"prompt": "one?", "chosen": "two", "rejected": "three"}
SHORT = ["--seq-len", "32", "--steps", "1", "--global-batch-size", "2", "--warmup-steps", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data of a single document, conversation or pair each, and files to validate on."""
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        assert main(options(folder, folder / "base", "--steps", "1")) == 0
        (folder / "one.txt").write_text("the sea was calm and old; ships, gulls, rain! " * 9)
        (folder / "val.txt").write_text("a light far off.\n\nnobody came (yet).\n")
        (folder / "talk.jsonl").write_text(json.dumps(TALK))
        other = {"messages": [ASK | {"content": "and then?"}, TELL]}
        (folder / "val.jsonl").write_text("\n".join(map(json.dumps, [other, other])))
        (folder / "pair.jsonl").write_text(json.dumps(PAIR))
        (folder / "val_pairs.jsonl").write_text(json.dumps(PAIR | {"prompt": "and then?"}))
        yield folder
        patch.undo()


def run(command: str, home, out, *files: str) -> int:
    argv = [command, "--init", home / "base", "--out", out, *SHORT]
    for flag, name in zip(("--data", "--val-data"), files):
        argv += [flag, home / name]
    return main([str(x) for x in argv])


def test_pretraining_validates_on_the_users_documents(home, tmp_path, capsys):
    assert run("train", home, tmp_path / "a", "one.txt") == 2  # something must be held out
    assert run("train", home, tmp_path / "run", "one.txt", "val.txt") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["val_bpb_by_source"]) == [str(home / "val.txt")]
    assert metrics(tmp_path / "run")[-1]["val_loss"] == summary["val_loss"] > 0
    assert "a light" in summary["samples"][0]["prompt"]
    assert f"on unseen {home / 'val.txt'} documents" in capsys.readouterr().out


def test_fine_tuning_validates_on_the_users_conversations(home, tmp_path, capsys):
    assert run("sft", home, tmp_path / "a", "talk.jsonl") == 2
    assert "--val-data" in capsys.readouterr().err
    assert run("sft", home, tmp_path / "run", "talk.jsonl", "val.jsonl") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["val_bpb_by_source"]) == [str(home / "val.jsonl")]
    assert all("and then?" in sample["prompt"] for sample in summary["samples"])
    (home / "val.jsonl").write_text(json.dumps(TALK))
    assert main(["sft", "--resume", "--out", str(tmp_path / "run")]) == 2  # another file by now


def test_a_reward_model_validates_on_the_users_pairs(home, tmp_path):
    assert run("reward", home, tmp_path / "a", "pair.jsonl") == 2
    assert run("reward", home, tmp_path / "run", "pair.jsonl", "val_pairs.jsonl") == 0
    assert metrics(tmp_path / "run")[-1]["agreement"] in (0, 0.5, 1)
