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
    """The price of a state that each parameter has so many bytes of, at every moment of a step."""
    entries: Counter[tuple[Kind, str]] = Counter()
    for weight in weights:
        own = num_bytes(weight)
        entries["optimizer_bytes", weight.part] += own
        entries["peak_bytes", "optimizer"] += own
    return Price(entries)


class OptimizerConfig(Component, family="optimizer"):
    """Which optimizer updates the parameters."""

    sharding: ClassVar[Sharding] = "none"
    """What a strategy may split without changing the update; an optimizer that does not say is not split."""

    rounds_state: ClassVar[bool] = False
    """Whether its state is of a coarser format than what it updates: the last digit of a gradient may move it by a code."""
    whatever_size: ClassVar[Mapping[str, object]] = {}
    """Fields with which it treats small parameters as it does large ones."""

    name: Text
    """The optimizer's name."""
    lr: Positive = 1e-3
    """Peak learning rate, which the schedule scales."""

    def resolve(self, *, is_bfloat16_fast: bool) -> Self:
        """The same, with every `auto` decided.

        Args:
            is_bfloat16_fast: whether the run's devices multiply bfloat16 faster than float32.
        """
        return self

    def groups(self, roles: Mapping[str, Role]) -> list[list[str]]:
        """The names of the parameters of each of the optimizer's groups, none of them empty.

        Args:
            roles: of the parameters, by name, in the model's order.
        """
        raise NotImplementedError(type(self))

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """The optimizer of these parameters; each group's `lr` is the peak."""
        raise NotImplementedError(type(self))

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Its state, which lives at every moment of a step."""
        raise NotImplementedError(type(self))
