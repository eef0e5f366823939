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
# GPU, needs **two**: each number comes in once, is squared, summed and scaled while it lies in a
# register, and leaves once. Since these steps wait for memory and for nothing else, 3.5 times fewer bytes
# are 3.5 times less time.
#
# This chapter writes such kernels, from six lines to a tiled matrix product with FP8's scales. Without a
# GPU, Triton's *interpreter* runs the same code on the CPU, one program after the other: slow, but the
# real thing. The first cell decides, since Triton asks only once, when it is imported.

# %%
import os
import shutil

if not shutil.which("nvidia-smi"):  # no GPU: the interpreter; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref import fp8, ops
from dsv3_ref.config import V3
from dsv3_ref.viz import BLUE, GREEN, GREY, ORANGE, PINK, attempt, figure, play, show

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
BANDWIDTH = 3.35e12  # bytes a second of an H100's or H800's memory
torch.manual_seed(0)
print("kernels run", "in the interpreter" if DEVICE == "cpu" else "on the GPU")


# %%
class Traffic(TorchDispatchMode):
    """Notes what every torch step reads and writes, in numbers."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        self.steps.append((func.overloadpacket.__name__, read, out.numel()))
        return out


def steps(fn, *args) -> list[tuple[str, int, int]]:
    with torch.no_grad(), Traffic() as seen:
        fn(*args)
    return seen.steps


x_nd, weight_d = torch.randn(64, 512), torch.ones(512)
passes = lambda name, *args: [
    (step, r / args[0].numel(), w / args[0].numel())
    for step, r, w in steps(ops.IMPLS[name]["naive"], *args)
]
found = passes("rms_norm", x_nd, weight_d, 1e-6)
total = sum(r + w for _, r, w in found)
V3_ROW = 4 * 4096 * V3.dim  # bytes of 4096 tokens in fp32
fig, ax = figure(width=7.5, height=2.3)
for y, kind in enumerate(([("fused", 1, 1)], found)):
    left = 0
    for step, read, written in kind:
        for size, colour in ((read, BLUE), (written, ORANGE)):
            ax.barh(y, size, left=left, color=colour, edgecolor="white", height=0.6)
            left += size
        if read + written > 0.5:
            ax.text(
                left - (read + written) / 2, y + 0.36, step, ha="center", va="bottom", fontsize=9
            )
    ax.text(left + 0.1, y, f"{left * V3_ROW / BANDWIDTH * 1e6:.0f} µs", va="center")
ax.barh(0, 0, color=BLUE, label="read")
ax.barh(0, 0, color=ORANGE, label="written")
ax.set_yticks([0, 1], ["one kernel", "torch steps"])
ax.set(xlabel="passes over x (times: 4096 tokens of V3 at an H100's bandwidth)")
ax.set(ylim=(-0.5, 1.8), xlim=(0, 8.2))
ax.set_title("RMSNorm: seven passes through memory, or two")
ax.legend(loc="lower right")
show(fig)
assert 7 <= total < 7.05

# %% [markdown]
# ## What the report says
# The team wrote its kernels by hand and shaped the algorithm around them. What concerns this chapter:
#
# - **Fuse what waits for memory.** On today's hardware, quantising means to fetch 128 bf16 numbers,
#   write their codes back, and fetch them a second time for the product. The report asks chip makers to
#   join cast and transfer (§3.5.2). A kernel can already join the cast to the step *before* it.
# - **Recompute what is cheap.** Norm outputs are made again in the backward pass (§3.2.3): easy to
#   afford once a norm costs two passes.
# - **Scales inside the product.** Tensor cores keep about 14 bits of a sum. So every 128 elements of K
#   the partial sum moves to ordinary cores, is multiplied by the scales there, and added in fp32. While
#   one group of warps does that, another keeps the tensor core busy (§3.3.2). The report would like the
#   scales handled *in* the tensor core (§3.5.2).
# - **Multiprocessors are a budget.** An H800 has 132; **20** of them move data between experts and
#   multiply nothing (§3.2.2, §3.5.1).

# %% [markdown]
# ## A first kernel
# SwiGLU on a vector of $n$ numbers, cut into blocks of $B$; program $p$ takes the $p$-th block:
#
# $$y_i = g_i\,\sigma(g_i)\,u_i,\qquad i\in\{pB,\dots,pB+B-1\},\ i<n .$$
#
# Triton has no threads to think about. One *program* handles a whole block at once, and the *grid* says
# how many programs there are. All of them run the same lines; only their number differs.


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
# | | |
# |---|---|
# | `@triton.jit` | the body is *compiled*, not run: only what Triton knows may stand in it |
# | `gate_ptr` | a tensor arrives as the address of its first number; shape and strides stay behind, so `n` is passed too |
# | `tl.constexpr` | known at compile time: a block's size decides how many registers there are |
# | 1 | which program am I? the only line in which programs differ |
# | 2 | the *offsets* of the block, a vector of integers; `arange` wants a power of two |
# | 3 | which of them exist: the last block hangs over the end |
# | 4 | addresses plus mask: one load for the block; a masked lane reads nothing and gets `other` |
# | 5 | arithmetic on registers, free beside the loads |
# | 6 | the only write; masked, or it would hit what lies behind `y` |
# | 7 | the grid, a tuple in brackets: ⌈n/B⌉ programs; then the arguments |

# %%
for n in (1, 255, 256, 257, 1000):  # ragged sizes first
    gate, up = torch.randn(2, n, device=DEVICE)
    assert torch.allclose(swiglu(gate, up), F.silu(gate) * up, atol=1e-6), n

n, BLOCK = 1000, 256
fig, ax = figure(width=8, height=1.7)
for pid, colour in zip(range(triton.cdiv(n, BLOCK)), (BLUE, ORANGE, GREEN, PINK)):
    start, end = pid * BLOCK, (pid + 1) * BLOCK
    ax.barh(0, min(end, n) - start, left=start, color=colour, edgecolor="white")
    ax.text((start + min(end, n)) / 2, 0, f"program {pid}", ha="center", va="center", color="white")
ax.barh(0, end - n, left=n, color="white", edgecolor=GREY, hatch="////")
ax.text(end + 10, 0, f"{end - n} masked lanes", va="center")
ax.set(yticks=[], xticks=[0, 256, 512, 768, 1000], xlabel="index i", xlim=(0, 1190))
ax.spines["left"].set_visible(False)
ax.set_title(f"A grid of {pid + 1} programs: {n} numbers in blocks of {BLOCK}")
show(fig)

# %% [markdown]
# *A warning.* This notebook stays in fp32. The stock interpreter cuts bf16 off instead of rounding it,
# and gets some FP8 codes wrong; the tests mend that (`tests/interpreter.py`), a chapter need not. And Triton's
# packages are for Linux: elsewhere, the executed notebook still shows every result.

# %% [markdown]
# ## A row at a time: RMSNorm
# $$y_{nd} = x_{nd}\;\Big(\tfrac1D\textstyle\sum_d x_{nd}^2+\epsilon\Big)^{-1/2} w_d,\qquad (n,d)\to(n,d)$$
#
# A sum over the row needs the row: one program holds all of it, padded to a power of two, so that $x$ is
# read **once** and used twice. V3's 7168 numbers become 8192 lanes, 32 in each of 256 threads. Masked
# lanes read 0 and add nothing, but the mean divides by $D$, not by the lanes. Rows may be slices of
# wider ones (MLA's latent is), hence the stride.


# %%
@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, d, stride, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row · stride may pass 2³¹
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

# %% [markdown]
# ## A tiled matrix product
# $$C_{mn}=\sum_k A_{mk}B_{kn},\qquad (m,k)\times(k,n)\to(m,n)$$
#
# One program makes one tile of $C$, $B_M\times B_N$. It walks along K in steps of $B_K$, each time loads
# a tile of A and a tile of B, and adds their product to an *accumulator* that never leaves the
# registers. Of $B_K(B_M+B_N)$ loaded numbers come $2B_MB_NB_K$ operations: **64 operations a number** with
# tiles of 64, 128 with tiles of 128. This is the whole reason for tiles.
#
# Which tile is program $p$'s? Row by row would do. `tile_of` walks instead through `GROUP` rows of tiles
# at a time, column by column; with `GROUP` = 1 that *is* row by row. The experiment below shows why.


# %%
@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of program pid's tile: GROUP rows of tiles at a time, down then right."""
    width = GROUP * tiles_n
    first = pid // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)  # the last group may be short
    return first + pid % width % height, pid % width // height


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
    c_mn, (block_m, block_n, _) = torch.empty(m, n, device=a_mk.device), block
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    args = a_mk, b_kn, c_mn, m, n, k, *a_mk.stride(), *b_kn.stride()
    matmul_kernel[grid](*args, *block, GROUP=group)
    return c_mn


