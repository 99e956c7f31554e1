"""A decoder with one layer that has a mixer and no MLP, over a vocabulary of a few tokens.

Measuring it measures a mixer, norms and the residual stream as in training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmeff.attention.mixer import MixerConfig
from llmeff.attention.scan import CHUNK
from llmeff.core.config import ConfigError, override, validate
from llmeff.models.transformer import DecoderConfig, LayerConfig

VOCABULARY = 8
"""Few enough tokens that the cost of embedding and logits is negligible beside a mixer."""
_CHUNKS = 256
"""Number of chunk products in a batch."""


def mixer_names() -> tuple[str, ...]:
    """Names of all registered mixers; the decoder's default comes first."""
    first = DecoderConfig().mixer.name
    return (first, *(name for name in MixerConfig.registry.names() if name != first))


def single_layer(name: str, settings: Sequence[str] = (), *, width: int, num_heads: int) -> DecoderConfig:
    """The config of a one-layer model with a mixer.

    Args:
        name: name of the mixer.
        settings: settings of the mixer, such as `window=64`.
        width: D.
        num_heads: N; the head width is D / N.

    Raises:
        ConfigError: there is no such mixer, or its settings are invalid.
    """
    if name not in MixerConfig.registry:
        raise ConfigError(MixerConfig.registry.unknown(name))
    layer = LayerConfig(has_mlp=False).model_dump(mode="json")
    given = {"width": width, "num_layers": 1, "num_heads": num_heads, "vocab_size": VOCABULARY}
    return validate(DecoderConfig, given | {"layers": [layer], "mixer": override({"name": name}, settings)})


def chunk_products(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Factors of the batched products that a scan computes for its chunks, and the FLOPs of their product.

    Returns:
        Random (256, 64, H) and (256, H, 64), and 2 * 256 * 64 * 64 * H.
    """
    left = torch.randn(_CHUNKS, CHUNK, head_dim, device=device, dtype=dtype)
    right = torch.randn(_CHUNKS, head_dim, CHUNK, device=device, dtype=dtype)
    return left, right, 2 * _CHUNKS * CHUNK * CHUNK * head_dim
