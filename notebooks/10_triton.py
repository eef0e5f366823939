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
# Written as separate torch steps, RMSNorm moves its matrix through memory **seven** times: square, mean
# and two products read it four times and write it three times. A *kernel*, a function that runs on the
# GPU, needs **two** passes. It loads each number once, squares, sums and scales it in registers, and
# stores it once. These steps are limited only by memory, so 3.5 times fewer bytes take 3.5 times less time.
#
# This chapter writes such kernels, from six lines to a tiled matrix product with FP8's scales. You do not
# need a GPU: Triton's *interpreter* runs the same code on the CPU, one program after the other. It is slow
# but gives the same results. The first cell selects it, since Triton reads the setting on import.

# %%
import os
import shutil
from itertools import product

if not shutil.which("nvidia-smi"):  # without a GPU use the interpreter; triton reads this on import
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
    """A record of (step, numbers read, numbers written) for every torch step."""

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
    """Draw a bar of numbers read and written, in passes over x, with the time at V3's size."""
    left = 0
    for step, read, written in steps:
        ax.barh(y, read, left=left, color=BLUE, edgecolor="white", height=0.6)
        ax.barh(y, written, left=left + read, color=ORANGE, edgecolor="white", height=0.6)
        if read + written > 0.5:  # steps on one number per row are too thin for a label
            ax.text(left + (read + written) / 2, y + 0.34, step, ha="center", va="bottom")
        left += read + written
    ax.text(left + 0.1, y, f"{left * 4 * 4096 * V3.dim / BANDWIDTH * 1e6:.0f} µs", va="center")


x_nd, weight_d = torch.randn(64, 512), torch.ones(512)
with torch.no_grad(), Traffic() as traffic:
    ops.IMPLS["rms_norm"]["torch"](x_nd, weight_d, 1e-6)  # the reference of chapter 01
n_x = x_nd.numel()
passes = [(step, read / n_x, written / n_x) for step, read, written in traffic.steps]
fig, ax = figure(width=7.5, height=2.5)
draw_passes(ax, 1, passes)
draw_passes(ax, 0, [("fused", 1, 1)])
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
# | *memory* | stores the tensors; high latency | 80 GB, 3.35 TB/s |
# | *L2* | a cache between memory and all multiprocessors | 50 MB |
# | *multiprocessor* | an independent core; a Triton program runs on one of them | 132 |
# | *shared memory* | the fast local memory of a multiprocessor, used for loaded tiles | 227 KiB |
# | *warp* | 32 threads that execute in lockstep; a program usually has 4 or 8 of them | |
# | *register* | stores one operand of a thread | at most 255 per thread |
# | *tensor core* | the unit of a multiprocessor that multiplies small matrices | FP8: 1979 TFLOP/s in total |
#
# Triton distributes the numbers of a program over its threads; our code never refers to a thread. We only
# specify which numbers a program loads, and when.

# %% [markdown]
# ## What the report says
# The authors wrote their kernels by hand and designed the algorithm around them. Relevant to this chapter:
#
# - **Fuse memory-bound steps.** On current hardware, quantization reads 128 bf16 numbers, writes their FP8
#   values, and reads these again for the product. The report asks hardware vendors to fuse cast and
#   transfer (§3.5.2). A kernel can already fuse the cast with the step *before* it.
# - **Recompute cheap results.** Norm outputs are recomputed in the backward pass (§3.2.3), which is
#   affordable once a norm takes two passes.
# - **Scales inside the product.** Tensor cores keep about 14 bits of a sum. Therefore, every 128 elements
#   of K, the summed axis, the partial sum moves to fp32 registers, is multiplied by the scales and added.
#   While one group of warps does that, another keeps the tensor core busy (§3.3.2). The report would
#   prefer tensor cores that apply the scales (§3.5.2).
# - **Multiprocessors are a budget.** An H800 has 132. **20** of them only move data between experts
#   (§3.2.2, §3.5.1).

