import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from llmeff.core.config import ConfigError, validate
from llmeff.data.augment import AugmentConfig

SHAPES = [(5, 7), (8, 6), (1, 3)]


def positions(shape):
    """An image whose red and green say where a pixel is, and labels that say it too, unlike for every pixel."""
    down, right = np.indices(shape, dtype=np.uint8)
    return np.stack([down, right, np.full_like(down, 9)], axis=-1), down * np.uint8(shape[1]) + right


def apply(shape, row=0, seed=0, step=0, **options):
    return AugmentConfig(**options).apply(*positions(shape), seed, step, row)


def whole(placed, shape):
    """The row with its padding."""
    image, labels = np.zeros((*shape, 3), placed.image.dtype), np.full(shape, 255)
    image[placed.rows, placed.columns], labels[placed.rows, placed.columns] = placed.image, placed.labels
    return image, labels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"scale": (1.0, 1.0)}, {"flip": 0.0, "colour": 0.0}])
def test_nothing_is_done_unless_it_is_asked_for(shape, options):
    image, labels = whole(apply(shape, **options), shape)
    assert np.array_equal(image, positions(shape)[0])
    assert np.array_equal(labels, positions(shape)[1])


ALL = {"flip": 0.5, "scale": (0.5, 2.0), "crop": (4, 3), "colour": 0.3}


