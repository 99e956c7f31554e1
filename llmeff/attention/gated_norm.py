"""Normalization of each head's output, with a gate: how mixers with a state end."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention.norm import RMSNorm


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
        gated = self.norm(x) * self.activation(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        return gated.to(gate.dtype)
