"""The contract of a strategy: how the processes of a run share a step."""

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
    """What a strategy is built from on this process."""

    model: nn.Module
    """The whole model, on the device."""
    parameter_infos: Callable[[nn.Module], list[ParameterInfo]]
    """Returns the parameters to train; of a model that the strategy may have split."""
    optimizer: Callable[[list[ParameterInfo]], Optimizer]
    """Builds an optimizer of the given parameters."""
    device: torch.device
    """The device of this process."""
    precision: Precision
    """The number formats."""
    micro_batch: int
    """Rows of a forward pass on one rank."""
    num_micro_batches: int
    """Micro-batches of a step on one rank."""
    clip_norm: float | None
    """The norm that larger gradients are scaled down to; None: never."""


class Strategy(ABC):
    """A model and its optimizer on this process, and the parts of a step in which ranks communicate."""

    model: nn.Module
    """The model whose forward is called, in training and under no_grad."""
    optimizer: Optimizer
    """Updates this process's share of the parameters; its groups hold the learning rate."""

    begun: list[Entries]
    """What the optimizer's groups held before the first step."""

    def __init__(self, inputs: StrategyInputs):
        self.device = inputs.device
        self.world: World = world()
        self.num_parameters = sum(parameter.numel() for parameter in inputs.model.parameters())
        """Numbers of the whole model, trained and frozen; shared parameters count once."""
        self.num_trained = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
        """Numbers that are trained."""
        self._plain = inputs.model

    def accumulate(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for forward and backward of a micro-batch; after the last one gradients are sums over all ranks."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """A context with the model in evaluation mode."""
        self.model.eval()
        yield self.model
        self.model.train()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds this share's gradients.

        Args:
            loss: the share's summed loss, divided by the step's global count.
        """

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a value over all ranks."""
        return group.total(value)

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Scales gradients down to a norm of at most `max_norm`; None: never.

        Returns:
            the norm before, over all parameters of all ranks.
        """

    @abstractmethod
    def step(self) -> bool:
        """Updates the parameters and clears the gradients; returns False if loss scaling skipped the update."""

    @abstractmethod
    def skip(self) -> None:
        """Clears the gradients without an update."""

    @property
    def loss_scale(self) -> float | None:
        """The factor of fp16's loss scaling; None if there is none."""
        return None

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only make loss scaling skip this step and lower its factor."""
        return False

    @abstractmethod
    def owners(self) -> list[ShardOwner]:
        """The weights and optimizer state that this rank saves; together the ranks save everything once."""

    def owned(self) -> list[ShardOwner]:
        """The weights that this rank updates, and loads. If every rank updates everything, only one saves it."""
        return self.owners()

    def resident(self) -> Iterable[Tensor]:
        """The tensors that live on this process between steps."""
        yield from self._plain.parameters()
        yield from self._plain.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's weights and buffers on the main rank; empty or not on others. All ranks call it."""
        return stored_tensors(self._plain)

    def extra_state(self) -> dict[str, Any]:
        """What else is needed to resume, as JSON: the loss scaling."""
        return {}

    def load_extra_state(self, others: Mapping[str, Any]) -> None:  # noqa: B027  there may be nothing
        """Restores what `extra_state` returned."""

    def save(self, folder: Path) -> None:
        """Writes this rank's share of what is needed to resume: weights, optimizer state and loss scaling."""
        buffers = {
            name: tensor for name, tensor in stored_tensors(self._plain).items() if _is_buffer(self._plain, name)
        }
        save(folder, self.world.rank, self.owners(), self.optimizer, self.begun, buffers, self.extra_state())

    def load(self, folder: Path) -> None:
        """Restores what any strategy's `save` wrote on any number of ranks.

        Raises:
            ConfigError: the state is of another model, or of an optimizer whose state cannot be split as this strategy
                needs.
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
        """Reads the model's weights and buffers into the tensors that forward reads."""

    def close(self) -> None:  # noqa: B027  there may be nothing
        """Frees what this process keeps for the strategy's engine."""


def _is_buffer(model: nn.Module, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last in model.get_submodule(module)._buffers


class StrategyConfig(Component, family="strategy"):
    """How many processes train together, and what each of them holds."""

    precisions: ClassVar[tuple[PrecisionName, ...]]
    """The precisions that the strategy can train in."""
    joins: ClassVar[bool] = True
    """Whether its processes form a process group, even if there is only one."""
    launch_flags: ClassVar[tuple[str, ...]] = ("--multi_gpu",)
    """Flags of `accelerate launch` that mean this strategy, on a CPU too; the first is the one to use."""

    name: Text
    """The strategy's name."""
    ranks: Count = 1
    """Number of processes."""
    timeout_s: Positive = 600.0
    """Seconds in which no rank makes progress, after which the run is ended on all ranks."""

    def external_settings(self) -> list[ExternalSetting]:
        """What the file that this config was read from states about other fields of the run's config."""
        return []

    def refusal(self, sharding: Sharding) -> str | None:
        """Why an optimizer with this sharding would silently differ under the strategy; None if it does not."""
        raise NotImplementedError(type(self))

    @property
    def miscounts(self) -> str | None:
        """Why an optimizer that counts steps in its groups would silently differ; None if it does not."""
        return None

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """Why these fields cannot work with the precision, or with the value of `runtime.compile`."""
        yield from ()

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> StrategyLaw:
        """What a rank keeps and sends in a step; with the laws of model and optimizer it gives the rank's price.

        Args:
            weights: all parameters, in the model's order.
            groups: names of the trained parameters, by the optimizer's groups.
            work: what a step does on the rank.
            rank: the index of the rank.
        """
        raise NotImplementedError(type(self))

    def build(self, inputs: StrategyInputs) -> Strategy:
        """Sets up the model and its optimizer on this process."""
        raise NotImplementedError(type(self))
