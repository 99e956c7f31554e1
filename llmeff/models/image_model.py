"""A trained image model as files: its config with the preparation of pictures, and safetensors."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llmeff.core.config import Config, ConfigError, Count, Fraction, Positive, Text, read, validate
from llmeff.core.tensors import copy_tensors, stored_tensors
from llmeff.models.model import ModelConfig

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Preparation(Config):
    """How a picture becomes the model's input, and what the model's classes are called."""

    classes: tuple[Text, ...]
    """Names of the K classes, in the order of the logits."""
    mean: tuple[Fraction, Fraction, Fraction]
    """Subtracted from red, green and blue in 0..1."""
    std: tuple[Positive, Positive, Positive]
    """Divides the difference."""
    size: tuple[Count, Count]
    """(H, W) of the training images; other pictures are resized to it."""


class _Saved(Config):
    """The content of `config.json`."""

    model: ModelConfig
    preparation: Preparation


def save_image_model(model: nn.Module, folder: Path, preparation: Preparation) -> None:
    """Writes a model that was built from a config.

    Args:
        model: the model, with its `config`.
        folder: folder to write to; made if it does not exist.
        preparation: how pictures are prepared for the model.
    """
    assert isinstance(model.config, ModelConfig)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in stored_tensors(model).items()}
    save_file(tensors, folder / _WEIGHTS)
    about = _Saved(model=model.config, preparation=preparation)
    (folder / _CONFIG).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_image_model(folder: Path) -> tuple[nn.Module, Preparation]:
    """Loads a model in evaluation mode on the CPU, and its preparation.

    Raises:
        ConfigError: the folder holds no model, or its config and weights do not match.
    """
    about = validate(_Saved, read(folder / _CONFIG))
    model = about.model.build()
    try:
        copy_tensors(model, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{folder / _WEIGHTS}: cannot be loaded ({error})") from None
    return model.eval(), about.preparation
