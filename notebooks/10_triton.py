# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Triton: a kernel, line by line

# %% [markdown]
# ## Why
# Written as separate torch steps, RMSNorm carries its matrix through memory **seven** times: square,
# mean and two products read it four times and write it three times. A *kernel*, one program for the
# GPU, needs **two**: each number comes in once, is squared, summed and scaled where the arithmetic is
# done, and leaves once. These steps wait for memory and for nothing else, so 3.5 times fewer bytes are
# 3.5 times less time.
#
# This chapter writes such kernels, from six lines to a tiled matrix product with FP8's scales. You need
# no GPU: Triton's *interpreter* runs the same code on the CPU, one program after the other, slow but
# the real thing. The first cell decides, since Triton asks only once, when it is imported.

# %%
import os
import shutil
from itertools import product

if not shutil.which("nvidia-smi"):  # no GPU: the interpreter; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref import fp8, ops
from dsv3_ref.config import V3, ceil_div
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, PINK, checker, figure, play, show

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
BANDWIDTH = 3.35e12  # bytes per second of an H100's or H800's memory
torch.manual_seed(0)
print("kernels run", "in the interpreter" if DEVICE == "cpu" else "on the GPU")


# %%
class Traffic(TorchDispatchMode):
    """A record of what every torch step reads and writes: (step, numbers read, numbers written)."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        if isinstance(out, torch.Tensor):
            self.steps.append((func.overloadpacket.__name__, read, out.numel()))
        return out


def draw_passes(ax, y: float, steps) -> None:
    """A bar of what is read and written, in passes over x, with its time at V3's size."""
    left = 0
    for step, read, written in steps:
        ax.barh(y, read, left=left, color=BLUE, edgecolor="white", height=0.6)
        ax.barh(y, written, left=left + read, color=ORANGE, edgecolor="white", height=0.6)
        if read + written > 0.5:  # the steps on one number per row are too thin for a name
            ax.text(left + (read + written) / 2, y + 0.34, step, ha="center", va="bottom")
        left += read + written
    ax.text(left + 0.1, y, f"{left * 4 * 4096 * V3.dim / BANDWIDTH * 1e6:.0f} µs", va="center")


x_nd, weight_d = torch.randn(64, 512), torch.ones(512)
with torch.no_grad(), Traffic() as traffic:
    ops.IMPLS["rms_norm"]["torch"](x_nd, weight_d, 1e-6)  # chapter 01's plainest form
n_x = x_nd.numel()
passes = [(step, read / n_x, written / n_x) for step, read, written in traffic.steps]
fig, ax = figure(width=7.5, height=2.5)
draw_passes(ax, 1, passes)
draw_passes(ax, 0, [("all in one", 1, 1)])
ax.legend(handles=[Patch(color=BLUE, label="read"), Patch(color=ORANGE, label="written")],
          loc="lower right")  # fmt: skip
ax.set_yticks([0, 1], ["one kernel", "torch steps"])
ax.set(xlabel="passes over x (times: 4096 tokens of V3 in fp32, at an H100's bandwidth)")
ax.set(ylim=(-0.5, 1.8), xlim=(0, 8.2))
ax.set_title("RMSNorm: seven passes through memory, or two")
show(fig)
assert 7 <= sum(read + written for _, read, written in passes) < 7.05

# %% [markdown]
# ## A GPU in seven words
# | word | what it is | on an H100 or H800 |
# |---|---|---|
# | *memory* | where tensors live; far away | 80 GB, 3.35 TB/s |
# | *L2* | a cache between memory and all multiprocessors | 50 MB |
# | *multiprocessor* | an independent core; a Triton program runs on one of them | 132 |
# | *shared memory* | a multiprocessor's own fast memory, for tiles that arrive | 227 KiB |
# | *warp* | 32 threads that execute in step; a program is mostly given 4 or 8 of them | |
# | *register* | where a thread holds what it computes with | 255 per thread at most |
# | *tensor core* | the part of a multiprocessor that multiplies small matrices | FP8: 1979 TFLOP/s in all |
#
# Triton shares a program's numbers out among its threads; we never name a thread. What remains for us
# is to say which numbers a program loads, and when.

# %% [markdown]
# ## What the report says
# The team wrote its kernels by hand and shaped the algorithm around them. What concerns this chapter:
#
# - **Fuse what waits for memory.** On today's hardware, quantizing means to fetch 128 bf16 numbers,
#   write their FP8 values back, and fetch them a second time for the product. The report asks chip makers to
#   join cast and transfer (§3.5.2). A kernel can already join the cast to the step *before* it.
# - **Recompute what is cheap.** Norm outputs are made again in the backward pass (§3.2.3): easy to
#   afford once a norm costs two passes.
# - **Scales inside the product.** Tensor cores keep about 14 bits of a sum. So every 128 elements of
#   K, the summed axis, the partial sum moves to ordinary arithmetic, is multiplied by the scales there,
#   and added in fp32. While one group of warps does that, another keeps the tensor core busy (§3.3.2).
#   The report would like the scales handled *in* the tensor core (§3.5.2).
# - **Multiprocessors are a budget.** An H800 has 132; **20** of them move data between experts and
#   multiply nothing (§3.2.2, §3.5.1).

