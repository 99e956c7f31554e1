"""Root-mean-square normalization that saves only its input and one number per row for backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmeff.cost.laws import promote
from llmeff.cost.tape import Array, Tape


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32; leaves other dtypes unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with x: the dtype of autocast if it is enabled, otherwise the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w. Autograd would save x and x / rms(x). This backward saves x and recomputes x / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = at_least_float32(x)
        inverse_rms = torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (full * inverse_rms).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # a second derivative would treat inverse_rms as a constant
            raise RuntimeError("RMSNorm supports only first derivatives: call backward without create_graph=True")
        x, weight, inverse_rms = ctx.saved_tensors
        normed = at_least_float32(x) * inverse_rms
        above = at_least_float32(grad)
        grad_weight = (above * normed).sum(dim=tuple(range(grad.dim() - 1)))
        weighted = above * weight
        along = (weighted * normed).mean(-1, keepdim=True)
        grad_x = weighted.addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


_rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply


class RMSNorm(nn.Module):
    """Root-mean-square layer normalization (Zhang and Sennrich 2019), computed in float32 or wider.

    Args:
        width: D, the size of the last dimension.
        eps: added under the square root.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension of x, (..., D)."""
        return _rms_norm(x, self.weight, self.eps)


def law(tape: Tape, x: Array) -> Array:
    """Records the price of `RMSNorm.forward`. Call it while the tape is inside the module's scope (`Tape.within`)."""
    weight = tape.weight("weight", x.shape[-1])
    node = tape.save((x, weight), (x,), partial(_law_back, tape))
    wide = x if x.dtype == "float32" else tape.elementwise(x.shape, "float32")
    square = tape.elementwise(wide.shape, "float32")
    inverse_rms = tape.elementwise((*x.shape[:-1], 1), "float32")
    del square
    tape.save_output(node, inverse_rms)
    normed = tape.elementwise(wide.shape, "float32")
    if x.dtype != "float32":
        normed = tape.elementwise(x.shape, x.dtype)
    return tape.elementwise(normed.shape, promote(x.dtype, weight.dtype), node)


def _law_back(tape: Tape, gradient: Array, x: Array, inverse_rms: Array) -> tuple[Array, Array]:
    normed = tape.new(x.shape, "float32")
    wide = gradient if gradient.dtype == "float32" else tape.new(x.shape, "float32")
    tape.new(wide.shape, "float32")  # wide * normed
    weighted = tape.new(wide.shape, "float32")
    tape.new(normed.shape, "float32")  # weighted * normed
    grad_x = weighted if x.dtype == "float32" else tape.new(x.shape, x.dtype)
    return grad_x, tape.new(x.shape[-1:], tape.precision.parameters)
