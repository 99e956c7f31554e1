"""SegNet (Badrinarayanan, Kendall and Cipolla 2017), with optional connections that preserve detail, and its law.

Pooling indices restore the positions that pooling loses. Optional connections, from encoder to decoder and around the
convolutions of a stage, restore more detail. They implement two ideas of "An Enhanced Encoder-Decoder Network
Architecture for Reducing Information Loss in Image Semantic Segmentation" (arXiv 2406.01605; also, with almost the same
abstract, Computer Measurement and Control 2024, 32(1)). The paper's full text was not available, so the places of the
connections and the way they join are our interpretation.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmeff.core.config import Count, Flag
from llmeff.core.parameters import Role
from llmeff.cost import image_laws
from llmeff.cost.tape import Array, Tape, Weight
from llmeff.models import image_norm
from llmeff.models.image_norm import ImageNorm, replayed
from llmeff.models.model import ImageModelConfig

# B batch, C channels, H height, W width, K classes

Connection = Literal["none", "add", "concat", "concat1x1"]
"""How the map of an encoder stage, before pooling, joins the unpooled map of the decoder. none: not at all, as in the
original. add: the maps are added, without parameters. concat: the maps are concatenated, so that the decoder's first
convolution reads twice as many channels. concat1x1: the maps are concatenated, and a 1x1 convolution reduces them to
the decoder's number of channels."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Channels and kernel sizes of a SegNet."""

    encoder: tuple[tuple[int, ...], ...]
    """Output channels of each convolution in each stage, outermost stage first. Pooling follows every stage."""
    decoder: tuple[tuple[int, ...], ...]
    """Output channels of each convolution in each stage, innermost stage first. Unpooling precedes every stage."""
    kernel: int
    """Kernel size of the convolutions in all stages, in pixels."""
    head_kernel: int
    """Kernel size of the last convolution, which computes the logits, in pixels."""
    decoder_relu: bool
    """Whether ReLU follows each convolution of the decoder."""


