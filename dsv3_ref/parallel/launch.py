"""Training on the ranks that torchrun or srun has started."""

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_ref import ops
from dsv3_ref.parallel.data_parallel import DataParallel, broadcast_object_from_rank0
from dsv3_ref.parallel.mesh import init_distributed
from dsv3_ref.parallel.mesh_parallel import MeshParallel, with_zero_bubble
from dsv3_ref.parallel.watchdog import collective_timeout, watch_for_hangs
from dsv3_ref.training import settings
from dsv3_ref.training.loop import train
from dsv3_ref.training.malloc import tune_malloc
from dsv3_ref.training.spike_guard import catch_signals
from dsv3_ref.training.task import Task


def validate(task: Task, device: torch.device) -> bool:
    """Raise a `UserError` if the settings cannot run on these ranks; return True.

    Only rank 0 calls it, so that a mistake that every rank would find is reported once.
    """
    settings.validate_args(task.config)
    if not (task.requires_whole_model or task.config.fully_shard):
        with_zero_bubble(ops.expand_backends(ops.ACTIVE_BACKENDS, device.type))
    return True


def run_on_ranks(task: Task, command: str | None = None) -> Path:
    """Train a task as one of several ranks and return the directory of the run."""
    config = task.config
    tune_malloc()
    timeout = collective_timeout(config.hang_timeout)
    with init_distributed(config.device, timeout) as device, ExitStack() as stack:
        broadcast_object_from_rank0(lambda: validate(task, device))
        run_dir = broadcast_object_from_rank0(
            lambda: stack.enter_context(settings.open_run_dir(config))
        )
        signals = stack.enter_context(catch_signals())
        rank, world = dist.get_rank(), dist.get_world_size()
        stack.enter_context(watch_for_hangs(run_dir / "logs", rank, world, config.hang_timeout))
        parallel = DataParallel if task.requires_whole_model else MeshParallel
        train(task, parallel(config, device), run_dir, command, signals)
        dist.barrier()  # rank 0 serves the store that all ranks need
    return run_dir