# %% [markdown]
# ## A first kernel
# SwiGLU of two vectors, gate $g$ and up $u$, of $n$ numbers each ($\sigma$ is the sigmoid). They are cut
# into blocks of $B$, and program $p$ takes the $p$-th block:
#
# $$y_i = g_i\,\sigma(g_i)\,u_i,\qquad i\in\{pB,\dots,pB+B-1\},\ i<n .$$
#
# One *program* handles a whole block at once; the *grid* says how many programs there are. All of them
# run the same lines, and only their number differs. The comments are numbered for the table below.


# %%
@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)  # 1
    at = pid * BLOCK + tl.arange(0, BLOCK)  # 2
    mask = at < n  # 3
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)  # 4
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
    y = gate * tl.sigmoid(gate) * up  # 5
    tl.store(y_ptr + at, y, mask=mask)  # 6


def swiglu(gate, up, block: int = 256):
    y, n = torch.empty_like(gate), gate.numel()
    swiglu_kernel[(triton.cdiv(n, block),)](gate, up, y, n, BLOCK=block)  # 7
    return y


# %% [markdown]
# | line | why |
# |---|---|
# | `@triton.jit` | the body is *compiled*, not run: only what Triton knows may stand in it |
# | `gate_ptr` | a tensor arrives as the address of its first number; shape and strides stay behind, so `n` is passed too |
# | `tl.constexpr` | known at compile time: a block's size decides how many registers there are |
# | 1 | which program am I? the only line in which programs differ |
# | 2 | the *offsets* of the block, a vector of integers; `arange` wants a power of two |
# | 3 | which of them exist: the last block hangs over the end |
# | 4 | one load for the block; a *lane* (a place in it) that is masked reads nothing and gets `other` |
# | 5 | arithmetic on registers, free beside the loads |
# | 6 | the only write; masked, or it would hit what lies after `y` |
# | 7 | the grid, a tuple in brackets: ⌈n/B⌉ programs; then the arguments |
#
# *A warning.* This notebook stays in fp32. The stock interpreter cuts bf16 off instead of rounding it,
# and gets some FP8 codes wrong; the tests mend that (`tests/interpreter.py`), a chapter need not. Triton's
# packages are for Linux: elsewhere, read the results that are stored here.

# %%
for n in (1, 255, 256, 257, 1000):  # ragged sizes first
    gate, up = torch.randn(2, n, device=DEVICE)
    assert torch.allclose(swiglu(gate, up), F.silu(gate) * up, atol=1e-6), n

n, BLOCK = 1000, 256
fig, ax = figure(width=8, height=1.7)
for pid, color in zip(range(triton.cdiv(n, BLOCK)), (BLUE, ORANGE, GREEN, PINK)):
    start, end = pid * BLOCK, (pid + 1) * BLOCK
    ax.barh(0, min(end, n) - start, left=start, color=color, alpha=0.6, edgecolor="white")
    ax.text((start + min(end, n)) / 2, 0, f"program {pid}", ha="center", va="center", weight="bold")
ax.barh(0, end - n, left=n, color="white", edgecolor=GRAY, hatch="////")
ax.text(end + 10, 0, f"{end - n} masked lanes", va="center")
ax.set(yticks=[], xticks=[0, 256, 512, 768, 1000], xlabel="index i", xlim=(0, 1230))
ax.spines["left"].set_visible(False)
ax.set_title(f"A grid of {pid + 1} programs: {n} numbers in blocks of {BLOCK}")
show(fig)

# %% [markdown]
# ## A row at a time: RMSNorm
# $$y_{nd} = x_{nd}\;\Big(\tfrac1D\textstyle\sum_{d'} x_{nd'}^2+\epsilon\Big)^{-1/2} w_d,\qquad (n,d)\times(d)\to(n,d)$$
#
# Here $w$ is the learned weight and $D$ a row's length. A sum over the row needs the row, so one program
# holds all of it, padded to a power of two: $x$ is read **once** and used twice. V3's 7168 numbers become 8192 lanes, which with
# 8 warps are 32 registers in each of 256 threads. Masked lanes read 0 and add nothing, but the mean
# divides by $D$, not by the lanes. Rows may be slices of wider ones (MLA's latent is), hence the
# *stride*: how many numbers lie between one row's start and the next.


