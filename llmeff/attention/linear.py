"""Linear attention: elu(x) + 1 as the features of queries and keys."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from llmeff.attention.kernel import KernelMixer
from llmeff.attention.mixer import LayerCache, MixerConfig, MixerShape
from llmeff.attention.norm import wide
from llmeff.core.layout import Layout

# B batch, T tokens, N heads, K key-value heads, H head width


class Linear(MixerConfig):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236); only causality tells it of positions."""

    name: Literal["linear"] = "linear"

    def build(self, shape: MixerShape) -> "LinearMixer":
        """The module."""
        return LinearMixer(shape)

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """A state for each head, with a column of sums."""
        return 4 * shape.num_heads * shape.head_dim * (shape.head_dim + 1)


class LinearMixer(KernelMixer):
    """phi(x) = psi(x) = elu(x) + 1 (equation 7)."""

    def features(
        self, query: Tensor, key: Tensor, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, None]:
        """(B, T, N, H), (B, T, K, H) and nothing."""
        return F.elu(wide(query)) + 1, F.elu(wide(key)) + 1, None
