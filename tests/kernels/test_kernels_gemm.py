"""Matrix products of kernels against their references and against fp64, at ragged sizes."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
import triton
from dsv3_ref.kernels import gemm

from dsv3_ref import fp8, ops
from dsv3_ref.ops import IMPLS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = torch.float32, torch.bfloat16
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
TENSOR_CORES = 2e-3 if DEVICE == "cuda" else 1e-6  # Hopper sums 128 products in 14 bits
COUNTS = {
    "edges": [0, 1, 127, 128, 129, 0],
    "even": [128, 128],
    "one row": [0, 1],
    "no rows": [0, 0, 0],
}

by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
by_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def error(got, want) -> float:
    """Return rms(got − want) / rms(want)."""
    return (rms(got.double() - want.double()) / rms(want).clamp(min=1e-30)).item()


def rms(x) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def rows(m: int, k: int):
    """Return FP8 values and scales of activations whose rows and tiles differ in magnitude."""
    x = torch.randn(m, k, device=DEVICE)
    x *= torch.logspace(-3, 3, k, device=DEVICE)
    return IMPLS["act_quant"]["torch"](x * torch.rand(m, 1, device=DEVICE))


def weight(*shape):
    w = torch.randn(shape, device=DEVICE) * torch.logspace(1, -1, shape[-1], device=DEVICE)
    return IMPLS["weight_quant"]["torch"](w * (torch.rand(shape[-2], 1, device=DEVICE) + 0.1))


def dequantized(q, s):
    """Return the fp64 values of tiles of 1 × 128 or of blocks."""
    as_tiles = s.shape[:-1] == q.shape[:-1]
    return (fp8.act_dequant if as_tiles else fp8.weight_dequant)(q, s).double()


def one_config(monkeypatch, name: str, config) -> None:
    """Replace the configs of a kernel by this one."""
    kernel = triton.autotune([config], key=[])(getattr(gemm, name).fn)
    monkeypatch.setattr(gemm, name, kernel)


def fitting(configs, grouped: bool) -> list:
    """Return the configs that the autotuner tries on this GPU or in the interpreter."""
    fits = [c for c in configs if gemm.config_fits(c, {"GROUPED": grouped})]
    return [pytest.param(c, id=str(c)) for c in fits]


# ── FP8, one weight ──

SHAPES = [
    (130, 330, 576),
    (1, 129, 128),
    (65, 1, 40),
    (5, 70, 300),
    (0, 7, 128),
    (7, 0, 128),
    (3, 4, 0),
]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_gemm(shape, dtype):
    m, n, k = shape
    a, b = rows(m, k), weight(n, k)
    for b in (weight(n, k), rows(n, k)):  # in blocks, in tiles
        got = IMPLS["fp8_gemm"]["triton"](*a, *b, dtype)
        assert got.shape == (m, n) and got.dtype == dtype
        if got.numel():
            want = IMPLS["fp8_gemm"]["torch"](*a, *b)
            exact = dequantized(*a) @ dequantized(*b).T
            assert error(got, want) < max(TENSOR_CORES, ROUNDING[dtype])
            assert error(got, exact) < max(TENSOR_CORES, ROUNDING[dtype])


@pytest.mark.parametrize("config", fitting(gemm.BLOCKWISE_CONFIGS, False))
def test_every_config_of_the_product_with_blocks(config, monkeypatch):
    one_config(monkeypatch, "_fp8_gemm_kernel", config)
    a, b = rows(150, 256), weight(450, 256)  # 192 + 192 + 66 columns
    got = IMPLS["fp8_gemm"]["triton"](*a, *b)
    assert error(got, dequantized(*a) @ dequantized(*b).T) < TENSOR_CORES


@pytest.mark.parametrize("config", fitting(gemm.WGRAD_CONFIGS, False))
def test_every_config_of_the_product_with_tiles(config, monkeypatch):
    one_config(monkeypatch, "_fp8_wgrad_kernel", config)
    a, b = rows(150, 256), rows(200, 256)
    got = IMPLS["fp8_gemm"]["triton"](*a, *b)
    assert error(got, dequantized(*a) @ dequantized(*b).T) < TENSOR_CORES


def test_values_that_start_at_an_odd_address():
    a, b = rows(9, 128), weight(8, 128)
    odd = torch.empty(9 * 128 + 1, dtype=torch.uint8, device=DEVICE)[1:].view(fp8.E4M3).view(9, 128)
    odd.copy_(a[0])
    got = IMPLS["fp8_gemm"]["triton"](odd, a[1], *b)
    assert error(got, dequantized(*a) @ dequantized(*b).T) < TENSOR_CORES


@pytest.mark.parametrize("n", [1, 8])
def test_one_row_of_a_wider_matrix(n):
    """A single row of a slice counts as contiguous; memory after it must not be read."""
    (a, a_s), (b, b_s) = rows(1, 48), rows(n, 48)
    got = IMPLS["fp8_gemm"]["triton"](a[:, :40], a_s, b[:, :40].contiguous(), b_s)
    want = dequantized(a[:, :40], a_s) @ dequantized(b[:, :40], b_s).T
    assert error(got, want) < TENSOR_CORES


# ── FP8, one weight per expert ──


@by_counts
@pytest.mark.parametrize("n, k", [(72, 576), (200, 130)])
def test_fp8_grouped_gemm(counts, n, k):
    m, tokens_per_expert_e = sum(counts), torch.tensor(counts, device=DEVICE)
    args = *rows(m, k), *weight(len(counts), n, k), tokens_per_expert_e
    got = IMPLS["fp8_grouped_gemm"]["triton"](*args)
    want = IMPLS["fp8_grouped_gemm"]["torch"](*args)
    assert got.shape == (m, n) and got.dtype == torch.float32
    assert not m or error(got, want) < TENSOR_CORES
    narrow = IMPLS["fp8_grouped_gemm"]["triton"](*args, torch.bfloat16)
    assert torch.equal(narrow, got.bfloat16())


@pytest.mark.parametrize("config", fitting(gemm.BLOCKWISE_CONFIGS, True))
def test_every_config_of_the_grouped_product(config, monkeypatch):
    one_config(monkeypatch, "_fp8_gemm_kernel", config)
    counts, n = [130, 0, 200], 210
    a, b = rows(330, 128), weight(3, n, 128)
    got = IMPLS["fp8_grouped_gemm"]["triton"](*a, *b, torch.tensor(counts, device=DEVICE))
    values = zip(dequantized(*a).split(counts), dequantized(*b))
    assert error(got, torch.cat([x @ w.T for x, w in values])) < TENSOR_CORES


def test_experts_do_not_affect_each_other():
    (a, a_s), (b, b_s) = rows(9, 128), weight(3, 40, 128)  # one load spans several experts
    b[1].view(torch.uint8).fill_(0x7F)  # NaN
    tokens_per_expert_e = torch.tensor([2, 4, 3], device=DEVICE)
    got = IMPLS["fp8_grouped_gemm"]["triton"](a, a_s, b, b_s, tokens_per_expert_e)
    assert got.isnan().all(1).tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert not got[[0, 1, 6, 7, 8]].isnan().any()


@by_counts
@pytest.mark.parametrize("n, k", [(130, 72), (40, 200)])
def test_fp8_grouped_wgrad(counts, n, k):
    m, tokens_per_expert_e = sum(counts), torch.tensor(counts, device=DEVICE)
    g, x = torch.randn(m, n, device=DEVICE), torch.randn(m, k, device=DEVICE)
    args = (
        *IMPLS["act_quant_transposed"]["torch"](g, tokens_per_expert_e),
        *IMPLS["act_quant_transposed"]["torch"](x, tokens_per_expert_e),
    )
    got = IMPLS["fp8_grouped_wgrad"]["triton"](*args, tokens_per_expert_e)
    want = IMPLS["fp8_grouped_wgrad"]["torch"](*args, tokens_per_expert_e)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert error(got, want) < TENSOR_CORES
    assert not got[tokens_per_expert_e == 0].any()
    parts = zip(g.split(counts), x.split(counts))
    assert not m or error(got, torch.stack([a.T @ b for a, b in parts])) < 0.05  # 4 bits
    start = torch.randn_like(got)
    out = start.clone()
    added = IMPLS["fp8_grouped_wgrad"]["triton"](*args, tokens_per_expert_e, out)
    assert added is out and torch.equal(out, start + got)


def test_the_gradient_of_one_weight_adds_to_a_tensor_in_place():
    operands = []
    for width in (70, 130):
        x = torch.randn(200, width, device=DEVICE)
        operands += IMPLS["act_quant_transposed"]["torch"](x)
    got = IMPLS["fp8_gemm"]["triton"](*operands)
    start = torch.randn_like(got)
    out = start.clone()
    assert IMPLS["fp8_gemm"]["triton"](*operands, out=out) is out
    assert torch.equal(out, start + got)


@pytest.mark.parametrize("config", fitting(gemm.WGRAD_CONFIGS, True))
def test_every_config_of_the_grouped_wgrad(config, monkeypatch):
    one_config(monkeypatch, "_fp8_wgrad_kernel", config)
    tokens_per_expert_e = torch.tensor([200, 0, 100], device=DEVICE)
    args = []
    for n in (130, 140):
        x = torch.randn(300, n)
        quantized = IMPLS["act_quant_transposed"]["torch"](x, tokens_per_expert_e)
        args += [t.to(DEVICE) for t in quantized]
    got = IMPLS["fp8_grouped_wgrad"]["triton"](*args, tokens_per_expert_e)
    want = IMPLS["fp8_grouped_wgrad"]["torch"](*args, tokens_per_expert_e)
    assert error(got, want) < TENSOR_CORES


# ── bf16 and fp32, one weight per expert ──


def grouped(backend: str, x, w, tokens_per_expert_e, g):
    """Return the output and both gradients for an incoming gradient."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = IMPLS["grouped_linear"][backend](x, w, tokens_per_expert_e)
    return y, *torch.autograd.grad(y, (x, w), g.to(y.dtype))


