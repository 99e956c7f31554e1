"""The decoder as a model of transformers: the same layers, with a cache, `generate` and the Auto classes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llmeff.attention.mixer import Initialized
from llmeff.attention.norm import RMSNorm
from llmeff.core.layout import Layout, places_in
from llmeff.core.registry import nearest
from llmeff.core.tested import check_tested
from llmeff.models.llama_format import from_own_fields, own_fields, shared_name
from llmeff.models.transformer import Decoder, DecoderConfig, Layer

# B batch, T queries, S cached and new tokens, D width, V vocabulary

_CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in _CACHE_NAMES)
"""Name of the cache in a model's arguments and output: `past_key_values` before transformers 5.24, then `cache`."""
_PASSED = {"output_hidden_states", "output_attentions", "num_items_in_batch", "ignore_index", "shift_labels"}
"""Further arguments that a model accepts, for transformers' decorators and its loss function."""


class LlmeffConfig(PreTrainedConfig):
    """A transformers config that stores a `DecoderConfig` in the field `decoder_config`, beside its usual fields."""

    model_type = "llmeff"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    decoder_config: dict[str, Any] | None = None
    """Fields of `DecoderConfig`, except vocabulary size and tying. Missing fields, or all if None, are defaults."""
    vocab_size: int = 256
    """V, size of the vocabulary."""
    tie_word_embeddings: bool = True
    """Use one matrix to embed the tokens and to compute the logits."""
    max_position_embeddings: int = 1024
    """Longest sequence in tokens that the model is meant for."""
    use_cache: bool = True
    """Whether a call that does not set `use_cache` makes and returns a cache for decoding."""
    bos_token_id: int | None = None
    """Token that begins a text. None if there is none."""
    eos_token_id: int | list[int] | None = None
    """Token that ends a text. None if there is none."""
    pad_token_id: int | None = None
    """Token that pads the rows of a batch. None if there is none."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.decoder_config = own_fields(self._read(self.decoder_config or {}))
        super().__post_init__(**kwargs)

    def _read(self, fields: dict[str, Any]) -> DecoderConfig:
        return from_own_fields(fields, self.vocab_size, self.tie_word_embeddings)

    @classmethod
    def wrap(cls, config: DecoderConfig, **kwargs: Any) -> "LlmeffConfig":
        """Builds the transformers config of a decoder. `kwargs` are further fields of the transformers config."""
        return cls(
            decoder_config=own_fields(config),
            vocab_size=config.vocabulary(),
            tie_word_embeddings=config.tied_embeddings,
            **kwargs,
        )

    def unwrap(self) -> DecoderConfig:
        """Returns the decoder's config, with the current vocabulary size and tying."""
        assert self.decoder_config is not None
        return self._read(self.decoder_config)

    @property
    def hidden_size(self) -> int:
        """D, width of the residual stream."""
        return self.unwrap().width

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.unwrap().num_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer."""
        return self.unwrap().layer_heads(0)[0]

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of the first layer."""
        return self.unwrap().layer_heads(0)[1]

    @property
    def head_dim(self) -> int:
        """H, width of a head."""
        return self.unwrap().head_width


