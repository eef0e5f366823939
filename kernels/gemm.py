"""Matrix products: FP8 promoted to fp32 every 128, and rows sorted by expert in any precision."""

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    AOTCase,
    autotune_bucket,
    check_tensor,
    num_sms,
)
from dsv3_ref.kernels.quant import E4M3, INT32, num_blocks, tile_map
from triton.runtime import driver

from dsv3_ref import fp8, moe  # noqa: F401  define the ops
from dsv3_ref.ops import defer_wgrad, impl, matmul_dtype

# ── Which configs are tried ──


def is_hopper() -> bool:
    """Whether kernels are compiled for sm_90; the interpreter takes what Hopper takes."""
    return triton.knobs.runtime.interpret or driver.active.get_current_target().arch == 90


def config_fits(config, given) -> bool:
    """Whether a config of an FP8 product compiles well for this GPU, without spills.

    Split roles (WS): Hopper's compiler makes of four warps one group that loads and two that
    multiply 64 rows each; Blackwell's adds one warp that loads, one that multiplies.
    """
    of, hopper = config.kwargs, is_hopper()
    if given.get("GROUPED") and of["BLOCK_M"] != 128:  # the map of rows is one of 128
        return False
    if of["WS"]:
        return config.num_warps == (4 if hopper else 8)
    return of["BLOCK_N"] != 192 or hopper


def prune_fp8_configs(configs, named, **rest):
    return [c for c in configs if config_fits(c, named | rest)]


def autotune_fp8(configs, *key):
    """Autotuning of an FP8 product over the configs that suit the GPU."""
    return triton.autotune(
        configs, key=key, prune_configs_by={"early_config_prune": prune_fp8_configs}
    )


def fp8_config(block_m: int, block_n: int, warps: int, stages: int, ws: bool = False):
    meta = {"BLOCK_M": block_m, "BLOCK_N": block_n, "WS": ws}
    return triton.Config(meta, num_warps=warps, num_stages=stages)


WGRAD_CONFIGS = [fp8_config(128, 128, 8, 4), fp8_config(128, 128, 4, 4, ws=True)]
BLOCKWISE_CONFIGS = [
    fp8_config(128, 128, 8, 4),
    fp8_config(128, 192, 8, 4),
    fp8_config(128, 128, 4, 5, ws=True),
    fp8_config(128, 192, 4, 4, ws=True),
    fp8_config(128, 128, 8, 4, ws=True),
    fp8_config(64, 128, 4, 5),
]

# ── Launching ──


def tma_scratch(size: int, alignment: int, stream):
    """Memory in which a kernel writes its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch_persistent(kernel, programs: int, *args) -> None:
    """Run a persistent kernel: a program a multiprocessor, each with every n-th tile."""
    triton.set_allocator(tma_scratch)  # each time: autograd's threads do not see what others set
    kernel[(min(programs, num_sms(args[0])),)](*args)


@triton.jit
def grouped_pid(tile, tiles_m, tiles_n):
    """Tile's row and column, eight rows of tiles at a time: neighbors share what L2 holds."""
    width = 8 * tiles_n
    first = tile // width * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + tile % width % height, tile % width // height


@triton.jit
def store_output_tile(c_ptr, acc, row, end, col, n):
    """Store a tile, but for rows from `end` and columns from `n` on."""
    rows = row + tl.arange(0, acc.shape[0])
    cols = col + tl.arange(0, acc.shape[1])
    at = c_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    mask = (rows < end)[:, None] & (cols < n)[None, :]
    tl.store(at, acc.to(c_ptr.dtype.element_ty), mask=mask)


# ── FP8: rows in tiles of 1 × 128 times weights in blocks of 128 × 128 ──


