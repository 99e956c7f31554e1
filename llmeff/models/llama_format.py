"""Saves and loads decoders in transformers' format, as stock Llama or Qwen3 if possible and otherwise as `llmeff`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmeff.attention.softmax import Softmax
from llmeff.core import files
from llmeff.core.config import ConfigError, validate
from llmeff.core.tensors import stored_tensors
from llmeff.models.model import save_model
from llmeff.models.transformer import Decoder, DecoderConfig

HEAD = "lm_head.weight"
"""Name of the output embedding, here and in transformers. It is not saved if the embeddings are tied."""

_STOCK = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_REFUSED = ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config")


def is_stock(config: DecoderConfig) -> bool:
    """Returns whether stock Llama or Qwen3 can represent the model: equal layers of softmax attention and an MLP."""
    shapes = {
        (
            config.layer_mixer(index).model_dump_json(),
            config.layer_heads(index),
            config.layer_mlp_width(index),
            layer.has_mixer and layer.has_mlp,
        )
        for index in range(config.num_layers)
        for layer in [config.layer(index)]
    }
    return isinstance(config.layer_mixer(0), Softmax) and len(shapes) == 1 and all(whole for *_, whole in shapes)


def shared_name(name: str) -> str:
    """Returns the name that a `Decoder` parameter has in transformers' models and files."""
    return name if name == HEAD else f"model.{name}"


def own_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of a decoder's config that the `llmeff` format adds to those of transformers.

    Vocabulary size and tying are left out, because transformers has fields for them.
    """
    return config.model_dump(mode="json", exclude={"name", "vocab_size", "tied_embeddings"})


def from_own_fields(fields: Mapping[str, Any], vocab_size: int, tied_embeddings: bool) -> DecoderConfig:
    """Builds a config from fields that `own_fields` returned.

    Raises:
        ConfigError: the fields are not a valid decoder config.
    """
    return validate(DecoderConfig, {**fields, "vocab_size": vocab_size, "tied_embeddings": tied_embeddings})


def _architecture(config: DecoderConfig) -> dict[str, Any]:
    if not is_stock(config):
        return {
            "architectures": ["LlmeffForCausalLM"],
            "model_type": "llmeff",
            "decoder_config": own_fields(config),
        }
    mixer = config.layer_mixer(0)
    assert isinstance(mixer, Softmax)
    model_type = "qwen3" if mixer.qk_norm else "llama"
    num_heads, num_kv_heads = config.layer_heads(0)
    return {
        "architectures": [_STOCK[model_type]],
        "model_type": model_type,
        "hidden_size": config.width,
        "intermediate_size": config.layer_mlp_width(0),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for releases before transformers 5
        "initializer_range": config.initial_std("embed_tokens.weight"),
    }


def save(
    decoder: Decoder,
    folder: Path,
    *,
    max_position_embeddings: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Writes model.safetensors, generation_config.json and, last, config.json. Each file is written atomically.

    Plain transformers loads a model for which `is_stock` is true. For others, import `llmeff.models.pretrained` first.

    Args:
        decoder: the model. The file stores its tensors in their current dtype.
        folder: folder to write to; created if it does not exist.
        max_position_embeddings: longest sequence in tokens that the model is meant for.
        bos_token_id: token that begins a text. None if the tokenizer has none.
        eos_token_id: token that ends a text. None if the tokenizer has none.
        pad_token_id: token that pads the rows of a batch. None if the tokenizer has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        shared_name(name): tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(decoder).items()
    }
    tokens = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    config = (
        _architecture(decoder.config)
        | tokens
        | {
            "vocab_size": decoder.config.vocabulary(),
            "tie_word_embeddings": decoder.config.tied_embeddings,
            "max_position_embeddings": max_position_embeddings,
            "dtype": str(decoder.norm.weight.dtype).removeprefix("torch."),
        }
    )
    with files.new_file(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    known = {name: token for name, token in tokens.items() if token is not None}
    files.write_text(folder / "generation_config.json", json.dumps(known, indent=2) + "\n")
    files.write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


@save_model.register
def _save_decoder(model: Decoder, folder: Path, *, max_length: int, end_id: int) -> None:
    save(model, folder, max_position_embeddings=max_length, bos_token_id=end_id, eos_token_id=end_id)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a model's config must be a JSON object, but this is a {type(content).__name__}")
    return content


def _stock_fields(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = [f"{name} is {raw[name]!r}" for name in _REFUSED if raw.get(name)]
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {raw['hidden_act']!r}, not 'silu'")
    if kind != "default":
        problems.append(f"rotary positions are {kind!r}, not 'default'")
    if problems:
        raise ConfigError(f"llmeff's decoder does not support this model: {'; '.join(problems)}")
    num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or (width // num_heads if model_type == "llama" else 128)
    return {
        "width": width,
        "num_layers": raw["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": raw.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "mlp_width": raw["intermediate_size"],
        "mixer": Softmax(qk_norm=model_type == "qwen3"),
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10_000.0)),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "init_std": raw.get("initializer_range", 0.02),
    }


def read_config(folder: Path) -> DecoderConfig:
    """Reads a decoder's config from the config.json in a folder.

    Raises:
        ConfigError: the file cannot be read, or it describes a model that `Decoder` does not support.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    model_type = raw.get("model_type")
    try:
        if model_type == "llmeff":
            fields = raw["decoder_config"]
        elif model_type in _STOCK:
            fields = _stock_fields(raw, model_type)
        else:
            known = ", ".join([*_STOCK, "llmeff"])
            raise ConfigError(f"model_type is {model_type!r}, but llmeff's decoder reads only {known}")
        return from_own_fields(fields, raw["vocab_size"], raw.get("tie_word_embeddings", False))
    except KeyError as error:
        raise ConfigError(f"{path}: lacks the field {error.args[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / name}: cannot be read ({error})") from None
    return tensors


def load(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Reads the config and tensors of a decoder that `save` wrote, or of a supported Llama or Qwen3 of transformers.

    Returns:
        The config, and the tensors by their names in `Decoder`, without a tied output embedding.

    Raises:
        ConfigError: a file is missing or damaged, or the tensors do not match the config.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder)
    if config.tied_embeddings:
        tensors.pop(HEAD, None)
    with torch.device("meta"):
        expected = stored_tensors(Decoder(config))
    problems = []
    for name, tensor in expected.items():
        found = tensors.get(shared_name(name))
        if found is None:
            problems.append(f"lacks {shared_name(name)}")
        elif found.shape != tensor.shape:
            problems.append(
                f"{shared_name(name)} has shape {tuple(found.shape)}, but the config gives {tuple(tensor.shape)}"
            )
    problems += [f"{name} is unexpected" for name in sorted(tensors.keys() - set(map(shared_name, expected)))]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(f"{folder}: the weights do not match the config: {'; '.join(problems[:3])}{more}")
    return config, {name: tensors[shared_name(name)] for name in expected}
