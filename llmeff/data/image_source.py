"""The contract of a source of labelled images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import Component, Text
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data.splits import Split

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""An image, (H, W, 3) RGB, and its labels, (H, W): indices into the source's classes, or IGNORED_PIXEL."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One image of a source, not yet read."""

    unit: str
    """Name of the image in the source: unique, and the same on every machine."""
    split: Split | None
    """The split that the source assigns. None: the data's settings choose."""
    read: Callable[[], Pair]
    """Reads the image and its labels; raises a ConfigError that names the file if they are invalid."""


class ImageSourceConfig(Component, family="image source"):
    """Where the labelled images come from."""

    image_end: ClassVar[str] = ""
    mask_end: ClassVar[str] = ""
    """The ends, before the file extension, in which the names of an image and its mask differ."""

    name: Text
    """The kind of source."""

    def classes(self) -> tuple[str, ...]:
        """Names of the classes in label order, known without reading an image."""
        raise NotImplementedError(type(self))

    def labels(self) -> dict[int, int]:
        """Maps each number in the masks to its class or IGNORED_PIXEL; no other number may occur."""
        return {**{label: label for label in range(len(self.classes()))}, IGNORED_PIXEL: IGNORED_PIXEL}

    def images(self) -> Iterator[LabelledImage]:
        """The images, always in the same order.

        Raises:
            ConfigError: the source does not match its description.
        """
        raise NotImplementedError(type(self))

    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of every image. None: unknown without decoding an image."""
        return None

    def fingerprint(self) -> str:
        """A hash of the images' names, contents, labels and splits; equal for equal sources on every machine."""
        raise NotImplementedError(type(self))
