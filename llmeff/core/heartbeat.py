"""Where this process is in its run, for whoever asks from another thread; to say it costs two writes."""


class Heartbeat:
    """The last place that the run said it had come to."""

    def __init__(self) -> None:
        self.count = 0
        """Grows with whatever is done: standing still, it says that nothing is."""
        self.step = 0
        """The step under way, from 1; 0 before the first."""
        self.part = "start"
        """What the run is in: one of `PARTS`."""


PARTS = ("start", "data", "forward", "backward", "update", "evaluation", "checkpoint")
"""In the order in which a run comes to them."""

HEARTBEAT = Heartbeat()
"""This process's."""


def beat(part: str | None = None, step: int | None = None) -> None:
    """Says that something was done: a batch, a file, or the beginning of a part."""
    if part is not None:
        HEARTBEAT.part = part
    if step is not None:
        HEARTBEAT.step = step
    HEARTBEAT.count += 1
