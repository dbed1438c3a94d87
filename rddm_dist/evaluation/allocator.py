"""The C library's allocator of a process that runs a network on the CPU, call after call."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MMAP_BYTES, KEPT_BYTES = 64 << 20, 512 << 20


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed activations, up to KEPT_BYTES, for the next call.

    By default it gives arrays above some megabytes back to the system at once, and each new one is paid for page by
    page: a quarter of the time of a small U-Net. Arrays above MMAP_BYTES still go back, so that large photographs need
    no more memory than before. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
