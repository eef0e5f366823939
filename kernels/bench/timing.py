"""Times of cases on a GPU, and the limits of that GPU."""

import gc
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from dsv3_ref import kernels
from dsv3_ref.kernels.bench import calls
from dsv3_ref.kernels.bench.calls import randn, with_backends
from dsv3_ref.kernels.bench.case import COPY, Call, Calls, Case, GPULimits, Output, Timing
from dsv3_ref.ops import use

FLUSH_BYTES = 256 * 2**20  # several times the size of an L2
WARM_UP_CALLS = 3
MODULES = (
    kernels.attention, kernels.decode, kernels.gemm, kernels.loss, kernels.moe, kernels.norm,
    kernels.quant,
)  # fmt: skip


# ── The clock ──


def time_gpu_calls(calls_by_name: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Return the median time of each call in ms, measured in alternation.

    Before each call, a tensor larger than L2 is read four times, so that L2 holds nothing of the
    call's and nothing that would have to be written back. That also keeps the GPU busy while Python
    launches the call, so that launch overhead is not measured.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    starts: dict[str, list[torch.cuda.Event]] = {name: [] for name in calls_by_name}
    ends: dict[str, list[torch.cuda.Event]] = {name: [] for name in calls_by_name}
    for _ in range(rounds):
        for name, call in calls_by_name.items():
            for _ in range(4):
                flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            starts[name].append(start)
            ends[name].append(end)
    torch.cuda.synchronize()
    return {
        name: statistics.median(
            start.elapsed_time(end) for start, end in zip(starts[name], ends[name])
        )
        for name in calls_by_name
    }


def format_error(error: Exception) -> str:
    """Return the type and the message of an error."""
    return f"{type(error).__name__}: {str(error).strip()}"


def first_line(text: str) -> str:
    """Return the text up to its first line break."""
    return text.partition("\n")[0]


def warm_up_yardsticks(yardsticks: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Call each yardstick a few times; return those that run, and the errors of the others."""
    working, errors = {}, {}
    for name, call in yardsticks.items():
        try:
            for _ in range(WARM_UP_CALLS):
                call()
            working[name] = call
        except Exception as e:
            errors[name] = first_line(format_error(e))
    return working, errors


# ── Are the results right? ──


def as_results(output: Output) -> tuple[Tensor, ...]:
    """Return the results of a call as a tuple."""
    return output if isinstance(output, tuple) else (output,)


def relative_difference(output: Output, expected: Output) -> float:
    """Return max ‖x − y‖ / ‖y‖ over the results x and y of two calls, in fp32.

    A result that is wider than the other because of padding is cut.
    """
    differences = []
    for pair in zip(as_results(output), as_results(expected), strict=True):
        x, y = (z.detach().float() for z in pair)
        if x.ndim:
            width = min(x.shape[-1], y.shape[-1])
            x, y = x[..., :width], y[..., :width]
        norm = y.norm().item()
        differences.append((x - y).norm().item() / (norm or 1.0))
    return torch.tensor(differences, device="cpu").max().item()  # NaN if any of them is


def tuned_configs() -> dict[str, float]:
    """Return the ms of each config of each kernel that was tuned since `forget_tuned_configs`."""
    ms_of_configs = {}
    for tuner in autotuners():
        for config, ms in getattr(tuner, "configs_timings", {}).items():
            median = ms[0] if isinstance(ms, list) else ms
            ms_of_configs[f"{tuner.base_fn.__name__} {config}"] = median
    return ms_of_configs


def forget_tuned_configs() -> None:
    """Drop the times of configs, but not the choices that they led to."""
    for tuner in autotuners():
        tuner.configs_timings = {}


def autotuners() -> list[Autotuner]:
    """Return all autotuned kernels."""
    values = chain.from_iterable(vars(module).values() for module in MODULES)
    return [x for x in values if isinstance(x, Autotuner)]


# ── A case ──


def prepare_calls(case: Case, device: str) -> Calls:
    """Return the calls of a case with tensors on this device, made with the kernels' backends."""
    with torch.device(device), use(*calls.KERNEL_BACKENDS):
        call, yardsticks = case.make()
    return with_backends(calls.KERNEL_BACKENDS, call), {
        name: with_backends(calls.KERNEL_BACKENDS, y) for name, y in yardsticks.items()
    }


def time_case(case: Case, rounds: int) -> Timing:
    """Time a case and its yardsticks, or skip it if the GPU lacks the memory."""
    free = torch.cuda.mem_get_info()[0]
    if case.memory > free:
        reason = f"needs {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        return case.make_timing(skipped=reason)
    call, yardsticks = prepare_calls(case, "cuda")
    forget_tuned_configs()
    for _ in range(WARM_UP_CALLS):
        call()
    working, errors = warm_up_yardsticks(yardsticks)
    expected = next(iter(working.values()), None)
    difference = relative_difference(call(), expected()) if expected else None
    if not case.flops:
        working[COPY] = copy_call(case.bytes)
    torch.cuda.synchronize()
    times = time_gpu_calls({"": call, **working}, rounds)
    timing = case.make_timing(times.pop(""), times | errors, difference)
    timing.configs = tuned_configs()
    return timing


def copy_call(num_bytes: float) -> Call:
    """Return a call that reads half of these bytes and writes them elsewhere."""
    x = torch.zeros(max(1, int(num_bytes) // 2), dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def try_case(case: Case, rounds: int) -> Timing:
    """Time a case, turn its error into a result, and free its memory."""
    try:
        timing = time_case(case, rounds)
    except Exception as e:
        timing = case.make_timing(error=format_error(e))
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        timing.fatal = True
    return timing


# ── The GPU ──


@dataclass(frozen=True)
class GPUInfo:
    """A GPU and its limits."""

    device: str
    driver: str
    limits: GPULimits


def describe_gpu(rounds: int) -> GPUInfo:
    """Measure the limits of this GPU: GB/s of a copy, read and written, and TFLOP/s of cuBLAS."""
    n = 8192
    with torch.device("cuda"):
        x, y = randn(2**29), randn(2**29)
        a, b = randn(n, n), randn(n, n)
    yardsticks: dict[str, Call] = {"copy": lambda: y.copy_(x), "bf16": lambda: a @ b}
    warm_up_yardsticks(yardsticks)
    ms = time_gpu_calls(yardsticks, rounds)
    peak = 2 * n**3 / ms["bf16"] / 1e9
    limits = {"copy": 4 * x.numel() / ms["copy"] / 1e6, "bf16": peak, "fp8": 2 * peak}
    return GPUInfo(torch.cuda.get_device_name(), driver_version(), limits)


def driver_version() -> str:
    """Return the version of the GPU's driver, or "unknown" without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "unknown"
