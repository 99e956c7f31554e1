"""Interface of a mixer, the part of a layer that mixes information between the tokens of a sequence."""

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
    """Dimensions and constants of the mixer of one layer."""

    width: int
    """D, width of the residual stream."""
    num_heads: int
    """N, number of query heads."""
    num_kv_heads: int
    """K, number of key and value heads. It divides N."""
    head_dim: int
    """H, width of a head."""
    rope_theta: float
    """Base of the rotary angles."""
    norm_eps: float
    """Epsilon that is added under the square root of every normalization."""


class LayerCache(Protocol):
    """Interface of one layer's cache in decoding. It stores keys and values, or named states, of earlier tokens."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values, (B, K, T, H). Returns all cached keys and all cached values, (B, K, S, H) each."""
        ...

    def recall(self, name: str) -> Tensor | None:
        """Returns the state stored under a name, (B, ...), or None if no token was processed yet."""
        ...

    def keep(self, name: str, state: Tensor) -> None:
        """Stores a state under a name. It replaces the previous state of that name."""
        ...


class Initialized(nn.Module, ABC):
    """Module that supplies the initial values of some of its parameters or buffers.

    For all other parameters, the model draws matrices from a normal distribution and sets vectors to 1.
    """

    def initial(self) -> dict[str, Tensor]:
        """Returns the initial values by parameter or buffer name. Random values come from torch's default generator."""
        return {}


class Mixer(Initialized):
    """Module that mixes the tokens of a sequence.

    It has a training form, without a cache, and a decoding form, with a cache. Both compute the same output. The
    projection into the residual stream must be named `o_proj`, because the model gives projections of that name initial
    weights that shrink with the number of layers.
    """

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D).

        A token sees only itself and earlier tokens of its document, and no padding.
        """

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the tables that layers share through the layout.

        If the model recomputes layers in backward, it calls this method before it runs the layers, because
        torch.compile does not allow a layer that runs twice to compute the tables. Otherwise, the first layer computes
        them.

        Args:
            layout: layout of the batch.
            num_rows: B.
            dtype: dtype of the queries, keys and values.
        """


class MixerConfig(Component, family="mixer"):
    """Base config of mixers."""

    extends: ClassVar[bool] = False
    """Whether decoding uses only `LayerCache.extend`. If it does, every cache class of transformers works."""

    name: Text
    """The mixer's name."""

    def problems(self, shape: MixerShape) -> list[str]:
        """Returns one message for each dimension in `shape` that the mixer does not support."""
        return []

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Returns one message for each requirement of the mixer that this machine does not meet.

        Args:
            shape: the dimensions of the layer.
            on_cpu: whether the mixer is trained on the CPU.
        """
        return []

    def build(self, shape: MixerShape) -> Mixer:
        """Builds the module.

        The module's parameters get their initial values afterwards, from the model (see `Initialized`).
        """
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: Batch) -> Array:
        """Records the price of the module's forward pass in training, (B, T, D) to (B, T, D), on the tape.

        Call it while the tape is inside the module's scope (`Tape.within`).
        """
        raise NotImplementedError(type(self))

    def buffer_bytes(self, shape: MixerShape, number_bytes: int) -> int:
        """Returns the bytes of the module's buffers, which are always in memory.

        Args:
            shape: the dimensions of the layer.
            number_bytes: bytes per number in the dtype of the parameters. Buffers have the same dtype.
        """
        return 0

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of the cache for one sequence in decoding.

        Args:
            shape: the dimensions of the layer.
            num_tokens: S, tokens of the sequence.
            number_bytes: bytes per number of cached keys and values. Recurrent states are float32.
        """
        raise NotImplementedError(type(self))


@functools.cache
def parameter_order(config: MixerConfig, shape: MixerShape) -> dict[str, int]:
    """Returns each parameter's index in the module's order, by name. The order in which a law uses them may differ."""
    with torch.device("meta"):
        return {name: place for place, (name, _) in enumerate(config.build(shape).named_parameters())}