@by_dtype
@by_counts
@pytest.mark.parametrize("o, i", [(72, 136), (130, 40), (1, 3)])
def test_grouped_linear(o, i, counts, dtype):
    m, e = sum(counts), len(counts)
    tokens_per_expert_e = torch.tensor(counts, device=DEVICE)
    x, w, g = (torch.randn(s, device=DEVICE).to(dtype) for s in ((m, i), (e, o, i), (m, o)))
    got = grouped("triton", x, w, tokens_per_expert_e, g)
    want = grouped("torch", x.double(), w.double(), tokens_per_expert_e, g.double())
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == dtype
        assert not b.numel() or error(a, b) < 8 * ROUNDING[dtype]
    assert not got[2][tokens_per_expert_e == 0].any()


def test_every_config_of_the_grouped_linear(monkeypatch):
    tokens_per_expert_e, narrow = torch.tensor([150, 0, 3], device=DEVICE), torch.bfloat16
    x, w, g = (torch.randn(s, device=DEVICE) for s in ((153, 264), (3, 200, 264), (153, 200)))
    for config in gemm._grouped_gemm_kernel.configs:
        dtype = narrow if config.kwargs["BLOCK_K"] == 64 else torch.float32
        with monkeypatch.context() as patch:
            one_config(patch, "_grouped_gemm_kernel", config)
            one_config(patch, "_grouped_wgrad_kernel", config)
            got = grouped("triton", x.to(dtype), w.to(dtype), tokens_per_expert_e, g)
        for a, b in zip(got, grouped("torch", x.double(), w.double(), tokens_per_expert_e, g)):
            assert error(a, b) < 8 * ROUNDING[dtype]