class StateLayer(CacheLayerMixin):
    """Cache layer of transformers that stores a mixer's states by name. Beam search may reorder or repeat its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.num_tokens = 0
        """Number of tokens that the states cover, padding included."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing, because states are created with the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises NotImplementedError, because this layer stores no keys and values."""
        raise NotImplementedError("this cache layer stores the states of a mixer, not keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of tokens that a mask covers, and the index of its first token, which is 0."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens that the states cover."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """Returns -1, because there is no maximum."""
        return -1

    def reset(self) -> None:
        """Removes all states, as before the first token."""
        self.states.clear()
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError, because states cannot be rolled back."""
        raise ValueError(
            "a mixer with a state cannot go back to an earlier token: decode without assisted or prompt-lookup generation"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows by index."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects rows by index."""
        self.states = {name: state.index_select(0, indices.to(state.device)) for name, state in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self.states = {name: state.repeat_interleave(repeats, dim=0) for name, state in self.states.items()}

    def offload(self) -> None:
        """Does nothing, because states are small and stay on the device."""

    def prefetch(self) -> None:
        """Does nothing, because states are never offloaded."""


@dataclass(frozen=True)
class _LayerCache:
    """One layer of a transformers cache, as the `LayerCache` that a mixer uses."""

    cache: Cache
    index: int

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.update(key, value, self.index)
        return keys, values

    def recall(self, name: str) -> Tensor | None:
        return self._layer().states.get(name)

    def keep(self, name: str, state: Tensor) -> None:
        self._layer().states[name] = state

    def _layer(self) -> StateLayer:
        layers = self.cache.layers
        layer = layers[self.index] if self.index < len(layers) else None
        if not isinstance(layer, StateLayer):
            raise ValueError(
                f"layer {self.index} of the cache is {type(layer).__name__}, but its mixer needs a StateLayer: give no "
                "cache, or a cache from the model's make_cache()"
            )
        return layer


def _cache_of(given: Mapping[str, Any]) -> Cache | None:
    """Returns the cache among a model's keyword arguments, under either of its names. Returns None if there is none.

    Unknown arguments raise an error. Otherwise, a cache under a third name would be ignored, which would change the
    generated text.

    Raises:
        TypeError: the cache is given under both names, or an argument is unknown.
    """
    told = {name: value for name, value in given.items() if value is not None and value is not False}
    unknown = sorted(told.keys() - _PASSED - set(_CACHE_NAMES))
    if unknown:
        raise TypeError(
            f"forward() got {unknown[0]}, which llmeff's models do not support. "
            "To separate documents, give position_ids." + nearest(unknown[0], {*_PASSED, CACHE})
        )
    caches = [told[name] for name in _CACHE_NAMES if name in told]
    if len(caches) > 1:
        raise TypeError(
            f"forward() got {' and '.join(_CACHE_NAMES)}, two names for the same argument: give only {CACHE}"
        )
    return caches[0] if caches else None


def _documents(positions: Tensor) -> Tensor | None:
    """Returns the number of each token's document in its row, or None if every row is one document.

    A document begins at each position that is not the previous position plus 1.
    """
    follows = positions.diff(dim=-1) == 1
    if bool(follows.all()):
        return None
    return nn.functional.pad((~follows).cumsum(-1), (1, 0))


def _layout(
    length: int,
    positions: Tensor | None,
    padding: Tensor | None,
    cache: Cache | None,
    device: torch.device,
) -> Layout:
    """Returns the layout that transformers' arguments describe.

    Without a cache and a mask, documents begin where positions restart, as in transformers.
    """
    if padding is not None and padding.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(padding.shape)}, but must be (batch, tokens), with True for real tokens"
        )
    past = 0 if cache is None else int(cache.get_seq_length())
    documents = None
    if positions is None:
        positions = torch.arange(past, past + length, device=device)[None]
    elif cache is None and padding is None:
        documents = _documents(positions)
        positions = positions if documents is None else places_in(documents)  # given positions may start at any number
    if padding is not None:
        padding = None if bool(padding.all()) else padding.bool()
    return Layout(positions=positions, documents=documents, padding=padding, past=past)


class LlmeffPreTrainedModel(PreTrainedModel):
    """Base class of `LlmeffModel` and `LlmeffForCausalLM`."""

    config_class = LlmeffConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [CACHE]
    _supports_sdpa = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": Layer}

    def __init__(self, config: LlmeffConfig):
        check_tested("transformers")
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a module's parameters. transformers calls this, and keeps loaded weights unchanged."""
        if isinstance(module, nn.Linear | nn.Embedding):
            # transformers passes no parameter name, so the layers' projections store their standard deviation
            std = getattr(module, "initial_std", self.config.unwrap().initial_std(""))
            initialization.normal_(module.weight, 0.0, std)
        elif isinstance(module, RMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, Initialized):
            for name, values in module.initial().items():
                initialization.copy_(getattr(module, name), values)

    def make_cache(self) -> Cache:
        """Returns an empty cache with which all mixers of the model can decode."""
        config = self.config.unwrap()
        layers = [index for index in range(config.num_layers) if config.layer(index).has_mixer]
        if all(config.layer_mixer(index).extends for index in layers):
            return DynamicCache(config=self.config)
        return Cache(layers=[DynamicLayer() if config.layer_mixer(index).extends else StateLayer() for index in layers])

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Returns the padding mask unchanged, for fixed-size caches in `generate`. `Layout` makes the full mask."""
        return attention_mask


class LlmeffModel(LlmeffPreTrainedModel):
    """Base model of transformers that maps tokens to the states before the output embedding."""

    def __init__(self, config: LlmeffConfig):
        super().__init__(config)
        plain = config.unwrap()
        self.embed_tokens = nn.Embedding(plain.vocabulary(), plain.width)
        self.layers = nn.ModuleList(Layer(plain, index) for index in range(plain.num_layers))
        self.norm = RMSNorm(plain.width, plain.norm_eps)
        # a cache takes its length from its first layer, so only layers with a mixer get a cache layer
        mixers = [plain.layer(index).has_mixer for index in range(plain.num_layers)]
        self._cache_indices = [sum(mixers[:index]) for index in range(plain.num_layers)]
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                module.initial_std = plain.initial_std(f"{name}.weight")  # type: ignore[assignment]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Maps (B, T) tokens or (B, T, D) embeddings to (B, T, D) states, with the arguments of transformers' Llama.

        Under any release of transformers, the cache may be given as `cache` or as `past_key_values`.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given, or attention_mask is not (B, S).
            TypeError: an argument is unknown, or the cache is given under both names.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, but not both")
        cache = _cache_of({**kwargs, "cache": cache, "past_key_values": past_key_values})
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout = _layout(x.shape[1], position_ids, attention_mask, cache, x.device)
        if use_cache and cache is None and layout.documents is None:
            cache = self.make_cache()
        for layer, index in zip(self.layers, self._cache_indices, strict=True):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, layout)
            else:
                x = layer(x, layout, None if cache is None else _LayerCache(cache, index))
        for kept in () if cache is None else cache.layers:
            if isinstance(kept, StateLayer):
                kept.num_tokens += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class LlmeffForCausalLM(LlmeffPreTrainedModel, GenerationMixin):
    """Causal language model of transformers, from tokens to logits. Parameters are named as in transformers' Llama."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlmeffConfig):
        super().__init__(config)
        self.model = LlmeffModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` a cache for states if a mixer needs one. transformers' caches store only keys and values."""
        plain = self.config.unwrap()
        extends = all(plain.layer_mixer(index).extends for index in range(plain.num_layers))
        for name in set(_CACHE_NAMES) - {CACHE}:
            if model_kwargs.get(name) is not None:
                model_kwargs[CACHE] = model_kwargs.pop(name)
        if extends or generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but mixers with a state need "
                "their own cache: leave it out"
            )
        model_kwargs[CACHE] = self.make_cache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits, and the mean loss if labels are given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), nonzero for real tokens and zero for padding.
            position_ids: (B, T). Without a mask and a cache, a document begins wherever positions restart.
            past_key_values: cache of earlier tokens, which is extended in place.
            inputs_embeds: (B, T, D), given instead of input_ids.
            labels: (B, T), the input tokens, with -100 for tokens that do not count. The loss shifts them by one.
            use_cache: whether to make a cache if none is given. None for the config's value.
            logits_to_keep: number of last positions, or indices of positions, whose logits are returned. 0 for all.
            cache: another name of `past_key_values`, used from transformers 5.24 on. Any release accepts both.
            kwargs: `output_hidden_states`, `num_items_in_batch` and others for transformers' decorators and loss.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given, or attention_mask is not (B, S).
            TypeError: an argument is unknown, or the cache is given under both names.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    @classmethod
    def from_decoder(cls, decoder: Decoder, **kwargs: Any) -> "LlmeffForCausalLM":
        """Wraps a decoder as a transformers model, which shares the decoder's parameters without copying them.

        Args:
            decoder: a built decoder.
            kwargs: further fields of `LlmeffConfig` (`max_position_embeddings`, `eos_token_id`).
        """
        with torch.device("meta"):
            model = cls(LlmeffConfig.wrap(decoder.config, **kwargs))
        tensors = {shared_name(name): tensor for name, tensor in decoder.state_dict(keep_vars=True).items()}
        model.load_state_dict(tensors, assign=True)
        model.train(decoder.training)
        return model

    def to_decoder(self) -> Decoder:
        """Returns the model as a `Decoder`, which shares its parameters without copying them."""
        with torch.device("meta"):
            decoder = Decoder(self.config.unwrap())
        tensors = self.state_dict(keep_vars=True)
        decoder.load_state_dict({name: tensors[shared_name(name)] for name in decoder.state_dict()}, assign=True)
        return decoder.train(self.training)


AutoConfig.register("llmeff", LlmeffConfig)
AutoModel.register(LlmeffConfig, LlmeffModel)
AutoModelForCausalLM.register(LlmeffConfig, LlmeffForCausalLM)
