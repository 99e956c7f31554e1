"""A Llama-style decoder in plain PyTorch, with RMSNorm, a mixer and SwiGLU in each layer, and its law."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmeff.attention import norm, pattern
from llmeff.attention.mixer import Initialized, LayerCache, MixerConfig, MixerShape, parameter_order
from llmeff.attention.norm import RMSNorm
from llmeff.attention.softmax import Softmax
from llmeff.core.config import Config, Count, Flag, Positive, Text
from llmeff.core.layout import Layout
from llmeff.core.parameters import Role
from llmeff.cost import laws
from llmeff.cost.arrays import Weight
from llmeff.cost.tape import Array, Tape
from llmeff.cost.workload import Workload
from llmeff.models import cross_entropy
from llmeff.models.cross_entropy import cross_entropy_sum
from llmeff.models.model import LanguageModelConfig

# B batch, T sequence, D width, F MLP width, V vocabulary, N heads, H head width


class LayerConfig(Config):
    """Settings of one layer that differ from the model's. A field that is None takes the model's value."""

    num_heads: Count | None = None
    """Number of query heads."""
    num_kv_heads: Count | None = None
    """Number of key and value heads."""
    mlp_width: Count | None = None
    """F, width of the MLP."""
    mixer: MixerConfig | None = None
    """The layer's mixer."""
    has_mixer: Flag = True
    """Whether the layer has a mixer. Layers of pruned models may have none."""
    has_mlp: Flag = True
    """Whether the layer has an MLP. Layers of pruned models may have none."""


