"""The FP8 recipe against plain loops: tiles, blocks, promoted sums, layers and training."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref import fp8, ops
from dsv3_ref.config import TINY, ceil_div
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.mla import MLA
from dsv3_ref.model import Transformer
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.optim import AdamW, TrainingRecipe, build_adamw
from dsv3_ref.pretrain import compute_losses, train_step
from dsv3_ref.rope import Rope
from dsv3_ref.training.recompute import saved_tensors

SIZES = st.integers(1, 300)
COUNTS = st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129]), min_size=1, max_size=4)


def wide_range(*shape):
    """Draw numbers over many orders of magnitude, and zeros."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-12, 5, shape)
    return x * (torch.rand(shape) > 0.1)


def expected_scale(x, use_ue8m0: bool) -> torch.Tensor:
    s = x.abs().max().clamp(min=1e-30) / 448
    return (2.0 ** s.double().log2().ceil()).float() if use_ue8m0 else s


# ── Tiles and blocks ──


class Divisors(TorchDispatchMode):
    """The divisors of all divisions by a Python number."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.found += [x for x in args[1:2] if not isinstance(x, torch.Tensor)]
        return fn(*args, **(kwargs or {}))


def test_no_scale_is_divided_by_a_python_number():
    """CUDA multiplies by the reciprocal of such a number, which powers of two alone survive."""
    x, counts = wide_range(130, 130), torch.tensor([2, 128])
    with Divisors() as divisors, ops.use("torch"):
        for use_ue8m0 in (False, True):
            q = fp8.act_quant(x, use_ue8m0)
            fp8.weight_quant(x, use_ue8m0)
            fp8.act_quant_transposed(x, counts, use_ue8m0)
            fp8.requant_transposed(*q, counts, use_ue8m0)
            fp8.rms_norm_quant(x, x[0], 1e-6, None, use_ue8m0)
            fp8.swiglu_quant(x, x, use_ue8m0)
        fp8.swiglu_quant_backward(x, *q, *q, counts)
        fp8.e5m6_dequant(*fp8.e5m6_quant(x), 130)
        assert (x / 3).shape == x.shape
    assert divisors.found == [3]


@pytest.mark.parametrize("use_ue8m0", [False, True])
@given(n=st.integers(1, 4), k=SIZES)
def test_tiles_are_quantized_one_by_one(use_ue8m0, n, k):
    x = wide_range(n, k)
    q, s = fp8.act_quant(x, use_ue8m0)
    assert q.shape == x.shape
    assert s.shape == (n, ceil_div(k, 128))
    for row, col in product(range(n), range(s.shape[1])):
        tile = x[row, 128 * col : 128 * col + 128]
        assert s[row, col] == expected_scale(tile, use_ue8m0)
        want = (tile / s[row, col]).clamp(-448, 448).to(fp8.E4M3)
        assert torch.equal(q[row, 128 * col : 128 * col + 128].float(), want.float())


@pytest.mark.parametrize("use_ue8m0", [False, True])
@given(o=SIZES, i=SIZES)
def test_blocks_are_quantized_one_by_one(use_ue8m0, o, i):
    w = wide_range(2, o, i)
    q, s = fp8.weight_quant(w, use_ue8m0)
    assert s.shape == (2, ceil_div(o, 128), ceil_div(i, 128))
    for y, z in product(range(s.shape[1]), range(s.shape[2])):
        block = slice(128 * y, 128 * y + 128), slice(128 * z, 128 * z + 128)
        assert s[1, y, z] == expected_scale(w[1][block], use_ue8m0)
        want = (w[1][block] / s[1, y, z]).to(fp8.E4M3).float() * s[1, y, z]
        assert torch.equal(fp8.weight_dequant(q, s)[1][block], want)


def test_the_transpose_of_a_quantized_weight_is_the_quantized_transpose():
    w = torch.randn(300, 200)
    q, s = fp8.weight_quant(w)
    q_of_transpose, s_of_transpose = fp8.weight_quant(w.T)
    assert torch.equal(q_of_transpose.float(), q.T.float())
    assert torch.equal(s_of_transpose, s.T)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e30, 3e38])
def test_extremes_stay_finite(value):
    x = torch.full((1, 128), value)
    q, s = fp8.act_quant(x)
    assert q.float().isfinite().all()
    assert s.isfinite().all()
    if value >= 1e-30:
        assert torch.allclose(fp8.act_dequant(q, s), x, rtol=0.04)


def test_scales_of_a_wrong_shape_raise():
    q, s = fp8.weight_quant(torch.randn(576, 128))
    message = r"a weight of 576×128 needs scales \(5, 1\), not \(4, 1\)"
    with pytest.raises(ValueError, match=message):
        fp8.weight_dequant(q, s[:4])


def test_the_bounds_of_scales_and_values():
    scale = fp8.amax_to_scale(torch.tensor([0.0, 1e-31, 1e-30, 448.0]), False)
    assert torch.equal(scale, torch.tensor([1e-30, 1e-30, 1e-30, 448.0]) / 448)
    ue8m0 = fp8.amax_to_scale(torch.tensor([448.0, 449.0, 896.0]), True)
    assert ue8m0.tolist() == [1.0, 2.0, 2.0]
    q = fp8.quantize(torch.tensor([1000.0, -1000.0, 447.0, 3.0]), torch.tensor(2.0))
    assert q.float().tolist() == [448.0, -448.0, 224.0, 1.5]
    assert fp8.quantize(torch.tensor([1e4, -1e4]), torch.tensor(1.0)).float().abs().max() == 448


# ── Along the tokens ──


def quantize_expert_by_expert(x_mk, tokens_per_expert_e, use_ue8m0=False):
    """Compute `act_quant_transposed` by a loop over experts and their tiles."""
    parts, scales = [], []
    for rows in x_mk.split(tokens_per_expert_e.tolist()):
        for tile in rows.split(128) if len(rows) else ():
            q, s = fp8.act_quant(tile.T.contiguous(), use_ue8m0)
            parts.append(torch.nn.functional.pad(q.float(), (0, 128 - len(tile))))
            scales.append(s)
    return torch.cat(parts, 1), torch.cat(scales, 1)


@pytest.mark.parametrize("use_ue8m0", [False, True])
@given(counts=COUNTS.filter(sum), k=st.integers(1, 40))
def test_columns_are_quantized_expert_by_expert(use_ue8m0, counts, k):
    tokens_per_expert_e = torch.tensor(counts)
    x = wide_range(sum(counts), k)
    q, s = fp8.act_quant_transposed(x, tokens_per_expert_e, use_ue8m0)
    want, want_s = quantize_expert_by_expert(x, tokens_per_expert_e, use_ue8m0)
    used = want_s.shape[1]
    assert s.shape[1] == sum(counts) // 128 + len(counts)
    assert torch.equal(q.float()[:, : 128 * used], want)
    assert torch.equal(s[:, :used], want_s)
    assert (q.float()[:, 128 * used :] == 0).all()
    assert (s[:, used:] == 1).all()


def test_requantization_with_powers_of_two_rounds_only_what_underflows():
    x = torch.randn(200, 130)
    for use_ue8m0, least, most in ((True, 0.0, 1e-6), (False, 0.01, 0.04)):
        quantized = fp8.act_quant(x, use_ue8m0)
        once = fp8.act_dequant(*quantized)
        requantized = fp8.requant_transposed(*quantized, None, use_ue8m0)
        twice = fp8.act_dequant(*requantized)[:, :200].T
        assert least <= (twice - once).norm() / x.norm() <= most


@given(k=SIZES)
def test_twelve_bits_round_trip(k):
    x = wide_range(3, k)
    packed, s = fp8.e5m6_quant(x)
    assert packed.shape == (3, ceil_div(k, 128), 192)
    assert packed.dtype == torch.uint8
    back = fp8.e5m6_dequant(packed, s, k)
    unit = s.repeat_interleave(128, 1)[:, :k]
    assert ((back - x).abs() <= torch.maximum(x.abs() * 2**-7, unit * 2**-21)).all()
    assert torch.equal(s, 2 ** s.log2().round())


def test_twelve_bits_round_to_the_nearest_number():
    """E5M6 is fp16 without four bits of its mantissa; check every number, tie and both ends."""
    half = torch.arange(0, 31 * 1024, 16, dtype=torch.int16).view(torch.float16).float()
    assert half.max() == fp8.E5M6_MAX == 65_024
    assert torch.equal(fp8.round_e5m6(half), half)
    assert torch.equal(fp8.round_e5m6(-half), -half)
    tie = (half[:-1] + half[1:]) / 2
    even = torch.where(torch.arange(len(tie)) % 2 == 1, half[1:], half[:-1])
    assert torch.equal(fp8.round_e5m6(tie), even)
    assert torch.equal(fp8.round_e5m6(tie * (1 + 2**-20)), half[1:])
    assert fp8.round_e5m6(torch.tensor([1e9, -1e9])).tolist() == [65_024, -65_024]


def test_twelve_bits_use_their_whole_range():
    x = torch.zeros(3, 128)
    x[:, 7] = torch.tensor([65_024.0, 65_025.0, 3.0])
    packed, s = fp8.e5m6_quant(x)
    assert s[:, 0].tolist() == [1.0, 2.0, 2.0**-14]
    back = fp8.e5m6_dequant(packed, s, 128)
    assert back[0, 7] == 65_024 and back[2, 7] == 3 and back.count_nonzero() == 3


# ── Products ──


@given(m=st.integers(0, 20), n=SIZES, k=SIZES)
def test_a_product_is_that_of_the_dequantized_matrices(m, n, k):
    a, b = torch.randn(m, k), torch.randn(n, k)
    qa, sa = fp8.act_quant(a)
    wide = fp8.act_dequant(qa, sa).double()
    for q, s, dequant in (
        (*fp8.weight_quant(b), fp8.weight_dequant),
        (*fp8.act_quant(b), fp8.act_dequant),
    ):
        other = dequant(q, s).double()
        got, want = fp8.fp8_gemm(qa, sa, q, s), wide @ other.T
        assert got.dtype == torch.float32  # terms may cancel, so the bound is relative to them
        assert (got - want).norm() <= 1e-6 * (wide.abs() @ other.abs().T).norm()


@given(counts=COUNTS, n=st.integers(1, 140), k=st.integers(1, 140))
def test_a_grouped_product_is_one_product_per_expert(counts, n, k):
    tokens_per_expert_e, m = torch.tensor(counts), sum(counts)
    x, g = torch.randn(m, k), torch.randn(m, n)
    w = torch.randn(len(counts), n, k)
    a, b = fp8.act_quant(x), fp8.weight_quant(w)
    y = fp8.fp8_grouped_gemm(*a, *b, tokens_per_expert_e)
    dw = fp8.fp8_grouped_wgrad(
        *fp8.act_quant_transposed(g, tokens_per_expert_e),
        *fp8.act_quant_transposed(x, tokens_per_expert_e),
        tokens_per_expert_e,
    )
    start = 0
    for e, rows in enumerate(counts):
        part = slice(start, start + rows)
        want = fp8.act_dequant(a[0][part], a[1][part]) @ fp8.weight_dequant(b[0][e], b[1][e]).T
        assert torch.allclose(y[part], want, rtol=1e-4, atol=1e-4)
        alone = [fp8.act_dequant(*fp8.act_quant_transposed(t[part]))[:, :rows] for t in (g, x)]
        assert torch.allclose(dw[e], alone[0] @ alone[1].T, rtol=1e-3, atol=1e-3)
        start += rows


@given(counts=COUNTS, extra=st.integers(1, 200))
def test_rows_after_the_last_experts_are_left_out(counts, extra):
    counts_e = torch.tensor(counts)
    n, k = 24, 40
    x = torch.randn(sum(counts) + extra, k)
    b, full = fp8.weight_quant(torch.randn(len(counts), n, k)), fp8.act_quant(x)
    rows = [t[: sum(counts)] for t in full]
    y = fp8.fp8_grouped_gemm(*full, *b, counts_e)
    assert torch.equal(y[: sum(counts)], fp8.fp8_grouped_gemm(*rows, *b, counts_e))
    assert len(y) == len(x) and not y[sum(counts) :].any()
    q, s = fp8.act_quant_transposed(x, counts_e)
    want_q, want_s = fp8.act_quant_transposed(x[: sum(counts)], counts_e)
    end = want_s.shape[1]
    assert torch.equal(q[:, : end * 128].float(), want_q.float())
    assert torch.equal(s[:, :end], want_s)
    assert not q[:, end * 128 :].float().any() and (s[:, end:] == 1).all()


@pytest.mark.parametrize("saved_input_format", ["e4m3", "e5m6"])
def test_a_batch_without_rows(saved_input_format):
    x = torch.randn(0, 16, 40, requires_grad=True)
    w1, w3, w2 = (torch.randn(*shape, requires_grad=True) for shape in [(24, 40)] * 2 + [(40, 24)])
    with ops.use("fp8", "torch"):
        gate, up = (ops.linear(x, w, saved_input_format) for w in (w1, w3))
        y = ops.swiglu_linear(gate, up, w2)
        y.sum().backward()
    assert y.shape == x.grad.shape == (0, 16, 40)
    assert not any(w.grad.any() for w in (w1, w2, w3))


def wgrad_operands(n: int, k: int, tokens_per_expert_e=None) -> list:
    """Draw 9 rows of gradients and inputs, in tiles along the rows."""
    operands = []
    for width in (n, k):
        operands += fp8.act_quant_transposed(torch.randn(9, width), tokens_per_expert_e)
    return operands


def test_a_weight_gradient_adds_to_a_tensor_in_place():
    counts_e = torch.tensor([4, 0, 5])
    for wgrad, *more in ((fp8.fp8_gemm,), (fp8.fp8_grouped_wgrad, counts_e)):
        args = *wgrad_operands(6, 10, *more), *more
        want = wgrad(*args)
        start = torch.randn_like(want)
        out = start.clone()
        assert wgrad(*args, out=out) is out and torch.equal(out, start + want)


@pytest.mark.parametrize("tokens_per_expert_e", [None, torch.tensor([4, 0, 5])], ids=str)
def test_a_weight_in_fp8_is_used_as_it_is(tokens_per_expert_e, monkeypatch):
    """Results are those of the wide weight, which is quantized first; the gradient is in fp32."""
    shape = (3, 40, 24) if tokens_per_expert_e is not None else (40, 24)
    wide = torch.randn(shape, requires_grad=True)
    q, s = fp8.weight_quant(wide.detach())
    narrow = torch.nn.Parameter(q)
    narrow.scale, narrow.main_grad = s, torch.ones(shape)
    x, g = torch.randn(9, 24, requires_grad=True), torch.randn(9, 40)
    more = () if tokens_per_expert_e is None else (tokens_per_expert_e,)
    name = "grouped_linear" if more else "linear"
    want_y = ops.IMPLS[name]["fp8"](x, wide, *more)
    want = torch.autograd.grad(want_y, (x, wide), g)
    monkeypatch.setattr(fp8, "weight_quant", None)  # not called
    y = ops.IMPLS[name]["fp8"](x, narrow, *more)
    y.backward(g)
    assert torch.equal(y, want_y) and torch.equal(x.grad, want[0])
    assert torch.equal(narrow.main_grad, 1 + want[1]) and narrow.grad is None


# ── The recipe as a backend ──


def run_both(layer, *inputs):
    """Return output and gradients in high precision and in FP8."""
    results = []
    for backends in (("auto",), ("fp8", "auto")):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with ops.use(*backends):
            y = layer(*leaves)
            grads = torch.autograd.grad(y, [*leaves, *layer.parameters()], torch.cos(y.detach()))
        results.append([y, *grads])
    return results


@pytest.mark.parametrize("saved_input_format", ["e4m3", "e5m6"])
@pytest.mark.parametrize("shape", [(1,), (2, 70), (129,)])
def test_a_layer_in_fp8_is_close_but_not_equal(saved_input_format, shape):
    layer = ops.Linear(576, 200, saved_input_format)
    torch.nn.init.normal_(layer.weight, std=576**-0.5)
    for wide, narrow in zip(*run_both(layer, torch.randn(*shape, 576))):
        assert narrow.shape == wide.shape
        assert narrow.dtype == torch.float32
        assert 1e-3 < (narrow - wide).norm() / wide.norm() < 0.08


def test_dgrad_and_wgrad_are_their_equations():
    layer, g = ops.Linear(200, 130), torch.randn(70, 130)
    x = torch.randn(70, 200, requires_grad=True)
    torch.nn.init.normal_(layer.weight)
    with ops.use("fp8", "auto"):
        dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), g)
    w = fp8.weight_dequant(*fp8.weight_quant(layer.weight.detach()))
    assert torch.allclose(dx, fp8.act_dequant(*fp8.act_quant(g)) @ w, rtol=1e-4, atol=1e-3)
    saved = fp8.act_quant(x.detach())
    g_mo = dequantize_rows(fp8.act_quant_transposed(g))
    want = g_mo.T @ dequantize_rows(fp8.requant_transposed(*saved))
    assert torch.allclose(dw, want, rtol=1e-4, atol=1e-3)


def dequantize_rows(transposed) -> torch.Tensor:
    """Return the first 70 rows of a matrix quantized by `act_quant_transposed`."""
    return fp8.act_dequant(*transposed)[:, :70].T


def test_wgrad_reads_the_input_saved_in_twelve_bits():
    layer, g = ops.Linear(200, 130, "e5m6"), torch.randn(70, 130)
    x = torch.randn(70, 200, requires_grad=True)
    torch.nn.init.normal_(layer.weight)
    with ops.use("fp8", "torch"), saved_tensors(False) as saved:
        y = layer(x)
        saved_bytes = saved.bytes
        dw = torch.autograd.grad(y, layer.weight, g)[0]
    wide_x = fp8.act_dequant(*fp8.act_quant(x.detach(), True))  # Fprop reads E4M3
    w = fp8.weight_dequant(*fp8.weight_quant(layer.weight.detach()))
    assert torch.allclose(y, wide_x @ w.T, rtol=1e-4, atol=1e-3)
    weight_bytes = sum(t.nbytes for t in fp8.weight_quant(layer.weight.detach()))
    assert saved_bytes == 70 * 2 * (192 + 4) + weight_bytes
    saved_x = fp8.e5m6_dequant(*fp8.e5m6_quant(x.detach()), 200)
    g_mo = dequantize_rows(fp8.act_quant_transposed(g))
    want = g_mo.T @ dequantize_rows(fp8.act_quant_transposed(saved_x, None, True))
    assert torch.allclose(dw, want, rtol=1e-4, atol=1e-3)
    other = g_mo.T @ dequantize_rows(fp8.act_quant_transposed(saved_x))
    assert not torch.allclose(dw, other, rtol=1e-4, atol=1e-3)  # scales are powers of two


def test_swiglu_backward_reads_the_saved_inputs():
    gate, up, g = torch.randn(3, 5, 200)
    gate_q, up_q = fp8.act_quant(gate), fp8.act_quant(up)
    dgate, dup, q, s, none = fp8.swiglu_quant_backward(g, *gate_q, *up_q)
    assert none is None
    wide_gate, wide_up = fp8.act_dequant(*gate_q), fp8.act_dequant(*up_q)
    sigma = wide_gate.sigmoid()
    h = wide_gate * sigma
    assert torch.allclose(dup, g * h, atol=1e-5)
    assert torch.allclose(dgate, g * wide_up * (sigma + h * (1 - sigma)), atol=1e-5)
    want_q, want_s = fp8.act_quant_transposed(h * wide_up)
    assert torch.allclose(s, want_s, rtol=1e-5)
    assert (q.float() != want_q.float()).float().mean() < 0.01


def test_swiglu_saves_its_inputs_in_fp8():
    mlp = ops.MLP(256, 512)
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.05)
    for wide, narrow in zip(*run_both(mlp, torch.randn(40, 256))):
        assert 1e-3 < (narrow - wide).norm() / wide.norm() < 0.12
    saved_bytes = {}
    for name in ("auto", "fp8"):
        x = torch.randn(40, 256, requires_grad=True)
        with ops.use(*dict.fromkeys((name, "auto"))), saved_tensors(False) as saved:
            y = mlp(x)
        saved_bytes[name] = saved.bytes
        del y
    quantized_bytes = 40 * (256 + 2 * 512) * (1 + 4 / 128)  # x, gate and up, with scales
    weight_bytes = 0
    for p in mlp.parameters():
        weight_bytes += sum(t.nbytes for t in fp8.weight_quant(p))
    assert saved_bytes["fp8"] == quantized_bytes + weight_bytes
    assert saved_bytes["auto"] > 3 * quantized_bytes


def weight_bytes(module) -> int:
    """Return the bytes of the weights' values and scales in FP8."""
    quantized = [fp8.weight_quant(p.detach()) for p in module.parameters()]
    return sum(q.nbytes + s.nbytes for q, s in quantized)


