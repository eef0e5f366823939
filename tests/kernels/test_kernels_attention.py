"""MLA's attention in Triton against the reference in fp64, forward and backward, packed or not."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch

from dsv3_ref import ops
from dsv3_ref.kernels import attention as kernels
from dsv3_ref.rope import to_cu_seqlens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ‖got − want‖ / ‖want‖: a few roundings in fp32; in bf16 those of the result, of p and of ds
BOUND = {torch.float32: 16 * 2**-24, torch.bfloat16: 2 * 2**-8}
by_dtype = pytest.mark.parametrize("dtype", BOUND, ids=str)
KERNELS = [
    kernels._attention_kernel, kernels._attention_dq_kernel, kernels._attention_dkdv_kernel,
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill fresh memory with NaN, which reveals missing writes and unintended reads."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(empty(*a, **k)))


def fill(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def random_inputs(b, s, t, h, x, v, dtype=torch.float32):
    """Return (q, k, v) and a gradient of the output."""
    shapes = (b, s, h, x), (b, t, h, x), (b, t, h, v), (b, s, h, v)
    *q_k_v, g = (randn(*shape, dtype=dtype) for shape in shapes)
    return q_k_v, g


def pack(lengths, h, x, v, dtype=torch.float32):
    """Return the same for packed sequences, and their bounds."""
    q_k_v, g = random_inputs(1, sum(lengths), sum(lengths), h, x, v, dtype)
    return [y[0] for y in q_k_v], g[0], to_cu_seqlens(lengths, DEVICE).long()


def results(fn, inputs, g, *more):
    """Return fn(*inputs, *more) and its gradients along g; inputs keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, *more)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def triton_results(name, inputs, g, *more):
    return results(ops.IMPLS[name]["triton"], inputs, g, *more)


def error(got, want) -> float:
    """Return rms(got − want) / rms(want); an rms(want) below 1/2 is due to cancellation."""
    return (rms(got - want) / rms(want).clamp(min=0.5)).item()


def rms(x) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def check(name, inputs, g, *more):
    """Compare values and gradients with the reference in fp64."""
    got = triton_results(name, inputs, g, *more)
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
    (2, 47, 64, 1, 12, 8),  # the newest key of a block is the first of another block
    (2, 1, 19, 3, 6, 4),
    (3, 3, 66, 1, 17, 33),
    (1, 40, 72, 1, 192, 128),
]


@by_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(size, dtype):
    check("attention", *random_inputs(*size, dtype), size[-2] ** -0.5)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("s, t", [(150, 150), (131, 203)])
