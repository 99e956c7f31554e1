"""The yardstick that everyone knows: U-Net on a classifier's encoder, as segmentation-models-pytorch builds it."""

from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.core.config import ConfigError, Count, Text
from llmeff.core.parameters import Role
from llmeff.core.registry import nearest
from llmeff.cost.workload import Workload
from llmeff.models.model import ImageModelConfig

# B batch, H height, W width, K classes


class UNet(ImageModelConfig):
    """U-Net (Ronneberger, Fischer and Brox 2015) with random weights; nothing is downloaded. Its price is traced."""

    name: Literal["unet"] = "unet"
    encoder: Text = "resnet18"
    """What halves the image again and again, by its name in segmentation-models-pytorch."""
    channels: tuple[Count, Count, Count, Count, Count] = (256, 128, 64, 32, 16)
    """Of the decoder's stages, innermost first."""

    def statistics_scope(self) -> Literal["nothing", "micro-batch", "ranks"]:
        """Scope of the batch statistics: a rank's micro-batch, since the model has batch normalization."""
        return "micro-batch"

    def build(self) -> "UNetModel":
        """The module, initialized from torch's default generator.

        Raises:
            ConfigError: segmentation-models-pytorch is not there, or knows no such encoder.
        """
        library = _library()
        known = library.encoders.get_encoder_names()
        if self.encoder not in known:
            raise ConfigError(
                f"model.encoder: segmentation-models-pytorch {library.__version__} knows no {self.encoder!r}."
                f"{nearest(self.encoder, known)}"
            )
        network = library.Unet(
            self.encoder,
            encoder_weights=None,
            decoder_channels=self.channels,
            classes=self.classes(),
        )
        return UNetModel(self, network)

    def least_size(self) -> int:
        """Every halving must leave a pixel."""
        return int(2 ** len(self.channels))

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """It cannot run its stages again."""
        yield from super().problems(workload, built)
        if built is None and workload.recompute:
            yield f"runtime.recompute is true, but model {self.name!r} cannot: use false"


def _library() -> ModuleType:
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise ConfigError(
            'model "unet" needs segmentation-models-pytorch: pip install "llmeff[segment]", with the torchvision that '
            "was built for your torch"
        ) from None
    except RuntimeError as error:  # of torchvision, whose operators are not there
        raise ConfigError(
            f'model "unet" needs segmentation-models-pytorch, which cannot be imported ({error}): install the '
            "torchvision that was built for your torch, from where you have torch"
        ) from None
    module: ModuleType = segmentation_models_pytorch
    return module


class UNetModel(nn.Module):
    """Images to logits of each pixel.

    Args:
        config: the model's.
        network: of segmentation-models-pytorch.
    """

    def __init__(self, config: UNet, network: nn.Module):
        super().__init__()
        self.config, self.network = config, network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, K, H, W), of any size: zeros are set at the right and below until all halvings go through."""
        height, width = images.shape[-2:]
        whole = self.config.least_size()
        logits: Tensor = self.network(F.pad(images, (0, -width % whole, 0, -height % whole)))
        return logits[..., :height, :width]

    def roles(self) -> dict[str, Role]:
        """What each parameter is, by name, told by the module that holds it."""
        head = set(self.network.segmentation_head.modules())  # type: ignore[union-attr]  # a module
        return {
            f"{prefix}.{name}": _role(module, name, parameter, is_head=module in head)
            for prefix, module in self.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }


def _role(module: nn.Module, name: str, parameter: Tensor, *, is_head: bool) -> Role:
    if parameter.dim() < 2:
        return "bias" if name == "bias" and isinstance(module, nn.Conv2d | nn.Linear) else "norm"
    if is_head:
        return "head"
    return "matrix" if isinstance(module, nn.Linear) else "conv"
