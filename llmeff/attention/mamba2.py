"""Mamba-2: a state space model whose state decays per head, by a time step computed from each token."""

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import fla, gated_norm, scan_law, short_conv
from llmeff.attention.decay import Rates, initial_decays, rates_law, steps_law
from llmeff.attention.gated_norm import GroupedRMSNorm
from llmeff.attention.heads import project, repeated, repeated_law, split
from llmeff.attention.mixer import LayerCache, Mixer, MixerShape
from llmeff.attention.norm import at_least_float32, product_dtype
from llmeff.attention.scan import ScanConfig, mix
from llmeff.attention.short_conv import ShortConv
from llmeff.core.config import Count
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads after expansion, K groups, H head width, W state width


class Mamba2(ScanConfig):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    `num_kv_heads` is the number of groups. The heads of a group share their keys and queries (B and C in the paper).
    """

    gates_heads = True
    fuses: ClassVar[frozenset[str]] = frozenset({"short_conv"})

    name: Literal["mamba2"] = "mamba2"
    state_width: Count = 128
    """W, size of the state of each channel."""
    expand: Count = 2
    """Expansion factor: the mixer has `expand` times `num_heads` heads."""
    conv: Count = 4
    """Width in tokens of the short convolution."""
    initial_rates: Rates = (1, 16)
    """(lowest, highest) initial decay rate, see `decay.Rates`. The default is the range of Mamba-2."""

    def num_heads(self, shape: MixerShape) -> int:
        """Returns N, the number of heads of the mixer: `expand` times the layer's number of heads."""
        return self.expand * shape.num_heads

    def channels(self, shape: MixerShape) -> int:
        """Returns the number of channels of the short convolution."""
        return self.num_heads(shape) * shape.head_dim + 2 * shape.num_kv_heads * self.state_width

    def build(self, shape: MixerShape) -> "Mamba2Mixer":
        """Builds a layer's mixer."""
        return Mamba2Mixer(self, shape)

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `Mamba2Mixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        num_heads, num_groups = self.num_heads(shape), shape.num_kv_heads
        widths = ((num_groups, self.state_width), (num_groups, self.state_width), (num_heads, shape.head_dim))
        parts = [
            project(tape, f"{name}_proj", x, *own).view(*x.shape[:2], own[0] * own[1])
            for name, own in zip("qkv", widths, strict=True)
        ]
        joined = laws.concat(tape, *parts)
        del parts
        with tape.within("conv"):
            mixed = short_conv.law(tape, joined, self.conv, has_bias=True)
        del joined
        query, key, value = laws.split(tape, mixed, *((*x.shape[:2], *own) for own in widths))
        query, key = repeated_law(tape, query, num_heads), repeated_law(tape, key, num_heads)
        value = laws.cast(tape, value, "float32")
        own = laws.linear(tape, x, tape.weight("a_proj.weight", num_heads, shape.width))
        steps = steps_law(tape, own, tape.weight("step_bias", num_heads))
        del own
        log_decay = laws.times(tape, steps, rates_law(tape, num_heads)).view(*x.shape[:2], num_heads, 1)
        given = laws.times(tape, value, steps.view(*x.shape[:2], num_heads, 1))
        out = scan_law.law(tape, query, key, given, log_decay, None, is_convolved=True)
        del given
        skipped = laws.times(tape, value, tape.weight("skip", num_heads))
        out = laws.add(tape, out, skipped).view(*x.shape[:2], num_heads * shape.head_dim)
        del skipped
        gate = laws.linear(tape, x, tape.weight("g_proj.weight", out.shape[-1], shape.width))
        with tape.within("o_norm"):
            out = gated_norm.grouped_law(tape, out, gate, num_groups)
        return laws.linear(tape, out, tape.weight("o_proj.weight", shape.width, out.shape[-1]))

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state per head, and of the last input tokens of the convolution."""
        state = 4 * self.num_heads(shape) * shape.head_dim * self.state_width
        return state + self.channels(shape) * (self.conv - 1) * number_bytes


class Mamba2Mixer(Mixer):
    """Module of Mamba-2: S_t = exp(-exp(A) dt) S_(t-1) + b (dt x)', with output y = S_t' c + D x.

    In terms of linear attention, c is the query, b the key and x the value (Dao and Gu 2024, section 7.2). The time
    step dt is softplus(a u + bias), where u is the input of the layer. D is the skip weight of each head. y is gated,
    then normalized.
    """

    def __init__(self, config: Mamba2, shape: MixerShape):
        super().__init__()
        self.kernel = config.kernel
        self.num_heads, self.num_groups = config.num_heads(shape), shape.num_kv_heads
        inner, width = self.num_heads * shape.head_dim, self.num_groups * config.state_width
        self.widths = (width, width, inner)
        self.q_proj = nn.Linear(shape.width, width, bias=False)
        self.k_proj = nn.Linear(shape.width, width, bias=False)
        self.v_proj = nn.Linear(shape.width, inner, bias=False)
        self.g_proj = nn.Linear(shape.width, inner, bias=False)
        self.a_proj = nn.Linear(shape.width, self.num_heads, bias=False)
        self.conv = ShortConv(config.channels(shape), config.conv, has_bias=True)
        self.initial_rates = config.initial_rates
        self.log_rate = nn.Parameter(torch.empty(self.num_heads))
        self.step_bias = nn.Parameter(torch.empty(self.num_heads))
        self.skip = nn.Parameter(torch.empty(self.num_heads))
        self.o_norm = GroupedRMSNorm(inner, self.num_groups, shape.norm_eps)
        self.o_proj = nn.Linear(inner, shape.width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Draws initial values for the parameters of the decay, and sets the skip weights to 1."""
        decays = initial_decays(self.initial_rates, self.log_rate, self.step_bias)
        return decays | {"skip": torch.ones_like(self.skip)}

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        dtype = product_dtype(x)
        fused = fla.fuses(self.kernel, dtype, x.device, cache)
        mixed = self.conv(
            torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1), layout, cache, fused=fused
        )
        query, key, value = mixed.split(self.widths, dim=-1)
        query, key = (repeated(split(own, self.num_groups), self.num_heads) for own in (query, key))
        value = at_least_float32(split(value, self.num_heads))
        steps = F.softplus(at_least_float32(self.a_proj(x)) + self.step_bias)[..., None]
        log_decay = -self.log_rate.exp()[:, None] * steps
        out = (
            mix(query, key, value * steps, log_decay, None, layout, cache, self.kernel, dtype)
            + value * self.skip[:, None]
        )
        return cast(Tensor, self.o_proj(self.o_norm(out.flatten(-2), self.g_proj(x))))
