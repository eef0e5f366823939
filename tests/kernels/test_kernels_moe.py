"""Choice of experts, and rows to them and back, in Triton: exact where copied or chosen."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.kernels import moe
from dsv3_ref.moe import MoE, sort_by_expert

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rms(got − want) / rms(want), `want` in fp64 and then rounded once: another rounding on the way
# would show. In fp32 a few roundings of sums; in bf16 it may be cut the other way here and there.
BOUND = {torch.float32: 8 * 2**-24, torch.bfloat16: 2**-8 / 8}
both = pytest.mark.parametrize("dtype", BOUND, ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


# ── The gate ──

V3_GATE = 256, (8, 8, 4, 2)  # experts; k, groups, open groups, experts that a group counts by
GATES = [V3_GATE, (160, (6, 8, 3, 1)), (64, (6, 1, 1, 1)), (15, (4, 3, 2, 2)), (35, (3, 5, 5, 2))]
GATES += [(1, (1, 1, 1, 1)), (12, (4, 3, 1, 2)), (21, (7, 7, 7, 3))]
gates = pytest.mark.parametrize("e, how", GATES, ids=str)


def reference(score, how):
    return ops.IMPLS["group_limited_topk"]["torch"](score, *how)


def slow(score: list[float], k: int, n_groups: int, n_limited: int, best: int) -> list[int]:
    """One token's experts; of equals the lower index."""
    size = len(score) // n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
    worth = lambda group: sum(sorted((score[e] for e in group), reverse=True)[:best])
    allowed = [e for g in sorted(groups, key=lambda g: -worth(g))[:n_limited] for e in g]
    return sorted(sorted(allowed), key=lambda e: -score[e])[:k]


@gates
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_choose_equals_the_reference(e, how, shift):
    """At −5 all scores are negative: a mask of 0 would beat them."""
    score = torch.rand(3, 7, e, device=DEVICE) + shift
    expert = moe.group_limited_topk(score, *how)
    assert expert.dtype == torch.int64 and expert.shape == (3, 7, how[0])
    assert torch.equal(expert, reference(score, how))


@given(data=st.data())
def test_choose_of_any_sizes_with_ties(data):
    """Scores from a few whole numbers: groups and experts tie all the time."""
    size = lambda low, high: data.draw(st.integers(low, high))
    groups, each = size(1, 8), size(1, 9)
    limited = size(1, groups)
    how = size(1, min(8, limited * each)), groups, limited, size(1, each)
    score = torch.randint(-3, 4, (size(1, 4), groups * each), device=DEVICE).float()
    assert moe.group_limited_topk(score, *how).tolist() == [slow(s, *how) for s in score.tolist()]


@gates
def test_choose_of_neighboring_floats(e, how):
    """Scores one unit in the last place apart, across zero: subnormal and negative ones too."""
    k, groups, limited, _ = how
    step = torch.stack([torch.randperm(e) for _ in range(5)]).int() - e // 2
    score = torch.where(step < 0, (-step).view(torch.float32).neg(), step.view(torch.float32))
    how = k, groups, limited, 1
    score = score.to(DEVICE)
    assert torch.equal(moe.group_limited_topk(score, *how), reference(score, how))
    near_one = (torch.ones(()).view(torch.int32) + step).view(torch.float32).to(DEVICE)
    assert torch.equal(moe.group_limited_topk(-near_one, *how), reference(-near_one, how))


@pytest.mark.filterwarnings("ignore:overflow")  # two of 3e38 are meant to be ∞
def test_choose_of_equal_scores_takes_the_first():
    e, how = V3_GATE
    for value in (0.0, -1.0, -torch.inf, torch.inf, 3e38):
        expert = moe.group_limited_topk(torch.full((2, e), value, device=DEVICE), *how)
        assert expert.tolist() == [list(range(8))] * 2


def test_choose_never_leaves_an_open_group_for_a_shut_one():
    """A bias of −∞ on all but two experts a group: the rest are filled from open groups."""
    score = torch.full((1, 4, 8), -torch.inf, device=DEVICE)
    score[0, :, :2] = torch.tensor([[1.0, 1.0], [4.0, 5.0], [0.5, 0.5], [2.0, 7.0]])
    (expert,) = moe.group_limited_topk(score.flatten(1), 8, 4, 2, 2).tolist()
    assert expert[:4] == [25, 9, 8, 24]
    assert sorted(expert[4:]) == [10, 11, 12, 13]  # −∞ in the open groups 1 and 3, lower first


