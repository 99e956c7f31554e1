"""Linear attention: elu(x) + 1 as the features of queries and keys."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from llmeff.attention.kernel import KernelConfig, KernelMixer
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, N heads, K key-value heads, H head width


class Linear(KernelConfig):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236). It has no position encoding."""

    name: Literal["linear"] = "linear"

    def build(self, shape: MixerShape) -> "LinearMixer":
        """Builds a layer's mixer."""
        return LinearMixer(self, shape)

    def features_law(
        self, shape: MixerShape, tape: Tape, query: Array, key: Array, batch: laws.Batch
    ) -> tuple[Array, Array, None]:
        """Records the price of `positive` for queries and keys. elu saves its input, and adding 1 makes a new array."""
        query, key = (
            laws.shift(tape, laws.function(tape, laws.cast(tape, x, "float32"), "input")) for x in (query, key)
        )
        return query, key, None

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state per head, including its column for the sums of weights."""
        return 4 * shape.num_heads * shape.head_dim * (shape.head_dim + 1)


class LinearMixer(KernelMixer):
    """Module of linear attention: phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020, equation 7)."""

    def features(
        self, query: Tensor, key: Tensor, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, None]:
        """Returns features of queries, (B, T, N, H), and of keys, (B, T, K, H), and None for no rescaling of sums."""
        return positive(query), positive(key), None


def positive(x: Tensor) -> Tensor:
    """Returns elu(x) + 1, in float32 or wider."""
    return F.elu(at_least_float32(x)) + 1