def test_blocks_of_every_config(number, s, t, monkeypatch):
    """Without a GPU every config runs in fp32; with one, those of its architecture in bf16."""
    on_gpu = DEVICE == "cuda"
    arch = torch.cuda.get_device_capability()[0] if on_gpu else None
    for kernel in KERNELS:
        configs = [c for c in kernel.configs if arch is None or arch in c.archs]
        one = [configs[number % len(configs)]]
        monkeypatch.setattr(kernel, "early_config_prune", lambda *a, one=one, **k: one)
        monkeypatch.setattr(kernel, "cache", {})
    x, v = (192, 128) if on_gpu else (24, 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    check("attention", *random_inputs(1, s, t, 1, x, v, dtype), x**-0.5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on NaN
def test_blocks_in_the_future_are_not_read():
    """Otherwise weights of 0 would be multiplied by NaN."""
    (q, k, v), g = random_inputs(1, 100, 100, 1, 16, 16)
    k[:, 64:], v[:, 64:] = torch.nan, torch.nan
    o, dq, *_ = triton_results("attention", (q, k, v), g, 0.25)
    assert o[:, :32].isfinite().all() and dq[:, :32].isfinite().all()
    (q, k, v), g = random_inputs(1, 100, 100, 1, 16, 16)
    q[:, :32], g[:, :32] = torch.nan, torch.nan
    *_, dk, dv = triton_results("attention", (q, k, v), g, 0.25)
    assert dk[:, 64:].isfinite().all() and dv[:, 64:].isfinite().all()


def test_large_scores_neither_overflow_nor_vanish():
    (q, k, v), g = random_inputs(1, 40, 40, 2, 16, 16)
    got = triton_results("attention", (100 * q, 100 * k, v), g, 1.0)
    want = results(ops.IMPLS["attention"]["torch"], (100 * q, 100 * k, v), g, 1.0)
    assert error(got[0], want[0]) < 1e-3  # scores of 10⁴ are exact to 10⁻³
    assert all(x.isfinite().all() for x in got)


@by_dtype
def test_values_may_be_a_slice_of_the_up_projection(dtype):
    """Use keys and values as in MLA: v next to k in memory, the rotary part of k appended."""
    q, kv, g = (randn(2, 20, 2, width, dtype=dtype) for width in (24, 32, 16))
    k, v = torch.cat((kv[..., :16], q[..., 16:]), -1), kv[..., 16:]
    assert not v.is_contiguous() and kernels.tma_aligned(v) is v
    strided = triton_results("attention", (q, k, v), g, 0.2)
    whole = triton_results("attention", (q, k, v.contiguous()), g, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(strided, whole))
    check("attention", (q, k, v), g, 0.2)


def test_any_strides_under_the_last_axis():
    """Heads before positions in memory, an expanded scalar as gradient, rows at odd addresses."""
    q_k_v, _ = random_inputs(2, 9, 9, 3, 8, 8)
    heads_first = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in q_k_v]
    check("attention", heads_first, torch.ones(1, device=DEVICE).expand(2, 9, 3, 8), 0.3)
    q_k_v, g = random_inputs(1, 9, 9, 2, 9, 9)
    check("attention", [y[..., 1:] for y in q_k_v], g[..., 1:], 0.3)


def test_the_future_changes_nothing():
    """With other keys and values from position 37, earlier results keep every bit."""
    (q, k, v), g = random_inputs(1, 60, 70, 2, 16, 16)
    late = 37
    g[:, late - 10 :] = 0  # the loss depends on earlier outputs; query s is at position s + 10
    before = triton_results("attention", (q, k, v), g, 0.25)
    k[:, late:], v[:, late:] = 7.0, -3.0
    q[:, late - 10 :] = 2.0
    after = triton_results("attention", (q, k, v), g, 0.25)
    assert torch.equal(before[0][:, : late - 10], after[0][:, : late - 10])
    assert not torch.equal(before[0][:, late - 10 :], after[0][:, late - 10 :])
    for x, y, first in zip(before[1:], after[1:], (late - 10, late, late)):
        assert torch.equal(x[:, :first], y[:, :first]) and x[:, :first].any()
        assert not x[:, first:].any() and not y[:, first:].any()


# ── Packed ──

PACKS = [[5], [1], [1, 1, 1], [0, 7, 0, 0, 33, 0], [33, 33, 1], [18, 1, 0, 70, 2]]


@by_dtype
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_varlen_attention(lengths, dtype):
    inputs, g, cu_seqlens = pack(lengths, 2, 24, 12, dtype)
    check("varlen_attention", inputs, g, cu_seqlens, 0.2)


def test_varlen_attention_of_v3():
    inputs, g, cu_seqlens = pack([20, 45], 1, 192, 128, torch.bfloat16)
    check("varlen_attention", inputs, g, cu_seqlens.int(), 192**-0.5)


def test_a_pack_equals_its_samples():
    """The results are equal bit for bit, so no sample attends to another."""
    lengths = [21, 0, 40, 1, 18]
    inputs, g, cu_seqlens = pack(lengths, 2, 20, 12)
    got = triton_results("varlen_attention", inputs, g, cu_seqlens, 0.2)
    parts = [[y[None] for y in x.split(lengths)] for x in (*inputs, g)]
    alone = [
        triton_results("attention", one[:3], one[3], 0.2) for one in zip(*parts) if one[3].numel()
    ]
    for x, ys in zip(got, zip(*alone)):
        assert torch.equal(x, torch.cat(ys, 1)[0])


def test_empty_sequences():
    inputs, g, cu_seqlens = pack([0, 0], 2, 16, 8)
    got = triton_results("varlen_attention", inputs, g, cu_seqlens, 0.2)
    assert [x.shape for x in got] == [g.shape, *(x.shape for x in inputs)]


def test_the_host_does_not_read_cu_seqlens(monkeypatch):
    inputs, g, cu_seqlens = pack([5, 12], 1, 16, 8)
    want = triton_results("varlen_attention", inputs, g, cu_seqlens, 0.2)  # autotuned here

    def fail(*_):
        raise AssertionError("the host waits for the GPU")

    names = {"item", "tolist", "__int__", "__index__", "__bool__"}
    if DEVICE == "cuda":  # the interpreter needs these
        names |= {"cpu", "numpy"}
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, fail)
        got = triton_results("varlen_attention", inputs, g, cu_seqlens, 0.2)
    assert all(map(torch.equal, got, want))


# ── Errors ──


def replace_argument(name, value):
    """Return the arguments of `attention`, one of them replaced."""
    (q, k, v), _ = random_inputs(2, 3, 4, 2, 8, 4)
    return list(({"q": q, "k": k, "v": v, "scale": 0.3} | {name: value}).values())


INVALID = [
    ("q", randn(2, 3, 2, 8).half(), "q_bshx must be float32 or bfloat16, not float16"),
    ("q", randn(2, 3, 8), r"q_bshx must have shape \(any, any, any, any\), not \(2, 3, 8\)"),
    ("q", randn(2, 5, 2, 8), "q_bshx must have from 1 to 4 positions, as many as k_bthx, not 5"),
    ("q", randn(2, 0, 2, 8), "q_bshx must have from 1 to 4 positions, as many as k_bthx, not 0"),
    ("q", randn(2, 3, 2, 16)[..., ::2], "q_bshx must have a last stride of 1, not 2"),
    ("k", randn(2, 4, 2, 8).bfloat16(), "k_bthx must be float32, not bfloat16"),
    ("k", randn(2, 4, 3, 8), r"k_bthx must have shape \(2, 4, 2, 8\), not \(2, 4, 3, 8\)"),
    ("v", randn(2, 3, 2, 4), r"v_bthv must have shape \(2, 4, 2, any\), not \(2, 3, 2, 4\)"),
    ("v", randn(2, 4, 2, 257), "v_bthv must have at most 256 dims per head, not 257"),
    ("scale", 0.0, "scale must be positive, not 0.0"),
]


@pytest.mark.parametrize("name, value, message", INVALID, ids=[x for *_, x in INVALID])
def test_invalid_arguments_of_attention(name, value, message):
    with pytest.raises(ValueError, match=message):
        ops.IMPLS["attention"]["triton"](*replace_argument(name, value))


def test_invalid_arguments_of_varlen_attention():
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
