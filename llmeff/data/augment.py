"""Augmentation of labelled images: a pure function of (seed, step, row), in which image and labels move together."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import model_validator

from llmeff.core.config import BelowOne, Config, Count, Fraction, Positive
from llmeff.core.seed import derive

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""What the channels add to a pixel's grey (ITU-R BT.601)."""

NUM_CHANCES = 7
"""Numbers drawn for a row, whatever is switched on: no option changes what another does."""

Colours = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What of a row an image fills; the rest is padding."""

    image: Colours
    """(h, w, 3) in 0..255."""
    labels: NDArray[np.uint8]
    """(h, w)."""
    rows: slice
    """Where it lies in the row, from above: h places."""
    columns: slice
    """From the left: w places."""


class AugmentConfig(Config):
    """How training images are changed each time they are seen; nothing, unless it is asked for."""

    flip: Fraction = 0.0
    """How probable it is that left and right are exchanged."""
    scale: tuple[Positive, Positive] | None = None
    """Zoom by a factor between these two, its logarithm uniform. Of what is larger than the row, a random part is taken;
    what is smaller lies in a random place of it. The image is interpolated between pixels, labels are the nearest."""
    crop: tuple[Count, Count] | None = None
    """(H, W) of a training row: a random part of the image that is so large. None: the whole image's."""
    colour: BelowOne = 0.0
    """Brightness, contrast and saturation are multiplied by a factor of their own in [1 - colour, 1 + colour], in this
    order."""

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is (low, high), and {self.scale[0]} is above {self.scale[1]}")
        return self

    def apply(self, image: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, step: int, row: int) -> Placed:
        """The image as a row of a step sees it.

        Args:
            image: (H, W, 3).
            labels: (H, W).
            seed: of the run.
            step: from 0.
            row: in the step's batch, over all ranks.
        """
        generator = np.random.Generator(np.random.Philox(key=derive(seed, "augment", step, row)))
        flip, zoom, down, right, *factors = generator.random(NUM_CHANCES).tolist()
        if flip < self.flip:
            image, labels = image[:, ::-1], labels[:, ::-1]
        height, width = self.crop or labels.shape
        factor = self._factor(zoom)
        zoomed = [max(1, round(side * factor)) for side in labels.shape]
        taken_rows, rows = _part(zoomed[0], height, down)
        taken_columns, columns = _part(zoomed[1], width, right)
        if factor == 1:
            image, labels = image[taken_rows, taken_columns], labels[taken_rows, taken_columns]
        else:
            image = _zoomed(image, zoomed, taken_rows, taken_columns, Image.Resampling.BILINEAR)
            labels = _zoomed(labels, zoomed, taken_rows, taken_columns, Image.Resampling.NEAREST)
        coloured = image if self.colour == 0 else _coloured(image, [1 + self.colour * (2 * u - 1) for u in factors])
        return Placed(image=coloured, labels=labels, rows=rows, columns=columns)

    def _factor(self, chance: float) -> float:
        if self.scale is None:
            return 1.0
        low, high = self.scale
        return math.exp(math.log(low) + chance * math.log(high / low))


def _part(there: int, wanted: int, chance: float) -> tuple[slice, slice]:
    """A random span of `wanted` pixels of `there`, or the place of all of them in it: (in the image, in the row)."""
    shift = int(chance * (abs(there - wanted) + 1))
    if there >= wanted:
        return slice(shift, shift + wanted), slice(0, wanted)
    return slice(0, there), slice(shift, shift + there)


def _zoomed(
    pixels: NDArray[np.uint8], zoomed: list[int], rows: slice, columns: slice, resampling: Image.Resampling
) -> NDArray[np.uint8]:
    """A part, given in pixels of the zoomed image, of the image zoomed to a size."""
    vertical, horizontal = pixels.shape[0] / zoomed[0], pixels.shape[1] / zoomed[1]
    box = (
        columns.start * horizontal,
        rows.start * vertical,
        min(columns.stop * horizontal, pixels.shape[1]),
        min(rows.stop * vertical, pixels.shape[0]),
    )
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(Image.fromarray(pixels).resize(size, resampling, box=box))


def _coloured(image: NDArray[np.uint8], factors: list[float]) -> NDArray[np.float32]:
    """Factors of brightness, of the distance from the mean grey, and of that from each pixel's own grey.

    All three are linear, so that a channel becomes a share of itself, a share of the pixel's grey, and a constant.
    """
    brightness, contrast, saturation = factors
    lit = brightness * contrast
    # Each channel by itself first: arithmetic is fast along the memory, slow across it.
    channels = np.ascontiguousarray(np.moveaxis(image, -1, 0), dtype=np.float32)
    red, green, blue = channels
    grey = GREY[0] * red
    grey += GREY[1] * green
    grey += GREY[2] * blue
    mean_grey = float(grey.mean())
    grey *= np.float32(lit * (1 - saturation))
    grey += np.float32(brightness * (1 - contrast) * mean_grey)
    channels *= np.float32(lit * saturation)
    channels += grey
    return np.moveaxis(channels.clip(0, 255, out=channels), 0, -1)