# %%
@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, d, stride, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row · stride may pass 2³¹: 32 bits would wrap
    col = tl.arange(0, BLOCK_D)
    mask = col < d
    x = tl.load(x_ptr + row * stride + col, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / d + eps)  # one number, of all lanes
    tl.store(y_ptr + row * d + col, x * inverse * weight, mask=mask)


def rms_norm(x_nd, weight_d, eps: float = 1e-6):
    (n, d), y_nd = x_nd.shape, torch.empty(x_nd.shape, device=x_nd.device)
    meta = {"BLOCK_D": triton.next_power_of_2(d)}
    rms_norm_kernel[(n,)](x_nd, weight_d, y_nd, d, x_nd.stride(0), eps, **meta)
    return y_nd


for n, d in ((1, 1), (3, 127), (5, 128), (7, 300)):
    wide, weight_d = torch.randn(n, d + 9, device=DEVICE), torch.rand(d, device=DEVICE)
    want = F.rms_norm(wide[:, :d], (d,), weight_d, 1e-6)
    assert torch.allclose(rms_norm(wide[:, :d], weight_d), want, atol=1e-5), (n, d)
print("RMSNorm: equal to torch at ragged widths and on slices")

# %% [markdown]
# `kernels/norm.py` adds what a GPU asks for: several short rows to a program, a loop over rows so that
# the weight is fetched once, the next rows on their way while these are summed, and a backward pass.
#
# ## A tiled matrix product
# $$C_{mn}=\sum_k A_{mk}B_{kn},\qquad (m,k)\times(k,n)\to(m,n)$$
#
# One program makes one tile of $C$, $B_M\times B_N$. It walks along K in steps of $B_K$, each time loads
# a tile of A and a tile of B, and adds their product to an *accumulator* that never leaves the
# registers. $B_K(B_M+B_N)$ loaded numbers make $2B_MB_NB_K$ operations: **64 operations a number** with
# tiles of 64 × 64, and 128 with tiles of 128 × 128. This is the whole reason for tiles.
#
# Which tile is program $p$'s? Row by row would do. `tile_of` instead takes `GROUP` rows of tiles at a
# time and walks through them column by column; with `GROUP` = 1 that *is* row by row. The experiment
# below shows why.


# %%
@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of program pid's tile: GROUP rows of tiles at a time, down then right."""
    group, inside = pid // (GROUP * tiles_n), pid % (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)  # the last group may be short
    return first + inside % height, inside // height


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, a_m, a_k, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """C = A B; a_m … b_n are strides."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a_at = a_ptr + row[:, None] * a_m + inner[None, :] * a_k
        b_at = b_ptr + inner[:, None] * b_k + col[None, :] * b_n
        a = tl.load(a_at, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
        b = tl.load(b_at, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
    c_at = c_ptr + row[:, None] * n + col[None, :]
    tl.store(c_at, acc, mask=(row < m)[:, None] & (col < n)[None, :])


def matmul(a_mk, b_kn, block=(32, 64, 32), group: int = 4):
    (m, k), n = a_mk.shape, b_kn.shape[1]
    c_mn = torch.empty(m, n, device=a_mk.device)
    grid = (triton.cdiv(m, block[0]) * triton.cdiv(n, block[1]),)
    args = a_mk, b_kn, c_mn, m, n, k, *a_mk.stride(), *b_kn.stride()
    matmul_kernel[grid](*args, *block, GROUP=group)
    return c_mn


# %% [markdown]
# `row[:, None]` and `inner[None, :]` broadcast to a tile of addresses, as in numpy. Three conditions
# guard the ragged edges. The one over K is the treacherous one: rows and columns that do not exist are
# never stored, but a K beyond the end would be *added* to numbers that are. Strides let a transposed
# view in without a copy. And `input_precision="ieee"` asks for true fp32: by default, a GPU rounds the
# factors of `tl.dot` to 10 bits of mantissa (TF32).

# %%
for m, n, k in ((1, 1, 1), (33, 65, 31), (88, 150, 70), (64, 128, 64)):
    a_mk, b_nk = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    for group in (1, 4):
        got = matmul(a_mk, b_nk.T, group=group)  # a weight is stored (out, in): a view does
        assert torch.allclose(got, a_mk @ b_nk.T, atol=1e-4), (m, n, k, group)
print("matrix product: equal to torch at ragged sizes, in both orders")

# %% [markdown]
# ## The same with scales
# [Chapter 09](09_fp8.ipynb)'s product of FP8 values $q$ with scales $s$, where $z$ counts the stretches of 128 along K,
#
# $$C_{mn}=\sum_z s^a_{mz}\,s^b_{\lfloor n/128\rfloor z}\sum_{k\in z}q^a_{mk}q^b_{nk},\qquad (m,k)\times(n,k)\to(m,n)$$
#
# has the same loop with $B_K = 128$: one step is one $z$. Compared with the kernel above, *two loads and
# one line* are new. `product` is the tensor core's own sum, 128 long and no longer; `acc` lives in
# ordinary fp32 registers. With $B_N = 128$ all columns of a tile share one block of the weight, so its
# scale is a single number. Here the FP8 values are fp32 numbers that E4M3 could hold, for the interpreter's
# sake; `fp8_gemm` in `kernels/gemm.py` loads FP8 values, a byte each, and a tensor core multiplies them.


# %%
@triton.jit
def scaled_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """C = Σ_z s^a_z s^b_z (A_z · B_zᵀ): A in tiles of 1 × 128, B (n, k) in blocks of 128 × 128."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, 128), GROUP)
    row, col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * 128 + tl.arange(0, 128)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    kz = tl.cdiv(k, 128)
    for z in range(kz):
        inner = z * 128 + tl.arange(0, 128)
        a_at = a_ptr + row[:, None] * k + inner[None, :]
        b_at = b_ptr + col[None, :] * k + inner[:, None]
        a = tl.load(a_at, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
        b = tl.load(b_at, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
        a_s = tl.load(a_s_ptr + row * kz + z, mask=row < m, other=0.0)  # a number per row
        b_s = tl.load(b_s_ptr + tile_n * kz + z)  # one number
        product = tl.dot(a, b, input_precision="ieee")
        acc += product * (a_s * b_s)[:, None]  # promotion: once every 128 of K
    c_at = c_ptr + row[:, None] * n + col[None, :]
    tl.store(c_at, acc, mask=(row < m)[:, None] & (col < n)[None, :])


def scaled_matmul(a, a_s, b, b_s, block_m: int = 64):
    (m, k), n = a.shape, len(b)
    c_mn = torch.empty(m, n, device=a.device)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, 128),)
    scaled_kernel[grid](a, a_s, b, b_s, c_mn, m, n, k, BLOCK_M=block_m, GROUP=4)
    return c_mn


