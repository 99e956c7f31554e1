"""Which kernels computed what, for the record: what has more than one says here which ran."""

from collections.abc import Iterator
from contextlib import contextmanager

SDPA = "attention: torch sdpa"
"""What softmax attention calls; torch takes a fused kernel for it, whose name follows, or plain products."""

_noted: dict[str, bool] | None = None


def ran(kernel: str, *, is_counted: bool = True) -> None:
    """Notes a kernel that runs, where somebody asks.

    Args:
        kernel: what it computes, and whose it is: "scan: torch".
        is_counted: whether its FLOPs can be counted as it runs.
    """
    if _noted is not None:
        _noted[kernel] = is_counted


@contextmanager
def noted() -> Iterator[dict[str, bool]]:
    """Gives all that run in it, with whether their FLOPs are counted."""
    global _noted
    before, _noted = _noted, {}
    try:
        yield _noted
    finally:
        _noted = before
