"""The progress of this process in its run, which other threads such as the watchdog can read."""


class Heartbeat:
    """The progress that this process last reported with `beat`."""

    def __init__(self) -> None:
        self.count = 0
        """Number of reports so far. If it stops growing, the process may be stuck."""
        self.step = 0
        """Number of the current step, from 1. 0 before the first step."""
        self.part = "start"
        """The current part of the run, one of `PARTS`."""


PARTS = ("start", "data", "forward", "backward", "update", "evaluation", "checkpoint")
"""Parts of a run, in the order in which a run first reaches them."""

HEARTBEAT = Heartbeat()
"""This process's heartbeat."""


def beat(part: str | None = None, step: int | None = None) -> None:
    """Reports progress, such as a finished batch or file.

    Args:
        part: the part of the run that starts now. None if it is unchanged.
        step: the step that starts now. None if it is unchanged.
    """
    if part is not None:
        HEARTBEAT.part = part
    if step is not None:
        HEARTBEAT.step = step
    HEARTBEAT.count += 1
