"""Cityscapes as an image source."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from llmeff.core.config import ConfigError, Text
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.core.registry import nearest
from llmeff.data.image_files import FilePair, ImageFiles, paired
from llmeff.data.splits import Split

CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""Names of the evaluated classes by their value in the masks ("id"), in the order of the labels ("trainId"). Source:
github.com/mcordts/cityscapesScripts, helpers/labels.py."""

NUM_IDS = 34
"""Number of mask values: masks contain 0 to 33. Pixels whose value is not in `CLASSES` are ignored."""


class Cityscapes(ImageFiles):
    """Cityscapes: street scenes with fine masks and the official 19 classes (Cordts et al. 2016).

    The files come from the Cityscapes website. The licence allows non-commercial research only. The labels of the
    official test set are not public, so the split `test` is the official validation set: 500 images of three cities
    that are not in the training set. The splits `search` and `validation` are whole cities, taken out of training.
    """

    image_end: ClassVar[str] = "_leftImg8bit"
    mask_end: ClassVar[str] = "_gtFine_labelIds"

    name: Literal["cityscapes"] = "cityscapes"
    path: Text
    """Folder that contains leftImg8bit and gtFine."""
    search_cities: tuple[Text, ...] = ("krefeld", "ulm")
    """Training cities that form the split `search`. The default cities have 194 images."""
    validation_cities: tuple[Text, ...] = ("darmstadt", "monchengladbach")
    """Training cities that form the split `validation`. The default cities have 179 images."""

    @model_validator(mode="after")
    def _a_city_is_in_one_split(self) -> Self:
        if both := sorted(set(self.search_cities) & set(self.validation_cities)):
            raise ValueError(
                f"search_cities and validation_cities both contain {', '.join(both)}. A city can be in only one of them"
            )
        return self

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the 19 classes."""
        return tuple(CLASSES.values())

    def labels(self) -> dict[int, int]:
        """Returns the meaning of the mask values, which are the original ids ("labelIds")."""
        return dict.fromkeys(range(NUM_IDS), IGNORED_PIXEL) | {value: label for label, value in enumerate(CLASSES)}

    def pairs(self) -> list[FilePair]:
        """Returns the official training pairs, then the official validation pairs, each sorted by city and name."""
        splits: dict[str, Split] = {
            **dict.fromkeys(self.search_cities, "search"),
            **dict.fromkeys(self.validation_cities, "validation"),
        }
        train, val = self._part("train"), self._part("val")
        cities = {name.partition("/")[0] for name in train}
        if unknown := [city for city in splits if city not in cities]:
            raise ConfigError(
                f"data.source: there is no training city {unknown[0]!r} in {self.path}.{nearest(unknown[0], cities)}"
            )
        return [
            *(
                self._pair(f"train/{name}", splits.get(name.partition("/")[0], "train"), files)
                for name, files in train.items()
            ),
            *(self._pair(f"val/{name}", "test", files) for name, files in val.items()),
        ]

    def _part(self, part: str) -> dict[str, tuple[Path, Path]]:
        root = Path(self.path).expanduser()
        ends = (f"{self.image_end}.png",), (f"{self.mask_end}.png",)
        return paired(root / "leftImg8bit" / part, root / "gtFine" / part, *ends)

    def _pair(self, unit: str, split: Split, files: tuple[Path, Path]) -> FilePair:
        return FilePair(unit=unit, split=split, image=files[0], mask=files[1])
