"""Quantization to FP8: each kernel reads its input once and writes values and scales once."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    E4M3,
    FLOATS,
    FP32,
    INT32,
    AOTCase,
    as_rows,
    cdiv_grid,
    check_quantized,
    check_tensor,
    kernel_config,
    num_blocks,
    on_its_device,
)
from dsv3_ref.kernels.norm import check_norm_inputs, rms_norm_backward
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_ref import fp8  # noqa: F401  defines the ops
from dsv3_ref.ops import impl

COUNT_DTYPES = (torch.int64, INT32)


# ── Scale and FP8 value of one number ──


@triton.jit
def float_bits(x):
    """Return the 32 bits of an fp32 number."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_from_bits(b):
    """Return the fp32 number of these 32 bits."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def div_448(x):
    """Compute x / 448 = x / 7 / 64 to the last bit: 7 · high is exact, so one rounding remains."""
    high = float_from_bits(float_bits(tl.minimum(x, 3.4028234663852886e38) * (1 / 7)) & -16)
    return (high + (x - 7 * high) * (1 / 7)) * (1 / 64)


@triton.jit
def e4m3_scale(amax, USE_UE8M0: tl.constexpr):
    """Compute s = amax / 448, with USE_UE8M0 rounded up to a power of two."""
    s = div_448(tl.maximum(amax, 1e-30))
    if USE_UE8M0:
        s = float_from_bits((float_bits(s) + 0x7FFFFF) & 0x7F800000)
    return s


@triton.jit
def exact_div_bf16(x, s):
    """Compute x / s for bf16 x and s = amax/448 of a bf16 amax, exactly enough for E4M3(x / s).

    1/s = high + low, high with 16 bits: x · high is exact, and so is every step up to low. A true
    division takes a dozen instructions per number, more than memory bandwidth hides; this takes
    two.
    """
    inverse = 1.0 / s
    # below 1/s, so that low > 0 and x = −0 gives −0
    high = float_from_bits(float_bits(inverse) - 4 & -256)
    s0 = float_from_bits(float_bits(s) & -65536)  # s = s0 + s1 + s2, eight bits each
    rest = s - s0
    s1 = float_from_bits(float_bits(rest) & -65536)
    low = (((1.0 - high * s0) - high * s1) - high * (rest - s1)) * inverse
    return x * high + x * low


@triton.jit
def cast_to_e4m3(x, s, USE_UE8M0: tl.constexpr, IS_BF16: tl.constexpr):
    """Compute q = E4M3(x / s), rounded to nearest and saturated at ±448.

    IS_BF16: x holds bf16 numbers, and so did the amax that s was computed from.
    """
    if USE_UE8M0:
        q = x * float_from_bits(0x7F000000 - float_bits(s))  # 1/s, exactly
    elif IS_BF16:
        q = exact_div_bf16(x, s)
    else:
        q = tl.div_rn(x, s)
    return q.to(tl.float8e4nv)


# ── Tiles of 1 × 128 ──


def alloc_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the FP8 values of x and a scale for each of its tiles of 1 × 128."""
    s = x.new_empty((*x.shape[:-1], num_blocks(x.shape[-1])), dtype=FP32)
    return torch.empty(x.shape, dtype=E4M3, device=x.device), s


TILE_CONFIGS = [
    kernel_config(4, BLOCK_N=16),
    kernel_config(4, BLOCK_N=32),
    kernel_config(8, BLOCK_N=64),
]


