"""What an operator measures in a run: MFU, traces of chosen steps, CUDA's memory, determinism."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dsv3_ref.checkpoints.atomic import clear_path
from dsv3_ref.config import UserError
from dsv3_ref.scale import GPU_SPECS, training_flops_per_token
from dsv3_ref.training.settings import TrainConfig

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

# ── Model FLOPs utilization ──


@cache
def peak_flops(precision: str, device: torch.device) -> float | None:
    """Return the data sheet's peak of a GPU in FLOP/s at a run's precision; None if unknown."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device).lower()
    spec = next((spec for gpu, spec in GPU_SPECS.items() if gpu in name), None)
    if spec is None:
        return None
    return spec.fp8 if precision == "fp8" else spec.bf16


def mfu(args: TrainConfig, device: torch.device, tokens_per_s: float) -> float | None:
    """Return the model FLOPs utilization of a rate of tokens per second and device.

    None if neither --peak-tflops nor the data sheet gives the device's peak.
    """
    peak = args.peak_tflops * 1e12 or peak_flops(args.precision, device)
    if not peak:
        return None
    return tokens_per_s * training_flops_per_token(args.model, args.recipe.seq_len) / peak


# ── Chosen steps ──


def require_device(args: TrainConfig, device: torch.device) -> None:
    """Raise a `UserError` if the device cannot record what the options ask for."""
    if args.memory_snapshot and device.type != "cuda":
        raise UserError(
            "--memory-snapshot records the allocations of CUDA, and this run is on "
            f"{device.type}: use --profile, whose traces hold the memory of operations"
        )


@contextmanager
def profile_step(
    args: TrainConfig, run_dir: Path, step: int, device: torch.device
) -> Iterator[None]:
    """Record what the options ask for while step number `step` runs, in the run's folder `logs`."""
    rank = int(os.environ.get("RANK", 0))
    chosen = step if rank in args.profile_ranks else None
    with ExitStack() as stack:
        if chosen in args.profile:
            path = run_dir / "logs" / f"profile-step{step}-rank{rank}.json.gz"
            stack.enter_context(record_trace(clear_path(path), device))
        if chosen in args.memory_snapshot:
            path = run_dir / "logs" / f"memory-step{step}-rank{rank}.pickle"
            stack.enter_context(record_allocations(clear_path(path)))
        yield


@contextmanager
def record_trace(path: Path, device: torch.device) -> Iterator[None]:
    """Write a trace of all operations in the block, with their shapes and memory."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as trace:
        yield
    path.parent.mkdir(exist_ok=True)
    trace.export_chrome_trace(str(path))


@contextmanager
def record_allocations(path: Path) -> Iterator[None]:
    """Write the history of CUDA's allocations in the block, also if it runs out of memory."""
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


# ── Determinism ──


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use only deterministic algorithms in the block; an operation that has none raises an error.

    cuBLAS reads its setting when it starts, so nothing may have used the GPU before.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
