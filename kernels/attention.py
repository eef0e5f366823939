"""MLA's attention where every head has its keys and values: training, prefill; packed or not.

One set of kernels for both forms, over rows laid end to end. Sequences have equal lengths, s
queries of t keys, or lie end to end, with bounds `cu_seqlens`. A head's 192 dims are taken as 128 + 64: two
products add up to the score, where one would be padded to 256.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import dsv3_ref.mla  # noqa: F401  defines the ops
from dsv3_ref.kernels.launch import BF16, FLOATS, FP32, AOTCase, autotune_bucket, check_tensor
from dsv3_ref.ops import impl

MAX_HEAD_DIM = 256  # dims of a head
LN2 = tl.constexpr(math.log(2))

# ── What the kernels share ──


@triton.jit
def load_tile(desc, head, row, col: tl.constexpr):
    """Rows of one head, for products to read from shared memory."""
    box = desc.load([head, row, col])
    return box.reshape(box.shape[1], box.shape[2])


@triton.jit
def load_a_operand(desc, head, row, col: tl.constexpr):
    """Rows of one head, for products to read from registers.

    The compiler leaves a box of (1, rows, dims) in shared memory, where `dot` finds it, but
    reads out one of (rows, 1, dims). In registers, a left operand of the whole loop leaves more
    of shared memory's bandwidth to the right ones.
    """
    box = desc.load([row, head, col])
    return box.reshape(box.shape[0], box.shape[2])


@triton.jit
def dot(a, b, plus=None):
    """a·b + plus, summed in fp32; numbers in fp32 are not cut to TF32."""
    return tl.dot(a, b, plus, input_precision="ieee")


@triton.jit
def store_tile(ptr, x, head, row, left, col: tl.constexpr, WIDTH: tl.constexpr):
    """Write the first `left` rows of a tile: ptr[row, head, col] = x."""
    h = tl.num_programs(1)
    down, right = tl.arange(0, x.shape[0])[:, None], col + tl.arange(0, x.shape[1])[None, :]
    ptr += (row.to(tl.int64) * h + head) * WIDTH
    mask = (down < left) & (right < WIDTH)
    tl.store(ptr + down * (h * WIDTH) + right, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def locate_sequence(cu_seqlens_ptr, b, s, t, shared, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's number within its sequence, programs of that, ends of its queries and keys.

    `shared` rows of a sequence are shared out, BLOCK a program. Packed, there are more programs
    than needed, so that nobody has to read cu_seqlens before the launch: for those the count is 0.
    Last, a gap: a query's numbers (lse, δ) lie so many columns after its row, so that a sequence's
    begin at a multiple of 16 bytes, where descriptors may fetch from.
    """
    i = tl.program_id(0)
    if cu_seqlens_ptr is None:
        count = tl.cdiv(shared, BLOCK)
        seq = i // count
        q_start, k_start = seq * s, seq * t
        q_end, k_end = q_start + s, k_start + t
        i = i % count
    else:
        each = tl.arange(0, BLOCK_B)
        start = tl.load(cu_seqlens_ptr + each, mask=each < b, other=0).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + each + 1, mask=each < b, other=0).to(tl.int32)
        counts = tl.cdiv(end - start, BLOCK)
        last = tl.cumsum(counts, 0)
        mine = (last - counts <= i) & (i < last)
        i -= tl.sum(tl.where(mine, last - counts, 0), 0)
        count = tl.sum(tl.where(mine, counts, 0), 0)
        q_start, q_end = tl.sum(tl.where(mine, start, 0), 0), tl.sum(tl.where(mine, end, 0), 0)
        k_start, k_end = q_start, q_end
        seq = tl.sum(tl.where(mine, each, 0), 0)
    return i, count, q_start, q_end, k_start, k_end, 4 * seq - q_start % 4


# ── Configs ──


def set_block_shapes(args):
    """Before a launch: what a descriptor fetches gets the config's number of rows."""
    for name, desc in args.items():
        if isinstance(desc, TensorDescriptor):
            rows = args["BLOCK_N" if name[0] in "kv" else "BLOCK_M"]
            desc.block_shape[0 if name.endswith("_held") else 1] = rows


def attention_config(m: int, n: int, warps: int, stages: int, *archs: int):
    """m queries by n keys, for GPUs of compute capability 9 and 10 or one of them; none: fp32."""
    made = triton.Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, pre_hook=set_block_shapes)
    made.archs = archs
    return made


