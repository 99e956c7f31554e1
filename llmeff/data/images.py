"""Labelled images as training data: a source, splits and augmentation."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import ConfigError, Count, Fraction
from llmeff.core.dist import cache_folder
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import image_cache, verified_cache
from llmeff.data.augment import AugmentConfig, Colours
from llmeff.data.data import DataConfig
from llmeff.data.image_cache import ImageCache, Size, StoredImages
from llmeff.data.image_source import ImageSourceConfig
from llmeff.data.permute import permuted
from llmeff.data.scenes import Scenes
from llmeff.data.source import fingerprint_of
from llmeff.data.splits import Shares, Split

PRIOR_IMAGES = 1000
"""Number of training images that suffice to estimate how frequent each class is at each pixel position."""
LEAST_STD = 1 / 255
"""Lower bound of a channel's standard deviation, so that a constant channel is not divided by 0."""


class ImageSplits(Shares):
    """Shares of the splits, used only if the image source does not assign images to splits.

    A hash of an image's name chooses its split, so the shares hold on average.
    """

    calibration: Fraction = 0.05
    """Share of the images."""
    search: Fraction = 0.1
    """Share of the images."""
    validation: Fraction = 0.1
    """Share of the images."""
    test: Fraction = 0.15
    """Share of the images."""


class ImageData(DataConfig):
    """Images with a class for each pixel."""

    name: Literal["images"] = "images"
    source: ImageSourceConfig = Scenes()
    """Source of the images."""
    size: tuple[Count, Count] | None = None
    """(H, W) to resize all images to. None keeps their size, which must then be equal."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training images."""
    splits: ImageSplits = ImageSplits()
    """Shares of the splits, if the source assigns none."""
    max_train: Count | None = None
    """Number of training images to use: the first in the source's order. None for all."""

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes in label order."""
        return self.source.classes()

    def row_size(self) -> Size | None:
        """Returns (H, W) of a training row, or None if it is unknown before the images are decoded."""
        return self.augment.crop or self.size or self.source.image_size()

    def open(self, *, is_main: bool = True, wait: Callable[[], None] = lambda: None) -> "ImageCorpus":
        """Opens the corpus from the image cache. The main process makes the cache if it is missing.

        Args:
            is_main: whether this process makes and checks the cache.
            wait: returns once all processes have called it.

        Raises:
            ConfigError: the images are not as the config describes them, `ImageCorpus` rejects them, or the cache
                cannot be written.
        """
        splits = self.splits.model_dump(mode="json")
        key = fingerprint_of([image_cache.FORMAT, self.source.fingerprint(), self.size, splits])
        folder = cache_folder() / "images" / key[:32]
        verified_cache.ensure_by_one(folder, self._write, image_cache.KIND, is_main=is_main, wait=wait)
        return ImageCorpus(self, ImageCache(folder))

    def _write(self, folder: Path) -> None:
        images = [(image.split or self.splits.by_hash(image.unit), image) for image in self.source.images()]
        _check_split("train", Counter(split for split, _ in images), self.source)
        image_cache.write_images(folder, images, self.classes(), self.size)


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Sizes of a split."""

    num_images: int
    """Number of images."""
    num_pixels: int
    """Number of labelled pixels in all images."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """A batch of images with a class for each pixel."""

    images: NDArray[np.float32]
    """(B, 3, H, W): colours minus their mean, divided by their standard deviation. Padding is 0."""
    labels: NDArray[np.int64]
    """(B, H, W): the class of each pixel, or IGNORED_PIXEL."""
    units: list[str]
    """Names of the images."""


def _check_split(split: Split, counts: Mapping[Split, int], source: ImageSourceConfig) -> None:
    if split not in counts:
        there = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
        raise ConfigError(
            f"data.splits: the split {split!r} is empty (images in the other splits: {there}). Give it a larger share "
            f"or, if the source {source.name!r} assigns the splits, add images to it"
        )


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Returns the order of the training images in an epoch."""
    return permuted(np.arange(num_images), num_images, seed, epoch)


