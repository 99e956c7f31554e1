"""Our attention in transformers' own models: importing this registers `llmeff_softmax` and `llmeff_sliding`.

`attn_implementation="llmeff_sliding"` then works wherever a model asks transformers' AttentionInterface. The window is the
model's own (`sliding_window`, as Mistral has), or what `use` wrote into its config. A model that needs what is not done
here is an error, and never something else without a word.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llmeff.attention.mixer import MixerConfig
from llmeff.attention.sliding import Sliding, slide
from llmeff.attention.softmax import Softmax, attend
from llmeff.core.config import ConfigError, validate
from llmeff.core.layout import Layout

# B batch, T queries, S cached and new tokens, N heads, K key-value heads, H head width

SETTINGS = "llmeff_sliding"
"""The field of a model's config that holds the settings of its sliding attention; it is saved with the model."""

_REFUSED = ("softcap", "s_aux")
"""What some models hand to attention beside the mask, and would compute something else with."""

_layouts = WeakTensorKeyDictionary()
"""The layout of each mask that is in use, with the tables that a model's layers share."""


def use(model: PreTrainedModel, mixer: MixerConfig) -> None:
    """Makes a built transformers model attend by a mixer of queries, keys and values, in all its layers.

    Args:
        model: any whose attention goes through transformers' AttentionInterface.
        mixer: `Softmax()` or `Sliding(...)`; projections and norms stay the model's.

    Raises:
        ConfigError: the model or the mixer is of another kind, or the model has a sliding window of its own.
    """
    if not isinstance(mixer, Softmax | Sliding) or mixer.qk_norm or mixer.kernel != "sdpa":
        raise ConfigError(
            f"mixer is {mixer}: a transformers model takes Softmax() or Sliding(...), without qk_norm and with kernel 'sdpa'"
        )
    if not model._can_set_attn_implementation():
        raise ConfigError(
            f"{type(model).__name__} does not ask transformers' AttentionInterface: its attention is its own"
        )
    if isinstance(mixer, Sliding):
        fields = mixer.model_dump(exclude={"name", "qk_norm", "kernel"})
        _check_window(model.config, fields)
        setattr(model.config, SETTINGS, fields)
    model.set_attn_implementation(f"llmeff_{mixer.name}")


def _check_window(config: Any, fields: dict[str, Any]) -> None:
    own = getattr(config, "sliding_window", None)
    if own is not None:
        raise ConfigError(
            f"{SETTINGS} is {fields}, and the model has a sliding_window of its own, {own}: set config.sliding_window to None "
            f"before the model is built, or leave {SETTINGS} out"
        )


def _softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """(B, N, T, H) queries and (B, K, S, H) keys and values to (B, T, N, H)."""
    layout = _checked(module, query, attention_mask, kwargs)
    window = kwargs.get("sliding_window")
    if window is not None:
        raise ConfigError(f"sliding_window is {window}: llmeff_softmax sees all tokens; take llmeff_sliding")
    key, value = _filled(layout, key), _filled(layout, value)
    return attend(query, key, value, layout, kwargs.get("scaling")).transpose(1, 2), None


def _sliding(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The same over the window, in those layers that the model has slide."""
    layout = _checked(module, query, attention_mask, kwargs)
    settings = _settings(module.config, kwargs.get("sliding_window"))
    key, value = _filled(layout, key), _filled(layout, value)
    if settings is None:
        return attend(query, key, value, layout, kwargs.get("scaling")).transpose(1, 2), None
    mixed = slide(settings, query, key, value, layout, kwargs.get("scaling"))
    return mixed.unflatten(-1, (query.shape[1], -1)), None


def _settings(config: Any, layer_window: int | None) -> Sliding | None:
    """Who sees whom in a layer; None: everybody, in a model of which only some layers slide."""
    fields = getattr(config, SETTINGS, None)
    if fields is not None:
        _check_window(config, fields)
        return validate(Sliding, fields)
    if getattr(config, "sliding_window", None) is None:
        raise ConfigError(
            f"llmeff_sliding needs a window, and {type(config).__name__} has neither sliding_window nor {SETTINGS}: call "
            "llmeff.models.interface.use(model, Sliding(window=...))"
        )
    return None if layer_window is None else validate(Sliding, {"window": layer_window})


def _checked(module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Layout:
    """The layout that the mask stands for.

    Raises:
        ConfigError: the model asks for what is not done here.
    """
    model = type(module).__name__
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ConfigError(f"{model} is not causal, and llmeff's attention is")
    if kwargs.get("dropout"):
        raise ConfigError(
            f"{model} drops {kwargs['dropout']} of its weights; llmeff's attention drops none: set it to 0"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"{model} asks for {name}, which llmeff's attention does not have")
    if mask is None or mask.dim() != 2:
        given = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
        raise ConfigError(
            f"{model} hands on a mask that is not llmeff's ({given}): give attention_mask as (batch, tokens)"
        )
    if mask not in _layouts:
        _layouts[mask] = _layout(mask, query.shape[2])
    layout: Layout = _layouts[mask]
    return layout


def _filled(layout: Layout, x: Tensor) -> Tensor:
    """Keys or values without what a cache of fixed size has room for."""
    num_tokens = layout.past + layout.positions.shape[-1]
    return x if x.shape[2] == num_tokens else x[:, :, :num_tokens]


def _layout(documents: Tensor, num_queries: int) -> Layout:
    """What `_documents` says, for T queries."""
    past = documents.shape[1] - num_queries
    padding = None if bool(documents.all()) else documents > 0
    places = torch.arange(documents.shape[1], device=documents.device)[None]
    if bool((documents <= 1).all()):
        return Layout(positions=places[:, past:], padding=padding, past=past)
    if past:
        raise ConfigError("rows of several documents, or chunks, are for training: decode them one by one")
    begins = F.pad(documents.diff(dim=-1) != 0, (1, 0), value=True)
    starts = torch.where(begins, places, 0).cummax(dim=-1).values
    # a copy: what holds the mask itself would never let it go
    return Layout(positions=places - starts, documents=documents.clone(), padding=padding)


def _documents(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device,
    **kwargs: Any,
) -> Tensor:
    """The mask that our functions are handed: (B, S) int64, the number of each token's document, 0 where it is padding.

    Arguments are those of transformers' mask interface. Documents are told by which tokens see the one before them.
    """
    if use_vmap:
        raise ConfigError("the model adds to its mask by functions of its own, which llmeff's attention does not take")
    rows = torch.arange(batch_size, device=device)[:, None]
    places = torch.arange(kv_offset, int(q_offset) + q_length, device=device)[None]
    earlier, later = places[:, :-1], places[:, 1:]
    if bool(mask_function(rows, 0, earlier, later).any()):
        raise ConfigError("the model lets tokens see later ones, and llmeff's attention is causal")
    follows = mask_function(rows, 0, later, earlier).expand(batch_size, -1)
    documents = F.pad(follows.logical_not().cumsum(-1), (1, 0)) + 1
    if attention_mask is None:
        return documents
    return documents.masked_fill(~attention_mask[:, kv_offset : kv_offset + places.shape[1]].bool(), 0)


for _name, _function in (("llmeff_softmax", _softmax), ("llmeff_sliding", _sliding)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _documents)  # without it the mask would be None, and padding be seen
