"""Lion: updates by the sign of interpolated momentum (Chen et al. 2023, algorithm 2)."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch.optim import Optimizer

from llmeff.core.config import BelowOne, ConfigError, NotNegative, Positive
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import BYTES, Precision
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Price
from llmeff.optim.decay_groups import DecayGroupsConfig
from llmeff.optim.optimizer import state_price


class Lion(DecayGroupsConfig):
    """pytorch_optimizer.Lion. It needs at most a third of AdamW's learning rate, and at least 3 times AdamW's decay."""

    sharding: ClassVar[Sharding] = "elementwise"

    name: Literal["lion"] = "lion"
    lr: Positive = 3e-4
    """Peak learning rate, which the schedule scales."""
    beta1: BelowOne = 0.9
    """Weight of the momentum in the update. The gradient has weight 1 - beta1."""
    beta2: BelowOne = 0.99
    """Decay rate of the momentum."""
    weight_decay: NotNegative = 0.3
    """Decoupled weight decay of matrices and embeddings, times the learning rate. Norms and biases do not decay."""

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """Builds pytorch_optimizer's Lion for one group of parameters with weight decay and one without.

        Raises:
            ConfigError: pytorch_optimizer is not installed.
        """
        try:
            import pytorch_optimizer
        except ImportError:
            raise ConfigError('optim "lion" needs pytorch_optimizer: pip install "llmeff[optim]"') from None
        optimizer: Optimizer = pytorch_optimizer.Lion(
            self.parameter_groups(rows), lr=self.lr, betas=(self.beta1, self.beta2), weight_decouple=True
        )
        return optimizer

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of one moment in the dtype of the updated parameters."""
        moment_bytes = BYTES[precision.master or precision.parameters]
        return state_price(weights, lambda weight: weight.size * moment_bytes)
