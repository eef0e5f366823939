"""MLA's attention in Triton equals the reference in fp64, forward and backward, packed or not."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch

from dsv3_ref import ops
from dsv3_ref.kernels import attention as kernels
from dsv3_ref.rope import to_cu_seqlens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ‖got − want‖ / ‖want‖: a few roundings in fp32; in bf16 those of the result, of p and of ds
BOUND = {torch.float32: 16 * 2**-24, torch.bfloat16: 2 * 2**-8}
both = pytest.mark.parametrize("dtype", BOUND, ids=str)
KERNELS = [
    kernels._attention_kernel, kernels._attention_dq_kernel, kernels._attention_dkdv_kernel,
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN: what a kernel does not write, or reads and should not, shows."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(empty(*a, **k)))


def fill(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def case(b, s, t, h, x, v, dtype=torch.float32):
    """q, k, v and a gradient of the output."""
    shapes = (b, s, h, x), (b, t, h, x), (b, t, h, v), (b, s, h, v)
    return [randn(*shape, dtype=dtype) for shape in shapes]


def pack(lengths, h, x, v, dtype=torch.float32):
    """The same, laid end to end, and the bounds."""
    *tensors, g = (y[0] for y in case(1, sum(lengths), sum(lengths), h, x, v, dtype))
    return tensors, g, to_cu_seqlens(lengths, DEVICE).long()


def results(fn, inputs, g, *more):
    """fn(*inputs, *more) and its gradients along g; strides of the inputs are kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, *more)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def triton(name, inputs, g, *more):
    return results(ops.IMPLS[name]["triton"], inputs, g, *more)


def error(got, want) -> float:
    """In units of the larger of ‖want‖ and 1/2 a number: what is far smaller is cancellation."""
    rms = lambda x: x.double().square().mean().sqrt()
    return (rms(got - want) / rms(want).clamp(min=0.5)).item()


def check(name, inputs, g, *more):
    """Values and gradients against the reference in fp64, from the same numbers."""
    got = triton(name, inputs, g, *more)
    want = results(ops.IMPLS[name]["torch"], [x.double() for x in inputs], g.double(), *more)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == g.dtype
        assert error(a, b) < BOUND[g.dtype]


# ── Sequences of equal lengths ──

SIZES = [  # b, s, t, h, x, v
    (1, 1, 1, 1, 1, 1),
    (2, 5, 5, 2, 16, 16),
    (1, 70, 70, 1, 20, 12),
    (2, 33, 47, 2, 24, 8),
    (2, 47, 64, 1, 12, 8),  # a block's newest key is another's first; one query short of a block
    (2, 1, 19, 3, 6, 4),
    (3, 3, 66, 1, 17, 33),
    (1, 40, 72, 1, 192, 128),
]


@both
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(size, dtype):
    check("attention", *triple(case(*size, dtype)), size[-2] ** -0.5)


