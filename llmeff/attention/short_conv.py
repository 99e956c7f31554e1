"""A causal convolution of each channel over the last few tokens, within documents."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.attention import fla
from llmeff.attention.mixer import Initialized, LayerCache
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape
from llmeff.cost.workspace import depthwise_room

# B batch, T tokens, C channels, W taps


class ShortConv(Initialized):
    """silu(sum over i < W of w_i x_(t - i)) per channel, as in Mamba (Gu and Dao 2023).

    Tokens of other documents and padding count as 0.

    Args:
        num_channels: C, the number of channels.
        taps: W, the number of tokens that the convolution spans.
        has_bias: whether to add a bias.
    """

    def __init__(self, num_channels: int, taps: int, *, has_bias: bool = False):
        super().__init__()
        self.taps = taps
        self.weight = torch.nn.Parameter(torch.empty(num_channels, 1, taps))
        self.bias = torch.nn.Parameter(torch.empty(num_channels)) if has_bias else None

    def initial(self) -> dict[str, Tensor]:
        """Draws uniform weights, as in torch's convolutions, and sets the bias to 0."""
        bound = 1 / math.sqrt(self.taps)
        found = {"weight": torch.empty_like(self.weight).uniform_(-bound, bound)}
        return found if self.bias is None else found | {"bias": torch.zeros_like(self.bias)}

    def forward(
        self, x: Tensor, layout: Layout, cache: LayerCache | None = None, name: str = "conv", *, fused: bool = False
    ) -> Tensor:
        """Convolves x, (B, T, C), and applies silu. Returns (B, T, C).

        The cache stores the last W - 1 tokens under `name`. `fused` is whether to use flash-linear-attention's kernel,
        as `fla.fuses` decides.
        """
        length = x.shape[1]
        x = layout.cleared(x)
        if fused:
            return fla.short_conv(x, self.weight[:, 0], self.bias, layout)
        before = None if cache is None else cache.recall(name)
        if before is None:
            before = x.new_zeros((x.shape[0], self.taps - 1, x.shape[2]))
        whole = torch.cat((before.to(x.dtype), x), dim=1)
        if cache is not None:
            # a copy, because a view would keep all tokens in memory
            cache.keep(name, whole[:, whole.shape[1] - self.taps + 1 :].detach().clone())
        if layout.documents is None:
            mixed = F.conv1d(whole.mT, self.weight, self.bias, groups=x.shape[2]).mT
        else:
            weights = self.weight[:, 0].to(x.dtype)
            mixed = x * weights[:, -1]
            for back in range(1, self.taps):
                start = self.taps - 1 - back
                reaches = (layout.positions >= back)[..., None]
                mixed = mixed + whole[:, start : start + length] * weights[:, start] * reaches
            mixed = mixed if self.bias is None else mixed + self.bias
        return F.silu(mixed)


def law(tape: Tape, x: Array, taps: int, *, has_bias: bool = False) -> Array:
    """Records the price of `ShortConv.forward` without a cache on the tape.

    Call it while the tape is inside the module's scope (`Tape.within`).

    Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
    """
    num_rows, length, channels = x.shape
    weight = tape.weight("weight", channels, 1, taps)
    bias = tape.weight("bias", channels) if has_bias else None
    before = tape.new((num_rows, taps - 1, channels), x.dtype)
    whole = laws.concat(tape, before.view(num_rows, channels, taps - 1), x.view(num_rows, channels, length))
    if tape.workload.packed:
        mixed = _packed_law(tape, x, whole, weight, bias, taps)
    else:
        mixed = _convolution_law(tape, whole, weight, bias).view(*x.shape)
    return laws.silu(tape, mixed)


def _convolution_law(tape: Tape, whole: Array, weight: Array, bias: Array | None) -> Array:
    """Records the price of the convolution on the tape: (B, C, W - 1 + T) to (B, C, T)."""
    whole, weight = laws.autocast(tape, whole), laws.autocast_weight(tape, weight)
    bias = None if bias is None else laws.autocast_weight(tape, bias)
    num_rows, channels, length = whole.shape
    shape = (num_rows, channels, length - weight.shape[-1] + 1)
    flops = 2 * num_rows * shape[-1] * weight.size
    own = (weight,) if bias is None else (weight, bias)
    node = tape.save((whole, *own), (whole, weight), partial(_convolution_back, tape, flops, bias is not None))
    tape.contract(flops)
    dense = tape.new(whole.shape, whole.dtype)  # a copy with channels before tokens
    with tape.room(depthwise_room(tape.workload, "output", whole.shape, weight.shape, shape, whole.dtype)):
        mixed = tape.new(shape, whole.dtype, node)
    del dense
    return mixed


def _convolution_back(
    tape: Tape, flops: int, has_bias: bool, gradient: Array, whole: Array, weight: Array
) -> tuple[Array, ...]:
    tape.execute(2 * flops)
    dense = tape.new(whole.shape, whole.dtype), tape.new(gradient.shape, gradient.dtype)
    with tape.room(depthwise_room(tape.workload, "weight", whole.shape, weight.shape, gradient.shape, whole.dtype)):
        found = tape.new(whole.shape, whole.dtype), tape.new(weight.shape, weight.dtype)
    del dense
    return (*found, tape.new(weight.shape[:1], weight.dtype)) if has_bias else found


def _packed_law(tape: Tape, x: Array, whole: Array, weight: Array, bias: Array | None, taps: int) -> Array:
    """Records the price of the convolution with packed documents on the tape. It takes one product per tap."""
    num_rows, length, channels = x.shape
    weights = laws.cast(tape, weight, x.dtype)

    def tap(own: Array) -> Array:
        # each view has its own gradient array, as large as all weights
        view = Array((channels,), weights.dtype, weights.storage, weights.node)
        return laws.times(tape, own, view)

    mixed = tap(x)
    for _ in range(1, taps):
        part = Array(x.shape, whole.dtype, whole.storage, whole.node)
        reaches = tape.new((num_rows, length, 1), "bool")
        mixed = laws.add(tape, mixed, laws.scale(tape, tap(part), reaches))
    return mixed if bias is None else laws.plus(tape, mixed, bias)
