"""Gated linear attention: a mixer whose state decays per channel, by factors computed from each token."""

from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import fla, gated_norm, scan_law
from llmeff.attention.gated_norm import GatedRMSNorm
from llmeff.attention.heads import ProjectedMixer, project, repeated, repeated_law, split
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.norm import at_least_float32, product_dtype
from llmeff.attention.scan import LEAST, ScanConfig, mix
from llmeff.core.config import Count, Finite
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads, K key-value heads, H head width, W key width

_TEMPERATURE = 16.0
"""Divisor of the log decay. With it, untrained states last for many tokens (Yang et al. 2023, section 4.4)."""


class GLA(ScanConfig):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635)."""

    fuses: ClassVar[frozenset[str]] = frozenset({"gated_rms_norm"})

    name: Literal["gla"] = "gla"
    key_width: Count | Literal["auto"] = "auto"
    """W, width of the queries and keys of each head. "auto" means H / 2."""
    rank: Count = 16
    """Rank of the low-rank projection that computes the decays."""
    initial_bias: Finite = 0.0
    """b, initial bias of the decays. A token with x = 0 multiplies the state by sigmoid(b)^(1/16)."""

    def width(self, shape: MixerShape) -> int:
        """Returns W, the width of a head's queries and keys, as a number even if the config has "auto"."""
        return shape.head_dim // 2 if self.key_width == "auto" else self.key_width

    def build(self, shape: MixerShape) -> "GLAMixer":
        """Builds a layer's mixer."""
        return GLAMixer(self, shape)

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `GLAMixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        head_dim, width = shape.head_dim, self.width(shape)
        query, gate = project(tape, "q_proj", x, num_heads, width), project(tape, "g_proj", x, num_heads, head_dim)
        key = project(tape, "k_proj", x, num_kv_heads, width)
        value = project(tape, "v_proj", x, num_kv_heads, head_dim)
        low = project(tape, "f_a_proj", x, 1, self.rank).view(*x.shape[:2], self.rank)
        high = laws.cast(tape, project(tape, "f_b_proj", low, num_kv_heads, width), "float32")
        del low
        open_ = laws.plus(tape, high, tape.weight("decay_bias", num_kv_heads * width))
        del high
        log_decay = laws.function(tape, laws.function(tape, _logsigmoid_law(tape, open_), "nothing"), "input")
        query = laws.function(tape, query, "nothing")
        key, value, log_decay = (repeated_law(tape, own, num_heads) for own in (key, value, log_decay))
        out = scan_law.law(tape, query, key, value, log_decay, None)
        with tape.within("o_norm"):
            out = gated_norm.law(tape, out, gate).view(*x.shape[:2], num_heads * head_dim)
        return laws.linear(tape, out, tape.weight("o_proj.weight", shape.width, num_heads * head_dim))

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state per head."""
        return 4 * shape.num_heads * self.width(shape) * shape.head_dim


class GLAMixer(ProjectedMixer):
    """Module of gated linear attention: S_t = diag(exp(g)) S_(t-1) + k v' with g = log(sigmoid(f x + b)) / 16.

    f x + b is a low-rank projection of the layer's input x, plus `decay_bias`. The output S_t' q is normalized and
    gated (Yang et al. 2023, section 4.4). g is at least `scan.LEAST`, so that from one token to the next a channel
    keeps at least 0.7 % of its state.
    """

    def __init__(self, config: GLA, shape: MixerShape):
        width = config.width(shape)
        super().__init__(shape, key_width=width)
        self.kernel = config.kernel
        self.g_proj = nn.Linear(shape.width, shape.num_heads * shape.head_dim, bias=False)
        self.f_a_proj = nn.Linear(shape.width, config.rank, bias=False)
        self.f_b_proj = nn.Linear(config.rank, shape.num_kv_heads * width, bias=False)
        self.initial_bias = config.initial_bias
        self.decay_bias = nn.Parameter(torch.empty(shape.num_kv_heads * width))
        self.o_norm = GatedRMSNorm(shape.head_dim, shape.norm_eps)

    def initial(self) -> dict[str, Tensor]:
        """Returns the initial bias of the decays."""
        return {"decay_bias": torch.full_like(self.decay_bias, self.initial_bias)}

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        query, gate = split(self.q_proj(x), num_heads), split(self.g_proj(x), num_heads)
        key, value = split(self.k_proj(x), num_kv_heads), split(self.v_proj(x), num_kv_heads)
        open_ = at_least_float32(self.f_b_proj(self.f_a_proj(x))) + self.decay_bias
        log_decay = split((F.logsigmoid(open_) / _TEMPERATURE).clamp(min=LEAST), num_kv_heads)
        query = query * query.shape[-1] ** -0.5
        key, value, log_decay = (repeated(own, num_heads) for own in (key, value, log_decay))
        dtype = product_dtype(x)
        fused = fla.fuses(self.kernel, dtype, x.device, cache)
        out = mix(query, key, value, log_decay, None, layout, cache, self.kernel, dtype)
        return cast(Tensor, self.o_proj(self.o_norm(out, gate, fused=fused).flatten(-2)))


def _logsigmoid_law(tape: Tape, x: Array) -> Array:
    """Records the price of logsigmoid on the tape. On a CPU it saves an exponential in addition to its input."""
    node = tape.save((x,), (x,), partial(_logsigmoid_back, tape))
    y = tape.elementwise(x.shape, x.dtype, node)
    if tape.workload.on_cpu:
        tape.save_output(node, tape.elementwise(x.shape, x.dtype))
    return y


def _logsigmoid_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    return (tape.new(gradient.shape, gradient.dtype),)
