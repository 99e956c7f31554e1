import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import source as hashing
from llmeff.data.camvid import CamVid
from llmeff.data.cityscapes import Cityscapes
from llmeff.data.image_folder import ImageFolder
from llmeff.data.images import ImageData

DATA = Path(os.environ.get("LLMEFF_DATA", Path(__file__).parents[3] / "shared" / "data"))

H, W = 5, 7
LABELS = (np.arange(H * W).reshape(H, W) % 3).astype(np.uint8)
IMAGE = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def read(config):
    return {image.unit: (image.split, *image.read()) for image in config.images()}


def palette(labels):
    """Indices whose colours have nothing to do with them."""
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([255, 255, 255, 7, 7, 7, 200, 0, 0])
    return image


class TestImageFolder:
    @pytest.fixture
    def folder(self, tmp_path, put):
        """Three pairs; a function that describes them."""
        for name in ("b", "a", "deep/c"):
            put(tmp_path / "images" / f"{name}.png", IMAGE)
            put(tmp_path / "masks" / f"{name}.png", LABELS)
        return tmp_path

    def config(self, folder, **settings):
        given = {"path": str(folder / "images"), "masks": str(folder / "masks"), "class_names": ["x", "y", "z"]}
        return validate(ImageFolder, given | settings)

    def test_images_come_in_the_order_of_their_names(self, folder):
        (folder / "images" / "notes.txt").write_text("not an image")
        (folder / "images" / ".hidden.png").write_text("not an image")
        config = self.config(folder)
        assert [image.unit for image in config.images()] == ["a", "b", "deep/c"]
        assert config.classes() == ("x", "y", "z")
        split, image, labels = read(config)["deep/c"]
        assert split is None
        assert image.dtype == labels.dtype == np.uint8
        assert np.array_equal(image, IMAGE)
        assert np.array_equal(labels, LABELS)

    def test_dumped_and_read_again(self, folder):
        config = self.config(folder)
        assert validate(ImageFolder, json.loads(config.model_dump_json())) == config

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            *((split, split) for split in ("train", "calibration", "search", "validation", "test")),
            ("val", "validation"),
            ("train/deep", "train"),
            ("Train", "train"),
            ("TEST", "test"),
            ("trains", None),
            ("valley/contest", None),
        ],
    )
    def test_folders_are_splits(self, tmp_path, put, name, split):
        put(tmp_path / "images" / name / "1.png", IMAGE)
        put(tmp_path / "masks" / name / "1.png", LABELS)
        assert read(self.config(tmp_path))[f"{name}/1"][0] == split

    @pytest.mark.parametrize("name", ["training", "Validate", "test_set", "set/train", "deep/deeper/Testing", "dev"])
    def test_what_may_be_a_split_is_not_dealt_out(self, tmp_path, put, name):
        for own in (name, "others"):
            put(tmp_path / "images" / own / "1.png", IMAGE)
            put(tmp_path / "masks" / own / "1.png", LABELS)
        words = f"the folders '{name}' in .*images look like splits but .* named train, calibration, search, validation"
        with pytest.raises(ConfigError, match=words):
            read(self.config(tmp_path))

    @pytest.mark.parametrize(
        "mask",
        [
            Image.fromarray(LABELS),
            Image.fromarray(LABELS.astype(np.uint16)),
            Image.frombytes("I;16B", LABELS.shape[::-1], LABELS.astype(">u2").tobytes()),
            palette(LABELS),
        ],
        ids=["8 bits", "16 bits", "16 bits, the higher byte first", "palette"],
    )
    def test_masks_are_read_as_numbers(self, folder, put, mask):
        (folder / "masks" / "a.png").unlink()
        path = put(folder / "masks" / f"a.{'tif' if mask.mode == 'I;16B' else 'png'}", mask)
        with Image.open(path) as stored:
            assert stored.mode == mask.mode
        assert np.array_equal(read(self.config(folder))["a"][2], LABELS)

    def test_a_mask_of_one_bit(self, folder, put):
        put(folder / "masks" / "a.png", Image.fromarray(LABELS > 1))
        assert np.array_equal(read(self.config(folder))["a"][2], LABELS > 1)

    @pytest.mark.parametrize("ignored", [3, 255, 40_000])
    def test_an_ignored_number(self, folder, put, ignored):
        mask = LABELS.astype(np.uint16)
        mask[0] = ignored
        put(folder / "masks" / "a.png", mask if ignored > 255 else mask.astype(np.uint8))
        labels = read(self.config(folder, ignored=ignored))["a"][2]
        assert (labels[0] == IGNORED_PIXEL).all()
        assert np.array_equal(labels[1:], LABELS[1:])

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
    def test_images_of_any_mode_are_rgb(self, folder, put, mode):
        given = Image.fromarray(IMAGE).convert(mode)
        put(folder / "images" / "a.tif", given)
        (folder / "images" / "a.png").unlink()
        assert np.array_equal(read(self.config(folder))["a"][1], np.asarray(given.convert("RGB")))

    @pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
    def test_images_are_turned_as_their_camera_noted(self, folder, put, orientation, turned):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(IMAGE).save(folder / "images" / "a.png", exif=exif)
        put(folder / "masks" / "a.png", np.ascontiguousarray(np.rot90(LABELS, turned)))
        assert np.array_equal(read(self.config(folder))["a"][1], np.rot90(IMAGE, turned))

    @pytest.mark.parametrize(
        ("orientation", "seen"),
        [
            (2, lambda pixels: pixels[:, ::-1]),
            (4, lambda pixels: pixels[::-1]),
            (5, lambda pixels: np.swapaxes(pixels, 0, 1)),
            (7, lambda pixels: np.swapaxes(pixels[::-1, ::-1], 0, 1)),
        ],
    )
    def test_images_are_mirrored_as_their_camera_noted(self, folder, put, orientation, seen):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(IMAGE).save(folder / "images" / "a.png", exif=exif)
        put(folder / "masks" / "a.png", np.ascontiguousarray(seen(LABELS)))
        assert np.array_equal(read(self.config(folder))["a"][1], seen(IMAGE))
        assert self.config(folder).image_size() == seen(LABELS).shape

    def test_a_photograph_with_a_mask_of_another_format(self, folder, put):
        (folder / "images" / "a.png").unlink()
        put(folder / "images" / "a.JPG", np.full((H, W, 3), 90, np.uint8))
        assert (read(self.config(folder))["a"][1] == 90).all()

    @pytest.mark.parametrize(
        ("harm", "problem"),
        [
            (
                lambda f, put: put(f / "masks/a.png", LABELS + np.uint8(1)),
                r"masks/a.png: contains values that are not classes: 3 \(11 pixels\)\. Allowed: 0 to 2, 255$",
            ),
            (
                lambda f, put: put(f / "masks/a.png", np.arange(H * W, dtype=np.uint16).reshape(H, W) * 1000),
                r"masks/a.png: .* not classes: 1000 \(1 pixels\), 2000 \(1 pixels\), 3000 \(1 pixels\) and 31 more\. ",
            ),
            (
                lambda f, put: put(f / "masks/a.png", LABELS[:, :-1]),
                "masks/a.png: is 6 pixels wide and 5 high, but .*images/a.png is 7 wide and 5 high",
            ),
            (
                lambda f, put: put(f / "masks/a.png", IMAGE),
                "masks/a.png: has the mode 'RGB', but a mask needs one channel",
            ),
            (lambda f, put: put(f / "images/a.png", LABELS.astype(np.uint16)), "images/a.png: has more than 8 bits"),
            (
                lambda f, put: (f / "masks/a.png").unlink(),
                r"images: 1 files have no mask of the same name \(ending in .png, .bmp, .*\) below .*masks: a.png",
            ),
            (
                lambda f, put: (f / "masks/deep/c.png").unlink(),
                r"images: 1 files have no mask of the same name .*: deep/c.png",
            ),
            (
                lambda f, put: (f / "images/a.png").unlink(),
                r"masks: 1 files have no image of the same name .* below .*images: a.png",
            ),
            (
                lambda f, put: [put(f / "images" / f"{i}.png", IMAGE) for i in range(5)],
                r"images: 5 files have no mask of the same name .* below .*masks: 0.png, 1.png, 2.png and 2 more$",
            ),
            (
                lambda f, put: put(f / "images/a.bmp", IMAGE),
                r"images/a.png: the same folder contains a.bmp. Rename one of them",
            ),
            (lambda f, put: shutil.rmtree(f / "masks"), "there is no folder .*masks"),
            (
                lambda f, put: [p.unlink() for p in (f / "images").rglob("*.png")],
                "no file below .*images ends in .png",
            ),
            (lambda f, put: (f / "images/a.png").write_bytes(b""), "images/a.png: is not an image"),
            (lambda f, put: (f / "masks/a.png").write_text("text"), "masks/a.png: is not an image"),
            (
                lambda f, put: [
                    put(f / part / "val/d.png", what) for part, what in (("images", IMAGE), ("masks", LABELS))
                ],
                "images has folders named after splits, so every image must be in one of these folders. "
                "Move the other 3 images there: a, b, deep/c$",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, folder, put, harm, problem):
        harm(folder, put)
        with pytest.raises(ConfigError, match=problem):
            read(self.config(folder))

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("part", ["images", "masks"])
    @pytest.mark.parametrize("end", ["png", "bmp", "tif"])
    def test_a_cut_file_is_named(self, folder, put, part, end):
        path = put(folder / part / f"a.{end}", np.resize(LABELS, (50, 50)))
        if end != "png":
            (folder / part / "a.png").unlink()
        put(folder / ("masks" if part == "images" else "images") / "a.png", np.resize(LABELS, (50, 50)))
        whole = path.read_bytes()
        for size in range(0, len(whole) - 100, 97):
            path.write_bytes(whole[:size])
            with pytest.raises(ConfigError, match=f"{part}/a.{end}: (is not an image|cannot be read as an image)"):
                read(self.config(folder))

    def test_all_that_the_heads_of_the_files_tell_is_said_at_once(self, folder, put):
        put(folder / "masks" / "a.png", IMAGE)
        put(folder / "masks" / "b.png", LABELS[1:])
        (folder / "images" / "deep" / "c.png").write_text("text")
        with pytest.raises(ConfigError) as caught:
            next(self.config(folder).images())
        assert [problem.partition(":")[0] for problem in caught.value.problems] == [
            str(folder / name) for name in ("masks/a.png", "masks/b.png", "images/deep/c.png")
        ]

    def test_of_many_problems_ten_are_listed(self, tmp_path, put):
        for number in range(13):
            put(tmp_path / "images" / f"{number}.png", IMAGE)
            put(tmp_path / "masks" / f"{number}.png", IMAGE)
        with pytest.raises(ConfigError) as caught:
            read(self.config(tmp_path))
        assert len(caught.value.problems) == 11
        assert caught.value.problems[-1] == "and 3 more problems"

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"class_names": ["x"]}, "class_names"),
            ({"class_names": [str(i) for i in range(256)]}, "class_names"),
            ({"class_names": ["x", "y", "x"]}, "class_names must be unique, but one name occurs twice"),
            ({"ignored": 2}, "ignored is 2, which is the number of the class 'z'"),
            ({"ignored": -1}, "ignored"),
            ({"mask": "masks"}, "Did you mean 'masks'"),
        ],
    )
    def test_wrong_settings(self, folder, settings, problem):
        with pytest.raises(ConfigError, match=problem):
            self.config(folder, **settings)

    def test_the_fingerprint_moves_with_the_folder(self, folder):
        before = self.config(folder).fingerprint()
        shutil.move(folder / "images", folder / "moved" / "images")
        shutil.move(folder / "masks", folder / "moved" / "masks")
        assert self.config(folder / "moved").fingerprint() == before

    def test_the_fingerprint_changes_with_all_that_is_read(self, folder, put):
        seen = {
            self.config(folder).fingerprint(),
            self.config(folder, class_names=["x", "y", "w"]).fingerprint(),
            self.config(folder, ignored=3).fingerprint(),
        }
        put(folder / "masks" / "a.png", LABELS[::-1])
        seen.add(self.config(folder).fingerprint())
        put(folder / "images" / "a.png", IMAGE[::-1])
        seen.add(self.config(folder).fingerprint())
        for part in ("images", "masks"):
            (folder / part / "deep").rename(folder / part / "other")
        seen.add(self.config(folder).fingerprint())
        assert len(seen) == 6

    def test_files_that_are_large_together_are_hashed_once(self, folder, put, monkeypatch):
        monkeypatch.setattr(hashing, "REMEMBERED_BYTES", 500)
        assert all(path.stat().st_size < 500 for path in folder.rglob("*.png"))
        before = self.config(folder).fingerprint()
        with monkeypatch.context() as patch:
            patch.setattr(hashing.files, "sha256", None)
            assert self.config(folder).fingerprint() == before
        put(folder / "masks" / "a.png", LABELS[::-1])
        assert self.config(folder).fingerprint() != before


