"""Kimi Delta Attention: a delta-rule mixer whose state decays per channel."""

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import fla, gated_norm
from llmeff.attention.decay import Rates, initial_decays, rates_law, steps_law
from llmeff.attention.delta import DeltaConfig, DeltaMixer
from llmeff.attention.gated_norm import GatedRMSNorm
from llmeff.attention.heads import project, split
from llmeff.attention.mixer import MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.attention.scan import LEAST
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads of values, H head width


class KDA(DeltaConfig):
    """Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692), as in Kimi Linear.

    The log decay is at least `scan.LEAST`, so that from one token to the next a channel keeps at least 0.7 % of its
    state. Kimi Linear has no such bound.
    """

    fuses: ClassVar[frozenset[str]] = DeltaConfig.fuses | {"gated_rms_norm", "channel_decay"}

    name: Literal["kda"] = "kda"
    initial_rates: Rates = (1, 16)
    """(lowest, highest) initial decay rate, see `decay.Rates`. The default is the range of Kimi Linear."""

    def build(self, shape: MixerShape) -> "KDAMixer":
        """Builds a layer's mixer."""
        return KDAMixer(self, shape)

    def log_decay_law(self, shape: MixerShape, tape: Tape, x: Array) -> Array:
        """Records the price of `KDAMixer.log_decay` on the tape: (B, T, D) to (B, T, N, H)."""
        own = low_rank_law(tape, "f", x, shape).view(*x.shape[:2], shape.num_heads * shape.head_dim)
        steps = steps_law(tape, own, tape.weight("step_bias", own.shape[-1]))
        steps = steps.view(*x.shape[:2], shape.num_heads, shape.head_dim)
        return laws.function(tape, laws.times(tape, steps, rates_law(tape, shape.num_heads)), "input")

    def finish_law(self, shape: MixerShape, tape: Tape, out: Array, x: Array) -> Array:
        """Records the price of `KDAMixer.finish` on the tape: (B, T, N, H) to (B, T, N, H)."""
        gate = low_rank_law(tape, "g", x, shape)
        with tape.within("o_norm"):
            return gated_norm.law(tape, out, gate, "output")


class KDAMixer(DeltaMixer):
    """Module of Kimi Delta Attention. The log decay of each channel is g = -exp(A) softplus(f x + dt).

    A is `log_rate` and dt is `step_bias`. The scan's output is normalized and gated by a sigmoid. The projection f and
    the projection of the gate have rank H.
    """

    def __init__(self, config: KDA, shape: MixerShape):
        super().__init__(config, shape)
        self.f_a_proj = nn.Linear(shape.width, shape.head_dim, bias=False)
        self.f_b_proj = nn.Linear(shape.head_dim, self.value_width, bias=False)
        self.g_a_proj = nn.Linear(shape.width, shape.head_dim, bias=False)
        self.g_b_proj = nn.Linear(shape.head_dim, self.value_width, bias=False)
        self.initial_rates = config.initial_rates
        self.log_rate = nn.Parameter(torch.empty(shape.num_heads))
        self.step_bias = nn.Parameter(torch.empty(self.value_width))
        self.o_norm = GatedRMSNorm(shape.head_dim, shape.norm_eps, "sigmoid")

    def initial(self) -> dict[str, Tensor]:
        """Draws initial values for the parameters of the decay."""
        return initial_decays(self.initial_rates, self.log_rate, self.step_bias)

    def log_decay(self, x: Tensor, *, fused: bool) -> Tensor:
        """Computes the log decay g, (B, T, N, H), from x, (B, T, D). g is at least `LEAST`."""
        if fused:
            own = split(self.f_b_proj(self.f_a_proj(x)), self.shape.num_heads)
            return fla.channel_decay(own, self.log_rate, self.step_bias).clamp(min=LEAST)
        steps = F.softplus(at_least_float32(self.f_b_proj(self.f_a_proj(x))) + self.step_bias)
        return (-self.log_rate.exp()[:, None] * split(steps, self.shape.num_heads)).clamp(min=LEAST)

    def finish(self, out: Tensor, x: Tensor, *, fused: bool) -> Tensor:
        """Normalizes the scan's output, (B, T, N, H), and gates it by a sigmoid of a projection of x."""
        gate = split(self.g_b_proj(self.g_a_proj(x)), self.shape.num_heads)
        return cast(Tensor, self.o_norm(out, gate, fused=fused))


def low_rank_law(tape: Tape, name: str, x: Array, shape: MixerShape) -> Array:
    """Records the price of a projection of rank H on the tape: (B, T, D) to (B, T, N, H)."""
    low = project(tape, f"{name}_a_proj", x, 1, shape.head_dim).view(*x.shape[:2], shape.head_dim)
    return project(tape, f"{name}_b_proj", low, shape.num_heads, shape.head_dim)
