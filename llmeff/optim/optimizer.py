"""Base class of optimizer configs."""

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
    """Returns the price of state that stays in memory for the whole step.

    Args:
        weights: the parameters.
        num_bytes: function that returns the bytes of a parameter's state.
    """
    entries: Counter[tuple[Kind, str]] = Counter()
    for weight in weights:
        state_bytes = num_bytes(weight)
        entries["optimizer_bytes", weight.part] += state_bytes
        entries["peak_bytes", "optimizer"] += state_bytes
    return Price(entries)


class OptimizerConfig(Component, family="optimizer"):
    """The optimizer that updates the parameters."""

    sharding: ClassVar[Sharding] = "none"
    """How finely ranks may split the optimizer without changing its update. By default, not at all."""

    rounds_state: ClassVar[bool] = False
    """Whether the state is quantized more coarsely than the parameters, so that a rounding error in a gradient may
    change a quantized value."""
    whatever_size: ClassVar[Mapping[str, object]] = {}
    """Values of config fields with which the optimizer treats small parameters like large ones."""

    name: Text
    """The optimizer's name."""
    lr: Positive = 1e-3
    """Peak learning rate, which the schedule scales."""

    def resolve(self, *, is_bfloat16_fast: bool) -> Self:
        """Returns the config with every "auto" replaced by its value.

        Args:
            is_bfloat16_fast: whether the run's devices multiply bfloat16 faster than float32.
        """
        return self

    def groups(self, roles: Mapping[str, Role]) -> list[list[str]]:
        """Returns the names of the parameters in each of the optimizer's groups. No group is empty.

        Args:
            roles: roles of the parameters by name, in the model's order.
        """
        raise NotImplementedError(type(self))

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """Builds the optimizer for these parameters. The `lr` of each group is the peak learning rate."""
        raise NotImplementedError(type(self))

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of the state, which stays in memory for the whole step, and of the update."""
        raise NotImplementedError(type(self))
