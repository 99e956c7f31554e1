"""U-Net with an image classifier as its encoder, from segmentation-models-pytorch: a well-known baseline."""

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
    """U-Net (Ronneberger, Fischer and Brox 2015), randomly initialized, without downloads. Its price is traced."""

    name: Literal["unet"] = "unet"
    encoder: Text = "resnet18"
    """Name of the encoder in segmentation-models-pytorch."""
    channels: tuple[Count, Count, Count, Count, Count] = (256, 128, 64, 32, 16)
    """Output channels of the decoder's stages, innermost first."""

    def statistics_scope(self) -> Literal["nothing", "micro-batch", "ranks"]:
        """Returns "micro-batch", because the model has batch normalization, which each rank computes alone."""
        return "micro-batch"

    def build(self) -> "UNetModel":
        """Builds the module, initialized from torch's default generator.

        Raises:
            ConfigError: segmentation-models-pytorch is not installed, or has no such encoder.
        """
        library = _library()
        known = library.encoders.get_encoder_names()
        if self.encoder not in known:
            raise ConfigError(
                f"model.encoder: segmentation-models-pytorch {library.__version__} has no encoder {self.encoder!r}."
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
        """Returns the smallest image side in pixels. Each stage halves the image, and one pixel must remain."""
        return int(2 ** len(self.channels))

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Yields the problems of image models, and a message if recomputation is on, which U-Net does not support."""
        yield from super().problems(workload, built)
        if built is None and workload.recompute:
            yield f"runtime.recompute is true, but model {self.name!r} does not support it: use false"


def _library() -> ModuleType:
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise ConfigError(
            'model "unet" needs segmentation-models-pytorch: pip install "llmeff[segment]", with the torchvision that '
            "was built for your torch"
        ) from None
    except RuntimeError as error:  # from torchvision, if its operators are missing
        raise ConfigError(
            f'model "unet" needs segmentation-models-pytorch, which cannot be imported ({error}): install the '
            "torchvision that was built for your torch, from the same index as torch"
        ) from None
    module: ModuleType = segmentation_models_pytorch
    return module


class UNetModel(nn.Module):
    """Maps images to the class logits of each pixel.

    Args:
        config: the model's config.
        network: the module of segmentation-models-pytorch.
    """

    def __init__(self, config: UNet, network: nn.Module):
        super().__init__()
        self.config, self.network = config, network

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to (B, K, H, W). Zero-pads at the right and bottom to a size that the stages can halve."""
        height, width = images.shape[-2:]
        whole = self.config.least_size()
        logits: Tensor = self.network(F.pad(images, (0, -width % whole, 0, -height % whole)))
        return logits[..., :height, :width]

    def roles(self) -> dict[str, Role]:
        """Returns the role of each parameter by name, derived from the module that owns the parameter."""
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
