"""Image cache: labelled images of one size in memory-mapped files, with statistics of each image."""

import contextlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llmeff.core.config import ConfigError
from llmeff.core.heartbeat import beat
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import verified_cache
from llmeff.data.image_files import LISTED, raise_all
from llmeff.data.image_source import LabelledImage, Pair
from llmeff.data.splits import Split

KIND = "image cache"
"""Name of this cache in messages."""
FORMAT = 2
"""Version of the cache format. Increase it if caches of older versions must not be read."""

Size = tuple[int, int]
"""(H, W)."""


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """The N images of a split, each H x W."""

    images: NDArray[np.uint8]
    """(N, H, W, 3), RGB."""
    labels: NDArray[np.uint8]
    """(N, H, W): the class of each pixel, or IGNORED_PIXEL."""
    class_pixels: NDArray[np.int64]
    """(N, K): number of labelled pixels of each class in each image."""
    sums: NDArray[np.int64]
    """(N, 2, 3): for each image and channel, the sum of values and the sum of squared values over all pixels."""
    units: list[str]
    """Names of the images."""

    def first(self, num_images: int) -> "StoredImages":
        """Returns the first `num_images` images."""
        return StoredImages(**{name: values[:num_images] for name, values in vars(self).items()})


class ImageCache:
    """A complete image cache on disk.

    Args:
        folder: a folder that `verified_cache.ensure` made.
    """

    def __init__(self, folder: Path):
        meta, self.fingerprint = verified_cache.read_meta(folder)
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.size: Size = (meta["size"][0], meta["size"][1])
        self.splits: dict[Split, StoredImages] = {split: self._read(folder, split) for split in meta["splits"]}

    def _read(self, folder: Path, split: Split) -> StoredImages:
        def values(kind: str, dtype: str, *shape: int) -> NDArray[Any]:
            whole = np.memmap(folder / f"{split}.{kind}", dtype=dtype, mode="r").view(np.ndarray)
            return whole.reshape(-1, *shape)

        return StoredImages(
            images=values("pixels", "u1", *self.size, 3),
            labels=values("labels", "u1", *self.size),
            class_pixels=values("class_pixels", "<i8", len(self.classes)),
            sums=values("sums", "<i8", 2, 3),
            units=json.loads((folder / f"{split}.units.json").read_text(encoding="utf-8")),
        )


def write_images(
    folder: Path, images: Iterable[tuple[Split, LabelledImage]], classes: tuple[str, ...], size: Size | None
) -> None:
    """Decodes images and writes the files of an image cache.

    Args:
        folder: folder to fill.
        images: the images, each with its split; at least one.
        classes: names of the classes.
        size: (H, W) to resize all images to. None to keep their size. In that case, all images must have the same size.

    Raises:
        ConfigError: an image is invalid, or its size differs from the first image's.
    """
    writers: dict[Split, _SplitWriter] = {}
    problems: list[str] = []
    first = None
    with contextlib.ExitStack() as opened:
        for split, image in images:
            beat()
            try:
                pixels, labels = image.read() if size is None else _resized(image.read(), size)
            except ConfigError as error:
                problems += error.problems
                if len(problems) >= LISTED:
                    break
                continue
            if problems:
                continue  # the cache will be discarded, so the remaining images are only checked
            first = first or (image.unit, labels.shape)
            if labels.shape != first[1]:
                raise ConfigError(
                    f"data.size: the image {image.unit} is {_words(labels.shape)}, but {first[0]} is "
                    f"{_words(first[1])}. Set data.size to resize all images"
                )
            if split not in writers:
                writers[split] = _SplitWriter(folder, split, len(classes), opened)
            writers[split].add(image.unit, pixels, labels)
    raise_all(problems)
    assert first is not None, "there must be at least one image"
    for writer in writers.values():
        writer.finish()
    meta = {"format": FORMAT, "classes": classes, "size": first[1], "splits": list(writers)}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


class _SplitWriter:
    """Writes the files of one split. It keeps only the images' names and statistics in memory."""

    def __init__(self, folder: Path, split: Split, num_classes: int, opened: contextlib.ExitStack):
        self._folder, self._split, self._num_classes = folder, split, num_classes
        self._pixels = opened.enter_context((folder / f"{split}.pixels").open("wb"))
        self._labels = opened.enter_context((folder / f"{split}.labels").open("wb"))
        self._class_pixels, self._sums = array("q"), array("q")
        self._units: list[str] = []

    def add(self, unit: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
        self._pixels.write(np.ascontiguousarray(pixels).data)
        self._labels.write(np.ascontiguousarray(labels).data)
        self._class_pixels.extend(
            np.bincount(labels.ravel(), minlength=IGNORED_PIXEL + 1)[: self._num_classes].tolist()
        )
        levels = np.arange(256)
        counts = np.array([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        self._sums.extend([*(counts @ levels).tolist(), *(counts @ levels**2).tolist()])
        self._units.append(unit)

    def finish(self) -> None:
        for kind, values in (("class_pixels", self._class_pixels), ("sums", self._sums)):
            (self._folder / f"{self._split}.{kind}").write_bytes(np.array(values, dtype="<i8").tobytes())
        (self._folder / f"{self._split}.units.json").write_text(json.dumps(self._units), encoding="utf-8")


def resized(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resizes an (H, W, 3) image by averaging over areas or, if a side grows, by bilinear interpolation."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), resampling))


def _resized(pair: Pair, size: Size) -> Pair:
    """Resizes an image and its labels. Labels take the nearest pixel."""
    pixels, labels = pair
    if labels.shape != size:
        labels = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    return resized(pixels, size), labels


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} pixels wide and {shape[0]} high"
