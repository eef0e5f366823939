"""MLA's attention with keys and values per head, for training and prefill, packed or not.

Both forms use the same kernels, on sequences stored end to end. Either all sequences have s queries
and t keys, or `cu_seqlens` holds their bounds. A head's 192 dims are split into 128 + 64, so that
a score is the sum of two products; a single one would be padded to 256.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    AOTCase,
    AutotuneDecorator,
    Grid,
    autotune_bucket,
    check_tensor,
    tma_aligned,
    on_its_device,
)  # fmt: skip
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

import dsv3_ref.mla  # noqa: F401  defines the ops
from dsv3_ref.ops import impl

MAX_HEAD_DIM = 256
LN2 = tl.constexpr(math.log(2))

# ── Device functions of all kernels ──


@triton.jit
def load_tile(desc, head, row, col: tl.constexpr):
    """Load rows of one head into shared memory, as an operand of `dot`."""
    box = desc.load([head, row, col])
    return box.reshape(box.shape[1], box.shape[2])


@triton.jit
def load_a_operand(desc, head, row, col: tl.constexpr):
    """Load rows of one head into registers, as the left operand of `dot`.

    The compiler leaves a box of (1, rows, dims) in shared memory, where `dot` reads it, but loads
    one of (rows, 1, dims) into registers. A left operand that the whole loop uses then takes none
    of the shared memory bandwidth that the right operands need.
    """
    box = desc.load([row, head, col])
    return box.reshape(box.shape[0], box.shape[2])


@triton.jit
def dot(a, b, plus=None):
    """Compute a·b + plus, summed in fp32; fp32 operands are not rounded to TF32."""
    return tl.dot(a, b, plus, input_precision="ieee")


@triton.jit
def store_tile(ptr, x, head, row, left, col: tl.constexpr, WIDTH: tl.constexpr):
    """Store the first `left` rows of a tile: ptr[row, head, col] = x."""
    h = tl.num_programs(1)
    down, right = tl.arange(0, x.shape[0])[:, None], col + tl.arange(0, x.shape[1])[None, :]
    ptr += (row.to(tl.int64) * h + head) * WIDTH
    mask = (down < left) & (right < WIDTH)
    tl.store(ptr + down * (h * WIDTH) + right, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def locate_sequence(cu_seqlens_ptr, b, s, t, shared, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return (i, count, q_start, q_end, k_start, k_end, gap) of this program's sequence.

    i of count: this program and the number of programs of its sequence, each of which processes
    BLOCK of the sequence's `shared` rows. For packed sequences more programs are launched than
    needed, so that the host never reads cu_seqlens; the count of a superfluous program is 0.
    gap: the statistics of a query (lse, δ) are stored that many columns after its row, so that
    those of a sequence begin at a multiple of 16 bytes, as descriptors require.
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


def set_block_shapes(args: dict) -> None:
    """Set the number of rows in the tensor descriptors of a launch to that of its config."""
    for name, desc in args.items():
        if isinstance(desc, TensorDescriptor):
            rows = args["BLOCK_N" if name[0] in "kv" else "BLOCK_M"]
            desc.block_shape[0 if name.endswith("_a_desc") else 1] = rows


def attention_config(m: int, n: int, warps: int, stages: int, *archs: int) -> triton.Config:
    """Return a config of m queries by n keys for compute capabilities 9 and 10; none means fp32."""
    config = triton.Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, pre_hook=set_block_shapes)
    config.archs = archs
    return config


def prune_configs(configs: list[triton.Config], args: dict, **_: object) -> list[triton.Config]:
    """Select the configs of this GPU; for fp32 and in the interpreter, those of fp32."""
    if args["v_desc"].base.dtype != BF16 or triton.knobs.runtime.interpret:
        return [config for config in configs if not config.archs]
    arch = 9 if triton.runtime.driver.active.get_current_target().arch < 100 else 10
    return [config for config in configs if arch in config.archs]


def autotune_attention(*configs: triton.Config) -> AutotuneDecorator:
    """Return a decorator that autotunes a kernel by head dims and length."""
    prune = {"early_config_prune": prune_configs}
    return triton.autotune(list(configs), key=["X", "V", "bucket"], prune_configs_by=prune)


# Arguments that change from batch to batch: no kernel is compiled again for a multiple of 16.
CHANGING_ARGS = ["stride", "b", "s", "t", "bucket"]

# ── Forward ──


@autotune_attention(
    attention_config(32, 16, 8, 2),
    attention_config(128, 64, 8, 4, 9, 10),
    attention_config(128, 64, 8, 3, 9, 10),
    attention_config(128, 128, 8, 2, 9, 10),
)
@triton.jit(do_not_specialize=CHANGING_ARGS)
def _attention_kernel(
    q0_a_desc, q1_a_desc, k0_desc, k1_desc, v_desc, o_ptr, lse_ptr, stride,
    cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute an online softmax in powers of 2: o = Σ pv / Σ p, p = 2^(scale·q·k − max).

    Stores log2 Σ 2^(scale·q·k) of every query in lse; `stride` is the distance between heads.
    """
    i, count, q_start, q_end, k_start, k_end, gap = locate_sequence(
        cu_seqlens_ptr, b, s, t, s, BLOCK_M, BLOCK_B
    )
    if count == 0:
        return
    head, row = tl.program_id(1), q_start + (count - 1 - i) * BLOCK_M  # longest first
    q0 = load_a_operand(q0_a_desc, head, row, 0)
    if X1:
        q1 = load_a_operand(q1_a_desc, head, row, X0)
    down, right = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    newest = row + k_end - q_end  # the newest key that the first query attends to
    for col in tl.range(k_start, tl.minimum(newest + BLOCK_M, k_end), BLOCK_N):
        score = dot(q0, load_tile(k0_desc, head, col, 0).T)
        if X1:
            score = dot(q1, load_tile(k1_desc, head, col, X0).T, score)
        if col + BLOCK_N > newest + 1:
            future = right[None, :] > down[:, None] + (newest - col)
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
@triton.jit(do_not_specialize=CHANGING_ARGS)
def _attention_dq_kernel(
    q0_a_desc, q1_a_desc, k0_desc, k1_desc, v_desc, g_desc, o_desc, dq_ptr, lse_ptr, delta_ptr,
    stride, cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq = scale·Σ p(g·v − δ) k over keys, p = 2^(scale·q·k − lse).

    Stores δ = g·o, laid out as lse.
    """
    i, count, q_start, q_end, k_start, k_end, gap = locate_sequence(
        cu_seqlens_ptr, b, s, t, s, BLOCK_M, BLOCK_B
    )
    if count == 0:
        return
    head, row = tl.program_id(1), q_start + (count - 1 - i) * BLOCK_M
    down, right = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    g = load_tile(g_desc, head, row, 0)
    delta = tl.sum(load_tile(o_desc, head, row, 0).to(tl.float32) * g.to(tl.float32), 1)
    offset = head.to(tl.int64) * stride + gap + row + down
    tl.store(delta_ptr + offset, delta, mask=row + down < q_end)
    lse = tl.load(lse_ptr + offset, mask=row + down < q_end, other=0.0)
    q0 = load_a_operand(q0_a_desc, head, row, 0)
    dq0 = tl.zeros([BLOCK_M, X0], tl.float32)
    if X1:
        q1 = load_a_operand(q1_a_desc, head, row, X0)
        dq1 = tl.zeros([BLOCK_M, X1], tl.float32)
    newest = row + k_end - q_end
    for col in tl.range(k_start, tl.minimum(newest + BLOCK_M, k_end), BLOCK_N):
        k0 = load_tile(k0_desc, head, col, 0)
        score = dot(q0, k0.T)
        if X1:
            k1 = load_tile(k1_desc, head, col, X0)
            score = dot(q1, k1.T, score)
        if col + BLOCK_N > newest + 1:
            future = right[None, :] > down[:, None] + (newest - col)
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
@triton.jit(do_not_specialize=CHANGING_ARGS)
def _attention_dkdv_kernel(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, g_desc, lse_desc, delta_desc, dk_ptr, dv_ptr,
    cu_seqlens_ptr, b, s, t, scale, bucket,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dv = Σ pg and dk = scale·Σ p(g·v − δ) q over queries.

    Scores are transposed: keys down, queries across.
    """
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
    first = tl.maximum(q_end - left, q_start)  # the oldest query that attends to one of these keys
    first -= (first - q_start) % 4  # its statistics must begin at a multiple of 16 bytes
    # counting `row` from the end of the sequence and writing `left` on the right saves registers
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


# ── Launching ──


def split_head_dim(x: int) -> tuple[int, int]:
    """Split x dims into two powers of two, each at least 16 as in `tl.dot`; the second may be 0."""
    first = max(16, 1 << x.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(x - first)) if x > first else 0


def tensor_descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """Describe blocks of x; `set_block_shapes` sets one of the block's lengths before a launch."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def tile_descriptors(x_nhx: Tensor, *widths: int) -> list[TensorDescriptor | None]:
    """Describe tiles of one head's rows for `load_tile`, one per width; None for a width of 0."""
    x_hnx = x_nhx.transpose(0, 1)
    return [tensor_descriptor(x_hnx, 1, 1, width) if width else None for width in widths]


def operand_descriptors(x_nhx: Tensor, *widths: int) -> list[TensorDescriptor | None]:
    """Describe tiles of one head's rows for `load_a_operand`; None for a width of 0."""
    return [tensor_descriptor(x_nhx, 1, 1, width) if width else None for width in widths]


def row_stats(x_nhx: Tensor, b: int) -> Tensor:
    """Allocate fp32 zeros per head and row, with the gaps of `locate_sequence`: (h, ~n + 4b).

    Gaps are read before they are masked, so they must not hold NaN.
    """
    n, h = x_nhx.shape[:2]
    return x_nhx.new_zeros(h, triton.cdiv(n, 4) * 4 + 4 * b, dtype=FP32)


def head_dim_args(x: int, v: int) -> dict[str, int]:
    """Return the keyword arguments of a kernel that hold the head dims."""
    x0, x1 = split_head_dim(x)
    return {"X": x, "X0": x0, "X1": x1, "V": v, "BLOCK_V": max(16, triton.next_power_of_2(v))}


def sequence_args(
    q_nhx: Tensor, k_nhx: Tensor, cu_seqlens: Tensor | None, b: int, scale: float
) -> dict[str, Tensor | int | float | None]:
    """Return the arguments that locate b sequences, and the scale of exponents of 2."""
    return {
        "cu_seqlens_ptr": cu_seqlens,
        "BLOCK_B": 0 if cu_seqlens is None else triton.next_power_of_2(b),
        "b": b,
        "s": len(q_nhx) // b,
        "t": len(k_nhx) // b,
        "bucket": autotune_bucket(len(q_nhx) // b),
        "scale": scale / LN2.value,
    }


def attention_grid(x_nhx: Tensor, block: str, cu_seqlens: Tensor | None, b: int) -> Grid:
    """Return a grid of blocks by heads; packed sequences need at most n / block + b blocks."""
    n, h = x_nhx.shape[:2]
    if cu_seqlens is None:
        return lambda meta: (b * triton.cdiv(n // b, meta[block]), h)
    return lambda meta: (n // meta[block] + b, h)


class TritonAttention(torch.autograd.Function):
    """Causal attention o = softmax(scale·q·kᵀ) v within each of b sequences.

    Queries (n, h, x), keys (m, h, x), values (m, h, v).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_nhx: Tensor,
        k_mhx: Tensor,
        v_mhv: Tensor,
        cu_seqlens: Tensor | None,
        b: int,
        scale: float,
    ) -> Tensor:
        o_nhv, lse_hn = v_mhv.new_empty(*q_nhx.shape[:2], v_mhv.shape[2]), row_stats(q_nhx, b)
        ctx.save_for_backward(q_nhx, k_mhx, v_mhv, o_nhv, lse_hn, cu_seqlens)
        ctx.b, ctx.scale = b, scale
        if not len(q_nhx):
            return o_nhv
        dims = head_dim_args(q_nhx.shape[2], v_mhv.shape[2])
        widths = dims["X0"], dims["X1"]
        q, k, v = map(tma_aligned, (q_nhx, k_mhx, v_mhv))
        _attention_kernel[attention_grid(q, "BLOCK_M", cu_seqlens, b)](
            *operand_descriptors(q, *widths), *tile_descriptors(k, *widths),
            *tile_descriptors(v, dims["BLOCK_V"]), o_nhv, lse_hn, lse_hn.stride(0),
            **sequence_args(q_nhx, k_mhx, cu_seqlens, b, scale), **dims,
        )  # fmt: skip
        return o_nhv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nhv: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        *leaves, o_nhv, lse_hn, cu_seqlens = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in leaves)
        if not len(dq):
            return dq, dk, dv, None, None, None
        b, delta_hn = ctx.b, torch.zeros_like(lse_hn)
        dims = head_dim_args(dq.shape[2], dv.shape[2])
        rest = sequence_args(dq, dk, cu_seqlens, b, ctx.scale) | dims
        widths, v_width = (dims["X0"], dims["X1"]), dims["BLOCK_V"]
        q, k, v, o, g = map(tma_aligned, (*leaves, o_nhv, g_nhv))
        _attention_dq_kernel[attention_grid(q, "BLOCK_M", cu_seqlens, b)](
            *operand_descriptors(q, *widths), *tile_descriptors(k, *widths),
            *tile_descriptors(v, v_width), *tile_descriptors(g, v_width),
            *tile_descriptors(o, v_width), dq, lse_hn, delta_hn, lse_hn.stride(0), **rest,
        )  # fmt: skip
        _attention_dkdv_kernel[attention_grid(k, "BLOCK_N", cu_seqlens, b)](
            *tile_descriptors(q, *widths), *tile_descriptors(k, *widths),
            *tile_descriptors(v, v_width), *tile_descriptors(g, v_width),
            tensor_descriptor(lse_hn, 1, 1), tensor_descriptor(delta_hn, 1, 1), dk, dv, **rest,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def check_attention_inputs(scale: float, **tensors: tuple[Tensor, tuple[int | None, ...]]) -> None:
    """Raise a `ValueError` for arguments that the kernels do not accept.

    tensors: (tensor, shape) by name, queries first; all must have the dtype of the queries.
    """
    dtypes: tuple[torch.dtype, ...] = FLOATS
    for name, (x, shape) in tensors.items():
        check_tensor(name, x, shape, dtypes, contiguous=False)
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have at most {MAX_HEAD_DIM} dims per head, not {x.shape[-1]}"
            )
        dtypes = (x.dtype,)
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")


@impl("attention", "triton")
@on_its_device
def attention(q_bshx: Tensor, k_bthx: Tensor, v_bthv: Tensor, scale: float) -> Tensor:
    """Compute causal attention, o = softmax(scale·q·kᵀ) v: (b, s, h, v).

    x = i + r; the queries are the last s of t positions.
    """
    b, _, h, x = q_bshx.shape if q_bshx.ndim == 4 else (None,) * 4
    t = k_bthx.shape[1] if k_bthx.ndim == 4 else None
    check_attention_inputs(
        scale, q_bshx=(q_bshx, (b, None, h, x)), k_bthx=(k_bthx, (b, t, h, x)),
        v_bthv=(v_bthv, (b, t, h, None)),
    )  # fmt: skip
    s = q_bshx.shape[1]
    if not 1 <= s <= k_bthx.shape[1]:
        raise ValueError(f"q_bshx must have from 1 to {t} positions, as many as k_bthx, not {s}")
    o = TritonAttention.apply(*(x.flatten(0, 1) for x in (q_bshx, k_bthx, v_bthv)), None, b, scale)
    return o.unflatten(0, (b, s))


@impl("varlen_attention", "triton")
@on_its_device
def varlen_attention(
    q_nhx: Tensor, k_nhx: Tensor, v_nhv: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Compute `attention` within each of b sequences stored end to end; cu_seqlens: (b + 1,).

    cu_seqlens begins with 0 and ends with n. That is not checked, since it would synchronize.
    """
    n, h, x = q_nhx.shape if q_nhx.ndim == 3 else (None,) * 3
    check_attention_inputs(
        scale, q_nhx=(q_nhx, (n, h, x)), k_nhx=(k_nhx, (n, h, x)), v_nhv=(v_nhv, (n, h, None))
    )
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int64, torch.int32))
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens must hold at least one sequence: 0 and its end")
    return TritonAttention.apply(q_nhx, k_nhx, v_nhv, cu_seqlens, len(cu_seqlens) - 1, scale)


# ── For the ahead-of-time compiler: V3, 4,096 tokens in one sequence or packed ──


def v3_operand(width: int) -> Tensor:
    """Return an operand of 4,096 rows and V3's 128 heads on the meta device."""
    return torch.empty(4096, 128, width, dtype=BF16, device="meta")


def aot_cases() -> list[AOTCase]:
    """Return a case of each kernel for sequences of equal length and one for packed sequences."""
    q, v = v3_operand(192), v3_operand(128)
    dims = head_dim_args(192, 128)
    q_operand, q_tile = operand_descriptors(q, 128, 64), tile_descriptors(q, 128, 64)
    k_tile, stats = tile_descriptors(q, 128, 64), tensor_descriptor(row_stats(q, 1), 1, 1)
    v_tile, g_tile, o_tile = (tile_descriptors(v, 128) for _ in range(3))
    forward_args = *q_operand, *k_tile, *v_tile, BF16, FP32, 4096
    dq_args = *q_operand, *k_tile, *v_tile, *g_tile, *o_tile, BF16, FP32, FP32, 4096
    dkdv_args = *q_tile, *k_tile, *v_tile, *g_tile, stats, stats, BF16, BF16
    kernels = {
        "attention": (_attention_kernel, forward_args),
        "attention_dq": (_attention_dq_kernel, dq_args),
        "attention_dkdv": (_attention_dkdv_kernel, dkdv_args),
    }
    equal_lengths = None, 1, 4096, 4096
    packed_lengths = torch.int64, 64, 0, 0
    forms = ("", 0, equal_lengths), ("_packed", 64, packed_lengths)
    cases = []
    for name, (kernel, args) in kernels.items():
        for suffix, block_b, lengths in forms:
            all_args = *args, *lengths, 0.1, autotune_bucket(4096)
            meta = dims | {"BLOCK_B": block_b}
            cases.append(AOTCase(name + suffix, kernel, all_args, meta, "bf16"))
    return cases


AOT_CASES = aot_cases()