# %% [markdown]
# `row[:, None]` and `inner[None, :]` broadcast to a tile of addresses, as in numpy. Three masks guard
# the ragged edges. The one over K is the treacherous one: rows and columns that do not exist are never
# stored, but a K beyond the end would be *added* to numbers that are. Strides let a transposed view in
# without a copy.

# %%
for m, n, k in ((1, 1, 1), (33, 65, 31), (88, 150, 70), (64, 128, 64)):
    a_mk, b_nk = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    for group in (1, 4):
        got = matmul(a_mk, b_nk.T, group=group)  # a weight is stored (out, in): a view does
        assert torch.allclose(got, a_mk @ b_nk.T, atol=1e-4), (m, n, k, group)
print("matrix product: equal to torch at ragged sizes, in both orders")

# %% [markdown]
# ## The same with scales
# Chapter 09's product, $C_{mn}=\sum_z s^a_{mz}\,s^b_{\lfloor n/128\rfloor z}\sum_{k\in z}q^a_{mk}q^b_{nk}$, has
# the same loop with $B_K = 128$: one step is one $z$. Compared with the kernel above, *two loads and
# one line* are new. `product` is the tensor core's own sum, 128 long and no longer; `acc` lives in
# ordinary fp32 registers. With $B_N = 128$ all columns share one block of the weight, so its scale is a
# single number. Here the codes are fp32 numbers that E4M3 could hold; on the GPU they are one byte.


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
        a_s = tl.load(a_s_ptr + row * kz + z, mask=row < m, other=0.0)  # a number a row
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
# The picture needs the kernel's index arithmetic in Python. To be sure that the two agree, a kernel of
# four lines lets every program sign its tile of C.


