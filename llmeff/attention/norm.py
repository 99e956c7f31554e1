"""Root-mean-square normalization that keeps only its input and one number a row for backward."""

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w. Autograd would keep x / rms(x) as well; here it is made again from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        wide = grad.float()
        grad_weight = (wide * normed).flatten(0, -2).sum(0)
        weighted = wide * weight
        along = (weighted * normed).mean(-1, keepdim=True)
        grad_x = weighted.addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square layer normalization (Zhang and Sennrich 2019), computed in float32.

    Args:
        width: D, the size of the last dimension.
        eps: added under the root.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normed
