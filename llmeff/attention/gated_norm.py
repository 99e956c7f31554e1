"""Gated RMS normalization of the scan's output. Mixers with a state apply it before their output projection."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import fla, norm
from llmeff.attention.mixer import Initialized
from llmeff.attention.norm import RMSNorm, at_least_float32
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * activation(gate), computed in float32 or wider (Sun et al. 2023; Yang et al. 2024).

    Args:
        width: W, the size of the last dimension.
        eps: added under the square root.
        activation: function applied to the gate.
    """

    def __init__(self, width: int, eps: float, activation: Literal["silu", "sigmoid"] = "silu"):
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.activation: Literal["silu", "sigmoid"] = activation

    def forward(self, x: Tensor, gate: Tensor, *, fused: bool = False) -> Tensor:
        """Maps x and gate, both (..., W), to (..., W) in the dtype of the gate.

        `fused` is whether to use flash-linear-attention's kernel, as `fla.fuses` decides.
        """
        if fused:
            return fla.gated_rms_norm(x, gate, self.norm.weight, self.norm.eps, self.activation).to(gate.dtype)
        gated: Tensor = self.norm(x) * (F.silu if self.activation == "silu" else torch.sigmoid)(at_least_float32(gate))
        return gated.to(gate.dtype)


class GroupedRMSNorm(Initialized):
    """RMSNorm(x * silu(gate)) over groups of channels, in float32 or wider. Applies the gate first (Dao and Gu 2024).

    Args:
        width: W, the size of the last dimension.
        num_groups: number of groups. It divides `width`.
        eps: added under the square root.
    """

    def __init__(self, width: int, num_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.num_groups, self.eps = num_groups, eps

    def initial(self) -> dict[str, Tensor]:
        """Returns a weight of ones."""
        return {"weight": torch.ones_like(self.weight)}

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Maps x and gate, both (..., W), to (..., W) in the dtype of the gate."""
        gated = (at_least_float32(x) * F.silu(at_least_float32(gate))).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(gate.dtype)


def law(tape: Tape, x: Array, gate: Array, keeps: Literal["input", "output"] = "input") -> Array:
    """Records the price of `GatedRMSNorm.forward`. Call it while the tape is inside the module's scope (`Tape.within`).

    `keeps` names the tensor that the activation saves for backward: silu saves its input, sigmoid its output.
    """
    with tape.within("norm"):
        normed = norm.law(tape, x)
    opened = laws.function(tape, laws.cast(tape, gate, "float32"), keeps)
    return laws.cast(tape, laws.multiply(tape, normed, opened), gate.dtype)


def grouped_law(tape: Tape, x: Array, gate: Array, num_groups: int) -> Array:
    """Records the price of `GroupedRMSNorm.forward`. Call it while the tape is inside the module's scope."""
    weight = tape.weight("weight", x.shape[-1])
    opened = laws.silu(tape, laws.cast(tape, gate, "float32"))
    gated = laws.multiply(tape, x, opened)
    del opened
    node = tape.save((gated,), (gated,), partial(_groups_back, tape))
    inverse_rms = tape.elementwise((*x.shape[:-1], num_groups), "float32")
    tape.save_output(node, inverse_rms)
    normed = tape.elementwise(x.shape, "float32", node)
    del gated
    return laws.cast(tape, laws.times(tape, normed, weight), gate.dtype)


def _groups_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    normed = tape.new(gradient.shape, gradient.dtype)
    weighted = tape.new(gradient.shape, gradient.dtype)
    del normed, weighted
    return (tape.new(gradient.shape, gradient.dtype),)