# %%
def place(pid: int, tiles_m: int, tiles_n: int, group: int) -> tuple[int, int]:
    """`tile_of` in Python."""
    width = group * tiles_n
    first = pid // width * group
    height = min(tiles_m - first, group)
    return first + pid % width % height, pid % width // height


def touched(pid: int, m: int, n: int, block_m: int, block_n: int, group: int):
    """Rows of A and C, and columns of B and C, that a program touches."""
    i, j = place(pid, -(-m // block_m), -(-n // block_n), group)
    rows = slice(i * block_m, min(m, (i + 1) * block_m))
    return rows, slice(j * block_n, min(n, (j + 1) * block_n))


@triton.jit
def sign_kernel(c_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(c_ptr + row * n + col, tl.program_id(0), mask=(row < m) & (col < n))


def signed(m: int, n: int, block_m: int, block_n: int, group: int):
    """Who wrote each element of C."""
    c_mn = torch.full((m, n), -1, dtype=torch.int32, device=DEVICE)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    sign_kernel[grid](c_mn, m, n, block_m, block_n, group)
    return c_mn.cpu()


for group in (1, 2, 4):
    by_kernel, by_hand = signed(88, 150, 16, 32, group), torch.full((88, 150), -1)
    for pid in range(6 * 5):
        rows, cols = touched(pid, 88, 150, 16, 32, group)
        by_hand[rows, cols] = pid
    assert torch.equal(by_kernel, by_hand.int()) and by_kernel.min() == 0
print("every element of C has one owner, and the picture knows it")

# %%
M, N, K = 88, 150, 96  # ragged in M and N


def draw_tiles(pid=8, step=1, block_m=16, block_n=32, block_k=32, order="grouped by 4"):
    """A left of C, B above it, as in a product by hand: what one program touches."""
    group = 4 if order.startswith("grouped") else 1
    count = -(-M // block_m) * -(-N // block_n)
    pid, step = min(pid, count - 1), min(step, -(-K // block_k) - 1)
    rows, cols = touched(pid, M, N, block_m, block_n, group)
    inner = slice(step * block_k, min(K, (step + 1) * block_k))
    ratios = {"width_ratios": (K, N), "height_ratios": (K, M)}
    fig, ((note, b), (a, c)) = figure(2, 2, width=8, height=6, gridspec_kw=ratios)
    box = lambda ax, r, s, colour, alpha=1.0: ax.add_patch(
        plt.Rectangle((s.start, r.start), s.stop - s.start, r.stop - r.start,
                      facecolor=colour, alpha=alpha, edgecolor="white", linewidth=1)
    )  # fmt: skip
    every = slice(0, K)
    box(a, rows, every, BLUE, 0.3), box(a, rows, inner, BLUE)
    box(b, every, cols, ORANGE, 0.3), box(b, inner, cols, ORANGE)
    for p in range(count):
        r, s = touched(p, M, N, block_m, block_n, group)
        box(c, r, s, GREEN if p == pid else GREY, 1.0 if p == pid else 0.35 if p < pid else 0.18)
        middle = ((s.start + s.stop) / 2, (r.start + r.stop) / 2)
        c.text(
            *middle,
            p,
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if p == pid else None,
        )
    for ax, name, height, width in (
        (a, "A (m, k)", M, K),
        (b, "B (k, n)", K, N),
        (c, "C (m, n)", M, N),
    ):
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, height])
        ax.set_title(name)
        ax.spines[["top", "right"]].set_visible(True)
    note.axis("off")
    text = (f"program {pid} of 0 … {count - 1}\nstep {step} of 0 … {-(-K // block_k) - 1}\n{order}\n\n"
            f"pale: all it reads\nfull: this step\ndark grey: started before")  # fmt: skip
    note.text(0, 0.5, text, va="center", transform=note.transAxes)
    show(fig)


draw_tiles()

# %% [markdown]
# Number 8 sits in the third column of the first group: its rows of A are shared with 0, 4, 12 and 16,
# its columns of B with 9, 10 and 11 at once, and much later with 24 and 25. The last row of tiles and the last column are the ragged ones.

# %% [markdown]
# ## Experiment: order is free, and worth a factor of two
# An H800 runs 132 programs of this kind at once, a *wave*. They ask for overlapping strips of A and B;
# what is asked for twice comes from the L2 cache (50 MB), if both ask at about the same time. So count
# the *different* strips in a wave. In a row-major wave the programs spread over all of B; in a grouped
# one they form a near-square patch of C. For $t$ tiles in a patch $g$ high, that is
# $g + t/g$ strips, least at $g=\sqrt t\approx 11$ for $t = 132$.
#
# The product is attention's $W^O$ on 4096 tokens in FP8: $(4096, 16384)\times(16384, 7168)$, tiles of
# 128. A and B are 184 MB together, too much for L2.

# %%
SMS, TILE = 132, 128
m, k, n = 4096, V3.n_heads * V3.v_head_dim, V3.dim
tiles_m, tiles_n = m // TILE, n // TILE


def strips(wave: int, group: int) -> int:
    """Different strips of A and of B that a wave of programs reads."""
    pids = range(wave * SMS, min((wave + 1) * SMS, tiles_m * tiles_n))
    rows, cols = zip(*(place(pid, tiles_m, tiles_n, group) for pid in pids))
    return len(set(rows)) + len(set(cols))


groups = [1, 2, 4, 6, 8, 11, 16, 32]
waves = -(-tiles_m * tiles_n // SMS)
mean = {g: sum(strips(w, g) for w in range(waves)) / waves for g in groups}
fig, axes = figure(1, 3, width=10, height=3.2)
for ax, group, name in zip(axes, (1, 8), ("Plain", "Grouped by 8")):
    picture = torch.zeros(tiles_m, tiles_n)
    for pid in range(3 * SMS):
        picture[place(pid, tiles_m, tiles_n, group)] = 1 + pid // SMS
    colours = plt.matplotlib.colors.ListedColormap(["#EEEEEE", GREEN, BLUE, ORANGE])
    ax.imshow(picture.numpy(), cmap=colours, vmin=0, vmax=3, aspect="auto")
    ax.set(xlabel="columns of tiles of C", ylabel="rows of tiles")
    ax.set_title(f"{name}: {strips(0, group)} strips a wave")
axes[2].plot(groups, list(mean.values()), "o-", color=BLUE, label="counted, mean of waves")
axes[2].plot(groups, [g + SMS / g for g in groups], "--", color=GREY, label="g + 132 / g")
axes[2].set(
    xscale="log", xlabel="rows of tiles in a group, g", ylabel="strips a wave", ylim=(0, 140)
)
axes[2].set_xticks(groups, groups)
axes[2].minorticks_off()
axes[2].set_title("Least where the patch is square")
axes[2].legend()
show(fig)

# %% [markdown]
# Left and middle: the first three waves (green, blue, orange). In numbers, and in time:

# %%
strip = TILE * k  # bytes in FP8
multiply = SMS * 2 * TILE * TILE * k / 1979e12
for group in (1, 8):
    fetch = strips(0, group) * strip
    print(f"group {group}: {strips(0, group)} strips, {fetch / 1e6:5.1f} MB a wave: "
          f"{fetch / BANDWIDTH * 1e6:4.1f} µs to fetch, {multiply * 1e6:.1f} µs to multiply")  # fmt: skip
assert strips(0, 1) == 59 and strips(0, 8) == 25
assert min(mean, key=mean.get) in (8, 11)
assert strips(0, 1) * strip / BANDWIDTH > multiply > 2 * strips(0, 8) * strip / BANDWIDTH

# %% [markdown]
# In plain order fetching alone takes longer than multiplying at the peak, so memory would set the pace. In
# grouped order it hides behind the arithmetic. Not one instruction of the inner loop has changed. The
# formula errs at the ends: a wave in plain order wraps round after 56 columns and cannot touch more
# columns than there are. (Count and peaks are ideal: real waves drift apart.) `swizzled` in
# `kernels/gemm.py` is `tile_of` with 8.

# %% [markdown]
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
# and that can be had without a GPU: Triton brings its own assembler, so the compiler can work for a card
# that is not there.
#
#     python tools/aot.py --target sm_90a rms_norm fp8_gemm
#
# prints a line for every kernel and every configuration that its autotuner would try. Some lines as
# Triton 3.7.1 gave them for Hopper, on V3's shapes:
#
# | kernel | configuration | registers | spills | shared memory | QGMMA |
# |---|---|---|---|---|---|
# | `swiglu` | 4096 numbers, 8 warps | 32 | 0 | 0 | 0 |
# | `rms_norm` | a row of 8192 lanes, 8 warps | 80 | 0 | 32 B | 0 |
# | `fp8_gemm` | 128 × 128, 8 warps, 4 stages | 179 | 0 | 131 kB | 4 |
# | `fp8_gemm` | 128 × 192, 8 warps, 4 stages | 228 | 0 | 164 kB | 8 |
#
# - **Registers**, at most 255 a thread. An accumulator of 128 × 128 fp32 numbers is 64 registers a thread
#   with 8 warps, 128 with 4: add tiles, scales and addresses, and the second is near the limit.
# - **Spills** (`STL`, `LDL`): what found no register goes to memory, inside the inner loop. The tool
#   fails on a single one. An early version of ours spilled at 128 × 128 with 4 warps.
# - **Shared memory**: stages × (tile of A + tile of B), 4 × 2 × 16 kB here, of 227 KiB. Stages are tiles
#   under way while an earlier one is multiplied.
# - **QGMMA** is Hopper's FP8 tensor-core instruction. If a cast to a wider type slips in before
#   `tl.dot`, it vanishes (`HGMMA`, half the speed), the result stays right, and no test of values
#   would notice. The tool does. SwiGLU and RMSNorm have none, since nothing there is a matrix.

# %% [markdown]
# ## Back through the seam
# [Chapter 01](01_ops.ipynb) built one switch between equations and kernels. Behind it now stand the real
# ones. A real kernel has several configurations, and an autotuner that times them on the first call;
# the interpreter has nothing to time, so there we let the first one win.

# %%
from triton.runtime.autotuner import Autotuner

if DEVICE == "cpu":
    Autotuner.do_bench = property(lambda self: lambda call, quantiles=None: [0.0, 0.0, 0.0])

norm, mlp = ops.RMSNorm(200, 1e-6).to(DEVICE), ops.MLP(200, 136).to(DEVICE)
for p in mlp.parameters():
    torch.nn.init.normal_(p, std=0.07)
x, g = (
    torch.randn(2, 7, 200, device=DEVICE, requires_grad=True),
    torch.randn(2, 7, 200, device=DEVICE),
)
inputs = (x, norm.weight, *mlp.parameters())


def run():
    y = mlp(norm(x))
    return y, *torch.autograd.grad(y, inputs, g)


by_torch = run()
with ops.use("triton", "torch"):
    by_kernels = run()
    print(ops.table())
for one, other in zip(by_torch, by_kernels):
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
print("\nnorm and MLP, forward and all gradients: equal")

# %% [markdown]
# The modules know nothing of it, and neither does the optimizer. Dense products stay with torch
# (`linear`): a vendor's bf16 product is hard to beat, while FP8 with 128-wide scales is ours to write.
# One parametrised test for each file of `kernels/` compares every kernel with its reference, forward and
# backward, at ragged sizes.

# %% [markdown]
# ## Exercises
# Fill in the function, run the cell, and let the check tell.


# %%
def check_traffic(fn) -> bool:
    def by_counting(m, n, k, block_m, block_n):
        total = 0
        for pid in range(-(-m // block_m) * -(-n // block_n)):
            rows, cols = touched(pid, m, n, block_m, block_n, 1)
            total += 4 * k * (rows.stop - rows.start + cols.stop - cols.start)
        return total

    cases = [(88, 150, 96, 16, 32), (128, 128, 64, 128, 128), (1, 300, 7, 16, 16)]
    return attempt(
        lambda: all(fn(*case) == by_counting(*case) for case in cases),
        "how often is a row of A loaded? once for every column of tiles",
    )


def check_owner(fn) -> bool:
    def test():
        for m, n, block_m, block_n in ((88, 150, 16, 32), (33, 64, 32, 16)):
            owner = signed(m, n, block_m, block_n, 1)
            assert all(fn(i, j, n, block_m, block_n) == owner[i, j]
                       for i in range(0, m, 5) for j in range(0, n, 7))  # fmt: skip

    return attempt(test, "row of tiles times tiles in a row, plus column of tiles")


@triton.jit
def careless_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at))  # no mask


def spoils(n: int, block: int) -> bool:
    """Whether the careless kernel on n numbers writes over what lies behind them."""
    x, memory = torch.ones(n + block, device=DEVICE), torch.full((n + block,), -1.0, device=DEVICE)
    careless_kernel[(triton.cdiv(n, block),)](x, memory, BLOCK=block)
    return bool((memory[n:] != -1).any())


def check_spoils(fn) -> bool:
    cases = [(64, 32), (65, 32), (1, 32), (96, 32), (100, 64), (128, 64), (31, 16), (16, 16)]
    return attempt(
        lambda: all(bool(fn(n, block)) is spoils(n, block) for n, block in cases),
        "which sizes does the grid cover exactly?",
    )  # fmt: skip


def check_split(fn) -> bool:
    def test():
        source = torch.Generator().manual_seed(1)
        a, b = torch.randn(5, 150, generator=source), torch.randn(150, 40, generator=source)
        for parts in (1, 2, 4):
            got = fn(a.to(DEVICE), b.to(DEVICE), parts).cpu()
            want = [x @ y for x, y in zip(a.chunk(parts, 1), b.chunk(parts, 0))]
            assert got.shape == (parts, 5, 40)
            assert torch.allclose(got, torch.stack(want), atol=1e-4)

    return attempt(test, "chunk both along k; `matmul` takes views; stack the results")


# %% [markdown]
# **1 · Compute.** How many bytes do all programs of `matmul` load together (fp32, masked lanes cost
# nothing, no cache)? Then see what doubling both blocks does.


# %%
def my_traffic(m: int, n: int, k: int, block_m: int, block_n: int) -> int:
    return ...


check_traffic(my_traffic)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_traffic(m, n, k, block_m, block_n):
#     tiles_m, tiles_n = -(-m // block_m), -(-n // block_n)
#     return 4 * k * (m * tiles_n + n * tiles_m)
# ```
#
# A is read once for each column of tiles, B once for each row of tiles. Blocks of twice the side: half
# the bytes.
# </details>

# %% [markdown]
# **2 · Predict.** In plain order, which program writes element $(i, j)$ of C?


# %%
def my_owner(i: int, j: int, n: int, block_m: int, block_n: int) -> int:
    return ...


check_owner(my_owner)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_owner(i, j, n, block_m, block_n):
#     return i // block_m * -(-n // block_n) + j // block_n
# ```
#
# The number of columns of tiles is rounded *up*; with `n // block_n` the ragged last column would belong
# to the next row's first program.
# </details>

# %% [markdown]
# **3 · Break.** `careless_kernel` forgot the mask. For which $n$ does it write over its neighbour's
# memory? (The check lets it do so, in a buffer with room behind.)


# %%
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
# With a test at $n = 1024$ nobody notices. Hence the house rule: ragged sizes first.
# </details>

# %% [markdown]
# **4 · Extend.** In decoding, $m$ is small: 5 × 40 outputs are a single tile, and 131 multiprocessors
# idle. *Split K*: let several launches each sum a part of it. Return the partial products, shape
# (parts, m, n), by `matmul` on views. (Who adds them up? A second, small kernel: `kernels/decode.py`
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

# %% [markdown]
# ## Scale-up
# What binds V3's kernels on one H100 or H800? The limits: 3.35 TB/s of memory, 1979 TFLOP/s in FP8, 989 in
# bf16, and 67 for ordinary fp32 arithmetic, which is what norms and quantisers use.

# %%
T, d, f, heads = 4096, V3.dim, V3.moe_inter_dim, V3.n_heads
latent, rope = V3.kv_lora_rank, V3.qk_rope_head_dim
product = lambda m, k, n: (2 * m * k * n, m * k + k * n + 2 * m * n, 1979e12)  # codes in, bf16 out
code = 1 + 4 / 128  # bytes: a code and its share of a scale
cases = {  # operations, bytes, operations a second
    "RMSNorm + quantise, 4096 rows": (8 * T * d, T * d * (2 + code), 67e12),
    "SwiGLU + quantise, 8 · 4096 rows": (9 * 8 * T * f, 8 * T * f * (4 + code), 67e12),
    "W^O in FP8, 4096 rows": product(T, heads * V3.v_head_dim, d),
    "an expert's W1, 1024 rows": product(1024, d, f),
    "an expert's W1, 32 rows (decode)": product(32, d, f),
    "MLA decode, a query, 4096 keys": (2 * T * heads * (2 * latent + rope), 2 * T * (latent + rope), 989e12),
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
# **Memory** binds norm and quantiser, so they are fused with their neighbours
# ([`kernels/norm.py`](../kernels/norm.py), [`kernels/quant.py`](../kernels/quant.py)). **Arithmetic** binds
# products of many rows, and the kernel's business is to keep tensor cores fed
# ([`kernels/gemm.py`](../kernels/gemm.py), the numbers of [chapter 09](09_fp8.ipynb)). With 32 rows an
# expert waits for its weights, whatever the kernel: only *more rows an expert* helps, and those come
# from other GPUs. MLA's decode stands near the knee, since 128 heads share one latent: 242 operations a
# byte of 295 ([`kernels/decode.py`](../kernels/decode.py)); with two tokens at a time, as drafts allow,
# arithmetic takes over. No mesh axis cuts a kernel: programs see one GPU. Where rows travel between GPUs,
# and 20 of 132 multiprocessors are spent on it, is the matter of chapter 11, on expert parallelism.
