"""Absorbed MLA for decoding: attention over a latent cache, split evenly over the GPU.

Every head reads the same 576 numbers per key, of which 512 are also the value. A program therefore
processes a block of (query, head) rows over a range of keys and loads each key once. Work is
counted in units of 64 keys and divided into equal splits, one per program, whatever the lengths: a
split may contain the end of one sequence and the beginning of the next. A second kernel combines
the splits of a sequence.
"""

from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    INT32,
    AOTCase,
    autotune_bucket,
    check_tensor,
    kernel_config,
    num_sms,
    on_its_device,
)  # fmt: skip
from torch import Tensor

import dsv3_ref.mla  # noqa: F401  defines the ops
from dsv3_ref.ops import impl

LENGTH_DTYPES = (INT32, torch.int64)
LOG2_E = 1.4426950408889634
KEYS_PER_UNIT = tl.constexpr(64)
MIN_UNITS_PER_SPLIT = tl.constexpr(2)  # below it, combining costs more than splitting saves


# ── Splits of the work ──


@triton.jit
def split_work(length_ptr, b, max_splits, BLOCK_B: tl.constexpr):
    """Return (units of each sequence, number of splits, each, more).

    total = n_splits · each + more: the first `more` splits have each + 1 units, the others each.
    """
    i = tl.arange(0, BLOCK_B)
    unit_b = tl.cdiv(tl.load(length_ptr + i, mask=i < b, other=0).to(tl.int32), KEYS_PER_UNIT)
    total = tl.sum(unit_b, 0)
    n_splits = tl.maximum(tl.minimum(max_splits, tl.cdiv(total, MIN_UNITS_PER_SPLIT)), 1)
    return unit_b, n_splits, total // n_splits, total % n_splits


@triton.jit
def split_begin(split, each, more):
    """Return the first unit of a split."""
    return split * each + tl.minimum(split, more)