def test_choose_of_nan_stays_in_range_and_names_no_expert_twice():
    e, how = V3_GATE
    score = torch.rand(4, e, device=DEVICE)
    score[0], score[1, 17], score[2, ::3] = torch.nan, torch.nan, torch.nan
    score[3, :250] = torch.full((250,), -1, dtype=torch.int32).view(torch.float32)  # −NaN
    for expert in moe.group_limited_topk(score, *how).tolist():
        assert len(set(expert)) == 8 and set(expert) <= set(range(e))
    assert moe.group_limited_topk(score, *how)[1, 0] == 17  # as in torch, NaN is the highest


def test_choose_by_the_two_best_of_a_group():
    """Group 0 has the best expert, group 1 the best pair, group 2 the best sum of all."""
    score = torch.tensor([9.0, 0, 0, 6, 6, 0, 5, 5, 5], device=DEVICE)
    pick = lambda best: moe.group_limited_topk(score, 1, 3, 1, best).item() // 3
    assert [pick(best) for best in (1, 2, 3)] == [0, 1, 2]


def test_choose_for_no_token():
    assert moe.group_limited_topk(torch.rand(2, 0, 16, device=DEVICE), 3, 4, 2, 2).shape == (
        2,
        0,
        3,
    )


# ── Rows out and back ──


def order(n: int, k: int, experts: int = 6, used: int = 4):
    """Rows of n tokens sorted by expert; experts from `used` on get none."""
    chosen = torch.stack([torch.randperm(experts + k)[:k] % used for _ in range(n)]) if n else None
    chosen = torch.empty(0, k, dtype=torch.int64) if chosen is None else chosen
    return [x.to(DEVICE) for x in sort_by_expert(chosen)]


def results(fn, inputs, g, indices):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, *indices)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def error(got, want) -> float:
    want, rms = want.to(got.dtype).double(), lambda x: x.square().mean().sqrt()
    return (rms(got.double() - want) / rms(want).clamp(min=0.5)).item()  # smaller is cancellation


def check(name, inputs, indices, g):
    """Values and gradients against the reference in fp64, from the same numbers."""
    got = results(ops.IMPLS[name]["triton"], inputs, g, indices)
    wide = [x.double() for x in inputs]
    want = results(ops.IMPLS[name]["torch"], wide, g.double(), indices)
    for a, b, x in zip(got, want, [inputs[0], *inputs]):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert error(a, b) < BOUND[x.dtype]
    return got


SIZES = [(1, 1, 1), (1, 8, 33), (9, 3, 1030), (13, 6, 7), (5, 8, 64), (40, 2, 130)]
sizes = pytest.mark.parametrize("n, k, d", SIZES)