class SegNetConfig(ImageModelConfig):
    """Fields that all SegNets share."""

    width: Count = 64
    """Channels of the outermost stage. The other stages have multiples of this number."""
    connection: Connection = "none"
    """How encoder maps join the decoder, in addition to the pooling indices."""
    residual_blocks: Flag = False
    """Add a residual connection to each stage, around its longest run of convolutions that keep the channel count."""
    norm: ImageNorm = "batch"
    """Normalization after every convolution except the last."""
    norm_groups: Count = 8
    """Number of channel groups if `norm` is "group"."""

    @model_validator(mode="after")
    def _fits(self) -> "SegNetConfig":
        shape = self.architecture()
        channels = {own for stage in (*shape.encoder, *shape.decoder) for own in stage}
        odd = sorted(own for own in channels if own % self.norm_groups)
        if self.norm == "group" and odd:
            raise ValueError(
                f"norm_groups is {self.norm_groups}, but a convolution has {odd[0]} channels: use a divisor of {odd[0]}"
            )
        return self

    def architecture(self) -> Architecture:
        """Returns the channels and kernel sizes of the model."""
        raise NotImplementedError(type(self))

    def build(self) -> "SegNet":
        """Builds the module, initialized from torch's default generator."""
        return SegNet(self)

    def statistics_scope(self) -> Literal["nothing", "micro-batch", "ranks"]:
        """Returns the scope of batch statistics, which depends on `norm`."""
        kinds: dict[str, Literal["micro-batch", "ranks"]] = {"batch": "micro-batch", "batch_sync": "ranks"}
        return kinds.get(self.norm, "nothing")

    def roles(self) -> dict[str, Role]:
        """Returns the role of each trained parameter by its name, which the law and the module share."""
        return {weight.name: _role(weight.name, len(weight.shape)) for weight in self.weights() if weight.is_trained}

    def weights(self) -> list[Weight]:
        """Returns the parameters in the module's order, where a stage's normalizations follow all its convolutions."""
        used = super().weights()
        stages = [_stage(weight.name) for weight in used]
        return sorted(used, key=lambda weight: (stages.index(_stage(weight.name)), ".norms." in weight.name))

    def buffer_bytes(self, number_bytes: int) -> int:
        """Returns the bytes of the running means and variances."""
        shape = self.architecture()
        return 0 if self.norm == "group" else 2 * number_bytes * sum(map(sum, (*shape.encoder, *shape.decoder)))

    def least_size(self) -> int:
        """Returns the smallest image side in pixels. Each pooling halves the image, and one pixel must remain."""
        return int(2 ** len(self.architecture().encoder))

    def law(self, tape: Tape, batch: Any) -> Array:
        """Records the price of `SegNet.forward` and the loss on the tape, and returns the loss.

        Local variables live as long as in `SegNet.forward`, because their lifetimes determine the memory.
        """
        shape = self.architecture()
        x, kept = batch.images, []
        for index, channels in enumerate(shape.encoder):
            run = partial(self._stage_law, tape, f"encoder.{index}", channels, has_relu=True)
            x = self._run_law(tape, run, x)
            size = x.shape[-2:]
            with tape.within(f"encoder.{index}", "pooling"):
                pooled, indices = image_laws.max_pool(tape, x)
            kept.append((x if self.connection != "none" else None, indices, size))
            x = pooled
            del pooled, indices
        for index, channels in enumerate(shape.decoder):
            skipped, indices, size = kept.pop()
            with tape.within(f"decoder.{index}", "pooling"):
                x = image_laws.max_unpool(tape, x, indices, size)
            del indices
            run = partial(self._decoder_law, tape, index, channels, skipped)
            x = self._run_law(tape, run, x)
            del skipped, run
        with tape.within("head", "head"):
            weight = tape.weight("weight", self.classes(), x.shape[1], shape.head_kernel, shape.head_kernel)
            logits = image_laws.convolution(tape, x, weight, tape.weight("bias", self.classes()))
        del x
        with tape.within("", "loss"):
            return image_laws.cross_entropy(tape, logits, batch)

    def _run_law(self, tape: Tape, run: Any, x: Array) -> Array:
        return tape.checkpoint(run, x) if tape.workload.recompute else cast(Array, run(x))

    def _decoder_law(self, tape: Tape, index: int, channels: tuple[int, ...], skipped: Array | None, x: Array) -> Array:
        if skipped is not None:
            with tape.within(f"decoder.{index}", "connections"):
                x = (
                    image_laws.add(tape, x, skipped)
                    if self.connection == "add"
                    else image_laws.concat(tape, x, skipped)
                )
                if self.connection == "concat1x1":
                    weight = tape.weight("join.weight", skipped.shape[1], x.shape[1], 1, 1)
                    x = image_laws.convolution(tape, x, weight, None)
        has_relu = self.architecture().decoder_relu
        return self._stage_law(tape, f"decoder.{index}", channels, x, has_relu=has_relu)

    def _stage_law(self, tape: Tape, path: str, channels: tuple[int, ...], x: Array, *, has_relu: bool) -> Array:
        kernel, place = self.architecture().kernel, shortcut((x.shape[1], *channels)) if self.residual_blocks else None
        shortcut_from: Array | None = None
        for number, own in enumerate(channels):
            if place is not None and number == place[0]:
                shortcut_from = x
            with tape.within(f"{path}.convs.{number}", "convolutions"):
                weight = tape.weight("weight", own, x.shape[1], kernel, kernel)
                x = image_laws.convolution(tape, x, weight, tape.weight("bias", own))
            with tape.within(f"{path}.norms.{number}", "norms"):
                x = image_norm.law(tape, x, self.norm, self.norm_groups)
            with tape.within(path, "activations"):
                if place is not None and number == place[1] - 1:
                    assert shortcut_from is not None
                    x = image_laws.add(tape, x, shortcut_from)
                    shortcut_from = None
                x = image_laws.relu(tape, x) if has_relu else x
        return x


