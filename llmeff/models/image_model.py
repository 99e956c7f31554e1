"""Saves and loads trained image models: their config, the preprocessing of images, and the weights in safetensors."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llmeff.core.config import Config, ConfigError, Count, Fraction, Positive, Text, read, validate
from llmeff.core.tensors import copy_tensors, stored_tensors
from llmeff.models.model import ModelConfig

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Preparation(Config):
    """Preprocessing of input images, and the names of the model's classes."""

    classes: tuple[Text, ...]
    """Names of the K classes, in the order of the logits."""
    mean: tuple[Fraction, Fraction, Fraction]
    """Subtracted from the red, green and blue values, which are in 0..1."""
    std: tuple[Positive, Positive, Positive]
    """Divides the red, green and blue values after `mean` is subtracted."""
    size: tuple[Count, Count]
    """(H, W) of the training images in pixels. Other images are resized to it."""


class _Saved(Config):
    """The content of `config.json`."""

    model: ModelConfig
    preparation: Preparation


def save_image_model(model: nn.Module, folder: Path, preparation: Preparation) -> None:
    """Writes a model and its preprocessing to a folder, as config.json and model.safetensors.

    Args:
        model: the model, built from the `ModelConfig` in its attribute `config`.
        folder: folder to write to; created if it does not exist.
        preparation: preprocessing of the model's input images.
    """
    assert isinstance(model.config, ModelConfig)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in stored_tensors(model).items()}
    save_file(tensors, folder / _WEIGHTS)
    about = _Saved(model=model.config, preparation=preparation)
    (folder / _CONFIG).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_image_model(folder: Path) -> tuple[nn.Module, Preparation]:
    """Loads a model that `save_image_model` wrote, in evaluation mode on the CPU, and its preprocessing.

    Raises:
        ConfigError: a file is missing or invalid, or the weights do not match the config.
    """
    about = validate(_Saved, read(folder / _CONFIG))
    model = about.model.build()
    try:
        copy_tensors(model, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{folder / _WEIGHTS}: cannot be loaded ({error})") from None
    return model.eval(), about.preparation
