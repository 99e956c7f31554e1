"""Learning-rate schedules: the factor on the peak rate as a function of the step only."""

import math
from typing import Literal

from llmeff.core.config import Component, CountOrZero, Fraction, Text


class ScheduleConfig(Component, family="schedule"):
    """How the learning rate changes over a run."""

    name: Text
    """The schedule's name."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up from 0; the last of them has the peak rate."""

    def factor(self, step: int, steps: int) -> float:
        """The factor on the peak rate at `step`, counted from 0, in a run of `steps` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, steps - self.warmup_steps)
        return self.after_warmup((step - self.warmup_steps + 1) / span)

    def after_warmup(self, progress: float) -> float:
        """The factor at a step; `progress`, in (0, 1], is the share of steps after warm-up done when the step ends."""
        raise NotImplementedError(type(self))


class Constant(ScheduleConfig):
    """The peak rate until the end."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, progress: float) -> float:
        """Returns 1."""
        return 1.0


class Cosine(ScheduleConfig):
    """Half a cosine from the peak to `final` times the peak (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = "cosine"
    final: Fraction = 0.01
    """Rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Falls from 1 to `final` along a cosine."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(ScheduleConfig):
    """A straight line from the peak to `final` times the peak."""

    name: Literal["linear"] = "linear"
    final: Fraction = 0.0
    """Rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Falls from 1 to `final` along a line."""
        return self.final + (1 - self.final) * (1 - progress)


class WSD(ScheduleConfig):
    """Warmup-stable-decay: the peak, then a line to `final` times the peak over the last steps (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"
    decay: Fraction = 0.2
    """Share of the steps after warm-up, at the end, in which the rate falls."""
    final: Fraction = 0.0
    """Rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Stays at 1, then falls from 1 to `final` along a line."""
        left = 1 - progress
        if left >= self.decay:
            return 1.0
        return self.final + (1 - self.final) * left / self.decay
