"""Expert parallelism: a rank's work against loops, and all ranks in a list against one device."""

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.expert_parallel import (
    apply_local_experts,
    dispatch_layout,
    mask_remote_weights,
    to_local_expert_ids,
)
from dsv3_ref.fp8 import act_dequant, act_quant
from dsv3_ref.moe import GroupedExperts, MoE


@st.composite
def choices(draw):
    """Draw (expert_nk with some −1, experts per member, members)."""
    per, size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    n, k = draw(st.integers(0, 20)), draw(st.integers(1, min(6, per * size)))
    expert_nk = torch.rand(n, per * size).argsort(1)[:, :k]
    return torch.where(torch.rand(n, k) < draw(st.sampled_from([0, 0.5])), -1, expert_nk), per, size


def filled(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def slow_experts(experts, x_nd, weight_nk, expert_nk):
    """Apply the experts token by token and expert by expert, in any dtype."""
    rows = []
    for x, weight_k, expert_k in zip(x_nd, weight_nk, expert_nk.tolist()):
        row = 0 * x
        for w, e in zip(weight_k, expert_k):
            if e >= 0:
                h = torch.nn.functional.silu(experts.w1[e] @ x) * (experts.w3[e] @ x)
                row = row + w * (experts.w2[e] @ h)
        rows.append(row)
    return torch.stack(rows)


# ── Who gets what ──


@given(choices())
def test_a_token_goes_once_to_each_member_that_holds_one_of_its_experts(case):
    expert_nk, per, size = case
    token_m, dest_m, count = dispatch_layout(expert_nk, per, size)
    want, counts = [], []
    for i in range(size):
        tokens = [n for n, chosen in enumerate(expert_nk.tolist())
                  if any(e >= 0 and e // per == i for e in chosen)]  # fmt: skip
        want += [(i, n) for n in tokens]
        counts.append(len(tokens))
    assert list(zip(dest_m.tolist(), token_m.tolist())) == want
    assert count.tolist() == counts


def chosen_experts(rows):
    """Count (token, choice, expert) in rows of (token, first expert, expert ids); −1 is none."""
    count = Counter()
    for n, first, expert_k in rows:
        count.update((n, j, first + e) for j, e in enumerate(expert_k) if e >= 0)
    return count


@given(choices())
def test_members_together_get_every_choice_once(case):
    expert_nk, per, size = case
    token_m, dest_m, _ = dispatch_layout(expert_nk, per, size)
    local_mk = to_local_expert_ids(expert_nk[token_m], dest_m, per)
    assert local_mk.dtype == torch.int32 and ((local_mk >= -1) & (local_mk < per)).all()
    sent = zip(token_m.tolist(), (per * dest_m).tolist(), local_mk.tolist())
    own = ((n, 0, expert_k) for n, expert_k in enumerate(expert_nk.tolist()))
    assert chosen_experts(sent) == chosen_experts(own)


@given(choices())
def test_two_levels_end_where_one_does(case):
    expert_nk, per, size = case
    expert_nk = torch.where(expert_nk % 2 == 0, expert_nk, -1)  # so that whole nodes are empty too
    for n in (i for i in range(1, size + 1) if size % i == 0):
        inside = size // n
        token_m, node_m, _ = dispatch_layout(expert_nk, per * inside, n)
        rows_mk = to_local_expert_ids(expert_nk[token_m], node_m, per * inside)
        row_m, place_m, _ = dispatch_layout(rows_mk, per, inside)
        two = zip(token_m[row_m].tolist(), (node_m[row_m] * inside + place_m).tolist())
        one = dispatch_layout(expert_nk, per, size)
        assert sorted(two) == sorted(zip(one[0].tolist(), one[1].tolist()))
        last = to_local_expert_ids(rows_mk[row_m], place_m, per)
        direct = to_local_expert_ids(
            expert_nk[token_m[row_m]], node_m[row_m] * inside + place_m, per
        )
        assert torch.equal(last, direct)


def test_weights_elsewhere_have_neither_value_nor_gradient():
    weight_mk = torch.rand(4, 3, requires_grad=True)
    expert_mk = torch.tensor([[0, -1, 2], [-1, -1, -1], [1, 1, 1], [3, 0, -1]])
    there = mask_remote_weights(weight_mk, expert_mk)
    there.sum().backward()
    assert torch.equal(there, weight_mk * (expert_mk >= 0))
    assert torch.equal(weight_mk.grad, (expert_mk >= 0).float())


# ── The experts that are here ──


def test_local_experts_is_the_loop_in_fp64_forward_and_backward(exact):
    experts = filled(GroupedExperts(3, 6, 5).double())
    x_nd = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight_nk = torch.rand(11, 4, dtype=torch.float64, requires_grad=True)
    expert_nk = torch.randint(-1, 3, (11, 4))
    expert_nk[5] = -1  # a row without local experts
    expert_nk[expert_nk == 1] = 2  # an expert without rows
    g_nd, leaves = torch.randn(11, 6).double(), (x_nd, weight_nk, *experts.parameters())
    both = [fn(experts, x_nd, weight_nk, expert_nk) for fn in (apply_local_experts, slow_experts)]
    grads = [torch.autograd.grad(y, leaves, g_nd) for y in both]
    for a, b in zip((both[0], *grads[0]), (both[1], *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (both[0][5] == 0).all() and (grads[0][0][5] == 0).all()


def test_an_expert_gets_its_rows_in_the_order_of_the_tokens():
    """So that a sum over an expert's rows is rounded in the same way in every run."""
    experts, inputs = GroupedExperts(3, 1, 8), []

    def forward(x_md, tokens_per_expert_e, weight_m):
        inputs.append(x_md[:, 0].split(tokens_per_expert_e.tolist()))
        return x_md

    experts.forward = forward
    x_nd, expert_nk = torch.arange(400.0)[:, None], torch.randint(-1, 3, (400, 2))
    apply_local_experts(experts, x_nd, torch.rand(400, 2), expert_nk)
    [rows_by_expert] = inputs
    for e, rows in enumerate(rows_by_expert):
        tokens, _ = (expert_nk == e).nonzero(as_tuple=True)  # twice where both choices are e
        assert rows.tolist() == tokens.tolist()


@pytest.mark.parametrize("n", [0, 3])
def test_a_rank_to_which_nothing_comes(n):
    experts = filled(GroupedExperts(2, 8, 8))
    x_nd = torch.randn(n, 8, requires_grad=True)
    y_nd = apply_local_experts(experts, x_nd, torch.rand(n, 2), torch.full((n, 2), -1))
    assert y_nd.shape == (n, 8) and (y_nd == 0).all()
    y_nd.backward(torch.ones_like(y_nd))
    assert (experts.w1.grad == 0).all() and (x_nd.grad == 0).all()


# ── FP8 values that have been sent ──


def test_fp8_products_use_the_values_that_arrived():
    """Given FP8 values, the rows themselves are never read; otherwise they are quantized again."""
    experts, x_nd = filled(GroupedExperts(3, 256, 128)), torch.randn(20, 256)
    weight_nk, expert_nk = torch.rand(20, 2), torch.randint(-1, 3, (20, 2))
    sent = act_quant(x_nd, True)
    received_nd, unused_nd = act_dequant(*sent), torch.full_like(x_nd, 7)
    with ops.use("fp8", "auto"), torch.no_grad():
        reused, blind, requantized = (
            apply_local_experts(experts, x, weight_nk, expert_nk, quantized)
            for x, quantized in ((received_nd, sent), (unused_nd, sent), (received_nd, None))
        )
    assert torch.equal(reused, blind) and not torch.equal(reused, requantized)
    exact = slow_experts(experts, x_nd, weight_nk, expert_nk)
    error, worse = ((y - exact).norm() / exact.norm() for y in (reused, requantized))
    assert 0 < error < worse


def test_fp8_values_change_nothing_outside_fp8():
    experts, x_nd = filled(GroupedExperts(3, 256, 128)), torch.randn(20, 256)
    weight_nk, expert_nk = torch.rand(20, 2), torch.randint(-1, 3, (20, 2))
    plain = apply_local_experts(experts, x_nd, weight_nk, expert_nk)
    assert torch.equal(
        plain, apply_local_experts(experts, x_nd, weight_nk, expert_nk, act_quant(x_nd))
    )


# ── All ranks, as a list ──


def one_hop(shares, x, weight, expert, per: int):
    """Send every rank's rows to every other rank and back, in a loop over pairs of ranks."""
    out = [torch.zeros_like(x_nd) for x_nd in x]
    for a, (x_nd, weight_nk, expert_nk) in enumerate(zip(x, weight, expert)):
        token_m, dest_m, _ = dispatch_layout(expert_nk, per, len(shares))
        for b, experts in enumerate(shares):
            m = token_m[dest_m == b]
            local_mk = to_local_expert_ids(expert_nk[m], dest_m[dest_m == b], per)
            y_md = apply_local_experts(
                experts, x_nd[m], mask_remote_weights(weight_nk[m], local_mk), local_mk
            )
            out[a] = out[a].index_add(0, m, y_md)
    return out


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_are_the_layer(exact, micro, ranks):
    moe = filled(MoE(micro).double())
    whole, per = moe.experts, micro.n_routed_experts // ranks
    shares = []
    for i in range(ranks):
        shares.append(GroupedExperts(per, micro.dim, micro.moe_inter_dim))
        for p, w in zip(shares[-1].parameters(), whole.parameters()):
            p.data = w.detach()[i * per : (i + 1) * per].clone()
    sizes = [7, 0, 12, 1, 5, 3, 2, 4][:ranks]  # rank 1 has no tokens
    x_nd = torch.randn(sum(sizes), micro.dim, dtype=torch.float64, requires_grad=True)
    r = moe.gate(x_nd.detach()[None])
    w_nk, e_nk = r.topk_weights_bsk[0].detach().requires_grad_(), r.topk_ids_bsk[0]
    g_nd = torch.randn_like(x_nd)
    alone = moe.forward_routed(x_nd, w_nk, e_nk)
    spread = torch.cat(one_hop(shares, *(t.split(sizes) for t in (x_nd, w_nk, e_nk)), per))
    want = torch.autograd.grad(alone, (x_nd, w_nk, *whole.parameters()), g_nd)
    parameters = list(chain.from_iterable(zip(*(s.parameters() for s in shares))))
    dx, dw, *rest = torch.autograd.grad(spread, (x_nd, w_nk, *parameters), g_nd)
    got = dx, dw, *(torch.cat(rest[i : i + ranks]) for i in range(0, len(rest), ranks))
    for a, b in zip((spread, *got), (alone, *want)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
