"""Data, schedule and step of pre-training against the report's numbers and plain loops."""

import random
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import accumulate, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import optim, pretrain
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import balance_loss
from dsv3_ref.optim import (
    AdamW,
    TrainingRecipe,
    adamw_update,
    build_adamw,
    ema_update,
    get_batch_size_schedule,
    get_bias_update_rate,
    get_lr,
    get_mtp_weight,
)
from dsv3_ref.pretrain import (
    LossOutput,
    compute_losses,
    expert_loads,
    fim,
    pack_documents,
    train_step,
)
from dsv3_ref.training.recompute import saved_tensors

R = TrainingRecipe()
TOKENS = 14.8  # trillions
LATE = 10**6  # a step long after the warm-up


# ── Data ──


@given(text=st.text(max_size=30), rate=st.floats(0, 1), seed=st.integers(0, 1000))
def test_fim_cuts_and_loses_nothing(text, rate, seed):
    parts = fim(text, random.Random(seed), rate)
    if parts is not None:
        assert "".join(parts) == text
        assert all(parts)


def test_fim_cuts_one_document_in_ten():
    rng = random.Random(0)
    cut = sum(fim("a text to be cut", rng, 0.1) is not None for _ in range(10_000))
    assert abs(cut - 1000) < 5 * (10_000 * 0.1 * 0.9) ** 0.5
    assert fim("a text", rng, 0.0) is None
    assert fim("a text", rng, 1.0) is not None
    assert fim("ab", rng, 1.0) is None  # too short for three parts


def test_fim_may_cut_anywhere():
    rng = random.Random(0)
    assert len({fim("abcd", rng, 1.0) for _ in range(200)}) == 3  # a|b|cd a|bc|d ab|c|d


@given(st.lists(st.lists(st.integers(), max_size=12), max_size=8), st.integers(1, 7))
def test_packing_keeps_every_token_in_order(documents, length):
    rows, rest = [], []
    for tokens in documents:
        new, rest = pack_documents(rest, tokens, length)
        rows += new
    assert all(len(row) == length for row in rows)
    assert len(rest) < length
    assert sum(rows, []) + rest == sum(documents, [])


def test_packing_leaves_its_arguments_alone():
    rest, tokens = [1, 2], [3, 4, 5]
    assert pack_documents(rest, tokens, 2) == ([[1, 2], [3, 4]], [5])
    assert (rest, tokens) == ([1, 2], [3, 4, 5])


# ── Schedules of §4.2, at the token counts that it names ──


@pytest.mark.parametrize(
    "trillions, lr",
    [
        (0.1, 2.2e-4),
        (9.999, 2.2e-4),
        (10 + 4.3 / 4, 2.2e-5 + 1.98e-4 * (2 + 2**0.5) / 4),  # a quarter of the cosine
        (10 + 4.3 / 2, (2.2e-4 + 2.2e-5) / 2),
        (14.3, 2.2e-5),
        (14.3 + 0.332, 2.2e-5),
        (14.3 + 0.334, 7.3e-6),
        (14.8, 7.3e-6),
    ],
)
def test_the_learning_rate_of_the_report(trillions, lr):
    assert get_lr(R, LATE, trillions / TOKENS) == pytest.approx(lr, rel=1e-4)


def test_the_learning_rate_warms_up_over_2000_steps():
    rates = [get_lr(R, step, 0.0) for step in range(2001)]
    assert rates[999] == pytest.approx(1.1e-4)
    assert rates[1999] == rates[2000] == 2.2e-4
    assert all(b - a == pytest.approx(1.1e-7) for a, b in zip(rates[:1999], rates[1:2000]))
    assert 0 < rates[0] < 2e-7


def test_the_cosine_falls_all_the_way():
    rates = [get_lr(R, LATE, (10 + 4.3 * i / 50) / TOKENS) for i in range(51)]
    assert all(b < a for a, b in zip(rates, rates[1:]))


