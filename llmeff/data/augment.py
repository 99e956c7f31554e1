"""Augmentation of labelled images: a pure function of (seed, step, row) that moves image and labels together."""

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
"""Weight of each channel in a pixel's grey (ITU-R BT.601)."""

NUM_CHANCES = 7
"""Random numbers drawn per row, whatever is switched on, so that no option changes the effect of another."""

Colours = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An image placed in a row; the rest of the row is padding."""

    image: Colours
    """(h, w, 3) in 0..255."""
    labels: NDArray[np.uint8]
    """(h, w)."""
    rows: slice
    """The h rows of pixels that the image fills."""
    columns: slice
    """The w columns of pixels that the image fills."""


class AugmentConfig(Config):
    """How training images are changed each time they are seen; by default, not at all."""

    flip: Fraction = 0.0
    """Probability of exchanging left and right."""
    scale: tuple[Positive, Positive] | None = None
    """(low, high) of the zoom factor, which is log-uniform. None: no zoom. If the result is larger than the row, a random
    part is taken; if it is smaller, it lies at a random place. Images are interpolated; labels take the nearest pixel."""
    crop: tuple[Count, Count] | None = None
    """(H, W) of a training row, a random part of the image. None: the whole image."""
    colour: BelowOne = 0.0
    """Brightness, contrast and saturation are multiplied, in this order, by independent factors in
    [1 - colour, 1 + colour]."""

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is (low, high), but {self.scale[0]} is above {self.scale[1]}")
        return self

    def apply(self, image: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, step: int, row: int) -> Placed:
        """Returns the augmented image for one row of a step.

        Args:
            image: (H, W, 3).
            labels: (H, W).
            seed: the run's seed.
            step: counted from 0.
            row: index in the step's batch over all ranks.
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
    """A random span of `wanted` of `there` pixels, or all of them at a random place: (in the image, in the row)."""
    shift = int(chance * (abs(there - wanted) + 1))
    if there >= wanted:
        return slice(shift, shift + wanted), slice(0, wanted)
    return slice(0, there), slice(shift, shift + there)


def _zoomed(
    pixels: NDArray[np.uint8], zoomed: list[int], rows: slice, columns: slice, resampling: Image.Resampling
) -> NDArray[np.uint8]:
    """Zooms an image to a size and returns a part, given in pixels of the zoomed image."""
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
    """Scales brightness, then the distance from the mean grey (contrast), then that from each pixel's grey (saturation).

    All three are linear, so the result is a multiple of the channel, a multiple of the pixel's grey and a constant.
    """
    brightness, contrast, saturation = factors
    lit = brightness * contrast
    # Make each channel contiguous first: arithmetic is fast along memory and slow across it.
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
