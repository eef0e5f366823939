"""Quantization kernels equal their references bit for bit wherever arithmetic is exact."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from dsv3_ref.kernels import quant

from dsv3_ref import fp8
from dsv3_ref.ops import IMPLS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = torch.float32, torch.bfloat16
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
COUNTS = {
    "one weight": None,
    "edges": [0, 1, 127, 128, 129, 0],
    "even": [128, 128],
    "one row": [1],
    "no rows": [0, 0, 0],
}

by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
by_scale_format = pytest.mark.parametrize("use_ue8m0", [False, True], ids=["any", "ue8m0"])
by_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def random_input(*shape, dtype=torch.float32):
    """Draw normal numbers in rows of very different magnitude, with zeros of both signs."""
    x = torch.randn(shape)
    if x.numel() > 1:
        x *= torch.logspace(-34, 30, len(x)).view(-1, *[1] * (x.ndim - 1))
        x.view(-1)[::7] = 0.0
        x.view(-1)[::11] *= -0.0
        x[len(x) // 2] = 0
    return x.to(DEVICE, dtype)


def expert_counts(counts):
    return None if counts is None else torch.tensor(counts, device=DEVICE)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def assert_same(got, want) -> None:
    """Compare the bits of all results, and their layout."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype and g.is_contiguous()
        assert torch.equal(bits(g), bits(w))


def run_both(name: str, *args):
    """Return the results of the kernel and of the reference."""
    return IMPLS[name]["triton"](*args), IMPLS[name]["torch"](*args)


# ── Tiles of 1 × 128 ──


@by_dtype
@by_scale_format
@pytest.mark.parametrize(
    "shape", [(5, 576), (2, 3, 128), (1, 1), (33, 300), (130,), (0, 64)], ids=str
)
def test_act_quant(shape, use_ue8m0, dtype):
    assert_same(*run_both("act_quant", random_input(*shape, dtype=dtype), use_ue8m0))


def test_act_quant_divides_every_pair_of_bf16_numbers_exactly():
    """x / s has a special form for bf16; up to powers of two, these are all possible quotients."""
    amax_n = torch.arange(128, 256).float()
    step = (torch.arange(128, 256) * torch.arange(-21.0, 1).exp2()[:, None]).flatten()
    x_nk = step.expand(128, -1)
    x_nk = torch.where(x_nk > amax_n[:, None], 0, x_nk)
    x_nzt = torch.nn.functional.pad(x_nk, (0, -x_nk.shape[1] % 127)).unflatten(1, (-1, 127))
    x_nzt = torch.cat([x_nzt, amax_n[:, None, None].expand(-1, x_nzt.shape[1], 1)], 2)
    assert_same(*run_both("act_quant", x_nzt.flatten(1).to(DEVICE, torch.bfloat16)))


def test_a_scale_is_the_quotient_by_448_to_the_last_bit():
    x_nt = torch.zeros(4096, 128)
    x_nt[:, 5] = torch.rand(4096).exp2() * torch.logspace(-29, 37, 4096)
    assert_same(*run_both("act_quant", x_nt.to(DEVICE)))


@by_scale_format
def test_numbers_halfway_between_two_values(use_ue8m0):
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (value[1:] + value[:-1]) / 2
    s = torch.rand(64, 1) + 0.5
    x = torch.cat([448 * s, half * s], 1)
    x = torch.stack([x, x.nextafter(x + 1), x.nextafter(x - 1)])
    x[..., 0] = 448 * s[:, 0]
    assert_same(*run_both("act_quant", torch.cat([x, -x], -1).to(DEVICE), use_ue8m0))


def test_rows_may_be_slices_of_wider_ones():
    x = random_input(6, 600, dtype=torch.bfloat16)
    want = IMPLS["act_quant"]["torch"](x[:, 16:400])
    assert_same(IMPLS["act_quant"]["triton"](x[:, 16:400]), want)
    assert_same(*run_both("act_quant_transposed", x[:, 16:400]))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@by_dtype
def test_infinity_and_nan_stay_non_finite(bad, dtype):
    x = torch.randn(2, 256, device=DEVICE).to(dtype)
    x[1, 130] = bad
    for use_ue8m0 in (False, True):
        value = fp8.act_dequant(*IMPLS["act_quant"]["triton"](x, use_ue8m0))
        assert value[0].isfinite().all() and not value[1, 130].isfinite()


# ── Twelve bits ──


@by_dtype
@pytest.mark.parametrize(
    "shape", [(5, 576), (2, 3, 128), (1, 1), (33, 300), (130,), (0, 64)], ids=str
)
def test_e5m6(shape, dtype):
    x = random_input(*shape, dtype=dtype)
    assert_same(*run_both("e5m6_quant", x))
    packed, s = IMPLS["e5m6_quant"]["torch"](x)
    for to in FLOATS:
        assert_same(*([y] for y in run_both("e5m6_restore", packed, s, shape[-1], to)))


