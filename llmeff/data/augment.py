"""Augmentation of labelled images. It depends only on (seed, step, row), and moves an image and its labels together."""

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
"""Weights of red, green and blue in a pixel's grey value (ITU-R BT.601)."""

NUM_CHANCES = 7
"""Random numbers drawn per row. The number is fixed, so that no option changes the random numbers of another."""

Colours = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An augmented image and its position in a row of the batch. The rest of the row is padding."""

    image: Colours
    """(h, w, 3) colours in 0..255."""
    labels: NDArray[np.uint8]
    """(h, w) classes, or IGNORED_PIXEL."""
    rows: slice
    """Vertical position of the image in the batch row: h pixels."""
    columns: slice
    """Horizontal position of the image in the batch row: w pixels."""


class AugmentConfig(Config):
    """Random augmentation, drawn anew each time a training image is used. By default, images stay unchanged."""

    flip: Fraction = 0.0
    """Probability of a horizontal flip."""
    scale: tuple[Positive, Positive] | None = None
    """(low, high) bounds of the random zoom factor, which is log-uniform. None for no zoom. If the zoomed image is
    larger than the training row, a random part of it is used. If it is smaller, it is put at a random position in the
    row. Images are interpolated bilinearly; labels take the nearest pixel."""
    crop: tuple[Count, Count] | None = None
    """(H, W) of a training row, which is a random crop of the image, padded if the image is smaller. None for the size
    of the image."""
    colour: BelowOne = 0.0
    """Strength of colour jitter. Brightness, contrast and saturation are multiplied, in this order, by independent
    random factors, each uniform in [1 - colour, 1 + colour]."""

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(
                f"scale must be (low, high), but the first value, {self.scale[0]}, is above the second, {self.scale[1]}"
            )
        return self

    def apply(self, image: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, step: int, row: int) -> Placed:
        """Returns the augmented image and labels for one row of a step.

        Args:
            image: (H, W, 3) colours.
            labels: (H, W) classes, or IGNORED_PIXEL.
            seed: the run's seed.
            step: index of the step, from 0.
            row: index of the row in the step's global batch.
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
    """Places an image at random in a row of the batch, along one axis.

    An image that is larger than the row is cropped. A smaller image keeps its size.

    Args:
        there: number of pixels that the image has along the axis.
        wanted: number of pixels that the row has along the axis.
        chance: random number in [0, 1) that determines the crop or the position.

    Returns:
        (span in the image, span in the row), of equal length.
    """
    shift = int(chance * (abs(there - wanted) + 1))
    if there >= wanted:
        return slice(shift, shift + wanted), slice(0, wanted)
    return slice(0, there), slice(shift, shift + there)


def _zoomed(
    pixels: NDArray[np.uint8], zoomed: list[int], rows: slice, columns: slice, resampling: Image.Resampling
) -> NDArray[np.uint8]:
    """Resizes an image to `zoomed`, (H, W), but computes and returns only some rows and columns of the result.

    Args:
        pixels: the image, (h, w) or (h, w, 3).
        zoomed: [H, W], size of the resized image.
        rows: rows of the resized image to return.
        columns: columns of the resized image to return.
        resampling: Pillow's filter for resizing.
    """
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
    """Scales brightness, contrast and saturation, in this order.

    Contrast is the distance from the image's mean grey, and saturation is the distance from each pixel's own grey. All
    three are linear, so the result is a weighted sum of the channel, the pixel's grey and a constant.
    """
    brightness, contrast, saturation = factors
    lit = brightness * contrast
    # Make each channel contiguous first, because arithmetic on contiguous memory is faster.
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