# %% [markdown]
# ## A first kernel
# The kernel computes SwiGLU of two vectors, gate $g$ and up $u$, of $n$ numbers each ($\sigma$ is the
# sigmoid). They are split into blocks of $B$, and program $p$ computes the $p$-th block:
#
# $$y_i = g_i\,\sigma(g_i)\,u_i,\qquad i\in\{pB,\dots,pB+B-1\},\ i<n .$$
#
# One *program* computes a whole block; the *grid* is the number of programs. All programs run the same
# code, and only their ids differ. The numbers in the comments refer to the table below.


# %%
@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)  # 1
    offsets = pid * BLOCK + tl.arange(0, BLOCK)  # 2
    mask = offsets < n  # 3
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0)  # 4
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0)
    y = gate * tl.sigmoid(gate) * up  # 5
    tl.store(y_ptr + offsets, y, mask=mask)  # 6


def swiglu(gate, up, block: int = 256):
    y, n = torch.empty_like(gate), gate.numel()
    swiglu_kernel[(triton.cdiv(n, block),)](gate, up, y, n, BLOCK=block)  # 7
    return y


# %% [markdown]
# | line | why |
# |---|---|
# | `@triton.jit` | the body is *compiled*, not run by Python: it may contain only what Triton supports |
# | `gate_ptr` | a tensor is passed as the address of its first number, without shape and strides, so `n` is passed too |
# | `tl.constexpr` | known at compile time: the block size determines the number of registers |
# | 1 | the id of this program; the only line in which programs differ |
# | 2 | the *offsets* of the block, a vector of integers; `arange` requires a power of two |
# | 3 | which offsets exist: the last block extends beyond the end |
# | 4 | one load for the block; a masked *lane* (an element of the block) reads nothing and becomes `other` |
# | 5 | arithmetic on registers, free compared with the loads |
# | 6 | the only store; without the mask it would overwrite the memory after `y` |
# | 7 | the grid, a tuple in brackets: ⌈n/B⌉ programs; then the arguments |
#
# *Note.* This notebook uses only fp32. The stock interpreter truncates bf16 instead of rounding it and gets
# some FP8 values wrong. The tests correct that (`tests/interpreter.py`); this chapter does not need to.
# Triton is available for Linux only; on other systems, read the stored results.

# %%
for n in (1, 255, 256, 257, 1000):  # including sizes that are not multiples of the block
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
# Here $w$ is the learned weight and $D$ the length of a row. The sum needs the whole row, so one program
# holds it in registers, padded to a power of two: $x$ is read **once** and used twice. V3's 7168 numbers
# become 8192 lanes; with 8 warps that is 32 registers in each of 256 threads. Masked lanes read 0 and add
# nothing, but the mean divides by $D$, not by the number of lanes. Rows may be slices of wider rows, as
# MLA's latent is. The *stride* is the number of elements from the start of one row to the next.


# %%
@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, d, stride, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row · stride may exceed 2³¹ and overflow 32 bits
    col = tl.arange(0, BLOCK_D)
    mask = col < d
    x = tl.load(x_ptr + row * stride + col, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / d + eps)  # one number, from all lanes
    tl.store(y_ptr + row * d + col, x * rstd * weight, mask=mask)


def rms_norm(x_nd, weight_d, eps: float = 1e-6):
    (n, d), y_nd = x_nd.shape, torch.empty(x_nd.shape, device=x_nd.device)
    meta = {"BLOCK_D": triton.next_power_of_2(d)}
    rms_norm_kernel[(n,)](x_nd, weight_d, y_nd, d, x_nd.stride(0), eps, **meta)
    return y_nd


for n, d in ((1, 1), (3, 127), (5, 128), (7, 300)):
    wide, weight_d = torch.randn(n, d + 9, device=DEVICE), torch.rand(d, device=DEVICE)
    want = F.rms_norm(wide[:, :d], (d,), weight_d, 1e-6)
    assert torch.allclose(rms_norm(wide[:, :d], weight_d), want, atol=1e-5), (n, d)
print("RMSNorm: equal to torch at any width and on slices")

