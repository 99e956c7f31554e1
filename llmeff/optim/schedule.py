"""Learning-rate schedules: the factor on the peak learning rate at each step of a run."""

import math
from typing import Literal

from llmeff.core.config import Component, CountOrZero, Fraction, Text


class ScheduleConfig(Component, family="schedule"):
    """Change of the learning rate over a run."""

    name: Text
    """The schedule's name."""
    warmup_steps: CountOrZero = 0
    """Number of steps of linear warm-up from 0. The last of these steps has the peak learning rate."""

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor on the peak learning rate at `step`, counted from 0, in a run of `steps` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, steps - self.warmup_steps)
        return self.after_warmup((step - self.warmup_steps + 1) / span)

    def after_warmup(self, progress: float) -> float:
        """Returns the factor at a step after warm-up.

        Args:
            progress: share of the steps after warm-up that are done at the end of this step, in (0, 1].
        """
        raise NotImplementedError(type(self))


class Constant(ScheduleConfig):
    """The peak learning rate in all steps after warm-up."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, progress: float) -> float:
        """Returns 1."""
        return 1.0


class Cosine(ScheduleConfig):
    """Half a cosine from the peak learning rate to `final` times the peak (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = "cosine"
    final: Fraction = 0.01
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Returns the factor, which falls from 1 to `final` along a cosine."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(ScheduleConfig):
    """A straight line from the peak learning rate to `final` times the peak."""

    name: Literal["linear"] = "linear"
    final: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Returns the factor, which falls from 1 to `final` along a line."""
        return self.final + (1 - self.final) * (1 - progress)


class WSD(ScheduleConfig):
    """Warmup-stable-decay: the peak learning rate, then a linear decay to `final` times the peak (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"
    decay: Fraction = 0.2
    """Length of the final decay, as a fraction of the steps after warm-up."""
    final: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Returns the factor, which is 1 before the decay and falls from 1 to `final` along a line during the decay."""
        left = 1 - progress
        if left >= self.decay:
            return 1.0
        return self.final + (1 - self.final) * left / self.decay
