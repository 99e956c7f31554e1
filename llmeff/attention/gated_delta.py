"""Gated DeltaNet: a state that decays, and gives up what it held for a key before it takes in another value for it."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention.gated_norm import GatedRMSNorm
from llmeff.attention.mixer import LayerCache, Mixer, MixerConfig, MixerShape
from llmeff.attention.scan import mix
from llmeff.attention.short_conv import ShortConv
from llmeff.core.config import Count
from llmeff.core.layout import Layout

# B batch, T tokens, D width, N heads of values, K heads of queries and keys, H head width


class GatedDelta(MixerConfig):
    """Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), as in Qwen3-Next.

    Values have `num_heads` heads, queries and keys `num_kv_heads`.
    """

    name: Literal["gated-deltanet"] = "gated-deltanet"
    conv: Count = 4
    """Tokens that the short convolution of queries, keys and values spans."""

    def build(self, shape: MixerShape) -> "GatedDeltaMixer":
        """The module."""
        return GatedDeltaMixer(self, shape)

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """A state for each head, and the last tokens of the convolution."""
        channels = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return 4 * shape.num_heads * shape.head_dim**2 + channels * (self.conv - 1) * number_bytes


class GatedDeltaMixer(Mixer):
    """S_t = (I - beta k k') exp(g) S_(t-1) + beta k v' with g = -exp(A) softplus(a x + dt), read by q, normalized and gated."""

    def __init__(self, config: GatedDelta, shape: MixerShape):
        super().__init__()
        self.shape = shape
        values, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, keys, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, values, bias=False)
        self.g_proj = nn.Linear(shape.width, values, bias=False)
        self.a_proj = nn.Linear(shape.width, shape.num_heads, bias=False)
        self.b_proj = nn.Linear(shape.width, shape.num_heads, bias=False)
        self.conv = ShortConv(2 * keys + values, config.conv)
        self.log_rate = nn.Parameter(torch.empty(shape.num_heads))
        self.step_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.o_norm = GatedRMSNorm(shape.head_dim, shape.norm_eps)
        self.o_proj = nn.Linear(values, shape.width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Rates uniform in 0.01 to 16, as in Qwen3-Next; steps by Mamba's rule."""
        return {
            "log_rate": torch.empty_like(self.log_rate).uniform_(0.01, 16).log(),
            "step_bias": initial_steps(self.step_bias),
        }

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        shape = self.shape
        mixed = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        heads = self.conv(mixed, layout, cache).unflatten(-1, (-1, shape.head_dim))
        query, key, value = heads.split((shape.num_kv_heads, shape.num_kv_heads, shape.num_heads), dim=2)
        query, key = unit(query) * shape.head_dim**-0.5, unit(key)
        groups = shape.num_heads // shape.num_kv_heads
        if groups > 1:
            query, key = query.repeat_interleave(groups, dim=2), key.repeat_interleave(groups, dim=2)
        steps = F.softplus(self.a_proj(x).float() + self.step_bias)
        log_decay = (-self.log_rate.exp() * steps)[..., None]
        out = mix(query, key, value, log_decay, self.b_proj(x).sigmoid(), layout, cache)
        gate = self.g_proj(x).unflatten(-1, (-1, shape.head_dim))
        return cast(Tensor, self.o_proj(self.o_norm(out, gate).flatten(-2)))

    def output_projections(self) -> list[nn.Linear]:
        """The projection of the heads' outputs."""
        return [self.o_proj]


def unit(x: Tensor) -> Tensor:
    """(..., H) of length 1, with 1e-6 under the root, as the kernels have it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def initial_steps(like: Tensor) -> Tensor:
    """Biases whose softplus is spread over 0.001 to 0.1, evenly in its logarithm (Gu and Dao 2023)."""
    steps = torch.empty_like(like).uniform_(-6.907755, -2.302585).exp()
    return steps + torch.log(-torch.expm1(-steps))
