"""The patched interpreter computes as a GPU does; with a GPU, these tests run on it."""

import interpreter  # isort: skip  first: makes Triton's interpreter round as a GPU does
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
N = 8192  # values per program


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, z_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "clamp":
        z = tl.clamp(x, y, y)
    else:
        z = x < y
    tl.store(z_ptr + i, z.to(z_ptr.dtype.element_ty))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    y = tl.load(y_ptr + i)
    tl.store(z_ptr + i, tl.fma(tl.load(x_ptr + i), y, y))


@triton.jit
def sum_kernel(x_ptr, rows_ptr, columns_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i)
    tl.store(rows_ptr + i, tl.sum(x, 1))
    tl.store(columns_ptr + i, tl.sum(x, 0))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i[:, None] * N + i)
    b = tl.load(b_ptr + i[:, None] * N + i)
    tl.store(c_ptr + i[:, None] * N + i, tl.dot(a, b.T))


@triton.jit
def atomic_kernel(x_ptr, y_ptr, M, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(y_ptr + i // 4, tl.load(x_ptr + i), mask=i < M)


@triton.autotune([triton.Config({"N": n}) for n in (32, 64, 128)], key=["M"])
@triton.jit
def tuned_kernel(x_ptr, M, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x_ptr + i, i * 2, mask=i < M)


@triton.jit
def loop_kernel(count_ptr, y_ptr):
    n = tl.load(count_ptr)
    total = 0
    for i in range(n):
        total += i
    tl.store(y_ptr, total)


def launch(kernel, x, *rest, **meta):
    """Run an elementwise kernel over all of x, and return the last tensor, its result."""
    assert x.numel() % N == 0
    kernel[(x.numel() // N,)](x, *rest, N=N, **meta)
    return rest[-1]


def cast(x, dtype):
    """Cast x to `dtype` by a kernel."""
    n = x.numel()
    padded = x.new_zeros(triton.cdiv(n, N) * N)
    padded[:n] = x
    return launch(cast_kernel, padded, torch.empty_like(padded, dtype=dtype))[:n]


def assert_same(got, want):
    """Compare bit for bit; any two NaN are equal."""
    nan = want.isnan() if want.is_floating_point() else torch.zeros_like(want, dtype=torch.bool)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[want.itemsize]
    equal = got.view(integer) == want.view(integer)
    assert got.dtype == want.dtype
    assert (equal | (nan & got.float().isnan())).all(), f"{(~equal & ~nan).sum()} differ"


def every_bf16():
    return torch.arange(1 << 16, device=DEVICE).to(torch.uint16).view(BF16)


def every_e4m3():
    return torch.arange(256, device=DEVICE).to(torch.uint8).view(E4M3)


def pairs():
    """Pair all bf16 numbers with others, in half of the pairs of similar magnitude."""
    x = every_bf16()
    y = x[torch.randperm(len(x), device=DEVICE)]
    near = (x.view(torch.int16) ^ torch.randint(1 << 10, x.shape, device=DEVICE)).to(torch.int16)
    y[::2] = near.view(BF16)[::2]
    return x, y


# ── Casts ──


def test_bf16_to_fp32():
    assert_same(cast(every_bf16(), torch.float32), every_bf16().float())


def test_fp32_to_bf16():
    """Cast every bf16 value, every tie between two, and their neighbors."""
    bits = torch.arange(1 << 16, device=DEVICE) << 16
    steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], device=DEVICE)
    x = (bits[:, None] + steps).flatten().to(torch.uint32).view(torch.float32)
    assert_same(cast(x, BF16), x.to(BF16))


def nearest_e4m3(x):
    """Return the E4M3 value at the smallest distance from x; of two the even one."""
    codes = torch.arange(127)  # 0 to 448, the positive ones
    value = codes.to(torch.uint8).view(E4M3).double()
    distance = (x.double().abs().clamp(max=448)[:, None] - value).abs()
    near = distance == distance.amin(1, keepdim=True)
    even = torch.where(near, codes % 2, 2).argmin(1)
    code = torch.where(x.isnan(), 127, even) + 128 * x.signbit()
    return code.to(torch.uint8).view(E4M3)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_to_e4m3(dtype):
    """Cast every value, tie, their neighbors, large numbers, infinities, NaN and random numbers."""
    value = every_e4m3().cpu()[:127].double()
    tie = (value[1:] + value[:-1]) / 2
    edges = torch.cat([value, tie, tie * (1 + 2**-20), tie * (1 - 2**-20), value * (1 - 2**-20)])
    large = torch.tensor([448.1, 463.9, 464, 464.1, 480, 1e4, 1e30, torch.inf, torch.nan])
    spread = torch.randn(1 << 14) * 2.0 ** torch.randint(-14, 14, (1 << 14,))
    x = torch.cat([edges.float(), large, spread])
    x = torch.cat([x, -x]).to(dtype)
    assert_same(cast(x.to(DEVICE), E4M3).cpu(), nearest_e4m3(x))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_from_e4m3(dtype):
    assert_same(cast(every_e4m3(), dtype), every_e4m3().to(dtype))


def test_between_bf16_and_integers():
    x = torch.randint(-(1 << 20), 1 << 20, (1 << 15,), dtype=torch.int32, device=DEVICE)
    assert_same(cast(x, BF16), x.to(BF16))
    assert_same(cast(x.to(BF16), torch.int32), x.to(BF16).to(torch.int32))


# ── Arithmetic ──


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_bf16_arithmetic(op):
    x, y = pairs()
    got = launch(arithmetic_kernel, x, y, torch.empty_like(x), OP=op)
    assert_same(got, getattr(torch, op)(x, y))


def test_bf16_comparison():
    x, y = pairs()
    assert_same(
        launch(arithmetic_kernel, x, y, torch.empty_like(x, dtype=torch.bool), OP="less"), x < y
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("op", ["maximum", "minimum"])
def test_maximum_of_nan(op, dtype):
    """The maximum and minimum of a number and NaN is the number."""
    x, y = (z.to(dtype) for z in pairs())
    got = launch(arithmetic_kernel, x, y, torch.empty_like(x), OP=op)
    want = torch.where(x.isnan(), y, torch.where(y.isnan(), x, getattr(torch, op)(x, y)))
    assert_same(got + 0.0, want + 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_clamp_of_nan(dtype):
    """Anything clamped from y to y is y, including NaN."""
    x, y = pairs()
    x, y = x.to(dtype), torch.where(y.isnan(), 1, y).to(dtype)
    assert_same(launch(arithmetic_kernel, x, y, torch.empty_like(x), OP="clamp") + 0.0, y + 0.0)


def test_bf16_fma():
    """Compare xy + y, rounded once, with fp64, where it is exact."""
    x, y = torch.randn(2, 1 << 15, device=DEVICE).to(BF16)
    got = launch(fma_kernel, x, y, torch.empty_like(x))
    torch.testing.assert_close(got.double(), x.double() * y.double() + y, rtol=2**-8, atol=1e-30)


# ── Reductions and products ──


def test_bf16_sum():
    """Sum whole numbers up to 256, which needs no rounding in any order."""
    x = torch.randint(-1, 2, (256, 256), device=DEVICE).to(BF16)
    rows, columns = x.new_empty(2, 256)
    sum_kernel[(1,)](x, rows, columns, N=256)
    assert_same(rows, x.float().sum(1).to(BF16))
    assert_same(columns, x.float().sum(0).to(BF16))


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_dot(dtype):
    """Multiply small whole numbers, whose products and sums are exact; a NaN makes its row NaN."""
    a, b = torch.randint(-4, 5, (2, 128, 128), device=DEVICE).float()
    a[3, 5] = torch.nan
    c = torch.empty_like(a)
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), c, N=128)
    assert_same(c + 0.0, a @ b.T + 0.0)


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_dot_with_the_identity(dtype):
    """Multiply every finite value of the type by the identity; a NaN makes its row NaN."""
    values = every_bf16() if dtype == BF16 else every_e4m3().repeat(64)
    values = torch.where(values.float().isfinite(), values.float(), 0).view(-1, 128, 128)
    values[:, 3, 5] = torch.nan
    identity, c = torch.eye(128, device=DEVICE).to(dtype), torch.empty(128, 128, device=DEVICE)
    for a in values:
        dot_kernel[(1,)](a.to(dtype), identity, c, N=128)
        assert_same(c + 0.0, a @ identity.float() + 0.0)


def test_bf16_atomic_add():
    """Add four numbers per address, and mask others."""
    x = torch.randint(-16, 17, (1024,), device=DEVICE).to(BF16)
    y = torch.ones(256, dtype=BF16, device=DEVICE)
    atomic_kernel[(1,)](x, y, 1000, N=1024)
    x[1000:] = 0
    assert_same(y, (x.view(256, 4).float().sum(1) + 1).to(BF16))


# ── Launching ──


def test_autotune_with_several_configs():
    x = torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    tuned_kernel[lambda meta: (triton.cdiv(1000, meta["N"]),)](x, 1000)
    assert_same(x, 2 * torch.arange(1000, dtype=torch.int32, device=DEVICE))


def test_range_of_a_loaded_number():
    count = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    y = torch.zeros_like(count)
    loop_kernel[(1,)](count, y)
    assert y.item() == 10


def test_install_is_idempotent():
    if not triton.knobs.runtime.interpret:
        pytest.skip("nothing is interpreted here")
    before = [getattr(owner, name, None) for owner, name, _ in interpreter.PATCHES]
    interpreter.install()
    assert [getattr(owner, name, None) for owner, name, _ in interpreter.PATCHES] == before


def test_nothing_changes_where_kernels_are_compiled():
    code = "import interpreter; assert not hasattr(interpreter.stock, 'is_patched')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(interpreter.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, check=True)
