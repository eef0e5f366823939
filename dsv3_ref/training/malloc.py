"""Settings of glibc's allocator for training."""

import ctypes
import os

# from malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


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
