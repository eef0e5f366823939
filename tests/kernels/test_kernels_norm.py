"""RMSNorm, SwiGLU and RoPE in Triton equal their references in fp64, to the last rounding."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from torch.nn import functional as F

from dsv3_ref import ops, rope
from dsv3_ref.kernels import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rms(got − want) / rms(want), `want` in fp64 and then rounded once: another rounding on the way
# would show. In fp32 a few roundings of sums; in bf16 it may be cut the other way here and there.
BOUND = {torch.float32: 8 * 2**-24, torch.bfloat16: 2**-8 / 8}
both = pytest.mark.parametrize("dtype", BOUND, ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def results(fn, inputs, g, **more):
    """fn(*inputs, **more) and its gradients along g; strides of the inputs are kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves, **more)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def error(got, want) -> float:
    want, rms = want.to(got.dtype).double(), lambda x: x.square().mean().sqrt()
    return (rms(got.double() - want) / rms(want).clamp(min=0.5)).item()  # smaller is cancellation


def check(name, inputs, g=None, **more):
    """Values and gradients against the reference in fp64, from the same numbers."""
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


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype):
    eps = 1e-6 if shape[-1] > 1 else 0.5  # of one number only its sign is left, but for ε
    check("rms_norm", [randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)], eps=eps)


@both
def test_rms_norm_of_wide_rows_that_share_a_program(dtype):
    """More rows than programs, forward and backward; a row that does not fill its block."""
    check("rms_norm", [randn(19, 7168, dtype=dtype), randn(7168, dtype=dtype)], eps=1e-6)


def test_rms_norm_keeps_the_dtype_of_its_weight():
    check("rms_norm", [randn(9, 96, dtype=torch.bfloat16), randn(96)], eps=1e-6)
    check("rms_norm", [randn(9, 96), randn(96, dtype=torch.bfloat16)], eps=1e-6)


@both
def test_rms_norm_of_the_latent_in_its_wider_row(dtype):
    """x and the gradient are slices of 576-wide rows, as `kv_norm` meets them."""
    x, g = (randn(2, 9, 576, dtype=dtype)[..., :512] for _ in range(2))
    assert not x.is_contiguous()
    check("rms_norm", [x, randn(512, dtype=dtype)], g=g, eps=1e-6)


def test_rms_norm_of_leading_axes_in_another_order():
    x = randn(4, 3, 40).transpose(0, 1)
    check("rms_norm", [x, randn(40)], g=randn(4, 3, 40).transpose(0, 1), eps=1e-6)


def test_gradients_of_one_number_for_all():
    """`.sum()` gives a gradient without strides of its own."""
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


@both
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5, 33), (2, 2049), (70, 64)], ids=str)
def test_swiglu(shape, dtype):
    check("swiglu", [4 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)])


@both
def test_swiglu_of_the_halves_of_a_row(dtype):
    gate, up = randn(5, 3, 2 * 48, dtype=dtype).chunk(2, -1)
    assert not gate.is_contiguous()
    check("swiglu", [gate, up], g=randn(5, 3, 96, dtype=dtype)[..., 48:])


@pytest.mark.filterwarnings("ignore:overflow")  # e^10000 = ∞ is meant
@both
def test_swiglu_far_out_is_neither_nan_nor_rounded_to_the_wrong_side(dtype):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE).to(dtype)
    check("swiglu", [gate, torch.ones_like(gate)], g=torch.ones_like(gate))


def test_swiglu_of_nothing():
    y, *grads = results(norm.swiglu, [randn(0, 8), randn(0, 8)], randn(0, 8))
    assert all(x.shape == (0, 8) for x in (y, *grads))


# ── RoPE ──


def table(s: int, pairs: int):
    angle = 10 * torch.randn(s, pairs, device=DEVICE)
    return {"cos": angle.cos(), "sin": angle.sin()}


def check_rotate(x, g=None):
    """Against the reference in fp32: it has no fp64."""
    more, g = table(x.shape[1], x.shape[3] // 2), torch.randn_like(x) if g is None else g
    got = results(norm.apply_rotary_emb, [x], g, **more)
    want = results(ops.IMPLS["apply_rotary_emb"]["torch"], [x.float()], g.float(), **more)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert error(a, b) < BOUND[x.dtype]


@both
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 18), (1, 3, 40, 64), (2, 70, 1, 6)])
def test_rotate(shape, dtype):
    check_rotate(randn(*shape, dtype=dtype))


