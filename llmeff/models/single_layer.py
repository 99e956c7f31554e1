"""A decoder for measuring a mixer: one layer with the mixer and no MLP, and a vocabulary of a few tokens.

Its step covers the mixer, the norms and the residual stream as in training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmeff.attention.mixer import MixerConfig
from llmeff.attention.scan import CHUNK
from llmeff.core.config import ConfigError, override, validate
from llmeff.models.transformer import DecoderConfig, LayerConfig

VOCABULARY = 8
"""Size of the vocabulary, so small that the cost of embedding and logits is negligible beside a mixer."""
_CHUNKS = 256
"""Number of chunks in the batched product of `chunk_products`."""


def mixer_names() -> tuple[str, ...]:
    """Returns the names of all registered mixers, with the decoder's default first."""
    first = DecoderConfig().mixer.name
    return (first, *(name for name in MixerConfig.registry.names() if name != first))


def single_layer(name: str, settings: Sequence[str] = (), *, width: int, num_heads: int) -> DecoderConfig:
    """Returns the config of a decoder with one layer, which has the given mixer and no MLP.

    Args:
        name: name of the mixer.
        settings: settings of the mixer, such as `window=64`.
        width: D, width of the residual stream.
        num_heads: N, number of heads. The head width is D / N.

    Raises:
        ConfigError: the mixer does not exist, or its settings are invalid.
    """
    if name not in MixerConfig.registry:
        raise ConfigError(MixerConfig.registry.unknown(name))
    layer = LayerConfig(has_mlp=False).model_dump(mode="json")
    given = {"width": width, "num_layers": 1, "num_heads": num_heads, "vocab_size": VOCABULARY}
    return validate(DecoderConfig, given | {"layers": [layer], "mixer": override({"name": name}, settings)})


def chunk_products(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Makes two random batches of matrices, whose products are like those of the chunks in a scan.

    Returns:
        The batches, (256, 64, H) and (256, H, 64), where H is `head_dim`, and the FLOPs of multiplying them.
    """
    left = torch.randn(_CHUNKS, CHUNK, head_dim, device=device, dtype=dtype)
    right = torch.randn(_CHUNKS, head_dim, CHUNK, device=device, dtype=dtype)
    return left, right, 2 * _CHUNKS * CHUNK * CHUNK * head_dim
