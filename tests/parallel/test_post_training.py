"""Fine-tuning, reward models and GRPO on a mesh: losses, gradients and scores of one process."""

from dataclasses import replace
from itertools import product
from math import inf, prod

import pytest
import torch
from miniruns import launch, metrics
from served import served
from test_cluster import wait_for_exit
from test_parallel import (
    CPU,
    MICRO,
    SPECIAL_TOKENS,
    computing_in,
    draw_conversations,
    gradient_errors,
    save_grads,
)
from test_replicas import home, reward, rl  # noqa: F401  a fixture
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref import ops
from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli import main
from dsv3_ref.data.packing import LOSS, START
from dsv3_ref.grpo import grpo_loss
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.posttraining.grpo_objective import GRPOObjective, RolloutRows
from dsv3_ref.posttraining.reward import PairRows, PreferenceObjective
from dsv3_ref.posttraining.sft import flagged_loss
from dsv3_ref.pretrain import LossOutput, train_step
from dsv3_ref.rewards import preference_loss, reward_scores
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.objective import CompletionLoss, RowBatch

RECIPE = replace(RECIPES["tiny"], balance_loss_coeff=0.0, max_grad_norm=1e9)
JUDGMENT_WEIGHT = 0.3


# ── Fine-tuning ──


def draw_sft(n: int) -> RowBatch:
    return RowBatch(draw_conversations(n))


def sft_reference(model, batch, objective) -> LossOutput:
    return flagged_loss(model, batch.rows_bs)


# ── A reward model ──


def draw_pairs(n: int) -> PairRows:
    """Draw pairs of samples of 4 to 11 tokens, some with judgments."""
    rows = []
    for i in range(n):
        pair = torch.randint(5, 64, (8 + 3 * i % 7 + 2 * i % 5,))
        cut = 4 + i % 3
        pair[[0, cut]] |= START
        if i % 2:
            pair[-2:] |= LOSS
        rows.append(pair)
    return PairRows(pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows]))


def reward_reference(model, batch, objective) -> LossOutput:
    """Compute `preference_loss` of chapter 15 on all pairs end to end."""
    rows = batch.packed()
    ends = (rows.start_bs[0].nonzero()[:, 0][1:]).tolist()
    cu_seqlens = torch.tensor([0, *ends, rows.tokens_bs.numel()], dtype=torch.int32)
    return preference_loss(
        model, rows.tokens_bs, rows.mask_bs, cu_seqlens, SPECIAL_TOKENS, JUDGMENT_WEIGHT
    ).losses


# ── GRPO ──


def draw_rollouts(n: int) -> RolloutRows:
    """Draw prompts of 2 to 4 and completions of 1 to 6 tokens, special tokens among them."""
    prompts, completions = [2 + i % 3 for i in range(n)], [1 + 5 * i % 6 for i in range(n)]
    samples = [torch.randint(0, 64, (p + c,)) for p, c in zip(prompts, completions)]
    width = max(completions)
    logps = [-4 + 0.3 * torch.randn(n, width) for _ in range(3)]
    return RolloutRows(
        pad_sequence(samples, batch_first=True), torch.tensor(prompts),
        torch.tensor([len(sample) for sample in samples]), torch.randn(n), *logps,
    )  # fmt: skip


def grpo_objective(loss_type: str, num_rollouts: int, num_tokens: int) -> GRPOObjective:
    objective = GRPOObjective(0.8, (0.2, 0.3), 0.05, loss_type, 9, sampler_cap=1.2)
    objective.start_batch(has_reference=True)
    objective.start_minibatch(num_rollouts, num_rollouts, num_tokens)
    return objective


def completions_by_hand(model, batch, temperature: float) -> tuple[torch.Tensor, list]:
    """Return log π of the completions' tokens from the logits of each sample, and the routes."""
    lengths = batch.num_tokens_b.tolist()
    samples = [row[:n] for row, n in zip(batch.rows_bs, lengths)]
    cu_seqlens = to_cu_seqlens(lengths, CPU)
    h_1nd, routes = model.hidden_states(torch.cat(samples)[None], cu_seqlens=cu_seqlens)
    logps = []
    for h_nd, sample, p in zip(h_1nd[0].split(lengths), samples, batch.num_prompt_tokens_b):
        logp_nw = (h_nd @ model.head.weight.T / temperature).log_softmax(-1)
        logps.append(torch.stack([logp_nw[i - 1, sample[i]] for i in range(p, len(sample))]))
    width = batch.sampled_logp_bt.shape[1]
    return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in logps]), routes


def grpo_reference(model, batch, objective) -> LossOutput:
    """Compute `grpo_loss` of chapter 16 on all rollouts."""
    logp_bt, routes = completions_by_hand(model, batch, objective.temperature)
    tokens = (batch.num_tokens_b - batch.num_prompt_tokens_b)[:, None]
    mask_bt = torch.arange(logp_bt.shape[1]) < tokens
    size = {"dapo": float(tokens.sum()), "dr_grpo": 9.0}.get(objective.loss_type)
    loss = grpo_loss(
        logp_bt, batch.old_logp_bt, batch.ref_logp_bt, batch.advantage_b, mask_bt, (0.2, 0.3),
        0.05, objective.loss_type, size, batch.sampled_logp_bt, 1.2,
    ).loss  # fmt: skip
    return LossOutput(loss, [], loss.new_zeros(()), routes)