class SegNetVGG(SegNetConfig):
    """SegNet with the thirteen convolutions of VGG16 and a mirrored decoder: 29,449,355 parameters with 11 classes."""

    name: Literal["segnet"] = "segnet"

    def architecture(self) -> Architecture:
        """Returns stages of 2, 2, 3, 3 and 3 convolutions of 1, 2, 4, 8 and 8 times the width, mirrored in decoding."""
        w = self.width
        return Architecture(
            encoder=((w,) * 2, (2 * w,) * 2, (4 * w,) * 3, (8 * w,) * 3, (8 * w,) * 3),
            decoder=((8 * w,) * 3, (8 * w, 8 * w, 4 * w), (4 * w, 4 * w, 2 * w), (2 * w, w), (w,)),
            kernel=3,
            head_kernel=3,
            decoder_relu=True,
        )


class SegNetBasic(SegNetConfig):
    """The small SegNet: four stages of one 7x7 convolution each in encoder and decoder.

    It has 1,416,587 parameters with 11 classes. The original's local response normalization of raw pixels is omitted,
    because images here have mean 0 and variance 1.
    """

    name: Literal["segnet-basic"] = "segnet-basic"

    def architecture(self) -> Architecture:
        """Returns stages that all have the same width, with a decoder without ReLU."""
        stages = ((self.width,),) * 4
        return Architecture(encoder=stages, decoder=stages, kernel=7, head_kernel=1, decoder_relu=False)


def shortcut(channels: tuple[int, ...]) -> tuple[int, int] | None:
    """Finds the longest run of convolutions that keep the number of channels.

    Args:
        channels: channels of the stage's input, then of the output of each convolution.

    Returns:
        (index of the first convolution, index after the last convolution), or None if no convolution keeps the number.

    >>> shortcut((3, 64, 64)), shortcut((512, 512, 512, 256)), shortcut((128, 64))
    ((1, 2), (0, 2), None)
    """
    best, start = (0, 0), 0
    for number in range(1, len(channels) + 1):
        if number == len(channels) or channels[number] != channels[start]:
            best = max(best, (start, number - 1), key=lambda run: run[1] - run[0])
            start = number
    return best if best[1] > best[0] else None


class Stage(nn.Module):
    """Convolutions at one scale, each followed by its normalization and, optionally, ReLU.

    Args:
        config: the model's config.
        before: channels of the stage's input.
        channels: output channels of each convolution.
        has_relu: whether ReLU follows each convolution.
        skipped: channels of the encoder map that joins the input. 0 if none does.
    """

    def __init__(
        self, config: SegNetConfig, before: int, channels: tuple[int, ...], *, has_relu: bool, skipped: int = 0
    ):
        super().__init__()
        kernel = config.architecture().kernel
        self.connection = config.connection if skipped else "none"
        if self.connection == "concat1x1":
            self.join = nn.Conv2d(before + skipped, before, 1, bias=False)
        elif self.connection == "concat":
            before += skipped
        widths = (before, *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[number], own, kernel, padding=kernel // 2) for number, own in enumerate(channels)
        )
        self.norms = nn.ModuleList(image_norm.build(config.norm, own, config.norm_groups) for own in channels)
        self.has_relu = has_relu
        self.place = shortcut(widths) if config.residual_blocks else None

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H, W). `skipped` is an encoder map of the same height and width, or None."""
        if skipped is not None:
            x = x + skipped if self.connection == "add" else torch.cat([x, skipped], dim=1)
            if self.connection == "concat1x1":
                x = self.join(x)
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.place is not None and number == self.place[0]:
                start = x
            x = norm(conv(x))
            if self.place is not None and number == self.place[1] - 1:
                x = x + start
            if self.has_relu:
                x = F.relu(x, inplace=True)
        return x


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the maxima of 2 x 2 windows, (B, C, H // 2, W // 2), and their flat indices in the H x W map, int64."""
    if not torch.are_deterministic_algorithms_enabled():
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return pooled, indices
    # on a GPU, torch refuses the gradient of max_pool2d, whose windows might overlap, but allows that of gather
    indices = F.max_pool2d(x.detach(), 2, return_indices=True)[1]
    return x.flatten(2).gather(2, indices.flatten(2)).view_as(indices), indices