# %% [markdown]
# `kernels/norm.py` adds optimizations for a GPU: a program processes several short rows, loops over rows so
# that it loads the weight once, and prefetches the next rows while it sums these. It also has a backward
# pass.
#
# ## A tiled matrix product
# $$C_{mn}=\sum_k A_{mk}B_{kn},\qquad (m,k)\times(k,n)\to(m,n)$$
#
# One program computes one tile of $C$, $B_M\times B_N$. It loops over K in steps of $B_K$. Each step loads
# a tile of A and a tile of B and adds their product to an *accumulator* in registers. $B_K(B_M+B_N)$
# loaded numbers are used in $2B_MB_NB_K$ operations: **64 operations per number** with tiles of 64 × 64,
# and 128 with tiles of 128 × 128. This reuse is the reason for tiles.
#
# Which tile does program $p$ compute? Row by row would be correct. `tile_of` instead processes `GROUP` rows
# of tiles at a time, column by column; with `GROUP` = 1 that is row by row. The experiment below shows why.


# %%
@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the row and column of the tile of program pid: GROUP rows at a time, down then right."""
    group, index = pid // (GROUP * tiles_n), pid % (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)  # the last group may have fewer rows
    return first + index % height, index // height


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, a_m, a_k, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute C = A B; a_m … b_n are strides."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + row[:, None] * a_m + inner[None, :] * a_k
        b_ptrs = b_ptr + inner[:, None] * b_k + col[None, :] * b_n
        a = tl.load(a_ptrs, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
    c_ptrs = c_ptr + row[:, None] * n + col[None, :]
    tl.store(c_ptrs, acc, mask=(row < m)[:, None] & (col < n)[None, :])


def matmul(a_mk, b_kn, block=(32, 64, 32), group: int = 4):
    (m, k), n = a_mk.shape, b_kn.shape[1]
    c_mn = torch.empty(m, n, device=a_mk.device)
    grid = (triton.cdiv(m, block[0]) * triton.cdiv(n, block[1]),)
    args = a_mk, b_kn, c_mn, m, n, k, *a_mk.stride(), *b_kn.stride()
    matmul_kernel[grid](*args, *block, GROUP=group)
    return c_mn


# %% [markdown]
# `row[:, None]` and `inner[None, :]` broadcast to a tile of addresses, as in numpy. Three conditions mask the
# partial tiles at the edges. The one over K is easy to forget: rows and columns beyond the edge are never
# stored, but an element beyond the end of K would be *added* to valid results. Strides allow transposed
# views without a copy. `input_precision="ieee"` requests true fp32; by default, a GPU rounds the operands
# of `tl.dot` to 10 bits of mantissa (TF32).

# %%
for m, n, k in ((1, 1, 1), (33, 65, 31), (88, 150, 70), (64, 128, 64)):
    a_mk, b_nk = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    for group in (1, 4):
        got = matmul(a_mk, b_nk.T, group=group)  # a weight is stored as (out, in)
        assert torch.allclose(got, a_mk @ b_nk.T, atol=1e-4), (m, n, k, group)
print("matrix product: equal to torch at any size, in both orders")

# %% [markdown]
# ## The same with scales
# [Chapter 09](09_fp8.ipynb)'s product of FP8 values $q$ with scales $s$, where $z$ indexes the blocks of 128
# along K,
#
# $$C_{mn}=\sum_z s^a_{mz}\,s^b_{\lfloor n/128\rfloor z}\sum_{k\in z}q^a_{mk}q^b_{nk},\qquad (m,k)\times(n,k)\to(m,n)$$
#
# has the same loop with $B_K = 128$: each step is one $z$. Compared with the kernel above, *two loads and
# one line* are new. `product` is a sum of 128 products in the tensor core; `acc` is a sum in fp32
# registers. With $B_N = 128$ all columns of a tile share one block of the weight, so its scale is a single
# number. Here the FP8 values are stored as fp32, because of the interpreter. `fp8_gemm` in
# `kernels/gemm.py` loads FP8 values of one byte, which tensor cores multiply.


# %%
@triton.jit
def scaled_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """Compute C = Σ_z s^a_z s^b_z (A_z · B_zᵀ), A in tiles of 1 × 128, B in blocks of 128 × 128."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, 128), GROUP)
    row, col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * 128 + tl.arange(0, 128)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    kz = tl.cdiv(k, 128)
    for z in range(kz):
        inner = z * 128 + tl.arange(0, 128)
        a_ptrs = a_ptr + row[:, None] * k + inner[None, :]
        b_ptrs = b_ptr + col[None, :] * k + inner[:, None]
        a = tl.load(a_ptrs, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
        a_s = tl.load(a_s_ptr + row * kz + z, mask=row < m, other=0.0)  # one number per row
        b_s = tl.load(b_s_ptr + tile_n * kz + z)  # one number
        product = tl.dot(a, b, input_precision="ieee")
        acc += product * (a_s * b_s)[:, None]  # promotion: once every 128 of K
    c_ptrs = c_ptr + row[:, None] * n + col[None, :]
    tl.store(c_ptrs, acc, mask=(row < m)[:, None] & (col < n)[None, :])


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
print("with scales: equal to the reference of chapter 09")

# %% [markdown]
# ## Which program reads and writes what
# A picture needs the index arithmetic of the kernel. `tile_of` is plain integer arithmetic, and its `.fn` is
# the Python function that `@triton.jit` decorates, so picture and kernel share one definition. The check:
# in every order, exactly one program computes each tile.


# %%
locate_tile = tile_of.fn  # (pid, tiles_m, tiles_n, group) → row and column of the tile


def touched(pid: int, m: int, n: int, block_m: int, block_n: int, group: int):
    """Return the rows of A and C and the columns of B and C that a program accesses."""
    i, j = locate_tile(pid, ceil_div(m, block_m), ceil_div(n, block_n), group)
    rows = slice(i * block_m, min(m, (i + 1) * block_m))
    return rows, slice(j * block_n, min(n, (j + 1) * block_n))


for group in (1, 2, 4, 8):
    tiles = [locate_tile(pid, 6, 5, group) for pid in range(6 * 5)]
    assert sorted(tiles) == list(product(range(6), range(5)))
    assert group > 1 or tiles == sorted(tiles)  # groups of one: row by row

# %%
M, N = 88, 150  # not multiples of a block
K = 96


def paint(ax, rows: slice, cols: slice, color: str, alpha: float = 1.0) -> None:
    """Fill a rectangle over these rows and columns of a matrix."""
    size = cols.stop - cols.start, rows.stop - rows.start
    style = {"facecolor": color, "alpha": alpha, "edgecolor": "white"}
    ax.add_patch(Rectangle((cols.start, rows.start), *size, **style))


def frame(ax, name: str, height: int, width: int) -> None:
    """Draw the outline of a matrix, its first row on top."""
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, height], title=name)
    ax.spines[["top", "right"]].set_visible(True)


