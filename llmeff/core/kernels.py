"""Notes which kernels ran, for the run's record. Operations that can use several kernels report the one they use."""

from collections.abc import Iterator
from contextlib import contextmanager

SDPA = "attention: torch sdpa"
"""Softmax attention by torch's `scaled_dot_product_attention`. If torch picks a fused kernel, its name is appended."""

_noted: dict[str, bool] | None = None


def ran(kernel: str, *, is_counted: bool = True) -> None:
    """Notes that a kernel runs. Does nothing outside a `noted` block.

    Args:
        kernel: the operation and the library ("scan: torch").
        is_counted: whether `count_flops` can count its FLOPs.
    """
    if _noted is not None:
        _noted[kernel] = is_counted


@contextmanager
def noted() -> Iterator[dict[str, bool]]:
    """Context manager that yields a dict, to which each kernel that runs in the block is added.

    The values say whether the kernel's FLOPs can be counted.
    """
    global _noted
    before, _noted = _noted, {}
    try:
        yield _noted
    finally:
        _noted = before
