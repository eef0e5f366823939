"""`dsv3 rl`: rollouts beside the model, updates beside autograd by hand, bad scorers, runs."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import miniruns
import pytest
import torch
from miniruns import metrics, options, override, results

from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.grpo import advantages, generate_rollouts, grpo_loss
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.posttraining.grpo import GRPOConfig, GRPOTask, PromptDataset, Rollout
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import TASKS, Problem, build_messages
from dsv3_ref.training import loop, settings
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess, StepHyperparams

# ── Rollouts ──


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rollouts_are_the_models_own(micro, temperature):
    """log π is the model's of these tokens, and at temperature 0 they are the most likely ones."""
    model, prompts = Transformer(micro), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    said, logp = generate_rollouts(model, prompts, 3, 12, {7}, temperature)
    assert len(said) == len(logp) == 9
    for i, (answer, logp_s) in enumerate(zip(said, logp)):
        prompt = prompts[i // 3]
        logit_sw = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        want_sw = (logit_sw / (temperature or 1)).log_softmax(-1)
        want = want_sw.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logp_s), want, atol=1e-4, rtol=0)
        assert 7 not in answer[:-1] and (len(answer) == 12 or answer[-1] == 7)
        if not temperature:
            assert answer == logit_sw.argmax(-1).tolist()


def test_answers_of_a_group_differ_and_a_seed_repeats_them(micro):
    model = Transformer(micro)

    def draw() -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        return generate_rollouts(model, [[1, 2]], 6, 8, {7}, 1.0, generator)[0]

    first = draw()
    assert first == draw() and len({tuple(a) for a in first}) > 1


def test_rollouts_are_samples_of_the_policy_unless_a_temperature_is_given(micro):
    """The shares of 3,000 first tokens are the model's probabilities, within 5 standard errors."""
    model, n = Transformer(replace(micro, vocab_size=5)), 3000
    completions, _ = generate_rollouts(
        model, [[1, 2]], n, 1, {0}, generator=torch.Generator().manual_seed(3)
    )
    p_w = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    share_w = torch.tensor(completions)[:, 0].bincount(minlength=5) / n
    assert ((share_w - p_w).abs() < 5 * (p_w * (1 - p_w) / n).sqrt()).all()


def test_a_first_token_that_ends_ends(micro):
    model = Transformer(micro)
    with torch.no_grad():
        model.norm.weight.zero_()  # every word is as likely: the first of them at temperature 0
    assert generate_rollouts(model, [[1], [2]], 2, 5, {0}, 0.0)[0] == [[0]] * 4