def test_every_code_of_e5m6_and_every_number_halfway_between_two():
    code = torch.arange(0, 31 * 1024, 16, dtype=torch.int16).view(torch.float16).float()
    half = (code[1:] + code[:-1]) / 2
    numbers = torch.cat([code, half, half.nextafter(code[1:]), half.nextafter(code[:-1])])
    numbers = torch.cat([numbers, -numbers])
    x = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (0, 1), value=65_024.0)  # a scale of 1 in every tile
    x = torch.cat([x * scale for scale in (1.0, 2.0**-90, 2.0**90)]).to(DEVICE)
    got, want = run_both("e5m6_quant", x)
    assert_same(got, want)
    assert_same(*([y] for y in run_both("e5m6_restore", *want, 128, torch.float32)))


def test_e5m6_of_rows_that_are_slices():
    x = random_input(6, 600, dtype=torch.bfloat16)
    assert_same(*run_both("e5m6_quant", x[:, 16:400]))


# ── Blocks of 128 × 128 ──


@by_dtype
@by_scale_format
@pytest.mark.parametrize(
    "shape", [(130, 257), (128, 128), (3, 72, 576), (1, 1), (2, 0, 5)], ids=str
)
def test_weight_quant(shape, use_ue8m0, dtype):
    assert_same(*run_both("weight_quant", random_input(*shape, dtype=dtype), use_ue8m0))


# ── Tiles of 128 × 1 ──


@by_counts
def test_the_map_of_tiles(counts):
    counts = counts or [300]
    map_xz, end_e = quant.tile_map(expert_counts(counts), sum(counts))
    want, ends = [], []
    row = 0
    for e, count in enumerate(counts):
        want += [(row + i, row + count, e) for i in range(0, count, 128)]
        ends.append(len(want))
        row += count
    assert end_e.tolist() == ends
    assert map_xz.shape == (3, sum(counts) // 128 + len(counts))
    assert map_xz[:, : len(want)].T.tolist() == [list(t) for t in want]
    assert not map_xz[1, len(want) :].any()


@by_dtype
@by_counts
@pytest.mark.parametrize("k", [576, 40])
def test_act_quant_transposed(k, counts, dtype):
    m = 130 if counts is None else sum(counts)
    x = random_input(m, k, dtype=dtype) if m else torch.zeros(0, k, device=DEVICE, dtype=dtype)
    assert_same(*run_both("act_quant_transposed", x, expert_counts(counts), k == 40))


@by_scale_format
@by_counts
def test_requant_transposed(counts, use_ue8m0):
    m = 256 if counts is None else sum(counts)
    q, s = IMPLS["act_quant"]["torch"](torch.randn(m, 200, device=DEVICE) * 100, use_ue8m0)
    assert_same(*run_both("requant_transposed", q, s, expert_counts(counts), use_ue8m0))


# ── Norm and SwiGLU ──


def error(got, want) -> float:
    """Return rms(got − want) / rms(want)."""
    return (rms(got.double() - want.double()) / rms(want)).item()


def rms(x) -> torch.Tensor:
    return x.double().square().mean().sqrt()


@by_dtype
@pytest.mark.parametrize("shape", [(3, 576), (1, 7168), (2, 2, 100), (5, 1), (0, 128)], ids=str)
def test_rms_norm_quant(shape, dtype):
    x, weight = torch.randn(shape), torch.rand(shape[-1]) + 0.5
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE)
    for use_ue8m0 in (False, True):
        y, *quantized = IMPLS["rms_norm_quant"]["triton"](x, weight, 1e-6, None, use_ue8m0)
        assert_same(quantized, IMPLS["act_quant"]["torch"](y, use_ue8m0))  # of the rounded y
        if y.numel():
            want = IMPLS["rms_norm"]["torch"](x.double(), weight.double(), 1e-6)
            assert error(y, want) < 2 * ROUNDING[dtype]
        assert y.dtype == dtype and y.shape == x.shape


