"""The contract of a sequence mixer: what mixes information between the tokens of a sequence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from llmeff.core.config import Component, Text
from llmeff.core.layout import Layout
from llmeff.cost.laws import Batch
from llmeff.cost.tape import Array, Tape

# B batch, T sequence, D width, N heads, K key-value heads, H head width


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """The widths of one layer's mixer."""

    width: int
    """D, of the residual stream."""
    num_heads: int
    """N, query heads."""
    num_kv_heads: int
    """K, key and value heads; divides N."""
    head_dim: int
    """H."""
    rope_theta: float
    """Base of the rotary angles."""
    norm_eps: float
    """Added under the root of every normalization."""


class KeyValueCache(Protocol):
    """The cached form of a mixer that keeps its keys and values."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, H) keys and values; returns all of them, (B, K, S, H)."""
        ...


class Mixer(nn.Module, ABC):
    """Mixes a sequence. Without a cache, the form for training; with one, the form for decoding: the two agree."""

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); token t sees only tokens of its document that are not after it, and no padding."""

    @abstractmethod
    def output_projections(self) -> list[nn.Linear]:
        """The projections that write into the residual stream (initialized smaller in deep models)."""


class MixerConfig(Component, family="mixer"):
    """Which mixer a layer has."""

    name: Text
    """The mixer's name."""

    def build(self, shape: MixerShape) -> Mixer:
        """The module, with uninitialized weights."""
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: Batch) -> Array:
        """The price of the module's forward in training, within it on the tape: (B, T, D) to (B, T, D)."""
        raise NotImplementedError(type(self))