# ── Runs ──


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model trained to end its answers, and tasks that reward short ones."""
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        patch.setitem(TASKS, "short", Short("short"))
        patch.setitem(TASKS, "bad", Short("bad"))
        assert main.main(options(folder, folder / "first")) == 0
        turns = [build_messages(f"say {i % 12}", "ab" * (1 + i % 3)) for i in range(60)]
        rows = [json.dumps({"messages": messages}) for messages in turns]
        (folder / "talks.jsonl").write_text("\n".join(rows))
        argv = ["sft", "--init", folder / "first", "--data", folder / "talks.jsonl", "--out",
                folder / "base", *"--seq-len 63 --global-batch-size 4 --start-batch-size 4".split(),
                *"--lr 5e-3 --epochs 8 --warmup-steps 1".split()]  # fmt: skip
        assert main.main([str(x) for x in argv]) == 0
        yield folder
        patch.undo()


class Short:
    """Short answers are right; the scorer of the task `bad` fails."""

    is_open_ended = False

    def __init__(self, name):
        self.name = name
        made = [Problem(name, f"say {i}", str(i)) for i in range(12)]
        self.problems = made[2:], made[:2]

    def score(self, text, problem):
        if self.name == "bad":
            raise RuntimeError("no idea")
        return float(len(text) < 4)


def rl(home, out, *more) -> int:
    fixed = ["rl", "--init", home / "base", "--out", out, "--tasks", "short"]
    fixed += "--seq-len 32 --global-batch-size 3 --start-batch-size 3".split()
    fixed += "--num-generations 4 --max-new-tokens 6".split()
    fixed += "--steps 4 --save-every 2 --lr 1e-3 --warmup-steps 1 --temperature 1.5".split()
    return main.main(override(fixed, more))


@pytest.fixture(scope="module")
def run(home):
    assert rl(home, home / "rl") == 0
    return home / "rl"


def test_a_row_says_what_grpo_is_watched_by(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 <= row["reward"] <= 1 and row["reward_by"] == {"short": row["reward"]}
        assert row["entropy"] > 0 and row["length"] <= 6 and 0 <= row["frac_reward_zero_std"] <= 1
        assert row["sampling_logp_difference"] < 1e-5
        assert (row.get("held_out") is None) == (row["step"] % 2 == 1)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[-1]["kl"] > 0
    began, end = (json.loads((run / x).read_text()) for x in ("before.json", "summary.json"))
    assert began["held_out"] == end["before"] and end["after"] == rows[-1]["held_out"]
    assert end["before"]["short"].keys() == {"greedy", "sampled", "length"}
    assert [s["before"] for s in end["samples"]] == [s["text"] for s in began["samples"]]


def gate_biases(folder) -> list[torch.Tensor]:
    return [moe.gate.bias for moe in moe_layers(load(folder)).values()]


def test_gate_biases_rest_or_follow(home, run, tmp_path):
    assert rl(home, tmp_path / "gamma", "--bias-update-rate", "0.01") == 0
    before = gate_biases(home / "base")
    assert all(map(torch.equal, before, gate_biases(run)))
    assert not torch.equal(before[0], gate_biases(tmp_path / "gamma")[0])


def timeless(rows: list[dict]) -> list[dict]:
    clock = miniruns.CLOCK | {"rollout_seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def test_resumed_it_is_the_same_run(home, run, tmp_path, monkeypatch):
    real = loop.take_step

    def stopping(run):
        if run.state.step == 3:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        assert rl(home, tmp_path / "half") == 130
    assert main.main(["rl", "--resume", "--out", str(tmp_path / "half")]) == 0
    assert timeless(metrics(tmp_path / "half")) == timeless(metrics(run))
    assert results(tmp_path / "half")[3] == results(run)[3]  # the last checkpoint's bytes


def new_run(home, folder, *more) -> Run:
    argv = [
        "--init",
        home / "base",
        "--tasks",
        "short",
        "--num-generations",
        2,
        "--seq-len",
        32,
        *more,
    ]
    folder.mkdir(exist_ok=True)
    config = settings.parse_args([str(x) for x in argv], GRPOConfig)
    return build_run(GRPOTask(config), SingleProcess(config), folder)


def train(run: Run, batch: list[Rollout], recipe, lr=0.0):
    """Train on these answers, with gate biases left alone."""
    hyperparams = StepHyperparams(recipe, lr, 0.0, 0.0, float("inf"))
    return loop.train_minibatches(run, batch, hyperparams)


def answers(run: Run) -> list[Rollout]:
    """Two groups, in which the completions contain special tokens too."""
    bos, eos, pad, user, assistant = run.data.special_tokens
    said = [[20, 21, eos], [22, bos, 23, 24, eos], [assistant, user, eos], [25, 26, 27, pad, 28]]
    out = []
    for i, tokens in enumerate(said):
        prompt = [bos, user, 30 + i // 2, assistant]
        logps = [-1.0] * len(tokens)
        out.append(Rollout(TASKS["short"].problems[0][i // 2], prompt, tokens, logps, "", 0.0))
    for a, x in zip(out, advantages(torch.tensor([1.0, 0.0, 0.3, 0.9]), 2).tolist()):
        a.advantage = x
    return out


def by_hand(model, run: Run, found: list[Rollout]):
    """The loss of all answers at once, each alone in its row."""
    longest = max(len(a.tokens) for a in found)
    logp_bs = torch.zeros(len(found), longest)
    for i, a in enumerate(found):
        logp = model(torch.tensor([a.prompt + a.tokens]))[0].log_softmax(-1)
        for s, token in enumerate(a.tokens):
            logp_bs[i, s] = logp[len(a.prompt) - 1 + s, token]
    mask_bs = torch.arange(longest) < torch.tensor([[len(a.tokens)] for a in found])
    a_b, args = torch.tensor([a.advantage for a in found]), run.config
    size = {"dapo": float(mask_bs.sum()), "dr_grpo": args.max_new_tokens}.get(args.loss_type)
    old_bs = logp_bs.detach()
    return grpo_loss(logp_bs, old_bs, old_bs, a_b, mask_bs, 0.2, args.beta, args.loss_type, size)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SHORT_CUTS = [("grpo", 1), ("dapo", 3), ("dr_grpo", 0), ("sequence", 3)]
MORE_CUTS = {*product(["grpo", "dapo", "dr_grpo", "sequence"], [1, 3, 0])} - {*SHORT_CUTS}


@pytest.mark.parametrize(
    "kind, lot",
    [*SHORT_CUTS, *(pytest.param(*cut, marks=pytest.mark.full) for cut in sorted(MORE_CUTS))],
)
def test_an_update_is_the_gradient_of_all_answers_at_once(home, tmp_path, kind, lot, monkeypatch):
    """However they are cut into micro-batches, and whatever tokens they hold."""
    run = new_run(home, tmp_path / "x", "--loss-type", kind, "--micro-batch", lot, "--beta", 0.01)
    found, grads = answers(run), {}
    model = run.strategy.model
    run.strategy.optimizer.register_step_pre_hook(lambda *_: grads.update(gradients(model)))
    by_hand(model, run, found).loss.backward()
    want = gradients(model)
    run.strategy.optimizer.zero_grad()
    train(run, found, replace(run.config.recipe, max_grad_norm=1e9))
    for name, g in want.items():
        torch.testing.assert_close(grads[name], g, atol=2e-6, rtol=2e-4)


def test_answers_without_advantage_count_but_cost_nothing(home, tmp_path, monkeypatch):
    run = new_run(home, tmp_path / "x", "--beta", 0)
    found = answers(run)
    found[2].advantage = found[3].advantage = 0.0
    read = []
    real = run.task.loss
    monkeypatch.setattr(
        run.task, "loss", lambda m, lot, b: read.append(len(lot)) or real(m, lot, b)
    )
    want = by_hand(run.strategy.model, run, found).loss.item()
    s = train(run, found, run.config.recipe)
    assert read == [2] and s.loss == pytest.approx(want, abs=1e-6)


def test_several_updates_clip_against_what_was_written_first(home, tmp_path):
    run = new_run(home, tmp_path / "x", "--steps-per-generation", 2, "--beta", 0)
    found = answers(run)
    train(run, found, run.config.recipe, lr=0.05)
    first = {a.old_logps.sum().item() for a in found}
    assert len(first) == 4 and run.task.token_means(run)["clip_ratio"] > 0


def test_a_scorer_that_fails_counts_0_and_is_told_once(home, tmp_path, capsys):
    assert rl(home, tmp_path / "rl", "--tasks", "bad", "--steps", "2") == 0
    assert capsys.readouterr().err.count("the scorer of bad failed and counts 0") == 1
    rows = metrics(tmp_path / "rl")
    assert {row["reward"] for row in rows} == {0.0} and rows[0]["invalid_rewards"] > 0


def test_a_kl_that_explodes_stops_the_run_with_its_last_checkpoint(home, tmp_path, capsys):
    assert rl(home, tmp_path / "rl", "--max-kl", "1e-9", "--save-every", "1") == 2
    said = capsys.readouterr().err
    assert "the KL to the reference model became" in said and "step_0000001" in said


def test_controls(home, tmp_path):
    run = new_run(home, tmp_path / "x", "--negative-control", "no-baseline")
    for a in run.task.next_batch(run, 3):
        assert a.advantage == a.reward
    run = new_run(
        home, tmp_path / "x", "--negative-control", "random-reward", "--num-generations", 8
    )
    found = run.task.next_batch(run, 3)
    assert len({round(a.advantage, 3) for a in found}) > 1
    assert any(a.reward != (a.advantage > 0) for a in found)


def test_own_problems_beside_ours(home, tmp_path):
    """A file of problems with answers; metrics name it by its path, on held-out problems too."""
    rows = [json.dumps({"question": f"say {i}", "answer": "7"}) for i in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    assert (
        rl(home, tmp_path / "rl", "--tasks", "short=0.5", tmp_path / "own.jsonl", "--steps", 2) == 0
    )
    names = {"short", str(tmp_path / "own.jsonl")}
    assert set(metrics(tmp_path / "rl")[-1]["held_out"]) == names
    assert all(names >= set(row["reward_by"]) for row in metrics(tmp_path / "rl"))


def test_open_answers_are_worth_the_votes_of_the_first_model(home, tmp_path, monkeypatch):
    (tmp_path / "open.jsonl").write_text("\n".join(f'{{"question": "say {i}"}}' for i in range(8)))
    seen = []

    def vote(self, asked, k):
        seen.append((self.model, len(asked), k))
        return torch.arange(len(asked) * k).view(-1, k) % 3 == 0

    monkeypatch.setattr(Policy, "sample_votes", vote)
    run = new_run(
        home, tmp_path / "x", "--tasks", tmp_path / "open.jsonl", "--votes", 4, "--beta", 0
    )
    seen.clear()
    found = run.task.next_batch(run, 3)
    whole = [a for a in found if a.tokens[-1] == run.data.special_tokens.eos]
    assert (
        seen == [(run.task.reference, len(whole), 4)]
        and run.task.reference is not run.strategy.model
        and whole
    )
    want = [(torch.arange(4 * n, 4 * n + 4) % 3 == 0).float().mean() for n in range(len(whole))]
    assert [a.reward for a in whole] == want


def test_a_vote_is_a_yes(home):
    policy = Policy.from_pretrained(home / "base")
    yes, no = ([*policy.tokenizer.encode(x, add_special_tokens=False).ids] for x in ("Yes", "no"))
    policy.model = SimpleNamespace(config=SimpleNamespace(max_seq_len=999, vocab_size=999))
    policy.rollout_fn = lambda prompts, k, *_: (
        [yes, no] * len(prompts) * (k // 2),
        [[0.0]] * k * 2,
    )
    assert policy.sample_votes([("a", "b"), ("c", "d")], 2).tolist() == [[True, False]] * 2


def test_an_answer_must_fit_behind_its_question(home, tmp_path, capsys):
    assert rl(home, tmp_path / "rl", "--max-new-tokens", 60) == 2
    assert "are more than the 64 of the model's context" in capsys.readouterr().err


def test_the_form_is_a_rule_too(home, tmp_path):
    run = new_run(home, tmp_path / "x", "--require-think-format")
    problem, eos_id = run.data.loader.next_batch(1)[0], run.data.special_tokens.eos

    def rollout(text: str) -> Rollout:
        return Rollout(problem, [1], [2, eos_id], [0.0, 0.0], text, 0.0)

    found = [rollout("a"), rollout("<think>a</think>\\boxed{1}")]
    reward_fn = run.task.reward_fn
    before = [reward_fn.rule_reward(a) for a in found]
    reward_fn.require_think_format = False
    assert before == [0.0, 0.0] and [reward_fn.rule_reward(a) for a in found] == [1.0, 0.0]


def test_held_out_problems_leave_random_numbers_alone(home, tmp_path):
    run = new_run(home, tmp_path / "x")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run.task.score_held_out(run)
    assert torch.equal(torch.rand(3), want)


def test_questions_go_on_where_they_stood():
    draw = PromptDataset({"sums": 2.0, "spelling": 1.0}, 0)
    first = draw.next_batch(30)
    assert {p.domain for p in first} == {"sums", "spelling"}
    other = PromptDataset({"sums": 2.0, "spelling": 1.0}, 0)
    other.load_state_dict({"drawn": 20})
    assert other.next_batch(10) == first[20:]


REFUSED = [
    ([], "--init is missing"),
    (["--init", "{base}", "--num-generations", "1"], "--num-generations must be at least 2"),
    (["--init", "{base}", "--tasks", "writing"], "--reward must name a reward model"),
    (["--init", "{base}", "--tasks", "writing", "--votes", "-1"], "--votes must be at least 0"),
    (["--init", "{base}", "--votes", "2", "--reward", "x"], "--reward or --votes, not both"),
    (
        ["--init", "{base}", "--steps-per-generation", "5", "--global-batch-size", "8",
         "--start-batch-size", "4"],
        "--steps-per-generation",
    ),
    (["--init", "{base}", "--tasks"], "--tasks needs at least one name"),
    (["--init", "{base}", "--tasks", "nowhere.jsonl"], "no data at 'nowhere.jsonl'"),
    (["--init", "{base}", "--tasks", "riddles"], "no task 'riddles'"),
    (["--init", "{base}", "--temperature", "0"], "--temperature must be above 0"),
    (["--init", "{base}", "--steps-per-generation", "99"], "--steps-per-generation"),
    (["--init", "{base}", "--tasks", "short", "--reward", "{base}"], "is not a reward model"),
]  # fmt: skip


@pytest.mark.parametrize("argv, why", REFUSED, ids=[why for _, why in REFUSED])
def test_refusals(argv, why, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [x.format(base=home / "base") for x in argv]
    assert main.main(["rl", *argv, "--out", "run", "--seq-len", "32"]) == 2
    assert why in capsys.readouterr().err
