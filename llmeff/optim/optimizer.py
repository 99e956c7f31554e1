"""The contract of an optimizer."""

from typing import ClassVar, Literal

from torch.optim import Optimizer

from llmeff.core.config import Component, Positive, Text
from llmeff.core.table import Row

Sharding = Literal["elementwise", "whole_tensor", "none"]
"""What may be split over ranks without changing the update: any slice, only whole tensors, or nothing."""


class OptimizerConfig(Component, family="optimizer"):
    """Which optimizer updates the parameters."""

    sharding: ClassVar[Sharding]

    name: Text
    """The optimizer's name."""
    lr: Positive = 1e-3
    """Peak learning rate, which the schedule scales."""

    def build(self, rows: list[Row]) -> Optimizer:
        """The optimizer of these parameters; each group's `lr` is the peak."""
        raise NotImplementedError(type(self))
