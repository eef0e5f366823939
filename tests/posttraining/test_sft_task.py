"""`dsv3 sft`: runs on files of conversations."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

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
from dsv3_ref.config import TINY
from dsv3_ref.data.packing import PackedDataset, flag_sample
from dsv3_ref.data.tokenizer import get_special_tokens, load_tokenizer, train_tokenizer
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining import sft as sft_module
from dsv3_ref.posttraining.sft import SFTConfig, SFTTask, flagged_loss, last_prompt
from dsv3_ref.sft import sft_loss
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


# ── Without a run ──

RECIPE = SFTConfig.RECIPES["tiny"]
SAMPLES = [  # tokens, and which of them are answers
    ([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 0]), ([12, 13], [1, 1]),
]  # fmt: skip


def test_rows_have_one_token_more_than_are_predicted(tmp_path, monkeypatch):
    """The first token of a row is only read, the last one only predicted."""
    chat = ChatTemplate(train_tokenizer(["one, two, three! "] * 20, 320))
    monkeypatch.setattr(sft_module, "find_chat_template", lambda _: chat)
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk(f"count {i}", "one, two")) for i in range(60)))
    recipe = replace(RECIPE, seq_len=48, steps=0)
    data = SFTTask(SFTConfig(model=TINY, recipe=recipe, data=(str(path),))).build_data()
    rows = [*data.loader.rows, *chain.from_iterable(data.val[str(path)])]
    assert {len(row) for row in rows} == {49}


def flagged(i: int) -> list[int]:
    tokens, mask = SAMPLES[i]
    return flag_sample(tokens, map(bool, mask))


def task_of(**options) -> SFTTask:
    return SFTTask(SFTConfig(model=TINY, recipe=replace(RECIPE, seq_len=6), **options))


ROWS_BS = torch.tensor([[*flagged(0), *flagged(1)], [*flagged(2), *flagged(1), 0, 0]])


def test_the_tokens_of_answers_count_but_for_the_first_of_a_row():
    """The first token of a row has none before it to predict it from."""
    task = task_of()
    assert task.loss_targets(ROWS_BS).tolist() == [7, 8, 10, 13, 10]
    assert task.loss_weight(ROWS_BS) == 5
    assert task.num_tokens(ROWS_BS) == 2 * 6 and task.minibatches(None, ROWS_BS) == [ROWS_BS]
    assert task.row_batch(None, ROWS_BS).rows_bs is ROWS_BS
    parts = task_of(micro_batch=1).micro_batches(None, ROWS_BS)
    assert [len(part) for part in parts] == [1, 1]


def test_the_loss_of_flagged_rows_is_that_of_chapter_14(micro):
    """A sample does not attend to those before it in its row."""
    model, task = Transformer(micro), task_of()
    tokens_bs = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 9, 10, 11, 0, 0]])
    mask_bs = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0, 0]]).bool()
    ends = torch.tensor([0, 4, 6, 8, 12], dtype=torch.int32)  # the last token of a row is not read
    want = sft_loss(model, tokens_bs, mask_bs, ends).main
    for got in (flagged_loss(model, ROWS_BS), task.loss(model, ROWS_BS, "sequence")):
        torch.testing.assert_close(got.main, want)
    assert task.nll(model, ROWS_BS) == pytest.approx(5 * want.item())


@pytest.mark.parametrize(
    "tokens, mask, prompt",
    [
        ([5, 6, 7, 8], [0, 0, 1, 1], [5, 6]),
        ([5, 6, 7, 8, 9], [0, 1, 0, 1, 0], [5, 6, 7]),  # the last of two answers, and a token after
        ([5, 6, 7, 8, 9], [0, 1, 1, 0, 0], [5]),
        ([5, 6], [1, 1], []), ([5, 6], [0, 0], []),
    ],
)  # fmt: skip
def test_a_prompt_ends_where_the_last_answer_begins(tokens, mask, prompt):
    assert last_prompt(flag_sample(tokens, map(bool, mask))) == prompt


@pytest.mark.parametrize("room, num_new", [(100, 24), (7, 4), (2, 0)])
def test_answers_to_held_out_prompts_fit_the_model(room, num_new, monkeypatch):
    monkeypatch.setattr(sft_module, "SAMPLE_TOKENS", 24)
    asked = []

    def stream(model, prompts, n, params, stops):
        asked.append((prompts, n, stops, params.temperature))
        return iter([([20],), ([21, 22],)])

    monkeypatch.setattr(sft_module, "stream", stream)
    task = task_of()
    task.config = replace(task.config, model=replace(TINY, max_seq_len=room))
    task.samples = [flag_sample([5, 6, 8, 7], [False, False, False, True])]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    chat = SimpleNamespace(stop_token_ids=(1, 1))
    data = SimpleNamespace(tokenizer=tokenizer, chat=chat, names=["a", "b"], val_name="a")
    data.batch_size_schedule = [2, 3]
    models = iter(["model", None])
    strategy = SimpleNamespace(load_whole_model=lambda _: next(models), device=torch.device("cpu"))
    run = SimpleNamespace(strategy=strategy, data=data, run_dir=Path("run"))
    (sample,) = task.answer_prompts(run)
    assert asked == [([[5, 6, 8]], num_new, {1}, sample["temperature"])]
    assert (sample["prompt"], sample["text"]) == ("5 6 8", "20 21 22")
    assert task.answer_prompts(run) == []  # the model does not fit
    assert task.describe_data(run) == "30 tokens of a and b"
    assert task.result_line(run, {"val_bpb": 1.2345}).startswith("1.234 bits per byte")


@pytest.mark.parametrize(
    "changes, option",
    [
        ({"init": None}, "--init"), ({"data": ()}, "--data"), ({"epochs": 0.0}, "--epochs"),
        ({"epochs": float("inf")}, "--epochs"), ({"steps": -1}, "--steps"),
    ],
)  # fmt: skip
def test_the_limits_of_the_options(changes, option):
    recipe = replace(RECIPE, steps=0)
    good = SFTConfig(model=TINY, recipe=recipe, init=Path("m"), data=("a",), epochs=0.1)
    assert all(holds for holds, _ in good.validation_rules())
    steps = changes.pop("steps", 0)
    bad = replace(good, recipe=replace(recipe, steps=steps), **changes)
    (sentence,) = [sentence for holds, sentence in bad.validation_rules() if not holds]
    assert sentence.startswith(option)
