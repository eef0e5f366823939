"""The MoE against loops that a reader can check by eye: gate, losses, bias, experts, order."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import V2_LITE, V3, Config
from dsv3_ref.moe import (
    Gate,
    MoE,
    Route,
    balance_loss,
    mask_to_top_groups,
    max_vio,
    permute,
    route,
    sort_by_expert,
    tokens_per_expert,
    unpermute,
    update_expert_bias,
)


@st.composite
def gates(draw):
    """Draw configs of every gate: groups or none, sigmoid or softmax."""

    def size(low, high):
        return draw(st.integers(low, high))

    groups, per_group = size(1, 5), size(1, 5)
    limited = size(1, groups)
    return replace(
        Config(),
        n_routed_experts=groups * per_group,
        n_expert_groups=groups,
        n_limited_groups=limited,
        n_activated_experts=size(1, limited * per_group),
        score_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
    )


def logits(c: Config, b: int, s: int):
    """Draw logits in fp64, so that no two scores tie."""
    return torch.randn(b, s, c.n_routed_experts).double()


def slow_route(logit: list[float], bias: list[float], c: Config) -> dict[int, float]:
    """Route one token by the words of §2.1.2: expert → weight."""
    x = torch.tensor(logit).double()
    sigmoid = c.score_func == "sigmoid"
    affinity = (1 / (1 + torch.exp(-x)) if sigmoid else torch.exp(x) / torch.exp(x).sum()).tolist()
    score = [a + b for a, b in zip(affinity, bias)]
    size = len(score) // c.n_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_expert_groups)]

    def best(group):
        return sum(sorted((score[e] for e in group), reverse=True)[: 2 if sigmoid else 1])

    open_groups = sorted(groups, key=best, reverse=True)[: c.n_limited_groups]
    allowed = chain.from_iterable(open_groups)
    chosen = sorted(allowed, key=lambda e: score[e], reverse=True)[: c.n_activated_experts]
    total = sum(affinity[e] for e in chosen) if sigmoid else 1.0
    return {e: affinity[e] / total * c.route_scale for e in chosen}


# ── The gate ──


@given(c=gates(), shape=st.tuples(st.integers(1, 3), st.integers(1, 9)), spread=st.floats(0, 3))
def test_routing_is_what_the_report_says(c, shape, spread):
    logit_bse = logits(c, *shape)
    bias_e = torch.randn(c.n_routed_experts).double() * spread
    r = route(logit_bse, bias_e, c)
    for b in range(shape[0]):
        for s in range(shape[1]):
            got = dict(zip(r.topk_ids_bsk[b, s].tolist(), r.topk_weights_bsk[b, s].tolist()))
            want = slow_route(logit_bse[b, s].tolist(), bias_e.tolist(), c)
            assert got == pytest.approx(want, rel=1e-9)


def test_shut_groups_stay_shut_when_every_score_is_negative():
    """A mask of 0.0 would beat all open groups here; the mask is −∞."""
    scores_bse = torch.tensor([[[-1.0, -2.0, -3.0, -4.0, -0.5, -9.0]]])
    out = mask_to_top_groups(scores_bse, n_groups=3, topk_groups=1, group_topk=2)
    assert out.tolist() == [[[-1.0, -2.0] + [-torch.inf] * 4]]
    c = replace(
        V3, n_routed_experts=6, n_expert_groups=3, n_limited_groups=1, n_activated_experts=2
    )
    r = route(scores_bse, torch.full((6,), -5.0), c)
    assert sorted(r.topk_ids_bsk.flatten().tolist()) == [0, 1]


def test_a_group_counts_by_its_two_best():
    """Group 0 has the best expert, group 1 the best pair, group 2 the best sum of all."""
    scores_bse = torch.tensor([[[9.0, 0, 0, 6, 6, 0, 5, 5, 5]]])
    out = mask_to_top_groups(scores_bse, n_groups=3, topk_groups=1, group_topk=2)
    assert out.isfinite().flatten().nonzero().flatten().tolist() == [3, 4, 5]


def test_bias_chooses_but_never_weighs(micro):
    """Push one expert into every token: the others' weights keep the ratio of their affinities."""
    logit_bse = logits(micro, 2, 7)
    bias_e = torch.zeros(16).double()
    bias_e[5] = 10.0
    r = route(logit_bse, bias_e, micro)
    assert (r.topk_ids_bsk == 5).any(-1).all()
    affinity_bsk = logit_bse.sigmoid().gather(-1, r.topk_ids_bsk)
    want = affinity_bsk / affinity_bsk.sum(-1, keepdim=True) * micro.route_scale
    assert torch.allclose(r.topk_weights_bsk, want)
    assert torch.equal(r.scores_bse, logit_bse.sigmoid())


