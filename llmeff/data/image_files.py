"""Base class of image sources that consist of files, and functions that pair, check and read images and masks."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llmeff.core.config import ConfigError
from llmeff.core.heartbeat import beat
from llmeff.core.units import show_names
from llmeff.data.image_source import ImageSourceConfig, LabelledImage, Pair
from llmeff.data.source import digests, fingerprint_of
from llmeff.data.splits import Split

MASK_MODES = ("1", "L", "P", "I;16", "I;16B")
"""Pillow modes that a mask may have: one channel of 1, 8 or 16 bits (either byte order), or palette indices. Mask
values are read unchanged."""
DEEP_MODES = ("I", "F")
"""Prefixes of the Pillow modes with more than 8 bits per channel. Pillow would clip their values."""
ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height: the displayed width is the stored height."""
NUM_VALUES = 2**16
"""Number of values that a pixel of a mask can have."""
NAMED = 3
"""Maximum number of files or pixel values that an error names."""
LISTED = 10
"""Maximum number of problems that an error lists."""


@dataclass(frozen=True, kw_only=True)
class FilePair:
    """An image file and its mask file."""

    unit: str
    """Name of the pair in the source."""
    split: Split | None
    """Split that the source assigns. None if `data.splits` chooses it."""
    image: Path
    """Image of any format that Pillow reads with 8 bits per channel."""
    mask: Path
    """Image with one channel of class ids."""


class ImageFiles(ImageSourceConfig):
    """Base class of sources that read pairs of an image file and a mask file of the same size."""

    def pairs(self) -> list[FilePair]:
        """Returns the pairs of files, always in the same order.

        Raises:
            ConfigError: folders or files are missing.
        """
        raise NotImplementedError(type(self))

    def images(self) -> Iterator[LabelledImage]:
        """Yields the images after checking the headers of all files."""
        yield from labelled(self.pairs(), self.labels())

    def image_size(self) -> tuple[int, int] | None:
        """Returns (H, W) of the first image. All images of the source must have this size.

        Reads only the header of the first image. Returns None if files are missing or this image cannot be read.
        """
        try:
            first, *_ = self.pairs()
            _, (width, height) = _head(first.image)
        except ConfigError:
            return None
        return height, width

    def fingerprint(self) -> str:
        """Returns a hash of the pairs' names, splits and contents, the class names and the meaning of mask values."""
        pairs = self.pairs()
        try:
            contents = digests([path for pair in pairs for path in (pair.image, pair.mask)])
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None
        names = [[pair.unit, pair.split] for pair in pairs]
        return fingerprint_of([self.classes(), sorted(self.labels().items()), names, contents])


def labelled(pairs: Sequence[FilePair], labels: Mapping[int, int]) -> Iterator[LabelledImage]:
    """Yields images with their labels, after checking the headers of all files.

    Args:
        pairs: the files.
        labels: meaning of the mask values, see `ImageSourceConfig.labels`.

    Raises:
        ConfigError: a file is invalid.
    """
    raise_all(problem for pair in pairs for problem in _problems(pair))
    table = np.full(NUM_VALUES, -1, dtype=np.int16)
    for value, label in labels.items():
        table[value] = label
    for pair in pairs:
        yield LabelledImage(unit=pair.unit, split=pair.split, read=partial(_read, pair, table))


def raise_all(problems: Iterable[str]) -> None:
    """If there are problems, raises one error that lists the first `LISTED` of them and counts the rest.

    Raises:
        ConfigError: there is a problem.
    """
    found = list(problems)
    if found:
        more = [f"and {len(found) - LISTED} more problems"] if len(found) > LISTED else []
        raise ConfigError(found[:LISTED] + more)


def paired(
    images: Path, masks: Path, image_ends: tuple[str, ...], mask_ends: tuple[str, ...]
) -> dict[str, tuple[Path, Path]]:
    """Pairs the images below one folder with the masks below another, by their relative paths without the endings.

    Args:
        images: folder of images.
        masks: folder of masks.
        image_ends: endings of image file names; other files are ignored.
        mask_ends: endings of mask file names; other files are ignored.

    Returns:
        (image, mask) by relative path without the ending, sorted.

    Raises:
        ConfigError: a folder is missing or contains no such file, two files share a name, or a file has no partner.
    """
    found, partners = listed(images, image_ends), listed(masks, mask_ends)
    problems = [
        f"{there}: {len(alone)} files have no {partner} of the same name (ending in {', '.join(ends)}) below {absent}: "
        f"{few(alone)}"
        for there, absent, partner, ends, alone in (
            (images, masks, "mask", mask_ends, _alone(images, found, partners)),
            (masks, images, "image", image_ends, _alone(masks, partners, found)),
        )
        if alone
    ]
    if problems:
        raise ConfigError(problems)
    return {name: (path, partners[name]) for name, path in found.items()}


