"""What the C library does with memory that is freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST_TRIM_BYTES = 2**31 - 1
"""The most that it may be set to."""


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for the next allocation, up to 2 GiB, whatever its size.

    It gives memory at the top of its heap back to the system, and blocks beyond 32 MiB always: a step that frees its
    activations and gradients faults their pages in again in the next, and the system clears each.

    Returns:
        whether this C library has been told; others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    told = [libc.mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_BYTES), libc.mallopt(_M_MMAP_MAX, 0)]
    return all(told)