@autotune_fp8(BLOCKWISE_CONFIGS, "n", "k", "bucket", "GROUPED")
@triton.jit(do_not_specialize=["m", "n_z"])
def _fp8_gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, map_ptr, end_ptr, m, n, k, e, n_z, bucket,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """C = Σ_z s^a_z s^b_z (A_z · B_zᵀ): tensor cores, of 14 bits, add 128 of k; fp32 the rest."""
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
            row, end, expert = z_m * BLOCK_M, m, 0
        col = z_n * BLOCK_N
        if BLOCK_N == 192:  # 128 columns and 64, so laid that each has one block of scales
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
            s_ab = s * tl.load(s_b + z)  # loaded before the product, to arrive while it runs
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


def tma_readable(x):
    """x as TMA can read it: rows of whole 16 bytes from such an address on; a copy if need be."""
    if x.shape[-1] % 16:
        return torch.nn.functional.pad(x.view(torch.uint8), (0, -x.shape[-1] % 16)).view(E4M3)
    return x.clone() if x.data_ptr() % 16 else x


def check_operand(name: str, q, shape, s, s_shape) -> None:
    """Codes and their scales."""
    check_tensor(name, q, shape, (E4M3,))
    check_tensor(f"{name}_s", s, s_shape, (FP32,))


def fp8_gemm_blockwise(a, a_s, b, b_s, c, map_xz, end_e, e: int):
    """Fill c by the product of rows with one weight or `e` of them."""
    (m, n), k, n_z = c.shape, a.shape[1], 0 if map_xz is None else map_xz.shape[1]
    if not k:
        return c.zero_()
    if c.numel():
        a, b = tma_readable(a), tma_readable(b)
        args = a, a_s, b, b_s, c, map_xz, end_e, m, n, a.shape[1], e, n_z, autotune_bucket(m)
        programs = max(n_z, triton.cdiv(m, 64)) * triton.cdiv(n, 128)
        launch_persistent(_fp8_gemm_kernel, programs, *args, map_xz is not None)
    return c


@impl("fp8_gemm", "triton")
def fp8_gemm(a, a_s, b, b_s, dtype=FP32):
    """C = A Bᵀ, (m, k) × (n, k): Σ_z s^a_z s^b_z (A_z · B_zᵀ), promoted to fp32 every 128 of k.

    b_s: (⌈n/128⌉, ⌈k/128⌉), the blocks of a weight, or (n, ⌈k/128⌉), tiles like A's (Wgrad).
    """
    check_tensor("a", a, (None, None), (E4M3,))
    (m, k), n = a.shape, len(b)
    check_operand("a", a, (m, k), a_s, (m, num_blocks(k)))
    by_tiles = n > 1 and len(b_s) == n
    check_operand("b", b, (n, k), b_s, (n if by_tiles else num_blocks(n), num_blocks(k)))
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    check_tensor("the result", c, dtypes=FLOATS)
    if by_tiles:
        return fp8_wgrad(a, a_s, b, b_s, c, None, 1)
    return fp8_gemm_blockwise(a, a_s, b, b_s, c, None, None, 1)


@impl("fp8_grouped_gemm", "triton")
def fp8_grouped_gemm(a, a_s, b, b_s, tokens_per_expert_e, dtype=FP32):
    """`fp8_gemm` of every expert's rows with its own weight: (m, k) × (e, n, k) → (m, n)."""
    check_tensor("a", a, (None, None), (E4M3,))
    check_tensor("b", b, (len(tokens_per_expert_e), None, a.shape[1]), (E4M3,))
    (m, k), (e, n, _) = a.shape, b.shape
    check_operand("a", a, (m, k), a_s, (m, num_blocks(k)))
    check_operand("b", b, (e, n, k), b_s, (e, num_blocks(n), num_blocks(k)))
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    check_tensor("the result", c, dtypes=FLOATS)
    return fp8_gemm_blockwise(a, a_s, b, b_s, c, *tile_map(tokens_per_expert_e, m), e)


# ── FP8: both sides in tiles of 1 × 128, summed over an expert's rows ──


@triton.jit
def load_broadcast(ptr):
    """Load a vector that runs along columns, once and not in every thread: in two dimensions.

    Else the compiler makes each thread load the 32 numbers that it needs.
    """
    two = tl.arange(0, 2)[None, :]
    return tl.sum(tl.load(ptr[:, None] + two, mask=two == 0, other=0.0), 1)


