"""Compile every Triton kernel for GPUs that this machine need not have, and check the machine code.

    python tools/aot.py                       every kernel of dsv3_ref.kernels, for every target
    python tools/aot.py act_quant             kernels whose name contains this
    python tools/aot.py --module quant        the kernels of kernels/quant.py; a path works too
    python tools/aot.py --target sm_90a       one target; --jobs 4 uses four processes
    python tools/aot.py --quick               every kernel once: first case and config, one target
    python tools/aot.py --json kernels.json   also write the table to a file

The tool compiles each case of a module's `AOT_CASES` list (see `kernels/launch.py`) in every config
of its autotuner. A fake driver takes the place of the GPU's; Triton includes assembler and
disassembler. A fault is reported in one sentence, and the exit status is then 1: a kernel does not
compile, spills registers, needs too much shared or tensor memory, or lacks the tensor-core
instruction of its case. Triton's cache, keyed by source, options and compiler, makes a second run
fast.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
import triton
from dsv3_ref.kernels.launch import AOTCase
from triton import Config
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.cache import get_cache_manager, triton_key
from triton.runtime.jit import MockTensor

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {"sm_90a": 90, "sm_100a": 100}
TENSOR_CORES = {
    "sm_90a": {"fp8": "QGMMA", "bf16": "HGMMA"},
    "sm_100a": {"fp8": "UTCQMMA", "bf16": "UTCHMMA"},
}
SPILLS = ("STL", "LDL")  # stores to and loads from a thread's local memory
COUNTED = (*SPILLS, "QGMMA", "HGMMA", "UTCQMMA", "UTCHMMA", "HMMA", "UTMALDG")
MAX_SHARED = 232_448  # bytes per block: 227 KiB
MAX_TENSOR_MEMORY = 512  # columns


class AbsentGPU:
    """A driver of an absent GPU, sufficient to compile for it."""

    def __init__(self, target: str):
        self.target = gpu_target(target)

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the architecture in place of a device."""
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the default stream."""
        return 0


def gpu_target(target: str) -> GPUTarget:
    """Return Triton's description of a GPU such as sm_90a."""
    return GPUTarget("cuda", TARGETS[target], 32)


# ── What to compile ──


