"""Scores of segmentation: cases by hand, and against plain code that shares nothing with them."""

import math

import numpy as np
import pytest

from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.tasks.image_metrics import BOUNDARY, boundary_f1, confusion, counts_of, image_counts, scores

X = IGNORED_PIXEL
CLASSES = ("road", "sky", "tree")


def array(*rows):
    return np.array(rows, np.uint8)


def image(predicted, truth, outline=math.nan):
    """What is kept of one image."""
    return counts_of(confusion(predicted, truth, len(CLASSES)), CLASSES) | {BOUNDARY: outline}


# -- counts


PREDICTED, TRUTH = array([0, 0], [1, 1]), array([0, 1], [1, X])


def test_a_confusion_by_hand():
    assert confusion(PREDICTED, TRUTH, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert counts_of(confusion(PREDICTED, TRUTH, 3), CLASSES) == {
        "correct.road": 1, "correct.sky": 1, "correct.tree": 0,
        "labelled.road": 1, "labelled.sky": 2, "labelled.tree": 0,
        "predicted.road": 2, "predicted.sky": 1, "predicted.tree": 0,
    }  # fmt: skip


def test_scores_by_hand():
    found = scores([image(PREDICTED, TRUTH, 0.25)], CLASSES)
    assert found["iou.road"] == 1 / 2  # one right of the two that are road or said to be
    assert found["iou.sky"] == 1 / 2
    assert math.isnan(found["iou.tree"])  # neither there nor predicted: it counts nowhere
    assert found["mean_iou"] == 1 / 2
    assert found["class_accuracy"] == (1 / 1 + 1 / 2) / 2
    assert found["global_accuracy"] == 2 / 3
    assert found["boundary_f1"] == 0.25


def test_a_class_that_is_predicted_in_vain_has_an_iou_of_nothing_and_no_accuracy():
    found = scores([image(array([2, 1], [1, 1]), array([1, 1], [1, X]))], CLASSES)
    assert (found["iou.tree"], found["iou.sky"]) == (0, 2 / 3)
    assert found["mean_iou"] == 1 / 3
    assert found["class_accuracy"] == found["global_accuracy"] == 2 / 3


def test_images_are_counted_together_but_for_their_outlines():
    """A mean of each image's IoU would be 3/4 for sky."""
    all_sky = image(array([1, 1], [1, 1]), array([1, 1], [1, 1]), math.nan)
    found = scores([image(PREDICTED, TRUTH, 0.2), all_sky, image(PREDICTED, TRUTH, 0.6)], CLASSES)
    assert found["iou.sky"] == (1 + 4 + 1) / (2 + 4 + 2)
    assert found["global_accuracy"] == (2 + 4 + 2) / (3 + 4 + 3)
    assert found["boundary_f1"] == pytest.approx(0.4)  # of the images that have one


def test_nothing_is_known_of_pixels_without_labels():
    found = scores([image(PREDICTED, array([X, X], [X, X]))], CLASSES)
    assert all(math.isnan(value) for value in found.values())
    assert all(math.isnan(value) for value in scores([], CLASSES).values())


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_random_pixels(seed):
    rng = np.random.default_rng(seed)
    truths = rng.choice([0, 1, 2, 3, X], (5, 6, 7), p=[0.5, 0.2, 0.1, 0.0, 0.2])
    predictions = rng.choice(4, (5, 6, 7), p=[0.4, 0.3, 0.1, 0.2])
    pairs = [(int(t), int(p)) for t, p in zip(truths.ravel(), predictions.ravel(), strict=True) if t != X]
    names = ("a", "b", "c", "d")
    ious, recalls = [], []
    for own in range(4):
        both = sum(t == own and p == own for t, p in pairs)
        either = sum(own in (t, p) for t, p in pairs)
        there = sum(t == own for t, _ in pairs)
        ious.append(both / either)
        recalls += [both / there] if there else []
    images = [
        counts_of(confusion(p, t, 4), names) | {BOUNDARY: math.nan} for p, t in zip(predictions, truths, strict=True)
    ]
    found = scores(images, names)
    assert [found[f"iou.{name}"] for name in names] == pytest.approx(ious)
    assert found["mean_iou"] == pytest.approx(sum(ious) / 4)
    assert found["class_accuracy"] == pytest.approx(sum(recalls) / 3)
    assert found["global_accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))


# -- outlines


def halves(left, height=4, width=9):
    """Class 0 on the left, class 1 from a column on."""
    return np.repeat((np.arange(width) >= left)[None].astype(np.uint8), height, axis=0)


@pytest.mark.parametrize(
    ("shift", "tolerance", "expected"),
    [(0, 0.0, 1), (1, 0.9, 0), (1, 1.0, 1), (-1, 1.0, 1), (2, 1.9, 0), (2, 2.0, 1), (-3, 2.5, 0)],
)
def test_an_outline_that_is_shifted_is_met_within_the_tolerance(shift, tolerance, expected):
    assert boundary_f1(halves(4 + shift), halves(4), 2, tolerance) == expected


def test_a_shift_is_measured_as_the_crow_flies():
    truth = np.kron(np.eye(2, dtype=np.uint8), np.ones((4, 4), np.uint8))
    shifted = np.roll(truth, (1, 1), axis=(0, 1))
    corner = array([0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])
    moved = np.roll(corner, (1, 1), axis=(0, 1))
    assert boundary_f1(moved, corner, 2, 1.0) < 1 == boundary_f1(moved, corner, 2, 1.5)
    assert boundary_f1(truth, truth, 2, 0.0) == 1 > boundary_f1(shifted, truth, 2, 0.0)


def test_an_outline_by_hand():
    """Class 0: the truth's is pixel 1, ours 0 and 4, of which 0 is near. Class 1: pixel 2, ours 1 and 3, both near."""
    truth, ours = array([0, 0, 1, 1, 1]), array([0, 1, 1, 1, 0])
    precision, recall = 1 / 2, 1
    first = 2 * precision * recall / (precision + recall)
    assert boundary_f1(ours, truth, 2, 1.0) == pytest.approx((first + 1) / 2)
    assert boundary_f1(ours, truth, 5, 1.0) == pytest.approx((first + 1) / 2)  # classes without an outline do not count


def test_an_outline_that_is_not_predicted_is_not_met():
    assert boundary_f1(array([0, 0, 0]), array([0, 1, 1]), 2, 5.0) == 0
    assert boundary_f1(array([0, 2, 1, 1]), array([0, 0, 1, 1]), 3, 0.0) == pytest.approx(1 / 2)


def test_beside_what_is_ignored_there_is_no_outline():
    assert math.isnan(boundary_f1(array([0, 0, 0, 1, 1]), array([0, 0, X, 1, 1]), 2, 1.0))
    assert math.isnan(boundary_f1(array([0, 1]), array([X, X]), 2, 1.0))
    assert math.isnan(boundary_f1(array([0, 1]), array([1, 1]), 2, 1.0))


def test_what_is_predicted_where_the_truth_is_ignored_does_not_count():
    truth = array([0, 0, 1, 1, X, X])
    for end in ([1, 1], [0, 1], [0, 0], [2, 0]):
        assert boundary_f1(array([0, 0, 1, 1, *end]), truth, 3, 0.0) == 1


def plain_boundary_f1(predicted, truth, num_classes, tolerance):
    height, width = truth.shape
    places = [(y, x) for y in range(height) for x in range(width) if truth[y, x] != X]

    def outline(labels, own):
        beside = [(0, 1), (1, 0), (0, -1), (-1, 0)]
        return [
            (y, x)
            for y, x in places
            if labels[y, x] == own and any((y + a, x + b) in places and labels[y + a, x + b] != own for a, b in beside)
        ]

    found = []
    for own in range(num_classes):
        ours, theirs = outline(predicted, own), outline(truth, own)
        if theirs:
            precise = [any(math.dist(p, q) <= tolerance for q in theirs) for p in ours]
            met = [any(math.dist(p, q) <= tolerance for q in ours) for p in theirs]
            right = sum(precise) / len(precise) if precise else 0
            share = sum(met) / len(met)
            found.append(2 * right * share / (right + share) if right + share else 0)
    return sum(found) / len(found)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 2.3])
