import json

import numpy as np
import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import image_cache
from llmeff.data.image_folder import ImageFolder
from llmeff.data.images import ImageData, ImageFacts
from llmeff.data.splits import SPLITS

H, W = 5, 7
AUGMENT = {"flip": 0.5, "scale": [0.5, 2.0], "crop": [4, 3], "colour": 0.3}


def pair(number):
    """An image and labels that differ from number to number."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (H, W, 3), dtype=np.uint8), rng.choice([0, 1, 2, IGNORED_PIXEL], (H, W)).astype(
        np.uint8
    )


@pytest.fixture
def folder(tmp_path, put):
    """Six images to train on and three to test on, of five by seven pixels."""
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        for number in numbers:
            for part, content in zip(("images", "masks"), pair(number), strict=True):
                put(tmp_path / part / split / f"{number}.png", content)
    return tmp_path


@pytest.fixture
def unsplit(tmp_path, put):
    """A hundred images that no folder divides."""
    for number in range(100):
        for part, content in zip(("images", "masks"), pair(number), strict=True):
            put(tmp_path / part / f"{number:03}.png", content)
    return tmp_path


def config(folder, **settings):
    source = {"name": "folder", "path": str(folder / "images"), "masks": str(folder / "masks")}
    return validate(ImageData, {"source": source | {"class_names": ["x", "y", "z"]}} | settings)


def test_dumped_and_read_again(folder):
    data = config(folder, size=[3, 4], augment=AUGMENT, splits={"test": 0.3}, max_train=2)
    assert validate(ImageData, json.loads(data.model_dump_json())) == data


def test_the_corpus_is_what_the_files_hold(folder):
    corpus = config(folder).open()
    assert corpus.name == "folder"
    assert corpus.classes == ("x", "y", "z")
    assert corpus.size == (H, W)
    labelled = [int((pair(number)[1] != IGNORED_PIXEL).sum()) for number in range(9)]
    assert corpus.splits == {
        "train": ImageFacts(num_images=6, num_pixels=sum(labelled[:6])),
        "test": ImageFacts(num_images=3, num_pixels=sum(labelled[6:])),
    }
    batch = corpus.held_out("test", range(1, 3))
    assert batch.units == ["test/7", "test/8"]
    assert batch.images.dtype == np.float32
    assert batch.labels.dtype == np.int64
    for row, number in enumerate((7, 8)):
        image, labels = pair(number)
        expected = (image / 255 - corpus.mean) / corpus.std
        assert batch.images[row].transpose(1, 2, 0) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert np.array_equal(batch.labels[row], labels)


def test_what_is_counted_in_two_images_of_two_by_two(tmp_path, put):
    masks = [[[0, 0], [1, IGNORED_PIXEL]], [[0, 2], [2, 2]]]
    images = np.zeros((2, 2, 2, 3), np.uint8)
    images[1, ..., 0] = 255  # red: nothing in one image, all in the other
    images[..., 1] = 51  # green: a fifth everywhere
    images[..., 0, 2] = [[51, 51], [102, 204]]  # blue: half of the pixels 0; 51, 51, 102, 204
    for number in range(2):
        put(tmp_path / "images/train" / f"{number}.png", images[number])
        put(tmp_path / "masks/train" / f"{number}.png", np.array(masks[number], np.uint8))
    corpus = config(tmp_path).open()
    assert corpus.pixels.tolist() == [3, 1, 3]
    assert corpus.present.tolist() == [3 + 4, 3, 4]
    assert corpus.mean.tolist() == pytest.approx([0.5, 0.2, 0.2])
    blue = ((0.04 + 0.04 + 0.16 + 0.64) / 8 - 0.04) ** 0.5
    assert corpus.std.tolist() == pytest.approx([0.5, 1 / 255, blue])
    assert np.isfinite(corpus.batch(0, 0, range(2), 2).images).all()


class TestTraining:
    def test_an_epoch_sees_every_image_once(self, folder):
        corpus = config(folder).open()
        orders = []
        for epoch in range(3):
            units = [unit for step in range(3) for unit in corpus.batch(0, 3 * epoch + step, range(2), 2).units]
            assert sorted(units) == [f"train/{number}" for number in range(6)]
            orders.append(tuple(units))
        orders.append(tuple(unit for step in range(3) for unit in corpus.batch(1, step, range(2), 2).units))
        assert len(set(orders)) == 4

    def test_rows_are_as_they_are_stored(self, folder):
        corpus = config(folder).open()
        batch = corpus.batch(0, 0, range(6), 6)
        for row, unit in enumerate(batch.units):
            stored = corpus.held_out("train", range(int(unit[-1]), int(unit[-1]) + 1))
            assert np.array_equal(batch.images[row], stored.images[0])
            assert np.array_equal(batch.labels[row], stored.labels[0])

    @pytest.mark.parametrize("augment", [{}, AUGMENT, {"scale": [0.2, 3.0]}])
    def test_a_batch_is_the_same_however_it_is_divided(self, folder, augment):
        corpus = config(folder, augment=augment).open()
        for step in range(4):
            whole = corpus.batch(3, step, range(4), 4)
            for divided in (
                [range(2), range(2, 4)],
                [range(1), range(1, 4)],
                [range(row, row + 1) for row in range(4)],
            ):
                parts = [corpus.batch(3, step, rows, 4) for rows in reversed(divided)][::-1]
                assert np.array_equal(whole.images, np.concatenate([part.images for part in parts]))
                assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))
                assert whole.units == [unit for part in parts for unit in part.units]

    def test_augmentation_changes_training_only(self, folder):
        plain, augmented = config(folder).open(), config(folder, augment=AUGMENT).open()
        assert augmented.batch(0, 0, range(2), 2).images.shape == (2, 3, 4, 3)
        assert augmented.fingerprint == plain.fingerprint
        for split in ("train", "test"):
            ours, theirs = (corpus.held_out(split, range(3)) for corpus in (plain, augmented))
            assert np.array_equal(ours.images, theirs.images)
            assert np.array_equal(ours.labels, theirs.labels)

    def test_an_image_seen_again_is_augmented_anew(self, folder):
        corpus = config(folder, augment={"crop": [2, 2]}, max_train=1).open()
        assert len({corpus.batch(0, step, range(1), 1).labels.tobytes() for step in range(20)}) > 5

    def test_padding_is_ignored_and_of_the_mean_colour(self, folder):
        corpus = config(folder, augment={"scale": [0.5, 0.5], "crop": [9, 11]}).open()
        batch = corpus.batch(0, 0, range(6), 6)
        assert batch.labels.shape == (6, 9, 11)
        filled = (batch.images != 0).any(axis=1)
        assert (filled.sum(axis=(1, 2)) == 2 * 4).all()
        assert (batch.labels[~filled] == IGNORED_PIXEL).all()

    def test_fewer_training_images(self, folder, cache_folder):
        some, every = config(folder, max_train=2).open(), config(folder).open()
        assert some.splits["train"].num_images == 2
        assert some.splits["test"] == every.splits["test"]
        units = {unit for step in range(5) for unit in some.batch(0, step, range(2), 2).units}
        assert units == {"train/0", "train/1"}
        pixels = np.array([pair(number)[0] for number in range(2)]) / 255
        assert some.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)))
        assert some.std == pytest.approx(pixels.std(axis=(0, 1, 2)))
        labels = np.array([pair(number)[1] for number in range(2)])
        assert some.pixels.tolist() == [(labels == label).sum() for label in range(3)]
        assert some.fingerprint != every.fingerprint
        assert len(list((cache_folder / "images").iterdir())) == 1
        assert config(folder, max_train=6).open().fingerprint == every.fingerprint


class TestSplits:
    def test_shares_of_images(self, unsplit):
        shares = {"calibration": 0.1, "search": 0.1, "validation": 0.2, "test": 0.2}
        corpus = config(unsplit, splits=shares).open()
        counts = [corpus.splits[split].num_images for split in SPLITS]
        assert sum(counts) == 100
        for count, share in zip(counts, [0.4, *shares.values()], strict=True):
            assert abs(count - 100 * share) < 4 * (100 * share * (1 - share)) ** 0.5
        units = [unit for split in SPLITS for unit in corpus.held_out(split, range(100)).units]
        assert sorted(units) == [f"{number:03}" for number in range(100)]

    def test_an_image_stays_where_it_is_when_others_come_or_go(self, unsplit):
        before = config(unsplit).open().held_out("test", range(100)).units
        gone = [unit for unit in before if int(unit) % 2]
        assert gone
        for unit in [*gone, "000", "001"]:
            for part in ("images", "masks"):
                (unsplit / part / f"{unit}.png").unlink(missing_ok=True)
        after = config(unsplit).open().held_out("test", range(100)).units
        assert after == [unit for unit in before if unit not in [*gone, "000", "001"]]

    def test_shares_change_nothing_that_the_source_has_divided(self, folder):
        assert config(folder, splits={"validation": 0.5}).open().splits == config(folder).open().splits

    def test_an_empty_split(self, folder):
        corpus = config(folder).open()
        corpus.check_split("test")
        for ask in (lambda: corpus.check_split("search"), lambda: corpus.held_out("search", range(1))):
            with pytest.raises(
                ConfigError, match=r"the split 'search' is empty \(images in the other splits: test 3, train 6\)"
            ):
                ask()


class TestSize:
    def test_images_are_averaged_and_labels_taken_from_the_middle(self, tmp_path, put):
        rng = np.random.default_rng(0)
        image, labels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), rng.integers(0, 3, (6, 9), dtype=np.uint8)
        put(tmp_path / "images/train/a.png", image)
        put(tmp_path / "masks/train/a.png", labels)
        corpus = config(tmp_path, size=[2, 3]).open()
        batch = corpus.held_out("train", range(1))
        found = batch.images[0].transpose(1, 2, 0) * corpus.std + corpus.mean
        blocks = image.reshape(2, 3, 3, 3, 3).mean(axis=(1, 3)) / 255
        assert found == pytest.approx(blocks, abs=1.01 / 255)  # rounded twice
        assert np.array_equal(batch.labels[0], labels[1::3, 1::3])

    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 3), (9, 4), (11, 13)])
    def test_any_size(self, folder, put, size):
        put(folder / "images/train/0.png", np.full((8, 3, 3), 200, np.uint8))
        put(folder / "masks/train/0.png", np.full((8, 3), 2, np.uint8))
        corpus = config(folder, size=size).open()
        batch = corpus.held_out("train", range(6))
        assert corpus.size == size
        assert batch.images.shape == (6, 3, *size)
        assert (batch.labels[0] == 2).all()
        assert set(np.unique(batch.labels)) <= {0, 1, 2, IGNORED_PIXEL}
        assert corpus.batch(0, 0, range(2), 2).images.shape == (2, 3, *size)

    def test_images_of_two_sizes_need_one(self, folder, put, cache_folder):
        put(folder / "images/train/2.png", pair(2)[0][1:])
        put(folder / "masks/train/2.png", pair(2)[1][1:])
        with pytest.raises(
            ConfigError,
            match=r"data.size: .* train/2 is 7 pixels wide and 4 high, but test/6 is 7 pixels wide and 5 high",
        ):
            config(folder).open()
        assert list((cache_folder / "images").iterdir()) == []

    @pytest.mark.parametrize(
        ("settings", "size"),
        [
            ({}, (H, W)),
            ({"source": {"name": "camvid", "path": "/nowhere"}}, None),
            ({"size": [3, 5]}, (3, 5)),
            ({"size": [30, 50], "augment": {"crop": [4, 3]}}, (4, 3)),
            ({"source": {"name": "scenes", "height": 20, "width": 30}}, (20, 30)),
        ],
    )
    def test_the_size_of_a_row_is_known_before_the_data_is_opened(self, folder, settings, size):
        assert config(folder, **settings).row_size() == size


class TestCache:
    def test_a_warm_start_decodes_nothing(self, folder, monkeypatch):
        data = config(folder)
        cold = data.open()
        monkeypatch.setattr(ImageFolder, "images", None)
        warm = data.open()
        assert warm.fingerprint == cold.fingerprint
        assert np.array_equal(warm.batch(0, 3, range(4), 4).images, cold.batch(0, 3, range(4), 4).images)

    def test_what_decides_the_images_decides_the_place(self, folder, cache_folder):
        settings = [{}, {"size": [3, 4]}, {"splits": {"test": 0.3}}]
        for setting in settings:
            config(folder, **setting).open()
        assert len(list((cache_folder / "images").iterdir())) == len(settings)

    def test_a_damaged_cache_is_made_again(self, folder, cache_folder, caplog):
        before = config(folder).open().fingerprint
        (made,) = (cache_folder / "images").iterdir()
        (made / "train.labels").write_bytes(b"")
        assert config(folder).open().fingerprint == before
        assert "the image cache is damaged (train.labels changed)" in caplog.text

    def test_another_process_waits_and_reads(self, folder):
        data, made = config(folder), []
        opened = data.open(is_main=False, wait=lambda: made.append(data.open()))
        assert opened.fingerprint == made[0].fingerprint

    def test_the_others_are_let_go_when_the_main_process_fails(self, folder, put):
        put(folder / "masks/train/3.png", pair(3)[0])
        waited = []
        with pytest.raises(ConfigError, match="has the mode 'RGB'"):
            config(folder).open(wait=lambda: waited.append(True))
        assert waited
        with pytest.raises(ConfigError, match="the image cache could not be made: see the error of the main process"):
            config(folder).open(is_main=False)

    def test_the_heads_of_all_files_are_read_before_anything_is_written(self, folder, put, monkeypatch):
        put(folder / "masks/train/5.png", pair(5)[0])
        monkeypatch.setattr(image_cache, "write_images", None)
        with pytest.raises(ConfigError, match=r"masks/train/5\.png"):
            config(folder).open()

    def test_no_training_image_is_found_before_anything_is_written(self, folder, monkeypatch):
        for part in ("images", "masks"):
            (folder / part / "train").rename(folder / part / "val")
        monkeypatch.setattr(image_cache, "write_images", None)
        with pytest.raises(
            ConfigError, match=r"the split 'train' is empty \(images in the other splits: test 3, validation 6\)"
        ):
            config(folder).open()

    def test_a_file_that_turns_out_bad_leaves_nothing(self, folder, put, cache_folder):
        put(folder / "masks/train/5.png", np.full((H, W), 9, np.uint8))
        with pytest.raises(
            ConfigError, match=r"masks/train/5.png: contains values that are not classes: 9 \(35 pixels\)"
        ):
            config(folder).open()
        assert list((cache_folder / "images").iterdir()) == []

    def test_all_files_that_turn_out_bad_are_named(self, folder, put):
        for number in (0, 3, 5):
            put(folder / f"masks/train/{number}.png", np.full((H, W), 9, np.uint8))
        with pytest.raises(ConfigError) as raised:
            config(folder).open()
        said = ": contains values that are not classes: 9"
        assert [problem.partition(said)[0][-11:] for problem in raised.value.problems] == [
            "train/0.png", "train/3.png", "train/5.png"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "found"),
    [(1, "only the class 'y' of the 3"), (IGNORED_PIXEL, "none of the 3")],
    ids=["one", "none"],
)
def test_a_training_set_in_which_there_is_nothing_to_tell_apart(folder, put, label, found):
    for number in range(6):
        put(folder / "masks/train" / f"{number}.png", np.full((H, W), label, np.uint8))
    with pytest.raises(ConfigError, match=f"training images of .*masks.* contain {found} classes, but training needs"):
        config(folder).open()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"source": "scene"}, r"unknown image source 'scene'\. Did you mean 'scenes'"),
        ({"size": [0, 5]}, "size.0"),
        ({"max_train": 0}, "max_train"),
        (
            {"splits": {"validation": 0.5, "test": 0.5}},
            "search, validation and test must sum to less than 1: the rest is the training split",
        ),
        ({"splits": {"by": "span"}}, "by: there is no such field"),
        ({"augment": {"flips": 0.5}}, "Did you mean 'flip'"),
    ],
)
def test_wrong_settings(folder, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        config(folder, **settings)


def test_more_training_images_than_there_are(folder):
    with pytest.raises(ConfigError, match=r"data\.max_train is 7, but there are only 6 training images"):
        config(folder, max_train=7).open()


def test_without_a_source_there_is_one_that_needs_nothing():
    data = validate(ImageData, {"source": {"height": 17, "width": 23, "num_train": 3, "num_test": 2}})
    corpus = data.open()
    assert corpus.size == data.row_size() == (17, 23)
    assert corpus.splits["train"].num_images == 3
    assert len(corpus.classes) == len(data.classes()) == 11
    assert corpus.batch(0, 0, range(2), 2).images.shape == (2, 3, 17, 23)
