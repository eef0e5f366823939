"""GRPO beside TRL, beside loops written from the equations, and at its edges."""

import math
from collections import defaultdict
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.grpo import (
    GRPO_RECIPES,
    advantages,
    completion_mask,
    grpo_loss,
    kl_k3,
    token_logprobs,
)
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.posttraining.grpo import GRPOConfig

KINDS = ["grpo", "bnpo", "dapo", "dr_grpo", "sequence"]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))


def batch(b: int, s: int, seed: int, far: float = 0.4):
    """Log-probabilities under three models, advantages, and a mask of answers of 1 to s tokens."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.double)

    logp = -rand(b, s).abs()
    mask = torch.arange(s) < torch.randint(1, s + 1, (b, 1), generator=g)
    old, ref = logp + far * rand(b, s), logp + far * rand(b, s)
    return logp.requires_grad_(), old, ref, rand(b), mask


def gradient(loss, logp):
    return torch.autograd.grad(loss, logp)[0]


# ── TRL ──


class Alone:
    """An accelerator of one process."""

    num_processes, sync_gradients = 1, True
    reduce = staticmethod(lambda x, reduction: x)
    gather = gather_for_metrics = staticmethod(lambda x: x)


def trl_loss(kind, logp, old, ref, a, mask, eps, beta, size, sampler_weight=None):
    """`GRPOTrainer._compute_loss` on given log-probabilities."""
    from trl import GRPOTrainer  # seconds

    b, s = logp.shape
    nothing = torch.zeros(b, 0, dtype=torch.long)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, epsilon_low=eps[0], epsilon_high=eps[1],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=kind, use_vllm=sampler_weight is not None,
        vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=size, accelerator=Alone(),
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "advantages": a,
        "completion_ids": torch.zeros(b, s, dtype=torch.long), "completion_mask": mask.long(),
        "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": torch.tensor(float(size)),
        "importance_sampling_ratio": sampler_weight,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(stub, None, inputs), stub._metrics["train"]


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("eps", [(0.2, 0.2), (0.1, 0.28)])
def test_losses_and_gradients_are_trls(kind, beta, eps):
    for seed in range(5):
        logp, old, ref, a, mask = batch(6, 9, seed)
        got = grpo_loss(logp, old, ref, a, mask, eps, beta, kind, 50)
        want, metrics = trl_loss(kind, logp, old, ref, a, mask, eps, beta, 50)
        assert abs(got.loss - want) < 1e-10
        assert (gradient(got.loss, logp) - gradient(want, logp)).abs().max() < 1e-10
        assert got.clip_ratio.item() == pytest.approx(
            metrics["clip_ratio/region_mean"][0], abs=1e-7
        )
        if beta:
            assert got.kl.item() == pytest.approx(metrics["kl"][0], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_truncated_importance_sampling_is_trls(kind):
    """TRL's mode token_truncate, with its formula for the weight."""
    for seed in range(5):
        logp, old, ref, a, mask = batch(6, 9, seed)
        sampler = old + 0.6 * torch.randn(6, 9, dtype=torch.double)
        got = grpo_loss(logp, old, ref, a, mask, 0.2, 0.04, kind, 50, sampler, 1.3)
        weight = torch.exp((old - sampler) * mask).clamp(max=1.3)
        want, _ = trl_loss(kind, logp, old, ref, a, mask, (0.2, 0.2), 0.04, 50, weight)
        assert abs(got.loss - want) < 1e-10
        assert (gradient(got.loss, logp) - gradient(want, logp)).abs().max() < 1e-10
        assert got.sampler_weight.item() == pytest.approx(weight[mask].mean().item())


# ── The equations, token by token ──