def draw_owners(ax, pid: int, count: int, blocks: tuple) -> None:
    """Draw C with the id of the program that computes each tile; program pid in green."""
    for p in range(count):
        rows, cols = touched(p, M, N, *blocks)
        if p == pid:
            paint(ax, rows, cols, GREEN)
        else:
            paint(ax, rows, cols, GRAY, 0.6 if p < pid else 0.2)
        center = (cols.start + cols.stop) / 2, (rows.start + rows.stop) / 2
        ax.text(*center, p, ha="center", va="center", weight="bold" if p == pid else "normal")


def draw_tiles(pid=8, step=1, block_m=16, block_n=32, block_k=32, order="grouped by 4"):
    """Draw A left of C and B above C, as in a product by hand, with the accesses of one program."""
    blocks = block_m, block_n, 4 if order.startswith("grouped") else 1
    count, steps = ceil_div(M, block_m) * ceil_div(N, block_n), ceil_div(K, block_k)
    pid, step = min(pid, count - 1), min(step, steps - 1)
    rows, cols = touched(pid, M, N, *blocks)
    all_k, inner = slice(0, K), slice(step * block_k, min(K, (step + 1) * block_k))
    ratios = {"width_ratios": (K, N), "height_ratios": (K, M)}
    fig, ((note, b), (a, c)) = figure(2, 2, width=8, height=6, gridspec_kw=ratios)
    paint(a, rows, all_k, BLUE, 0.3)
    paint(a, rows, inner, BLUE)
    paint(b, all_k, cols, ORANGE, 0.3)
    paint(b, inner, cols, ORANGE)
    draw_owners(c, pid, count, blocks)
    frame(a, "A (m, k)", M, K)
    frame(b, "B (k, n)", K, N)
    frame(c, "C (m, n)", M, N)
    note.axis("off")
    text = (f"program {pid} of 0 … {count - 1}, {order}\nstep {step} of 0 … {steps - 1} along K\n\n"
            "pale: everything that it reads\nfull color: read in this step\ngreen: the tile it computes\n"
            "dark gray: started before it\nlight gray: starts later")  # fmt: skip
    note.text(0, 0.5, text, va="center", transform=note.transAxes)
    show(fig)