def test_a_row_is_a_function_of_seed_step_and_row():
    first, again = apply((9, 9), **ALL), apply((9, 9), **ALL)
    assert np.array_equal(first.image, again.image)
    others = [apply((9, 9), **ALL, **{what: 1}) for what in ("row", "seed", "step")]
    others.append(apply((9, 9), **ALL, row=10, step=1))
    others.append(apply((9, 9), **ALL, row=0, step=11))
    found = [first, *others]
    assert all(not np.array_equal(a.image, b.image) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flip_exchanges_left_and_right(shape):
    placed, (image, labels) = apply(shape, flip=1.0), positions(shape)
    assert np.array_equal(placed.image, image[:, ::-1])
    assert np.array_equal(placed.labels, labels[:, ::-1])


def test_flips_are_as_frequent_as_asked():
    flipped = sum(apply((1, 2), row=row, flip=0.3).labels[0, 0] == 1 for row in range(1000))
    assert abs(flipped - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7)


@pytest.mark.parametrize("crop", [(3, 4), (5, 7), (6, 9), (3, 9), (1, 1)])
def test_a_crop_is_any_part_of_the_image_and_what_it_has_beyond_is_padding(crop):
    padded = np.pad(positions((5, 7))[1].astype(int), ((9, 9), (9, 9)), constant_values=255)
    windows = np.lib.stride_tricks.sliding_window_view(padded, crop)
    inside = [min(have, want) for have, want in zip((5, 7), crop, strict=True)]
    spans = [(min(0, have - want), max(0, have - want)) for have, want in zip((5, 7), crop, strict=True)]
    allowed = {
        windows[9 + down, 9 + right].tobytes()
        for down, right in itertools.product(*(range(low, high + 1) for low, high in spans))
    }
    seen = set()
    for row in range(40 * len(allowed)):
        placed = apply((5, 7), row=row, crop=crop)
        assert placed.labels.shape == tuple(inside)
        assert np.array_equal(placed.image[..., 0] * np.uint8(7) + placed.image[..., 1], placed.labels)
        seen.add(whole(placed, crop)[1].tobytes())
    assert seen == allowed


@pytest.mark.parametrize("crop", [None, (12, 10), (31, 37)])
@pytest.mark.parametrize("scale", [(0.4, 0.4), (0.5, 2.0), (3.0, 3.0)])
def test_labels_move_with_the_image_when_it_is_zoomed(scale, crop):
    """Red grows by 6 a column and green by 6 a row; classes are bands of four columns."""
    shape = (23, 29)
    down, right = np.indices(shape)
    image = np.stack([6 * right, 6 * down, 0 * down], axis=-1).astype(np.uint8)
    labels = (right // 4).astype(np.uint8)
    config, shares = AugmentConfig(scale=scale, crop=crop, flip=0.5), []
    for row in range(20):
        placed = config.apply(image, labels, 0, 0, row)
        size = crop or shape
        assert placed.labels.shape == placed.image.shape[:2]
        assert whole(placed, size)[1].shape == size
        x = (
            placed.image[..., 0] / 6 + 0.5
        )  # where the pixel was, but for rounding, and for the rim, beyond which is nothing
        told = (np.abs(x - 4 * np.round(x / 4)) > 0.6) & (x > 3) & (x < shape[1] - 3)
        shares.append(told.mean())
        assert np.array_equal(placed.labels[told], x[told] // 4)
    assert np.mean(shares) > 0.25


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.9, 2.0])
def test_a_part_of_the_zoomed_image_is_zoomed_as_the_whole_is(scale):
    shape, crop = (23, 29), (9, 11)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = rng.integers(0, 9, shape, dtype=np.uint8)
    size = [round(side * scale) for side in reversed(shape)]
    all_labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    all_pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(all_labels, crop)
    for row in range(20):
        placed = AugmentConfig(scale=(scale, scale), crop=crop).apply(image, labels, 0, 0, row)
        ((down, right),) = np.argwhere((windows == placed.labels).all(axis=(2, 3)))
        part = all_pixels[down : down + crop[0], right : right + crop[1]]
        assert np.abs(part - placed.image).max() <= 1


def test_what_becomes_smaller_is_placed_anywhere():
    places = set()
    for row in range(200):
        placed = apply((8, 6), row=row, scale=(0.5, 0.5))
        assert placed.labels.shape == (4, 3)
        places.add((placed.rows.start, placed.columns.start))
    assert places == set(itertools.product(range(5), range(4)))


def test_the_zoom_is_uniform_in_its_logarithm():
    config = AugmentConfig(scale=(0.5, 8.0), crop=(200, 200))
    labels = np.zeros((20, 20), np.uint8)
    image = np.zeros((20, 20, 3), np.uint8)
    sides = [config.apply(image, labels, 0, 0, row).labels.shape[0] for row in range(1000)]
    assert min(sides) == 10
    assert max(sides) >= 150
    for quantile, side in ((0.25, 20), (0.5, 40), (0.75, 80)):
        assert abs(np.mean(np.array(sides) <= side) - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / 1000)


def test_a_zoom_to_nothing_leaves_a_pixel():
    assert apply((5, 7), scale=(0.01, 0.01)).labels.shape == (1, 1)


def test_no_option_changes_what_another_does():
    for row in range(20):
        base = apply((9, 8), row=row, flip=0.5, crop=(4, 5))
        coloured = apply((9, 8), row=row, flip=0.5, crop=(4, 5), colour=0.2)
        assert np.array_equal(base.labels, coloured.labels)
        flip = apply((9, 8), row=row, flip=0.5)
        assert np.diff(base.labels[0].astype(int))[0] == np.diff(flip.labels[0].astype(int))[0]


def test_colours_are_changed_as_pillow_does():
    image = np.random.default_rng(0).integers(90, 150, (15, 17, 3), dtype=np.uint8)
    found = []
    for row in range(50):
        changed = AugmentConfig(colour=0.3).apply(image, image[..., 0], 0, 0, row).image
        found.append(_fit(image, changed))
        expected = Image.fromarray(image)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhance, factor in zip(kinds, found[-1], strict=True):
            expected = enhance(expected).enhance(factor)
        # Each of Pillow's three steps cuts off up to 1, which the next multiplies by up to 1.3.
        assert np.abs(np.asarray(expected) - changed).max() < 4
    low, high = np.min(found, axis=0), np.max(found, axis=0)
    assert (low > 0.699).all()
    assert (low < 0.75).all()
    assert (high > 1.25).all()
    assert (high < 1.301).all()


def _fit(image, changed):
    """Brightness, contrast and saturation that take an image to another where nothing is cut off."""
    weights = np.array([0.299, 0.587, 0.114])
    grey, new_grey = image @ weights, changed.astype(float) @ weights
    brightness = new_grey.mean() / grey.mean()
    slope = np.polyfit(grey.ravel(), new_grey.ravel(), 1)[0]
    chroma, new_chroma = image - grey[..., None], changed - new_grey[..., None]
    return brightness, slope / brightness, (chroma * new_chroma).sum() / (chroma**2).sum() / slope


def test_colours_stay_in_their_range():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for row in range(20):
        changed = AugmentConfig(colour=0.9).apply(image, image[..., 0], 0, 0, row).image
        assert changed.min() >= 0
        assert changed.max() <= 255


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"scale": [2.0, 0.5]}, r"scale must be \(low, high\), but the first value, 2.0, is above the second, 0.5"),
        ({"scale": [0.0, 0.5]}, "scale.0"),
        ({"scale": 0.5}, "scale"),
        ({"crop": [0, 5]}, "crop.0"),
        ({"crop": 5}, "crop"),
        ({"flip": 1.5}, "flip"),
        ({"colour": 1.0}, "colour"),
        ({"color": 0.5}, "Did you mean 'colour'"),
    ],
)
def test_wrong_settings(given, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(AugmentConfig, given)
