"""Several optimizers that act as one optimizer. Each updates its own parameters."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Steps several optimizers that share no parameters. Its groups and states are the optimizers' own, not copies.

    Args:
        optimizers: the optimizers, at least one.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = tuple(optimizers)
        super().__init__([{"params": list(_parameters(optimizer))} for optimizer in self.optimizers], {})
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.state = _States(self.optimizers)  # type: ignore[assignment]  # only used as a mapping

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every optimizer. Returns the closure's loss, or None without a closure."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


class _States(MutableMapping[Tensor, Any]):
    """Mapping from each parameter to its state, which is stored in the optimizer that updates the parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self._optimizers = optimizers
        self._owners = {parameter: optimizer for optimizer in optimizers for parameter in _parameters(optimizer)}

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owners[parameter].state[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._owners[parameter].state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owners[parameter].state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)
