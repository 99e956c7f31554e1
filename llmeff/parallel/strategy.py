"""Base classes of strategies, which define how the processes of a run share an optimizer step."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmeff.core import group
from llmeff.core.config import Component, ConfigError, Count, Positive, Text
from llmeff.core.dist import ExternalSetting, World, world
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import Precision, PrecisionName
from llmeff.core.tensors import stored_tensors
from llmeff.cost.arrays import Weight
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload
from llmeff.parallel.group_state import Entries
from llmeff.parallel.sharded_checkpoint import ShardedCheckpoint, ShardOwner, save


@dataclass(frozen=True, kw_only=True)
class StrategyInputs:
    """Inputs from which a strategy is built on this process."""

    model: nn.Module
    """The whole model, on the device."""
    parameter_infos: Callable[[nn.Module], list[ParameterInfo]]
    """Returns the parameters to train of a model, which the strategy may have split already."""
    optimizer: Callable[[list[ParameterInfo]], Optimizer]
    """Builds an optimizer for the given parameters."""
    device: torch.device
    """The device of this process."""
    precision: Precision
    """The dtypes of the run."""
    micro_batch: int
    """Rows of a forward pass on one rank."""
    num_micro_batches: int
    """Micro-batches of a step on one rank."""
    clip_norm: float | None
    """Largest gradient norm: larger gradients are scaled down to it. None if gradients are not clipped."""


class Strategy(ABC):
    """A model and its optimizer on this process, with the parts of a step in which ranks communicate."""

    model: nn.Module
    """The model to call for a forward pass, in training and under no_grad."""
    optimizer: Optimizer
    """The optimizer of this process's share of the parameters. Its groups hold the learning rate."""

    begun: list[Entries]
    """Entries of the optimizer's groups before the first step, from `group_entries`."""

    def __init__(self, inputs: StrategyInputs):
        self.device = inputs.device
        self.world: World = world()
        self.num_parameters = sum(parameter.numel() for parameter in inputs.model.parameters())
        """Number of elements of the whole model's parameters, trained and frozen. Shared parameters count once."""
        self.num_trained = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
        """Number of elements of the trained parameters."""
        self._plain = inputs.model

    def accumulate(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for forward and backward of a micro-batch.

        Args:
            is_last: whether it is the step's last micro-batch, after which gradients are summed over all ranks.
        """
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """A context with the model in evaluation mode."""
        self.model.eval()
        yield self.model
        self.model.train()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass of a micro-batch and adds its gradients.

        Args:
            loss: the micro-batch's summed loss, divided by the step's global count of items.
        """

    def reduce_sum(self, value: Tensor) -> Tensor:
        """Returns the sum of a value over all ranks."""
        return group.total(value)

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Scales gradients down to a norm of at most `max_norm`, or leaves them unchanged if `max_norm` is None.

        Some strategies do the scaling in `step`.

        Returns:
            The norm before clipping, over all parameters of all ranks.
        """

    @abstractmethod
    def step(self) -> bool:
        """Updates the parameters and clears the gradients. Returns False if loss scaling skipped the update."""

    @abstractmethod
    def skip(self) -> None:
        """Clears the gradients without an update."""

    @property
    def loss_scale(self) -> float | None:
        """The factor of fp16 loss scaling. None if the loss is not scaled."""
        return None

    @property
    def may_overflow(self) -> bool:
        """Whether non-finite gradients may come from loss scaling, which then skips the step and lowers its factor."""
        return False

    @abstractmethod
    def owners(self) -> list[ShardOwner]:
        """Returns the weights and optimizer state that this rank saves. Together the ranks save everything once."""

    def owned(self) -> list[ShardOwner]:
        """Returns the weights that this rank updates and loads, even if another rank saves them (see `owners`)."""
        return self.owners()

    def resident(self) -> Iterable[Tensor]:
        """Yields the tensors that stay in memory on this process between steps."""
        yield from self._plain.parameters()
        yield from self._plain.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the whole model's weights and buffers. All ranks must call it, but only the main rank needs them."""
        return stored_tensors(self._plain)

    def extra_state(self) -> dict[str, Any]:
        """Returns further state that a resume needs, as JSON values: the state of the loss scaling."""
        return {}

    def load_extra_state(self, others: Mapping[str, Any]) -> None:  # noqa: B027  there may be nothing
        """Restores what `extra_state` returned."""

    def save(self, folder: Path) -> None:
        """Writes this rank's share of the state that a resume needs: weights, optimizer state and loss scaling."""
        buffers = {
            name: tensor for name, tensor in stored_tensors(self._plain).items() if _is_buffer(self._plain, name)
        }
        save(folder, self.world.rank, self.owners(), self.optimizer, self.begun, buffers, self.extra_state())

    def load(self, folder: Path) -> None:
        """Restores the state that `save` wrote, under any strategy and on any number of ranks.

        Raises:
            ConfigError: the state belongs to another model, or to an optimizer whose state cannot be split as this
                strategy needs.
        """
        saved = ShardedCheckpoint(folder)
        try:
            self.load_weights(saved)
            saved.load(self.owned(), self.optimizer)
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from error
        self.load_extra_state(saved.others)

    @abstractmethod
    def load_weights(self, saved: ShardedCheckpoint) -> None:
        """Reads the model's weights and buffers into the tensors that the forward pass reads."""

    def close(self) -> None:  # noqa: B027  there may be nothing
        """Frees the resources of the strategy's engine on this process."""


def _is_buffer(model: nn.Module, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last in model.get_submodule(module)._buffers


class StrategyConfig(Component, family="strategy"):
    """The strategy of a run: the number of processes, and how they share model, gradients and optimizer state."""

    precisions: ClassVar[tuple[PrecisionName, ...]]
    """The precisions that the strategy supports."""
    joins: ClassVar[bool] = True
    """Whether the strategy uses a process group, even with a single process."""
    launch_flags: ClassVar[tuple[str, ...]] = ("--multi_gpu",)
    """Flags of `accelerate launch` that select this strategy, also on a CPU. The first is the recommended flag."""

    name: Text
    """The strategy's name."""
    ranks: Count = 1
    """Number of processes."""
    timeout_s: Positive = 600.0
    """The run ends on all ranks if no rank makes progress for this many seconds."""

    def external_settings(self) -> list[ExternalSetting]:
        """Returns the settings that this config's file, if any, makes for other parts of the run's config."""
        return []

    def refusal(self, sharding: Sharding) -> str | None:
        """Returns the reason to refuse optimizers with this sharding, or None if the strategy supports them.

        An optimizer is refused if the strategy would silently change its updates. In the error, the reason follows
        the names of the optimizer and the strategy.
        """
        raise NotImplementedError(type(self))

    @property
    def miscounts(self) -> str | None:
        """The reason to refuse optimizers that count steps in their groups, or None if the counts stay right."""
        return None

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Yields an error message for each conflict with the precision or with the value of `runtime.compile`."""
        yield from ()

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> StrategyLaw:
        """Returns the law of what a rank keeps and sends in a step.

        Together with the laws of model and optimizer it gives the rank's price.

        Args:
            weights: all parameters, in the model's order.
            groups: names of the trained parameters of each optimizer group.
            work: the step on this rank.
            rank: the index of the rank.
        """
        raise NotImplementedError(type(self))

    def build(self, inputs: StrategyInputs) -> Strategy:
        """Sets up the model and its optimizer on this process."""
        raise NotImplementedError(type(self))
