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
    """What a strategy sets up on this process."""

    model: nn.Module
    """The whole model, on the device."""
    parameter_infos: Callable[[nn.Module], list[ParameterInfo]]
    """The parameters to train, of the model as it is when asked."""
    optimizer: Callable[[list[ParameterInfo]], Optimizer]
    """Builds the optimizer of parameters."""
    device: torch.device
    """Where this process computes."""
    precision: Precision
    """The number formats."""
    micro_batch: int
    """Rows a forward pass on one rank."""
    num_micro_batches: int
    """Micro-batches a step on one rank."""
    clip_norm: float | None
    """The norm that gradients are scaled down to; None: never."""


class Strategy(ABC):
    """A model and its optimizer, set up on this process, and the collective parts of a step."""

    model: nn.Module
    """The model whose forward a step calls; under no_grad too."""
    optimizer: Optimizer
    """What updates this process's share; its groups hold the learning rate."""

    begun: list[Entries]
    """What the optimizer's groups held before its first step."""

    def __init__(self, inputs: StrategyInputs):
        self.device = inputs.device
        self.world: World = world()
        self.num_parameters = sum(parameter.numel() for parameter in inputs.model.parameters())
        """Trained and frozen, of the whole model, shared ones once."""
        self.num_trained = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
        """Trained."""
        self._plain = inputs.model

    def accumulate(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; after the last one's, gradients are those of all ranks."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model as it is when it does not learn."""
        self.model.eval()
        yield self.model
        self.model.train()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds this share's gradients; `loss` is the share's sum over the step's global count."""

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        return group.total(value)

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
    def loss_scale(self) -> float | None:
        """The factor of fp16's loss scaling; None where there is none."""
        return None

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only mean that loss scaling skips this step and goes lower."""
        return False

    @abstractmethod
    def owners(self) -> list[ShardOwner]:
        """What this rank owns of weights and optimizer state; together the ranks own everything once."""

    def owned(self) -> list[ShardOwner]:
        """What this rank updates, whoever owns it: where every rank updates everything, one saves and all load."""
        return self.owners()

    def resident(self) -> Iterable[Tensor]:
        """The tensors that live between steps on this process."""
        yield from self._plain.parameters()
        yield from self._plain.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's weights and buffers, on the main rank; elsewhere it may be empty. All ranks call it."""
        return stored_tensors(self._plain)

    def extra_state(self) -> dict[str, Any]:
        """What else training goes on from, as JSON: the loss scaling."""
        return {}

    def load_extra_state(self, others: Mapping[str, Any]) -> None:  # noqa: B027  there may be nothing
        """Puts back what `extra_state` gave."""

    def save(self, folder: Path) -> None:
        """Writes this rank's share of all that training goes on from: weights, optimizer state, loss scaling."""
        buffers = {
            name: tensor for name, tensor in stored_tensors(self._plain).items() if _is_buffer(self._plain, name)
        }
        save(folder, self.world.rank, self.owners(), self.optimizer, self.begun, buffers, self.extra_state())

    def load(self, folder: Path) -> None:
        """Puts back what any strategy's `save` wrote on any number of ranks.

        Raises:
            ConfigError: it is another model's, or an optimizer's whose state cannot be cut as it must be here.
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
        """Puts the model's weights and buffers back, in the form in which forward reads them."""

    def close(self) -> None:  # noqa: B027  there may be nothing
        """Lets go of what the process keeps for the engine."""


def _is_buffer(model: nn.Module, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last in model.get_submodule(module)._buffers


class StrategyConfig(Component, family="strategy"):
    """How many processes train together, and what each holds."""

    precisions: ClassVar[tuple[PrecisionName, ...]]
    """The precisions that it can train in."""
    joins: ClassVar[bool] = True
    """Whether its processes make a group, be it of one."""
    launch_flags: ClassVar[tuple[str, ...]] = ("--multi_gpu",)
    """The flags of `accelerate launch` that start its processes, on a CPU too; the first is the one to use."""

    name: Text
    """The strategy's name."""
    ranks: Count = 1
    """How many processes."""
    timeout_s: Positive = 600.0
    """How long a rank may go without progress before the run is ended everywhere."""

    def external_settings(self) -> list[ExternalSetting]:
        """What a file that it was read from states of fields elsewhere in the config."""
        return []

    def refusal(self, sharding: Sharding) -> str | None:
        """Why an optimizer of this kind would not be itself here; None where it is."""
        raise NotImplementedError(type(self))

    @property
    def miscounts(self) -> str | None:
        """Why an optimizer that counts its steps in its groups would not be itself here; None where it is."""
        return None

    def clashes(self, precision: PrecisionName, compiled: str) -> Iterator[str]:
        """What of a precision that it trains in, or of `runtime.compile`, cannot work with these fields, and why."""
        yield from ()

    def strategy_law(self, weights: list[Weight], groups: list[list[str]], work: Workload, rank: int) -> StrategyLaw:
        """What a rank keeps and sends in a step: with the laws of the model and the optimizer, the rank's price.

        Args:
            weights: the parameters, in the model's order.
            groups: the trained ones' names, by the optimizer's groups.
            work: what the step does on the rank.
            rank: which one.
        """
        raise NotImplementedError(type(self))

    def build(self, inputs: StrategyInputs) -> Strategy:
        """Sets the model, its parameters and their optimizer up on this process."""
        raise NotImplementedError(type(self))