draw_tiles()

# %% [markdown]
# Program 8 computes a tile in the third column of the first group. Programs 0, 4, 12 and 16 read the same
# rows of A. Programs 9, 10 and 11, which start right after it, read the same columns of B, and so do 24 and
# 25 much later. The last row and the last column have partial tiles.
#
# ## Experiment: the order of tiles more than halves the memory traffic
# An H800 runs 132 programs of this kind at once, one per multiprocessor: a *wave*. Each reads a *strip* of
# A (its rows) and a strip of B (its columns). A strip that several programs read at about the same time
# comes from memory once and then from L2. We therefore count the *different* strips in a wave. In plain
# order a wave spreads over all of B; in grouped order it is a nearly square patch of C. A patch of $t$
# tiles with height $g$ needs $g + t/g$ strips, fewest at $g=\sqrt t\approx 11$ for $t = 132$.
#
# The product is $W^O$ of attention on 4096 tokens in FP8: $(4096, 16384)\times(16384, 7168)$, tiles of
# 128. A and B have 184 MB together, too much for L2.

# %%
SMS = 132
TILE = 128
m, n = 4096, V3.dim
k = V3.n_heads * V3.v_head_dim
tiles_m, tiles_n = m // TILE, n // TILE


def strips(wave: int, group: int) -> int:
    """Count the different strips of A and of B that a wave of programs reads."""
    pids = range(wave * SMS, min((wave + 1) * SMS, tiles_m * tiles_n))
    rows, cols = zip(*(locate_tile(pid, tiles_m, tiles_n, group) for pid in pids))
    return len(set(rows)) + len(set(cols))


groups = [1, 2, 4, 6, 8, 11, 16, 32]
waves = ceil_div(tiles_m * tiles_n, SMS)
mean = {g: sum(strips(w, g) for w in range(waves)) / waves for g in groups}


def draw_waves(ax, group: int, name: str) -> None:
    """Draw the tiles of C that the first three waves compute."""
    picture = torch.zeros(tiles_m, tiles_n)
    for pid in range(3 * SMS):
        picture[locate_tile(pid, tiles_m, tiles_n, group)] = 1 + pid // SMS
    colors = ListedColormap(["#EEEEEE", GREEN, BLUE, ORANGE])
    ax.imshow(picture, cmap=colors, vmin=0, vmax=3, alpha=0.6, aspect="auto")
    for wave in range(3):
        row, col = (picture == 1 + wave).nonzero().float().mean(0)
        ax.text(col, row, f"wave {wave}", ha="center", va="center", weight="bold")
    ax.set(xlabel="columns of tiles of C", ylabel="rows of tiles of C")
    ax.set_title(f"{name}: {strips(0, group)} strips per wave")


fig, (plain, grouped, ax) = figure(1, 3, width=10, height=3.2)
draw_waves(plain, 1, "Plain")
draw_waves(grouped, 8, "Grouped by 8")
ax.plot(groups, list(mean.values()), "o-", color=BLUE, label="counted, mean over waves")
ax.plot(groups, [g + SMS / g for g in groups], "--", color=GRAY, label="g + 132 / g")
ax.set(xscale="log", xlabel="rows of tiles in a group, g", ylabel="strips per wave", ylim=(0, 140))
ax.set_xticks(groups, groups)
ax.minorticks_off()
ax.set_title("Fewest for a square patch")
ax.legend()
show(fig)

strip = TILE * k  # bytes in FP8
compute_time = SMS * 2 * TILE * TILE * k / 1979e12
for group in (1, 8):
    wave_bytes = strips(0, group) * strip
    print(
        f"group {group}: {strips(0, group)} strips, {wave_bytes / 1e6:5.1f} MB per wave: ", end=""
    )
    print(f"{wave_bytes / BANDWIDTH * 1e6:.1f} µs to load, {compute_time * 1e6:.1f} µs to multiply")
