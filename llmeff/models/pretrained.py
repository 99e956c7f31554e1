"""The Hugging Face face of the decoder: its layers as a transformers model, with cache, `generate` and the Auto classes."""

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
"""What this release of transformers calls a cache, in a model's arguments and in its output: `cache` from 5.24 on."""
_PASSED = {"output_hidden_states", "output_attentions", "num_items_in_batch", "ignore_index", "shift_labels"}
"""What a model takes beside the arguments of its own: for transformers' decorators and for its loss."""


class LlmeffConfig(PreTrainedConfig):
    """A `DecoderConfig` as transformers keeps it: `decoder_config` beside the fields that transformers knows."""

    model_type = "llmeff"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    decoder_config: dict[str, Any] | None = None
    """`DecoderConfig`'s fields, less the vocabulary and the tying; those left out have its defaults."""
    vocab_size: int = 256
    """V."""
    tie_word_embeddings: bool = True
    """One matrix embeds the tokens and gives the logits."""
    max_position_embeddings: int = 1024
    """The longest sequence, in tokens, that the model is meant for."""
    use_cache: bool = True
    """Keep keys and values for decoding unless a call says otherwise."""
    bos_token_id: int | None = None
    """Begins a text."""
    eos_token_id: int | list[int] | None = None
    """Ends a text."""
    pad_token_id: int | None = None
    """Fills up the rows of a batch."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.decoder_config = own_fields(self._read(self.decoder_config or {}))
        super().__post_init__(**kwargs)

    def _read(self, fields: dict[str, Any]) -> DecoderConfig:
        return from_own_fields(fields, self.vocab_size, self.tie_word_embeddings)

    @classmethod
    def wrap(cls, config: DecoderConfig, **kwargs: Any) -> "LlmeffConfig":
        """The decoder's config with transformers' further fields."""
        return cls(
            decoder_config=own_fields(config),
            vocab_size=config.vocabulary(),
            tie_word_embeddings=config.tied_embeddings,
            **kwargs,
        )

    def unwrap(self) -> DecoderConfig:
        """The decoder's config, with the vocabulary as it now is."""
        assert self.decoder_config is not None
        return self._read(self.decoder_config)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.unwrap().width

    @property
    def num_hidden_layers(self) -> int:
        """How many layers."""
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
        """H."""
        return self.unwrap().head_width


class StateLayer(CacheLayerMixin):
    """What a mixer keeps by name, as a layer of a transformers cache: it is reordered, repeated and selected with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.num_tokens = 0
        """Tokens that the states have seen, padding included."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """States come with the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values go elsewhere."""
        raise NotImplementedError("this layer keeps states by name, no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask is over, from the first."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that were seen."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No end."""
        return -1

    def reset(self) -> None:
        """As before the first token."""
        self.states.clear()
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """States have forgotten what was before."""
        raise ValueError(
            "a mixer with a state cannot go back to an earlier token: decode without assisted or prompt-lookup generation"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows of these numbers."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows of these numbers."""
        self.states = {name: state.index_select(0, indices.to(state.device)) for name, state in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so often."""
        self.states = {name: state.repeat_interleave(repeats, dim=0) for name, state in self.states.items()}

    def offload(self) -> None:
        """States are small and stay."""

    def prefetch(self) -> None:
        """They are there."""


@dataclass(frozen=True)
class _LayerCache:
    """One layer's part of a transformers cache, as a mixer takes it."""

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
                f"layer {self.index} of the cache is {type(layer).__name__}, and its mixer keeps states: give no cache, or "
                "the one that the model makes"
            )
        return layer


def _cache_of(given: Mapping[str, Any]) -> Cache | None:
    """The cache among what a model is given beside the tokens, by the one name or the other.

    Nothing else that could matter is passed over, or a cache by a third name would be, and other text be written.

    Raises:
        TypeError: two caches, or an argument that no model here has.
    """
    told = {name: value for name, value in given.items() if value is not None and value is not False}
    unknown = sorted(told.keys() - _PASSED - set(_CACHE_NAMES))
    if unknown:
        raise TypeError(
            f"forward() is given {unknown[0]}, which llmeff's models do not have (documents are told by position_ids)."
            + nearest(unknown[0], {*_PASSED, CACHE})
        )
    caches = [told[name] for name in _CACHE_NAMES if name in told]
    if len(caches) > 1:
        raise TypeError(f"forward() is given {' and '.join(_CACHE_NAMES)}, two names of one thing: give {CACHE} alone")
    return caches[0] if caches else None


def _documents(positions: Tensor) -> Tensor | None:
    """Numbers the documents packed in each row, by where positions do not go on by one; None if each row is one."""
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
    """What transformers says of a batch, as the mixers take it.

    Documents are told apart by their positions, as transformers does, where there is neither a cache nor a mask.
    """
    if padding is not None and padding.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(padding.shape)}; give (batch, tokens), True for real ones")
    past = 0 if cache is None else int(cache.get_seq_length())
    documents = None
    if positions is None:
        positions = torch.arange(past, past + length, device=device)[None]
    elif cache is None and padding is None:
        documents = _documents(positions)
        positions = positions if documents is None else places_in(documents)  # they may begin at any
    if padding is not None:
        padding = None if bool(padding.all()) else padding.bool()
    return Layout(positions=positions, documents=documents, padding=padding, past=past)


