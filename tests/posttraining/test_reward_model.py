"""`dsv3 reward`: a run on pairs, and the reward model that it leaves."""

import json
from itertools import product

import miniruns
import pytest
import torch
from miniruns import metrics, options, override, results

from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data.conversations import PairFormat, split_samples
from dsv3_ref.posttraining import reward as reward_module
from dsv3_ref.posttraining.prompts import build_messages
from dsv3_ref.posttraining.reward import RewardConfig, RewardModel, RewardTask
from dsv3_ref.sft import render_conversation
from dsv3_ref.training import loop, settings
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess, StepHyperparams


def row(i: int = 0, **changes) -> dict:
    """A pair of answers with everything that any reward model needs; None drops a field."""
    full = {
        "prompt": build_messages(f"ask {i % 5}"), "chosen": "aa", "rejected": "bb",
        "reference": "aa", "judgment_chosen": "is aa", "judgment_rejected": "no aa",
    }  # fmt: skip
    return {k: v for k, v in (full | changes).items() if v is not None}


def written(path, rows) -> str:
    lines = [x if isinstance(x, str) else json.dumps(x) for x in rows]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("judge, uses_cot", [("direct", False), ("cot", True)])
@pytest.mark.parametrize("with_reference", [False, True])
def test_options_choose_the_format_reward_module(judge, uses_cot, with_reference):
    config = RewardConfig(
        TINY, RewardConfig.RECIPES["tiny"], judge=judge, with_reference=with_reference
    )
    assert config.pair_format == PairFormat(TINY.max_seq_len, uses_cot, with_reference)


# ── Runs ──


