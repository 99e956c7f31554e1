"""Image source that reads a folder of images and a folder of masks."""

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
"""File formats that preserve mask values. GIF does not, because its writers reorder palettes."""

SPLIT_FOLDERS: dict[str, Split] = {**{split: split for split in SPLITS}, "val": "validation"}
_LIKE_SPLITS = re.compile(
    r"(train(ing)?|val(id(at(e|ion|ing))?)?|dev|eval(uation)?|test(ing)?|search|calibration)([-_ ]?(set|split|data|images))?",
    re.IGNORECASE,
)
"""Pattern of the folder names that people commonly give to splits."""


class ImageFolder(ImageFiles):
    """Images in one folder, with masks of the same names in another folder.

    Subfolders are searched too. The images in the subfolders train, calibration, search, validation (or val) and test,
    in upper or lower case, belong to these splits. Without such subfolders, `data.splits` divides the images. Images
    are rotated by their EXIF orientation.
    """

    name: Literal["folder"] = "folder"
    path: Text
    """Folder of the images, which are RGB or grey with 8 bits per channel."""
    masks: Text
    """Folder of the masks. The value of a mask pixel is the number of its class, stored in one channel of 1, 8 or 16
    bits or as a palette index (not as a colour)."""
    class_names: tuple[Text, ...] = Field(min_length=2, max_length=IGNORED_PIXEL)
    """Names of the classes, in the order of their numbers. The first class is number 0."""
    ignored: Annotated[int, Field(strict=True, ge=0, lt=2**16)] = IGNORED_PIXEL
    """Mask value of the pixels that count in neither the loss nor the metrics."""

    @model_validator(mode="after")
    def _every_number_has_one_meaning(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names must be unique, but one name occurs twice")
        if self.ignored < len(self.class_names):
            raise ValueError(
                f"ignored is {self.ignored}, which is the number of the class {self.class_names[self.ignored]!r}. "
                "Choose a number that is not the number of a class"
            )
        return self

    def classes(self) -> tuple[str, ...]:
        """Returns `class_names`."""
        return self.class_names

    def labels(self) -> dict[int, int]:
        """Returns the class of each mask value: the value itself, or IGNORED_PIXEL for the value `ignored`."""
        return {**{label: label for label in range(len(self.class_names))}, self.ignored: IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """Returns all pairs below the two folders, sorted by name."""
        images, masks = Path(self.path).expanduser(), Path(self.masks).expanduser()
        found = [
            FilePair(unit=name, split=_split(name), image=image, mask=mask)
            for name, (image, mask) in paired(images, masks, IMAGE_ENDS, MASK_ENDS).items()
        ]
        likely = sorted({name for pair in found if pair.split is None for name in _like_splits(pair.unit)})
        if likely:
            raise ConfigError(
                f"data.source: the folders {few(map(repr, likely))} in {images} look like splits but are not read as "
                "such, so their images would be mixed into all splits. Put the folders of splits directly below the "
                f"folder of images, named {', '.join(SPLIT_FOLDERS)}"
            )
        unsplit = [pair.unit for pair in found if pair.split is None]
        if 0 < len(unsplit) < len(found):
            raise ConfigError(
                f"data.source: {images} has folders named after splits, so every image must be in one of these "
                f"folders. Move the other {len(unsplit)} images there: {few(unsplit)}"
            )
        return found


def _like_splits(name: str) -> list[str]:
    """Returns the folders in an image's path that are named like splits."""
    folders = name.split("/")[:-1]
    return ["/".join(folders[: depth + 1]) for depth, folder in enumerate(folders) if _LIKE_SPLITS.fullmatch(folder)]


def _split(name: str) -> Split | None:
    folder, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(folder.lower()) if slash else None
