"""RMSNorm, SwiGLU and RoPE in Triton equal their references in fp64, up to the last rounding."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from torch.nn import functional as F

from dsv3_ref import ops, rope
from dsv3_ref.kernels import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rms(got − want) / rms(want), where `want` is computed in fp64 and rounded once. The bound for
# fp32 allows a few roundings of sums, that for bf16 a different rounding of a few numbers.
BOUND = {torch.float32: 8 * 2**-24, torch.bfloat16: 2**-8 / 8}
by_dtype = pytest.mark.parametrize("dtype", BOUND, ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def results(fn, inputs, g, **more):
    """Return fn(*inputs, **more) and its gradients along g; inputs keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, **more)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def error(got, want) -> float:
    """Return rms(got − want) / rms(want); an rms(want) below 1/2 is due to cancellation."""
    want = want.to(got.dtype).double()
    return (rms(got.double() - want) / rms(want).clamp(min=0.5)).item()


def rms(x) -> torch.Tensor:
    return x.square().mean().sqrt()


def check(name, inputs, g=None, **more):
    """Compare values and gradients with the reference in fp64."""
    g = randn(*inputs[0].shape, dtype=inputs[0].dtype) if g is None else g
    got = results(ops.IMPLS[name]["triton"], inputs, g, **more)
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in more.items()}
    want = results(ops.IMPLS[name]["torch"], [x.double() for x in inputs], g.double(), **wide)
    assert got[0].dtype == inputs[0].dtype
    for a, b, x in zip(got, want, [inputs[0], *inputs]):
        assert a.shape == b.shape and a.dtype == x.dtype and a.isfinite().all()
        assert error(a, b) < BOUND[x.dtype]


# ── RMSNorm ──

SHAPES = [(1, 2), (7, 1), (3, 5, 300), (2, 3, 2, 64), (1, 1536), (130, 129)]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype):
    eps = 1e-6 if shape[-1] > 1 else 0.5  # the norm of a single number is its sign, but for ε
    check("rms_norm", [randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)], eps=eps)


@by_dtype
def test_rms_norm_of_wide_rows_that_share_a_program(dtype):
    """There are more rows than programs, and a row does not fill its block."""
    check("rms_norm", [randn(19, 7168, dtype=dtype), randn(7168, dtype=dtype)], eps=1e-6)


def test_rms_norm_keeps_the_dtype_of_its_weight():
    check("rms_norm", [randn(9, 96, dtype=torch.bfloat16), randn(96)], eps=1e-6)
    check("rms_norm", [randn(9, 96), randn(96, dtype=torch.bfloat16)], eps=1e-6)


@by_dtype
def test_rms_norm_of_the_latent_within_wider_rows(dtype):
    """x and the gradient are slices of rows of 576 numbers, as in `kv_norm`."""
    x, g = (randn(2, 9, 576, dtype=dtype)[..., :512] for _ in range(2))
    assert not x.is_contiguous()
    check("rms_norm", [x, randn(512, dtype=dtype)], g=g, eps=1e-6)


def test_rms_norm_of_leading_axes_in_another_order():
    x = randn(4, 3, 40).transpose(0, 1)
    check("rms_norm", [x, randn(40)], g=randn(4, 3, 40).transpose(0, 1), eps=1e-6)


def test_expanded_scalar_gradients():
    """`.sum()` has a gradient whose strides are 0."""
    x = randn(6, 40)
    check("rms_norm", [x, randn(40)], g=torch.ones((), device=DEVICE).expand(6, 40), eps=1e-6)
    check("swiglu", [x, randn(6, 40)], g=torch.ones((), device=DEVICE).expand(6, 40))


def test_rms_norm_of_no_rows_gives_a_weight_gradient_of_zero():
    y, dx, dweight = results(norm.rms_norm, [randn(0, 64), randn(64)], randn(0, 64), eps=1e-6)
    assert y.shape == dx.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_rms_norm_of_a_row_of_zeros_and_of_large_numbers():
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e18), torch.full((64,), 1e-18)))
    y = norm.rms_norm(x.to(DEVICE), torch.ones(64, device=DEVICE), 1e-6)
    assert torch.allclose(y[0], torch.zeros_like(y[0]))
    assert torch.allclose(y[1], torch.ones_like(y[1]))
    assert y[2].isfinite().all()


# ── SwiGLU ──


@by_dtype
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5, 33), (2, 2049), (70, 64)], ids=str)
def test_swiglu(shape, dtype):
    check("swiglu", [4 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)])


@by_dtype
def test_swiglu_of_the_halves_of_a_row(dtype):
    gate, up = randn(5, 3, 2 * 48, dtype=dtype).chunk(2, -1)
    assert not gate.is_contiguous()
    check("swiglu", [gate, up], g=randn(5, 3, 96, dtype=dtype)[..., 48:])


@pytest.mark.filterwarnings("ignore:overflow")  # e^10000 is ∞ on purpose
@by_dtype
def test_swiglu_of_extreme_numbers(dtype):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE).to(dtype)
    check("swiglu", [gate, torch.ones_like(gate)], g=torch.ones_like(gate))


def test_swiglu_of_no_rows():
    y, *grads = results(norm.swiglu, [randn(0, 8), randn(0, 8)], randn(0, 8))
    assert all(x.shape == (0, 8) for x in (y, *grads))


# ── RoPE ──


def random_rope(s: int, pairs: int):
    angle = 10 * torch.randn(s, pairs, device=DEVICE)
    return {"cos": angle.cos(), "sin": angle.sin()}