def test_bias_speed_and_mtp_weight_change_when_the_report_says():
    assert [get_bias_update_rate(R, x / TOKENS) for x in (0, 14.299, 14.301, 14.8)] == [
        1e-3,
        1e-3,
        0,
        0,
    ]
    assert [get_mtp_weight(R, x / TOKENS) for x in (0, 9.999, 10.001, 14.8)] == [0.3, 0.3, 0.1, 0.1]
    assert get_mtp_weight(R, R.decay_start) == 0.1  # all of the first 10T tokens have been seen
    assert get_bias_update_rate(R, R.decay_end) == 0


def test_the_batch_plan_is_14_8_trillion_tokens():
    plan = get_batch_size_schedule(R, R.steps)
    seen = list(accumulate(n * R.seq_len / 1e12 for n in plan))
    assert seen[-1] == pytest.approx(14.8, rel=1e-4)
    assert plan[0] == 3072
    assert plan[-1] == max(plan) == 15_360
    assert all(a <= b for a, b in zip(plan, plan[1:]))
    full = next(t for t, n in zip(seen, plan) if n == 15_360)
    assert full == pytest.approx(0.469, abs=0.002)


@given(
    steps=st.integers(20, 300),
    start=st.integers(1, 20),
    grow=st.integers(0, 60),
    ramp=st.floats(0.01, 0.9),
)
def test_a_batch_plan_grows_and_stays(steps, start, grow, ramp):
    plan = get_batch_size_schedule(
        TrainingRecipe(
            start_batch_size=start, global_batch_size=start + grow, batch_rampup_frac=ramp
        ),
        steps,
    )
    assert len(plan) == steps
    assert all(a <= b for a, b in zip(plan, plan[1:]))
    assert plan[0] == start
    assert start <= plan[-1] <= start + grow


def test_a_ramp_takes_its_share_of_the_sequences():
    plan = get_batch_size_schedule(
        TrainingRecipe(start_batch_size=10, global_batch_size=50, batch_rampup_frac=0.25), 1000
    )
    ramp = sum(n for n in plan if n < 50)
    assert ramp / sum(plan) == pytest.approx(0.25, abs=0.01)


# ── Losses ──


def rows(micro, b: int, t: int = 8):
    return torch.randint(micro.vocab_size, (b, t + 1))


def test_the_main_loss_is_the_mean_surprise(exact, micro):
    model, tokens_bs = Transformer(micro).double(), rows(micro, 3)
    parts, logp = compute_losses(model, tokens_bs), model(tokens_bs[:, :-1]).log_softmax(-1)
    nll = [-logp[b, s, tokens_bs[b, s + 1]] for b, s in product(range(3), range(8))]
    assert parts.main.item() == pytest.approx(sum(nll).item() / 24)
    assert len(parts.mtp) == 2
    assert parts.balance.item() == pytest.approx(sum(balance_loss(r).item() for r in parts.routes))
    assert len(parts.routes) == 4  # two layers, two MTP modules


def test_the_total_weighs_its_parts():
    x = torch.tensor
    parts = LossOutput(x(1.0), [x(2.0), x(4.0)], x(5.0), [])
    assert parts.total(0.3, 0.1).item() == pytest.approx(1 + 0.3 / 2 * (2 + 4) + 0.1 * 5)
    assert LossOutput(x(1.0), [], x(5.0), []).total(0.3, 0.0).item() == 1.0


def test_loads_are_counted_for_every_layer(micro):
    parts = compute_losses(Transformer(micro), rows(micro, 3))
    load_le = expert_loads(parts.routes)
    assert load_le.shape == (4, 16)
    assert load_le.sum(1).tolist() == [3 * 8 * 3, 3 * 8 * 3, 3 * 7 * 3, 3 * 6 * 3]


# ── The step ──


