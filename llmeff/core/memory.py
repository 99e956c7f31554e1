"""What the C library does with memory that is freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_TRIM_BYTES = 2**31 - 1
_MOST_MMAP_BYTES = 32 * 2**20
"""The most that each may be set to."""


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for the next allocation, up to 2 GiB, in blocks of up to 32 MiB.

    It gives memory at the top of its heap back to the system, and a step that frees its activations and gradients faults
    their pages in again in the next: thousands of faults a step, or none, as chance lays out the heap.

    Returns:
        whether this C library has been told; others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    told = [
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_BYTES),
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_BYTES),
    ]
    return all(told)