@triton.jit
def split_of_unit(unit, each, more):
    """Return the split that a unit lies in."""
    large = more * (each + 1)
    small = more + (unit - large) // tl.maximum(each, 1)
    return tl.where(unit < large, unit // (each + 1), small)


# ── Attention of a block of rows to a range of keys ──


@triton.jit
def tile_mask(rows, col, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mask a tile by rows and, where the block is wider than SIZE, by columns."""
    mask = rows[:, None]
    if SIZE != BLOCK:
        mask = mask & (col < SIZE)[None, :]
    return mask


@triton.jit
def zero_after(x):
    """Return 0 for x ≥ 0, without the compiler's knowledge: a sum with it is computed after x."""
    return (x < 0).to(tl.int32)


@triton.jit
def load_queries(ptr, row, h, stride_s, stride_h, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of (query, head) rows of one sequence; only the last stride must be 1."""
    col = tl.arange(0, BLOCK)
    offset = (row // h).to(tl.int64) * stride_s + (row % h).to(tl.int64) * stride_h
    return tl.load(ptr + offset[:, None] + col[None, :], tile_mask(row >= 0, col, SIZE, BLOCK), 0)


@triton.jit
def online_softmax_step(s, c, m_i, sums, acc, PRECISION: tl.constexpr):
    """Update an online softmax by one tile: o ← o · 2^(m_i − m_new) + 2^(s − m_new) c."""
    BLOCK_M: tl.constexpr = s.shape[0]
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    # two sums, one per warpgroup, which exchange them only at the end
    half = tl.sum(tl.reshape(p, (BLOCK_M, 2, s.shape[1] // 2)), 2)
    sums = sums * alpha[:, None] + half
    acc = tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, sums, acc


@triton.jit
def attend_range(
    q_c, q_r, c_ptr, r_ptr, table, scale, low, high, length, visible, page_c, page_r,
    PAGE: tl.constexpr, KEY_C: tl.constexpr, KEY_R: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to keys low to high of one sequence.

    Returns each row's largest score m, Σ 2^(s − m) and Σ 2^(s − m) c.

    Both branches also guide the compiler. With `start < most` it issues the next tile's loads
    before the products of this one instead of after them. For a chain of two products it places
    all warps along the rows; 64 rows occupy only half of them, so each score is computed twice.
    The branch on `start + BLOCK_T <= fewest` breaks that chain.
    """
    near = tl.arange(0, BLOCK_T)
    col_c, col_r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    fewest, most = tl.min(visible, 0), tl.max(visible, 0)
    m_i = tl.full((BLOCK_M,), -1e30, tl.float32)
    sums = tl.zeros((BLOCK_M, 2), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    page = tl.load(table + (low // PAGE if PAGE else 0))
    for start in tl.range(low, high, BLOCK_T, num_stages=STAGES, disable_licm=True):
        real = near < length - start  # unwritten slots may hold NaN
        if PAGE % BLOCK_T == 0:  # the tile lies in one page, which is looked up one tile ahead
            offset_c = page.to(tl.int64) * page_c + (start % PAGE if PAGE else start) * KEY_C
            offset_r = page.to(tl.int64) * page_r + (start % PAGE if PAGE else start) * KEY_R
            offset_c += near * KEY_C
            offset_r += near * KEY_R
            if PAGE:
                page = tl.load(table + tl.minimum(start + BLOCK_T, length - 1) // PAGE)
        else:
            key = start + near
            pages = tl.load(table + key // PAGE, mask=real, other=0).to(tl.int64)
            offset_c = pages * page_c + (key % PAGE) * KEY_C
            offset_r = pages * page_r + (key % PAGE) * KEY_R
        c = tl.load(
            c_ptr + offset_c[:, None] + col_c[None, :], tile_mask(real, col_c, C, BLOCK_C), 0
        )
        r = tl.load(
            r_ptr + offset_r[:, None] + col_r[None, :], tile_mask(real, col_r, R, BLOCK_R), 0
        )
        if start < most:
            s = tl.dot(q_c, c.T, input_precision=PRECISION) * scale
            if start + BLOCK_T <= fewest:
                s += tl.dot(q_r, r.T, input_precision=PRECISION) * scale
            else:
                s += tl.dot(q_r, r.T, input_precision=PRECISION) * scale
                s = tl.where(near[None, :] < (visible - start)[:, None], s, -float("inf"))
            m_i, sums, acc = online_softmax_step(s, c, m_i, sums, acc, PRECISION)
    return m_i, tl.sum(sums, 1), acc


def prune_decode_configs(
    configs: list[triton.Config], args: dict, PAGE: int, **_: object
) -> list[triton.Config]:
    """Select the configs for a dtype and page size.

    fp32 needs the smallest blocks. Where tiles cross pages, each key of a tile has its own address,
    so only tiles of 32 keys are tried.
    """
    tensor_core_sizes = {32} if PAGE % 64 else {32, 64}
    block_sizes = {16} if args["c_ptr"].dtype == FP32 else tensor_core_sizes
    return [config for config in configs if config.kwargs["BLOCK_T"] in block_sizes]


@triton.autotune(
    [
        kernel_config(8, BLOCK_M=64, BLOCK_T=64, STAGES=2),
        kernel_config(8, BLOCK_M=64, BLOCK_T=32, STAGES=3),
        kernel_config(8, BLOCK_M=16, BLOCK_T=16, STAGES=1),
    ],
    key=["rows", "PAGE", "C", "R", "bucket"],
    prune_configs_by={"early_config_prune": prune_decode_configs},
)
@triton.jit(do_not_specialize=["b", "stride_table", "bucket"])
def _mla_decode_split_kv_kernel(
    q_c_ptr, q_r_ptr, c_ptr, r_ptr, table_ptr, length_ptr, o_ptr, partial_o_ptr, lse_ptr,
    scale, b, rows, h, stride_table, page_c, page_r, qc_b, qc_s, qc_h, qr_b, qr_s, qr_h, bucket,
    PAGE: tl.constexpr, KEY_C: tl.constexpr, KEY_R: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with a block of rows to one split of the keys.

    o = softmax(scale·(q^C·c + q^R·k)) c.
    """
    split = tl.program_id(1)
    unit_b, n_splits, each, more = split_work(length_ptr, b, tl.num_programs(1), BLOCK_B)
    if split >= n_splits:
        return
    begin, end = split_begin(split, each, more), split_begin(split + 1, each, more)
    stop_b, remaining = tl.cumsum(unit_b, 0), end - begin
    # the sequences of this split and the empty ones after them
    first = tl.where(split == 0, 0, tl.sum((stop_b <= begin).to(tl.int32), 0))
    last = tl.sum((stop_b <= end).to(tl.int32), 0) - 1
    last = tl.minimum(tl.maximum(last, tl.sum((stop_b < end).to(tl.int32), 0)), b - 1)
    skip = begin - tl.sum(tl.where(stop_b <= begin, unit_b, 0), 0)  # units of the first sequence
    # `disable_licm` and `zero_after` keep addresses from being computed early, in registers
    for i in tl.range(first, last + 1, disable_licm=True):
        length = tl.load(length_ptr + i).to(tl.int32)
        low = skip * KEYS_PER_UNIT
        high = tl.minimum(low + remaining * KEYS_PER_UNIT, length)
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.minimum(row + zero_after(length), rows - 1)
        batch = tl.cast(i, tl.int64)
        q_c = load_queries(q_c_ptr + batch * qc_b, row, h, qc_s, qc_h, C, BLOCK_C)
        q_r = load_queries(q_r_ptr + batch * qr_b, row, h, qr_s, qr_h, R, BLOCK_R)
        visible = length - (rows - 1 - row) // h  # the last query attends to all keys
        m_i, total, acc = attend_range(
            q_c, q_r, c_ptr, r_ptr, table_ptr + batch * stride_table, scale, low, high, length,
            visible, page_c, page_r, PAGE, KEY_C, KEY_R, C, R, BLOCK_C, BLOCK_R, PRECISION,
            BLOCK_M, BLOCK_T, STAGES,
        )  # fmt: skip
        acc = acc / tl.where(total > 0, total, 1)[:, None]
        col_c = tl.arange(0, BLOCK_C)
        o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M) + zero_after(tl.max(total, 0))
        mask = tile_mask(o_row < rows, col_c, C, BLOCK_C)
        if (low == 0) & (high == length):
            offset = (batch * rows + o_row)[:, None] * C + col_c[None, :]
            tl.store(o_ptr + offset, acc.to(o_ptr.dtype.element_ty), mask)
        else:
            slot = (2 * split + (low == 0).to(tl.int32)).to(tl.int64) * rows + o_row
            tl.store(partial_o_ptr + slot[:, None] * C + col_c[None, :], acc, mask)
            tl.store(lse_ptr + slot, m_i + tl.log2(tl.maximum(total, 1e-30)), o_row < rows)
        remaining -= tl.cdiv(high - low, KEYS_PER_UNIT)
        skip = 0


# ── Combining the splits of a sequence ──


@triton.autotune(
    [kernel_config(4, ROWS=rows, GROUP=group) for rows, group in ((1, 16), (4, 4), (8, 2))],
    key=["C", "BLOCK_B", "max_splits"],
)
@triton.jit(do_not_specialize=["b"])
def _combine_splits_kernel(
    partial_o_ptr, lse_ptr, length_ptr, o_ptr, b, rows, max_splits,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Combine the splits p of a sequence: o = Σ 2^lse_p o_p / Σ 2^lse_p.

    The program of its second split does so; all others return early.
    """
    split = tl.program_id(1) + 1
    unit_b, n_splits, each, more = split_work(length_ptr, b, max_splits, BLOCK_B)
    cut, stop_b = split_begin(split, each, more), tl.cumsum(unit_b, 0)
    i = tl.sum((stop_b <= cut).to(tl.int32), 0)  # the sequence at the cut
    start = tl.sum(tl.where(stop_b <= cut, unit_b, 0), 0)
    first = split_of_unit(start, each, more)
    if (split >= n_splits) | (start == cut) | (split != first + 1):
        return
    last = split_of_unit(tl.min(tl.where(stop_b > cut, stop_b, 2147483647), 0) - 1, each, more)
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    m_i = tl.full((ROWS,), -1e30, tl.float32)
    total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, BLOCK_C), tl.float32)
    for p in range(first, last + 1, GROUP):
        near = p + tl.arange(0, GROUP)
        slot = (2 * near + (near == first).to(tl.int32)).to(tl.int64)
        offset = slot[:, None] * rows + row[None, :]
        mask = (near <= last)[:, None] & (row < rows)[None, :]
        lse = tl.load(lse_ptr + offset, mask=mask, other=-float("inf"))
        mask = mask[:, :, None] & (col < C)[None, None, :]
        o = tl.load(partial_o_ptr + offset[:, :, None] * C + col[None, None, :], mask=mask, other=0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        weight, alpha = tl.exp2(lse - m_new[None, :]), tl.exp2(m_i - m_new)
        total = total * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(o * weight[:, :, None], 0)
        m_i = m_new
    acc = acc / tl.where(total > 0, total, 1)[:, None]
    offset = (i.to(tl.int64) * rows + row)[:, None] * C + col[None, :]
    tl.store(o_ptr + offset, acc.to(o_ptr.dtype.element_ty), tile_mask(row < rows, col, C, BLOCK_C))


# ── Ops ──


def mla_decode(
    q_bshc: Tensor,
    q_bshr: Tensor,
    c_pyc: Tensor,
    r_pyr: Tensor,
    block_table_bp: Tensor,
    cache_seqlens_b: Tensor,
    scale: float,
) -> Tensor:
    """Launch both kernels and return o, (b, s, h, c); the host never reads the lengths."""
    (b, s, h, c), r = q_bshc.shape, q_bshr.shape[-1]
    rows = s * h
    max_splits = max(1, num_sms(q_bshc, 4) // triton.cdiv(rows, 64))
    o_bshc = q_bshc.new_empty(b, s, h, c)
    partial_o_xc = q_bshc.new_empty(2 * max_splits * rows, c, dtype=FP32)
    lse_x = partial_o_xc.new_empty(2 * max_splits * rows)
    block_b = max(16, triton.next_power_of_2(b))
    block_c, block_r = (max(16, triton.next_power_of_2(x)) for x in (c, r))
    _mla_decode_split_kv_kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), max_splits)](
        q_bshc, q_bshr, c_pyc, r_pyr, block_table_bp, cache_seqlens_b, o_bshc, partial_o_xc, lse_x,
        scale * LOG2_E, b, rows, h, block_table_bp.stride(0), c_pyc.stride(0), r_pyr.stride(0),
        *q_bshc.stride()[:3], *q_bshr.stride()[:3],
        autotune_bucket(b * block_table_bp.shape[1] * c_pyc.shape[1]),  # of the keys, at most
        PAGE=c_pyc.shape[1] if block_table_bp.shape[1] > 1 else 0,
        KEY_C=c_pyc.stride(1), KEY_R=r_pyr.stride(1), C=c, R=r, BLOCK_C=block_c, BLOCK_R=block_r,
        BLOCK_B=block_b, PRECISION="ieee" if q_bshc.dtype == FP32 else "tf32",
    )  # fmt: skip
    if max_splits > 1:
        args = partial_o_xc, lse_x, cache_seqlens_b, o_bshc, b, rows, max_splits
        _combine_splits_kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]), max_splits - 1)](
            *args, C=c, BLOCK_C=block_c, BLOCK_B=block_b
        )
    return o_bshc


def apply_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the dtype of autocast if it is enabled, as torch.matmul does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


class TritonMLADecode(torch.autograd.Function):
    """A wrapper of `mla_decode` whose backward pass raises an error that names the alternatives."""

    @staticmethod
    def forward(
        ctx: Any,
        q_bshc: Tensor,
        q_bshr: Tensor,
        c_pyc: Tensor,
        r_pyr: Tensor,
        block_table_bp: Tensor,
        cache_seqlens_b: Tensor,
        scale: float,
    ) -> Tensor:
        return mla_decode(q_bshc, q_bshr, c_pyc, r_pyr, block_table_bp, cache_seqlens_b, scale)

    @staticmethod
    def backward(ctx: Any, g_bshc: Tensor) -> NoReturn:
        raise NotImplementedError(
            "attention in the latent has no gradient in the triton backend, which only decodes; "
            "train with MLA.absorb = False, or under use('torch')"
        )


@impl("paged_attention", "triton")
@on_its_device
def paged_attention(
    q_bshx: Tensor,
    kv_cache_pyx: Tensor,
    block_table_bp: Tensor,
    cache_seqlens_b: Tensor,
    c: int,
    scale: float,
) -> Tensor:
    """Compute `latent_attention` over a paged cache: (b, s, h, c).

    q_bshx: [q^C; q^R], x = c + r; the queries are the last s of cache_seqlens_b.
    kv_cache_pyx: pages of y positions. block_table_bp: int32, the pages of row b.
    The output of a row of length 0 is 0. Lengths and pages are not checked, since that would
    synchronize.
    """
    q_bshx, kv_cache_pyx = apply_autocast(q_bshx, kv_cache_pyx)
    b, x = len(q_bshx), q_bshx.shape[-1]
    check_tensor("q_bshx", q_bshx, (None,) * 4, FLOATS, contiguous=False)
    check_tensor("kv_cache_pyx", kv_cache_pyx, (None, None, x), (q_bshx.dtype,), contiguous=False)
    check_tensor("block_table_bp", block_table_bp, (b, None), (INT32,), contiguous=False)
    check_tensor("cache_seqlens_b", cache_seqlens_b, (b,), LENGTH_DTYPES)
    if not 0 < c < x:
        raise ValueError(f"c must lie between 0 and the {x} of q_bshx, not be {c}")
    latent_and_rope = *q_bshx.tensor_split([c], -1), *kv_cache_pyx.tensor_split([c], -1)
    return TritonMLADecode.apply(*latent_and_rope, block_table_bp, cache_seqlens_b, scale)


@impl("latent_attention", "triton")
@on_its_device
def latent_attention(
    q_bshc: Tensor, q_bshr: Tensor, c_btc: Tensor, k_btr: Tensor, scale: float
) -> Tensor:
    """Compute causal attention with the latent as key and value: (b, s, h, c).

    o = softmax(scale·(q·c + q·k)) c.
    """
    q_bshc, q_bshr, c_btc, k_btr = apply_autocast(q_bshc, q_bshr, c_btc, k_btr)
    check_tensor("q_bshc", q_bshc, (None,) * 4, FLOATS, contiguous=False)
    (b, s, h, c), dtypes = q_bshc.shape, (q_bshc.dtype,)
    check_tensor("c_btc", c_btc, (b, None, c), dtypes, contiguous=False)
    check_tensor("k_btr", k_btr, (b, c_btc.shape[1], None), dtypes, contiguous=False)
    check_tensor("q_bshr", q_bshr, (b, s, h, k_btr.shape[2]), dtypes, contiguous=False)
    page_b = torch.arange(b, dtype=INT32, device=q_bshc.device)  # every row of the batch is a page
    cache_seqlens_b = torch.full_like(page_b, c_btc.shape[1])
    return TritonMLADecode.apply(
        q_bshc, q_bshr, c_btc, k_btr, page_b[:, None], cache_seqlens_b, scale
    )


# ── For the ahead-of-time compiler: V3's shapes ──


def aot_case(
    name: str, dtype: torch.dtype = BF16, h: int = 128, page: int = 64, s: int = 1
) -> AOTCase:
    """Return the case of 128 sequences with s queries of h heads each."""
    strides = 64, 64 * 576, 64 * 576, s * h * 576, h * 576, 576, s * h * 576, h * 576, 576
    pointers = dtype, dtype, dtype, dtype, INT32, INT32, dtype, FP32, FP32
    meta: dict[str, int | str] = {"C": 512, "R": 64, "BLOCK_C": 512, "BLOCK_R": 64, "BLOCK_B": 128}
    meta |= {"PAGE": page, "KEY_C": 576, "KEY_R": 576}
    meta["PRECISION"] = "ieee" if dtype == FP32 else "tf32"
    args = *pointers, 0.1, 128, s * h, h, *strides, autotune_bucket(128 * 4096)
    return AOTCase(name, _mla_decode_split_kv_kernel, args, meta, "bf16" if dtype == BF16 else "")


COMBINE_ARGS = FP32, FP32, INT32, BF16, 128, 128, 66
COMBINE_META = {"C": 512, "BLOCK_C": 512, "BLOCK_B": 128}
AOT_CASES = [
    AOTCase("combine_splits", _combine_splits_kernel, COMBINE_ARGS, COMBINE_META),
    aot_case("decode"),
    aot_case("decode_page_48", page=48),
    aot_case("decode_one_page", page=0),
    aot_case("decode_draft", h=32, s=2),
    aot_case("decode_fp32", FP32),
]
