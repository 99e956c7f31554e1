"""AdamW with 8-bit moments, quantized block by block (Dettmers et al. 2022)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from llmeff.core.config import BelowOne, ConfigError, Count, Positive
from llmeff.core.parameters import ParameterInfo, Sharding
from llmeff.core.precision import BYTES, Precision
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Weight
from llmeff.cost.price import Kind, Price
from llmeff.optim.decay_groups import DecayGroupsConfig

_BLOCK = 256
"""Number of values in a quantization block. They share a scale."""
_CODES = 256
"""Number of entries in a moment's code table, which has the float32 value of each 8-bit code."""


class AdamW8bit(DecayGroupsConfig):
    """bitsandbytes.optim.AdamW8bit.

    Ranks may share out whole parameters, but must not split a parameter, because its state is quantized by block.
    """

    sharding: ClassVar[Sharding] = "whole_tensor"
    rounds_state: ClassVar[bool] = True
    whatever_size: ClassVar[Mapping[str, object]] = {"min_8bit_size": 1}

    name: Literal["adamw8bit"] = "adamw8bit"
    beta1: BelowOne = 0.9
    """Decay rate of the first moment."""
    beta2: BelowOne = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    min_8bit_size: Count = 4096
    """Parameters with fewer elements keep their moments in float32."""

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """Builds bitsandbytes' optimizer for one group of parameters with weight decay and one without.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        try:
            import bitsandbytes.optim
        except ImportError:
            raise ConfigError('optim "adamw8bit" needs bitsandbytes: pip install "llmeff[optim]"') from None
        check_tested("bitsandbytes")
        kind: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]  # it does not list its exports
        optimizer: Optimizer = kind(
            self.parameter_groups(rows),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Returns the price of two 8-bit moments with a float32 scale per block, and of a code table per moment."""
        entries: Counter[tuple[Kind, str]] = Counter()
        is_quantized = False
        for weight in weights:
            num_bytes = 2 * weight.size * BYTES["float32"]
            if weight.size >= self.min_8bit_size:
                num_bytes = 2 * (weight.size + -(-weight.size // _BLOCK) * BYTES["float32"])
                is_quantized = True
            entries["optimizer_bytes", weight.part] += num_bytes
        if is_quantized:
            entries["optimizer_bytes", "codes"] += 2 * _CODES * BYTES["float32"]
        entries["peak_bytes", "optimizer"] = sum(entries.values())
        return Price(entries)
