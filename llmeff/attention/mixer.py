"""The contract of a sequence mixer: what mixes information between the tokens of a sequence."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
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


class LayerCache(Protocol):
    """What a layer keeps of the tokens that it has seen: their keys and values, or states by name."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, H) keys and values; returns all of them, (B, K, S, H)."""
        ...

    def recall(self, name: str) -> Tensor | None:
        """What was kept under a name; None before the first token. Its first dimension is B."""
        ...

    def keep(self, name: str, state: Tensor) -> None:
        """Puts a state in the place of the one of that name."""
        ...


class Initialized(nn.Module, ABC):
    """A module with parameters of its own that begin neither as the model's matrices nor at 1."""

    def initial(self) -> dict[str, Tensor]:
        """Their first values, by name, drawn from torch's default generator."""
        return {}


class Mixer(Initialized):
    """Mixes a sequence. Without a cache, the form for training; with one, the form for decoding: the two agree.

    What writes into the residual stream is called `o_proj`: by that name a model lets it begin smaller in deep stacks.
    """

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); token t sees only tokens of its document that are not after it, and no padding."""

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Makes the layout's tables that layers share: torch.compile lets no layer that runs twice write them.

        Args:
            layout: of the batch.
            num_rows: B.
            dtype: in which queries, keys and values are mixed.
        """


class MixerConfig(Component, family="mixer"):
    """Which mixer a layer has."""

    extends: ClassVar[bool] = False
    """Whether decoding keeps keys and values by `LayerCache.extend` alone, for which any of transformers' caches will do."""

    name: Text
    """The mixer's name."""

    def problems(self, shape: MixerShape) -> list[str]:
        """What of the widths does not fit it."""
        return []

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """What it asks of this machine that is not there.

        Args:
            shape: the widths.
            on_cpu: whether it is trained on the CPU.
        """
        return []

    def build(self, shape: MixerShape) -> Mixer:
        """The module, with uninitialized weights but for `Initialized.initial`."""
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: Batch) -> Array:
        """The price of the module's forward in training, within it on the tape: (B, T, D) to (B, T, D)."""
        raise NotImplementedError(type(self))

    def buffer_bytes(self, shape: MixerShape, number_bytes: int) -> int:
        """What the module keeps beside its parameters, at every moment.

        Args:
            shape: the widths.
            number_bytes: of a number of the parameters' format, which buffers have too.
        """
        return 0

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """What decoding keeps of one sequence.

        Args:
            shape: the widths.
            num_tokens: S, tokens that the sequence has.
            number_bytes: of a number of keys and values; states of sums are float32.
        """
        raise NotImplementedError(type(self))


@functools.cache
def parameter_order(config: MixerConfig, shape: MixerShape) -> dict[str, int]:
    """Places of the module's parameters, by name; a law uses them in another order."""
    with torch.device("meta"):
        return {name: place for place, (name, _) in enumerate(config.build(shape).named_parameters())}