for m, n, k in ((3, 200, 576), (70, 128, 100), (129, 300, 256)):  # 576 = 4.5 · 128
    (a, a_s), (b, b_s) = fp8.act_quant(torch.randn(m, k)), fp8.weight_quant(torch.randn(n, k))
    args = [t.float().to(DEVICE) for t in (a, a_s, b, b_s)]
    want = fp8.fp8_gemm(*args)
    assert torch.allclose(scaled_matmul(*args), want, rtol=1e-4, atol=1e-4), (m, n, k)
print("with scales: equal to chapter 09's reference")

# %% [markdown]
# ## Which program touches what
# A picture needs the kernel's index arithmetic, and `tile_of` is plain arithmetic on integers: its `.fn`
# is the Python function that `@triton.jit` was given, so picture and kernel cannot disagree. The check:
# in every order, each tile has exactly one owner.


# %%
place = tile_of.fn  # (pid, tiles_m, tiles_n, group) → the tile's row and column


def touched(pid: int, m: int, n: int, block_m: int, block_n: int, group: int):
    """Rows of A and C, and columns of B and C, that a program touches."""
    i, j = place(pid, ceil_div(m, block_m), ceil_div(n, block_n), group)
    rows = slice(i * block_m, min(m, (i + 1) * block_m))
    return rows, slice(j * block_n, min(n, (j + 1) * block_n))


for group in (1, 2, 4, 8):
    tiles = [place(pid, 6, 5, group) for pid in range(6 * 5)]
    assert sorted(tiles) == list(product(range(6), range(5)))
    assert group > 1 or tiles == sorted(tiles)  # groups of one: row by row

# %%
M, N, K = 88, 150, 96  # ragged in M and N


def paint(ax, rows: slice, cols: slice, color: str, alpha: float = 1.0) -> None:
    """A rectangle over these rows and columns of a matrix."""
    size = cols.stop - cols.start, rows.stop - rows.start
    look = {"facecolor": color, "alpha": alpha, "edgecolor": "white"}
    ax.add_patch(Rectangle((cols.start, rows.start), *size, **look))


def frame(ax, name: str, height: int, width: int) -> None:
    """The outline of a matrix, its first row on top."""
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, height], title=name)
    ax.spines[["top", "right"]].set_visible(True)


def draw_owners(ax, pid: int, count: int, blocks: tuple) -> None:
    """C with the number of the program that makes each tile; program pid in green."""
    for p in range(count):
        rows, cols = touched(p, M, N, *blocks)
        look = (GREEN, 1) if p == pid else (GRAY, 0.6 if p < pid else 0.2)
        paint(ax, rows, cols, *look)
        center = (cols.start + cols.stop) / 2, (rows.start + rows.stop) / 2
        ax.text(*center, p, ha="center", va="center", weight="bold" if p == pid else "normal")


