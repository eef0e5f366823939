"""Conversations: as tokens, as packed rows, from files with bad rows, and a run on them."""

import json

import miniruns
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniruns import metrics, options, results

from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import get_special_tokens, load_tokenizer
from dsv3_ref.posttraining.sft import PackedDataset, read_conversations, train_val_split
from dsv3_ref.sft import (
    SpecialTokens,
    assistant_mask,
    pack_samples,
    render_conversation,
    sample_cu_seqlens,
)
from dsv3_ref.training import loop

SPECIAL_TOKENS = SpecialTokens(*range(5))
texts = st.lists(st.integers(5, 20), max_size=6)
talks = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def tokens_of(talk, system=()) -> list[int]:
    """A conversation by hand."""
    out = [SPECIAL_TOKENS.bos, *system]
    for asked, answer in talk:
        out += [SPECIAL_TOKENS.user, *asked, SPECIAL_TOKENS.assistant, *answer, SPECIAL_TOKENS.eos]
    return out


def spoken(row: list[int]) -> list[bool]:
    """`assistant_mask`, a token at a time."""
    out, on = [], False
    for token in row:
        out.append(on)
        on = token == SPECIAL_TOKENS.assistant or (
            on and token not in (SPECIAL_TOKENS.eos, SPECIAL_TOKENS.bos, SPECIAL_TOKENS.user)
        )
    return out


# ── Tokens ──


@given(talks, texts)
def test_a_conversation_is_its_turns_between_marks(talk, system):
    encode = lambda text: [int(x) for x in text.split()]
    spell = lambda tokens: " ".join(map(str, tokens))
    messages = [{"role": "system", "content": spell(system)}]
    for asked, answer in talk:
        messages += [{"role": "user", "content": spell(asked)}]
        messages += [{"role": "assistant", "content": spell(answer)}]
    assert render_conversation(messages, encode, SPECIAL_TOKENS) == tokens_of(talk, system)
    assert (
        render_conversation(messages[:-1], encode, SPECIAL_TOKENS)
        == tokens_of(talk, system)[: -1 - len(talk[-1][1])]
    )


@given(st.lists(talks, min_size=1, max_size=4))
def test_who_speaks_and_where_samples_end(rows):
    samples = [tokens_of(talk) for talk in rows]
    line = [token for sample in samples for token in sample]
    assert assistant_mask(torch.tensor([line]), SPECIAL_TOKENS)[0].tolist() == spoken(line)
    lengths = torch.tensor([len(s) for s in samples])
    assert sample_cu_seqlens(torch.tensor([line]), SPECIAL_TOKENS).tolist() == [
        0,
        *lengths.cumsum(0).tolist(),
    ]
    answers = [t for talk in rows for _, answer in talk for t in (*answer, SPECIAL_TOKENS.eos)]
    assert (
        torch.tensor(line)[assistant_mask(torch.tensor([line]), SPECIAL_TOKENS)[0]].tolist()
        == answers
    )


def test_a_row_begins_a_sample_whatever_it_begins_with():
    tokens_bs = torch.tensor([[7, 7, 0, 7], [7, 0, 7, 7]])
    assert sample_cu_seqlens(tokens_bs, SPECIAL_TOKENS).tolist() == [0, 2, 4, 5, 8]
    assert sample_cu_seqlens(tokens_bs[:0], SPECIAL_TOKENS).tolist() == [0]


@given(st.lists(st.integers(1, 30), max_size=40))
def test_packing_keeps_every_sample_whole(lengths):
    samples = [[SPECIAL_TOKENS.bos, *[5 + i] * (n - 1)] for i, n in enumerate(lengths)]
    rows = pack_samples(samples, 30, SPECIAL_TOKENS.pad)
    found = []
    for row in rows:
        assert len(row) == 30 and row[0] == SPECIAL_TOKENS.bos
        starts = [i for i, t in enumerate(row) if t == SPECIAL_TOKENS.bos]
        pieces = [row[a:b] for a, b in zip(starts, [*starts[1:], 30])]
        pieces[-1] = [t for t in pieces[-1] if t != SPECIAL_TOKENS.pad]
        found += pieces
    assert sorted(found) == sorted(samples)
    assert (
        sum(2 * sum(t != SPECIAL_TOKENS.pad for t in row) <= 30 for row in rows) <= 1
    )  # else two fit one


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="31 tokens does not fit a row of 30"):
        pack_samples([[5] * 31], 30, SPECIAL_TOKENS.pad)


# ── Files ──


def talk(asked: str, answer: str) -> dict:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    }