def prune_configs(configs, args, **_):
    """The configs of this GPU, those of fp32 for fp32 and in the interpreter."""
    arch = None
    if args["v_desc"].base.dtype == BF16 and not triton.knobs.runtime.interpret:
        arch = 9 if triton.runtime.driver.active.get_current_target().arch < 100 else 10
    return [c for c in configs if (arch in c.archs if arch else not c.archs)]


def autotune_attention(*configs):
    """Autotuned by head dims and length."""
    prune = {"early_config_prune": prune_configs}
    return triton.autotune(list(configs), key=["X", "V", "bucket"], prune_configs_by=prune)


# ── Forward ──


@autotune_attention(
    attention_config(32, 16, 8, 2),
    attention_config(128, 64, 8, 4, 9, 10),
    attention_config(128, 64, 8, 3, 9, 10),
    attention_config(128, 128, 8, 2, 9, 10),
)
@triton.jit
def _attention_kernel(
    q0_held, q1_held, k0_desc, k1_desc, v_desc, o_ptr, lse_ptr, stride,
    cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax as the keys come, in powers of 2: o = Σ pv / Σ p, p = 2^(scale·q·k − max).

    Saves log2 Σ 2^(scale·q·k) of every query in lse, `stride` apart by head.
    """
    i, count, q_start, q_end, k_start, k_end, gap = locate_sequence(
        cu_seqlens_ptr, b, s, t, s, BLOCK_M, BLOCK_B
    )
    if count == 0:
        return
    head, row = tl.program_id(1), q_start + (count - 1 - i) * BLOCK_M  # longest first
    q0 = load_a_operand(q0_held, head, row, 0)
    if X1:
        q1 = load_a_operand(q1_held, head, row, X0)
    down, right = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    seen = row + k_end - q_end  # the newest key that the first query sees
    for col in tl.range(k_start, tl.minimum(seen + BLOCK_M, k_end), BLOCK_N):
        score = dot(q0, load_tile(k0_desc, head, col, 0).T)
        if X1:
            score = dot(q1, load_tile(k1_desc, head, col, X0).T, score)
        if col + BLOCK_N > seen + 1:
            future = right[None, :] > down[:, None] + (seen - col)
            score = tl.where(future, -float("inf"), score)
        m_new = tl.maximum(m_i, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        total = total * alpha + tl.sum(p, 1)
        v = load_tile(v_desc, head, col, 0)
        o = dot(p.to(v.dtype), v, o * alpha[:, None])
        m_i = m_new
    store_tile(o_ptr, o / total[:, None], head, row, q_end - row, 0, V)
    lse_ptr += head.to(tl.int64) * stride + gap + row
    tl.store(lse_ptr + down, m_i + tl.log2(total), mask=row + down < q_end)


# ── Backward ──


@autotune_attention(
    attention_config(32, 16, 8, 2),
    attention_config(128, 64, 8, 4, 9),
    attention_config(128, 64, 8, 3, 9),
    attention_config(128, 64, 4, 2, 10),
    attention_config(128, 32, 8, 3, 10),
)
@triton.jit
def _attention_dq_kernel(
    q0_held, q1_held, k0_desc, k1_desc, v_desc, g_desc, o_desc, dq_ptr, lse_ptr, delta_ptr,
    stride, cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = scale·Σ p(g·v − δ) k over keys, p = 2^(scale·q·k − lse); saves δ = g·o as lse is."""
    i, count, q_start, q_end, k_start, k_end, gap = locate_sequence(
        cu_seqlens_ptr, b, s, t, s, BLOCK_M, BLOCK_B
    )
    if count == 0:
        return
    head, row = tl.program_id(1), q_start + (count - 1 - i) * BLOCK_M
    down, right = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    g = load_tile(g_desc, head, row, 0)
    delta = tl.sum(load_tile(o_desc, head, row, 0).to(tl.float32) * g.to(tl.float32), 1)
    at = head.to(tl.int64) * stride + gap + row + down
    tl.store(delta_ptr + at, delta, mask=row + down < q_end)
    lse = tl.load(lse_ptr + at, mask=row + down < q_end, other=0.0)
    q0 = load_a_operand(q0_held, head, row, 0)
    dq0 = tl.zeros([BLOCK_M, X0], tl.float32)
    if X1:
        q1 = load_a_operand(q1_held, head, row, X0)
        dq1 = tl.zeros([BLOCK_M, X1], tl.float32)
    seen = row + k_end - q_end
    for col in tl.range(k_start, tl.minimum(seen + BLOCK_M, k_end), BLOCK_N):
        k0 = load_tile(k0_desc, head, col, 0)
        score = dot(q0, k0.T)
        if X1:
            k1 = load_tile(k1_desc, head, col, X0)
            score = dot(q1, k1.T, score)
        if col + BLOCK_N > seen + 1:
            future = right[None, :] > down[:, None] + (seen - col)
            score = tl.where(future, -float("inf"), score)
        p = tl.exp2(score * scale - lse[:, None])
        dp = dot(g, load_tile(v_desc, head, col, 0).T)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = dot(ds, k0, dq0)
        if X1:
            dq1 = dot(ds, k1, dq1)
    store_tile(dq_ptr, dq0 * (scale * LN2), head, row, q_end - row, 0, X)
    if X1:
        store_tile(dq_ptr, dq1 * (scale * LN2), head, row, q_end - row, X0, X)


@autotune_attention(
    attention_config(16, 32, 8, 2),
    attention_config(64, 128, 8, 3, 9),
    attention_config(32, 128, 8, 3, 9),
    attention_config(64, 64, 8, 2, 9),
    attention_config(32, 64, 4, 3, 10),
    attention_config(64, 64, 4, 2, 10),
)
@triton.jit
def _attention_dkdv_kernel(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, g_desc, lse_desc, delta_desc, dk_ptr, dv_ptr,
    cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv = Σ pg and dk = scale·Σ p(g·v − δ) q over queries; scores lie transposed, keys down."""
    i, count, q_start, q_end, k_start, k_end, gap = locate_sequence(
        cu_seqlens_ptr, b, s, t, t, BLOCK_N, BLOCK_B
    )
    if count == 0:
        return
    head, col = tl.program_id(1), k_start + i * BLOCK_N  # longest first
    down, right = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    k0, v = load_tile(k0_desc, head, col, 0), load_tile(v_desc, head, col, 0)
    dk0 = tl.zeros([BLOCK_N, X0], tl.float32)
    if X1:
        k1 = load_tile(k1_desc, head, col, X0)
        dk1 = tl.zeros([BLOCK_N, X1], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    left = k_end - col
    first = tl.maximum(q_end - left, q_start)  # the oldest query that sees a key of these
    first -= (first - q_start) % 4  # where its numbers may be fetched from
    # `row` counts from the sequence's end, and `left` stands on the right: no register to spare
    for row in tl.range(first - q_end, 0, BLOCK_M):
        q0 = load_tile(q0_desc, head, q_end + row, 0)
        score = dot(k0, q0.T)
        if X1:
            q1 = load_tile(q1_desc, head, q_end + row, X0)
            score = dot(k1, q1.T, score)
        lse = lse_desc.load([head, q_end + gap + row]).reshape(BLOCK_M)
        if (row < BLOCK_N - 1 - left) | (row > -BLOCK_M):
            future = down[:, None] > right[None, :] + (row + left)
            future |= (right + row >= 0)[None, :]
            score = tl.where(future, -float("inf"), score)
        g = load_tile(g_desc, head, q_end + row, 0)
        p = tl.exp2(score * scale - lse[None, :]).to(g.dtype)
        dv = dot(p, g, dv)
        dp = dot(v, g.T)
        delta = delta_desc.load([head, q_end + gap + row]).reshape(BLOCK_M)
        ds = (p.to(tl.float32) * (dp - delta[None, :])).to(g.dtype)
        dk0 = dot(ds, q0, dk0)
        if X1:
            dk1 = dot(ds, q1, dk1)
    store_tile(dk_ptr, dk0 * (scale * LN2), head, col, left, 0, X)
    if X1:
        store_tile(dk_ptr, dk1 * (scale * LN2), head, col, left, X0, X)
    store_tile(dv_ptr, dv, head, col, left, 0, V)


# ── From tensors to kernels ──


def split_head_dim(x: int) -> tuple[int, int]:
    """A head's dims as powers of two, at least 16 as products want; the second may be 0."""
    first = max(16, 1 << x.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(x - first)) if x > first else 0


def tma_aligned(x):
    """x if its rows start at multiples of 16 bytes, as descriptors want, else such a copy."""
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])
    if aligned and x.stride(-1) == 1:
        return x
    wide = x.new_empty(*x.shape[:-1], triton.cdiv(x.shape[-1], unit) * unit)
    return wide[..., : x.shape[-1]].copy_(x)


