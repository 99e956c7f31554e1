"""Heads of queries, keys and values: projections, repetition, rotary positions, and base classes of mixers."""

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
    """Splits the last dimension into heads: (B, T, N H) to (B, T, N, H)."""
    return cast(Tensor, x.unflatten(-1, (num_heads, -1)))


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """Repeats each head N / K times, as in grouped-query attention: (B, T, K, .) to (B, T, N, .)."""
    groups = num_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys, (B, N, T, H), by their rotary angles (Su et al. 2021). Keeps the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class ProjectedMixer(Mixer):
    """Base class of mixers with query, key, value and output projections.

    Queries have N heads; keys and values have K heads. The projections have the same names as in transformers' Llama.

    Args:
        shape: the dimensions of the layer.
        key_width: width of the queries and keys of each head. None means H.
        value_width: width of the values of each head. None means H.
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
    """Base config of mixers with rotary positions, whose heads all have width H.

    Queries are (B, N, T, H). Keys and values are (B, K, T, H). Queries and keys are rotated by position.
    """

    qk_norm: Flag = False
    """Normalize queries and keys per head before the rotation (Dehghani et al. 2023; as in Qwen3)."""
    kernel: Literal["sdpa", "flex"] = "sdpa"
    """Implementation of attention for masks other than a plain causal mask.

    "sdpa" is torch's scaled_dot_product_attention with a bias. "flex" is torch's FlexAttention for whole rows on GPUs,
    and sdpa elsewhere. Prices always assume sdpa."""

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Returns an error if a run on the CPU uses kernel 'flex', because FlexAttention trains only on GPUs."""
        no_gpu = f"mixer {self.name!r}: kernel 'flex' trains only on GPUs, but this run is on the CPU; use 'sdpa'"
        return [no_gpu] if self.kernel == "flex" and on_cpu else []

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `HeadsMixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
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
        """Records the price of `HeadsMixer.mix` in training, without a cache, on the tape."""
        raise NotImplementedError(type(self))


class HeadsMixer(ProjectedMixer):
    """Base class of mixers that project the input, rotate queries and keys, call `mix` and project its result.

    Parameters have the same names as in transformers' Llama and Qwen3.
    """

    def __init__(self, config: HeadsConfig, shape: MixerShape):
        super().__init__(shape)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if config.qk_norm else None

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, which the layers share."""
        layout.rotary(self.shape.head_dim, self.shape.rope_theta)

    @abstractmethod
    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """Mixes the values of the tokens that each query sees.

        Args:
            query: (B, N, T, H), of the new tokens.
            key: (B, K, T, H), of the new tokens.
            value: (B, K, T, H), of the new tokens.
            layout: positions, documents and padding.
            cache: stores what later tokens need, such as keys and values. None in training.

        Returns:
            (B, T, N H).
        """

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
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
    """Records the price of a linear projection of (B, T, D) and of `split` on the tape. Returns (B, T, N, H)."""
    weight = tape.weight(f"{name}.weight", num_heads * head_dim, x.shape[-1])
    return laws.linear(tape, x, weight).view(*x.shape[:-1], num_heads, head_dim)


def heads_first_law(tape: Tape, name: str, x: Array, num_heads: int, head_dim: int) -> Array:
    """Calls `project` and returns its result viewed as (B, N, T, H). The memory layout stays (B, T, N, H)."""
    return project(tape, name, x, num_heads, head_dim).view(x.shape[0], num_heads, x.shape[1], head_dim)


def repeated_law(tape: Tape, x: Array, num_heads: int) -> Array:
    """Records the price of `repeated` on the tape."""
    if num_heads == x.shape[2]:
        return x
    node = None if x.node is None else tape.save((x,), (), partial(_repeated_back, tape, x.shape))
    return tape.elementwise((*x.shape[:2], num_heads, *x.shape[3:]), x.dtype, node)


def _repeated_back(tape: Tape, shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def rotate_law(tape: Tape, x: Array, cos: Array, sin: Array) -> Array:
    """Records the price of `rotate` on the tape."""
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
