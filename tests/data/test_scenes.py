import hashlib
import itertools
from functools import partial

import numpy as np
import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import scenes
from llmeff.data.scenes import CLASSES, Scenes

SHARES = (17.44, 24.19, 1.02, 33.10, 4.67, 10.11, 1.22, 1.17, 6.11, 0.67, 0.30)
CAMVID = dict(zip(CLASSES, SHARES, strict=True))
"""Per cent of the labelled pixels of the 367 training images, counted in the set of 240 x 180."""


def pairs(count, split="train", **settings):
    found = (image.read() for image in Scenes(**settings).images() if image.split == split)
    images, labels = zip(*itertools.islice(found, count), strict=True)
    return np.stack(images), np.stack(labels)


@pytest.fixture(scope="module")
def sample():
    """Half of the default training split."""
    return pairs(200)


@pytest.fixture
def street():
    return scenes._Street(scenes._generator("street"), scenes._generator("noise"), 96, 128)


def test_an_image_is_the_same_on_every_machine():
    image, labels = next(Scenes(height=48, width=64).images()).read()
    assert [hashlib.sha256(array.tobytes()).hexdigest()[:32] for array in (image, labels)] == [
        "c7c05cc02a173a7f98d366bc844e1ca1",
        "c496b43f6306d5f10ac050f9b396e07a",
    ]


def test_everything_that_is_drawn_is_the_same_on_every_machine():
    images, labels = pairs(40, num_train=40, height=24, width=32)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:32] == "c499ec4ae17b38014677ac254c33c138"
    assert set(np.unique(labels)) == {*range(len(CLASSES)), IGNORED_PIXEL}


def test_an_image_is_the_same_each_time_and_in_any_order():
    source = Scenes(num_train=2, num_search=1, num_validation=1, num_test=1, height=40, width=60)
    forth = [image.read() for image in source.images()]
    back = [image.read() for image in reversed(list(source.images()))][::-1]
    for (image, labels), (again, labels_again) in zip(forth, back, strict=True):
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(labels, labels_again)


def test_units_splits_and_size():
    source = Scenes(num_train=2, num_search=1, num_validation=0, num_test=1)
    assert [(image.unit, image.split) for image in source.images()] == [
        ("train/00000", "train"),
        ("train/00001", "train"),
        ("search/00000", "search"),
        ("test/00000", "test"),
    ]
    assert source.classes() == tuple(CAMVID)
    assert source.image_size() == (96, 128)


def test_no_two_images_are_alike_in_or_between_splits_and_seeds():
    count = {f"num_{split}": 3 for split in ("train", "search", "validation", "test")}
    seen = [
        image.read()[1].tobytes()
        for seed in (0, 1)
        for image in Scenes(height=24, width=32, seed=seed, void=0, **count).images()
    ]
    assert len(set(seen)) == len(seen) == 24


def test_the_number_of_images_changes_none_of_them():
    few, many = pairs(3, num_train=3, num_test=1, height=24, width=32), pairs(3, num_test=9, height=24, width=32)
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_fingerprint_is_of_all_that_the_images_follow_from(monkeypatch):
    assert Scenes().fingerprint() == Scenes().fingerprint()
    others = [{"seed": 1}, {"height": 97}, {"width": 97}, {"num_train": 9}, {"num_test": 9}, {"void": 0.1}]
    seen = {Scenes(**settings).fingerprint() for settings in [{}, *others]}
    monkeypatch.setattr(scenes, "EDITION", scenes.EDITION + 1)
    assert len(seen | {Scenes().fingerprint()}) == len(others) + 2


@pytest.mark.parametrize("size", [(1, 1), (17, 23), (23, 17), (5, 200), (180, 240)])
def test_any_size(size):
    images, labels = pairs(10, height=size[0], width=size[1])
    assert images.shape == (10, *size, 3)
    assert labels.shape == (10, *size)
    assert images.dtype == labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {*range(len(CLASSES)), IGNORED_PIXEL}


def test_a_scene_is_drawn_finer_at_twice_the_size():
    _, coarse = pairs(8, height=96, width=128, void=0)
    _, fine = pairs(8, height=192, width=256, void=0)
    assert np.mean(fine[:, ::2, ::2] == coarse) > 0.93


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_as_rare_as_in_camvid(sample, name):
    labels = sample[1][sample[1] != IGNORED_PIXEL]
    share = 100 * np.mean(labels == CLASSES.index(name))
    assert CAMVID[name] / 1.6 < share < CAMVID[name] * 1.6


def test_void_is_a_share_of_the_pixels_beside_another_class():
    _, labels = pairs(10, void=0)
    assert IGNORED_PIXEL not in labels
    beside = np.stack([scenes._beside_another(one) for one in labels])
    _, half = pairs(10, void=0.5)
    np.testing.assert_array_equal(half[half != IGNORED_PIXEL], labels[half != IGNORED_PIXEL])
    assert not np.any((half == IGNORED_PIXEL) & ~beside)
    assert np.mean((half == IGNORED_PIXEL)[beside]) == pytest.approx(0.5, abs=0.02)
    _, all_of_them = pairs(10, void=1)
    np.testing.assert_array_equal(all_of_them == IGNORED_PIXEL, beside)


