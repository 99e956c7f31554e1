"""A source of a folder of images and a folder of masks."""

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
"""Formats that preserve every number. GIF is not among them: its writers reorder palettes."""

SPLIT_FOLDERS: dict[str, Split] = {**{split: split for split in SPLITS}, "val": "validation"}
_LIKE_SPLITS = re.compile(
    r"(train(ing)?|val(id(at(e|ion|ing))?)?|dev|eval(uation)?|test(ing)?|search|calibration)([-_ ]?(set|split|data|images))?",
    re.IGNORECASE,
)
"""Names that people commonly give to splits."""


class ImageFolder(ImageFiles):
    """Any images with masks of the same names.

    Subfolders are searched too. Subfolders called train, calibration, search, validation (or val) and test, in any case,
    are the splits; without them the data's settings choose. Images are rotated by their EXIF orientation.
    """

    name: Literal["folder"] = "folder"
    path: Text
    """The folder of the images: RGB or grey, 8 bits per channel."""
    masks: Text
    """The folder of the masks. Each pixel holds the number of its class: one channel of 1, 8 or 16 bits, or the index (not
    the colour) in a palette."""
    class_names: tuple[Text, ...] = Field(min_length=2, max_length=IGNORED_PIXEL)
    """Names of the classes; the first is number 0."""
    ignored: Annotated[int, Field(strict=True, ge=0, lt=2**16)] = IGNORED_PIXEL
    """The number in the masks of pixels that count in neither loss nor metrics."""

    @model_validator(mode="after")
    def _every_number_has_one_meaning(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names contains a name twice")
        if self.ignored < len(self.class_names):
            raise ValueError(f"ignored is {self.ignored}, but that is the class {self.class_names[self.ignored]!r}")
        return self

    def classes(self) -> tuple[str, ...]:
        """Returns `class_names`."""
        return self.class_names

    def labels(self) -> dict[int, int]:
        """Every number is its class, except `ignored`."""
        return {**{label: label for label in range(len(self.class_names))}, self.ignored: IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """All pairs below the two folders, sorted by name."""
        images, masks = Path(self.path).expanduser(), Path(self.masks).expanduser()
        found = [
            FilePair(unit=name, split=_split(name), image=image, mask=mask)
            for name, (image, mask) in paired(images, masks, IMAGE_ENDS, MASK_ENDS).items()
        ]
        likely = sorted({name for pair in found if pair.split is None for name in _like_splits(pair.unit)})
        if likely:
            raise ConfigError(
                f"data.source: the folders {few(map(repr, likely))} in {images} look like splits, but their images would be "
                f"mixed into all splits. Put the folders of splits directly below it, named {', '.join(SPLIT_FOLDERS)}"
            )
        unsplit = [pair.unit for pair in found if pair.split is None]
        if 0 < len(unsplit) < len(found):
            raise ConfigError(
                f"data.source: {images} has folders named after splits, but {len(unsplit)} images are in none of them: "
                f"{few(unsplit)}"
            )
        return found


def _like_splits(name: str) -> list[str]:
    """The folders in an image's path that are named like splits."""
    folders = name.split("/")[:-1]
    return ["/".join(folders[: depth + 1]) for depth, folder in enumerate(folders) if _LIKE_SPLITS.fullmatch(folder)]


def _split(name: str) -> Split | None:
    folder, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(folder.lower()) if slash else None
