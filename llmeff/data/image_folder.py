"""A folder of images and a folder of masks as a source."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmeff.core.config import ConfigError, Text
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data.image_files import FilePair, ImageFiles, few, paired
from llmeff.data.splits import SPLITS, Split

IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MASK_ENDS = (".png", ".bmp", ".tif", ".tiff", ".pgm")
"""Formats that keep every number as it is; writers of GIF sort palettes anew."""

SPLIT_FOLDERS: dict[str, Split] = {**{split: split for split in SPLITS}, "val": "validation"}
_LIKE_SPLITS = re.compile(
    r"(train(ing)?|val(id(at(e|ion|ing))?)?|dev|eval(uation)?|test(ing)?|search|calibration)([-_ ]?(set|split|data|images))?",
    re.IGNORECASE,
)
"""What people call splits."""


class ImageFolder(ImageFiles):
    """Any images with masks of the same names.

    Folders below are searched too. Where they are called train, calibration, search, validation (or val) and test, in any
    case, they are the splits, else the data's settings choose. Images are turned as their camera noted, as people see them.
    """

    name: Literal["folder"] = "folder"
    path: Text
    """The folder of the images: RGB or grey, 8 bits a channel."""
    masks: Text
    """The folder of the masks: each pixel the number of its class, as one channel of 1, 8 or 16 bits, or as the index,
    not the colour, in a palette."""
    class_names: tuple[Text, ...] = Field(min_length=2, max_length=IGNORED_PIXEL)
    """The classes, from number 0 on."""
    ignored: Annotated[int, Field(strict=True, ge=0, lt=2**16)] = IGNORED_PIXEL
    """The number in the masks of a pixel that is no part of loss or metric."""

    @model_validator(mode="after")
    def _every_number_has_one_meaning(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names holds a name twice")
        if self.ignored < len(self.class_names):
            raise ValueError(f"ignored is {self.ignored}, which is the class {self.class_names[self.ignored]!r}")
        return self

    def classes(self) -> tuple[str, ...]:
        """As they are given."""
        return self.class_names

    def labels(self) -> dict[int, int]:
        """Numbers are classes but for one."""
        return {**{label: label for label in range(len(self.class_names))}, self.ignored: IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """All below the two folders, in the order of their names."""
        images, masks = Path(self.path).expanduser(), Path(self.masks).expanduser()
        found = [
            FilePair(unit=name, split=_split(name), image=image, mask=mask)
            for name, (image, mask) in paired(images, masks, IMAGE_ENDS, MASK_ENDS).items()
        ]
        likely = sorted({name for pair in found if pair.split is None for name in _like_splits(pair.unit)})
        if likely:
            raise ConfigError(
                f"data.source: {images} has folders {few(map(repr, likely))}, which seem to be splits, and images in them would "
                f"be dealt out to others. Splits are directly below it, called {', '.join(SPLIT_FOLDERS)}"
            )
        unsplit = [pair.unit for pair in found if pair.split is None]
        if 0 < len(unsplit) < len(found):
            raise ConfigError(
                f"data.source: {images} has folders that are called as splits are, and {len(unsplit)} images that lie "
                f"in none of them: {few(unsplit)}"
            )
        return found


def _like_splits(name: str) -> list[str]:
    """Folders on the way to an image that are called as splits may be."""
    folders = name.split("/")[:-1]
    return ["/".join(folders[: depth + 1]) for depth, own in enumerate(folders) if _LIKE_SPLITS.fullmatch(own)]


def _split(name: str) -> Split | None:
    folder, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(folder.lower()) if slash else None