def draw_tiles(pid=8, step=1, block_m=16, block_n=32, block_k=32, order="grouped by 4"):
    """A left of C, B above it, as in a product by hand: what one program touches."""
    blocks = block_m, block_n, 4 if order.startswith("grouped") else 1
    count, steps = ceil_div(M, block_m) * ceil_div(N, block_n), ceil_div(K, block_k)
    pid, step = min(pid, count - 1), min(step, steps - 1)
    rows, cols = touched(pid, M, N, *blocks)
    every, inner = slice(0, K), slice(step * block_k, min(K, (step + 1) * block_k))
    ratios = {"width_ratios": (K, N), "height_ratios": (K, M)}
    fig, ((note, b), (a, c)) = figure(2, 2, width=8, height=6, gridspec_kw=ratios)
    paint(a, rows, every, BLUE, 0.3), paint(a, rows, inner, BLUE)
    paint(b, every, cols, ORANGE, 0.3), paint(b, inner, cols, ORANGE)
    draw_owners(c, pid, count, blocks)
    frame(a, "A (m, k)", M, K), frame(b, "B (k, n)", K, N), frame(c, "C (m, n)", M, N)
    note.axis("off")
    text = (f"program {pid} of 0 … {count - 1}, {order}\nstep {step} of 0 … {steps - 1} along K\n\n"
            "pale: all that it reads\nfull color: read in this step\ngreen: the tile it makes\n"
            "dark gray: started before it\nlight gray: starts later")  # fmt: skip
    note.text(0, 0.5, text, va="center", transform=note.transAxes)
    show(fig)


draw_tiles()

# %% [markdown]
# Number 8 sits in the third column of the first group. Its rows of A are shared with 0, 4, 12 and 16;
# its columns of B with 9, 10 and 11, which start right after it, and with 24 and 25, much later. The
# last row of tiles and the last column are the ragged ones.
#
# ## Experiment: order is free, and more than halves what is fetched
# An H800 runs 132 programs of this kind at once, one per multiprocessor: a *wave*. Each reads a *strip* of
# A (its rows) and a strip of B (its columns). What several programs ask for at about the same time
# comes from memory once and then from L2. So count the *different* strips in a wave. In plain order a
# wave spreads over all of B; in grouped order it is a near-square patch of C. For $t$ tiles in a patch
# $g$ high, that is $g + t/g$ strips, least at $g=\sqrt t\approx 11$ for $t = 132$.
#
# The product is attention's $W^O$ on 4096 tokens in FP8: $(4096, 16384)\times(16384, 7168)$, tiles of
# 128. A and B are 184 MB together, too much for L2.

# %%
SMS = 132
TILE = 128
m, n = 4096, V3.dim
k = V3.n_heads * V3.v_head_dim
tiles_m, tiles_n = m // TILE, n // TILE


def strips(wave: int, group: int) -> int:
    """Different strips of A and of B that a wave of programs reads."""
    pids = range(wave * SMS, min((wave + 1) * SMS, tiles_m * tiles_n))
    rows, cols = zip(*(place(pid, tiles_m, tiles_n, group) for pid in pids))
    return len(set(rows)) + len(set(cols))


groups = [1, 2, 4, 6, 8, 11, 16, 32]
waves = ceil_div(tiles_m * tiles_n, SMS)
mean = {g: sum(strips(w, g) for w in range(waves)) / waves for g in groups}


def draw_waves(ax, group: int, name: str) -> None:
    """The tiles of C that the first three waves make."""
    picture = torch.zeros(tiles_m, tiles_n)
    for pid in range(3 * SMS):
        picture[place(pid, tiles_m, tiles_n, group)] = 1 + pid // SMS
    colors = ListedColormap(["#EEEEEE", GREEN, BLUE, ORANGE])
    ax.imshow(picture, cmap=colors, vmin=0, vmax=3, alpha=0.6, aspect="auto")
    for wave in range(3):
        row, col = (picture == 1 + wave).nonzero().float().mean(0)
        ax.text(col, row, f"wave {wave}", ha="center", va="center", weight="bold")
    ax.set(xlabel="columns of tiles of C", ylabel="rows of tiles of C")
    ax.set_title(f"{name}: {strips(0, group)} strips a wave")


fig, (plain, grouped, ax) = figure(1, 3, width=10, height=3.2)
draw_waves(plain, 1, "Plain")
draw_waves(grouped, 8, "Grouped by 8")
ax.plot(groups, list(mean.values()), "o-", color=BLUE, label="counted, mean of waves")
ax.plot(groups, [g + SMS / g for g in groups], "--", color=GRAY, label="g + 132 / g")
ax.set(xscale="log", xlabel="rows of tiles in a group, g", ylabel="strips a wave", ylim=(0, 140))
ax.set_xticks(groups, groups)
ax.minorticks_off()
ax.set_title("Least where the patch is square")
ax.legend()
show(fig)