class DecoderConfig(LanguageModelConfig):
    """A Llama-style decoder (Touvron et al. 2023)."""

    name: Literal["decoder"] = "decoder"
    width: Count = 256
    """D, width of the residual stream."""
    num_layers: Count = 6
    """Number of layers."""
    num_heads: Count = 4
    """N, number of query heads."""
    num_kv_heads: Count | Literal["auto"] = "auto"
    """Number of key and value heads. Fewer than `num_heads` is grouped-query attention, and 1 is multi-query attention.
    auto: `num_heads`."""
    head_dim: Count | Literal["auto"] = "auto"
    """H, width of a head. auto: width / num_heads."""
    mlp_width: Count | Literal["auto"] = "auto"
    """F, width of the MLP. auto: 8/3 width, rounded up to a multiple of 32. SwiGLU then has about as many parameters as
    a two-layer MLP with 4 times the width."""
    mixer: MixerConfig = Softmax()
    """The mixer of all layers, unless `pattern` or `layers` name another."""
    pattern: Text | None = None
    """Names of the layers' mixers, such as "sliding*3+softmax", repeated from the first layer to the last. None if all
    layers have `mixer`."""
    mixers: dict[Text, MixerConfig] = Field(default_factory=dict)
    """Named mixers with settings, for use in the pattern. Other names there are mixers with default settings."""
    tied_embeddings: Flag = True
    """Use one matrix to embed the tokens and to compute the logits."""
    rope_theta: Positive = 10_000.0
    """Base of the angles of rotary position embeddings."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in every RMSNorm, so that nothing is divided by 0."""
    init_std: Positive | Literal["auto"] = "auto"
    """Standard deviation of the initial weights. auto: sqrt(2 / (5 width)) (Nguyen and Salazar 2019)."""
    layers: tuple[LayerConfig, ...] | None = None
    """One entry per layer, if layers differ. None if all layers are alike."""

    @model_validator(mode="after")
    def _fits(self) -> "DecoderConfig":
        problems = []
        if self.head_dim == "auto" and self.width % self.num_heads:
            problems.append(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}: change either, or set head_dim"
            )
        elif self.head_width % 2:
            problems.append(f"head_dim is {self.head_width}, but rotary positions rotate pairs: use an even number")
        if self.layers is not None and len(self.layers) != self.num_layers:
            problems.append(f"layers has {len(self.layers)} entries, but num_layers is {self.num_layers}")
        elif wrong := self._pattern_problems():
            problems += wrong
        else:
            for index in range(self.num_layers):
                heads, kv_heads = self.layer_heads(index)
                if heads % kv_heads:
                    problems.append(f"layer {index}: num_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
                    break
                if wrong := self.layer_mixer(index).problems(self.mixer_shape(index)):
                    problems += [f"layer {index}: {problem}" for problem in wrong]
                    break
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _pattern_problems(self) -> list[str]:
        """Returns messages about the fields that assign mixers to layers."""
        if self.pattern is not None:
            found = pattern.problems(self.pattern, self.mixers, self.num_layers)
            if self.mixer != Softmax():
                found.append(
                    f"mixer is {self.mixer.name!r}, but no layer uses it, because pattern {self.pattern!r} names the "
                    "mixers of all layers: leave mixer out, and define named mixers in mixers"
                )
            return found
        unused = ", ".join(map(repr, self.mixers))
        return [f"mixers defines {unused}, but there is no pattern that uses it: set pattern"] if unused else []

    @property
    def head_width(self) -> int:
        """H, width of a head, with "auto" resolved."""
        return self.width // self.num_heads if self.head_dim == "auto" else self.head_dim

    def layer(self, index: int) -> LayerConfig:
        """Returns the layer's entry in `layers`, or an empty entry if all layers are alike."""
        return LayerConfig() if self.layers is None else self.layers[index]

    def layer_heads(self, index: int) -> tuple[int, int]:
        """Returns a layer's numbers of query heads and of key-value heads."""
        own = self.layer(index)
        heads = own.num_heads or self.num_heads
        shared = heads if self.num_kv_heads == "auto" else self.num_kv_heads
        return heads, own.num_kv_heads or shared

    def layer_mixer(self, index: int) -> MixerConfig:
        """Returns the mixer of a layer."""
        own = self.layer(index).mixer
        if own is not None:
            return own
        if self.pattern is None:
            return self.mixer
        return next(islice(pattern.mixers(self.pattern, self.mixers), index, None))

    def layer_mlp_width(self, index: int) -> int:
        """Returns F, the MLP width of a layer."""
        own = self.layer(index).mlp_width
        if own is not None:
            return own
        return 32 * math.ceil(8 * self.width / 3 / 32) if self.mlp_width == "auto" else self.mlp_width

    def mixer_shape(self, index: int) -> MixerShape:
        """Returns the widths from which a layer's mixer is built."""
        heads, kv_heads = self.layer_heads(index)
        return MixerShape(
            width=self.width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_width,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
        )

    def _mixers(self) -> Iterator[tuple[MixerConfig, MixerShape]]:
        """Yields the mixer and its widths for each layer that has a mixer."""
        for index in range(self.num_layers):
            if self.layer(index).has_mixer:
                yield self.layer_mixer(index), self.mixer_shape(index)

    def initial_std(self, name: str) -> float:
        """Returns the standard deviation of a matrix's initial weights. `name` is the parameter's name."""
        std = math.sqrt(2 / (5 * self.width)) if self.init_std == "auto" else self.init_std
        written = name.endswith(("o_proj.weight", "down_proj.weight"))
        return std / math.sqrt(2 * self.num_layers) if written else std

    def build(self) -> "Decoder":
        """Builds the module, initialized from torch's default generator."""
        return Decoder(self)

    def weights(self) -> list[Weight]:
        """Returns the parameters in the module's order, in which strategies distribute them. Laws use another order."""
        found: list[Weight] = []
        for layer, used in groupby(super().weights(), lambda weight: weight.name.rpartition(".self_attn.")[0]):
            own = list(used)
            if layer:
                index = int(layer.removeprefix("layers."))
                order = parameter_order(self.layer_mixer(index), self.mixer_shape(index))
                own.sort(key=lambda weight: order[weight.name.rpartition(".self_attn.")[2]])
            found += own
        return found

    def roles(self) -> dict[str, Role]:
        """Returns the role of each parameter by its name, which the law and the module share."""
        return {weight.name: _role(weight.name, len(weight.shape)) for weight in self.weights()}

    def buffer_bytes(self, number_bytes: int) -> int:
        """Returns the bytes of the mixers' buffers."""
        return sum(mixer.buffer_bytes(shape, number_bytes) for mixer, shape in self._mixers())

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Yields problems of all language models, and a message for each requirement of a mixer that is not met."""
        yield from super().problems(workload, built)
        if built is None:
            lacking = [mixer.missing_requirements(shape, on_cpu=workload.on_cpu) for mixer, shape in self._mixers()]
            yield from dict.fromkeys(problem for problems in lacking for problem in problems)

    def cache_bytes(self, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of the decoding cache after a sequence of `num_tokens`, see `MixerConfig.cache_bytes`."""
        return sum(mixer.cache_bytes(shape, num_tokens, number_bytes) for mixer, shape in self._mixers())

    def law(self, tape: Tape, batch: laws.Batch) -> Array:
        """Records the price of `Decoder.forward` with targets on the tape, and returns the loss.

        Local variables live as long as in `Decoder.forward`, because their lifetimes determine the memory.
        """
        with tape.within("embed_tokens", "embedding"):
            embedding = tape.weight("weight", self.vocabulary(), self.width)
            x = laws.embedding(tape, batch, embedding)
        for index in range(self.num_layers):
            with tape.within(f"layers.{index}"):
                layer = partial(self._layer_law, tape, batch, index)
                x = tape.checkpoint(layer, x) if tape.workload.recompute else layer(x)
        with tape.within("norm", "norms"):
            x = norm.law(tape, x)
        with tape.within("lm_head", "head"):
            head = embedding if self.tied_embeddings else tape.weight("weight", self.vocabulary(), self.width)
            return cross_entropy.law(tape, x, head, batch)

    def _layer_law(self, tape: Tape, batch: laws.Batch, index: int, x: Array) -> Array:
        own = self.layer(index)
        if own.has_mixer:
            with tape.within("input_layernorm", "norms"):
                normed = norm.law(tape, x)
            with tape.within("self_attn", "attention"):
                mixed = self.layer_mixer(index).law(self.mixer_shape(index), tape, normed, batch)
                del normed
                x = laws.add(tape, x, mixed)
                del mixed
        if own.has_mlp:
            with tape.within("post_attention_layernorm", "norms"):
                normed = norm.law(tape, x)
            with tape.within("mlp", "mlp"):
                mixed = _mlp_law(tape, normed, self.layer_mlp_width(index))
                del normed
                x = laws.add(tape, x, mixed)
        return x


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6). (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


def _mlp_law(tape: Tape, x: Array, mlp_width: int) -> Array:
    width = x.shape[-1]
    gate = laws.silu(tape, laws.linear(tape, x, tape.weight("gate_proj.weight", mlp_width, width)))
    up = laws.linear(tape, x, tape.weight("up_proj.weight", mlp_width, width))
    product = laws.multiply(tape, gate, up)
    del gate, up
    return laws.linear(tape, product, tape.weight("down_proj.weight", width, mlp_width))


class Layer(nn.Module):
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x)). In a pruned model, the mixer or the MLP may be missing."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        own = config.layer(index)
        if own.has_mixer:
            self.input_layernorm = RMSNorm(config.width, config.norm_eps)
            self.self_attn = config.layer_mixer(index).build(config.mixer_shape(index))
        if own.has_mlp:
            self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
            self.mlp = MLP(config.width, config.layer_mlp_width(index))
        self.has_mixer, self.has_mlp = own.has_mixer, own.has_mlp

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Prepares the layout for the layer's mixer, see `Mixer.prepare`."""
        if self.has_mixer:
            self.self_attn.prepare(layout, num_rows, dtype)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        if self.has_mixer:
            x = x + self.self_attn(self.input_layernorm(x), layout, cache)
        if self.has_mlp:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Head(nn.Linear):
    """The output embedding and the loss in one module, so that sharding strategies gather its weight when it runs."""

    def forward(self, x: Tensor, targets: Tensor | None = None, loss_chunk: int | None = None) -> Tensor:
        """Maps (B, T, D) states to (B, T, V) logits or, given targets, to the summed loss, see `Decoder.forward`."""
        if targets is None:
            return F.linear(x, self.weight)
        return cross_entropy_sum(x, self.weight, targets, loss_chunk)