def train(home, out, *more) -> int:
    fixed = ["reward", "--init", home / "base", "--data", home / "pairs.jsonl", "--out", out]
    fixed += (
        "--seq-len 32 --global-batch-size 4 --start-batch-size 4 --warmup-steps 1 --lr 3e-3".split()
    )
    return main.main(override([*fixed, "--min-lr", "1e-3"], more))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model, pairs in which aa is better than bb, and a reward model of each kind."""
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        mini = json.loads((folder / "mini.json").read_text())
        wide = mini | {"max_seq_len": 192, "original_seq_len": 192}
        (folder / "mini.json").write_text(json.dumps(wide))
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        patch.setattr(reward_module, "MAX_JUDGMENT_TOKENS", 12)
        assert main.main(options(folder, folder / "base")) == 0
        written(folder / "pairs.jsonl", [row(i) for i in range(64)])
        for name, more in KINDS.items():
            assert train(folder, folder / name, "--epochs", "2", *more) == 0
        yield folder
        patch.undo()


KINDS = {
    "direct": [],
    "cot": ["--judge", "cot"],
    "with_reference": ["--judge", "cot", "--with-reference"],
    "direct with reference": ["--with-reference"],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_run_learns_which_is_better(home, kind):
    rows = metrics(home / kind)
    summary = json.loads((home / kind / "summary.json").read_text())
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["agreement"] == summary["agreement"] == 1.0
    assert summary["val_loss"] < 0.3
    held_out = split_samples(range(64))[1]
    assert sum(n for _, _, n in summary["calibration"]) == len(held_out)


def test_epochs_say_how_long(home):
    train_pairs, _ = split_samples(range(64))
    assert len(metrics(home / "direct")) == round(2 * len(train_pairs) / 4)


def test_bad_rows_do_not_stop_a_run(home, tmp_path, capsys):
    data = written(tmp_path / "x.jsonl", ["{", *(row(i) for i in range(20)), row(chosen=3)])
    assert train(home, tmp_path / "run", "--data", data, "--steps", "2") == 0
    told = capsys.readouterr().err
    assert "line 1 is left out: it is not JSON" in told
    assert "line 22 is left out: 'chosen'" in told


def test_resumed_it_is_the_same_run(home, tmp_path, monkeypatch):
    real = loop.take_step

    def stopping(run):
        if run.state.step == 5:
            raise KeyboardInterrupt
        return real(run)

    more = ["--steps", "8", "--save-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        assert train(home, tmp_path / "run", *more) == 130
    assert main.main(["reward", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert train(home, tmp_path / "whole", *more) == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def new_run(home, out, *more) -> Run:
    """The run, not yet begun."""
    argv = ["--init", home / "base", "--data", home / "pairs.jsonl", "--out", out, *more]
    config = settings.parse_args([*map(str, argv), "--seq-len", "32"], RewardConfig)
    return build_run(RewardTask(config), SingleProcess(config), out)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SHORT_CUTS = [("direct", 3), ("cot", 1), ("with_reference", 3), ("direct with reference", 1)]
MORE_CUTS = {*product(KINDS, [1, 3])} - {*SHORT_CUTS}


@pytest.mark.parametrize(
    "kind, lot",
    [*SHORT_CUTS, *(pytest.param(*cut, marks=pytest.mark.full) for cut in sorted(MORE_CUTS))],
)
def test_an_update_is_the_same_however_a_batch_is_cut(home, tmp_path, kind, lot):
    """Judgments of one and of many tokens are in one batch."""
    rows = [row(i, judgment_chosen="aa " * (1 + i), judgment_rejected="b") for i in range(5)]
    data, grads = written(tmp_path / "x.jsonl", rows), []
    for n in (0, lot):
        run = new_run(home, tmp_path / str(n), "--data", data, "--micro-batch", n, *KINDS[kind])
        run.strategy.optimizer.register_step_pre_hook(
            lambda *_, model=run.strategy.model: grads.append(gradients(model))
        )
        hyperparams = StepHyperparams(run.config.recipe, 0.0, 0.0, 0.0, float("inf"))
        loop.train_minibatches(run, run.data.loader.next_batch(4), hyperparams)
    whole, cut = grads
    assert whole.keys() == cut.keys()
    for name, g in whole.items():
        torch.testing.assert_close(cut[name], g, atol=1e-5, rtol=1e-3)


REFUSED = [
    (["--data", "{pairs}"], "--init is missing"),
    (["--init", "{base}"], "--data needs at least one file of pairs"),
    (["--init", "{base}", "--data", "./none.jsonl"], "no data at './none.jsonl'"),
    (["--init", "{base}", "--data", "{pairs}", "--epochs", "0"], "--epochs must be above 0"),
    (["--init", "{base}", "--data", "{pairs}", "--steps", "-1"], "--steps must be at least 0"),
    (
        ["--init", "{base}", "--data", "{pairs}", "--judgment-weight", "-1"],
        "--judgment-weight must be at least 0",
    ),
    (["--init", "{base}", "--data", "{bad}"], "no pair to learn from (1 rows were left out)"),
]  # fmt: skip


@pytest.mark.parametrize("argv, why", REFUSED, ids=[why for _, why in REFUSED])
def test_refusals(argv, why, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = written(tmp_path / "bad.jsonl", ["x"])
    argv = [x.format(base=home / "base", pairs=home / "pairs.jsonl", bad=bad) for x in argv]
    assert main.main(["reward", *argv, "--out", "run", "--seq-len", "32"]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


# ── The judge ──


def asked(judge: RewardModel, *texts: str) -> list[list[int]]:
    """Conversations that end with these answers."""
    encode = judge.chat.encode
    return [
        render_conversation(build_messages("ask 1", text), encode, judge.special_tokens)
        for text in texts
    ]


def test_a_score_is_the_logit_of_padding_behind_the_end(home):
    judge = RewardModel(home / "direct")
    samples = asked(judge, "aa", "bb", "aa aa aa")
    reward_b, model = judge.score(samples), load(home / "direct")
    for tokens, reward in zip(samples, reward_b):
        want = model(torch.tensor([tokens]))[0, -1, judge.special_tokens.pad]
        torch.testing.assert_close(reward, want, atol=1e-4, rtol=1e-4)
    assert reward_b[0] > reward_b[1]


@every_kind
def test_a_score_does_not_depend_on_its_company(home, kind, monkeypatch):
    judge = RewardModel(home / kind)
    samples, truths = asked(judge, "aa", "bb", "cc", "aa bb"), ["aa"] * 4
    together = judge.score(samples, truths)
    alone = torch.cat([judge.score([s], ["aa"]) for s in samples])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_an_answer_may_hold_any_token(home):
    """A policy may sample a special token; the score is still that of the whole answer."""
    judge = RewardModel(home / "direct")
    (tokens,) = asked(judge, "aa")
    strange = [*tokens[:-1], judge.special_tokens.bos, judge.special_tokens.user, tokens[-1]]
    want = judge.model(torch.tensor([strange]))[0, -1, judge.special_tokens.pad]
    got = judge.score([strange, tokens])
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, truths", [("cot", None), ("with_reference", ["aa", "aa"])])
def test_a_judge_that_thinks_writes_first_and_scores_behind_it(home, kind, truths):
    judge = RewardModel(home / kind)
    samples, m = asked(judge, "aa", "bb"), judge.special_tokens
    judged = judge.add_judgments(samples, truths or ["", ""])
    for before, after in zip(samples, judged):
        assert after[: len(before)] == before
        assert after[len(before)] == m.user and after[-1] == m.eos
        assert after.count(m.assistant) == 2
    torch.testing.assert_close(judge.score(samples, truths), judge.score_batch(judged))
    asks = [judge.chat.tokenizer.decode(x[len(s) :]) for x, s in zip(judged, samples)]
    assert all(("It should be aa." in x) == (kind == "with_reference") for x in asks)


def test_a_judgment_without_an_end_is_ended(home, monkeypatch):
    judge = RewardModel(home / "cot")
    monkeypatch.setattr(reward_module, "MAX_JUDGMENT_TOKENS", 1)
    for after in judge.add_judgments(asked(judge, "aa", "bb"), ["", ""]):
        assert after[-1] == judge.special_tokens.eos and after[-2] != judge.special_tokens.eos


@pytest.mark.parametrize("kind", ["with_reference", "direct with reference"])
def test_one_that_is_told_must_be_told(home, kind):
    judge = RewardModel(home / kind)
    with pytest.raises(UserError, match="was trained with reference answers"):
        judge.score(asked(judge, "aa"))


@pytest.mark.parametrize("name, why", [("base", "is not a reward model"), ("nowhere", "nowhere")])
def test_what_is_not_a_reward_model(name, why, home):
    with pytest.raises(UserError, match=why):
        RewardModel(home / name)