def tile_descriptors(x_nhx, *widths: int, held: bool = False) -> list:
    """Descriptors of boxes of one head's rows, for `load_tile` or `load_a_operand`; None for a width of 0."""
    x = x_nhx if held else x_nhx.transpose(0, 1)
    return [tensor_descriptor(x, 1, 1, width) if width else None for width in widths]


def tensor_descriptor(x, *block: int):
    """`set_block_shapes` changes one length of the block before a launch."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def row_stats(x_nhx, b: int):
    """Zeros for a number a row and head in fp32, with the gaps of `locate_sequence`: (h, n + 4b or so).

    Zeros, as gaps are read and then masked.
    """
    n, h = x_nhx.shape[:2]
    return x_nhx.new_zeros(h, triton.cdiv(n, 4) * 4 + 4 * b, dtype=FP32)


def head_dim_args(x: int, v: int) -> dict:
    """Head dims as the kernels take them."""
    names = "X", "X0", "X1", "V", "BLOCK_V"
    return dict(zip(names, (x, *split_head_dim(x), v, max(16, triton.next_power_of_2(v)))))


def sequence_args(q_nhx, k_nhx, cu_seqlens, b: int, scale: float) -> dict:
    """Where the kernels find b sequences, and the scale in powers of 2."""
    s, t = len(q_nhx) // b, len(k_nhx) // b
    size = 0 if cu_seqlens is None else triton.next_power_of_2(b)
    lengths = {
        "cu_seqlens_ptr": cu_seqlens,
        "BLOCK_B": size,
        "b": b,
        "s": s,
        "t": t,
        "bucket": autotune_bucket(s),
    }
    return lengths | {"scale": scale / LN2.value}


def attention_grid(x_nhx, block: str, cu_seqlens, b: int):
    """Blocks of the sequences' rows by heads: packed ones need n / block + b at most."""
    n, h = x_nhx.shape[:2]
    if cu_seqlens is None:
        return lambda m: (b * triton.cdiv(n // b, m[block]), h)
    return lambda m: (n // m[block] + b, h)


class Attention(torch.autograd.Function):
    """o = softmax(scale·q·kᵀ) v within each of b sequences; (n, h, x), (m, h, x), (m, h, v)."""

    @staticmethod
    def forward(ctx, q_nhx, k_mhx, v_mhv, cu_seqlens, b, scale):
        o_nhv, lse_hn = v_mhv.new_empty(*q_nhx.shape[:2], v_mhv.shape[2]), row_stats(q_nhx, b)
        ctx.save_for_backward(q_nhx, k_mhx, v_mhv, o_nhv, lse_hn, cu_seqlens)
        ctx.b, ctx.scale = b, scale
        if not len(q_nhx):
            return o_nhv
        where = sequence_args(q_nhx, k_mhx, cu_seqlens, b, scale)
        size = head_dim_args(q_nhx.shape[2], v_mhv.shape[2])
        q, k, v = map(tma_aligned, (q_nhx, k_mhx, v_mhv))
        parts = size["X0"], size["X1"]
        _attention_kernel[attention_grid(q, "BLOCK_M", cu_seqlens, b)](
            *tile_descriptors(q, *parts, held=True), *tile_descriptors(k, *parts), *tile_descriptors(v, size["BLOCK_V"]),
            o_nhv, lse_hn, lse_hn.stride(0), **where, **size,
        )  # fmt: skip
        return o_nhv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_nhv):
        *leaves, o_nhv, lse_hn, cu_seqlens = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in leaves)
        if not len(dq):
            return dq, dk, dv, None, None, None
        b, delta_hn = ctx.b, torch.zeros_like(lse_hn)
        rest = sequence_args(dq, dk, cu_seqlens, b, ctx.scale) | head_dim_args(
            dq.shape[2], dv.shape[2]
        )
        q, k, v, o, g = map(tma_aligned, (*leaves, o_nhv, g_nhv))
        parts, width = (rest["X0"], rest["X1"]), rest["BLOCK_V"]
        _attention_dq_kernel[attention_grid(q, "BLOCK_M", cu_seqlens, b)](
            *tile_descriptors(q, *parts, held=True), *tile_descriptors(k, *parts), *tile_descriptors(v, width), *tile_descriptors(g, width),
            *tile_descriptors(o, width), dq, lse_hn, delta_hn, lse_hn.stride(0), **rest,
        )  # fmt: skip
        _attention_dkdv_kernel[attention_grid(k, "BLOCK_N", cu_seqlens, b)](
            *tile_descriptors(q, *parts), *tile_descriptors(k, *parts), *tile_descriptors(v, width), *tile_descriptors(g, width),
            tensor_descriptor(lse_hn, 1, 1), tensor_descriptor(delta_hn, 1, 1), dk, dv, **rest,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def check_attention_inputs(scale: float, **tensors) -> None:
    """Refuse what the kernels cannot take; tensors: each with its shape, queries first."""
    dtypes = FLOATS
    for name, (x, shape) in tensors.items():
        check_tensor(name, x, shape, dtypes, contiguous=False)
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have at most {MAX_HEAD_DIM} dims a head, not {x.shape[-1]}"
            )
        dtypes = (x.dtype,)
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")


@impl("attention", "triton")
def attention(q_bshx, k_bthx, v_bthv, scale: float):
    """Causal attention, o = softmax(scale·q·kᵀ) v; x = i + r, the queries are the last s of t."""
    b, _, h, x = q_bshx.shape if q_bshx.ndim == 4 else (None,) * 4
    t = k_bthx.shape[1] if k_bthx.ndim == 4 else None
    check_attention_inputs(
        scale, q_bshx=(q_bshx, (b, None, h, x)), k_bthx=(k_bthx, (b, t, h, x)),
        v_bthv=(v_bthv, (b, t, h, None)),
    )  # fmt: skip
    s = q_bshx.shape[1]
    if not 1 <= s <= t:
        raise ValueError(f"q_bshx must have from 1 to {t} positions, as many as k_bthx, not {s}")
    o = Attention.apply(*(x.flatten(0, 1) for x in (q_bshx, k_bthx, v_bthv)), None, b, scale)
    return o.unflatten(0, (b, s))


@impl("varlen_attention", "triton")
def varlen_attention(q_nhx, k_nhx, v_nhv, cu_seqlens, scale: float):
    """Compute `attention` inside each of b sequences laid end to end; cu_seqlens: (b + 1,).

    It begins with 0 and ends with n. That is not checked: cu_seqlens stays on its device.
    """
    n, h, x = q_nhx.shape if q_nhx.ndim == 3 else (None,) * 3
    check_attention_inputs(
        scale, q_nhx=(q_nhx, (n, h, x)), k_nhx=(k_nhx, (n, h, x)), v_nhv=(v_nhv, (n, h, None))
    )
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int64, torch.int32))
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens must hold at least one sequence: 0 and where it ends")
    return Attention.apply(q_nhx, k_nhx, v_nhv, cu_seqlens, len(cu_seqlens) - 1, scale)