OFFICIAL = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
"""The labelIds of trainIds 0 to 18."""


class TestCityscapes:
    @pytest.fixture
    def folder(self, tmp_path, put):
        self.ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
        for place in ("train/aachen", "train/ulm", "train/zurich", "val/lindau"):
            city = place.rpartition("/")[2]
            name = f"{place}/{city}_000000_000019"
            put(tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png", np.zeros((2, 17, 3), np.uint8))
            put(tmp_path / "gtFine" / f"{name}_gtFine_labelIds.png", self.ids)
            put(tmp_path / "gtFine" / f"{name}_gtFine_color.png", np.zeros((2, 17, 4), np.uint8))
            (tmp_path / "gtFine" / f"{name}_gtFine_polygons.json").write_text("{}")
        return tmp_path

    def config(self, folder, **settings):
        cities = {"search_cities": ["ulm"], "validation_cities": ["zurich"]}
        return validate(Cityscapes, {"path": str(folder)} | cities | settings)

    def test_cities_are_splits(self, folder):
        assert {unit: split for unit, (split, *_) in read(self.config(folder)).items()} == {
            "train/aachen/aachen_000000_000019": "train",
            "train/ulm/ulm_000000_000019": "search",
            "train/zurich/zurich_000000_000019": "validation",
            "val/lindau/lindau_000000_000019": "test",
        }

    def test_the_official_classes(self, folder):
        config = self.config(folder)
        (_, pixels, labels), *_ = read(config).values()
        assert not pixels.any()
        assert labels.ravel().tolist() == [OFFICIAL.index(i) if i in OFFICIAL else IGNORED_PIXEL for i in range(34)]
        assert config.classes() == (
            "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
            "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
        )  # fmt: skip

    def test_the_cities_decide_the_fingerprint(self, folder):
        assert self.config(folder).fingerprint() != self.config(folder, search_cities=[]).fingerprint()

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"search_cities": ["achen"]}, "there is no training city 'achen' in .* Did you mean 'aachen'"),
            (
                {"search_cities": ["zurich"]},
                "search_cities and validation_cities both contain zurich. A city can be in only one of them",
            ),
        ],
    )
    def test_wrong_cities(self, folder, settings, problem):
        with pytest.raises(ConfigError, match=problem):
            read(self.config(folder, **settings))

    def test_an_id_that_is_none(self, folder, put):
        path = put(next(folder.rglob("aachen*labelIds.png")), self.ids + np.uint8(1))
        with pytest.raises(
            ConfigError,
            match=rf"{path.name}: contains values that are not classes: 34 \(1 pixels\)\. Allowed: 0 to 33$",
        ):
            read(self.config(folder))