@autotune_fp8(WGRAD_CONFIGS, "n", "k")
@triton.jit(do_not_specialize=["n_z"])
def _fp8_wgrad_kernel(
    g_ptr, g_s_ptr, x_ptr, x_s_ptr, c_ptr, end_ptr, n, k, m, e, n_z,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """For each expert, over the tiles z of its rows: C = Σ_z s^g_z s^x_z (G_z · X_zᵀ)."""
    g_desc = tl.make_tensor_descriptor(g_ptr, [n, m], [m, 1], [BLOCK_M, 128])
    x_desc = tl.make_tensor_descriptor(x_ptr, [k, m], [m, 1], [BLOCK_N, 128])
    tiles_n, tiles_k = tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N)
    each = tiles_n * tiles_k
    for tile in tl.range(tl.program_id(0), e * each, tl.num_programs(0)):
        expert = tile // each
        at_n, at_k = grouped_pid(tile % each, tiles_n, tiles_k)
        first, last = 0, n_z
        if GROUPED:
            first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
            last = tl.load(end_ptr + expert)
        row, col = at_n * BLOCK_M, at_k * BLOCK_N
        g_s = g_s_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), n - 1) * n_z
        x_s = x_s_ptr + tl.minimum(col + tl.arange(0, BLOCK_N), k - 1) * n_z
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for z in tl.range(first, last, warp_specialize=WS):
            s_row, s_col = tl.load(g_s + z), load_broadcast(x_s + z)
            g = g_desc.load([row, z * 128])
            product = tl.dot(g, x_desc.load([col, z * 128]).T)
            acc += product * s_row[:, None] * s_col[None, :]
        store_output_tile(c_ptr + expert.to(tl.int64) * n * k, acc, row, n, col, k)


def fp8_wgrad(g, g_s, x, x_s, c, end_e, e: int):
    """Fill c (e, n, k), or (n, k), by the product of g (n, m) with x (k, m)."""
    n, k = c.shape[-2:]
    if not g.shape[1]:
        return c.zero_()
    if c.numel():
        g, x = tma_readable(g), tma_readable(x)
        args = g, g_s, x, x_s, c, end_e, n, k, g.shape[1], e, g_s.shape[1], end_e is not None
        launch_persistent(_fp8_wgrad_kernel, e * num_blocks(n) * num_blocks(k), *args)
    return c


@impl("fp8_grouped_wgrad", "triton")
def fp8_grouped_wgrad(g, g_s, x, x_s, tokens_per_expert_e):
    """∂L/∂W of every expert, gᵀ x over its rows: (n, 128·Z), (k, 128·Z) → (e, n, k), fp32."""
    check_tensor("g", g, (None, None), (E4M3,))
    (n, m), k, e = g.shape, len(x), len(tokens_per_expert_e)
    check_operand("g", g, (n, num_blocks(m) * 128), g_s, (n, num_blocks(m)))
    check_operand("x", x, (k, m), x_s, (k, num_blocks(m)))
    c = torch.empty(e, n, k, dtype=FP32, device=g.device)
    # of m rows only Z is known, ⌊m/128⌋ + e; any m that gives it gives the same ends
    return fp8_wgrad(
        g, g_s, x, x_s, c, tile_map(tokens_per_expert_e, (num_blocks(m) - e) * 128)[1], e
    )


# ── bf16 and fp32: rows sorted by expert ──


