"""A causal convolution over the last few tokens of each channel, within documents."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.attention.mixer import Initialized, LayerCache
from llmeff.core.layout import Layout

# B batch, T tokens, C channels, W taps


class ShortConv(Initialized):
    """silu(sum over i < W of w_i x_(t - i)), each channel by itself, as in Mamba (Gu and Dao 2023).

    Tokens of another document and padding count as 0.

    Args:
        num_channels: C.
        taps: W.
        has_bias: whether a bias is added.
    """

    def __init__(self, num_channels: int, taps: int, *, has_bias: bool = False):
        super().__init__()
        self.taps = taps
        self.weight = torch.nn.Parameter(torch.empty(num_channels, 1, taps))
        self.bias = torch.nn.Parameter(torch.empty(num_channels)) if has_bias else None

    def initial(self) -> dict[str, Tensor]:
        """Uniform, as torch's own convolutions begin; a bias of 0."""
        bound = 1 / math.sqrt(self.taps)
        found = {"weight": torch.empty_like(self.weight).uniform_(-bound, bound)}
        return found if self.bias is None else found | {"bias": torch.zeros_like(self.bias)}

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None, name: str = "conv") -> Tensor:
        """(B, T, C) to the same; the cache keeps the last W - 1 tokens under `name`."""
        length = x.shape[1]
        x = layout.cleared(x)
        before = None if cache is None else cache.recall(name)
        if before is None:
            before = x.new_zeros((x.shape[0], self.taps - 1, x.shape[2]))
        whole = torch.cat((before.to(x.dtype), x), dim=1)
        if cache is not None:
            cache.keep(name, whole[:, whole.shape[1] - self.taps + 1 :].detach())
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