strip = TILE * k  # bytes in FP8
multiply = SMS * 2 * TILE * TILE * k / 1979e12
for group in (1, 8):
    fetch = strips(0, group) * strip
    print(f"group {group}: {strips(0, group)} strips, {fetch / 1e6:5.1f} MB a wave: ", end="")
    print(f"{fetch / BANDWIDTH * 1e6:.1f} µs to fetch, {multiply * 1e6:.1f} µs to multiply")
assert strips(0, 1) == 59 and strips(0, 8) == 25
assert min(mean, key=mean.get) in (8, 11)
assert strips(0, 1) * strip / BANDWIDTH > multiply > 2 * strips(0, 8) * strip / BANDWIDTH

# %% [markdown]
# A wave's products take 35.8 µs at the peak, whatever the order. In plain order, fetching takes as long
# and a little more: no slack, and memory sets the pace. In grouped order, fetching needs less than half of
# the time and hides behind the arithmetic. Not one instruction of the inner loop has changed. (Count
# and peaks are ideal: real waves drift apart. And the formula fails for small $g$: there a wave wraps
# round after 56 columns, and no wave can touch more columns than there are.) `grouped_pid` in
# `kernels/gemm.py` is `tile_of` with 8.
#
# ## Play: be the program
# Step through the program ids and watch which strips stay; then change order and blocks.

# %%
play(
    draw_tiles,
    pid=(0, 59, 1),
    step=(0, 5, 1),
    block_m=[16, 32, 64],
    block_n=[32, 16, 64],
    block_k=[32, 16, 64],
    order=["grouped by 4", "plain"],
)

# %% [markdown]
# ## What the compiler makes of it
# The interpreter says whether a kernel is *right*. Whether it is any *good* stands in the machine code,
# and that can be had without a GPU: Triton brings its own assembler, so it compiles for a card that is
# not there.
#
#     python tools/aot.py --target sm_90a rms_norm fp8_gemm
#
# prints a line for every kernel and every *configuration* (block sizes, warps, stages) that its
# *autotuner*, which tries them all and keeps the fastest, would time. Some of them, as Triton 3.7.1 gave
# them for Hopper (H100, H800) on V3's shapes:
#
# | kernel | configuration | registers | spills | shared memory | QGMMA |
# |---|---|---|---|---|---|
# | `swiglu` | 4096 numbers, 8 warps | 32 | 0 | 0 | 0 |
# | `rms_norm` | a row of 8192 lanes, 8 warps | 80 | 0 | 32 B | 0 |
# | `fp8_gemm` | 128 × 128, 8 warps, 4 stages | 179 | 0 | 131 kB | 4 |
# | `fp8_gemm` | 128 × 192, 8 warps, 4 stages | 228 | 0 | 164 kB | 8 |
#
# - **Registers**, at most 255 per thread. 128 × 128 fp32 numbers are 64 registers per thread with 8 warps, 128
#   with 4, and the FP8 product holds that many *twice*, as `product` and as `acc`. With 8 warps there is
#   room for scales and addresses beside them; with 4 there is none.
# - **Spills** (instructions `STL`, `LDL`): what found no register goes to memory, inside the inner loop. The
#   tool fails on a single one. An early version of ours spilled at 128 × 128 with 4 warps.
# - **Shared memory**: stages × (tile of A + tile of B), for `fp8_gemm` 4 × 2 × 16 KiB = 131 kB of the
#   232 kB that there are. *Stages* are tiles under way while an earlier one is multiplied.
# - **QGMMA** is Hopper's FP8 tensor-core instruction; the column says how many the code has. If a cast to
#   a wider type slips in before `tl.dot`, they vanish (in their place stands `HGMMA`, at half the speed), the
#   result stays right, and no test of values would notice. The tool does. SwiGLU and RMSNorm have none,
#   since they multiply no matrices.

# %% [markdown]
# ## Back through the seam
# [Chapter 01](01_ops.ipynb) built one switch between equations and kernels. Behind it now stand the real
# ones. At a kernel's first call, its autotuner times the configurations. Times in the interpreter would
# mean nothing, so there every one is said to take 0 ms, and the first one wins.

# %%
from triton.runtime.autotuner import Autotuner

if DEVICE == "cpu":
    Autotuner.do_bench = property(lambda self: lambda call, quantiles=None: [0.0] * 3)

norm, mlp = ops.RMSNorm(200, 1e-6).to(DEVICE), ops.MLP(200, 136).to(DEVICE)
for p in mlp.parameters():
    torch.nn.init.normal_(p, std=0.07)
x = torch.randn(2, 7, 200, device=DEVICE, requires_grad=True)
g = torch.randn(2, 7, 200, device=DEVICE)  # a gradient from above
inputs = (x, norm.weight, *mlp.parameters())