@both
def test_rotate_inside_wider_rows(dtype):
    """Queries' last 64 of 192 dims in each head, and the one key behind the latent."""
    q, k = randn(2, 5, 3, 192, dtype=dtype), randn(2, 5, 576, dtype=dtype)
    check_rotate(q[..., 128:], g=torch.randn_like(q)[..., 128:])
    check_rotate(k[..., 512:][:, :, None], g=torch.randn_like(k)[..., 512:][:, :, None])
    check_rotate(q[:, 1:4, :, :64], g=torch.randn_like(q)[:, 2:, :, 128:])  # some of the positions


def test_rotate_one_vector_to_every_position():
    check_rotate(
        randn(1, 1, 1, 8).expand(2, 7, 1, 8), g=torch.ones((), device=DEVICE).expand(2, 7, 1, 8)
    )


def test_the_gradient_turns_back():
    x, more = randn(2, 5, 3, 16), table(5, 8)
    y, back = results(norm.apply_rotary_emb, [x], norm.apply_rotary_emb(x, **more), **more)
    assert torch.allclose(back, x, atol=1e-6) and not torch.allclose(y, x, atol=0.1)


def test_rotate_nothing():
    y, dx = results(norm.apply_rotary_emb, [randn(2, 0, 3, 8)], randn(2, 0, 3, 8), **table(0, 4))
    assert y.shape == dx.shape == (2, 0, 3, 8)


# ── The seam, and refusals ──


def test_the_switch_reaches_the_kernels(monkeypatch):
    heard, x = [], randn(3, 8)
    for name in ("rms_norm", "swiglu", "apply_rotary_emb"):
        monkeypatch.setitem(ops.IMPLS[name], "triton", lambda *a, name=name: heard.append(name))
    with ops.use("triton", "torch"):
        ops.rms_norm(x, x[0], 1e-6)
        ops.swiglu(x, x)
        rope.apply_rotary_emb(x[None, :, None], x[:, :4], x[:, :4])
    assert heard == ["rms_norm", "swiglu", "apply_rotary_emb"]


def refused(words: str, fn, *args):
    with pytest.raises(ValueError, match=words):
        fn(*args)


def test_rms_norm_refuses():
    x, w = randn(4, 8), randn(8)
    refused("^x must be float32 or bfloat16, not float64", norm.rms_norm, x.double(), w, 1e-6)
    refused("^x must have a last stride of 1, not 4", norm.rms_norm, randn(8, 4).T, w, 1e-6)
    refused(
        "^x must have a last axis of at most 8192", norm.rms_norm, randn(1, 8193), randn(8193), 0
    )
    refused(r"^weight must have shape \(8\), not \(7,\)", norm.rms_norm, x, randn(7), 1e-6)
    refused("^weight must be float32 or bfloat16, not float16", norm.rms_norm, x, w.half(), 1e-6)


def test_swiglu_refuses():
    x = randn(4, 8)
    refused("^gate must be float32 or bfloat16, not float16", norm.swiglu, x.half(), x.half())
    refused("^up must be float32, not bfloat16", norm.swiglu, x, x.bfloat16())
    refused(r"^up must have shape \(4, 8\), not \(4, 7\)", norm.swiglu, x, x[:, :7])
    refused("^gate must have a last stride of 1", norm.swiglu, randn(8, 4).T, x)


def test_rotate_refuses():
    x, (cos, sin) = randn(1, 3, 2, 8), table(3, 4).values()
    refused("^x_bshr must have shape", norm.apply_rotary_emb, x[0], cos, sin)
    refused(
        "^x_bshr must have an even last axis, not 7", norm.apply_rotary_emb, x[..., :7], cos, sin
    )
    refused("^x_bshr must be float32 or bfloat16", norm.apply_rotary_emb, x.double(), cos, sin)
    refused(
        "^x_bshr must have a last stride of 1", norm.apply_rotary_emb, x.transpose(2, 3), cos, sin
    )
    refused("^cos must be float32, not bfloat16", norm.apply_rotary_emb, x, cos.bfloat16(), sin)
    refused(r"^cos must have shape \(3, 4\), not \(4, 3\)", norm.apply_rotary_emb, x, cos.T, sin)
    refused("^sin must be contiguous", norm.apply_rotary_emb, x, cos, sin.T.contiguous().T)


def test_a_layer_of_the_model_learns_the_same(micro):
    """The norm's module and an MLP, their parameters' gradients too."""
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