def test_what_a_norm_and_an_mlp_recompute_is_not_saved():
    norm, mlp = ops.RMSNorm(256, 1e-6), ops.MLP(256, 512)
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(40, 256, requires_grad=True)
    grads = []
    for recompute in (False, True):
        with ops.use("fp8", "auto"), saved_tensors(recompute, [norm.weight]) as saved:
            y = mlp(norm(x))
            saved_bytes = saved.bytes - weight_bytes(mlp)
            grads.append(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]))
    assert saved_bytes == 40 * (4 * 256 + 4)  # the input of the norm and 1/ρ
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_experts_save_arrived_rows_once_and_weigh_them_from_eight_bits():
    experts = GroupedExperts(4, 256, 128)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.06)
    x, weight_nk = torch.randn(30, 256), torch.rand(30, 3, requires_grad=True)
    expert_nk = torch.rand(30, 4).argsort(1)[:, :3].int()
    expert_nk[::5, 0] = -1  # elsewhere
    m = int((expert_nk >= 0).sum())
    q, s = fp8.act_quant(x)
    wide = apply_local_experts(experts, fp8.act_dequant(q, s), weight_nk, expert_nk)
    (want,) = torch.autograd.grad(wide.square().sum() / 2, weight_nk)
    with ops.use("fp8", "auto"), saved_tensors(True) as saved:
        y = apply_local_experts(experts, fp8.act_dequant(q, s), weight_nk, expert_nk, (q, s))
        saved_bytes = saved.bytes - weight_bytes(experts)
        (got,) = torch.autograd.grad(y, weight_nk, wide.detach())
    gate_and_up = 2 * (128 + 4)  # and no `up` in a wider format
    assert saved_bytes == 30 * (256 + 8) + m * (gate_and_up + 4 + 8 + 8)
    assert (got - want).norm() < 0.06 * want.norm()
    assert (got[expert_nk < 0] == 0).all()


