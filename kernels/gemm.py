"""Matrix products: FP8 promoted to fp32 every 128, and grouped by expert in any precision."""

import os
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
    AutotuneDecorator,
    autotune_bucket,
    cdiv_grid,
    check_quantized,
    check_tensor,
    kernel_config,
    num_blocks,
    num_sms,
    tma_aligned,
    on_its_device,
)
from dsv3_ref.kernels.quant import tile_map
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from dsv3_ref import fp8, moe  # noqa: F401  define the ops
from dsv3_ref.ops import defer_wgrad, impl, matmul_dtype

# ── Configs ──


def is_hopper() -> bool:
    """Return whether kernels are compiled for sm_90; true in the interpreter too."""
    return triton.knobs.runtime.interpret or driver.active.get_current_target().arch == 90


# Warp specialization has produced wrong results before (triton-lang/triton#8311).
USE_WARP_SPECIALIZATION = os.environ.get("DSV3_WARP_SPECIALIZATION", "1") != "0"


def config_fits(config: triton.Config, args: dict) -> bool:
    """Return whether a config of an FP8 product compiles well for this GPU, without spills.

    With warp specialization (WS) the compiler for Hopper makes of four warps one group that loads
    and two that multiply 64 rows each; for Blackwell it adds a warp that loads and one that
    multiplies.
    """
    meta, hopper = config.kwargs, is_hopper()
    if args.get("GROUPED") and meta["BLOCK_M"] != 128:  # the tile map has tiles of 128 rows
        return False
    if meta["WS"]:
        return USE_WARP_SPECIALIZATION and config.num_warps == (4 if hopper else 8)
    return meta["BLOCK_N"] != 192 or hopper


def prune_fp8_configs(
    configs: list[triton.Config], args: dict, **meta: object
) -> list[triton.Config]:
    """Select the configs that fit this GPU and these arguments."""
    return [config for config in configs if config_fits(config, args | meta)]


def autotune_fp8(configs: list[triton.Config], *key: str) -> AutotuneDecorator:
    """Return a decorator that autotunes an FP8 product over the configs that fit the GPU."""
    prune = {"early_config_prune": prune_fp8_configs}
    return triton.autotune(configs, key=key, prune_configs_by=prune)


WGRAD_CONFIGS = [
    kernel_config(8, 4, BLOCK_M=128, BLOCK_N=128, WS=False),
    kernel_config(4, 4, BLOCK_M=128, BLOCK_N=128, WS=True),
]
BLOCKWISE_CONFIGS = [
    kernel_config(8, 4, BLOCK_M=128, BLOCK_N=128, WS=False),
    kernel_config(8, 4, BLOCK_M=128, BLOCK_N=192, WS=False),
    kernel_config(4, 5, BLOCK_M=128, BLOCK_N=128, WS=True),
    kernel_config(4, 4, BLOCK_M=128, BLOCK_N=192, WS=True),
    kernel_config(8, 4, BLOCK_M=128, BLOCK_N=128, WS=True),
    kernel_config(4, 5, BLOCK_M=64, BLOCK_N=128, WS=False),
]

# ── Launching ──


def tma_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate the memory that a kernel writes its tensor descriptors to."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def padded_rows(x: Tensor) -> Tensor:
    """Return contiguous x for TMA, rows padded with zeros to a multiple of 16 bytes."""
    # two views, since the strides of an axis of length 1 may differ from those of a fresh tensor
    return tma_aligned(x.view(-1).view(x.shape))


def launch_persistent(
    kernel: Autotuner, num_tiles: int, first: Tensor, *args: Tensor | int | None
) -> None:
    """Launch kernel(first, *args) with one program per multiprocessor, each for every n-th tile."""
    triton.set_allocator(tma_scratch)  # each time, since the setting is per thread of autograd
    kernel[(min(num_tiles, num_sms(first)),)](first, *args)