def slow(logp, old, ref, a, mask, eps, beta, kind, size, sampler=None, cap=0.0):
    terms = []
    sampler = old if sampler is None else sampler
    for i in range(len(a)):
        at = [t for t in range(mask.shape[1]) if mask[i, t]]
        each = [[x[i, t] for x in (logp, old, ref, sampler)] for t in at]
        if kind == "sequence":
            each = [[sum(column) for column in zip(*each)]]
        terms.append([])
        for new, was, began, sampled in each:
            rho, d = math.exp(new - was), began - new
            gain = min(rho * a[i], min(max(rho, 1 - eps), 1 + eps) * a[i])
            weight = min(math.exp(was - sampled), cap) if cap else 1.0
            terms[-1].append(beta * (math.exp(d) - d - 1) - weight * gain)
    if kind in ("grpo", "sequence"):
        return sum(sum(t) / len(t) for t in terms) / len(terms)
    return sum(map(sum, terms)) / {"bnpo": mask.sum(), "dapo": size, "dr_grpo": len(a) * size}[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(SHAPES)
def test_every_kind_is_its_equation(kind, shape):
    inputs = batch(*shape)
    got = grpo_loss(*inputs, 0.2, 0.1, kind, 17).loss
    assert abs(got - slow(*(x.detach() for x in inputs), 0.2, 0.1, kind, 17)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@given(SHAPES, st.floats(0.5, 3.0))
def test_the_samplers_weight_is_its_equation(kind, shape, cap):
    logp, old, *others = batch(*shape)
    sampler = batch(*shape[:2], shape[2] + 1)[1]
    args = logp.detach(), old, *others, 0.2, 0.1, kind, 17, sampler, cap
    assert abs(grpo_loss(*args).loss - slow(*args)) < 1e-10


@given(SHAPES)
def test_an_answer_of_one_token_is_a_sequence(shape):
    logp, old, ref, a, _ = batch(shape[0], 1, shape[2])
    inputs = logp, old, ref, a, torch.ones_like(logp)
    assert torch.equal(*(grpo_loss(*inputs, 0.2, 0.1, kind).loss for kind in ("grpo", "sequence")))


# ── What the clip and the mask do ──


@given(SHAPES)
def test_where_nothing_has_moved_the_gradient_is_that_of_the_policy(shape):
    logp, _, _, a, mask = batch(*shape)
    got = gradient(grpo_loss(logp, logp.detach(), None, a, mask, loss_type="bnpo").loss, logp)
    want = gradient(-(a[:, None] * logp * mask).sum() / mask.sum(), logp)
    assert torch.allclose(got, want, atol=1e-14)


@pytest.mark.parametrize("a, moved, silent", [
    (1.0, 0.5, True), (1.0, -0.5, False), (-1.0, -0.5, True), (-1.0, 0.5, False),
    (1.0, 0.25, False),
])  # fmt: skip
def test_only_what_has_gone_far_enough_is_silent(a, moved, silent):
    logp = torch.zeros(1, 1, dtype=torch.double, requires_grad=True)
    out = grpo_loss(
        logp, logp.detach() - moved, None, torch.tensor([a]), torch.ones(1, 1), (0.2, 0.3)
    )
    assert (gradient(out.loss, logp) == 0) == silent == bool(out.clip_ratio)


@pytest.mark.parametrize("kind", KINDS)
@given(SHAPES, st.sampled_from([float("nan"), float("inf"), -1e9, 0.0]))
def test_padding_changes_no_bit_whatever_it_holds(kind, shape, junk):
    logp, old, ref, a, mask = batch(*shape)
    size = 17 if kind in ("dapo", "dr_grpo") else None
    clean = grpo_loss(logp, old, ref, a, mask, 0.2, 0.1, kind, size)
    dirty = [torch.where(mask, x.detach(), junk).requires_grad_() for x in (logp, old, ref)]
    got = grpo_loss(*dirty, a, mask, 0.2, 0.1, kind, size)
    assert all(torch.equal(x, y) for x, y in zip(got, clean))
    assert torch.equal(gradient(got.loss, dirty[0]), gradient(clean.loss, logp))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_without_tokens_are_no_numbers_that_spread(kind):
    logp, old, ref, a, mask = batch(3, 4, 0)
    for empty in (mask & torch.tensor([[True], [False], [True]]), torch.zeros_like(mask)):
        out = grpo_loss(logp, old, ref, a, empty, 0.2, 0.1, kind)
        assert all(x.isfinite() for x in out) and gradient(out.loss, logp).isfinite().all()


def test_micro_batches_of_dapo_add_up_to_the_whole():
    logp, old, ref, a, mask = batch(6, 5, 3)
    total = grpo_loss(logp, old, ref, a, mask, 0.2, 0.1, "dapo").loss
    parts = zip(*(x.split(2) for x in (logp, old, ref, a, mask)))
    assert abs(sum(grpo_loss(*p, 0.2, 0.1, "dapo", mask.sum()).loss for p in parts) - total) < 1e-14


# ── Advantages ──

REWARDS = st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5)


@given(REWARDS, st.sampled_from(["group", "batch", "none"]))
def test_advantages_of_a_group_sum_to_nothing(rewards, scale):
    r = torch.tensor(rewards, dtype=torch.double).flatten()
    a = advantages(r, 4, scale).view(-1, 4)
    assert (a.sum(1).abs() <= 1e-9 * (1 + a.abs().max())).all()
    assert (a[[len(set(group)) == 1 for group in rewards]].abs() < 1e-6).all()


@given(REWARDS, st.floats(0.1, 9), st.floats(-5, 5))
def test_neither_unit_nor_zero_of_rewards_matters(rewards, unit, zero):
    r = torch.tensor(rewards, dtype=torch.double).flatten()
    if r.view(-1, 4).std(1).min() > 1e-2:
        same = advantages(unit * r + zero, 4, std_eps=0.0)
        assert torch.allclose(same, advantages(r, 4, std_eps=0.0), atol=1e-6)


def test_advantages_are_trls():
    r = torch.rand(12, dtype=torch.double)
    for scale, std in (("group", r.view(3, 4).std(1).repeat_interleave(4)), ("batch", r.std())):
        want = (r - r.view(3, 4).mean(1).repeat_interleave(4)) / (std + 1e-4)
        assert torch.allclose(advantages(r, 4, scale), want, atol=1e-14)


@pytest.mark.parametrize("n, group", [(7, 2), (4, 1), (4, 0)])
def test_what_is_no_group_is_refused(n, group):
    with pytest.raises(UserError, match=f"{n} rewards cannot be cut into groups of {group}"):
        advantages(torch.zeros(n), group)


# ── Log-probabilities ──


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_k3_is_never_negative(a, b):
    a, b = torch.tensor([a, b], dtype=torch.double)
    assert kl_k3(a, b) >= 0 and kl_k3(a, a) == 0


@pytest.mark.parametrize("n", [0, 1, 513, 1100])
def test_log_probabilities_and_entropies_are_their_definitions(n):
    torch.manual_seed(n)
    h = torch.randn(n, 6, dtype=torch.double, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.double, requires_grad=True)
    y, t = torch.randint(11, (n,)), 0.6
    logp, entropy = token_logprobs(h, w, y, t)
    all_logp = (h @ w.T / t).log_softmax(-1)
    want = all_logp.gather(1, y[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)
    assert torch.allclose(logp, want[0]) and torch.allclose(entropy, want[1])
    for x, z in zip((logp, entropy), want):
        for got, right in zip(
            *(torch.autograd.grad(v.sum(), (h, w), retain_graph=True) for v in (x, z))
        ):
            assert torch.allclose(got, right)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_mask_ends_with_the_first_end(rows):
    got = completion_mask(torch.tensor(rows), eos_id=0)
    for row, mask in zip(rows, got.tolist()):
        n = row.index(0) + 1 if 0 in row else len(row)
        assert mask == [True] * n + [False] * (len(row) - n)


# ── Constants, as data ──

REPORT = {"scale_rewards": "group"}  # eq. 28: divided by the standard deviation of the group
OWN_CHOICES = {  # the report does not publish ε, β, G, the temperature or the lengths
    "num_generations": 16, "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.001, "temperature": 1.0,
    "max_new_tokens": 48, "steps_per_generation": 1, "loss_type": "grpo",
}  # fmt: skip
OWN_RECIPE = {
    "steps": 1000, "lr": 1e-6, "min_lr": 1e-6, "warmup_steps": 10, "decay_start": 0.0,
    "decay_end": 1.0, "final_start": 1.1, "start_batch_size": 32, "global_batch_size": 32,
    "bias_update_rate": 0.0, "mtp_weight": 0.0, "mtp_weight_end": 0.0, "balance_loss_coeff": 0.0,
    "weight_decay": 0.0,
}  # fmt: skip
TINY_RECIPE = {
    "steps": 60, "seq_len": 256, "lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 5,
    "start_batch_size": 16, "global_batch_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("field, value", (REPORT | OWN_CHOICES).items())
def test_every_constant_of_grpo(field, value):
    assert getattr(GRPOConfig, field) == value


def test_the_recipes_differ_from_pre_training_in_these_numbers():
    v3 = asdict(TrainingRecipe()) | OWN_RECIPE
    assert {name: asdict(recipe) for name, recipe in GRPO_RECIPES.items()} == {
        "v3": v3,
        "tiny": v3 | TINY_RECIPE,
    }
    assert GRPOConfig.RECIPES is GRPO_RECIPES


def test_sequence_is_equation_26_of_the_report():
    """One ratio per completion, symmetric clip bounds, and k₃ of the whole completion (eq. 27)."""
    logp, old, ref, a, mask = batch(4, 5, 0)
    ratio = ((logp - old) * mask).sum(1).exp()
    gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    delta = ((ref - logp) * mask).sum(1)
    want = -(gain - 0.1 * (delta.exp() - delta - 1)).mean()
    assert abs(grpo_loss(logp, old, ref, a, mask, 0.2, 0.1, "sequence").loss - want) < 1e-12