class ImageCorpus:
    """Labelled images in an opened image cache.

    Args:
        config: the config of the images.
        cache: the cache of the images.

    Raises:
        ConfigError: there are fewer training images than `max_train`, or their labels have fewer than two classes.
    """

    def __init__(self, config: ImageData, cache: ImageCache):
        self._config = config
        self._stored = dict(cache.splits)
        self.name = config.source.name
        """Name of the source."""
        self.classes = cache.classes
        """Names of the K classes in label order."""
        self.size = cache.size
        """(H, W) of the images. Training rows may have another size, see `AugmentConfig.crop`."""
        train = self._stored["train"] = self._train(cache.splits["train"])
        self.fingerprint = fingerprint_of([cache.fingerprint, len(train.units)])
        """SHA-256 of all that a run reads: pixels, labels and image names of every split, and class names."""
        self.pixels: NDArray[np.int64] = train.class_pixels.sum(axis=0)
        """(K,): number of labelled pixels of each class in the training images."""
        labelled = train.class_pixels.sum(axis=1, keepdims=True)
        self.present: NDArray[np.int64] = ((train.class_pixels > 0) * labelled).sum(axis=0)
        """(K,): for each class, the number of all labelled pixels in the training images that contain the class."""
        self._check_classes()
        num_pixels = len(train.units) * self.size[0] * self.size[1]
        mean, mean_square = train.sums.sum(axis=0) / num_pixels
        self.mean: NDArray[np.float32] = (mean / 255).astype(np.float32)
        """(3,): mean of R, G and B in 0..1 over all pixels of the training images."""
        std = np.sqrt(np.maximum(mean_square - mean**2, 0)) / 255
        self.std: NDArray[np.float32] = np.maximum(std, LEAST_STD).astype(np.float32)
        """(3,): standard deviation of R, G and B over the same pixels, at least 1/255."""

    @property
    def splits(self) -> dict[Split, ImageFacts]:
        """Sizes of each split. Empty splits are absent."""
        return {
            split: ImageFacts(num_images=len(stored.units), num_pixels=int(stored.class_pixels.sum()))
            for split, stored in self._stored.items()
        }

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> ImageBatch:
        """Returns some rows of a step's global batch. They do not depend on the process or on earlier calls.

        An epoch contains every training image once, in shuffled order.

        Args:
            seed: the run's seed.
            step: index of the step, from 0.
            rows: indices of the rows, within range(global_batch).
            global_batch: number of rows in a step, over all ranks.
        """
        train, augment = self._stored["train"], self._config.augment
        size = augment.crop or self.size
        images = np.zeros((len(rows), 3, *size), dtype=np.float32)
        labels = np.full((len(rows), *size), IGNORED_PIXEL, dtype=np.int64)
        units = []
        for place, row in enumerate(rows):
            epoch, slot = divmod(step * global_batch + row, len(train.units))
            index = _order(seed, epoch, len(train.units))[slot]
            placed = augment.apply(train.images[index], train.labels[index], seed, step, row)
            images[place, :, placed.rows, placed.columns] = self._normalised(placed.image)
            labels[place, placed.rows, placed.columns] = placed.labels
            units.append(train.units[index])
        return ImageBatch(images=images, labels=labels, units=units)

    def held_out(self, split: Split, images: range) -> ImageBatch:
        """Returns images of a split, in order and without augmentation.

        Args:
            split: the split.
            images: indices of the images, within range(num_images).

        Raises:
            ConfigError: the split has no images, or no labelled pixels.
        """
        self.check_split(split)
        stored = self._stored[split]
        chosen = slice(images.start, images.stop, images.step)
        return ImageBatch(
            images=self._normalised(stored.images[chosen]),
            labels=stored.labels[chosen].astype(np.int64),
            units=stored.units[chosen],
        )

    def as_stored(self, split: Split) -> NDArray[np.uint8]:
        """Returns the split's images as (N, H, W, 3) RGB for display, not normalised as in `held_out`."""
        return self._stored[split].images

    def labels(self, split: Split) -> NDArray[np.uint8]:
        """Returns the split's labels as (N, H, W): the class of each pixel, or IGNORED_PIXEL."""
        return self._stored[split].labels

    def place_counts(self) -> NDArray[np.int64]:
        """Returns (K, H, W): the number of training images in which the pixel (h, w) has the class k.

        Counts only a sample of about `PRIOR_IMAGES` training images.
        """
        labels = self._stored["train"].labels
        classes = np.arange(len(self.classes))[:, None, None]
        counts = np.zeros((len(self.classes), *self.size), dtype=np.int64)
        for image in labels[:: max(1, len(labels) // PRIOR_IMAGES)]:
            counts += image == classes
        return counts

    def units(self, split: Split) -> list[str]:
        """Returns the names of a split's images, in order."""
        return self._stored[split].units

    def check_split(self, split: Split) -> None:
        """Raises an error if a split has no images or no labels.

        Raises:
            ConfigError: the split has no images (the error lists the other splits), or no labelled pixels.
        """
        counts = {name: len(stored.units) for name, stored in self._stored.items()}
        _check_split(split, counts, self._config.source)
        if not self._stored[split].class_pixels.any():
            raise ConfigError(f"data.source: no pixel of the split {split!r} has a label, so it cannot be evaluated")

    def _train(self, stored: StoredImages) -> StoredImages:
        wanted, there = self._config.max_train, len(stored.units)
        if wanted is not None and wanted > there:
            raise ConfigError(f"data.max_train is {wanted}, but there are only {there} training images")
        return stored.first(wanted or there)

    def _check_classes(self) -> None:
        there = [name for name, num_pixels in zip(self.classes, self.pixels, strict=True) if num_pixels]
        if len(there) < 2:
            source = self._config.source.model_dump_json(exclude_defaults=True)
            found = f"only the class {there[0]!r}" if there else "none"
            raise ConfigError(
                f"data.source: the labels of the training images of {source} contain {found} of the {len(self.classes)} "
                "classes, but training needs at least two"
            )

    def _normalised(self, images: Colours) -> NDArray[np.float32]:
        return normalised(images, self.mean, self.std)


def normalised(images: Colours, mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalises images: scales colours to 0..1, subtracts each channel's mean and divides by its standard deviation.

    Args:
        images: (..., H, W, 3) in 0..255.
        mean: (3,) in 0..1.
        std: (3,) in 0..1.

    Returns:
        (..., 3, H, W).
    """
    # Make each channel contiguous first, because arithmetic on contiguous memory is faster.
    channels = np.ascontiguousarray(np.moveaxis(images, -1, -3), dtype=np.float32)
    channels *= (1 / (255 * std))[:, None, None]
    channels -= (mean / std)[:, None, None]
    return channels
