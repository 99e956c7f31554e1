"""The contract of an optimizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Self

from torch.optim import Optimizer

from llmeff.core.config import Component, Positive, Text
from llmeff.core.parameters import ParameterInfo, Role, Sharding
from llmeff.core.precision import Precision
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Kind, Price


def state_price(weights: Iterable[Weight], num_bytes: Callable[[Weight], int]) -> Price:
    """The price of an optimizer state that lives throughout a step, given its bytes per parameter."""
    entries: Counter[tuple[Kind, str]] = Counter()
    for weight in weights:
        state_bytes = num_bytes(weight)
        entries["optimizer_bytes", weight.part] += state_bytes
        entries["peak_bytes", "optimizer"] += state_bytes
    return Price(entries)


class OptimizerConfig(Component, family="optimizer"):
    """The optimizer that updates the parameters."""

    sharding: ClassVar[Sharding] = "none"
    """What a strategy may split without changing the update. By default, nothing."""

    rounds_state: ClassVar[bool] = False
    """Whether its state is coarser than the parameters, so that a gradient's last digit may change the state by a code."""
    whatever_size: ClassVar[Mapping[str, object]] = {}
    """Field values that make it treat small parameters like large ones."""

    name: Text
    """The optimizer's name."""
    lr: Positive = 1e-3
    """Peak learning rate; the schedule scales it."""

    def resolve(self, *, is_bfloat16_fast: bool) -> Self:
        """Returns the config with every "auto" replaced by its value.

        Args:
            is_bfloat16_fast: whether the run's devices multiply bfloat16 faster than float32.
        """
        return self

    def groups(self, roles: Mapping[str, Role]) -> list[list[str]]:
        """Names of the parameters in each of the optimizer's groups, none of them empty.

        Args:
            roles: roles of the parameters by name, in the model's order.
        """
        raise NotImplementedError(type(self))

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """Builds the optimizer of these parameters; the `lr` of each group is the peak rate."""
        raise NotImplementedError(type(self))

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """The price of the state, which lives throughout a step, and of the update."""
        raise NotImplementedError(type(self))