class Decoder(nn.Module):
    """Maps tokens to logits or to a summed loss. Parameters are named as in transformers' Llama, without `model.`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        vocabulary = config.vocabulary()
        self.embed_tokens = nn.Embedding(vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = Head(config.width, vocabulary, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.recompute = False
        """Whether training saves only each layer's input, and recomputes the layer in backward (Chen et al. 2016)."""
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws weights from a normal distribution.

        As in GPT-2, weights that map into the residual stream are divided by sqrt(2 num_layers).

        Parameters with one dimension are set to 1. Modules that are `Initialized` set some parameters themselves.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, self.config.initial_std(name))
            else:
                parameter.fill_(1.0)
        for module in self.modules():
            if isinstance(module, Initialized):
                for name, values in module.initial().items():
                    getattr(module, name).copy_(values)

    def hidden(self, tokens: Tensor, layout: Layout | None = None, caches: Any = None) -> Tensor:
        """Maps (B, T) tokens to (B, T, D) states before the output embedding. `caches[i]` is the cache of layer i."""
        if layout is None:
            layout = Layout.plain(tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        if recompute:  # make shared tables first: under torch.compile, a part that runs twice must not write them
            device = tokens.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            for layer in self.layers:
                cast(Layer, layer).prepare(layout, tokens.shape[0], dtype)
        for index, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, layout, use_reentrant=False)
            else:
                x = layer(x, layout, None if caches is None else caches[index])
        return cast(Tensor, self.norm(x))

    def forward(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        targets: Tensor | None = None,
        loss_chunk: int | None = None,
    ) -> Tensor:
        """Returns the logits, or the summed loss if targets are given.

        Args:
            tokens: (B, T) int64.
            layout: positions and documents. None for one document per row.
            targets: (B, T) int64, the next token at each position; `IGNORED_TOKEN` marks targets that do not count.
            loss_chunk: number of tokens whose logits are in memory at the same time. None for all tokens.

        Returns:
            (B, T, V) logits or, if targets are given, the cross-entropy in nats summed over the counted targets, a
            float32 scalar.
        """
        return cast(Tensor, self.lm_head(self.hidden(tokens, layout), targets, loss_chunk))

    def roles(self) -> dict[str, Role]:
        """Returns the role of each parameter by name, from which the optimizer's groups follow."""
        return {name: _role(name, parameter.dim()) for name, parameter in self.named_parameters()}


