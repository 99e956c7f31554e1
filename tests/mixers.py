"""Every mixer, with settings under which a short sequence meets all that it does; for tables over the registry."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llmeff.attention import MixerConfig
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout
from llmeff.testing import mixers as testing
from llmeff.testing.mixers import Kept as Kept

NAMES = MixerConfig.registry.names()
every_mixer = pytest.mark.parametrize("name", NAMES)

SETTINGS: dict[str, dict[str, Any]] = {
    "mamba2": {"state_width": 5},
    "mla": {"latent": 10, "rotary": 4, "query_latent": 8},
    "sliding": {"window": 5, "sinks": 1, "global_every": 7},
}
"""By name; a mixer that is not here has its defaults."""


def config(name: str) -> MixerConfig:
    """The mixer's."""
    return MixerConfig.registry[name](**SETTINGS.get(name, {}))


def layouts(length: int, *, document: int, padded: int) -> dict[str, Layout]:
    """Of two rows: of one document each, of documents of so many tokens, and with so many places of padding before the first."""
    places, padding = torch.arange(length).repeat(2, 1), torch.ones(2, length, dtype=torch.bool)
    padding[0, :padded] = False
    return {
        "plain": testing.plain(length),
        "packed": Layout(positions=places % document, documents=places // document),
        "padded": Layout(positions=(padding.long().cumsum(-1) - 1).clamp(min=0), padding=padding),
    }


def grouped(name: str, shape: MixerShape) -> MixerShape:
    """The shape with half as many key-value heads as heads, or, where the mixer cannot share them, with as many."""
    return testing.grouped(config(name), shape)


def fields(name: str, num_kv_heads: int) -> dict[str, Any]:
    """A decoder's, with so many key-value heads where the mixer can share them."""
    own = SETTINGS.get(name, {})
    shape = MixerShape(width=8, num_heads=2, num_kv_heads=1, head_dim=4, rope_theta=1e4, norm_eps=1e-5)
    shared = grouped(name, shape).num_kv_heads == shape.num_kv_heads
    return {"mixer": {"name": name, **own}, "num_kv_heads": num_kv_heads if shared else "auto"}


def fields_of_each(names: Sequence[str] = NAMES) -> dict[str, Any]:
    """A decoder's, with a layer of each mixer."""
    own = {name: {"name": name, **SETTINGS[name]} for name in names if name in SETTINGS}
    return {"pattern": "+".join(names), "mixers": own, "num_layers": len(names), "num_kv_heads": "auto"}
