"""How the C library handles freed memory."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST_TRIM_BYTES = 2**31 - 1
"""The highest value that it can be set to."""


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation, up to 2 GiB, whatever the size of a block.

    By default it returns memory at the top of its heap to the system, and blocks above 32 MiB always. A step that frees
    its activations and gradients then faults their pages in again in the next step, and the system clears each.

    Returns:
        whether this C library took the settings; others than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    told = [libc.mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_BYTES), libc.mallopt(_M_MMAP_MAX, 0)]
    return all(told)
