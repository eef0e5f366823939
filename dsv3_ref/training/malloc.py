"""Settings of glibc's allocator for training."""

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def tune_malloc() -> None:
    """Reuse freed memory instead of returning it to the kernel, in huge pages where Linux has them.

    A training step frees and allocates the same hundreds of megabytes; by default glibc returns
    them each time, and the kernel clears every page again. Call before the first large tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for huge pages
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 256 << 20)