def test_an_equal_bias_changes_nothing(micro):
    logit_bse = logits(micro, 2, 7)
    biased, plain = (route(logit_bse, b, micro) for b in (torch.full((16,), 3.0), None))
    assert all(torch.equal(a, b) for a, b in zip(biased, plain))


@given(c=gates())
def test_sigmoid_weights_sum_to_the_scale_and_softmax_weights_do_not_renormalize(c):
    logit_bse = logits(c, 2, 5)
    total = route(logit_bse, None, c).topk_weights_bsk.sum(-1)
    if c.score_func == "sigmoid":
        assert torch.allclose(total, torch.full_like(total, c.route_scale))
    else:
        assert (total <= c.route_scale * (1 + 1e-9)).all()
        if c.n_activated_experts < c.n_routed_experts:
            assert (total < c.route_scale).all()


def test_the_softmax_gate_of_v2_lite_is_plain_top_6():
    logit_bse = logits(V2_LITE, 2, 5)
    want = logit_bse.softmax(-1).topk(6).values
    assert torch.allclose(route(logit_bse, None, V2_LITE).topk_weights_bsk, want)
    assert Gate(replace(V2_LITE, dim=4)).bias is None


def test_the_gate_works_in_fp32_and_its_bias_is_a_buffer(micro):
    gate = Gate(micro)
    torch.nn.init.normal_(gate.weight)
    x_bsd = torch.randn(2, 5, micro.dim)
    want = torch.nn.functional.linear(x_bsd, gate.weight).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        r = gate(x_bsd)
    assert torch.equal(r.scores_bse, want)
    r.topk_weights_bsk.square().sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    assert [n for n, _ in gate.named_parameters()] == ["weight"]
    assert not gate.bias.requires_grad
    assert "bias" in gate.state_dict()


# ── Balance ──


def test_bias_moves_by_gamma_towards_the_mean():
    bias_e = torch.tensor([0.0, 1.0, -1.0, 0.5])
    update_expert_bias(bias_e, torch.tensor([9, 1, 5, 5]), gamma=0.001)
    assert bias_e.tolist() == pytest.approx([-0.001, 1.001, -1.0, 0.5])


def test_bias_alone_evens_out_a_lopsided_gate(micro):
    logit_bse = logits(micro, 8, 64) + torch.linspace(-2, 2, 16)
    bias_e = torch.zeros(16)

    def load():
        return tokens_per_expert(route(logit_bse, bias_e, micro).topk_ids_bsk, 16)

    assert max_vio(load()) > 1.0
    for _ in range(300):
        update_expert_bias(bias_e, load(), gamma=0.01)
    assert max_vio(load()) < 0.15


def test_load_counts_every_choice_and_max_vio_the_worst():
    topk_ids_bsk = torch.tensor([[[0, 2], [2, 3]], [[2, 0], [2, 5]]])
    load_e = tokens_per_expert(topk_ids_bsk, 6)
    assert load_e.tolist() == [2, 0, 4, 1, 0, 1]
    assert max_vio(load_e) == pytest.approx(4 / (8 / 6) - 1)