def grouped_config(block_n: int, block_k: int, warps: int, stages: int):
    meta = {"BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(meta, num_warps=warps, num_stages=stages)


def prune_by_dtype(configs, named, **rest):
    """bf16 goes to the tensor cores, in large tiles; fp32 does not, if it is to stay fp32."""
    narrow = named["x_ptr"].dtype == BF16
    return [c for c in configs if (c.kwargs["BLOCK_K"] == 64) == narrow]


def autotune_by_dtype(*key):
    configs = [
        grouped_config(128, 64, 8, 4),
        grouped_config(256, 64, 8, 3),
        grouped_config(128, 64, 4, 4),
        grouped_config(64, 16, 8, 3),
    ]
    return triton.autotune(
        configs, key=key, prune_configs_by={"early_config_prune": prune_by_dtype}
    )


@autotune_by_dtype("n", "k", "bucket", "stride_n")
@triton.jit(do_not_specialize=["m", "n_z"])
def _grouped_gemm_kernel(
    x_ptr, w_ptr, y_ptr, map_ptr, end_ptr, m, n, k, e, n_z, stride_e, stride_n, stride_k, bucket,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """128 rows of one expert: Y = X W_eᵀ, or X W_e if the strides are exchanged."""
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
            there = i < k - z * BLOCK_K
            a = tl.load(x + z * BLOCK_K, mask=there[None, :], other=0.0)
            mask = there[:, None] & (cols < n)[None, :]
            b = tl.load(w + z * BLOCK_K * stride_k, mask=mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        store_output_tile(y_ptr, acc, row, end, col, n)


@autotune_by_dtype("n", "k")
@triton.jit(do_not_specialize=["n_z"])
def _grouped_wgrad_kernel(
    g_ptr, x_ptr, c_ptr, map_ptr, end_ptr, n, k, n_z,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """128 rows of one expert's gradient, over its rows of x: dW_e = Σ_m g_mᵀ x_m."""
    tiles_n, tiles_k = tl.cdiv(n, 128), tl.cdiv(k, BLOCK_N)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    at_n, at_k = grouped_pid(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    some = first < tl.load(end_ptr + expert)
    start = tl.load(map_ptr + first, mask=some, other=0)
    end = tl.load(map_ptr + n_z + first, mask=some, other=0)
    i, rows = tl.arange(0, BLOCK_K), at_n * 128 + tl.arange(0, 128)
    cols = at_k * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((128, BLOCK_N), tl.float32)
    for m in tl.range(start, end, BLOCK_K):
        at, there = (m + i).to(tl.int64), m + i < end
        g = g_ptr + at[None, :] * n + rows[:, None]
        x = x_ptr + at[:, None] * k + cols[None, :]
        a = tl.load(g, mask=there[None, :] & (rows < n)[:, None], other=0.0)
        b = tl.load(x, mask=there[:, None] & (cols < k)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    store_output_tile(c_ptr + expert.to(tl.int64) * n * k, acc, at_n * 128, n, at_k * BLOCK_N, k)


def grouped_gemm(x_mi, weight_eoi, map_xz, end_e, transposed: bool):
    """y_mo = W_e x, or with `transposed` from rows of (m, o): W_eᵀ x."""
    (m, k), (e, o, i), n_z = x_mi.shape, weight_eoi.shape, map_xz.shape[1]
    stride_e, stride_n, stride_k = weight_eoi.stride()
    n = o
    if transposed:
        n, stride_n, stride_k = i, stride_k, stride_n
    y = x_mi.new_empty(m, n)
    if y.numel():
        grid = lambda meta: (n_z * triton.cdiv(n, meta["BLOCK_N"]),)
        sizes = m, n, k, e, n_z, stride_e, stride_n, stride_k, autotune_bucket(m)
        _grouped_gemm_kernel[grid](x_mi, weight_eoi, y, map_xz, end_e, *sizes)
    return y


def grouped_wgrad(g_mo, x_mi, map_xz, end_e):
    """dW_e = Σ_m g_mᵀ x_m over the rows of each expert, (e, o, i)."""
    (e,), n, k = end_e.shape, g_mo.shape[1], x_mi.shape[1]
    dw = x_mi.new_empty(e, n, k)
    if dw.numel():
        grid = lambda meta: (e * num_blocks(n) * triton.cdiv(k, meta["BLOCK_N"]),)
        sizes = n, k, map_xz.shape[1]
        _grouped_wgrad_kernel[grid](g_mo, x_mi, dw, map_xz, end_e, *sizes)
    return dw


class GroupedLinear(torch.autograd.Function):
    """y_m = W_e(m) x_m and its gradients, without waiting for the counts; dW when `defer_wgrad` says."""

    @staticmethod
    def forward(ctx, x_mi, weight_eoi, tokens_per_expert_e):
        ctx.weight, ctx.dtype = weight_eoi, x_mi.dtype  # the parameter itself, not a narrow copy
        x_mi, maps = x_mi.to(matmul_dtype(x_mi)), tile_map(tokens_per_expert_e, len(x_mi))
        ctx.save_for_backward(x_mi, *maps)
        return grouped_gemm(x_mi, weight_eoi.to(x_mi.dtype), *maps, transposed=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_mo):
        (x_mi, *maps), weight, g_mo = ctx.saved_tensors, ctx.weight, g_mo.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = grouped_gemm(g_mo, weight.to(g_mo.dtype), *maps, transposed=True).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = defer_wgrad(weight, lambda: grouped_wgrad(g_mo, x_mi, *maps).to(weight.dtype))
        return dx, dw, None


@impl("grouped_linear", "triton")
def grouped_linear(x_mi, weight_eoi, tokens_per_expert_e):
    """Rows sorted by expert, each times its own matrix: y_m = W_e(m) x_m; tokens_per_expert_e sums to m."""
    check_tensor("x_mi", x_mi, (None, None), FLOATS)
    like = FLOATS if torch.is_autocast_enabled(x_mi.device.type) else (x_mi.dtype,)
    check_tensor("weight_eoi", weight_eoi, (len(tokens_per_expert_e), None, x_mi.shape[1]), like)
    return GroupedLinear.apply(x_mi, weight_eoi, tokens_per_expert_e)


# ── For the ahead-of-time compiler: V3's shapes, 8 experts, 4096 rows ──


def fp8_gemm_case(name: str, dtype, n: int, k: int, e: int = 1) -> AOTCase:
    """4096 rows in tiles times weights in blocks."""
    maps = (INT32, INT32) if e > 1 else (None, None)
    args = E4M3, FP32, E4M3, FP32, dtype, *maps, 4096, n, k, e, 40, autotune_bucket(4096)
    return AOTCase(name, _fp8_gemm_kernel, args, {"GROUPED": e > 1}, "fp8")


def wgrad_case(name: str, dtype, e: int = 1) -> AOTCase:
    args = E4M3, FP32, E4M3, FP32, dtype, INT32 if e > 1 else None, 2048, 7168, 5120, e, 40
    return AOTCase(name, _fp8_wgrad_kernel, args, {"GROUPED": e > 1}, "fp8")


def grouped_case(name: str, dtype, strides) -> AOTCase:
    args = dtype, dtype, dtype, INT32, INT32, 4096, 2048, 7168, 8, 40, 2048 * 7168, *strides, 4
    return AOTCase(name, _grouped_gemm_kernel, args, {}, "bf16" if dtype == BF16 else "")


AOT_CASES = [
    fp8_gemm_case("fp8_gemm", BF16, 7168, 16384),
    fp8_gemm_case("fp8_gemm_fp32", FP32, 2112, 7168),
    fp8_gemm_case("fp8_grouped_gemm", BF16, 4096, 7168, 8),
    fp8_gemm_case("fp8_grouped_gemm_fp32", FP32, 7168, 2048, 8),
    wgrad_case("fp8_gemm_tiles", FP32),
    wgrad_case("fp8_gemm_tiles_bf16", BF16),
    wgrad_case("fp8_grouped_wgrad", FP32, 8),
]
for dtype, kind in ((BF16, "bf16"), (FP32, "")):
    suffix = str(dtype)[6:]
    args = dtype, dtype, dtype, INT32, INT32, 2048, 7168, 40
    AOT_CASES += [
        grouped_case(f"grouped_linear_{suffix}", dtype, (7168, 1)),
        grouped_case(f"grouped_linear_dgrad_{suffix}", dtype, (1, 2048)),
        AOTCase(f"grouped_linear_wgrad_{suffix}", _grouped_wgrad_kernel, args, {}, kind),
    ]
