"""The contract of a strategy: how the processes of a run share a step."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core.config import Component, Count, Text
from llmeff.core.dist import World
from llmeff.core.precision import Precision, PrecisionName
from llmeff.core.table import Row


class Strategy(ABC):
    """A model and its optimizer, set up on this process, and the collective parts of a step."""

    device: torch.device
    """Where this process computes."""
    world: World
    """This process among the others."""
    model: nn.Module
    """The model whose forward a step calls."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds this share's gradients; `loss` is the share's sum over the step's global count."""

    @abstractmethod
    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the gradients down to the norm where they exceed it; returns the norm before, over all parameters."""

    @abstractmethod
    def step(self) -> bool:
        """Updates the parameters and clears the gradients; False where loss scaling skipped the update."""

    @abstractmethod
    def skip(self) -> None:
        """Clears the gradients without an update."""

    @property
    @abstractmethod
    def loss_scale(self) -> float | None:
        """The factor of fp16's loss scaling; None where there is none."""

    @property
    @abstractmethod
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only mean that loss scaling skips this step and goes lower."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every rank has come here."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's weights and buffers, on the main rank; elsewhere it may be empty."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes all that training goes on from: weights, optimizer state, loss scaling."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Puts back what `save` wrote."""


class StrategyConfig(Component, family="strategy"):
    """How many processes train together, and what each holds."""

    precisions: ClassVar[tuple[PrecisionName, ...]]
    """The precisions that it can train in."""

    name: Text
    """The strategy's name."""
    ranks: Count = 1
    """How many processes."""

    def build(
        self,
        model: nn.Module,
        rows: list[Row],
        optimizer: Optimizer,
        device: torch.device,
        precision: Precision,
    ) -> Strategy:
        """Sets the model, its parameters' table and their optimizer up on this process."""
        raise NotImplementedError(type(self))
