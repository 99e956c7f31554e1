"""Images and masks that are files: how they are paired and read, for the sources that consist of them."""

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
"""What Pillow calls a channel of 1, 8 or 16 bits (in either order of bytes), or indices of a palette; a mask's numbers are
read as they stand."""
DEEP_MODES = ("I", "F")
"""The beginnings of modes that do not fit in 8 bits, which Pillow would cut off."""
ON_ITS_SIDE = (5, 6, 7, 8)
"""What a camera notes (EXIF's orientation) of an image whose width, as it is to be seen, is the height that is stored."""
NUM_VALUES = 2**16
"""What a number in a mask can be."""
NAMED = 3
"""An error names so many files, or pixel values, of many."""
LISTED = 10
"""An error lists so many problems of many."""


@dataclass(frozen=True, kw_only=True)
class FilePair:
    """An image and its mask."""

    unit: str
    """Its name in the source."""
    split: Split | None
    """The split that the source itself names; None: the data's settings choose."""
    image: Path
    """Any that Pillow reads with 8 bits a channel."""
    mask: Path
    """One channel of class ids."""


class ImageFiles(ImageSourceConfig):
    """A source that is files: an image and a mask of the same size each."""

    def pairs(self) -> list[FilePair]:
        """The files, always in the same order.

        Raises:
            ConfigError: folders or files are missing.
        """
        raise NotImplementedError(type(self))

    def images(self) -> Iterator[LabelledImage]:
        """The images, once the heads of all files are found to be right."""
        yield from labelled(self.pairs(), self.labels())

    def image_size(self) -> tuple[int, int] | None:
        """The first image's, by its head: where no size is given, all must be alike. None where there is none to read."""
        try:
            first, *_ = self.pairs()
            _, (width, height) = _head(first.image)
        except ConfigError:
            return None
        return height, width

    def fingerprint(self) -> str:
        """Of the pairs' names, splits and content, and of what the masks' numbers mean."""
        pairs = self.pairs()
        try:
            contents = digests([path for pair in pairs for path in (pair.image, pair.mask)])
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None
        names = [[pair.unit, pair.split] for pair in pairs]
        return fingerprint_of([self.classes(), sorted(self.labels().items()), names, contents])


def labelled(pairs: Sequence[FilePair], labels: Mapping[int, int]) -> Iterator[LabelledImage]:
    """Images with their masks, once the heads of all files are found to be right.

    Args:
        pairs: the files.
        labels: what the numbers in the masks mean, see `ImageSourceConfig.labels`.

    Raises:
        ConfigError: files are not what they should be.
    """
    raise_all(problem for pair in pairs for problem in _problems(pair))
    table = np.full(NUM_VALUES, -1, dtype=np.int16)
    for value, label in labels.items():
        table[value] = label
    for pair in pairs:
        yield LabelledImage(unit=pair.unit, split=pair.split, read=partial(_read, pair, table))


def raise_all(problems: Iterable[str]) -> None:
    """Raises the problems, or the first of many, in one error; none where there are none.

    Raises:
        ConfigError: there is one.
    """
    found = list(problems)
    if found:
        more = [f"and {len(found) - LISTED} more problems"] if len(found) > LISTED else []
        raise ConfigError(found[:LISTED] + more)


def paired(
    images: Path, masks: Path, image_ends: tuple[str, ...], mask_ends: tuple[str, ...]
) -> dict[str, tuple[Path, Path]]:
    """The images below a folder with the masks below another, by what their names have in common, sorted.

    Args:
        images: folder of images.
        masks: folder of masks.
        image_ends: what the images' names end in, beside what they have in common; other files do not count.
        mask_ends: the same for the masks.

    Raises:
        ConfigError: a folder is missing or has no such file, two files have one name, or a partner is missing.
    """
    found, partners = listed(images, image_ends), listed(masks, mask_ends)
    problems = [
        f"{there}: {len(alone)} files have no {partner} of their name below {absent}, ending in {', '.join(ends)}: {few(alone)}"
        for there, absent, partner, ends, alone in (
            (images, masks, "mask", mask_ends, _alone(images, found, partners)),
            (masks, images, "image", image_ends, _alone(masks, partners, found)),
        )
        if alone
    ]
    if problems:
        raise ConfigError(problems)
    return {name: (path, partners[name]) for name, path in found.items()}