assert strips(0, 1) == 59 and strips(0, 8) == 25
assert min(mean, key=mean.get) in (8, 11)
assert strips(0, 1) * strip / BANDWIDTH > compute_time > 2 * strips(0, 8) * strip / BANDWIDTH

# %% [markdown]
# The products of a wave take 35.8 µs at the peak rate, in any order. In plain order loading takes slightly
# longer, so memory is the bottleneck. In grouped order loading takes less than half of that time and is
# hidden by the arithmetic. The inner loop is unchanged. (Counts and peak rates are idealized, since real
# waves drift apart. The formula fails for small $g$, where a wave wraps around after 56 columns: no wave
# can read more columns than there are.) `grouped_pid` in `kernels/gemm.py` is `tile_of` with 8.
#
# ## Play: one program at a time
# Step through the program ids and watch which strips are reused; then change order and blocks.

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
# The interpreter shows whether a kernel is *correct*. Whether it is *efficient* can be seen in the machine
# code, and that does not need a GPU: Triton includes an assembler and compiles for any target.
#
#     python tools/aot.py --target sm_90a rms_norm fp8_gemm
#
# prints a line for every kernel and every *configuration* (block sizes, warps, stages) that its *autotuner*
# would time to select the fastest. Some of them, from Triton 3.7.1 for Hopper (H100, H800) and V3's shapes:
#
# | kernel | configuration | registers | spills | shared memory | QGMMA |
# |---|---|---|---|---|---|
# | `swiglu` | 4096 numbers, 8 warps | 32 | 0 | 0 | 0 |
# | `rms_norm` | a row of 8192 lanes, 8 warps | 80 | 0 | 32 B | 0 |
# | `fp8_gemm` | 128 × 128, 8 warps, 4 stages | 179 | 0 | 131 kB | 4 |
# | `fp8_gemm` | 128 × 192, 8 warps, 4 stages | 228 | 0 | 164 kB | 8 |
#
# - **Registers**: at most 255 per thread. 128 × 128 fp32 numbers take 64 registers per thread with 8 warps
#   and 128 with 4. The FP8 product needs *twice* that, for `product` and `acc`. With 8 warps there is room
#   for scales and addresses; with 4 there is none.
# - **Spills** (instructions `STL`, `LDL`): values without a register are stored in memory, inside the inner
#   loop. The tool fails on a single one. An early version of our kernel spilled at 128 × 128 with 4 warps.
# - **Shared memory**: stages × (tile of A + tile of B). For `fp8_gemm` that is 4 × 2 × 16 KiB = 131 kB of
#   the available 232 kB. *Stages* are tiles that are loaded while an earlier one is multiplied.
# - **QGMMA** is Hopper's FP8 tensor-core instruction; the column counts its occurrences. A cast to a wider
#   type before `tl.dot` would replace it by `HGMMA` at half the speed. The result would stay correct, so no
#   test of values would fail, but the tool does. SwiGLU and RMSNorm do not multiply matrices.

# %% [markdown]
# ## Kernels as a backend
# [Chapter 01](01_ops.ipynb) introduced backends of ops; the kernels are one of them. On the first call of a
# kernel, its autotuner times the configurations. Times in the interpreter would be meaningless, so the cell
# below reports 0 ms for each, and the autotuner selects the first one.

# %%
from triton.runtime.autotuner import Autotuner

if DEVICE == "cpu":
    Autotuner.do_bench = property(lambda self: lambda call, quantiles=None: [0.0] * 3)

norm, mlp = ops.RMSNorm(200, 1e-6).to(DEVICE), ops.MLP(200, 136).to(DEVICE)
for p in mlp.parameters():
    torch.nn.init.normal_(p, std=0.07)
x = torch.randn(2, 7, 200, device=DEVICE, requires_grad=True)
g = torch.randn(2, 7, 200, device=DEVICE)  # the incoming gradient
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
        print(f"{name:9} runs on {active:7} (also available: {', '.join(others)})")