def triple(tensors):
    *inputs, g = tensors
    return inputs, g


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("s, t", [(150, 150), (131, 203)])
def test_blocks_of_every_config(number, s, t, monkeypatch):
    """As fp32 where no GPU sets limits, else as what they are for."""
    dtype, x, v, arch = torch.float32, 24, 16, None
    if DEVICE == "cuda":
        dtype, x, v, arch = torch.bfloat16, 192, 128, torch.cuda.get_device_capability()[0]
    for kernel in KERNELS:
        able = [c for c in kernel.configs if arch is None or arch in c.archs]
        one = [able[number % len(able)]]
        monkeypatch.setattr(kernel, "early_config_prune", lambda *a, one=one, **k: one)
        monkeypatch.setattr(kernel, "cache", {})
    check("attention", *triple(case(1, s, t, 1, x, v, dtype)), x**-0.5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on NaN
def test_blocks_in_the_future_are_not_read():
    """Else weights of 0 would meet NaN there."""
    (q, k, v), g = triple(case(1, 100, 100, 1, 16, 16))
    k[:, 64:], v[:, 64:] = torch.nan, torch.nan
    o, dq, *_ = triton("attention", (q, k, v), g, 0.25)
    assert o[:, :32].isfinite().all() and dq[:, :32].isfinite().all()
    (q, k, v), g = triple(case(1, 100, 100, 1, 16, 16))
    q[:, :32], g[:, :32] = torch.nan, torch.nan
    *_, dk, dv = triton("attention", (q, k, v), g, 0.25)
    assert dk[:, 64:].isfinite().all() and dv[:, 64:].isfinite().all()


def test_large_scores_neither_overflow_nor_vanish():
    (q, k, v), g = triple(case(1, 40, 40, 2, 16, 16))
    got = triton("attention", (100 * q, 100 * k, v), g, 1.0)
    want = results(ops.IMPLS["attention"]["torch"], (100 * q, 100 * k, v), g, 1.0)
    assert error(got[0], want[0]) < 1e-3  # scores of 10⁴ are known to 10⁻³
    assert all(x.isfinite().all() for x in got)


@both
def test_values_may_be_a_slice_of_what_was_projected_up(dtype):
    """Keys and values as MLA makes them: v beside k in memory, k's rotary part appended."""
    q, kv, g = (randn(2, 20, 2, width, dtype=dtype) for width in (24, 32, 16))
    k, v = torch.cat((kv[..., :16], q[..., 16:]), -1), kv[..., 16:]
    assert not v.is_contiguous() and kernels.tma_aligned(v) is v
    strided = triton("attention", (q, k, v), g, 0.2)
    whole = triton("attention", (q, k, v.contiguous()), g, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(strided, whole))
    check("attention", (q, k, v), g, 0.2)


def test_any_strides_under_the_last_axis():
    """Heads before positions in memory, a gradient that is one number, rows at odd addresses."""
    q, k, v, _ = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in case(2, 9, 9, 3, 8, 8))
    check("attention", (q, k, v), torch.ones(1, device=DEVICE).expand(2, 9, 3, 8), 0.3)
    q, k, v, g = (y[..., 1:] for y in case(1, 9, 9, 2, 9, 9))
    check("attention", (q, k, v), g, 0.3)


def test_the_future_changes_nothing():
    """Other keys and values from position 37 on: earlier outputs and gradients keep every bit."""
    (q, k, v), g = triple(case(1, 60, 70, 2, 16, 16))
    late = 37
    g[:, late - 10 :] = 0  # the loss is of the outputs before: query s stands at position s + 10
    before = triton("attention", (q, k, v), g, 0.25)
    k[:, late:], v[:, late:], q[:, late - 10 :] = 7.0, -3.0, 2.0
    after = triton("attention", (q, k, v), g, 0.25)
    assert torch.equal(before[0][:, : late - 10], after[0][:, : late - 10])
    assert not torch.equal(before[0][:, late - 10 :], after[0][:, late - 10 :])
    for x, y, first in zip(before[1:], after[1:], (late - 10, late, late)):
        assert torch.equal(x[:, :first], y[:, :first]) and x[:, :first].any()
        assert not x[:, first:].any() and not y[:, first:].any()


# ── Packed ──

PACKS = [[5], [1], [1, 1, 1], [0, 7, 0, 0, 33, 0], [33, 33, 1], [18, 1, 0, 70, 2]]


@both
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_varlen_attention(lengths, dtype):
    inputs, g, cu_seqlens = pack(lengths, 2, 24, 12, dtype)
    check("varlen_attention", inputs, g, cu_seqlens, 0.2)


def test_varlen_attention_of_v3():
    inputs, g, cu_seqlens = pack([20, 45], 1, 192, 128, torch.bfloat16)
    check("varlen_attention", inputs, g, cu_seqlens.int(), 192**-0.5)