def run():
    y = mlp(norm(x))
    return y, *torch.autograd.grad(y, inputs, g)


by_torch = run()
with ops.use("triton", "torch"):
    by_kernels = run()
    rows = [row.split() for row in ops.backend_table().splitlines()]
for name, active, *others in rows:
    if name in ("linear", "rms_norm", "swiglu"):
        print(f"{name:9} runs on {active:7} (also there: {', '.join(others)})")
for one, other in zip(by_torch, by_kernels):
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
print("norm and MLP, forward and all gradients: equal")

# %% [markdown]
# The modules know nothing of it, and neither does the optimizer. Dense products stay with torch
# (`linear`): a vendor's bf16 product is hard to beat, while FP8 with 128-wide scales is ours to write.
# One parametrized test for each file of `kernels/` compares every kernel with its reference, forward and
# backward, at ragged sizes.
#
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** How many bytes do all programs of `matmul` together load for $(m,k)\times(k,n)$? (fp32; a masked lane costs
# nothing; no cache helps.) Then see what doubling both blocks does.


# %%
def by_counting(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    """Bytes that all programs of `matmul` load, one program after the other."""
    total = 0
    for pid in range(ceil_div(m, block_m) * ceil_div(n, block_n)):
        rows, cols = touched(pid, m, n, block_m, block_n, 1)
        total += 4 * k * (rows.stop - rows.start + cols.stop - cols.start)
    return total


@checker
def check_traffic(fn):
    """How many programs load one row of A? And one column of B?"""
    cases = [(88, 150, 96, 16, 32), (128, 128, 64, 128, 128), (1, 300, 7, 16, 16)]
    assert all(abs(fn(*case) - by_counting(*case)) < 1e-9 for case in cases)


@checker
def check_owner(fn):
    """In which row and column of tiles is (i, j)? How many tiles come before that one?"""
    for m, n, block_m, block_n in ((88, 150, 16, 32), (33, 64, 32, 16)):
        for pid in range(ceil_div(m, block_m) * ceil_div(n, block_n)):
            rows, cols = touched(pid, m, n, block_m, block_n, 1)
            for i, j in product((rows.start, rows.stop - 1), (cols.start, cols.stop - 1)):
                assert abs(fn(i, j, n, block_m, block_n) - pid) < 1e-9


@checker
def check_spoils(fn):
    """Which sizes does the grid cover exactly?"""
    for n, block in ((64, 32), (65, 32), (1, 32), (96, 32), (100, 64), (31, 16), (16, 16)):
        assert bool(fn(n, block)) is spoils(n, block)


@checker
def check_split(fn):
    """A part is an ordinary product: which columns of A belong to which rows of B?"""
    source = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 150, generator=source), torch.randn(150, 40, generator=source)
    for parts in (1, 2, 4):
        got = fn(a.to(DEVICE), b.to(DEVICE), parts).cpu()
        assert got.shape == (parts, 5, 40) and torch.allclose(got.sum(0), a @ b, atol=1e-4)
        taken = fn(a.to(DEVICE), torch.eye(150, device=DEVICE), parts).cpu()[:, 0] != 0
        assert (taken.sum(0) == 1).all()  # every k is in one part,
        assert taken.sum(1).max() - taken.sum(1).min() <= parts  # and the parts are alike


# %%
def my_traffic(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    return ...


check_traffic(my_traffic)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_traffic(m, n, k, block_m, block_n):
#     tiles_m, tiles_n = ceil_div(m, block_m), ceil_div(n, block_n)
#     return 4 * k * (m * tiles_n + n * tiles_m)
# ```
#
# A is read once for each column of tiles, B once for each row of tiles. Blocks of twice the side: half
# the bytes.
# </details>
#
# **2 · Predict.** In plain order (`GROUP` = 1), which program writes element $(i, j)$ of C, a matrix with $n$
# columns?


# %%
def my_owner(i: int, j: int, n: int, block_m: int, block_n: int) -> int:
    return ...


check_owner(my_owner)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_owner(i, j, n, block_m, block_n):
#     return i // block_m * ceil_div(n, block_n) + j // block_n
# ```
#
# The number of columns of tiles is rounded *up*; with `n // block_n` the ragged last column would belong
# to the next row's first program.
# </details>
#
# **3 · Break.** `careless_kernel` forgot the mask. For which $n$ does it write over its neighbor's
# memory? (The check lets it do so, in a buffer with room to spare.)


# %%
@triton.jit
def careless_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at))  # no mask


def spoils(n: int, block: int) -> bool:
    """Return whether the careless kernel on n numbers writes over what lies after them."""
    x, memory = torch.ones(n + block, device=DEVICE), torch.full((n + block,), -1.0, device=DEVICE)
    careless_kernel[(triton.cdiv(n, block),)](x, memory, BLOCK=block)
    return bool((memory[n:] != -1).any())


