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
    """torch.optim.SGD in its foreach form, since the fused form cannot update FSDP2's rows.

    Its decay is not decoupled: it is added to the gradient.
    """

    sharding: ClassVar[Sharding] = "elementwise"

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    """Peak learning rate; the schedule scales it."""
    momentum: BelowOne = 0.9
    """Decay rate of the sum of gradients; 0: no momentum."""
    nesterov: Flag = False
    """Use Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """The gradient of matrices and embeddings gains this times the parameter."""

    def build(self, rows: list[ParameterInfo]) -> torch.optim.SGD:
        """Builds torch's optimizer over groups with and without decay."""
        groups = self.parameter_groups(rows)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """One moment in the format of the updated parameters; none without momentum."""
        moment_bytes = BYTES[precision.master or precision.parameters] if self.momentum else 0
        return state_price(weights, lambda weight: weight.size * moment_bytes)
