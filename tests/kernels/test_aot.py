"""Every kernel compiles for Hopper and Blackwell, and tools/aot.py reports each kind of fault.

The compiler runs in another process, since the kernels here are defined for the interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
COMPILED = [
    path.stem
    for path in sorted((ROOT / "kernels").glob("*.py"))
    if re.search(r"^AOT_CASES\b", path.read_text(), re.MULTILINE)
]

PLANTED = """
import os
import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import AOTCase

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


@triton.jit
def operand(x):
    return x


@triton.autotune([triton.Config({"N": n}, num_warps=4) for n in (32, 64)], key=["k"])
@triton.jit
def gemm(a_ptr, bias_ptr, c_ptr, shape, k, UPCAST: tl.constexpr, N: tl.constexpr):
    m, n, z = tl.arange(0, 64), tl.arange(0, N), tl.arange(0, 64)
    c = tl.zeros((64, N), tl.float32)
    for i in range(0, k, 64):
        a = operand(tl.load(a_ptr + m[:, None] * k + i + z))
        b = operand(tl.load(a_ptr + n[:, None] * k + i + z))
        if UPCAST:
            a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        c += tl.dot(a, b.T)
    if bias_ptr is not None:
        c += tl.load(bias_ptr + n)
    tl.store(c_ptr + m[:, None] * shape[0] + n, c, mask=n < shape[0])


@triton.jit
def normalize(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(x_ptr + tl.arange(0, N), x / tl.sum(x))


@triton.jit
def three_products(a_ptr, c_ptr, k, N: tl.constexpr):
    m, n, z = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 64)
    c = tl.zeros((128, N), tl.float32)
    c1, c2 = c, c
    for i in range(0, k, 64):
        a = tl.load(a_ptr + m[:, None] * k + i + z)
        b = tl.load(a_ptr + n[:, None] * k + i + z)
        c += tl.dot(a, b.T)
        c1 += tl.dot(a, (b + 1).T)
        c2 += tl.dot(a, (b + 2).T)
    tl.store(c_ptr + m[:, None] * N + n, c * c1 + c2)


class Crash:
    def warmup(self, *args, **kwargs):
        os.abort()


FP8, HALF = (E4M3, BF16, FP32, (64, 64), 4096), (BF16, None, FP32, (64, 64), 4096)
DEEP = {"UPCAST": False, "N": 128, "num_stages": 12}
AOT_CASES = [
    AOTCase("good", gemm, FP8, {"UPCAST": False}, "fp8"),
    AOTCase("good_bf16", gemm, HALF, {"UPCAST": False}, "bf16"),
    AOTCase("upcast", gemm, FP8, {"UPCAST": True}, "fp8"),
    AOTCase("spilling", normalize, (FP32,), {"N": 8192, "num_warps": 1}),
    AOTCase("deep", gemm.fn, HALF, DEEP, "bf16"),
    AOTCase("broad", three_products, (BF16, FP32, 4096), {"N": 256, "num_warps": 8}, "bf16"),
    AOTCase("wrong", normalize, (FP32,), {"N": 100}),
    AOTCase("crash", Crash(), ()),
]
"""
FAULTS = [
    ("good", "sm_90a", None),
    ("good", "sm_100a", None),
    ("good_bf16", "sm_90a", None),
    ("good_bf16", "sm_100a", None),
    ("upcast", "sm_90a", "has no QGMMA"),
    ("upcast", "sm_100a", "has no UTCQMMA"),
    ("spilling", "sm_90a", r"spills registers: \d+ stores"),
    ("spilling", "sm_100a", r"spills registers: \d+ stores"),
    ("deep", "sm_90a", r"needs \S+ bytes of shared memory; there are 232,448"),
    ("deep", "sm_100a", r"needs \S+ bytes of shared memory; there are 232,448"),
    ("broad", "sm_100a", "needs 768 columns of tensor memory; there are 512"),
    ("wrong", "sm_90a", "compiler failed: .*arange's range must be a power of 2"),
    ("crash", "sm_90a", "compiler failed: it crashed"),
]


def aot(*args, **environment):
    """Run the tool without TRITON_INTERPRET, which the tests set."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tools" / "aot.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment)


def test_every_kernel_compiles_once():
    done = aot("--quick")
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
    for word in (*COMPILED, "sm_90a", "sm_100a"):
        assert re.search(rf"\b{word}\b", done.stdout)


@pytest.mark.full
@pytest.mark.parametrize("module", COMPILED)
def test_every_kernel(module):
    done = aot("--module", module)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Return the finished process, its rows and its folder, for kernels with one fault each."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "planted.py").write_text(PLANTED)
    done = check(folder, "--json", folder / "rows.json")
    return done, json.loads((folder / "rows.json").read_text())["rows"], folder


def check(folder, *args):
    """Run the tool on the kernels of a folder, with a separate cache."""
    cache = {"TRITON_CACHE_DIR": str(folder / "cache")}
    return aot("--module", folder / "planted.py", *args, **cache)


def machine_code(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.cubin")}


@pytest.mark.parametrize("kernel, target, fault", FAULTS)
def test_planted(planted, kernel, target, fault):
    """Each fault is reported in every config, and no other is."""
    done, rows, _ = planted
    assert done.returncode == 1
    mine = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
    assert len(mine) == (2 if kernel in ("good", "good_bf16", "upcast") else 1)
    for row in mine:
        assert len(row["violations"]) == (fault is not None), row
        for sentence in row["violations"]:
            assert re.match(fault, sentence)
            assert sentence in done.stdout


def test_cache_follows_the_source(planted):
    """A second run compiles nothing, unless a function that a kernel calls was edited."""
    folder = planted[2]
    before = machine_code(folder)
    again = check(folder, "good", "--target", "sm_90a")
    assert again.returncode == 0, again.stdout
    assert machine_code(folder) == before
    edited = PLANTED.replace("return x", "return x.to(tl.bfloat16)")
    (folder / "planted.py").write_text(edited)
    edited = check(folder, "good", "--target", "sm_90a")
    assert edited.returncode == 1
    assert "planted.good (sm_90a N=32 warps=4 stages=3): has no QGMMA" in edited.stdout


def test_quick_takes_each_kernel_once(planted):
    """`gemm` with and without an autotuner are two kernels; of each only the first case is left."""
    done = check(planted[2], "good", "deep", "upcast", "--quick", "--json", planted[2] / "quick")
    rows = json.loads((planted[2] / "quick").read_text())["rows"]
    assert [(row["kernel"], row["target"]) for row in rows] == [
        ("good", "sm_90a"), ("deep", "sm_100a"),
    ]  # fmt: skip
    assert done.returncode == 1


def test_invalid_arguments(planted):
    done = check(planted[2], "no_such_kernel")
    assert (done.returncode, done.stderr) == (1, "no kernel of an AOT_CASES list has such a name\n")
    done = aot(TRITON_INTERPRET="1")
    assert (done.returncode, "unset it" in done.stderr) == (1, True)