def _alone(folder: Path, candidates: Mapping[str, Path], partners: Mapping[str, Path]) -> list[str]:
    """Returns the files in `candidates` whose name is not in `partners`, as paths relative to `folder`."""
    return [path.relative_to(folder).as_posix() for name, path in candidates.items() if name not in partners]


def few(names: Iterable[str]) -> str:
    """Joins the first `NAMED` names by commas, and counts the rest."""
    return show_names(list(names), NAMED)


def listed(folder: Path, ends: tuple[str, ...], asked: str = "data.source") -> dict[str, Path]:
    """Finds the files in a folder whose names have one of the endings. Hidden files are skipped.

    Args:
        folder: searched recursively.
        ends: endings of file names. Upper and lower case count as the same.
        asked: name of the setting that gives the folder, for errors.

    Returns:
        The files by relative path without the ending, sorted.

    Raises:
        ConfigError: the folder is missing, no file has such an ending, or two files share a name.
    """
    if not folder.is_dir():
        raise ConfigError(f"{asked}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        end = next((end for end in ends if path.name.lower().endswith(end.lower())), None)
        relative = path.relative_to(folder)
        if end is None or any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        name = relative.as_posix()[: -len(end)]
        if name in found:
            raise ConfigError(
                f"{path}: the same folder contains {found[name].name}. Rename one of them: the ending is not part of a "
                "name, so both have the same name"
            )
        found[name] = path
    if not found:
        raise ConfigError(f"{asked}: no file below {folder} ends in {', '.join(ends)}")
    return dict(sorted(found.items()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image and reads its header. The pixels are read on demand.

    Raises:
        ConfigError: the file is not an image, or the body of the `with` block fails to read its pixels.
    """
    beat()
    try:
        with Image.open(path) as image:
            yield image
    except ConfigError:
        raise
    except UnidentifiedImageError:
        raise ConfigError(f"{path}: is not an image, or has a format that Pillow cannot read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error})") from None


def _problems(pair: FilePair) -> Iterator[str]:
    """Reads the headers of an image file and its mask file. Yields an error message for each problem."""
    try:
        (image_mode, image_size), (mask_mode, mask_size) = _head(pair.image), _head(pair.mask)
    except ConfigError as error:
        yield str(error)
        return
    if image_mode.startswith(DEEP_MODES):
        yield _too_deep(pair.image, image_mode)
    if mask_mode not in MASK_MODES:
        yield (
            f"{pair.mask}: has the mode {mask_mode!r}, but a mask needs one channel of class ids: 1, 8 or 16 bits, or "
            "palette indices"
        )
    if image_size != mask_size:
        yield (
            f"{pair.mask}: is {mask_size[0]} pixels wide and {mask_size[1]} high, but {pair.image} is {image_size[0]} "
            f"wide and {image_size[1]} high"
        )


def _too_deep(path: Path, mode: str) -> str:
    return f"{path}: has more than 8 bits per channel (Pillow's mode {mode!r}). Convert it to 8-bit RGB or grey"


def _head(path: Path) -> tuple[str, tuple[int, int]]:
    """Returns an image's Pillow mode and its displayed (width, height), from the header."""
    with _opened(path) as image:
        width, height = image.size
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
        return image.mode, (height, width) if is_turned else (width, height)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns an image as (H, W, 3) RGB, rotated by its EXIF orientation.

    Raises:
        ConfigError: the file is not an image, is incomplete, or has more than 8 bits per channel.
    """
    with _opened(path) as image:
        if image.mode.startswith(DEEP_MODES):
            raise ConfigError(_too_deep(path, image.mode))
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _read(pair: FilePair, table: NDArray[np.int16]) -> Pair:
    pixels = read_image(pair.image)
    with _opened(pair.mask) as mask:
        values = np.asarray(mask).astype(np.uint16)
    labels = table[values]
    wrong = values[labels < 0]
    if wrong.size:
        found, counts = np.unique(wrong, return_counts=True)
        named = few(f"{value} ({count} pixels)" for value, count in zip(found, counts, strict=True))
        raise ConfigError(
            f"{pair.mask}: contains values that are not classes: {named}. "
            f"Allowed: {_ranges(np.flatnonzero(table >= 0))}"
        )
    return pixels, labels.astype(np.uint8)


def _ranges(values: Iterable[int]) -> str:
    """Formats sorted integers as ranges.

    >>> _ranges([0, 1, 2, 255])
    '0 to 2, 255'
    """
    runs = [[value for _, value in run] for _, run in groupby(enumerate(values), lambda entry: entry[1] - entry[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