@triton.jit
def grouped_pid(tile, tiles_m, tiles_n):
    """Return the row and column of a tile, in groups of eight rows, so that neighbors share L2."""
    width = 8 * tiles_n
    first = tile // width * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + tile % width % height, tile % width // height


@triton.jit
def store_output_tile(c_ptr, acc, row, end, col, n, ADD: tl.constexpr = False):
    """Store the part of a tile whose rows lie below `end` and whose columns lie below `n`.

    ADD: add to what is stored there.
    """
    rows = row + tl.arange(0, acc.shape[0])
    cols = col + tl.arange(0, acc.shape[1])
    ptrs = c_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    mask = (rows < end)[:, None] & (cols < n)[None, :]
    if ADD:
        acc += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


# ── FP8: rows in tiles of 1 × 128 times weights in blocks of 128 × 128 ──


@autotune_fp8(BLOCKWISE_CONFIGS, "n", "k", "bucket", "GROUPED")
@triton.jit(do_not_specialize=["m", "n_z"])
def _fp8_gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, map_ptr, end_ptr, m, n, k, e, n_z, bucket,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Compute C = Σ_z s^a_z s^b_z (A_z · B_zᵀ).

    Tensor cores sum 128 products in 14 bits; the sum over z is in fp32.
    """
    FIRST: tl.constexpr = 128 if BLOCK_N == 192 else BLOCK_N
    kz, blocks = tl.cdiv(k, 128), tl.cdiv(n, 128)
    a_desc = tl.make_tensor_descriptor(a_ptr, [m, k], [k, 1], [BLOCK_M, 128])
    b_desc = tl.make_tensor_descriptor(b_ptr, [e * n, k], [k, 1], [FIRST, 128])
    if BLOCK_N == 192:
        d_desc = tl.make_tensor_descriptor(b_ptr, [e * n, k], [k, 1], [64, 128])
    tiles_m = tl.load(end_ptr + e - 1) if GROUPED else tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        z_m, z_n = grouped_pid(tile, tiles_m, tiles_n)
        if GROUPED:
            row, end = tl.load(map_ptr + z_m), tl.load(map_ptr + n_z + z_m)
            expert = tl.load(map_ptr + 2 * n_z + z_m)
        else:
            row, end = z_m * BLOCK_M, m
            expert = 0
        col = z_n * BLOCK_N
        if BLOCK_N == 192:  # 128 columns and 64, each within one block of scales
            col += z_n % 2 * 64
            col_d = z_n * BLOCK_N + 128 - z_n % 2 * 128
        s_a = a_s_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), m - 1) * kz
        s_b = b_s_ptr + (expert * blocks + tl.minimum(col // 128, blocks - 1)) * kz
        acc = tl.zeros((BLOCK_M, FIRST), tl.float32)
        if BLOCK_N == 192:
            s_d = b_s_ptr + (expert * blocks + tl.minimum(col_d // 128, blocks - 1)) * kz
            acc_d = tl.zeros((BLOCK_M, 64), tl.float32)
        for z in tl.range(kz, warp_specialize=WS):
            s = tl.load(s_a + z)
            s_ab = s * tl.load(s_b + z)  # before the product, which hides the latency
            if BLOCK_N == 192:
                s_ad = s * tl.load(s_d + z)
            a = a_desc.load([row, z * 128])
            product = tl.dot(a, b_desc.load([expert * n + col, z * 128]).T)
            acc += product * s_ab[:, None]
            if BLOCK_N == 192:
                product = tl.dot(a, d_desc.load([expert * n + col_d, z * 128]).T)
                acc_d += product * s_ad[:, None]
        store_output_tile(c_ptr, acc, row, end, col, n)
        if BLOCK_N == 192:
            store_output_tile(c_ptr, acc_d, row, end, col_d, n)


def fp8_gemm_blockwise(
    a: Tensor,
    a_s: Tensor,
    b: Tensor,
    b_s: Tensor,
    c: Tensor,
    map_xz: Tensor | None,
    end_e: Tensor | None,
) -> Tensor:
    """Fill c with a bᵀ: b is one weight or, with a tile map, the weights of the experts."""
    (m, n), k = c.shape, a.shape[1]
    e = 1 if end_e is None else len(end_e)
    n_z = 0 if map_xz is None else map_xz.shape[1]
    if not k:
        return c.zero_()
    if c.numel():
        a, b = padded_rows(a), padded_rows(b)
        padded_k = triton.cdiv(k, 16) * 16
        args = a, a_s, b, b_s, c, map_xz, end_e, m, n, padded_k, e, n_z, autotune_bucket(m)
        num_tiles = max(n_z, triton.cdiv(m, 64)) * triton.cdiv(n, 128)
        launch_persistent(_fp8_gemm_kernel, num_tiles, *args, map_xz is not None)
    return c


@impl("fp8_gemm", "triton")
@on_its_device
def fp8_gemm(
    a: Tensor,
    a_s: Tensor,
    b: Tensor,
    b_s: Tensor,
    dtype: torch.dtype = FP32,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply C = A Bᵀ, (m, k) × (n, k) → (m, n), promoted to fp32 every 128 of k (§3.3.2):
    C = Σ_z s^a_z s^b_z (A_z · B_zᵀ).

    b_s: (⌈n/128⌉, ⌈k/128⌉), the blocks of a weight, or (n, ⌈k/128⌉), tiles like A's (Wgrad). out:
    a tensor in fp32 to which C is added in place; the kernel of Wgrad does so as it stores.
    """
    check_tensor("a", a, (None, None), (E4M3,))
    (m, k), n = a.shape, len(b)
    check_quantized("a", a, (m, k), "a_s", a_s, (m, num_blocks(k)))
    by_tiles = n > 1 and len(b_s) == n
    rows = n if by_tiles else num_blocks(n)
    check_quantized("b", b, (n, k), "b_s", b_s, (rows, num_blocks(k)))
    if by_tiles and out is not None:
        check_tensor("out", out, (m, n), (FP32,))
        return fp8_wgrad(a, a_s, b, b_s, out, None, add=True)
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    check_tensor("the result", c, dtypes=FLOATS)
    if by_tiles:
        return fp8_wgrad(a, a_s, b, b_s, c, None)
    fp8_gemm_blockwise(a, a_s, b, b_s, c, None, None)
    return c if out is None else out.add_(c)