class TestCamVid:
    @pytest.fixture
    def folder(self, tmp_path, put):
        names = {"train": ["0001TP_1", "0006R0_1", "0006R0_2"], "val": ["0016E5_1"], "test": ["0001TP_9"]}
        for part, units in names.items():
            for unit in units:
                put(tmp_path / part / f"{unit}.png", np.zeros((3, 4, 3), np.uint8))
                put(tmp_path / f"{part}annot" / f"{unit}.png", np.arange(12, dtype=np.uint8).reshape(3, 4))
        return tmp_path

    @pytest.mark.parametrize(
        ("settings", "splits"),
        [
            ({}, ["train", "train", "train", "validation", "test"]),
            ({"search": "0006R0_2"}, ["train", "train", "search", "validation", "test"]),
            ({"search": "0001TP"}, ["search", "train", "train", "validation", "test"]),
        ],
    )
    def test_a_sequence_is_the_search_split(self, folder, settings, splits):
        found = read(validate(CamVid, {"path": str(folder)} | settings))
        assert [split for split, *_ in found.values()] == splits
        assert next(iter(found)) == "train/0001TP_1"

    def test_the_twelfth_number_is_ignored(self, folder):
        config = validate(CamVid, {"path": str(folder)})
        (_, _, labels), *_ = read(config).values()
        assert labels.ravel().tolist() == [*range(11), IGNORED_PIXEL]
        assert config.classes()[0] == "sky"
        assert config.classes()[-1] == "bicyclist"

    def test_a_sequence_that_is_not_there(self, folder):
        with pytest.raises(ConfigError, match=r"search: no image name in .*train begins with '0002'"):
            read(validate(CamVid, {"path": str(folder), "search": "0002"}))

    def test_a_folder_that_is_not_there(self, folder):
        shutil.rmtree(folder / "valannot")
        with pytest.raises(ConfigError, match=r"there is no folder .*valannot"):
            read(validate(CamVid, {"path": str(folder)}))


ARCHIVE = DATA / "camvid" / "camvid_240x180.tar.gz"


@pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"no camvid/camvid_240x180.tar.gz in {DATA}")
def test_camvid_is_counted_as_its_copy_says(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "camvid_240x180"
    corpus = ImageData(source=CamVid(path=str(folder), search="")).open()
    counts = {split: facts.num_images for split, facts in corpus.splits.items()}
    assert counts == {"train": 367, "validation": 101, "test": 233}
    assert corpus.size == (180, 240)
    known = json.loads((folder / "MANIFEST.json").read_text())["splits"]
    assert corpus.pixels.tolist() == known["train"]["label_pixels"][:11]
    for split, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert corpus.splits[split].num_pixels == sum(known[part]["label_pixels"][:11])
    # In per cent, of the labels of twice the height and width, of which these are a fourth.
    shares = [17.54, 24.22, 1.02, 32.96, 4.67, 10.12, 1.22, 1.17, 6.11, 0.67, 0.30]
    assert (100 * corpus.pixels / corpus.pixels.sum()).tolist() == pytest.approx(shares, abs=0.15)