# ── A step over all ranks ──

TASKS = {
    "sft": (draw_sft, sft_reference),
    "reward": (draw_pairs, reward_reference),
    "rl": (draw_rollouts, grpo_reference),
}


def make_objective(task: str, loss_type: str, batch):
    if task == "sft":
        return CompletionLoss()
    if task == "reward":
        return PreferenceObjective(SPECIAL_TOKENS, JUDGMENT_WEIGHT)
    num_tokens = int((batch.num_tokens_b - batch.num_prompt_tokens_b).sum())
    return grpo_objective(loss_type, len(batch), num_tokens)


def compare_steps(shape, name: str, task: str, loss_type: str, cp: int = 1):
    """Take two steps on a mesh and on one process, in fp64.

    Return the relative error of each gradient, the largest difference of loss and gradient norm,
    and the sums of GRPO's metrics on this rank.
    """
    draw, reference = TASKS[task]
    with computing_in(torch.float64):
        torch.manual_seed(2)
        batch = draw(5)  # fewer than four pipelines × two micro-batches: some are empty
        objective = make_objective(task, loss_type, batch)
        engine = ParallelEngine(
            MICRO, RECIPE, Mesh(*shape, CPU, cp=cp),
            EngineSettings(name, torch.float64, micro_batch=1), 1, objective,
        )  # fmt: skip
        torch.manual_seed(1)
        whole = Transformer(MICRO)
        optimizer, differences = build_adamw(whole, RECIPE, torch.float64), []
        grads, hook = save_grads(whole, optimizer)
        args = RECIPE, 1e-3, 1e-2, 0.0, inf
        for _ in range(2):
            want = train_step(
                whole, optimizer, [batch], *args,
                lambda model, rows, _: reference(model, rows, objective), len,
            )  # fmt: skip
            with ops.use("zero_bubble", "auto"):
                got = engine.train_step(batch, *args)
            differences += [abs(got.loss / want.loss - 1), abs(got.grad_norm / want.grad_norm - 1)]
            if len(differences) == 2:
                errors = gradient_errors(engine, grads)
                hook.remove()
    sums = {k: float(x) for k, x in getattr(objective, "sums", {}).items()}
    return errors, max(differences), sums


MESHES = [
    ((2, 1, 1), "dualpipe"),
    ((2, 1, 2), "dualpipe"),
    ((2, 1, 1), "1f1b"),
    ((2, 1, 2), "1f1b"),
]
SHORT = {
    ("sft", "dualpipe", 2),
    ("reward", "dualpipe", 2),
    ("rl", "dualpipe", 2),
    ("rl", "1f1b", 1),
}


@pytest.mark.parametrize(
    "shape, name, task",
    [
        pytest.param(
            shape, name, task,
            marks=[] if (task, name, shape[2]) in SHORT else pytest.mark.full,
        )
        for (shape, name), task in product(MESHES, TASKS)
    ],
    ids=str,
)  # fmt: skip
def test_a_step_of_each_task_is_the_step_of_one_process(shape, name, task, gang):
    for errors, difference, _ in gang.run(prod(shape), compare_steps, shape, name, task, "grpo"):
        assert max(errors.values()) < 1e-11, max(errors.items(), key=lambda e: e[1])
        assert difference < 1e-11


@pytest.mark.full
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "sequence"])
def test_every_average_of_grpo_is_that_of_one_process(loss_type, gang):
    for errors, difference, _ in gang.run(4, compare_steps, (2, 1, 2), "dualpipe", "rl", loss_type):
        assert max(errors.values()) < 1e-11 and difference < 1e-11


SHARING = [  # loss_type matters for rl alone
    ("rl", "sequence", (1, 1, 2), "1f1b"),
    ("reward", "", (1, 1, 2), "1f1b"),
    pytest.param("rl", "grpo", (2, 1, 2), "dualpipe", marks=pytest.mark.full),
    pytest.param("rl", "dapo", (1, 2, 1), "1f1b", marks=pytest.mark.full),
    pytest.param("reward", "", (2, 1, 2), "zb1p", marks=pytest.mark.full),
]


@pytest.mark.parametrize("task, loss_type, shape, name", SHARING)
def test_ranks_may_share_samples(task, loss_type, shape, name, gang):
    """Rewards and log-probabilities of other ranks count in the loss; metrics count once."""
    sums = []
    for cp in (1, 2):
        answers = gang.run(prod(shape), compare_steps, shape, name, task, loss_type, cp)
        for errors, difference, _ in answers:
            assert max(errors.values()) < 1e-11, max(errors.items(), key=lambda e: e[1])
            assert difference < 1e-11
        sums.append({k: sum(metrics[k] for *_, metrics in answers) for k in answers[0][2]})
    assert sums[1] == pytest.approx(sums[0], rel=1e-9)