def slow_balance(r: Route) -> float:
    """Compute eq. 17–20 as printed, one sequence after the other."""
    (b, t, k), e = r.topk_ids_bsk.shape, r.scores_bse.shape[-1]
    total = 0.0
    for row in range(b):
        chosen, affinity = r.topk_ids_bsk[row].tolist(), r.scores_bse[row].tolist()
        for i in range(e):
            f = e / (k * t) * sum(i in chosen[s] for s in range(t))
            p = sum(affinity[s][i] / sum(affinity[s]) for s in range(t)) / t
            total += f * p / b
    return total


@given(c=gates(), shape=st.tuples(st.integers(1, 3), st.integers(1, 9)))
def test_balance_loss_is_equations_17_to_20(c, shape):
    r = route(logits(c, *shape), None, c)
    assert balance_loss(r).item() == pytest.approx(slow_balance(r))


@given(c=gates(), shape=st.tuples(st.integers(1, 3), st.integers(1, 9)))
def test_balance_over_a_batch_takes_its_tokens_as_one_sequence(c, shape):
    logit_bse = logits(c, *shape)
    as_batch = balance_loss(route(logit_bse, None, c), "batch")
    one_sequence = balance_loss(route(logit_bse.flatten(0, 1)[None], None, c))
    assert as_batch.item() == pytest.approx(one_sequence.item(), rel=1e-9)


def test_balance_loss_is_one_when_even_and_e_over_k_when_all_agree():
    scores_bse = torch.full((1, 6, 3), 0.3)
    even = torch.arange(6)[None, :, None] % 3
    assert balance_loss(Route(None, even, scores_bse)).item() == pytest.approx(1.0)
    sure_bse = torch.tensor([1.0, 0, 0]).expand(1, 6, 3)
    assert balance_loss(Route(None, even * 0, sure_bse)).item() == pytest.approx(3.0)


def test_balance_loss_teaches_the_gate_to_spread():
    """Its gradient lowers the affinity of the busiest expert and lifts the idle ones."""
    logit_bse = torch.zeros(1, 8, 3, requires_grad=True)
    r = Route(None, torch.zeros(1, 8, 1, dtype=torch.int64), logit_bse.sigmoid())
    balance_loss(r).backward()
    assert (logit_bse.grad[..., 0] > 0).all()
    assert (logit_bse.grad[..., 1:] < 0).all()


# ── Rows to experts and back ──


@given(n=st.integers(1, 6), k=st.integers(1, 4), d=st.integers(1, 3))
def test_permute_and_combine_have_right_gradients(n, k, d):
    rows = sort_by_expert(torch.randint(3, (n, k)))
    x_nd, y_md, w_nk = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((n, d), (n * k, d), (n, k))
    )
    assert torch.autograd.gradcheck(lambda x: permute(x, *rows), x_nd)
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, w, *rows), (y_md, w_nk))


