"""llmeff's attention for models of transformers. Importing this module registers the mixers that need only Q, K and V.

Then `attn_implementation="llmeff_sliding"` works in every model that uses transformers' AttentionInterface, and so do
`llmeff_softmax`, `llmeff_linear` and `llmeff_performer`. The window is the model's own `sliding_window`, as in Mistral,
or the window that `use` wrote into its config. Models keep their usual KV cache; `linear` and `performer` recompute
their state from it in every call. A model that needs an unsupported feature raises an error, and never silently
returns a different result.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llmeff.attention.heads import repeated
from llmeff.attention.kernel import KernelConfig, counted, weighed
from llmeff.attention.linear import Linear, positive
from llmeff.attention.mixer import MixerConfig
from llmeff.attention.norm import at_least_float32
from llmeff.attention.performer import Performer, exponents, orthogonal, relative
from llmeff.attention.sliding import Sliding, slide
from llmeff.attention.softmax import Softmax, attend
from llmeff.core.config import ConfigError, validate
from llmeff.core.layout import Layout, places_in
from llmeff.core.seed import derive
from llmeff.core.tested import check_tested

# B batch, T queries, S cached and new tokens, N heads, K key-value heads, H head width, M features

SETTINGS = "llmeff_sliding"
"""Field of a model's config with the settings of its sliding attention. It is saved with the model."""
FEATURES = "llmeff_performer"
"""Field of a model's config with the settings of its Performer attention. The random directions are not saved, because
they follow from the layer's index and its widths."""

_REFUSED = ("softcap", "s_aux")
"""Arguments that some models pass to attention. They change its result and are not supported here."""

_layouts = WeakTensorKeyDictionary()
"""Layout of each mask in use. It also stores the tables that the model's layers share."""

_directions: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""Performer's random directions, (M, H), by attention layer."""


def use(model: PreTrainedModel, mixer: MixerConfig) -> None:
    """Replaces the attention in all layers of a built transformers model by a mixer.

    Args:
        model: any model whose attention uses transformers' AttentionInterface.
        mixer: `Softmax()`, `Sliding(...)`, `Linear()` or `Performer(...)`. The model's own projections and norms stay.

    Raises:
        ConfigError: the model or the mixer is not supported, or a sliding mixer is given to a model that has its own
            sliding_window.
    """
    check_tested("transformers")
    if isinstance(mixer, Softmax | Sliding):
        is_taken = not mixer.qk_norm and mixer.kernel == "sdpa"
    else:
        is_taken = isinstance(mixer, KernelConfig) and mixer.kernel != "fla"
    if not is_taken:
        raise ConfigError(
            f"mixer is {mixer}, but a transformers model supports Softmax(), Sliding(...), Linear() or Performer(...), "
            "without qk_norm and with the default kernel"
        )
    # the first check only searches the model's source code: it accepts Mamba, which has no attention
    if not (model._can_set_attn_implementation() and model._supports_attention_backend):
        raise ConfigError(
            f"{type(model).__name__} does not use transformers' AttentionInterface, so its attention cannot be replaced"
        )
    if isinstance(mixer, Sliding):
        fields = mixer.model_dump(exclude={"name", "qk_norm", "kernel"})
        _check_window(model.config, fields)
        setattr(model.config, SETTINGS, fields)
    if isinstance(mixer, Performer):
        setattr(model.config, FEATURES, mixer.model_dump(exclude={"name", "kernel"}))
        for module in model.modules():
            _directions.pop(module, None)
    model.set_attn_implementation(f"llmeff_{mixer.name}")


def _check_window(config: Any, fields: dict[str, Any]) -> None:
    own = getattr(config, "sliding_window", None)
    if own is not None:
        raise ConfigError(
            f"{SETTINGS} is {fields}, but the model has its own sliding_window, {own}: set config.sliding_window to None "
            f"before the model is built, or leave {SETTINGS} out"
        )


def _softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention of (B, N, T, H) queries over (B, K, S, H) keys and values; returns (B, T, N, H)."""
    layout = _checked(module, query, attention_mask, kwargs, sees_all="llmeff_softmax")
    key, value = _filled(layout, key), _filled(layout, value)
    return attend(query, key, value, layout, kwargs.get("scaling")).transpose(1, 2), None


def _sliding(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Sliding-window attention, with the shapes of `_softmax`. Layers without a window attend to all tokens."""
    layout = _checked(module, query, attention_mask, kwargs)
    settings = _settings(module.config, kwargs.get("sliding_window"))
    key, value = _filled(layout, key), _filled(layout, value)
    if settings is None:
        return attend(query, key, value, layout, kwargs.get("scaling")).transpose(1, 2), None
    mixed = slide(settings, query, key, value, layout, kwargs.get("scaling"))
    return mixed.unflatten(-1, (query.shape[1], -1)), None