class LlmeffPreTrainedModel(PreTrainedModel):
    """What the two models below have in common."""

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
        """Called by transformers for each module that holds parameters; leaves alone what came from a file."""
        if isinstance(module, nn.Linear | nn.Embedding):
            # transformers tells no name here, so the layers' projections carry their scale
            std = getattr(module, "initial_std", self.config.unwrap().initial_std(""))
            initialization.normal_(module.weight, 0.0, std)
        elif isinstance(module, RMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, Initialized):
            for name, values in module.initial().items():
                initialization.copy_(getattr(module, name), values)

    def make_cache(self) -> Cache:
        """An empty cache that every mixer can decode with."""
        config = self.config.unwrap()
        layers = [index for index in range(config.num_layers) if config.layer(index).has_mixer]
        if all(config.layer_mixer(index).extends for index in layers):
            return DynamicCache(config=self.config)
        return Cache(layers=[DynamicLayer() if config.layer_mixer(index).extends else StateLayer() for index in layers])

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Asked by `generate` for a cache of fixed size: the layout makes the mask from the padding itself."""
        return attention_mask


class LlmeffModel(LlmeffPreTrainedModel):
    """Tokens to the states before the output embedding."""

    def __init__(self, config: LlmeffConfig):
        super().__init__(config)
        plain = config.unwrap()
        self.embed_tokens = nn.Embedding(plain.vocabulary(), plain.width)
        self.layers = nn.ModuleList(Layer(plain, index) for index in range(plain.num_layers))
        self.norm = RMSNorm(plain.width, plain.norm_eps)
        # the first cached layer's length is the cache's, so layers without a mixer are not counted
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
        """(B, T) tokens or (B, T, D) embeddings to (B, T, D) states; arguments as transformers' Llama has them.

        The cache may go by either name, under any release of transformers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
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
    """Tokens to logits, with parameter names as in transformers' Llama."""

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
        """Asked by `generate`: transformers' own caches hold keys and values only."""
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
                f"cache_implementation is {generation_config.cache_implementation!r}: mixers with a state have a cache of "
                "their own; leave it out"
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
        """Logits, and the mean loss where labels are given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), nonzero for real tokens, zero for padding.
            position_ids: (B, T); without mask and cache, documents packed in a row are told by where it starts anew.
            past_key_values: what was kept of earlier tokens; extended in place.
            inputs_embeds: (B, T, D), in place of input_ids.
            labels: (B, T), the input tokens themselves, -100 where one does not count; shifted here.
            use_cache: make a cache and return it.
            logits_to_keep: only the last so many positions' logits, or those at these positions; 0: all.
            cache: `past_key_values` by its name from transformers 5.24 on; either does under any release.
            kwargs: `output_hidden_states`, `num_items_in_batch` and what else the decorators and the loss take.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, or a mask that is not (B, S).
            TypeError: an argument that is not one of these, or a cache by each name.
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
        """The same model as transformers sees it: the parameters are shared, not copied.

        Args:
            decoder: a built model.
            kwargs: further fields of `LlmeffConfig` (`max_position_embeddings`, `eos_token_id`).
        """
        with torch.device("meta"):
            model = cls(LlmeffConfig.wrap(decoder.config, **kwargs))
        tensors = {shared_name(name): tensor for name, tensor in decoder.state_dict(keep_vars=True).items()}
        model.load_state_dict(tensors, assign=True)
        model.train(decoder.training)
        return model

    def to_decoder(self) -> Decoder:
        """The reverse of `from_decoder`, sharing the parameters too."""
        with torch.device("meta"):
            decoder = Decoder(self.config.unwrap())
        tensors = self.state_dict(keep_vars=True)
        decoder.load_state_dict({name: tensors[shared_name(name)] for name in decoder.state_dict()}, assign=True)
        return decoder.train(self.training)


AutoConfig.register("llmeff", LlmeffConfig)
AutoModel.register(LlmeffConfig, LlmeffModel)
AutoModelForCausalLM.register(LlmeffConfig, LlmeffForCausalLM)
