"""Interface of a source of labelled images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import Component, Text
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data.splits import Split

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""(H, W, 3) RGB image and its (H, W) labels, which are indices into the source's classes, or IGNORED_PIXEL."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """A labelled image of a source, which is read on demand."""

    unit: str
    """Name of the image in the source. It is unique, and the same on every machine."""
    split: Split | None
    """Split that the source assigns. None if `data.splits` chooses it."""
    read: Callable[[], Pair]
    """Reads the image and its labels. Raises a ConfigError that names the file if they are invalid."""


class ImageSourceConfig(Component, family="image source"):
    """Source of labelled images."""

    image_end: ClassVar[str] = ""
    mask_end: ClassVar[str] = ""
    """Endings, before the file extension, that distinguish the name of an image from the name of its mask."""

    name: Text
    """The kind of source."""

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes in label order, without reading an image."""
        raise NotImplementedError(type(self))

    def labels(self) -> dict[int, int]:
        """Returns the class, or IGNORED_PIXEL, for each value that may occur in a mask."""
        return {**{label: label for label in range(len(self.classes()))}, IGNORED_PIXEL: IGNORED_PIXEL}

    def images(self) -> Iterator[LabelledImage]:
        """Yields the images, always in the same order.

        Raises:
            ConfigError: the images are not as the config describes them.
        """
        raise NotImplementedError(type(self))

    def image_size(self) -> tuple[int, int] | None:
        """Returns (H, W) of every image, or None if it is unknown before the images are decoded."""
        return None

    def fingerprint(self) -> str:
        """Returns a hash of the images' names, contents, labels and splits.

        Equal sources have equal hashes on every machine.
        """
        raise NotImplementedError(type(self))
