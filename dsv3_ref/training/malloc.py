"""Memory of the host and of GPUs: settings of glibc's allocator, and how much is free."""

import ctypes
import math
import os
from pathlib import Path

import torch

# from malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of this container, with the files of version 2


def tune_malloc() -> None:
    """Keep freed memory in the process instead of returning it to the kernel; use huge pages.

    A training step frees and allocates the same hundreds of megabytes. By default glibc returns
    them to the kernel each time, which then clears every page again. Call this before the first
    large tensor is allocated.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch then requests huge pages
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 256 << 20)


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on a device; ∞ where it is unknown.

    On the host that is the least of the kernel's estimate and of what the container may use.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [math.inf]
    if MEMINFO.is_file():
        fields = dict(line.split(":") for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        limits.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    if (CGROUP / "memory.max").is_file():
        most = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = (CGROUP / "memory.current").read_text(encoding="utf-8")
        limits.append(math.inf if most == "max" else float(most) - float(used))
    return min(limits)