def test_grouped_linear_under_autocast():
    tokens_per_expert_e = torch.tensor([3, 0, 8], device=DEVICE)
    x, w, g = (torch.randn(s, device=DEVICE) for s in ((11, 16), (3, 24, 16), (11, 24)))
    with torch.autocast(DEVICE, torch.bfloat16):
        got, want = (
            grouped(backend, x, w, tokens_per_expert_e, g) for backend in ("triton", "torch")
        )
    assert [t.dtype for t in got] == [t.dtype for t in want] == [torch.bfloat16, *FLOATS[:1] * 2]
    for a, b in zip(got, want):
        assert error(a, b) < 8 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
def test_a_schedule_can_defer_the_gradient_of_a_weight(cast):
    tokens_per_expert_e = torch.tensor([3, 0, 8], device=DEVICE)
    x, w, g = (torch.randn(s, device=DEVICE) for s in ((11, 16), (3, 24, 16), (11, 24)))
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
        _, *want = grouped("triton", x, w, tokens_per_expert_e, g)
        y = IMPLS["grouped_linear"]["triton"](x, w, tokens_per_expert_e)
    with ops.deferring_wgrads() as todo:
        y.backward(g.to(y.dtype))
    assert torch.equal(x.grad, want[0]) and w.grad is None
    ((weight, wgrad),) = todo
    assert weight is w  # the parameter itself, whose .grad a pipeline adds to
    dw = wgrad()
    assert dw.dtype == w.dtype and torch.equal(dw, want[1])


def test_an_expanded_gradient_and_an_unneeded_one():
    tokens_per_expert_e = torch.tensor([5, 4], device=DEVICE)
    x = torch.randn(9, 16, device=DEVICE, requires_grad=True)
    w = torch.randn(2, 8, 16, device=DEVICE)
    IMPLS["grouped_linear"]["triton"](x, w, tokens_per_expert_e).sum().backward()
    want = torch.cat([w[0].sum(0).expand(5, -1), w[1].sum(0).expand(4, -1)])
    assert error(x.grad, want) < 8 * ROUNDING[torch.float32]
    w.requires_grad_()
    IMPLS["grouped_linear"]["triton"](x.detach(), w, tokens_per_expert_e).sum().backward()
    assert error(w.grad[0], x[:5].sum(0).expand(8, -1)) < 8 * ROUNDING[torch.float32]


