"""How far this process has come in its run, readable from other threads. An update costs two writes."""


class Heartbeat:
    """The last place that the run reported."""

    def __init__(self) -> None:
        self.count = 0
        """Grows with everything that is done. If it stands still, nothing is being done."""
        self.step = 0
        """The current step, from 1; 0 before the first."""
        self.part = "start"
        """The current part of the run: one of `PARTS`."""


PARTS = ("start", "data", "forward", "backward", "update", "evaluation", "checkpoint")
"""In the order in which a run first reaches them."""

HEARTBEAT = Heartbeat()
"""This process's heartbeat."""


def beat(part: str | None = None, step: int | None = None) -> None:
    """Reports that something was done: a batch, a file, or the start of a part."""
    if part is not None:
        HEARTBEAT.part = part
    if step is not None:
        HEARTBEAT.step = step
    HEARTBEAT.count += 1
