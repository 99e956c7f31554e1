"""Wall time of a run by activity, and the time of each step, measured without waiting for the device in every step."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from llmeff.core.heartbeat import beat
from llmeff.record.schema import Timings

ClockName = Literal["startup", "eval", "checkpoint", "record"]
"""Names of the clocks; see the fields of `Timings`. Step times are added by `Clocks.add_step`, not by name."""
Part = Literal["data", "forward", "backward", "optimizer"]
"""Names of the parts of a step."""

_NEXT = {"data": "forward", "forward": "backward", "backward": "update"}
_HELD = {"eval": "evaluation", "checkpoint": "checkpoint"}
"""Phases reported to the heartbeat: after a mark (`_NEXT`), and while a clock is held (`_HELD`)."""

SYNCHRONISED_EVERY = 50
"""Interval between steps that are timed part by part. On a GPU, such a step waits for the device after each part."""
WARMUP_STEPS = 5
"""Number of steps at the start of a process whose times are marked as warm-up."""


class Clocks:
    """Sums of wall seconds, one per clock name.

    Args:
        device: the device that computes. `hold` waits for it before and after its block, so that a clock counts only
            the work of the block.
        earlier: seconds that earlier processes of this run spent. None starts at zero.
    """

    def __init__(self, device: torch.device, earlier: Timings | None = None):
        self._device = device
        self._seconds: dict[str, float] = (earlier or Timings()).model_dump()

    @contextlib.contextmanager
    def hold(self, name: ClockName) -> Iterator[None]:
        """Adds the time of a `with` block to a clock. Blocks must not be nested."""
        beat(_HELD.get(name))
        _wait(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait(self._device)
            self.add(name, start)

    def add(self, name: ClockName, start: float) -> None:
        """Adds the time since `start` (a `time.perf_counter` value) to a clock, without waiting for the device."""
        self._seconds[f"{name}_s"] += time.perf_counter() - start

    def add_step(self, times: "StepTimes") -> None:
        """Adds the times of a step to `data_s` and `train_s`."""
        self._seconds["data_s"] += times.data_s
        self._seconds["train_s"] += times.step_s - times.data_s

    def timings(self) -> Timings:
        """Returns the seconds of all clocks so far."""
        return Timings(**self._seconds)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Times of one step, in seconds. `StepRow` describes the fields."""

    step: int
    step_s: float
    data_s: float
    forward_s: float | None
    backward_s: float | None
    optimizer_s: float | None
    is_warmup: bool


class StepClock:
    """Times steps: `begin`, work, `mark("data")`, work, `mark("forward")`, ..., `end`.

    `mark` adds the time since the previous mark to one part of the step. A part may occur several times in a step, once
    per micro-batch. On a GPU, a step is timed by two device events, which are read while the next step runs.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._steps_done = 0
        self._pending: list[_Step] = []

    def begin(self, step: int) -> None:
        """Starts the step with this number, counted from 1."""
        beat("data", step)
        self._current = _Step(
            number=step,
            is_warmup=self._steps_done < WARMUP_STEPS,
            is_synchronised=step % SYNCHRONISED_EVERY == 0,
        )
        if self._on_gpu:
            self._current.began = _event()
            if self._current.is_synchronised:
                _wait(self._device)
        self._last = self._start = time.perf_counter()

    def mark(self, part: Part) -> None:
        """Ends a part: adds the time since the previous mark to it."""
        current = self._current
        if self._on_gpu and current.is_synchronised:
            _wait(self._device)
        now = time.perf_counter()
        current.parts[part] = current.parts.get(part, 0.0) + now - self._last
        self._last = now
        beat(_NEXT.get(part))

    def end(self) -> list[StepTimes]:
        """Ends the step. Returns the steps whose times are known now: on a CPU this step, on a GPU the previous one."""
        current = self._current
        self._steps_done += 1
        if not self._on_gpu:
            current.wall_s = time.perf_counter() - self._start
            return [current.times()]
        current.ended = _event()
        ready, self._pending = self._pending, [current]
        return [step.times() for step in ready]

    def flush(self) -> list[StepTimes]:
        """Waits for the device, and returns the times of the steps that `end` has not returned yet."""
        ready, self._pending = self._pending, []
        return [step.times() for step in ready]


@dataclass
class _Step:
    number: int
    is_warmup: bool
    is_synchronised: bool
    parts: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    began: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None

    def times(self) -> StepTimes:
        step_s = self.wall_s
        if self.began is not None and self.ended is not None:
            self.ended.synchronize()
            step_s = self.began.elapsed_time(self.ended) / 1e3
        breakdown = self.parts if self.is_synchronised else {}
        return StepTimes(
            step=self.number,
            step_s=step_s,
            data_s=self.parts.get("data", 0.0),
            forward_s=breakdown.get("forward"),
            backward_s=breakdown.get("backward"),
            optimizer_s=breakdown.get("optimizer"),
            is_warmup=self.is_warmup,
        )


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