# ── For the ahead-of-time compiler: V3, 4,096 tokens in one sequence or packed ──


def v3_operand(width: int):
    return torch.empty(4096, 128, width, dtype=BF16, device="meta")


def aot_cases() -> list[AOTCase]:
    """Each kernel for both forms."""
    q, v, size = v3_operand(192), v3_operand(128), head_dim_args(192, 128)
    keys, like_v = (
        [*tile_descriptors(q, 128, 64), *tile_descriptors(v, 128)],
        lambda: tile_descriptors(v, 128),
    )
    held_q, line = tile_descriptors(q, 128, 64, held=True), tensor_descriptor(row_stats(q, 1), 1, 1)
    kernels = {
        "": (_attention_kernel, (*held_q, *keys, BF16, FP32, 4096)),
        "_dq": (
            _attention_dq_kernel,
            (*held_q, *keys, *like_v(), *like_v(), BF16, FP32, FP32, 4096),
        ),
        "_dkdv": (
            _attention_dkdv_kernel,
            (*tile_descriptors(q, 128, 64), *keys, *like_v(), line, line, BF16, BF16),
        ),
    }
    forms = {"": (None, 1, 4096, 4096), "_packed": (torch.int64, 64, 0, 0)}
    return [
        AOTCase(
            f"attention{which}{form}",
            kernel,
            (*args, *lengths, 0.1, autotune_bucket(4096)),
            size | {"BLOCK_B": 64 if form else 0},
            "bf16",
        )
        for which, (kernel, args) in kernels.items()
        for form, lengths in forms.items()
    ]


AOT_CASES = aot_cases()
