"""How well pixels are told apart: counts of one confusion matrix, what follows from them, and how boundaries lie."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmeff.data.image_source import IGNORED

# H height, W width, K classes

CORRECT, LABELLED, PREDICTED, BOUNDARY = "correct", "labelled", "predicted", "boundary_f1"
"""Counts of pixels of each class, `correct.road`, and the boundary F1 of an image."""

Labels = NDArray[np.integer]
Masks = NDArray[np.bool_]


def confusion(predicted: Labels, truth: Labels, num_classes: int) -> NDArray[np.int64]:
    """(K, K) pixels by true class (row) and predicted class (column); pixels whose truth is ignored are left out.

    Args:
        predicted: classes in range(K), any shape.
        truth: the same, or IGNORED.
        num_classes: K.
    """
    counted = truth != IGNORED
    places = truth[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def counts_of(matrix: NDArray[np.int64], classes: Sequence[str]) -> dict[str, float]:
    """What of a confusion matrix adds up over images, by name: correct, labelled and predicted pixels of each class."""
    kinds = {CORRECT: matrix.diagonal(), LABELLED: matrix.sum(1), PREDICTED: matrix.sum(0)}
    return {
        f"{kind}.{name}": float(count)
        for kind, counts in kinds.items()
        for name, count in zip(classes, counts, strict=True)
    }


def scores(images: Iterable[Mapping[str, float]], classes: Sequence[str]) -> dict[str, float]:
    """What is reported of a set of images, from the counts of them all together.

    `global_accuracy`: correct pixels of all. `class_accuracy`: recall of a class, mean over classes with labelled pixels.
    `mean_iou`: correct / (labelled + predicted - correct) (Jaccard), mean over classes that are labelled or predicted at
    all. `boundary_f1`: mean over images that have one. Then each class's IoU.
    """
    given = list(images)

    def total(kind: str) -> NDArray[np.float64]:
        return np.array([math.fsum(image[f"{kind}.{name}"] for image in given) for name in classes])

    correct, labelled, predicted = total(CORRECT), total(LABELLED), total(PREDICTED)
    union = labelled + predicted - correct
    iou = np.divide(correct, union, out=np.full(len(classes), np.nan), where=union > 0)
    recall = np.divide(correct, labelled, out=np.full(len(classes), np.nan), where=labelled > 0)
    boundaries = [image[BOUNDARY] for image in given if not math.isnan(image[BOUNDARY])]
    return {
        "mean_iou": _mean(iou),
        "class_accuracy": _mean(recall),
        "global_accuracy": float(correct.sum() / labelled.sum()) if labelled.any() else math.nan,
        "boundary_f1": math.fsum(boundaries) / len(boundaries) if boundaries else math.nan,
        **{f"iou.{name}": float(value) for name, value in zip(classes, iou, strict=True)},
    }


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def boundary_f1(predicted: Labels, truth: Labels, num_classes: int, tolerance: float) -> float:
    """How well the outlines of classes are met (Csurka et al. 2013): the mean F1 over the classes with one in the truth.

    A pixel is on its class's outline if a pixel beside it is labelled and of another class. Precision is the share of
    predicted outline pixels with one of the truth within the tolerance, recall the other way round. What is predicted
    where the truth is ignored does not count.

    Args:
        predicted: (H, W) classes.
        truth: (H, W) classes, or IGNORED.
        num_classes: K.
        tolerance: distance between pixels' centres, in pixels.

    Returns:
        NaN where no class has an outline in the truth.
    """
    counted = truth != IGNORED
    classes = np.arange(num_classes)[:, None, None]
    outlines = [_outlines((labels == classes) & counted, counted) for labels in (predicted, truth)]
    near = [_widened(own, tolerance) for own in outlines]
    ours, theirs = (own.sum((1, 2)) for own in outlines)
    hits, found = ((outlines[0] & near[1]).sum((1, 2)), (outlines[1] & near[0]).sum((1, 2)))
    there = theirs > 0
    if not there.any():
        return math.nan
    precision = hits[there] / np.maximum(ours[there], 1)
    recall = found[there] / theirs[there]
    both = precision + recall
    return float(np.mean(np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)))


def _outlines(masks: Masks, counted: Masks) -> Masks:
    """(K, H, W) masks to the pixels of each that have a counted pixel of another beside them."""
    others = counted & ~masks
    beside = np.zeros_like(masks)
    beside[:, 1:] |= others[:, :-1]
    beside[:, :-1] |= others[:, 1:]
    beside[:, :, 1:] |= others[:, :, :-1]
    beside[:, :, :-1] |= others[:, :, 1:]
    return masks & beside


def _widened(masks: Masks, radius: float) -> Masks:
    """(K, H, W) masks to the pixels within a distance of each."""
    reach = int(radius)
    height, width = masks.shape[1:]
    # pixels to the left of each place: a span of a row holds one where the counts at its ends differ
    counts = np.cumsum(np.pad(masks, ((0, 0), (0, 0), (reach + 1, reach))), axis=2, dtype=np.int32)
    found = np.zeros_like(masks)
    for down in range(min(reach, height - 1) + 1):
        across = int(math.sqrt(radius**2 - down**2))
        left, right = reach - across, reach + across + 1
        near = counts[:, :, right : right + width] > counts[:, :, left : left + width]
        found[:, down:] |= near[:, : height - down]
        found[:, : height - down] |= near[:, down:]
    return found
