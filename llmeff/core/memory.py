"""Sets how the C library treats freed memory."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST_TRIM_BYTES = 2**31 - 1
"""The largest trim threshold that mallopt accepts."""


def keep_freed_memory() -> bool:
    """Makes glibc keep up to 2 GiB of freed memory for later allocations, in blocks of any size.

    By default, glibc returns free memory at the top of its heap to the system, and always returns blocks above 32 MiB.
    Each step would then fault the pages of its activations and gradients in again, and the system would zero each page.

    Returns:
        True if glibc accepted the settings. False if it did not, or if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    told = [libc.mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_BYTES), libc.mallopt(_M_MMAP_MAX, 0)]
    return all(told)