@given(n=st.integers(1, 9), k=st.integers(1, 4))
def test_rows_are_sorted_by_expert_and_come_back(n, k):
    expert_nk, x_nd = torch.randint(3, (n, k)), torch.randn(n, 3)
    sorted_ids_m, row_ids_nk = sort_by_expert(expert_nk)
    rows_md = permute(x_nd, sorted_ids_m, row_ids_nk)
    assert (expert_nk.flatten()[sorted_ids_m].diff() >= 0).all()
    assert all(torch.equal(rows_md[j], x_nd[sorted_ids_m[j] // k]) for j in range(n * k))
    assert torch.equal(rows_md[row_ids_nk], x_nd[:, None].expand(-1, k, -1))


# ── The layer ──


def layer(c: Config) -> MoE:
    moe = MoE(c).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return moe


def slow_moe(moe: MoE, x_bsd):
    """Compute y = shared(x) + Σ w_k · W₂(silu(W₁x) · W₃x), one token and expert at a time."""

    def ffn(x, w1, w2, w3):
        z = w1 @ x
        return w2 @ (z / (1 + torch.exp(-z)) * (w3 @ x))

    e, shared = moe.experts, moe.shared_experts
    out = []
    for x in x_bsd.flatten(0, 1):
        logit_e = moe.gate.weight @ x
        chosen = slow_route(logit_e.tolist(), moe.gate.bias.tolist(), moe.config)
        r = route(logit_e[None, None], moe.gate.bias, moe.config)  # with gradient
        weight = dict(zip(r.topk_ids_bsk.flatten().tolist(), r.topk_weights_bsk.flatten()))
        assert weight.keys() == chosen.keys()
        y = ffn(x, shared.w1.weight, shared.w2.weight, shared.w3.weight)
        for i, w in weight.items():
            y = y + w * ffn(x, e.w1[i], e.w2[i], e.w3[i])
        out.append(y)
    return torch.stack(out).view_as(x_bsd)


def with_gradients(moe, fn, x_bsd):
    x_bsd = x_bsd.clone().requires_grad_()
    y_bsd = fn(x_bsd)
    wave = torch.linspace(-1, 1, y_bsd.numel()).double().view(y_bsd.shape)
    return [y_bsd, *torch.autograd.grad(y_bsd, [x_bsd, *moe.parameters()], wave)]


SHAPES = {"one token": (1, 1), "one row": (1, 7), "a batch": (3, 5)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("skew", [0.0, 10.0], ids=["spread", "the same experts for all"])
def test_the_layer_is_a_sum_over_chosen_experts(exact, micro, shape, skew):
    """One token leaves 13 of 16 experts empty; the skew sends every token to experts 0, 1 and 2."""
    moe = layer(micro)
    moe.gate.bias[:3] += skew
    x_bsd = torch.randn(*shape, micro.dim).double()
    got = with_gradients(moe, lambda x: moe(x)[0], x_bsd)
    want = with_gradients(moe, lambda x: slow_moe(moe, x), x_bsd)
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-12)
    load_e = tokens_per_expert(moe(x_bsd)[1].topk_ids_bsk, 16)
    assert load_e.sum() == shape[0] * shape[1] * 3  # no token is dropped
    if skew:
        assert load_e.tolist() == [shape[0] * shape[1]] * 3 + [0] * 13


def test_tokens_do_not_see_one_another(micro):
    moe = layer(micro).float()
    x_bsd = torch.randn(3, 5, micro.dim)
    y_bsd, alone = moe(x_bsd)[0], torch.stack([moe(x[None])[0][0] for x in x_bsd])
    assert torch.allclose(y_bsd, alone, atol=1e-5)


def test_the_experts_are_handed_sorted_rows_and_their_counts(micro):
    """As on a rank that holds experts: rows sorted by expert, and one count per expert."""
    moe, calls = layer(micro).float(), []

    def forward(x_md, tokens_per_expert_e):
        calls.append((x_md, tokens_per_expert_e))
        return x_md * 0

    moe.experts.forward = forward
    x_bsd = torch.randn(2, 5, micro.dim)
    y_bsd, r = moe(x_bsd)
    assert torch.equal(y_bsd, moe.shared_experts(x_bsd))
    [(x_md, tokens_per_expert_e)] = calls
    rows = iter(x_md)
    for e, count in enumerate(tokens_per_expert_e.tolist()):
        tokens = x_bsd[(r.topk_ids_bsk == e).any(-1)]
        assert len(tokens) == count
        assert all(torch.equal(next(rows), token) for token in tokens)


def test_shared_experts_are_one_mlp_of_their_summed_width(micro):
    shared = MoE(replace(micro, n_shared_experts=2)).shared_experts
    assert shared.w1.weight.shape == shared.w3.weight.shape == (16, 24)  # of two experts of 8
    assert shared.w2.weight.shape == (24, 16)


def test_a_layer_without_shared_experts_is_only_routed(micro):
    moe = layer(replace(micro, n_shared_experts=0)).float()
    y_bsd, _ = moe(torch.randn(1, 4, micro.dim))
    assert moe.shared_experts(torch.randn(1, 4, micro.dim)).abs().max() == 0
    assert y_bsd.abs().min() > 0