def test_outlines_of_random_pixels(tolerance):
    rng = np.random.default_rng(0)
    for _ in range(4):
        coarse = rng.choice([0, 1, 2, X], (2, 4, 5), p=[0.4, 0.3, 0.2, 0.1])
        truth = np.kron(coarse[0], np.ones((3, 3), int))
        predicted = np.where(np.kron(coarse[1], np.ones((3, 3), int)) == X, 0, np.kron(coarse[1], np.ones((3, 3), int)))
        expected = plain_boundary_f1(predicted, truth, 3, tolerance)
        assert boundary_f1(predicted, truth, 3, tolerance) == pytest.approx(expected)


# -- all of it on one drawing


DRAWN = array([0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, X], [0, 0, 0, 0, X])
ASIDE = array([0, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0])
"""A square of two by two pixels, and the same a pixel to the right, where two pixels are ignored."""


@pytest.mark.parametrize(
    ("tolerance", "outline"),
    [
        # The square: two of four pixels are met, either way. The ground: of its outline there are eight pixels, of which
        # two are met; of the other's seven, since one of eight is ignored.
        (0.15, (1 / 2 + 2 * 2 / (7 + 8)) / 2),
        (0.16, 1),  # of a diagonal of 6.4 pixels: more than one
    ],
)
def test_a_drawing_by_hand(tolerance, outline):
    found = scores([image_counts(ASIDE, DRAWN, CLASSES, tolerance)], CLASSES)
    assert (found["iou.road"], found["iou.sky"]) == (12 / (14 + 14 - 12), 2 / (4 + 4 - 2))
    assert math.isnan(found["iou.tree"])
    assert found["mean_iou"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert found["class_accuracy"] == pytest.approx((12 / 14 + 2 / 4) / 2)
    assert found["global_accuracy"] == 14 / 18
    assert found["boundary_f1"] == pytest.approx(outline)