# ── A forward pass alone ──


def compare_values(shape, name: str, cp: int):
    """Return errors of log-probabilities and of scores, of all rows, on this rank.

    Log-probabilities are those of a frozen second model.
    """
    with computing_in(torch.float64):
        torch.manual_seed(2)
        rollouts, pairs = draw_rollouts(5), draw_pairs(5)
        objective = grpo_objective("grpo", 5, 1)
        mesh = Mesh(*shape, CPU, cp=cp)
        settings = EngineSettings(name, micro_batch=1)
        engine = ParallelEngine(MICRO, RECIPE, mesh, settings, 1, objective)
        frozen = engine.build_frozen()
        frozen.model.load_state_dict(engine.model.state_dict())
        with torch.no_grad():
            for p in engine.model.parameters():
                p.zero_()  # the second model has weights of its own
        assert not any(p.requires_grad for p in frozen.model.parameters())
        torch.manual_seed(1)
        whole = Transformer(MICRO)
        width = rollouts.sampled_logp_bt.shape[1]
        got = frozen.read_out(rollouts, objective.read_logprobs, width)
        with torch.no_grad():
            want = completions_by_hand(whole, rollouts, objective.temperature)[0]
        scoring = PreferenceObjective(SPECIAL_TOKENS, 0.0)
        frozen.objective = scoring
        scores = frozen.read_out(pairs, scoring.read_scores, 2)
        with torch.no_grad():
            tokens, cu_seqlens = scoring.model_input(pairs)
            h_1nd, _ = whole.hidden_states(tokens, cu_seqlens=cu_seqlens)
            all_scores = reward_scores(h_1nd[0], whole.head.weight, cu_seqlens, SPECIAL_TOKENS)
        return float((got - want).abs().max()), float((scores - all_scores.view(5, 2)).abs().max())


@pytest.mark.parametrize("name, cp", [("dualpipe", 1), ("1f1b", 2)])
def test_a_forward_pass_returns_values_of_all_rows_to_all_ranks(name, cp, gang):
    for errors in gang.run(4, compare_values, (2, 1, 2), name, cp):
        assert max(errors) < 1e-12


# ── Whole runs ──


WAYS = [  # to divide a model among two ranks, and the sentence of the run
    ("--pp 2 --schedule dualpipe", "pp 2 × dp 1 × ep 1"),
    pytest.param("--fully-shard", "2 ranks, fully sharded", marks=pytest.mark.full),
]


@pytest.mark.parametrize("way, sentence", WAYS)
def test_a_reward_model_in_parts_is_that_of_one_process(way, sentence, home, tmp_path):  # noqa: F811
    assert main.main(reward(home, tmp_path / "one")) == 0
    argv = [*reward(home, tmp_path / "two"), *way.split()]
    outputs = wait_for_exit(launch(home, 2, argv))
    assert sentence in outputs[0] and "agrees with" in outputs[0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
    assert two[-1]["agreement"] == one[-1]["agreement"]


@pytest.mark.parametrize("way, sentence", WAYS)
def test_rl_in_parts_samples_from_an_engine(way, sentence, home, tmp_path, monkeypatch):  # noqa: F811
    """The engine is a server over HTTP. Its first samples are those that one process gets."""
    monkeypatch.setenv("DSV3_API_KEY", "secret")
    more = ["--temperature", "1", "--steps", "2", "--save-every", "2", "--beta", "0.01"]
    rows, models = {}, {}
    with served(home / "base", reload_root=tmp_path) as (address, service):
        for world in (1, 2):
            out = tmp_path / f"rl-{world}"
            argv = rl(home, out, *more, "--rollout", address, "--rollout-dir", tmp_path / "hf")
            if world == 1:
                assert main.main(argv) == 0
            else:
                argv += [*way.split(), "--steps-per-generation", "2"]
                outputs = wait_for_exit(launch(home, 2, argv, DSV3_API_KEY="secret"))
                assert sentence in outputs[0]
            rows[world], models[world] = metrics(out), load(out).state_dict()
            served_now = service.engine.runner.model.state_dict()
            assert all(torch.equal(x, served_now[name]) for name, x in models[world].items())
    for a, b in zip(rows[1], rows[2], strict=True):
        assert max(a["sampling_logp_difference"], b["sampling_logp_difference"]) < 1e-4
        assert b["sampler_weight"] == pytest.approx(1, abs=1e-3)
    first, first_on_mesh = rows[1][0], rows[2][0]
    assert first["example"] == first_on_mesh["example"]
    assert first["reward"] == first_on_mesh["reward"]
    assert first["entropy"] == pytest.approx(first_on_mesh["entropy"], rel=1e-3)
    before = load(home / "base").state_dict()
    assert any(not torch.equal(x, before[name]) for name, x in models[2].items())
