"""What mixers with a kernel in place of softmax's exponential have in common: features of queries and of keys."""

from abc import abstractmethod
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention.heads import repeated, split
from llmeff.attention.mixer import LayerCache, Mixer, MixerShape
from llmeff.attention.norm import wide
from llmeff.attention.scan import mix
from llmeff.core.layout import Layout

# B batch, T tokens, D width, N heads, K key-value heads, H head width, M features

_SMALLEST = 1e-30
"""The least sum of weights that is divided by: what padding reads is 0, and no number over nothing."""


class KernelMixer(Mixer):
    """o_t = (sum over s <= t of phi(q_t)' psi(k_s) v_s) / (sum over s <= t of phi(q_t)' psi(k_s)) (Katharopoulos et al. 2020, eq. 9).

    The sums of weights are one more column of the values, of ones. Parameter names are those of `SoftmaxMixer`.

    Args:
        shape: the widths.
    """

    def __init__(self, shape: MixerShape):
        super().__init__()
        self.shape = shape
        query_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, query_width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.width, bias=False)

    @abstractmethod
    def features(
        self, query: Tensor, key: Tensor, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is above 0 of queries and keys, in float32 or wider.

        Args:
            query: (B, T, N, H).
            key: (B, T, K, H).
            layout: who sees whom.
            cache: keeps what features of keys depend on beside the keys themselves.

        Returns:
            phi(q), (B, T, N, M), psi(k), (B, T, K, M), and by how much what was summed before a token is scaled for it,
            as a logarithm, (B, T, K, 1); None: by nothing.
        """

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        value = split(self.v_proj(x), num_kv_heads)
        query, key = split(self.q_proj(x), num_heads), split(self.k_proj(x), num_kv_heads)
        query, key, log_decay = self.features(query, key, layout, cache)
        key, counted = repeated(key, num_heads), repeated(F.pad(wide(value), (0, 1), value=1.0), num_heads)
        log_decay = None if log_decay is None else repeated(log_decay, num_heads)
        out = mix(query, key, counted, log_decay, None, layout, cache)
        out = out[..., :-1] / out[..., -1:].clamp(min=_SMALLEST)
        return cast(Tensor, self.o_proj(out.to(value.dtype).flatten(-2)))

    def output_projections(self) -> list[nn.Linear]:
        """The projection of the heads' outputs."""
        return [self.o_proj]