class SavesOutput(torch.autograd.Function):
    """Attention that saves its output, as kernels do, and keeps what its backward pass read."""

    @staticmethod
    def forward(ctx, scale, read, *qkv):
        ctx.scale, ctx.read = scale, read
        o = ops.IMPLS["attention"]["torch"](*qkv, scale).contiguous()
        ctx.save_for_backward(*qkv, o)
        read.append(o.clone())
        return o

    @staticmethod
    def backward(ctx, g):
        *qkv, o = ctx.saved_tensors
        ctx.read.append(o)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in qkv]
            y = ops.IMPLS["attention"]["torch"](*leaves, ctx.scale)
        return None, None, *torch.autograd.grad(y, leaves, g)


def test_attention_reads_its_output_in_twelve_bits(micro):
    config = mini_config(micro)
    layer, read = MLA(config), []
    for p in layer.parameters():
        torch.nn.init.normal_(p, float(p.ndim == 1), 0.2)
    ops.impl("attention", "saves_output")(
        lambda q, k, v, scale: SavesOutput.apply(scale, read, q, k, v)
    )
    rope = Rope.from_positions(config, torch.arange(20))
    x = torch.randn(2, 20, config.dim, requires_grad=True)
    saved_bytes = []
    for recompute in (False, True):
        with ops.use("saves_output", "fp8", "auto"), saved_tensors(recompute) as saved:
            y = layer(x, rope)
            saved_bytes.append(saved.bytes)
            y.square().sum().backward()
    _, kept, o, restored = read
    assert torch.equal(kept, o)  # without recomputation both forms are saved
    want = fp8.e5m6_restore(*fp8.e5m6_quant(o.flatten(2)), o.flatten(2).shape[-1], o.dtype)
    assert torch.equal(restored.flatten(2), want)
    assert 0 < (restored - o).abs().max() <= 2**-7 * o.abs().max()
    assert saved_bytes[0] - saved_bytes[1] > o.nbytes
    del ops.IMPLS["attention"]["saves_output"]


