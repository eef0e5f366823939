"""Top-k, permutation and its inverse in Triton; copies and selections must be exact."""

from itertools import chain

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.kernels import moe
from dsv3_ref.moe import MoE, sort_by_expert

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rms(got − want) / rms(want), where `want` is computed in fp64 and rounded once. The bound for
# fp32 allows a few roundings of sums, that for bf16 a different rounding of a few numbers.
BOUND = {torch.float32: 8 * 2**-24, torch.bfloat16: 2**-8 / 8}
by_dtype = pytest.mark.parametrize("dtype", BOUND, ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


# ── Top-k ──

V3_ROUTER = 256, (8, 8, 4, 2)  # experts; topk, n_groups, topk_groups, group_topk
ROUTERS = [V3_ROUTER, (160, (6, 8, 3, 1)), (64, (6, 1, 1, 1)), (15, (4, 3, 2, 2))]
ROUTERS += [(35, (3, 5, 5, 2)), (1, (1, 1, 1, 1)), (12, (4, 3, 1, 2)), (21, (7, 7, 7, 3))]
by_router = pytest.mark.parametrize("e, settings", ROUTERS, ids=str)


def reference(score, settings):
    return ops.IMPLS["group_limited_topk"]["torch"](score, *settings)


def topk_by_sorting(
    score: list[float], topk: int, n_groups: int, topk_groups: int, group_topk: int
) -> list[int]:
    """Return the experts of one token; of equal scores the lower index comes first."""
    size = len(score) // n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]

    def group_score(group: list[int]) -> float:
        return sum(sorted((score[e] for e in group), reverse=True)[:group_topk])

    best_groups = sorted(groups, key=group_score, reverse=True)[:topk_groups]
    candidates = sorted(chain.from_iterable(best_groups))
    return sorted(candidates, key=lambda e: score[e], reverse=True)[:topk]


@by_router
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_topk_equals_the_reference(e, settings, shift):
    """At −5 all scores are negative, so masked entries must not count as 0."""
    score = torch.rand(3, 7, e, device=DEVICE) + shift
    expert = moe.group_limited_topk(score, *settings)
    assert expert.dtype == torch.int64 and expert.shape == (3, 7, settings[0])
    assert torch.equal(expert, reference(score, settings))


@given(data=st.data())
def test_topk_of_any_sizes_with_ties(data):
    """Scores are a few whole numbers, so groups and experts often tie."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, each = draw(1, 8), draw(1, 9)
    limited = draw(1, groups)
    settings = draw(1, min(8, limited * each)), groups, limited, draw(1, each)
    score = torch.randint(-3, 4, (draw(1, 4), groups * each), device=DEVICE).float()
    want = [topk_by_sorting(s, *settings) for s in score.tolist()]
    assert moe.group_limited_topk(score, *settings).tolist() == want


@by_router
def test_topk_of_neighboring_floats(e, settings):
    """Scores are one unit in the last place apart, across zero."""
    k, groups, limited, _ = settings
    step = torch.stack([torch.randperm(e) for _ in range(5)]).int() - e // 2
    score = torch.where(step < 0, (-step).view(torch.float32).neg(), step.view(torch.float32))
    settings = k, groups, limited, 1
    near_one = (torch.ones(()).view(torch.int32) + step).view(torch.float32)
    for x in (score.to(DEVICE), -near_one.to(DEVICE)):
        assert torch.equal(moe.group_limited_topk(x, *settings), reference(x, settings))


@pytest.mark.filterwarnings("ignore:overflow")  # 3e38 + 3e38 is ∞ on purpose
def test_topk_of_equal_scores_selects_the_first():
    e, settings = V3_ROUTER
    for value in (0.0, -1.0, -torch.inf, torch.inf, 3e38):
        expert = moe.group_limited_topk(torch.full((2, e), value, device=DEVICE), *settings)
        assert expert.tolist() == [list(range(8))] * 2


def test_topk_never_selects_from_a_masked_group():
    """With −∞ for all but two experts per group, the rest come from the selected groups."""
    score = torch.full((1, 4, 8), -torch.inf, device=DEVICE)
    score[0, :, :2] = torch.tensor([[1.0, 1.0], [4.0, 5.0], [0.5, 0.5], [2.0, 7.0]])
    (expert,) = moe.group_limited_topk(score.flatten(1), 8, 4, 2, 2).tolist()
    assert expert[:4] == [25, 9, 8, 24]
    assert sorted(expert[4:]) == [10, 11, 12, 13]  # −∞ in groups 1 and 3, lower first


def test_topk_of_nan_stays_in_range_and_selects_no_expert_twice():
    e, settings = V3_ROUTER
    score = torch.rand(4, e, device=DEVICE)
    for index in (0, (1, 17), (2, slice(None, None, 3))):
        score[index] = torch.nan
    score[3, :250] = torch.full((250,), -1, dtype=torch.int32).view(torch.float32)  # −NaN
    for expert in moe.group_limited_topk(score, *settings).tolist():
        assert len(set(expert)) == 8 and set(expert) <= set(range(e))
    assert moe.group_limited_topk(score, *settings)[1, 0] == 17  # NaN is the highest, as in torch


def test_the_score_of_a_group():
    """Group 0 has the best expert, group 1 the best pair, group 2 the best sum of all."""
    score = torch.tensor([9.0, 0, 0, 6, 6, 0, 5, 5, 5], device=DEVICE)
    for group, group_topk in enumerate((1, 2, 3)):
        assert moe.group_limited_topk(score, 1, 3, 1, group_topk).item() // 3 == group


def test_topk_of_no_token():
    score = torch.rand(2, 0, 16, device=DEVICE)
    assert moe.group_limited_topk(score, 3, 4, 2, 2).shape == (2, 0, 3)


# ── Permutation and its inverse ──


def random_permutation(n: int, k: int, experts: int = 6, used: int = 4):
    """Return the permutation of n tokens to the first `used` of the experts, k rows each."""
    topk_ids_nk = torch.empty(n, k, dtype=torch.int64)
    for token in topk_ids_nk:
        token[:] = torch.randperm(experts + k)[:k] % used
    return [x.to(DEVICE) for x in sort_by_expert(topk_ids_nk)]


def results(fn, inputs, g, indices):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, *indices)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def error(got, want) -> float:
    """Return rms(got − want) / rms(want); an rms(want) below 1/2 is due to cancellation."""
    want = want.to(got.dtype).double()
    return (rms(got.double() - want) / rms(want).clamp(min=0.5)).item()


def rms(x) -> torch.Tensor:
    return x.square().mean().sqrt()


def check(name, inputs, indices, g):
    """Compare values and gradients with the reference in fp64."""
    got = results(ops.IMPLS[name]["triton"], inputs, g, indices)
    wide = [x.double() for x in inputs]
    want = results(ops.IMPLS[name]["torch"], wide, g.double(), indices)
    for a, b, x in zip(got, want, [inputs[0], *inputs]):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert error(a, b) < BOUND[x.dtype]
    return got


SIZES = [(1, 1, 1), (1, 8, 33), (9, 3, 1030), (13, 6, 7), (5, 8, 64), (40, 2, 130)]
sizes = pytest.mark.parametrize("n, k, d", SIZES)


@by_dtype
@sizes
def test_permute(n, k, d, dtype):
    x, (sorted_ids_m, row_ids_nk) = randn(n, d, dtype=dtype), random_permutation(n, k)
    y, _ = check("permute", [x], (sorted_ids_m, row_ids_nk), randn(n * k, d, dtype=dtype))
    assert torch.equal(y, x[sorted_ids_m // k])  # copied, not computed


@by_dtype
@sizes
def test_unpermute(n, k, d, dtype):
    y, weight = randn(n * k, d, dtype=dtype), randn(n, k, dtype=dtype)
    check("unpermute", [y, weight], random_permutation(n, k), randn(n, d, dtype=dtype))


@pytest.mark.parametrize("dtypes", [BOUND, [*BOUND][::-1]], ids=["rows fp32", "rows bf16"])
def test_unpermute_with_weights_of_another_dtype(dtypes):
    rows, weights = dtypes
    y, weight = randn(27, 40, dtype=rows), randn(9, 3, dtype=weights)
    check("unpermute", [y, weight], random_permutation(9, 3), randn(9, 40, dtype=rows))


@by_dtype
def test_rows_within_wider_rows(dtype):
    x, wide_x = (randn(n, 96, dtype=dtype)[:, 16:80] for n in (9, 27))
    assert not x.is_contiguous()
    indices = random_permutation(9, 3)
    check("permute", [x], indices, wide_x)
    check("unpermute", [randn(27, 64, dtype=dtype), randn(9, 3, dtype=dtype)], indices, x)


def test_expanded_scalar_gradients():
    """`.sum()` has a gradient whose strides are 0."""
    one, indices = torch.ones((), device=DEVICE), random_permutation(9, 3)
    check("permute", [randn(9, 40)], indices, one.expand(27, 40))
    check("unpermute", [randn(27, 40), randn(9, 3)], indices, one.expand(9, 40))


def test_unpermute_inverts_permute():
    """Eighths of eight equal rows of whole numbers add up without rounding."""
    x, indices = randn(11, 40).round(), random_permutation(11, 8)
    weight = torch.full((11, 8), 1 / 8, device=DEVICE)
    assert torch.equal(moe.unpermute(moe.permute(x, *indices), weight, *indices), x)


def test_every_row_to_one_expert_and_no_rows_at_all():
    check("permute", [randn(5, 12)], random_permutation(5, 1, used=1), randn(5, 12))
    indices = random_permutation(0, 4)
    y, dx = results(moe.permute, [randn(0, 12)], randn(0, 12), indices)
    assert y.shape == dx.shape == (0, 12)
    o, dy, dw = results(moe.unpermute, [y, randn(0, 4)], randn(0, 12), indices)
    assert o.shape == dy.shape == (0, 12) and dw.shape == (0, 4)


# ── The layer ──


def test_a_layer_of_the_model_learns_the_same(micro):
    torch.manual_seed(0)
    layer = MoE(micro)
    for w in layer.parameters():
        torch.nn.init.normal_(w, std=0.3)
    layer, x = layer.to(DEVICE), randn(2, 9, micro.dim).requires_grad_()
    topk_ids, grads = [], []
    for backends in (("triton", "torch"), ("torch",)):
        with ops.use(*backends):
            y, route = layer(x)
        topk_ids.append(route.topk_ids_bsk)
        grads.append(torch.autograd.grad(y.square().sum(), (x, *layer.parameters())))
    assert torch.equal(*topk_ids)
    for got, want in zip(*grads):
        assert error(got, want) < 1e-5


# ── Errors ──


def check_error(message: str, fn, *args):
    with pytest.raises(ValueError, match=message):
        fn(*args)


def test_invalid_arguments_of_topk():
    score, topk = torch.rand(2, 12, device=DEVICE), moe.group_limited_topk
    by_column = score.T.contiguous().T
    check_error("^scores_bse must be float32, not bfloat16", topk, score.bfloat16(), 3, 3, 2, 2)
    check_error("^scores_bse must be contiguous", topk, by_column, 3, 3, 2, 2)
    check_error("^scores_bse must have a multiple of 5 experts, not 12", topk, score, 3, 5, 2, 2)
    check_error("^topk_groups must be from 1 to 3, not 4", topk, score, 3, 3, 4, 2)
    check_error("^group_topk must be from 1 to 4, not 5", topk, score, 3, 3, 2, 5)
    check_error("^topk must be from 1 to 8, not 9", topk, score, 9, 3, 2, 2)


def test_invalid_arguments_of_permute():
    x, (ids, rows) = randn(5, 8), random_permutation(5, 3)
    permute, by_column = moe.permute, rows.T.contiguous().T
    check_error("^x_nd must be float32 or bfloat16", permute, x.double(), ids, rows)
    check_error("^x_nd must have a last stride of 1", permute, randn(8, 5).T, ids, rows)
    check_error("^x_nd must have shape", permute, x[None], ids, rows)
    check_error("^row_ids_nk must be int64, not int32", permute, x, ids, rows.int())
    check_error(r"^row_ids_nk must have shape \(4, any\)", permute, x[:4], ids, rows)
    check_error("^row_ids_nk must be contiguous", permute, x, ids, by_column)
    check_error(r"^sorted_ids_m must have shape \(15\), not \(14,\)", permute, x, ids[1:], rows)


def test_invalid_arguments_of_unpermute():
    y, weight = randn(15, 8), randn(5, 3)
    ids, rows = random_permutation(5, 3)
    unpermute, slices = moe.unpermute, randn(15, 16)[:, :8]
    narrow = weight[:, :2].clone()
    check_error("^y_md must be float32 or bfloat16", unpermute, y.half(), weight, ids, rows)
    check_error(r"^y_md must have shape \(15, any\)", unpermute, y[1:], weight, ids, rows)
    check_error("^y_md must be contiguous", unpermute, slices, weight, ids, rows)
    check_error("^weight_nk must be float32 or bfloat16", unpermute, y, weight.double(), ids, rows)
    check_error(r"^row_ids_nk must have shape \(5, 2\)", unpermute, y, narrow, ids, rows)
    check_error("^sorted_ids_m must be int64", unpermute, y, weight, ids.int(), rows)
