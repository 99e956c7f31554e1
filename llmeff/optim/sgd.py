"""SGD: stochastic gradient descent with momentum (Robbins and Monro 1951; Sutskever et al. 2013)."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch

from llmeff.core.config import BelowOne, Flag, NotNegative, Positive
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import BYTES, Precision
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Price
from llmeff.optim.decay_groups import DecayGroupsConfig
from llmeff.optim.optimizer import state_price


class SGD(DecayGroupsConfig):
    """torch.optim.SGD in its foreach form, because the fused form cannot update the rows that FSDP2 gives a rank.

    The weight decay is not decoupled: it is added to the gradient.
    """

    sharding: ClassVar[Sharding] = "elementwise"

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    """Peak learning rate, which the schedule scales."""
    momentum: BelowOne = 0.9
    """Decay rate of the sum of past gradients. 0 disables momentum."""
    nesterov: Flag = False
    """Use Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """L2 penalty of matrices and embeddings: this value times the parameter is added to the gradient."""

    def build(self, rows: list[ParameterInfo]) -> torch.optim.SGD:
        """Builds torch.optim.SGD for one group of parameters with weight decay and one without."""
        groups = self.parameter_groups(rows)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of one moment in the dtype of the updated parameters. Without momentum, it is 0."""
        moment_bytes = BYTES[precision.master or precision.parameters] if self.momentum else 0
        return state_price(weights, lambda weight: weight.size * moment_bytes)