def my_spoils(n: int, block: int) -> bool:
    return ...


check_spoils(my_spoils)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_spoils(n, block):
#     return n % block != 0
# ```
#
# A test at $n = 1024$ does not notice. Hence the house rule: ragged sizes first.
# </details>
#
# **4 · Extend.** In decoding, $m$ is small: 5 × 40 outputs are a single tile, and 131 multiprocessors
# idle. *Split K*: let several launches each sum a part of it, all parts about equally long. Return the
# partial products, shape (parts, m, n), by `matmul` on views. (Who adds them up? A second, small kernel: `kernels/decode.py`
# does that with attention over a long cache.)


# %%
def my_split(a_mk, b_kn, parts: int):
    return ...


check_split(my_split)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_split(a_mk, b_kn, parts):
#     pairs = zip(a_mk.chunk(parts, 1), b_kn.chunk(parts, 0))
#     return torch.stack([matmul(a, b) for a, b in pairs])
# ```
#
# One launch would do as well: a second axis of the grid, `tl.program_id(1)`, picks the part.
# </details>
#
# *A blank page.* Write a softmax over rows. The skeleton is RMSNorm's with two reductions, `tl.max` and
# `tl.sum`. One thing changes: what must a masked lane read so that it adds nothing? (Not 0: $e^0 = 1$.
# It is `-float("inf")`.)
#
# ## Scale-up
# What binds V3's kernels on one H100 or H800? The limits: 3.35 TB/s of memory, 1979 TFLOP/s in FP8, 989 in
# bf16, and 67 for ordinary fp32 arithmetic, which is what norms and quantizers use. Peak over bandwidth is
# the *knee*: with fewer operations per byte than that, a kernel waits for memory.

# %%
T, heads = 4096, V3.n_heads
d, f = V3.dim, V3.moe_inter_dim
latent, rope = V3.kv_lora_rank, V3.qk_rope_head_dim
fp8_bytes = 1 + 4 / 128  # an FP8 value and its share of a scale


def fp8_product(m: int, k: int, n: int) -> tuple[int, int, float]:
    """Count for (m, k) × (k, n) from FP8 to bf16: operations, bytes, operations per second."""
    return 2 * m * k * n, m * k + k * n + 2 * m * n, 1979e12


cases = {  # operations, bytes, operations per second
    "RMSNorm + quantize, 4096 rows": (8 * T * d, T * d * (2 + fp8_bytes), 67e12),
    "SwiGLU + quantize, 8 · 4096 rows": (9 * 8 * T * f, 8 * T * f * (4 + fp8_bytes), 67e12),
    "W^O in FP8, 4096 rows": fp8_product(T, heads * V3.v_head_dim, d),
    "an expert's W1, 1024 rows": fp8_product(1024, d, f),
    "an expert's W1, 32 rows (decode)": fp8_product(32, d, f),
    "MLA decode, a query, 4096 keys": (
        2 * T * heads * (2 * latent + rope), 2 * T * (latent + rope), 989e12
    ),
}  # fmt: skip
binds = {}
print(f"{'':34}{'op/byte':>8}{'knee':>6}{'memory':>12}{'arithmetic':>12}")
for name, (work, moved, peak) in cases.items():
    memory, arithmetic = moved / BANDWIDTH * 1e6, work / peak * 1e6
    binds[name] = "memory" if memory > arithmetic else "arithmetic"
    print(f"{name:34}{work / moved:8.0f}{peak / BANDWIDTH:6.0f}{memory:9.1f} µs{arithmetic:9.1f} µs"
          f"  {binds[name]}")  # fmt: skip
assert list(binds.values()) == ["memory"] * 2 + ["arithmetic"] * 2 + ["memory"] * 2

# %% [markdown]
# **Memory** binds norm and quantizer, so they are fused with their neighbors
# ([`kernels/norm.py`](../kernels/norm.py), [`kernels/quant.py`](../kernels/quant.py)). **Arithmetic** binds
# products of many rows, and the kernel's business is to keep tensor cores fed
# ([`kernels/gemm.py`](../kernels/gemm.py), the numbers of [chapter 09](09_fp8.ipynb)). With 32 rows an
# expert waits for its weights, whatever the kernel: only *more rows per expert* help, and those come
# from other GPUs. MLA's decode stands near the knee, since 128 heads share one latent: 242 operations per
# byte, where the knee is 295 ([`kernels/decode.py`](../kernels/decode.py)); with two tokens at a time, as
# drafts allow ([chapter 08](08_generate.ipynb)), arithmetic takes over.
#
# However the model is cut over GPUs, a kernel sees one of them. How rows travel between GPUs, and why 20 of
# 132 multiprocessors are spent on that, is the matter of [chapter 11](11_expert_parallel.ipynb).
