"""Which kernels ran, for the record: operations that have several kernels note here which one ran."""

from collections.abc import Iterator
from contextlib import contextmanager

SDPA = "attention: torch sdpa"
"""What softmax attention calls. torch picks a fused kernel, whose name is appended, or plain products."""

_noted: dict[str, bool] | None = None


def ran(kernel: str, *, is_counted: bool = True) -> None:
    """Notes a kernel that runs, if somebody is recording.

    Args:
        kernel: what it computes and whose it is ("scan: torch").
        is_counted: whether its FLOPs can be counted while it runs.
    """
    if _noted is not None:
        _noted[kernel] = is_counted


@contextmanager
def noted() -> Iterator[dict[str, bool]]:
    """A block that yields the kernels that run in it, and whether their FLOPs are counted."""
    global _noted
    before, _noted = _noted, {}
    try:
        yield _noted
    finally:
        _noted = before