def load_kernel_module(name: str) -> ModuleType:
    """Import the module of dsv3_ref.kernels of this name, or the file at this path."""
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        return importlib.import_module(f"dsv3_ref.kernels.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_module() -> list[str]:
    """Return the names of the modules of dsv3_ref.kernels."""
    package = importlib.import_module("dsv3_ref.kernels")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def mock_arg(arg: Any) -> Any:
    """Replace dtypes by pointers, also within tuples; return other arguments unchanged."""
    if not isinstance(arg, tuple):
        return MockTensor.wrap_dtype(arg)
    return type(arg)(*map(mock_arg, arg)) if hasattr(arg, "_fields") else tuple(map(mock_arg, arg))


def configs_of(case: AOTCase, args: tuple) -> list:
    """Return the configs that the autotuner does not prune; [None] without an autotuner."""
    if not isinstance(case.kernel, Autotuner):
        return [None]
    case.kernel.nargs = dict(zip(case.kernel.arg_names, args))
    return case.kernel.prune_configs(dict(case.meta))


def make_jobs(modules: list[ModuleType], only: list[str], targets: list[str]) -> list[dict]:
    """Return a job per case, config and target; `only` selects cases whose name contains one."""
    jobs = []
    for target in targets:
        triton.runtime.driver.set_active(AbsentGPU(target))
        for module in modules:
            for case in getattr(module, "AOT_CASES", ()):
                if only and not any(part in case.name for part in only):
                    continue
                args = tuple(map(mock_arg, case.args))
                common = {"module": module.__name__.split(".")[-1], "case": case, "target": target}
                jobs += [common | {"args": args, "config": c} for c in configs_of(case, args)]
    return jobs


def choose_quick(jobs: list[dict]) -> list[dict]:
    """Return the first job of each kernel, with the targets in turn."""
    targets = list(dict.fromkeys(job["target"] for job in jobs))
    by_kernel: dict[int, dict[str, dict]] = {}
    for job in jobs:
        by_kernel.setdefault(id(job["case"].kernel), {}).setdefault(job["target"], job)
    return [of[targets[i % len(targets)]] for i, of in enumerate(by_kernel.values())]


# ── Compile one ──


def compile_one(job: dict) -> CompiledKernel:
    """Compile the kernel of a job; nothing is launched."""
    case, config = job["case"], job["config"]
    triton.runtime.driver.set_active(AbsentGPU(job["target"]))
    if config is None:
        return case.kernel.warmup(*job["args"], grid=(1,), **case.meta)
    meta = case.meta | config.all_kwargs()
    if config.pre_hook:  # sets the block shapes of tensor descriptors
        config.pre_hook(dict(zip(case.kernel.arg_names, job["args"])) | meta)
    return case.kernel.fn.warmup(*job["args"], grid=(1,), **meta)


def run_tool(name: str, *args: str) -> str:
    """Return the output of a program that is included with Triton."""
    return subprocess.run([BIN / name, *args], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> dict:
    """Return the registers and instruction counts of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    counts = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", sass))
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))  # over its functions
    return {"registers": registers} | {op: counts[op] for op in COUNTED}


def analyze(kernel: CompiledKernel) -> dict:
    """Return registers, memory and instruction counts of a kernel, cached by Triton."""
    cubin, name = kernel.asm["cubin"], "sass.json"
    cache = get_cache_manager(hashlib.sha256(cubin + repr(COUNTED).encode()).hexdigest())
    if path := cache.get_file(name):
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    else:
        counts = disassemble(cubin)
        cache.put(json.dumps(counts), name, binary=False)
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    return counts | {"shared": kernel.metadata.shared, "tensor_memory": tensor_memory}


def first_error(error: Exception | None, log: str) -> str:
    """Return one line with the first error of the compiler and the exception."""
    errors = [line.strip() for line in log.splitlines() if "error:" in line][:1]
    text = f"{type(error).__name__}: {error}" if error else "it crashed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " · ".join(dict.fromkeys([*errors, lines[0], lines[-1]]))[:600]


def compile_in_child(job: dict, pipe: Connection, log: BinaryIO) -> None:
    """Compile a job in a separate process, so that a crash of the compiler is only its result."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    start = time.perf_counter()
    try:
        result = analyze(compile_one(job))
    except Exception as error:  # any error is the result of this kernel
        sys.stderr.flush()
        result = {"error": first_error(error, read_log(log))}
    pipe.send(result | {"seconds": round(time.perf_counter() - start, 2)})


def read_log(log: BinaryIO) -> str:
    """Return the output of a process."""
    log.seek(0)
    return log.read().decode(errors="replace")


# ── Compile all ──


def start(job: dict) -> dict:
    """Start the process of a job."""
    fork = get_context("fork")  # inherits torch, Triton and the kernels within milliseconds
    receiver, sender = fork.Pipe(duplex=False)
    log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `finish`
    process = fork.Process(target=compile_in_child, args=(job, sender, log), daemon=True)
    process.start()
    sender.close()  # so that the end of the process closes the pipe
    return {"job": job, "pipe": receiver, "log": log, "process": process}


def finish(running: dict) -> dict:
    """Return the row of the table for a job whose process has ended or crashed."""
    try:
        result = running["pipe"].recv()
    except EOFError:
        result = {"error": first_error(None, read_log(running["log"]))}
    running["process"].join()
    running["log"].close()
    job = running["job"]
    row = {"module": job["module"], "kernel": job["case"].name, "target": job["target"]}
    row |= {"config": format_config(job["config"])} | result
    return row | {"violations": find_violations(row, job["case"].tensor_cores)}


def compile_all(todo: list[dict], n: int) -> list[dict]:
    """Compile with `n` processes at a time; return rows in the order of the jobs."""
    rows: dict[int, dict] = {}
    running: dict[Any, tuple[int, dict]] = {}
    waiting = list(enumerate(todo))[::-1]
    while waiting or running:
        while waiting and len(running) < n:
            i, job = waiting.pop()
            one = start(job)
            running[one["pipe"]] = i, one
        for pipe in connection.wait(list(running)):
            i, one = running.pop(pipe)
            rows[i] = finish(one)
    return [rows[i] for i in range(len(todo))]


# ── Check and print ──


def format_config(config: Config | None) -> str:
    """Return a config as `BLOCK_N=64 warps=8 stages=4`, or '' without an autotuner."""
    if config is None:
        return ""
    renamed = {"num_warps": "warps", "num_stages": "stages", "num_ctas": "ctas"}
    shown = {k: v for k, v in config.all_kwargs().items() if (k, v) != ("num_ctas", 1)}
    return " ".join(f"{renamed.get(k, k)}={v}" for k, v in shown.items())


def find_violations(row: dict, tensor_cores: str) -> list[str]:
    """Return one sentence per fault of a kernel."""
    if "error" in row:
        return [f"compiler failed: {row['error']}"]
    bad = []
    if row["STL"] or row["LDL"]:
        bad.append(f"spills registers: {row['STL']} stores (STL), {row['LDL']} loads (LDL)")
    if row["shared"] > MAX_SHARED:
        bad.append(f"needs {row['shared']:,} bytes of shared memory; there are {MAX_SHARED:,}")
    if row["tensor_memory"] > MAX_TENSOR_MEMORY:  # the assembler then produces no code to check
        have = f"there are {MAX_TENSOR_MEMORY}"
        bad.append(f"needs {row['tensor_memory']} columns of tensor memory; {have}")
    elif tensor_cores and not row[want := TENSOR_CORES[row["target"]][tensor_cores]]:
        bad.append(f"has no {want}: its {tensor_cores} products miss the tensor cores")
    return bad


def format_table(rows: list[dict]) -> str:
    """Return the rows as an aligned table with a header."""
    names = ["module", "kernel", "config", "target", "registers", "shared", *COUNTED, "seconds"]
    lines = [[str(row.get(name, "-")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *lines)]
    align = [str.ljust] * 4 + [str.rjust] * (len(names) - 4)
    return "\n".join(
        "  ".join(a(cell, w) for a, cell, w in zip(align, line, widths)) for line in [names, *lines]
    )


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="*", help="select kernels whose name contains one of these")
    parser.add_argument(
        "--module", action="append", help="module of kernels/, or a path; repeatable"
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable")
    parser.add_argument(
        "--quick", action="store_true", help="compile each kernel once, for the targets in turn"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")
    return parser.parse_args()


def main() -> int:
    """Compile the selected kernels; return 1 if one has a fault."""
    args = parse_args()
    if triton.knobs.runtime.interpret:  # kernels are then defined for the interpreter
        sys.exit("TRITON_INTERPRET is set; unset it to compile")
    targets = args.target or list(TARGETS)
    triton_key()  # hashes the compiler once, before the processes start
    for target in targets:
        make_backend(gpu_target(target)).hash()
    todo = make_jobs(
        [load_kernel_module(name) for name in args.module or every_module()], args.name, targets
    )
    if args.quick:
        todo = choose_quick(todo)
    if not todo:
        sys.exit("no kernel of an AOT_CASES list has such a name")
    rows = compile_all(todo, args.jobs)
    print(format_table(rows))
    if args.json:
        table = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        where = " ".join(filter(None, [row["target"], row["config"]]))
        for violation in row["violations"]:
            print(f"{row['module']}.{row['kernel']} ({where}): {violation}")
    return int(any(row["violations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