@triton.jit
def locate_tiles(n, k, BLOCK_N: tl.constexpr):
    """Return the indices, rows, columns and mask of the tiles of this program."""
    kz = tl.cdiv(k, 128)
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = (t % kz * 128)[:, None] + tl.arange(0, 128)[None, :]
    return t, (t // kz).to(tl.int64)[:, None], col, (t < n * kz)[:, None] & (col < k)


@triton.jit
def store_tiles(
    q_ptr, s_ptr, y, t, row, col, mask, n, k, USE_UE8M0: tl.constexpr, IS_BF16: tl.constexpr
):
    """Quantize tiles in registers and store their values and scales."""
    s = e4m3_scale(tl.max(tl.abs(y), 1), USE_UE8M0)
    tl.store(q_ptr + row * k + col, cast_to_e4m3(y, s[:, None], USE_UE8M0, IS_BF16), mask=mask)
    tl.store(s_ptr + t, s, mask=t < n * tl.cdiv(k, 128))


@triton.autotune(TILE_CONFIGS, key=["k"])
@triton.jit
def _act_quant_kernel(
    x_ptr, q_ptr, s_ptr, n, k, stride, USE_UE8M0: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Quantize tiles in memory order: s = max|x| / 448, q = E4M3(x / s)."""
    t, row, col, mask = locate_tiles(n, k, BLOCK_N)
    x = tl.load(x_ptr + row * stride + col, mask=mask, other=0.0)
    is_bf16: tl.constexpr = x.dtype == tl.bfloat16
    store_tiles(q_ptr, s_ptr, x.to(tl.float32), t, row, col, mask, n, k, USE_UE8M0, is_bf16)


@impl("act_quant", "triton")
@on_its_device
def act_quant(x: Tensor, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize (…, k) in tiles of 1 × 128: values like x, scales (…, ⌈k/128⌉) in fp32 (§3.3.2)."""
    check_tensor("x", x, dtypes=FLOATS, contiguous=False)
    q, s = alloc_quantized(x)
    if x.numel():
        x_nk = as_rows(x)
        grid = cdiv_grid(s.numel(), "BLOCK_N")
        _act_quant_kernel[grid](x_nk, q, s, *x_nk.shape, x_nk.stride(0), use_ue8m0)
    return q, s


# ── Twelve bits for the input of attention's output matrix ──

# of an amax: E5M6 reaches 65,024 where E4M3 reaches 448
E5M6_PER_E4M3 = tl.constexpr(fp8.E4M3_MAX / fp8.E5M6_MAX)


@triton.jit
def e5m6_code(y):
    """Return the 12 bits of y, rounded to nearest even: half precision without its last four.

    y + c lies where fp32 numbers are as far apart as E5M6's are at y, so the sum rounds as E5M6.
    """
    exponent = tl.maximum(float_bits(y) >> 23 & 0xFF, 113)  # 2⁻¹⁴, the smallest normal number
    c = float_from_bits((exponent + 17 << 23) | 0x400000)
    rounded = tl.minimum(tl.maximum((y + c) - c, -65024.0), 65024.0)
    # adding c drops the sign of −0 and of what rounds to it
    code = rounded.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 4 & 0xFFF
    return code | (float_bits(y) >> 31 & 1) << 11


@triton.autotune(TILE_CONFIGS, key=["k"])
@triton.jit
def _e5m6_quant_kernel(x_ptr, packed_ptr, s_ptr, n, k, stride, BLOCK_N: tl.constexpr):
    """Quantize tiles: s = 2^⌈log2 max|x| / 65,024⌉, and two codes of x / s in three bytes."""
    t, row, col, mask = locate_tiles(n, k, BLOCK_N)
    x = tl.load(x_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    s = e4m3_scale(tl.max(tl.abs(x), 1) * E5M6_PER_E4M3, True)
    code = e5m6_code(x * float_from_bits(0x7F000000 - float_bits(s))[:, None])
    a, b = tl.split(tl.reshape(code, (BLOCK_N, 64, 2)))
    place = packed_ptr + t.to(tl.int64)[:, None] * 192 + 3 * tl.arange(0, 64)[None, :]
    exists = (t < n * tl.cdiv(k, 128))[:, None]
    tl.store(place, (a >> 4).to(tl.uint8), mask=exists)
    tl.store(place + 1, ((a & 15) << 4 | b >> 8).to(tl.uint8), mask=exists)
    tl.store(place + 2, (b & 255).to(tl.uint8), mask=exists)
    tl.store(s_ptr + t, s, mask=t < n * tl.cdiv(k, 128))


@triton.autotune(TILE_CONFIGS, key=["k"])
@triton.jit
def _e5m6_restore_kernel(packed_ptr, s_ptr, x_ptr, n, k, BLOCK_N: tl.constexpr):
    """Compute x = s · value of each code."""
    t, row, col, mask = locate_tiles(n, k, BLOCK_N)
    exists = t < n * tl.cdiv(k, 128)
    place = packed_ptr + t.to(tl.int64)[:, None] * 192 + 3 * tl.arange(0, 64)[None, :]
    first = tl.load(place, mask=exists[:, None], other=0).to(tl.int32)
    middle = tl.load(place + 1, mask=exists[:, None], other=0).to(tl.int32)
    last = tl.load(place + 2, mask=exists[:, None], other=0).to(tl.int32)
    code = tl.join(first << 4 | middle >> 4, (middle & 15) << 8 | last)
    half = (tl.reshape(code, (BLOCK_N, 128)) << 4).to(tl.int16).to(tl.float16, bitcast=True)
    x = half.to(tl.float32) * tl.load(s_ptr + t, mask=exists, other=0.0)[:, None]
    tl.store(x_ptr + row * k + col, x.to(x_ptr.dtype.element_ty), mask=mask)


@impl("e5m6_quant", "triton")
@on_its_device
def e5m6_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (…, k) in tiles of 1 × 128 to 12 bits: bytes (…, z, 192), scales (…, z) (§3.3.3)."""
    check_tensor("x", x, dtypes=FLOATS, contiguous=False)
    s = x.new_empty((*x.shape[:-1], num_blocks(x.shape[-1])), dtype=FP32)
    packed = torch.empty((*s.shape, 192), dtype=torch.uint8, device=x.device)
    if x.numel():
        x_nk = as_rows(x)
        grid = cdiv_grid(s.numel(), "BLOCK_N")
        _e5m6_quant_kernel[grid](x_nk, packed, s, *x_nk.shape, x_nk.stride(0))
    return packed, s


@impl("e5m6_restore", "triton")
@on_its_device
def e5m6_restore(packed: Tensor, s: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Dequantize the bytes of `e5m6_quant` to a contiguous tensor of a dtype, (…, k)."""
    check_tensor("s", s, (*s.shape[:-1], num_blocks(k)), (FP32,))
    check_tensor("packed", packed, (*s.shape, 192), (torch.uint8,))
    x = torch.empty((*s.shape[:-1], k), dtype=dtype, device=packed.device)
    if x.numel():
        grid = cdiv_grid(s.numel(), "BLOCK_N")
        _e5m6_restore_kernel[grid](packed, s, x, x.numel() // k, k)
    return x


# ── Blocks of 128 × 128 ──


@triton.autotune([kernel_config(8), kernel_config(16)], key=["o", "i"])
@triton.jit
def _weight_quant_kernel(w_ptr, q_ptr, s_ptr, o, i, USE_UE8M0: tl.constexpr):
    """Quantize a block in registers: s = max|w| / 448, q = E4M3(w / s)."""
    block = tl.program_id(0)
    oz, iz = tl.cdiv(o, 128), tl.cdiv(i, 128)
    row = block // iz % oz * 128 + tl.arange(0, 128)
    col = block % iz * 128 + tl.arange(0, 128)
    first = (block // (oz * iz)).to(tl.int64) * o * i
    offset = first + row.to(tl.int64)[:, None] * i + col[None, :]
    mask = (row < o)[:, None] & (col < i)[None, :]
    w = tl.load(w_ptr + offset, mask=mask, other=0.0)
    is_bf16: tl.constexpr = w.dtype == tl.bfloat16
    w = w.to(tl.float32)
    s = e4m3_scale(tl.max(tl.max(tl.abs(w), 1), 0), USE_UE8M0)
    tl.store(q_ptr + offset, cast_to_e4m3(w, s, USE_UE8M0, is_bf16), mask=mask)
    tl.store(s_ptr + block, s)


@impl("weight_quant", "triton")
@on_its_device
def weight_quant(w: Tensor, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize (…, o, i) in blocks of 128 × 128, fp32 scales (…, ⌈o/128⌉, ⌈i/128⌉) (§3.3.2)."""
    check_tensor("w", w, dtypes=FLOATS)
    *lead, o, i = w.shape
    q = torch.empty(w.shape, dtype=E4M3, device=w.device)
    s = w.new_empty((*lead, num_blocks(o), num_blocks(i)), dtype=FP32)
    if s.numel():
        _weight_quant_kernel[s.numel(),](w, q, s, o, i, use_ue8m0)
    return q, s


# ── The map of tiles of 128 rows to experts ──


@triton.jit
def _tile_map_kernel(count_ptr, map_ptr, end_ptr, e, n_z, BLOCK_E: tl.constexpr):
    """Store for each tile z of expert E its first row, the end of E's rows, and E.

    Also stores the tiles up to each expert, end_E = Σ_{j ≤ E} ⌈count_j/128⌉.
    """
    i = tl.arange(0, BLOCK_E)
    count = tl.load(count_ptr + i, mask=i < e, other=0).to(tl.int32)
    n_tiles = (count + 127) // 128
    row, end = tl.cumsum(count, 0), tl.cumsum(n_tiles, 0)
    z = tl.program_id(0) * 32 + tl.arange(0, 32)
    mine = (z[:, None] >= (end - n_tiles)[None, :]) & (z[:, None] < end[None, :])
    first = tl.sum(tl.where(mine, (row - count - (end - n_tiles) * 128)[None, :], 0), 1) + z * 128
    tl.store(map_ptr + z, first, mask=z < n_z)
    tl.store(map_ptr + n_z + z, tl.sum(tl.where(mine, row[None, :], 0), 1), mask=z < n_z)
    tl.store(map_ptr + 2 * n_z + z, tl.sum(tl.where(mine, i[None, :], 0), 1), mask=z < n_z)
    tl.store(end_ptr + i, end, mask=(i < e) & (tl.program_id(0) == 0))


def tile_map(tokens_per_expert_e: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Map m rows sorted by expert to tiles of 128 rows, without a synchronization.

    Returns two int32 tensors. The first, (3, Z), holds for each tile its first row, the end of its
    expert's rows and the expert; the end of an unused tile is 0. The second, (e,), holds the index
    after the last tile of each expert. Z = ⌊m/128⌋ + e bounds the number of tiles for any counts.
    """
    check_tensor("tokens_per_expert_e", tokens_per_expert_e, (None,), COUNT_DTYPES)
    e, n_z = len(tokens_per_expert_e), m // 128 + len(tokens_per_expert_e)
    map_xz = torch.empty(3, n_z, dtype=INT32, device=tokens_per_expert_e.device)
    end_e = torch.empty(e, dtype=INT32, device=tokens_per_expert_e.device)
    grid = (triton.cdiv(n_z, 32),)
    _tile_map_kernel[grid](
        tokens_per_expert_e, map_xz, end_e, e, n_z, BLOCK_E=triton.next_power_of_2(e)
    )
    return map_xz, end_e


# ── Tiles of 128 × 1, transposed ──

COLUMN_CONFIGS = [
    kernel_config(4, BLOCK_K=64),
    kernel_config(8, BLOCK_K=64),
    kernel_config(8, BLOCK_K=128),
]


@triton.jit
def locate_tile_rows(map_ptr, z, m, n_z, GROUPED: tl.constexpr):
    """Return the 128 rows of tile z, a mask of those that exist, and whether the tile is used."""
    if GROUPED:
        first, end = tl.load(map_ptr + z), tl.load(map_ptr + n_z + z)
    else:
        first, end = z * 128, m
    row = first + tl.arange(0, 128)
    return row.to(tl.int64), row < end, first < end


@triton.jit
def store_columns(
    q_ptr, s_ptr, y, z, col, used, k, n_z, IS_BF16: tl.constexpr, USE_UE8M0: tl.constexpr
):
    """Quantize 128 rows along the tokens: q (k, 128·Z), s (k, Z); unused tiles have scale 1."""
    s = tl.where(used, e4m3_scale(tl.max(tl.abs(y), 0), USE_UE8M0), 1.0)
    q = cast_to_e4m3(y, s[None, :], USE_UE8M0, IS_BF16).trans()
    tile = col.to(tl.int64) * n_z + z
    tl.store(q_ptr + (tile * 128)[:, None] + tl.arange(0, 128)[None, :], q, mask=(col < k)[:, None])
    tl.store(s_ptr + tile, s, mask=col < k)


@triton.autotune(COLUMN_CONFIGS, key=["k"])
@triton.jit
def _act_quant_transposed_kernel(
    x_ptr, x_s_ptr, map_ptr, q_ptr, s_ptr, m, k, stride, n_z,
    GROUPED: tl.constexpr, QUANTIZED: tl.constexpr, USE_UE8M0: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Quantize 128 rows × BLOCK_K columns: s_k = max_m |x_mk| / 448, q_km = E4M3(x_mk / s_k)."""
    nk = tl.cdiv(k, BLOCK_K)
    z, col = tl.program_id(0) // nk, tl.program_id(0) % nk * BLOCK_K + tl.arange(0, BLOCK_K)
    row, exists, used = locate_tile_rows(map_ptr, z, m, n_z, GROUPED)
    mask = exists[:, None] & (col < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0)
    is_bf16: tl.constexpr = x.dtype == tl.bfloat16
    x = x.to(tl.float32)
    if QUANTIZED:  # one tile of 1 × 128 in each row, since BLOCK_K divides 128
        offset = row * tl.cdiv(k, 128) + tl.program_id(0) % nk * BLOCK_K // 128
        x *= tl.load(x_s_ptr + offset, mask=exists, other=0.0)[:, None]
    store_columns(q_ptr, s_ptr, x, z, col, used, k, n_z, is_bf16, USE_UE8M0)


def alloc_columns(
    m: int, k: int, tokens_per_expert_e: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the tile map of m rows and uninitialized values (k, 128·Z) and scales (k, Z)."""
    n_z, map_xz = m // 128 + 1, None
    if tokens_per_expert_e is not None:
        n_z, map_xz = m // 128 + len(tokens_per_expert_e), tile_map(tokens_per_expert_e, m)[0]
    q = torch.empty(k, n_z * 128, dtype=E4M3, device=like.device)
    return map_xz, q, torch.empty(k, n_z, dtype=FP32, device=like.device)


def quantize_columns(
    x_mk: Tensor, x_s: Tensor | None, tokens_per_expert_e: Tensor | None, use_ue8m0: bool
) -> tuple[Tensor, Tensor]:
    """Quantize (m, k) in tiles of 128 × 1, transposed; with scales x_s, x_mk holds FP8 values."""
    m, k = x_mk.shape
    map_xz, q, s = alloc_columns(m, k, tokens_per_expert_e, x_mk)
    if q.numel():
        n_z = s.shape[1]
        grid = cdiv_grid(k, "BLOCK_K", n_z)
        args = x_mk, x_s, map_xz, q, s, m, k, x_mk.stride(0), n_z
        _act_quant_transposed_kernel[grid](*args, map_xz is not None, x_s is not None, use_ue8m0)
    return q, s


@impl("act_quant_transposed", "triton")
@on_its_device
def act_quant_transposed(
    x_mk: Tensor, tokens_per_expert_e: Tensor | None = None, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize (m, k) in tiles of 128 × 1, transposed: values (k, 128·Z), scales (k, Z)."""
    check_tensor("x_mk", x_mk, (None, None), FLOATS, contiguous=False)
    return quantize_columns(x_mk, None, tokens_per_expert_e, use_ue8m0)


def check_tiles(
    name: str, q: Tensor, s: Tensor, shape: tuple[int | None, ...] | torch.Size
) -> None:
    """Raise a `ValueError` unless q has this shape and s one scale per tile of 1 × 128."""
    s_shape = (*q.shape[:-1], num_blocks(q.shape[-1]))
    check_quantized(name, q, shape, f"scales of {name}", s, s_shape)


@impl("requant_transposed", "triton")
@on_its_device
def requant_transposed(
    q: Tensor, s: Tensor, tokens_per_expert_e: Tensor | None = None, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Requantize tiles of 1 × 128 as tiles of 128 × 1, laid out as by `act_quant_transposed`."""
    check_tiles("q", q, s, (None, None))
    return quantize_columns(q, s, tokens_per_expert_e, use_ue8m0)


# ── Norm and SwiGLU, quantized ──


@triton.jit
def _rms_norm_quant_kernel(
    x_ptr, weight_ptr, y_ptr, q_ptr, s_ptr, rstd_ptr, k, stride, eps,
    USE_UE8M0: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Normalize and quantize a row in tiles of 128.

    y = x / √(mean(x²) + ε) · weight, s = max|y| / 448, q = E4M3(y / s).
    """
    n, z = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_Z)
    col = z[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + n * stride + col, mask=col < k, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < k, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(x * x, 1), 0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(square / k + eps))
    y = (x * rstd * weight).to(y_ptr.dtype.element_ty)
    tl.store(rstd_ptr + n, rstd)
    tl.store(y_ptr + n * k + col, y, mask=col < k)
    is_bf16: tl.constexpr = y.dtype == tl.bfloat16
    y, kz = y.to(tl.float32), tl.cdiv(k, 128)
    s = e4m3_scale(tl.max(tl.abs(y), 1), USE_UE8M0)
    q = cast_to_e4m3(y, s[:, None], USE_UE8M0, is_bf16)
    tl.store(q_ptr + n * k + col, q, mask=col < k)
    tl.store(s_ptr + n * kz + z, s, mask=z < kz)


class TritonRMSNormQuant(torch.autograd.Function):
    """RMSNorm whose output is quantized too; the backward pass is that of RMSNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, use_ue8m0: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_nk, y = as_rows(x), x.new_empty(x.shape, dtype=dtype)
        q, s = alloc_quantized(x)
        rstd_n, block_z = x.new_empty(len(x_nk), dtype=FP32), triton.next_power_of_2(s.shape[-1])
        if x.numel():
            args = x_nk, weight, y, q, s, rstd_n, x_nk.shape[1], x_nk.stride(0), eps, use_ue8m0
            warps = min(max(block_z // 8, 1), 16)
            _rms_norm_quant_kernel[len(x_nk),](*args, BLOCK_Z=block_z, num_warps=warps)
        ctx.save_for_backward(x, weight, rstd_n)
        ctx.mark_non_differentiable(q, s)
        return y, q, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *rms_norm_backward(g, *ctx.saved_tensors), None, None, None


@impl("rms_norm_quant", "triton")
@on_its_device
def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    use_ue8m0: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x and quantize the result in one pass: (y, values, scales).

    The gradient flows through y.
    """
    check_norm_inputs(x, weight, dtype)
    return TritonRMSNormQuant.apply(x, weight, eps, dtype or x.dtype, use_ue8m0)


@triton.jit
def sigmoid(x):
    """Compute σ(x) = 1 / (1 + exp(−x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def round_like(x, like):
    """Round x to the dtype of `like` and return it in fp32."""
    return x.to(like.dtype).to(tl.float32)


@triton.autotune(TILE_CONFIGS, key=["k"])
@triton.jit
def _swiglu_quant_kernel(
    gate_ptr, up_ptr, scale_ptr, q_ptr, s_ptr, n, k, gate_stride, up_stride,
    USE_UE8M0: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Quantize tiles of y = gate · σ(gate) · up: s = max|y| / 448, q = E4M3(y / s).

    SCALED: y is multiplied by its row's scale.
    """
    t, row, col, mask = locate_tiles(n, k, BLOCK_N)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    y = round_like(round_like(wide * sigmoid(wide), gate) * up, gate)
    if SCALED:
        y = round_like(y * tl.load(scale_ptr + row, mask=row < n, other=0.0), gate)
    is_bf16: tl.constexpr = gate.dtype == tl.bfloat16
    store_tiles(q_ptr, s_ptr, y, t, row, col, mask, n, k, USE_UE8M0, is_bf16)


@impl("swiglu_quant", "triton")
@on_its_device
def swiglu_quant(
    gate: Tensor, up: Tensor, use_ue8m0: bool = False, scale_m: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize swiglu(gate, up), each row times its scale, and return only that."""
    check_tensor("gate", gate, dtypes=FLOATS, contiguous=False)
    check_tensor("up", up, gate.shape, (gate.dtype,), contiguous=False)
    check_row_scales(scale_m, gate)
    q, s = alloc_quantized(gate)
    if gate.numel():
        gate, up = as_rows(gate), as_rows(up)
        args = gate, up, scale_m, q, s, *gate.shape, gate.stride(0), up.stride(0), use_ue8m0
        _swiglu_quant_kernel[cdiv_grid(s.numel(), "BLOCK_N")](*args, scale_m is not None)
    return q, s


def check_row_scales(scale_m: Tensor | None, x: Tensor) -> None:
    """Raise a `ValueError` unless there are no scales, or one in fp32 for each row of x."""
    if scale_m is not None:
        check_tensor("scale_m", scale_m, (len(as_rows(x)),), (FP32,))


MIN_SWIGLU_COLUMNS = 32  # columns of a program


@triton.autotune(
    [kernel_config(4, BLOCK_K=MIN_SWIGLU_COLUMNS), kernel_config(8, BLOCK_K=64)], key=["k"]
)
@triton.jit
def _swiglu_quant_backward_kernel(
    g_ptr, gate_ptr, gate_s_ptr, up_ptr, up_s_ptr, map_ptr, scale_ptr,
    dgate_ptr, dup_ptr, q_ptr, s_ptr, dscale_ptr, m, k, stride, n_z,
    GROUPED: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dgate = g·up·σ·(1 + gate·(1 − σ)) and dup = g·gate·σ, with σ of gate.

    Also recomputes y = gate·σ·up and quantizes it along the tokens. SCALED: y is multiplied by its
    row's scale p, and so is g; dp = Σ g·y is stored for each block of columns, (k/BLOCK_K, m).
    """
    nk = tl.cdiv(k, BLOCK_K)
    z, col = tl.program_id(0) // nk, tl.program_id(0) % nk * BLOCK_K + tl.arange(0, BLOCK_K)
    row, exists, used = locate_tile_rows(map_ptr, z, m, n_z, GROUPED)
    mask = exists[:, None] & (col < k)[None, :]
    offset = row[:, None] * k + col[None, :]
    offset_s = row * tl.cdiv(k, 128) + tl.program_id(0) % nk * BLOCK_K // 128
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    gate *= tl.load(gate_s_ptr + offset_s, mask=exists, other=0.0)[:, None]
    up = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up *= tl.load(up_s_ptr + offset_s, mask=exists, other=0.0)[:, None]
    g = tl.load(g_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0)
    gate, up = round_like(gate, g), round_like(up, g)
    wide = g.to(tl.float32)
    sigma = sigmoid(gate)
    if SCALED:
        part = dscale_ptr + (tl.program_id(0) % nk).to(tl.int64) * m
        y = round_like(round_like(gate * sigma, g) * up, g)
        tl.store(part + row, tl.sum(wide * y, 1), mask=exists)
        scale = tl.load(scale_ptr + row, mask=exists, other=0.0)[:, None]
        wide = round_like(wide * scale, g)
    dgate = round_like(wide * up, g) * sigma * (1.0 + gate * (1.0 - sigma))
    tl.store(dgate_ptr + offset, dgate.to(g.dtype), mask=mask)
    h = round_like(gate * sigma, g)
    tl.store(dup_ptr + offset, (h * wide).to(g.dtype), mask=mask)
    y = round_like(h * up, g)
    if SCALED:
        y = round_like(y * scale, g)
    is_bf16: tl.constexpr = g.dtype == tl.bfloat16
    store_columns(q_ptr, s_ptr, y, z, col, used, k, n_z, is_bf16, False)


@impl("swiglu_quant_backward", "triton")
@on_its_device
def swiglu_quant_backward(
    g: Tensor,
    gate_q: Tensor,
    gate_s: Tensor,
    up_q: Tensor,
    up_s: Tensor,
    tokens_per_expert_e: Tensor | None = None,
    scale_m: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Recompute SwiGLU from quantized gate and up and backpropagate g (§3.3.3).

    Returns the gradients of gate and up, then the (scaled) output in tiles of 128 × 1, and the
    gradient of the scales or None.
    """
    check_tensor("g", g, (None, None), FLOATS, contiguous=False)
    check_tiles("gate_q", gate_q, gate_s, g.shape)
    check_tiles("up_q", up_q, up_s, g.shape)
    check_row_scales(scale_m, g)
    m, k = g.shape
    dscale_xm = None
    if scale_m is not None:  # a kernel with wider programs leaves the last rows zero
        dscale_xm = scale_m.new_zeros(triton.cdiv(k, MIN_SWIGLU_COLUMNS), m)
    dgate, dup = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    map_xz, q, s = alloc_columns(m, k, tokens_per_expert_e, g)
    if q.numel():
        n_z = s.shape[1]
        inputs = g, gate_q, gate_s, up_q, up_s, map_xz, scale_m
        args = *inputs, dgate, dup, q, s, dscale_xm, m, k, g.stride(0), n_z
        flags = map_xz is not None, scale_m is not None
        _swiglu_quant_backward_kernel[cdiv_grid(k, "BLOCK_K", n_z)](*args, *flags)
    return dgate, dup, q, s, None if dscale_xm is None else dscale_xm.sum(0)


# ── For the ahead-of-time compiler: 4096 rows, experts of 2048 × 7168 ──

INPUT_DTYPES = {"bf16": BF16, "fp32": FP32}
SCALE_FORMATS = {"": {"USE_UE8M0": False}, "_ue8m0": {"USE_UE8M0": True}}
ROW_FORMATS = {"": None, "_grouped": INT32}  # dtype of the tile map
SCALE_PTRS = {"": None, "_scaled": FP32}  # dtype of the rows' scales
QUANTIZED_PTRS = E4M3, FP32


def forward_cases() -> Iterator[AOTCase]:
    """Yield cases of the kernels that quantize along a row, for every dtype and scale format."""
    for suffix, meta in SCALE_FORMATS.items():
        for name, dtype in INPUT_DTYPES.items():
            act = dtype, *QUANTIZED_PTRS, 4096, 7168, 7168
            yield AOTCase(f"act_quant_{name}{suffix}", _act_quant_kernel, act, meta)
            if meta["USE_UE8M0"]:
                twelve = dtype, torch.uint8, FP32, 4096, 16384, 16384
                yield AOTCase(f"e5m6_quant_{name}", _e5m6_quant_kernel, twelve)
                restored = torch.uint8, FP32, dtype, 4096, 16384
                yield AOTCase(f"e5m6_restore_{name}", _e5m6_restore_kernel, restored)
            weight = dtype, *QUANTIZED_PTRS, 2048, 7168
            yield AOTCase(f"weight_quant_{name}{suffix}", _weight_quant_kernel, weight, meta)
            norm = dtype, FP32, dtype, *QUANTIZED_PTRS, FP32, 7168, 7168, 1e-6
            row = meta | {"BLOCK_Z": 64, "num_warps": 8}
            yield AOTCase(f"rms_norm_quant_{name}{suffix}", _rms_norm_quant_kernel, norm, row)
        for name, scale in SCALE_PTRS.items():
            gate_up = BF16, BF16, scale, *QUANTIZED_PTRS, 4096, 2048, 2048, 2048
            flags = meta | {"SCALED": scale is not None}
            yield AOTCase(f"swiglu_quant{name}{suffix}", _swiglu_quant_kernel, gate_up, flags)


def transposed_cases() -> Iterator[AOTCase]:
    """Yield cases of the kernels that quantize along the tokens, for one weight and by expert."""
    tile_map_args = torch.int64, INT32, INT32, 256, 288
    yield AOTCase("tile_map", _tile_map_kernel, tile_map_args, {"BLOCK_E": 256})
    for rows, map_ptr in ROW_FORMATS.items():
        grouped = {"GROUPED": map_ptr is not None}
        args = FP32, map_ptr, *QUANTIZED_PTRS, 4096, 7168, 7168, 40
        for suffix, scale_format in SCALE_FORMATS.items():
            for name, dtype in (("act_quant_transposed", BF16), ("requant_transposed", E4M3)):
                meta = grouped | scale_format | {"QUANTIZED": dtype == E4M3}
                kernel_args = dtype, *args
                kernel = _act_quant_transposed_kernel
                yield AOTCase(f"{name}{rows}{suffix}", kernel, kernel_args, meta)
        for suffix, scale in SCALE_PTRS.items():
            inputs = BF16, *QUANTIZED_PTRS, *QUANTIZED_PTRS, map_ptr, scale
            backward = *inputs, BF16, BF16, *QUANTIZED_PTRS, scale, 4096, 2048, 2048, 40
            flags = grouped | {"SCALED": scale is not None}
            name = f"swiglu_quant_backward{rows}{suffix}"
            yield AOTCase(name, _swiglu_quant_backward_kernel, backward, flags)


AOT_CASES = [*forward_cases(), *transposed_cases()]
