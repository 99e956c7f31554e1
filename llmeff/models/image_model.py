"""A trained model of images as files: its config with what prepares a picture for it, and safetensors."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llmeff.core.config import Config, ConfigError, Count, Fraction, Positive, Text, read, validate
from llmeff.core.tensors import copy_tensors, stored_tensors
from llmeff.models.model import ModelConfig

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Preparation(Config):
    """What a picture is to a model, and what the model says of it."""

    classes: tuple[Text, ...]
    """K names, in the order of the logits."""
    mean: tuple[Fraction, Fraction, Fraction]
    """Of red, green and blue in 0..1: taken away."""
    std: tuple[Positive, Positive, Positive]
    """What the rest is divided by."""
    size: tuple[Count, Count]
    """(H, W) that it was trained on: other pictures are brought to it."""


class _Saved(Config):
    """`config.json`."""

    model: ModelConfig
    preparation: Preparation


def save_image_model(model: nn.Module, folder: Path, preparation: Preparation) -> None:
    """Writes a model that its config built.

    Args:
        model: with its `config`.
        folder: made if absent.
        preparation: what pictures are to it.
    """
    assert isinstance(model.config, ModelConfig)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in stored_tensors(model).items()}
    save_file(tensors, folder / _WEIGHTS)
    about = _Saved(model=model.config, preparation=preparation)
    (folder / _CONFIG).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_image_model(folder: Path) -> tuple[nn.Module, Preparation]:
    """The model in evaluation mode, on the CPU.

    Raises:
        ConfigError: the folder holds none, or what it holds does not fit together.
    """
    about = validate(_Saved, read(folder / _CONFIG))
    model = about.model.build()
    try:
        copy_tensors(model, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{folder / _WEIGHTS}: cannot be loaded ({error})") from None
    return model.eval(), about.preparation
