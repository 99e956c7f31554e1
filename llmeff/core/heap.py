"""Has the C library keep freed memory, since a training step asks for the same again."""

import ctypes
import ctypes.util

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
_MIB = 2**20


def keep_freed_memory() -> None:
    """Sets glibc's thresholds; does nothing where there is no glibc.

    By default a large tensor is mapped anew at each step and given back after it, and every page of it faults again:
    about 2,000 faults in a step of a 1M-parameter model, none so.
    """
    name = ctypes.util.find_library("c")
    if name is None or not name.startswith("libc.so"):
        return
    libc = ctypes.CDLL(name)
    libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)  # the most that glibc allows
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 64 * _MIB)