def test_rows_of_another_expert_do_not_affect_a_gradient():
    tokens_per_expert_e = torch.tensor([3, 4], device=DEVICE)
    x, w, g = (torch.randn(s, device=DEVICE) for s in ((7, 16), (2, 8, 16), (7, 8)))
    x[3:], g[3:] = torch.inf, torch.nan
    y, dx, dw = grouped("triton", x, w, tokens_per_expert_e, g)
    assert y[:3].isfinite().all() and dx[:3].isfinite().all() and dw[0].isfinite().all()
    assert not dw[1].isfinite().any()


def test_the_host_never_reads_the_counts(monkeypatch):
    tokens_per_expert_e = torch.tensor([3, 0, 4], device=DEVICE)
    a, b = rows(7, 128), weight(3, 16, 128)
    x = torch.randn(7, 128, device=DEVICE, requires_grad=True)
    g, w = torch.randn(7, 16, device=DEVICE), torch.randn(3, 16, 128, device=DEVICE)
    for name in ("tolist", "item", "__int__", "__index__", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, None)
    IMPLS["fp8_grouped_gemm"]["triton"](*a, *b, tokens_per_expert_e)
    columns = (
        *IMPLS["act_quant_transposed"]["triton"](g, tokens_per_expert_e),
        *IMPLS["act_quant_transposed"]["triton"](x, tokens_per_expert_e),
    )
    IMPLS["fp8_grouped_wgrad"]["triton"](*columns, tokens_per_expert_e)
    IMPLS["grouped_linear"]["triton"](x, w, tokens_per_expert_e).backward(g)


# ── Errors ──


def invalid_calls() -> list:
    """Return (op, arguments, message)."""
    (a, a_s), (b, b_s) = rows(4, 256), weight(200, 256)
    x = torch.zeros(4, 256, device=DEVICE)
    many, tokens_per_expert_e = weight(2, 200, 256), torch.tensor([1, 3], device=DEVICE)
    g, g_s = a[:, :128].contiguous(), a_s[:, :1].contiguous()
    half = torch.float16
    return [
        ("fp8_gemm", (x, a_s, b, b_s), "a must be float8_e4m3fn, not float32"),
        ("fp8_gemm", (a.T, a_s, b, b_s), "a must be contiguous"),
        ("fp8_gemm", (a, a_s[:, :1], b, b_s), "a_s must have shape (4, 2), not (4, 1)"),
        ("fp8_gemm", (a, a_s, b[:, :128], b_s), "b must have shape (200, 256), not (200, 128)"),
        ("fp8_gemm", (a, a_s, b, b_s[:1]), "b_s must have shape (2, 2), not (1, 2)"),
        ("fp8_gemm", (a, a_s, b, b_s, half), "the result must be float32 or bfloat16, not float16"),
        (
            "fp8_grouped_gemm",
            (a, a_s, *many, tokens_per_expert_e[:1]),
            "b must have shape (1, any, 256)",
        ),
        (
            "fp8_grouped_gemm",
            (a, a_s, *many, tokens_per_expert_e.float()),
            "tokens_per_expert_e must be int64 or int32",
        ),
        (
            "fp8_grouped_gemm",
            (a, a_s, many[0], b_s, tokens_per_expert_e),
            "b_s must have shape (2, 2, 2)",
        ),
        (
            "fp8_grouped_wgrad",
            (g, g_s, g[:, :64], g_s, tokens_per_expert_e),
            "x must have shape (4, 128)",
        ),
        (
            "fp8_grouped_wgrad",
            (g, g_s[:1], g, g_s, tokens_per_expert_e),
            "g_s must have shape (4, 1)",
        ),
        (
            "grouped_linear",
            (x.half(), x[None], tokens_per_expert_e[:1]),
            "x_mi must be float32 or bfloat16",
        ),
        ("grouped_linear", (x.T, x[None], tokens_per_expert_e[:1]), "x_mi must be contiguous"),
        (
            "grouped_linear",
            (x, x[None], tokens_per_expert_e),
            "weight_eoi must have shape (2, any, 256)",
        ),
        (
            "grouped_linear",
            (x, x[None].bfloat16(), tokens_per_expert_e[:1]),
            "weight_eoi must be float32",
        ),
    ]


@pytest.mark.parametrize("i", range(15))
def test_invalid_arguments(i):
    name, args, message = invalid_calls()[i]
    with pytest.raises(ValueError) as e:
        IMPLS[name]["triton"](*args)
    assert message in str(e.value)