POISON = [
    ("no json {", "no list of messages"),
    ([1, 2], "no list of messages"),
    ({"messages": "hello"}, "no list of messages"),
    ({"messages": []}, "a conversation needs a question"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "turn 1 is by 'assistant'"),
    ({"messages": [{"role": "user", "content": 7}]}, "turn 1 is not a role with a text"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "the last turn is not the assistant's"),
    (talk("hi", ""), "an answer is empty"),
    (talk("hi", "x" * 50), "56 tokens, a row has 40"),
]


def written(path, rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return str(path)


def letters(text: str) -> list[int]:
    return [5 + ord(c) % 50 for c in text]


def test_a_bad_row_is_reported_by_number_and_left_out(tmp_path):
    rows = [row for bad, _ in POISON for row in (talk("a", "b"), bad)] + [""]
    told = []
    found = read_conversations(
        written(tmp_path / "x.jsonl", rows), letters, SPECIAL_TOKENS, 40, told.append
    )
    assert len(found) == len(POISON)
    for i, (line, (_, why)) in enumerate(zip(told, POISON)):
        assert f"row {2 * i + 2} is left out" in line and why in line


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    path = written(tmp_path / "x.jsonl", [bad for bad, _ in POISON])
    with pytest.raises(UserError, match=r"no conversation to learn from \(9 rows were left out\)"):
        read_conversations(path, letters, SPECIAL_TOKENS, 40, lambda _: None)


def test_a_parquet_file_is_read_too(tmp_path):
    miniruns.apart(parquet, tmp_path, tmp_path)


def parquet(folder):
    import datasets

    rows = datasets.Dataset.from_list([talk("a", "b"), talk("c", "d")])
    rows.to_parquet(str(folder / "x.parquet"))
    found = read_conversations(str(folder / "x.parquet"), letters, SPECIAL_TOKENS, 40)
    assert found == [tokens_of([(letters(a), letters(b))]) for a, b in ("ab", "cd")]


@pytest.mark.parametrize(
    "name, why", [("x.txt", "not .jsonl or .parquet"), ("./none.jsonl", "no data at")]
)
def test_what_holds_no_conversations(name, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=why):
        read_conversations(name, letters, SPECIAL_TOKENS, 40)


def test_one_in_twenty_is_held_out():
    kept, held = train_val_split(list(range(100)))
    assert len(held) == 5 and sorted(kept + held) == list(range(100))
    assert train_val_split(list(range(100))) == (kept, held)
    with pytest.raises(UserError, match="one conversation is too few"):
        train_val_split([1])


# ── Rows ──


def stream(seed=0) -> PackedDataset:
    samples = [[SPECIAL_TOKENS.bos, *[5 + i] * (i % 9)] for i in range(50)]
    return PackedDataset(samples, 12, seed, SPECIAL_TOKENS.pad)


def test_every_sample_once_an_epoch_each_in_another_order():
    p = stream()
    epochs = [p.next_batch(len(p.rows)) for _ in range(3)]
    for rows in epochs:
        assert rows.flatten().sort()[0].tolist() == epochs[0].flatten().sort()[0].tolist()
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_rows_go_on_where_they_stood():
    p, q = stream(), stream()
    p.next_batch(len(p.rows) + 3)
    q.load_state_dict(*json.loads(json.dumps(p.state_dict())))
    assert torch.equal(p.next_batch(40), q.next_batch(40))


# ── Runs ──


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        assert main.main(options(folder, folder / "base")) == 0
        rows = [talk(f"count {i % 7}", "one, two, three! " * (i % 3 + 1)) for i in range(60)]
        written(folder / "talks.jsonl", rows)
        yield folder
        patch.undo()


def sft(home, out, *more) -> int:
    fixed = ["sft", "--init", home / "base", "--data", home / "talks.jsonl", "--out", out]
    fixed += "--seq-len 63 --global-batch-size 2 --start-batch-size 2".split()
    fixed += "--warmup-steps 1 --lr 3e-3 --epochs 3".split()
    return main.main([str(x) for x in [*fixed, *more]])


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
    special_tokens = get_special_tokens(t := load_tokenizer(tuned))
    encode = lambda text: t.encode(text, add_special_tokens=False).ids
    kept, _ = train_val_split(
        read_conversations(str(home / "talks.jsonl"), encode, special_tokens, 64)
    )
    assert len(metrics(tuned)) == round(
        3 * len(PackedDataset(kept, 64, 0, special_tokens.pad).rows) / 2
    )


def test_resumed_it_is_the_same_run(home, tuned, tmp_path, monkeypatch):
    real = loop.take_step

    def stopping(run):
        if run.state.step == 5:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        assert sft(home, tmp_path / "run", "--save-every", 2) == 130
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
