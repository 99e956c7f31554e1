"""Normalization of each head's output, with a gate: how mixers with a state end."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention.mixer import Initialized
from llmeff.attention.norm import RMSNorm, wide


class GatedRMSNorm(nn.Module):
    """rmsnorm(x) * activation(gate), in float32 (Sun et al. 2023; Yang et al. 2024).

    Args:
        width: of the last dimension.
        eps: added under the root.
        activation: of the gate.
    """

    def __init__(self, width: int, eps: float, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(..., W) twice to (..., W), in the gate's format."""
        return (self.norm(x) * self.activation(wide(gate))).to(gate.dtype)


class GroupedRMSNorm(Initialized):
    """rmsnorm(x * silu(gate)) over groups of channels, in float32: the gate comes first (Dao and Gu 2024).

    Args:
        width: of the last dimension.
        num_groups: divides it.
        eps: added under the root.
    """

    def __init__(self, width: int, num_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.num_groups, self.eps = num_groups, eps

    def initial(self) -> dict[str, Tensor]:
        """A weight of 1."""
        return {"weight": torch.ones_like(self.weight)}

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(..., W) twice to (..., W), in the gate's format."""
        gated = (wide(x) * F.silu(wide(gate))).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(gate.dtype)