def test_rms_norm_quant_rounds_once_and_has_the_gradient_of_rms_norm():
    x, weight = torch.randn(5, 576), torch.rand(576) + 0.5
    g = torch.randn(5, 576).bfloat16()
    x, weight = (t.to(DEVICE).requires_grad_() for t in (x, weight))
    y, *quantized = IMPLS["rms_norm_quant"]["triton"](x, weight, 1e-6, torch.bfloat16)
    plain = IMPLS["rms_norm"]["triton"](x, weight, 1e-6, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and error(y, plain) < 2**-9  # 1/ρ may differ by one bit
    assert_same(quantized, IMPLS["act_quant"]["torch"](y.detach()))
    for got, want in zip(*(torch.autograd.grad(t, (x, weight), g.to(DEVICE)) for t in (y, plain))):
        assert got.dtype == torch.float32 and error(got, want) < 2**-20


def assert_close(got, want, dtype) -> None:
    """Compare values and scales up to roundings of exp: few values differ, each by one step."""
    (q, s), (want_q, want_s) = got, want
    assert q.shape == want_q.shape and s.shape == want_s.shape
    steps = bits(q).short() - bits(want_q).short()
    assert (steps.abs() <= 1).all() and (steps != 0).float().mean() < 0.003
    assert ((s - want_s).abs() <= want_s * 16 * ROUNDING[dtype]).all()


@by_dtype
@pytest.mark.parametrize("shape", [(5, 576), (2, 3, 128), (1, 40)], ids=str)
def test_swiglu_quant(shape, dtype):
    gate, up = (torch.randn(shape, device=DEVICE).mul(4).to(dtype) for _ in "ab")
    scale_m = torch.rand(gate.shape[:-1].numel(), device=DEVICE)
    for use_ue8m0 in (False, True):
        assert_close(*run_both("swiglu_quant", gate, up, use_ue8m0), dtype)
    rows = gate.flatten(0, -2), up.flatten(0, -2)
    assert_close(*run_both("swiglu_quant", *rows, False, scale_m), dtype)
    wide = torch.stack([gate, up], -2)  # the layout of a single matrix product
    assert_same(
        run_both("swiglu_quant", *wide.unbind(-2))[0], run_both("swiglu_quant", gate, up)[0]
    )


@by_dtype
@by_counts
def test_swiglu_quant_backward(counts, dtype):
    m, k = 131 if counts is None else sum(counts), 200
    g = torch.randn(m, k, device=DEVICE).to(dtype)
    quantized = [IMPLS["act_quant"]["torch"](4 * torch.randn(m, k, device=DEVICE)) for _ in "ab"]
    args = g, *quantized[0], *quantized[1], expert_counts(counts)
    gate, up = (fp8.act_dequant(*x).to(dtype).double().requires_grad_() for x in quantized)
    scale_m = torch.rand(m, device=DEVICE).requires_grad_()
    y = gate * gate.sigmoid() * up
    for scale, out in ((None, y), (scale_m.detach(), scale_m[:, None] * y)):
        (*got, got_q, got_s, dscale), want = run_both("swiglu_quant_backward", *args, scale)
        assert_close((got_q, got_s), want[2:4], dtype)
        exact = torch.autograd.grad(out, (gate, up), g.double(), retain_graph=True)
        for d, w in zip(got, exact):
            assert d.dtype == dtype and d.shape == (m, k)
            if m:
                assert error(d, w) < 3 * ROUNDING[dtype]
    (exact,) = torch.autograd.grad(out, scale_m, g.double())
    assert dscale.shape == (m,) and dscale.dtype == torch.float32
    terms = (g.double() * y.detach()).abs().sum(-1)  # their sum cancels
    assert ((dscale - exact).abs() <= 3 * ROUNDING[dtype] * terms).all()


# ── Errors ──


def invalid_calls() -> list:
    """Return (op, arguments, message)."""
    half, x = torch.zeros(4, 128, dtype=torch.float16), torch.zeros(4, 128)
    q, s = x.to(torch.float8_e4m3fn), torch.ones(4, 1)
    wide = torch.zeros(1, 8193)
    dtypes = "float32 or bfloat16, not float16"
    return [
        ("act_quant", (half,), f"x must be {dtypes}"),
        ("act_quant", (x.T,), "x must have a last stride of 1, not 128"),
        ("e5m6_quant", (half,), f"x must be {dtypes}"),
        ("e5m6_restore", (q, s, 128, torch.float32), "packed must be uint8, not float8_e4m3fn"),
        ("e5m6_restore", (q, s, 129, torch.float32), "s must have shape (4, 2), not (4, 1)"),
        ("weight_quant", (half,), f"w must be {dtypes}"),
        ("weight_quant", (torch.zeros(4, 256)[:, :128],), "w must be contiguous"),
        ("act_quant_transposed", (x[None],), "x_mk must have shape (any, any), not (1, 4, 128)"),
        (
            "act_quant_transposed",
            (x, torch.ones(2)),
            "tokens_per_expert_e must be int64 or int32, not float32",
        ),
        ("requant_transposed", (x, s), "q must be float8_e4m3fn, not float32"),
        ("requant_transposed", (q, s[:3]), "scales of q must have shape (4, 1), not (3, 1)"),
        ("rms_norm_quant", (x, x[0, :5], 1e-6), "weight must have shape (128), not (5,)"),
        ("rms_norm_quant", (wide, wide[0], 1e-6), "x must have a last axis of at most 8192"),
        ("rms_norm_quant", (x, x[0], 1e-6, torch.float16), "dtype must be float32 or bfloat16"),
        ("swiglu_quant", (x, x[:2]), "up must have shape (4, 128), not (2, 128)"),
        ("swiglu_quant", (x, x.bfloat16()), "up must be float32, not bfloat16"),
        ("swiglu_quant_backward", (x, q, s, q[:2], s), "up_q must have shape (4, 128)"),
        ("swiglu_quant_backward", (half, q, s, q, s), f"g must be {dtypes}"),
    ]


@pytest.mark.parametrize("name, args, message", invalid_calls())
def test_invalid_arguments(name, args, message):
    args = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(ValueError) as e:
        IMPLS[name]["triton"](*args)
    assert message in str(e.value)
