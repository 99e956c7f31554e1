"""Softmax attention: multi-head, grouped-query or multi-query, with rotary positions."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.attention import flex
from llmeff.attention.heads import HeadsConfig, HeadsMixer
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.core import kernels
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T queries, S keys, N heads, K key-value heads, H head width


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """Computes softmax(scale q k') v over the keys that the layout lets each query see.

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H). K divides N.
        value: (B, K, S, H).
        layout: positions, documents and padding of the batch.
        scale: factor that multiplies the scores. None means 1 / sqrt(H).

    Returns:
        (B, N, T, H).
    """
    bias = layout.bias(key.shape[2], value.dtype)
    return attend_biased(query, key, value, bias, scale)


def attend_biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """Computes softmax(scale q k' + bias) v, see `attend`. The bias has shape (B or 1, 1, T, S).

    If the bias is None, uses a plain causal mask. There must then be as many keys as queries.
    """
    grouped = query.shape[1] != key.shape[1]
    kernels.ran(kernels.SDPA)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )


class Softmax(HeadsConfig):
    """Softmax attention (Vaswani et al. 2017; GQA: Ainslie et al. 2023)."""

    extends: ClassVar[bool] = True

    name: Literal["softmax"] = "softmax"

    def build(self, shape: MixerShape) -> "SoftmaxMixer":
        """Builds a layer's mixer."""
        return SoftmaxMixer(self, shape)

    def mix_law(self, tape: Tape, query: Array, key: Array, value: Array, batch: laws.Batch) -> Array:
        """Records the price of attention over whole rows on the tape."""
        mixed = laws.attention(tape, query, key, value, batch.bias(value.dtype))
        return laws.joined_heads(tape, mixed)

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of all keys and values."""
        return 2 * shape.num_kv_heads * shape.head_dim * num_tokens * number_bytes


class SoftmaxMixer(HeadsMixer):
    """Module of softmax attention to all earlier tokens of the document."""

    def __init__(self, config: Softmax, shape: MixerShape):
        super().__init__(config, shape)
        self.kernel = config.kernel

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, and the bias or block mask if there are documents or padding."""
        super().prepare(layout, num_rows, dtype)
        if self.kernel != "flex" or not layout.positions.is_cuda:
            layout.bias(layout.positions.shape[-1], dtype)
        elif not layout.is_plain:
            flex.block_mask(layout, "softmax", _sees)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """Lets each token attend to itself and to all earlier tokens of its document."""
        if not layout.is_plain and flex.takes(self.kernel, query, cache):
            mixed = flex.attend(query, key, value, flex.block_mask(layout, "softmax", _sees))
            return mixed.transpose(1, 2).flatten(-2)
        if cache is not None:
            key, value = cache.extend(key, value)
        return attend(query, key, value, layout).transpose(1, 2).flatten(-2)


def _sees(query: Tensor, key: Tensor) -> Tensor:
    return (key >= 0) & (key <= query)