def unpool(x: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    """Moves values to the positions of the maxima that `pool` found.

    Args:
        x: (B, C, h, w).
        indices: (B, C, h, w) int64, flat indices in the H x W map.
        size: [H, W].

    Returns:
        (B, C, H, W), with 0 at all other positions.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.max_unpool2d(x, indices, (2, 2), output_size=size)
    # torch refuses max_unpool2d, because it does not know that the indices of 2x2 windows are distinct
    flat = x.new_zeros(*x.shape[:2], size[0] * size[1])
    placed: Tensor = flat.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)
    return placed


class SegNet(nn.Module):
    """Maps images to the class logits of each pixel."""

    def __init__(self, config: SegNetConfig):
        super().__init__()
        self.config = config
        shape = config.architecture()
        ends = [3, *(stage[-1] for stage in shape.encoder)]
        self.encoder = nn.ModuleList(
            Stage(config, before, stage, has_relu=True) for before, stage in zip(ends, shape.encoder, strict=False)
        )
        befores = [shape.encoder[-1][-1], *(stage[-1] for stage in shape.decoder)]
        joined = [0 if config.connection == "none" else own for own in reversed(ends[1:])]
        self.decoder = nn.ModuleList(
            Stage(config, before, stage, has_relu=shape.decoder_relu, skipped=skipped)
            for before, stage, skipped in zip(befores, shape.decoder, joined, strict=False)
        )
        self.head = nn.Conv2d(befores[-1], config.classes(), shape.head_kernel, padding=shape.head_kernel // 2)
        self.recompute = False
        """Whether training saves only each stage's input, and recomputes the stage in backward (Chen et al. 2016)."""
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws normal weights that preserve the variance through ReLU (He et al. 2015), and sets biases to 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def layers(self) -> list[nn.Module]:
        """Stages of encoder and decoder, which can be compiled separately."""
        return [*self.encoder, *self.decoder]

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to (B, K, H, W). H and W must be at least 2^(stages of the encoder), and may be odd."""
        recompute = self.recompute and self.training and torch.is_grad_enabled()

        def run(stage: nn.Module, x: Tensor, skipped: Tensor | None = None) -> Tensor:
            if recompute:
                # a compiled graph recomputes single operations, not modules, so it needs no context
                around: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _once_moved}
                again = checkpoint(stage, x, skipped, use_reentrant=False, preserve_rng_state=False, **around)
                return cast(Tensor, again)
            return cast(Tensor, stage(x, skipped))

        x = images
        kept: list[tuple[Tensor | None, Tensor, list[int]]] = []
        for stage in self.encoder:
            x = run(stage, x)
            size = list(x.shape[-2:])
            pooled, indices = pool(x)
            kept.append((x if self.config.connection != "none" else None, indices, size))
            x = pooled
            del pooled, indices
        for stage in self.decoder:
            skipped, indices, size = kept.pop()
            x = unpool(x, indices, size)
            del indices
            x = run(stage, x, skipped)
            del skipped
        return cast(Tensor, self.head(x))

    def roles(self) -> dict[str, Role]:
        """Returns the role of each parameter by name."""
        return {name: _role(name, parameter.dim()) for name, parameter in self.named_parameters()}


def _stage(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _once_moved() -> tuple[Any, Any]:
    """Returns two contexts: one for a stage's first run, and one for its recomputation.

    The second context keeps running statistics from being updated twice.
    """
    return nullcontext(), replayed()


def _role(name: str, num_dims: int) -> Role:
    if name.startswith("head"):
        return "head" if num_dims > 1 else "bias"
    if num_dims > 1:
        return "conv"
    return "norm" if ".norms." in name else "bias"