for want, got in zip(by_torch, by_kernels):
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
print("norm and MLP, forward and all gradients: equal")

# %% [markdown]
# Neither the modules nor the optimizer change. Dense bf16 products (`linear`) stay with torch, whose vendor
# library is hard to beat; FP8 with scales per 128 elements needs our own kernel. One test file per file of
# `kernels/` compares every kernel with its reference, forward and backward, at sizes that are not multiples
# of a block.
#
# ## Exercises
# Fill in each function and run its cell; the checkers are defined first.
#
# **1 · Compute.** How many bytes do all programs of `matmul` together load for $(m,k)\times(k,n)$ in fp32?
# Masked lanes load nothing, and there is no cache. What does doubling both blocks change?


# %%
def by_counting(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    """Count the bytes that all programs of `matmul` load, program by program."""
    total = 0
    for pid in range(ceil_div(m, block_m) * ceil_div(n, block_n)):
        rows, cols = touched(pid, m, n, block_m, block_n, 1)
        total += 4 * k * (rows.stop - rows.start + cols.stop - cols.start)
    return total


@checker
def check_traffic(fn):
    """How many programs load one row of A, and how many one column of B?"""
    cases = [(88, 150, 96, 16, 32), (128, 128, 64, 128, 128), (1, 300, 7, 16, 16)]
    assert all(abs(fn(*case) - by_counting(*case)) < 1e-9 for case in cases)


@checker
def check_owner(fn):
    """In which row and column of tiles is (i, j)? How many tiles precede it?"""
    for m, n, block_m, block_n in ((88, 150, 16, 32), (33, 64, 32, 16)):
        for pid in range(ceil_div(m, block_m) * ceil_div(n, block_n)):
            rows, cols = touched(pid, m, n, block_m, block_n, 1)
            for i, j in product((rows.start, rows.stop - 1), (cols.start, cols.stop - 1)):
                assert abs(fn(i, j, n, block_m, block_n) - pid) < 1e-9


@checker
def check_overruns(fn):
    """Which sizes does the grid cover exactly?"""
    for n, block in ((64, 32), (65, 32), (1, 32), (96, 32), (100, 64), (31, 16), (16, 16)):
        assert bool(fn(n, block)) is overruns(n, block)


@checker
def check_split(fn):
    """A part is an ordinary product: which columns of A belong to which rows of B?"""
    seed = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 150, generator=seed), torch.randn(150, 40, generator=seed)
    for parts in (1, 2, 4):
        got = fn(a.to(DEVICE), b.to(DEVICE), parts).cpu()
        assert got.shape == (parts, 5, 40) and torch.allclose(got.sum(0), a @ b, atol=1e-4)
        is_in_part = fn(a.to(DEVICE), torch.eye(150, device=DEVICE), parts).cpu()[:, 0] != 0
        assert (is_in_part.sum(0) == 1).all()  # every k is in exactly one part
        lengths = is_in_part.sum(1)
        assert lengths.max() - lengths.min() <= parts  # which have similar lengths


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
# A is read once per column of tiles, and B once per row of tiles. Blocks of twice the side length halve the
# bytes.
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
# The number of columns of tiles is rounded *up*. With `n // block_n` a partial last column would belong to
# the first program of the next row.
# </details>
#
# **3 · Break.** `unmasked_kernel` has no mask. For which $n$ does it overwrite the memory after its result?
# (The check allows it to, in a buffer that is large enough.)


# %%
@triton.jit
def unmasked_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets))  # no mask


def overruns(n: int, block: int) -> bool:
    """Return whether the unmasked kernel on n numbers writes beyond their end."""
    x, memory = torch.ones(n + block, device=DEVICE), torch.full((n + block,), -1.0, device=DEVICE)
    unmasked_kernel[(triton.cdiv(n, block),)](x, memory, BLOCK=block)
    return bool((memory[n:] != -1).any())


def my_overruns(n: int, block: int) -> bool:
    return ...


