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
"""An image as (H, W, 3) RGB and its labels as (H, W): each a class's place in the source's classes, or IGNORED_PIXEL."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One image of a source, not read yet."""

    unit: str
    """Its name in the source: unique, the same on every machine."""
    split: Split | None
    """The split that the source itself names; None: the data's settings choose."""
    read: Callable[[], Pair]
    """Gives the image and its labels; raises ConfigError, naming the file, where they are not what they should be."""


class ImageSourceConfig(Component, family="image source"):
    """Where the labelled images come from."""

    image_end: ClassVar[str] = ""
    mask_end: ClassVar[str] = ""
    """What the names of its images and of their masks end in, before the kind of file, where these are not the same."""

    name: Text
    """The kind of source."""

    def classes(self) -> tuple[str, ...]:
        """The classes' names in the order of their labels, known without reading an image."""
        raise NotImplementedError(type(self))

    def labels(self) -> dict[int, int]:
        """What the numbers in its masks mean: each one's class, or IGNORED_PIXEL; no other may occur."""
        return {**{label: label for label in range(len(self.classes()))}, IGNORED_PIXEL: IGNORED_PIXEL}

    def images(self) -> Iterator[LabelledImage]:
        """The images, always in the same order.

        Raises:
            ConfigError: the source is not there as it is described.
        """
        raise NotImplementedError(type(self))

    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of every image, where the source can tell it without decoding one."""
        return None

    def fingerprint(self) -> str:
        """A hash of the images' names, content, labels and splits: equal sources have equal ones, on every machine."""
        raise NotImplementedError(type(self))