def step(model, micro_batches, lr=1e-2, gamma=0.1, **recipe):
    r = TrainingRecipe(**recipe)
    return train_step(model, build_adamw(model, r), micro_batches, r, lr, gamma, 0.3)


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def watch_gradients(monkeypatch):
    """Keep the gradients that reach the clipping, unclipped."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return seen


def test_micro_batches_of_any_size_are_the_whole_batch(exact, micro, monkeypatch):
    model, tokens_bs = Transformer(micro).double(), rows(micro, 7)
    whole, parts = deepcopy(model), deepcopy(model)
    seen = watch_gradients(monkeypatch)
    want = step(whole, [tokens_bs])
    got = step(parts, tokens_bs.split([4, 1, 2]))
    for a, b in zip(*seen):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert got.loss == pytest.approx(want.loss)
    assert got.mtp == pytest.approx(want.mtp)
    assert got.total == pytest.approx(want.total)
    assert got.grad_norm == pytest.approx(want.grad_norm)
    assert torch.equal(got.load_le, want.load_le)
    for name, moe in moe_layers(whole).items():
        assert torch.equal(moe.gate.bias, moe_layers(parts)[name].gate.bias)


def test_the_gradient_is_that_of_the_total_loss(micro, monkeypatch):
    model, tokens_bs = Transformer(micro), rows(micro, 3)
    seen = watch_gradients(monkeypatch)
    want = torch.autograd.grad(
        compute_losses(model, tokens_bs).total(0.3, 1e-4), list(model.parameters())
    )
    stats = step(model, [tokens_bs])
    assert all(torch.equal(g, w) for g, w in zip(seen[0], want))
    norm = torch.stack([g.norm() for g in want]).norm()
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_a_step_clips_sets_the_rate_and_clears(micro, monkeypatch):
    model, r = Transformer(micro), TrainingRecipe(max_grad_norm=0.01)
    seen = {}
    optimizer = build_adamw(model, r)

    def note():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        seen.update(norm=norm.item(), lr={g["lr"] for g in optimizer.param_groups})

    monkeypatch.setattr(optimizer, "step", note)
    stats = train_step(model, optimizer, [rows(micro, 3)], r, 0.125, 0.1, 0.3)
    assert stats.grad_norm > 0.1
    assert seen["norm"] == pytest.approx(0.01, rel=1e-3)
    assert seen["lr"] == {0.125}
    assert all(p.grad is None for p in model.parameters())


def test_a_step_moves_biases_by_its_whole_load(micro):
    model = Transformer(micro)
    stats = step(model, rows(micro, 6).split(2), gamma=0.1)
    for load_e, moe in zip(stats.load_le, moe_layers(model).values()):
        want = 0.1 * (load_e.float().mean() - load_e).sign()
        assert torch.allclose(moe.gate.bias, want)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_skipped(micro, monkeypatch, poison):
    """One bad micro-batch of two, its gradients fine: nothing moves, and the caller hears of it."""
    model = Transformer(micro)
    calls, real = [], compute_losses

    def poisoned(*args):
        parts = real(*args)
        calls.append(1)
        return parts._replace(main=parts.main + (poison if len(calls) == 2 else 0.0))

    monkeypatch.setattr(pretrain, "compute_losses", poisoned)
    before = state(model)
    stats = step(model, rows(micro, 4).split(2))
    assert not torch.tensor(stats.total).isfinite()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_no_number_is_skipped_though_the_loss_is_one(micro):
    model = Transformer(micro)
    model.head.weight.register_hook(lambda grad: grad * float("inf"))
    before = state(model)
    stats = step(model, [rows(micro, 2)])
    assert torch.tensor(stats.total).isfinite()
    assert not torch.tensor(stats.grad_norm).isfinite()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_steps_learn(micro):
    model, r = Transformer(micro), TrainingRecipe()
    tokens_bs = rows(micro, 4)
    optimizer = build_adamw(model, r)
    stats = [train_step(model, optimizer, [tokens_bs], r, 1e-2, 1e-3, 0.3) for _ in range(30)]
    assert stats[-1].loss < 0.5 * stats[0].loss
    assert all(last < 0.8 * first for first, last in zip(stats[0].mtp, stats[-1].mtp))


def test_decay_spares_the_norms(micro):
    model = Transformer(micro)
    decayed, spared = build_adamw(model, R).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == spared["betas"] == (0.9, 0.95)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in spared["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


# ── AdamW and the average, against the plain equations ──


def random_steps(optimizer, params, steps: int, seed: int = 0):
    """Steps with random gradients, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def twin(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def ours(params, **more):
    return AdamW([{"params": params, "weight_decay": 0.1}], 1e-2, (0.9, 0.95), **more)


def test_fp32_moments_are_torchs_adamw_after_many_steps():
    a = [torch.nn.Parameter(torch.randn(shape)) for shape in ((600, 500), (7,), (3, 5, 2))]
    b = twin(a)
    random_steps(ours(a, state_dtype=torch.float32), a, 200)
    random_steps(torch.optim.AdamW(b, 1e-2, (0.9, 0.95), weight_decay=0.1), b, 200)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    steps=st.integers(1, 5),
    chunk=st.integers(1, 20),
    moments=st.sampled_from([torch.float32, torch.bfloat16]),
    weights=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_adamw_is_the_plain_equation(shape, steps, chunk, moments, weights):
    """In chunks of any size; bf16 weights are their rounded master, moments are rounded.

    Each step is compared from what the step before it stored, so that the only difference left
    is that of a number so near the middle of two that it may be rounded either way.
    """
    p = torch.nn.Parameter(torch.randn(shape).to(weights))
    w = p.detach().float().clone()
    m, v = torch.zeros(shape), torch.zeros(shape)
    optimizer = ours([p], state_dtype=moments)
    near = {"rtol": 2**-7, "atol": 1e-6} if moments == torch.bfloat16 else {}
    for t in range(1, steps + 1):
        p.grad = torch.randn(shape).to(weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "CPU_CHUNK_NUMEL", chunk)
            optimizer.step()
        want_w, *want = adamw_update(w, p.grad.float(), m, v, t, 1e-2, (0.9, 0.95), 0.1)
        state = optimizer.state[p]
        assert ("master" in state) == (weights == torch.bfloat16)
        w = state.get("master", p.detach()).clone()
        m, v = (state[k].to(w, copy=True) for k in ("exp_avg", "exp_avg_sq"))
        torch.testing.assert_close(w, want_w)
        assert torch.equal(p.detach(), w.to(weights))
        for x, y in zip((m, v), want):
            torch.testing.assert_close(x, y.to(moments).float(), **near)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_bit_for_bit(weights):
    """Also where weights are bf16: a master must not be rounded on the way."""
    a = [torch.nn.Parameter(torch.randn(40, 30).to(weights)) for _ in range(2)]
    first = ours(a)
    random_steps(first, a, 3)
    b = twin(a)
    second = ours(b)
    second.load_state_dict(deepcopy(first.state_dict()))
    random_steps(first, a, 3, seed=1)
    random_steps(second, b, 3, seed=1)
    for x, y in zip(a, b):
        assert torch.equal(x, y)
        one, two = first.state[x], second.state[y]
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize(
    ("moments", "weights", "size"),
    [(torch.float32, torch.float32, 8), (torch.bfloat16, torch.float32, 4)]
    + [(torch.bfloat16, torch.bfloat16, 8)],
)
def test_bytes_of_optimizer_state(moments, weights, size):
    p = torch.nn.Parameter(torch.zeros(10, 100, dtype=weights))
    optimizer = ours([p], state_dtype=moments)
    random_steps(optimizer, [p], 1)
    held = sum(x.nbytes for k, x in optimizer.state[p].items() if k != "step")
    assert held == size * p.numel()


@given(steps=st.integers(1, 12), decay=st.floats(0.0, 0.999), n=st.integers(1, 50))
def test_the_average_is_weighted_by_age(steps, decay, n):
    path, mean = torch.randn(steps, n), torch.full((n,), 7.0)  # what it starts from is forgotten
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "CPU_CHUNK_NUMEL", 80)
        for t, w in enumerate(path, start=1):
            ema_update([mean], [w], decay, t)
    weight = torch.tensor([decay ** (steps - 1 - s) for s in range(steps)])
    want = (weight[:, None] * path).sum(0) / weight.sum()
    torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-5)