def test_beside_another_is_of_four_neighbours():
    labels = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], np.uint8)
    expected = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(scenes._beside_another(labels), np.array(expected, bool))


def test_most_images_hold_a_pole_at_most_two_pixels_wide_and_an_eighth_of_the_height_tall():
    _, labels = pairs(50, void=0)
    pole = np.pad(labels == scenes.POLE, ((0, 0), (0, 0), (1, 1)))
    three = pole[..., :-2] & pole[..., 1:-1] & pole[..., 2:]
    wide = np.pad(three, ((0, 0), (0, 0), (1, 1)))
    wide = wide[..., :-2] | wide[..., 1:-1] | wide[..., 2:]
    thin = pole[..., 1:-1] & ~wide
    tall = np.lib.stride_tricks.sliding_window_view(thin, 12, axis=1).all(-1)
    assert np.mean(tall.any((1, 2))) > 0.7


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearer_covers_the_farther_in_whatever_order_they_are_given(street, order):
    regions = {2: street.front(-1, 1, 0, 2, 8), 5: street.front(-0.5, 3, 0, 4, 16), 7: street.front(0, 4, 0, 9, 32)}
    z = {2: 8.0, 5: 16.0, 7: 32.0}
    colour = scenes._rgb(0.5, 0.5, 0.5)
    expected = np.zeros((96, 128), int)
    for label in (7, 5, 2):
        expected[regions[label].place] = label
    things = [(z[label], partial(street.paint, region, label, colour)) for label, region in regions.items()]
    scenes._paint(things[::order])
    np.testing.assert_array_equal(street.label, expected)
    assert set(np.unique(expected)) == {0, 2, 5, 7}


def test_in_whole_scenes_nothing_in_the_street_is_hidden_by_what_is_farther(monkeypatch):
    """But for the length of a car, whose depth is that of the part that is seen."""
    standing = [scenes.POLE, scenes.SIGN, scenes.CAR, scenes.PEDESTRIAN, scenes.BICYCLIST]
    paint = scenes._Canvas.paint

    def checked(street, region, label, *args, **kwargs):
        hidden = np.isin(street.label[region.place], standing) & region.mask
        assert np.all((street.depth[region.place] > region.z - 9)[hidden])
        painted.append(label)
        return paint(street, region, label, *args, **kwargs)

    painted = []
    monkeypatch.setattr(scenes._Canvas, "paint", checked)
    pairs(20)
    assert set(painted) == set(range(len(CLASSES)))


def test_a_place_is_seen_where_perspective_puts_it(street):
    street.focal, street.eye_m, street.horizon, street.vanishing = 100.0, 1.5, 40.0, 60.0
    assert street.at(0, 1.5, 20) == (60, 40)
    assert street.at(2, 0, 10) == (80, 55)
    region = street.front(-1, 1, 0, 2, 10)
    assert region.place == (slice(35, 55), slice(50, 70))
    region = street.ground(-2, 2, 5, 10)
    assert region.place == (slice(55, 70), slice(20, 100))
    assert region.mask[0].sum() == pytest.approx(400 / 10, abs=2)
    assert region.mask[-1].sum() == pytest.approx(400 / 5, abs=6)
    region = street.side(2, 0, 3, 5, 10)
    assert region.place == (slice(10, 70), slice(80, 100))
    assert region.mask[:, 0].sum() == pytest.approx(300 / 10, abs=2)
    assert region.mask[:, -1].sum() == pytest.approx(300 / 5, abs=2)


def test_an_ellipse_holds_the_pixels_whose_centres_are_in_it_or_on_its_border_to_the_right_or_below(street):
    expected = [".....", ".###.", ".####", ".###.", "..#.."]
    region = street.ellipse(2.5, 2.5, 2, 2, 1.0)
    found = np.zeros((5, 5), bool)
    found[region.place] = region.mask
    assert ["".join(np.where(row, "#", ".")) for row in found] == expected


def test_colour_alone_tells_little(sample):
    """The commonest class of each of 4096 colours in the training images, asked of others."""
    images, labels = pairs(40, "validation")

    def codes(images):
        return (images >> 4).astype(int) @ np.array([256, 16, 1])

    counts = np.zeros((4096, 256), int)
    np.add.at(counts, (codes(sample[0]), sample[1]), 1)
    guess = counts[:, : len(CLASSES)].argmax(1)[codes(images)]
    guess[labels == IGNORED_PIXEL] = IGNORED_PIXEL
    pairs_of = [(guess == label, labels == label) for label in range(len(CLASSES))]
    overlaps = [np.sum(one & other) / np.sum(one | other) for one, other in pairs_of]
    assert np.mean(overlaps) < 0.25


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"height": 0}, "height"),
        ({"num_train": 0}, "num_train"),
        ({"num_test": -1}, "num_test"),
        ({"void": 1.5}, "void"),
        ({"num_tests": 3}, "num_test"),
    ],
)
def test_wrong_settings(given, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(Scenes, given)
