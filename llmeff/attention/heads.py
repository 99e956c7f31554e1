"""Heads of queries, keys and values: projections, sharing, rotation, and the mixers that are a function of them."""

from abc import abstractmethod
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from llmeff.attention import norm
from llmeff.attention.mixer import LayerCache, Mixer, MixerConfig, MixerShape
from llmeff.attention.norm import RMSNorm
from llmeff.core.config import Flag
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads, K key-value heads, H head width


def split(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, N H) to (B, T, N, H)."""
    return cast(Tensor, x.unflatten(-1, (num_heads, -1)))


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, K, .) to (B, T, N, .): repeats each head N / K times, as in grouped-query attention."""
    groups = num_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (B, N, T, H) queries or keys by their rotary angles (Su et al. 2021), in x's format."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class ProjectedMixer(Mixer):
    """Projections of N query heads, K key and value heads, and the output. Names are those of transformers' Llama.

    Args:
        shape: the widths of the layer.
        key_width: width of a head's queries and keys; None: H.
        value_width: width of a head's values; None: H.
    """

    def __init__(self, shape: MixerShape, *, key_width: int | None = None, value_width: int | None = None):
        super().__init__()
        self.shape = shape
        key_width, value_width = key_width or shape.head_dim, value_width or shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.num_heads * key_width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.num_kv_heads * key_width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.num_kv_heads * value_width, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * value_width, shape.width, bias=False)


class HeadsConfig(MixerConfig):
    """A mixer of (B, N, T, H) queries and (B, K, T, H) keys and values; queries and keys are rotated by position."""

    qk_norm: Flag = False
    """Normalize queries and keys per head before the rotation (Dehghani et al. 2023; as in Qwen3)."""
    kernel: Literal["sdpa", "flex"] = "sdpa"
    """Implementation for masks that are more than causal. sdpa: torch's scaled_dot_product_attention with a bias. flex:
    torch's FlexAttention for whole rows on GPUs, sdpa elsewhere. Prices are those of sdpa."""

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Reports a missing GPU for FlexAttention."""
        no_gpu = f"mixer {self.name!r}: kernel 'flex' trains only on GPUs, but this run is on the CPU; use 'sdpa'"
        return [no_gpu] if self.kernel == "flex" and on_cpu else []

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Projections, rotation and the price of `mix`; variables live as long as in `HeadsMixer.forward`."""
        query, key, value = self._heads_law(shape, tape, x, batch)
        mixed = self.mix_law(tape, query, key, value, batch)
        weight = tape.weight("o_proj.weight", shape.width, shape.num_heads * shape.head_dim)
        return laws.linear(tape, mixed, weight)

    def _heads_law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> tuple[Array, Array, Array]:
        query = heads_first_law(tape, "q_proj", x, shape.num_heads, shape.head_dim)
        key = heads_first_law(tape, "k_proj", x, shape.num_kv_heads, shape.head_dim)
        value = heads_first_law(tape, "v_proj", x, shape.num_kv_heads, shape.head_dim)
        if self.qk_norm:
            with tape.within("q_norm"):
                normed_query = norm.law(tape, query)
            with tape.within("k_norm"):
                query, key = normed_query, norm.law(tape, key)
            del normed_query
        cos, sin = batch.rotary(shape.head_dim, shape.rope_theta)
        query, key = rotate_law(tape, query, cos, sin), rotate_law(tape, key, cos, sin)
        return query, key, value

    def mix_law(self, tape: Tape, query: Array, key: Array, value: Array, batch: laws.Batch) -> Array:
        """The price of `HeadsMixer.mix` in training."""
        raise NotImplementedError(type(self))


class HeadsMixer(ProjectedMixer):
    """Projections around `mix`. Parameter names are those of transformers' Llama and Qwen3."""

    def __init__(self, config: HeadsConfig, shape: MixerShape):
        super().__init__(shape)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Makes the rotary tables."""
        layout.rotary(self.shape.head_dim, self.shape.rope_theta)

    @abstractmethod
    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """(B, N, T, H) queries and (B, K, T, H) keys and values of the new tokens to (B, T, N H)."""

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        query, key, value = self._heads(x, layout)
        if cache is not None:
            key = key.to(value.dtype)  # autocast leaves normalized keys in float32
        mixed = self.mix(query, key, value, layout, cache)
        return cast(Tensor, self.o_proj(mixed))

    def _heads(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        query = split(self.q_proj(x), self.shape.num_heads).transpose(1, 2)
        key = split(self.k_proj(x), self.shape.num_kv_heads).transpose(1, 2)
        value = split(self.v_proj(x), self.shape.num_kv_heads).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = layout.rotary(self.shape.head_dim, self.shape.rope_theta)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, key, value


def project(tape: Tape, name: str, x: Array, num_heads: int, head_dim: int) -> Array:
    """The price of projecting (B, T, D) and of `split`: (B, T, N, H)."""
    weight = tape.weight(f"{name}.weight", num_heads * head_dim, x.shape[-1])
    return laws.linear(tape, x, weight).view(*x.shape[:-1], num_heads, head_dim)


def heads_first_law(tape: Tape, name: str, x: Array, num_heads: int, head_dim: int) -> Array:
    """The same as `project`, viewed as (B, N, T, H); in memory it stays (B, T, N, H)."""
    return project(tape, name, x, num_heads, head_dim).view(x.shape[0], num_heads, x.shape[1], head_dim)


def repeated_law(tape: Tape, x: Array, num_heads: int) -> Array:
    """The price of `repeated`."""
    if num_heads == x.shape[2]:
        return x
    node = None if x.node is None else tape.save((x,), (), partial(_repeated_back, tape, x.shape))
    return tape.elementwise((*x.shape[:2], num_heads, *x.shape[3:]), x.dtype, node)


def _repeated_back(tape: Tape, shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


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
