"""AdamW: adaptive moments with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch

from llmeff.core.config import BelowOne, Positive
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import BYTES, Precision
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Price
from llmeff.optim.decay_groups import DecayGroupsConfig
from llmeff.optim.optimizer import state_price


class AdamW(DecayGroupsConfig):
    """torch.optim.AdamW in its fused form. All devices that torch trains on support it for floating point."""

    sharding: ClassVar[Sharding] = "elementwise"

    name: Literal["adamw"] = "adamw"
    beta1: BelowOne = 0.9
    """Decay rate of the first moment."""
    beta2: BelowOne = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""

    def build(self, rows: list[ParameterInfo]) -> torch.optim.AdamW:
        """Builds torch.optim.AdamW for one group of parameters with weight decay and one without."""
        groups = self.parameter_groups(rows)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of two moments in the dtype of the updated parameters, and one step count per parameter."""
        moment_bytes = BYTES[precision.master or precision.parameters]
        return state_price(weights, lambda weight: 2 * weight.size * moment_bytes + BYTES["float32"])
