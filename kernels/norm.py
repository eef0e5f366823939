"""Memory-bound kernels between the matrix products: RMSNorm, SwiGLU and RoPE."""

from typing import Any

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    AOTCase,
    Grid,
    as_rows,
    autotune_bucket,
    check_tensor,
    dtype_name,
    kernel_config,
    num_sms,
    on_its_device,
)  # fmt: skip
from torch import Tensor
from torch.autograd.function import once_differentiable

import dsv3_ref.rope  # noqa: F401  defines the op `apply_rotary_emb`
from dsv3_ref.ops import impl

MAX_ROW_SIZE = 8192  # a row is held in registers: 32 numbers per thread of 8 warps


# ── RMSNorm ──


@triton.jit
def tile_ptrs(ptr, row, col, n, d, stride):
    """Return the pointers ptr + row·stride + col of a block of rows and their mask."""
    offset = row.to(tl.int64)[:, None] * stride + col[None, :]
    return ptr + offset, (row < n)[:, None] & (col < d)[None, :]


@triton.autotune(
    [  # TILE: numbers per tile; STAGES: tiles in flight, by cp.async if over 1; PER_SM: programs
        kernel_config(8, TILE=8192, STAGES=1, PER_SM=8),
        kernel_config(4, TILE=4096, STAGES=1, PER_SM=16),
        kernel_config(8, TILE=8192, STAGES=2, PER_SM=4),
        kernel_config(16, TILE=8192, STAGES=3, PER_SM=2),
    ],
    key=["d", "bucket"],
)
@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, n, d, stride, eps, bucket,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """Normalize rows in registers, as is the weight: y = x / √(mean(x²) + ε) · weight."""
    BLOCK_N: tl.constexpr = TILE // BLOCK_D if TILE > BLOCK_D else 1
    col = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + col, mask=col < d, other=0).to(tl.float32)
    step = tl.num_programs(0)
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK_N), step, num_stages=STAGES):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs, mask = tile_ptrs(x_ptr, row, col, n, d, stride)
        x = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)
        y = x * rstd[:, None] * weight[None, :]
        tl.store(rstd_ptr + row, rstd, mask=row < n)
        ptrs, mask = tile_ptrs(y_ptr, row, col, n, d, d)
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.autotune(
    [
        kernel_config(16, TILE=8192, STAGES=2),
        kernel_config(16, TILE=8192, STAGES=3),
        kernel_config(8, TILE=8192, STAGES=3),
        kernel_config(8, TILE=4096, STAGES=2),
    ],
    key=["d", "bucket"],
)
@triton.jit
def _rms_norm_backward_kernel(
    g_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n, d, g_stride, x_stride, bucket,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx = (a − u·mean(a·u))/ρ with u = x/ρ, a = g·weight, and Σ_n g·u over its rows."""
    BLOCK_N: tl.constexpr = TILE // BLOCK_D if TILE > BLOCK_D else 1
    col = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + col, mask=col < d, other=0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    step = tl.num_programs(0)
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK_N), step, num_stages=STAGES):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs, mask = tile_ptrs(x_ptr, row, col, n, d, x_stride)
        x = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
        ptrs, mask = tile_ptrs(g_ptr, row, col, n, d, g_stride)
        g = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < n, other=0)[:, None]
        unit = x * rstd
        dweight += g * unit
        a = g * weight[None, :]
        along = tl.sum(a * unit, axis=1)[:, None] / d
        ptrs, mask = tile_ptrs(dx_ptr, row, col, n, d, d)
        dx = (a - unit * along) * rstd
        tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * d + col, tl.sum(dweight, axis=0), mask=col < d)


class TritonRMSNorm(torch.autograd.Function):
    """RMSNorm that saves x and 1/ρ; the rows of x may be slices of wider ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_nd = as_rows(x)
        n, d = x_nd.shape
        y, rstd_n = x.new_empty(x.shape, dtype=dtype), x.new_empty(n, dtype=FP32)
        sms, block_d = num_sms(x), triton.next_power_of_2(d)

        def grid(meta: dict[str, int]) -> tuple[int, ...]:
            rows = max(meta["TILE"] // block_d, 1)
            return (min(triton.cdiv(n, rows), sms * meta["PER_SM"]),)

        args = x_nd, weight, y, rstd_n, n, d, x_nd.stride(0), eps, autotune_bucket(n)
        _rms_norm_kernel[grid](*args, BLOCK_D=block_d)
        ctx.save_for_backward(x, weight, rstd_n)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *rms_norm_backward(g, *ctx.saved_tensors), None, None


def rms_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, rstd_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ∂L/∂x and ∂L/∂weight from the gradient g of y and from 1/ρ of every row."""
    g_nd, x_nd = as_rows(g), as_rows(x)
    n, d = x_nd.shape
    dx, sms = x.new_empty(x.shape), num_sms(x)  # registers allow one program per SM
    partial_xd = x.new_empty(sms, d, dtype=FP32)
    strides = g_nd.stride(0), x_nd.stride(0)
    args = g_nd, x_nd, weight, rstd_n, dx, partial_xd, n, d, *strides, autotune_bucket(n)
    _rms_norm_backward_kernel[sms,](*args, BLOCK_D=triton.next_power_of_2(d))
    return dx, partial_xd.sum(0).to(weight.dtype)


def check_norm_inputs(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> None:
    """Raise a `ValueError` for arguments that the kernels of RMSNorm do not accept."""
    check_tensor("x", x, dtypes=FLOATS, contiguous=False)
    check_tensor("weight", weight, (x.shape[-1],), FLOATS)
    if x.shape[-1] > MAX_ROW_SIZE:
        raise ValueError(f"x must have a last axis of at most {MAX_ROW_SIZE}, not {x.shape[-1]}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype_name(dtype)}")


@impl("rms_norm", "triton")
@on_its_device
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Divide by the root mean square of the last axis: y = x / √(mean(x²) + ε) · weight."""
    check_norm_inputs(x, weight, dtype)
    return TritonRMSNorm.apply(x, weight, eps, dtype or x.dtype)


# ── SwiGLU ──


SWIGLU_CONFIGS = [
    kernel_config(4, TILE=1024),
    kernel_config(4, TILE=2048),
    kernel_config(8, TILE=4096),
]


@triton.jit
def swiglu_tile(n, f, BLOCK_F: tl.constexpr, TILE: tl.constexpr):
    """Return the rows and columns of a program's tile; programs follow columns, then rows."""
    WIDE: tl.constexpr = BLOCK_F if BLOCK_F < TILE else TILE
    across = tl.cdiv(f, WIDE)
    pid = tl.program_id(0)
    row = pid // across * (TILE // WIDE) + tl.arange(0, TILE // WIDE)
    return row, pid % across * WIDE + tl.arange(0, WIDE)


@triton.autotune(SWIGLU_CONFIGS, key=["f", "bucket"])
@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, n, f, gate_stride, up_stride, bucket,
    BLOCK_F: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute y = gate · σ(gate) · up."""
    row, col = swiglu_tile(n, f, BLOCK_F, TILE)
    ptrs, mask = tile_ptrs(gate_ptr, row, col, n, f, gate_stride)
    gate = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    ptrs, mask = tile_ptrs(up_ptr, row, col, n, f, up_stride)
    up = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    ptrs, mask = tile_ptrs(y_ptr, row, col, n, f, f)
    tl.store(ptrs, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.autotune(SWIGLU_CONFIGS, key=["f", "bucket"])
@triton.jit
def _swiglu_backward_kernel(
    g_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, f, g_stride, gate_stride, up_stride, bucket,
    BLOCK_F: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute dup = g · h and dgate = g · up · (σ + h · (1 − σ)), with h = gate · σ."""
    row, col = swiglu_tile(n, f, BLOCK_F, TILE)
    ptrs, mask = tile_ptrs(g_ptr, row, col, n, f, g_stride)
    g = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    ptrs, mask = tile_ptrs(gate_ptr, row, col, n, f, gate_stride)
    gate = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    ptrs, mask = tile_ptrs(up_ptr, row, col, n, f, up_stride)
    up = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    h = gate * sigma
    dgate, dup = g * up * (sigma + h * (1 - sigma)), g * h
    ptrs, mask = tile_ptrs(dgate_ptr, row, col, n, f, f)
    tl.store(ptrs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    ptrs, mask = tile_ptrs(dup_ptr, row, col, n, f, f)
    tl.store(ptrs, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def swiglu_grid(n: int, f: int) -> Grid:
    """Return the grid that `swiglu_tile` expects."""

    def grid(meta: dict[str, int]) -> tuple[int, ...]:
        width = min(triton.next_power_of_2(f), meta["TILE"])
        return (triton.cdiv(n, meta["TILE"] // width) * triton.cdiv(f, width),)

    return grid


class TritonSwiGLU(torch.autograd.Function):
    """SwiGLU that saves only its two inputs (§3.2.3)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate_nf, up_nf = as_rows(gate), as_rows(up)
        n, f = gate_nf.shape
        y = gate.new_empty(gate.shape)
        args = gate_nf, up_nf, y, n, f, gate_nf.stride(0), up_nf.stride(0), autotune_bucket(n)
        _swiglu_kernel[swiglu_grid(n, f)](*args, BLOCK_F=triton.next_power_of_2(f))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        g_nf, gate_nf, up_nf = map(as_rows, (g, gate, up))
        n, f = gate_nf.shape
        dgate, dup = (x.new_empty(x.shape) for x in (gate, up))
        strides = g_nf.stride(0), gate_nf.stride(0), up_nf.stride(0)
        args = g_nf, gate_nf, up_nf, dgate, dup, n, f, *strides, autotune_bucket(n)
        _swiglu_backward_kernel[swiglu_grid(n, f)](*args, BLOCK_F=triton.next_power_of_2(f))
        return dgate, dup


@impl("swiglu", "triton")
@on_its_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute SwiGLU, y = gate · σ(gate) · up."""
    check_tensor("gate", gate, dtypes=FLOATS, contiguous=False)
    check_tensor("up", up, gate.shape, (gate.dtype,), contiguous=False)
    return TritonSwiGLU.apply(gate, up)


# ── RoPE ──


@triton.autotune(
    [kernel_config(4, TILE=32), kernel_config(4, TILE=64), kernel_config(8, TILE=128)],
    key=["h", "r", "bucket"],
)
@triton.jit
def _apply_rotary_emb_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, s, h, r, stride_b, stride_s, stride_h, bucket,
    INVERSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate interleaved pairs, (x₀cos − x₁sin, x₀sin + x₁cos); INVERSE: by the negative angle.

    TILE: (position, head) rows per program.
    """
    HEADS: tl.constexpr = BLOCK_H if BLOCK_H < TILE else TILE
    SPAN: tl.constexpr = TILE // HEADS
    heads, spans = tl.cdiv(h, HEADS), tl.cdiv(s, SPAN)
    pid = tl.program_id(0)
    head = pid % heads * HEADS + tl.arange(0, HEADS)
    pos = pid // heads % spans * SPAN + tl.arange(0, SPAN)
    batch = (pid // heads // spans).to(tl.int64)
    col, pair = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R // 2)

    offset = batch * stride_b + pos.to(tl.int64)[:, None, None] * stride_s
    offset += head[None, :, None] * stride_h + col[None, None, :]
    mask = (pos < s)[:, None, None] & (head < h)[None, :, None] & (col < r)[None, None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0).to(tl.float32)
    x0, x1 = tl.split(x.reshape(SPAN, HEADS, BLOCK_R // 2, 2))
    ptrs, angle_mask = tile_ptrs(cos_ptr, pos, pair, s, r // 2, r // 2)
    cos = tl.load(ptrs, mask=angle_mask, other=0)[:, None, :]
    ptrs, angle_mask = tile_ptrs(sin_ptr, pos, pair, s, r // 2, r // 2)
    sin = tl.load(ptrs, mask=angle_mask, other=0)[:, None, :]
    if INVERSE:
        sin = -sin
    y = tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos).reshape(SPAN, HEADS, BLOCK_R)
    row = (batch * s + pos)[:, None, None] * h + head[None, :, None]
    tl.store(y_ptr + row * r + col[None, None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def rotate_pairs(x_bshr: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotate by `_apply_rotary_emb_kernel`; the result is contiguous."""
    x = x_bshr if x_bshr.stride(-1) == 1 else x_bshr.contiguous()
    b, s, h, r = x.shape
    y = x.new_empty(x.shape)
    block_h, block_r = triton.next_power_of_2(h), triton.next_power_of_2(r)

    def grid(meta: dict[str, int]) -> tuple[int, ...]:
        heads = min(block_h, meta["TILE"])
        return (b * triton.cdiv(s, meta["TILE"] // heads) * triton.cdiv(h, heads),)

    args = x, cos, sin, y, s, h, r, *x.stride()[:3], autotune_bucket(b * s)
    _apply_rotary_emb_kernel[grid](*args, INVERSE=inverse, BLOCK_H=block_h, BLOCK_R=block_r)
    return y


class TritonRotaryEmb(torch.autograd.Function):
    """A rotation of pairs, whose gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_pairs(x_bshr, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_bshr: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_pairs(g_bshr, cos, sin, inverse=True), None, None


@impl("apply_rotary_emb", "triton")
@on_its_device
def apply_rotary_emb(x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x₀, x₁) by their angle: (x₀cos − x₁sin, x₀sin + x₁cos).

    cos, sin: (s, r/2), fp32.
    """
    check_tensor("x_bshr", x_bshr, (None,) * 4, FLOATS, contiguous=False)
    if x_bshr.shape[-1] % 2:
        raise ValueError(f"x_bshr must have an even last axis, not {x_bshr.shape[-1]}")
    shape = x_bshr.shape[1], x_bshr.shape[3] // 2
    check_tensor("cos", cos, shape, (FP32,))
    check_tensor("sin", sin, shape, (FP32,))
    return TritonRotaryEmb.apply(x_bshr, cos, sin)


# ── For the ahead-of-time compiler: V3's shapes ──

N, D = 4096, 7168
F, H = 2048, 128


def norm_cases() -> list[AOTCase]:
    """Return cases of RMSNorm and its backward pass, on rows and on slices of wider rows."""
    row, latent = {"BLOCK_D": 8192}, {"BLOCK_D": 512}
    bf16_args = BF16, BF16, BF16, FP32, N, D, D, 1e-6, 4
    fp32_args = FP32, FP32, FP32, FP32, N, D, D, 1e-6, 4
    latent_args = BF16, FP32, BF16, FP32, N, 512, 576, 1e-6, 4
    bf16_backward = BF16, BF16, BF16, FP32, BF16, FP32, N, D, D, D, 4
    fp32_backward = FP32, FP32, FP32, FP32, FP32, FP32, N, D, D, D, 4
    latent_backward = BF16, BF16, FP32, FP32, BF16, FP32, N, 512, 576, 576, 4
    return [
        AOTCase("rms_norm", _rms_norm_kernel, bf16_args, row),
        AOTCase("rms_norm_fp32", _rms_norm_kernel, fp32_args, row),
        AOTCase("rms_norm_latent", _rms_norm_kernel, latent_args, latent),
        AOTCase("rms_norm_backward", _rms_norm_backward_kernel, bf16_backward, row),
        AOTCase("rms_norm_backward_fp32", _rms_norm_backward_kernel, fp32_backward, row),
        AOTCase("rms_norm_backward_latent", _rms_norm_backward_kernel, latent_backward, latent),
    ]


def elementwise_cases() -> list[AOTCase]:
    """Return cases of SwiGLU and of RoPE, on the queries and on the key that all heads share."""
    ffn = {"BLOCK_F": F}
    swiglu_args = BF16, BF16, BF16, 8 * N, F, F, F, 4
    swiglu_backward = BF16, BF16, BF16, BF16, BF16, 8 * N, F, F, F, F, 4
    query_args = BF16, FP32, FP32, BF16, N, H, 64, N * H * 192, H * 192, 192, 4
    key_args = BF16, FP32, FP32, BF16, N, 1, 64, N * 576, 576, 576, 4
    query = {"INVERSE": False, "BLOCK_H": H, "BLOCK_R": 64}
    key = {"INVERSE": True, "BLOCK_H": 1, "BLOCK_R": 64}
    return [
        AOTCase("swiglu", _swiglu_kernel, swiglu_args, ffn),
        AOTCase("swiglu_backward", _swiglu_backward_kernel, swiglu_backward, ffn),
        AOTCase("apply_rotary_emb", _apply_rotary_emb_kernel, query_args, query),
        AOTCase("apply_rotary_emb_key", _apply_rotary_emb_kernel, key_args, key),
    ]


AOT_CASES = [*norm_cases(), *elementwise_cases()]