@impl("fp8_grouped_gemm", "triton")
@on_its_device
def fp8_grouped_gemm(
    a: Tensor,
    a_s: Tensor,
    b: Tensor,
    b_s: Tensor,
    tokens_per_expert_e: Tensor,
    dtype: torch.dtype = FP32,
) -> Tensor:
    """Multiply each expert's rows by its weight as `fp8_gemm` does: (m, k) × (e, n, k) → (m, n).

    The rows are sorted by expert.
    """
    check_tensor("a", a, (None, None), (E4M3,))
    check_tensor("b", b, (len(tokens_per_expert_e), None, a.shape[1]), (E4M3,))
    (m, k), (e, n, _) = a.shape, b.shape
    check_quantized("a", a, (m, k), "a_s", a_s, (m, num_blocks(k)))
    check_quantized("b", b, (e, n, k), "b_s", b_s, (e, num_blocks(n), num_blocks(k)))
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    check_tensor("the result", c, dtypes=FLOATS)
    return fp8_gemm_blockwise(a, a_s, b, b_s, c, *tile_map(tokens_per_expert_e, m))


# ── FP8: both operands in tiles of 1 × 128, summed over the rows of an expert ──


@triton.jit
def load_broadcast(ptr):
    """Load a vector along the columns once per block, by a detour over two dimensions.

    Otherwise the compiler makes each thread load the 32 numbers that it needs.
    """
    two = tl.arange(0, 2)[None, :]
    return tl.sum(tl.load(ptr[:, None] + two, mask=two == 0, other=0.0), 1)


