"""Softmax attention: multi-head, grouped-query or multi-query, with rotary positions."""

from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import norm
from llmeff.attention.mixer import LayerCache, Mixer, MixerConfig, MixerShape
from llmeff.attention.norm import RMSNorm
from llmeff.core.config import Flag
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T queries, S keys, D width, N heads, K key-value heads, H head width


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns (B, N, T, H) queries or keys by their rotary angles, in x's precision."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """softmax(q k' / sqrt(H)) v over the keys that the layout lets each query see.

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H), K divides N.
        value: (B, K, S, H).
        layout: who sees whom.

    Returns:
        (B, N, T, H).
    """
    bias = layout.bias(key.shape[2], value.dtype)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)


class Softmax(MixerConfig):
    """Softmax attention (Vaswani et al. 2017; GQA: Ainslie et al. 2023) with rotary positions (Su et al. 2021)."""

    extends: ClassVar[bool] = True

    name: Literal["softmax"] = "softmax"
    qk_norm: Flag = False
    """Normalize queries and keys per head before they are turned (Dehghani et al. 2023; as in Qwen3)."""

    def build(self, shape: MixerShape) -> "SoftmaxMixer":
        """The module."""
        return SoftmaxMixer(self, shape)

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Projections, turns and attention; names live as long as in `SoftmaxMixer.forward`."""

        def heads(projection: str, num_heads: int) -> Array:
            weight = tape.weight(f"{projection}.weight", num_heads * shape.head_dim, shape.width)
            num_rows, num_tokens, _ = x.shape
            return laws.linear(tape, x, weight).view(num_rows, num_heads, num_tokens, shape.head_dim)

        query = heads("q_proj", shape.num_heads)
        key = heads("k_proj", shape.num_kv_heads)
        value = heads("v_proj", shape.num_kv_heads)
        if self.qk_norm:
            with tape.within("q_norm"):
                normed_query = norm.law(tape, query)
            with tape.within("k_norm"):
                query, key = normed_query, norm.law(tape, key)
            del normed_query
        cos, sin = batch.rotary(shape.head_dim, shape.rope_theta)
        query, key = rotate_law(tape, query, cos, sin), rotate_law(tape, key, cos, sin)
        mixed = laws.attention(tape, query, key, value, batch.bias(value.dtype))
        weight = tape.weight("o_proj.weight", shape.width, shape.num_heads * shape.head_dim)
        return laws.linear(tape, laws.joined_heads(tape, mixed), weight)

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Every key and value."""
        return 2 * shape.num_kv_heads * shape.head_dim * num_tokens * number_bytes


class SoftmaxMixer(Mixer):
    """Projections around `attend`. Parameter names are those of transformers' Llama and Qwen3."""

    def __init__(self, config: Softmax, shape: MixerShape):
        super().__init__()
        self.shape = shape
        query_width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, query_width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.width, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        head_dim = self.shape.head_dim
        query = self.q_proj(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        key = self.k_proj(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = layout.rotary(head_dim, self.shape.rope_theta)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = attend(query, key, value, layout)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).flatten(-2)))

    def output_projections(self) -> list[nn.Linear]:
        """The projection of the heads' outputs."""
        return [self.o_proj]


def rotate_law(tape: Tape, x: Array, cos: Array, sin: Array) -> Array:
    """The price of `rotate`."""
    kept = laws.scale(tape, x, laws.cast(tape, cos, x.dtype))
    node = tape.save((x,), (), partial(_swap_back, tape))
    tape.elementwise((x.size // 2,), x.dtype)  # -second
    swapped = tape.elementwise(x.shape, x.dtype, node)
    turned = laws.scale(tape, swapped, laws.cast(tape, sin, x.dtype))
    del swapped
    return laws.add(tape, kept, turned)


def _swap_back(tape: Tape, gradient: Array) -> tuple[Array]:
    half = tape.new((gradient.size // 2,), gradient.dtype)
    joined = tape.new(gradient.shape, gradient.dtype)
    del half
    return (joined,)
