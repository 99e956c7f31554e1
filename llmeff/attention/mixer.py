"""The contract of a sequence mixer, which mixes information between the tokens of a sequence."""

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
    """D, width of the residual stream."""
    num_heads: int
    """N, number of query heads."""
    num_kv_heads: int
    """K, number of key and value heads; divides N."""
    head_dim: int
    """H, width of a head."""
    rope_theta: float
    """Base of the rotary angles."""
    norm_eps: float
    """Added under the root of every normalization."""


class LayerCache(Protocol):
    """What a layer keeps of the tokens that it has seen: keys and values, or states by name."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, H) keys and values; returns all of them, (B, K, S, H)."""
        ...

    def recall(self, name: str) -> Tensor | None:
        """The state kept under a name; its first dimension is B. None: before the first token."""
        ...

    def keep(self, name: str, state: Tensor) -> None:
        """Keeps a state under a name, replacing the previous one."""
        ...


class Initialized(nn.Module, ABC):
    """A module with parameters that are initialized neither like the model's matrices nor to 1."""

    def initial(self) -> dict[str, Tensor]:
        """Initial values of these parameters by name, drawn from torch's default generator."""
        return {}


class Mixer(Initialized):
    """Mixes a sequence: without a cache in its form for training, with one in its form for decoding. Both agree.

    The projection that writes into the residual stream is called `o_proj`. By that name a model gives it smaller initial
    weights in deep stacks.
    """

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D). A token sees only itself and earlier tokens of its document, and no padding."""

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Makes the tables of the layout that layers share, since torch.compile lets no layer that runs twice write them.

        Args:
            layout: layout of the batch.
            num_rows: B.
            dtype: format in which queries, keys and values are mixed.
        """


class MixerConfig(Component, family="mixer"):
    """The mixer of a layer."""

    extends: ClassVar[bool] = False
    """Whether decoding only uses `LayerCache.extend`, so that every cache of transformers works."""

    name: Text
    """The mixer's name."""

    def problems(self, shape: MixerShape) -> list[str]:
        """The widths that the mixer does not support, as messages."""
        return []

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """What the mixer needs and this machine lacks, as messages.

        Args:
            shape: the widths of the layer.
            on_cpu: whether the mixer is trained on the CPU.
        """
        return []

    def build(self, shape: MixerShape) -> Mixer:
        """Builds the module. The model initializes its weights, by `Initialized.initial` if that names them."""
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: Batch) -> Array:
        """The price of the module's training forward, inside its scope on the tape: (B, T, D) to (B, T, D)."""
        raise NotImplementedError(type(self))

    def buffer_bytes(self, shape: MixerShape, number_bytes: int) -> int:
        """Bytes of the module's buffers, which live all the time.

        Args:
            shape: the widths of the layer.
            number_bytes: bytes per number in the format of the parameters, which is also that of buffers.
        """
        return 0

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Bytes that decoding keeps of one sequence.

        Args:
            shape: the widths of the layer.
            num_tokens: S, tokens of the sequence.
            number_bytes: bytes per number of keys and values; states of sums are float32.
        """
        raise NotImplementedError(type(self))


@functools.cache
def parameter_order(config: MixerConfig, shape: MixerShape) -> dict[str, int]:
    """Index of each of the module's parameters, by name; a law uses them in another order."""
    with torch.device("meta"):
        return {name: place for place, (name, _) in enumerate(config.build(shape).named_parameters())}