@autotune_fp8(WGRAD_CONFIGS, "n", "k", "ADD")
@triton.jit(do_not_specialize=["n_z"])
def _fp8_wgrad_kernel(
    g_ptr, g_s_ptr, x_ptr, x_s_ptr, c_ptr, end_ptr, n, k, m, e, n_z,
    GROUPED: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WS: tl.constexpr,
):  # fmt: skip
    """Compute C = Σ_z s^g_z s^x_z (G_z · X_zᵀ) for each expert, over the tiles z of its rows.

    ADD: C += Σ … instead.
    """
    g_desc = tl.make_tensor_descriptor(g_ptr, [n, m], [m, 1], [BLOCK_M, 128])
    x_desc = tl.make_tensor_descriptor(x_ptr, [k, m], [m, 1], [BLOCK_N, 128])
    tiles_n, tiles_k = tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N)
    each = tiles_n * tiles_k
    for tile in tl.range(tl.program_id(0), e * each, tl.num_programs(0)):
        expert = tile // each
        tile_n, tile_k = grouped_pid(tile % each, tiles_n, tiles_k)
        first, last = 0, n_z
        if GROUPED:
            first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
            last = tl.load(end_ptr + expert)
        row, col = tile_n * BLOCK_M, tile_k * BLOCK_N
        g_s = g_s_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), n - 1) * n_z
        x_s = x_s_ptr + tl.minimum(col + tl.arange(0, BLOCK_N), k - 1) * n_z
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for z in tl.range(first, last, warp_specialize=WS):
            s_row, s_col = tl.load(g_s + z), load_broadcast(x_s + z)
            g = g_desc.load([row, z * 128])
            product = tl.dot(g, x_desc.load([col, z * 128]).T)
            acc += product * s_row[:, None] * s_col[None, :]
        store_output_tile(c_ptr + expert.to(tl.int64) * n * k, acc, row, n, col, k, ADD)


def fp8_wgrad(
    g: Tensor, g_s: Tensor, x: Tensor, x_s: Tensor, c: Tensor, end_e: Tensor | None,
    add: bool = False,
) -> Tensor:  # fmt: skip
    """Fill c, (e, n, k) or without end_e (n, k), with g xᵀ of g (n, m) and x (k, m).

    add: add the product to c.
    """
    n, k = c.shape[-2:]
    m = g.shape[1]
    e = 1 if end_e is None else len(end_e)
    if not m:
        return c if add else c.zero_()
    if c.numel():
        g, x = padded_rows(g), padded_rows(x)
        padded_m = triton.cdiv(m, 16) * 16
        args = g, g_s, x, x_s, c, end_e, n, k, padded_m, e, g_s.shape[1], end_e is not None, add
        launch_persistent(_fp8_wgrad_kernel, e * num_blocks(n) * num_blocks(k), *args)
    return c