def test_a_pack_is_its_samples():
    """Bit for bit, so that no sample sees another."""
    lengths = [21, 0, 40, 1, 18]
    inputs, g, cu_seqlens = pack(lengths, 2, 20, 12)
    got = triton("varlen_attention", inputs, g, cu_seqlens, 0.2)
    parts = [[y[None] for y in x.split(lengths)] for x in (*inputs, g)]
    alone = [triton("attention", one[:3], one[3], 0.2) for one in zip(*parts) if one[3].numel()]
    for x, ys in zip(got, zip(*alone)):
        assert torch.equal(x, torch.cat(ys, 1)[0])


def test_nothing_packed():
    inputs, g, cu_seqlens = pack([0, 0], 2, 16, 8)
    got = triton("varlen_attention", inputs, g, cu_seqlens, 0.2)
    assert [x.shape for x in got] == [g.shape, *(x.shape for x in inputs)]


def test_the_ends_are_not_read_by_the_host(monkeypatch):
    inputs, g, cu_seqlens = pack([5, 12], 1, 16, 8)
    want = triton("varlen_attention", inputs, g, cu_seqlens, 0.2)  # autotuned here

    def refuse(*_):
        raise AssertionError("the host waits for the GPU")

    with monkeypatch.context() as patch:
        own = ("cpu", "numpy") if DEVICE == "cpu" else ()  # the interpreter needs them
        for name in {"item", "tolist", "__int__", "__index__", "__bool__", "cpu", "numpy"} - {*own}:
            patch.setattr(torch.Tensor, name, refuse)
        got = triton("varlen_attention", inputs, g, cu_seqlens, 0.2)
    assert all(map(torch.equal, got, want))


# ── Refusals ──


def bad(name, value):
    """Arguments of `attention` with one replaced."""
    q, k, v, _ = case(2, 3, 4, 2, 8, 4)
    return list(({"q": q, "k": k, "v": v, "scale": 0.3} | {name: value}).values())


REFUSED = [
    ("q", randn(2, 3, 2, 8).half(), "q_bshx must be float32 or bfloat16, not float16"),
    ("q", randn(2, 3, 8), r"q_bshx must have shape \(any, any, any, any\), not \(2, 3, 8\)"),
    ("q", randn(2, 5, 2, 8), "q_bshx must have from 1 to 4 positions, as many as k_bthx, not 5"),
    ("q", randn(2, 0, 2, 8), "q_bshx must have from 1 to 4 positions, as many as k_bthx, not 0"),
    ("q", randn(2, 3, 2, 16)[..., ::2], "q_bshx must have a last stride of 1, not 2"),
    ("k", randn(2, 4, 2, 8).bfloat16(), "k_bthx must be float32, not bfloat16"),
    ("k", randn(2, 4, 3, 8), r"k_bthx must have shape \(2, 4, 2, 8\), not \(2, 4, 3, 8\)"),
    ("v", randn(2, 3, 2, 4), r"v_bthv must have shape \(2, 4, 2, any\), not \(2, 3, 2, 4\)"),
    ("v", randn(2, 4, 2, 257), "v_bthv must have at most 256 dims a head, not 257"),
    ("scale", 0.0, "scale must be positive, not 0.0"),
]


@pytest.mark.parametrize("name, value, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_attention_refuses(name, value, words):
    with pytest.raises(ValueError, match=words):
        ops.IMPLS["attention"]["triton"](*bad(name, value))


def test_varlen_attention_refuses():
    (q, k, v), _, cu_seqlens = pack([2, 3], 2, 8, 4)
    packed = ops.IMPLS["varlen_attention"]["triton"]
    with pytest.raises(ValueError, match="cu_seqlens must be int64 or int32, not float32"):
        packed(q, k, v, cu_seqlens.float(), 0.3)
    with pytest.raises(ValueError, match="cu_seqlens must hold at least one sequence"):
        packed(q, k, v, cu_seqlens[:1], 0.3)
    with pytest.raises(ValueError, match=r"k_nhx must have shape \(5, 2, 8\), not \(4, 2, 8\)"):
        packed(q, k[1:], v, cu_seqlens, 0.3)
    with pytest.raises(ValueError, match="v_nhv must be float32, not bfloat16"):
        packed(q, k, v.bfloat16(), cu_seqlens, 0.3)