@both
@sizes
def test_permute(n, k, d, dtype):
    x, (sorted_ids_m, row_ids_nk) = randn(n, d, dtype=dtype), order(n, k)
    y, _ = check("permute", [x], (sorted_ids_m, row_ids_nk), randn(n * k, d, dtype=dtype))
    assert torch.equal(y, x[sorted_ids_m // k])  # copied, not computed


@both
@sizes
def test_combine(n, k, d, dtype):
    y, weight = randn(n * k, d, dtype=dtype), randn(n, k, dtype=dtype)
    check("unpermute", [y, weight], order(n, k), randn(n, d, dtype=dtype))


@pytest.mark.parametrize("dtypes", [BOUND, [*BOUND][::-1]], ids=["rows fp32", "rows bf16"])
def test_combine_with_weights_of_another_dtype(dtypes):
    rows, weights = dtypes
    y, weight = randn(27, 40, dtype=rows), randn(9, 3, dtype=weights)
    check("unpermute", [y, weight], order(9, 3), randn(9, 40, dtype=rows))


@both
def test_rows_inside_wider_ones(dtype):
    wide = lambda n: randn(n, 96, dtype=dtype)[:, 16:80]
    assert not wide(9).is_contiguous()
    indices = order(9, 3)
    check("permute", [wide(9)], indices, wide(27))
    check("unpermute", [randn(27, 64, dtype=dtype), randn(9, 3, dtype=dtype)], indices, wide(9))


def test_gradients_of_one_number_for_all():
    """`.sum()` gives a gradient without strides of its own."""
    one, indices = torch.ones((), device=DEVICE), order(9, 3)
    check("permute", [randn(9, 40)], indices, one.expand(27, 40))
    check("unpermute", [randn(27, 40), randn(9, 3)], indices, one.expand(9, 40))


def test_out_and_back_is_the_same():
    """Eighths of eight equal rows of whole numbers add up without rounding."""
    x, indices = randn(11, 40).round(), order(11, 8)
    weight = torch.full((11, 8), 1 / 8, device=DEVICE)
    assert torch.equal(moe.unpermute(moe.permute(x, *indices), weight, *indices), x)


def test_every_row_to_one_expert_and_no_rows_at_all():
    check("permute", [randn(5, 12)], order(5, 1, used=1), randn(5, 12))
    indices = order(0, 4)
    y, dx = results(moe.permute, [randn(0, 12)], randn(0, 12), indices)
    assert y.shape == dx.shape == (0, 12)
    o, dy, dw = results(moe.unpermute, [y, randn(0, 4)], randn(0, 12), indices)
    assert o.shape == dy.shape == (0, 12) and dw.shape == (0, 4)


# ── The layer, and refusals ──


def test_a_layer_of_the_model_learns_the_same(micro):
    torch.manual_seed(0)
    layer = MoE(micro)
    for w in layer.parameters():
        torch.nn.init.normal_(w, std=0.3)
    layer, x = layer.to(DEVICE), randn(2, 9, micro.dim).requires_grad_()
    loads, grads = [], []
    for backends in (("triton", "torch"), ("torch",)):
        with ops.use(*backends):
            y, r = layer(x)
        loads.append(r.topk_ids_bsk)
        grads.append(torch.autograd.grad(y.square().sum(), (x, *layer.parameters())))
    assert torch.equal(*loads)
    for got, want in zip(*grads):
        assert error(got, want) < 1e-5


def refused(words: str, fn, *args):
    with pytest.raises(ValueError, match=words):
        fn(*args)


def test_choose_refuses():
    score = torch.rand(2, 12, device=DEVICE)
    refused(
        "^scores_bse must be float32, not bfloat16",
        moe.group_limited_topk,
        score.bfloat16(),
        3,
        3,
        2,
        2,
    )
    refused(
        "^scores_bse must be contiguous", moe.group_limited_topk, score.T.contiguous().T, 3, 3, 2, 2
    )
    refused(
        "^scores_bse must have a multiple of 5 experts, not 12",
        moe.group_limited_topk,
        score,
        3,
        5,
        2,
        2,
    )
    refused("^topk_groups must be from 1 to 3, not 4", moe.group_limited_topk, score, 3, 3, 4, 2)
    refused("^group_topk must be from 1 to 4, not 5", moe.group_limited_topk, score, 3, 3, 2, 5)
    refused("^topk must be from 1 to 8, not 9", moe.group_limited_topk, score, 9, 3, 2, 2)


def test_permute_refuses():
    x, (sorted_ids_m, row_ids_nk) = randn(5, 8), order(5, 3)
    refused("^x_nd must be float32 or bfloat16", moe.permute, x.double(), sorted_ids_m, row_ids_nk)
    refused(
        "^x_nd must have a last stride of 1", moe.permute, randn(8, 5).T, sorted_ids_m, row_ids_nk
    )
    refused("^x_nd must have shape", moe.permute, x[None], sorted_ids_m, row_ids_nk)
    refused("^row_ids_nk must be int64, not int32", moe.permute, x, sorted_ids_m, row_ids_nk.int())
    refused(r"^row_ids_nk must have shape \(4, any\)", moe.permute, x[:4], sorted_ids_m, row_ids_nk)
    refused(
        "^row_ids_nk must be contiguous", moe.permute, x, sorted_ids_m, row_ids_nk.T.contiguous().T
    )
    refused(
        r"^sorted_ids_m must have shape \(15\), not \(14,\)",
        moe.permute,
        x,
        sorted_ids_m[1:],
        row_ids_nk,
    )


def test_combine_refuses():
    y, weight, indices = randn(15, 8), randn(5, 3), order(5, 3)
    refused("^y_md must be float32 or bfloat16", moe.unpermute, y.half(), weight, *indices)
    refused(r"^y_md must have shape \(15, any\)", moe.unpermute, y[1:], weight, *indices)
    refused("^y_md must be contiguous", moe.unpermute, randn(15, 16)[:, :8], weight, *indices)
    refused("^weight_nk must be float32 or bfloat16", moe.unpermute, y, weight.double(), *indices)
    refused(
        r"^row_ids_nk must have shape \(5, 2\)", moe.unpermute, y, weight[:, :2].clone(), *indices
    )
    refused("^sorted_ids_m must be int64", moe.unpermute, y, weight, indices[0].int(), indices[1])
