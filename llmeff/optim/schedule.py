"""Learning-rate schedules: the factor on the peak rate, a function of the step alone."""

import math
from typing import Literal

from llmeff.core.config import Component, CountOrZero, Fraction, Text


class ScheduleConfig(Component, family="schedule"):
    """How the learning rate moves over a run."""

    name: Text
    """The schedule's name."""
    warmup_steps: CountOrZero = 0
    """Steps over which the rate rises linearly from 0 to the peak, which the last of them has."""

    def factor(self, step: int, steps: int) -> float:
        """The factor on the peak rate for a step (from 0) of a run of so many steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, steps - self.warmup_steps)
        return self.after_warmup((step - self.warmup_steps + 1) / span)

    def after_warmup(self, progress: float) -> float:
        """The factor where `progress`, in (0, 1], of the steps after warm-up is done once the step is."""
        raise NotImplementedError(type(self))


class Constant(ScheduleConfig):
    """The peak rate to the end."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, progress: float) -> float:
        """1."""
        return 1.0


class Cosine(ScheduleConfig):
    """Half a cosine from the peak down to `final` of it (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = "cosine"
    final: Fraction = 0.01
    """What is left of the peak at the last step."""

    def after_warmup(self, progress: float) -> float:
        """From 1 to `final`."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(ScheduleConfig):
    """A straight line from the peak down to `final` of it."""

    name: Literal["linear"] = "linear"
    final: Fraction = 0.0
    """What is left of the peak at the last step."""

    def after_warmup(self, progress: float) -> float:
        """From 1 to `final`."""
        return self.final + (1 - self.final) * (1 - progress)


class WSD(ScheduleConfig):
    """Warm-up, stable, decay: the peak, then a line down to `final` of it over the last steps (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"
    decay: Fraction = 0.2
    """The part of the steps after warm-up in which the rate falls."""
    final: Fraction = 0.0
    """What is left of the peak at the last step."""

    def after_warmup(self, progress: float) -> float:
        """1, then from 1 to `final`."""
        left = 1 - progress
        if left >= self.decay:
            return 1.0
        return self.final + (1 - self.final) * left / self.decay
