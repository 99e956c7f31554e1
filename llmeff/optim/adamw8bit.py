"""AdamW with its moments in 8 bits, quantized block by block (Dettmers et al. 2022)."""

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
"""Numbers that share a scale."""
_CODES = 256
"""Values that 8 bits stand for, of each moment, as float32."""


class AdamW8bit(DecayGroupsConfig):
    """bitsandbytes.optim.AdamW8bit. A block must lie in one parameter, so a slice of many is another optimizer."""

    sharding: ClassVar[Sharding] = "whole_tensor"
    rounds_state: ClassVar[bool] = True
    whatever_size: ClassVar[Mapping[str, object]] = {"min_8bit_size": 1}

    name: Literal["adamw8bit"] = "adamw8bit"
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    min_8bit_size: Count = 4096
    """Parameters with fewer numbers keep their moments in float32."""

    def build(self, rows: list[ParameterInfo]) -> Optimizer:
        """The groups, with their decay."""
        try:
            import bitsandbytes.optim
        except ImportError:
            raise ConfigError('optim "adamw8bit" needs bitsandbytes: pip install "llmeff[optim]"') from None
        check_tested("bitsandbytes")
        kind: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]  # it has no list of what it exports
        optimizer: Optimizer = kind(
            self.parameter_groups(rows),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer

    def price(self, weights: Iterable[Weight], precision: Precision) -> Price:
        """Two moments of a byte with a float32 scale a block, and one table of codes for each moment."""
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