def check_rotary(x, g=None):
    """Compare with the reference in fp32, since it has no fp64 form."""
    more = random_rope(x.shape[1], x.shape[3] // 2)
    g = torch.randn_like(x) if g is None else g
    got = results(norm.apply_rotary_emb, [x], g, **more)
    want = results(ops.IMPLS["apply_rotary_emb"]["torch"], [x.float()], g.float(), **more)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert error(a, b) < BOUND[x.dtype]


@by_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 18), (1, 3, 40, 64), (2, 70, 1, 6)])
def test_apply_rotary_emb(shape, dtype):
    check_rotary(randn(*shape, dtype=dtype))


@by_dtype
def test_apply_rotary_emb_within_wider_rows(dtype):
    """Rotate the last 64 of 192 dims of each query head, and the key stored after the latent."""
    q, k = randn(2, 5, 3, 192, dtype=dtype), randn(2, 5, 576, dtype=dtype)
    check_rotary(q[..., 128:], g=torch.randn_like(q)[..., 128:])
    check_rotary(k[..., 512:][:, :, None], g=torch.randn_like(k)[..., 512:][:, :, None])
    check_rotary(q[:, 1:4, :, :64], g=torch.randn_like(q)[:, 2:, :, 128:])  # some positions


def test_apply_rotary_emb_to_an_expanded_vector():
    x, g = randn(1, 1, 1, 8), torch.ones((), device=DEVICE)
    check_rotary(x.expand(2, 7, 1, 8), g=g.expand(2, 7, 1, 8))


def test_the_gradient_is_the_inverse_rotation():
    x, more = randn(2, 5, 3, 16), random_rope(5, 8)
    y, back = results(norm.apply_rotary_emb, [x], norm.apply_rotary_emb(x, **more), **more)
    assert torch.allclose(back, x, atol=1e-6) and not torch.allclose(y, x, atol=0.1)


def test_apply_rotary_emb_of_no_positions():
    x, g = randn(2, 0, 3, 8), randn(2, 0, 3, 8)
    y, dx = results(norm.apply_rotary_emb, [x], g, **random_rope(0, 4))
    assert y.shape == dx.shape == (2, 0, 3, 8)


# ── The backend ──


def test_the_backend_selects_the_kernels(monkeypatch):
    called, x = [], randn(3, 8)
    for name in ("rms_norm", "swiglu", "apply_rotary_emb"):
        monkeypatch.setitem(ops.IMPLS[name], "triton", lambda *a, name=name: called.append(name))
    with ops.use("triton", "torch"):
        ops.rms_norm(x, x[0], 1e-6)
        ops.swiglu(x, x)
        rope.apply_rotary_emb(x[None, :, None], x[:, :4], x[:, :4])
    assert called == ["rms_norm", "swiglu", "apply_rotary_emb"]


def test_a_layer_of_the_model_learns_the_same(micro):
    """Compare outputs and gradients of a norm and an MLP."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(ops.RMSNorm(micro.dim, 1e-6), ops.MLP(micro.dim, micro.inter_dim))
    for w in layer.parameters():
        torch.nn.init.normal_(w, std=0.3)
    layer, x = layer.to(DEVICE), randn(2, 9, micro.dim).requires_grad_()
    grads = []
    for backends in (("triton", "torch"), ("torch",)):
        with ops.use(*backends):
            loss = F.mse_loss(layer(x), torch.ones_like(x))
            grads.append(torch.autograd.grad(loss, (x, *layer.parameters())))
    for got, want in zip(*grads):
        assert error(got, want) < 1e-5


# ── Errors ──


def check_error(message: str, fn, *args):
    with pytest.raises(ValueError, match=message):
        fn(*args)


def test_invalid_arguments_of_rms_norm():
    x, w = randn(4, 8), randn(8)
    rms_norm, wide = norm.rms_norm, randn(1, 8193)
    check_error("^x must be float32 or bfloat16, not float64", rms_norm, x.double(), w, 1e-6)
    check_error("^x must have a last stride of 1, not 4", rms_norm, randn(8, 4).T, w, 1e-6)
    check_error("^x must have a last axis of at most 8192", rms_norm, wide, wide[0], 0)
    check_error(r"^weight must have shape \(8\), not \(7,\)", rms_norm, x, randn(7), 1e-6)
    check_error("^weight must be float32 or bfloat16, not float16", rms_norm, x, w.half(), 1e-6)


def test_invalid_arguments_of_swiglu():
    x, swiglu = randn(4, 8), norm.swiglu
    check_error("^gate must be float32 or bfloat16, not float16", swiglu, x.half(), x.half())
    check_error("^up must be float32, not bfloat16", swiglu, x, x.bfloat16())
    check_error(r"^up must have shape \(4, 8\), not \(4, 7\)", swiglu, x, x[:, :7])
    check_error("^gate must have a last stride of 1", swiglu, randn(8, 4).T, x)


def test_invalid_arguments_of_apply_rotary_emb():
    x, (cos, sin) = randn(1, 3, 2, 8), random_rope(3, 4).values()
    rotate, by_column = norm.apply_rotary_emb, sin.T.contiguous().T
    check_error("^x_bshr must have shape", rotate, x[0], cos, sin)
    check_error("^x_bshr must have an even last axis, not 7", rotate, x[..., :7], cos, sin)
    check_error("^x_bshr must be float32 or bfloat16", rotate, x.double(), cos, sin)
    check_error("^x_bshr must have a last stride of 1", rotate, x.transpose(2, 3), cos, sin)
    check_error("^cos must be float32, not bfloat16", rotate, x, cos.bfloat16(), sin)
    check_error(r"^cos must have shape \(3, 4\), not \(4, 3\)", rotate, x, cos.T, sin)
    check_error("^sin must be contiguous", rotate, x, cos, by_column)