def _role(name: str, num_dims: int) -> Role:
    if name.startswith("embed_tokens"):
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    return "matrix" if num_dims == 2 else "norm"


# name: width, layers, heads, key-value heads, MLP width, tied. Comments give the number of parameters, as a function of
# the vocabulary size V or for the V of the original model.
_PRESETS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "llama-1m": (128, 4, 4, 4, 352, True),  # 0.8 M + 128 V
    "llama-10m": (384, 6, 6, 6, 1024, True),  # 10.6 M + 384 V
    "llama-30m": (512, 9, 8, 4, 1536, True),  # 28 M + 512 V
    "llama-125m": (768, 12, 12, 12, 2048, True),  # 85 M + 768 V: 124 M at V = 50,304
    "llama-350m": (1024, 24, 16, 16, 2816, True),  # 308 M + 1,024 V
    "llama-1b": (2048, 16, 32, 8, 8192, True),  # Llama 3.2 1B's shape: 973 M + 2,048 V
    "llama-3b": (3072, 28, 24, 8, 8192, True),  # Llama 3.2 3B's shape
    "llama-7b": (4096, 32, 32, 32, 11_008, False),  # Llama 2 7B's shape: 6.74 B at V = 32,000
}


def _preset(name: str) -> type[DecoderConfig]:
    width, layers, heads, kv_heads, mlp_width, tied = _PRESETS[name]
    fields: dict[str, Any] = {
        "name": (Literal[name], name),
        "width": (Count, width),
        "num_layers": (Count, layers),
        "num_heads": (Count, heads),
        "num_kv_heads": (Count | Literal["auto"], kv_heads),
        "mlp_width": (Count | Literal["auto"], mlp_width),
        "tied_embeddings": (Flag, tied),
    }
    return create_model(name, __base__=DecoderConfig, __module__=__name__, **fields)


PRESETS = {name: _preset(name) for name in _PRESETS}
"""Configs of decoders with well-known shapes, selected by `model = "<name>"`."""
