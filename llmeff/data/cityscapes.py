"""Cityscapes as a source."""

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
"""The evaluated classes by their number in the masks, in the order of the labels ("trainIds"). Source:
github.com/mcordts/cityscapesScripts, helpers/labels.py."""

NUM_IDS = 34
"""Masks hold the numbers 0 to 33; numbers without a class are ignored."""


class Cityscapes(ImageFiles):
    """The street scenes of Cordts et al. (2016) with fine masks and the official 19 classes.

    The files come from the Cityscapes site; the licence allows non-commercial research only. The labels of the official
    test set are not public, so the 500 official validation images, of three other cities, are the split `test` here. The
    splits `search` and `validation` are whole cities taken out of training.
    """

    image_end: ClassVar[str] = "_leftImg8bit"
    mask_end: ClassVar[str] = "_gtFine_labelIds"

    name: Literal["cityscapes"] = "cityscapes"
    path: Text
    """The folder that holds leftImg8bit and gtFine."""
    search_cities: tuple[Text, ...] = ("krefeld", "ulm")
    """Training cities that form the split `search`; 194 images by default."""
    validation_cities: tuple[Text, ...] = ("darmstadt", "monchengladbach")
    """Training cities that form the split `validation`; 179 images by default."""

    @model_validator(mode="after")
    def _a_city_is_in_one_split(self) -> Self:
        if both := sorted(set(self.search_cities) & set(self.validation_cities)):
            raise ValueError(f"search_cities and validation_cities share {', '.join(both)}")
        return self

    def classes(self) -> tuple[str, ...]:
        """The 19 classes."""
        return tuple(CLASSES.values())

    def labels(self) -> dict[int, int]:
        """Masks hold the original ids ("labelIds")."""
        return dict.fromkeys(range(NUM_IDS), IGNORED_PIXEL) | {value: label for label, value in enumerate(CLASSES)}

    def pairs(self) -> list[FilePair]:
        """The official training and validation pairs, each sorted by city and name."""
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
