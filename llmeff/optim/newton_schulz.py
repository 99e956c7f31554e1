"""Momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024), in float32 or bfloat16."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

IterationFormat = Literal["float32", "bfloat16"]
"""Number format of the iterations. float32: float64 matrices stay in float64. bfloat16: faster on devices with matrix
units (GPUs, CPUs with AMX), and slow on other CPUs."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that brings singular values near 1 in five iterations (Jordan et al. 2024)."""
_LEAST = 1e-7
"""Lower bound of the norm by which a matrix is divided."""


def orthogonalize(x: Tensor, num_iterations: int, iteration_format: IterationFormat) -> Tensor:
    """Moves all singular values of a matrix near 1. After five iterations, they are between about 0.7 and 1.2.

    Args:
        x: (rows, columns), in any floating-point format.
        num_iterations: number of iterations of the quintic polynomial.
        iteration_format: number format of the iterations.

    Returns:
        (rows, columns), in the format of the iterations.
    """
    dtype = torch.bfloat16 if iteration_format == "bfloat16" else torch.promote_types(x.dtype, torch.float32)
    a, b, c = _COEFFICIENTS
    is_tall = x.shape[0] > x.shape[1]
    y = x.to(dtype)
    y = y.mT if is_tall else y
    y = y / y.norm().clamp(min=_LEAST)
    for _ in range(num_iterations):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if is_tall else y


class OrthogonalMomentum(Optimizer):
    """Updates matrices by their orthogonalized momentum, scaled to the size of AdamW's updates.

    The update is the orthogonalized momentum times lr * 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, equation 4). The
    matrix decays by lr * `weight_decay`. `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` does the same, but
    always in bfloat16.

    Args:
        parameters: whole matrices. A parameter with more dimensions is flattened to a matrix whose rows are its first
            dimension.
        lr: the learning rate.
        momentum: decay rate of the moving average of gradients.
        nesterov: whether to use Nesterov momentum.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        num_iterations: number of iterations, see `orthogonalize`.
        iteration_format: number format of the iterations, see `orthogonalize`.

    Raises:
        ValueError: a parameter has fewer than two dimensions.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        num_iterations: int,
        iteration_format: IterationFormat,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self._num_iterations, self._iteration_format = num_iterations, iteration_format
        shapes = [tuple(parameter.shape) for group in self.param_groups for parameter in group["params"]]
        wrong = [shape for shape in shapes if len(shape) < 2]
        if wrong:
            raise ValueError(f"only matrices can be orthogonalized, but a parameter has the shape {wrong[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every matrix that has a gradient. Returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrix = ahead.flatten(1)
        update = orthogonalize(matrix, self._num_iterations, self._iteration_format).view_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * sqrt(max(matrix.shape)))