def _linear(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Linear attention as in the mixer `Linear`, with the shapes of `_softmax`. Queries and keys are not scaled."""
    layout = _checked(module, query, attention_mask, kwargs, sees_all="llmeff_linear")
    query, key, value = _tokens_first(layout, query, key, value)
    query, key, past = positive(query), positive(key), layout.past
    before = _Before(state=_sums(key[:, :past], value[:, :past], layout, query.shape[2])) if past else None
    return weighed(query, key[:, past:], value[:, past:], None, layout, before), None


def _performer(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Performer attention: an estimate of softmax attention, with the shapes of `_softmax`."""
    layout = _checked(module, query, attention_mask, kwargs, sees_all="llmeff_performer")
    query, key, value = _tokens_first(layout, query, key, value)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    directions = at_least_float32(_directions_of(module, query))
    with torch.autocast(query.device.type, enabled=False):
        query = exponents(at_least_float32(query) * scale**0.5, directions)
        key = exponents(at_least_float32(key) * scale**0.5, directions, has_lengths=True)
    query, past, before = (query - query.detach().amax(-1, keepdim=True)).exp(), layout.past, None
    if past:
        largest = key[:, :past].detach().amax(-1)
        if layout.padding is not None:
            largest = largest.masked_fill(~layout.padding[:, :past, None], -torch.inf)
        largest = largest.amax(1)
        kept = (key[:, :past] - largest[:, None, :, None]).exp()
        before = _Before(state=_sums(kept, value[:, :past], layout, query.shape[2]), largest=largest)
    key, fall = relative(key[:, past:], layout, before)
    return weighed(query, key.exp(), value[:, past:], fall, layout, before), None


def _directions_of(module: nn.Module, query: Tensor) -> Tensor:
    """Returns the random directions of a layer, (M, H), which are computed at the first call."""
    found = _directions.get(module)
    if found is None or found.device != query.device:
        mixer = validate(Performer, getattr(module.config, FEATURES, {}))
        width, layer = query.shape[-1], getattr(module, "layer_idx", None) or 0
        like = torch.empty(mixer.width(width), width, dtype=torch.float32, device="cpu")
        with torch.inference_mode(False):  # a later training step could not use inference tensors
            found = orthogonal(like, torch.Generator().manual_seed(derive(0, FEATURES, layer))).to(query.device)
        _directions[module] = found
    return found


def _tokens_first(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Transposes queries to (B, T, N, H), and keys and values to (B, S, K, H). Drops unused slots of a cache.

    Args:
        layout: layout of the call.
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, H).
    """
    return tuple(x.transpose(1, 2) for x in (query, _filled(layout, key), _filled(layout, value)))


class _Before:
    """The state after the past tokens, as a layer cache for one call. It is recomputed from the model's KV cache."""

    def __init__(self, **states: Tensor):
        self._states = states

    def recall(self, name: str) -> Tensor | None:
        return self._states.get(name)

    def keep(self, name: str, state: Tensor) -> None:
        """Does nothing, because the next call recomputes the state."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _sums(key: Tensor, value: Tensor, layout: Layout, num_heads: int) -> Tensor:
    """Returns the state of linear attention after the past tokens, (B, N, M, H + 1), in the form of `kernel.weighed`.

    It is the sum over past tokens of the key's features times the value, to which a 1 is appended.

    Args:
        key: features of the past keys, (B, S, K, M).
        value: past values, (B, S, K, H).
        layout: padding of the past tokens, which do not count.
        num_heads: N, number of query heads.
    """
    if layout.padding is not None:
        key = key.masked_fill(~layout.padding[:, : layout.past, None, None], 0)
    with torch.autocast(key.device.type, enabled=False):
        sums = torch.einsum("bskm,bskh->bkmh", key, counted(value))
    return repeated(sums.transpose(1, 2), num_heads).transpose(1, 2)


def _settings(config: Any, layer_window: int | None) -> Sliding | None:
    """Returns the settings of a layer's window.

    Returns None if the layer sees all tokens, in a model that has a window only in some layers.

    Raises:
        ConfigError: the model has no window, two windows, or invalid settings.
    """
    fields = getattr(config, SETTINGS, None)
    if fields is not None:
        _check_window(config, fields)
        return validate(Sliding, fields)
    if getattr(config, "sliding_window", None) is None:
        raise ConfigError(
            f"llmeff_sliding needs a window, but {type(config).__name__} has neither sliding_window nor {SETTINGS}: call "
            "llmeff.models.interface.use(model, Sliding(window=...))"
        )
    return None if layer_window is None else validate(Sliding, {"window": layer_window})


def _checked(
    module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any], sees_all: str | None = None
) -> Layout:
    """Checks a call of attention, and returns the layout that its mask encodes.

    Args:
        module: attention layer of the model.
        query: (B, N, T, H).
        mask: mask from `_documents`.
        kwargs: further arguments that the model passes to attention.
        sees_all: name of the attention function, if it attends to all tokens. None if it supports a window.

    Raises:
        ConfigError: the model needs an unsupported feature.
    """
    model = type(module).__name__
    window = kwargs.get("sliding_window")
    if sees_all is not None and window is not None:
        raise ConfigError(f"sliding_window is {window}, but {sees_all} sees all tokens: use llmeff_sliding")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ConfigError(f"{model} is not causal, but llmeff's attention is always causal")
    if kwargs.get("dropout"):
        raise ConfigError(
            f"{model} has an attention dropout of {kwargs['dropout']}, which llmeff's attention does not support: set it to 0"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"{model} uses {name}, which llmeff's attention does not support")
    if mask is None or mask.dim() != 2:
        given = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
        raise ConfigError(
            f"llmeff's attention needs a mask that it built itself, but {model} passes {given}. Call the whole "
            "model, and give it an attention_mask of shape (batch, tokens) or none"
        )
    if mask not in _layouts:
        _layouts[mask] = _checked_packing(_layout(mask, query.shape[2]), kwargs)
    layout: Layout = _layouts[mask]
    return layout


def _checked_packing(layout: Layout, kwargs: dict[str, Any]) -> Layout:
    """Checks that the layout separates all documents that the arguments describe, and returns it.

    Raises:
        ConfigError: the arguments describe several documents in one row, but the layout does not.
    """
    if layout.documents is not None or layout.past:
        return layout
    positions = kwargs.get("position_ids")
    borders = kwargs.get("cu_seq_lens_q")
    told = "cu_seq_lens_q" if borders is not None and len(borders) > 2 else None
    if isinstance(positions, Tensor) and positions.dim() == 2:
        falls = positions.diff(dim=-1) <= 0  # positions that skip ahead may be intended
        if layout.padding is not None:
            falls = falls & layout.padding[:, 1:] & layout.padding[:, :-1]
        if bool(falls.any()):
            told = "position_ids"
    if told is not None:
        raise ConfigError(
            f"{told} describes several documents in one row, but the model's mask does not separate them. Give "
            "position_ids that restart in each document, no attention_mask, and use_cache=False"
        )
    return layout


def _filled(layout: Layout, x: Tensor) -> Tensor:
    """Returns keys or values without the unused slots of a cache of fixed size."""
    num_tokens = layout.past + layout.positions.shape[-1]
    return x if x.shape[2] == num_tokens else x[:, :, :num_tokens]


def _layout(documents: Tensor, num_queries: int) -> Layout:
    """Returns the layout that a mask from `_documents` encodes, for `num_queries` new tokens."""
    past = documents.shape[1] - num_queries
    padding = None if bool(documents.all()) else documents > 0
    places = torch.arange(documents.shape[1], device=documents.device)[None]
    if bool((documents <= 1).all()):
        return Layout(positions=places[:, past:], padding=padding, past=past)
    if past:
        raise ConfigError(
            "a row with several documents supports neither a cache nor attention in chunks: put each document in a row "
            "of its own"
        )
    # a copy, because a layout that refers to its own key in `_layouts` would never be freed
    return Layout(positions=places_in(documents), documents=documents.clone(), padding=padding)


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
    """Builds the mask for llmeff's attention, (B, S) int64: each token's document, counted from 1, or 0 for padding.

    The arguments are those of transformers' mask interface. A token that may not see the previous token begins a
    document.
    """
    if use_vmap:
        raise ConfigError(
            "the model has its own mask functions, which llmeff's attention does not support: use another "
            "attn_implementation"
        )
    rows = torch.arange(batch_size, device=device)[:, None]
    places = torch.arange(kv_offset, int(q_offset) + q_length, device=device)[None]
    earlier, later = places[:, :-1], places[:, 1:]
    if bool(mask_function(rows, 0, earlier, later).any()):
        raise ConfigError("the model lets tokens see later tokens, but llmeff's attention is causal")
    follows = mask_function(rows, 0, later, earlier).expand(batch_size, -1)
    documents = F.pad(follows.logical_not().cumsum(-1), (1, 0)) + 1
    if attention_mask is None:
        return documents
    return documents.masked_fill(~attention_mask[:, kv_offset : kv_offset + places.shape[1]].bool(), 0)


for _mixer, _function in ((Softmax, _softmax), (Sliding, _sliding), (Linear, _linear), (Performer, _performer)):
    _name = f"llmeff_{_mixer.model_fields['name'].default}"
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _documents)  # otherwise, the mask would be None and padding visible