check_overruns(my_overruns)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_overruns(n, block):
#     return n % block != 0
# ```
#
# A test at $n = 1024$ does not detect that. Therefore, test sizes that are not multiples of the block first.
# </details>
#
# **4 · Extend.** In decoding, $m$ is small: 5 × 40 outputs are a single tile, and 131 multiprocessors are
# idle. *Split K*: let several launches each sum a part of K, all parts about equally long. Return the partial
# products, shape (parts, m, n), by `matmul` on views. (A second, small kernel would add them;
# `kernels/decode.py` does so for attention over a long cache.)


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
# A single launch is possible too: a second axis of the grid, `tl.program_id(1)`, selects the part.
# </details>
#
# *From scratch.* Write a softmax over rows. It has the structure of RMSNorm with two reductions, `tl.max`
# and `tl.sum`. One thing differs: which value must a masked lane read so that it adds nothing? (Not 0, since
# $e^0 = 1$, but `-float("inf")`.)
#
# ## Scale-up
# What limits V3's kernels on one H100 or H800? The peak rates are 3.35 TB/s of memory, 1979 TFLOP/s in FP8,
# 989 in bf16, and 67 in ordinary fp32 arithmetic, which norms and quantizers use. Peak rate over bandwidth
# is the *ridge point*: a kernel with fewer operations per byte is memory-bound.

# %%
T, heads = 4096, V3.n_heads
d, f = V3.dim, V3.moe_inter_dim
latent, rope = V3.kv_lora_rank, V3.qk_rope_head_dim
fp8_bytes = 1 + 4 / 128  # an FP8 value and 1/128 of a scale


def fp8_product(m: int, k: int, n: int) -> tuple[int, int, float]:
    """Return operations, bytes and operations per second of (m, k) × (k, n) from FP8 to bf16."""
    return 2 * m * k * n, m * k + k * n + 2 * m * n, 1979e12


cases = {  # operations, bytes, operations per second
    "RMSNorm + quantize, 4096 rows": (8 * T * d, T * d * (2 + fp8_bytes), 67e12),
    "SwiGLU + quantize, 8 · 4096 rows": (9 * 8 * T * f, 8 * T * f * (4 + fp8_bytes), 67e12),
    "W^O in FP8, 4096 rows": fp8_product(T, heads * V3.v_head_dim, d),
    "an expert's W1, 1024 rows": fp8_product(1024, d, f),
    "an expert's W1, 32 rows (decode)": fp8_product(32, d, f),
    "MLA decode, one query, 4096 keys": (
        2 * T * heads * (2 * latent + rope), 2 * T * (latent + rope), 989e12
    ),
}  # fmt: skip
binds = {}
print(f"{'':34}{'op/byte':>8}{'ridge':>7}{'memory':>11}{'arithmetic':>12}")
for name, (work, moved, peak) in cases.items():
    memory, arithmetic = moved / BANDWIDTH * 1e6, work / peak * 1e6
    binds[name] = "memory" if memory > arithmetic else "arithmetic"
    print(f"{name:34}{work / moved:8.0f}{peak / BANDWIDTH:7.0f}{memory:8.1f} µs{arithmetic:9.1f} µs"
          f"  {binds[name]}")  # fmt: skip
assert list(binds.values()) == ["memory"] * 2 + ["arithmetic"] * 2 + ["memory"] * 2

# %% [markdown]
# Norm and quantizer are bound by **memory**, so they are fused with their neighbors
# ([`kernels/norm.py`](../kernels/norm.py), [`kernels/quant.py`](../kernels/quant.py)). Products of many rows
# are bound by **arithmetic**, and the kernel must keep the tensor cores busy
# ([`kernels/gemm.py`](../kernels/gemm.py), the numbers of [chapter 09](09_fp8.ipynb)). An expert with
# 32 rows is bound by loading its weights, in any kernel: only *more rows per expert* help, and these come
# from other GPUs. MLA's decode is near the ridge point, since 128 heads share one latent: 242 operations per byte, where
# the ridge point is 295 ([`kernels/decode.py`](../kernels/decode.py)). With two tokens per step, as
# speculative decoding allows ([chapter 08](08_generate.ipynb)), it becomes compute-bound.
#
# A kernel runs on one GPU, however the model is distributed. [Chapter 11](11_expert_parallel.ipynb) shows how
# rows are exchanged between GPUs, and why 20 of 132 multiprocessors are reserved for that.