@impl("fp8_grouped_wgrad", "triton")
@on_its_device
def fp8_grouped_wgrad(
    g: Tensor,
    g_s: Tensor,
    x: Tensor,
    x_s: Tensor,
    tokens_per_expert_e: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Compute ∂L/∂W = gᵀ x of each expert in fp32: (n, 128·Z), (k, 128·Z) → (e, n, k).

    Both operands are laid out as by `act_quant_transposed`. out: a tensor in fp32 to which the
    result is added in place.
    """
    check_tensor("g", g, (None, None), (E4M3,))
    n, m = g.shape
    k, e = len(x), len(tokens_per_expert_e)
    tiles = num_blocks(m)
    check_quantized("g", g, (n, tiles * 128), "g_s", g_s, (n, tiles))
    check_quantized("x", x, (k, m), "x_s", x_s, (k, tiles))
    c = torch.empty(e, n, k, dtype=FP32, device=g.device) if out is None else out
    check_tensor("out", c, (e, n, k), (FP32,))
    # only Z = ⌊rows/128⌋ + e is known of the rows; any number with this Z gives the same ends
    end_e = tile_map(tokens_per_expert_e, (tiles - e) * 128)[1]
    return fp8_wgrad(g, g_s, x, x_s, c, end_e, add=out is not None)


# ── bf16 and fp32: rows sorted by expert ──


def prune_by_dtype(configs: list[triton.Config], args: dict, **_: object) -> list[triton.Config]:
    """Select large tiles for bf16 and small ones for fp32, which does not use tensor cores."""
    is_bf16 = args["x_ptr"].dtype == BF16
    return [config for config in configs if (config.kwargs["BLOCK_K"] == 64) == is_bf16]


def autotune_by_dtype(*key: str) -> AutotuneDecorator:
    """Return a decorator that autotunes a grouped product over the configs of its dtype."""
    configs = [
        kernel_config(8, 4, BLOCK_N=128, BLOCK_K=64),
        kernel_config(8, 3, BLOCK_N=256, BLOCK_K=64),
        kernel_config(4, 4, BLOCK_N=128, BLOCK_K=64),
        kernel_config(8, 3, BLOCK_N=64, BLOCK_K=16),
    ]
    prune = {"early_config_prune": prune_by_dtype}
    return triton.autotune(configs, key=key, prune_configs_by=prune)


@autotune_by_dtype("n", "k", "bucket", "stride_n")
@triton.jit(do_not_specialize=["m", "n_z"])
def _grouped_gemm_kernel(
    x_ptr, w_ptr, y_ptr, map_ptr, end_ptr, m, n, k, e, n_z, stride_e, stride_n, stride_k, bucket,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute 128 rows of one expert: Y = X W_eᵀ, or X W_e with exchanged strides of W."""
    tiles_m, tiles_n = tl.load(end_ptr + e - 1), tl.cdiv(n, BLOCK_N)
    if tl.program_id(0) < tiles_m * tiles_n:
        z_m, z_n = grouped_pid(tl.program_id(0), tiles_m, tiles_n)
        row, end = tl.load(map_ptr + z_m), tl.load(map_ptr + n_z + z_m)
        expert, col = tl.load(map_ptr + 2 * n_z + z_m), z_n * BLOCK_N
        i = tl.arange(0, BLOCK_K)
        rows = tl.minimum(row + tl.arange(0, 128), m - 1).to(tl.int64)
        cols = col + tl.arange(0, BLOCK_N)
        x = x_ptr + rows[:, None] * k + i[None, :]
        w_e = w_ptr + expert.to(tl.int64) * stride_e
        w = w_e + i[:, None] * stride_k + cols[None, :] * stride_n
        acc = tl.zeros((128, BLOCK_N), tl.float32)
        for z in tl.range(tl.cdiv(k, BLOCK_K)):
            inside = i < k - z * BLOCK_K
            a = tl.load(x + z * BLOCK_K, mask=inside[None, :], other=0.0)
            mask = inside[:, None] & (cols < n)[None, :]
            b = tl.load(w + z * BLOCK_K * stride_k, mask=mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        store_output_tile(y_ptr, acc, row, end, col, n)


@autotune_by_dtype("n", "k")
@triton.jit(do_not_specialize=["n_z"])
def _grouped_wgrad_kernel(
    g_ptr, x_ptr, c_ptr, map_ptr, end_ptr, n, k, n_z,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute 128 rows of one expert's gradient, dW_e = Σ_m g_mᵀ x_m over its rows."""
    tiles_n, tiles_k = tl.cdiv(n, 128), tl.cdiv(k, BLOCK_N)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile_n, tile_k = grouped_pid(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    has_rows = first < tl.load(end_ptr + expert)
    start = tl.load(map_ptr + first, mask=has_rows, other=0)
    end = tl.load(map_ptr + n_z + first, mask=has_rows, other=0)
    i, rows = tl.arange(0, BLOCK_K), tile_n * 128 + tl.arange(0, 128)
    cols = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((128, BLOCK_N), tl.float32)
    for m in tl.range(start, end, BLOCK_K):
        row, inside = (m + i).to(tl.int64), m + i < end
        g = g_ptr + row[None, :] * n + rows[:, None]
        x = x_ptr + row[:, None] * k + cols[None, :]
        a = tl.load(g, mask=inside[None, :] & (rows < n)[:, None], other=0.0)
        b = tl.load(x, mask=inside[:, None] & (cols < k)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    store_output_tile(
        c_ptr + expert.to(tl.int64) * n * k, acc, tile_n * 128, n, tile_k * BLOCK_N, k
    )


def grouped_gemm(
    x_mi: Tensor, weight_eoi: Tensor, map_xz: Tensor, end_e: Tensor, transposed: bool
) -> Tensor:
    """Compute y_mo = W_e x_mi, or with `transposed` x_mi = W_eᵀ y_mo, for rows sorted by expert."""
    m, k = x_mi.shape
    e, n, inner = weight_eoi.shape
    stride_e, stride_n, stride_k = weight_eoi.stride()
    if transposed:
        n = inner
        stride_n, stride_k = stride_k, stride_n
    y = x_mi.new_empty(m, n)
    if y.numel():
        n_z = map_xz.shape[1]
        sizes = m, n, k, e, n_z, stride_e, stride_n, stride_k, autotune_bucket(m)
        grid = cdiv_grid(n, "BLOCK_N", n_z)
        _grouped_gemm_kernel[grid](x_mi, weight_eoi, y, map_xz, end_e, *sizes)
    return y


def grouped_wgrad(g_mo: Tensor, x_mi: Tensor, map_xz: Tensor, end_e: Tensor) -> Tensor:
    """Compute dW_e = Σ_m g_mᵀ x_m over the rows of each expert, (e, o, i)."""
    n, k = g_mo.shape[1], x_mi.shape[1]
    e = len(end_e)
    dw = x_mi.new_empty(e, n, k)
    if dw.numel():
        grid = cdiv_grid(k, "BLOCK_N", e * num_blocks(n))
        _grouped_wgrad_kernel[grid](g_mo, x_mi, dw, map_xz, end_e, n, k, map_xz.shape[1])
    return dw


class TritonGroupedLinear(torch.autograd.Function):
    """A linear layer y_m = W_e(m) x_m whose host code never reads the counts.

    The gradient of the weight is passed to `defer_wgrad`.
    """

    @staticmethod
    def forward(ctx: Any, x_mi: Tensor, weight_eoi: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight_eoi, x_mi.dtype  # the parameter itself, not its bf16 copy
        x_mi = x_mi.to(matmul_dtype(x_mi))
        map_xz, end_e = tile_map(tokens_per_expert_e, len(x_mi))
        ctx.save_for_backward(x_mi, map_xz, end_e)
        return grouped_gemm(x_mi, weight_eoi.to(x_mi.dtype), map_xz, end_e, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_mo: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # a deferred Wgrad would keep the graph that made x
        x_mi, map_xz, end_e = (x.detach() for x in ctx.saved_tensors)
        weight, g_mo = ctx.weight, g_mo.contiguous()

        def wgrad(out: Tensor | None = None) -> Tensor:
            dw_eoi = grouped_wgrad(g_mo, x_mi, map_xz, end_e)
            return dw_eoi.to(weight.dtype) if out is None else out.add_(dw_eoi)

        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = grouped_gemm(g_mo, weight.to(g_mo.dtype), map_xz, end_e, transposed=True)
            dx = dx.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = defer_wgrad(weight, wgrad)
        return dx, dw, None


@impl("grouped_linear", "triton")
@on_its_device
def grouped_linear(x_mi: Tensor, weight_eoi: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """Multiply each row by the matrix of its expert: y_m = W_e(m) x_m, (m, o).

    The rows are sorted by expert; the counts sum to m.
    """
    check_tensor("x_mi", x_mi, (None, None), FLOATS)
    dtypes = FLOATS if torch.is_autocast_enabled(x_mi.device.type) else (x_mi.dtype,)
    shape = len(tokens_per_expert_e), None, x_mi.shape[1]
    check_tensor("weight_eoi", weight_eoi, shape, dtypes)
    return TritonGroupedLinear.apply(x_mi, weight_eoi, tokens_per_expert_e)


# ── For the ahead-of-time compiler: V3's shapes, 8 experts, 4096 rows ──


def fp8_gemm_case(name: str, dtype: torch.dtype, n: int, k: int, e: int = 1) -> AOTCase:
    """Return the case of 4096 rows in tiles times weights in blocks."""
    maps = (INT32, INT32) if e > 1 else (None, None)
    args = E4M3, FP32, E4M3, FP32, dtype, *maps, 4096, n, k, e, 40, autotune_bucket(4096)
    return AOTCase(name, _fp8_gemm_kernel, args, {"GROUPED": e > 1}, "fp8")


def fp8_wgrad_case(name: str, dtype: torch.dtype, e: int = 1, add: bool = False) -> AOTCase:
    """Return the case of a weight's gradient, with both operands in tiles along the tokens."""
    args = E4M3, FP32, E4M3, FP32, dtype, INT32 if e > 1 else None, 2048, 7168, 5120, e, 40
    return AOTCase(name, _fp8_wgrad_kernel, args, {"GROUPED": e > 1, "ADD": add}, "fp8")


def grouped_case(name: str, dtype: torch.dtype, strides: tuple[int, int]) -> AOTCase:
    """Return the case of a grouped product; the strides of o and i distinguish Fprop and Dgrad."""
    args = dtype, dtype, dtype, INT32, INT32, 4096, 2048, 7168, 8, 40, 2048 * 7168, *strides, 4
    return AOTCase(name, _grouped_gemm_kernel, args, {}, "bf16" if dtype == BF16 else "")


def grouped_wgrad_case(name: str, dtype: torch.dtype) -> AOTCase:
    """Return the case of the gradient of grouped weights."""
    args = dtype, dtype, dtype, INT32, INT32, 2048, 7168, 40
    return AOTCase(name, _grouped_wgrad_kernel, args, {}, "bf16" if dtype == BF16 else "")


AOT_CASES = [
    fp8_gemm_case("fp8_gemm", BF16, 7168, 16384),
    fp8_gemm_case("fp8_gemm_fp32", FP32, 2112, 7168),
    fp8_gemm_case("fp8_grouped_gemm", BF16, 4096, 7168, 8),
    fp8_gemm_case("fp8_grouped_gemm_fp32", FP32, 7168, 2048, 8),
    fp8_wgrad_case("fp8_gemm_tiles", FP32),
    fp8_wgrad_case("fp8_gemm_tiles_bf16", BF16),
    fp8_wgrad_case("fp8_grouped_wgrad", FP32, 8),
    fp8_wgrad_case("fp8_grouped_wgrad_add", FP32, 8, add=True),
    grouped_case("grouped_linear_bfloat16", BF16, (7168, 1)),
    grouped_case("grouped_linear_dgrad_bfloat16", BF16, (1, 2048)),
    grouped_wgrad_case("grouped_linear_wgrad_bfloat16", BF16),
    grouped_case("grouped_linear_float32", FP32, (7168, 1)),
    grouped_case("grouped_linear_dgrad_float32", FP32, (1, 2048)),
    grouped_wgrad_case("grouped_linear_wgrad_float32", FP32),
]