def _alone(folder: Path, own: Mapping[str, Path], others: Mapping[str, Path]) -> list[str]:
    """The files without a partner, as they lie in their folder."""
    return [path.relative_to(folder).as_posix() for name, path in own.items() if name not in others]


def few(names: Iterable[str]) -> str:
    """The first of many names."""
    return show_names(list(names), NAMED)


def listed(folder: Path, ends: tuple[str, ...], asked: str = "data.source") -> dict[str, Path]:
    """The files below a folder whose names end so, by their names below it without that end, sorted; none that is hidden.

    Args:
        folder: searched with all below it.
        ends: of the names, in any case.
        asked: what named the folder, for errors.

    Raises:
        ConfigError: there is no such folder or file, or two files have one name.
    """
    if not folder.is_dir():
        raise ConfigError(f"{asked}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        end = next((end for end in ends if path.name.lower().endswith(end.lower())), None)
        own = path.relative_to(folder)
        if end is None or any(part.startswith(".") for part in own.parts) or not path.is_file():
            continue
        name = own.as_posix()[: -len(end)]
        if name in found:
            raise ConfigError(
                f"{path}: there is also {found[name].name}, and a file is paired by its name without the end"
            )
        found[name] = path
    if not found:
        raise ConfigError(f"{asked}: there is no file below {folder} that ends in {', '.join(ends)}")
    return dict(sorted(found.items()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose head is read; its content is when it is asked for.

    Raises:
        ConfigError: the file, or its content within the block, is not an image's.
    """
    beat()
    try:
        with Image.open(path) as image:
            yield image
    except ConfigError:
        raise
    except UnidentifiedImageError:
        raise ConfigError(f"{path}: is no image, or of a format that Pillow does not know") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error})") from None


def _problems(pair: FilePair) -> Iterator[str]:
    """What the heads of two files tell that is wrong."""
    try:
        (image_mode, image_size), (mask_mode, mask_size) = _head(pair.image), _head(pair.mask)
    except ConfigError as error:
        yield str(error)
        return
    if image_mode.startswith(DEEP_MODES):
        yield _too_deep(pair.image, image_mode)
    if mask_mode not in MASK_MODES:
        yield (
            f"{pair.mask}: is an image of mode {mask_mode!r}, but a mask has one channel of class ids, of 8 or 16 bits "
            "or a palette's indices"
        )
    if image_size != mask_size:
        yield (
            f"{pair.mask}: is {mask_size[0]} pixels wide and {mask_size[1]} high, but {pair.image} is {image_size[0]} "
            f"wide and {image_size[1]} high"
        )


def _too_deep(path: Path, mode: str) -> str:
    return f"{path}: has more than 8 bits a channel (Pillow's mode {mode!r}): make it RGB or grey of 8"


def _head(path: Path) -> tuple[str, tuple[int, int]]:
    """What Pillow calls the kind of pixels; width and height, as it is to be seen."""
    with _opened(path) as image:
        width, height = image.size
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
        return image.mode, (height, width) if is_turned else (width, height)


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as (H, W, 3) RGB, turned as its camera noted.

    Raises:
        ConfigError: the file is no image, not a whole one, or one of more than 8 bits a channel.
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
            f"{pair.mask}: holds {named}, which is no class: allowed are {_ranges(np.flatnonzero(table >= 0))}"
        )
    return pixels, labels.astype(np.uint8)


def _ranges(values: Iterable[int]) -> str:
    """Sorted integers in words.

    >>> _ranges([0, 1, 2, 255])
    '0 to 2, 255'
    """
    runs = [[value for _, value in run] for _, run in groupby(enumerate(values), lambda entry: entry[1] - entry[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