def test_a_modified_tensor_is_quantized_again():
    x = torch.randn(4, 128)
    first = fp8.quantize_cached(x)
    assert fp8.quantize_cached(x)[0] is first[0]
    x += 1
    assert torch.equal(fp8.quantize_cached(x)[0].float(), fp8.act_quant(x)[0].float())


def test_pending_forward_passes_share_a_quantized_weight(monkeypatch):
    """A weight is quantized again after a step, and when no forward pass awaits its backward."""
    weights, quant = [], fp8.weight_quant
    monkeypatch.setattr(fp8, "weight_quant", lambda w: weights.append(w) or quant(w))
    layer, x = ops.Linear(256, 128), torch.randn(8, 256)
    torch.nn.init.normal_(layer.weight)
    optimizer = AdamW([{"params": [layer.weight], "weight_decay": 0.0}], 0.1, (0.9, 0.95))
    with ops.use("fp8", "auto"):
        first, second = layer(x).sum(), layer(x).sum()
        assert len(weights) == 1
        first.backward()
        optimizer.step()  # while the second is pending
        third = layer(x).sum()
        assert len(weights) == 2 and third != second
        second.backward()
        third.backward()
        del first, second, third
        layer(x)
        assert len(weights) == 3


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_linear_layers_read_the_quantized_output_of_the_norm(autocast, monkeypatch):
    norm = ops.RMSNorm(128, 1e-6)
    w1, w3 = ops.Linear(128, 64), ops.Linear(128, 64)
    for w in (w1.weight, w3.weight):
        torch.nn.init.normal_(w)
    x = torch.randn(2, 5, 128)
    quantized, quant = [], fp8.IMPLS["act_quant"]["torch"]

    def record(x, *args):
        quantized.append(x)
        return quant(x, *args)

    monkeypatch.setitem(fp8.IMPLS["act_quant"], "torch", record)
    with ops.use("fp8", "auto"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
        w1(y)
        w3(y)
    (only,) = quantized  # once for both layers
    assert y.dtype == only.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(only, y)


def mini_config(micro):
    return replace(micro, dim=64, inter_dim=72, moe_inter_dim=32, q_lora_rank=32, kv_lora_rank=40)


def test_training_uses_the_weights_of_the_last_step(micro):
    """Fused optimizers modify weights without incrementing their version."""
    model, recipe = Transformer(mini_config(micro)), TrainingRecipe()
    optimizer, tokens_bs = build_adamw(model, recipe), torch.randint(micro.vocab_size, (3, 9))
    with ops.use("fp8", "auto"):
        for _ in range(3):
            train_step(model, optimizer, [tokens_bs], recipe, 1e-2, 0.1, 0.3)
            with torch.no_grad():
                loss = compute_losses(model, tokens_bs).main
                uncached_loss = compute_losses(deepcopy(model), tokens_bs).main
            assert loss == uncached_loss


def test_recomputation_changes_no_bit_in_fp8_either(micro):
    start, tokens_bs = Transformer(mini_config(micro)), torch.randint(micro.vocab_size, (3, 9))
    gradients = []
    for recompute in (False, True):
        model = deepcopy(start)
        with ops.use("fp8", "auto"), saved_tensors(recompute):
            compute_losses(model, tokens_bs).total(0.3, 1e-4).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_thirty_steps_in_fp8_follow_those_in_fp32():
    config = replace(
        TINY, vocab_size=64, n_layers=2, dim=64, inter_dim=128, moe_inter_dim=32, n_mtp_layers=0,
        n_routed_experts=4, n_activated_experts=2, n_expert_groups=2, n_limited_groups=1,
    )  # fmt: skip
    start, recipe = Transformer(config), TrainingRecipe()
    curves = []
    text = torch.arange(4000) ** 2 % 61  # squares, which can be learned
    for backends in (("auto",), ("fp8", "auto")):
        model = deepcopy(start)
        optimizer, seed = build_adamw(model, recipe), torch.Generator().manual_seed(0)
        curve = []
        for _ in range(30):
            starts = torch.randint(3900, (4,), generator=seed)
            rows = torch.stack([text[i : i + 65] for i in starts])
            with ops.use(*backends):
                curve.append(train_step(model, optimizer, [rows], recipe, 3e-3, 1e-2, 0.3).loss)
        curves.append(torch.tensor(curve))
    wide, narrow = curves
    assert wide[-5:].mean() < 0.8 * wide[:5].mean()  # the model learns
    assert not torch.equal(wide, narrow)
    assert ((narrow - wide).abs() / wide).mean() < 0.02