# ── Recomputation ──


@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_a_step_that_recomputes_is_the_same_step(micro, q_lora_rank):
    start = Transformer(replace(micro, q_lora_rank=q_lora_rank))
    tokens_bs, after = rows(micro, 3), []
    for recompute in (False, True):
        model = deepcopy(start)
        with saved_tensors(True) if recompute else nullcontext():
            stats = step(model, tokens_bs.split(2))
        after.append([stats.total, *(p.detach() for p in model.state_dict().values())])
    assert after[0][0] == after[1][0]
    assert all(torch.equal(a, b) for a, b in zip(after[0][1:], after[1][1:]))


# ── The report's recipe, as data (§4.2) ──

RECIPE_TABLE = {
    "steps": 242_783, "seq_len": 4096, "lr": 2.2e-4, "min_lr": 2.2e-5, "final_lr": 7.3e-6,
    "warmup_steps": 2000, "start_batch_size": 3072, "global_batch_size": 15_360,
    "bias_update_rate": 0.001, "mtp_weight": 0.3, "mtp_weight_end": 0.1,
    "balance_loss_coeff": 0.0001, "balance_loss_scope": "sequence", "weight_decay": 0.1,
    "beta1": 0.9, "beta2": 0.95, "max_grad_norm": 1.0,
}  # fmt: skip
TRILLIONS = {  # of tokens: where the cosine begins and ends, the last rate, the ramp's end
    "decay_start": 10.0, "decay_end": 14.3, "final_start": 14.633, "batch_rampup_frac": 0.469,
}  # fmt: skip
OWN_RECIPES = {  # what differs from the report's in the sizes that are ours
    "tiny": {
        "steps": 500, "seq_len": 256, "start_batch_size": 2, "global_batch_size": 8,
        "warmup_steps": 20, "lr": 0.004, "min_lr": 0.0004, "final_lr": 0.00013,
        "bias_update_rate": 0.01,
    },
    "small": {
        "steps": 20_000, "seq_len": 2048, "start_batch_size": 32, "global_batch_size": 128,
        "warmup_steps": 400, "lr": 0.0006, "min_lr": 0.00006, "final_lr": 0.00002,
    },
    "v2_lite": {
        "steps": 100_000, "start_batch_size": 512, "global_batch_size": 2304, "lr": 0.00042,
        "min_lr": 0.000042, "final_lr": 0.000014, "mtp_weight": 0.0, "mtp_weight_end": 0.0,
        "balance_loss_coeff": 0.001, "bias_update_rate": 0.0,
    },
    "v3": {},
}  # fmt: skip


def test_every_number_of_the_recipe_is_the_reports():
    values = asdict(R)
    fractions = {name: values.pop(name) for name in TRILLIONS}
    assert values == RECIPE_TABLE
    assert {k: TOKENS * x for k, x in fractions.items()} == pytest.approx(TRILLIONS, rel=1e-12)


def test_the_recipes_of_the_sizes_change_only_these_numbers():
    assert set(optim.RECIPES) == set(OWN_RECIPES)
    for name, changes in OWN_RECIPES.items():
        assert asdict(optim.RECIPES[name]) == asdict(R) | changes


def test_fim_cuts_three_characters():
    assert fim("abc", random.Random(0), 1.0) == ("a", "b", "c")


def test_rates_of_chance_exclude_their_bound():
    """random() may return 0: a rate of 0 never strikes; one equal to the number does not either."""

    class Fixed(random.Random):
        def random(self) -> float:
            return 0.0

    assert fim("a text", Fixed(), 0.0) is None
    assert pretrain.split_newlines([7], {7: [1, 2]}, Fixed(), 0.0) == [7]
    assert pretrain.split_newlines([7], {7: [1, 2]}, Fixed(), 1e-9) == [1, 2]
